"""What must hold for a run to begin, to go on and to be saved; and what to tell a person where it does not."""

from pathlib import Path

import torch
from torch import nn

from pbe_core.errors import InputError
from pbe_train.checkpoints.trainer_checkpoint import CheckpointState, list_checkpoints
from pbe_train.config import TrainSettings
from pbe_train.data.shards import ShardReader
from pbe_train.training.ranks import Ranks


def check_agreement(
    ranks: Ranks, checkpoint: Path | None, state: CheckpointState | None, reader: ShardReader, precision: str
) -> None:
    """Refuse ranks that would train from different starts, on different data or in different arithmetic.

    On several machines paths may mislead, and cards may differ.

    Raises:
        InputError: with what each sort of rank has.
    """
    weights = state.files["model.safetensors"].sha256[:12] if state and "model.safetensors" in state.files else "new"
    dataset = f"{reader.info.fingerprint[:12]} (samples {reader.samples_hash()[:12]})"
    found = (state.step if state else 0, weights, dataset, precision)
    seen = ranks.gather(found)
    if len(set(seen)) > 1:
        shown = "; ".join(
            f"rank {seen.index(start)} starts at step {start[0]} (weights {start[1]}) on dataset {start[2]} in {start[3]}"
            for start in dict.fromkeys(seen)
        )
        raise InputError(
            f"{checkpoint or reader.folder}: the ranks do not see the same: {shown}; "
            "put `out` and `dataset` into folders that all machines share, and give --precision where the cards differ"
        )


def check_weights(settings: TrainSettings, step: int, trained: dict[str, nn.Parameter]) -> None:
    """Stop a run whose weights broke, before they are saved; they are the same on all ranks.

    Raises:
        InputError: a weight is not finite.
    """
    if not torch.stack(torch._foreach_norm(list(trained.values()))).sum().isfinite():
        saved = list_checkpoints(settings.out)
        kept = f"{saved[-1].name} is from before that and kept" if saved else "no checkpoint was written"
        raise InputError(
            f"{settings.out}: weights became infinite or not a number by step {step} ({kept}); the same settings would come here "
            "again: start a new run with another --out and a lower --optimizer.learning_rate"
        )


def out_of_memory(error: Exception, settings: TrainSettings, ranks: Ranks) -> str:
    """What to tell a person whose GPU is too small, and what helps."""
    size = settings.global_batch // (ranks.count * settings.accumulation)
    helps = []
    if size % 2 == 0:
        more = 2 * settings.accumulation
        helps.append(f"--accumulation {more} (halves the batch of {size} that a GPU holds; the training is the same)")
    if not settings.model.gradient_checkpointing:
        helps.append("--model.gradient_checkpointing true (a third more arithmetic)")
    if settings.precision == "fp32":
        helps.append("--precision bf16")
    if settings.ema_decay:
        helps.append("--ema_decay 0, for a new run")
    first = str(error).partition("\n")[0]
    said = f"what helps: {'; '.join(helps)}" if helps else "all that helps is set already: more GPUs, or larger ones"
    return f"rank {ranks.rank} is out of memory ({first}); {said}; docs/training.md has a table"
