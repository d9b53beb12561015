from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY, Group, Program, dump_settings, load_settings, preset, read_section
from pipelines.config import BuildSettings


class Views(Group):
    """Views."""

    size: int = Field(512, gt=0)
    """Side of a view in px."""
    kind: Literal["square", "round"] = "square"
    """Its form."""


class Settings(Program):
    """A program."""

    out: Path
    """Where to."""
    views: Views = Views()


@pytest.fixture
def config(tmp_path):
    """Writes a config file; with another text, one in a folder of its own, whose base the first may be."""

    def write(text: str, own: str = "") -> str:
        path = tmp_path / ("base.yaml" if own else "config.yaml")
        path.write_text(text)
        if own:
            path = tmp_path / "own" / "config.yaml"
            path.parent.mkdir()
            path.write_text(own)
        return str(path)

    return write


def test_command_line_goes_over_file_goes_over_defaults(config):
    path = config("build:\n  out: a\n  views: {size: 64}\ntrain: {anything: 1}\n")
    settings = load_settings(Settings, "build", ["--config", path, "--views.kind", "round"])
    assert (settings.out, settings.views.size, settings.views.kind) == (Path("a"), 64, "round")
    assert load_settings(Settings, "build", ["--config", path, "--views.size", "32"]).views.size == 32
    assert load_settings(Settings, "build", ["--config", config(dump_settings(settings, "build"))]) == settings


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("build: {out: a, views: {siez: 3}}", [], ["config.yaml", "build.views.siez", "did you mean `views.size`"]),
        ("build: {out: a, views: {size: big}}", [], ["config.yaml", "build.views.size", "valid integer", "'big'"]),
        ("build: {out: a, views: {size: 0}}", [], ["build.views.size", "greater than 0"]),
        ("buld: {out: a}", [], ["no section `buld`", "did you mean `build`"]),
        ("build: {out: a}", ["--views.kind", "oval"], ["--views.kind", "'square' or 'round'"]),
        ("build: {out: a}", ["--views.sizes", "1"], ["--views.sizes", "did you mean `--views.size`"]),
        ("build: {out: a, views: {size: 8}}", ["--views.size", "-8"], ["--views.size: input should be greater than 0"]),
        ("build: {views: {size: 1}}", [], ["build.out", "--out"]),
        ("build: [1, 2]", [], ["section `build`", "list"]),
        ("build: {out: [", [], ["not a YAML file"]),
    ],
)
def test_what_is_wrong_is_said_on_one_line_with_its_place(config, text, options, parts):
    with pytest.raises(InputError) as caught:
        load_settings(Settings, "build", ["--config", config(text), *options])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_file_goes_over_its_base_key_by_key(config, capsys):
    base = "build: {out: a, views: {size: 64, kind: round}}\ntrain: {out: c}\n"
    path = config(base, "base: ../base.yaml\nbuild: {views: {size: 32}}\n")
    settings = load_settings(Settings, "build", ["--config", path])
    assert (settings.out, settings.views.size, settings.views.kind) == (Path("a"), 32, "round")
    assert capsys.readouterr().out == f"settings: {path} over {Path(path).parent.parent / 'base.yaml'}\n"
    assert load_settings(Settings, "train", ["--config", path]) == Settings(out=Path("c"))
    assert load_settings(Settings, "build", ["--config", path, "--views.size", "8"]).views.size == 8


def test_a_base_has_a_base_and_a_null_goes_over_a_value_but_an_empty_group_says_nothing(config, tmp_path):
    own = "base: ../base.yaml\nbuild: {out: b, views: , label: }"
    path = config("base: first.yaml\nbuild: {label: x, views: {kind: round}}", own)
    (tmp_path / "first.yaml").write_text("build: {out: a, views: {size: 64, kind: square}}")
    assert read_section(Path(path), "build") == {"out": "b", "views": {"size": 64, "kind": "round"}, "label": None}


def test_a_null_takes_out_a_group_that_may_be_left_out(config):
    class Whole(Program):
        """A program."""

        out: Path = Path("a")
        """Where to."""
        views: Views | None = None
        """Views, if any."""

    path = config("build: {views: {size: 64}}", "base: ../base.yaml\nbuild: {views: null}")
    assert load_settings(Whole, "build", ["--config", path]).views is None
    Path(path).write_text("base: ../base.yaml\nbuild: {views: {kind: round}}")
    assert load_settings(Whole, "build", ["--config", path]).views == Views(size=64, kind="round")


@pytest.mark.parametrize(
    ("base", "own", "parts"),
    [
        ("", "base: base.yaml", ["own/config.yaml: its base", "own/base.yaml is not there", "counts from the folder"]),
        ("base: own/config.yaml", "base: ../base.yaml", ["base.yaml: its base leads back", "config.yaml -> ", "take one"]),
        ("", "base: config.yaml", ["its base leads back", "config.yaml -> "]),
        ("", "base: [1]", ["own/config.yaml: `base` must be the path", "list"]),
        ("buld: {}", "base: ../base.yaml", ["base.yaml: no section `buld`", "did you mean `build`"]),
        ("build: [", "base: ../base.yaml", ["base.yaml: not a YAML file"]),
        ("build: {out: a, views: {size: 0}}", "base: ../base.yaml\nbuild: {out: b}", ["base.yaml: `build.views.size`"]),
        ("build: {out: a}", "base: ../base.yaml\nbuild: {views: {size: 0}}", ["own/config.yaml: `build.views.size`"]),
        ("build: {out: a, views: 3}", "base: ../base.yaml\nbuild:", ["/base.yaml: `build.views`"]),
        ("", "bases: ../base.yaml", ["no section `bases`", "did you mean `base`"]),
    ],
)
def test_what_is_wrong_with_a_base_is_said_of_the_file_that_says_it(config, base, own, parts):
    with pytest.raises(InputError) as caught:
        load_settings(Settings, "build", ["--config", config(base, own)])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message.replace("own/../", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", "{path}"], "{path}"),
        (["--config={path}"], "{path}"),
        ([], "{path}, as no --config is given (--config none reads no file)"),
        (["--config", "none"], "no config file, plain defaults"),
    ],
)
def test_the_first_line_says_which_file_was_read(config, capsys, options, said):
    """Also where something in it is wrong."""
    path = config("build: {views: {kind: round}}")
    options = [option.format(path=path) for option in options]
    with pytest.raises(InputError, match=r"`build\.out` is not set"):
        load_settings(Settings, "build", options, Path(path))
    assert capsys.readouterr().out == f"settings: {said.format(path=path)}\n"
    settings = load_settings(Settings, "build", [*options, "--out", "a"], Path(path))
    assert settings == Settings(out=Path("a"), views=Views(kind="square" if "none" in options else "round"))


def test_of_many_ranks_one_says_it(config, capsys, monkeypatch):
    path = config("build: {out: a}")
    for rank in ("0", "1", "7"):
        monkeypatch.setenv("RANK", rank)
        load_settings(Settings, "build", ["--config", path])
    assert capsys.readouterr().out == f"settings: {path}\n"


def test_a_preset_is_found_from_anywhere_by_its_path_in_the_project_and_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for named in ("tiny", "configs/tiny.yaml", str(preset("tiny"))):
        assert read_section(Path(named), "build")["views"]["size"] == 128
    (tmp_path / "tiny").write_text("build: {views: {size: 64}}")
    assert read_section(Path("tiny"), "build")["views"]["size"] == 64, "a file that is here goes first"


def test_a_missing_config_file_is_named_with_the_presets():
    names = ", ".join(sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml")))
    assert {"coco", "lora", "open_images", "tiny"} <= set(names.split(", "))
    told = rf"nowhere\.yaml: no such config file; presets, by name: {names}"
    with pytest.raises(InputError, match=told):
        load_settings(Settings, "build", ["--config", "nowhere.yaml"])


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(BuildSettings, "build", ["--help"], preset("tiny"))
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for explained in ("--views.size", "Side of a view in px", "--masks.jitter", "--config FILE", "--config none reads no file"):
        assert explained in text


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads(path):
    assert load_settings(BuildSettings, "build", ["--config", str(path)]).seed == 0
