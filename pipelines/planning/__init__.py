"""Objects -> a frozen plan: which sample goes into which shard, its fingerprint, and what it will cost."""
