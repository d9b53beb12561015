"""Pictures for the pairs of a set: painted by a model, put through its VAE alone, or brought by another program.

    folder/recipe.json    what the pictures were made with
    folder/<id>.png       one picture a pair, whole or not there

Whoever runs again goes on: what is there is not made again (`pbe_train.evaluation.filling`). Ranks take every so-many-th pair.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_serializer

from pbe_core.buckets import Shape, by_shape
from pbe_core.errors import InputError
from pbe_core.id_list import ID_DIGITS
from pbe_core.images import AnyMask, AnyPhoto
from pbe_core.images.crop import Window, cut_view, paste, resize
from pbe_core.images.decode import PhotoError, photo_size
from pbe_core.progress import Progress
from pbe_core.randomness import name_hash
from pbe_core.vae import weights_sha256
from pbe_core.words import few, number_of
from pbe_train.data.latents import to_tensor
from pbe_train.editing.paint_by_example import PaintByExample, choose_window, edit
from pbe_train.editing.reading import read_photo
from pbe_train.evaluation.filling import fill_folder
from pbe_train.evaluation.pair_files import PICTURE_SUFFIXES
from pbe_train.evaluation.pair_sets import Pair, PairPictures, PairSet
from pbe_train.model.pipeline import Run, SamplingSettings, check_guidance, check_size
from pbe_train.model.sampling import EVERYWHERE
from schemas.dataset import leave_out

WindowOf = Literal["whole", "region"]


class PaintingRecipe(BaseModel):
    """All that decides what is painted."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, protected_namespaces=())

    model: str
    """Where it was loaded from, for people; what counts is its hash."""
    model_sha256: str
    """Of all weights that paint, the conditioner's and the frozen encoder's among them."""
    encoder_sha256: str
    """Of the vision encoder's weights."""
    vae_sha256: str
    """Of the VAE's weights."""
    step: int
    """Of the training."""
    weights: str
    """The moving average, `ema`, or the plain weights, `model`."""
    guidance: float
    """How strongly the reference is followed; 1 = no guidance."""
    steps: int
    """Of denoising."""
    scheduler: str
    """As `pbe_train.model.schedulers.make_scheduler` takes it."""
    guidance_interval: tuple[float, float] = EVERYWHERE
    """Shares of the schedule between which the reference is followed so. Left out of the file where that is all of it."""
    reuse: int = 1
    """Every so-many-th step goes through the whole U-Net. Left out of the file where all do."""
    size: int
    """Side in px at which the model works."""
    buckets: tuple[Shape, ...] | None = None
    """Shapes at which it works instead, each photo at the nearest. Null and left out of the file: at `size`."""
    seed: int
    """A pair's noise is a function of this and of its id."""
    precision: str
    """Of the networks."""
    window: WindowOf
    """Whether the whole of a photo of the view's shape is the view, as in the published test, or a window around the region, as
    in edits."""
    blend: bool
    """Whether every byte outside the mask is the photo's; in the published test it is not."""
    pairs: str
    """Fingerprint of the pair set."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return leave_out(write(self), {"buckets": None, "guidance_interval": list(EVERYWHERE), "reuse": 1})


def make_recipe(
    paint: PaintByExample,
    pairs: PairSet,
    *,
    model: str,
    weights: str,
    precision: str,
    how: SamplingSettings,
    size: int | None,
    seed: int,
    window: WindowOf = "region",
    blend: bool = True,
) -> PaintingRecipe:
    """The recipe of a loaded model. Hashes its weights and, where that has not been done, the pictures of the set."""
    identity = paint.run.identity
    return PaintingRecipe(
        model=model,
        model_sha256=weights_sha256(paint.run.model.state_dict()),
        encoder_sha256=identity.encoder_sha256,
        vae_sha256=identity.vae_sha256,
        step=paint.run.step,
        weights=weights,
        guidance=how.guidance,
        steps=how.steps,
        scheduler=str(how.scheduler),
        guidance_interval=how.guidance_interval,
        reuse=how.reuse,
        size=size or identity.view_size,
        buckets=None if size else identity.buckets,
        seed=seed,
        precision=precision,
        window=window,
        blend=blend,
        pairs=pairs.fingerprint,
    )


def paint_pairs(
    paint: PaintByExample,
    pairs: PairSet,
    recipe: PaintingRecipe,
    folder: Path,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
) -> None:
    """Paint each pair's reference into its photo: `folder/<id>.png`. Blended, its bytes outside the mask are the photo's.

    Args:
        paint: the model.
        pairs: what to paint.
        recipe: how; of the model its hashes alone are looked at, to compare them with the folder's.
        folder: made where it is not there.
        batch: pairs painted at once; it changes a picture by no more than the model's rounding.
        rank: of this process, which paints pairs rank, rank + world, ...
        world: how many processes paint.
        progress: shows the pairs of this rank; by default rank 0 shows its own.

    Raises:
        InputError: the folder holds pictures of another recipe, or of no recipe; pairs that cannot be read, after all others
            have been painted; guidance or a size that the model does not have.
    """
    check_guidance(paint.run, recipe.guidance)
    check_size(paint.run, recipe.size)
    how = SamplingSettings(recipe.guidance, recipe.steps, recipe.scheduler, recipe.guidance_interval, recipe.reuse)

    def make(which: Sequence[Pair], shown: Sequence[PairPictures], tell: Callable[[float], None]) -> list[AnyPhoto]:
        photos, masks, references = ([getattr(one, part) for one in shown] for part in ("photo", "mask", "reference"))
        seeds = [name_hash(recipe.seed, "pair", one.id, bits=32) for one in which]
        size = None if recipe.buckets else recipe.size
        windows = [view_window(one.mask, recipe.window, shape_of(paint.run, one.mask, size)) for one in shown]
        return edit(
            paint.run,
            photos,
            masks,
            references,
            seeds,
            how,
            size=size,
            blend=recipe.blend,
            windows=windows,
            watch=lambda step, of, _: tell(step / of),
        )

    fill_folder(
        folder, pairs, recipe.model_dump(mode="json"), make, "painting", batch, range(rank, len(pairs.pairs), world), progress
    )


def reconstruct_pairs(
    run: Run,
    pairs: PairSet,
    folder: Path,
    *,
    batch: int,
    size: int | None = None,
    window: WindowOf = "region",
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
) -> None:
    """Put what an edit would repaint through the VAE alone, and blend it as an edit is: the best that any painter can do.

    Args and errors are those of `paint_pairs`; `size` and `window` are the recipe's there.
    """
    check_size(run, size)

    def make(which: Sequence[Pair], shown: Sequence[PairPictures], tell: Callable[[float], None]) -> list[AnyPhoto]:
        shapes = [shape_of(run, one.mask, size) for one in shown]
        made: dict[int, AnyPhoto] = {}
        for places in by_shape(shapes):
            few = [(shown[place], view_window(shown[place].mask, window, shapes[place])) for place in places]
            views = np.stack([cut_view(real_view(one), cut, shapes[places[0]]) for one, cut in few])
            decoded = run.decode(run.encode_pixels(to_tensor(views).float() / 127.5 - 1))
            for place, (one, cut), view in zip(places, few, decoded, strict=True):
                made[place] = paste(one.photo, resize(view, cut.width, cut.height), one.mask, cut)
        return [made[place] for place in range(len(shown))]

    dtype = str(run.vae.dtype).removeprefix("torch.")
    recipe = {
        "made": "VAE reconstruction",
        "vae_sha256": run.identity.vae_sha256,
        "size": size or run.identity.view_size,
        **({"buckets": [list(shape) for shape in run.identity.buckets]} if run.identity.buckets and not size else {}),
        "window": window,
        "precision": dtype,
    }
    mine = range(rank, len(pairs.pairs), world)
    fill_folder(folder, pairs, {**recipe, "pairs": pairs.fingerprint}, make, "reconstructing", batch, mine, progress)


def real_view(given: PairPictures) -> AnyPhoto:
    """What is really there: the truth, or the photo itself."""
    return given.photo if given.truth is None else given.truth


def shape_of(run: Run, mask: AnyMask, size: int | None) -> Shape:
    """Width and height in px at which a model works on the photo of this mask."""
    return run.identity.view_shape(mask.shape[1], mask.shape[0], size)


def view_window(mask: AnyMask, window: WindowOf, shape: Shape) -> Window:
    """What the model repaints at this shape of views: see `PaintingRecipe.window`."""
    height, width = mask.shape
    whole = window == "whole" and width * shape[1] == height * shape[0]
    return Window(0, 0, width, height) if whole else choose_window(mask, shape)


def check_pictures(pairs: PairSet, folder: Path) -> None:
    """Make sure that a folder of another program's pictures has one for each pair, of its photo's size, by their headers.

    Args:
        pairs: the set.
        folder: of <id>.png, .jpg, .jpeg or .webp; of ids that are padded with zeros, also without these.

    Raises:
        InputError: pictures that are missing, of other sizes or no pictures; the first few, and how many.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one with a picture <id>.png for each pair")
    there = {path.name for path in folder.iterdir()}
    missing, wrong, twice = [], [], []
    for number, pair in enumerate(pairs.pairs):
        found = [name for name in _names(pair.id) if name in there]
        if not found:
            missing.append(pair.id)
            continue
        if len(found) > 1:
            twice.append(f"{found[0]} and {found[1]}")
        try:
            width, height = photo_size(folder / found[0], frame="exif")
        except PhotoError as error:
            raise InputError(f"{folder / found[0]}: not a readable picture ({error})") from None
        with suppress(InputError):  # Of a photo that is damaged: reading it tells that.
            if (height, width) != (size := pairs.size(number)):
                wrong.append(f"{found[0]} is {width}x{height}, its photo {size[1]}x{size[0]} px")
    problems = []
    if missing:
        problems.append(f"{number_of(len(missing), 'picture')} of {len(pairs.pairs):,} missing (named <id>.png): {few(missing)}")
    if wrong:
        problems.append(f"{number_of(len(wrong), 'picture')} painted at another size: {few(wrong, 2)}; paint at the photos' size")
    if twice:
        problems.append(f"more than one picture of an id: {few(twice, 2)}; keep one")
    if problems:
        raise InputError(f"{folder}: {'; '.join(problems)}")


def read_picture(folder: Path, id: str) -> AnyPhoto:
    """The picture of a pair in a folder that `paint_pairs`, `reconstruct_pairs` or another program has filled.

    Raises:
        InputError: it is not there, or damaged.
    """
    return read_photo(picture_path(folder, id))


def picture_path(folder: Path, id: str) -> Path:
    """Where the picture of a pair lies.

    Raises:
        InputError: it is not there.
    """
    found = next((path for name in _names(id) if (path := folder / name).is_file()), None)
    if found is None:
        raise InputError(f"{folder}: there is no picture {id}.png; paint the set again, which makes what is missing")
    return found


def _names(pair_id: str) -> list[str]:
    """What a picture of a pair may be called, ours first."""
    plain = str(int(pair_id)) if pair_id.isdigit() and len(pair_id) == ID_DIGITS else pair_id
    return [f"{stem}{suffix}" for stem in dict.fromkeys((pair_id, plain)) for suffix in PICTURE_SUFFIXES]
