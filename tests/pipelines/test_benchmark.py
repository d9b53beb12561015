"""Pair sets: which pairs, from which photos, what is written, and that it is the same whatever happens on the way."""

import csv
import json
import pickle
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pbe_core.images.crop import Rectangle
from pbe_core.randomness import hash_column
from pbe_core.settings import REPOSITORY, load_settings
from pipelines import benchmark
from pipelines.pairing.cut import cut_object, open_object, square_around
from pipelines.pairing.draw import draw
from pipelines.pairing.settings import BenchmarkSettings
from pipelines.selection.objects import select_objects
from tests.coco_files import annotation, image, write
from tests.conftest import Done, call_program

BROKEN = "cat-7"
FAILED = ("decode_error", "no_reference")
Row = dict[str, str]


def texture(name: str, width: int = 160, height: int = 120) -> np.ndarray:
    """A picture of blobs, another one for each name."""
    random = np.random.default_rng(list(name.encode()))
    blobs = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """8 photos of cats, one of them broken and one with a dog, 6 of dogs, the only bird, and a twin saved twice."""
    folder = tmp_path_factory.mktemp("world")
    rows = []
    names = [*(f"cat-{n}" for n in range(8)), *(f"dog-{n}" for n in range(6)), "bird-0", "twin-0", "twin-1"]
    for number, name in enumerate(names):
        label, wide = name.partition("-")[0], name == "dog-5"
        picture = texture("twin" if label == "twin" else name, 400 if wide else 160)
        Image.fromarray(picture).save(folder / f"{name}.jpg", quality=70 if name == "twin-1" else 95)
        box = (20, 30, 380, 90) if wide else (10 + number, 20, 80 + number, 90)
        rows.append((f"{name}.jpg", *box, label, picture.shape[1], 120))
    rows += [("cat-0.jpg", 90, 10, 150, 110, "dog", 160, 120), ("cat-1.jpg", 1, 1, 5, 5, "cat", 160, 120)]
    (folder / f"{BROKEN}.jpg").write_bytes((folder / f"{BROKEN}.jpg").read_bytes()[:300])
    with (folder / "boxes.csv").open("w") as file:
        csv.writer(file).writerows([("photo", "x_min", "y_min", "x_max", "y_max", "label", "width", "height"), *rows])
    return folder


def options(world: Path, out: Path, *more: str) -> list[str]:
    source = ["--source.kind", "boxes", "--source.unit", "pixel", "--source.annotations", str(world / "boxes.csv")]
    split = ["--source.photos", str(world), "--source.validation_share", "0", "--benchmark.split", "train"]
    own = ["--benchmark.out", str(out), "--benchmark.size", "96"]
    return ["--config", "none", *source, *split, *own, *(more or ("--benchmark.reference", "random"))]


def run(*arguments: str, check: bool = True) -> Done:
    done = call_program(benchmark.main, *arguments)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table_of(folder: Path) -> list[Row]:
    with (folder / "pairs.csv").open() as file:
        return list(csv.DictReader(file))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "benchmark.json").read_text())


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def made(world, tmp_path_factory) -> Path:
    """The set of all pairs, references at random."""
    out = tmp_path_factory.mktemp("made") / "set"
    run(*options(world, out))
    return out


def test_every_box_is_a_pair_or_left_out_by_a_reason(made):
    record = record_of(made)
    # Of cats the broken photo; cat-0 gives its cat or its dog.
    expected = {"too_small": 1, "only_photo_of_class": 1, "another_of_photo": 1, "decode_error": 1, "no_reference": 2}
    assert record["books"]["left_out"] == expected
    assert record["books"]["boxes"] == 19 == record["pairs"] + sum(expected.values())
    assert sum(record["classes"].values()) == record["pairs"] == 13
    assert any("3,500 pairs wanted" in note for note in record["notes"])


def test_the_layout_is_that_of_cocoee(made):
    ids = np.load(made / "id_list.npy", allow_pickle=False)
    assert ids.dtype == np.int64
    assert ids.tolist() == list(range(1, 14))
    names = [f"{number:012d}" for number in ids]
    for folder, ending in (("GT", "GT"), ("Mask_bbox", "mask"), ("Ref", "ref")):
        assert sorted(path.name for path in (made / f"{folder}_13").iterdir()) == [f"{name}_{ending}.png" for name in names]
    rows = table_of(made)
    assert [row["id"] for row in rows] == names
    assert all((made / row[column]).is_file() for row in rows for column in ("photo", "mask", "reference"))
    assert len({row["photo_id"] for row in rows}) == len(rows)  # One box a photo.
    assert sorted(path.name for path in made.iterdir() if path.is_file()) == [
        *("benchmark.json", "contact_sheet.png", "id_list.npy", "pairs.csv")
    ]


def test_photo_mask_and_reference_are_cut_as_said(made, world):
    uncut = 0
    for row in table_of(made):
        photo, mask, reference = (picture(made / row[name]) for name in ("photo", "mask", "reference"))
        assert photo.shape == (96, 96, 3)
        assert mask.shape == (96, 96)
        x_min, y_min, x_max, y_max = (int(row[name]) for name in ("x_min", "y_min", "x_max", "y_max"))
        expected = np.zeros((96, 96), np.uint8)
        expected[y_min:y_max, x_min:x_max] = 255
        assert np.array_equal(mask, expected)
        original = picture(world / f"{row['photo_id']}.jpg")
        # Boxes of photos of 160 x 120 px lie in their middle square; that of the wide photo is longer than its square.
        wide = row["photo_id"] == "dog-5"
        assert row["whole_box"] == ("0" if wide else "1")
        left = 140 if wide else min(int(original.shape[1] - 120) // 2, box_of(world, row["photo_id"], row["label"])[0])
        square = np.asarray(Image.fromarray(original[:, left : left + 120]).resize((96, 96), Image.Resampling.BICUBIC))
        assert np.abs(square.astype(int) - photo).max() <= 1
        if wide:
            assert (x_min, x_max) == (0, 96)
        other = picture(world / f"{row['reference_photo_id']}.jpg")
        left, top, right, bottom = box_of(world, row["reference_photo_id"], row["label"])
        crop = other[max(top - 10, 0) : bottom + 10, max(left - 10, 0) : right + 10]
        if max(crop.shape) <= 96:
            assert np.array_equal(reference, crop)
            uncut += 1
        else:
            assert max(reference.shape) == 96
        assert row["reference_photo_id"] not in (row["photo_id"], BROKEN)
    assert uncut > 5


def box_of(world: Path, photo_id: str, label: str) -> tuple[int, ...]:
    """The first box of a class in a photo: x_min, y_min, x_max, y_max in px."""
    with (world / "boxes.csv").open() as file:
        box = next(box for box in csv.DictReader(file) if (box["photo"], box["label"]) == (f"{photo_id}.jpg", label))
    return tuple(int(box[name]) for name in ("x_min", "y_min", "x_max", "y_max"))


@pytest.mark.parametrize("judged", [False, True])
def test_the_bytes_do_not_depend_on_the_threads(made, world, tmp_path, monkeypatch, judged):
    choice = []
    if judged:
        monkeypatch.setattr(benchmark, "_load_judge", lambda settings: ColourJudge())
        choice = ["--benchmark.judge", "stand-in=colours"]
    for threads in ("1", "5"):
        wanted = choice or ["--benchmark.reference", "random"]
        run(*options(world, tmp_path / threads, *wanted, "--benchmark.threads", threads))
    assert contents(tmp_path / "1") == contents(tmp_path / "5")
    if not judged:
        assert contents(tmp_path / "1") == contents(made)


def test_a_larger_set_holds_a_smaller_one(made, world, tmp_path):
    run(*options(world, tmp_path / "set", "--benchmark.reference", "random", "--benchmark.count", "4"))
    small, large = table_of(tmp_path / "set"), table_of(made)[:4]
    changed = ("photo", "mask", "reference")  # The folders are named by the number of pairs.
    assert [{**row, **dict.fromkeys(changed)} for row in small] == [{**row, **dict.fromkeys(changed)} for row in large]
    for row, same in zip(small, large, strict=True):
        assert all((tmp_path / "set" / row[name]).read_bytes() == (made / same[name]).read_bytes() for name in changed)
    record = record_of(tmp_path / "set")
    assert record["books"]["left_out"]["not_needed"] == 16 - 4 - sum(record["books"]["left_out"].get(code, 0) for code in FAILED)


class ColourJudge:
    """Knows pictures by their mean colour, about the mean of all."""

    identity = SimpleNamespace(kind="stand-in", sha256="0" * 64, preparation="none", model_dump=lambda mode: {"kind": "stand-in"})

    def features(self, pictures):
        return np.stack([picture.mean(axis=(0, 1)) - 127 for picture in pictures]).astype(np.float32)


def test_the_nearest_reference_is_that_of_the_largest_cosine(world, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "_load_judge", lambda settings: ColourJudge())
    arguments = options(world, tmp_path / "set", "--benchmark.judge", "stand-in=colours")
    run(*arguments)
    settings = load_settings(BenchmarkSettings, "build", arguments)
    select_objects(settings, tmp_path)
    pools = draw(tmp_path / "objects.parquet", settings.seed, 50).pools
    found = {}
    for row in [row for rows in pools.values() for row in rows if row["photo_id"] != BROKEN]:
        crop = cut_object(open_object(row, settings), 10, 96)
        features = crop.mean(axis=(0, 1)).astype(np.float32) - 127
        found[row["object_id"]] = features / np.linalg.norm(features)
    rows = table_of(tmp_path / "set")
    for row in rows:
        others = [one["object_id"] for one in pools[row["label_id"]] if one["photo_id"] not in (row["photo_id"], BROKEN)]
        target = found.get(row["object_id"])
        if target is None:  # Of several boxes of a class in a photo the pool has another one.
            continue
        cosines = {name: float(found[name] @ target) for name in others}
        assert float(row["similarity"]) == pytest.approx(max(cosines.values()), abs=1e-5)
        assert cosines[row["reference_object_id"]] == pytest.approx(max(cosines.values()), abs=1e-6)
    record = record_of(tmp_path / "set")
    assert record["books"]["left_out"]["no_reference"] == 2  # A twin is the nearest to a twin, and the same photo.
    assert record["judge"] == {"kind": "stand-in"}
    assert len({row["reference_object_id"] for row in rows}) < len(rows)


def test_the_draw_is_the_same_however_much_is_read_at_once(world, tmp_path):
    """Photos in the order of their hashes, and of each class at most so many candidates."""
    settings = load_settings(BenchmarkSettings, "build", options(world, tmp_path / "set"))
    select_objects(settings, tmp_path)
    drawn = draw(tmp_path / "objects.parquet", settings.seed, 50)
    whole, parts = ([row["object_id"] for rows in drawn.read_targets(n) for row in rows] for n in (100, 3))
    assert len(whole) == len(set(whole)) == 16
    assert whole == parts
    hashes = hash_column(pa.array([name.rpartition("-")[0] for name in whole]), settings.seed, "benchmark photo")
    assert hashes.tolist() == sorted(hashes.tolist())
    assert {label: len(rows) for label, rows in drawn.pools.items()} == {"cat": 8, "dog": 7, "bird": 1, "twin": 2}
    fewer = draw(tmp_path / "objects.parquet", settings.seed, 3).pools
    assert {label: rows[:3] for label, rows in drawn.pools.items()} == fewer
    for rows in drawn.pools.values():
        assert len({row["photo_id"] for row in rows}) == len(rows)


@given(st.integers(16, 400), st.integers(16, 400), st.data())
def test_a_square_holds_the_box_and_leaves_the_middle_only_for_it(width, height, data):
    left, right = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    window = square_around(Rectangle(left, top, right, bottom), width, height)
    side = min(width, height)
    assert window.side == side
    for start, low, high, length in ((window.left, left, right, width), (window.top, top, bottom, height)):
        assert 0 <= start <= length - side
        middle = (length - side) // 2
        if high - low <= side:
            assert start <= low
            assert high <= start + side
            # One px nearer to the middle, and the box is cut.
            nearer = start + np.sign(middle - start)
            assert start == middle or nearer > low or nearer + side < high
        else:
            assert start == min(max((low + high - side) // 2, 0), length - side)


KILLED = """
import os, signal, sys
from pipelines import benchmark
from pipelines.pairing.write_set import SetWriter
moment, add, calls = sys.argv.pop(1), SetWriter.add, []
def dies(*anything):
    os.kill(os.getpid(), signal.SIGKILL)
def add_or_die(self, number, pair):
    calls.append(number)
    add(self, number, pair) if len(calls) < 4 else dies()
if moment == "pairing":
    SetWriter.add = add_or_die
else:
    benchmark._give_name = dies
benchmark.main()
"""


def test_killed_it_leaves_no_set_and_run_again_the_same_bytes(made, world, tmp_path):
    out = tmp_path / "set"
    for moment in ("pairing", "naming"):
        command = [sys.executable, "-c", KILLED, moment, *options(world, out)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not out.exists()
        assert len(list(tmp_path.iterdir())) == 1  # What the first one left, the second one took away.
    out.mkdir()  # An empty folder is as good as none.
    run(*options(world, out))
    assert contents(out) == contents(made)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_finished_set_stays_and_others_are_refused(made, world, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    again = run(*options(world, made))
    assert "13 pairs of 2 classes" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before

    other = run(*options(world, made, "--benchmark.reference", "random", "--seed", "7"), check=False)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "settings.seed: 0 -> 7" in other.stderr

    (tmp_path / "mine").write_text("mine")
    foreign = run(*options(world, tmp_path), check=False)
    assert foreign.returncode == 2
    assert "no benchmark.json" in foreign.stderr


def test_a_set_that_was_changed_is_not_taken_for_whole(world, tmp_path):
    out = tmp_path / "set"
    run(*options(world, out))
    (out / "results").mkdir()  # Others' files beside it do no harm.
    run(*options(world, out))
    mask = out / table_of(out)[0]["mask"]
    mask.write_bytes(mask.read_bytes()[:-1])
    done = run(*options(world, out), check=False)
    assert done.returncode == 2
    assert "not those that were written" in done.stderr


def test_a_quota_of_area_is_asked_of_the_square(made, world, tmp_path):
    """A model sees the square: half of a photo may be all of it."""
    out = tmp_path / "set"
    largest = max(int(row["x_max"]) - int(row["x_min"]) for row in table_of(made) if row["photo_id"] != "dog-5")
    share = 0.45
    assert (96 * 48) / 96**2 > share > largest * 60 / 96**2  # The wide photo's box is 60 of 120 px high, all its square wide.
    run(*options(world, out, "--benchmark.reference", "random", "--selection.max_area", str(share)))
    assert record_of(out)["books"]["left_out"]["too_large_in_square"] == 1
    assert "dog-5" not in {row["photo_id"] for row in table_of(out)}


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """Five photos of cars, one of a bus; annotations with ids of their own, two of them of the first photo."""
    folder = tmp_path_factory.mktemp("coco")
    images = [image(n, width=160, height=120, coco_url=f"http://x.org/{n}.jpg", license=1) for n in range(1, 7)]
    for entry in images:
        Image.fromarray(texture(entry["file_name"])).save(folder / entry["file_name"])
    boxes = [annotation(1000 + n, image_id=n, bbox=[30, 20 + n, 60, 50], category_id=3 if n < 6 else 6) for n in range(1, 7)]
    boxes.append(annotation(900_000_000_001, image_id=1, bbox=[80, 10, 60, 90]))
    write(folder / "instances.json", boxes, images, licenses=[{"id": 1, "url": "http://licence"}])
    return folder


def coco_options(coco: Path, out: Path, *more: str) -> list[str]:
    source = ["--source.kind", "coco", "--source.annotations", str(coco / "instances.json"), "--source.photos", str(coco)]
    own = ["--benchmark.out", str(out), "--benchmark.reference", "random", "--benchmark.size", "120"]
    return ["--config", "none", *source, *own, *(more or ("--benchmark.split", "all"))]


def test_pairs_of_coco_are_named_by_annotation_ids(coco, tmp_path):
    run(*coco_options(coco, tmp_path / "set"))
    rows = table_of(tmp_path / "set")
    assert {row["photo_id"] for row in rows} == {"1", "2", "3", "4", "5"}
    for row in rows:
        top = 20 + int(row["photo_id"])
        if int(row["id"]) == 900_000_000_001:
            assert (row["photo_id"], row["y_min"], row["y_max"]) == ("1", "10", "100")
        else:
            assert int(row["id"]) == 1000 + int(row["photo_id"])
            assert (row["x_min"], row["y_min"], row["x_max"], row["y_max"]) == ("10", str(top), "70", str(top + 50))
        assert (row["url"], row["licence"]) == (f"http://x.org/{row['photo_id']}.jpg", "http://licence")
        assert row["reference_url"] == f"http://x.org/{row['reference_photo_id']}.jpg"
    assert np.load(tmp_path / "set" / "id_list.npy").tolist() == [int(row["id"]) for row in rows]


def test_ids_that_are_no_names_give_way_to_numbers(coco, tmp_path):
    document = json.loads((coco / "instances.json").read_text())
    document["annotations"][0]["id"] = document["annotations"][1]["id"]
    (tmp_path / "repeated.json").write_text(json.dumps(document))
    run(
        *coco_options(coco, tmp_path / "set", "--benchmark.split", "all", "--source.annotations", str(tmp_path / "repeated.json"))
    )
    assert np.load(tmp_path / "set" / "id_list.npy").tolist() == [1, 2, 3, 4, 5]
    assert any("numbered from 1" in note for note in record_of(tmp_path / "set")["notes"])


def test_given_annotation_ids_are_the_set_in_their_order_whatever_the_rules(coco, tmp_path):
    np.save(tmp_path / "ids.npy", [1003, 900_000_000_001, 77, 1006, 1001])
    done = run(*coco_options(coco, tmp_path / "set", "--benchmark.ids", str(tmp_path / "ids.npy"), "--selection.max_area", "0.2"))
    record, rows = record_of(tmp_path / "set"), table_of(tmp_path / "set")
    # 900000000001 is too large a box for the rules, and of the same photo as 1001.
    assert [int(row["id"]) for row in rows] == [1003, 900_000_000_001, 1001]
    assert record["books"] == {"boxes": 5, "left_out": {"no_reference": 1, "no_such_annotation": 1}}
    said = " ".join(done.stdout.split())
    for text in ("no_such_annotation: 77", "no_reference: 1006", "references are not COCOEE's"):
        assert text in said
        assert any(text in note for note in record["notes"])
    assert (rows[1]["y_min"], rows[1]["y_max"]) == ("10", "100")
    assert all(row["reference_photo_id"] != row["photo_id"] and row["label"] == "car" for row in rows)
    whole = contents(tmp_path / "set")
    run(*coco_options(coco, tmp_path / "set", "--benchmark.ids", str(tmp_path / "ids.npy"), "--selection.max_area", "0.2"))
    assert contents(tmp_path / "set") == whole


def test_lists_of_ids_that_are_none_are_refused_in_one_line(coco, tmp_path):
    class Runs:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    lists = {
        "floats": (np.array([1.5]), "float64"),
        "objects": (np.array([Runs()], object), "no list of ids"),
        "square": (np.zeros((2, 2), int), "[2, 2]"),
        "twice": (np.array([1001, 1001]), "1001 stands there twice"),
        "long": (np.array([10**13]), "ids from"),
        "none": (np.array([5, 6]), "none of the 2 ids"),
    }
    for name, (ids, expected) in lists.items():
        np.save(tmp_path / f"{name}.npy", ids, allow_pickle=True)
        done = run(*coco_options(coco, tmp_path / "set", "--benchmark.ids", str(tmp_path / f"{name}.npy")), check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert expected in done.stderr
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps([1001]))
    done = run(*coco_options(coco, tmp_path / "set", "--benchmark.ids", str(tmp_path / "pickle.npy")), check=False)
    assert "no list of ids" in done.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "benchmark.judge is not set"),
        (["--benchmark.reference", "random", "--benchmark.judge", "clip=x"], "benchmark.judge: nobody asks it"),
        (["--benchmark.reference", "random", "--benchmark.ids", "x.npy"], "benchmark.ids: annotation ids are COCO's"),
        (["--benchmark.reference", "random", "--benchmark.count", "0"], "greater than or equal to 1"),
        (["--benchmark.reference", "random", "--benchmark.split", "test"], "no box in it for the splits test"),
        (["--benchmark.reference", "random", "--selection.include_labels", '["bird"]'], "no pair can be made of 19 boxes"),
        (["--benchmark.reference", "random", "--selection.include_labels", '["bird"]'], "try --benchmark.split all"),
        (["--benchmark.reference", "random", "--benchmark.out", "/proc/x/set"], "set build.benchmark.out"),
        (["--benchmark.reference", "random", "--benchmark.out", "/proc/set"], "set build.benchmark.out"),
        (["--benchmark.reference", "random", "--benchmark.out", f"/tmp/{'x' * 250}"], "set build.benchmark.out"),
        (["--benchmark.reference", "random", "--benchmark.out", "/proc"], "/proc"),
    ],
)
def test_bad_settings_are_one_line(world, tmp_path, more, expected):
    done = run(*[*options(world, tmp_path / "set", "--seed", "0"), *more], check=False)
    assert (done.returncode, done.stderr.count("error:"), done.stderr.count("Traceback")) == (2, 1, 0), done.stderr
    assert expected in done.stderr
    assert not list(tmp_path.iterdir())


def test_real_photos_of_coco(real_data, tmp_path):
    """The published format with its licences; 40 pairs, each mask as its annotation has it, in the square of its photo."""
    coco = real_data / "coco_mini"
    place = ["--source.annotations", str(coco / "instances.json"), "--source.photos", str(coco / "images")]
    own = ["--benchmark.split", "all", "--benchmark.reference", "random", "--benchmark.out", str(tmp_path / "set")]
    run("--config", "coco", *place, *own, "--benchmark.size", "128")
    document = json.loads((coco / "instances.json").read_text())
    boxes = {entry["id"]: entry for entry in document["annotations"]}
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in document["images"]}
    rows, record = table_of(tmp_path / "set"), record_of(tmp_path / "set")
    assert record["books"]["boxes"] == len(boxes) == record["pairs"] + sum(record["books"]["left_out"].values())
    assert len(rows) == record["pairs"] == 40
    for row in rows:
        entry = boxes[int(row["id"])]
        assert str(entry["image_id"]) == row["photo_id"]
        scale = 128 / min(sizes[entry["image_id"]])
        sides = int(row["x_max"]) - int(row["x_min"]), int(row["y_max"]) - int(row["y_min"])
        if row["whole_box"] == "1":
            assert sides == pytest.approx((entry["bbox"][2] * scale, entry["bbox"][3] * scale), abs=1.01)
        assert row["licence"].startswith("http")
    assert Counter(row["label"] for row in rows) == record["classes"]


def test_a_real_judge_finds_nearer_references_than_chance(real_data, tmp_path):
    """The cosines that it says are those of the written crops, and no smaller than those of references at random."""
    load_judge = pytest.importorskip("pbe_core.judges.judge").load_judge
    spec = f"mobilenet={real_data / 'judge' / 'mobilenet_v1_imagenet_fp16.safetensors'}"
    coco = real_data / "coco_mini"
    place = ["--source.annotations", str(coco / "instances.json"), "--source.photos", str(coco / "images")]
    common = ["--config", "coco", *place, "--benchmark.split", "all", "--benchmark.size", "224"]
    common += ["--selection.include_labels", '["dog", "cat", "bird", "toilet"]']
    run(*common, "--benchmark.out", str(tmp_path / "random"), "--benchmark.reference", "random")
    run(*common, "--benchmark.out", str(tmp_path / "nearest"), "--benchmark.judge", spec)
    judge = load_judge(spec)
    record = record_of(tmp_path / "nearest")
    assert record["judge"] == judge.identity.model_dump(mode="json")
    settings = load_settings(BenchmarkSettings, "build", [*common, "--benchmark.out", "x"])
    select_objects(settings, tmp_path)
    objects = {row["object_id"]: row for row in pq.read_table(tmp_path / "objects.parquet").to_pylist()}
    rows = {name: table_of(tmp_path / name) for name in ("nearest", "random")}
    assert [row["object_id"] for row in rows["nearest"]] == [row["object_id"] for row in rows["random"]]
    for near, chance in zip(rows["nearest"], rows["random"], strict=True):
        names = near["object_id"], near["reference_object_id"], chance["reference_object_id"]
        crops = [cut_object(open_object(objects[name], settings), settings.references.padding, 224) for name in names]
        assert np.array_equal(crops[1], picture(tmp_path / "nearest" / near["reference"]))
        target, *others = (features / np.linalg.norm(features) for features in judge.features(crops).astype(np.float64))
        assert float(near["similarity"]) == pytest.approx(others[0] @ target, abs=1e-4)
        assert others[0] @ target >= others[1] @ target - 1e-4
