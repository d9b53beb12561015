"""Filling a folder with a picture for each pair: whole pictures only, none twice, and goes on where it was killed.

    folder/recipe.json    what the pictures are made with: written first, and compared by whoever goes on
    folder/<id>.png       one picture a pair, whole or not there

A picture that is damaged, or of another size than its photo, is made again. A pair that cannot be read costs itself alone: the
others are made, and one error at the end names it. Memory grows with a batch, not with the set.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import cv2

from pbe_core.errors import InputError
from pbe_core.files import sweep, write_atomically
from pbe_core.images import AnyPhoto
from pbe_core.images.decode import PhotoError, decode_photo
from pbe_core.progress import Progress
from pbe_core.words import number_of
from pbe_train.evaluation.pair_sets import Pair, PairPictures, PairSet

# Makes the pictures of some pairs, and tells, from 0 to 1, how far it is.
Make = Callable[[Sequence[Pair], Sequence[PairPictures], Callable[[float], None]], Sequence[AnyPhoto]]
_RECIPE = "recipe.json"
# Reading, checking and writing of pictures, beside the model.
_THREADS = 4


def fill_folder(
    folder: Path,
    pairs: PairSet,
    recipe: dict[str, object],
    make: Make,
    doing: str,
    batch: int,
    mine: range,
    progress: Progress | None,
) -> None:
    """Make what is missing, a batch at a time, while threads read the next one and write the one before.

    Args:
        folder: made where it is not there.
        pairs: the set.
        recipe: all that decides the pictures, as JSON; of `model`, a place, no notice is taken.
        make: makes the pictures of a batch, in its order, each of its photo's size.
        doing: what it is called while it goes on.
        batch: pairs made at once.
        mine: numbers of this rank's pairs; from 0 on rank 0.
        progress: shows them; by default rank 0 shows its own.

    Raises:
        InputError: the folder holds pictures of another recipe, or of no recipe; or pairs cannot be read: when all others are
            made.
    """
    _claim(folder, recipe)
    sweep(folder)
    shown = progress or Progress(doing, len(mine), "pairs")
    unreadable: list[str] = []
    with ThreadPoolExecutor(_THREADS) as pool, shown if progress is None and mine.start == 0 else nullcontext():
        shown.say("looking for what is there")
        missing = _missing(pool, folder, pairs, mine)
        shown.say("")
        shown.set(len(mine) - len(missing), len(mine))
        shown.begin()
        # Batches are the same ones whatever is there already, and so is how a picture is rounded beside its neighbours.
        batches = [part for start in range(0, len(mine), batch) if not missing.isdisjoint(part := mine[start : start + batch])]
        writing: list[Future[None]] = []
        for part, results in _read_ahead(pool, pairs, batches):
            read = {number: one for number, one in zip(part, results, strict=True) if isinstance(one, PairPictures)}
            failed = {number: one for number, one in zip(part, results, strict=True) if isinstance(one, InputError)}
            unreadable += [f"{pairs.pairs[number].id}: {one}" for number, one in failed.items()]
            count = len(missing.intersection(part))

            def tell(share: float, count: int = count) -> None:
                shown.partly(share * count)

            if not missing.isdisjoint(read):
                pictures = make([pairs.pairs[number] for number in read], list(read.values()), tell)
                for done in writing:
                    done.result()
                writing = [
                    pool.submit(_write, folder / f"{pairs.pairs[number].id}.png", picture)
                    for number, picture in zip(read, pictures, strict=True)
                    if number in missing
                ]
            shown.partly(0)
            shown.update(count)
        for done in writing:
            done.result()
    if unreadable:
        raise InputError(
            f"{number_of(len(unreadable), 'pair')} cannot be read and have no picture in {folder}, all others of "
            f"{len(mine):,} have: {'; '.join(unreadable[:2])}{' ...' if len(unreadable) > 2 else ''}"
        )


def _claim(folder: Path, recipe: dict[str, object]) -> None:
    """Write the recipe into a new folder, or compare it with the one that is there."""
    path, way_out = folder / _RECIPE, "give another --out, or remove the folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{folder}: no folder can be made there ({error.strerror}); give another --out") from None
    # In this order: another rank may write the recipe, and then a picture, at any moment.
    picture = next(folder.glob("*.png"), None)
    if not path.exists():
        if picture:
            raise InputError(f"{folder}: {picture.name} and no {_RECIPE}: nobody knows how it was painted; {way_out}")
        write_atomically(path, (json.dumps(recipe, indent=1) + "\n").encode())
    try:
        there = json.loads(path.read_text("utf-8"))
        # Where a model lies does not matter; its hashes do.
        other = [name for name in {**recipe, **there} if name != "model" and there.get(name) != recipe.get(name)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({str(error)[:100]}); {way_out}") from None
    if other:
        told = ", ".join(f"{name} {_short(there.get(name))}, now {_short(recipe.get(name))}" for name in other)
        raise InputError(f"{folder}: its pictures were made with {told}; {way_out}")


def _short(value: object) -> str:
    """A value for a message; of hashes a part."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _missing(pool: ThreadPoolExecutor, folder: Path, pairs: PairSet, mine: range) -> set[int]:
    """Numbers of pairs without a picture that is whole and of its photo's size."""
    whole = pool.map(lambda number: _is_whole(folder / f"{pairs.pairs[number].id}.png", pairs, number), mine)
    return {number for number, there in zip(mine, whole, strict=True) if not there}


def _is_whole(path: Path, pairs: PairSet, number: int) -> bool:
    try:
        return decode_photo(path.read_bytes(), frame="exif").shape[:2] == pairs.size(number)
    except (FileNotFoundError, PhotoError, InputError):  # Of a pair that cannot be read, reading it tells what is wrong.
        return False


def _read_ahead(
    pool: ThreadPoolExecutor, pairs: PairSet, batches: Sequence[range]
) -> Iterator[tuple[range, list[PairPictures | InputError]]]:
    """Each batch with its pictures, or why there are none; the next one is read meanwhile."""

    def read(number: int) -> PairPictures | InputError:
        try:
            return pairs.read(number)
        except InputError as error:
            return error

    reading: list[Future[PairPictures | InputError]] = []
    for part, following in pairwise([range(0), *batches, range(0)]):
        results = [one.result() for one in reading]
        reading = [pool.submit(read, number) for number in following]
        if part:
            yield part, results


def _write(path: Path, picture: AnyPhoto) -> None:
    done, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not done:
        raise RuntimeError(f"OpenCV could not write a PNG of {picture.shape[1]}x{picture.shape[0]} px")
    write_atomically(path, data.tobytes())
