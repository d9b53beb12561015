"""A judge: a network that the user names, by whose features pictures are compared.

    KIND=WHERE ──load_judge──▶ Judge;  picture [H, W, 3] ──prepare──▶ [3, size, size] ──embed──▶ width numbers

Features of a picture are the same whatever pictures are beside it, but for rounding (1e-6 of the largest).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import BaseModel, ConfigDict

from pbe_core.errors import InputError
from pbe_core.images import AnyPhoto
from pbe_core.judges.inception import load_inception
from pbe_core.judges.loading import LoadedNetwork
from pbe_core.judges.mobilenet import load_mobilenet
from pbe_core.judges.transformers_judges import load_clip, load_dinov2, load_resnet

Kind = Literal["inception-clean", "inception-legacy", "clip", "dinov2", "resnet", "mobilenet", "conditioner"]
"""`conditioner` is a model's own encoder: nobody names it, it judges where no other judge does."""

_INCEPTION = "curl -LO https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
HOW_TO_GET: Mapping[Kind, str] = {
    "inception-clean": _INCEPTION,
    "inception-legacy": _INCEPTION,
    "clip": "clip=openai/clip-vit-base-patch32 (a hub id, or a folder with its config.json and model.safetensors)",
    "dinov2": "dinov2=facebook/dinov2-large (a hub id, or a folder with its config.json and model.safetensors)",
    "resnet": "resnet=microsoft/resnet-50 (a hub id, or a folder with its config.json and model.safetensors)",
    "mobilenet": "where it comes from is described in docs/evaluation.md",
}
"""What a person does to have a judge of a kind; nothing is fetched that is not named."""

_FILES = ("inception-clean", "inception-legacy", "mobilenet")
"""Kinds that are a file, and never fetched."""
_LOADERS: Mapping[str, Callable[[str], LoadedNetwork]] = {
    "inception-clean": partial(load_inception, way="clean"),
    "inception-legacy": partial(load_inception, way="legacy"),
    "clip": load_clip,
    "dinov2": load_dinov2,
    "resnet": load_resnet,
    "mobilenet": load_mobilenet,
}


class JudgeIdentity(BaseModel):
    """Which network judged, and how pictures were prepared for it: what a result says of a judge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """As in tables; unique in one evaluation."""
    kind: Kind
    source: str
    """What the user named."""
    sha256: str
    """`pbe_core.vae.weights_sha256` of the network's tensors, as they are stored."""
    input_size: int
    """Pixels, of the square that the network sees."""
    preparation: str
    """Resize filter, crop, normalisation."""
    width: int
    """Features of a picture."""


@dataclass(frozen=True)
class Judge:
    """A loaded network on its device."""

    identity: JudgeIdentity
    loaded: LoadedNetwork
    device: torch.device

    @property
    def encoder_hashes(self) -> frozenset[str]:
        """Hashes by which a run may know this network as its vision encoder (`RunIdentity.encoder_sha256`); none but for CLIP."""
        return self.loaded.encoder_hashes

    def prepare(self, picture: AnyPhoto) -> Float32[np.ndarray, "3 size size"]:
        """A picture, of any size, as the network takes it. Pure; threads may share the judge."""
        return self.loaded.prepare(picture)

    def embed(self, prepared: Float32[np.ndarray, "pictures 3 size size"]) -> Float32[np.ndarray, "pictures width"]:
        """Features of prepared pictures, in float32 (on a GPU, too: its shorter TF32 is off meanwhile)."""
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            inputs = torch.from_numpy(prepared).to(self.device, memory_format=torch.channels_last)
            features: np.ndarray = self.loaded.network(inputs).float().cpu().numpy()
        return features

    def features(self, pictures: Sequence[AnyPhoto]) -> Float32[np.ndarray, "pictures width"]:
        """`prepare` and `embed`."""
        return self.embed(np.stack([self.prepare(picture) for picture in pictures]))


def load_judge(spec: str, device: torch.device | str = "cpu") -> Judge:
    """The judge that a user names.

    Args:
        spec: `KIND=WHERE`, or `NAME:KIND=WHERE` to give it another name than its kind. WHERE is a file (Inception, MobileNet), or
            a folder or hub id (CLIP, DINOv2, ResNet).
        device: where it computes.

    Raises:
        InputError: no such kind, nothing there, or a network of another architecture.
    """
    what, equals, where = spec.partition("=")
    name, colon, kind = what.rpartition(":")
    kinds = ", ".join(_LOADERS)
    if not equals or not where:
        raise InputError(f"judge {spec}: not of the form KIND=WHERE or NAME:KIND=WHERE; kinds are {kinds}")
    if kind not in _LOADERS:
        raise InputError(f"judge {spec}: no kind {kind or 'without a name'}; kinds are {kinds}")
    name = name if colon else kind
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError(f"judge {spec}: {name!r} is no name for tables and files; use letters, digits, - and _")
    if kind in _FILES and not Path(where).expanduser().exists():
        raise InputError(f"judge {spec}: no such file; {HOW_TO_GET[kind]}")  # type: ignore[index]
    loaded = _LOADERS[kind](where)
    # Channels last: on a CPU, convolutions take two thirds of the time.
    loaded.network.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    identity = JudgeIdentity(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        source=where,
        sha256=loaded.sha256,
        input_size=loaded.input_size,
        preparation=loaded.preparation,
        width=loaded.width,
    )
    return Judge(identity, loaded, torch.device(device))
