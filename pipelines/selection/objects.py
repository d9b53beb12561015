"""The stage: boxes -> objects.parquet + rejects.parquet, for more boxes than memory holds.

    boxes ──┐                     ┌─▶ rejects.parquet
            ├─ runs, by photo ─▶ judge ─▶ candidates ──cap per class──▶ objects.parquet
    photos ─┘   (on disk)         bucket by bucket          └─▶ rejects.parquet

Memory does not grow with the number of boxes; the runs take about 100 bytes a box on disk, below the output folder, until the
stage is over. Objects come out sorted by split, hash of the photo and hash of the object, whatever the order of the input was.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import UInt64

from pbe_core.errors import InputError
from pbe_core.files import atomic_file, sweep, temporary_folder
from pbe_core.progress import Progress
from pbe_core.randomness import hash_column
from pbe_core.words import number_of
from pipelines.annotations import open_source
from pipelines.annotations.source import Source
from pipelines.annotations.unread import flags_that_nobody_sets
from pipelines.config import BuildSettings
from pipelines.selection.balance import Balance, keeps
from pipelines.selection.classes import choose_classes, class_notes
from pipelines.selection.gathering import SORTED_SPLITS, Gathered, gather, photo_hashes
from pipelines.selection.judging import EXAMPLES, Judged, Judging, numbers
from pipelines.selection.rules import REASONS
from pipelines.selection.same_photo import by_place, read_survey, same_photos
from pipelines.threads import in_order
from schemas.tables import OBJECTS, REJECTS, SAME_PHOTOS, WORD

_ROW_GROUP = 100_000
_ADDRESS = "^[A-Za-z][A-Za-z0-9+.-]*://[^/]+/."
_THREADS = min(4, os.cpu_count() or 1)


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
    """Size of the published originals of those, as far as the tables say."""
    objects_of_unknown_size: int = 0
    """Whose photo's width and height the tables do not say."""
    objects_with_outline: int = 0
    """Whose own pixels the tables say."""
    photos_of_known_size: int = 0
    """How many of those the tables give an original's size for."""
    same_photos: dict[str, int] = field(default_factory=dict)
    """Photos that are there under another id too, by how that was found; `across_splits` of them in another split."""
    objects_by_class: dict[str, dict[str, int]] = field(default_factory=dict)
    """Split -> class name -> objects."""
    notes: list[str] = field(default_factory=list)
    """What a user should know and may not expect."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Malformed rows, by reason: the first few, in words."""


def select_objects(settings: BuildSettings, out: Path, source: Source | None = None) -> Selection:
    """Read all boxes, judge them, and write `objects.parquet`, `rejects.parquet` and `same_photos.parquet` into a folder.

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
        gathered = gather(source, settings, folder)
        selection = Selection(boxes=gathered.boxes.rows)
        labels = gathered.labels.words
        choice = choose_classes(labels, source, settings.selection)
        # Own boxes have no class hierarchy, and that of COCO is in its file.
        notes = list(class_notes(labels, source, settings.selection)) if settings.source.kind == "open_images" else []
        same = _find_same_photos(gathered, settings)
        same = pa.concat_tables([_joined_photos(source), same]).unify_dictionaries()
        selection.same_photos = _count_same(same)
        dropped = _photo_hashes(same if settings.source.same_photo == "drop" else same.slice(0, 0), settings)

        objects = stack.enter_context(_table_writer(out / "objects.parquet", OBJECTS))
        rejects = stack.enter_context(_table_writer(out / "rejects.parquet", REJECTS))
        same_file = stack.enter_context(_table_writer(out / "same_photos.parquet", SAME_PHOTOS))
        same_file(same)
        judging = Judging(gathered, source, settings, choice, dropped)
        parts = in_order(pool, judging.judge, gathered.parts(), _THREADS + 1)
        judged = _with_progress(parts, gathered, settings, selection, rejects, same_file)
        for candidates in _balanced(judged, settings, gathered, folder, selection, rejects, judging):
            _count_objects(candidates, selection)
            objects(candidates.select(OBJECTS.names))
        rejected = sum(selection.rejects.values())
        if selection.boxes != selection.objects + rejected:
            raise RuntimeError(
                f"the books do not balance: "
                f"of {number_of(selection.boxes, 'box', 'boxes')} {selection.objects} were accepted, {rejected} rejected"
            )
        if not selection.boxes:
            raise InputError(
                f"{source.name}: there is no box in it for the splits {', '.join(settings.source.splits)}; get a file with "
                f"boxes, or change source.splits"
            )
        if not selection.objects:
            raise InputError(
                f"{source.name}: none of the {number_of(selection.boxes, 'box', 'boxes')} is accepted "
                f"({_shown(selection.rejects)}): "
                f"docs/data-format.md#reasons-of-rejects tells what each means{_first_example(selection)}"
                f"{''.join(f'; {note}' for note in notes)}"
            )
        selection.notes = [*notes, *source.read_notes(), *_notes(selection, settings)]
    selection.rejects = {reason: selection.rejects[reason] for reason in REASONS if reason in selection.rejects}
    selection.examples = {reason: selection.examples[reason] for reason in REASONS if reason in selection.examples}
    return selection


def _joined_photos(source: Source) -> pa.Table:
    """Rows of `SAME_PHOTOS` for what the reader has put together already."""
    rows = [
        {"split": split, "photo_id": photo_id, "kept_split": split, "kept_photo_id": kept, "by": "file_name"}
        for split, photo_id, kept in sorted(source.joined())
    ]
    return pa.Table.from_pylist(rows, schema=SAME_PHOTOS)


def _find_same_photos(gathered: Gathered, settings: BuildSettings) -> pa.Table:
    """Photos that are there under another id too: by what the tables say of their files, and by the survey's hashes."""
    parts = gathered.parts()
    found = {name: _photos_that_share(gathered, parts, name) for name in ("file_name", "original_md5", "url")}
    # Where the annotations are one file, so are all that bear one name: it knows nothing of splits and their folders.
    if not settings.source.annotations.is_file():
        found["file_name"] = by_place(found["file_name"], settings.source.photos)
    same = SAME_PHOTOS.empty_table()
    if any(map(len, found.values())):
        same = same_photos(pa.concat_tables(found.values(), promote_options="default").unify_dictionaries().combine_chunks())
    if not settings.source.survey:
        return same
    surveyed = read_survey(settings.source.survey).same
    built = pa.array(list(settings.source.splits))
    here = [pc.is_in(surveyed[name].cast(pa.string()), built) for name in ("split", "kept_split")]
    surveyed = surveyed.filter(pc.and_(*here))
    # The survey knows the tables' hashes too, as of the photos that it found; what it says of a photo counts.
    names = [pc.binary_join_element_wise(table["split"].cast(pa.string()), table["photo_id"], "/") for table in (same, surveyed)]
    told = pc.is_in(names[0], value_set=names[1].combine_chunks())
    return pa.concat_tables([same.filter(pc.invert(told)), surveyed]).unify_dictionaries()


def _photos_that_share(gathered: Gathered, parts: Sequence[range], name: str) -> pa.Table:
    """Photos that have boxes and of which a column says what it says of another row too: split, photo_id and this column.

    Holds a hash of each photo's value, and the photos that are found.
    """
    hashes = [hash_column(gathered.photos.read_columns(part, [name])[0].drop_null()) for part in parts]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = values[counts > 1]
    schema = pa.schema([("split", WORD), ("photo_id", pa.string()), (name, pa.string())])
    tables = [schema.empty_table()]
    for part in parts if len(repeated) else ():
        photo, photo_id, value = gathered.photos.read_columns(part, ["photo", "photo_id", name])
        # A photo without boxes must not be the one that is kept.
        with_boxes = np.asarray(gathered.boxes.read_columns(part, ["photo"])[0])
        wanted = np.isin(hash_column(value), repeated) & np.isin(photo, with_boxes)
        wanted &= pc.is_valid(value).to_numpy(zero_copy_only=False)
        if name == "url":  # `http://` or `unknown` is no photo's address.
            wanted &= pc.fill_null(pc.match_substring_regex(value, _ADDRESS), False).to_numpy(zero_copy_only=False)
        chosen = pa.array(wanted)
        split = pa.array([gathered.split_of(part)] * int(wanted.sum()), WORD)
        tables.append(pa.table([split, photo_id.filter(chosen), value.filter(chosen)], schema=schema))
    return pa.concat_tables(tables)


def _count_same(same: pa.Table) -> dict[str, int]:
    counts = Counter(same["by"].to_pylist())
    across = sum(a != b for a, b in zip(same["split"].to_pylist(), same["kept_split"].to_pylist(), strict=True))
    return {**dict(sorted(counts.items())), "across_splits": across} if len(same) else {}


def _photo_hashes(same: pa.Table, settings: BuildSettings) -> dict[str, UInt64[np.ndarray, " photos"]]:
    """The photos that are not kept, by split."""
    splits = same["split"].cast(pa.string())
    ids = {split: same.filter(pc.equal(splits, split))["photo_id"].combine_chunks() for split in SORTED_SPLITS}
    return {split: np.unique(photo_hashes(column, settings.seed)) for split, column in ids.items()}


def _with_progress(
    judged: Iterator[Judged],
    gathered: Gathered,
    settings: BuildSettings,
    selection: Selection,
    rejects: Callable[[pa.Table], None],
    same_file: Callable[[pa.Table], None],
) -> Iterator[pa.Table]:
    """Write the rejects of each part, keep the books, and pass its candidates on."""
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with Progress("selecting", gathered.boxes.rows, "boxes") as progress:
        for part in judged:
            totals += part.counts
            reasons += part.reasons
            for reason, examples in part.examples.items():
                selection.examples[reason] = [*selection.examples.get(reason, []), *examples][:EXAMPLES]
            if part.not_surveyed:
                raise InputError(
                    f"{settings.source.survey}: this survey does not know photo {part.not_surveyed} of {part.split}, which has "
                    f"boxes: it is of other annotations, or older; run pipelines/survey.py again with these settings"
                )
            rejects(part.rejects)
            same_file(part.in_two_splits)
            for name in ("photo_id", "across_splits") if len(part.in_two_splits) else ():
                selection.same_photos[name] = selection.same_photos.get(name, 0) + len(part.in_two_splits)
            yield part.candidates
            progress.update(len(part.rejects) + len(part.candidates))
    selection.rejects = dict(reasons)
    selection.photos = totals["photos"]
    selection.photos_with_boxes = totals["photos_with_boxes"]
    selection.photos_without_boxes = totals["photos_without_boxes"]


def _balanced(
    judged: Iterator[pa.Table],
    settings: BuildSettings,
    gathered: Gathered,
    folder: Path,
    selection: Selection,
    rejects: Callable[[pa.Table], None],
    judging: Judging,
) -> Iterator[pa.Table]:
    """Candidates that their class has a place for; the others are written as rejects."""
    cap = settings.selection.max_per_class
    if cap is None:
        yield from judged
        return
    balance = Balance(len(SORTED_SPLITS) * max(1, len(gathered.labels)))
    paths: list[Path] = []
    for candidates in judged:
        balance.count(numbers(candidates, "group"), numbers(candidates, "priority"))
        paths.append(folder / f"candidates-{len(paths):05d}.arrow")
        with pa.OSFile(str(paths[-1]), "wb") as file, pa.ipc.new_file(file, candidates.schema) as writer:
            writer.write_table(candidates.unify_dictionaries().combine_chunks())
    limits = balance.limits(cap, settings.selection.class_smoothing, (_read_groups(path) for path in paths))
    over = 0
    for path in paths:
        with pa.OSFile(str(path)) as file:
            candidates = pa.ipc.open_file(file).read_all()
        stays = pa.array(keeps(limits, numbers(candidates, "group"), numbers(candidates, "priority")))
        left = candidates.filter(pc.invert(stays))
        rejects(judging.reject_candidates(left))
        over += len(left)
        yield candidates.filter(stays)
    if over:
        selection.rejects["over_class_cap"] = over


def _read_groups(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with pa.OSFile(str(path)) as file:
        names = pa.ipc.open_file(file).schema.names
    options = pa.ipc.IpcReadOptions(included_fields=[names.index("group"), names.index("priority")])
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file, options=options).read_all()
    return numbers(table, "group"), numbers(table, "priority")


def _notes(selection: Selection, settings: BuildSettings) -> Iterator[str]:
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
    for split in settings.source.splits:
        if split not in selection.objects_by_class:
            yield f"{split} has no object" + (": nothing to judge a model by" if split == "validation" else "")
    if unset := flags_that_nobody_sets(settings):
        yield f"selection.reject_flags: {', '.join(unset)} is unknown of all boxes of source.kind {settings.source.kind}"
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


class _table_writer:
    """A Parquet file, written in parts, that is there only once all is written. Call it with a table.

    Row groups have a fixed size: how the rows were read must not show in the file.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.waiting: list[pa.Table] = []

    def __enter__(self) -> Callable[[pa.Table], None]:
        self.stack = ExitStack()
        temporary = self.stack.enter_context(atomic_file(self.path))
        self.writer = self.stack.enter_context(pq.ParquetWriter(temporary, self.schema))
        return self.write

    def write(self, table: pa.Table) -> None:
        """Take rows; they are written once a row group is full."""
        self.waiting.append(table)
        if sum(map(len, self.waiting)) >= _ROW_GROUP:
            self._flush(_ROW_GROUP)

    def _flush(self, least: int) -> None:
        table = pa.concat_tables(self.waiting).unify_dictionaries()
        while len(table) >= least:
            self.writer.write_table(_with_sorted_words(table.slice(0, _ROW_GROUP)).cast(self.schema), row_group_size=_ROW_GROUP)
            table = table.slice(_ROW_GROUP)
        self.waiting = [table.combine_chunks()]

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self.waiting:
            self._flush(1)
        self.stack.__exit__(*error)


def _with_sorted_words(table: pa.Table) -> pa.Table:
    """The table with dictionaries of the words in use, sorted: the order in which words were met must not show in the file."""
    for place, name in enumerate(table.column_names):
        if pa.types.is_dictionary(table.schema.field(place).type):
            column = table.column(place).unify_dictionaries().combine_chunks()
            used = pc.unique(column.indices.drop_null())
            words = column.dictionary.take(used)
            order = pc.sort_indices(words)
            new_place = np.zeros(max(1, len(column.dictionary)), np.int32)
            new_place[used.take(order).to_numpy()] = np.arange(len(order))
            indices = column.indices.fill_null(0).to_numpy(zero_copy_only=False)
            missing = column.is_null().to_numpy(zero_copy_only=False)
            sorted_column = pa.DictionaryArray.from_arrays(pa.array(new_place[indices], mask=missing), words.take(order))
            table = table.set_column(place, name, sorted_column)
    return table


def _shown(rejects: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {rejects[reason]:,}" for reason in REASONS if reason in rejects)


def _first_example(selection: Selection) -> str:
    for reason in REASONS:
        if selection.examples.get(reason):
            return f"; for example {selection.examples[reason][0]}"
    return ""
