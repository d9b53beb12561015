"""Print a list of view shapes for `views.buckets`: the area of a square, in several aspects.

    python -m pipelines.buckets 768 --max-aspect 2
    buckets: [[1088, 512], ..., [768, 768], ..., [512, 1088]]

Sides are multiples of 64 px, as a VAE's 8 and a U-Net's three halvings ask for; small networks take smaller steps.
"""

import argparse

from pbe_core.buckets import suggest_buckets
from pbe_core.errors import InputError, run_program


def main() -> None:
    """Print the list."""
    run_program(print_buckets)


def print_buckets() -> int:
    """Read the arguments and print one line of YAML. Raises InputError where there is no such list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=int, help="side in px of the square whose area all shapes have at most")
    parser.add_argument("--max-aspect", type=float, default=2.0, help="largest ratio of the sides (default 2)")
    parser.add_argument("--step", type=int, default=64, help="all sides are multiples of this, px (default 64)")
    options = parser.parse_args()
    try:
        shapes = suggest_buckets(options.size, options.max_aspect, max(1, options.step))
    except ValueError as error:
        raise InputError(f"{error}; give others") from None
    print(f"buckets: {[list(shape) for shape in shapes]}")
    return 0


if __name__ == "__main__":
    main()
