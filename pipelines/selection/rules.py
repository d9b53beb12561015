"""The rules: which boxes become objects. Vectorised over the boxes of whole photos; no I/O.

Rules come in three groups. Each group looks at the boxes that pass the groups before it, all of its rules look at the same boxes,
and a box is accepted if it breaks none: who is accepted does not depend on the order of the rules.

    1  a box by itself, and its photo      malformed rows, labels, flags, area, size, subset, photos that are there twice
    2  a box beside others of its photo    duplicates, near-duplicates, nested boxes
    3  how many                            per photo (`apply_rules`); then, over all photos of a split, per class (`class_limits`)

Every rule, its default and its source: docs/selection.md. Reasons: `schemas.tables.REJECT_REASONS`.
"""

import difflib
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int8, Int32, Int64, Integer, UInt64

from pbe_core.errors import InputError
from pbe_core.randomness import mix, name_hash
from pipelines.annotations.source import Source
from pipelines.config import SelectionSettings
from schemas.tables import COORDINATES, FLAGS, REJECT_REASONS

# Ids become file names and sample keys, so no separators and no dots.
PHOTO_ID = r"^[A-Za-z0-9_-]{1,64}$"
_LONGEST_ID = 64
_ID_LETTERS = np.isin(np.arange(256), np.frombuffer(f"{string.ascii_letters}{string.digits}_-".encode(), np.uint8))
REASONS = tuple(REJECT_REASONS)
FLAG_MISSING = -128
_UNREADABLE = ("bad_row", "unknown_photo")
# In px: fractions times a length come out beside whole numbers by the last bit.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Boxes:
    """Boxes of whole photos, as columns of equal length."""

    photo: UInt64[np.ndarray, " boxes"]
    """A hash of split and photo id."""
    photo_id: pa.Array
    label: Int32[np.ndarray, " boxes"]
    """Numbers the source's labels; -1 where missing."""
    x_min: Float64[np.ndarray, " boxes"]
    """Coordinates are fractions of the photo, NaN where missing."""
    x_max: Float64[np.ndarray, " boxes"]
    y_min: Float64[np.ndarray, " boxes"]
    y_max: Float64[np.ndarray, " boxes"]
    flags: Mapping[str, Int8[np.ndarray, " boxes"]]
    """1, 0, -1 (unknown), or `FLAG_MISSING`."""
    problem: Int8[np.ndarray, " boxes"]
    """What the reader found, a place in `REASONS`; or -1."""
    width: Float64[np.ndarray, " boxes"]
    """Of the photo, px; NaN where unknown."""
    height: Float64[np.ndarray, " boxes"]
    listed: Bool[np.ndarray, " boxes"]
    """Whether the source's tables list the photo (or list no photos)."""
    left_out: Bool[np.ndarray, " boxes"]
    """Whether the box or its photo is in the list of what is left out."""
    repeated: Bool[np.ndarray, " boxes"]
    """Whether the photo is there under an id that is kept instead."""
    object_mask: UInt64[np.ndarray, " boxes"]
    """A hash of the object's mask; 0 where there is none."""
    object_share: Float64[np.ndarray, " boxes"]
    """Share of the reference that this mask covers; NaN where there is none or nothing is cut out by it."""
    torn: Bool[np.ndarray, " boxes"] | None = None
    """Whether the box's group has boxes in a split that is kept rather than this one; null where there are no groups."""

    def __len__(self) -> int:
        return len(self.photo)

    def area(self) -> Float64[np.ndarray, " boxes"]:
        """Box area / photo area."""
        with np.errstate(invalid="ignore", over="ignore"):  # Of infinite coordinates, which are rejected as such.
            share: np.ndarray = (self.x_max - self.x_min) * (self.y_max - self.y_min)
        return share


@dataclass(frozen=True)
class RuleMask:
    """Which rules each of `count` boxes breaks. `broken[rule]` marks boxes; a rule that no box breaks need not be there."""

    count: int
    broken: dict[str, Bool[np.ndarray, " boxes"]] = field(default_factory=dict)

    def add(self, reason: str, rows: Bool[np.ndarray, " boxes"]) -> None:
        """Note that these boxes break a rule."""
        if rows.any():
            self.broken[reason] = self.broken[reason] | rows if reason in self.broken else rows

    def add_places(self, reason: str, places: Int64[np.ndarray, " broken"]) -> None:
        """Note that the boxes at these places break a rule."""
        rows = np.zeros(self.count, bool)
        rows[places] = True
        self.add(reason, rows)

    def accepted(self) -> Bool[np.ndarray, " boxes"]:
        """Boxes that break no rule so far."""
        return self.first_reason() < 0

    def alone(self, reason: str) -> Bool[np.ndarray, " boxes"]:
        """Boxes that break this rule and no other."""
        others = [rows for name, rows in self.broken.items() if name != reason]
        none = np.zeros(self.count, bool)
        alone: np.ndarray = self.broken.get(reason, none) & ~np.logical_or.reduce([none, *others])
        return alone

    def first_reason(self) -> Int8[np.ndarray, " boxes"]:
        """The first rule that each box breaks, as a place in `REASONS`; -1 for accepted boxes."""
        first = np.full(self.count, -1, np.int8)
        for place, reason in reversed(list(enumerate(REASONS))):
            if reason in self.broken:
                first[self.broken[reason]] = place
        return first

    def all_reasons(self) -> pa.ListArray:
        """All rules that each box breaks, in the order of `REASONS`, as lists of strings."""
        reasons = [reason for reason in REASONS if reason in self.broken]
        table = np.stack([np.zeros(self.count, bool), *(self.broken[reason] for reason in reasons)], axis=1)
        offsets = np.r_[0, np.cumsum(table.sum(axis=1))].astype(np.int32)
        words = pa.array(["", *reasons]).take(pa.array(np.nonzero(table)[1]))
        return pa.ListArray.from_arrays(pa.array(offsets), words)


@dataclass(frozen=True)
class ClassChoice:
    """For each word of a list of labels: whether the source lists it, and whether the settings include it."""

    known: Bool[np.ndarray, " labels"]
    chosen: Bool[np.ndarray, " labels"]


def choose_classes(labels: Sequence[str], source: Source, settings: SelectionSettings) -> ClassChoice:
    """Whether each label is known and chosen.

    Args:
        labels: class ids as they stand in the boxes.
        source: for names and hierarchy.
        settings: `include_labels` and `exclude_labels`: by name or id, each with what lies below it in the hierarchy.

    Raises:
        InputError: a name in the settings is no class of the source, or of several.
    """
    included = below(settings.include_labels, source, "include_labels", labels)
    excluded = below(settings.exclude_labels, source, "exclude_labels", labels)
    known = [not source.class_names or label in source.class_names for label in labels]
    chosen = [(not settings.include_labels or label in included) and label not in excluded for label in labels]
    return ClassChoice(np.array(known, bool), np.array(chosen, bool))


def below(wanted: Iterable[str], source: Source, key: str, present: Sequence[str] = ()) -> set[str]:
    """The ids of the wanted classes and of all classes below them in the hierarchy.

    Raises:
        InputError: a name that is no class of the source, or that several classes bear.
    """
    stack = [_class_id(word, source, {*source.subclasses, *present}, key) for word in wanted]
    found: set[str] = set()
    while stack:
        label = stack.pop()
        if label not in found:
            found.add(label)
            stack += source.subclasses.get(label, ())
    return found


def _class_id(word: str, source: Source, others: set[str], key: str) -> str:
    names = source.class_names
    if word in names or word in others:
        return word
    found = [label for label, name in names.items() if name.casefold() == word.casefold()]
    if not found:
        further = source.other_names.items()
        found = [label for label, called in further if word.casefold() in (name.casefold() for name in called)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"selection.{key}: several classes are called {word!r}: {', '.join(found)}; give the id of one")
    close = difflib.get_close_matches(word.casefold(), [name.casefold() for name in names.values()], n=3)
    meant = sorted({name for name in names.values() if name.casefold() in close})
    hint = f"did you mean {', '.join(meant)}?" if meant else "give a class's name or id as the source's class list has it"
    raise InputError(f"selection.{key}: the source has no class {word!r}; {hint}")


def apply_rules(
    boxes: Boxes, choice: ClassChoice, settings: SelectionSettings, seed: int, identity: UInt64[np.ndarray, " boxes"]
) -> RuleMask:
    """Apply all rules but the cap per class.

    Args:
        boxes: all boxes of some photos.
        choice: which labels are known and chosen.
        settings: thresholds; null switches a rule off.
        seed: of the subset and of the caps.
        identity: what makes a box the one it is (`box_identity`): equal for the same box under the same label.
    """
    mask = RuleMask(len(boxes))
    _ask_alone(boxes, choice, settings, seed, mask)
    _ask_beside_others(boxes, identity, settings, mask)
    _cap_photos(boxes, identity, settings, seed, mask)
    return mask


def is_photo_id(photo_ids: pa.Array) -> Bool[np.ndarray, " boxes"]:
    """Whether each can be a photo's id."""
    if not photo_ids.null_count and photo_ids.type == pa.string():
        lengths = pc.binary_length(photo_ids).to_numpy()
        start = photo_ids.slice(0, 1).buffers()[1] and int(np.frombuffer(photo_ids.buffers()[1], np.int32)[photo_ids.offset])
        letters = np.frombuffer(photo_ids.buffers()[2] or b"", np.uint8)[start : (start or 0) + int(lengths.sum())]
        # Nearly always all are ids, and a look at the bytes takes a tenth of the time of an expression.
        if _ID_LETTERS[letters].all():
            fits: np.ndarray = (lengths >= 1) & (lengths <= _LONGEST_ID)
            return fits
    values: np.ndarray = pc.fill_null(pc.match_substring_regex(photo_ids, PHOTO_ID), False).to_numpy(zero_copy_only=False)
    return values


def box_identity(
    label: UInt64[np.ndarray, " boxes"],
    x_min: Float64[np.ndarray, " boxes"],
    x_max: Float64[np.ndarray, " boxes"],
    y_min: Float64[np.ndarray, " boxes"],
    y_max: Float64[np.ndarray, " boxes"],
) -> UInt64[np.ndarray, " boxes"]:
    """A hash of label (given as a hash of its text) and coordinates: no order of rows and no selection changes it."""
    mixed: np.ndarray = label
    for values in (x_min, x_max, y_min, y_max):
        mixed = mix(mixed ^ values.astype("<f8").view(np.uint64))
    return mixed


def label_hashes(labels: Sequence[str]) -> UInt64[np.ndarray, " labels"]:
    """What `box_identity` takes for labels, by their place; 0 for no label, whose place is -1."""
    return np.array([*(name_hash("label", label) for label in labels), 0], np.uint64)


def object_ids(photo_ids: pa.Array, identity: UInt64[np.ndarray, " boxes"]) -> pa.Array:
    """`<photo_id>-<12 hex digits of the box's identity>`."""
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    octets = identity.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :6]
    text = np.stack([digits[octets & 15], digits[octets >> 4]], axis=2).reshape(-1, 12)
    offsets = pa.py_buffer(np.arange(0, 12 * len(text) + 1, 12, dtype=np.int32))
    return pc.binary_join_element_wise(
        photo_ids, pa.StringArray.from_buffers(len(text), offsets, pa.py_buffer(text.tobytes())), "-"
    )


def priority(identity: UInt64[np.ndarray, " boxes"], photo: UInt64[np.ndarray, " boxes"], *names: int | str) -> np.ndarray:
    """A uniform 64-bit number of each box for a random choice among boxes; smaller comes first."""
    return mix(mix(identity ^ photo) ^ np.uint64(name_hash(*names)))


def _ask_alone(boxes: Boxes, choice: ClassChoice, settings: SelectionSettings, seed: int, mask: RuleMask) -> None:
    for place in np.unique(boxes.problem[boxes.problem >= 0]).tolist():
        mask.add(REASONS[place], boxes.problem == place)
    # A row that could not be read, or whose px cannot become fractions, has this reason alone.
    unread = np.isin(boxes.problem, [REASONS.index(reason) for reason in _UNREADABLE])

    coordinates = np.stack([getattr(boxes, name) for name in COORDINATES])
    flags = np.stack([boxes.flags[name] for name in FLAGS])
    mask.add("bad_photo_id", ~is_photo_id(boxes.photo_id))
    mask.add("no_label", boxes.label < 0)
    mask.add("bad_number", np.isnan(coordinates).any(axis=0))
    mask.add("outside_photo", np.any((coordinates < 0) | (coordinates > 1), axis=0))
    mask.add("empty_box", (boxes.x_min >= boxes.x_max) | (boxes.y_min >= boxes.y_max))  # Of NaN, comparisons are false.
    mask.add("bad_flag", np.any((flags < -1) | (flags > 1), axis=0))
    mask.add("unknown_label", (boxes.label >= 0) & ~np.append(choice.known, True)[boxes.label])
    mask.add("unknown_photo", ~unread & ~boxes.listed)

    mask.add("left_out", boxes.left_out)
    mask.add("same_photo", boxes.repeated)
    if boxes.torn is not None:
        mask.add("group_in_two_splits", boxes.torn)
    if settings.subset < 1:
        drawn = mix(boxes.photo ^ np.uint64(name_hash(seed, "subset")))
        mask.add("not_in_subset", drawn >= np.uint64(settings.subset * 2.0**64))
    mask.add("label_excluded", (boxes.label >= 0) & ~np.append(choice.chosen, True)[boxes.label])
    for flag in settings.reject_flags:
        mask.add(flag, boxes.flags[f"is_{flag}"] == 1)
        if settings.unknown_flags == "reject":
            mask.add("unknown_flag", boxes.flags[f"is_{flag}"] == -1)
    area = boxes.area()
    mask.add("too_small", area < settings.min_area)
    mask.add("too_large", area > settings.max_area)
    with np.errstate(invalid="ignore"):
        sides = np.stack([(boxes.x_max - boxes.x_min) * boxes.width, (boxes.y_max - boxes.y_min) * boxes.height])
    shorter, longer = sides.min(axis=0), sides.max(axis=0)
    mask.add("reference_too_small", below_min_side(shorter, settings))
    mask.add("too_elongated", above_max_aspect(shorter, longer, settings))
    if settings.min_object_share is not None:
        mask.add("reference_too_empty", boxes.object_share < settings.min_object_share)
    if unread.any():
        for reason in set(mask.broken) - set(_UNREADABLE):
            mask.broken[reason] = mask.broken[reason] & ~unread


def below_min_side(shorter: Float64[np.ndarray, " boxes"], settings: SelectionSettings) -> Bool[np.ndarray, " boxes"]:
    """Whether the shorter side of boxes, px, breaks `min_side`; a side that is it but for rounding does not."""
    return shorter < (settings.min_side or -np.inf) - _ROUNDING


def above_max_aspect(
    shorter: Float64[np.ndarray, " boxes"], longer: Float64[np.ndarray, " boxes"], settings: SelectionSettings
) -> Bool[np.ndarray, " boxes"]:
    """Whether boxes with these sides, px, break `max_aspect`."""
    if settings.max_aspect is None:
        return np.zeros(len(shorter), bool)
    return longer > shorter * settings.max_aspect + _ROUNDING


def _ask_beside_others(boxes: Boxes, identity: UInt64[np.ndarray, " boxes"], settings: SelectionSettings, mask: RuleMask) -> None:
    rows = np.flatnonzero(mask.accepted())
    order = _largest_first(rows, boxes, identity)
    photo, own = boxes.photo[order], identity[order]
    mask.add_places("duplicate", order[1:][(photo[1:] == photo[:-1]) & (own[1:] == own[:-1])])
    if settings.near_duplicate_iou is None and settings.nested_share is None:
        return

    x_min, x_max, y_min, y_max = (getattr(boxes, name)[order] for name in COORDINATES)
    area = boxes.area()[order]
    near: list[np.ndarray] = [np.zeros((2, 0), np.int64)]
    nested = np.zeros(len(order), bool)
    for larger, smaller in pairs_within(photo):
        width = np.minimum(x_max[larger], x_max[smaller]) - np.maximum(x_min[larger], x_min[smaller])
        height = np.minimum(y_max[larger], y_max[smaller]) - np.maximum(y_min[larger], y_min[smaller])
        common = np.maximum(width, 0) * np.maximum(height, 0)
        if settings.near_duplicate_iou is not None:
            # Not divided: the union of two boxes has an area, but rounding may make it anything for tiny ones.
            close = common >= settings.near_duplicate_iou * (area[larger] + area[smaller] - common)
            near.append(np.stack([larger[close], smaller[close]]))
        if settings.nested_share is not None:
            nested[smaller[common >= settings.nested_share * area[smaller]]] = True
    mask.add_places("nested", order[nested])
    mask.add_places("near_duplicate", order[suppress(np.concatenate(near, axis=1), len(order))])


def _largest_first(
    rows: Int64[np.ndarray, " rows"], boxes: Boxes, identity: UInt64[np.ndarray, " boxes"]
) -> Int64[np.ndarray, " rows"]:
    """Boxes by photo, and within a photo the largest first; of equal boxes the one whose identity, flags and object mask come
    first: no order of rows decides.
    """
    photo, area = boxes.photo[rows], boxes.area()[rows]
    # An area is at most 1, but for rounding: all that counts here is that a larger one never has a larger number.
    order, tied = order_within(photo, (np.clip(1 - area, 0, 1) * 2.0**63).astype(np.uint64))
    rows, few = rows[order], rows[order[tied]]
    flags = [boxes.flags[name][few] for name in reversed(FLAGS)]
    in_full = (few, boxes.object_mask[few], *flags, identity[few], -boxes.area()[few], boxes.photo[few])
    rows[tied] = few[np.lexsort(in_full)]
    return rows


_FIRST_BITS = np.uint64(20)


def order_within(
    photo: UInt64[np.ndarray, " rows"], number: UInt64[np.ndarray, " rows"]
) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " tied"]]:
    """An order of rows by photo, and within a photo by a number's first 20 bits; and the places in it of what these do not part.

    The first 44 bits of a photo's hash and these are sorted as one number, which takes a sixth of the time of two stable sorts.
    Those who call sort the rows at the places that are tied, which are few, by all that they go by.
    """
    low = np.uint64(64) - _FIRST_BITS
    key = (photo >> _FIRST_BITS << _FIRST_BITS) | (number >> low)
    order = np.argsort(key)
    if (photo[order[1:]] < photo[order[:-1]]).any():  # Two photos that have these 44 bits in common.
        order = np.lexsort((number, photo))
    alike = np.r_[False, key[order[1:]] == key[order[:-1]]][: len(key)]
    return order, np.flatnonzero(alike | np.r_[alike[1:], False][: len(key)])


def pairs_within(
    groups: Integer[np.ndarray, " rows"],
) -> Iterator[tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]]:
    """All pairs of rows of the same group, as arrays (earlier row, later row), each pair once.

    Args:
        groups: the group of each row; equal ones must stand together, in any order of groups.

    Row i is compared with row i + 1, then i + 2, ... for as long as any group is that long: one yield for each shift. A row that
    has left its group behind is not looked at again, so that time goes by the number of pairs, the sum of n * (n - 1) / 2 over
    groups of n rows. Memory is that of one shift, at most a few numbers for each row.
    """
    earlier = np.arange(len(groups))
    shift = 0
    while len(earlier):
        shift += 1
        earlier = earlier[: np.searchsorted(earlier, len(groups) - shift)]
        earlier = earlier[groups[earlier] == groups[earlier + shift]]
        if len(earlier):
            yield earlier, earlier + shift


def suppress(pairs: Int64[np.ndarray, "2 pairs"], count: int) -> Bool[np.ndarray, " boxes"]:
    """Greedy non-maximum suppression over pairs of boxes that are too close.

    Args:
        pairs: (earlier, later) places in the order of preference.
        count: number of boxes.

    A box is suppressed if an earlier one of its pairs is not. Decided in rounds, each over all pairs at once; there are as many
    rounds as links in the longest chain of boxes that are each too close to the next, which in a photo are few.
    """
    suppressed = np.zeros(count, bool)
    earlier, later = pairs
    while len(later):
        undecided = np.zeros(count, bool)
        undecided[later] = True
        suppressed[later[~suppressed[earlier] & ~undecided[earlier]]] = True
        still_open = ~suppressed[later] & ~suppressed[earlier]
        earlier, later = earlier[still_open], later[still_open]
    return suppressed


def _cap_photos(
    boxes: Boxes, identity: UInt64[np.ndarray, " boxes"], settings: SelectionSettings, seed: int, mask: RuleMask
) -> None:
    if settings.max_per_photo is None:
        return
    rows = np.flatnonzero(mask.accepted())
    drawn = priority(identity[rows], boxes.photo[rows], seed, "objects of a photo")
    order = rows[np.lexsort((drawn, boxes.photo[rows]))]
    photo = boxes.photo[order]
    mask.add_places("over_photo_cap", order[np.arange(len(order)) - np.searchsorted(photo, photo) >= settings.max_per_photo])


def quotas(counts: Int64[np.ndarray, "..."], cap: int, smoothing: float) -> Int64[np.ndarray, "..."]:
    """Objects that each class may keep: all n up to the cap, then cap * (n / cap) ** smoothing, rounded down.

    Source: exponential smoothing of language frequencies in sampling (Conneau et al. 2020, section 3.1), counted from the cap.
    """
    beyond = cap * (np.maximum(counts, cap) / cap) ** smoothing * (1 + 1e-9)  # What is whole but for rounding stays whole.
    allowed: np.ndarray = np.minimum(counts, np.floor(beyond).astype(np.int64))
    return allowed


def class_limits(
    group: Int64[np.ndarray, " objects"], drawn: UInt64[np.ndarray, " objects"], cap: int, smoothing: float
) -> UInt64[np.ndarray, " groups"]:
    """The largest priority that each group keeps: a class of a split keeps its `quotas`, those of the smallest priority.

    So the choice depends on names alone, and what a smaller cap keeps, a larger one keeps too.

    Args:
        group: class and split of each object, a small number.
        drawn: the priority of each object, a hash of its name.
        cap: objects of a group that are always allowed.
        smoothing: how far larger groups may go beyond it.
    """
    counts = np.bincount(group)
    ordered = drawn[np.lexsort((drawn, group))]
    last = np.cumsum(counts) - counts + quotas(counts, cap, smoothing) - 1
    limits: np.ndarray = ordered[np.maximum(last, 0)]  # Of a group without objects it is any number.
    return limits
