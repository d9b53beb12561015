"""Edit one photo: paint what a reference shows into a region of it.

python -m pbe_train.sample --model runs/tiny --image photo.jpg --mask mask.png --reference cat.jpg --out edited.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from pbe_train.editing.region import Mask, Photo
from pbe_train.editing.sampling import Run, SamplingSettings, check_guidance, edit, load_run
from schemas.errors import InputError, run_program
from schemas.photos import PhotoError, decode_photo


def main() -> None:
    """Read the three pictures, paint, write the result."""
    options = parse_options()
    if options.steps < 1:
        raise InputError(f"--steps {options.steps}: must be 1 or more")
    photo, mask, reference = read_photo(options.image), read_mask(options.mask), read_photo(options.reference)
    check_mask(mask, photo, options.mask, options.image)
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--out {options.out}: write a .png (keeps every byte outside the mask), .jpg or .webp")
    run = load_run(options.model, options.weights)
    check_size(run, options.size)
    check_guidance(run, options.guidance)
    how = SamplingSettings(options.guidance, options.steps, options.scheduler)
    edited = edit(run, [photo], [mask], [reference], [options.seed], how, size=options.size, blend=options.blend)[0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(edited).save(options.out)
    print(f"{options.out}: {edited.shape[1]}x{edited.shape[0]} px, {mask.mean():.1%} of it repainted")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="run folder that train.py wrote, or one of its checkpoints")
    parser.add_argument("--image", type=Path, required=True, help="photo to edit, any size; EXIF rotation is applied")
    parser.add_argument(
        "--mask", type=Path, required=True, help="white = repaint; opaque, of the photo's size, at least one white px"
    )
    parser.add_argument("--reference", type=Path, required=True, help="photo of what to paint, cropped closely around it")
    parser.add_argument("--out", type=Path, required=True, help="picture to write; .png keeps every byte outside the mask")
    parser.add_argument("--guidance", type=float, default=5.0, help="how strongly to follow the reference; 1 = no guidance")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="the same seed paints the same picture")
    parser.add_argument(
        "--scheduler", default="DDIMScheduler", help="a scheduler of diffusers; DPMSolverMultistepScheduler is fast"
    )
    parser.add_argument("--size", type=int, help="side in px at which the model works; by default the one it was trained at")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averaged weights, where there are any, or plain"
    )
    parser.add_argument(
        "--blend",
        type=parse_switch,
        default=True,
        help="true: keep every px outside the mask; false: the whole square is painted",
    )
    return parser.parse_args()


def parse_switch(word: str) -> bool:
    """`true` or `false` on the command line."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return word.lower() == "true"


def read_photo(path: Path) -> Photo:
    """A photo from disk, turned as its EXIF says.

    Raises:
        InputError: no such file, or no readable photo.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a photo")
    try:
        return decode_photo(path.read_bytes(), frame="exif")
    except PhotoError as error:
        raise InputError(f"{path}: not a readable photo ({error}); give a JPEG, PNG or WebP file") from None


def read_mask(path: Path) -> Mask:
    """A mask from disk: True where it is brighter than mid grey.

    Raises:
        InputError: no readable picture, or a transparent px, of which one cannot tell whether it is to be repainted.
    """
    mask: Mask = read_photo(path).mean(axis=2) > 127
    with Image.open(path) as image:  # Its size was checked when it was decoded.
        opaque = not image.has_transparency_data or bool(np.all(np.asarray(image.convert("RGBA"))[..., 3] == 255))
    if not opaque:
        raise InputError(f"{path}: the mask is transparent in places; save it without transparency, white on black")
    return mask


def check_mask(mask: Mask, photo: Photo, mask_path: Path, photo_path: Path) -> None:
    """Refuse a mask that does not say which pixels to repaint.

    Raises:
        InputError: another size than the photo (a guess at how to fit it would repaint the wrong place), or no white pixel.
    """
    if mask.shape != photo.shape[:2]:
        raise InputError(
            f"{mask_path}: the mask is {mask.shape[1]}x{mask.shape[0]} px, the photo {photo_path} is "
            f"{photo.shape[1]}x{photo.shape[0]} px; draw the mask at the photo's size"
        )
    if not np.any(mask):
        raise InputError(f"{mask_path}: the mask is empty; paint the region to be edited white")


def check_size(run: Run, size: int | None) -> None:
    """Refuse a working size that does not halve evenly down to the U-Net's lowest level.

    Raises:
        InputError: with the sizes that fit.
    """
    step = 2 ** (len(run.vae.config.block_out_channels) - 1 + len(run.identity.unet["block_out_channels"]) - 1)
    if size is not None and (size < step or size % step):
        raise InputError(f"--size {size}: must be a multiple of {step} px; the model was trained at {run.identity.view_size}")


if __name__ == "__main__":
    run_program(main)
