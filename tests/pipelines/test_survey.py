"""The duplicate scan, by its command on a real Ray and by its chunks: what it finds, what a bad photo costs, how it goes on."""

import contextlib
import csv
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images.decode import decode_photo
from pbe_core.settings import preset
from pipelines import photos as photos_module
from pipelines import survey
from pipelines.annotations import open_source
from pipelines.annotations.source import Source
from pipelines.config import SourceSettings
from pipelines.selection import duplicate_scan
from pipelines.selection.duplicate_scan import finish, freeze_list, list_photos, scan_chunk, scan_photo
from pipelines.selection.duplicates import perceptual_hash, read_scan
from pipelines.selection.objects import select_objects
from schemas.tables import BOXES, PHOTOS, SAME_PHOTOS, SURVEY
from tests.conftest import settings_of


@dataclass(frozen=True)
class World:
    """The tiny world with three photos added that are there already, and a survey of it."""

    folder: Path
    copied: tuple[str, str]
    """A photo of train, and the same file in validation."""
    smaller: tuple[str, str]
    """A photo of train, and the same at JPEG quality 60 and 0.7 of its size, in train too."""
    original: tuple[str, str]
    """Two photos of train that look different, but whose originals had the same MD5, as the tables say."""
    survey: Path
    printed: str
    """What the survey printed."""


def add_photo(folder: Path, like: str, name: str, data: bytes, md5: str | None = None) -> None:
    """Add a photo `name`, given as <split>/<id>, with the boxes of another one, and its hash if none is given."""
    (source, source_id), (split, photo_id) = like.split("/"), name.split("/")
    (folder / split / f"{photo_id}.jpg").write_bytes(data)
    changed = {"Subset": split, **({"OriginalMD5": md5} if md5 else {})}
    for table, changes in (("annotations-bbox", {}), ("images-boxable-with-rotation", changed)):
        with (folder / f"{source}-{table}.csv").open(newline="") as file:
            rows = [{**row, "ImageID": photo_id, **changes} for row in csv.DictReader(file) if row["ImageID"] == source_id]
        with (folder / f"{split}-{table}.csv").open("a", newline="") as file:
            csv.DictWriter(file, list(rows[0]), lineterminator="\n").writerows(rows)


def jpeg(image: Image.Image, quality: int = 75) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.fixture(scope="module")
def world(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Eight chunks of 55 photos, surveyed by the real command; Ray's workers were started in another folder."""
    parent = tmp_path_factory.mktemp("twice")
    folder = parent / "photos"
    shutil.copytree(photos, folder)
    first, second, third = (f"train/{path.stem}" for path in sorted((folder / "train").glob("*.jpg"))[:3])
    add_photo(folder, first, "validation/copied", (folder / f"{first}.jpg").read_bytes(), "another upload")
    image = Image.open(folder / f"{second}.jpg")
    image = image.resize((round(image.width * 0.7), round(image.height * 0.7)), Image.Resampling.BICUBIC)
    add_photo(folder, second, "train/smaller", jpeg(image, 60), "another one")
    unlike = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).resize((200, 150))
    add_photo(folder, third, "train/original", jpeg(unlike))
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()) as printed:
        patched.setattr(duplicate_scan, "PHOTOS_PER_CHUNK", 7)
        patched.chdir(parent)
        assert call_survey(Path("photos"), Path("survey")) == 0
    pairs = (first, "validation/copied"), (second, "train/smaller"), (third, "train/original")
    yield World(folder, *pairs, parent / "survey", printed.getvalue())
    ray.shutdown()


def call_survey(folder: Path, out: Path, *options: str) -> int:
    """The command's main, in this process; its status."""
    arguments = ["survey.py", "--config", str(preset("tiny")), *options]
    where = ["--source.annotations", str(folder), "--source.photos", str(folder), "--source.survey", str(out)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [*arguments, *where])
        return survey.main()


def scan_here(folder: Path, out: Path, *options: str) -> None:
    """A survey of all chunks in this process."""
    settings = settings_of(folder, out, "--source.survey", str(out), *options)
    chunks = freeze_list(list_photos(open_source(settings)), settings.source, out)
    for number in range(len(chunks.sizes)):
        scan_chunk(chunks, number, settings.source)
    finish(chunks)


def rows_of(out: Path) -> dict[str, dict]:
    return {f"{row['split']}/{row['photo_id']}": row for batch in read_scan(out).read_photos() for row in batch.to_pylist()}


def pairs_of(out: Path) -> dict[frozenset[str], str]:
    """Pairs of the same photo, and how they were found."""
    return {
        frozenset({f"{row['split']}/{row['photo_id']}", f"{row['kept_split']}/{row['kept_photo_id']}"}): row["by"]
        for row in read_scan(out).same.to_pylist()
    }


def stamps(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((out / "parts").glob("*.parquet"))}


def test_the_same_photos_are_found_and_no_others_and_the_command_shows_them(world):
    by = {
        frozenset(world.copied): "sha256",
        frozenset(world.smaller): "perceptual_hash",
        frozenset(world.original): "original_md5",
    }
    assert pairs_of(world.survey) == by
    copied = next(row for row in read_scan(world.survey).same.to_pylist() if row["by"] == "sha256")
    assert (copied["kept_split"], copied["split"]) == ("validation", "train"), "the held-out one is kept"
    assert f"validation/copied is the same as {world.copied[0]} (sha256)" in world.printed
    assert "train/smaller" not in world.printed
    cells = [line.split("│") for line in world.printed.splitlines() if line.count("│") == 4]
    numbers = {row[1].strip(): row[3].strip() for row in cells}
    assert numbers["groups of the same photo, of which one is kept"] == "3"
    assert numbers["of these found by perceptual_hash"] == "1"
    assert numbers["of these in another split than the one kept"] == "1"
    with Image.open(world.survey / "same_photos.png") as sheet:
        assert sheet.height > 3 * 300, "a row for each pair"


def test_every_photo_has_its_row(world):
    assert pq.read_schema(world.survey / "photos.parquet").equals(SURVEY)
    assert read_scan(world.survey).same.schema.equals(SAME_PHOTOS)
    rows = rows_of(world.survey)
    files = {f"{path.parent.name}/{path.stem}": path for path in world.folder.glob("*/*.jpg")}
    assert list(rows) == sorted(files)
    for name, path in files.items():
        data = path.read_bytes()
        pixels = decode_photo(data, frame="stored")
        hashes = perceptual_hash(pixels)
        known = {"code": "ok", "detail": None, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        known |= {"height": pixels.shape[0], "width": pixels.shape[1]}
        known |= {"perceptual_hash": hashes.coarse, "detail_hash": hashes.detail}
        assert rows[name] == {"split": path.parent.name, "photo_id": path.stem, **known}


def test_a_bad_photo_costs_itself_alone_and_is_looked_at_again(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(duplicate_scan, "PHOTOS_PER_CHUNK", 7)
    broken, out = tmp_path / "photos", tmp_path / "survey"
    shutil.copytree(world.folder, broken)
    paths = sorted((broken / "validation").glob("*.jpg"))[:6]
    kept = [path.read_bytes() for path in paths]
    paths[0].unlink()
    for number, data in ((1, b"<html>404</html>"), (2, b"<html>404</html>"), (3, kept[3][:-200]), (5, kept[5][:-2])):
        paths[number].write_bytes(data)
    Image.new("RGB", (600, 600)).save(paths[4])
    options = ["--source.max_photo_pixels", "300000", "--source.missing_end_mark", "refuse"]
    scan_here(broken, out, *options)
    rows = rows_of(out)
    codes = {name: row["code"] for name, row in rows.items() if row["code"] != "ok"}
    expected = ["missing", "not_an_image", "not_an_image", "decode_error", "too_many_pixels", "no_end_mark"]
    assert codes == {f"validation/{path.stem}": code for path, code in zip(paths, expected, strict=True)}
    assert all(row["width"] is None and row["perceptual_hash"] is None for row in rows.values() if row["code"] != "ok")
    assert len(pairs_of(out)) == 3, "two error pages are not the same photo"
    survey.print_summary(out)
    assert "failed: not_an_image" in capsys.readouterr().out

    before = stamps(out)
    paths[0].write_bytes(kept[0])
    Image.new("RGB", (10, 10)).save(broken / "train" / "smaller.jpg")  # Of the same chunk, the last one of train.
    scan_here(broken, out, *options)
    assert rows_of(out)[f"validation/{paths[0].stem}"]["code"] == "ok"
    assert rows_of(out)["train/smaller"] == rows["train/smaller"], "a photo that was good was read again"
    after = stamps(out)
    assert sum(before[name] != after[name] for name in before) == 1, "only the part with the photo that came back is new"


def test_only_what_is_missing_is_done_again_to_the_same_tables(world, tmp_path, monkeypatch, capsys):
    """An error that is no photo's fails its chunk by name and leaves the survey unfinished; the next run goes on."""
    monkeypatch.setattr(duplicate_scan, "PHOTOS_PER_CHUNK", 7)
    folder, out = tmp_path / "photos", tmp_path / "survey"
    shutil.copytree(world.folder, folder)
    shutil.copytree(world.survey, out)
    tables = [(out / f"{name}.parquet").read_bytes() for name in ("photos", "same_photos")]
    parts = [out / "parts" / f"{number:06d}.parquet" for number in range(8)]
    parts[2].unlink()
    parts[2].mkdir()
    parts[3].write_bytes(parts[3].read_bytes()[:-10])
    foreign = pq.read_table(parts[6])
    identity = json.loads((out / "survey.json").read_text())["identity"].encode()
    notes = {name: text.replace(identity, identity[::-1]) for name, text in foreign.schema.metadata.items()}
    pq.write_table(foreign.replace_schema_metadata(notes), parts[6])
    missing = pq.ParquetFile(parts[4]).read(columns=["split", "photo_id"]).to_pylist()[0]
    shutil.copy(parts[5], parts[4])
    (out / "parts" / f".000001.parquet.{'0' * 32}.tmp").write_bytes(b"left by a dead attempt")
    photo = folder / missing["split"] / f"{missing['photo_id']}.jpg"
    photo.rename(tmp_path / photo.name)
    before = stamps(out)
    assert call_survey(folder, out, "--ray.attempts", "1") == 1
    said = capsys.readouterr().err
    assert "chunk 2 failed 1 time" in said
    assert "1 of 8 chunks failed" in said
    with pytest.raises(InputError, match="not finished"):
        read_scan(out)
    parts[2].rmdir()
    (tmp_path / photo.name).rename(photo)
    between = stamps(out)
    assert call_survey(folder, out) == 0
    assert [(out / f"{name}.parquet").read_bytes() for name in ("photos", "same_photos")] == tables
    after = stamps(out)
    assert {number for number in range(8) if before[parts[number].name] == after[parts[number].name]} == {0, 1, 5, 7}
    again = {number for number in range(8) if between.get(parts[number].name) != after[parts[number].name]}
    assert again == {2, 4}, "what failed, as a chunk or as a photo"
    assert not list((out / "parts").glob(".*"))


def test_another_list_or_way_in_the_same_folder_is_refused(world, photos, tmp_path):
    with pytest.raises(InputError, match=r"another photo list.*photos: 55 -> 52"):
        call_survey(photos, world.survey)
    with pytest.raises(InputError, match="max_photo_pixels: 100000000 -> 1000"):
        call_survey(world.folder, world.survey, "--source.max_photo_pixels", "1000")
    renamed = tmp_path / "renamed"
    shutil.copytree(world.folder, renamed)
    boxes = renamed / "train-annotations-bbox.csv"
    boxes.write_text(boxes.read_text().replace("smaller", "shorter"))
    with pytest.raises(InputError, match="photos_sha256"):
        call_survey(renamed, world.survey)


def test_without_a_folder_to_write_to_nothing_is_scanned(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["survey.py", "--source.annotations", str(tmp_path), "--source.photos", str(tmp_path)])
    with pytest.raises(InputError, match=r"build\.source\.survey is not set"):
        survey.main()


def test_photos_are_those_of_the_boxes_each_once(monkeypatch):
    """With what the tables know of them, in any order; broken rows and ids that lead out of the folder name no photo."""
    monkeypatch.setattr(photos_module, "_ROWS_HELD", 1)

    def source(boxes: list[dict], photos: list[dict]) -> Source:
        def batches(schema: pa.Schema, rows: list[dict]) -> Iterator[pa.RecordBatch]:
            return iter([pa.RecordBatch.from_pylist(rows[start : start + 2], schema) for start in range(0, len(rows), 2)])

        return Source("here", (), "stored", lambda: batches(BOXES, boxes), lambda: batches(PHOTOS, photos))

    ids = ["b", "a", "b", "b", "a", "../../etc/passwd", "", None]
    boxes = [{"split": "train", "photo_id": photo_id} for photo_id in ids]
    boxes += [{"split": "validation", "photo_id": "a"}, {"split": "train", "photo_id": "c", "problem": "bad_number"}]
    known = [
        {"split": "train", "photo_id": "a", "file_name": "x/ä.jpg"},
        {"split": "train", "photo_id": "a", "original_md5": "m"},
        {"split": "train", "photo_id": "without boxes", "original_md5": "n"},
        {"split": "validation", "photo_id": "b", "original_md5": "o"},
    ]
    nothing = {"file_name": None, "original_md5": None}
    expected = [
        {"split": "train", "photo_id": "a", "file_name": "x/ä.jpg", "original_md5": "m"},
        {"split": "train", "photo_id": "b", **nothing},
        {"split": "validation", "photo_id": "a", **nothing},
    ]
    assert list_photos(source(boxes, known)).to_pylist() == expected
    assert list_photos(source(boxes[::-1], known[::-1])).to_pylist() == expected
    with pytest.raises(InputError, match="here: no box can be read"):
        list_photos(source([], []))


def test_a_photo_is_found_by_its_name_and_measured_in_the_frame_of_its_boxes(tmp_path):
    """A photo that its EXIF turns by a quarter: upright for boxes drawn on what viewers show, lying for Open Images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "holiday").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "holiday" / "beach 1.jpg", exif=exif)
    listed = {"split": "train", "photo_id": "1", "file_name": "holiday/beach 1.jpg"}
    for kind, size in (({"kind": "boxes", "unit": "pixel"}, (20, 40)), ({"kind": "open_images"}, (40, 20))):
        row = scan_photo(listed, SourceSettings(**kind, annotations=tmp_path, photos=tmp_path))
        assert (row["code"], row["width"], row["height"], row["perceptual_hash"]) == ("ok", *size, None)


def test_a_selection_drops_what_the_survey_found_and_knows_how_large_photos_are(world, tmp_path):
    out = tmp_path / "out"
    settings = settings_of(world.folder, out, "--source.survey", str(world.survey), "--selection.min_area", "0")
    selection = select_objects(settings, out)
    assert selection.same_photos == {"original_md5": 1, "sha256": 1, "perceptual_hash": 1, "across_splits": 1}
    objects, rejects = (pq.read_table(out / f"{name}.parquet").to_pylist() for name in ("objects", "rejects"))
    dropped = {f"{row['split']}/{row['photo_id']}" for row in read_scan(world.survey).same.to_pylist()}
    assert len(dropped) == 3
    assert dropped == {f"{row['split']}/{row['photo_id']}" for row in rejects if row["reason"] == "same_photo"}
    assert dropped.isdisjoint({f"{row['split']}/{row['photo_id']}" for row in objects})
    sizes = {name: (row["width"], row["height"]) for name, row in rows_of(world.survey).items()}
    assert all((row["width"], row["height"]) == sizes[f"{row['split']}/{row['photo_id']}"] for row in objects)


def test_a_survey_that_does_not_know_a_photo_is_refused(world, tmp_path):
    """It is older than the photo, which may be the twin of one that it knows; or it is of other annotations."""
    folder = tmp_path / "photos"
    shutil.copytree(world.folder, folder)
    add_photo(folder, world.copied[0], "train/later", b"", "new")
    settings = settings_of(folder, tmp_path / "out", "--source.survey", str(world.survey))
    with pytest.raises(InputError, match=r"does not know photo later of train.*run pipelines/survey\.py again"):
        select_objects(settings, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
