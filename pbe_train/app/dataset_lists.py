"""Tables that people page through, rejects and failures: rows by filters. And the list of what is marked to be left out."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int32

from pbe_core.dataset_reader import take_rows
from pbe_core.errors import InputError
from pbe_core.leave_out import LeftOut, read_left_out, write_left_out

BATCH_ROWS = 65_536
KEPT = 3
"""Filters whose rows are kept, 4 bytes a row."""


class Listed:
    """Rows of one table, by filters. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: OrderedDict[tuple[tuple[str, str], ...], Int32[np.ndarray, " found"]] = OrderedDict()
        self._lock = threading.Lock()

    def page(
        self, filters: Mapping[str, str], texts: Mapping[str, str], first: int, count: int, columns: Sequence[str]
    ) -> tuple[int, list[dict[str, Any]]]:
        """How many rows pass, and some of them.

        Args:
            filters: column -> the word that must stand there.
            texts: column -> what must stand there somewhere, in any case.
            first: of the rows that pass, from 0.
            count: of rows.
            columns: of the rows; each has its `place` in the table, too.

        Raises:
            InputError: the table cannot be read.
        """
        try:
            if not filters and not texts:
                total = pq.read_metadata(self.path).num_rows
                places = np.arange(min(first, total), min(first + count, total))
            else:
                found = self._find(filters, texts)
                total, places = len(found), found[first : first + count]
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
        rows = take_rows(self.path, places.tolist(), columns)
        return total, [{**row, "place": place} for row, place in zip(rows, places.tolist(), strict=True)]

    def row(self, place: int, columns: Sequence[str]) -> dict[str, Any]:
        """One row. Raises InputError where there is none."""
        if place >= pq.read_metadata(self.path).num_rows:
            raise InputError(f"{self.path}: no row {place}")
        return take_rows(self.path, [place], columns)[0]

    def _find(self, filters: Mapping[str, str], texts: Mapping[str, str]) -> Int32[np.ndarray, " found"]:
        key = (*sorted(filters.items()), ("", ""), *sorted(texts.items()))
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _places(self.path, filters, texts)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


def _places(path: Path, filters: Mapping[str, str], texts: Mapping[str, str]) -> Int32[np.ndarray, " found"]:
    parts, done = [np.zeros(0, np.int32)], 0
    with pq.ParquetFile(path, read_dictionary=list(filters)) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=[*filters, *texts]):
            passes = np.ones(len(batch), bool)
            for name, word in filters.items():
                passes &= _equals(batch.column(name), word)
            for name, text in texts.items():
                matches = pc.match_substring(batch.column(name).cast(pa.string()), text, ignore_case=True)
                passes &= pc.fill_null(matches, False).to_numpy(zero_copy_only=False)
            parts.append((np.flatnonzero(passes) + done).astype(np.int32))
            done += len(batch)
    return np.concatenate(parts)


def _equals(column: pa.Array, word: str) -> Bool[np.ndarray, " rows"]:
    words = column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
    place = words.dictionary.index(word).as_py()
    equal: np.ndarray = words.indices.fill_null(-1).to_numpy(zero_copy_only=False) == (place if place >= 0 else -2)
    return equal


class Marks:
    """The list of what is left out: a file, read again where somebody else has changed it, and written with each mark.

    Args:
        path: of the list; it need not be there yet.
        folders: of the datasets, in none of which it may lie.

    Raises:
        InputError: it lies in one.
    """

    def __init__(self, path: Path, folders: Sequence[Path]) -> None:
        self.path = path.absolute()
        for folder in folders:
            if self.path.is_relative_to(folder.absolute()) and (folder / "dataset.json").is_file():
                raise InputError(
                    f"--leave-out {path}: lies in the dataset {folder}, which stays as it was built; give another place"
                )
        self._lock = threading.Lock()

    def read(self) -> LeftOut:
        """What is marked now. Raises InputError where the file is no such list."""
        return read_left_out(self.path) if self.path.exists() else LeftOut()

    def mark(self, what: str, name: str, leave: bool) -> LeftOut:
        """Add an id of an `object` or `photo`, or take it away; what is marked then.

        Raises:
            InputError: the file cannot be written.
        """
        with self._lock:
            marked = self.read()
            if leave:
                marked.of(what).add(name)
            else:
                marked.of(what).discard(name)
            try:
                write_left_out(self.path, marked)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror}); give another place: --leave-out") from None
            return marked
