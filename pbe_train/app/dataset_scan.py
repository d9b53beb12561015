"""Reads one column of a whole dataset, as a program of its own: what the viewer filters by.

    index.parquet ──▶ the class of every sample          plan.parquet ──▶ its object's share of the photo
                 └──▶ places of keys with a text in them  shards ──────▶ which kinds of masks it has

The footer of a large index takes hundreds of MB and seconds: the process ends, and all that is gone. It reads a task as JSON
from its standard input, fills an array in a file, and prints JSON lines. A small dataset is read by a thread of the server.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pbe_core.errors import InputError, run_program
from pbe_core.storage import RemoteFolder
from schemas.sample import MASK_KINDS

BATCH_ROWS = 65_536
TYPES = {"classes": "<i4", "sizes": "<f4", "kinds": "<u1"}
"""What the arrays hold: the class's number, in the order of meeting; the share of the photo, NaN where unknown; a bit for each of
`MASK_KINDS`, from the lowest."""
_PLANNED = b"shards"

Told = dict[str, Any]


def main() -> None:
    """Do the task of standard input."""
    for told in scan(json.loads(sys.stdin.readline())):
        print(json.dumps(told), flush=True)


def scan(task: Told) -> Iterator[Told]:
    """Do a task; yields how far it is and what it met.

    Args:
        task: `what`, a scan below; `folder` of the dataset's tables; `samples` in it; `out`, the array's file, or `text`, what is
            looked for; for sizes also `shards`, `url` and `storage`.

    Raises:
        InputError: a table is missing or damaged.
    """
    scans = {"classes": scan_classes, "sizes": scan_sizes, "kinds": scan_kinds, "text": scan_text}
    try:
        yield from scans[task["what"]](task)
    except (OSError, pa.ArrowException) as error:
        raise InputError(" ".join(str(error).split())[:300]) from None


def scan_classes(task: Told) -> Iterator[Told]:
    """The class of each sample, by numbers; tells each class's id and name when it is met."""
    numbers: dict[str, int] = {}
    array = _array(task)
    done = 0
    with _index(task, read_dictionary=["label", "label_name"]) as index:
        for batch in index.iter_batches(BATCH_ROWS, columns=["label", "label_name"], use_threads=False):
            labels, names = (_as_dictionary(batch.column(name)) for name in ("label", "label_name"))
            own = labels.dictionary.to_pylist()
            new = [place for place, label in enumerate(own) if label not in numbers]
            places = labels.indices.to_numpy()
            met = []
            for place in new:
                first = int(np.argmax(places == place))
                if places[first] != place:  # A word of the dictionary that this batch does not use.
                    continue
                numbers[own[place]] = len(numbers)
                met.append([own[place], names[first].as_py()])
            known = np.array([numbers.get(label, -1) for label in own], np.int32)
            array[done : done + len(batch)] = known[places]
            done += len(batch)
            yield {"done": done, "classes": met}
    array.flush()


def scan_sizes(task: Told) -> Iterator[Told]:
    """The object's share of the photo of each sample. The plan has the samples of the index, and those that failed."""
    array = _array(task)
    samples: dict[str, list[int]] = task["shards"]
    keys: _KeysOfShards | None = None
    with _plan(task) as plan:
        shards = iter(json.loads((plan.metadata.metadata or {})[_PLANNED]).items())
        for group in range(plan.num_row_groups):
            table, start = plan.read_row_group(group, columns=["area_share"]), 0
            named: pa.Table | None = None
            while start < len(table):
                shard, planned = next(shards)
                own = table.slice(start, planned)["area_share"].to_numpy()
                first, count = samples.get(shard, (0, 0))
                if 0 < count != planned:
                    named = named or plan.read_row_group(group, columns=["key"])
                    keys = keys or _KeysOfShards(Path(task["folder"]) / "index.parquet")
                    places = pc.index_in(keys.of(shard), value_set=named["key"].slice(start, planned).combine_chunks())
                    own = np.append(own, np.nan)[places.fill_null(planned).to_numpy(zero_copy_only=False)]
                if count:
                    array[first : first + count] = own
                start += planned
            yield {"done": max((sum(samples[name]) for name in (shard,) if name in samples), default=0)}
    array.flush()


def scan_kinds(task: Told) -> Iterator[Told]:
    """The kinds of each sample's masks. They stand in the samples alone, so each one's `json` is read."""
    array = _array(task)
    folder = Path(task["folder"])
    done = 0
    with _index(task) as index:
        for batch in index.iter_batches(BATCH_ROWS, columns=["shard", "json"], use_threads=False):
            shard, file = "", -1
            for row in batch.to_pylist():
                if row["shard"] != shard:
                    if file >= 0:
                        os.close(file)
                    shard, file = row["shard"], _open(folder / "shards" / f"{row['shard']}.tar")
                array[done] = _kinds(file, row["json"])
                done += 1
            if file >= 0:
                os.close(file)
            yield {"done": done}
    array.flush()


def scan_text(task: Told) -> Iterator[Told]:
    """Places of samples whose key, which begins with the photo's id, has a text in it, whatever the case."""
    done = 0
    with _index(task) as index:
        for batch in index.iter_batches(BATCH_ROWS, columns=["key"], use_threads=False):
            found = pc.indices_nonzero(pc.match_substring(batch.column("key"), task["text"], ignore_case=True))
            yield {"done": done + len(batch), "found": (found.to_numpy() + done).tolist()}
            done += len(batch)


class _KeysOfShards:
    """Keys of a shard's samples in `index.parquet`; opened only where the plan has samples that failed."""

    def __init__(self, path: Path) -> None:
        from pbe_train.app.dataset_folder import groups_of_shards

        self._index = pq.ParquetFile(path)
        self._groups = groups_of_shards(self._index)

    def of(self, shard: str) -> pa.Array:
        return self._index.read_row_group(self._groups[shard], columns=["key"])["key"].combine_chunks()


def _index(task: Told, **options: Any) -> pq.ParquetFile:
    # Reading ahead and in threads takes more memory and no less time.
    return pq.ParquetFile(Path(task["folder"]) / "index.parquet", pre_buffer=False, **options)


def _plan(task: Told) -> pq.ParquetFile:
    path = Path(task["folder"]) / "plan.parquet"
    if path.is_file() or not task["url"]:
        return pq.ParquetFile(path)
    remote = RemoteFolder(task["url"], task["storage"])
    return pq.ParquetFile(remote.files.open(remote.path("plan.parquet"), "rb"))


def _array(task: Told) -> "np.memmap[Any, Any]":
    return np.lib.format.open_memmap(task["out"], mode="r+")


def _as_dictionary(column: pa.Array) -> pa.DictionaryArray:
    return column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return -1


def _kinds(file: int, place: dict[str, int]) -> int:
    """Bits of a sample's kinds of masks; 0 where it cannot be read."""
    if file < 0:
        return 0
    try:
        kinds = json.loads(os.pread(file, place["length"], place["offset"]))["mask_kinds"]
        return sum(1 << number for number, kind in enumerate(MASK_KINDS) if kind in kinds)
    except (ValueError, KeyError, TypeError):
        return 0


if __name__ == "__main__":
    run_program(main)
