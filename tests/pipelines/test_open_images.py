"""Open Images' files as they are published, as they are damaged, and in any order or packing."""

import csv
import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.annotations import csv_files, open_images
from pipelines.config import BuildSettings, SelectionSettings, SourceSettings
from pipelines.selection.objects import select_objects
from schemas.errors import InputError
from schemas.tables import BOXES, PHOTOS

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
ROW = "0001eeaf4aed83f9,xclick,/m/0cmf2,1,0.022673031,0.9642005,0.07103825,0.80054647,0,-1,1,0,0\n"
IN_PIXELS = HEADER + ROW.replace("0.9642005", "987.2") * 3 + ROW
METADATA = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,"
    "OriginalSize,OriginalMD5,Thumbnail300KURL,Rotation\n"
)


def read(path: Path) -> list[dict]:
    return pa.Table.from_batches(open_images.read_boxes(path, "train"), schema=BOXES).to_pylist()


def read_metadata(path: Path) -> list[dict]:
    return pa.Table.from_batches(open_images.read_photos(path, "train"), schema=PHOTOS).to_pylist()


def open_folder(folder: Path, *splits: str) -> open_images.Source:
    return open_images.open_open_images(SourceSettings(annotations=folder, photos=folder, splits=splits or ("train",)))


@pytest.fixture
def boxes_file(tmp_path) -> Path:
    path = tmp_path / "train-annotations-bbox.csv"
    path.write_text(HEADER + ROW)
    return path


def test_a_published_row_is_read_as_it_stands(boxes_file):
    """The order in the file is XMin, XMax, YMin, YMax, and a flag of -1 stays -1."""
    (row,) = read(boxes_file)
    assert (row["x_min"], row["x_max"], row["y_min"], row["y_max"]) == (0.022673031, 0.9642005, 0.07103825, 0.80054647)
    assert (row["is_occluded"], row["is_truncated"], row["is_group_of"]) == (0, -1, 1)
    assert (row["photo_id"], row["label"], row["row"]) == ("0001eeaf4aed83f9", "/m/0cmf2", 1)
    assert (row["split"], row["file"], row["problem"]) == ("train", "train-annotations-bbox.csv", None)


def test_columns_are_found_by_name(boxes_file):
    """The train file of V6 has eight more columns; another order, a byte order mark and quotes do not matter either."""
    plain = read(boxes_file)
    names, values = HEADER.strip().split(","), ROW.strip().split(",")
    pairs = [*zip(names, values, strict=True), *((f"XClick{number}X", "0.5") for number in range(1, 9))]
    random.Random(0).shuffle(pairs)
    text = ",".join(f'"{name}"' for name, _ in pairs) + "\n" + ",".join(value for _, value in pairs) + "\n"
    text = text.replace(",", " , ", 3)
    boxes_file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(boxes_file) == plain
    assert [row["row"] for batch in open_folder(boxes_file.parent).read_boxes() for row in batch.to_pylist()] == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER.replace(",XMax", "") + ROW, "line 1: column XMax is missing"),
        (ROW + ROW, "the line of column names seems to be missing"),
        ("photo,x_min\na,1\n", "expected Open Images' box CSV with at least ImageID"),
        ("", "the first line is empty"),
        (HEADER, "no row can be read below the header"),
        (HEADER.encode("utf-16"), "this file is UTF-16; save it as UTF-8"),
        (b"\x89PNG\xff\xfe\x00", "no UTF-8 text; is it really a CSV"),
        (IN_PIXELS, "line 2: XMax is 987.2, not.*seems to be in pixels.*source.unit: pixel"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_stops_before_any_work(content, message, boxes_file):
    boxes_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        open_folder(boxes_file.parent)
    assert str(boxes_file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_that_are_all_unknown_say_that_the_files_do_not_belong_together(boxes_file):
    (boxes_file.parent / "class-descriptions-boxable.csv").write_text("/m/1,Disc\n/m/2,Ring\n")
    with pytest.raises(InputError, match=r"line 2: LabelName is /m/0cmf2.*class-descriptions-boxable\.csv: the two files do not"):
        open_folder(boxes_file.parent)


DAMAGED = (
    ROW
    + ROW.replace("0.9642005", "wide")
    + "0002,xclick,/m/y,1,0.1\n"
    + ",,,,,,,,,,,,\n"
    + ROW.replace(",0,-1,", ",300,-1,")
    + ROW.replace(",0,-1,", ",no,-1,")
    + ROW
)


@pytest.mark.parametrize("block", [None, 300])
def test_what_is_wrong_with_a_row_is_told_of_that_row_alone(boxes_file, block, monkeypatch):
    """Whether the row stands in the first block that is read or in a later one."""
    if block:
        monkeypatch.setattr(csv_files, "_BLOCK_BYTES", block)
    boxes_file.write_bytes((HEADER + ROW * 20 + DAMAGED).encode() + ROW.encode().replace(b"/m/0cmf2", b"/m/\xff"))
    rows = {row["row"]: row for row in read(boxes_file)}
    assert sorted(rows) == list(range(1, 29))
    found = {number - 20: (row["problem"], row["detail"]) for number, row in rows.items() if row["problem"]}
    assert found == {
        2: ("bad_number", "XMax is 'wide', not a number"),
        3: ("bad_row", "5 cells, the header has 13"),
        5: ("bad_flag", "IsOccluded is 300, expected 1, 0 or -1"),
        6: ("bad_flag", "IsOccluded is 'no', not a number"),
        8: ("bad_row", "LabelName is no UTF-8 text"),
    }
    assert rows[24]["x_min"] is None
    assert rows[22]["x_min"] == rows[21]["x_min"] == 0.022673031
    assert rows[22]["x_max"] is None


def test_a_stray_quote_swallows_no_row(boxes_file):
    """Quotes around cells are taken off; one alone is a part of its cell, and the lines behind it stay rows of their own."""
    for rows in (20, 20000):
        lines = [ROW] * rows
        lines[rows // 3] = ROW.replace("/m/0cmf2", '"/m/0cmf2')
        lines[rows // 2] = ROW.replace("/m/0cmf2", '"/m/0cmf2"').replace("0001eeaf4aed83f9", '"0001eeaf4aed83f9"')
        boxes_file.write_text(HEADER + "".join(lines))
        found = read(boxes_file)
        assert [row["row"] for row in found] == list(range(1, rows + 1))
        assert {row["label"] for row in found} == {"/m/0cmf2"}
        assert {row["photo_id"] for row in found} == {"0001eeaf4aed83f9"}
        boxes_file.write_text(HEADER + "".join(lines) + ROW.replace("0.9642005", "wide"))
        assert [row["row"] for row in read(boxes_file)] == list(range(1, rows + 2))


def test_a_second_table_below_the_first_costs_its_own_rows(boxes_file):
    """Whole blocks of nothing but broken rows."""
    boxes_file.write_text(HEADER + ROW * 20 + "x,y,z\n" * 400_000 + ROW)
    found = read(boxes_file)
    assert len(found) == 400_021
    assert sum(row["problem"] == "bad_row" for row in found) == 400_000
    assert max(row["row"] for row in found if row["problem"] is None) == 400_021


def test_how_many_rows_a_gzip_has_is_guessed_from_all_its_members(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(b"".join(gzip.compress((ROW * 100).encode()) for _ in range(50)))
    assert 4500 < csv_files.count_rows(path) < 5500
    data = bytearray(path.read_bytes())
    data[500:600] = b"\xff" * 100
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        csv_files.count_rows(path)


def test_a_row_that_ends_the_file_in_its_middle_is_a_file_that_was_cut_off(boxes_file):
    boxes_file.write_text(HEADER + ROW + ROW[:40])
    with pytest.raises(InputError, match=r"line 3: 5 cells, the header has 13, and the file ends there.*cut off"):
        read(boxes_file)
    boxes_file.write_text(HEADER + ROW + ROW[:40] + "\n")
    assert [row["problem"] for row in read(boxes_file)] == [None, "bad_row"]


def test_a_cut_row_is_noticed_in_a_block_of_its_own(boxes_file, monkeypatch):
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 300)
    boxes_file.write_text(HEADER + ROW * 9 + "x,y\n" * 200 + "x," * 4)
    with pytest.raises(InputError, match=r"line 211: 5 cells, the header has 13, and the file ends there.*cut off"):
        read(boxes_file)
    boxes_file.write_text(HEADER + ROW * 9 + "x,y\n" * 200 + ROW.strip())
    assert len(read(boxes_file)) == 210


def test_a_gzip_that_is_cut_off_stops(boxes_file):
    draw = random.Random(0)
    rows = "".join(ROW.replace("0001eeaf4aed83f9", f"{draw.getrandbits(64):016x}") for _ in range(20000))
    whole = gzip.compress((HEADER + rows).encode())
    path = boxes_file.with_name("train-annotations-bbox.csv.gz")
    boxes_file.unlink()
    path.write_bytes(whole)
    assert len(read(path)) == 20000
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"train-annotations-bbox\.csv\.gz, after line \d+: the file is cut off"):
        read(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        open_images.box_files(tmp_path / "nowhere", ["train"])
    with pytest.raises(InputError, match=r"test-annotations-bbox.csv: no such file"):
        open_images.box_files(tmp_path, ["test"])


def test_published_names_are_found_gzipped_and_in_parts(tmp_path):
    for name in (
        "oidv6-train-annotations-bbox.csv",
        "validation-annotations-bbox-00000.csv.gz",
        "validation-annotations-bbox-00001.csv.gz",
    ):
        (tmp_path / name).touch()
    (tmp_path / "validation-annotations-bbox.txt").touch()
    found = open_images.box_files(tmp_path, ["train", "validation"])
    assert [path.name for path in found["train"]] == ["oidv6-train-annotations-bbox.csv"]
    assert [path.name for path in found["validation"]] == [f"validation-annotations-bbox-0000{part}.csv.gz" for part in (0, 1)]


@pytest.mark.parametrize("second", ["oidv6-train-annotations-bbox.csv", "train-annotations-bbox.csv.gz"])
def test_boxes_that_are_there_twice_are_not_counted_twice(boxes_file, second):
    (boxes_file.parent / second).write_text("x")
    with pytest.raises(InputError, match="move"):
        open_images.box_files(boxes_file.parent, ["train"])


def test_metadata_is_read_with_what_it_says_of_each_photo(tmp_path):
    path = tmp_path / "train-images-boxable-with-rotation.csv"
    with path.open("w", newline="") as file:
        file.write(METADATA)
        writer = csv.writer(file)
        writer.writerow(
            ["a", "train", "https://x/a", "", "cc", "", "Ada, Countess", 'a "title"\nin two lines', 12, "md==", "", "90.0"]
        )
        writer.writerow(["b", "train", "", "", "", "", "NA", "", "", "", "", ""])
        writer.writerow(["c", "train", "u", "", "cc", "", "null", "t", 13, "x", "", "nan"])
    first, second, third = read_metadata(path)
    known = {"url": "https://x/a", "author": "Ada, Countess", "licence": "cc", "rotation": 90}
    assert {name: first[name] for name in known} == known
    assert (first["original_md5"], first["original_bytes"], first["split"]) == ("md==", 12, "train")
    assert (second["url"], second["author"], second["rotation"], second["original_bytes"]) == (None, "NA", None, None)
    assert (third["author"], third["rotation"]) == ("null", None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,train,u,,cc,,A,t,12,md,,45", "row 1: Rotation is 45, none of 0, 90, 180, 270"),
        ("a,train,u,,cc,,A,t,12,md,,upright", "row 1: Rotation is 'upright', not a number"),
        ("a,train,u", "row 1: 3 cells"),
        ("a,train,u,,cc,,A,t,12.5,md,,0", "row 1: OriginalSize is 12.5, not a number of bytes"),
        ("a,train,u,,cc,,A,t,1e30,md,,0", "row 1: OriginalSize is 1e[+]30"),
    ],
)
def test_metadata_that_cannot_be_trusted_stops(row, message, tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(METADATA + row + "\n")
    with pytest.raises(InputError, match=message):
        read_metadata(path)


def test_metadata_of_old_mirrors_has_four_columns(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("ImageID,OriginalURL,License,Author\na,u,cc,NA\n")
    (row,) = read_metadata(path)
    assert (row["url"], row["author"], row["rotation"], row["original_md5"]) == ("u", "NA", None, None)
    path.write_text("ImageID,OriginalURL,License,Author\n")
    assert read_metadata(path) == []


def test_class_names_are_read_with_and_without_a_header(tmp_path):
    path = tmp_path / "class-descriptions-boxable.csv"
    path.write_text('LabelName,DisplayName\n/m/1,Disc\n/m/2,"Ring, blue"\n')
    assert open_images.read_class_names(path) == {"/m/1": "Disc", "/m/2": "Ring, blue"}
    path.write_text("/m/1,Disc\n/m/2,Ring, blue\n")
    with pytest.raises(InputError, match=r"class-descriptions-boxable\.csv, line 2: 3 cells, expected 2"):
        open_images.read_class_names(path)
    path.write_bytes("/m/1,Disc\n/m/2,Ré\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 text"):
        open_images.read_class_names(path)
    packed = path.with_suffix(".csv.gz")
    packed.write_bytes(gzip.compress(b"/m/1,Disc\n" * 1000)[:40])
    with pytest.raises(InputError, match="cut off or damaged"):
        open_images.read_class_names(packed)
    path.write_text("/m/1,Disc\n/m/1,Ring\n")
    with pytest.raises(InputError, match="line 2: class /m/1 has two names, Disc and Ring"):
        open_images.read_class_names(path)


def test_the_hierarchy_is_what_is_below_and_not_what_is_a_part(tmp_path):
    path = tmp_path / "bbox_labels_600_hierarchy.json"
    hand = {"LabelName": "/m/hand", "Subcategory": [{"LabelName": "/m/fist"}]}
    person = {"LabelName": "/m/person", "Subcategory": [{"LabelName": "/m/man"}, {"LabelName": "/m/woman"}], "Part": [hand]}
    path.write_text(json.dumps({"LabelName": "/m/entity", "Subcategory": [person]}))
    below = open_images.read_hierarchy(path)
    assert below["/m/person"] == ("/m/man", "/m/woman")
    assert below["/m/entity"] == ("/m/person",)
    assert below["/m/hand"] == ("/m/fist",)
    for text in ("{", "[]", '{"Subcategory": []}'):
        path.write_text(text)
        with pytest.raises(InputError, match="not Open Images' class hierarchy"):
            open_images.read_hierarchy(path)


def test_the_real_files(real_data, tmp_path):
    """189 boxes, every one accepted or rejected with its reason; the paper's area rule alone rejects 89."""
    folder = real_data / "open_images_mini"
    source = open_folder(folder, "train", "validation")
    rows = [row for batch in source.read_boxes() for row in batch.to_pylist()]
    assert len(rows) == 189
    assert {row["label"] for row in rows} <= set(source.class_names)
    vehicle = next(label for label, name in source.class_names.items() if name == "Land vehicle")
    assert {source.class_names[label] for label in source.subclasses[vehicle]} >= {"Car", "Bicycle", "Truck"}
    paper = SelectionSettings(reject_flags=(), near_duplicate_iou=None)
    chosen = BuildSettings(out=tmp_path, source=SourceSettings(annotations=folder, photos=folder), selection=paper)
    selection = select_objects(chosen, tmp_path)
    assert (selection.boxes, selection.objects, selection.rejects) == (189, 100, {"too_small": 86, "too_large": 3})


def test_order_files_and_gzip_change_no_byte_of_the_objects(tmp_path):
    """One CSV, the same rows shuffled, in five files, gzipped; with damaged rows among them."""
    draw = random.Random(0)
    rows = []
    for photo in range(300):
        for _ in range(draw.randint(1, 8)):
            x, y = draw.uniform(0, 0.6), draw.uniform(0, 0.6)
            sides = f"{x:.6f},{x + draw.uniform(0.05, 0.4):.6f},{y:.6f},{y + draw.uniform(0.05, 0.4):.6f}"
            rows.append(f"{photo * 7919:016x},xclick,/m/{draw.randrange(9)},1,{sides},{draw.randint(-1, 1)},0,0,0,0\n")
    rows += [DAMAGED.splitlines(keepends=True)[number] for number in (1, 2, 3)]
    rules = SelectionSettings(nested_share=0.9, max_per_photo=3, max_per_class=60, subset=0.8, all_reasons=True)

    def objects(name: str, parts: list[list[str]], packed: bool) -> tuple[bytes, dict[str, int]]:
        folder = tmp_path / name
        folder.mkdir()
        for number, part in enumerate(parts):
            suffix = f"-{number}" if len(parts) > 1 else ""
            data = (HEADER + "".join(part)).encode()
            path = folder / f"train-annotations-bbox{suffix}.csv{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
        source = SourceSettings(annotations=folder, photos=folder, splits=("train",))
        selection = select_objects(BuildSettings(out=folder, source=source, selection=rules), folder)
        assert selection.boxes == len(rows) == selection.objects + len(pq.read_table(folder / "rejects.parquet"))
        return (folder / "objects.parquet").read_bytes(), selection.rejects

    plain = objects("plain", [rows], False)
    assert {"bad_row", "bad_number", "over_photo_cap", "over_class_cap", "not_in_subset", "nested"} <= set(plain[1])
    shuffled = list(rows)
    draw.shuffle(shuffled)
    assert objects("shuffled", [shuffled], False) == plain
    assert objects("five", [shuffled[number::5] for number in range(5)], False) == plain
    assert objects("packed", [shuffled[number::5] for number in range(5)], True) == plain
    assert objects("one packed", [rows], True) == plain
