"""Are our distances those of the field's libraries? By command, as it installs them in an environment of their own (1.5 GB):

    python -m tests.compat.metrics [--venv FOLDER]

Gives torch-fidelity, torchmetrics, pytorch-fid and clean-fid the same features as ours, prints what each makes of them and how
far that is from ours, relative, and ends with status 1 where it is more than 1e-6 for sets with more pictures than features, in
double precision. Shown without that demand: features in single precision, in which some of them reckon, and sets with fewer
pictures than features, where a root of the covariances' product is noise. Versions are in metrics.txt.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from pbe_core.errors import InputError, run_program
from pbe_core.randomness import generator
from pbe_train.evaluation.distances import frechet_distance, kernel_distance

HERE = Path(__file__).resolve().parent
VERSIONS = HERE / "metrics.txt"
LIBRARIES = ("torch", "torchvision", "scipy", "torch-fidelity", "torchmetrics", "pytorch-fid", "clean-fid")
LARGEST = 1e-6
OURS = {"FID": frechet_distance, "KID": kernel_distance}


def main() -> int:
    """Print the table; returns 1 where a library and ours differ that should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="folder of their environment; kept, and used again where it is there")
    options = parser.parse_args()
    table = Table("features", "library", "score", "theirs", "ours", "relative difference", "<= 1e-6")
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        python = make_environment((options.venv or Path(scratch) / "venv").absolute())
        for name, demanded, a, b in sets():
            np.savez(Path(scratch) / "features.npz", a=a, b=b)
            # -I: nothing of this environment, and not this project's folder, is on the path.
            words = [str(python), "-I", str(HERE / "metrics_of_others.py"), str(Path(scratch) / "features.npz")]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            for library, scores in json.loads(done.stdout.splitlines()[-1]).items():
                for score, theirs in scores.items():
                    ours = OURS[score](a, b)
                    difference = math.inf if isinstance(theirs, str) else abs(theirs - ours) / abs(ours)
                    good = difference <= LARGEST
                    wrong += demanded and not good
                    shown = theirs if isinstance(theirs, str) else f"{theirs:.10g}"
                    verdict = "yes" if good else "NO" if demanded else "not demanded"
                    table.add_row(name, library, score, shown, f"{ours:.10g}", f"{difference:.1e}", verdict)
            table.add_section()
    Console(width=160).print(table)
    print(f"{wrong} of those demanded differ by more than {LARGEST:g}")
    return int(bool(wrong))


def make_environment(folder: Path) -> Path:
    """The Python of an environment that has the libraries and nothing of this one's."""
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(VERSIONS)]
        if subprocess.run([*pip, *LIBRARIES], check=False).returncode:
            raise InputError(f"{folder}: pip cannot install {', '.join(LIBRARIES)}; see above")
        (folder / "installed").touch()
    return python


def sets() -> Iterator[tuple[str, bool, Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]]:
    """Name, whether all libraries are to agree, and two sets of features: of known kinds, then as networks' are, above 0."""
    for name, n, width, kind, demanded in (
        ("700 of 256", 700, 256, np.float64, True),
        ("1,200 of 1,024", 1200, 1024, np.float64, True),
        ("700 of 256, single", 700, 256, np.float32, False),
        ("200 of 256", 200, 256, np.float64, False),
        ("200 of 1,024", 200, 1024, np.float64, False),
    ):
        random = generator("metrics", name)
        mixing = random.standard_normal((width, width)) * np.arange(1, width + 1.0)[:, None] ** -0.5 / 4
        spread = [random.standard_normal((n, width)) @ mixing for _ in range(2)]
        yield name, demanded, *(np.maximum(0.3 + by * one, 0).astype(kind) for by, one in zip((1, 1.1), spread, strict=True))


if __name__ == "__main__":
    run_program(main)
