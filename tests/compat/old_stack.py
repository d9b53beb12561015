"""Does an export load in the diffusers of yesterday, in one line, and paint the same? By command, as it installs 1 GB:

    python -m tests.compat.old_stack [--venv FOLDER]

Makes (or uses again) a virtual environment with diffusers 0.36 and transformers 4.57, exports a small random model of the
published architecture, edits a picture with both stacks from the same noise, and prints the largest difference.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pbe_core.errors import InputError, run_program
from pbe_core.randomness import name_hash
from pbe_train.checkpoints.export import export
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.model.pipeline import SamplingSettings
from tests.pbe_train.published import make_comparable, make_published, make_run, write_hub

PACKAGES = ("torch==2.13.0", "diffusers==0.36.*", "transformers==4.57.*", "accelerate", "pillow", "numpy")
STEPS, GUIDANCE, SEED = 10, 5.0, 7
SCHEDULERS = ("PNDMScheduler", "DDIMScheduler")
LARGEST = 1 / 255

# Runs in the old environment, without this project.
PAINT = """
import sys
import diffusers, numpy, torch, transformers
from diffusers import DiffusionPipeline
from PIL import Image

folder, inputs, steps, guidance = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
pipeline = DiffusionPipeline.from_pretrained(folder)
print(type(pipeline).__name__, "loaded in one line")
pipeline.set_progress_bar_config(disable=True)
for name in sys.argv[5:]:
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    picture = pipeline(
        example_image=Image.open(f"{inputs}/reference.png"),
        image=Image.open(f"{inputs}/photo.png"),
        mask_image=Image.open(f"{inputs}/mask.png"),
        latents=torch.from_numpy(numpy.load(f"{inputs}/noise.npy")),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
    ).images[0]
    numpy.save(f"{inputs}/{name}.npy", picture)
"""


def main() -> int:
    """Build both stacks' pictures and compare them; returns 1 where they differ by a grey level."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, help="folder of the old environment; kept, and used again where it is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        python = make_environment((options.venv or Path(scratch) / "venv").absolute())
        differences = compare(python, Path(scratch))
    for name, (largest, other) in differences.items():
        print(f"{name}: largest difference {largest * 255:.3f} of 255; from another reference it would be {other * 255:.1f}")
    return int(any(largest >= LARGEST or other < 3 * LARGEST for largest, other in differences.values()))


def make_environment(folder: Path) -> Path:
    """The Python of an environment that has the old packages and nothing of this one's."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=False)
    if done.returncode:
        raise InputError(f"{folder}: pip cannot install {', '.join(PACKAGES)}; see above")
    return python


def compare(python: Path, scratch: Path) -> dict[str, tuple[float, float]]:
    """For each scheduler, the largest difference of both pictures, and that to our picture from another reference, of 1."""
    hub = write_hub(scratch / "hub", make_comparable(make_published(9, layers=24)))
    made = make_run(scratch / "run", hub, hub, blocks=5)
    run = load_run(made, device="cpu")
    export(run, made, scratch / "exported", "", "diffusers", "ema")

    random = np.random.default_rng(0)
    photo, reference = (np.repeat(np.repeat(random.integers(0, 256, (8, 8, 3), np.uint8), n, 0), n, 1) for n in (8, 4))
    mask = np.zeros((64, 64), bool)
    mask[8:40, 16:56] = True
    for name, picture in (("photo", photo), ("reference", reference), ("mask", mask.astype(np.uint8) * 255)):
        Image.fromarray(picture).save(scratch / f"{name}.png")
    # The noise that our own painting draws for this seed.
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(name_hash("paint", SEED, bits=32)))
    np.save(scratch / "noise.npy", noise.numpy())
    # -I: nothing of this environment, and not this project's folder, is on the path.
    arguments = [str(scratch / "exported"), str(scratch), str(STEPS), str(GUIDANCE), *SCHEDULERS]
    subprocess.run([str(python), "-I", "-c", PAINT, *arguments], check=True)

    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 127.5 - 1
    pixels[torch.from_numpy(mask)[None, None].expand_as(pixels)] = 0
    references = (reference, 255 - reference)
    differences = {}
    for name in SCHEDULERS:
        how = SamplingSettings(GUIDANCE, STEPS, name)
        theirs = np.load(scratch / f"{name}.npy")
        pictures = (run.paint(run.encode_pixels(pixels), mask[None], [seen], [SEED], how)[0] for seen in references)
        same, other = (float(np.abs(picture / 255 - theirs).max()) for picture in pictures)
        differences[name] = same, other
    return differences


if __name__ == "__main__":
    run_program(main)
