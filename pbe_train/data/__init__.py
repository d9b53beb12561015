"""Shards to batches: the order of samples, reading them, and what the model sees at (step, slot)."""
