#!/usr/bin/env bash
# datasets 5.2.0: of a WebDataset's JSON, a number that is whole in the first five samples is cut to a whole one in all others.
#
# Guess: a column of whole and fractional numbers is one of floats, or an error says that it is not one of integers.
# Behaviour: types are decided by the first five samples of the first shard. Where a value is an integer there, 6.5 is 6 in all
# later samples, also when streaming, and also in lists. A value that is null there and a text later is an error where the
# dataset is prepared, and comes through as text when streaming.
# Why it matters: boxes in px that are whole in the first photos lose their fractions, and scores of 1, 1, 0, 1, 1 make
# zeros of all that are below 1. Declaring the features (in the dataset's card, or features=...) keeps them.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "datasets==5.2.0" "pyarrow==26.0.1" "pillow==13.0.0" "numpy==2.4.6"
cat >probe.py <<'END'
import io
import json
import os
import sys
import tarfile

os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=os.path.abspath("home"))
import datasets

datasets.disable_progress_bars()
with tarfile.open("boxes.tar", "w") as tar:
    for n in range(8):
        told = json.dumps({"score": 1 if n < 5 else 0.75, "box": [10, 20, 30, 40] if n < 5 else [10.5, 20.25, 30.5, 40.75]}).encode()
        member = tarfile.TarInfo(f"{n:03d}.json")
        member.size = len(told)
        tar.addfile(member, io.BytesIO(told))
seen = []
for streaming in (False, True):
    *_, last = datasets.load_dataset("webdataset", data_files="boxes.tar", split="train", streaming=streaming)
    seen.append((last["json"]["score"], list(last["json"]["box"])))
recorded = [(0, [10, 20, 30, 40])] * 2
print("datasets", datasets.__version__)
print("guess:", [(0.75, [10.5, 20.25, 30.5, 40.75])] * 2)
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
