"""Survey the photos themselves: read, hash and decode each one, and find those that are there twice under two ids.

    python pipelines/survey.py --config configs/open_images.yaml --source.survey data/open_images/survey

    boxes ──▶ photo_list.parquet ──chunks, on Ray──▶ parts/*.parquet ──▶ photos.parquet ──▶ same_photos.parquet, .png
              (each photo once, sorted, frozen)                          (survey.json, written last: the survey is finished)

A build with the same `source.survey` then knows all sizes, and drops photos that are there twice. Interrupted, the survey goes on
where it stopped when the same command is run again; photos that could not be used are then looked at again.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from rich.console import Console
from rich.table import Table

from pbe_core.errors import InputError, machine_error, run_program
from pbe_core.files import atomic_file, sweep, write_atomically
from pbe_core.images.decode import PhotoError, decode_photo
from pbe_core.images.sheets import Picture, fit, save_picture, sheet
from pbe_core.progress import Progress
from pbe_core.settings import help_first, load_settings, preset
from pbe_core.words import number_of
from pipelines.annotations import open_source
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings, RaySettings, SourceSettings
from pipelines.on_ray import find_cluster, start_ray
from pipelines.photo_folder import check_photos, read_photo_file
from pipelines.photo_list import as_listed, each_once, known_about
from pipelines.ray_pool import actor_options, work_on_ray
from pipelines.selection.rules import PHOTO_ID
from pipelines.selection.same_photo import PHOTO_LIST, SURVEY_RECORD, perceptual_hash, read_survey, same_photos
from schemas.tables import SURVEY

# One core surveys 70 photos of 1,024 px a second, so that a crash costs a few seconds.
PHOTOS_PER_CHUNK = 500
PAIRS_PRINTED = 5
PAIRS_DRAWN = 12
_FEWER = "a Ray cluster of fewer CPUs runs fewer surveying processes at once"
_CELL = 300
_PARTS_AT_ONCE = 200
_LISTED = pa.schema([(name, pa.string()) for name in ("split", "photo_id", "file_name", "original_md5")])


@dataclass(frozen=True)
class Chunks:
    """The frozen photo list, cut into chunks; chunk n is row group n of `photo_list.parquet`, and part n of the survey."""

    folder: Path
    identity: str
    """Hash of all that determines the parts."""
    sizes: tuple[int, ...]
    """Photos of each chunk."""

    def part(self, number: int) -> Path:
        """The file of what was found in chunk `number`."""
        return self.folder / "parts" / f"{number:06d}.parquet"

    def notes(self, number: int, failures: int) -> dict[str, str]:
        """What a part bears in its footer, so that it is taken for no other chunk's, nor another survey's."""
        return {"part": f"{number} of {self.identity}", "failures": str(failures)}

    def failures(self, number: int) -> int | None:
        """How many photos of a chunk could not be used; nothing if the chunk is not done. Reads the footer alone."""
        try:
            metadata = pq.read_metadata(self.part(number))
        except (OSError, pa.ArrowInvalid):  # Not there, or damaged after it was written.
            return None
        found = {name.decode(): text.decode() for name, text in (metadata.metadata or {}).items()}
        failures = int(found.get("failures", 0))
        fits = self.notes(number, failures).items() <= found.items() and metadata.num_rows == self.sizes[number]
        return failures if fits else None


def main() -> int:
    """The story of a survey."""
    help_first(BuildSettings, "build", __doc__, preset("tiny"))
    settings = load_settings(BuildSettings, "build", default_config=preset("tiny"))
    if settings.source.survey is None:
        raise InputError("build.source.survey is not set: give --source.survey FOLDER, the folder to write the survey to")
    find_cluster(settings.ray.address)  # Before any work.
    folder = settings.source.survey.resolve()
    check_photos(settings)
    with Progress("opening the annotations"):
        source = open_source(settings)
    source.print_notes()
    with Progress("listing the photos"):
        chunks = freeze_list(list_photos(source), settings.source, folder)
    errors = survey_missing(chunks, settings)
    if errors:
        for number, message in errors.items():
            print(f"chunk {number} failed {number_of(settings.ray.attempts, 'time')}, last with:\n{message}", file=sys.stderr)
        of_all = f"{len(errors):,} of {number_of(len(chunks.sizes), 'chunk')}"
        print(f"error: {of_all} failed; the others are kept, run again", file=sys.stderr)
        return 1
    with Progress("comparing the photos"):
        finish(chunks)
    print_summary(folder)
    with Progress("drawing pairs"):
        picture = draw_pairs(folder, settings.source)
    if picture:
        print(f"the pairs that are least alike: {picture}")
    return 0


def list_photos(source: Source) -> pa.Table:
    """Every photo that has a box, once, sorted by split and id; with its file's name and its original's MD5 where tables say so.

    Photos without boxes are never used, and some lists have many times more of them. Ids that no file can have are left to the
    selection, which rejects them row by row.

    Raises:
        InputError: no box can be read.
    """
    named = each_once((_photos_of(batch) for batch in source.read_boxes()), _LISTED)
    if not len(named):
        raise InputError(f"{source.name}: no box can be read, so there is no photo to survey; see the annotations' rows")
    return known_about(source.read_photos(), named, _LISTED)


def freeze_list(photos: pa.Table, source: SourceSettings, folder: Path) -> Chunks:
    """Write the photo list of a survey folder, or take the one that is there if it is the same.

    Writes photo_list.parquet and, last, photo_list.json: what determines the parts.

    Raises:
        InputError: the folder holds a survey of other photos, or one made in another way.
    """
    plan = {
        "photos": len(photos),
        "photos_sha256": _list_sha256(photos),
        "photos_per_chunk": PHOTOS_PER_CHUNK,
        "photo_frame": source.photo_frame,
        "max_photo_pixels": source.max_photo_pixels,
        "missing_end_mark": source.missing_end_mark,
        "version": importlib.metadata.version("paint-by-example"),
    }
    stored = folder / PHOTO_LIST
    if stored.is_file():
        before = json.loads(stored.read_text())
        difference = [f"{key}: {before.get(key)} -> {plan[key]}" for key in plan if before.get(key) != plan[key]]
        if difference:
            raise InputError(
                f"{stored}: this folder holds the survey of another photo list, or one made in another way "
                f"({'; '.join(difference)}); give another --source.survey, or remove the folder"
            )
    else:
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "photo_list.parquet") as temporary:
            pq.write_table(photos, temporary, row_group_size=PHOTOS_PER_CHUNK)
        write_atomically(stored, json.dumps(plan, indent=1).encode())
    identity = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    sizes = tuple(min(PHOTOS_PER_CHUNK, len(photos) - start) for start in range(0, len(photos), PHOTOS_PER_CHUNK))
    return Chunks(folder, identity, sizes)


def survey_missing(chunks: Chunks, settings: BuildSettings) -> dict[int, str]:
    """Survey all chunks that are not done, or in which photos failed, on Ray; returns the last error of each that could not be.

    One chunk is one unit of work on one core, tried `ray.attempts` times.

    Raises:
        InputError: the Ray cluster has no CPU.
    """
    for written in (chunks.folder, chunks.part(0).parent):
        sweep(written)
    waiting = {number for number in range(len(chunks.sizes)) if chunks.failures(number) != 0}
    errors: dict[int, str] = {}
    if not waiting:
        return errors
    # From here to the end this survey is not finished: its tables would not be those of its parts.
    (chunks.folder / SURVEY_RECORD).unlink(missing_ok=True)
    # Paths as this process sees them: Ray's workers start in another folder.
    source = settings.source.model_copy(update={"photos": settings.source.photos.resolve()})
    done = sum(size for number, size in enumerate(chunks.sizes) if number not in waiting)
    with Progress("surveying", sum(chunks.sizes), "photos", done) as progress:
        for _ in range(settings.ray.attempts):
            if not waiting:
                break
            for number, error in survey_on_ray(chunks, source, settings.ray, sorted(waiting), progress):
                if error:
                    errors[number] = error
                    continue
                waiting.remove(number)
                progress.update(chunks.sizes[number])
    return {number: errors[number] for number in sorted(waiting)}


def survey_on_ray(
    chunks: Chunks, source: SourceSettings, settings: RaySettings, numbers: list[int], progress: Progress
) -> Iterator[tuple[int, str]]:
    """Survey chunks on all nodes; yields (number, error or "") as they finish.

    Raises:
        InputError: the Ray cluster has no CPU.
    """
    progress.say("starting Ray")
    start_ray(settings.address)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if not cpus:
        raise InputError("the Ray cluster has no CPU to survey photos on; add a node, or set build.ray.address to another one")
    make = ray.remote(SurveyActor).options(**actor_options(1))
    yield from work_on_ray(lambda: make.remote(chunks, source), cpus, numbers, progress, _FEWER)


class SurveyActor:
    """A Ray actor that surveys chunks. An unexpected exception fails its chunk and is returned as text, not lost."""

    def __init__(self, chunks: Chunks, source: SourceSettings) -> None:
        self.chunks, self.source = chunks, source
        self.photos_done = 0

    def ready(self) -> None:
        """Nothing to say; that this returns means that the actor has found its place."""

    def work(self, number: int) -> str:
        """Survey a chunk; returns what went wrong, with its traceback where that may help, or nothing."""
        self.photos_done = 0
        try:
            survey_chunk(self.chunks, number, self.source, self._count)
        except OSError as error:  # A full disk, say: the message has it all.
            return machine_error(error) or traceback.format_exc()
        except Exception:
            return traceback.format_exc()
        return ""

    def done(self) -> float:
        """Photos of the chunk at hand that were looked at."""
        return self.photos_done

    def _count(self) -> None:
        self.photos_done += 1


def survey_chunk(chunks: Chunks, number: int, source: SourceSettings, count: Callable[[], None] = lambda: None) -> None:
    """Survey the photos of one chunk and write its part; those that were found good before are not read again.

    Calls `count` for each photo that is done with.
    """
    cv2.setNumThreads(1)  # The actor has one core.
    photos = pq.ParquetFile(chunks.folder / "photo_list.parquet").read_row_group(number).to_pylist()
    before = [] if chunks.failures(number) is None else pq.read_table(chunks.part(number)).to_pylist()
    good = {(row["split"], row["photo_id"]): row for row in before if row["code"] == "ok"}
    rows = []
    for photo in photos:
        rows.append(good.get((photo["split"], photo["photo_id"])) or survey_photo(photo, source))
        count()
    if rows == before:
        return
    failures = sum(row["code"] != "ok" for row in rows)
    part = pa.Table.from_pylist(rows, SURVEY)
    part = part.replace_schema_metadata({**SURVEY.metadata, **chunks.notes(number, failures)})
    with atomic_file(chunks.part(number)) as temporary:
        pq.write_table(part, temporary)


def survey_photo(photo: Mapping[str, Any], source: SourceSettings) -> dict[str, Any]:
    """What one photo of the list is like: a row of `schemas.tables.SURVEY`; with a code if it cannot be used.

    Raises:
        OSError: too many files are open, say: the machine's trouble, not the photo's.
    """
    row: dict[str, Any] = dict.fromkeys(SURVEY.names) | {"split": photo["split"], "photo_id": photo["photo_id"], "code": "ok"}
    try:
        data = read_photo_file(photo, source)
        row |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        pixels = _decoded(data, source)
    except PhotoError as error:
        return row | {"code": error.code, "detail": error.detail}
    row |= {"height": pixels.shape[0], "width": pixels.shape[1]}
    hashes = perceptual_hash(pixels)
    return row | ({"perceptual_hash": hashes.coarse, "detail_hash": hashes.detail} if hashes else {})


def _decoded(data: bytes, source: SourceSettings) -> Picture:
    return decode_photo(
        data, frame=source.photo_frame, max_pixels=source.max_photo_pixels, missing_end_mark=source.missing_end_mark
    )


def finish(chunks: Chunks) -> None:
    """Put the parts together, find the same photos among all, and write the record that makes the survey finished."""
    codes: Counter[str] = Counter()
    with atomic_file(chunks.folder / "photos.parquet") as temporary, pq.ParquetWriter(temporary, SURVEY) as writer:
        for start in range(0, len(chunks.sizes), _PARTS_AT_ONCE):
            numbers = range(start, min(start + _PARTS_AT_ONCE, len(chunks.sizes)))
            photos = pa.concat_tables([pq.read_table(chunks.part(number)).cast(SURVEY) for number in numbers])
            writer.write_table(photos.combine_chunks())
            codes.update(photos["code"].to_pylist())
    same = find_same_photos(chunks.folder)
    with atomic_file(chunks.folder / "same_photos.parquet") as temporary:
        pq.write_table(same, temporary)
    record = {"identity": chunks.identity, "photos": sum(chunks.sizes), "codes": dict(codes.most_common()), "same": len(same)}
    write_atomically(chunks.folder / SURVEY_RECORD, json.dumps(record, indent=1).encode())


def find_same_photos(folder: Path) -> pa.Table:
    """Photos of a survey that are there under another id too, by its own hashes and by those of the originals."""
    columns = ["split", "photo_id", "code", "sha256", "perceptual_hash", "detail_hash"]
    photos = pq.read_table(folder / "photos.parquet", columns=columns)
    # Two files that are no photos may well be equal, the same error page: what is wrong with these is told by their code.
    good = pc.equal(photos["code"].cast(pa.string()), "ok")
    photos = photos.set_column(columns.index("sha256"), "sha256", pc.if_else(good, photos["sha256"], None))
    # In the same order: the parts follow the list.
    originals = pq.read_table(folder / "photo_list.parquet", columns=["original_md5"])
    return same_photos(photos.append_column("original_md5", originals["original_md5"]))


def print_summary(folder: Path) -> None:
    """Where every photo went, and the first few that are there in two splits."""
    survey = read_survey(folder)
    codes: Counter[tuple[str, str]] = Counter()
    plain = 0
    for batch in survey.read_photos():
        codes.update(zip(batch["code"].to_pylist(), batch["split"].to_pylist(), strict=True))
        plain += batch["perceptual_hash"].null_count - batch["width"].null_count
    same = survey.same.to_pylist()
    across = [pair for pair in same if pair["split"] != pair["kept_split"]]
    table = Table(title="What the photos are like", title_justify="left")
    table.add_column("outcome")
    table.add_column("split")
    table.add_column("photos", justify="right")
    for (code, split), count in sorted(codes.items(), key=lambda item: (item[0][0] != "ok", item[0])):
        table.add_row("ok" if code == "ok" else f"failed: {code}", split, f"{count:,}")
    table.add_row("ok, but too plain for a perceptual hash", "", f"{plain:,}")
    table.add_section()
    groups = {(pair["kept_split"], pair["kept_photo_id"]) for pair in same}
    table.add_row("groups of the same photo, of which one is kept", "", f"{len(groups):,}")
    table.add_row("the others in these groups", "", f"{len(same):,}")
    for by, count in Counter(pair["by"] for pair in same).most_common():
        table.add_row(f"of these found by {by}", "", f"{count:,}")
    table.add_row("of these in another split than the one kept", "", f"{len(across):,}")
    console = Console()
    console.print(table)
    for pair in across[:PAIRS_PRINTED]:
        console.print(_caption(pair), soft_wrap=True, highlight=False)
    if len(across) > PAIRS_PRINTED:
        console.print(
            f"... and {len(across) - PAIRS_PRINTED:,} more in {folder / 'same_photos.parquet'}", soft_wrap=True, highlight=False
        )
    console.print(f"survey: {folder}", soft_wrap=True, highlight=False)


def draw_pairs(folder: Path, source: SourceSettings) -> Path | None:
    """Write `same_photos.png`: pairs that were found to be the same, for a person to judge, those least alike first."""
    path = folder / "same_photos.png"
    path.unlink(missing_ok=True)
    pairs = read_survey(folder).same.to_pylist()
    # Equal hashes need no judge. Where only a third photo links two that have no distance, they may be anything.
    pairs.sort(key=lambda pair: -1 if pair["by"] != "perceptual_hash" else 64 if pair["distance"] is None else pair["distance"])
    chosen = pairs[: -PAIRS_DRAWN - 1 : -1]
    names = {(pair[f"{kept}split"], pair[f"{kept}photo_id"]) for pair in chosen for kept in ("", "kept_")}
    ids = pa.array([photo_id for _, photo_id in names], pa.string())
    listed = pq.read_table(folder / "photo_list.parquet", filters=pc.field("photo_id").isin(ids))
    pictures: dict[tuple[str, str], Picture] = {}
    for photo in listed.to_pylist():
        name = photo["split"], photo["photo_id"]
        if name in names:
            with contextlib.suppress(PhotoError):  # It failed before, or is not there any more.
                data = read_photo_file(photo, source)
                pictures[name] = fit(_decoded(data, source), _CELL)
    rows, captions = [], []
    for pair in chosen:
        kept, other = (pair["kept_split"], pair["kept_photo_id"]), (pair["split"], pair["photo_id"])
        if kept in pictures and other in pictures:
            rows.append([pictures[kept], pictures[other]])
            captions.append(_caption(pair))
    if not rows:
        return None
    save_picture(sheet(rows, ("kept", "the same"), captions, cell=_CELL), path)
    return path


def _caption(pair: Mapping[str, Any]) -> str:
    bits = "" if pair["distance"] is None else f", {pair['distance']} of 64 bits differ"
    return f"{pair['kept_split']}/{pair['kept_photo_id']} is the same as {pair['split']}/{pair['photo_id']} ({pair['by']}{bits})"


def _photos_of(boxes: pa.RecordBatch) -> pa.Table:
    """The photos of a batch of boxes."""
    usable = pc.and_kleene(
        pc.is_null(boxes["problem"]), pc.fill_null(pc.match_substring_regex(boxes["photo_id"], PHOTO_ID), False)
    )
    return as_listed(boxes.select(["split", "photo_id"]).filter(usable), _LISTED)


def _list_sha256(photos: pa.Table) -> str:
    digest = hashlib.sha256()
    for batch in photos.to_batches(max_chunksize=100_000):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(f"{row!r}\n".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    run_program(main)
