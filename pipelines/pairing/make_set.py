"""A pair set from settings: rules, draw, pairs, and the books of where every box went."""

import importlib.metadata
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbe_core.errors import InputError
from pbe_core.files import file_sha256, temporary_folder
from pbe_core.progress import Progress
from pbe_core.words import number_of
from pipelines.annotations.source import Source
from pipelines.dataset.write_plan import SOURCE_KEYS, fingerprint_hash, hash_inputs
from pipelines.pairing.annotation_ids import ids_by_row, ids_of_objects, objects_of_ids, some
from pipelines.pairing.draw import Draw, Row, draw
from pipelines.pairing.make_pairs import Compares, MadePair, PairMaker, cpus
from pipelines.pairing.settings import PUBLISHED_COUNT, BenchmarkSettings
from pipelines.pairing.write_set import SetWriter
from pipelines.readers import reader_of
from pipelines.selection.objects import Selection, select_objects
from schemas.dataset import CUTTING_VERSION

LIBRARIES = ("paint-by-example", "numpy", "opencv-python-headless", "pillow", "pyarrow", "torch")
METHOD = {
    "photo": "the largest square in the photo's middle, moved as little as holding the box takes; resized bicubic, antialiased",
    "mask": "the pixels of the square whose centres lie in the box, 255",
    "reference": "an object of the same class from another photo, its box padded and shrunk to the square's side at most",
}
AS_PUBLISHED = (
    "photos and masks are of the given annotation ids; the references are not COCOEE's: those were picked by hand from COCO's "
    "train2017, by no rule that was published. Here they are objects of the same class from other photos of this source. How "
    "COCOEE's squares were cut was not published either: scores on this set are not scores on COCOEE"
)


@dataclass
class Books:
    """Where every box went: all of them are pairs or left out by a reason."""

    boxes: int
    left_out: Counter[str]
    pairs: int = 0
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises RuntimeError where they do not balance, which is a defect of ours."""
        if self.boxes != self.pairs + self.left_out.total():
            raise RuntimeError(f"counts do not add up: {self.boxes} boxes, {self.pairs} pairs, left out: {dict(self.left_out)}")


def rules_of(settings: BenchmarkSettings, source: Source, judge: Compares | None) -> dict[str, Any]:
    """All that determines a set's bytes, but for the photos themselves: settings, annotations, the judge, libraries."""
    chosen = settings.model_dump(mode="json", include={"seed", "source", "selection", "references", "benchmark"})
    chosen["source"] = {name: chosen["source"][name] for name in SOURCE_KEYS if name in chosen["source"]} | {
        "frame": settings.source.photo_frame
    }
    del chosen["selection"]["all_reasons"], chosen["selection"]["leave_out"]  # The latter's contents are among the inputs.
    chosen["references"] = {"padding": settings.references.padding}
    for name in ("out", "threads", "judge"):
        del chosen["benchmark"][name]
    if settings.benchmark.ids:
        chosen["benchmark"]["ids"] = file_sha256(settings.benchmark.ids)
    rules = {
        "versions": {"cutting": str(CUTTING_VERSION)} | {name: importlib.metadata.version(name) for name in LIBRARIES},
        "inputs": hash_inputs(settings, source),
        "judge": judge and {name: getattr(judge.identity, name) for name in ("kind", "sha256", "preparation")},
        "settings": chosen,
    }
    content: dict[str, Any] = json.loads(json.dumps(rules))
    return content


def make_set(
    settings: BenchmarkSettings,
    source: Source,
    judge: Compares | None,
    ids: list[int] | None,
    folder: Path,
    rules: dict[str, Any],
) -> dict[str, Any]:
    """Make all pairs and write the set into an empty folder; returns its record.

    Raises:
        InputError: no pair can be made, or what is wrong with the annotations.
    """
    with temporary_folder(folder, "tables") as tables:
        selection = select_objects(settings, tables, source)
        with Progress("drawing"):
            drawn = draw(tables / "objects.parquet", settings.seed, settings.benchmark.candidates)
        with Progress("finding annotation ids"):
            by_row = ids_by_row(source) if reader_of(settings.source.kind).annotation_ids else None
        writer = SetWriter(folder)
        threads = ThreadPoolExecutor(settings.benchmark.threads or cpus(), thread_name_prefix="pair")
        with threads:
            maker = PairMaker(settings, drawn.pools, judge, threads)
            if ids is None:
                books = _pair_drawn(settings, source, drawn, selection, by_row, maker, writer)
            else:
                books = _pair_named(settings, source, ids, by_row, maker, writer)
    if maker.unread:
        codes = ", ".join(f"{code}: {count:,}" for code, count in sorted(maker.unread.items()))
        books.notes.append(f"objects that cannot be references, as their photos cannot be used ({codes})")
    if cut := sum(not row["whole_box"] for row in writer.rows):
        books.notes.append(f"boxes that no square of their photo holds, so that the mask ends at its edge: {cut:,}")
    books.pairs = len(writer.rows)
    books.check()
    left_out = dict(sorted(books.left_out.items(), key=lambda item: (-item[1], item[0])))
    if not books.pairs:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in left_out.items())
        boxes = number_of(books.boxes, "box", "boxes")
        way = "" if settings.benchmark.split == "all" else f" of split {settings.benchmark.split}; try --benchmark.split all"
        raise InputError(f"{source.name}: no pair can be made of {boxes} ({reasons}){way}")
    classes = Counter(row["label"] for row in writer.rows)
    record = {
        "method": METHOD,
        "rules": rules,
        "source_fingerprint": fingerprint_hash(rules["inputs"]),
        "books": {"boxes": books.boxes, "left_out": left_out},
        "classes": dict(sorted(classes.items(), key=lambda item: (-item[1], item[0]))),
        "judge": judge and judge.identity.model_dump(mode="json"),
        "notes": books.notes,
    }
    return writer.finish(record)


def _pair_drawn(
    settings: BenchmarkSettings,
    source: Source,
    drawn: Draw,
    selection: Selection,
    by_row: dict[tuple[str, int], int] | None,
    maker: PairMaker,
    writer: SetWriter,
) -> Books:
    """Pairs of drawn objects, until there are enough."""
    books = Books(selection.boxes, Counter(selection.rejects) + Counter(drawn.left_out), notes=list(selection.notes))
    wanted = settings.benchmark.count or PUBLISHED_COUNT
    if reader_of(settings.source.kind).annotation_ids and by_row is None:
        books.notes.append("ids of annotations are missing, repeated or no whole numbers: pairs are numbered from 1")
    tried = 0
    for targets in drawn.read_targets(max(wanted, 64)):
        known = ids_of_objects(source, [row["object_id"] for row in targets], by_row) if by_row else {}
        maker.look_at(targets)
        with Progress("pairing", min(wanted, len(drawn.targets)), "pairs", len(writer.rows)) as progress:
            for row, made in zip(targets, maker.make(targets), strict=False):
                tried += 1
                if isinstance(made, MadePair):
                    writer.add(known.get(row["object_id"], len(writer.rows) + 1), made)
                    progress.update()
                else:
                    books.left_out[made] += 1
                if len(writer.rows) == wanted:
                    break
        if len(writer.rows) == wanted:
            break
    books.left_out += Counter(not_needed=len(drawn.targets) - tried)
    if len(writer.rows) < wanted:
        books.notes.append(f"{number_of(wanted, 'pair')} wanted, and there are no more than {len(writer.rows):,}")
    return books


def _pair_named(
    settings: BenchmarkSettings,
    source: Source,
    ids: list[int],
    by_row: dict[tuple[str, int], int] | None,
    maker: PairMaker,
    writer: SetWriter,
) -> Books:
    """Pairs of the annotations that the ids name, in their order."""
    if by_row is None:
        raise InputError(
            f"{source.name}: its annotations' ids are missing, repeated or no whole numbers: no id names one of them"
        )
    ids = ids[: settings.benchmark.count]
    rows, problems = objects_of_ids(source, ids, by_row)
    books = Books(len(ids), Counter(), notes=[AS_PUBLISHED])
    numbers = [number for number in ids if number in rows]
    targets: list[Row] = [rows[number] for number in numbers]
    maker.look_at(targets)
    with Progress("pairing", len(targets), "pairs") as progress:
        for number, made in zip(numbers, maker.make(targets), strict=True):
            progress.update()
            if isinstance(made, MadePair):
                writer.add(number, made)
            else:
                problems[number] = made
    books.left_out = Counter(problems.values())
    for reason in sorted(books.left_out):
        named = [number for number, problem in problems.items() if problem == reason]
        books.notes.append(f"ids of which no pair can be made, {reason}: {some(named)}")
    return books
