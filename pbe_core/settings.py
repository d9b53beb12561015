"""Settings: one YAML file with a section for each program, overridden on the command line.

    build:                  # read by pipelines/build.py
      out: data/tiny/dataset
    train:                  # read by pbe_train/train.py
      steps: 2000

A file may name another one that it changes; its own values go over those of the base, key by key through all groups:

    base: ../open_images.yaml   # relative to the folder of the file that says so
    train:
      condition_dropout: 0

Keys are typed by pydantic models; `--help` prints each with its default and meaning; `--views.size 256` overrides one.
A key that does not exist is an error, never ignored. The first line that a program prints says which file was read;
`--config none` reads none.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from pbe_core.errors import InputError

SECTIONS = ("build", "train")
BASE = "base"
NO_CONFIG = "none"
REPOSITORY = Path(__file__).resolve().parent.parent
"""The folder that holds the packages: the checkout or, of an installed wheel, Python's folder of packages."""
PRESETS = REPOSITORY / "configs"

ProgramType = TypeVar("ProgramType", bound="Program")


class Group(BaseModel):
    """A group of settings. Attribute docstrings are the help texts; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class Program(BaseSettings):
    """All settings of one program. Environment variables are not read: a run must be told by its file and command line."""

    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        frozen=True,
        cli_avoid_json=True,
        cli_use_class_docs_for_groups=True,
        cli_implicit_flags=False,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
        nested_model_default_partial_update=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only the YAML file (given as init values) and the command line count."""
        return (init_settings,)


def preset(name: str) -> Path:
    """The path of a preset that ships with the project, e.g. `preset("tiny")`."""
    return PRESETS / f"{name}.yaml"


def load_settings(
    program: type[ProgramType], section: str, arguments: Sequence[str] | None = None, default_config: Path | None = None
) -> ProgramType:
    """Read `--config FILE` (its `section`), say so, put the other command line options over it, and validate.

    Args:
        program: the pydantic model of the section.
        section: `build` or `train`.
        arguments: command line without the program's name; `sys.argv[1:]` by default.
        default_config: the file used when `--config` is not given; `--config none` reads none.

    Raises:
        InputError: no such file, not YAML, no such key (with the nearest one that exists), or a value out of range.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config, rest = find_config(arguments, default_config)
    values = read_section(config, section, program) if config else {}
    if "--help" in rest or "-h" in rest:
        print(f"usage: --config FILE reads the `{section}:` section of a YAML file (default: {_shown(default_config)});")
        print(f"       --config {NO_CONFIG} reads no file: plain defaults, and all that has none is to be given here;")
        print("       every option below overrides one of its keys.\n")
        values = {}
    elif os.environ.get("RANK", "0") == "0":  # torchrun starts a program many times.
        print(f"settings: {_origin(config, section, by_default=len(rest) == len(arguments))}", flush=True)
    try:
        given_values = _without_empty(values, program)
        return CliApp.run(program, cli_args=rest, cli_settings_source=None, cli_exit_on_error=False, **given_values)
    except SettingsError as error:
        raise InputError(_option_error(program, str(error))) from None
    except ValidationError as error:
        given = {word.partition("=")[0].removeprefix("--") for word in rest}
        raise InputError(_explain(program, error, config, section, given)) from None


def find_config(arguments: Sequence[str], default: Path | None) -> tuple[Path | None, list[str]]:
    """The config file that a command line asks for, null where it asks for none; and its other arguments."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, default=default)
    chosen, rest = first.parse_known_args(list(arguments))
    return None if chosen.config == Path(NO_CONFIG) else chosen.config, rest


def _origin(config: Path | None, section: str, by_default: bool) -> str:
    """Where settings come from, in words."""
    if config is None:
        return "no config file, plain defaults"
    files = " over ".join(_shown(path) for path, _ in _read_layers(config, section))
    return f"{files}, as no --config is given (--config {NO_CONFIG} reads no file)" if by_default else files


def read_section(path: Path, section: str, program: type[BaseModel] | None = None) -> dict[str, Any]:
    """The mapping under `section` of a YAML file, over that of its base; empty if there are other known sections only.

    Args:
        path: of the file.
        section: `build` or `train`.
        program: the pydantic model of the section, which says of which groups null is a value (`lora: null`).

    Raises:
        InputError: a file is missing, is not YAML, has a top-level key that is no section, or bases go in a circle.
    """
    values: dict[str, Any] = {}
    for _, own in reversed(_read_layers(path, section)):
        values = _merge(values, own, program)
    return values


def _read_layers(path: Path, section: str) -> list[tuple[Path, dict[str, Any]]]:
    """A config file, its base, the base's base, and so on: each with its own values of the section."""
    path = _find_config_file(path)
    layers: list[tuple[Path, dict[str, Any]]] = []
    while True:
        content = _read_file(path)
        values = content.get(section) or {}
        if not isinstance(values, dict):
            raise InputError(f"{path}: section `{section}` must hold keys and values, found {type(values).__name__}")
        layers.append((path, values))
        base = content.get(BASE)
        if base is None:
            return layers
        if not isinstance(base, str):
            raise InputError(f"{path}: `{BASE}` must be the path of a config file, found {type(base).__name__}")
        below = path.parent / base
        if not below.is_file():
            raise InputError(f"{path}: its base {below} is not there; `{BASE}` counts from the folder of the file that says it")
        if any(below.samefile(seen) for seen, _ in layers):
            circle = " -> ".join(str(one) for one in [*(seen for seen, _ in layers), below])
            raise InputError(f"{path}: its base leads back to a file that leads here: {circle}; take one `{BASE}` out")
        path = below


def _find_config_file(path: Path) -> Path:
    """A config file: as its path says, or a preset by its name (`tiny`) or by its path in the project (`configs/tiny.yaml`)."""
    # Installed, or started by `ray submit`, a program runs in another folder.
    for found in (path, REPOSITORY / path, PRESETS / f"{path}.yaml"):
        if found.is_file():
            return found
    names = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
    raise InputError(f"{path}: no such config file; presets, by name: {names}, in {_shown(PRESETS)}")


def _read_file(path: Path) -> dict[str, Any]:
    """The content of one config file, whose top-level keys are known."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected sections {', '.join(SECTIONS)} at the top level, found {type(content).__name__}")
    for key in content:
        if key not in (*SECTIONS, BASE):
            near = _nearest(str(key), (*SECTIONS, BASE))
            raise InputError(f"{path}: no section `{key}`{near}; sections are {', '.join(SECTIONS)}, beside `{BASE}`")
    return content


def _merge(below: Mapping[str, Any], above: Mapping[str, Any], model: type[BaseModel] | None) -> dict[str, Any]:
    """The values of `above` over those of `below`, group by group; an empty group says nothing, any other null is a value.

    So is the null of a group that may be left out as a whole: it takes out what the base says of it.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        group, optional = _group_of(model, key)
        if isinstance(old, dict) and (isinstance(value, dict) or (value is None and not optional)):
            merged[key] = _merge(old, value or {}, group)
        else:
            merged[key] = value
    return merged


def _group_of(model: type[BaseModel] | None, key: str) -> tuple[type[BaseModel] | None, bool]:
    """The model of the group under a key, if one is known, and whether null may stand in its place."""
    field = model.model_fields.get(key) if model else None
    kinds = get_args(field.annotation) or (field.annotation,) if field else ()
    groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return groups[0] if groups else None, type(None) in kinds


def dump_settings(settings: BaseModel, section: str) -> str:
    """Settings as YAML text that `load_settings` reads back to the same values."""
    return yaml.safe_dump({section: settings.model_dump(mode="json")}, sort_keys=False, allow_unicode=True)


def field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a settings model, groups included."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += field_names(field.annotation, f"{prefix}{name}.")
    return names


def _explain(program: type[BaseModel], error: ValidationError, path: Path | None, section: str, options: set[str]) -> str:
    """One line for the first thing that is wrong: where it was said, what is wrong, what would be right."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    given = [option for option in options if f"{option}.".startswith(f"{key}.") or key.startswith(f"{option}.")]
    from_file = path and _file_of(path, section, first["loc"])
    where = f"--{sorted(given)[0]}" if given else f"{from_file}: `{section}.{key}`" if from_file else f"`{section}.{key}`"
    if first["type"] == "extra_forbidden":
        parent = key.rpartition(".")[0]
        siblings = [name for name in field_names(program) if name.rpartition(".")[0] == parent]
        return f"{where}: no such key{_nearest(key, field_names(program))}; keys here: {', '.join(siblings)}"
    if first["type"] == "missing":
        return f"`{section}.{key}` is not set: put it into {path or 'a config file'} or give --{key}"
    message = first["msg"][0].lower() + first["msg"][1:]
    # Of a rule between keys the input is the whole group, which tells nothing.
    got = "" if isinstance(first.get("input"), dict) else f" (got {first.get('input')!r})"
    return f"{where}: {message.removeprefix('value error, ')}{got}"


def _file_of(path: Path, section: str, key: Sequence[int | str]) -> Path:
    """Of a config file and its bases, the one whose value of this key counts; the file itself where none has it."""
    for layer, values in _read_layers(path, section):
        found: Any = values
        for part in key:
            # A list, or what stands in the place of a group, is said as a whole: here.
            if not isinstance(found, dict):
                return layer
            if part not in found:
                break
            found = found[part]
        else:
            return layer
    return path


def _option_error(program: type[BaseModel], message: str) -> str:
    unknown = [word for word in message.split() if word.startswith("--")]
    if "unrecognized arguments" in message and unknown:
        option = unknown[0].partition("=")[0].removeprefix("--")
        return f"no option --{option}{_nearest(option, field_names(program), '--')}; --help lists all"
    return message


def _nearest(word: str, known: Sequence[str], mark: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean `{mark}{close[0]}`?)" if close else ""


def _without_empty(values: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A group with nothing in it (`ray:` with all of it commented out) means its defaults; any other null is a value."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        field = model.model_fields.get(key)
        group = (
            field.annotation if field and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) else None
        )
        if group and value is None:
            continue
        kept[key] = _without_empty(value, group) if group and isinstance(value, dict) else value
    return kept


def _shown(path: Path | None) -> str:
    if path is None:
        return "none"
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return os.path.normpath(path)


def help_first(program: type[Program], section: str, about: str | None, default_config: Path | None = None) -> None:
    """Where the command line asks for help, print what a program is for and its settings, and end it.

    Programs call this first, before they import what takes seconds to load. Arguments as of `load_settings`; `about` is the
    program's own text.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{(about or '').strip()}\n")
        load_settings(program, section, ["--help"], default_config)
