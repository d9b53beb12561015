"""The rows of an evaluation: who is asked, painting what is missing, and the rows that bound the models'.

--model, --checkpoints ──paint──▶ OUT/pictures/ROW ──┐
--pictures ──────────────check──▶ their folder ──────┼──▶ rows
copy-paste, real view, ... made on the way ──────────┘
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pbe_core.errors import InputError
from pbe_core.judges.judge import Judge
from pbe_core.progress import Progress
from pbe_core.words import number_of
from pbe_train.checkpoints.trainer_checkpoint import list_checkpoints, read_state
from pbe_train.editing.paint_by_example import PaintByExample
from pbe_train.evaluation.conditioner_judge import conditioner_judge
from pbe_train.evaluation.features import Row
from pbe_train.evaluation.painting import (
    check_pictures,
    make_recipe,
    paint_pairs,
    picture_path,
    read_picture,
    real_view,
    reconstruct_pairs,
)
from pbe_train.evaluation.pair_scores import copy_paste
from pbe_train.evaluation.pair_sets import DatasetPairs, PairSet, file_hashes
from pbe_train.evaluation.results import BOUNDS
from pbe_train.model.pipeline import SamplingSettings, check_guidance
from pbe_train.model.sampling import EVERYWHERE, check_interval

LONGEST_NAME = 120
"""Bytes of a row's name as a folder's: file systems allow 255, and features add their mark."""
Named = tuple[str, str]
"""A row's name, and where its model or its pictures are."""


@dataclass(frozen=True)
class Painted:
    """Pictures of one model or program, painted or to be painted."""

    name: str
    folder: Path
    model: str | None = None
    step: int | None = None
    encoder_sha256: str | None = None
    note: str = ""
    """How it was painted."""


def find_rows(options: argparse.Namespace, pairs: PairSet) -> tuple[list[Named], list[Named]]:
    """The models that paint, and the folders that others painted; these and the pairs have been checked.

    Raises:
        InputError: no checkpoints, two rows of one name, pictures that do not fit, or pairs that cannot be read.
    """
    models = [_named(word) for word in options.model]
    if options.checkpoints:
        found = list_checkpoints(options.checkpoints)
        if not found:
            raise InputError(f"--checkpoints {options.checkpoints}: no checkpoint there; give a run folder that train.py wrote")
        models += [(f"step {read_state(path).step:,}", str(path)) for path in found]
    pictures = [_named(word) for word in options.pictures]
    names = [name for name, _ in (*models, *pictures)]
    check_names([*names, *BOUNDS], "rows")
    check_folders(names)
    for _, place in pictures:
        check_pictures(pairs, Path(place))
    if models:
        check_pairs(pairs, options.threads)
    return models, pictures


def paint_all(
    options: argparse.Namespace,
    pairs: PairSet,
    models: Sequence[Named],
    pictures: Sequence[Named],
    rank: int,
    world: int,
    device: torch.device,
) -> tuple[list[Painted], Path | None, Judge | None]:
    """Paint with each model, one after the other, so that one is in memory at a time.

    Returns:
        The rows of pictures; the folder of what the first model's VAE makes of the real pictures; and, where no judge is named,
        that model's own encoder as one.
    """
    painted, reconstructed, own = [], None, None
    for number, (name, source) in enumerate(models):
        with Progress(f"loading {name}"):
            paint = PaintByExample.from_pretrained(source, device=device, precision="fp32")
        row = paint_one(options, paint, pairs, name, source, rank, world)
        # Checkpoints of one run are points of one curve.
        painted.append(replace(row, model=str(options.checkpoints)) if number >= len(options.model) else row)
        if reconstructed is None:
            reconstructed = options.out / "pictures" / f"vae-{paint.run.identity.vae_sha256[:12]}"
            with Progress("reconstructing", len(pairs.pairs), "pairs") as progress:
                how = {"batch": options.batch, "size": options.size, "window": options.window}
                reconstruct_pairs(paint.run, pairs, reconstructed, **how, rank=rank, world=world, progress=progress)
            own = None if options.judge else conditioner_judge(paint.run)
        del paint
    painted += [Painted(name, Path(place), note="painted by another program") for name, place in pictures]
    return painted, reconstructed, own


def paint_one(
    options: argparse.Namespace, paint: PaintByExample, pairs: PairSet, name: str, source: str, rank: int, world: int
) -> Painted:
    """What is missing of a model's row."""
    check_guidance(paint.run, options.guidance)
    interval = check_interval(options.guidance_interval)
    how = SamplingSettings(options.guidance, options.steps, options.scheduler, interval, options.reuse)
    recipe = make_recipe(
        paint,
        pairs,
        model=source,
        weights="ema",
        precision="fp32",
        how=how,
        size=options.size,
        seed=options.seed,
        window=options.window,
        blend=options.blend,
    )
    if isinstance(pairs, DatasetPairs) and pairs.trained(paint.run.identity.dataset_fingerprint) and rank == 0:
        print(f"warning: {name} was trained on these samples; its scores say nothing of new photos", file=sys.stderr)
    folder = options.out / "pictures" / file_name(name)
    with Progress(f"painting, {name}", len(pairs.pairs), "pairs") as progress:
        paint_pairs(paint, pairs, recipe, folder, batch=options.batch, rank=rank, world=world, progress=progress)
    shown = ", ".join(f"{width}x{height}" for width, height in recipe.buckets or ()) or recipe.size
    where = "" if interval == EVERYWHERE else f" from {interval[0]:g} to {interval[1]:g} of the schedule"
    note = f"{how.steps} steps of {how.scheduler}, guidance {how.guidance:g}{where}, at {shown} px"
    return Painted(name, folder, source, recipe.step, recipe.encoder_sha256, note)


def check_pairs(pairs: PairSet, threads: int) -> None:
    """Read every pair once, so that one that is damaged is known before hours of painting, and not after them.

    Raises:
        InputError: with the first few that cannot be read, and how many.
    """

    def problem(number: int) -> str | None:
        try:
            pairs.read(number)
        except InputError as error:
            return f"{pairs.pairs[number].id}: {error}"
        finally:
            progress.update()
        return None

    with ThreadPoolExecutor(threads) as pool, Progress("checking the pairs", len(pairs.pairs), "pairs") as progress:
        problems = [told for told in pool.map(problem, range(len(pairs.pairs))) if told]
    if problems:
        more = f" ({number_of(len(problems), 'such pair')})" if len(problems) > 1 else ""
        raise InputError(f"pair {problems[0]}{more}; no pair is left out by itself, as scores of other pairs are other scores")


def rows_of(pairs: PairSet, painted: Sequence[Painted], reconstructed: Path | None) -> list[Row]:
    """All rows: those of models, and those that bound them."""

    def of_folder(name: str, folder: Path) -> Row:
        return Row(name, _state(pairs, folder), lambda pair, _: read_picture(folder, pair.id), folder)

    rows = [of_folder(one.name, one.folder) for one in painted]
    rows.append(Row("copy-paste", "copy-paste", lambda _, given: copy_paste(given.photo, given.mask, given.reference)))
    if pairs.has_truth:
        rows.append(Row("nothing painted", "photo", lambda _, given: given.photo))
    rows.append(Row("real view", "real", lambda _, given: real_view(given)))
    if reconstructed:
        rows.append(of_folder("VAE reconstruction", reconstructed))
    return rows


def notes_of(painted: Sequence[Painted]) -> list[str]:
    """How rows were painted: a line for all that were painted alike, as the checkpoints of a run are."""
    return [
        f"{', '.join(one.name for one in painted if one.note == note)}: {note}"
        for note in dict.fromkeys(one.note for one in painted)
    ]


def is_independent(judge: Judge, painted: Sequence[Painted]) -> bool | None:
    """Whether a judge's weights are those of no conditioner that was painted with; None where nobody knows some of these."""
    encoders = {one.encoder_sha256 for one in painted}
    if not judge.encoder_hashes.isdisjoint(encoders):
        return False
    return None if None in encoders else True


def check_names(names: Sequence[str], what: str) -> None:
    """Refuse two rows, or judges, of one name."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two {what} are called {', '.join(twice)}; give each a name of its own: NAME=...")


def check_folders(names: Sequence[str]) -> None:
    """Refuse rows whose pictures would lie in one folder, or in none that can be made."""
    folders = [file_name(name) for name in names]
    for name, folder in zip(names, folders, strict=True):
        if not folder.strip("-") or len(folder.encode()) > LONGEST_NAME:
            raise InputError(f"row {name[:60]!r}: no name for a folder; give it one of some letters: NAME=...")
        # Some file systems know no case.
        if same := [other for other, one in zip(names, folders, strict=True) if one.lower() == folder.lower()][1:]:
            raise InputError(f"rows {name!r} and {same[0]!r} would share the folder {folder}; give one another name: NAME=...")


def file_name(name: str) -> str:
    """A row's name as a folder's."""
    return re.sub(r"[^\w.-]+", "-", name).lstrip(".")


def _named(word: str) -> tuple[str, str]:
    """NAME=PLACE, or a place, which has the name of its folder."""
    name, mark, place = word.partition("=")
    return (name, place) if mark and re.fullmatch(r"[\w .,+-]+", name) else (Path(word).resolve().name, word)


def _state(pairs: PairSet, folder: Path) -> str:
    """What tells the pictures of a folder from those of another one, or of another time: their contents."""
    paths = [picture_path(folder, pair.id) for pair in pairs.pairs]
    return hashlib.sha256("\n".join(file_hashes(paths, f"hashing {folder.name}")).encode()).hexdigest()
