"""Draw docs/pictures/augmentation_*.png: 64 draws of each preset of augmentation, of one object of the tiny world.

Usage:  python -m docs.pictures.make_augmentations [--out docs/pictures] [--geometry squash]
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from pbe_core.errors import run_program
from pbe_core.images.sheets import sheet
from pbe_train.data.references import Augmentation, prepare_reference
from tiny_world.kinds import KINDS, generator, instance
from tiny_world.scenes import Light, Pose, add_object, background

PRESETS = ("paper", "strong")
SIDE, PER_ROW = 224, 8
"""Of the encoder's square, px; draws in a row, of which there are as many."""
CELL = 88
"""Of a draw in the picture, px."""


def draw_object(
    name: str, height: int, width: int
) -> tuple[UInt8[np.ndarray, "{height} {width} 3"], Bool[np.ndarray, "{height} {width}"]]:
    """An object of a kind of the tiny world before its background: RGB, 0-255, and which pixels are the object's."""
    random = generator("docs", "augmentations")
    kind = next(number for number, one in enumerate(KINDS) if one.name == name)
    photo = background(random, height, width)
    pose = Pose(x=width / 2, y=height / 2, radius=0.42 * min(height, width), angle_rad=0.2)
    window, opacity, _ = add_object(photo, instance(0, "docs", kind, 0), pose, Light(0.8, 0.2, 1.0))
    outline = np.zeros((height, width), bool)
    outline[window] = opacity > 0.5
    return (np.clip(photo, 0, 1) * 255 + 0.5).astype(np.uint8), outline


def main() -> None:
    """Write a picture for each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: %(default)s)")
    parser.add_argument("--geometry", choices=["squash", "pad"], default="squash", help="of the reference (default: %(default)s)")
    given = parser.parse_args()
    reference, outline = draw_object("Banded fish", 260, 300)
    given.out.mkdir(parents=True, exist_ok=True)
    for preset in PRESETS:
        settings = Augmentation(preset=preset)
        draws = [
            prepare_reference(settings, given.geometry, reference, outline, SIDE, "docs", number) for number in range(PER_ROW**2)
        ]
        small = [cv2.resize(draw, (CELL, CELL), interpolation=cv2.INTER_AREA) for draw in draws]
        rows = [small[start : start + PER_ROW] for start in range(0, len(small), PER_ROW)]
        path = given.out / f"augmentation_{preset}.png"
        # 256 colours of the picture's own: a quarter of the bytes.
        Image.fromarray(sheet(rows, cell=CELL, gap=3)).quantize(256).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_program(main)
