"""One pass over a row's pictures: what judges see in them, in parts of 64 that are kept as files.

    pair ──read, make the row's picture, prepare (threads)──▶ 64 of them ──judges──▶ FOLDER/00003.npz

A part that is there is not made again, so that an evaluation that was interrupted goes on; several processes take the parts in
turn. Names of arrays say what was looked at, and by which judge:

    whole/JUDGE        the whole picture, after the codec that both sides pass
    region/JUDGE       the bounding box of the mask; in the row of references, the reference
    published/JUDGE    the same as the published CLIP score takes it
    pixels/SCORE       numbers of single pairs that need no judge
"""

import io
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pbe_core.errors import InputError, machine_error
from pbe_core.files import atomic_file
from pbe_core.images import AnyPhoto
from pbe_core.images.decode import decode_jpeg
from pbe_core.judges.judge import Judge
from pbe_core.progress import Progress
from pbe_train.evaluation.pair_scores import copying, cut_region, psnr_outside, published_clip_pictures, seam
from pbe_train.evaluation.pair_sets import Pair, PairPictures, PairSet
from pbe_train.evaluation.real_photos import RealPhotos

LOOKS = 1
"""Grows when other numbers are taken of the same pictures: what was kept then is looked at again."""
PART = 64
"""Pictures of a part. The same whatever the number of processes, since a feature's last bits depend on its batch."""
Looks = Mapping[str, np.ndarray]
"""Of one picture: array name -> what the judge of that name is given, or a number."""
Features = dict[str, np.ndarray]
"""Array name -> an array with a row for each picture."""
# Of a part: the names of its arrays. A damaged list of files in it would have some missing, and nobody would see that.
_NAMES = "names"


@dataclass(frozen=True)
class Row:
    """One set of pictures for the pairs.

    `make` makes a pair's picture; `pictures` tells two sets of pictures of one name apart; `folder` is where they lie, if any.
    """

    name: str
    pictures: str
    make: Callable[[Pair, PairPictures], AnyPhoto]
    folder: Path | None = None


def extract(
    look: Callable[[int], Looks],
    count: int,
    judges: Sequence[Judge],
    folder: Path,
    *,
    threads: int,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
) -> None:
    """Make the parts that are not there yet.

    Args:
        look: what to look at in a picture, by its number; called from threads.
        count: of pictures.
        judges: with the names that `look` uses.
        folder: where the parts lie.
        threads: that read and prepare pictures, while the judges look at those of the part before.
        rank: of this process; it takes every `world`-th part.
        world: number of processes.
        progress: counts pictures.

    Raises:
        InputError: a picture cannot be read, or a judge's features are not numbers.
    """
    make_folder(folder)
    by_name = {judge.identity.name: judge for judge in judges}
    parts = [range(start, min(start + PART, count)) for start in range(0, count, PART)]
    missing = []
    for number in range(rank, len(parts), world):
        if _read_part(folder, number, len(parts[number])) is None:
            missing.append(number)
        elif progress:
            progress.update(len(parts[number]))
    with ThreadPoolExecutor(threads, "look") as pool:

        def begin(number: int) -> list[Future[Looks]]:
            return [pool.submit(look, index) for index in parts[number]]

        ahead = begin(missing[0]) if missing else []
        for place, number in enumerate(missing):
            looks = [future.result() for future in ahead]
            ahead = begin(missing[place + 1]) if place + 1 < len(missing) else []
            arrays = {key: _see(key, np.stack([one[key] for one in looks]), by_name) for key in looks[0]}
            with atomic_file(_part_file(folder, number)) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays, **{_NAMES: np.array(sorted(arrays))})  # type: ignore[arg-type]
            if progress:
                progress.update(len(looks))


def share_of(count: int, rank: int, world: int) -> int:
    """How many of so many pictures one of the processes looks at in `extract`."""
    return sum(min(PART, count - start) for start in range(rank * PART, count, world * PART))


def read_features(folder: Path, count: int) -> Features:
    """All parts, one after the other.

    Raises:
        InputError: a part is not there, or damaged.
    """
    arrays: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for number, start in enumerate(range(0, count, PART)):
        part = _read_part(folder, number, min(PART, count - start))
        if part is None:
            raise InputError(f"{_part_file(folder, number)}: not there, or damaged; run the same command again")
        for key, array in part.items():
            arrays[key].append(array)
    return {key: np.concatenate(parts) for key, parts in arrays.items()}


def look_at_row(
    row: Row, pairs: PairSet, others: Sequence[int | None], judges: Sequence[Judge], codec: str
) -> Callable[[int], Looks]:
    """What to look at in a row's pictures.

    Args:
        row: with the function that makes them.
        pairs: the pair set.
        others: for each pair the number of another one, whose reference is another photo of the class; None where there is none.
        judges: that look at them.
        codec: see `through_codec`.
    """

    def look(number: int) -> Looks:
        given, other = pairs.read(number), others[number]
        picture = row.make(pairs.pairs[number], given)
        copied = np.nan if other is None else copying(picture, given.mask, given.reference, pairs.read(other).reference)
        region = cut_region(coded := through_codec(picture, codec), given.mask)
        looks: dict[str, np.ndarray] = {
            "pixels/PSNR outside": np.array(psnr_outside(given.photo, picture, given.mask)),
            "pixels/seam": np.array(seam(given.photo, picture, given.mask)),
            "pixels/copying": np.array(copied),
            "pixels/area": np.array(given.mask.mean()),
        }
        for judge in judges:
            name = judge.identity.name
            looks[f"whole/{name}"] = judge.prepare(coded)
            if sees_regions(judge):
                looks[f"region/{name}"] = judge.prepare(region)
            if takes_published(judge):
                looks[f"published/{name}"] = published_clip_pictures(picture, given.mask, given.reference)[0]
        return looks

    return look


def look_at_references(pairs: PairSet, judges: Sequence[Judge], codec: str) -> Callable[[int], Looks]:
    """What to look at in the references: each as it is, and as the published CLIP score takes it."""

    def look(number: int) -> Looks:
        given = pairs.read(number)
        looks: dict[str, np.ndarray] = {"pixels/number": np.array(number)}  # There may be no judge.
        for judge in judges:
            name = judge.identity.name
            if sees_regions(judge):
                looks[f"region/{name}"] = judge.prepare(through_codec(given.reference, codec))
            if takes_published(judge):
                looks[f"published/{name}"] = published_clip_pictures(given.photo, given.mask, given.reference)[1]
        return looks

    return look


def look_at_real(photos: RealPhotos, judges: Sequence[Judge], codec: str) -> Callable[[int], Looks]:
    """What to look at in the real photos: each whole, after the codec that the painted ones pass as well."""

    def look(number: int) -> Looks:
        photo = through_codec(photos.read(number), codec)
        return {"pixels/number": np.array(number), **{f"whole/{judge.identity.name}": judge.prepare(photo) for judge in judges}}

    return look


def sees_regions(judge: Judge) -> bool:
    """Whether cosines of its features say how alike two objects are. Inception's do not, and nobody takes them for that."""
    return not judge.identity.kind.startswith("inception")


def takes_published(judge: Judge) -> bool:
    """Whether the published CLIP score is defined for it: of 224 px, and with CLIP's text space."""
    return judge.identity.kind == "clip" and judge.identity.input_size == 224


def through_codec(picture: AnyPhoto, codec: str) -> AnyPhoto:
    """A picture as it comes back from a file of the codec: `png` (unchanged) or `jpeg:QUALITY` (4:2:0, as cameras write).

    Raises:
        InputError: another codec.
    """
    name, _, quality = codec.partition(":")
    if name == "png" and not quality:
        return picture
    if name != "jpeg" or not (quality.isascii() and quality.isdecimal()) or not 1 <= int(quality) <= 100:
        raise InputError(f"codec {codec}: give png, or jpeg:QUALITY with a quality of 1 to 100")
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=int(quality), subsampling="4:2:0")
    return decode_jpeg(file.getvalue())


def _see(key: str, looked: np.ndarray, judges: Mapping[str, Judge]) -> np.ndarray:
    """What the judge of an array's name sees; numbers stay what they are."""
    what, name = key.split("/", 1)
    if what == "pixels":
        return looked
    features = judges[name].embed(looked)
    if not np.isfinite(features).all():
        raise InputError(f"judge {name}: its features of some pictures are not finite numbers; its weights file may be damaged")
    return features


def make_folder(folder: Path) -> None:
    """A folder and those above it.

    Raises:
        InputError: a file is in the way, or nothing can be made there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if machine_error(error):
            raise
        raise InputError(f"{str(folder)[:300]}: no folder can be made there ({error.strerror}); give another --out") from None


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npz"


def _read_part(folder: Path, number: int, count: int) -> Features | None:
    """A part's arrays; None where it is not there, or not whole."""
    try:
        with np.load(_part_file(folder, number), allow_pickle=False) as file:
            part = {key: file[key] for key in file.files}
    # RuntimeError: of a flag or a version that a flipped bit makes of another one.
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
    names = part.pop(_NAMES, np.array([])).tolist()
    return part if sorted(part) == names and all(len(array) == count for array in part.values()) else None
