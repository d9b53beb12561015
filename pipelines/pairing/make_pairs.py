"""From a drawn object to a pair: its square and mask, and a reference of its class from another photo.

    target ──▶ square, mask                                        pool of its class
       └─────▶ the object's crop ──judge──▶ features ──cosine──▶ nearest first     (or an order by name)
                                                     └─▶ the first whose photo can be read and is another one ──▶ reference

Each object is looked at by itself, a network's batch is one picture and runs on one thread: so features, and what is nearest,
are the same whatever the number of threads.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8

from pbe_core.images.decode import PhotoError
from pbe_core.progress import Progress
from pbe_core.randomness import name_hash
from pipelines.pairing.cut import Opened, cut_object, cut_target, open_object, png_bytes, same_in_tables, same_photo
from pipelines.pairing.draw import Row
from pipelines.pairing.settings import BenchmarkSettings
from pipelines.threads import in_order

NO_REFERENCE = "no_reference"


@runtime_checkable
class Compares(Protocol):
    """What is asked of a judge (`pbe_core.judges.judge.Judge`)."""

    @property
    def identity(self) -> Any:
        """A pydantic model that says which network it is."""

    def features(self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float32[np.ndarray, "pictures width"]:
        """One row for each picture."""


@dataclass(frozen=True)
class MadePair:
    """A pair, as its files will be."""

    target: Mapping[str, Any]
    """Row of the object."""
    reference: Mapping[str, Any]
    """Row of the other object."""
    similarity: float | None
    """Cosine of the two by the judge's features; null where nobody was asked."""
    box: tuple[int, int, int, int]
    """Of the mask, in px of the square: x_min, y_min, x_max, y_max; ends exclusive."""
    whole: bool
    """Whether the square holds all of the object's box."""
    photo_png: bytes
    mask_png: bytes
    reference_png: bytes


@dataclass(frozen=True)
class Pool:
    """The objects of a class that may be references, and their features, unit length, where a judge is asked."""

    rows: list[Row]
    features: Float64[np.ndarray, "rows width"] | None


class PairMaker:
    """Makes pairs in threads; keeps the features of each pool that was needed, nothing else."""

    def __init__(
        self, settings: BenchmarkSettings, pools: Mapping[str, list[Row]], judge: Compares | None, threads: ThreadPoolExecutor
    ) -> None:
        self.settings = settings
        self.judge = judge
        self.threads = threads
        self.ahead = 2 * (settings.benchmark.threads or cpus())
        self.pools = {} if judge else {label: Pool(rows, None) for label, rows in pools.items()}
        # Of most sources, few pools are ever needed.
        self.waiting = dict(pools) if judge else {}
        self.unread: Counter[str] = Counter()
        """Codes of objects that cannot be references."""

    def look_at(self, targets: Iterable[Row]) -> None:
        """Compute the features of the pools that these targets need; objects whose photos cannot be used leave them."""
        wanted = dict.fromkeys(row["label"] for row in targets if row["label"] in self.waiting)
        pools = {label: self.waiting.pop(label) for label in wanted}
        if not pools:
            return
        rows = [row for pool in pools.values() for row in pool]
        features: dict[str, list[tuple[Row, Float64[np.ndarray, " width"]]]] = {label: [] for label in pools}
        with Progress("looking at references", len(rows), "objects") as progress:
            for row, found in zip(rows, in_order(self.threads, self._features_of, rows, self.ahead), strict=True):
                progress.update()
                if isinstance(found, str):
                    self.unread[found] += 1
                else:
                    features[row["label"]].append((row, found))
        for label, pairs in features.items():
            self.pools[label] = Pool([row for row, _ in pairs], np.stack([found for _, found in pairs]) if pairs else None)

    def make(self, targets: Iterable[Row]) -> Iterator[MadePair | str]:
        """For each target, in order, its pair, or the reason why there is none."""
        return in_order(self.threads, self.make_one, targets, self.ahead)

    def make_one(self, row: Row) -> MadePair | str:
        """One pair, or why there is none: a photo's code, what the square makes of the box, or `no_reference`."""
        settings = self.settings
        size, rules = settings.benchmark.size, settings.selection
        try:
            opened = open_object(row, settings)
        except PhotoError as error:
            return error.code
        target = cut_target(opened, size)
        # The area rules are asked of what a model sees, too: of a square, a box is a larger share than of its photo.
        if settings.benchmark.ids is None and not rules.min_area <= target.share <= rules.max_area:
            return "too_small_in_square" if target.share < rules.min_area else "too_large_in_square"
        for candidate, similarity in self._best_first(opened):
            try:
                other = open_object(candidate, settings)
            except PhotoError:
                continue
            if not same_photo(opened, other):
                reference = cut_object(other, settings.references.padding, size)
                pngs = [png_bytes(picture) for picture in (target.photo, target.mask, reference)]
                return MadePair(row, candidate, similarity, _box_of(target.mask), target.whole, *pngs)
        return NO_REFERENCE

    def _best_first(self, opened: Opened) -> Iterator[tuple[Row, float | None]]:
        """The pool of an object's class, the best reference first, with the cosine where a judge says it."""
        pool = self.pools.get(opened.row["label"], Pool([], None))
        rows, scores = pool.rows, None
        if pool.features is not None and rows:
            # Not `@`: the order in which BLAS sums may depend on its threads.
            scores = (pool.features * self._unit_features(opened)).sum(axis=1)
            order = np.argsort(-scores, kind="stable").tolist()
        else:
            names = self.settings.seed, "reference", opened.row["object_id"]
            order = sorted(range(len(rows)), key=lambda place: name_hash(*names, rows[place]["object_id"]))
        for place in order:
            if not same_in_tables(opened.row, rows[place]):
                yield rows[place], None if scores is None else float(scores[place])

    def _features_of(self, row: Row) -> Float64[np.ndarray, " width"] | str:
        try:
            return self._unit_features(open_object(row, self.settings))
        except PhotoError as error:
            return error.code

    def _unit_features(self, opened: Opened) -> Float64[np.ndarray, " width"]:
        assert self.judge is not None
        crop = cut_object(opened, self.settings.references.padding, self.settings.benchmark.size)
        features = self.judge.features([crop])[0].astype(np.float64)
        unit: np.ndarray = features / max(float(np.linalg.norm(features)), np.finfo(np.float64).tiny)
        return unit


@contextmanager
def one_thread_each(asked: bool) -> Iterator[None]:
    """While the block runs, PyTorch, where it is asked, and OpenCV use one thread for each of ours: more would be in the way."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        if not asked:
            yield
            return
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
    finally:
        cv2.setNumThreads(before)


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _box_of(mask: Bool[np.ndarray, "size size"]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
