"""The tensors of a trained run by part, under the names that diffusers and transformers 5 give them."""

from typing import NamedTuple

from torch import Tensor

from pbe_train.checkpoints.key_mapping import bare_encoder_names, starting_with
from pbe_train.model.pipeline import Run


class Trained(NamedTuple):
    """Of one run."""

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    encoder: dict[str, Tensor]
    """The vision encoder, under bare names."""
    conditioner: dict[str, Tensor]
    """Mapper, normalisation, projection, null vector."""


def tensors_of(run: Run) -> Trained:
    """All tensors of a run that painting needs, contiguous and on the CPU."""
    conditioner = {name: tensor for name, tensor in run.model.conditioner.state_dict().items() if not name.startswith("model.")}
    encoder = bare_encoder_names(starting_with("model.", run.model.conditioner.state_dict()))
    parts = (run.model.unet.state_dict(), run.vae.state_dict(), encoder, conditioner)
    return Trained(*({name: tensor.detach().cpu().contiguous() for name, tensor in part.items()} for part in parts))
