"""Edit one photo: paint what a reference shows into a region of it.

python -m pbe_train.sample --model runs/tiny --image photo.jpg --mask mask.png --reference cat.jpg --out edited.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from pbe_core.errors import InputError, run_program
from pbe_core.progress import Progress


def main() -> None:
    """Read the pictures, paint, write the result."""
    options = parse_options()
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--out {options.out}: write a .png (keeps every byte outside the mask), .jpg or .webp")
    # Before a model of gigabytes is read.
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        missing = not options.out.exists()
        options.out.open("ab").close()
        if missing:
            options.out.unlink()
    except OSError as error:
        raise InputError(f"--out {options.out}: cannot be written to ({error.strerror}); give another place") from None
    # PyTorch, diffusers and transformers take seconds to load: --help, and what is wrong with the options, do not wait for them.
    from pbe_train.editing.reading import check_mask, read_mask, read_photo, with_profile

    photo, mask = read_photo(options.image), read_mask(options.mask)
    check_mask(mask, photo, options.mask, options.image)
    references = [read_photo(reference) for reference in options.reference]
    with Progress("loading the model"):
        from pbe_train.editing.paint_by_example import PaintByExample, Preview

        paint = PaintByExample.from_pretrained(
            options.model, weights=options.weights, device=options.device, precision=options.precision, offload=options.offload
        )
    with Progress("painting", options.steps, "steps") as progress:

        def show(preview: Preview) -> None:
            progress.set(preview.step, total=preview.steps)

        edited = paint(
            photo,
            mask,
            references,
            seed=options.seed,
            guidance=options.guidance,
            steps=options.steps,
            scheduler=options.scheduler,
            size=options.size,
            blend=options.blend,
            callback=show,
        )
    assert isinstance(edited, Image.Image)
    edited = with_profile(np.asarray(edited), options.image)
    edited.save(options.out, icc_profile=edited.info.get("icc_profile"))
    print(f"{options.out}: {edited.width}x{edited.height} px, {mask.mean():.1%} of it repainted")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="run folder of train.py, or a published model")
    parser.add_argument("--image", type=Path, required=True, help="photo to edit, any size; EXIF rotation is applied")
    parser.add_argument(
        "--mask", type=Path, required=True, help="white (or 1 beside 0 alone) = repaint; of the photo's size (docs/editing.md)"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        required=True,
        help="photo of what to paint, cropped closely around it; several of one object are averaged",
    )
    parser.add_argument("--out", type=Path, required=True, help="picture to write; .png keeps every byte outside the mask")
    parser.add_argument("--guidance", type=float, default=5.0, help="how strongly to follow the reference; 1 = no guidance")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="the same seed paints the same picture")
    parser.add_argument(
        "--scheduler",
        default="DDIMScheduler",
        help="a scheduler of diffusers, also with options: 'DDIMScheduler(timestep_spacing=\"leading\")'; "
        "DPMSolverMultistepScheduler is fast",
    )
    parser.add_argument("--size", type=int, help="side in px at which the model works; by default the one it was trained at")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averaged weights, where there are any, or plain"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the first GPU, else the CPU")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the networks")
    parser.add_argument(
        "--offload", type=parse_switch, default=False, help="true: on the GPU only the network that works, for small GPUs"
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


if __name__ == "__main__":
    run_program(main)
