"""`settings.json`: all that an edit depends on, written by the app and read by `pbe edit --settings`.

Pictures are named by file name and SHA-256. They lie beside the file, as in the app's archive, or are given anew.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer

from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_train.model.sampling import EVERYWHERE
from schemas.dataset import leave_out


class PictureRecord(BaseModel):
    """A file that went into an edit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Without a folder."""
    sha256: str

    @field_validator("name")
    @classmethod
    def _is_plain(cls, name: str) -> str:
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise ValueError("must be the name of a file, without a folder")
        return name


class ModelRecord(BaseModel):
    """The model of an edit."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """As the app called it."""
    source: str | None = None
    """What `--model` was given; null where that is nobody's business but the server's."""
    sha256: str | None = None
    """Of its file of weights, where its state.json says it."""


class LoraRecord(BaseModel):
    """A LoRA in the weights of an edit's model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """Its last part, of file or folder."""
    source: str | None = None
    """What `--lora` was given, without the weight; null where that is nobody's business but the server's."""
    weight: float = Field(allow_inf_nan=False)
    sha256: str
    """Of its file."""


class EditSettings(BaseModel):
    """The content of settings.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: ModelRecord
    loras: list[LoraRecord] = []
    """Those in the model's weights; left out of the file where there are none."""
    weights: Literal["ema", "model"] = "ema"
    seeds: list[int] = Field(min_length=1)
    """Of each result, in their order."""
    guidance: float
    guidance_interval: tuple[float, float] = EVERYWHERE
    """Shares of the schedule between which guidance worked; left out of the file where it was all of it."""
    steps: int
    reuse: int = Field(default=1, ge=1)
    """How many steps share deep features; left out of the file where none do."""
    scheduler: str
    size: int | tuple[int, int]
    """Side in px at which the model worked; or width and height."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    """Layout of the weights, which rounds otherwise; left out of the file where it is not this."""
    prepacked: bool = False
    """Whether the U-Net's weights were packed, which rounds otherwise; left out of the file where they were not."""
    compile: bool = False
    """Whether the passes were compiled, which rounds otherwise; left out of the file where they were not."""
    device: str
    """`cpu` or `cuda`: another kind may round otherwise."""
    threads: int | None = None
    """On the CPU; another number may round otherwise."""
    photo: PictureRecord
    mask: PictureRecord
    references: list[PictureRecord] = Field(min_length=1)

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        usual = {"loras": [], "guidance_interval": list(EVERYWHERE), "reuse": 1}
        return leave_out(write(self), usual | dict.fromkeys(("channels_last", "prepacked", "compile"), False))


def read_settings(path: Path) -> EditSettings:
    """The settings of an edit.

    Raises:
        InputError: the file is not there, or is no settings of an edit; says where.
    """
    try:
        return EditSettings.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a settings.json that the app wrote") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(
            f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}; give a settings.json that the app wrote"
        ) from None


def find_picture(record: PictureRecord, given: Path | None, settings: Path, option: str) -> Path:
    """The file that a record means: the one that was given, or the one of its name beside the settings.

    Raises:
        InputError: it is not there, or not the one that the edit was made with.
    """
    path = given or settings.parent / record.name
    try:
        found = file_sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the file with {option}") from None
    if found != record.sha256:
        raise InputError(
            f"{path}: is not the {record.name} that {settings} names (SHA-256 {found[:12]}, not {record.sha256[:12]}); give that "
            f"file with {option}, or leave --settings out"
        )
    return path


def weights_hash(source: str) -> str | None:
    """SHA-256 of a model's file of weights, as its state.json says it; null for models that say nothing.

    Args:
        source: as `PaintByExample.from_pretrained` takes it.
    """
    from pbe_core.network_files import local_folder
    from pbe_train.checkpoints.trainer_checkpoint import locate_checkpoint, read_state

    folder = local_folder(source)
    checkpoint = folder and locate_checkpoint(folder)
    if not checkpoint:
        return None
    files = read_state(checkpoint).files
    record = files.get("ema.safetensors") or files.get("model.safetensors")
    return record.sha256 if record else None
