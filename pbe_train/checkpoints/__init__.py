"""Weights in and out: the trainer's checkpoints, foreign models as a start, models in the layouts that others load."""
