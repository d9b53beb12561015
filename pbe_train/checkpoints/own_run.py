"""A run of this trainer, or one of its checkpoints, as a start."""

from pathlib import Path

from pbe_train.checkpoints.key_mapping import starting_with
from pbe_train.checkpoints.source import Source
from pbe_train.checkpoints.trainer_checkpoint import locate_checkpoint, read_file, read_state


def read_own(path: Path) -> Source | None:
    """The newest checkpoint of a run folder, or this checkpoint; null where the path is neither.

    Of a run that keeps a moving average of its weights, the average; encoder and VAE are not in it, only their hashes.

    Raises:
        InputError: a damaged checkpoint.
    """
    folder = locate_checkpoint(path)
    if not folder:
        return None
    state = read_state(folder)
    averaged = "ema.safetensors" in state.files
    tensors = read_file(folder, state, "ema" if averaged else "model")
    return Source(
        where=str(folder),
        kind="run of this trainer",
        unet_config=state.identity.unet,
        unet=starting_with("unet.", tensors),
        conditioner=starting_with("conditioner.", tensors),
        encoder_sha256=state.identity.encoder_sha256,
        vae_sha256=state.identity.vae_sha256,
        prediction=state.settings.get("prediction"),
        trained_with=state.settings.get("model", {}),
        aside={"optimizer": 0} | ({"weights that are not averaged": 0} if averaged else {}),
    )
