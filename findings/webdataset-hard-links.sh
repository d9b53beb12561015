#!/usr/bin/env bash
# webdataset 1.0.2: a sample whose file is a hard link in the tar is left out without a word.
#
# Guess: a file that tar, tarfile and fsspec read is a sample.
# Behaviour: tar writes the second name of one file as a link to the first, without its bytes. webdataset passes over every
# member that is no regular file. Nothing is counted or logged.
# Why it matters: tools that find duplicates replace them by hard links, and backups and `cp -l` make them. A shard of such a
# folder lacks photos, or has captions without their photos: here 1.jpg is gone and 1.txt is a sample of its own.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "webdataset==1.0.2" "numpy==2.4.6"
cat >probe.py <<'END'
import os
import sys
import tarfile
import warnings
from importlib.metadata import version

import webdataset

warnings.simplefilter("ignore")
names = ["0.jpg", "0.txt", "1.jpg", "1.txt"]
for name, content in (("0.jpg", "a photo"), ("0.txt", "a caption"), ("1.txt", "another caption")):
    with open(name, "w") as file:
        file.write(content)
os.link("0.jpg", "1.jpg")
with tarfile.open("shard.tar", "w") as shard:
    for name in names:
        shard.add(name)
with tarfile.open("shard.tar") as shard:
    assert shard.extractfile("1.jpg").read() == b"a photo"
read = webdataset.WebDataset("shard.tar", shardshuffle=False)
seen = [(sample["__key__"], sorted(key for key in sample if not key.startswith("__"))) for sample in read]
recorded = [("0", ["jpg", "txt"]), ("1", ["txt"])]
print("webdataset", version("webdataset"))
print("guess:", [("0", ["jpg", "txt"]), ("1", ["jpg", "txt"])])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
