"""Edit one photo: paint what a reference shows into a region of it.

python -m pbe_train.sample --model runs/tiny --image photo.jpg --mask mask.png --reference cat.jpg --out edited.png
python -m pbe_train.sample --settings settings.json --out edited.png
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pbe_core.errors import InputError, run_program
from pbe_core.progress import Progress
from pbe_core.words import number_of
from pbe_train.model.sampling import add_sampling_options, check_interval, check_published

if TYPE_CHECKING:
    from pbe_train.editing.edit_settings import EditSettings
    from pbe_train.editing.paint_by_example import PaintByExample


# Of the command line, what a model is loaded with.
LOADED = ("weights", "device", "precision", "channels_last", "prepacked", "compile", "offload")


def main() -> None:
    """Read the pictures, paint, write the result."""
    options, settings = parse_options()
    if settings:
        find_pictures(options, settings)
    check_interval(options.guidance_interval)
    if options.exact_published:
        check_published(options.steps, options.scheduler, options.guidance_interval)
        # What differs from machine to machine is not looked for; what is asked for by name is refused once the model is there.
        options.precision = "fp32" if options.precision == "auto" else options.precision
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads}: must be 1 or more")
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
    from pbe_train.editing.reading import check_mask, read_mask, read_photo, save_picture, with_profile

    photo, mask = read_photo(options.image), read_mask(options.mask)
    check_mask(mask, photo, options.mask, options.image)
    references = [read_photo(reference) for reference in options.reference]
    with Progress("loading the model"):
        from pbe_train.editing.paint_by_example import PaintByExample, Preview

        chosen = {name: getattr(options, name) for name in LOADED}
        paint = PaintByExample.from_pretrained(options.model, loras=options.lora, **chosen)
    prepare(paint, options, settings)
    with Progress("painting", options.steps, "steps") as progress:

        def show(preview: Preview) -> None:
            progress.set(preview.step, total=preview.steps)

        edited = paint(
            photo,
            mask,
            references,
            seed=options.seed,
            guidance=options.guidance,
            guidance_interval=options.guidance_interval,
            steps=options.steps,
            scheduler=options.scheduler,
            exact_published=options.exact_published,
            size=options.size,
            blend=options.blend,
            reuse=options.reuse,
            callback=show,
        )
    assert isinstance(edited, Image.Image)
    save_picture(with_profile(np.asarray(edited), options.image), options.out)
    print(f"{options.out}: {edited.width}x{edited.height} px, {mask.mean():.1%} of it repainted")


def find_pictures(options: argparse.Namespace, settings: "EditSettings") -> None:
    """Photo, mask and references of an edit that is to be repeated: those that were given, or those beside its settings.

    Raises:
        InputError: one is not there, or not the one that the settings name; or no model is known.
    """
    from pbe_train.editing.edit_settings import find_picture

    options.image = find_picture(settings.photo, options.image, options.settings, "--image")
    options.mask = find_picture(settings.mask, options.mask, options.settings, "--mask")
    given = options.reference or [None] * len(settings.references)
    if len(given) != len(settings.references):
        told = number_of(len(given), "file")
        raise InputError(f"--reference: {told}, and {options.settings} names {len(settings.references)}; give as many")
    pairs = zip(settings.references, given, strict=True)
    options.reference = [find_picture(record, path, options.settings, "--reference") for record, path in pairs]
    if options.model is None:
        raise InputError(f"{options.settings}: does not say where the model {settings.model.name!r} lies; give it with --model")


def prepare(paint: "PaintByExample", options: argparse.Namespace, settings: "EditSettings | None") -> None:
    """Set the threads, and say where an edit that is to be repeated may come out otherwise.

    Raises:
        InputError: the model that the settings name has other weights now.
    """
    import torch

    from pbe_train.editing.edit_settings import weights_hash
    from pbe_train.editing.threads import default_threads

    torch.set_num_threads(options.threads or default_threads(paint.run))
    for note in ([paint.note] if paint.note else []) + [note for lora in paint.loras for note in lora.notes]:
        print(note, file=sys.stderr)
    if not settings:
        return
    check_loras(paint, options, settings)
    expected, found = settings.model.sha256, weights_hash(str(options.model))
    if expected and found and expected != found:
        told = f"{options.model}: has other weights ({found[:12]}) than the model of {options.settings} ({expected[:12]})"
        if settings.model.source and options.model == Path(settings.model.source):
            raise InputError(f"{told}; give the model as it was with --model")
        print(f"{told}: the picture will be another one", file=sys.stderr)
    if paint.run.device.type != settings.device:
        print(f"painted on {settings.device} before, on {paint.run.device.type} now: pixels may differ", file=sys.stderr)


def check_loras(paint: "PaintByExample", options: argparse.Namespace, settings: "EditSettings") -> None:
    """Say where other LoRAs are in the model than in an edit that is to be repeated.

    Raises:
        InputError: a LoRA that the settings name is another one now.
    """
    before = [(record.weight, record.sha256) for record in settings.loras]
    if before == [(lora.weight, lora.sha256) for lora in paint.loras]:
        return
    if options.lora == replayed(settings):
        pairs = zip(settings.loras, paint.loras, strict=True)
        changed = next(lora.source for record, lora in pairs if record.sha256 != lora.sha256)
        raise InputError(f"{changed}: is not the LoRA of {options.settings}; give that one with --lora")
    print("--lora: others than those of the settings: the picture will be another one", file=sys.stderr)


def replayed(settings: "EditSettings") -> list[tuple[str, float]]:
    """The LoRAs of an edit that is to be repeated. Raises InputError: the settings do not say where one lies."""
    if lost := next((record.name for record in settings.loras if record.source is None), None):
        raise InputError(f"the settings do not say where the LoRA {lost!r} lies; give it with --lora, and its weight")
    return [(str(record.source), record.weight) for record in settings.loras]


def parse_options() -> tuple[argparse.Namespace, "EditSettings | None"]:
    """The command line, and the settings that it names; an option that is given wins over them, `--exact-published` over all that
    it decides.

    Raises:
        InputError: there are no such settings.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--settings", type=Path)
    first.add_argument("--exact-published", action="store_true")
    asked = first.parse_known_args()[0]
    named = asked.settings
    parser = make_parser(required=named is None)
    if named is None:
        return parser.parse_args(), None
    from pbe_train.editing.edit_settings import read_settings

    settings = read_settings(named)
    # Not as they are written, which leaves out what is usual: what is usual here is another thing.
    names = ["guidance", "size", "weights", "threads"]
    if not asked.exact_published:  # Which says all of these itself.
        names += ["guidance_interval", "steps", "reuse", "scheduler", "precision", "channels_last", "prepacked", "compile"]
    parser.set_defaults(
        model=settings.model.source,
        seed=settings.seeds[0],
        device="cpu" if settings.device == "cpu" else None,
        lora=None,
        **{name: getattr(settings, name) for name in names},
    )
    options = parser.parse_args()
    options.lora = replayed(settings) if options.lora is None else options.lora
    return options, settings


def make_parser(required: bool) -> argparse.ArgumentParser:
    """The options.

    Args:
        required: whether model and pictures must be given.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=required, help="run folder of train.py, or a published model")
    parser.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="LORA[:WEIGHT]",
        help="LoRAs to add to the model, each a file, folder or run, and how strongly, such as cup.safetensors:0.8",
    )
    parser.add_argument("--image", type=Path, required=required, help="photo to edit, any size; EXIF rotation is applied")
    parser.add_argument(
        "--mask",
        type=Path,
        required=required,
        help="white (or 1 beside 0 alone) = repaint; of the photo's size (docs/editing.md)",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        required=required,
        help="photo of what to paint, cropped closely around it; several of one object are averaged",
    )
    parser.add_argument("--out", type=Path, required=True, help="picture to write; .png keeps every byte outside the mask")
    parser.add_argument(
        "--settings",
        type=Path,
        help="settings.json of an edit of `pbe app`, to repeat it: its pictures lie beside it or are given anew, and options win "
        "over it",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed paints the same picture")
    add_sampling_options(parser)
    parser.add_argument(
        "--exact-published",
        action="store_true",
        help="paint as the published code does, in 102 passes: no other --steps, --scheduler or --guidance-interval",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        help="px at which the model works: a side, or WIDTHxHEIGHT; by default what it was trained at, of several shapes the one "
        "nearest to the photo's",
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averaged weights, where there are any, or plain"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the first GPU, else the CPU")
    add_speed_options(parser)
    parser.add_argument(
        "--offload", type=parse_switch, default=False, help="true: on the GPU only the network that works, for small GPUs"
    )
    parser.add_argument("--threads", type=int, help="on the CPU; by default 1 for small models, else PyTorch's own choice")
    parser.add_argument(
        "--blend",
        type=parse_switch,
        default=True,
        help="true: keep every px outside the mask; false: the whole window is painted",
    )
    return parser


def add_speed_options(parser: argparse.ArgumentParser) -> None:
    """How the networks compute."""
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the networks; auto is what this machine is fastest in, measured once; fp32 paints the same everywhere",
    )
    parser.add_argument(
        "--channels-last", type=parse_switch, help="layout of the weights; by default what is faster, and false for fp32"
    )
    parser.add_argument(
        "--prepacked",
        type=parse_switch,
        help="pack the U-Net's weights for oneDNN, on x86 CPUs; by default as --channels-last, and not with --compile",
    )
    parser.add_argument(
        "--compile",
        type=parse_switch,
        nargs="?",
        const=True,
        default=False,
        help="for GPUs: compile the networks; a minute or more for the first edit of each shape, less time for those after it",
    )


def parse_size(word: str) -> int | tuple[int, int]:
    """`512` or `640x384` on the command line."""
    sides = word.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise argparse.ArgumentTypeError(f"expected px as in 512 or 640x384 (width x height), got {word!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def parse_switch(word: str) -> bool:
    """`true` or `false` on the command line."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return word.lower() == "true"


if __name__ == "__main__":
    run_program(main)
