"""`source.frame`: boxes that were drawn on photos as viewers show them, for every kind of source, cut what they show."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pbe_core.errors import InputError
from pbe_core.images.decode import decode_photo
from pipelines.annotations import open_source
from pipelines.annotations.photo_names import size_in_frame
from pipelines.config import BuildSettings, SelectionSettings, SourceSettings
from pipelines.dataset.plan_shards import PlanRow
from pipelines.dataset.samples import decode_segmentation, prepare_photo
from pipelines.dataset.write_plan import fingerprint
from pipelines.selection.objects import select_objects
from tests.coco_files import annotation, image, write

WIDTH, HEIGHT = 96, 64
BOX = (8, 6, 40, 30)  # Left, top, width, height; in no place that turning or mirroring maps onto itself.
# What undoes ImageOps.exif_transpose.
STORED_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def phone_photo(path: Path, orientation: int) -> tuple[int, int]:
    """A dark photo with the box in red, as it is shown; its file holds it as a camera stores it. Returns the stored size."""
    shown = np.full((HEIGHT, WIDTH, 3), 30, np.uint8)
    x, y, width, height = BOX
    shown[y : y + height, x : x + width] = (250, 10, 10)
    picture = Image.fromarray(shown)
    stored = picture.transpose(STORED_BY[orientation]) if orientation > 1 else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.save(path, quality=95, subsampling=0, exif=exif)
    assert ImageOps.exif_transpose(Image.open(path)).size == (WIDTH, HEIGHT)
    return stored.size


def settings_for(folder: Path, annotations: Path, photos: Path, **source: Any) -> BuildSettings:
    return BuildSettings(
        out=folder / "out",
        source=SourceSettings(annotations=annotations, photos=photos, frame="exif", splits=("train",), **source),
        selection=SelectionSettings(reject_flags=()),
        views={"size": 64},
        references={"padding": 0},
    )


def references_of(settings: BuildSettings) -> list[tuple[dict[str, Any], np.ndarray, Any]]:
    """Select, and cut the references of all objects."""
    select_objects(settings, settings.out)
    found = []
    for row in pq.read_table(settings.out / "objects.parquet").to_pylist():
        (sample,) = prepare_photo([PlanRow.of({**row, "key": f"{row['object_id']}_0", "view": 0})], settings)
        assert hasattr(sample, "reference"), sample
        assert sample.record.photo_size == (WIDTH, HEIGHT)
        found.append((row, decode_photo(sample.reference, frame="stored"), sample.record))
    return found


def is_red(reference: np.ndarray) -> bool:
    return bool(reference.shape == (BOX[3], BOX[2], 3) and (reference[..., 0] > 200).all() and (reference[..., 1] < 60).all())


def test_coco_boxes_on_photos_as_shown_are_cut_where_they_were_drawn(tmp_path):
    """All eight ways in which EXIF turns a photo; sizes in the file may be those shown, those stored, of a copy, or missing."""
    images, annotations = [], []
    for orientation in range(1, 9):
        for said in ("shown", "stored", "half", "half as stored", "missing"):
            number = len(images)
            stored = phone_photo(tmp_path / "photos" / f"{number}.jpg", orientation)
            scale = 0.5 if "half" in said else 1
            size = [int(side * scale) for side in (stored if "stored" in said else (WIDTH, HEIGHT))]
            size = [None, -1] if said == "missing" else size
            images.append(image(number, file_name=f"{number}.jpg", width=size[0], height=size[1]))
            x, y, width, height = box = [side * scale for side in BOX]
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(annotation(number, image_id=number, bbox=box, segmentation=[polygon]))
    path = write(tmp_path / "boxes.json", annotations, images)
    found = references_of(settings_for(tmp_path, path, tmp_path / "photos", kind="coco", validation_share=0.0))
    assert len(found) == len(annotations)
    for row, reference, record in found:
        assert is_red(reference), row
        assert (row["width"], row["height"]) in ((WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2))
        assert decode_segmentation(record.reference_mask, BOX[2], BOX[3]).mean() > 0.9


def test_the_plan_of_photos_as_shown_depends_on_their_headers(tmp_path):
    """And not where nobody asked: boxes of COCO and Open Images are of the pixels as stored by default, own ones as shown."""
    phone_photo(tmp_path / "photos" / "1.jpg", 6)
    path = write(tmp_path / "boxes.json", [annotation(1)], [image(7, file_name="1.jpg", width=HEIGHT, height=WIDTH)])
    shown = settings_for(tmp_path, path, tmp_path / "photos", kind="coco")
    stored = shown.model_copy(update={"source": shown.source.model_copy(update={"frame": None})})
    before = open_source(shown).read_elsewhere()
    assert open_source(stored).read_elsewhere() == {}
    assert (open_source(shown).frame, open_source(stored).frame) == ("exif", "stored")
    frames = [fingerprint(settings, {}, None)["settings"]["source"]["frame"] for settings in (shown, stored)]
    assert frames == ["exif", "stored"]
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "photos" / "1.jpg")
    assert open_source(shown).read_elsewhere() != before
    assert SourceSettings(annotations=path, photos=tmp_path).photo_frame == "stored"
    own = {"kind": "boxes", "unit": "pixel", "annotations": path, "photos": tmp_path}
    assert [SourceSettings(**own, frame=frame).photo_frame for frame in (None, "stored")] == ["exif", "stored"]


@pytest.mark.parametrize(
    ("said", "shown", "used"),
    [
        ((40, 30), (40, 30), (40, 30)),
        ((30, 40), (40, 30), (40, 30)),  # As stored.
        ((20, 15), (40, 30), (20, 15)),  # A smaller copy, as shown,
        ((15, 20), (40, 30), (20, 15)),  # and as stored.
        ((100, 101), (101, 100), (101, 100)),  # Nearly square: both would do but for rounding.
        ((101, 100), (101, 100), (101, 100)),
        ((50, 50), (40, 30), (50, 50)),  # Another photo: packing finds out.
    ],
)
def test_which_size_a_file_gives_is_told_by_the_photo(said, shown, used):
    assert size_in_frame(said, shown) == used


def test_tables_in_open_images_format_may_be_of_photos_as_shown(tmp_path):
    """But not where their Rotation counts from the stored photo: each would be turned twice."""
    x, y, width, height = BOX
    lines = ["ImageID,LabelName,XMin,XMax,YMin,YMax"]
    for orientation in range(1, 9):
        phone_photo(tmp_path / "train" / f"{orientation:016x}.jpg", orientation)
        edges = (x / WIDTH, (x + width) / WIDTH, y / HEIGHT, (y + height) / HEIGHT)
        lines.append(f"{orientation:016x},/m/1,{','.join(map(str, edges))}")
    (tmp_path / "train-annotations-bbox.csv").write_text("\n".join(lines) + "\n")
    found = references_of(settings_for(tmp_path, tmp_path, tmp_path))
    assert [is_red(reference) for _, reference, _ in found] == [True] * 8
    metadata = f"ImageID,OriginalURL,License,Author,Rotation\n{1:016x},http://u,http://l,A,90.0\n"
    (tmp_path / "train-images-boxable-with-rotation.csv").write_text(metadata)
    with pytest.raises(InputError, match=r"with-rotation\.csv: its column Rotation turns .* leave source.frame out, or take"):
        open_source(settings_for(tmp_path, tmp_path, tmp_path))
