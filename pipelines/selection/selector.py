"""The selector: the boxes of some photos, the rules, and the rows of both tables that come of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int64, UInt64

from pbe_core.leave_out import LeftOut, read_left_out
from pbe_core.randomness import hash_column, mix
from pipelines.annotations.coco_file import mask_areas
from pipelines.annotations.mask_files import PREFIX
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings
from pipelines.selection.mask_join import join_masks
from pipelines.selection.partition import REASON_WORDS, SORTED_SPLITS, Partitions, Vocabulary
from pipelines.selection.rules import (
    FLAG_MISSING,
    REASONS,
    Boxes,
    ClassChoice,
    apply_rules,
    box_identity,
    label_hashes,
    object_ids,
    order_within,
    priority,
)
from schemas.tables import COORDINATES, FLAGS, OBJECTS, REJECTS, SAME_PHOTOS, one_word, paired

EXAMPLES = 3
_Column = Float64[np.ndarray, " boxes"]
# Where a photo is in several splits: which of them keeps it.
_KEPT_FIRST = ("test", "validation", "train")
_MALFORMED = REASONS[: REASONS.index("unknown_photo") + 1]


@dataclass(frozen=True)
class SelectedPart:
    """What became of the boxes of some buckets."""

    split: str
    rejects: pa.Table
    candidates: pa.Table
    """Columns of `OBJECTS` and what rejecting them later takes: file, row, of_class, priority."""
    counts: Counter[str]
    reasons: Counter[str]
    examples: dict[str, list[str]]
    not_scanned: str | None
    """A photo with boxes that the duplicate scan, if there is one, lacks."""
    shown_only: pa.Table | None
    """Rejects that are too large to be objects and nothing else, as rows like `candidates`: good references for their groups."""
    in_two_splits: pa.Table
    """Rows of `SAME_PHOTOS` for photos whose id is in a split that is kept rather than this one."""


class Selector:
    """Divides boxes into candidates and rejects. `select` is called from several threads."""

    def __init__(
        self,
        partitions: Partitions,
        source: Source,
        settings: BuildSettings,
        choice: ClassChoice,
        dropped: dict[str, UInt64[np.ndarray, " photos"]],
    ) -> None:
        self.partitions = partitions
        self.source = source
        self.settings = settings
        self.choice = choice
        self.dropped = dropped
        listed = settings.selection.leave_out
        self.left_out = read_left_out(listed) if listed else LeftOut()
        self.label_hashes = label_hashes(partitions.labels.words)
        self.schema = paired(OBJECTS) if source.groups else OBJECTS
        kept = [split for split in _KEPT_FIRST if source.groups and split in settings.source.splits]
        self.groups_in = {split: partitions.groups_of(split) for split in kept}
        names = [source.class_names.get(label) or label for label in partitions.labels.words]
        # Two labels may bear one name: a dictionary must not hold a word twice.
        self.names = Vocabulary()
        self.name_places = np.array([self.names.place(name) for name in names], np.int32)

    def select(self, part: range) -> SelectedPart:
        """Divide the boxes of some buckets."""
        partitions, settings = self.partitions, self.settings
        split = partitions.split_of(part)
        masks = partitions.masks.read(part)
        rows, joined = join_masks(partitions.boxes.read(part), masks)
        photos = _one_row_each(partitions.photos.read(part), partitions.licences)
        elsewhere = self._in_better_splits(part, split)
        identity = self._identity(rows)
        boxes, place = self._boxes(rows, photos, partitions.sizes.read(part), split, elsewhere, identity)
        broken = apply_rules(boxes, self.choice, settings.selection, settings.seed, identity)
        first = broken.first_reason()

        rejected = np.flatnonzero(first >= 0)
        rejects, examples = self._rejects(rows, boxes, rejected, first[rejected], split)
        if settings.selection.all_reasons:
            reasons = broken.all_reasons().take(pa.array(rejected))
            rejects = rejects.set_column(REJECTS.get_field_index("reasons"), "reasons", reasons)

        accepted = np.flatnonzero(first < 0)
        order, tied = order_within(boxes.photo[accepted], identity[accepted])
        accepted, few = accepted[order], accepted[order[tied]]
        accepted[tied] = few[np.lexsort((identity[few], boxes.photo[few]))]
        candidates = self._candidates(rows, boxes, photos, place, identity, accepted, split)
        shown_only = None
        if self.source.groups and settings.references.others:
            large = np.flatnonzero(broken.alone("too_large") & (numbers(rows, "group_hash") != 0))
            shown_only = self._candidates(rows, boxes, photos, place, identity, large, split)
        known = ~np.isin(first, [REASONS.index(reason) for reason in ("bad_row", "bad_photo_id")])
        counts = Counter(
            masks=len(masks),
            masks_of_boxes=joined,
            photos=len(photos),
            photos_with_boxes=_count_listed(place[known], len(photos)) + len(np.unique(boxes.photo[known & (place < 0)])),
            photos_without_boxes=len(photos) - _count_listed(place, len(photos)),
        )
        found, times = np.unique(first[rejected], return_counts=True)
        by_reason = Counter({REASONS[reason]: count for reason, count in zip(found.tolist(), times.tolist(), strict=True)})
        not_scanned = None
        if settings.source.survey:
            missing = np.flatnonzero(known & ~np.isin(boxes.photo, partitions.sizes.read_column(part, "photo")))
            not_scanned = str(boxes.photo_id[int(missing[0])]) if len(missing) else None
        in_two_splits = _in_two_splits(boxes, split, elsewhere)
        return SelectedPart(split, rejects, candidates, counts, by_reason, examples, not_scanned, shown_only, in_two_splits)

    def _in_better_splits(self, part: range, split: str) -> dict[str, UInt64[np.ndarray, " photos"]]:
        """Photos that have boxes in a split that is kept rather than this one: by a photo's id, a photo is in one split."""
        better = [other for other in _KEPT_FIRST[: _KEPT_FIRST.index(split)] if other in self.settings.source.splits]
        hashes = {other: self.partitions.boxes.read_column(self.partitions.in_split(part, other), "photo") for other in better}
        return {other: np.unique(column.to_numpy()) for other, column in hashes.items()}

    def _identity(self, rows: pa.Table) -> UInt64[np.ndarray, " boxes"]:
        return box_identity(self.label_hashes[numbers(rows, "label")], *(numbers(rows, name) for name in COORDINATES))

    def _is_left_out(self, photo_ids: pa.Array, identity: UInt64[np.ndarray, " boxes"]) -> Bool[np.ndarray, " boxes"]:
        """Whether each box or its photo is listed. Only of photos with a listed object are ids of objects made."""
        if not (self.left_out.photos or self.left_out.objects):
            return np.zeros(len(photo_ids), bool)
        found = _is_among(photo_ids, self.left_out.photos)
        rows = np.flatnonzero(_is_among(photo_ids, {name.rpartition("-")[0] for name in self.left_out.objects}))
        found[rows] |= _is_among(object_ids(photo_ids.take(pa.array(rows)), identity[rows]), self.left_out.objects)
        return found

    def _boxes(
        self,
        rows: pa.Table,
        photos: pa.Table,
        sizes: pa.Table,
        split: str,
        elsewhere: dict[str, UInt64[np.ndarray, " photos"]],
        identity: UInt64[np.ndarray, " boxes"],
    ) -> tuple[Boxes, Int64[np.ndarray, " boxes"]]:
        """The columns that the rules look at, and the place of each box's photo in `photos`, -1 where it is not listed."""

        def column(name: str) -> np.ndarray:
            values: np.ndarray = rows.column(name).combine_chunks().to_numpy(zero_copy_only=False)
            return values

        photo = column("photo")
        place = _places(photos, photo)
        width, height = (_joined(photos, place, name) for name in ("width", "height"))
        if len(sizes):
            sizes = sizes.sort_by("photo")
            scanned = _places(sizes, photo)
            width = np.where(np.isnan(width), _joined(sizes, scanned, "width"), width)
            height = np.where(np.isnan(height), _joined(sizes, scanned, "height"), height)
        edges = {name: column(name) for name in COORDINATES}
        references = self.settings.references
        masks = rows.column("segmentation").combine_chunks()
        boxes = Boxes(
            photo=photo,
            photo_id=rows.column("photo_id").combine_chunks(),
            label=column("label"),
            **edges,
            flags={name: column(name) for name in FLAGS},
            problem=column("problem"),
            width=width,
            height=height,
            listed=place >= 0 if split in self.source.listed_splits else np.ones(len(photo), bool),
            left_out=self._is_left_out(rows.column("photo_id").combine_chunks(), identity),
            repeated=np.isin(photo, np.concatenate([self.dropped[split], *elsewhere.values()])),
            object_mask=_mask_hashes(masks),
            # Where nothing is cut out by object masks, or there is no limit, nobody asks.
            object_share=object_shares(masks, (width, height), edges, references.padding)
            if references.background == "grey" and self.settings.selection.min_object_share is not None
            else np.full(len(masks), np.nan),
            torn=self._is_torn(rows, split) if self.source.groups else None,
        )
        return boxes, place

    def _is_torn(self, rows: pa.Table, split: str) -> Bool[np.ndarray, " boxes"]:
        """Whether each box's group has boxes in a better split: an instance is in one split."""
        better = [self.groups_in[other] for other in _KEPT_FIRST[: _KEPT_FIRST.index(split)] if other in self.groups_in]
        return np.isin(numbers(rows, "group_hash"), np.concatenate([np.zeros(0, np.uint64), *better]))

    def _rejects(
        self, rows: pa.Table, boxes: Boxes, rejected: Int64[np.ndarray, " rejects"], first: np.ndarray, split: str
    ) -> tuple[pa.Table, dict[str, list[str]]]:
        taken = _take(rows, ["photo_id", "label", "file", "row", "detail"], rejected)
        details: list[Any] = taken["detail"].to_pylist() if taken["detail"].null_count < len(taken) else [None] * len(taken)
        malformed = np.flatnonzero(first < len(_MALFORMED))
        examples: dict[str, list[str]] = {}
        for place in malformed.tolist():
            row, reason = int(rejected[place]), REASONS[first[place]]
            if boxes.problem[row] != first[place] or not details[place]:
                # The detail of the reader belongs to the problem that the reader found.
                details[place] = _explain(reason, boxes, row, self.partitions.labels)
            shown = examples.setdefault(reason, [])
            if len(shown) < EXAMPLES:
                file = self.partitions.files.words[taken["file"][place].as_py()]
                where = "" if details[place].startswith(file) else f"{file}, row {taken['row'][place].as_py()}: "
                shown.append(f"{where}{details[place]}")
        columns = {
            "split": one_word(split, len(taken)),
            "label": self.partitions.labels.decode(numbers(taken, "label")),
            "file": self.partitions.files.decode(numbers(taken, "file")),
            "reason": REASON_WORDS.decode(first.astype(np.int32)),
            "reasons": pa.nulls(len(taken), pa.list_(pa.string())),
            "detail": pa.array(details, pa.string()),
        }
        for name in COORDINATES:
            values = getattr(boxes, name)[rejected]
            columns[name] = pa.array(values, mask=np.isnan(values))
        for name in FLAGS:
            values = boxes.flags[name][rejected]
            columns[name] = pa.array(values, mask=values == FLAG_MISSING)
        return _table(columns, taken, REJECTS), examples

    def _candidates(
        self,
        rows: pa.Table,
        boxes: Boxes,
        photos: pa.Table,
        place: Int64[np.ndarray, " boxes"],
        identity: UInt64[np.ndarray, " boxes"],
        accepted: Int64[np.ndarray, " objects"],
        split: str,
    ) -> pa.Table:
        kept = ["photo_id", *COORDINATES, *FLAGS, "segmentation", "file", "row", *(["group", "references"] * self.source.groups)]
        taken = _take(rows, kept, accepted)
        of_photo = photos.take(pa.array(place[accepted], mask=place[accepted] < 0))
        label = boxes.label[accepted]
        columns = {name: of_photo[name] for name in ("file_name", "rotation", "url", "author")}
        columns |= {
            "split": one_word(split, len(taken)),
            "object_id": object_ids(taken["photo_id"].combine_chunks(), identity[accepted]),
            "label": self.partitions.labels.decode(label),
            "label_name": self.names.decode(self.name_places[label]),
            "area_share": pa.array(boxes.area()[accepted]),
            "width": _pixels(boxes.width[accepted]),
            "height": _pixels(boxes.height[accepted]),
            "licence": self.partitions.licences.decode(
                of_photo["licence"].combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)
            ),
        }
        objects = _table(columns, taken, self.schema)
        group = SORTED_SPLITS.index(split) * len(self.partitions.labels.words) + label.astype(np.int64)
        drawn = priority(identity[accepted], boxes.photo[accepted], self.settings.seed, "objects of a class")
        more = {name: taken[name] for name in ("file", "row")} | {"of_class": pa.array(group), "priority": pa.array(drawn)}
        for name, values in {**more, "original_bytes": of_photo["original_bytes"]}.items():
            objects = objects.append_column(name, values)
        return objects

    def reject_candidates(self, candidates: pa.Table, reason: str = "over_class_cap") -> pa.Table:
        """Rows of `REJECTS` for candidates that their class has no place for, or that no other photo shows."""
        reasons = [reason] if self.settings.selection.all_reasons else None
        columns = {
            "file": self.partitions.files.decode(numbers(candidates, "file")),
            "reason": one_word(reason, len(candidates)),
            "reasons": pa.array([reasons] * len(candidates), pa.list_(pa.string())),
            "detail": pa.nulls(len(candidates), pa.string()),
        }
        return _table(columns, candidates, REJECTS)


def _is_among(ids: pa.Array, listed: set[str]) -> Bool[np.ndarray, " boxes"]:
    found: np.ndarray = pc.is_in(ids, value_set=pa.array(sorted(listed), pa.string())).to_numpy(zero_copy_only=False)
    return found.copy()


def object_shares(
    masks: pa.Array,
    sides: tuple[_Column, _Column],
    edges: Mapping[str, _Column],
    padding: int,
) -> Float64[np.ndarray, " boxes"]:
    """Share of each reference's px that the object's mask covers; NaN where there is no mask, or no size of the photo.

    Args:
        masks: compressed RLE, checked when it was read; or the place of a file, of which nothing is known yet; or null.
        sides: width and height of each box's photo, px, as the masks have it; NaN where unknown.
        edges: `x_min`, `x_max`, `y_min` and `y_max` of each box, fractions of the photo; may be anything.
        padding: of the reference, px on each side.

    The reference's window is that of `geometry.reference_window`, for columns.
    """
    shares = np.full(len(masks), np.nan)
    told = pc.fill_null(pc.invert(pc.starts_with(masks, PREFIX)), False).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(told & np.isfinite(sides[0]) & np.isfinite(sides[1]))
    if not len(rows):
        return shares
    window = np.ones(len(rows))
    for axis, side in zip("xy", sides, strict=True):
        low, high, length = edges[f"{axis}_min"][rows], edges[f"{axis}_max"][rows], side[rows]
        window *= np.ceil(np.minimum(high * length + padding, length)) - np.floor(np.maximum(low * length - padding, 0))
    with np.errstate(divide="ignore"):  # Of boxes that are nowhere in the photo, which are rejected as such.
        shares[rows] = mask_areas(masks.take(pa.array(rows)).to_pylist()) / window
    return shares


def _one_row_each(photos: pa.Table, licences: Vocabulary) -> pa.Table:
    """Photos sorted by hash, one row each: of several the first by contents, so that no file order decides."""
    # Licences are numbered as they were met; their alphabetical rank depends on no order of rows.
    rank = np.argsort(np.argsort(np.array([*licences.words, ""], object)[:-1], kind="stable"))
    numbered = photos["licence"].fill_null(-1).to_numpy()
    ranked = photos.append_column("rank", pa.array(np.where(numbered < 0, -1, np.append(rank, -1)[numbered])))
    contents = [name for name in photos.column_names if name not in ("photo", "licence")]
    order = pc.sort_indices(ranked, [("photo", "ascending"), *((name, "ascending") for name in (*contents, "rank"))])
    photos = photos.take(order)
    hashes = np.asarray(photos["photo"])
    return photos.filter(pa.array(np.r_[True, hashes[1:] != hashes[:-1]][: len(hashes)])).combine_chunks()


def _mask_hashes(column: pa.Array) -> UInt64[np.ndarray, " boxes"]:
    """A hash of each object mask: of its length, its start and its end, by which masks of one box differ."""
    if column.null_count == len(column):
        return np.zeros(len(column), np.uint64)
    ends = [hash_column(pc.utf8_slice_codeunits(column, *part)) for part in ((0, 64), (-64, None))]
    length = pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.uint64)
    hashes = mix(ends[0] ^ mix(ends[1] ^ mix(length)))
    return np.where(column.is_null().to_numpy(zero_copy_only=False), np.uint64(0), hashes)


def _in_two_splits(boxes: Boxes, split: str, elsewhere: dict[str, UInt64[np.ndarray, " photos"]]) -> pa.Table:
    if not any(map(len, elsewhere.values())):
        return SAME_PHOTOS.empty_table()
    photos, first = np.unique(boxes.photo, return_index=True)
    tables = [SAME_PHOTOS.empty_table()]
    for other, theirs in elsewhere.items():
        ids = boxes.photo_id.take(pa.array(first[np.isin(photos, theirs)]))
        same = {
            "split": one_word(split, len(ids)),
            "photo_id": ids,
            "kept_split": one_word(other, len(ids)),
            "kept_photo_id": ids,
        }
        by = {"by": one_word("photo_id", len(ids)), "distance": pa.nulls(len(ids), pa.int8())}
        tables.append(pa.table(same | by).cast(SAME_PHOTOS))
    return pa.concat_tables(tables)


def _take(rows: pa.Table, names: Sequence[str], places: Int64[np.ndarray, " rows"]) -> pa.Table:
    """Some columns of some rows. What a column holds nothing of, as most sources have no outlines, need not be looked up."""
    taken = rows.select([name for name in names if rows[name].null_count < len(rows)]).take(pa.array(places))
    for name in names:
        if name not in taken.column_names:
            taken = taken.append_column(name, pa.nulls(len(places), rows.schema.field(name).type))
    return taken


def _count_listed(place: Int64[np.ndarray, " boxes"], photos: int) -> int:
    """How many of so many listed photos have one of these boxes; `place` as `_places` gives it."""
    with_boxes = np.zeros(photos, bool)
    with_boxes[place[place >= 0]] = True
    return int(with_boxes.sum())


def _places(table: pa.Table, photo: UInt64[np.ndarray, " boxes"]) -> Int64[np.ndarray, " boxes"]:
    """Where each photo stands in a table that is sorted by `photo`; -1 where it does not."""
    hashes = np.asarray(table["photo"])
    if not len(hashes):
        return np.full(len(photo), -1)
    place = np.minimum(np.searchsorted(hashes, photo), len(hashes) - 1)
    return np.where(hashes[place] == photo, place, -1)


def _joined(table: pa.Table, place: Int64[np.ndarray, " boxes"], name: str) -> np.ndarray:
    """A number of each box's photo; NaN where unknown."""
    values = table[name].cast(pa.float64()).fill_null(np.nan).to_numpy()
    joined: np.ndarray = np.append(values, np.nan)[place]
    return joined


def _explain(reason: str, boxes: Boxes, row: int, labels: Vocabulary) -> str:
    """What is wrong with a malformed row, in words."""
    values = {name: float(getattr(boxes, name)[row]) for name in COORDINATES}
    if reason == "bad_photo_id":
        return f"the photo's id is {boxes.photo_id[row].as_py()!r:.80}, expected 1 to 64 letters, digits, _ and -"
    if reason == "no_label":
        return "the label is empty"
    if reason == "bad_number":
        return f"{', '.join(name for name in COORDINATES if np.isnan(values[name]))} is empty or not a number"
    if reason == "outside_photo":
        name = next(name for name in COORDINATES if not 0 <= values[name] <= 1)
        return f"{name} is {values[name]:g}, not a fraction of the photo (0 to 1)"
    if reason == "empty_box":
        axis = "x" if values["x_min"] >= values["x_max"] else "y"
        return f"{axis}_min is {values[f'{axis}_min']:g} and {axis}_max is {values[f'{axis}_max']:g}: are the columns swapped?"
    if reason == "bad_flag":
        name = next(name for name in FLAGS if not -1 <= boxes.flags[name][row] <= 1)
        value = int(boxes.flags[name][row])
        return f"{name} is {'empty' if value == FLAG_MISSING else value}, expected 1, 0 or -1"
    if reason == "unknown_label":
        return f"the label {labels.words[boxes.label[row]]!r:.80} is not in the source's list of classes"
    return f"the photo {boxes.photo_id[row].as_py()!r:.80} is not in the source's list of photos"


def _table(columns: dict[str, Any], rest: pa.Table, schema: pa.Schema) -> pa.Table:
    arrays = [columns[name] if name in columns else rest[name] for name in schema.names]
    return pa.table(arrays, names=schema.names)


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as an array."""
    values: np.ndarray = table[name].combine_chunks().to_numpy(zero_copy_only=False)
    return values


def _pixels(values: np.ndarray) -> pa.Array:
    return pa.array(np.nan_to_num(values).astype(np.int32), mask=np.isnan(values))
