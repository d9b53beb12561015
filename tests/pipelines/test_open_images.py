"""Open Images' files as they are published, as they are damaged, and in any order or packing."""

import csv
import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pipelines.annotations import csv_files, open_images, open_source
from pipelines.annotations.open_images import HIERARCHY_NAMES, METADATA_NAMES, open_open_images
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings, SelectionSettings, SourceSettings
from pipelines.dataset.write_plan import hash_inputs, select_and_plan
from pipelines.selection.objects import select_objects
from pipelines.selection.rules import below
from tests.coco_files import boxes_of, photos_of

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
ROW = "0001eeaf4aed83f9,xclick,/m/0cmf2,1,0.022673031,0.9642005,0.07103825,0.80054647,0,-1,1,0,0\n"
METADATA = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,"
    "OriginalSize,OriginalMD5,Thumbnail300KURL,Rotation\n"
)
FLAGS = {"IsOccluded": "is_occluded", "IsTruncated": "is_truncated", "IsGroupOf": "is_group_of"}
FLAGS |= {"IsDepiction": "is_depiction", "IsInside": "is_inside"}


def opened(folder: Path, *splits: str) -> Source:
    return open_open_images(SourceSettings(annotations=folder, photos=folder, splits=splits or ("train",)))


def put(path: Path, content: str | bytes) -> Path:
    """Gzipped where the name says so."""
    data = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def boxes_file(tmp_path) -> Path:
    return put(tmp_path / "train-annotations-bbox.csv", HEADER + ROW)


def rows_of(path: Path, content: str | bytes) -> list[dict[str, Any]]:
    return sorted(boxes_of(opened(put(path, content).parent)), key=lambda row: row["row"])


def test_a_published_row_is_read_as_it_stands_and_columns_go_by_name(boxes_file):
    """The order in the file is XMin, XMax, YMin, YMax, and a flag of -1 stays -1. The train file of V6 has eight more columns;
    another order, a byte order mark, quotes and spaces do not matter either.
    """
    (row,) = boxes_of(opened(boxes_file.parent))
    assert (row["x_min"], row["x_max"], row["y_min"], row["y_max"]) == (0.022673031, 0.9642005, 0.07103825, 0.80054647)
    assert [row[name] for name in FLAGS.values()] == [0, -1, 1, 0, 0]
    assert (row["photo_id"], row["label"], row["row"]) == ("0001eeaf4aed83f9", "/m/0cmf2", 1)
    assert (row["split"], row["file"], row["problem"]) == ("train", "train-annotations-bbox.csv", None)
    names, values = HEADER.strip().split(","), ROW.strip().split(",")
    pairs = [*zip(names, values, strict=True), *((f"XClick{number}X", "0.5") for number in range(1, 9))]
    random.Random(0).shuffle(pairs)
    text = ",".join(f'"{name}"' for name, _ in pairs) + "\n" + ",".join(f' "{value}"\t' for _, value in pairs) + "\n"
    assert rows_of(boxes_file, b"\xef\xbb\xbf" + text.replace(",", " , ", 3).encode()) == [row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER.replace(",XMax", "") + ROW, "line 1: column XMax is missing"),
        (HEADER.replace("IsOccluded", "XMax") + ROW, "column XMax is there twice"),
        (HEADER.replace(",", ";"), "divided by commas"),
        ("", "the first line is empty"),
        (HEADER + ("," * 12 + "\n") * 4, "all cells of 4 rows are empty"),
        (HEADER.encode("utf-16"), "UTF-16"),
        (b"\x89PNG\xff\xfe\x00", "no UTF-8 text"),
        (HEADER + ROW.replace("0.9642005", "987.2") * 3 + ROW, "of the first 4 rows 3 have edges above 1.*source.unit: pixel"),
    ],
)
def test_what_is_wrong_with_a_file_stops_before_any_work(content, message, boxes_file):
    put(boxes_file, content)
    with pytest.raises(InputError, match=message) as caught:
        opened(boxes_file.parent)
    assert str(boxes_file) in str(caught.value)
    assert "\n" not in str(caught.value)


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
        monkeypatch.setattr(csv_files, "_BLOCK_LINES", 3)
    content = (HEADER + ROW * 20 + DAMAGED).encode() + ROW.encode().replace(b"/m/0cmf2", b"/m/\xff")
    rows = {row["row"]: row for row in rows_of(boxes_file, content)}
    assert sorted(rows) == list(range(1, 29))
    found = {number - 20: (row["problem"], row["detail"]) for number, row in rows.items() if row["problem"]}
    assert found == {
        2: ("bad_number", "train-annotations-bbox.csv, line 23: XMax is 'wide', not a number"),
        3: ("bad_row", "train-annotations-bbox.csv, line 24: 5 cells, the header has 13"),
        5: ("bad_flag", "train-annotations-bbox.csv, line 26: IsOccluded is 300, expected 1, 0 or -1"),
        6: ("bad_flag", "train-annotations-bbox.csv, line 27: IsOccluded is 'no', not a number"),
        8: ("bad_row", "train-annotations-bbox.csv, line 29: no UTF-8 text (byte 28 of the line); save the file as UTF-8"),
    }
    assert rows[24]["x_min"] is rows[22]["x_max"] is rows[25]["is_occluded"] is rows[26]["is_occluded"] is None
    assert rows[22]["x_min"] == rows[21]["x_min"] == 0.022673031


@pytest.mark.parametrize("bad", ["", ROW.replace("0.9642005", "wide")])
@pytest.mark.parametrize("rows", [20, 20000])
def test_a_stray_quote_swallows_no_row(boxes_file, rows, bad):
    """Quotes around cells are taken off; one alone is a part of its cell, and the lines behind it stay rows of their own."""
    lines = [ROW] * rows
    lines[rows // 3] = ROW.replace("/m/0cmf2", '"/m/0cmf2')
    lines[rows // 2] = ROW.replace("/m/0cmf2", ' "/m/0cmf2"\t').replace("0001eeaf4aed83f9", '"0001eeaf4aed83f9"')
    found = rows_of(boxes_file, HEADER + "".join(lines) + bad)
    assert [row["row"] for row in found] == list(range(1, rows + 1 + bool(bad)))
    assert {(row["label"], row["photo_id"]) for row in found} == {("/m/0cmf2", "0001eeaf4aed83f9")}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bad", ["", "   \n", "0002,xclick,/m/y,1,0.1\n", ROW.replace("0.9642005", "wide"), "," * 12 + "\n"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_rows_are_known_by_their_lines(tmp_path, end, bad, suffix):
    """Empty lines are no rows, and count as lines, whatever else is there; a line of commas is a row."""
    text = (HEADER + ROW + "\n\n" + ROW + bad + ROW + "\n\n").replace("\n", end)
    lines = [number for number, line in enumerate(text.split(end), 1) if line.strip() and number > 1]
    rows = rows_of(tmp_path / f"train-annotations-bbox.csv{suffix}", text)
    assert [row["row"] + 1 for row in rows] == lines
    assert [row["row"] + 1 for row in rows if row["problem"]] == ([6] if bad.strip(", \n") else [])


def test_a_file_that_was_cut_off_stops(boxes_file, monkeypatch):
    """A row that ends the file in its middle, also in a block of its own; a gzip, wherever it ends."""
    with pytest.raises(InputError, match=r"line 3: 5 cells, .*cut off"):
        rows_of(boxes_file, HEADER + ROW + ROW[:40])
    assert [row["problem"] for row in rows_of(boxes_file, HEADER + ROW + ROW[:40] + "\n")] == [None, "bad_row"]
    monkeypatch.setattr(csv_files, "_BLOCK_LINES", 7)
    with pytest.raises(InputError, match=r"line 211: 5 cells, the header has 13, and the file ends there.*cut off"):
        rows_of(boxes_file, HEADER + ROW * 9 + "x,y\n" * 200 + "x," * 4)
    assert len(rows_of(boxes_file, HEADER + ROW * 9 + "x,y\n" * 200 + ROW.strip())) == 210
    boxes_file.unlink()
    draw = random.Random(0)
    rows = "".join(ROW.replace("0001eeaf4aed83f9", f"{draw.getrandbits(64):016x}") for _ in range(20000))
    path = boxes_file.with_name("train-annotations-bbox.csv.gz")
    source = opened(put(path, HEADER + rows).parent)
    assert len(boxes_of(source)) == 20000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for read in (lambda: boxes_of(source), lambda: opened(path.parent)):
        with pytest.raises(InputError, match=r"train-annotations-bbox\.csv\.gz, after line \d+: .*cut off"):
            read()


def test_how_many_rows_a_gzip_has_is_guessed_from_all_its_members(tmp_path, monkeypatch):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(
        b"".join(gzip.compress(random.Random(n).randbytes(20000).hex(" ", 40).replace(" ", "\n").encode()) for n in range(50))
    )
    for head in (1 << 20, 1 << 23):
        monkeypatch.setattr(csv_files, "_HEAD_BYTES", head)
        assert 22_000 < csv_files.count_rows(path) < 28_000


def test_a_flag_that_is_not_given_is_unknown_and_not_0(boxes_file):
    """The training boxes of V2 and V3 have no columns of flags, those of the challenges one; globox leaves cells empty."""
    values = dict(zip(HEADER.strip().split(","), ROW.strip().split(","), strict=True))
    for present in ([], ["IsGroupOf"], ["IsInside", "IsOccluded"]):
        names = ["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", *present]
        (row,) = rows_of(boxes_file, ",".join(names) + "\n" + ",".join(values[name] for name in names) + "\n")
        assert {name: row[column] for name, column in FLAGS.items() if name not in present} == dict.fromkeys(
            FLAGS.keys() - present, -1
        )
        assert {name: row[FLAGS[name]] for name in present} == {name: int(values[name]) for name in present}
        absent = ", ".join(name for name in FLAGS if name not in present)
        assert opened(boxes_file.parent).notes == (
            f"train-annotations-bbox.csv: no column {absent}, which are unknown (-1) then",
        )
    rows = [ROW.replace(",0,-1,1,0,0", flags) for flags in (",,,,,", ",,1,,,0", ",no,,,,")]
    for count in (2, 3):  # A cell that is no number has the file read line by line.
        found = rows_of(boxes_file, HEADER + "".join(rows[:count]))
        assert [[row[name] for name in FLAGS.values()] for row in found[:2]] == [[-1] * 5, [-1, 1, -1, -1, 0]]
        assert [row["problem"] for row in found] == [None, None, "bad_flag"][:count]


# Which files are read.


def write_boxes(folder: Path, *splits: str) -> None:
    for split in splits:
        put(folder / f"{split}-annotations-bbox.csv", HEADER + ROW.replace("0001eeaf4aed83f9", f"{split}0"))


def metadata_row(photo: str, split: str) -> str:
    return f"{photo},{split},https://x/{photo},,cc,,Ada,t,12,md==,,0\n"


@pytest.mark.parametrize(
    "names",
    [
        ["{0}-annotations-bbox.csv"],
        ["oidv6-{0}-annotations-bbox.csv.gz"],
        ["{0}-annotations-bbox-00000.csv.gz", "{0}-annotations-bbox-00001.csv.gz"],
        ["{0}/annotations-human-bbox.csv"],
        ["{0}/{0}-annotations-bbox.csv.gz"],
        ["challenge-2019-{0}-detection-bbox.csv"],
        ["challenge-2018-{0}-annotations-bbox.csv"],
    ],
)
def test_boxes_are_read_under_every_published_name(tmp_path, names):
    put(tmp_path / "train-annotations-bbox.txt", "")
    for split in ("train", "validation"):
        for name in names:
            put(tmp_path / name.format(split), HEADER + ROW.replace("0001eeaf4aed83f9", split))
    rows = boxes_of(opened(tmp_path, "train", "validation"))
    assert [(row["photo_id"], row["split"], row["file"]) for row in rows] == [
        (split, split, name.format(split)) for split in ("train", "validation") for name in names
    ]


def test_without_a_splits_boxes_or_with_two_tables_of_them_nothing_is_read(boxes_file):
    folder = boxes_file.parent
    with pytest.raises(InputError, match=r"test-annotations-bbox.csv: no such file; .*take `test` out"):
        opened(folder, "train", "test")
    for wrong in (folder / "nowhere", boxes_file):
        with pytest.raises(InputError, match=f"{wrong}: no such folder; .*source.kind: boxes"):
            opened(wrong)
    for second in ("oidv6-train-annotations-bbox.csv", "train-annotations-bbox.csv.gz"):
        put(folder / second, "x")
        with pytest.raises(InputError, match=f"both train-annotations-bbox.csv and {second} are there; move one"):
            opened(folder)
        (folder / second).unlink()


@pytest.mark.parametrize("name", [*METADATA_NAMES, *(f"{{}}/{name}" for name in METADATA_NAMES)])
def test_metadata_is_read_under_the_names_of_every_version(tmp_path, name):
    if name == "images":
        pytest.skip("a name that says no split means something in a split's folder alone")
    write_boxes(tmp_path, "train", "validation")
    for split in ("train", "validation"):
        put(tmp_path / f"{name}.csv".format(*[split] * 2), METADATA + metadata_row(f"{split}0", split))
    source = opened(tmp_path, "train", "validation")
    assert {row["photo_id"]: row["split"] for row in photos_of(source)} == {"train0": "train", "validation0": "validation"}
    assert (source.listed_splits, source.notes, len(set(source.files))) == ({"train", "validation"}, (), 4)


def test_one_file_of_metadata_serves_all_splits_that_have_none_of_their_own(tmp_path):
    write_boxes(tmp_path, "train", "validation", "test")
    rows = "".join(metadata_row(f"{split}{number}", split) for number in range(2) for split in ("test", "validation", "train"))
    put(tmp_path / "image_ids_and_rotation.csv", METADATA + rows)
    source = opened(tmp_path, "train", "validation")
    found = {(row["photo_id"], row["split"]) for row in photos_of(source)}
    assert found == {(f"{split}{number}", split) for split in ("train", "validation") for number in range(2)}
    (batch,) = source.read_photos()
    assert set(batch.column("split").dictionary.to_pylist()) == {"train", "validation"}, "no word of a split that is not read"
    put(tmp_path / "train-images-boxable.csv", METADATA + metadata_row("train9", "train"))
    both = opened(tmp_path, "train", "test")
    assert [row["photo_id"] for row in photos_of(both)] == ["train9", "test0", "test1"]
    assert both.listed_splits == {"train", "test"}
    put(tmp_path / "image_ids_and_rotation.csv", METADATA.replace("Subset", "Part") + rows)
    with pytest.raises(InputError, match=r"image_ids_and_rotation.csv, line 1: column Subset is missing"):
        opened(tmp_path, "test")


def test_metadata_is_read_with_what_it_says_of_each_photo(tmp_path):
    """A title in quotes may take two lines; NA and null are names of people; a hash of zeros is none, or all were copies."""
    write_boxes(tmp_path, "train")
    path = tmp_path / "train-images-boxable-with-rotation.csv"
    title = 'a "title"\nin two lines'
    with path.open("w", newline="") as file:
        file.write(METADATA)
        writer = csv.writer(file)
        writer.writerow(["a", "train", " https://x/a", "", "cc ", "", "Ada, Countess", title, 12, "md== ", "", "90.0"])
        writer.writerow(["b", "train", "", "", "", "", "NA", "", "", "A" * 22 + "==", "", ""])
        writer.writerow(["c", "train", "u", "", "cc", "", "null", "t", 13, "x", "", "nan"])
    names = ("split", "url", "author", "licence", "original_md5", "original_bytes", "rotation")
    assert [tuple(row[name] for name in names) for row in photos_of(opened(tmp_path))] == [
        ("train", "https://x/a", "Ada, Countess", "cc", "md==", 12, 90),
        ("train", None, "NA", None, None, None, None),
        ("train", "u", "null", "cc", "x", 13, None),
    ]
    put(path, "ImageID,OriginalURL,License,Author\na,u,cc,NA\n")  # As the oldest mirrors have it.
    assert [tuple(row[name] for name in names) for row in photos_of(opened(tmp_path))] == [
        ("train", "u", "NA", "cc", None, None, None)
    ]
    put(path, "ImageID,OriginalURL,License,Author\n")
    assert photos_of(opened(tmp_path)) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,train,u,,cc,,A,t,12,md,,45", "row 1 below the header: Rotation is 45"),
        ("a,train,u,,cc,,A,t,12,md,,upright", "after row 0 below the header: .*'upright'"),
        ("a,train,u", "after row 0 below the header: .*got 3"),
        ("a,train,u,,cc,,A,t,12.5,md,,0", "row 1 below the header: OriginalSize is 12.5"),
        ("a,train,u,,cc,,A,t,1e30,md,,0", "row 1 below the header: OriginalSize is 1e[+]30"),
    ],
)
def test_metadata_that_cannot_be_trusted_stops(row, message, tmp_path):
    write_boxes(tmp_path, "train")
    put(tmp_path / "train-images.csv", METADATA + row + "\n")
    with pytest.raises(InputError, match=message):
        photos_of(opened(tmp_path))


def test_files_of_one_name_in_the_folders_of_splits_are_two_inputs(tmp_path):
    for split in ("train", "validation"):
        put(tmp_path / split / "annotations-human-bbox.csv", HEADER + ROW)
    settings = BuildSettings(out=tmp_path / "out", source=SourceSettings(annotations=tmp_path, photos=tmp_path))
    before = hash_inputs(settings, open_source(settings))
    assert set(before) == {"train/annotations-human-bbox.csv", "validation/annotations-human-bbox.csv"}
    put(tmp_path / "train" / "annotations-human-bbox.csv", HEADER + ROW * 2)
    assert hash_inputs(settings, open_source(settings)) != before


def test_every_table_that_is_not_read_is_named_once(tmp_path, capsys):
    write_boxes(tmp_path, "train", "validation", "test")
    others = ["boxes.TSV", "class-descriptions.csv", "my_hierarchy.json", "objects.parquet", "test-annotations-bbox.csv"]
    others += ["notes.json.gz", "train-images-boxable.csv"]
    for name in ("train-images-boxable-with-rotation.csv", "class-descriptions-boxable.csv", *others):
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text(METADATA if "rotation" in name else "/m/0cmf2,Disc\n")
    (tmp_path / "bbox_labels_600_hierarchy.json").write_text(json.dumps({"LabelName": "/m/0cmf2"}))
    for name in ("README.md", ".hidden.csv", "photo.jpg", "folder.csv/x"):
        put(tmp_path / name, "")
    source = SourceSettings(annotations=tmp_path, photos=tmp_path)
    select_and_plan(BuildSettings(out=tmp_path / "out", source=source, selection=SelectionSettings(reject_flags=())))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not read" in line]
    assert line.startswith(f"note: {tmp_path}: not read: {', '.join(sorted(others))}; ")


def test_the_page_names_the_files_as_they_are_read():
    page = (REPOSITORY / "docs" / "selection.md").read_text().partition("## Files of Open Images")[2].partition("\n## ")[0]
    groups = [open_images.BOX_NAMES, open_images.OTHER_BOX_NAMES, METADATA_NAMES, open_images.CLASS_NAMES, HIERARCHY_NAMES]
    names = {name.replace("{}", "<split>") for group in groups for name in group}
    assert set(re.findall(r"`([\w<>-]+)`", page)) >= {*names, open_images.ALL_METADATA_NAME}


# Classes.

NAMES = "/m/0cmf2,Disc\n/m/fruit , Fruit\n/m/apple,Apple\n/m/fig,Common fig\n"
HAND = {"LabelName": "/m/hand", "Subcategory": [{"LabelName": "/m/fist"}]}
FRUIT = {"LabelName": "/m/fruit", "Subcategory": [{"LabelName": "/m/apple"}], "Part": [HAND]}
IDS = {"LabelName": "/m/all", "Subcategory": [FRUIT]}
OF_IDS = {"/m/all": ("/m/fruit",), "/m/fruit": ("/m/apple",), "/m/hand": ("/m/fist",)}
WORDS = {
    "name": "Entity",
    "children": [
        {"name": "fruit", "children": [{"name": "Apple", "size": 1}, {"name": "Common fig"}, {"name": "Plum"}]},
        {"name": "Indoor", "children": [{"name": "Disc"}]},
    ],
}
OF_WORDS = {"Entity": ("/m/fruit", "Indoor"), "/m/fruit": ("/m/apple", "/m/fig", "Plum"), "Indoor": ("/m/0cmf2",)}


@pytest.mark.parametrize(
    ("name", "tree", "expected"),
    [
        *[(f"{name}.json", IDS, OF_IDS) for name in (*HIERARCHY_NAMES, "my-hierarchy")],
        ("bbox_hierarchy.json.gz", WORDS, OF_WORDS),
        # Of no known layout: one of the tables that are not read.
        *[
            ("a_hierarchy.json", tree, {})
            for tree in ({"id": "/m/all", "subs": []}, [1], {"name": "E", "children": [{"name": "Cat"}]})
        ],
    ],
)
def test_a_hierarchy_is_what_is_below_and_not_what_is_a_part(tmp_path, name, tree, expected):
    """Since V4 by ids. That of the oldest versions goes by names; groups that are no class stay as they are."""
    write_boxes(tmp_path, "train")
    put(tmp_path / "class-descriptions-boxable.csv", "LabelName,DisplayName\n" + NAMES)
    put(tmp_path / name, json.dumps(tree))
    source = opened(tmp_path)
    assert {label: members for label, members in source.subclasses.items() if members} == expected
    assert source.class_names == {"/m/0cmf2": "Disc", "/m/fruit": "Fruit", "/m/apple": "Apple", "/m/fig": "Common fig"}
    if expected:
        told = () if name.startswith(HIERARCHY_NAMES[:2]) else (f"class hierarchy: {tmp_path / name}",)
        assert (source.notes, source.files[-1]) == (told, tmp_path / name)
        assert below(["Fruit"], source, "include_labels") == {"/m/fruit", *expected["/m/fruit"]}
    else:
        assert f"not read: {name};" in source.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *[
            ("bbox_labels_600_hierarchy.json", text, "not Open Images' class hierarchy")
            for text in ("{", "[]", '{"Subcategory": []}')
        ],
        ("class-descriptions-boxable.csv", '/m/1,Disc\n/m/2,"Ring, blue"\n/m/3,Ring, blue\n', "line 3: 3 cells, expected 2"),
        ("class-descriptions-boxable.csv", "/m/1,Disc\n/m/2,Ré\n".encode("latin-1"), "line 2: no CSV in UTF-8"),
        ("class-descriptions-boxable.csv", "/m/1,Disc\n/m/1,Ring\n", "line 2: class /m/1 has two names, Disc and Ring"),
    ],
)
def test_class_files_that_cannot_be_trusted_stop(tmp_path, name, content, message):
    write_boxes(tmp_path, "train")
    put(tmp_path / name, content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        opened(tmp_path)


# A whole selection.


def test_the_real_files(real_data, tmp_path):
    """189 boxes, every one accepted or rejected with its reason; the paper's area rule alone rejects 89."""
    folder = real_data / "open_images_mini"
    source = opened(folder, "train", "validation")
    rows = boxes_of(source)
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

    def objects(name: str, parts: list[list[str]], suffix: str = "") -> tuple[bytes, dict[str, int]]:
        folder = tmp_path / name
        for number, part in enumerate(parts):
            put(folder / f"train-annotations-bbox-{number}.csv{suffix}", HEADER + "".join(part))
        source = SourceSettings(annotations=folder, photos=folder, splits=("train",))
        selection = select_objects(BuildSettings(out=folder, source=source, selection=rules), folder)
        assert selection.boxes == len(rows) == selection.objects + len(pq.read_table(folder / "rejects.parquet"))
        return (folder / "objects.parquet").read_bytes(), selection.rejects

    plain = objects("plain", [rows])
    assert {"bad_row", "bad_number", "over_photo_cap", "over_class_cap", "not_in_subset", "nested"} <= set(plain[1])
    shuffled = draw.sample(rows, len(rows))
    assert objects("shuffled", [shuffled]) == plain
    assert objects("packed", [shuffled[number::5] for number in range(5)], ".gz") == plain
