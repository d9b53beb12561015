"""Weights in and out: the trainer's checkpoints, pretrained models in published layouts, exports for other programs."""
