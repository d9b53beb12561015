"""Weights in and out: foreign models as a start of training, trained models in the layouts that others load."""
