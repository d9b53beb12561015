#!/usr/bin/env bash
# datasets 5.2.0: of a WebDataset, a member that none of the first five samples has is left out of all, without a word.
#
# Guess: a member that only some samples have is there in those, and None in the others.
# Behaviour: which columns there are is decided by the first five samples of the first shard. A member that is in these is None
# in later samples without it, as guessed; one that comes later is dropped, also when streaming. Where the five differ among
# themselves, the dataset is refused as no WebDataset.
# Why it matters: masks, captions or further references that only some photos have are lost, or not, by the order of the
# samples. Declaring the features (in the dataset's card, or features=...) keeps them.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "datasets==5.2.0" "pyarrow==26.0.1" "pillow==13.0.0" "numpy==2.4.6"
cat >probe.py <<'END'
import io
import os
import sys
import tarfile

os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=os.path.abspath("home"))
import datasets

datasets.disable_progress_bars()


def write(name, samples_with_it):
    with tarfile.open(name, "w") as tar:
        for n in range(10):
            for suffix in ("txt", "mask.txt") if n in samples_with_it else ("txt",):
                member = tarfile.TarInfo(f"{n:03d}.{suffix}")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))


seen = {}
for name, samples in (("early", range(6)), ("late", range(5, 8))):
    write(f"{name}.tar", samples)
    for streaming in (False, True):
        rows = datasets.load_dataset("webdataset", data_files=f"{name}.tar", split="train", streaming=streaming)
        seen[name, streaming] = sum(row.get("mask.txt") is not None for row in rows)
recorded = {("early", False): 6, ("early", True): 6, ("late", False): 0, ("late", True): 0}
print("datasets", datasets.__version__)
print("guess:", {**recorded, ("late", False): 3, ("late", True): 3})
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
