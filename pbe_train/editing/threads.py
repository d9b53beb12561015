"""How many threads paint on a CPU."""

import torch

from pbe_train.editing.speed import is_small
from pbe_train.model.pipeline import Run


def default_threads(run: Run) -> int:
    """One for a small model, and what PyTorch takes by itself for all others."""
    return 1 if is_small(run.model.unet) else torch.get_num_threads()
