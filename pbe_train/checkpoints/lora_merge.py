"""LoRAs into a model's weights: each with a weight of its own, as many as one likes.

    W  ──▶  W + w1 * delta1 + w2 * delta2 + ...        in fp32, before the model is cast or placed

Nothing is left of them then but other numbers: the model takes the memory and the time that it took.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from pbe_core.errors import InputError
from pbe_core.vae import weights_sha256
from pbe_core.words import number_of
from pbe_train.checkpoints.ldm_format import unet_names
from pbe_train.checkpoints.lora_files import LoraFile, read_lora
from pbe_train.model.lora import LoraLayer, merged, misfits
from pbe_train.model.pipeline import Run


class Lora(NamedTuple):
    """A LoRA that one asks for."""

    source: str
    """File, folder, or run of this trainer."""
    weight: float = 1.0
    """How strongly: 1 as it was trained, 0 not at all; also beyond 1, or below 0."""


# As people give one: `FILE`, `FILE:0.8`, or a pair of both.
AnyLora = str | Path | tuple[str | Path, float] | Lora
SHOWN = 3


def asked_for(given: AnyLora) -> Lora:
    """A LoRA and its weight. What lies there under the whole name, colon and all, is meant first.

    Raises:
        InputError: the weight is no finite number.
    """
    if isinstance(given, tuple):
        source, weight = str(given[0]), given[1]
    else:
        source, weight = str(given), 1.0
        before, colon, after = source.rpartition(":")
        if colon and before and not Path(source).expanduser().exists():
            source, weight = before, after  # type: ignore[assignment]
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"LoRA {source}: its weight is {weight!r}; give a number, such as {source}:0.8")
    return Lora(source, number)


class MergedLora(NamedTuple):
    """A LoRA that is in a model's weights."""

    source: str
    weight: float
    sha256: str
    """Of its file."""
    notes: list[str]
    """What a person should know of it."""


def merge_loras(run: Run, loras: Sequence[AnyLora]) -> list[MergedLora]:
    """Add LoRAs to the weights of a run's model, in place.

    Args:
        run: loaded, in fp32.
        loras: which, and how strongly.

    Raises:
        InputError: one is not there, damaged, no plain LoRA, or of another architecture; then nothing was changed.
    """
    if not loras:
        return []
    weights = run.model.kept()
    names = [name.removesuffix(".weight") for name, weight in weights.items() if name.endswith(".weight") and weight.ndim > 1]
    wanted = [asked_for(each) for each in loras]
    files = [read_lora(lora.source, names, unet_names(run.identity.unet)) for lora in wanted]
    for file in files:
        if wrong := misfits(weights, file.layers):
            more = f" and {number_of(len(wrong) - SHOWN, 'other')}" if len(wrong) > SHOWN else ""
            raise InputError(
                f"{file.where}: is of another architecture than the model: it changes {'; '.join(wrong[:SHOWN])}{more}; give a "
                "LoRA of this kind of model"
            )
    # Seconds at full size: only where a LoRA says what it was trained beside.
    own = weights_sha256(weights) if any(file.base_sha256 for file in files) else None
    parts: dict[str, list[tuple[LoraLayer, float]]] = {}
    for lora, file in zip(wanted, files, strict=True):
        for name, layer in file.layers.items():
            parts.setdefault(f"{name}.weight", []).append((layer, lora.weight))
    with torch.no_grad():
        for name, layers in parts.items():
            weights[name].copy_(merged(weights[name], layers))
    return [MergedLora(*lora, file.sha256, _notes(file, own)) for lora, file in zip(wanted, files, strict=True)]


def _notes(file: LoraFile, own: str | None) -> list[str]:
    """What was left aside, and whether it was trained beside other weights than the model's own."""
    notes = [f"{file.where}: {count} {what} are left aside, this model has none" for what, count in file.aside.items()]
    if own and file.base_sha256 not in (None, own):
        notes.append(
            f"{file.where}: was trained beside other weights ({str(file.base_sha256)[:12]}) than this model's ({own[:12]}), and "
            "may do less, or something else"
        )
    return notes
