"""An object's own pixels as text: COCO's compressed run lengths, as pycocotools reads and writes them."""

import numpy as np
import pycocotools.mask
from jaxtyping import Bool


def decode_segmentation(counts: str, width: int, height: int) -> Bool[np.ndarray, "height width"]:
    """The pixels that are the object's. The counts were checked when they were read; these sum to width * height."""
    pixels: np.ndarray = pycocotools.mask.decode({"size": [height, width], "counts": counts.encode()}).astype(bool)
    return pixels


def encode_segmentation(pixels: Bool[np.ndarray, "height width"]) -> str:
    """The counts of a mask; its size is not in them."""
    counts: bytes = pycocotools.mask.encode(np.asfortranarray(pixels, np.uint8))["counts"]
    return counts.decode()
