"""The survey, by its command and on a real Ray: what it finds, what a bad photo costs, and how it goes on."""

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
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
from pbe_core.settings import REPOSITORY
from pipelines import photos as photos_module
from pipelines import survey
from pipelines.annotations.source import Source
from pipelines.config import SourceSettings
from pipelines.selection import duplicate_scan
from pipelines.selection.duplicate_scan import list_photos, scan_photo
from pipelines.selection.duplicates import perceptual_hash, read_scan
from pipelines.selection.objects import select_objects
from schemas.tables import BOXES, PHOTOS, SAME_PHOTOS, SURVEY
from tests.conftest import settings_of


@dataclass(frozen=True)
class World:
    """The tiny world with three photos added that are there already."""

    folder: Path
    copied: tuple[str, str]
    """A photo of train, and the same file in validation."""
    smaller: tuple[str, str]
    """A photo of train, and the same at JPEG quality 60 and 0.7 of its size, in train too."""
    original: tuple[str, str]
    """Two photos of train that look different, but whose originals had the same MD5, as the tables say."""


def add_photo(folder: Path, like: str, name: str, data: bytes, md5: str) -> None:
    """Add a photo `name`, given as <split>/<id>, with the boxes of another one."""
    (source, source_id), (split, photo_id) = like.split("/"), name.split("/")
    (folder / split / f"{photo_id}.jpg").write_bytes(data)
    for table, changes in (("annotations-bbox", {}), ("images-boxable-with-rotation", {"Subset": split, "OriginalMD5": md5})):
        with (folder / f"{source}-{table}.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["ImageID"] == source_id]
        with (folder / f"{split}-{table}.csv").open("a", newline="") as file:
            csv.DictWriter(file, list(rows[0]), lineterminator="\n").writerows(
                {**row, "ImageID": photo_id, **changes} for row in rows
            )


def md5_of(folder: Path, name: str) -> str:
    split, photo_id = name.split("/")
    with (folder / f"{split}-images-boxable-with-rotation.csv").open(newline="") as file:
        return next(row["OriginalMD5"] for row in csv.DictReader(file) if row["ImageID"] == photo_id)


@pytest.fixture(scope="module")
def world(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("twice") / "photos"
    shutil.copytree(photos, folder)
    first, second, third = (f"train/{path.stem}" for path in sorted((folder / "train").glob("*.jpg"))[:3])
    data = (folder / f"{first}.jpg").read_bytes()
    add_photo(folder, first, "validation/copied", data, "another upload")
    image = Image.open(folder / f"{second}.jpg")
    image = image.resize((round(image.width * 0.7), round(image.height * 0.7)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    add_photo(folder, second, "train/smaller", file.getvalue(), "another one")
    unlike = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).resize((200, 150)).save(unlike, "JPEG")
    add_photo(folder, third, "train/original", unlike.getvalue(), md5_of(folder, third))
    return World(folder, (first, "validation/copied"), (second, "train/smaller"), (third, "train/original"))


def run_survey(*options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python pipelines/survey.py` with the tiny preset, as a user starts it."""
    command = [sys.executable, "pipelines/survey.py", "--config", "configs/tiny.yaml", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def options_of(folder: Path, out: Path) -> list[str]:
    return ["--source.annotations", str(folder), "--source.photos", str(folder), "--source.survey", str(out)]


@pytest.fixture(scope="module")
def surveyed(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The survey that the real command makes, and what it prints."""
    out = tmp_path_factory.mktemp("surveyed") / "survey"
    return out, run_survey(*options_of(world.folder, out)).stdout


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray for surveys in this process."""
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def small_chunks(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine chunks of the 55 photos."""
    monkeypatch.setattr(duplicate_scan, "PHOTOS_PER_CHUNK", 7)


def call_survey(folder: Path, out: Path, *options: str) -> int:
    """The command's main, in this process."""
    arguments = ["survey.py", "--config", str(REPOSITORY / "configs" / "tiny.yaml"), *options_of(folder, out), *options]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", arguments)
        return survey.main()


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


def test_the_same_photos_are_found_and_no_others(world, surveyed):
    out, _ = surveyed
    assert pairs_of(out) == {
        frozenset(world.copied): "sha256",
        frozenset(world.smaller): "perceptual_hash",
        frozenset(world.original): "original_md5",
    }
    copied = next(row for row in read_scan(out).same.to_pylist() if row["by"] == "sha256")
    assert (copied["kept_split"], copied["split"]) == ("validation", "train"), "the held-out one is kept"


def test_every_photo_has_its_row(world, surveyed):
    out, _ = surveyed
    assert pq.read_schema(out / "photos.parquet").equals(SURVEY)
    assert read_scan(out).same.schema.equals(SAME_PHOTOS)
    rows = rows_of(out)
    files = {f"{path.parent.name}/{path.stem}": path for path in world.folder.glob("*/*.jpg")}
    assert list(rows) == sorted(files)
    for name, path in files.items():
        data = path.read_bytes()
        pixels = decode_photo(data, frame="stored")
        hashes = perceptual_hash(pixels)
        assert rows[name] == {
            "split": path.parent.name,
            "photo_id": path.stem,
            "code": "ok",
            "detail": None,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "perceptual_hash": hashes.coarse,
            "detail_hash": hashes.detail,
        }


def test_the_command_shows_what_it_found(world, surveyed):
    """Numbers, the pair that lies across splits, and a picture in which each row shows two photos that look alike."""
    out, printed = surveyed
    assert f"validation/copied is the same as {world.copied[0]} (sha256)" in printed
    assert "train/smaller" not in printed
    numbers = {line.split("│")[1].strip(): line.split("│")[3].strip() for line in printed.splitlines() if line.count("│") == 4}
    assert numbers["groups of the same photo, of which one is kept"] == "3"
    assert numbers["of these found by perceptual_hash"] == "1"
    assert numbers["of these in another split than the one kept"] == "1"
    assert str(out / "same_photos.png") in printed
    with Image.open(out / "same_photos.png") as sheet:
        assert sheet.height > 3 * 300, "a row for each pair"


def test_a_bad_photo_costs_itself_alone_and_is_looked_at_again(world, tmp_path, capsys, small_chunks):
    broken = tmp_path / "photos"
    shutil.copytree(world.folder, broken)
    paths = sorted((broken / "validation").glob("*.jpg"))[:6]
    kept = [path.read_bytes() for path in paths]
    paths[0].unlink()
    paths[1].write_bytes(b"<html>404</html>")
    paths[2].write_bytes(b"<html>404</html>")
    paths[3].write_bytes(kept[3][:-200])
    Image.new("RGB", (600, 600)).save(paths[4])
    paths[5].write_bytes(kept[5][:-2])
    options = ["--source.max_photo_pixels", "300000", "--source.missing_end_mark", "refuse"]
    out = tmp_path / "survey"
    assert call_survey(broken, out, *options) == 0
    rows = rows_of(out)
    codes = {name: row["code"] for name, row in rows.items() if row["code"] != "ok"}
    expected = ["missing", "not_an_image", "not_an_image", "decode_error", "too_many_pixels", "no_end_mark"]
    assert codes == {f"validation/{path.stem}": code for path, code in zip(paths, expected, strict=True)}
    assert all(row["width"] is None and row["perceptual_hash"] is None for row in rows.values() if row["code"] != "ok")
    assert "failed: not_an_image" in capsys.readouterr().out
    assert len(pairs_of(out)) == 3, "two error pages are not the same photo"

    before = stamps(out)
    paths[0].write_bytes(kept[0])
    Image.new("RGB", (10, 10)).save(broken / "train" / "smaller.jpg")  # Of the same chunk, the last one of train.
    assert call_survey(broken, out, *options) == 0
    assert rows_of(out)[f"validation/{paths[0].stem}"]["code"] == "ok"
    assert rows_of(out)["train/smaller"] == rows["train/smaller"], "a photo that was good was read again"
    after = stamps(out)
    assert sum(before[name] != after[name] for name in before) == 1, "only the part with the photo that came back is new"


def test_only_what_is_missing_is_done_again_to_the_same_tables(world, surveyed, tmp_path, small_chunks):
    out = tmp_path / "survey"
    assert call_survey(world.folder, out) == 0
    tables = [(out / f"{name}.parquet").read_bytes() for name in ("photos", "same_photos")]
    assert len(stamps(out)) == 8
    assert rows_of(out) == rows_of(surveyed[0]), "the chunks do not matter"
    (out / "parts" / "000002.parquet").unlink()
    (out / "parts" / "000003.parquet").write_bytes((out / "parts" / "000003.parquet").read_bytes()[:-10])
    shutil.copy(out / "parts" / "000005.parquet", out / "parts" / "000004.parquet")
    foreign = pq.read_table(out / "parts" / "000006.parquet")
    identity = json.loads((out / "survey.json").read_text())["identity"].encode()
    notes = {name: text.replace(identity, identity[::-1]) for name, text in foreign.schema.metadata.items()}
    foreign = foreign.replace_schema_metadata(notes)
    pq.write_table(foreign, out / "parts" / "000006.parquet")
    (out / "parts" / f".000001.parquet.{'0' * 32}.tmp").write_bytes(b"left by a dead attempt")
    before = stamps(out)
    assert call_survey(world.folder, out) == 0
    assert [(out / f"{name}.parquet").read_bytes() for name in ("photos", "same_photos")] == tables
    after = stamps(out)
    assert {name for name in before if after[name] == before[name]} == {f"{number:06d}.parquet" for number in (0, 1, 5, 7)}
    assert not list((out / "parts").glob(".*"))


def test_a_survey_is_unfinished_while_a_part_is_made_again(world, tmp_path, monkeypatch, capsys, small_chunks):
    """And an unexpected error fails its chunk by name, the status says so, and the other parts stay."""
    out = tmp_path / "survey"
    assert call_survey(world.folder, out) == 0
    (out / "parts" / "000002.parquet").unlink()
    shutil.move(out / "photo_list.parquet", tmp_path / "photo_list.parquet")
    assert call_survey(world.folder, out, "--ray.attempts", "2") == 1
    said = capsys.readouterr().err
    assert "chunk 2 failed 2 times" in said
    assert "photo_list.parquet" in said
    assert "1 of 8 chunks failed" in said
    with pytest.raises(InputError, match="not finished"):
        read_scan(out)
    shutil.move(tmp_path / "photo_list.parquet", out / "photo_list.parquet")
    assert call_survey(world.folder, out) == 0
    assert len(pairs_of(out)) == 3


def test_another_list_or_way_in_the_same_folder_is_refused(world, photos, surveyed, tmp_path):
    out = tmp_path / "survey"
    shutil.copytree(surveyed[0], out)
    with pytest.raises(InputError, match="another photo list") as caught:
        call_survey(photos, out)
    assert "photos: 55 -> 52" in str(caught.value)
    assert str(out) in str(caught.value)
    with pytest.raises(InputError, match="max_photo_pixels: 100000000 -> 1000"):
        call_survey(world.folder, out, "--source.max_photo_pixels", "1000")
    renamed = tmp_path / "renamed"
    shutil.copytree(world.folder, renamed)
    boxes = renamed / "train-annotations-bbox.csv"
    boxes.write_text(boxes.read_text().replace("smaller", "shorter"))
    with pytest.raises(InputError, match="photos_sha256"):
        call_survey(renamed, out)
    assert len(pairs_of(out)) == 3


def test_relative_folders_are_those_of_the_command(world, tmp_path, monkeypatch, small_chunks):
    """Ray's workers were started in another folder."""
    monkeypatch.chdir(world.folder.parent)
    assert call_survey(Path(world.folder.name), Path(os.path.relpath(tmp_path / "survey"))) == 0
    assert {row["code"] for row in rows_of(tmp_path / "survey").values()} == {"ok"}


def test_without_a_folder_to_write_to_nothing_is_scanned(world):
    done = run_survey("--source.annotations", str(world.folder), "--source.photos", str(world.folder), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: build.source.survey is not set")


def test_photos_are_those_of_the_boxes_each_once(monkeypatch):
    """With what the tables know of them, in any order; broken rows and ids that lead out of the folder name no photo."""
    monkeypatch.setattr(photos_module, "_ROWS_HELD", 1)

    def batches(schema: pa.Schema, rows: list[dict], size: int = 2) -> list[pa.RecordBatch]:
        return [pa.RecordBatch.from_pylist(rows[start : start + size], schema) for start in range(0, len(rows), size)]

    ids = ["b", "a", "b", "b", "a", "../../etc/passwd", "", None]
    boxes = [{"split": "train", "photo_id": photo_id} for photo_id in ids]
    boxes += [{"split": "validation", "photo_id": "a"}, {"split": "train", "photo_id": "c", "problem": "bad_number"}]
    known = [
        {"split": "train", "photo_id": "a", "file_name": "x/ä.jpg"},
        {"split": "train", "photo_id": "a", "original_md5": "m"},
        {"split": "train", "photo_id": "without boxes", "original_md5": "n"},
        {"split": "validation", "photo_id": "b", "original_md5": "o"},
    ]
    expected = [
        {"split": "train", "photo_id": "a", "file_name": "x/ä.jpg", "original_md5": "m"},
        {"split": "train", "photo_id": "b", "file_name": None, "original_md5": None},
        {"split": "validation", "photo_id": "a", "file_name": None, "original_md5": None},
    ]
    for order in (1, -1):
        source = Source(
            name="here",
            files=(),
            frame="stored",
            read_boxes=lambda order=order: iter(batches(BOXES, boxes[::order])),
            read_photos=lambda order=order: iter(batches(PHOTOS, known[::order])),
        )
        assert list_photos(source).to_pylist() == expected
    nothing = Source(name="here", files=(), frame="stored", read_boxes=lambda: iter([]), read_photos=lambda: iter([]))
    with pytest.raises(InputError, match="here: no box can be read"):
        list_photos(nothing)


def test_a_photo_is_found_by_its_name_and_measured_in_the_frame_of_its_boxes(tmp_path):
    """A photo that its EXIF turns by a quarter: upright for boxes drawn on what viewers show, lying for Open Images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "holiday").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "holiday" / "beach 1.jpg", exif=exif)
    listed = {"split": "train", "photo_id": "1", "file_name": "holiday/beach 1.jpg"}
    folders = {"annotations": tmp_path, "photos": tmp_path}
    own = scan_photo(listed, SourceSettings(kind="boxes", unit="pixel", **folders))
    assert (own["code"], own["width"], own["height"], own["perceptual_hash"]) == ("ok", 20, 40, None)
    stored = scan_photo(listed, SourceSettings(kind="open_images", **folders))
    assert (stored["width"], stored["height"]) == (40, 20)


def test_a_selection_drops_what_the_survey_found_and_knows_how_large_photos_are(world, surveyed, tmp_path):
    settings = settings_of(world.folder, tmp_path / "out", "--source.survey", str(surveyed[0]), "--selection.min_area", "0")
    selection = select_objects(settings, tmp_path / "out")
    assert selection.same_photos == {"original_md5": 1, "sha256": 1, "perceptual_hash": 1, "across_splits": 1}
    objects = pq.read_table(tmp_path / "out" / "objects.parquet").to_pylist()
    left = {f"{row['split']}/{row['photo_id']}" for row in objects}
    dropped = {f"{row['split']}/{row['photo_id']}" for row in read_scan(surveyed[0]).same.to_pylist()}
    assert len(dropped) == 3
    assert left.isdisjoint(dropped)
    rejected = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert dropped == {f"{row['split']}/{row['photo_id']}" for row in rejected if row["reason"] == "same_photo"}
    sizes = {name: (row["width"], row["height"]) for name, row in rows_of(surveyed[0]).items()}
    assert all((row["width"], row["height"]) == sizes[f"{row['split']}/{row['photo_id']}"] for row in objects)


def test_a_survey_that_does_not_know_a_photo_is_refused(world, surveyed, tmp_path):
    """It is older than the photo, which may be the twin of one that it knows; or it is of other annotations."""
    folder = tmp_path / "photos"
    shutil.copytree(world.folder, folder)
    add_photo(folder, world.copied[0], "train/later", b"", "new")
    settings = settings_of(folder, tmp_path / "out", "--source.survey", str(surveyed[0]))
    with pytest.raises(InputError, match=r"does not know photo later of train.*run pipelines/survey\.py again"):
        select_objects(settings, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
