"""The annotations that benchmarks measure with: Open Images' layout and shares, the same bytes for the same seed."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.make_annotations import (
    BOX_COLUMNS,
    BOX_FILE,
    CLASS_FILE,
    DEFECTS,
    EDGES,
    FLAG_SHARES,
    HIERARCHY_FILE,
    PHOTO_COLUMNS,
    PHOTO_FILE,
    draw_boxes,
    make_annotations,
)
from benchmarks.selection import select_floor, select_published

OFFICIAL_BOX_COLUMNS = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
OFFICIAL_PHOTO_COLUMNS = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,"
    "OriginalSize,OriginalMD5,Thumbnail300KURL,Rotation"
)
ROWS, PHOTOS = 21_000, 2_500
MALFORMED = 20  # Of ROWS.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("annotations")
    make_annotations(out, ROWS, PHOTOS, seed=3, malformed_share=MALFORMED / ROWS)
    return out


@pytest.fixture(scope="module")
def boxes(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / f"{BOX_FILE}.csv", dtype={"ImageID": str})


@pytest.fixture(scope="module")
def photos(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / f"{PHOTO_FILE}.csv", dtype=str, keep_default_na=False)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def area_rule(boxes: pd.DataFrame) -> pd.Series:
    return ((boxes.XMax - boxes.XMin) * (boxes.YMax - boxes.YMin)).between(0.02, 0.8)


def test_the_tables_are_open_images(folder, boxes, photos):
    assert ",".join(BOX_COLUMNS) == OFFICIAL_BOX_COLUMNS
    assert ",".join(PHOTO_COLUMNS) == OFFICIAL_PHOTO_COLUMNS
    assert list(boxes.columns) == list(BOX_COLUMNS)
    assert list(photos.columns) == list(PHOTO_COLUMNS)
    assert (len(boxes), boxes.ImageID.nunique(), len(photos)) == (ROWS, PHOTOS, PHOTOS)
    assert photos.ImageID.str.fullmatch("[0-9a-f]{16}").all()
    assert photos.ImageID.is_monotonic_increasing
    assert boxes.ImageID.drop_duplicates().tolist() == photos.ImageID.tolist()
    with (folder / f"{BOX_FILE}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(len(row["YMax"]) == len("0.000000") for row in rows)


def test_classes_and_hierarchy_belong_together(folder, boxes):
    with (folder / CLASS_FILE).open(newline="") as file:
        names = dict(csv.reader(file))
    assert len(names) == len(set(names.values())) == 600
    assert list(names.values())[:5] == ["Clothing", "Man", "Tree", "Person", "Woman"]
    assert set(boxes.LabelName.dropna()) <= set(names)
    places: list[str] = []
    kinds: set[str] = set()

    def walk(node: dict, above: tuple[str, ...]) -> None:
        assert node["LabelName"] not in above, "a class lies below itself"
        kinds.update(node)
        places.append(node["LabelName"])
        for child in (*node.get("Subcategory", ()), *node.get("Part", ())):
            walk(child, (*above, node["LabelName"]))

    root = json.loads((folder / HIERARCHY_FILE).read_text())
    walk(root, ())
    assert root["LabelName"] not in names
    assert kinds == {"LabelName", "Subcategory", "Part"}
    assert set(places) == {*names, root["LabelName"]}
    assert len(places) > len(set(places)), "some classes stand in two places"


def test_shares_are_near_the_published_ones(boxes, photos):
    known = boxes[boxes.Source == "xclick"]
    for name, share in FLAG_SHARES.items():
        assert (known[name] == 1).mean() == pytest.approx(share, rel=0.1, abs=0.002), name
    unknown = boxes[boxes.Source == "activemil"]
    assert 0.05 < len(unknown) / ROWS < 0.12
    assert (unknown[list(FLAG_SHARES)].fillna(-1) == -1).all(axis=None)
    counts = boxes.LabelName.value_counts(normalize=True)
    assert 0.08 < counts.iloc[0] < 0.12
    assert counts.iloc[:50].sum() > 0.7
    assert (counts < 1e-4).sum() > 50
    per_photo = boxes.ImageID.value_counts()
    assert per_photo.min() == 1
    assert 100 < per_photo.max() <= 700
    rotation = photos.Rotation.value_counts(normalize=True)
    assert rotation[["90.0", "180.0", "270.0"]].sum() == pytest.approx(0.026, abs=0.008)
    assert 0 < rotation[""] < 0.02
    assert photos.OriginalMD5.duplicated(keep=False).mean() == pytest.approx(0.001, abs=0.0005)
    assert photos.OriginalMD5.str.fullmatch("[A-Za-z0-9+/]{22}==").all()
    assert photos.Title.str.contains(",").any()
    assert photos.Title.str.contains('"').any()


def test_the_area_rule_leaves_half_of_the_boxes_and_a_third_of_the_photos_without(boxes):
    passes = area_rule(boxes)
    assert 0.45 < passes.mean() < 0.55
    assert 0.28 < 1 - passes.groupby(boxes.ImageID).any().mean() < 0.38


def test_boxes_lie_in_the_photo_and_some_in_each_other(boxes):
    sound = boxes.dropna().query("XMin < XMax")
    assert sound[list(EDGES)].stack().between(0, 1).all()
    assert (sound.YMin < sound.YMax).all()
    # Truncated objects end where the photo does; near duplicates and nested boxes are copies that need not.
    touches = (sound.XMin == 0) | (sound.XMax == 1) | (sound.YMin == 0) | (sound.YMax == 1)
    assert touches[sound.IsTruncated == 1].mean() > 0.9
    follows = sound.ImageID == sound.ImageID.shift()
    before = sound.shift()
    moved = np.abs(sound[list(EDGES)] - before[list(EDGES)]).max(axis=1)
    near = follows & (moved < 0.01) & (moved > 0) & area_rule(sound)
    assert near.sum() > ROWS / 500
    assert (sound.LabelName != before.LabelName)[near].mean() > 0.9
    inside = (sound.XMin >= before.XMin) & (sound.XMax <= before.XMax) & (sound.YMin >= before.YMin) & (sound.YMax <= before.YMax)
    assert (follows & inside).mean() > 0.04
    assert sound.duplicated().any()


def test_malformed_rows_are_there_and_no_more_than_asked_for(folder, boxes):
    text = pd.read_csv(folder / f"{BOX_FILE}.csv", dtype=str, keep_default_na=False)
    kinds = [text.LabelName == "", text.XMin == "", text.IsOccluded == "", text.XMin == "NaN", boxes.XMin >= boxes.XMax]
    assert [kind.sum() for kind in kinds] == [MALFORMED / DEFECTS] * DEFECTS


def test_bytes_depend_on_the_seed_alone(folder, tmp_path):
    for name, seed in {"same": 3, "other": 4}.items():
        make_annotations(tmp_path / name, ROWS, PHOTOS, seed=seed, malformed_share=MALFORMED / ROWS)
    assert files_of(tmp_path / "same") == files_of(folder)
    differing = {name for name, data in files_of(tmp_path / "other").items() if data != files_of(folder)[name]}
    assert differing == {f"{BOX_FILE}.csv", f"{PHOTO_FILE}.csv"}
    counts = np.full(50, 8)
    drawn, other = (draw_boxes(counts, 0, seed) for seed in (3, 4))
    assert (drawn["edges"] != other["edges"]).all(axis=1).mean() > 0.5


def test_a_smaller_one_looks_alike(boxes, tmp_path):
    make_annotations(tmp_path, ROWS // 2, PHOTOS // 2, seed=3)
    small = pd.read_csv(tmp_path / f"{BOX_FILE}.csv")
    assert len(small) == ROWS // 2
    assert area_rule(small).mean() == pytest.approx(area_rule(boxes).mean(), abs=0.04)


def test_other_forms_hold_the_same_rows(folder, tmp_path):
    """Compressed, cut into files and shuffled: the same lines, in the same order but for the last."""
    header, *lines = (folder / f"{BOX_FILE}.csv").read_bytes().splitlines()
    share = MALFORMED / ROWS
    make_annotations(tmp_path / "gzip", ROWS, PHOTOS, seed=3, compress=True, malformed_share=share)
    for name in (BOX_FILE, PHOTO_FILE):
        compressed = (tmp_path / "gzip" / f"{name}.csv.gz").read_bytes()
        assert gzip.decompress(compressed) == (folder / f"{name}.csv").read_bytes()
        # RFC 1952: flags (a file name would be one) and time.
        assert compressed[3:8] == bytes(5), "the bytes depend on when they were written, or under which name"

    make_annotations(tmp_path / "files", ROWS, PHOTOS, seed=3, files=3, malformed_share=share)
    parts = [(tmp_path / "files" / f"{BOX_FILE}-0000{part}-of-00003.csv").read_bytes().splitlines() for part in range(3)]
    assert [part[0] for part in parts] == [header] * 3
    assert [len(part) for part in parts] == [ROWS // 3 + 1] * 3
    assert [line for part in parts for line in part[1:]] == lines

    make_annotations(tmp_path / "shuffled", ROWS, PHOTOS, seed=3, order="shuffled", malformed_share=share)
    shuffled = (tmp_path / "shuffled" / f"{BOX_FILE}.csv").read_bytes().splitlines()[1:]
    assert shuffled != lines
    assert sorted(shuffled) == sorted(lines)


def test_rows_that_do_not_fit_the_photos_are_refused(tmp_path):
    with pytest.raises(ValueError, match="9 boxes do not fit 10 photos"):
        make_annotations(tmp_path, 9, 10)
    make_annotations(tmp_path, 10, 10)
    assert len(pd.read_csv(tmp_path / f"{BOX_FILE}.csv")) == 10


def test_the_ways_that_are_compared_accept_the_same_boxes(folder, boxes):
    table = folder / f"{BOX_FILE}.csv"
    published = select_published(table)
    assert sum(map(len, published.values())) == select_floor(table) == area_rule(boxes).sum()
