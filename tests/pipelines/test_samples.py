"""One plan row and its photo -> a sample: turned photos, outlines of objects, and what only the photo tells."""

import errno
import io
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pbe_core.images.decode import PhotoError, decode_photo
from pbe_core.photo_files import photo_path
from pbe_core.settings import load_settings, preset
from pipelines.config import BuildSettings
from pipelines.dataset.plan_shards import PlanRow
from pipelines.dataset.samples import OF_PHOTOS, Failure, decode_segmentation, encode_segmentation, prepare_photo, prepare_sample
from schemas.tables import FAILURE_CODES, OBJECTS

ROW = PlanRow.of(dict.fromkeys(OBJECTS.names) | {
    "key": "p-0_0", "view": 0, "split": "train", "photo_id": "p", "object_id": "p-0", "label": "/m/1", "label_name": "Disc",
    "x_min": 0.25, "x_max": 0.5, "y_min": 0.1, "y_max": 0.4,
})  # fmt: skip

BOXES = {"kind": "boxes", "unit": "fraction"}


def settings_for(folder: Path, source: dict | None = None, views: dict | None = None, **groups) -> BuildSettings:
    source = {"annotations": folder, "photos": folder, **(source or {})}
    return BuildSettings(out=folder, source=source, views={"size": 64, **(views or {})}, **groups)


def photo_with_a_box(width: int = 200, height: int = 120) -> np.ndarray:
    """Noise, and the row's box in red."""
    photo = np.random.default_rng(0).integers(0, 60, (height, width, 3)).astype(np.uint8)
    photo[int(0.1 * height) : int(0.4 * height), int(0.25 * width) : int(0.5 * width)] = (250, 10, 10)
    return photo


@pytest.mark.parametrize("rotation", [0, 90, 180, 270, None])
def test_photo_and_box_are_turned_together(rotation, tmp_path):
    (tmp_path / "train").mkdir()
    Image.fromarray(photo_with_a_box()).save(tmp_path / "train" / "p.jpg", quality=95)
    sample = prepare_photo([replace(ROW, rotation=rotation)], settings_for(tmp_path, references={"padding": 0}))[0]
    sideways = rotation in (90, 270)
    assert sample.record.rotation == (rotation or 0)
    assert sample.record.photo_size == ((120, 200) if sideways else (200, 120))
    reference = decode_photo(sample.reference, frame="stored")
    assert reference.shape == ((50, 36, 3) if sideways else (36, 50, 3))
    assert reference[..., 0].mean() > 230, "the reference shows the box"
    x_min, y_min, x_max, y_max = (round(value) for value in sample.record.box_in_view)
    assert sample.view[y_min + 2 : y_max - 2, x_min + 2 : x_max - 2, 0].mean() > 230, "so does the view"


def test_exif_counts_where_boxes_were_drawn_on_what_viewers_show(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Shown turned by 90 degrees clockwise.
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(photo_with_a_box())).save(buffer, "JPEG", quality=95, exif=exif)
    (tmp_path / "any name.jpg").write_bytes(buffer.getvalue())
    row = replace(ROW, file_name="any name.jpg")
    shown = prepare_photo([row], settings_for(tmp_path, BOXES, references={"padding": 0}))[0]
    assert shown.record.photo_size == (200, 120)
    assert decode_photo(shown.reference, frame="stored")[..., 0].mean() > 230
    stored = prepare_photo([row], settings_for(tmp_path, {**BOXES, "frame": "stored"}))[0]
    assert stored.record.photo_size == (120, 200)
    assert settings_for(tmp_path).source.photo_frame == settings_for(tmp_path, {"kind": "coco"}).source.photo_frame == "stored"


@pytest.mark.parametrize("background", ["keep", "grey"])
def test_outlines_are_kept_and_cut_the_reference_if_wished(background, tmp_path):
    photo = photo_with_a_box()
    pixels = np.zeros((120, 200), bool)
    pixels[20:40, 60:80] = True
    row = replace(ROW, segmentation=encode_segmentation(pixels), width=200, height=120)
    sample = prepare_sample(row, photo, "00", settings_for(tmp_path, references={"padding": 5, "background": background}))
    reference = decode_photo(sample.reference, frame="stored")
    height, width = reference.shape[:2]
    mask = decode_segmentation(sample.record.reference_mask, width, height)
    x_min, y_min, _, _ = sample.record.reference_window
    assert mask.sum() == 400
    assert mask[20 - y_min : 40 - y_min, 60 - x_min : 80 - x_min].all()
    outside = reference[~mask]
    assert (np.abs(outside.astype(int) - 127).mean() < 8) == (background == "grey")
    assert prepare_sample(ROW, photo, "00", settings_for(tmp_path)).record.reference_mask is None


@pytest.mark.parametrize(
    ("size", "fails"),
    [((200, 120), False), ((400, 240), False), ((401, 240), False), ((120, 200), True), ((200, 100), True)],
)
def test_a_photo_of_another_shape_than_the_annotations_say_is_not_used(size, fails, tmp_path):
    row = replace(ROW, width=size[0], height=size[1])
    sample = prepare_sample(row, photo_with_a_box(), "00", settings_for(tmp_path))
    assert isinstance(sample, Failure) == fails
    if fails:
        assert (sample.code, sample.detail) == (
            "shape_mismatch",
            f"the photo has 200x120 px, the annotations say {size[0]}x{size[1]}"
            + (": turned by its EXIF? then set source.frame: exif" if size == (120, 200) else ""),
        )


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        ({"min_side": 36}, None), ({"min_side": 37}, "reference_too_small"),
        ({"max_aspect": 1.4}, None), ({"max_aspect": 1.38}, "too_elongated"),
    ],
)  # fmt: skip
def test_rules_in_px_are_asked_of_the_photo_where_the_tables_are_silent(rules, code, tmp_path):
    """The box has 50 x 36 px."""
    sample = prepare_sample(ROW, photo_with_a_box(), "00", settings_for(tmp_path, selection=rules))
    assert (sample.code if isinstance(sample, Failure) else None) == code
    known = replace(ROW, width=200, height=120)
    assert not isinstance(prepare_sample(known, photo_with_a_box(), "00", settings_for(tmp_path, selection=rules)), Failure)


def test_a_jpeg_without_an_end_mark_is_packed_or_refused_as_is_set(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(photo_with_a_box()).save(buffer, "JPEG", quality=95)
    (tmp_path / "p.jpg").write_bytes(buffer.getvalue()[:-2])
    rows = [replace(ROW, file_name="p.jpg")]
    [sample] = prepare_photo(rows, settings_for(tmp_path, {"kind": "coco"}))
    assert sample.record.photo_size == (200, 120)
    [failure] = prepare_photo(rows, settings_for(tmp_path, {"kind": "coco", "missing_end_mark": "refuse"}))
    assert failure.code == "no_end_mark"
    assert {"no_end_mark", "unsupported_format"} <= OF_PHOTOS & FAILURE_CODES.keys()


def test_views_are_zoomed_as_the_settings_say(tmp_path):
    """Of a photo of 200 x 120 px: published, all sides are trimmed alike from a square as high as the photo."""
    windows = {}
    for zoom in ("published", "free"):
        settings = settings_for(tmp_path, views={"zoom": zoom})
        rows = [replace(ROW, view=view) for view in range(40)]
        windows[zoom] = [prepare_sample(row, photo_with_a_box(), "00", settings).record.window for row in rows]
    assert all(side == 120 - 2 * top for _, top, side in windows["published"])
    assert not all(side == 120 - 2 * top for _, top, side in windows["free"])
    default = [prepare_sample(row, photo_with_a_box(), "00", settings_for(tmp_path)).record.window for row in rows]
    assert default == windows["free"]


def test_pictures_are_resized_as_the_settings_say(tmp_path):
    photo = photo_with_a_box(800, 480)
    both = {"resize": "published"}
    published = prepare_sample(ROW, photo, "00", settings_for(tmp_path, references={"side": 48, **both}, views=both))
    left, top, side = published.record.window
    shown = cv2.resize(photo[top : top + side, left : left + side], (64, 64), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(published.view, shown)
    assert decode_photo(published.reference, frame="stored").shape == (48, 48, 3)
    smooth = prepare_sample(ROW, photo, "00", settings_for(tmp_path, references={"side": 48}))
    assert smooth.record.window == published.record.window
    assert smooth.view[..., 2].std() < 0.8 * published.view[..., 2].std(), "noise is averaged"
    assert decode_photo(smooth.reference, frame="stored").shape != (48, 48, 3)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_mask_kinds_come_in_the_configured_share(share, tmp_path):
    """150 views with 2 masks: the share of Bessel masks lies within four standard deviations of the setting."""
    settings = settings_for(tmp_path, masks={"arbitrary_mask_prob": share})
    made = [prepare_sample(replace(ROW, object_id=f"x-{n}"), photo_with_a_box(), "00", settings) for n in range(150)]
    kinds = [kind for sample in made for kind in sample.record.mask_kinds]
    assert abs(kinds.count("bessel") / 300 - share) < 4 * (share * (1 - share) / 300) ** 0.5


def test_views_that_no_square_holds_are_padded_or_rejected_and_masks_stay_on_the_photo(tmp_path):
    wide, photo = replace(ROW, x_min=0.02, x_max=0.98, y_min=0.0, y_max=1.0), photo_with_a_box(300, 100)
    for number in range(20):
        sample = prepare_sample(replace(wide, object_id=f"x-{number}"), photo, "00", settings_for(tmp_path))
        assert sample.record.padded
        assert sample.view.shape == (64, 64, 3)
        _, top, side = sample.record.window
        rows = np.flatnonzero(sample.masks.any(axis=(0, 2)))
        assert rows.min() >= (0 - top) / side * 64 - 1
        assert rows.max() <= (100 - top) / side * 64 + 1
    rejected = prepare_sample(wide, photo, "00", settings_for(tmp_path, views={"no_square": "reject"}))
    assert rejected.code == "no_square"


def test_the_papers_presets_zoom_as_published_and_the_tiny_one_does_not():
    presets = {name: load_settings(BuildSettings, "build", [], preset(name)).views for name in ("open_images", "coco", "tiny")}
    assert [(views.zoom, views.max_zoom) for views in presets.values()] == [("published", 0.6), ("published", 0.6), ("free", 0.9)]


LOOP, TOO_LONG = "loop.jpg", f"{'x' * 300}.jpg"


@pytest.mark.parametrize(
    ("name", "code"), [(LOOP, "unreadable"), (TOO_LONG, "unreadable"), ("a\0b.jpg", "missing"), ("folder.jpg", "missing")]
)
def test_a_name_that_the_system_refuses_costs_its_own_samples(name, code, tmp_path):
    (tmp_path / LOOP).symlink_to(LOOP)
    (tmp_path / "folder.jpg").mkdir()
    rows = [replace(ROW, file_name=name, view=view) for view in (0, 1)]
    failures = prepare_photo(rows, settings_for(tmp_path, BOXES))
    assert [failure.code for failure in failures] == [code, code]
    assert code in OF_PHOTOS & FAILURE_CODES.keys(), "the next build looks at it again"


@pytest.mark.parametrize(
    ("broken", "number", "code"),
    [
        *(("read_bytes", number, "unreadable") for number in (errno.EIO, errno.ESTALE, errno.EACCES)),
        ("read_bytes", errno.ENOENT, "missing"),
        # A trouble of the machine is no photo's fault.
        ("read_bytes", errno.EMFILE, None),
        ("stat", errno.EMFILE, None),
    ],
)
def test_a_photo_that_cannot_be_read_costs_its_own_samples(broken, number, code, tmp_path, monkeypatch):
    def fail(path: Path, **options: bool) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    (tmp_path / "a.jpg").touch()
    rows, settings = [replace(ROW, file_name="a.jpg")], settings_for(tmp_path, BOXES)
    monkeypatch.setattr(Path, broken, fail)
    if code is None:
        with pytest.raises(OSError, match="Too many open files"):
            prepare_photo(rows, settings)
    else:
        [failure] = prepare_photo(rows, settings)
        assert (failure.code, failure.detail) == (code, f"{os.strerror(number)}: {tmp_path / 'a.jpg'}")


def test_photos_are_found_below_the_root_or_a_folder_of_the_split(tmp_path):
    """Also where the first place cannot be read."""
    (tmp_path / "train").mkdir()
    (tmp_path / LOOP).symlink_to(LOOP)
    for path in (tmp_path / "a.png", tmp_path / "train" / "b.png", tmp_path / "train" / LOOP):
        path.touch()
        assert photo_path(tmp_path, "train", "x", path.name) == path
    for path in (tmp_path / "train_0" / "0a.jpg", tmp_path / "train" / "0a.jpg"):  # As Open Images' archives unpack, and plainly.
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert photo_path(tmp_path, "train", "0a") == path
    with pytest.raises(PhotoError, match="missing"):
        photo_path(tmp_path, "train", "x", "c.png")
