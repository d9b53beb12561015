"""The contract between the two wings: what the pipelines write and the trainer reads.

Tables: `tables.py`. A sample in a shard: `sample.py`. `dataset.json`: `dataset.py`. What became of a photo: `outcomes.py`.
As a page: `document.py`. Imports nothing of ours.
"""
