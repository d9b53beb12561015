"""Do the judges see what the field's own programs see? By command, as it installs 1 GB in an environment of its own:

    python -m tests.compat.judges [--venv FOLDER] [--photos FOLDER]

Draws weights for FID's Inception, gives them and a few photos to torch-fidelity, pytorch-fid and clean-fid's resizing, and to
our judges, and prints the largest difference of each, relative to the largest feature. Real photos are used where there is a
folder of them. Status 1 where a difference is above 1e-5.

torchvision's wheel on PyPI does not import beside a PyTorch for the CPU (`operator torchvision::nms does not exist`): in that
environment its two missing operators are declared before the import. Nothing here calls them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pbe_core.errors import InputError, run_program
from pbe_core.judges.inception import Inception, folded
from pbe_core.judges.judge import load_judge
from tests.compat.judge_files import inception_tensors

PACKAGES = (
    "torch==2.13.0",
    "torchvision==0.28.0",
    "torch-fidelity==0.4.0",
    "pytorch-fid==0.3.0",
    "numpy==2.4.6",
    "pillow==13.0.0",
)
# Without what it asks for: only its resizing is used, and the rest breaks on SciPy 1.18.
ALONE = ("clean-fid==0.1.35",)
LARGEST = 1e-5
SIZES = ((512, 512), (299, 299), (640, 427), (180, 240), (90, 61), (1200, 800))  # Height and width of drawn photos.

# Runs in the other environment, without this project.
FOREIGN = """
import sys
import numpy, torch
operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import PIL.Image, torchvision
import pytorch_fid.inception
from cleanfid.resize import build_resizer
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

torch.set_num_threads(2)
folder, weights = sys.argv[1], sys.argv[2]
print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, PIL {PIL.__version__}")
pictures = numpy.load(folder + "/pictures.npz")
pictures = [pictures[name] for name in sorted(pictures.files)]

fidelity = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
pytorch_fid.inception.load_state_dict_from_url = lambda url, progress=True: torch.load(weights, weights_only=True)
theirs = pytorch_fid.inception.InceptionV3([3]).eval()
clean = build_resizer("clean")

out = {"network": [], "legacy": [], "clean": [], "clean_pixels": []}
with torch.no_grad():
    for picture in pictures:
        values = torch.from_numpy(picture.transpose(2, 0, 1).copy())[None]
        # Its own resizing does nothing to a picture of the network's size.
        crop = torch.from_numpy(numpy.resize(picture, (299, 299, 3)).transpose(2, 0, 1).copy())[None]
        out["network"].append(fidelity(crop)[0][0].numpy())
        out["legacy"].append(theirs(torchvision.transforms.functional.to_tensor(picture)[None])[0][0, :, 0, 0].numpy())
        resized = clean(picture)
        out["clean_pixels"].append(resized)
        inputs = (torch.from_numpy(resized.transpose(2, 0, 1).copy())[None] - 128) / 128
        for block in theirs.blocks:
            inputs = block(inputs)
        out["clean"].append(inputs[0, :, 0, 0].numpy())
numpy.savez(folder + "/theirs.npz", **{name: numpy.stack(values) for name, values in out.items()})
"""


def main() -> int:
    """Compare; returns 1 where something differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, help="folder of the other environment; kept, and used again where it is there")
    parser.add_argument("--photos", type=Path, help="folder of photos (.jpg, also below it), of which six are taken")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        python = make_environment((options.venv or Path(scratch) / "venv").absolute())
        differences = compare(python, Path(scratch), pictures_of(options.photos))
    for name, difference in differences.items():
        print(f"{name}: {difference:.1e}")
    return int(max(differences.values()) > LARGEST)


def make_environment(folder: Path) -> Path:
    """The Python of an environment that has the other programs and nothing of this one's."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for packages in (PACKAGES, ("--no-deps", *ALONE)):
        if subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=False).returncode:
            raise InputError(f"{folder}: pip could not install {', '.join(packages)}")
    return python


def pictures_of(folder: Path | None) -> list[np.ndarray]:
    """Drawn photos of many sizes, and some from a folder."""
    random = np.random.default_rng(3)
    pictures = []
    for height, width in SIZES:
        coarse = Image.fromarray(random.integers(0, 256, (height // 15, width // 15, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        pictures.append((smooth + random.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8))
    paths = sorted(folder.rglob("*.jpg")) if folder else []
    for path in paths[:: max(1, len(paths) // 6)][:6]:
        pictures.append(np.asarray(Image.open(path).convert("RGB")))
    return pictures


def compare(python: Path, folder: Path, pictures: list[np.ndarray]) -> dict[str, float]:
    """What differs, largest of all features, relative to the largest feature."""
    weights = folder / "inception.pth"
    tensors = inception_tensors()
    torch.save(tensors, weights)
    np.savez(folder / "pictures.npz", **{f"{number:03d}": picture for number, picture in enumerate(pictures)})
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", FOREIGN, str(folder), str(weights)], check=True, env=environment)
    theirs = np.load(folder / "theirs.npz")
    clean, legacy = (load_judge(f"inception-{way}={weights}") for way in ("clean", "legacy"))
    crops = np.stack([np.resize(picture, (299, 299, 3)).transpose(2, 0, 1) for picture in pictures])
    ready = ((crops.astype(np.float32) - 128) / 128).astype(np.float32)
    plain = Inception()
    plain.load_state_dict(tensors, strict=False)
    with torch.inference_mode():
        unfolded = plain.eval()(torch.from_numpy(ready)).numpy()
        refolded = folded(plain)(torch.from_numpy(ready)).numpy()
    pixels = np.stack([clean.prepare(picture) * 128 + 128 for picture in pictures]).transpose(0, 2, 3, 1)
    return {
        f"network alone, {len(pictures)} pictures, against torch-fidelity": relative(clean.embed(ready), theirs["network"]),
        "batch norms folded, against unfolded": relative(refolded, unfolded),
        "legacy, against pytorch-fid": relative(legacy.features(pictures), theirs["legacy"]),
        "clean, pixels against clean-fid": relative(pixels, theirs["clean_pixels"]),
        "clean, against clean-fid's pixels in pytorch-fid's network": relative(clean.features(pictures), theirs["clean"]),
        "one picture at a time, against all at once": relative(
            np.concatenate([clean.features([picture]) for picture in pictures]), clean.features(pictures)
        ),
    }


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max())


if __name__ == "__main__":
    run_program(main)
