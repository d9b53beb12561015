"""Which samples pass the viewer's filters: places in the index, found in compact columns.

    Query ──▶ split: ranges of shards
          ──▶ class, size, kinds of masks: arrays of 4, 4 and 1 bytes a sample, mapped from files of the cache
          ──▶ text: a list of places

An array is read once for a dataset and machine, by `dataset_scan`, when a filter first needs it. Until it is whole, what has been
read so far is searched, and `read` says how much that is.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from pbe_core.errors import InputError
from pbe_core.files import write_atomically
from pbe_train.app.dataset_folder import LARGE_FOOTER, DatasetFolder, footer_bytes
from pbe_train.app.dataset_scan import TYPES, scan

KEPT_RESULTS, KEPT_BYTES = 6, 80_000_000
"""Results of filters that are kept: their number, and the memory of all of them."""
KEPT_TEXTS = 2
"""Searches for a text that may run or be kept."""
MOST_FOUND = 2_000_000
"""Places that a search for a text keeps; a longer text finds fewer."""
_AT_ONCE = 1 << 18
KINDS = {"box": 1, "bessel": 2, "both": 3}
"""What the filter by kinds of masks calls the bits of `dataset_scan`: these kinds, and no other."""


class Query(NamedTuple):
    """What is asked for. All must hold."""

    label: str = ""
    """Class id; empty for any."""
    split: str = ""
    kinds: str = ""
    """A key of `KINDS`, or empty."""
    text: str = ""
    """Part of a key or of a photo's id, in any case."""
    smallest: float = 0.0
    """Least share of the photo that the object has."""
    largest: float = 1.0

    def needs(self) -> list[str]:
        """The columns that are looked at."""
        sized = self.smallest > 0 or self.largest < 1
        return [name for name, asked in (("classes", self.label), ("sizes", sized), ("kinds", self.kinds)) if asked]


@dataclass(frozen=True)
class Found:
    """Places of the samples that pass, in order: ranges where no column was looked at, else an array."""

    ranges: tuple[tuple[int, int], ...]
    places: Int32[np.ndarray, " found"] | None
    read: float
    """Share of the samples that were looked at, 0..1."""

    @property
    def total(self) -> int:
        """How many."""
        return sum(end - start for start, end in self.ranges) if self.places is None else len(self.places)

    def page(self, first: int, count: int) -> list[int]:
        """The places from the `first`-th one on."""
        if self.places is not None:
            page: list[int] = self.places[first : first + count].tolist()
            return page
        page = []
        for start, end in self.ranges:
            page += range(min(end, start + first), min(end, start + first + count - len(page)))
            first = max(0, first - (end - start))
        return page


class Column:
    """One of `dataset_scan.TYPES` of all samples: in the cache, or being read.

    Args:
        folder: of the dataset.
        what: which.
        cache: this dataset's folder of the cache.
    """

    def __init__(self, folder: DatasetFolder, what: str, cache: Path) -> None:
        self.scan: Scan | None = None
        self.classes: list[tuple[str, str]] = []
        """Id and name of the class of each number."""
        self.done = 0
        self.error = ""
        self._path, self._told = cache / f"{what}.npy", cache / f"{what}.json"
        shape = (folder.samples,)
        kept = _read_kept(self._path, self._told, TYPES[what], shape)
        if kept:
            self.values, self.classes, self.done = kept[0], kept[1], folder.samples
            return
        part = cache / f".{what}.{uuid.uuid4().hex}.npy"
        self.values = np.lib.format.open_memmap(part, "w+", TYPES[what], shape)
        self.scan = Scan(folder, what, {"out": str(part)})
        follow = threading.Thread(target=self._follow, args=(self.scan, part, folder.samples), name=f"reads {what}", daemon=True)
        follow.start()

    def _follow(self, scan: "Scan", part: Path, samples: int) -> None:
        try:
            for told in scan.lines():
                self.classes += [(label, name) for label, name in told.get("classes", ())]
                self.done = max(self.done, min(samples, told["done"]))
            self.done = samples
            part.replace(self._path)
            write_atomically(self._told, json.dumps({"classes": self.classes}).encode())
        except (InputError, OSError) as error:
            self.error = str(error)
            part.unlink(missing_ok=True)


class Search:
    """A search for a text in keys, running or done."""

    def __init__(self, folder: DatasetFolder, text: str) -> None:
        self.done, self.error, self.total = 0, "", folder.samples
        self._places: list[Int32[np.ndarray, " some"]] = []
        self._found = 0
        self.scan = Scan(folder, "text", {"text": text})
        threading.Thread(target=self._follow, name="searches", daemon=True).start()

    def places(self) -> Int32[np.ndarray, " found"]:
        """What has been found so far."""
        return np.concatenate([np.zeros(0, np.int32), *self._places])

    def _follow(self) -> None:
        try:
            for told in self.scan.lines():
                if told["found"] and self._found < MOST_FOUND:
                    self._places.append(np.array(told["found"][: MOST_FOUND - self._found], np.int32))
                    self._found += len(self._places[-1])
                self.done = told["done"]
            self.done = self.total
        except (InputError, OSError) as error:
            self.error = str(error)


class Scan:
    """`dataset_scan` at work: of a large dataset in a process of its own, which takes its memory along; of a small one here.

    Args:
        folder: of the dataset.
        what: which scan.
        more: of its task.
    """

    def __init__(self, folder: DatasetFolder, what: str, more: dict[str, Any]) -> None:
        shards = {name: (folder.start(name), int(end) - folder.start(name)) for name, end in _ends(folder)}
        self._task = {
            "what": what,
            "folder": str(folder.folder),
            "samples": folder.samples,
            "url": folder.remote.url if folder.remote else None,
            "storage": folder.storage,
            **({"shards": shards} if what == "sizes" else {}),
            **more,
        }
        self._small = footer_bytes(folder.folder / "index.parquet") <= LARGE_FOOTER
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it tells, until it has ended.

        Raises:
            InputError: it failed, or was stopped.
        """
        for told in scan(self._task) if self._small else self._run():
            yield told
            if self._stopped:
                raise InputError("reading it was stopped")

    def _run(self) -> Iterator[dict[str, Any]]:
        command = [sys.executable, "-m", "pbe_train.app.dataset_scan"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **pipes) as process:
            self._process = process
            assert process.stdin
            assert process.stdout
            assert process.stderr
            # Not on the command line, which all users of a machine see: options of stores hold keys.
            process.stdin.write(json.dumps(self._task) + "\n")
            process.stdin.close()
            for line in process.stdout:
                if line.endswith("\n"):  # The last one of a process that was killed may be cut off.
                    yield json.loads(line)
            said = process.stderr.read()
        if process.returncode:
            raise InputError(said.strip().splitlines()[-1].removeprefix("error: ") if said.strip() else "reading it failed")

    def stop(self) -> None:
        """End it, whatever it has done."""
        self._stopped = True
        if self._process:
            self._process.kill()


class Rows:
    """The samples of one dataset, by filters. Threads may share it.

    Args:
        folder: of the dataset.
        cache: folder for what is read once.
    """

    def __init__(self, folder: DatasetFolder, cache: Path) -> None:
        self.folder = folder
        self._cache = _folder_of(folder, cache)
        self._columns: dict[str, Column] = {}
        self._searches: OrderedDict[str, Search] = OrderedDict()
        self._kept: OrderedDict[Query, Found] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, query: Query) -> Found:
        """The samples that pass.

        Raises:
            InputError: a class or split that does not exist, or a column that cannot be read.
        """
        with self._lock:
            if query in self._kept:
                self._kept.move_to_end(query)
                return self._kept[query]
            found = self._find(query)
            if found.places is not None and found.read == 1:
                self._kept[query] = found
                while len(self._kept) > KEPT_RESULTS or sum(_bytes(each) for each in self._kept.values()) > KEPT_BYTES:
                    if len(self._kept) == 1:
                        break
                    self._kept.popitem(last=False)
            return found

    def count_classes(self, query: Query) -> tuple[list[tuple[str, str, int]], float]:
        """Id, name and samples of each class, the largest first, among those that pass all but the class; and the share read."""
        column = self._column("classes")
        found = self.find(query._replace(label=""))
        done = column.done
        counts = np.zeros(len(column.classes) + 1, np.int64)
        for codes in _parts(column.values, found, done):
            counts += np.bincount(codes, minlength=len(counts))[: len(counts)]
        order = np.argsort(-counts[:-1], kind="stable").tolist()
        listed = [(*column.classes[number], int(counts[number])) for number in order if counts[number]]
        return listed, min(found.read, done / max(1, self.folder.samples))

    def close(self) -> None:
        """End what is being read."""
        running = [column.scan for column in self._columns.values()] + [search.scan for search in self._searches.values()]
        for each in running:
            if each:
                each.stop()

    def _find(self, query: Query) -> Found:
        if query.split and query.split not in self.folder.info.splits:
            raise InputError(f"{self.folder.name}: no split `{query.split}`; it has {', '.join(self.folder.info.splits)}")
        ranges = tuple(self.folder.ranges(query.split or None))
        if not query.needs() and not query.text:
            return Found(ranges, None, 1.0)
        columns = {name: self._column(name) for name in query.needs()}
        search = self._search(query.text) if query.text else None
        done = min([each.done for each in columns.values()] + ([search.done] if search else []))
        tests = {name: _test(query, name, columns[name]) for name in columns}
        if search:
            places = search.places()
            places = places[(places < done) & _within(places, ranges)]
            for test in tests.values():
                places = places[test(places)]
        else:
            places = _places(list(tests.values()), ranges, done)
        return Found(ranges, places, done / max(1, self.folder.samples))

    def _column(self, what: str) -> Column:
        if what == "kinds" and self.folder.remote:
            raise InputError(
                "kinds of masks stand in the samples alone, which are not read one by one over a network; filter a local copy"
            )
        if what not in self._columns:
            self._columns[what] = Column(self.folder, what, self._cache)
        column = self._columns[what]
        if column.error:
            del self._columns[what]  # Asked again, it is tried again.
            raise InputError(f"{self.folder.name}: {column.error}")
        return column

    def _search(self, text: str) -> Search:
        text = text.strip().lower()
        if text not in self._searches:
            self._searches[text] = Search(self.folder, text)
            while len(self._searches) > KEPT_TEXTS:
                self._searches.popitem(last=False)[1].scan.stop()
        self._searches.move_to_end(text)
        search = self._searches[text]
        if search.error:
            del self._searches[text]
            raise InputError(f"{self.folder.name}: {search.error}")
        return search


def _test(query: Query, name: str, column: Column) -> Any:
    """Places (an array or a slice) -> which of them pass by one column."""
    values = column.values
    if name == "classes":
        numbers = [number for number, (label, _) in enumerate(column.classes) if label == query.label]
        code = numbers[0] if numbers else -1
        return lambda places: values[places] == code
    if name == "kinds":
        return lambda places: values[places] == KINDS[query.kinds]
    # Limits come in whole percents and shares in float32: 0.3 must not be smaller than 0.3. NaN passes nothing.
    smallest, largest = np.float32(query.smallest), np.float32(query.largest)
    return lambda places: (values[places] >= smallest) & (values[places] <= largest)


def _places(tests: Sequence[Any], ranges: tuple[tuple[int, int], ...], done: int) -> Int32[np.ndarray, " found"]:
    """The places in ranges, as far as `done`, that pass all tests. Takes a byte a sample beside what it returns."""
    passes = np.zeros(done, bool)
    for start, end in _chunks(ranges, done):
        passes[start:end] = True
        for test in tests:
            passes[start:end] &= test(slice(start, end))
    places, filled = np.empty(int(np.count_nonzero(passes)), np.int32), 0
    for start, end in _chunks(((0, done),), done):
        some = np.flatnonzero(passes[start:end])
        places[filled : filled + len(some)] = some + start
        filled += len(some)
    return places


def _within(places: Int32[np.ndarray, " found"], ranges: tuple[tuple[int, int], ...]) -> Bool[np.ndarray, " found"]:
    inside = np.zeros(len(places), bool)
    for start, end in ranges:
        inside |= (places >= start) & (places < end)
    return inside


def _parts(values: np.ndarray, found: Found, done: int) -> Iterator[np.ndarray]:
    """The values at the places found, some at a time."""
    if found.places is not None:
        places = found.places[found.places < done]
        for start in range(0, len(places), _AT_ONCE):
            yield values[places[start : start + _AT_ONCE]]
        return
    for start, end in _chunks(found.ranges, done):
        yield values[start:end]


def _chunks(ranges: tuple[tuple[int, int], ...], done: int) -> Iterator[tuple[int, int]]:
    """Ranges as far as `done`, cut into some that take little memory."""
    for first, last in ranges:
        for start in range(first, min(last, done), _AT_ONCE):
            yield start, min(last, done, start + _AT_ONCE)


def _bytes(found: Found) -> int:
    return 0 if found.places is None else found.places.nbytes


def _ends(folder: DatasetFolder) -> Iterator[tuple[str, int]]:
    return zip(folder.shards, folder.ends.tolist(), strict=True)


def _folder_of(folder: DatasetFolder, cache: Path) -> Path:
    """This dataset's folder of the cache: by its dataset.json and the size of its index, which another build changes."""
    known = (folder.folder / "dataset.json").read_bytes() + b"%d" % (folder.folder / "index.parquet").stat().st_size
    own = cache / "viewer" / hashlib.sha256(known).hexdigest()[:16]
    try:
        own.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=own):
            return own
    except OSError as error:
        raise InputError(f"{own}: cannot be written to ({error.strerror}); give another folder: --cache") from None


def _read_kept(path: Path, told: Path, kind: str, shape: tuple[int, ...]) -> tuple[Any, list[tuple[str, str]]] | None:
    """A column of the cache, mapped; null where there is none, or another one."""
    try:
        values = np.lib.format.open_memmap(path, mode="r")
        classes = [(label, name) for label, name in json.loads(told.read_bytes())["classes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (values, classes) if values.dtype == np.dtype(kind) and values.shape == shape else None
