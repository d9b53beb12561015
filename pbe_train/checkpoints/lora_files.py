"""LoRAs in files: those of this trainer, and those that other tools wrote, in one form.

    unet.down_blocks.0. ... .to_q.lora_A.weight          diffusers and peft; alpha in the header, or in adapter_config.json
    unet.down_blocks.0. ... .to_q.lora.down.weight       diffusers before peft
    unet. ... .attn1.processor.to_q_lora.down.weight     and the first of them
    lora_unet_down_blocks_0_ ... _to_q.lora_down.weight  kohya's, which ComfyUI and others load; alpha beside it
    lora_unet_input_blocks_1_1_ ... .lora_down.weight    the same with the original code's names
    conditioner.mapper.blocks.0. ... .lora_A.weight      this project's, for the part that no other program has

What a file means is asked of the model that it is for: `read_lora` takes the names of its layers. What belongs to text encoders
is left aside and told; what is no plain LoRA is refused.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_core.weight_files import check_finite, weights_format
from pbe_core.words import number_of
from pbe_train.checkpoints.key_mapping import NameTable
from pbe_train.checkpoints.pretrained import read_tensor_file
from pbe_train.checkpoints.trainer_checkpoint import locate_checkpoint, read_file, read_state
from pbe_train.config import LoraSettings
from pbe_train.model.lora import LoraLayer, layers_of

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
CONDITIONER_FILE = "conditioner_lora_weights.safetensors"
"""Of this project, beside either layout: what a LoRA adds between vision encoder and U-Net."""
DIFFUSERS_KEY, OWN_KEY = "lora_adapter_metadata", "paint_by_example_lora"
"""Keys of a safetensors header: diffusers' own, JSON of peft's settings by part; and ours, JSON of `base_sha256` and `beside`."""
PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
# What a folder's LoRA is called, the best name first.
NAMES = (DIFFUSERS_FILE, "pytorch_lora_weights.bin", PEFT_FILE)
KOHYA = "lora_unet_"
# Of a tensor's name: what follows the layer's.
_ENDINGS = {
    r"\.lora_A(?:\.\w+)?\.weight": "down",
    r"\.lora_B(?:\.\w+)?\.weight": "up",
    r"[._]lora[._]down\.weight": "down",
    r"[._]lora[._]up\.weight": "up",
    r"(?:\.lora)?\.alpha": "alpha",
}
_ENDING = re.compile("(?P<layer>.+?)(?:" + "|".join(f"(?P<e{number}>{way})" for number, way in enumerate(_ENDINGS)) + ")")
_OTHER_KINDS = {
    "dora_scale": "a DoRA, which also scales each weight's columns",
    "magnitude_vector": "a DoRA, which also scales each weight's columns",
    "hada_": "a LoHa, whose matrices are multiplied element by element",
    "lokr_": "a LoKr, made of Kronecker products",
    "lora_mid": "a LoCon with core tensors (lora_mid)",
    "oft_": "an OFT, which turns weights",
    "lora_B.bias": "a LoRA with biases",
    ".diff": "whole differences of weights",
}
_TEXT = re.compile(r"(base_model\.model\.)?(lora_te\d?_|text_encoder)")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that was read."""

    where: str
    """Its file or folder."""
    layers: dict[str, LoraLayer]
    """By name in the model (`unet. ...`, `conditioner. ...`); by its own where the model has no such layer."""
    sha256: str
    """Of its file or, of two, of the first one."""
    base_sha256: str | None = None
    """Hash of the weights that it was trained beside, where it says so."""
    aside: dict[str, int] = field(default_factory=dict)
    """What it has and the model has no use for -> tensors."""


def read_lora(source: str | Path, names: Collection[str], original: NameTable | None = None) -> LoraFile:
    """The LoRA in a file; in a folder of one, an export among them; or in a run of this trainer, by its averaged weights.

    Args:
        source: where it lies.
        names: of the model's layers, with the part in front: `unet. ...`, `conditioner. ...`.
        original: names of the U-Net in the original code, where it is of a kind that has them.

    Raises:
        InputError: none there, a damaged one, or one that is no plain LoRA.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        checkpoint = locate_checkpoint(path)
        if checkpoint:
            return _read_run(checkpoint)
        path = _file_in(path)
    if not path.is_file():
        raise InputError(f"{source}: no such file or folder; give a LoRA: a file, a folder that holds one, or a run of one")
    resolve = resolver(names, original)
    layers, aside, own = _read_one(path, resolve)
    beside = own.get("beside")
    if isinstance(beside, str) and beside:
        other = path.parent / Path(beside).name
        if not other.is_file():
            raise InputError(f"{path}: a part of it, {other.name}, is not beside it, and without that it would do something else")
        more, more_aside, _ = _read_one(other, resolve)
        layers, aside = {**layers, **more}, {**aside, **more_aside}
    if not layers:
        raise InputError(f"{path}: holds no LoRA" + (" but for text encoders, and this model has none" if aside else ""))
    base = own.get("base_sha256")
    return LoraFile(str(path), layers, file_sha256(path), base if isinstance(base, str) else None, aside)


def _read_run(checkpoint: Path) -> LoraFile:
    state = read_state(checkpoint)
    if state.identity.base_sha256 is None:
        raise InputError(f"{checkpoint}: all weights of this run are its own, it holds no LoRA; give it as the model")
    name = "ema" if "ema.safetensors" in state.files else "model"
    scale = LoraSettings.model_validate(state.settings["lora"]).scale
    layers = layers_of(read_file(checkpoint, state, name), scale)
    return LoraFile(str(checkpoint), layers, state.files[f"{name}.safetensors"].sha256, state.identity.base_sha256)


def _file_in(folder: Path) -> Path:
    """The file of a folder that holds a LoRA. Raises InputError: there is none, or there are several."""
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in NAMES:
        if name in there:
            return folder / name
    weights = [name for name in there if name.endswith(".safetensors") and name != CONDITIONER_FILE]
    if len(weights) == 1:
        return folder / weights[0]
    if not weights and CONDITIONER_FILE in there:
        return folder / CONDITIONER_FILE
    raise InputError(
        f"{folder}: {number_of(len(weights), 'file')} (.safetensors) here, and none is called {DIFFUSERS_FILE}; name the file"
    )


def _read_one(path: Path, resolve: Callable[[str], str]) -> tuple[dict[str, LoraLayer], dict[str, int], dict[str, Any]]:
    """Layers, what is left aside, and our own notes of one file."""
    tensors, notes = read_tensor_file(path).tensors, _notes_of(path)
    for part, what in _OTHER_KINDS.items():
        if example := next((name for name in tensors if part in name), None):
            raise InputError(f"{path}: {what} ({example}), and no plain LoRA; merge it into its model with the tool that made it")
    check_finite(tensors, str(path))
    text = [name for name in tensors if _TEXT.match(name)]
    parts: dict[str, dict[str, Tensor]] = {}
    for name in tensors.keys() - set(text):
        found = _ENDING.fullmatch(name)
        if not found:
            raise InputError(f"{path}: {name} is no part of a LoRA as diffusers, peft or kohya's scripts write it")
        kind = next(what for number, what in enumerate(_ENDINGS.values()) if found[f"e{number}"])
        parts.setdefault(found["layer"], {})[kind] = tensors[name]
    settings = _peft_settings(path, notes)
    layers = {}
    for layer in sorted(parts):
        name = resolve(layer)
        if name in layers:
            raise InputError(f"{path}: {name} is in it twice, under different names")
        layers[name] = _layer(path, layer, parts[layer], settings)
    return layers, {"tensors of text encoders": len(text)} if text else {}, _parsed(notes.get(OWN_KEY))


def _layer(path: Path, name: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LoraLayer:
    """One layer from its two matrices and its alpha, or that of the settings, or the rank."""
    if "down" not in parts or "up" not in parts:
        raise InputError(f"{path}: {name} has not both of its matrices; the file is not whole")
    down, up = parts["down"], parts["up"]
    rank = int(down.shape[0]) if down.ndim else 0
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or rank != up.shape[1] or up.shape[2:].numel() != 1 or not rank:
        raise InputError(f"{path}: {name}: matrices of {list(down.shape)} and {list(up.shape)} do not make a LoRA")
    alpha = parts["alpha"].item() if "alpha" in parts and parts["alpha"].numel() == 1 else _alpha_of(name, settings)
    if alpha is not None and not math.isfinite(alpha):
        raise InputError(f"{path}: {name}: its alpha is {alpha}, and no finite number")
    root = settings.get("use_rslora") is True and "alpha" not in parts
    return LoraLayer(down, up, 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank))


def _alpha_of(name: str, settings: Mapping[str, Any]) -> float | None:
    pattern = settings.get("alpha_pattern")
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        # peft takes these for regular expressions; names of layers are what tools write.
        plain = str(key).removeprefix("^").removesuffix("$").replace("\\.", ".")
        if f".{name}".endswith(f".{plain}") and isinstance(value, int | float):
            return float(value)
    alpha = settings.get("lora_alpha")
    return float(alpha) if isinstance(alpha, int | float) else None


def _peft_settings(path: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    """Peft's settings of a U-Net's LoRA: from the header, where diffusers puts them, or from the file beside peft's own."""
    content = _parsed(notes.get(DIFFUSERS_KEY))
    settings = {name.removeprefix("unet."): value for name, value in content.items()}
    beside = path.parent / PEFT_SETTINGS
    if not settings and path.name == PEFT_FILE:
        try:
            settings = _parsed(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(f"{beside}: missing or damaged, and it says how strong {path.name} is") from None
    if settings.get("use_dora") is True:
        raise InputError(f"{path}: a DoRA, and no plain LoRA; merge it into its model with the tool that made it")
    return settings


def _notes_of(path: Path) -> dict[str, str]:
    """The header's notes of a safetensors file; none of another."""
    if weights_format(path) != "safetensors":
        return {}
    try:
        with safe_open(path, "pt") as opened:  # type: ignore[no-untyped-call]
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: a safetensors file that is damaged or cut short ({error})") from None


def _parsed(text: str | None) -> dict[str, Any]:
    """A JSON object; empty where it is none: notes are a stranger's."""
    try:
        content = json.loads(text) if text else None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def resolver(names: Collection[str], original: NameTable | None) -> Callable[[str], str]:
    """A function from a layer's name in a file, of any of the layouts, to that in the model, or to itself."""
    inside = [name.removeprefix("unet.") for name in names if name.startswith("unet.")]
    known = {name: name for name in names} | {name: f"unet.{name}" for name in inside}
    known |= {KOHYA + name.replace(".", "_"): f"unet.{name}" for name in inside}
    for name in inside if original else ():
        assert original
        found = original.ldm_name(name)
        if found:
            known |= {KOHYA + found.replace(".", "_"): f"unet.{name}", f"diffusion_model.{found}": f"unet.{name}"}

    def resolve(layer: str) -> str:
        plain = layer.removeprefix("base_model.model.")
        plain = plain.replace(".processor.", ".")
        return known.get(plain) or known.get(re.sub(r"\.to_out$", ".to_out.0", plain)) or layer

    return resolve
