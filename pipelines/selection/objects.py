"""The stage: boxes -> objects.parquet + rejects.parquet, for more boxes than memory holds.

    boxes ──┐                          ┌─▶ rejects.parquet
            ├─ partition by photo ─▶ selector ─▶ candidates ──class quota──▶ objects.parquet
    photos ─┘   (on disk)            part by part          └─▶ rejects.parquet

Memory does not grow with the number of boxes, but for 16 bytes a candidate where classes have a quota. The partitions take about
100 bytes a box on disk, below the output folder, until the stage is over. Objects are sorted by split, hash of the photo and hash
of the object, whatever the order of the input was.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pbe_core.dataset_reader import find_places, take_rows
from pbe_core.errors import InputError
from pbe_core.files import atomic_file, sweep, temporary_folder
from pbe_core.progress import Progress
from pbe_core.words import number_of
from pipelines.annotations import open_source
from pipelines.annotations.mask_files import PREFIX
from pipelines.annotations.source import Source, flags_that_nobody_sets
from pipelines.config import BuildSettings
from pipelines.readers import reader_of
from pipelines.selection.duplicates import count_duplicates, find_duplicates, hashes_by_split, read_scan
from pipelines.selection.groups import ReferenceDraw
from pipelines.selection.partition import partition_by_photo
from pipelines.selection.rules import REASONS, box_identity, choose_classes, class_limits, label_hashes, object_ids
from pipelines.selection.selector import EXAMPLES, SelectedPart, Selector, numbers
from pipelines.threads import OneBehind, in_order
from schemas.tables import COORDINATES, OBJECTS, REJECTS, SAME_PHOTOS, paired, with_dictionary

_ROW_GROUP = 100_000
_THREADS = min(4, os.cpu_count() or 1)
# More boxes than any photo has.
_BOXES_OF_A_PHOTO = 10_000


@dataclass
class Selection:
    """What a selection found; boxes = objects + rejects. Kept as `selection.json`."""

    boxes: int = 0
    objects: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    """By first reason."""
    photos: int = 0
    """That the source's tables list; 0 where they list none."""
    photos_without_boxes: int = 0
    """Of those that are listed."""
    photos_with_boxes: int = 0
    photos_with_objects: int = 0
    original_bytes: int = 0
    """Size of the published originals of those, as far as the tables give it."""
    objects_of_unknown_size: int = 0
    """Whose photo's width and height are not in the tables."""
    objects_with_outline: int = 0
    """Whose object mask is in the tables."""
    photos_of_known_size: int = 0
    """How many of those the tables give an original's size for."""
    same_photos: dict[str, int] = field(default_factory=dict)
    """Photos that are there under another id too, by how that was found; `across_splits` of them in another split."""
    references: int = 0
    """Of all objects, from other photos."""
    objects_with_references: int = 0
    """That have one or more of them."""
    objects_by_class: dict[str, dict[str, int]] = field(default_factory=dict)
    """Split -> class name -> objects."""
    notes: list[str] = field(default_factory=list)
    """What a user should know and may not expect."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Malformed rows, by reason: the first few, in words."""


def select_objects(settings: BuildSettings, out: Path, source: Source | None = None) -> Selection:
    """Read all boxes, apply the rules, and write `objects.parquet`, `rejects.parquet` and `same_photos.parquet` into a folder.

    Args:
        settings: of the build.
        out: the folder; also holds the temporary files.
        source: the annotations, if they are open already.

    Raises:
        InputError: what is wrong with a file or a setting, or no box is accepted. Nothing is written then.
    """
    source = source or open_source(settings)
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder(out, "selection"))
        pool = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="select"))
        scan = read_scan(settings.source.survey) if settings.source.survey else None
        partitions = partition_by_photo(source, settings.seed, folder, scan.read_photos() if scan else ())
        selection = Selection(boxes=int(partitions.boxes.counts.sum()), notes=list(_notes_on_classes(settings, source)))
        choice = choose_classes(partitions.labels.words, source, settings.selection)
        same = find_duplicates(partitions, source, settings, scan)
        selection.same_photos = count_duplicates(same)

        objects, rejects, same_photos = (
            stack.enter_context(_writing_table(out / f"{name}.parquet", schema))
            for name, schema in (
                ("objects", paired(OBJECTS) if source.groups else OBJECTS),
                ("rejects", REJECTS),
                ("same_photos", SAME_PHOTOS),
            )
        )
        same_photos(same)
        dropped = hashes_by_split(same if settings.source.same_photo == "drop" else same.slice(0, 0), settings.seed)
        selector = Selector(partitions, source, settings, choice, dropped)
        parts = in_order(pool, selector.select, partitions.parts(), _THREADS + 1)
        shown_only: list[pa.Table] = []
        candidates = _write_rejects(parts, selection, settings, rejects, same_photos, shown_only)
        accepted = _within_quotas(candidates, selector, selection, folder, rejects)
        if source.groups:
            drawn = ReferenceDraw(settings, selector.left_out.photos, folder)
            accepted = _with_references(drawn, accepted, shown_only, selector, selection, rejects)
        in_files = 0
        for part in accepted:
            _count_objects(part, selection)
            in_files += int(pc.sum(pc.starts_with(part["segmentation"], PREFIX)).as_py() or 0)
            objects(part.select(selector.schema.names))
        selection.rejects = {reason: selection.rejects[reason] for reason in REASONS if reason in selection.rejects}
        selection.examples = {reason: selection.examples[reason] for reason in REASONS if reason in selection.examples}
        _check_counts(selection, source, settings)
        selection.notes += [*source.read_notes(), *_notes(selection, settings, in_files)]
    return selection


def rejected_boxes(rejects: Path, name: str) -> list[dict[str, Any]]:
    """Rejected boxes whose object id, which they would have as objects, begins with a name.

    Args:
        rejects: rejects.parquet.
        name: a photo's id, an object's id or its beginning, or a sample's key.

    Returns:
        Rows with `object_id`, `reason`, `file` and `row`.

    Raises:
        InputError: the table is not there or damaged.
    """
    beginning = re.sub(r"(-[0-9a-f]{12})_\d+$", r"\1", name)
    # Ids of photos may have dashes, the hash of a box has none.
    photos = pa.array([beginning, beginning.rpartition("-")[0]])
    places = find_places(rejects, "photo_id", lambda ids: pc.is_in(ids, value_set=photos), _BOXES_OF_A_PHOTO)
    rows = take_rows(rejects, places, ["photo_id", "label", *COORDINATES, "reason", "file", "row"])
    if not rows:
        return []
    labels = label_hashes([row["label"] or "" for row in rows])[:-1]
    edges = [np.array([row[name] for row in rows], np.float64) for name in COORDINATES]  # None becomes NaN.
    ids = object_ids(pa.array([row["photo_id"] for row in rows]), box_identity(labels, *edges)).to_pylist()
    named = [{**row, "object_id": object_id} for row, object_id in zip(rows, ids, strict=True)]
    return [row for row in named if row["object_id"].startswith(beginning)]


def _check_counts(selection: Selection, source: Source, settings: BuildSettings) -> None:
    boxes = number_of(selection.boxes, "box", "boxes")
    if selection.boxes != selection.objects + sum(selection.rejects.values()):
        raise RuntimeError(f"counts do not add up: of {boxes} {selection.objects} were accepted; rejected: {selection.rejects}")
    if not selection.boxes:
        splits = ", ".join(settings.source.splits)
        raise InputError(f"{source.name}: no box in it for the splits {splits}; get another file, or change source.splits")
    if not selection.objects:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in selection.rejects.items())
        more = [f"for example {examples[0]}" for examples in selection.examples.values()][:1] + selection.notes
        raise InputError(
            f"{source.name}: none of the {boxes} is accepted ({reasons}; see docs/data-format.md#reasons-of-rejects)"
            f"{''.join(f'; {text}' for text in more)}"
        )


def _write_rejects(
    parts: Iterable[SelectedPart],
    selection: Selection,
    settings: BuildSettings,
    rejects: Callable[[pa.Table], None],
    same_photos: Callable[[pa.Table], None],
    shown_only: list[pa.Table],
) -> Iterator[pa.Table]:
    """Write and count the rejects of each part, and pass its candidates on; `shown_only` gets the rejects that are references."""
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with Progress("selecting", selection.boxes, "boxes") as progress:
        for part in parts:
            totals += part.counts
            reasons += part.reasons
            for reason, examples in part.examples.items():
                selection.examples[reason] = [*selection.examples.get(reason, []), *examples][:EXAMPLES]
            if part.not_scanned:
                raise InputError(
                    f"{settings.source.survey}: this survey does not know photo {part.not_scanned} of {part.split}, which has "
                    f"boxes: it is of other annotations, or older; run pipelines/survey.py again with these settings"
                )
            rejects(part.rejects)
            if part.shown_only is not None:
                shown_only.append(part.shown_only)
            same_photos(part.in_two_splits)
            for name in ("photo_id", "across_splits") if len(part.in_two_splits) else ():
                selection.same_photos[name] = selection.same_photos.get(name, 0) + len(part.in_two_splits)
            yield part.candidates
            progress.update(len(part.rejects) + len(part.candidates))
    selection.rejects = dict(reasons)
    selection.photos = totals["photos"]
    selection.photos_with_boxes = totals["photos_with_boxes"]
    selection.photos_without_boxes = totals["photos_without_boxes"]
    if totals["masks"]:
        joined, left = totals["masks_of_boxes"], totals["masks"] - totals["masks_of_boxes"]
        selection.notes.append(
            f"object masks that belong to a box, by photo, label and edges: {joined:,} of {totals['masks']:,}"
            f"{f'; {left:,} belong to none' if left else ''}"
        )


def _within_quotas(
    parts: Iterator[pa.Table], selector: Selector, selection: Selection, folder: Path, rejects: Callable[[pa.Table], None]
) -> Iterator[pa.Table]:
    """Candidates within the quota of their class; the others are written as rejects."""
    rules = selector.settings.selection
    if rules.max_per_class is None:
        yield from parts
        return
    paths: list[Path] = []
    groups, drawn = [], []
    for candidates in parts:
        groups.append(numbers(candidates, "of_class"))
        drawn.append(numbers(candidates, "priority"))
        paths.append(folder / f"candidates-{len(paths):05d}.arrow")
        with pa.OSFile(str(paths[-1]), "wb") as file, pa.ipc.new_file(file, candidates.schema) as writer:
            writer.write_table(candidates.unify_dictionaries().combine_chunks())
    limits = class_limits(np.concatenate(groups), np.concatenate(drawn), rules.max_per_class, rules.class_smoothing)
    over = 0
    for path in paths:
        with pa.OSFile(str(path)) as file:
            candidates = pa.ipc.open_file(file).read_all()
        within = pa.array(numbers(candidates, "priority") <= limits[numbers(candidates, "of_class")])
        left = candidates.filter(pc.invert(within))
        rejects(selector.reject_candidates(left))
        over += len(left)
        yield candidates.filter(within)
    if over:
        selection.rejects["over_class_cap"] = over


def _with_references(
    drawn: ReferenceDraw,
    parts: Iterator[pa.Table],
    shown_only: Sequence[pa.Table],
    selector: Selector,
    selection: Selection,
    rejects: Callable[[pa.Table], None],
) -> Iterator[pa.Table]:
    """Accepted objects with their references from other photos; those without are rejected where the settings say so."""
    for part in drawn.draw(parts, shown_only):
        counts = pc.fill_null(pc.list_value_length(part["references"]), 0)
        selection.references += pc.sum(counts).as_py() or 0
        selection.objects_with_references += int((counts.to_numpy() > 0).sum())
        if selector.settings.references.alone == "own":
            yield part
            continue
        alone = part.filter(pc.equal(counts, 0))
        if len(alone):
            rejects(selector.reject_candidates(alone, "no_other_photo"))
            selection.rejects["no_other_photo"] = selection.rejects.get("no_other_photo", 0) + len(alone)
        yield part.filter(pc.greater(counts, 0))


def _notes_on_classes(settings: BuildSettings, source: Source) -> Iterator[str]:
    """Own boxes have no class hierarchy, and that of COCO is in its file."""
    hierarchy = reader_of(settings.source.kind).hierarchy_file
    for key in ("include_labels", "exclude_labels"):
        words = getattr(settings.selection, key)
        if words and not source.subclasses and hierarchy:
            yield (f"selection.{key} means {', '.join(words)} alone, and nothing below: no class hierarchy is read ({hierarchy})")


def _notes(selection: Selection, settings: BuildSettings, in_files: int) -> Iterator[str]:
    """`in_files` is how many objects have a mask that is still to be read."""
    rules = settings.selection
    if (rules.min_side or rules.max_aspect) and selection.objects_of_unknown_size:
        yield (
            f"the tables do not say how large the photos of {number_of(selection.objects_of_unknown_size, 'object')} are: "
            f"min_side and max_aspect are asked when the photos are read, and boxes that break them count as failed samples"
        )
    if settings.source.same_photo == "drop" and (shared := selection.same_photos.get("url")):
        yield (
            f"{number_of(shared, 'photo')} with the URL of another photo, taken for it: such boxes are rejected as same_photo; "
            f"where URLs are those of pages and not of photos, source.same_photo: report keeps all"
        )
    alone = selection.objects - selection.objects_with_references
    if alone and (settings.references.others or selection.references):
        yield f"{alone:,} of {number_of(selection.objects, 'object')} that no other photo shows: the reference is the own crop"
    for split in settings.source.splits:
        if split not in selection.objects_by_class:
            yield f"{split} has no object" + (": nothing to judge a model by" if split == "validation" else "")
    if unset := flags_that_nobody_sets(settings):
        yield f"selection.reject_flags: {', '.join(unset)} is unknown of all boxes of source.kind {settings.source.kind}"
    if settings.references.background == "grey" and rules.min_object_share is not None and in_files:
        yield (
            f"the object masks of {number_of(in_files, 'object')} are in files of their own: "
            f"min_object_share is asked when these are read, and objects that break it count as failed samples"
        )
    if settings.references.background == "grey" and selection.objects_with_outline < selection.objects:
        yield (
            f"{selection.objects - selection.objects_with_outline:,} of {number_of(selection.objects, 'object')} "
            f"{'has' if selection.objects == 1 else 'have'} no outline: "
            f"references.background: grey leaves their references as they are"
        )


def _count_objects(objects: pa.Table, selection: Selection) -> None:
    selection.objects += len(objects)
    selection.objects_of_unknown_size += objects["width"].null_count
    selection.objects_with_outline += len(objects) - objects["segmentation"].null_count
    if not len(objects):
        return
    split = objects["split"][0].as_py()
    by_class = selection.objects_by_class.setdefault(split, {})
    names = objects["label_name"].combine_chunks()
    counts = np.bincount(names.indices.to_numpy(zero_copy_only=False), minlength=len(names.dictionary))
    for name, count in zip(names.dictionary.to_pylist(), counts.tolist(), strict=True):
        if count:
            by_class[name] = by_class.get(name, 0) + count
    # Rows of a photo stand together.
    photo_ids = objects["photo_id"].combine_chunks()
    first = np.r_[True, pc.not_equal(photo_ids[1:], photo_ids[:-1]).to_numpy(zero_copy_only=False)]
    sizes = objects["original_bytes"].combine_chunks().filter(pa.array(first))
    selection.photos_with_objects += int(first.sum())
    selection.photos_of_known_size += len(sizes) - sizes.null_count
    selection.original_bytes += int(pc.sum(sizes).as_py() or 0)


@contextmanager
def _writing_table(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """A function that takes rows of a Parquet file, which is there once all are written.

    Row groups have a fixed size: how the rows were read must not show in the file.
    """
    waiting: list[pa.Table] = []
    # What a row group holds of all but the split says nothing: rows are sorted by hashes.
    options = {"use_dictionary": with_dictionary(schema), "write_statistics": ["split"]}
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:

        def write_group(table: pa.Table) -> None:
            writer.write_table(_with_sorted_words(table).cast(schema), row_group_size=_ROW_GROUP)

        def flush(least: int) -> None:
            table = pa.concat_tables(waiting).unify_dictionaries()
            while len(table) >= least:
                write_behind(table.slice(0, _ROW_GROUP))
                table = table.slice(_ROW_GROUP)
            waiting[:] = [table.combine_chunks()]

        def write(table: pa.Table) -> None:
            waiting.append(table)
            if sum(map(len, waiting)) >= _ROW_GROUP:
                flush(_ROW_GROUP)

        with OneBehind(write_group) as write_behind:
            yield write
            if waiting:
                flush(1)


def _with_sorted_words(table: pa.Table) -> pa.Table:
    """The table with dictionaries of the words in use, sorted: the order in which words were met must not show in the file."""
    for place, name in enumerate(table.column_names):
        if pa.types.is_dictionary(table.schema.field(place).type):
            column = table.column(place).unify_dictionaries().combine_chunks()
            used = column.dictionary.take(pc.unique(column.indices.drop_null()))
            words = used.take(pc.sort_indices(used))
            places = pc.index_in(column.dictionary, value_set=words)
            table = table.set_column(place, name, pa.DictionaryArray.from_arrays(places.take(column.indices), words))
    return table
