"""A LoRA of a run in the layouts that others load: diffusers' own, or kohya's.

    lora    pytorch_lora_weights.safetensors      unet. ... .to_q.lora_A.weight           diffusers, peft
    kohya   NAME.safetensors                      lora_unet_ ... _to_q.lora_down.weight   ComfyUI, sd-scripts and the like
    both    conditioner_lora_weights.safetensors  conditioner.mapper. ... .lora_A.weight  of `mapper`: this project alone

alpha / rank is multiplied into B, and alpha is the rank: so a tool that loses alpha, or takes none, loads it at full strength.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.weight_files import save_tensors
from pbe_core.words import number_of
from pbe_train.checkpoints.export import new_export
from pbe_train.checkpoints.load_report import OPEN_RAIL, read_report
from pbe_train.checkpoints.lora_files import CONDITIONER_FILE, DIFFUSERS_FILE, DIFFUSERS_KEY, KOHYA, OWN_KEY
from pbe_train.checkpoints.trainer_checkpoint import CheckpointState, locate_checkpoint, read_file, read_state
from pbe_train.config import LoraSettings
from pbe_train.model.lora import LoraLayer, layers_of

CARD = Path(__file__).with_name("lora_card.md.jinja")
LORA_FORMS = ("lora", "kohya")
LoraForm = Literal["lora", "kohya"]


def has_lora(model: Path) -> bool:
    """Whether a run trains a LoRA; its own checkpoint says so, without a look at the weights. False where there is no run."""
    checkpoint = locate_checkpoint(model)
    return checkpoint is not None and read_state(checkpoint).identity.base_sha256 is not None


def export_lora(model: Path, folder: Path, form: LoraForm, weights: Literal["ema", "model"]) -> int:
    """Write the LoRA of a run; returns the step of the run. Its base is not read.

    Args:
        model: run folder or checkpoint folder.
        folder: of the export; kohya's file is called as it is.
        form: whose layout.
        weights: the moving average, where there is one, or the plain weights.

    Raises:
        InputError: no run, one that holds no LoRA, or the folder holds something else.
    """
    checkpoint = locate_checkpoint(model)
    if checkpoint is None:
        raise InputError(f"{model}: no checkpoint here; give a run folder that train.py wrote (the `out` of its settings)")
    state = read_state(checkpoint)
    if state.identity.base_sha256 is None:
        raise InputError(f"{checkpoint}: all weights of this run are its own, it holds no LoRA; --format {form} is for one")
    kept = "ema" if weights == "ema" and "ema.safetensors" in state.files else "model"
    settings = LoraSettings.model_validate(state.settings["lora"])
    layers = {name: folded(layer) for name, layer in layers_of(read_file(checkpoint, state, kept), settings.scale).items()}
    parts = {
        part: {name.removeprefix(f"{part}."): layer for name, layer in layers.items() if name.startswith(f"{part}.")}
        for part in ("unet", "conditioner")
    }
    file = DIFFUSERS_FILE if form == "lora" else f"{folder.absolute().name}.safetensors"
    report = read_report(checkpoint) or {}
    metadata = {
        "format": form,
        "step": state.step,
        "weights": kept,
        "run": str(model),
        "base": {"name": state.settings["model"]["pretrained"], "sha256": state.identity.base_sha256},
        "rank": settings.rank,
        "targets": list(settings.targets),
        "licence": report.get("licence"),
    }
    with new_export(folder, metadata) as partial:
        if parts["unet"]:
            write = write_diffusers_lora if form == "lora" else write_kohya_lora
            write(partial / file, parts["unet"], _own(state, CONDITIONER_FILE if parts["conditioner"] else None))
        if parts["conditioner"]:
            tensors = _pairs("conditioner.", parts["conditioner"])
            save_tensors(tensors, partial / CONDITIONER_FILE, {"format": "pt", OWN_KEY: _own(state, None)})
        told = {name: len(part) for name, part in parts.items() if part}
        (partial / "README.md").write_text(_card(state, metadata, told, folder.absolute().name, file), encoding="utf-8")
    return state.step


def folded(layer: LoraLayer) -> LoraLayer:
    """The same LoRA in fp32 with its scale in B, so that alpha is the rank."""
    return LoraLayer(layer.down.float().contiguous(), (layer.scale * layer.up.float()).contiguous(), 1.0)


def _pairs(prefix: str, layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    named = {f"{prefix}{name}.lora_A.weight": layer.down for name, layer in layers.items()}
    return named | {f"{prefix}{name}.lora_B.weight": layer.up for name, layer in layers.items()}


def _own(state: CheckpointState, beside: str | None) -> str:
    return json.dumps({"base_sha256": state.identity.base_sha256, "beside": beside})


def write_diffusers_lora(path: Path, layers: Mapping[str, LoraLayer], own: str = "{}") -> None:
    """As diffusers' `save_lora_weights` does when it is given peft's settings, without which it would lose alpha.

    Args:
        path: of the file.
        layers: of the U-Net, by name in it, `folded`.
        own: this project's notes, JSON.
    """
    rank = next(iter(layers.values())).rank
    settings: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": sorted(layers)}
    note = json.dumps({f"unet.{name}": value for name, value in settings.items()}, indent=2, sort_keys=True)
    save_tensors(_pairs("unet.", layers), path, {"format": "pt", DIFFUSERS_KEY: note, OWN_KEY: own})


def write_kohya_lora(path: Path, layers: Mapping[str, LoraLayer], own: str) -> None:
    """As kohya's scripts name them; arguments as of `write_diffusers_lora`."""
    tensors, rank = {}, next(iter(layers.values())).rank
    for name, layer in layers.items():
        start = KOHYA + name.replace(".", "_")
        tensors[f"{start}.lora_down.weight"] = layer.down
        tensors[f"{start}.lora_up.weight"] = layer.up
        tensors[f"{start}.alpha"] = torch.tensor(float(rank))
    notes = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    save_tensors(tensors, path, {"format": "pt", **notes, OWN_KEY: own})


def _card(state: CheckpointState, metadata: Mapping[str, Any], parts: Mapping[str, int], name: str, file: str) -> str:
    """The text of README.md."""
    licence = metadata["licence"]
    card = ModelCard.from_template(
        ModelCardData(license=licence or "other", tags=["paint-by-example", "lora", "image-to-image", "inpainting"]),
        template_path=str(CARD),
        **{key: metadata[key] for key in ("base", "rank", "targets", "weights", "step")},
        form=metadata["format"],
        global_batch=state.settings["global_batch"],
        parts=parts,
        name=name,
        file=file,
        beside=CONDITIONER_FILE,
        licence=licence,
        open_rail=licence == OPEN_RAIL,
        number_of=number_of,
    )
    return str(card)
