"""Each format that labelling tools export is read whole, and builds to shards with every box accounted for."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pbe_core.dataset_reader import find_imbalance, read_dataset
from pbe_core.errors import InputError
from pipelines.annotations import open_source
from pipelines.config import BuildSettings
from pipelines.dataset.samples import decode_segmentation
from pipelines.readers import ALL_FLAGS, READERS
from tests import format_files
from tests.conftest import VAE, run_build
from tests.format_files import BOXES, HEIGHT, WIDTH, WORLD, TrueBox

# How each is read; whether its photos have splits of their own, and its objects outlines.
FORMATS = {
    "ultralytics": ("yolo", True, True),
    "roboflow_yolo": ("yolo", True, True),
    "darknet": ("yolo", True, False),
    "labelstudio_yolo": ("yolo", False, True),
    "voc": ("voc", True, True),
    "roboflow_voc": ("voc", True, False),
    "labelimg": ("voc", False, False),
    "label_studio": ("label_studio", False, True),
    "label_studio_min": ("label_studio", False, True),
    "cvat": ("cvat", True, True),
    "roboflow_coco": ("coco", True, True),
}


def rows_of(kind: str, annotations: Path, photos: Path, **source: object) -> list[dict]:
    settings = BuildSettings(
        out=annotations.parent / "out", source={"kind": kind, "annotations": annotations, "photos": photos, **source}
    )
    opened = open_source(settings)
    names = opened.class_names
    rows = [row for batch in opened.read_boxes() for row in batch.to_pylist()]
    return [{**row, "name": names.get(row["label"], row["label"])} for row in rows]


def truth_of(file_name: str) -> tuple[TrueBox, ...]:
    return WORLD[Path(file_name).name]


@pytest.mark.parametrize("name", FORMATS)
def test_every_box_is_read_where_it_was_drawn(name, tmp_path):
    """Against the truth: labels, edges, splits, files of photos, outlines; all of it, and nothing else."""
    kind, splits, outlines = FORMATS[name]
    annotations, photos = getattr(format_files, name)(tmp_path / "set")
    settings = BuildSettings(out=tmp_path / "out", source={"kind": kind, "annotations": annotations, "photos": photos})
    source = open_source(settings)
    assert source.frame == ("stored" if kind == "coco" else "exif")
    known = {row["photo_id"]: row for batch in source.read_photos() for row in batch.to_pylist()}
    assert sorted(Path(row["file_name"]).name for row in known.values()) == sorted(WORLD)
    for row in known.values():
        assert (photos / row["file_name"]).is_file()
        assert not splits or row["split"] == ("validation" if Path(row["file_name"]).name[0] == "v" else "train")
    found = []
    for row in rows_of(kind, annotations, photos):
        assert row["problem"] is None, row["detail"]
        photo = known[row["photo_id"]]
        edges = [row["x_min"] * WIDTH, row["y_min"] * HEIGHT, row["x_max"] * WIDTH, row["y_max"] * HEIGHT]
        (box,) = [
            one for one in truth_of(photo["file_name"]) if one.label == row["name"] and np.allclose(one.edges, edges, atol=1e-3)
        ]
        found.append((photo["file_name"], box))
        assert bool(row["segmentation"]) == (outlines and bool(box.outline))
        if row["segmentation"]:
            mask = decode_segmentation(row["segmentation"], photo["width"], photo["height"])
            assert mask.shape == (HEIGHT, WIDTH)
            assert np.abs(mask.sum() / shoelace(box.outline) - 1) < 0.1
            # All but a border lies in the box.
            assert mask[box.top : box.bottom, box.left : box.right].sum() > 0.97 * mask.sum()
    assert len(found) == len(set(found)) == BOXES


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "labelimg"])  # That one says no sizes.
def test_photos_that_are_still_to_be_fetched_lose_no_box(name, tmp_path):
    """Without any photo here the same boxes are read, and photos keep their splits; but YOLO's outlines need photos' sizes."""
    kind, splits, outlines = FORMATS[name]
    annotations, photos = getattr(format_files, name)(tmp_path / "set")
    source = {"kind": kind, "annotations": annotations, "photos": photos, "frame": "stored"}
    here = [row for batch in open_source(BuildSettings(out=tmp_path, source=source)).read_boxes() for row in batch.to_pylist()]
    for path in (tmp_path / "set").rglob("*.jpg"):
        path.unlink()
    crawl = {"sources": ["https://example.org/{file_name}"], "contact": "me@example.org"}
    away = open_source(BuildSettings(out=tmp_path, source={**source, "photos": tmp_path / "store"}, crawl=crawl))
    found = [row for batch in away.read_boxes() for row in batch.to_pylist()]
    assert [row["problem"] for row in found] == [None] * BOXES
    columns = ["label", "x_min", "y_min", "x_max", "y_max", *(["split"] if splits else [])]
    assert sorted([row[column] for column in columns] for row in found) == sorted(
        [row[column] for column in columns] for row in here
    )
    if kind != "yolo":
        assert sum(bool(row["segmentation"]) for row in found) == (3 if outlines else 0)


def shoelace(outline: tuple[int, ...]) -> float:
    x, y = np.array(outline[::2]), np.array(outline[1::2])
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


@pytest.mark.parametrize("name", FORMATS)
def test_each_builds_to_shards_and_the_books_balance(name, tmp_path):
    """With objects cut out of their references, where there are outlines."""
    kind, splits, outlines = FORMATS[name]
    annotations, photos = getattr(format_files, name)(tmp_path / "set")
    folders = ["--source.kind", kind, "--source.annotations", str(annotations), "--source.photos", str(photos)]
    grey = ["--references.background", "grey"] if outlines else []
    share = [] if splits else ["--source.validation_share", "0.4", "--seed", "2"]
    rules = ["--selection.max_area", "1", "--selection.reject_flags", "[]", "--selection.min_object_share", "null"]
    out = tmp_path / "out"
    run_build(*folders, *share, *grey, *rules, "--views.size", "64", "--latents.vae", VAE, "--out", str(out))
    info = read_dataset(out)
    assert find_imbalance(info.books) is None
    assert (info.books.boxes, info.books.objects, info.books.samples) == (BOXES, BOXES, BOXES)
    assert len(pq.read_table(out / "index.parquet")) == BOXES


def test_what_is_known_of_the_kinds():
    """Each word is its reader's own, and names what a `Source` and the selection understand."""
    assert [reader.kind for reader in READERS.values()] == list(READERS)
    for reader in READERS.values():
        assert set(reader.flags) <= set(ALL_FLAGS)
    with pytest.raises(ValueError, match=r"source.kind: 'yollo' is none of open_images, coco, .*boxes, yolo.*PBE_READERS"):
        BuildSettings(out="out", source={"kind": "yollo", "annotations": "a", "photos": "b"})


@pytest.mark.parametrize(("name", "kind"), [("ultralytics", "yolo"), ("voc", "voc"), ("cvat", "cvat")])
def test_a_share_for_validation_is_refused_where_all_photos_have_splits(name, kind, tmp_path):
    annotations, photos = getattr(format_files, name)(tmp_path / "set")
    with pytest.raises(InputError, match=r"validation_share: .* has splits of its own"):
        rows_of(kind, annotations, photos, validation_share=0.3)


@pytest.mark.parametrize("kind", ["yolo", "voc", "label_studio", "cvat"])
def test_what_is_not_there_is_one_sentence(kind, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "nowhere", tmp_path / "empty", Path(__file__)):
        with pytest.raises(InputError) as caught:
            rows_of(kind, place, tmp_path)
        assert str(place) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_the_files_say_is_a_part_of_the_fingerprint(tmp_path):
    """A label that changes, a photo that comes: their hashes change, and nothing else does it."""
    annotations, photos = format_files.ultralytics(tmp_path / "set")
    settings = BuildSettings(out=tmp_path / "out", source={"kind": "yolo", "annotations": annotations, "photos": photos})

    def hashes() -> dict[str, str]:
        return dict(open_source(settings).read_elsewhere())

    before = hashes()
    assert hashes() == before
    label = tmp_path / "set" / "labels" / "train" / "t1.txt"
    label.write_text(label.read_text().replace("0 ", "1 ", 1))
    changed = hashes()
    assert changed["files of single photos"] != before["files of single photos"]
    assert changed["paths and sizes of photos"] == before["paths and sizes of photos"]
    format_files.photo(tmp_path / "set" / "images" / "train" / "t9.jpg")
    assert hashes()["paths and sizes of photos"] != before["paths and sizes of photos"]
