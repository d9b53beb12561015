"""The duplicate scan: read, hash and decode every photo on Ray, and find those that are there twice under two ids.

The photo list is frozen and cut into chunks; a chunk is one unit of work and leaves one part; survey.json is written last.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pbe_core.errors import InputError, machine_error
from pbe_core.files import atomic_file, sweep, write_atomically
from pbe_core.images.decode import PhotoError, decode_photo
from pbe_core.images.sheets import Picture, fit, sheet
from pbe_core.progress import Progress
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings, SourceSettings
from pipelines.on_ray import start_ray
from pipelines.photos import as_listed, each_once, known_about, read_photo_file
from pipelines.ray_pool import actor_options, work_on_ray
from pipelines.selection.duplicates import PHOTO_LIST, SCAN_RECORD, perceptual_hash, read_scan, same_photos
from pipelines.selection.rules import is_photo_id
from schemas.tables import SURVEY

# One core surveys 70 photos of 1,024 px a second, so that a crash costs a few seconds.
PHOTOS_PER_CHUNK = 500
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


def list_photos(source: Source) -> pa.Table:
    """Every photo that has a box, once, sorted by split and id; with its file's name and original's MD5 where tables have them.

    Photos without boxes are never used, and some lists have many times more of them. Ids that no file can have are left to the
    selection, which rejects them row by row.

    Raises:
        InputError: no box can be read.
    """
    named = each_once((_photos_of(batch) for batch in source.read_boxes()), _LISTED)
    if not len(named):
        raise InputError(f"{source.name}: no box can be read, so there is no photo to survey; see the annotations' rows")
    return known_about(source.read_photos(), named, _LISTED).sort_by([("split", "ascending"), ("photo_id", "ascending")])


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


def scan_missing(chunks: Chunks, settings: BuildSettings) -> dict[int, str]:
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
    (chunks.folder / SCAN_RECORD).unlink(missing_ok=True)
    # Paths as this process sees them: Ray's workers start in another folder.
    source = settings.source.model_copy(update={"photos": settings.source.photos.resolve()})
    done = sum(size for number, size in enumerate(chunks.sizes) if number not in waiting)
    with Progress("surveying", sum(chunks.sizes), "photos", done) as progress:
        progress.say("starting Ray")
        start_ray(settings.ray.address)
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if not cpus:
            raise InputError(
                "the Ray cluster has no CPU to survey photos on; add a node, or set build.ray.address to another one"
            )
        actors = ray.remote(ScanActor).options(**actor_options(1))
        for _ in range(settings.ray.attempts):
            for number, error in work_on_ray(lambda: actors.remote(chunks, source), cpus, sorted(waiting), progress, _FEWER):
                if error:
                    errors[number] = error
                    continue
                waiting.remove(number)
                progress.update(chunks.sizes[number])
    return {number: errors[number] for number in sorted(waiting)}


class ScanActor:
    """A Ray actor that surveys chunks. An unexpected exception fails its chunk and is returned as text, not lost."""

    def __init__(self, chunks: Chunks, source: SourceSettings) -> None:
        self.chunks, self.source = chunks, source
        self.photos_done = 0

    def ready(self) -> None:
        """Returns once the actor stands."""

    def work(self, number: int) -> str:
        """Survey a chunk; returns what went wrong, with its traceback where that may help, or nothing."""
        self.photos_done = 0
        try:
            scan_chunk(self.chunks, number, self.source, self._count)
        except OSError as error:  # As of a full disk: the message is enough.
            return machine_error(error) or traceback.format_exc()
        except Exception:
            return traceback.format_exc()
        return ""

    def done(self) -> float:
        """Photos of the chunk at hand that were looked at."""
        return self.photos_done

    def _count(self) -> None:
        self.photos_done += 1


def scan_chunk(chunks: Chunks, number: int, source: SourceSettings, count: Callable[[], None] = lambda: None) -> None:
    """Survey the photos of one chunk and write its part; those that were found good before are not read again.

    Calls `count` for each photo that is done with.
    """
    cv2.setNumThreads(1)  # The actor has one core.
    photos = pq.ParquetFile(chunks.folder / "photo_list.parquet").read_row_group(number).to_pylist()
    before = [] if chunks.failures(number) is None else pq.read_table(chunks.part(number)).to_pylist()
    good = {(row["split"], row["photo_id"]): row for row in before if row["code"] == "ok"}
    rows = []
    for photo in photos:
        rows.append(good.get((photo["split"], photo["photo_id"])) or scan_photo(photo, source))
        count()
    if rows == before:
        return
    notes = chunks.notes(number, failures=sum(row["code"] != "ok" for row in rows))
    part = pa.Table.from_pylist(rows, SURVEY).replace_schema_metadata({**SURVEY.metadata, **notes})
    with atomic_file(chunks.part(number)) as temporary:
        pq.write_table(part, temporary)


def scan_photo(photo: Mapping[str, Any], source: SourceSettings) -> dict[str, Any]:
    """What one photo of the list is like: a row of `schemas.tables.SURVEY`; with a code if it cannot be used.

    Raises:
        OSError: a fault of the machine, as too many open files, and not of the photo.
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
    same = _find_duplicates(chunks.folder)
    with atomic_file(chunks.folder / "same_photos.parquet") as temporary:
        pq.write_table(same, temporary)
    record = {"identity": chunks.identity, "photos": sum(chunks.sizes), "codes": dict(codes.most_common()), "same": len(same)}
    write_atomically(chunks.folder / SCAN_RECORD, json.dumps(record, indent=1).encode())


def _find_duplicates(folder: Path) -> pa.Table:
    """Photos of a survey that are there under another id too, by its own hashes and by those of the originals."""
    columns = ["split", "photo_id", "code", "sha256", "perceptual_hash", "detail_hash"]
    photos = pq.read_table(folder / "photos.parquet", columns=columns)
    # Two files that are no photos may well be equal, the same error page: their code is what counts.
    good = pc.equal(photos["code"].cast(pa.string()), "ok")
    photos = photos.set_column(columns.index("sha256"), "sha256", pc.if_else(good, photos["sha256"], None))
    # In the same order: the parts follow the list.
    originals = pq.read_table(folder / "photo_list.parquet", columns=["original_md5"])
    return same_photos(photos.append_column("original_md5", originals["original_md5"]))


def draw_pairs(folder: Path, source: SourceSettings) -> Picture | None:
    """Pairs that were found to be the same, for a person to judge, those least alike first; none where none can be drawn."""
    pairs = read_scan(folder).same.to_pylist()
    # Equal hashes need no look. Where only a third photo links two that have no distance, they may be anything.
    pairs.sort(key=lambda pair: -1 if pair["by"] != "perceptual_hash" else 64 if pair["distance"] is None else pair["distance"])
    chosen = pairs[: -PAIRS_DRAWN - 1 : -1]
    ids = pa.array([pair[name] for pair in chosen for name in ("photo_id", "kept_photo_id")], pa.string())
    listed = pq.read_table(folder / "photo_list.parquet", filters=pc.field("photo_id").isin(ids)).to_pylist()
    photos = {(photo["split"], photo["photo_id"]): photo for photo in listed}
    rows, captions = [], []
    for pair in chosen:
        both = (pair["kept_split"], pair["kept_photo_id"]), (pair["split"], pair["photo_id"])
        with contextlib.suppress(PhotoError):  # One of them failed before, or is not there any more.
            rows.append([fit(_decoded(read_photo_file(photos[name], source), source), _CELL) for name in both])
            captions.append(caption_of(pair))
    return sheet(rows, ("kept", "the same"), captions, cell=_CELL) if rows else None


def caption_of(pair: Mapping[str, Any]) -> str:
    """A row of `SAME_PHOTOS` in words."""
    bits = "" if pair["distance"] is None else f", {pair['distance']} of 64 bits differ"
    return f"{pair['kept_split']}/{pair['kept_photo_id']} is the same as {pair['split']}/{pair['photo_id']} ({pair['by']}{bits})"


def _photos_of(boxes: pa.RecordBatch) -> pa.Table:
    """The photos of a batch of boxes."""
    usable = pc.and_(pc.is_null(boxes["problem"]), pa.array(is_photo_id(boxes["photo_id"])))
    return as_listed(boxes.select(["split", "photo_id"]).filter(usable), _LISTED)


def _list_sha256(photos: pa.Table) -> str:
    digest = hashlib.sha256()
    for batch in photos.to_batches(max_chunksize=100_000):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(f"{row!r}\n".encode())
    return digest.hexdigest()
