"""Pairs of photo, mask and reference from boxes, for judging models: what `pipelines/benchmark.py` is made of."""
