"""References from another photo of the same instance: how they are told, drawn, cut, and what a lost one costs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pbe_core.dataset_reader import read_dataset, read_sample, take_rows
from pbe_core.errors import InputError
from pbe_core.images.decode import decode_jpeg
from pbe_core.images.rle import decode_pixels
from pbe_core.randomness import hash_column, mix, name_hash
from pbe_core.settings import load_settings, preset
from pipelines import inspect_dataset, verify
from pipelines.annotations.groups import split_names
from pipelines.annotations.own_boxes import open_boxes
from pipelines.annotations.source import photo_id_of
from pipelines.config import BuildSettings, SourceSettings
from pipelines.dataset.write_plan import select_and_plan
from pipelines.selection.groups import frame_of
from tests.coco_files import boxes_of, photos_of
from tests.conftest import REPOSITORY, call_program, run_build

SIDE = 64
BOX = ("x_min", "y_min", "x_max", "y_max")
SMALL = ("--source.kind", "boxes", "--source.unit", "fraction", "--views.size", "32", "--shards.samples", "6")


def rows_of(groups: int, each: int, **more: Any) -> list[dict[str, Any]]:
    """Boxes of instances, each in several photos: row `n` of a group is in photo `<group>/<n>.jpg`."""
    draw = np.random.default_rng(0)
    rows = []
    for group in range(groups):
        for number in range(each):
            left, top = draw.uniform(0.05, 0.4, 2).round(3).tolist()
            name = f"g{group}/{number:03d}.jpg"
            rows.append(
                {"photo": name, "x_min": left, "y_min": top, "x_max": left + 0.4, "y_max": top + 0.5, "group": f"g{group}"}
            )
    return [{**row, **more} for row in rows]


def write_photos(folder: Path, names: set[str]) -> None:
    """Photos that differ: soft noise, drawn by their names."""
    for name in sorted(names):
        draw = np.random.default_rng(name_hash(name))
        coarse = draw.integers(0, 256, (8, 8, 3), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR))


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as CSV, JSON Lines or Parquet, as the name says; not all rows need to have all keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows]), path)
        return path
    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".csv":
        lines = [",".join(keys), *(",".join(str(row.get(key, "")) for key in keys) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def opened(path: Path, **settings: Any):
    told = {"kind": "boxes", "annotations": path, "photos": path.parent if path.suffix else path, "unit": "fraction", **settings}
    return open_boxes(SourceSettings(**told), 0)


def settings_for(world: Path, table: Path, out: Path, *options: str) -> BuildSettings:
    folders = ["--source.annotations", str(table), "--source.photos", str(world), "--out", str(out)]
    return load_settings(BuildSettings, "build", [*SMALL, *folders, *options], preset("tiny"))


def build(world: Path, table: Path, out: Path, *options: str):
    return run_build(*SMALL, "--source.annotations", str(table), "--source.photos", str(world), "--out", str(out), *options)


def built(out: Path) -> list[Any]:
    rows = take_rows(out / "index.parquet", range(pq.read_metadata(out / "index.parquet").num_rows))
    return [read_sample(out, row) for row in rows]


# What is read.


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_column_says_which_boxes_show_the_same_instance(tmp_path, ending):
    rows = [*rows_of(2, 2), {**rows_of(1, 1)[0], "photo": "alone.jpg", "group": ""}]
    source = opened(write_table(tmp_path / f"boxes.{ending}", rows))
    assert source.groups
    assert [(row["group"], row["references"], row["row"]) for row in boxes_of(source)] == [
        *((group, None, number) for number, group in enumerate(("g0", "g0", "g1", "g1"), 1)),
        (None, None, 5),
    ]


def test_folders_are_instances_and_number_their_tracks_by_themselves(tmp_path):
    rows = [{**row, "group": "track 1"} for row in rows_of(2, 1)]
    path = write_table(tmp_path / "boxes.csv", rows)
    assert [row["group"] for row in boxes_of(opened(path, group_by="folder"))] == ["g0/track 1", "g1/track 1"]
    path = write_table(tmp_path / "boxes.csv", [{key: row[key] for key in ("photo", *BOX)} for row in rows])
    assert [row["group"] for row in boxes_of(opened(path, group_by="folder"))] == ["g0", "g1"]


def test_groups_may_be_numbers_as_pandas_writes_them_where_a_cell_is_empty(tmp_path):
    """Their column is one of floats then."""
    rows = [{**row, "group": group} for row, group in zip(rows_of(1, 3), (7.0, 7.0, None), strict=True)]
    found = [
        [row["group"] for row in boxes_of(opened(write_table(tmp_path / f"boxes.{kind}", rows)))] for kind in ("parquet", "jsonl")
    ]
    assert found == [["7", "7", None]] * 2


def test_a_folder_of_photos_is_read_without_a_table(tmp_path):
    """Each photo is one box, the whole of it; what is hidden or no photo is none."""
    world = tmp_path / "world"
    write_photos(world, {"mug/b.jpg", "mug/a.jpg", "cat/x/1.png", ".hidden/c.jpg"})
    (world / "mug" / "notes.txt").write_text("no photo")
    found = boxes_of(opened(world, group_by="folder", unit=None))
    assert [(row["group"], row["label"], *(row[edge] for edge in BOX)) for row in found] == [
        ("cat/x", "object", 0, 0, 1, 1),
        ("mug", "object", 0, 0, 1, 1),
        ("mug", "object", 0, 0, 1, 1),
    ]
    assert opened(world, unit=None).read_elsewhere().keys() == {"paths of photos"}, "photos that come must count as other inputs"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no photo in it"):
        opened(tmp_path / "empty", unit=None)


PAIR = {"photo": "a.jpg", "x_min": 0.1, "y_min": 0.1, "x_max": 0.5, "y_max": 0.6}
REFERENCE = {
    "reference_photo": "b.jpg",
    **{f"reference_{edge}": value for edge, value in zip(BOX, (0, 0.2, 0.9, 1), strict=True)},
}


def test_rows_of_a_table_of_pairs_that_name_one_box_are_one_box(tmp_path):
    rows = [
        {**PAIR, **REFERENCE, "licence": "cc"},
        {**PAIR, **REFERENCE, "reference_photo": "c.jpg"},
        {**PAIR, **REFERENCE},  # Said twice.
        {**PAIR, "photo": "d.jpg", "reference_photo": "a.jpg"},  # The whole photo.
        {**PAIR, "photo": "e.jpg"},
    ]
    first, whole, none = boxes_of(opened(write_table(tmp_path / "pairs.csv", rows)))
    assert [one["photo_id"] for one in first["references"]] == ["b", "c"]
    assert [first["references"][0][name] for name in BOX] == [0, 0.2, 0.9, 1]
    assert [(one["file_name"], one["licence"], *(one[edge] for edge in BOX)) for one in whole["references"]] == [
        ("a.jpg", "cc", 0, 0, 1, 1)
    ]
    assert none["references"] is None
    photos = {photo["photo_id"] for photo in photos_of(opened(tmp_path / "pairs.csv"))}
    assert photos == set("abcde"), "what references are of is told of, too: photos are fetched by it"


def test_references_have_masks_of_their_own(tmp_path):
    """As polygons or PNGs; grey cuts each reference out by its own."""
    write_photos(tmp_path, {"a.jpg", "b.jpg", "c.jpg"})
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[20:44, 10:50] = 255
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    square = [[0.2, 0.3, 0.8, 0.3, 0.8, 0.9, 0.2, 0.9]]
    rows = [
        {**PAIR, "reference_photo": "b.jpg", "reference_segmentation": square, "segmentation": square},
        {**PAIR, "reference_photo": "c.jpg", "reference_mask": "m.png"},
        {**PAIR, "photo": "c.jpg", "reference_photo": "b.jpg", "reference_mask": "none.png"},
    ]
    table = write_table(tmp_path / "pairs.jsonl", rows)
    assert "reference: column mask: no file 'none.png'" in boxes_of(opened(table))[0]["detail"]
    build(tmp_path, table, tmp_path / "out", "--source.validation_share", "0", "--references.background", "grey")
    (sample,) = built(tmp_path / "out")
    for data, one, shown in zip(sample.others, sample.record.references, (0.36, 24 * 40 / SIDE**2), strict=True):
        pixels = decode_jpeg(data)
        own = decode_pixels(one.mask, *pixels.shape[:2])
        assert own.mean() == pytest.approx(shown, abs=0.03)
        assert np.abs(pixels[~own].astype(int) - 127).mean() < 6 < np.abs(pixels[own].astype(int) - 127).mean()


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"reference_photo": "a.jpg"}, "bad_row", "reference_photo: is the photo itself"),
        ({"reference_photo": "../b.jpg"}, "bad_row", "leads out of the photo folder"),
        ({"reference_x_min": 0.95}, "empty_box", "reference: x_max: 0.9, not more than x_min, 0.95"),
        ({"reference_x_max": 7}, "outside_photo", "reference: x_max: 7"),
        ({"reference_y_min": "high"}, "bad_number", "reference_y_min: 'high' is no finite number"),
    ],
)
def test_a_reference_that_cannot_be_read_costs_its_row(tmp_path, change, reason, detail):
    rows = [{**PAIR, **REFERENCE, **change}, *({**PAIR, **REFERENCE, "photo": f"{number}.jpg"} for number in range(3))]
    found = boxes_of(opened(write_table(tmp_path / "pairs.jsonl", rows)))
    assert [row["problem"] for row in found] == [reason, None, None, None]
    assert detail in found[0]["detail"]


def test_the_examples_of_the_page_can_be_read(tmp_path):
    page = (REPOSITORY / "docs" / "own-data.md").read_text()
    _, grouped, paired = re.findall(r"```csv\n(.*?)```", page, re.DOTALL)
    for name in re.findall(r"[a-z]+/[a-z0-9-]+\.jpg|desk\.jpg", grouped + paired):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((1000, 1000, 3), np.uint8))
    (tmp_path / "boxes.csv").write_text(grouped)
    (tmp_path / "pairs.csv").write_text(paired)
    found = boxes_of(opened(tmp_path / "boxes.csv", unit="pixel"))
    assert [(row["problem"], row["group"]) for row in found] == [(None, "blue mug")] * 3 + [(None, "lamp 7")]
    found = boxes_of(opened(tmp_path / "pairs.csv", unit="pixel"))
    assert [len(row["references"]) for row in found] == [2, 1]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{**PAIR, "reference_x_min": 0.1}], (), "column reference_photo is missing"),
        ([PAIR], ("--references.others", "1"), "does not say which boxes show the same instance"),
        ([PAIR], ("--references.alone", "reject"), "does not say which boxes show the same instance"),
        ([{**PAIR, "group": "a"}], ("--references.frames", "[1, 5]"), "references.others is 0"),
        ([{**PAIR, "group": "a"}], ("--references.others", "1", "--references.frames", "[5, 1]"), "0 <= smallest <= largest"),
        ([{**PAIR, "grupe": "a"}], (), "no column is called 'grupe'"),
        ([{**PAIR, "group": "a", "instance": "b"}], (), "columns group, instance all mean `group`"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(tmp_path, rows, options, words):
    table = write_table(tmp_path / "boxes.csv", rows)
    with pytest.raises(InputError, match=re.escape(words)):
        select_and_plan(settings_for(tmp_path, table, tmp_path / "out", *options))


# Splits.


def test_no_instance_and_no_photo_is_in_two_splits_and_more_photos_change_no_other(tmp_path):
    draw = np.random.default_rng(1)
    links = [(f"p{draw.integers(300)}", f"g{draw.integers(200)}", None) for _ in range(260)]
    links += [("p1000", None, "p1001"), ("p1001", None, "p1002")]
    names = split_names(links)
    for photo, group, other in links:
        alike = {names[photo] for photo, own, _ in links if own == group is not None}
        assert len(alike) <= 1
        assert other is None or names[photo] == names[other]
    assert len(set(names.values())) > 20, "not all are linked"
    assert split_names(links[::-1]) == names
    grown = split_names([*links, ("new", links[0][1], None), ("newer", "new group", None)])
    assert {photo: grown[photo] for photo in names} == names


def test_instances_are_held_out_whole(tmp_path):
    rows = rows_of(60, 3)
    found = boxes_of(opened(write_table(tmp_path / "boxes.csv", rows), validation_share=0.3))
    by_group: dict[str, set[str]] = {}
    for row in found:
        by_group.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_group.values())
    assert 8 <= sum(splits == {"validation"} for splits in by_group.values()) <= 30


# What is drawn.


def planned(
    world: Path, rows: list[dict[str, Any]], out: Path, *options: str
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Photos of the references of each photo's object, and photos of rejects by reason; without packing."""
    select_and_plan(settings_for(world, write_table(world / f"{out.name}.csv", rows), out, *options))
    objects = pq.read_table(out / "objects.parquet").to_pylist()
    rejects: dict[str, list[str]] = {}
    for row in pq.read_table(out / "rejects.parquet").to_pylist():
        rejects.setdefault(row["reason"], []).append(row["photo_id"])
    return {row["file_name"]: [one["file_name"] for one in row["references"]] for row in objects}, rejects


def test_which_references_are_drawn_is_a_function_of_names(tmp_path):
    """Beside a plain second way to say it; another order of the rows changes nothing, another seed does."""
    rows = rows_of(5, 6)
    drawn, _ = planned(tmp_path, rows, tmp_path / "a", "--references.others", "3")
    assert planned(tmp_path, rows[::-1], tmp_path / "b", "--references.others", "3")[0] == drawn
    ids = {row["file_name"]: row["object_id"] for row in pq.read_table(tmp_path / "a" / "objects.parquet").to_pylist()}

    def hashed(name: str) -> np.ndarray:
        return hash_column(pa.array([ids[name]]), "member")

    for name, found in drawn.items():
        others = [other for other in drawn if other.split("/")[0] == name.split("/")[0] and other != name]
        key = mix(hashed(name) ^ np.uint64(name_hash(0, "references")))
        assert found == sorted(others, key=lambda other: int(mix(hashed(other) ^ key)[0]))[:3]
    assert planned(tmp_path, rows, tmp_path / "c", "--references.others", "3", "--seed", "1")[0] != drawn
    few, _ = planned(tmp_path, rows, tmp_path / "d", "--references.others", "1")
    assert few == {name: found[:1] for name, found in drawn.items()}, "fewer are the first of them"


def test_frames_are_so_far_apart_as_is_asked(tmp_path):
    rows = [*rows_of(2, 12), {**rows_of(1, 1)[0], "photo": "other/001.jpg"}]
    drawn, _ = planned(tmp_path, rows, tmp_path / "a", "--references.others", "16", "--references.frames", "[3, 5]")
    for name, found in drawn.items():
        expected = {
            other
            for other in drawn
            if other.split("/")[0] == name.split("/")[0] and 3 <= abs(frame_of(other) - frame_of(name)) <= 5
        }
        assert set(found) == expected
    assert frame_of("v/frame_000123.jpg") == 123
    assert frame_of("v/12/last.jpg") == -1


def test_an_object_that_no_other_photo_shows_has_its_own_crop_or_is_rejected(tmp_path):
    rows = [*rows_of(2, 2), {**PAIR, "photo": "alone.jpg", "group": "alone"}, {**PAIR, "photo": "none.jpg", "group": ""}]
    rows.append({**rows[0], "photo": "g0/twin.jpg", "x_max": 0.999, "x_min": 0.001, "y_min": 0.0, "y_max": 1.0})  # Too large.
    drawn, rejects = planned(tmp_path, rows, tmp_path / "own", "--references.others", "4")
    assert drawn["alone.jpg"] == drawn["none.jpg"] == []
    assert set(drawn["g0/000.jpg"]) == {"g0/001.jpg", "g0/twin.jpg"}, "too large for an object, and right for a reference"
    assert list(rejects) == ["too_large"]
    left, rejects = planned(tmp_path, rows, tmp_path / "reject", "--references.others", "4", "--references.alone", "reject")
    assert left == {name: found for name, found in drawn.items() if found}
    assert sorted(rejects["no_other_photo"]) == ["alone", "none"]


def test_an_instance_that_the_source_itself_puts_into_two_splits_stays_in_the_better_one(tmp_path):
    rows = [{**row, "split": "train"} for row in rows_of(2, 3)]
    rows[0]["split"] = "validation"
    drawn, rejects = planned(tmp_path, rows, tmp_path / "a", "--references.others", "1")
    assert sorted(rejects["group_in_two_splits"]) == sorted(photo_id_of(f"g0/{number:03d}.jpg") for number in (1, 2))
    assert drawn.keys() == {"g0/000.jpg", "g1/000.jpg", "g1/001.jpg", "g1/002.jpg"}


# What is cut, and what is lost.


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_photos(folder, {row["photo"] for row in rows_of(5, 3)})
    write_table(folder / "boxes.csv", rows_of(5, 3))
    return folder


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "dataset"
    build(world, world / "boxes.csv", out, "--references.others", "2", "--source.validation_share", "0.3")
    return out


def test_samples_hold_the_crops_of_other_photos(world, whole):
    samples = built(whole)
    assert len(samples) == 15
    for sample in samples:
        record = sample.record
        assert len(sample.others) == len(record.references) == 2
        assert {one.file_name.split("/")[0] for one in record.references} == {record.file_name.split("/")[0]} == {record.group}
        for data, one in zip(sample.others, record.references, strict=True):
            assert one.file_name != record.file_name
            photo = cv2.cvtColor(cv2.imread(str(world / one.file_name)), cv2.COLOR_BGR2RGB)
            left, top, right, bottom = one.window
            difference = np.abs(decode_jpeg(data).astype(int) - photo[top:bottom, left:right])
            assert difference.mean() < 4, "JPEG of quality 95 changes little"
    books = read_dataset(whole).books
    assert (books.references, books.lost_references) == (30, {})
    assert call_program(verify.main, str(whole)).returncode == 0
    told = call_program(inspect_dataset.main, "trace", samples[0].record.key, str(whole))
    assert samples[0].record.references[1].photo_id in told.stdout
    assert "ref_2.jpg" in told.stdout


def test_bytes_do_not_depend_on_threads_or_on_what_was_packed_before(world, whole, tmp_path, monkeypatch):
    from pipelines.dataset import samples as samples_module

    monkeypatch.setattr(samples_module.Photos.__init__, "__defaults__", (1,))  # Next to no photo is kept.
    shutil.copytree(whole, tmp_path / "dataset")
    before = {path.name: path.read_bytes() for path in (whole / "shards").iterdir()}
    for path in list((tmp_path / "dataset" / "shards").glob("train-000001*")):
        path.unlink()
    options = ("--references.others", "2", "--source.validation_share", "0.3", "--ray.cpus_per_actor", "3")
    build(world, world / "boxes.csv", tmp_path / "dataset", *options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "dataset" / "shards").iterdir()} == before


def test_a_photo_that_is_lost_costs_its_references_and_no_more_until_it_comes(world, whole, tmp_path):
    moved = tmp_path / "world"
    shutil.copytree(world, moved)
    (moved / "g1/001.jpg").rename(moved / "away")
    options = ("--references.others", "2", "--source.validation_share", "0.3")
    done = build(moved, moved / "boxes.csv", tmp_path / "dataset", *options)
    books = read_dataset(tmp_path / "dataset").books
    assert (books.planned, books.samples, books.failures) == (15, 14, {"missing": 1})
    assert (books.references, books.lost_references) == (26, {"missing": 2})
    assert "not cut: missing" in done.stdout
    lost = [sample.record for sample in built(tmp_path / "dataset") if sample.record.lost_references]
    assert [(len(record.references), record.lost_references[0].code) for record in lost] == [(1, "missing")] * 2
    assert call_program(verify.main, str(tmp_path / "dataset")).returncode == 0
    # It comes, and the same command puts it into all that lack it.
    (moved / "away").rename(moved / "g1/001.jpg")
    build(moved, moved / "boxes.csv", tmp_path / "dataset", *options)
    for path in (whole / "shards").glob("*.tar"):
        assert (tmp_path / "dataset" / "shards" / path.name).read_bytes() == path.read_bytes()


def test_a_shard_is_not_packed_again_where_it_would_lose_a_reference(tmp_path):
    """A photo comes, and another one, of which only a reference was cut, is gone: that one stays, until all are here."""
    rows = [{**PAIR, **REFERENCE, "reference_photo": name} for name in ("b.jpg", "c.jpg")]
    table, out = write_table(tmp_path / "pairs.csv", rows), tmp_path / "out"

    def cut() -> list[str]:
        build(tmp_path, table, out, "--source.validation_share", "0")
        return [one.file_name for one in built(out)[0].record.references]

    write_photos(tmp_path, {"a.jpg", "c.jpg"})
    assert cut() == ["c.jpg"]
    (tmp_path / "c.jpg").unlink()
    write_photos(tmp_path, {"b.jpg"})
    assert cut() == ["c.jpg"]
    write_photos(tmp_path, {"c.jpg"})
    assert cut() == ["b.jpg", "c.jpg"]


def test_pairs_are_cut_as_told_and_a_sample_is_lost_with_its_last_reference(tmp_path):
    names = {"a.jpg", "b.jpg", "c.jpg"}
    write_photos(tmp_path, names)
    rows = [
        {**PAIR, **REFERENCE},
        {**PAIR, **REFERENCE, "reference_photo": "c.jpg"},
        {**PAIR, "photo": "b.jpg", "reference_photo": "gone.jpg"},
    ]
    table = write_table(tmp_path / "pairs.parquet", rows)
    build(tmp_path, table, tmp_path / "own", "--source.validation_share", "0")
    cut = {sample.record.file_name: [one.file_name for one in sample.record.references] for sample in built(tmp_path / "own")}
    assert cut == {"a.jpg": ["b.jpg", "c.jpg"], "b.jpg": []}
    build(tmp_path, table, tmp_path / "reject", "--source.validation_share", "0", "--references.alone", "reject")
    books = read_dataset(tmp_path / "reject").books
    assert (books.samples, books.failures, books.references) == (1, {"no_reference": 1}, 2)


def test_a_crawl_wants_the_photos_of_references_too(tmp_path):
    from pipelines.crawling.wanted import list_wanted

    rows = [{**PAIR, **REFERENCE}]
    planned(tmp_path, rows, tmp_path / "a", "--source.validation_share", "0")
    wanted = list_wanted(tmp_path / "a" / "objects.parquet", opened(tmp_path / "a.csv", validation_share=0), [])
    assert sorted(wanted["file_name"].to_pylist()) == ["a.jpg", "b.jpg"]


def test_an_extension_moves_no_instance_into_another_split(tmp_path):
    """Boxes that are told to be of one instance only later: some of its photos would change their split."""
    rows = rows_of(4, 4)
    write_photos(tmp_path, {row["photo"] for row in rows})
    share = ("--source.validation_share", "0.4")
    plain = [{name: value for name, value in row.items() if name != "group"} for row in rows]
    build(tmp_path, write_table(tmp_path / "plain.csv", plain), tmp_path / "dataset", *share)
    before = {path.name: path.read_bytes() for path in (tmp_path / "dataset").rglob("*.tar")}
    with pytest.raises(AssertionError, match=r"would be in another split by these annotations \(photo [\w-]+ from \w+ to \w+\)"):
        build(tmp_path, write_table(tmp_path / "grouped.csv", rows), tmp_path / "dataset", *share, "--extend")
    assert {path.name: path.read_bytes() for path in (tmp_path / "dataset").rglob("*.tar")} == before
