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
    assert ",".join(BOX_COLUMNS) == ",".join(boxes.columns) == OFFICIAL_BOX_COLUMNS
    assert ",".join(PHOTO_COLUMNS) == ",".join(photos.columns) == OFFICIAL_PHOTO_COLUMNS
    assert (len(boxes), boxes.ImageID.nunique(), len(photos)) == (ROWS, PHOTOS, PHOTOS)
    assert photos.ImageID.str.fullmatch("[0-9a-f]{16}").all()
    assert photos.ImageID.is_monotonic_increasing
    assert boxes.ImageID.drop_duplicates().tolist() == photos.ImageID.tolist()
    text = pd.read_csv(folder / f"{BOX_FILE}.csv", dtype=str, keep_default_na=False)
    assert (text.YMax.str.len() == len("0.000000")).all()
    kinds = [text.LabelName == "", text.XMin == "", text.IsOccluded == "", text.XMin == "NaN", boxes.XMin >= boxes.XMax]
    assert [kind.sum() for kind in kinds] == [MALFORMED / DEFECTS] * DEFECTS, "malformed rows are as many as asked for"


def test_classes_and_hierarchy_belong_together(folder, boxes):
    with (folder / CLASS_FILE).open(newline="") as file:
        names = dict(csv.reader(file))
    assert len(names) == len(set(names.values())) == 600
    assert list(names.values())[:5] == ["Clothing", "Man", "Tree", "Person", "Woman"]
    assert set(boxes.LabelName.dropna()) <= set(names)
    places: list[str] = []

    def walk(node: dict, above: tuple[str, ...]) -> None:
        assert node["LabelName"] not in above, "a class lies below itself"
        places.append(node["LabelName"])
        for child in (*node.get("Subcategory", ()), *node.get("Part", ())):
            walk(child, (*above, node["LabelName"]))

    root = json.loads((folder / HIERARCHY_FILE).read_text())
    walk(root, ())
    assert root["LabelName"] not in names
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
    assert rotation[["90.0", "180.0", "270.0"]].sum() == pytest.approx(0.026, abs=0.01)
    assert photos.OriginalMD5.duplicated(keep=False).mean() == pytest.approx(0.001, abs=0.0005)
    passes = area_rule(boxes)
    assert 0.45 < passes.mean() < 0.55, "the area rule leaves half of the boxes"
    assert 0.28 < 1 - passes.groupby(boxes.ImageID).any().mean() < 0.38, "and a third of the photos without"


def test_boxes_lie_in_the_photo_and_some_in_each_other(boxes):
    sound = boxes.dropna().query("XMin < XMax")
    assert sound[list(EDGES)].stack().between(0, 1).all()
    assert (sound.YMin < sound.YMax).all()
    follows, before = sound.ImageID == sound.ImageID.shift(), sound.shift()
    moved = np.abs(sound[list(EDGES)] - before[list(EDGES)]).max(axis=1)
    near = follows & (moved < 0.01) & (moved > 0) & area_rule(sound)
    assert near.sum() > ROWS / 500
    inside = (sound.XMin >= before.XMin) & (sound.XMax <= before.XMax) & (sound.YMin >= before.YMin) & (sound.YMax <= before.YMax)
    assert (follows & inside).mean() > 0.04
    assert sound.duplicated().any()


def test_bytes_depend_on_the_seed_alone(folder, tmp_path):
    for name, seed in {"same": 3, "other": 4}.items():
        make_annotations(tmp_path / name, ROWS, PHOTOS, seed=seed, malformed_share=MALFORMED / ROWS)
    assert files_of(tmp_path / "same") == files_of(folder)
    differing = {name for name, data in files_of(tmp_path / "other").items() if data != files_of(folder)[name]}
    assert differing == {f"{BOX_FILE}.csv", f"{PHOTO_FILE}.csv"}


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


def test_the_ways_that_are_compared_accept_the_same_boxes(folder, boxes):
    table = folder / f"{BOX_FILE}.csv"
    published = select_published(table)
    assert sum(map(len, published.values())) == select_floor(table) == area_rule(boxes).sum()
