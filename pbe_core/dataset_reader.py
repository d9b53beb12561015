"""A dataset folder: its `dataset.json`, and single rows and samples by random access (`index.parquet` says where members lie).

Tables have millions of rows: to find some, one column streams by; the other columns are read where rows were found.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64
from pydantic import ValidationError

from pbe_core.errors import InputError
from pbe_core.sample_codec import Sample, decode_sample
from pbe_core.words import number_of
from schemas.dataset import FORMAT_VERSION, Books, DatasetInfo
from schemas.sample import MEMBER_NAMES, other_reference

_BATCH_ROWS = 65_536


def read_dataset(folder: Path) -> DatasetInfo:
    """The `dataset.json` of a dataset folder.

    Raises:
        InputError: no dataset there, a build that was not finished, or another format version.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        if (folder / "plan.parquet").is_file():
            raise InputError(f"{path}: the build in this folder is not finished; run the same build command again")
        raise InputError(f"{path}: no dataset here; build one first (`make shards`, or python pipelines/build.py --config ...)")
    try:
        content = json.loads(path.read_bytes())
        version = content["format_version"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; run the build again, it makes only what is missing") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; build the dataset again")
    try:
        return DatasetInfo.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; build the dataset again") from None


def find_imbalance(books: Books) -> str | None:
    """The first account that does not balance, as a sentence; None if all do."""
    if books.boxes != books.objects + sum(books.rejects.values()):
        boxes = number_of(books.boxes, "box", "boxes")
        return f"of {boxes} {books.objects} were accepted and {sum(books.rejects.values())} rejected"
    if books.planned != books.samples + sum(books.failures.values()):
        planned = number_of(books.planned, "sample")
        return f"of {planned} planned {books.samples} were packed and {sum(books.failures.values())} failed"
    return None


def find_places(table: Path, column: str, matches: Callable[[pa.Array], pa.Array], limit: int) -> dict[int, str]:
    """The first `limit` rows of a table whose text in `column` matches: place of the row -> that text.

    Args:
        table: a Parquet file.
        column: of strings.
        matches: values -> booleans; null counts as false.
        limit: of rows.

    Raises:
        InputError: the table is not there or damaged.
    """
    found: dict[int, str] = {}
    start = 0
    with _opened(table) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=[column]):
            values = batch.column(0)
            places = pc.indices_nonzero(pc.fill_null(matches(values), False))[: limit - len(found)]
            found.update(zip((start + place for place in places.to_pylist()), values.take(places).to_pylist(), strict=True))
            if len(found) == limit:
                break
            start += len(batch)
    return found


def take_rows(table: Path, places: Iterable[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a table by their places, in the order of the table; only row groups that hold one of them are read.

    Args:
        table: a Parquet file.
        places: 0 is the first row.
        columns: all, by default.

    Raises:
        InputError: the table is not there or damaged.
    """
    wanted = np.unique(np.fromiter(places, np.int64))
    rows: list[dict[str, Any]] = []
    with _opened(table) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        groups = np.searchsorted(starts, wanted, side="right") - 1
        for group in np.unique(groups).tolist():
            inside = pa.array(wanted[groups == group] - starts[group])
            chosen = list(columns) if columns is not None else None
            rows += file.read_row_group(group, columns=chosen).take(inside).to_pylist()
    return rows


def read_sample(dataset: Path, row: Mapping[str, Any], *, means_only: bool = False) -> Sample:
    """The sample of a row of the index, decoded and validated; `means_only` says dataset.json (`vae.deterministic`).

    Raises:
        InputError: its shard is not there, or the sample is damaged.
    """
    path = dataset / "shards" / f"{row['shard']}.tar"
    members = {}
    try:
        with path.open("rb") as file:
            for name, place in member_places(row).items():
                file.seek(place["offset"])
                members[name] = file.read(place["length"])
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; copy the shard here, or run the same build command again, which makes what is missing"
        ) from None
    return decode_sample(members, f"{path}, key {row['key']}", means_only=means_only)


def member_places(row: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Members that a row of the index tells of: name -> offset and length in the tar, in bytes."""
    places = {name: row[name.replace(".", "_")] for name in MEMBER_NAMES}
    others = {other_reference(number): place for number, place in enumerate(row.get("refs_jpg") or (), start=1)}
    return {name: place for name, place in (places | others).items() if place is not None}


@dataclass(frozen=True)
class Classes:
    """The class of every sample of a dataset. Holds 4 bytes for each sample."""

    labels: tuple[str, ...]
    """Class ids, sorted."""
    names: tuple[str, ...]
    """Class name of each."""
    codes: Int32[np.ndarray, " samples"]
    """Place in `labels` of each sample's class, in the order of the index."""

    def counts(self) -> Int64[np.ndarray, " labels"]:
        """Samples of each class."""
        return np.bincount(self.codes, minlength=len(self.labels)).astype(np.int64)

    def by_frequency(self) -> list[int]:
        """Places in `labels`, the class of most samples first; of equal ones by id."""
        places: list[int] = np.argsort(-self.counts(), kind="stable").tolist()
        return places


def read_classes(dataset: Path) -> Classes:
    """The classes of a dataset's index.

    Raises:
        InputError: the index is not there or damaged.
    """
    names: dict[str, str] = {}
    places: dict[str, int] = {}
    codes = [np.zeros(0, np.int32)]
    with _opened(dataset / "index.parquet") as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=["label", "label_name"]):
            labels = batch.column("label").dictionary_encode()
            own = labels.dictionary.to_pylist()
            numbers = labels.indices.to_numpy()
            first = np.unique(numbers, return_index=True)[1]
            names |= zip(own, batch.column("label_name").take(pa.array(first)).to_pylist(), strict=True)
            codes.append(np.array([places.setdefault(label, len(places)) for label in own], np.int32)[numbers])
    ordered = sorted(places)
    rank = np.zeros(len(places), np.int32)
    rank[[places[label] for label in ordered]] = np.arange(len(ordered), dtype=np.int32)
    return Classes(tuple(ordered), tuple(names[label] for label in ordered), rank[np.concatenate(codes)])


@contextmanager
def _opened(table: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file, closed afterwards; whatever is wrong with it becomes an error for people."""
    try:
        with pq.ParquetFile(table) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"{table}: cannot be read ({cause}); run the same build command again, which makes what is missing"
        ) from None
