"""Held-out samples, which tell how good a model is."""
