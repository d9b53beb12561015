"""The arms of the ladder: settings of the trainer that grow into a preset's own, one setting an arm.

    baseline ──model.pretrained──▶ + prior ──augmentation.preset──▶ + augmentation
             ──model.tokens──────▶ + bottleneck ──condition_dropout──▶ + guidance

The last arm has the preset's settings. "No prior" differs from it in weights alone: a U-Net from scratch gets the start's sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError

from pbe_core.errors import InputError
from pbe_train.checkpoints.networks import unet_config
from pbe_train.config import TrainSettings, UNetSettings
from pbe_train.model.paint_model import new_unet


@dataclass(frozen=True)
class Arm:
    """One rung of the ladder: the arm before with one setting more."""

    name: str
    """In paths and on the command line."""
    title: str
    key: str = ""
    """The setting that it takes over from the preset; empty for the first one."""
    off: Any = None
    """What the arms before have in its place."""


ARMS = (
    Arm("baseline", "baseline"),
    Arm("prior", "+ prior", "model.pretrained", None),
    Arm("augmentation", "+ augmentation", "augmentation.preset", "none"),
    Arm("bottleneck", "+ bottleneck", "model.tokens", "all"),
    Arm("guidance", "+ guidance", "condition_dropout", 0.0),
)
# Differ between runs of one ladder by what they are, or are of no account for what is compared: pictures are painted after all.
_OF_RUNS: Mapping[str, Any] = {"resume": "auto", "keep_last": 1, "pictures.every": 0}
# Sizes of text-to-image training that no painting reads.
_NOT_COMPARED = ("sample_size", "in_channels")


def choose_arms(names: Sequence[str], settings: TrainSettings) -> list[Arm]:
    """The arms that are asked for, in the ladder's order.

    Args:
        names: of arms; none for all.
        settings: the preset's, those of the last arm.

    Raises:
        InputError: no such arm, or the preset lacks what an arm adds, which would then be the arm before again.
    """
    if unknown := [name for name in names if name not in {arm.name for arm in ARMS}]:
        raise InputError(f"--arms {unknown[0]}: no such arm; there are {', '.join(arm.name for arm in ARMS)}")
    chosen = [arm for arm in ARMS if not names or arm.name in names]
    for arm in ARMS[1 : ARMS.index(chosen[-1]) + 1]:
        if arm.key and read_key(settings.model_dump(mode="json"), arm.key) == arm.off:
            others = " ".join(one.name for one in chosen if one is not arm)
            given = {"model.pretrained": "FOLDER", "augmentation.preset": "paper", "model.tokens": "class"}.get(arm.key, "0.2")
            raise InputError(
                f"the arm `{arm.title}` adds {arm.key}, and the settings have none (got {arm.off!r}): give --{arm.key} {given}, "
                f"or leave it out: --arms {others}"
            )
    return chosen


def settings_of(arm: Arm, settings: TrainSettings, seed: int, out: Path) -> TrainSettings:
    """The settings of one run.

    Args:
        arm: which arm's.
        settings: the preset's; `model.unet` has the sizes of its start (`with_sizes_of_start`).
        seed: of the training.
        out: the run's folder.
    """
    values = settings.model_dump(mode="json")
    for later in ARMS[ARMS.index(arm) + 1 :]:
        write_key(values, later.key, later.off)
    for key, value in ({"seed": seed, "out": str(out)} | dict(_OF_RUNS)).items():
        write_key(values, key, value)
    return TrainSettings.model_validate(values)


def with_sizes_of_start(settings: TrainSettings) -> TrainSettings:
    """The same settings, whose `model.unet` has the sizes of the start, which a run from scratch then has as well.

    Raises:
        InputError: the start is not there, or a U-Net that settings cannot describe.
    """
    start = settings.model.pretrained
    if start is None:
        return settings
    model = settings.model.model_copy(update={"unet": sizes_of(unet_config(start), start)})
    return settings.model_copy(update={"model": model})


def sizes_of(config: Mapping[str, Any], where: str) -> UNetSettings:
    """Sizes of a U-Net as settings name them.

    Args:
        config: diffusers' configuration of it.
        where: it is from, for messages.

    Raises:
        InputError: a U-Net from scratch of these sizes would be another one.
    """
    # What diffusers notes down for itself stays behind: values that it calls its defaults it would not read.
    written = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(written).config
        heads, channels = theirs.attention_head_dim, int(theirs.out_channels)
        try:
            sizes = UNetSettings(
                block_out_channels=tuple(theirs.block_out_channels),
                attention=tuple("CrossAttn" in kind for kind in theirs.down_block_types),
                layers_per_block=theirs.layers_per_block,
                attention_heads=heads[0] if isinstance(heads, list | tuple) else heads,
                norm_groups=theirs.norm_num_groups,
                cross_attention_dim=theirs.cross_attention_dim,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{where}: no U-Net from scratch has its sizes ({first['loc'][0]}: {first['msg']})") from None
        ours = new_unet(sizes, channels).config
    differing = [
        f"{name} {_plain(theirs[name])}, not {_plain(ours[name])}"
        for name in ours
        if not name.startswith("_") and name not in _NOT_COMPARED and _plain(theirs[name]) != _plain(ours[name])
    ]
    if differing:
        raise InputError(
            f"{where}: no U-Net from scratch has its sizes: {'; '.join(differing[:3])}; the arm without a prior needs one: "
            "give a start of Stable Diffusion 1.x's kind, or leave it out with --arms"
        )
    return sizes


def _plain(value: Any) -> Any:
    """A value of a configuration; of heads that are the same for each level, one."""
    if isinstance(value, list | tuple):
        return value[0] if len(set(value)) == 1 and isinstance(value[0], int) else list(value)
    return value


def read_key(values: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in settings as a mapping."""
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found


def write_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key."""
    group, _, rest = key.partition(".")
    if rest:
        write_key(values[group], rest, value)
    else:
        values[group] = value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
