"""Around the loop of train.py: its set-up, the ranks, the optimizer, and what a run says about itself."""
