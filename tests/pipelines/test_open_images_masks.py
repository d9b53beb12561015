"""Open Images' object masks: tables and zips as published, joined by box, cut right, and every box accounted for."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pbe_core.errors import InputError
from pipelines.annotations import open_source
from pipelines.annotations.mask_files import MaskFiles, is_place, read_place
from pipelines.annotations.open_images_masks import mask_containers
from pipelines.config import BuildSettings, SelectionSettings, SourceSettings
from pipelines.dataset.write_plan import hash_inputs
from pipelines.selection import mask_join
from pipelines.selection.mask_join import join_masks
from pipelines.selection.objects import select_objects
from schemas.tables import COORDINATES
from tests.conftest import VAE, run_build
from tests.mask_files import HEIGHT, WIDTH, build_samples, check_reference, ellipse, photo_of, png, save_photo

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
MASKS = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks\n"
METADATA = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,"
    "OriginalSize,OriginalMD5,Thumbnail300KURL,Rotation\n"
)
TABLE = "train-annotations-object-segmentation.csv"
LABEL = "/m/0cmf2"
# x_min, x_max, y_min, y_max with 7 digits, as in tables of boxes since V6; a half of the sixth may be rounded either way.
LEFT, RIGHT = (0.0765625, 0.4453125, 0.1234567, 0.8765433), (0.5328125, 0.9671875, 0.2, 0.7)
# First digit of the photo's id -> its Rotation, and the size of its masks: the photo's, larger, smaller and rounded.
PHOTOS = {
    "0": ("0", (WIDTH, HEIGHT)),
    "1": ("90", (320, 240)),
    "2": ("180", (427, 320)),
    "3": ("270", (100, 75)),
    "a": ("", (1600, 1200)),
}
DIGITS = {"left": "11111111", "right": "22222222"}


def photo_id(digit: str) -> str:
    return f"{digit}fedcba987654321"


def mask_name(digit: str, side: str) -> str:
    return f"{photo_id(digit)}_m0cmf2_{DIGITS[side]}.png"


def mask_row(digit: str, side: str, **changes: str) -> str:
    """With 6 digits, of which the last was cut off or rounded up."""
    x_min, x_max, y_min, y_max = LEFT if side == "left" else RIGHT
    cells = {
        "MaskPath": mask_name(digit, side),
        "ImageID": photo_id(digit),
        "LabelName": LABEL,
        "BoxID": DIGITS[side],
        "BoxXMin": f"{int(x_min * 1e6) / 1e6:.6f}",
        "BoxXMax": f"{x_max + 1e-9:.6f}",
        "BoxYMin": f"{y_min:.6f}",
        "BoxYMax": f"{y_max:.6f}",
        "PredictedIoU": "0.81",
        "Clicks": "0.15808 0.26206 1;0.90333 0.14288 0",
    }
    return ",".join((cells | changes).values()) + "\n"


def covered(side: str, size: tuple[int, int]) -> np.ndarray:
    x_min, x_max, y_min, y_max = LEFT if side == "left" else RIGHT
    return ellipse(x_min, y_min, x_max, y_max, *size)


@pytest.fixture
def world(tmp_path) -> Path:
    """Five photos with two objects each; the masks of photo 3 are unpacked, the others in a zip for each first digit."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    boxes, masks, metadata = HEADER, MASKS, METADATA
    for digit, (rotation, size) in PHOTOS.items():
        metadata += f"{photo_id(digit)},train,https://x/{digit},,https://l/,,,,,,,{rotation}\n"
        save_photo(
            tmp_path / "photos" / "train" / f"{photo_id(digit)}.jpg", photo_of(*(covered(s, (WIDTH, HEIGHT)) for s in DIGITS))
        )
        for side, box in (("left", LEFT), ("right", RIGHT)):
            boxes += f"{photo_id(digit)},xclick,{LABEL},1,{','.join(map(str, box))},0,0,0,0,0\n"
            masks += mask_row(digit, side)
            data = png(covered(side, size))
            if digit == "3":
                (folder / "train-masks").mkdir(exist_ok=True)
                (folder / "train-masks" / mask_name(digit, side)).write_bytes(data)
            else:
                how = zipfile.ZIP_DEFLATED if side == "left" else zipfile.ZIP_STORED
                with zipfile.ZipFile(folder / f"train-masks-{digit}.zip", "a", how) as archive:
                    archive.writestr(mask_name(digit, side), data)
    (folder / "train-annotations-bbox.csv").write_text(boxes)
    (folder / TABLE).write_text(masks)
    (folder / "train-images-boxable-with-rotation.csv").write_text(metadata)
    return folder


def build(folder: Path, *options: str, check: bool = True):
    given = [
        "--source.annotations",
        str(folder),
        "--source.photos",
        str(folder.parent / "photos"),
        "--source.splits",
        '["train"]',
    ]
    out = folder.parent / "out"
    more = ["--out", str(out), "--latents.vae", VAE, "--selection.nested_share", "null", *options]
    return out, run_build(*given, *more, check=check)


def add(folder: Path, *rows: str) -> None:
    with (folder / TABLE).open("a") as file:
        file.writelines(rows)


@pytest.mark.parametrize("background", ["grey", "keep"])
def test_masks_in_zips_and_folders_at_any_size_are_cut_with_photo_and_box(background, world):
    """Turned photos too: mask, box and photo are all in the stored frame, and Rotation turns all three."""
    out, _ = build(world, "--references.background", background)
    samples = build_samples(out)
    assert sorted(samples) == sorted(map(photo_id, PHOTOS))
    for digit, (rotation, _) in PHOTOS.items():
        assert len(samples[photo_id(digit)]) == 2
        for sample in samples[photo_id(digit)]:
            left_first = sample.record.box[0] if rotation in ("", "0") else None
            turned = {s: np.rot90(covered(s, (WIDTH, HEIGHT)), int(rotation or 0) // 90) for s in DIGITS}
            x_min, y_min, x_max, y_max = map(int, sample.record.box)
            inside = {s: pixels[y_min:y_max, x_min:x_max].mean() for s, pixels in turned.items()}
            side = max(inside, key=inside.__getitem__)
            assert left_first is None or side == ("left" if left_first < WIDTH / 2 else "right")
            check_reference(sample, turned[side], background)
    places = pq.read_table(out / "objects.parquet")["segmentation"].to_pylist()
    assert all(map(is_place, places))
    assert '"train-masks/3' in "".join(places)
    assert '"train-masks-a.zip","afed' in "".join(places)
    notes = (out / "selection.json").read_text()
    assert "object masks that belong to a box, by photo, label and edges: 10 of 10" in notes


def test_what_does_not_join_is_counted_and_what_cannot_be_read_fails_its_sample_alone(world):
    """A box without a mask is built as ever, unless the mask is there and unusable: its reference would show what it must not."""
    add(
        world,
        mask_row("0", "left", ImageID=photo_id("9"), MaskPath=mask_name("0", "left")),  # No such photo.
        mask_row("0", "left", LabelName="/m/other", MaskPath=mask_name("0", "left")),
        mask_row("0", "left", BoxXMin="0.076560", MaskPath=mask_name("0", "left")),  # 2e-6 away.
        mask_row("0", "left", MaskPath="gone.png"),
        mask_row("0", "left", BoxXMin="wide"),
        "short,row\n",
    )
    masks = world / "train-masks"
    (masks / mask_name("3", "left")).write_bytes(png(covered("left", (75, 100))))
    (masks / mask_name("3", "right")).write_bytes(png(covered("right", (100, 75)))[:60])
    lines = (world / TABLE).read_text().splitlines(keepends=True)
    (world / TABLE).write_text("".join(line for line in lines if not line.startswith(mask_name("2", "left"))))
    out, done = build(world, "--references.background", "grey")
    samples = build_samples(out)
    assert {len(found) for found in samples.values()} == {2}
    assert len(samples) == 4
    by_mask = sorted(sample.record.reference_mask is None for found in samples.values() for sample in found)
    assert by_mask == [False] * 7 + [True]
    failures = pq.read_table(out / "failures.parquet").to_pylist()
    assert [(row["code"], row["photo_id"]) for row in failures] == [("bad_mask", photo_id("3"))] * 2
    # Both are turned by the photo's Rotation of 270 degrees.
    turned = "the object's mask has 100x75 px, the photo 120x160"
    assert sum(turned in row["detail"] for row in failures) == 1, "the other one is damaged"
    notes = (out / "selection.json").read_text()
    assert "by photo, label and edges: 9 of 12; 3 belong to none" in notes
    assert "object masks whose PNG is not there: 1, for example gone.png" in notes
    assert f"rows of object masks that cannot be read: 2, for example {TABLE}, line 15: BoxXMin is 'wide'" in notes
    assert "1 of 10 objects have no outline" in notes
    assert "min_object_share is asked when these are read" in notes
    assert done.returncode == 0


def test_an_object_that_covers_too_little_of_its_reference_fails_when_its_mask_is_read(world):
    thin = covered("left", (320, 240))
    thin[:, 60:] = False
    with zipfile.ZipFile(world / "train-masks-1.zip", "w") as archive:
        archive.writestr(mask_name("1", "left"), png(thin))
        archive.writestr(mask_name("1", "right"), png(np.zeros((240, 320), bool)))
    out, _ = build(world, "--references.background", "grey")
    build_samples(out)
    codes = [(row["photo_id"], row["code"]) for row in pq.read_table(out / "failures.parquet").to_pylist()]
    assert codes == [(photo_id("1"), "reference_too_empty")] * 2


def selected(folder: Path, **references: str):
    source = SourceSettings(annotations=folder, photos=folder.parent / "photos", splits=("train",))
    settings = BuildSettings(
        out=folder.parent / "plan", source=source, references=references, selection=SelectionSettings(min_area=0)
    )
    opened = open_source(settings)
    return select_objects(settings, settings.out, opened), opened, hash_inputs(settings, opened)


def test_places_change_the_fingerprint_and_no_order_of_rows_does(world):
    """Which PNGs are there decides which boxes have masks; what is in them, as of photos, each sample shows itself."""
    _, _, before = selected(world)
    assert "masks of train" in before
    table = pq.read_table(world.parent / "plan" / "objects.parquet")
    head, *rows = (world / TABLE).read_text().splitlines(keepends=True)
    (world / TABLE).write_text("".join([head, *reversed(rows)]))
    _, _, reversed_rows = selected(world)
    assert reversed_rows["masks of train"] == before["masks of train"]
    assert pq.read_table(world.parent / "plan" / "objects.parquet").equals(table)
    (world / "train-masks-0.zip").unlink()
    selection, _, after = selected(world)
    assert after["masks of train"] != before["masks of train"]
    assert selection.objects_with_outline == 8
    assert any("whose PNG is not there: 2" in note for note in selection.notes)


@pytest.mark.parametrize(
    "place",
    ["train-masks-0", "train-masks", "masks", "masks/train", "train/masks", "train/labels/masks/0", "masks/train-masks-0"],
)
def test_pngs_are_found_in_every_layout(place, tmp_path):
    """As unzipped into one folder or into one for each zip, as FiftyOne keeps them, and beside the tables, as Datumaro does."""
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "x.png").write_bytes(b"")
    assert mask_containers(tmp_path, "train") == (tmp_path / place,)
    (tmp_path / "annotations").mkdir()
    beside = mask_containers(tmp_path / "annotations", "train")
    assert beside == ((tmp_path / place,) if place in ("masks", "masks/train", "masks/train-masks-0") else ())
    (found,) = MaskFiles.of(tmp_path / "annotations", beside).find(["x.png"])
    assert not beside or read_place(str(found), tmp_path / "annotations", tmp_path / "no photos") == b""
    assert ("train" in place) == (not mask_containers(tmp_path, "validation"))


def test_tables_without_pngs_and_the_reverse_are_told_and_grey_is_refused(world):
    for path in world.glob("train-masks*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, opened, _ = selected(world)
    assert opened.read_masks is None
    assert any(f"{TABLE}: not read, as there is no PNG" in note for note in opened.notes)
    with pytest.raises(InputError, match=r"references\.background: grey takes object masks, and .* has none: .*<split>-annot"):
        selected(world, background="grey")
    (world / TABLE).unlink()
    with zipfile.ZipFile(world / "train-masks-0.zip", "w") as archive:
        archive.writestr("a.png", b"")
    _, opened, _ = selected(world)
    assert any("train-masks-0.zip: object masks are not read without their table" in note for note in opened.notes)


def test_a_damaged_zip_stops_before_any_work(world):
    data = (world / "train-masks-0.zip").read_bytes()
    (world / "train-masks-0.zip").write_bytes(data[:-30])
    with pytest.raises(InputError, match=r"train-masks-0\.zip: no zip that can be read, or cut off"):
        selected(world)


@pytest.mark.parametrize("at_once", [1, 70, 4_000_000])
def test_masks_join_the_nearest_box_of_their_photo_and_label(at_once, monkeypatch):
    """Against a plain loop, over boxes that lie close together, and labels and photos that share edges."""
    monkeypatch.setattr(mask_join, "_PAIRS_AT_ONCE", at_once)
    random = np.random.default_rng(0)
    edges = np.round(random.choice([0.1, 0.1 + 1e-6, 0.1 + 4e-7, 0.2], (300, 4)), 7)
    photo, label = random.integers(0, 3, (2, 300))

    def table(rows: np.ndarray, masks: list[str | None]) -> pa.Table:
        columns = {name: edges[rows, place] for place, name in enumerate(COORDINATES)}
        columns |= {"photo": photo[rows].astype(np.uint64), "label": label[rows].astype(np.int32)}
        return pa.table(columns).append_column("segmentation", pa.array(masks, pa.string()))

    boxes, masks = np.arange(200), np.arange(200, 300)
    names = [f"png:{number:03}" for number in random.permutation(masks)]
    joined, count = join_masks(table(boxes, [None, "kept"] * 100), table(masks, names))
    expected = []
    for box in boxes:
        apart = np.abs(edges[masks] - edges[box]).max(axis=1)
        fits = [
            (apart[place], names[place])
            for place, mask in enumerate(masks)
            if photo[mask] == photo[box] and label[mask] == label[box] and apart[place] < 1.1e-6
        ]
        expected.append(min(fits)[1] if fits else [None, "kept"][box % 2])
    assert joined["segmentation"].to_pylist() == expected
    assert count == len({name for name in expected if name and name.startswith("png:")}) > 20
    assert join_masks(table(boxes, [None] * 200), table(masks[:0], []))[1] == 0
