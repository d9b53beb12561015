"""The encoder that conditions a model, as a judge: what it sees in a region against what it sees in the reference.

It tells whether the model paints what that encoder sees in a reference, not whether people, or another network, would agree.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from pbe_core.images import AnyPhoto
from pbe_core.judges.judge import Judge, JudgeIdentity
from pbe_core.judges.loading import LoadedNetwork
from pbe_train.data.latents import normalise_reference
from pbe_train.data.references import fit_reference
from pbe_train.model.pipeline import Run

NAME = "conditioner"


class _ClassToken(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pictures: Float[Tensor, "pictures 3 size size"]) -> Float[Tensor, "pictures width"]:
        token: Tensor = self.encoder(pixel_values=pictures).pooler_output
        return token


def conditioner_judge(run: Run) -> Judge:
    """The class token of a run's vision encoder; pictures are prepared as its references are."""
    side, geometry = run.reference_size, run.settings.model.reference_geometry
    preparation = f"{geometry} to {side} px as the model's references, CLIP's mean and standard deviation"

    def prepare(picture: AnyPhoto) -> Float32[np.ndarray, "3 side side"]:
        square = torch.from_numpy(fit_reference(picture, side, geometry)[None])
        prepared: Float32[np.ndarray, "3 side side"] = normalise_reference(square)[0].float().numpy()
        return prepared

    encoder: Any = run.model.conditioner.model
    hashes = frozenset({run.identity.encoder_sha256})
    loaded = LoadedNetwork(
        network=_ClassToken(encoder),
        prepare=prepare,
        preparation=preparation,
        input_size=side,
        width=int(encoder.config.hidden_size),
        sha256=run.identity.encoder_sha256,
        encoder_hashes=hashes,
    )
    identity = JudgeIdentity(
        name=NAME,
        kind="conditioner",
        source=run.settings.model.encoder,
        sha256=loaded.sha256,
        input_size=side,
        preparation=preparation,
        width=loaded.width,
    )
    return Judge(identity, loaded, run.device)
