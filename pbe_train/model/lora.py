"""LoRA: small matrices beside the weights of a model that stays as it is.

    x ──▶ W x ────────────────────────────▶ (+) ──▶ y        W: frozen
      └─▶ A x ──▶ B A x ── x alpha / rank ───┘              A [rank, in]: random at first; B [out, rank]: 0

So at first it changes nothing, bit for bit, and in the end it is a sum that can be added to W: `delta`. A layer of kernels has an
A of such kernels and a B of 1 x 1. While it is trained, layers are those of peft; in a file, or merged, each is a `LoraLayer`.

Source: Hu et al., LoRA: low-rank adaptation of large language models (2021).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbe_core.errors import InputError
from pbe_train.config import LoraSettings, LoraTarget

# Names of layers in the U-Net, and of those between vision encoder and U-Net, inside the conditioner.
_PROJECTION = r"(to_q|to_k|to_v|to_out\.0)"
UNET_LAYERS: dict[LoraTarget, str] = {
    "attention": rf".*\.attn[12]\.{_PROJECTION}",
    "feed_forward": r".*\.ff\.net\.(0\.proj|2)",
    "convolutions": r".*\.(conv1|conv2|conv_shortcut)|.*samplers\.\d+\.conv",
}
MAPPER_LAYERS = rf"mapper\.blocks\.\d+\.(attn1\.{_PROJECTION}|ff\.net\.(0\.proj|2))|proj_out"
# Queries and keys where there is one token to attend to: in the U-Net, and in the mapper.
_WITHOUT_EFFECT = {"unet": r".*\.attn2\.to_[qk]", "conditioner": r"mapper\..*\.attn1\.to_[qk]"}
_ADAPTER = "default"
"""peft's name for the one LoRA that is trained."""


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to one layer."""

    down: Float[Tensor, "rank inputs ..."]
    """A."""
    up: Float[Tensor, "outputs rank ..."]
    """B."""
    scale: float
    """alpha / rank."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.down.shape[0])

    def delta(self) -> Float[Tensor, "outputs inputs ..."]:
        """What is added to the layer's weight, in fp32: scale * B A, of the shape of A's kernels."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).view(len(self.up), *self.down.shape[1:])


def add_layers(unet: nn.Module, conditioner: nn.Module, settings: LoraSettings, one_token: bool) -> int:
    """Put layers of peft in the places of those that the settings name; returns how many. A is drawn from torch's generator.

    Args:
        unet: of the model.
        conditioner: of the model.
        settings: which layers, and of what rank.
        one_token: whether attention to the condition sees a single token, so that queries and keys do nothing there.

    Raises:
        InputError: the model has no layer of a kind that is asked for.
    """
    # Seconds to import, with all that it brings: for those who train a LoRA.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer as PeftLayer

    count = 0
    for part, network in (("unet", unet), ("conditioner", conditioner)):
        names = [name for target in settings.targets for name in _layers_of(part, network, target, one_token)]
        if not names:
            continue
        config = LoraConfig(r=settings.rank, lora_alpha=settings.scale * settings.rank, target_modules=names)  # type: ignore[arg-type]
        inject_adapter_in_model(config, network, _ADAPTER)
        layers = [module for module in network.modules() if isinstance(module, PeftLayer)]
        if len(layers) != len(names):
            raise RuntimeError(f"{len(layers)} layers got a LoRA, {len(names)} were to")
        for layer in layers:
            # Under autocast inputs stay in 16 bits, as they come, instead of a copy of each in 32.
            layer.cast_input_dtype_enabled = False
        count += len(layers)
    return count


def _layers_of(part: str, network: nn.Module, target: LoraTarget, one_token: bool) -> list[str]:
    pattern = UNET_LAYERS.get(target) if part == "unet" else MAPPER_LAYERS if target == "mapper" else None
    if pattern is None:
        return []
    idle = _WITHOUT_EFFECT[part] if one_token else "(?!)"
    found = [name for name, _ in network.named_modules() if re.fullmatch(pattern, name) and not re.fullmatch(idle, name)]
    if not found:
        raise InputError(f"lora.targets: the model has no layers of the kind {target!r}; leave it out")
    return found


def own_name(name: str) -> str:
    """A parameter's name without what peft puts into it: `to_q.lora_A.default.weight` is `to_q.lora_A.weight` in files."""
    return name.replace(f".{_ADAPTER}.", ".") if is_lora(name) else name


def is_lora(name: str) -> bool:
    """Whether a parameter is A or B of a layer."""
    return ".lora_A." in name or ".lora_B." in name


def layers_of(tensors: Mapping[str, Tensor], scale: float) -> dict[str, LoraLayer]:
    """Name of a layer -> its LoRA, from tensors under the names of a checkpoint (`unet. ... .lora_A.weight`)."""
    ending = ".lora_A.weight"
    names = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    return {name: LoraLayer(tensors[name + ending], tensors[f"{name}.lora_B.weight"], scale) for name in names}


def misfits(weights: Mapping[str, Tensor], layers: Mapping[str, LoraLayer]) -> list[str]:
    """What of a LoRA has no place in a model, in words, each with its shape.

    Args:
        weights: of the model, by name.
        layers: by the names of the model's.
    """
    wrong = []
    for name, layer in layers.items():
        weight = weights.get(f"{name}.weight")
        shape = [len(layer.up), *layer.down.shape[1:]]
        if weight is None:
            wrong.append(f"{name} {shape}, which the model has not")
        elif _squeezed(shape) != _squeezed(list(weight.shape)):
            wrong.append(f"{name} {shape}, not {list(weight.shape)}")
    return wrong


def _squeezed(shape: list[int]) -> list[int]:
    """A linear layer's weight as a kernel of 1 x 1: some files hold it so."""
    return [*shape, 1, 1] if len(shape) == 2 else shape


@torch.no_grad()
def merged(weight: Tensor, parts: Sequence[tuple[LoraLayer, float]]) -> Float[Tensor, "..."]:
    """W + the sum of weight * delta, in fp32: what is added up first, in the order given, is what is added.

    Args:
        weight: W, of one layer.
        parts: what each LoRA adds to it, and how strongly.
    """
    added = sum((strength * layer.delta() for layer, strength in parts), start=torch.zeros(()))
    return weight.float() + added.view(weight.shape).to(weight.device)
