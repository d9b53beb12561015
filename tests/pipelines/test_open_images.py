import csv
import random
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.annotations import open_images
from pipelines.config import SelectionSettings
from pipelines.selection import drop_duplicates, select
from schemas.errors import InputError
from schemas.tables import BOXES

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
ROW = "0001eeaf4aed83f9,xclick,/m/0cmf2,1,0.022673031,0.9642005,0.07103825,0.80054647,0,-1,1,0,0\n"


def read(path: Path) -> pa.Table:
    return pa.Table.from_batches(open_images.read_boxes(path, "train"), schema=BOXES)


def test_a_published_row_is_read_as_it_stands(tmp_path):
    """The order in the file is XMin, XMax, YMin, YMax, and a flag of -1 stays -1."""
    path = tmp_path / "train-annotations-bbox.csv"
    path.write_text(HEADER + ROW)
    (row,) = read(path).to_pylist()
    assert (row["x_min"], row["x_max"], row["y_min"], row["y_max"]) == (0.022673031, 0.9642005, 0.07103825, 0.80054647)
    assert (row["is_occluded"], row["is_truncated"], row["is_group_of"]) == (0, -1, 1)
    assert (row["photo_id"], row["label"], row["row"]) == ("0001eeaf4aed83f9", "/m/0cmf2", 1)


def test_columns_are_found_by_name(tmp_path):
    """The train file of V6 has eight more columns; another order does not matter either."""
    path = tmp_path / "a.csv"
    names, values = HEADER.strip().split(","), ROW.strip().split(",")
    pairs = [*zip(names, values, strict=True), ("XClick1X", "0.5")]
    random.Random(0).shuffle(pairs)
    path.write_text(",".join(name for name, _ in pairs) + "\n" + ",".join(value for _, value in pairs) + "\n")
    plain = tmp_path / "a" / "a.csv"
    plain.parent.mkdir()
    plain.write_text(HEADER + ROW)
    assert read(path).equals(read(plain))


def test_a_missing_column_is_named(tmp_path):
    path = tmp_path / "train-annotations-bbox.csv"
    path.write_text(HEADER.replace(",XMax", "") + ROW)
    with pytest.raises(InputError) as caught:
        read(path)
    assert f"{path}, line 1" in str(caught.value)
    assert "column XMax is missing" in str(caught.value)


def test_a_cell_that_is_no_number_is_named_with_its_line(tmp_path):
    path = tmp_path / "train-annotations-bbox.csv"
    path.write_text(HEADER + ROW + ROW.replace("0.9642005", "wide"))
    with pytest.raises(InputError) as caught:
        read(path)
    assert f"{path}, line 3" in str(caught.value)
    assert "wide" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_with_empty_cells_are_rejected_one_by_one(tmp_path):
    path = tmp_path / "train-annotations-bbox.csv"
    path.write_text(HEADER + ROW + "0001eeaf4aed83f9,,,,,,,,,,,,\n")
    selected = select(read(path).combine_chunks().to_batches()[0], SelectionSettings(reject_flags=()))
    assert len(selected.objects) == 1
    assert selected.rejects["reason"].to_pylist() == ["bad_box"]


def test_an_empty_label_is_no_label(tmp_path):
    path = tmp_path / "train-annotations-bbox.csv"
    path.write_text(HEADER + ROW.replace("/m/0cmf2", ""))
    selected = select(read(path).combine_chunks().to_batches()[0], SelectionSettings(reject_flags=()))
    assert selected.rejects["reason"].to_pylist() == ["bad_box"]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        open_images.annotation_files(tmp_path / "nowhere", ["train"])
    with pytest.raises(InputError, match=r"test-annotations-bbox.csv: no such file"):
        open_images.annotation_files(tmp_path, ["test"])


def test_both_published_names_are_found(tmp_path):
    (tmp_path / "oidv6-train-annotations-bbox.csv").touch()
    (tmp_path / "validation-annotations-bbox.csv").touch()
    files = open_images.annotation_files(tmp_path, ["train", "validation"])
    assert [path.name for path in files.values()] == ["oidv6-train-annotations-bbox.csv", "validation-annotations-bbox.csv"]


def test_metadata_is_kept_for_the_wanted_photos_once_each(tmp_path):
    path = tmp_path / "m.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageID", "Subset", "OriginalURL", "License", "Author", "Title"])
        for photo in ("a", "b", "a"):
            writer.writerow([photo, "train", f"https://x/{photo}", "cc", "Ada, Countess", 'a "title"\nin two lines'])
    table = open_images.read_metadata([path], pa.array(["a", "c"]))
    assert table.to_pylist() == [{"photo_id": "a", "url": "https://x/a", "author": "Ada, Countess", "licence": "cc"}]


def test_authors_keep_their_names_and_their_licences(tmp_path):
    """A name may be NA, which, not nothing; and of two rows of a photo the first counts, whole."""
    path = tmp_path / "m.csv"
    path.write_text("ImageID,OriginalURL,License,Author\na,u,cc,NA\na,t,bb,AA\nb,,,\n")
    assert open_images.read_metadata([path], pa.array(["a", "b"])).to_pylist() == [
        {"photo_id": "a", "url": "u", "author": "NA", "licence": "cc"},
        {"photo_id": "b", "url": None, "author": None, "licence": None},
    ]


def test_metadata_without_rows_is_no_metadata(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("ImageID,OriginalURL,License,Author\n")
    assert len(open_images.read_metadata([path], pa.array(["a"]))) == 0


def test_a_class_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "class-descriptions-boxable.csv"
    path.write_text("/m/1,Disc\n/m/2,Ring, blue\n")
    with pytest.raises(InputError, match=r"class-descriptions-boxable\.csv: .*Expected 2 columns"):
        open_images.read_class_names(path)


def test_the_real_files(real_data):
    """189 boxes, every one accepted or rejected with its reason; the paper's area rule alone rejects 89."""
    folder = real_data / "open_images_mini"
    files = open_images.annotation_files(folder, ["train", "validation"])
    table = pa.concat_tables([pa.Table.from_batches(open_images.read_boxes(path, split)) for split, path in files.items()])
    assert len(table) == 189
    selected = select(table.combine_chunks().to_batches()[0], SelectionSettings(reject_flags=()))
    unique = drop_duplicates(selected.objects)
    assert (len(unique.objects), len(selected.rejects), len(unique.rejects)) == (100, 89, 0)
    names = open_images.read_class_names(open_images.class_file(folder))
    assert set(table["label"].to_pylist()) <= set(names)


def test_a_row_that_was_cut_off_is_named_with_its_line(tmp_path):
    path = tmp_path / "train-annotations-bbox.csv"
    path.write_text(HEADER + ROW + ROW[:40])
    with pytest.raises(InputError, match=r"line 3: 5 cells, the header has 13"):
        read(path)
