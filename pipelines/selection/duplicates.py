"""The same photo under two ids: how it is found, and which of the two is kept. Otherwise held-out photos would be trained on.

    file_name ─────equal──┐
    original_md5 ──equal──┤
    url ───────────equal──┼─▶ pairs ──connected components──▶ groups ──one kept each──▶ SAME_PHOTOS
    sha256 ────────equal──┤
    perceptual_hash ─near─┘

All of it is vectorised, and holds names and hashes of all photos in memory: at most 1.6 GB, and 40 s, for 1.9 million photos.
Not found are copies that were turned, mirrored, cut by more than some 2 % of a side, or written over; nor are photos told apart
that are empty but for one spot in the same place.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64, UInt8, UInt64

from pbe_core.errors import InputError
from pbe_core.randomness import hash_column
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings
from pipelines.selection.partition import SORTED_SPLITS, Partitions, photo_hashes
from pipelines.selection.rules import pairs_within
from schemas.tables import SAME_PHOTOS, WORD, one_word

# Strongest evidence first: one file, what the tables have on the original, the file's bytes, what the photo shows.
EVIDENCE = ("file_name", "original_md5", "url", "sha256", "perceptual_hash")
# Bits of `PerceptualHash.coarse` and `.detail` in which copies may differ. On 74 real photos these are at most 2 and 4 if saved
# again or made smaller, in 8 and 10 if edited or cut a little; different photos in 14 and 16 at least (docs/decisions.md).
MAX_DISTANCE = 6
MAX_DETAIL_DISTANCE = 12
# In grey levels. The plainest of these photos has 24; made fainter and saved again, none is lost down to 4, 15 % between 2 and 3.
MIN_STRUCTURE = 2.0
# The 64 lowest frequencies outside the 8 x 8 block of `coarse`, (row, column), diagonal by diagonal.
_DETAIL = tuple(
    np.array(sorted((index for index in np.ndindex(32, 32) if max(index) >= 8), key=lambda index: (sum(index), index))[:64]).T
)
# Bands of a hash that must agree; see `near_pairs`.
_AGREEING_BANDS = 3

ADDRESS = "^[A-Za-z][A-Za-z0-9+.-]*://[^/]+/."
PHOTO_LIST = "photo_list.json"
SCAN_RECORD = "survey.json"


class PerceptualHash(NamedTuple):
    """What a photo shows, in 2 x 64 bits that hardly change when it is resized or compressed again."""

    coarse: int
    """The 8 x 8 lowest frequencies: copies are found by it."""
    detail: int
    """The 64 next ones: a copy is confirmed by it."""


def perceptual_hash(photo: UInt8[np.ndarray, "height width 3"]) -> PerceptualHash | None:
    """Hash what a photo (RGB, 0-255) shows; nothing if it shows too little.

    It is made grey, shrunk to 32 x 32 and transformed by an orthonormal DCT. `coarse` are the 8 x 8 lowest frequencies, row by
    row, a bit for each that is above their median; the constant term, which is the mean brightness, has no part in the median.
    `detail` is the same of the 64 next frequencies, diagonal by diagonal.

    A photo shows too little if its structure is below `MIN_STRUCTURE` grey levels: the median distance of the coarse frequencies
    from their median. Bits would then be noise, or the same zeros. Variance could not tell: that of a gradient is large.

    Source: the DCT hash of Zauner, Implementation and benchmarking of perceptual image hash functions (2010). `detail` is ours.
    """
    from scipy.fft import dctn  # SciPy takes 0.3 s of CPU to load, and plans without a scan need none of it.

    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY).astype(np.float32)  # Not 8 bits: rounding would be noise in plain photos.
    frequencies = dctn(cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64), norm="ortho")
    coarse = frequencies[:8, :8].ravel()
    middle = np.median(coarse[1:])
    if np.median(np.abs(coarse[1:] - middle)) < MIN_STRUCTURE:
        return None
    detail = frequencies[_DETAIL]
    return PerceptualHash(_as_integer(coarse > middle), _as_integer(detail > np.median(detail)))


def near_pairs(hashes: UInt64[np.ndarray, " hashes"], max_distance: int) -> Int64[np.ndarray, "pairs 2"]:
    """All pairs of hashes that differ in at most `max_distance` (0 to 61) of 64 bits, as places (smaller, larger), sorted. Exact.

    Divide the bits into d + 3 bands: in a pair that differs in at most d bits, at least 3 bands are untouched (the pigeonhole
    principle). So, for every 3 bands, sort the hashes by these and compare those that agree in them. With d + 1 bands, of which 1
    must agree, there would be fewer sorts, but thousands of times the comparisons. Every band takes bits from all over the hash,
    since those that stand together are alike in many photos. 1.9 million random hashes take 13 to 20 s at distance 6. Time and
    memory go by the number of pairs too, so give equal hashes once.

    Source: Manku et al., Detecting near-duplicates for web crawling (WWW 2007), section 3.
    """
    bands = max_distance + _AGREEING_BANDS
    masks = [sum(1 << bit for bit in range(band, 64, bands)) for band in range(bands)]
    found = np.zeros(0, np.int64)
    for chosen in itertools.combinations(masks, _AGREEING_BANDS):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys)
        new = [found]
        for earlier, later in pairs_within(keys[order]):
            left, right = order[earlier], order[later]
            near = np.bitwise_count(hashes[left] ^ hashes[right]) <= max_distance
            left, right = left[near], right[near]
            new.append(np.minimum(left, right) * len(hashes) + np.maximum(left, right))
        found = np.unique(np.concatenate(new))  # The closer a pair, the more bands find it.
    return np.stack(np.divmod(found, max(1, len(hashes))), axis=1)


def keepers(
    pairs: Int64[np.ndarray, "pairs 2"], is_train: Bool[np.ndarray, " photos"], order: UInt64[np.ndarray, " photos"]
) -> Int64[np.ndarray, " photos"]:
    """The place of the photo that is kept for each photo: itself, unless pairs lead from it, over any number of steps, to a
    better one.

    Args:
        pairs: places of photos that are the same.
        is_train: a photo of validation or test is kept rather than one of train: held-out photos stay what they are.
        order: then the smallest; a hash of the photo's name, so that the choice depends on names alone.
    """
    if not len(pairs):
        return np.arange(len(order))
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(order), len(order)))
    _, group = connected_components(graph, directed=False)
    best_first = np.lexsort((order, is_train, group))
    first = np.r_[True, np.diff(group[best_first]) != 0]
    kept: np.ndarray = best_first[first][group]
    return kept


def same_photos(photos: pa.Table) -> pa.Table:
    """Which photos are the same as another one that is kept, by all evidence together.

    Args:
        photos: columns split and photo_id, and any of `EVIDENCE`, the perceptual hash with detail_hash beside it. A null is
            unknown. Rows of the same split and id are one photo: tables with different evidence can be put below one another.

    Returns:
        Rows of `schemas.tables.SAME_PHOTOS`, sorted by split and id; the order of `photos` does not matter.
    """
    splits = photos["split"].cast(pa.string())
    names = pc.binary_join_element_wise(splits, photos["photo_id"], "/").combine_chunks().dictionary_encode()
    photo = names.indices.to_numpy().astype(np.int64)  # The number of each row's photo.
    first_row = np.unique(photo, return_index=True)[1]
    split, photo_id = (column.take(pa.array(first_row)) for column in (splits, photos["photo_id"]))
    is_train = pc.equal(split, "train").to_numpy(zero_copy_only=False)
    order = hash_column(names.dictionary, "same photo")

    pairs = np.zeros((0, 2), np.int64)
    kept = np.arange(len(order))
    kept_by = {}  # Evidence -> the photo kept for each photo, by it and by what is stronger.
    for name in EVIDENCE:
        if name in photos.column_names:
            rows = _alike(photos) if name == "perceptual_hash" else _equal(photos[name])
            pairs = np.concatenate([pairs, photo[rows]])
            kept = kept_by[name] = keepers(pairs, is_train, order)
    dropped = np.flatnonzero(kept != np.arange(len(order)))
    kept = kept[dropped]

    by = np.full(len(dropped), "", object)
    for name, keeper in kept_by.items():
        by[(by == "") & (keeper[dropped] == keeper[kept])] = name
    distance = np.zeros(len(dropped), np.int8)
    unknown = by != "perceptual_hash"
    if "perceptual_hash" in photos.column_names:
        rows, hashes = _present(photos["perceptual_hash"])
        of_photo, known = np.zeros(len(order), np.uint64), np.zeros(len(order), bool)
        of_photo[photo[rows]], known[photo[rows]] = hashes, True
        distance = np.bitwise_count(of_photo[dropped] ^ of_photo[kept]).astype(np.int8)
        unknown |= ~known[dropped] | ~known[kept]
    columns = {
        "split": split.take(pa.array(dropped)),
        "photo_id": photo_id.take(pa.array(dropped)),
        "kept_split": split.take(pa.array(kept)),
        "kept_photo_id": photo_id.take(pa.array(kept)),
        "by": pa.array(by, pa.string()),
        "distance": pa.array(distance, mask=unknown),
    }
    return pa.table(columns).sort_by([("split", "ascending"), ("photo_id", "ascending")]).cast(SAME_PHOTOS)


@dataclass(frozen=True)
class DuplicateScan:
    """What `pipelines/survey.py` left in a folder."""

    folder: Path
    same: pa.Table
    """Photos that are there under another id too; rows of `schemas.tables.SAME_PHOTOS`."""

    def read_photos(self) -> Iterator[pa.RecordBatch]:
        """All photos that have boxes, with their sizes; batches of `schemas.tables.SURVEY`."""
        with pq.ParquetFile(self.folder / "photos.parquet") as file:
            yield from file.iter_batches()


def read_scan(folder: Path) -> DuplicateScan:
    """Open what a duplicate scan left.

    Raises:
        InputError: there is none, or it is not finished.
    """
    if not (folder / SCAN_RECORD).is_file():
        found = "this survey is not finished" if (folder / PHOTO_LIST).is_file() else "no survey here"
        raise InputError(
            f"{folder}: {found} (it has no {SCAN_RECORD}); run pipelines/survey.py with the same config and --source.survey "
            f"{folder}, or do without it: take source.survey out of the config"
        )
    return DuplicateScan(folder, pq.read_table(folder / "same_photos.parquet"))


def find_duplicates(partitions: Partitions, source: Source, settings: BuildSettings, scan: DuplicateScan | None) -> pa.Table:
    """Photos that are there under another id too, by all that is known of them; rows of `schemas.tables.SAME_PHOTOS`.

    That is: what the reader has put together already, what the tables have on the photos' files, and what a scan found.
    """
    rows = [
        {"split": split, "photo_id": photo_id, "kept_split": split, "kept_photo_id": kept, "by": "file_name"}
        for split, photo_id, kept in sorted(source.joined())
    ]
    joined = pa.Table.from_pylist(rows, schema=SAME_PHOTOS)
    found = {name: _photos_that_share(partitions, name) for name in ("file_name", "original_md5", "url")}
    # Where the annotations are one file, so are all that bear one name: it has no splits and no folders for them.
    if not settings.source.annotations.is_file():
        found["file_name"] = by_place(found["file_name"], settings.source.photos)
    same = SAME_PHOTOS.empty_table()
    if any(map(len, found.values())):
        same = same_photos(pa.concat_tables(found.values(), promote_options="default").unify_dictionaries().combine_chunks())
    if not scan:
        return pa.concat_tables([joined, same]).unify_dictionaries()
    built = pa.array(list(settings.source.splits))
    here = [pc.is_in(scan.same[name].cast(pa.string()), built) for name in ("split", "kept_split")]
    scanned = scan.same.filter(pc.and_(*here))
    # The scan uses the tables' hashes too, of the photos that it found: its word on a photo counts.
    names = [pc.binary_join_element_wise(table["split"].cast(pa.string()), table["photo_id"], "/") for table in (same, scanned)]
    known = pc.is_in(names[0], value_set=names[1].combine_chunks())
    return pa.concat_tables([joined, same.filter(pc.invert(known)), scanned]).unify_dictionaries()


def count_duplicates(same: pa.Table) -> dict[str, int]:
    """How many photos were found, by how, and how many of them in another split than the one that is kept."""
    counts = Counter(same["by"].to_pylist())
    across = sum(a != b for a, b in zip(same["split"].to_pylist(), same["kept_split"].to_pylist(), strict=True))
    return {**dict(sorted(counts.items())), "across_splits": across} if len(same) else {}


def hashes_by_split(same: pa.Table, seed: int) -> dict[str, UInt64[np.ndarray, " photos"]]:
    """The photos that are not kept, by split, sorted."""
    splits = same["split"].cast(pa.string())
    ids = {split: same.filter(pc.equal(splits, split))["photo_id"].combine_chunks() for split in SORTED_SPLITS}
    return {split: np.unique(photo_hashes(column, seed)) for split, column in ids.items()}


def _photos_that_share(partitions: Partitions, name: str) -> pa.Table:
    """Photos that have boxes and share the value of a column with another row: split, photo_id and this column."""
    parts = partitions.parts()
    hashes, known = [], []
    for part in parts:
        column = partitions.photos.read_column(part, name)
        known.append(np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)))
        hashes.append(hash_column(column.drop_null()))
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = values[counts > 1]
    schema = pa.schema([("split", WORD), ("photo_id", pa.string()), (name, pa.string())])
    tables = [schema.empty_table()]
    for part, valid, own in zip(parts, known, hashes, strict=True):
        places = valid[np.isin(own, repeated)]
        if not len(places):
            continue
        photos = partitions.photos.read(part, ["photo", "photo_id", name]).take(pa.array(places)).combine_chunks()
        photo, photo_id, value = (photos[column].combine_chunks() for column in ("photo", "photo_id", name))
        # A photo without boxes must not be the one that is kept.
        wanted = are_among(np.asarray(photo), np.asarray(partitions.boxes.read_column(part, "photo")))
        if name == "url":  # `http://` or `unknown` is no photo's address.
            wanted &= pc.fill_null(pc.match_substring_regex(value, ADDRESS), False).to_numpy(zero_copy_only=False)
        chosen = pa.array(wanted)
        split = one_word(partitions.split_of(part), int(wanted.sum()))
        tables.append(pa.table([split, photo_id.filter(chosen), value.filter(chosen)], schema=schema))
    return pa.concat_tables(tables)


def are_among(few: UInt64[np.ndarray, " few"], many: UInt64[np.ndarray, " many"]) -> Bool[np.ndarray, " few"]:
    """Whether each of some numbers is among many; `np.isin` would sort these."""
    known = np.unique(few)
    place = np.minimum(np.searchsorted(known, many), len(known) - 1)
    found = np.zeros(len(known), bool)
    found[place[known[place] == many]] = True
    return found[np.searchsorted(known, few)]


def by_place(photos: pa.Table, root: Path) -> pa.Table:
    """Photos with a `file_name` that is equal where their files are one file, and not where two folders have one of this name.

    Args:
        photos: split, photo_id and file_name, the path below the photo folder, or below its folder of the split.
        root: the photo folder.
    """
    names, splits = photos["file_name"].to_pylist(), photos["split"].to_pylist()
    first: dict[str, str] = {}
    in_two = {name for name, split in zip(names, splits, strict=True) if first.setdefault(name, split) != split}
    one_file = {name for name in in_two if (root / name).is_file()}
    places = [name if name in one_file else f"{split}/{name}" for name, split in zip(names, splits, strict=True)]
    return photos.set_column(photos.schema.get_field_index("file_name"), "file_name", pa.array(places, pa.string()))


def _present(column: pa.ChunkedArray) -> tuple[Int64[np.ndarray, " rows"], UInt64[np.ndarray, " rows"]]:
    """Rows that have a number, and these numbers."""
    return np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)), column.drop_null().to_numpy(zero_copy_only=False)


def _equal(column: pa.ChunkedArray) -> Int64[np.ndarray, "pairs 2"]:
    """Pairs of rows that chain together all that have the same value."""
    codes = column.combine_chunks().dictionary_encode().indices
    rows = np.flatnonzero(codes.is_valid().to_numpy(zero_copy_only=False))
    values = codes.drop_null().to_numpy()
    order = np.argsort(values, kind="stable")
    again = np.flatnonzero(np.diff(values[order]) == 0)
    pairs: np.ndarray = rows[np.stack([order[again], order[again + 1]], axis=1)]
    return pairs


def _alike(photos: pa.Table) -> Int64[np.ndarray, "pairs 2"]:
    """Pairs of rows that chain together all whose photos look the same."""
    rows, coarse = _present(photos["perceptual_hash"])
    detail = photos["detail_hash"].drop_null().to_numpy()
    # Equal ones are chained and then compared with others once: a thousand copies are half a million pairs.
    order = np.lexsort((detail, coarse))
    new = np.r_[True, (np.diff(coarse[order]) != 0) | (np.diff(detail[order]) != 0)][: len(order)]
    again = np.flatnonzero(~new)
    copies = np.stack([order[again - 1], order[again]], axis=1)
    different = order[new]
    near = different[near_pairs(coarse[different], MAX_DISTANCE)]
    confirmed = np.bitwise_count(detail[near[:, 0]] ^ detail[near[:, 1]]) <= MAX_DETAIL_DISTANCE
    pairs: np.ndarray = rows[np.concatenate([copies, near[confirmed]])]
    return pairs


def _as_integer(bits: Bool[np.ndarray, " 64"]) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
