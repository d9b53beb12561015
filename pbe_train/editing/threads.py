"""How many threads paint on a CPU."""

import torch

from pbe_train.model.pipeline import Run

SMALL_PARAMETERS = 50_000_000
"""A U-Net below this size has sums so small that a second thread costs more than it gives, above all beside other work."""


def default_threads(run: Run) -> int:
    """One for a small model, and what PyTorch takes by itself for all others."""
    parameters = sum(parameter.numel() for parameter in run.model.unet.parameters())
    return 1 if parameters < SMALL_PARAMETERS else torch.get_num_threads()
