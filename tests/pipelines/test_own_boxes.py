import codecs
import gzip
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images import decode as decode_module
from pbe_core.settings import REPOSITORY, load_settings, preset
from pipelines.annotations.own_boxes import open_boxes
from pipelines.annotations.own_table import CORNERS, columns_of
from pipelines.annotations.source import Source, assign_splits, photo_id_of
from pipelines.config import BuildSettings, SourceSettings
from schemas.tables import BOXES, PHOTOS

HEADER = "photo,x_min,y_min,x_max,y_max"
SIZED = f"{HEADER},width,height\n"
COORDINATES = ("x_min", "x_max", "y_min", "y_max")
GOOD = {"photo": "a.jpg", "x_min": 10, "y_min": 5, "x_max": 30, "y_max": 15}


def opened(path: Path, content: str | bytes | None = None, unit: str = "pixel", seed: int = 0, **settings: Any) -> Source:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_boxes(
        SourceSettings(**{"kind": "boxes", "annotations": path, "photos": path.parent, "unit": unit, **settings}), seed
    )


def boxes_of(source: Source) -> list[dict[str, Any]]:
    return pa.Table.from_batches(source.read_boxes(), schema=BOXES).to_pylist()


def photos_of(source: Source) -> list[dict[str, Any]]:
    return pa.Table.from_batches(source.read_photos(), schema=PHOTOS).to_pylist()


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


def test_columns_are_found_by_name_and_px_become_fractions(csv_file):
    """In any order; what the file does not say is unknown, not 0."""
    source = opened(csv_file, "height,width,label,y_max,x_max,y_min,x_min,photo\n20,40,cat,15,24,5,4,cats/1.jpg\n")
    (row,) = boxes_of(source)
    assert [row[name] for name in COORDINATES] == [0.1, 0.6, 0.25, 0.75]
    assert (row["label"], row["file"], row["row"], row["problem"]) == ("cat", "boxes.csv", 1, None)
    assert {row[name] for name in row if name.startswith("is_")} == {-1}
    (photo,) = photos_of(source)
    assert (photo["file_name"], photo["width"], photo["height"], photo["photo_id"]) == ("cats/1.jpg", 40, 20, row["photo_id"])
    assert source.class_names == {}
    assert source.files == (csv_file,)
    assert source.rows == pytest.approx(1, abs=1)


def test_both_formats_say_the_same(csv_file, jsonl_file):
    more = {"width": 40, "height": 20, "url": "http://u", "author": "Ann, Ben", "licence": "http://l"}
    rows = [
        {"photo": "a.jpg", "x_min": 1, "y_min": 2.5, "x_max": 30, "y_max": 20, "label": "dog", "split": "train", **more},
        {"photo": "b/c.jpg", "x_min": 0, "y_min": 0, "x_max": 9, "y_max": 9, "label": "3", "split": "validation", **more},
    ]
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    by_csv = opened(csv_file, "\n".join(lines))
    by_json = opened(jsonl_file, "\n".join(json.dumps(row) for row in [rows[0], {**rows[1], "label": 3}]))
    as_csv = [{**row, "file": "boxes.csv"} for row in boxes_of(by_json)]
    assert as_csv == boxes_of(by_csv)
    assert photos_of(by_json) == photos_of(by_csv)
    assert photos_of(by_csv)[1] | {**more, "split": "validation", "file_name": "b/c.jpg"} == photos_of(by_csv)[1]
    assert as_csv[1]["label"] == "3"


@pytest.mark.parametrize(("frame", "size"), [("stored", (40, 20)), ("exif", (20, 40))])
def test_px_are_divided_by_the_photos_size_in_the_frame_of_the_boxes(csv_file, frame, size):
    """EXIF turns this photo by a quarter: viewers show 20 x 40 px."""
    save_photo(csv_file.parent / "cats" / "IMG 1.jpg", orientation=6)
    source = opened(csv_file, f"{HEADER}\ncats/IMG 1.jpg,0,0,10,10\n", frame=frame)
    (row,), (photo,) = boxes_of(source), photos_of(source)
    assert (row["x_max"], row["y_max"]) == (10 / size[0], 10 / size[1])
    assert (photo["width"], photo["height"]) == size
    assert source.frame == frame


def test_a_photos_header_is_read_once(csv_file, monkeypatch):
    save_photo(csv_file.parent / "a.jpg")
    source = opened(csv_file, f"{HEADER}\n" + "a.jpg,0,0,10,10\nnone.jpg,0,0,10,10\n" * 50)
    asked = []
    size = decode_module._size
    monkeypatch.setattr(decode_module, "_size", lambda *arguments: asked.append(1) or size(*arguments))
    boxes_of(source)
    photos_of(source)
    assert len(asked) == 1


def test_a_px_beyond_the_edge_is_rounding_and_more_is_not(csv_file):
    rows = boxes_of(opened(csv_file, SIZED + "a.jpg,-1,-0.5,41,20.5,40,20\na.jpg,-1.5,0,10,21.5,40,20\n"))
    assert [rows[0][name] for name in COORDINATES] == [0, 1, 0, 1]
    assert (rows[1]["x_min"], rows[1]["y_max"]) == (-1.5 / 40, 21.5 / 20)


def test_fractions_may_overshoot_by_a_px_or_by_rounding(csv_file):
    sized = boxes_of(opened(csv_file, SIZED + "a.jpg,-0.02,0,1.02,1.06,40,20\n", unit="fraction"))[0]
    assert [sized[name] for name in COORDINATES] == [0, 1, 0, 1.06]
    bare = boxes_of(opened(csv_file, f"{HEADER}\na.jpg,-0.0001,0,1.00005,1.001\n", unit="fraction"))[0]
    assert [bare[name] for name in COORDINATES] == [0, 1, 0, 1.001]


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
        ("a.jpg,1,2,3,4,cat,train,40,wide", "bad_row", "column height: 'wide'"),
        ("a.jpg,1,2,3,4,cat,train,40,", "bad_row", "only one is there"),
        ("a.jpg,x,2,3,4,cat,train,40,20", "bad_number", "column x_min: 'x'"),
        ('a.jpg,1,"2,5",3,4,cat,train,40,20', "bad_number", "column y_min: '2,5' .*decimal point"),
        ("a.jpg,1,2,nan,4,cat,train,40,20", "bad_number", "column x_max: 'nan'"),
        ("a.jpg,1,2,3,inf,cat,train,40,20", "bad_number", "column y_max: 'inf'"),
        ("a.jpg,1,2,3,1_0,cat,train,40,20", "bad_number", "column y_max: '1_0'"),
        ("a.jpg,1,,3,4,cat,train,40,20", "bad_number", "column y_min: is empty"),
        ("a.jpg,1,2,50,4,cat,train,40,20", "outside_photo", "column x_max: 50, and the photo is 40 px"),
        ("a.jpg,3,2,1,4,cat,train,40,20", "empty_box", "column x_max: 1, not more"),
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
        ('{"photo": "a.jpg", "split": "train"}', "bad_number", "column x_min: is empty"),
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


def test_empty_lines_are_no_rows_and_keep_the_count_of_lines(csv_file):
    rows = boxes_of(opened(csv_file, SIZED + "\na.jpg,1,2,3,4,40,20\n\r\n   \na.jpg,x,2,3,4,40,20\n\n"))
    assert [row["row"] for row in rows] == [2, 5]
    assert "line 6" in rows[1]["detail"]


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        ("Big Cat", "Big Cat"),
        ("  cat\t", "cat"),
        ("\u00a0cat", "cat"),
        ("", None),
        (" ", None),
        ("2", "2"),
        ("2.0", "2"),  # pandas makes floats of whole numbers where a cell of their column is empty.
        ("-1.0", "-1"),
        ("2.5", "2.5"),
        ("v2.0", "v2.0"),
        ("1.0.0", "1.0.0"),
    ],
)
def test_a_label_is_its_text_without_spaces_and_a_number_without_its_zero(csv_file, jsonl_file, cell, label):
    (row,) = boxes_of(opened(csv_file, f"{HEADER},label,width,height\na.jpg,1,2,3,4,{cell},40,20\n"))
    assert (row["label"], row["problem"]) == (label, None)
    if cell.strip():
        (row,) = boxes_of(opened(jsonl_file, json.dumps({**GOOD, "label": cell, "width": 40, "height": 20})))
        assert (row["label"], row["problem"]) == (label, None)


@pytest.mark.parametrize(("value", "label"), [(2, "2"), (2.0, "2"), (2.5, "2.5"), (float("nan"), None)])
def test_a_label_of_json_may_be_a_number(jsonl_file, value, label):
    lines = [{**GOOD, "label": word, "width": 40, "height": 20} for word in ("cat", value)]
    rows = boxes_of(opened(jsonl_file, "\n".join(map(json.dumps, lines))))
    assert [(row["label"], row["problem"]) for row in rows] == [("cat", None), (label, None)]


def test_without_labels_every_box_is_an_object(csv_file):
    source = opened(csv_file, SIZED + "a.jpg,1,2,3,4,40,20\n")
    assert boxes_of(source)[0]["label"] == "object"
    assert source.class_names == {"object": "object"}


# Photos.


@pytest.mark.parametrize(
    ("name", "photo_id"),
    [
        ("000000000030.jpg", "000000000030"),
        ("a_B-9.jpg", "a_B-9"),
        ("a.png", "a-<hash>"),
        ("a.JPG", "a-<hash>"),
        ("cats/IMG 1.jpg", "cats-IMG-1-<hash>"),
        ("Müller/Straße.jpg", "Muller-Strae-<hash>"),
        ("猫.jpg", "photo-<hash>"),
        ("x" * 65 + ".jpg", "x" * 40 + "-<hash>"),
        ("a.b.jpg", "a-b-<hash>"),
    ],
)
def test_a_photos_id_can_be_read(name, photo_id):
    assert re.fullmatch(photo_id.replace("<hash>", "[0-9a-f]{8}"), photo_id_of(name))


def test_ids_stay_what_they_are():
    """They are in every dataset that was built, and split and order hang on them."""
    assert photo_id_of("cats/IMG 1.jpg") == "cats-IMG-1-85f38690"


@given(st.lists(st.text(min_size=1), min_size=2, max_size=20, unique=True))
def test_ids_can_be_ids_and_differ_where_paths_do(names):
    ids = [photo_id_of(name) for name in names]
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", photo_id) for photo_id in ids)
    assert len(set(ids)) == len(names)


def test_two_photos_of_one_id_are_not_mixed_up(csv_file):
    """A file that bears, by chance or on purpose, the very id of another one."""
    twin = f"{photo_id_of('cats/1.png')}.jpg"
    rows = boxes_of(opened(csv_file, SIZED + f"cats/1.png,1,2,3,4,40,20\n{twin},1,2,3,4,40,20\n"))
    assert [row["problem"] for row in rows] == [None, "bad_row"]
    assert "'cats/1.png' get the same id" in rows[1]["detail"]


def test_a_photo_comes_once_with_all_that_any_line_says(csv_file):
    content = f"{HEADER},width,height,url,author,licence\n./a.jpg,1,2,3,4,,,,Ann,\na.jpg,1,2,3,4,40,20,http://u,Ben,\n"
    (photo,) = photos_of(opened(csv_file, content))
    known = {"file_name": "a.jpg", "width": 40, "height": 20, "url": "http://u", "author": "Ann", "licence": None}
    assert photo | known == photo


def test_a_photo_that_cannot_be_read_is_no_photo(csv_file):
    save_photo(csv_file.parent / "a.jpg")
    source = opened(csv_file, f"{HEADER}\na.jpg,1,2,3,4\nnone.jpg,1,2,3,4\n")
    assert [photo["file_name"] for photo in photos_of(source)] == ["a.jpg"]
    with_limit = opened(csv_file, max_photo_pixels=799)
    assert "too_many_pixels" in boxes_of(with_limit)[0]["detail"]


def test_sizes_of_photos_are_not_asked_for_fractions(csv_file):
    (photo,) = photos_of(opened(csv_file, f"{HEADER}\nnone.jpg,0.1,0.2,0.3,0.4\n", unit="fraction"))
    assert (photo["width"], photo["height"]) == (None, None)


@pytest.mark.parametrize("unit", ["pixel", "fraction"])
def test_a_name_that_a_tool_wrote_elsewhere_leads_to_the_photo(tmp_path, unit):
    """Absolute here or on another machine, or from the folder above; what lies in the folder is then a part of the inputs."""
    folder = tmp_path / "images"
    for name in ("cats/1.png", "2.jpg"):
        save_photo(folder / name)
    written = [f"{folder}/cats/1.png", "D:\\set\\cats\\1.png", "cats/1.png", "images/2.jpg", "images\\2.jpg"]
    box = "0.1,0.2,0.8,0.9" if unit == "fraction" else "1,2,30,15"
    path = tmp_path / "boxes.csv"
    source = opened(path, f"{HEADER}\n" + "".join(f"{name},{box}\n" for name in written), unit, photos=folder)
    before = source.read_elsewhere()
    rows = boxes_of(source)
    assert [row["problem"] for row in rows] == [None] * 5
    assert sorted(photo["file_name"] for photo in photos_of(source)) == ["2.jpg", "cats/1.png"]
    assert len({row["photo_id"] for row in rows}) == 2
    assert any("found by their base names: 1; for example" in note for note in source.read_notes())
    (folder / "cats" / "1.png").rename(folder / "1.png")
    assert opened(path, unit=unit, photos=folder).read_elsewhere()["paths of photos"] != before["paths of photos"]


# Splits.


@pytest.mark.parametrize(
    ("word", "split"), [("TRAIN", "train"), ("Validation", "validation"), ("val", "validation"), ("valid", "validation")]
)
def test_a_split_may_be_written_in_other_ways(csv_file, word, split):
    source = opened(csv_file, f"{HEADER},split,width,height\na.jpg,1,2,3,4,{word},40,20\n")
    assert [(row["split"], row["problem"]) for row in boxes_of(source)] == [(split, None)]


def test_splits_of_the_file_are_kept(csv_file):
    names = ["train", "validation", "test"]
    path = csv_file
    content = f"{HEADER},split,width,height\n" + "".join(f"{name}.jpg,1,2,3,4,{name},40,20\n" for name in names)
    source = opened(path, content, splits=("validation", "test"))
    assert [row["split"] for row in boxes_of(source)] == [row["photo_id"] for row in boxes_of(source)] == ["validation", "test"]
    assert [row["split"] for row in photos_of(source)] == ["validation", "test"]


def test_without_splits_a_hash_of_the_photo_decides(csv_file):
    content = SIZED + "".join(f"{number // 2}.jpg,1,2,3,4,40,20\n" for number in range(1200))
    source = opened(csv_file, content, seed=5, validation_share=0.25)
    splits = {row["photo_id"]: row["split"] for row in photos_of(source)}
    assert len(splits) == 600
    assert 110 < Counter(splits.values())["validation"] < 190
    assert splits == dict(zip(splits, assign_splits(list(splits), 5, 0.25), strict=True))
    assert all(row["split"] == splits[row["photo_id"]] for row in boxes_of(source))
    only = opened(csv_file, seed=5, validation_share=0.25, splits=("validation",))
    assert {row["photo_id"] for row in boxes_of(only)} == {name for name, split in splits.items() if split == "validation"}


def test_a_row_that_cannot_be_read_is_counted_whatever_splits_are_built(csv_file):
    """Of no known photo, so of no known split; it may not vanish."""
    content = SIZED + "a.jpg,1,2,3,4,40,20\nb.jpg,1\n"
    for splits in (("train",), ("validation",)):
        rows = boxes_of(opened(csv_file, content, splits=splits))
        assert [row["problem"] for row in rows if row["problem"]] == ["bad_row"]


def test_large_files_come_in_batches(csv_file, monkeypatch):
    monkeypatch.setattr("pipelines.annotations.source.BATCH_ROWS", 10)
    source = opened(csv_file, SIZED + "a.jpg,1,2,3,4,40,20\n" * 25, validation_share=0.0)
    assert [len(batch) for batch in source.read_boxes()] == [10, 10, 5]
    assert [row["row"] for row in boxes_of(source)] == list(range(1, 26))  # Again from the start.


# Files.


@pytest.mark.parametrize("name", ["boxes.csv", "boxes.csv.gz", "boxes.jsonl", "boxes.jsonl.gz"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_file_may_be_compressed_and_have_a_byte_order_mark(tmp_path, name, mark):
    values = {"photo": "a.jpg", "x_min": 1, "y_min": 2, "x_max": 3, "y_max": 4, "width": 40, "height": 20}
    text = json.dumps(values) if "json" in name else f"{','.join(values)}\r\n{','.join(map(str, values.values()))}\r\n"
    content = mark + text.encode()
    (row,) = boxes_of(opened(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content))
    assert (row["problem"], row["x_max"], row["row"]) == (None, 3 / 40, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("boxes.csv", "", "empty"),
        ("boxes.csv", "\n\n", "empty"),
        ("boxes.csv", f"{HEADER}\n", "no row below the header"),
        ("boxes.csv", "a.jpg,10,20,30,40\n", "line 1: a header is missing"),
        ("boxes.csv", "images/a.jpg,,,,,\n", "header is missing"),
        ("boxes.csv", "TRAIN,gs://b/a.jpg,label,0.1,0.2,,,0.3,0.4,,", "header is missing"),
        ("boxes.csv", HEADER.replace(",", ";") + "\na.jpg;1;2;3;4\n", "not divided by commas"),
        ("boxes.csv", f"{HEADER},lable\n", "'lable' .did you mean `label`"),
        ("boxes.csv", f"{HEADER},zzz,cls\n", "no column is called 'zzz', 'cls'"),
        ("boxes.csv", f"{HEADER},photo\n", "photo, photo all mean `photo`"),
        ("boxes.csv", f"{HEADER},filename\n", "photo, filename all mean `photo`"),
        ("boxes.csv", "photo,x_min,y_min\n", "column x_max, y_max is missing .found: photo, x_min, y_min"),
        ("boxes.csv", "image_id,xmin,ymin,xmax,ymax\n", "'image_id'.*column photo is missing"),
        ("boxes.csv", "photo,x,y,width,height\n", "x_max.* is missing.*#boxes-of-another-form"),
        ("boxes.csv", "photo,bbox,label\n", "is missing.*#boxes-of-another-form"),
        ("boxes.csv", "ImageID,LabelName,XMin,XMax,YMin,YMax\n", "source.kind: open_images"),
        ("boxes.csv", f"{HEADER},width\n", "only one is there"),
        ("boxes.csv", f"{HEADER}\n".encode("utf-16"), "UTF-16"),
        ("boxes.csv", f"{HEADER},caf\xe9\n".encode("latin-1"), "header cannot be read"),
        ("boxes.csv", f'{HEADER},"label\n', "header cannot be read"),
        ("boxes.jsonl", json.dumps([GOOD]), "a JSON list"),
        ("boxes.jsonl", HEADER, "line 1: not JSON .*write one object"),
        ("boxes.jsonl", json.dumps({**GOOD, "lable": "cat"}), "line 1: .*'lable' .did you mean `label`"),
        ("boxes.jsonl", json.dumps({"photo": "a.jpg", "x_min": 3}), "column y_min, x_max, y_max is missing"),
        ("boxes.jsonl", json.dumps(GOOD).encode("utf-16"), "UTF-16"),
        ("boxes.json", "{}", "must end in .*source.kind: coco"),
        ("boxes.txt", f"{HEADER}\n", "must end in"),
        ("boxes.csv", f"{HEADER}\n" + ",,,,\n" * 7, "all cells of the first 7 rows are empty"),
        ("boxes.jsonl", '{"photo": null, "x_min": ""}\n' * 7, "all cells of the first 7 rows are empty"),
        ("boxes.csv", bytes(100), "zero bytes"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        opened(tmp_path / name, content)
    assert str(caught.value).startswith(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "message"), [("label", "first `label`"), ("split", "first `split`"), ("ulr", "mean `url`")])
def test_a_key_that_decides_about_all_lines_or_is_none_may_not_come_late(jsonl_file, key, message):
    """The lines above would be `object`s, or divided by a hash."""
    source = opened(jsonl_file, "\n".join([json.dumps(GOOD)] * 1000 + [json.dumps({**GOOD, key: "train"})]))
    with pytest.raises(InputError, match=f"line 1001: .*{message}"):
        photos_of(source)


def test_no_file_is_no_source(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        opened(tmp_path / "boxes.csv")
    with pytest.raises(InputError, match="a folder"):
        opened(tmp_path)


def test_a_gzip_that_is_cut_off_is_refused(tmp_path):
    """At once where its beginning is missing, else where it ends: half a file is not a smaller one."""
    path = tmp_path / "boxes.csv.gz"
    text = SIZED + "".join(f"{number}.jpg,1,2,{3 + number % 30},4,40,20\n" for number in range(4000))
    packed = gzip.compress(text.encode())
    for wrong in (packed[:15], b"no gzip"):
        with pytest.raises(InputError, match="damaged or cut off"):
            opened(path, wrong)
    source = opened(path, packed[: len(packed) // 2])
    for read in (source.read_boxes, source.read_photos):
        with pytest.raises(InputError, match=r"boxes.csv.gz, after line \d+: .*cut off"):
            list(read())


# Names of columns.

PLAIN = [{"photo": "a.jpg", "x_min": 10, "y_min": 5, "x_max": 30, "y_max": 15, "label": "cat", "width": 40, "height": 20}]


def renamed(path: Path, names: dict[str, str], unread: dict[str, Any] | None = None) -> Source:
    """The same row under other names."""
    row = {**(unread or {}), **{names.get(name, name): value for name, value in PLAIN[0].items() if names.get(name) != "-"}}
    lines = [",".join(row), ",".join(map(str, row.values()))] if path.suffix == ".csv" else [json.dumps(row)]
    return opened(path, "\n".join(lines), photos=path.parent)


VOTT = {"photo": "image", "x_min": "xmin", "y_min": "ymin", "x_max": "xmax", "y_max": "ymax"}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (VOTT, "read image as photo, xmin as x_min, ymin as y_min, xmax as x_max, ymax as y_max"),
        ({**VOTT, "photo": "filename", "label": "class"}, "read filename as photo, .*, class as label"),
        (
            {"photo": "path", "x_min": "x1", "y_min": "y1", "x_max": "x2", "y_max": "y2", "label": "class_name"},
            "read path as photo, x1 as x_min, y1 as",
        ),
        ({"x_min": "x0", "y_min": "y0", "x_max": "x1", "y_max": "y1"}, "read x0 as x_min, y0 as y_min, x1 as x_max, y1 as y_max"),
        ({"photo": "Image Path", "x_min": "XMin", "x_max": "X-Max", "label": "Category"}, "read Image Path as photo"),
        (
            {"photo": "img", "x_min": "left", "y_min": "top", "x_max": "right", "y_max": "bottom", "label": "-"},
            "read img as photo, left as x_min",
        ),
    ],
)
def test_common_names_of_columns_are_read_and_said(tmp_path, suffix, names, said):
    plain = renamed(tmp_path / f"boxes.{suffix}", {})
    expected = boxes_of(plain), photos_of(plain)
    assert plain.notes == ()
    source = renamed(tmp_path / f"boxes.{suffix}", names)
    if "label" in names.values() or names.get("label") == "-":
        expected = [{**row, "label": "object"} for row in expected[0]], expected[1]
    assert (boxes_of(source), photos_of(source)) == expected
    (note,) = source.notes
    assert re.match(rf"{source.name}: {said}", note)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_columns_that_say_nothing_of_a_box_are_left_out_and_said(tmp_path, suffix):
    """Pandas' row numbers, numbers of images and classes beside their names."""
    unread = {"": 0, "Unnamed: 0.1": 0, "id": 7, "image_id": 3, "class_id": 2, "area": 200, "iscrowd": 0, "confidence": 0.9}
    source = renamed(tmp_path / f"boxes.{suffix}", {}, unread)
    assert [row["label"] for row in boxes_of(source)] == ["cat"]
    left = "a column without a name, Unnamed: 0.1, id, image_id, class_id, area, iscrowd, confidence"
    assert source.notes == (f"{source.name}: not read: {left}",)


FOUR_CORNERS = "split,photo,label,x_min,y_min,,,x_max,y_max,,"


def test_a_table_of_four_corners_is_read_under_the_header_of_the_page(csv_file):
    """AutoML's: columns without a name are not read."""
    (box,) = boxes_of(opened(csv_file, f"{FOUR_CORNERS}\nTRAIN,a.jpg,cat,0.1,0.2,,,0.3,0.4,,\n", unit="fraction"))
    assert [round(box[name], 6) for name in ("x_min", "y_min", "x_max", "y_max")] == [0.1, 0.2, 0.3, 0.4]


# The unit.


def rows_beyond(share: float, rows: int) -> str:
    """Rows of fractions, but for a share of them whose largest coordinate is 2."""
    return f"{HEADER}\n" + "".join(f"a.jpg,0.1,0.2,{2 if row < share * rows else 0.5},0.9\n" for row in range(rows))


def test_px_that_are_declared_to_be_fractions_are_found_out(csv_file):
    with pytest.raises(InputError, match=r"501 have .*set source.unit: pixel"):
        opened(csv_file, rows_beyond(0.501, 1000) + "a.jpg,0.1,0.2,0.3,0.4\n" * 5000, unit="fraction")
    opened(csv_file, rows_beyond(0.5, 1000), unit="fraction")  # These may be mistakes of single rows.


def test_fractions_that_are_declared_to_be_px_are_found_out(csv_file):
    with pytest.raises(InputError, match=r"none has .*set source.unit: fraction"):
        opened(csv_file, rows_beyond(0, 20))
    opened(csv_file, rows_beyond(0.05, 20))


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=5), st.integers(2, 500), st.integers(2, 500))
def test_px_and_fractions_of_the_same_boxes_agree(boxes, width, height):
    """Whatever the sizes: what is read from px is what is read from fractions, to rounding."""
    values = [dict(zip(CORNERS, box, strict=True)) for box in boxes]
    scale = dict(zip(CORNERS, (width, height, width, height), strict=True))
    in_px = [{name: value[name] * scale[name] for name in CORNERS} for value in values]
    read = {}
    with tempfile.TemporaryDirectory() as folder:
        for unit, rows in (("fraction", values), ("pixel", [*in_px, dict(scale)])):
            lines = [json.dumps({"photo": "a.jpg", "width": width, "height": height, **row}) for row in rows]
            read[unit] = boxes_of(opened(Path(folder) / f"{unit}.jsonl", "\n".join(lines), unit=unit))
    for fraction, px in zip(read["fraction"], read["pixel"][: len(values)], strict=True):
        assert [px[name] for name in COORDINATES] == pytest.approx([fraction[name] for name in COORDINATES])


# The page for strangers.

PAGE = (REPOSITORY / "docs" / "own-data.md").read_text()
EXAMPLES = dict(re.findall(r"```(csv|json|yaml|python)\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_the_examples_of_the_page_can_be_read(tmp_path, kind):
    save_photo(tmp_path / "cats" / "IMG 1.jpg", size=(640, 480))
    save_photo(tmp_path / "dogs" / "rex.png", size=(640, 480))
    rows = boxes_of(opened(tmp_path / f"boxes.{kind.replace('json', 'jsonl')}", EXAMPLES[kind], validation_share=0.0))
    assert {row["problem"] for row in rows} == {None}
    assert {row["label"] for row in rows} >= {"cat", "dog"}


def test_the_settings_of_the_page_are_settings(tmp_path):
    (tmp_path / "own.yaml").write_text(EXAMPLES["yaml"])
    written = load_settings(BuildSettings, "build", ["--config", str(tmp_path / "own.yaml")]).source
    (options,) = set(re.findall(r"--source.kind boxes[^`]*?(?=--out)", PAGE))
    words = [*options.replace("\\\n", " ").split(), "--out", "DATASET"]
    assert load_settings(BuildSettings, "build", words, preset("open_images")).source == written


def test_the_names_of_the_page_are_read():
    table = re.findall(r"^\| (`[^|]*) \|[^|]*\| ([^|]*) \|$", PAGE, re.MULTILINE)
    others = [(name, ours) for ours, names in table for name in re.findall(r"\w+", names.replace("and so for y", ""))]
    assert {"image_path", "x0", "bottom", "class_name", "license"} <= {name for name, _ in others}
    for name, ours in others:
        (column, *_) = columns_of((name, "x0", "y0") if name in ("x0", "y0") else (name,)).columns
        assert f"`{column}`" in ours, name


def test_the_script_of_the_page_turns_corners_and_sizes_into_edges(tmp_path, monkeypatch, csv_file):
    old = tmp_path / "old.csv"
    old.write_text('photo,x,y,width,height,label\na.jpg,10,20,5,2.5,"cat, big"\n')
    monkeypatch.setattr("sys.argv", ["edges.py", str(old), str(csv_file)])
    exec(EXAMPLES["python"], {})
    assert csv_file.read_text().splitlines() == [f"{HEADER},label", 'a.jpg,10.0,20.0,15.0,22.5,"cat, big"']


@pytest.mark.parametrize("name", ["boxes.csv", "boxes.jsonl"])
def test_a_file_that_ends_in_the_middle_of_a_line_is_one_that_was_cut_off(tmp_path, name):
    line = {"photo": "a.jpg", "x_min": 1, "y_min": 2, "x_max": 30, "y_max": 15}
    rows = (
        [",".join(line), *(",".join(map(str, line.values())) for _ in range(3))]
        if name.endswith("csv")
        else [json.dumps(line)] * 4
    )
    text = "\n".join(rows)
    assert len(boxes_of(opened(tmp_path / name, text + "\n"))) == len(boxes_of(opened(tmp_path / name, text)))
    with pytest.raises(InputError, match=r"line 4: .*cut off"):
        boxes_of(opened(tmp_path / name, text[:-9]))
