from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from pipelines.config import BuildSettings
from schemas.errors import InputError
from schemas.settings import REPOSITORY, Group, Program, dump_settings, load_settings, preset


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
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_command_line_goes_over_file_goes_over_defaults(config):
    path = config("build:\n  out: a\n  views: {size: 64}\ntrain: {anything: 1}\n")
    settings = load_settings(Settings, "build", ["--config", path, "--views.kind", "round"])
    assert (settings.out, settings.views.size, settings.views.kind) == (Path("a"), 64, "round")
    assert load_settings(Settings, "build", ["--config", path, "--views.size", "32"]).views.size == 32


def test_dumped_settings_read_back_equal(config):
    settings = Settings(out=Path("b"), views=Views(size=96))
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


def test_a_missing_config_file_is_named():
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such config file"):
        load_settings(Settings, "build", ["--config", "nowhere.yaml"])


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(BuildSettings, "build", ["--help"], preset("tiny"))
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for explained in ("--views.size", "Side of a view in px", "--masks.jitter", "--config FILE"):
        assert explained in text


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads(path):
    assert load_settings(BuildSettings, "build", ["--config", str(path)]).seed == 0
