"""Boxes of one's own, as CSV and as JSON Lines, as people and tools write them."""

import codecs
import gzip
import json
import re
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images import decode as decode_module
from pbe_core.settings import REPOSITORY, load_settings, preset
from pipelines.annotations import own_lines
from pipelines.annotations.own_boxes import open_boxes
from pipelines.annotations.source import Source, assign_splits, photo_id_of
from pipelines.config import BuildSettings, SourceSettings
from tests.coco_files import boxes_of, photos_of

CORNERS = ("x_min", "y_min", "x_max", "y_max")
HEADER = "photo,x_min,y_min,x_max,y_max"
SIZED = f"{HEADER},width,height\n"
GOOD = {"photo": "a.jpg", "x_min": 4, "y_min": 5, "x_max": 24, "y_max": 15, "label": "cat", "width": 40, "height": 20}


def opened(path: Path, content: str | bytes | None = None, unit: str = "pixel", seed: int = 0, **settings: Any) -> Source:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_boxes(
        SourceSettings(**{"kind": "boxes", "annotations": path, "photos": path.parent, "unit": unit, **settings}), seed
    )


def written(path: Path, *rows: dict[str, Any]) -> Path:
    """Rows of the same keys, in the format that the name says."""
    lines = [json.dumps(row) for row in rows]
    if ".csv" in path.name:
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines))
    return path


def save_photo(path: Path, orientation: int = 1, size: tuple[int, int] = (40, 20)) -> None:
    """A JPEG or PNG of `size` px as stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, exif=exif)


@pytest.fixture
def csv_file(tmp_path):
    return tmp_path / "boxes.csv"


@pytest.fixture
def jsonl_file(tmp_path):
    return tmp_path / "boxes.jsonl"


UNREAD = {"": 0, "Unnamed: 0.1": 0, "id": 7, "image_id": 3, "class_id": 2, "area": 200, "iscrowd": 0, "confidence": 0.9}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("names", "unread"),
    [
        ("photo x_min y_min x_max y_max label", {}),
        ("image xmin ymin xmax ymax label", {}),  # VoTT's.
        ("filename xmin ymin xmax ymax class", {}),  # TensorFlow's examples'.
        ("path x1 y1 x2 y2 class_name", {}),
        ("photo x0 y0 x1 y1 label", {}),
        ("Image-Path XMin Y-min X_Max ymax Category", {}),
        ("img left top right bottom label_name", {}),
        ("photo x_min y_min x_max y_max label", UNREAD),
    ],
)
def test_columns_go_by_common_names_in_any_order(tmp_path, suffix, names, unread):
    """What the file does not say is unknown, not 0; pandas' row numbers, and numbers beside names, are left out and said."""
    called = {column: name for name, column in zip(names.split(), GOOD, strict=False)}
    row = {**unread, **{called.get(column, column): value for column, value in reversed(GOOD.items())}}
    source = opened(written(tmp_path / f"boxes.{suffix}", row))
    (box,), (photo,) = boxes_of(source), photos_of(source)
    assert [box[name] for name in CORNERS] == [0.1, 0.25, 0.6, 0.75]
    assert (box["label"], box["file"], box["row"], box["problem"]) == ("cat", f"boxes.{suffix}", 1, None)
    assert {box[name] for name in box if name.startswith("is_")} == {-1}
    assert (photo["file_name"], photo["width"], photo["height"], photo["photo_id"]) == ("a.jpg", 40, 20, box["photo_id"])
    assert (source.class_names, source.files, source.frame) == ({}, (tmp_path / f"boxes.{suffix}",), "exif")
    said = ", ".join(f"{called[column]} as {column}" for column in reversed(GOOD) if called.get(column, column) != column)
    left = ", ".join(unread).replace(", ", "a column without a name, ", 1)
    told = f"read {said}" if said else f"not read: {left}"
    assert source.notes == ((f"{source.name}: {told}",) if said or unread else ())


def test_both_formats_say_the_same(csv_file, jsonl_file):
    more = {"url": "http://u", "author": "Ann, Ben", "licence": "http://l"}
    rows = [{**GOOD, "split": "train", **more}, {**GOOD, "photo": "b/c.jpg", "label": "3", "split": "Valid", **more}]
    by_csv, by_json = opened(written(csv_file, *rows)), opened(written(jsonl_file, rows[0], {**rows[1], "label": 3}))
    assert [{**row, "file": "boxes.csv"} for row in boxes_of(by_json)] == boxes_of(by_csv)
    assert photos_of(by_json) == photos_of(by_csv)
    assert photos_of(by_csv)[1] | {**more, "split": "validation", "file_name": "b/c.jpg"} == photos_of(by_csv)[1]
    assert boxes_of(by_csv)[1]["label"] == "3"


@pytest.mark.parametrize(("frame", "size"), [("stored", (40, 20)), ("exif", (20, 40))])
def test_px_are_divided_by_the_photos_size_in_the_frame_of_the_boxes(csv_file, monkeypatch, frame, size):
    """EXIF turns this photo by a quarter: viewers show 20 x 40 px. Its header is read once."""
    save_photo(csv_file.parent / "cats" / "IMG 1.jpg", orientation=6)
    source = opened(csv_file, f"{HEADER}\n" + "cats/IMG 1.jpg,0,0,10,10\nnone.jpg,0,0,10,10\n" * 50, frame=frame)
    asked = []
    read_size = decode_module._size
    monkeypatch.setattr(decode_module, "_size", lambda *arguments: asked.append(1) or read_size(*arguments))
    rows, (photo,) = boxes_of(source), photos_of(source)
    assert (rows[0]["x_max"], rows[0]["y_max"]) == (10 / size[0], 10 / size[1])
    assert rows[1]["problem"] == "unknown_photo"
    assert (photo["width"], photo["height"], len(asked)) == (*size, 1)
    assert "too_many_pixels" in boxes_of(opened(csv_file, max_photo_pixels=799))[0]["detail"]


def test_a_px_beyond_the_edge_is_rounding_and_more_is_not(csv_file):
    """Of fractions too, and some of them have four decimals; without a size of the photo nothing is asked for."""
    header, sized = f"{HEADER}\n", SIZED
    for content, unit, box, problem in (
        (sized + "a.jpg,-1,-0.5,41,20.5,40,20\n", "pixel", [0, 0, 1, 1], None),
        (sized + "a.jpg,-1.5,0,10,21.5,40,20\n", "pixel", [-1.5 / 40, 0, 10 / 40, 21.5 / 20], "outside_photo"),
        (sized + "a.jpg,-0.02,0,1.02,1.06,40,20\n", "fraction", [0, 0, 1, 1.06], None),  # The selection rejects it.
        (header + "a.jpg,-0.0001,0,1.00005,1.001\n", "fraction", [0, 0, 1, 1.001], None),
    ):
        source = opened(csv_file, content, unit=unit)
        (row,), (photo,) = boxes_of(source), photos_of(source)
        assert ([row[name] for name in CORNERS], row["problem"]) == (box, problem)
        assert photo["width"] == (40 if content.startswith(sized) else None)


@settings(max_examples=30)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=5), st.integers(2, 500), st.integers(2, 500))
def test_px_and_fractions_of_the_same_boxes_agree(boxes, width, height):
    """Whatever the sizes: what is read from px is what is read from fractions, to rounding."""
    values = [dict(zip(CORNERS, box, strict=True)) for box in boxes]
    scale = dict(zip(CORNERS, (width, height, width, height), strict=True))
    in_px = [*({name: value[name] * scale[name] for name in CORNERS} for value in values), dict(scale)]
    read = {}
    with tempfile.TemporaryDirectory() as folder:
        for unit, rows in (("fraction", values), ("pixel", in_px)):
            lines = [{"photo": "a.jpg", "width": width, "height": height, **row} for row in rows]
            read[unit] = boxes_of(opened(written(Path(folder) / f"{unit}.jsonl", *lines), unit=unit))
    for fraction, px in zip(read["fraction"], read["pixel"], strict=False):
        assert [px[name] for name in CORNERS] == pytest.approx([fraction[name] for name in CORNERS])


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ("a.jpg,1,2,3,4,cat,train,40", "bad_row", "boxes.csv, line 3: 8 cells, the header has 9"),
        ("a.jpg,1,2,3,4,cat,train,40,20,", "bad_row", "10 cells"),
        ('a.jpg,1,2,3,4,"cat,train,40,20', "bad_row", "not CSV"),
        ("caf\xe9.jpg,1,2,3,4,cat,train,40,20", "bad_row", "no UTF-8 text .byte 4"),
        (",1,2,3,4,cat,train,40,20", "bad_row", "line 3, column photo: .* is empty"),
        ("/a.jpg,1,2,3,4,cat,train,40,20", "bad_row", "'/a.jpg' is absolute"),
        ("b/../../a.jpg,1,2,3,4,cat,train,40,20", "bad_row", "leads out"),
        ("a.jpg,1,2,3,4,cat,dev,40,20", "bad_row", "column split: 'dev' is none of"),
        ("a.jpg,1,2,3,4,cat,,40,20", "bad_row", "column split: is empty"),
        ("c.jpg,1,2,3,4,cat,validation,40,20", "bad_row", "column split: 'validation', but 'train' in line 2"),
        ("c.jpg,1,2,3,4,cat,train,41,20", "bad_row", "column width: 41, but 40 in line 2"),
        ("a.jpg,1,2,3,4,cat,train,0,20", "bad_row", "column width: '0'"),
        ("a.jpg,1,2,3,4,cat,train,40,", "bad_row", "only one is there"),
        ("a.jpg,x,2,3,4,cat,train,40,20", "bad_number", "column x_min: 'x'"),
        ('a.jpg,1,"2,5",3,4,cat,train,40,20', "bad_number", "column y_min: '2,5'"),
        ("a.jpg,1,2,nan,4,cat,train,40,20", "bad_number", "column x_max: 'nan'"),
        ("a.jpg,1,2,3,1_0,cat,train,40,20", "bad_number", "column y_max: '1_0'"),
        ("a.jpg,1,,3,4,cat,train,40,20", "bad_number", "column y_min: is empty"),
        ("a.jpg,1,2,50,4,cat,train,40,20", "outside_photo", "column x_max: 50, and the photo is 40 px"),
        ("a.jpg,3,2,1,4,cat,train,40,20", "empty_box", "column x_max: 1, not more than x_min, 3; is x_max a width"),
        ("none.jpg,1,2,3,4,cat,train,,", "unknown_photo", "size of 'none.jpg' .*missing"),
        ("boxes.csv,1,2,3,4,cat,train,,", "unknown_photo", "not_an_image"),
        ('{"photo": "a.jpg", "x_min": 1', "bad_row", "boxes.jsonl, line 3: not JSON"),
        # More levels than Python's parser takes, whose limit bounds its stack.
        ("[" * (sys.getrecursionlimit() + 10), "bad_row", "not JSON"),
        ("[1, 2]", "bad_row", "no JSON object"),
        ('{"photo": 5.5, "split": "train"}', "bad_row", "column photo: 5.5"),
        ('{"photo": "\\ud800.jpg", "split": "train"}', "bad_row", "column photo: .* is no text"),
        ('{"photo": "a.jpg", "split": "train", "label": ["cat"]}', "bad_row", "column label"),
        ('{"photo": "a.jpg", "split": "train", "width": true, "height": 20}', "bad_row", "column width: True"),
        ('{"photo": "a.jpg", "split": "train", "x_min": true}', "bad_number", "column x_min: True"),
        ('{"photo": "a.jpg", "split": "train", "x_min": 1e999}', "bad_number", "column x_min: inf"),
    ],
)
def test_a_malformed_row_costs_itself_alone(tmp_path, line, reason, detail):
    """Those around it are read, a stray quote swallows none, and the detail names file, line and column."""
    suffix = "jsonl" if line.startswith(("{", "[")) else "csv"
    values = {**dict(zip(HEADER.split(","), ("c.jpg", 1, 2, 3, 4), strict=True)), "label": "cat", "split": "train"}
    values |= {"width": 40, "height": 20}
    good = json.dumps(values) if suffix == "jsonl" else ",".join(map(str, values.values()))
    header = good if suffix == "jsonl" else ",".join(values)
    rows = boxes_of(opened(tmp_path / f"boxes.{suffix}", "\n".join([header, good, line, good, ""]).encode("latin-1")))
    assert [row["problem"] for row in rows][-3:] == [None, reason, None]
    assert [row["row"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-2]["split"] == "train"
    assert re.search(detail, rows[-2]["detail"]), rows[-2]["detail"]


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        ("  Big Cat\t", "Big Cat"),
        ("\u00a0cat", "cat"),
        *[(empty, None) for empty in ("", " ", float("nan"))],
        *[(number, "2") for number in ("2", "2.0", 2, 2.0)],  # pandas makes floats of whole numbers beside an empty cell.
        ("-1.0", "-1"),
        *[(number, "2.5") for number in ("2.5", 2.5)],
        ("v2.0", "v2.0"),
        ("1.0.0", "1.0.0"),
    ],
)
def test_a_label_is_its_text_without_spaces_and_a_number_without_its_zero(csv_file, jsonl_file, cell, label):
    for path in (csv_file, jsonl_file) if isinstance(cell, str) else (jsonl_file,):
        rows = boxes_of(opened(written(path, GOOD, {**GOOD, "label": cell})))
        assert [(row["label"], row["problem"]) for row in rows] == [("cat", None), (label, None)]


def test_without_labels_every_box_is_an_object(csv_file):
    source = opened(csv_file, SIZED + "a.jpg,1,2,3,4,40,20\n")
    assert (boxes_of(source)[0]["label"], source.class_names) == ("object", {"object": "object"})


# Photos.


@pytest.mark.parametrize(
    ("name", "photo_id"),
    [
        ("000000000030.jpg", "000000000030"),
        ("a_B-9.jpg", "a_B-9"),
        ("a.JPG", "a-[0-9a-f]{8}"),
        ("cats/IMG 1.jpg", "cats-IMG-1-85f38690"),  # As it is in datasets that were built: split and order hang on it.
        ("Müller/Straße.jpg", "Muller-Strae-[0-9a-f]{8}"),
        ("猫.jpg", "photo-[0-9a-f]{8}"),
        ("x" * 65 + ".jpg", "x" * 40 + "-[0-9a-f]{8}"),
        ("a.b.jpg", "a-b-[0-9a-f]{8}"),
    ],
)
def test_a_photos_id_can_be_read(name, photo_id):
    assert re.fullmatch(photo_id, photo_id_of(name))


@given(st.lists(st.text(min_size=1), min_size=2, max_size=20, unique=True))
def test_ids_can_be_ids_and_differ_where_paths_do(names):
    ids = [photo_id_of(name) for name in names]
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", photo_id) for photo_id in ids)
    assert len(set(ids)) == len(names)


def test_a_photo_comes_once_with_all_that_any_line_says(csv_file):
    """Two of one id are not mixed up: a file may bear the very id of another one."""
    content = f"{HEADER},width,height,url,author,licence\n./a.jpg,1,2,3,4,,,,Ann,\na.jpg,1,2,3,4,40,20,http://u,Ben,\n"
    (photo,) = photos_of(opened(csv_file, content))
    known = {"file_name": "a.jpg", "width": 40, "height": 20, "url": "http://u", "author": "Ann", "licence": None}
    assert photo | known == photo
    twin = f"{photo_id_of('cats/1.png')}.jpg"
    rows = boxes_of(opened(csv_file, SIZED + f"cats/1.png,1,2,3,4,40,20\n{twin},1,2,3,4,40,20\n"))
    assert [row["problem"] for row in rows] == [None, "bad_row"]
    assert "'cats/1.png' get the same id" in rows[1]["detail"]


@pytest.mark.parametrize("unit", ["pixel", "fraction"])
def test_a_name_that_a_tool_wrote_elsewhere_leads_to_the_photo(tmp_path, unit):
    """Absolute here or on another machine, or from the folder above; what lies in the folder is then a part of the inputs."""
    folder, path = tmp_path / "images", tmp_path / "boxes.csv"
    for name in ("cats/1.png", "2.jpg"):
        save_photo(folder / name)
    names = [f"{folder}/cats/1.png", "D:\\set\\cats\\1.png", "cats/1.png", "images/2.jpg", "images\\2.jpg"]
    box = "0.1,0.2,0.8,0.9" if unit == "fraction" else "1,2,30,15"
    source = opened(path, f"{HEADER}\n" + "".join(f"{name},{box}\n" for name in names), unit, photos=folder)
    before = source.read_elsewhere()
    rows = boxes_of(source)
    assert ([row["problem"] for row in rows], len({row["photo_id"] for row in rows})) == ([None] * 5, 2)
    assert sorted(photo["file_name"] for photo in photos_of(source)) == ["2.jpg", "cats/1.png"]
    assert any("found by their base names: 1; for example" in note for note in source.read_notes())
    (folder / "cats" / "1.png").rename(folder / "1.png")
    assert opened(path, unit=unit, photos=folder).read_elsewhere()["paths of photos"] != before["paths of photos"]


# Splits.


def test_splits_of_the_file_are_kept(csv_file):
    words = {"a": "TRAIN", "b": "Validation", "c": "val", "d": "valid", "e": "test"}
    content = f"{HEADER},split,width,height\n" + "".join(f"{name}.jpg,1,2,3,4,{word},40,20\n" for name, word in words.items())
    for splits, expected in ((("train",), "a"), (("validation", "test"), "bcde")):
        source = opened(csv_file, content, splits=splits)
        assert [row["photo_id"] for row in boxes_of(source)] == [row["photo_id"] for row in photos_of(source)] == list(expected)
        assert {row["split"] for row in boxes_of(source)} == set(splits)


def test_without_splits_a_hash_of_the_photo_decides(csv_file):
    content = SIZED + "".join(f"{number // 2}.jpg,1,2,3,4,40,20\n" for number in range(600))
    source = opened(csv_file, content, seed=5, validation_share=0.25)
    splits = {row["photo_id"]: row["split"] for row in photos_of(source)}
    assert (len(splits), 50 < Counter(splits.values())["validation"] < 100) == (300, True)
    assert splits == dict(zip(splits, assign_splits(list(splits), 5, 0.25), strict=True))
    assert all(row["split"] == splits[row["photo_id"]] for row in boxes_of(source))
    only = opened(csv_file, seed=5, validation_share=0.25, splits=("validation",))
    assert {row["photo_id"] for row in boxes_of(only)} == {name for name, split in splits.items() if split == "validation"}


def test_a_row_that_cannot_be_read_is_counted_whatever_splits_are_built(csv_file):
    """Of no known photo, so of no known split; it may not vanish. Empty lines are no rows, and count as lines."""
    content = SIZED + "\na.jpg,1,2,3,4,40,20\n\r\n   \nb.jpg,1\n\n"
    for splits in (("train",), ("validation",)):
        rows = boxes_of(opened(csv_file, content, splits=splits))
        assert [(row["problem"], row["row"]) for row in rows if row["problem"]] == [("bad_row", 5)]
        assert "line 6" in rows[-1]["detail"]


def test_large_files_come_in_batches(csv_file, monkeypatch):
    monkeypatch.setattr("pipelines.annotations.source.BATCH_ROWS", 10)
    source = opened(csv_file, SIZED + "a.jpg,1,2,3,4,40,20\n" * 25, validation_share=0.0)
    assert [len(batch) for batch in source.read_boxes()] == [10, 10, 5]
    assert [row["row"] for row in boxes_of(source)] == list(range(1, 26))  # Again from the start.


# Files.


@pytest.mark.parametrize("name", ["boxes.csv", "boxes.csv.gz", "boxes.jsonl", "boxes.jsonl.gz"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_file_may_be_compressed_and_have_a_byte_order_mark(tmp_path, name, mark):
    content = mark + written(tmp_path / name, GOOD).read_bytes().replace(b"\n", b"\r\n")
    (row,) = boxes_of(opened(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content))
    assert (row["problem"], row["x_max"], row["row"]) == (None, 24 / 40, 1)


BARE = json.dumps({key: value for key, value in GOOD.items() if key != "label"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("boxes.csv", "\n\n", "empty"),
        ("boxes.csv", f"{HEADER}\n" + ",,,,\n" * 7, "all cells of 7 rows are empty"),
        ("boxes.jsonl", '{"photo": null, "x_min": ""}\n' * 7, "all cells of 7 rows are empty"),
        ("boxes.csv", "a.jpg,10,20,30,40\n", "line 1: .*column photo, x_min, y_min, x_max, y_max is missing"),
        ("boxes.csv", HEADER.replace(",", ";") + "\na.jpg;1;2;3;4\n", "divided by commas"),
        ("boxes.csv", f"{HEADER},zzz,lable\n", "no column is called 'zzz', 'lable'"),
        ("boxes.csv", f"{HEADER},photo\n", "photo, photo all mean `photo`"),
        ("boxes.csv", f"{HEADER},filename\n", "photo, filename all mean `photo`"),
        ("boxes.csv", "photo,x_min,y_min\n", "column x_max, y_max is missing"),
        ("boxes.csv", "image_id,xmin,ymin,xmax,ymax\n", "'image_id'.*column photo is missing"),
        ("boxes.csv", "photo,x,y,width,height\n", "'x', 'y'.* is missing.*docs/own-data.md"),
        ("boxes.csv", f"{HEADER}\n".encode("utf-16"), "UTF-16"),
        ("boxes.csv", bytes(100), "no UTF-8 text"),
        ("boxes.csv", f"{HEADER},caf\xe9\n".encode("latin-1"), "no header of a CSV in UTF-8"),
        ("boxes.csv", f'{HEADER},"label\n', "no header of a CSV in UTF-8"),
        ("boxes.jsonl", json.dumps([GOOD]), "line 1: no JSON object"),
        ("boxes.jsonl", HEADER, "line 1: not JSON"),
        ("boxes.jsonl", json.dumps({**GOOD, "lable": "cat"}), "line 1: no column is called 'lable'"),
        ("boxes.jsonl", json.dumps({"photo": "a.jpg", "x_min": 3}), "column y_min, x_max, y_max is missing"),
        # What decides about all lines may not come late: those above would be `object`s, or divided by a hash.
        *[("boxes.jsonl", f"{BARE}\n" * 1000 + json.dumps({**json.loads(BARE), key: "train"}), f"line 1001: .*{says}")
          for key, says in (("label", "first `label`"), ("split", "first `split`"), ("ulr", "'ulr'"))],
        ("boxes.json", "{}", "must end in .*source.kind: coco"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_ours_is_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        photos_of(opened(tmp_path / name, content))
    assert str(caught.value).startswith(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)


def test_no_file_is_no_source(tmp_path):
    for path, message in ((tmp_path / "boxes.csv", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=message):
            opened(path)


@pytest.mark.parametrize("name", ["boxes.csv", "boxes.jsonl", "boxes.csv.gz"])
def test_half_a_file_is_not_a_smaller_one(tmp_path, name):
    """One that ends in the middle of a line; a gzip, wherever it ends."""
    data = written(tmp_path / name, *[{**GOOD, "photo": f"{number:x}.jpg"} for number in range(400)]).read_bytes()
    if name.endswith(".gz"):
        data = gzip.compress(data)
        for wrong in (data[:15], b"no gzip"):
            with pytest.raises(InputError, match="damaged or cut off"):
                opened(tmp_path / name, wrong)
    source = opened(tmp_path / name, data)
    assert len(boxes_of(source)) == 400
    (tmp_path / name).write_bytes(data[:-9] if ".gz" not in name else data[: len(data) // 2])
    for read in (boxes_of, photos_of):
        with pytest.raises(InputError, match=r"line \d+: .*cut off"):
            read(source)


def test_the_unit_is_compared_with_the_first_rows(csv_file):
    """A share of the rows has 2 for its largest coordinate, which may be mistakes of single rows."""

    def rows(share: float, count: int) -> str:
        return f"{HEADER}\n" + "".join(f"a.jpg,0.1,0.2,{2 if row < share * count else 0.5},0.9\n" for row in range(count))

    with pytest.raises(InputError, match=r"501 have .*set source.unit: pixel"):
        opened(csv_file, rows(0.501, 1000) + "a.jpg,0.1,0.2,0.3,0.4\n" * 5000, unit="fraction")
    with pytest.raises(InputError, match=r"none has .*set source.unit: fraction"):
        opened(csv_file, rows(0, 20))
    for share, count, unit in ((0.5, 1000, "fraction"), (0.05, 20, "pixel")):
        opened(csv_file, rows(share, count), unit=unit)


# The page for strangers.

PAGE = (REPOSITORY / "docs" / "own-data.md").read_text()
# Of each language the first.
EXAMPLES = dict(reversed(re.findall(r"```(csv|json|yaml|python)\n(.*?)```", PAGE, re.DOTALL)))


def test_the_examples_of_the_page_can_be_read(tmp_path):
    for name in ("cats/IMG 1.jpg", "dogs/rex.png"):
        save_photo(tmp_path / name, size=(640, 480))
    for name, content in (("boxes.csv", EXAMPLES["csv"]), ("boxes.jsonl", EXAMPLES["json"])):
        rows = boxes_of(opened(tmp_path / name, content, validation_share=0.0))
        assert {row["problem"] for row in rows} == {None}
        assert {row["label"] for row in rows} >= {"cat", "dog"}
    header = re.search("^split,photo,.*,,$", PAGE, re.MULTILINE)[0]  # AutoML's: columns without a name are not read.
    (box,) = boxes_of(opened(tmp_path / "boxes.csv", f"{header}\nTRAIN,a.jpg,cat,0.1,0.2,,,0.3,0.4,,\n", unit="fraction"))
    assert [round(box[name], 6) for name in CORNERS] == [0.1, 0.2, 0.3, 0.4]


def test_the_settings_of_the_page_are_settings(tmp_path):
    (tmp_path / "own.yaml").write_text(EXAMPLES["yaml"])
    source = load_settings(BuildSettings, "build", ["--config", str(tmp_path / "own.yaml")]).source
    options, same, *others = re.findall(r"--source.kind boxes[^`]*?(?=--out)", PAGE)
    assert options == same
    for more in others:
        load_settings(BuildSettings, "build", ["--config", "none", "--out", "x", *shlex.split(more.replace("\\\n", " "))])
    words = [*options.replace("\\\n", " ").split(), "--out", "DATASET"]
    assert load_settings(BuildSettings, "build", words, preset("open_images")).source == source


def test_the_names_of_the_page_are_read():
    table = re.findall(r"^\| (`[^|]*) \|[^|]*\| ([^|]*) \|$", PAGE, re.MULTILINE)
    others = [(name, ours) for ours, names in table for name in re.findall(r"\w+", names.replace("and so for y", ""))]
    assert {"image_path", "x0", "bottom", "class_name", "license"} <= {name for name, _ in others}
    for name, ours in others:
        (column, *_) = own_lines.columns_of((name, "x0", "y0") if name in ("x0", "y0") else (name,)).columns
        assert f"`{column}`" in ours, name


def test_the_script_of_the_page_turns_corners_and_sizes_into_edges(tmp_path, monkeypatch, csv_file):
    old = tmp_path / "old.csv"
    old.write_text('photo,x,y,width,height,label\na.jpg,10,20,5,2.5,"cat, big"\n')
    monkeypatch.setattr("sys.argv", ["edges.py", str(old), str(csv_file)])
    exec(EXAMPLES["python"], {})
    assert csv_file.read_text().splitlines() == [f"{HEADER},label", 'a.jpg,10.0,20.0,15.0,22.5,"cat, big"']
