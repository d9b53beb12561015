"""A few photos with known objects, for tests of object masks: which pixels of a photo each object covers is told by numpy."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pbe_core.dataset_reader import find_imbalance, read_dataset, read_sample
from pbe_core.images.decode import decode_photo
from pbe_core.images.rle import decode_pixels
from pbe_core.sample_codec import Sample

OBJECT, GROUND = (230, 30, 30), (30, 60, 200)
WIDTH, HEIGHT = 160, 120


def ellipse(x_min: float, y_min: float, x_max: float, y_max: float, width: int, height: int, power: int = 2) -> np.ndarray:
    """The pixels of the ellipse in a box, given as fractions, in a picture of some size; with a power of 1, of the diamond."""
    y, x = np.mgrid[:height, :width]
    across = ((x + 0.5) / width - (x_min + x_max) / 2) / ((x_max - x_min) / 2)
    down = ((y + 0.5) / height - (y_min + y_max) / 2) / ((y_max - y_min) / 2)
    return np.abs(across) ** power + np.abs(down) ** power <= 1


def photo_of(*objects: np.ndarray) -> np.ndarray:
    """Objects in one colour before a ground of another."""
    return np.where(np.any(objects, axis=0)[..., None], np.uint8(OBJECT), np.uint8(GROUND))


def png(pixels: np.ndarray | Image.Image) -> bytes:
    """A mask as a PNG of 1 bit, anything else as its type says."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, "png")
    return file.getvalue()


def save_photo(path: Path, pixels: np.ndarray, orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, quality=95, subsampling=0, exif=exif)


def is_object(reference: np.ndarray) -> np.ndarray:
    """Which pixels of a reference are in the objects' colour, and neither ground nor grey."""
    return (reference[..., 0].astype(int) - reference[..., 2] > 100) & (reference[..., 0] > 150)


def huge_png(side: int = 20_000) -> bytes:
    """A PNG whose header announces more px than are decoded."""
    header = struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def build_samples(dataset: Path) -> dict[str, list[Sample]]:
    """The samples of a dataset by their photos, once its books are looked at: a box is an object or a reject."""
    info = read_dataset(dataset)
    assert find_imbalance(info.books) is None
    assert len(pq.read_table(dataset / "rejects.parquet")) + len(pq.read_table(dataset / "objects.parquet")) == info.books.boxes
    samples: dict[str, list[Sample]] = {}
    for row in pq.read_table(dataset / "index.parquet").to_pylist():
        sample = read_sample(dataset, row)
        samples.setdefault(sample.record.photo_id, []).append(sample)
    return samples


def check_reference(sample: Sample, covered: np.ndarray, background: str = "grey") -> None:
    """A reference shows the object where its mask is, and grey elsewhere; the mask is what numpy cuts from the photo's pixels.

    `covered` are the object's pixels over the photo as it is used, turned if it is.
    """
    record = sample.record
    assert record.photo_size == covered.shape[::-1]
    reference = decode_photo(sample.reference, frame="stored")
    mask = decode_pixels(record.reference_mask, *reference.shape[:2])
    x_min, y_min, x_max, y_max = record.reference_window
    window = covered[y_min:y_max, x_min:x_max]
    assert mask.shape == window.shape, "the photos are so small that no reference is shrunk"
    assert intersection_over_union(mask, window) > 0.9, "a mask of another size differs by its own pixels at the edge"
    shown = is_object(reference)
    assert intersection_over_union(shown, window) > 0.9
    outside = reference[~(mask | window)].astype(int)
    assert len(outside) > 50, "the corners of the box"
    if background == "grey":
        assert np.abs(outside - 127).mean() < 12
    else:
        assert np.abs(outside - GROUND).mean() < 12


def intersection_over_union(left: np.ndarray, right: np.ndarray) -> float:
    return float((left & right).sum() / (left | right).sum())
