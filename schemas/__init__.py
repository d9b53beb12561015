"""The contract between the two wings: what the pipelines write and the trainer reads, agreed to the bit.

Imports neither wing. Tables: `tables.py`. A sample in a shard: `sample.py`. `dataset.json`: `dataset.py`. Bytes to pixels:
`photos.py`. Random choices as functions of names: `randomness.py`. Configuration files: `settings.py`.
"""
