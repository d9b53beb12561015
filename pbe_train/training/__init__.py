"""Around the loop: ranks, moving average, checkpoints, and what a run says about itself."""
