"""Shards to model: the trainer of Paint by Example, and what one does with a trained model.

    data/ ─▶ train.py (model/, training/) ─▶ checkpoints/ ─▶ editing/ ─▶ PaintByExample, sample, demo, evaluate

Entry points: `train.py` (also under torchrun), `sample.py`, `demo.py`, `evaluate.py`, and `cost.py`, which tells what a run will
cost. Settings: `config.py`.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pbe_train.editing.paint_by_example import PaintByExample

__all__ = ["PaintByExample"]

# Nothing phones home. The libraries read these when they are imported, so they are set before any of them is.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_TELEMETRY", "1")
# Likewise: from its import on, transformers advises to install torchvision, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def __getattr__(name: str) -> Any:
    """`from pbe_train import PaintByExample`, without a second of imports for who wants something else."""
    if name == "PaintByExample":
        from pbe_train.editing.paint_by_example import PaintByExample

        return PaintByExample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
