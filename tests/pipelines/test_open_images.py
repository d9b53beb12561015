"""Open Images' files as they are published, as they are damaged, and in any order or packing."""

import csv
import gzip
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pipelines.annotations import csv_files, open_images, open_source
from pipelines.annotations.open_images_files import (
    ALL_METADATA_NAME,
    BOX_NAMES,
    CLASS_NAMES,
    HIERARCHY_NAMES,
    METADATA_NAMES,
    OTHER_BOX_NAMES,
    find_files,
    find_hierarchy,
    read_class_names,
    read_hierarchy,
)
from pipelines.config import BuildSettings, SelectionSettings, SourceSettings
from pipelines.dataset.write_plan import hash_inputs, select_and_plan
from pipelines.selection.objects import select_objects
from pipelines.selection.rules import below
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
        (HEADER.replace(",XMax", ",XMin") + ROW, "column XMin is there twice"),
        (HEADER.replace("IsGroupOf", "is_group_of") + ROW, "column is_group_of .*call it IsGroupOf"),
        (ROW + ROW, "is missing"),
        (HEADER.replace(",", ";"), "divided by commas"),
        ("image,xmin,ymin,xmax,ymax,label\na.jpg,1,2,3,4,cat\n", "--source.kind boxes .*train-annotations-bbox.csv"),
        ("", "the first line is empty"),
        (HEADER, "no row can be read below the header"),
        (HEADER + ("," * 12 + "\n") * 4, "all cells of 4 rows are empty"),
        (HEADER.encode("utf-16"), "UTF-16"),
        (b"\x89PNG\xff\xfe\x00", "no UTF-8 text"),
        (IN_PIXELS, "line 2: XMax is 987.2, not.*source.unit: pixel"),
    ],
)
def test_what_is_wrong_with_a_file_stops_before_any_work(content, message, boxes_file):
    boxes_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        open_folder(boxes_file.parent)
    assert str(boxes_file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_that_are_all_unknown_say_that_the_files_do_not_belong_together(boxes_file):
    (boxes_file.parent / "class-descriptions-boxable.csv").write_text("/m/1,Disc\n/m/2,Ring\n")
    with pytest.raises(InputError, match=r"line 2: no label .*class-descriptions-boxable\.csv .*do not belong together"):
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
        2: ("bad_number", "train-annotations-bbox.csv, line 23: XMax is 'wide', not a number"),
        3: ("bad_row", "train-annotations-bbox.csv, line 24: 5 cells, the header has 13"),
        5: ("bad_flag", "train-annotations-bbox.csv, line 26: IsOccluded is 300, expected 1, 0 or -1"),
        6: ("bad_flag", "train-annotations-bbox.csv, line 27: IsOccluded is 'no', not a number"),
        8: ("bad_row", "train-annotations-bbox.csv, line 29: LabelName is no UTF-8 text"),
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
    with pytest.raises(InputError, match=r"line 3: 5 cells, .*cut off"):
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


def test_published_names_are_found_gzipped_and_in_parts(tmp_path):
    for name in (
        "oidv6-train-annotations-bbox.csv",
        "validation-annotations-bbox-00000.csv.gz",
        "validation-annotations-bbox-00001.csv.gz",
    ):
        (tmp_path / name).touch()
    (tmp_path / "validation-annotations-bbox.txt").touch()
    found = find_files(tmp_path, ["train", "validation"]).boxes
    assert [path.name for path in found["train"]] == ["oidv6-train-annotations-bbox.csv"]
    assert [path.name for path in found["validation"]] == [f"validation-annotations-bbox-0000{part}.csv.gz" for part in (0, 1)]


@pytest.mark.parametrize("second", ["oidv6-train-annotations-bbox.csv", "train-annotations-bbox.csv.gz"])
def test_boxes_that_are_there_twice_are_not_counted_twice(boxes_file, second):
    (boxes_file.parent / second).write_text("x")
    with pytest.raises(InputError, match="move"):
        find_files(boxes_file.parent, ["train"])


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
        ("a,train,u,,cc,,A,t,12,md,,45", "row 1 below the header: Rotation is 45, none of 0, 90, 180, 270"),
        ("a,train,u,,cc,,A,t,12,md,,upright", "row 1 below the header: Rotation is 'upright', not a number"),
        ("a,train,u", "row 1 below the header: 3 cells"),
        ("a,train,u,,cc,,A,t,12.5,md,,0", "row 1 below the header: OriginalSize is 12.5, not a number of bytes"),
        ("a,train,u,,cc,,A,t,1e30,md,,0", "row 1 below the header: OriginalSize is 1e[+]30"),
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
    assert read_class_names(path) == {"/m/1": "Disc", "/m/2": "Ring, blue"}
    path.write_text("/m/1,Disc\n/m/2,Ring, blue\n")
    with pytest.raises(InputError, match=r"class-descriptions-boxable\.csv, line 2: 3 cells, expected 2"):
        read_class_names(path)
    path.write_bytes("/m/1,Disc\n/m/2,Ré\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_class_names(path)
    packed = path.with_suffix(".csv.gz")
    packed.write_bytes(gzip.compress(b"/m/1,Disc\n" * 1000)[:40])
    with pytest.raises(InputError, match="cut off or damaged"):
        read_class_names(packed)
    path.write_text("/m/1,Disc\n/m/1,Ring\n")
    with pytest.raises(InputError, match="line 2: class /m/1 has two names, Disc and Ring"):
        read_class_names(path)


def test_the_hierarchy_is_what_is_below_and_not_what_is_a_part(tmp_path):
    path = tmp_path / "bbox_labels_600_hierarchy.json"
    hand = {"LabelName": "/m/hand", "Subcategory": [{"LabelName": "/m/fist"}]}
    person = {"LabelName": "/m/person", "Subcategory": [{"LabelName": "/m/man"}, {"LabelName": "/m/woman"}], "Part": [hand]}
    path.write_text(json.dumps({"LabelName": "/m/entity", "Subcategory": [person]}))
    below, _ = read_hierarchy(path, {})
    assert below["/m/person"] == ("/m/man", "/m/woman")
    assert below["/m/entity"] == ("/m/person",)
    assert below["/m/hand"] == ("/m/fist",)
    for text in ("{", "[]", '{"Subcategory": []}'):
        path.write_text(text)
        with pytest.raises(InputError, match="not Open Images' class hierarchy"):
            find_hierarchy([path], {})


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


# Lines.


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bad", ["", "0002,xclick,/m/y,1,0.1\n", ROW.replace("0.9642005", "wide")])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_rows_are_known_by_their_lines(tmp_path, end, bad, suffix):
    """Empty lines are no rows, and count as lines; whether the file is read typed or, from a bad cell on, as text."""
    text = (HEADER + ROW + "\n\n" + ROW + "   \n" + bad + ROW + "\n\n").replace("\n", end)
    path = tmp_path / f"train-annotations-bbox.csv{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    lines = [number for number, line in enumerate(text.split(end), 1) if line.strip() and number > 1]
    rows = sorted(read(path), key=lambda row: row["row"])
    assert [row["row"] + 1 for row in rows] == lines
    assert [row["detail"] for row in rows if row["problem"]] == [row["detail"] for row in rows if row["detail"]]
    if bad:
        assert f"{path.name}, line 7: " in rows[2]["detail"]


def test_a_row_of_empty_cells_is_no_empty_line(boxes_file):
    boxes_file.write_text(HEADER + ROW + "," * 12 + "\n\n" + ROW)
    assert [(row["row"], row["photo_id"] is None) for row in read(boxes_file)] == [(1, False), (2, True), (4, False)]


def test_spaces_around_cells_are_no_part_of_them(tmp_path, boxes_file):
    boxes_file.write_text(HEADER + ROW.replace("/m/0cmf2", " /m/0cmf2\t").replace("0001eeaf4aed83f9", ' "0001eeaf4aed83f9" ') * 2)
    (row, _) = read(boxes_file)
    assert (row["photo_id"], row["label"]) == ("0001eeaf4aed83f9", "/m/0cmf2")
    path = tmp_path / "m.csv"
    path.write_text(METADATA + 'a,train," https://x/a ",, cc ,,"  Ada Lovelace",t,12, md== ,,0\n')
    (photo,) = read_metadata(path)
    assert [photo[name] for name in ("url", "licence", "author", "original_md5")] == ["https://x/a", "cc", "Ada Lovelace", "md=="]
    names = tmp_path / "class-descriptions-boxable.csv"
    names.write_text("/m/1 , Disc\n")
    assert read_class_names(names) == {"/m/1": "Disc"}


# Columns and files of other versions and of challenges.


def cells(header: str, row: str, names: list[str]) -> str:
    values = dict(zip(header.strip().split(","), row.strip().split(","), strict=True))
    return ",".join(names) + "\n" + ",".join(values[name] for name in names) + "\n"


FLAGS = ["IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]
PLACE = ["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax"]


@pytest.mark.parametrize("present", [[], ["IsGroupOf"], ["IsInside", "IsOccluded"]])
def test_a_flag_without_a_column_is_unknown_and_not_0(boxes_file, present):
    """The training boxes of V2 and V3 have no flags, those of the challenges one."""
    boxes_file.write_text(cells(HEADER, ROW.replace(",0,-1,1,0,0", ",0,0,0,0,0"), [*PLACE, *present]))
    source = open_folder(boxes_file.parent)
    (row,) = [row for batch in source.read_boxes() for row in batch.to_pylist()]
    values = {name: row[open_images.BOX_COLUMNS[name]] for name in FLAGS}
    assert values == {name: 0 if name in present else -1 for name in FLAGS}
    absent = ", ".join(name for name in FLAGS if name not in present)
    assert source.notes == (f"train-annotations-bbox.csv: no column {absent}, which are unknown (-1) then",)


def test_an_empty_flag_is_unknown_beside_a_flag_that_is_wrong_too(boxes_file):
    """As globox writes it: all columns of flags, and nothing in them. The cell that is no number has the file read as text."""
    rows = [ROW.replace(",0,-1,1,0,0", flags) for flags in (",,,,,", ",,1,,,0", ",no,,,,")]
    for count in (2, 3):
        boxes_file.write_text(HEADER + "".join(rows[:count]))
        found = [row for batch in open_folder(boxes_file.parent).read_boxes() for row in batch.to_pylist()]
        assert [[row[open_images.BOX_COLUMNS[name]] for name in FLAGS] for row in found[:2]] == [[-1] * 5, [-1, 1, -1, -1, 0]]
        assert [row["problem"] for row in found] == [None, None, "bad_flag"][:count]


def write_boxes(folder: Path, *splits: str) -> None:
    for split in splits:
        folder.mkdir(exist_ok=True)
        (folder / f"{split}-annotations-bbox.csv").write_text(HEADER + ROW.replace("0001eeaf4aed83f9", f"{split}0"))


def metadata_row(photo: str, split: str) -> str:
    return f"{photo},{split},https://x/{photo},,cc,,Ada,t,12,md==,,0\n"


def photos_of(source: open_images.Source) -> dict[str, str]:
    """Photo id -> split, of those with a URL."""
    rows = [row for batch in source.read_photos() for row in batch.to_pylist()]
    return {row["photo_id"]: row["split"] for row in rows if row["url"] == f"https://x/{row['photo_id']}"}


@pytest.mark.parametrize("place", ["", "{}/"])
@pytest.mark.parametrize("name", METADATA_NAMES)
def test_metadata_is_read_under_the_names_of_every_version(tmp_path, place, name):
    if name == "images" and not place:
        pytest.skip("a name that says no split means something in a split's folder alone")
    write_boxes(tmp_path, "train", "validation")
    for split in ("train", "validation"):
        path = tmp_path / f"{place}{name}.csv".format(*[split] * 2)
        path.parent.mkdir(exist_ok=True)
        path.write_text(METADATA + metadata_row(f"{split}0", split))
    source = open_folder(tmp_path, "train", "validation")
    assert photos_of(source) == {"train0": "train", "validation0": "validation"}
    assert source.listed_splits == {"train", "validation"}
    assert source.notes == ()
    assert len(set(source.files)) == 4


def test_one_file_of_metadata_serves_all_splits_that_have_none_of_their_own(tmp_path):
    write_boxes(tmp_path, "train", "validation", "test")
    rows = "".join(metadata_row(f"{split}{number}", split) for number in range(3) for split in ("test", "validation", "train"))
    (tmp_path / "image_ids_and_rotation.csv").write_text(METADATA + rows)
    assert photos_of(open_folder(tmp_path, "train", "validation")) == {
        f"{split}{number}": split for split in ("train", "validation") for number in range(3)
    }
    (tmp_path / "train-images-boxable.csv").write_text(METADATA + metadata_row("train9", "train"))
    both = open_folder(tmp_path, "train", "test")
    assert photos_of(both) == {"train9": "train", **{f"test{number}": "test" for number in range(3)}}
    assert both.listed_splits == {"train", "test"}
    (tmp_path / "image_ids_and_rotation.csv").write_text(METADATA.replace("Subset", "Part") + rows)
    with pytest.raises(InputError, match=r"image_ids_and_rotation.csv, line 1: column Subset is missing"):
        open_folder(tmp_path, "test")


def test_a_hash_of_zeros_is_no_hash(tmp_path):
    """Nobody knows the original's then; taken for one, all such photos were copies of each other."""
    path = tmp_path / "m.csv"
    path.write_text(METADATA + metadata_row("a", "train").replace("md==", "A" * 22 + "=="))
    assert read_metadata(path)[0]["original_md5"] is None


@pytest.mark.parametrize(
    "name",
    [
        "{}/annotations-human-bbox.csv",
        "{}/{}-annotations-bbox.csv.gz",
        "challenge-2019-{}-detection-bbox.csv",
        "challenge-2018-{}-annotations-bbox.csv",
    ],
)
def test_boxes_are_read_under_other_published_names(tmp_path, name):
    for split in ("train", "validation"):
        path = tmp_path / name.format(split, split)
        path.parent.mkdir(exist_ok=True)
        data = (HEADER + ROW.replace("0001eeaf4aed83f9", split)).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    source = open_folder(tmp_path, "train", "validation")
    rows = [row for batch in source.read_boxes() for row in batch.to_pylist()]
    assert [(row["photo_id"], row["split"], row["file"]) for row in rows] == [
        (split, split, name.format(split, split)) for split in ("train", "validation")
    ]


def test_files_of_one_name_in_the_folders_of_splits_are_two_inputs(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "annotations-human-bbox.csv").write_text(HEADER + ROW)
    source = SourceSettings(annotations=tmp_path, photos=tmp_path)
    settings = BuildSettings(out=tmp_path / "out", source=source)
    before = hash_inputs(settings, open_source(settings))
    assert set(before) == {"train/annotations-human-bbox.csv", "validation/annotations-human-bbox.csv"}
    (tmp_path / "train" / "annotations-human-bbox.csv").write_text(HEADER + ROW * 2)
    assert hash_inputs(settings, open_source(settings)) != before


def test_every_table_that_is_not_read_is_named_once(tmp_path, capsys):
    write_boxes(tmp_path, "train", "validation", "test")
    others = ["boxes.TSV", "class-descriptions.csv", "my_hierarchy.json", "objects.parquet", "test-annotations-bbox.csv"]
    others += ["notes.json.gz", "train-images-boxable.csv"]
    for name in ("train-images-boxable-with-rotation.csv", "class-descriptions-boxable.csv", *others):
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text(METADATA if "rotation" in name else "/m/0cmf2,Disc\n")
    (tmp_path / "bbox_labels_600_hierarchy.json").write_text(json.dumps({"LabelName": "/m/0cmf2"}))
    for name in ("README.md", ".hidden.csv", "photo.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "folder.csv").mkdir()
    source = SourceSettings(annotations=tmp_path, photos=tmp_path)
    select_and_plan(BuildSettings(out=tmp_path / "out", source=source, selection=SelectionSettings(reject_flags=())))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not read" in line]
    assert line == (
        f"note: {tmp_path}: not read: {', '.join(sorted(others))}; names that are read: docs/selection.md#files-of-open-images"
    )


def test_the_page_names_the_files_as_they_are_read():
    page = (REPOSITORY / "docs" / "selection.md").read_text().partition("## Files of Open Images")[2].partition("\n## ")[0]
    names = (*BOX_NAMES, *OTHER_BOX_NAMES, *METADATA_NAMES, ALL_METADATA_NAME, *CLASS_NAMES, *HIERARCHY_NAMES)
    assert set(re.findall(r"`([\w<>-]+)`", page)) >= {name.replace("{}", "<split>") for name in names}


# Classes.


def below_of(tmp_path: Path, name: str, tree: dict | list, names: dict[str, str]) -> open_images.Source:
    write_boxes(tmp_path, "train")
    (tmp_path / name).write_text(json.dumps(tree))
    (tmp_path / "class-descriptions-boxable.csv").write_text("".join(f"{label},{word}\n" for label, word in names.items()))
    return open_folder(tmp_path)


NAMES = {"/m/0cmf2": "Disc", "/m/fruit": "Fruit", "/m/apple": "Apple", "/m/fig": "Common fig"}
IDS = {"LabelName": "/m/all", "Subcategory": [{"LabelName": "/m/fruit", "Subcategory": [{"LabelName": "/m/apple"}]}]}
WORDS = {
    "name": "Entity",
    "children": [
        {"name": "fruit", "children": [{"name": "Apple", "size": 1}, {"name": "Common fig"}, {"name": "Plum"}]},
        {"name": "Indoor", "children": [{"name": "Disc"}]},
    ],
}


@pytest.mark.parametrize(
    "name", ["bbox_labels_500_hierarchy.json", "challenge-2019-label500-hierarchy.json", "my-hierarchy.json"]
)
def test_a_hierarchy_is_read_under_other_names_and_said(tmp_path, name):
    source = below_of(tmp_path, name, IDS, NAMES)
    assert source.subclasses["/m/fruit"] == ("/m/apple",)
    assert source.notes == (f"class hierarchy: {tmp_path / name}",)
    assert source.files[-1] == tmp_path / name


def test_the_hierarchy_of_the_oldest_versions_goes_by_names(tmp_path):
    """Groups that are no class, and names of classes that are not there, stay as they are."""
    source = below_of(tmp_path, "bbox_hierarchy.json", WORDS, NAMES)
    assert source.subclasses["/m/fruit"] == ("/m/apple", "/m/fig", "Plum")
    assert source.subclasses["Indoor"] == ("/m/0cmf2",)
    (note,) = source.notes
    assert note == f"class hierarchy: {tmp_path}/bbox_hierarchy.json, in which a part (a person's hand) lies below its whole"
    assert below(["Fruit"], source, "include_labels") == {"/m/fruit", "/m/apple", "/m/fig", "Plum"}


@pytest.mark.parametrize(
    "tree", [{"id": "/m/all", "subs": []}, [1], {"name": "Entity", "children": [{"name": "Cat"}]}], ids=["keys", "list", "names"]
)
def test_a_hierarchy_of_no_known_layout_is_one_of_the_tables_that_are_not_read(tmp_path, tree):
    source = below_of(tmp_path, "bbox_hierarchy.json", tree, NAMES)
    assert not source.subclasses
    assert "not read: bbox_hierarchy.json;" in source.notes[0]


def test_tables_of_empty_cells_are_files_to_get_again(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(METADATA + ("," * 11 + "\n") * 3)
    with pytest.raises(InputError, match="all cells of 3 rows are empty; get the file again"):
        read_metadata(path)
    path.write_text(",\n" * 5)
    with pytest.raises(InputError, match="all cells of 5 rows are empty; get the file again"):
        read_class_names(path)


def test_a_file_in_the_place_of_the_folder_is_said_to_be_one(tmp_path):
    own = "image,xmin,ymin,xmax,ymax\n"
    for name, text, message in (
        ("boxes.csv", own, "--source.kind boxes .*boxes.csv"),
        ("export.json", "{}", "source.kind: coco"),
        ("train-annotations-bbox.csv", HEADER, "the folder that holds"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=f"{name}: a file; .*{message}"):
            open_folder(tmp_path / name)


def test_without_box_tables_those_that_are_there_are_named(tmp_path):
    (tmp_path / "my.csv").write_text("image,xmin,ymin,xmax,ymax\n")
    with pytest.raises(InputError, match=r"no such file .*my.csv\).*my.csv .*--source.kind boxes"):
        open_folder(tmp_path)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        open_folder(tmp_path / "nowhere")
