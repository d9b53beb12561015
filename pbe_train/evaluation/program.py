"""The story of an evaluation: paint, look, score, show. `pbe_train/evaluate.py` is its command line."""

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from pbe_core.errors import InputError
from pbe_core.judges.judge import Judge, load_judge
from pbe_core.progress import Progress, silence
from pbe_core.words import number_of
from pbe_train.checkpoints.trainer_checkpoint import list_checkpoints, read_state
from pbe_train.config import ModelSettings, TrainSettings
from pbe_train.data.remote_shards import open_reader
from pbe_train.editing.paint_by_example import PaintByExample
from pbe_train.evaluation.conditioner_judge import conditioner_judge
from pbe_train.evaluation.features import (
    LOOKS,
    Features,
    Row,
    extract,
    look_at_real,
    look_at_references,
    look_at_row,
    make_folder,
    read_features,
    share_of,
    through_codec,
)
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
from pbe_train.evaluation.pair_sets import (
    CANDIDATES,
    DatasetPairs,
    PairSet,
    draw_alike,
    draw_candidates,
    file_hashes,
    open_pairs,
    pairs_of_dataset,
)
from pbe_train.evaluation.quality import FEWEST_FOR_MIXTURE, Mixture, fit_mixture
from pbe_train.evaluation.real_photos import RealPhotos, open_real_photos
from pbe_train.evaluation.report import Shown, write_report
from pbe_train.evaluation.results import BOUNDS, LABELS, MIXTURE, Evaluation, check_comparable, read_evaluation
from pbe_train.evaluation.summary import FEWEST, Question, by_group, pair_rows, score_row, scores_of_pairs, sizes_of
from pbe_train.evaluation.tables import score_tables
from pbe_train.model.pipeline import SamplingSettings, check_guidance

DRAWS = 0
"""Seed of candidates and of other photos of a class: of the ruler, whatever seed a model paints with."""
PATIENCE = timedelta(days=1)
"""The other processes may still be painting."""
LONGEST_NAME = 120
"""Bytes of a row's name as a folder's: file systems allow 255, and features add their mark."""
NO_JUDGE = (
    "no judge was given: nothing independent says whether the object is the reference's. "
    "CLIP: --judge clip=openai/clip-vit-base-patch32 fetches it, or give a folder that "
    "`hf download openai/clip-vit-base-patch32` made; docs/evaluation.md names the others"
)

FEW_CLASSES = f"labels of fewer than {CANDIDATES} classes: whether a reference is recognised among {CANDIDATES} is not asked"


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


def evaluate(options: argparse.Namespace) -> None:
    """Paint what is missing, look at it, and write OUT/evaluation.json and OUT/index.html.

    Raises:
        InputError: something is missing, damaged, or does not fit together.
    """
    beside = [read_evaluation(path) for path in options.beside]
    if not (options.pairs or options.dataset):
        check_comparable(beside)
        show(options.out, [Shown(each) for each in beside])
        return
    through_codec(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy(), options.codec)
    with processes(options.threads) as (rank, world, device):
        pairs = find_pairs(options)
        given = [load_judge(spec, device) for spec in options.judge]
        check_names([judge.identity.name for judge in given], "judges")
        models, pictures = find_rows(options, pairs)
        real = open_real_photos(options.real, _common_size(pairs)) if options.real else None
        # What is wrong is known before hours of painting, not after them.
        check_comparable([describe(options, pairs, [], real, given), *beside])
        check_out(options.out)
        painted, reconstructed, own = paint_all(options, pairs, models, pictures, rank, world, device)
        given = [own] if own else given
        _meet(world)
        described = describe(options, pairs, painted, real, given)
        check_comparable([described, *beside])
        rows = rows_of(pairs, painted, reconstructed)
        folders = look_at_all(options, pairs, rows, real, given, rank, world)
        _meet(world)
        if rank:
            return
        result = described.model_copy(update=score(options, pairs, rows, painted, real, given, folders, described.recipe))
    result.write(options.out / "evaluation.json")
    check_comparable([result, *beside])  # A mixture may just have been fitted.
    print(f"the result: {options.out / 'evaluation.json'}")
    folders_of_rows = {row.name: row.folder for row in rows if row.folder}
    show(options.out, [Shown(result, folders_of_rows), *(Shown(each) for each in beside)], pairs)


def show(out: Path, shown: Sequence[Shown], pairs: PairSet | None = None) -> None:
    """Print results as tables, and draw them as a page: OUT/index.html. Without the pairs it has no pictures."""
    Console().print(score_tables([each.evaluation for each in shown]))
    page = out / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    with Progress("drawing the page"):
        write_report(shown, page, pairs)
    print(f"the page: {page}")


@contextmanager
def processes(threads: int) -> Iterator[tuple[int, int, torch.device]]:
    """This process's rank, how many there are, and its device; under torchrun they wait for one another."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, locally = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(max(1, threads // locally))
    if world > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
    with silence() if rank else nullcontext():
        yield rank, world, device
    if world > 1:
        dist.destroy_process_group()


def find_pairs(options: argparse.Namespace) -> PairSet:
    """The pairs that are asked: of files, or of a split of a dataset."""
    if options.pairs:
        return open_pairs(options.pairs)
    nothing = ModelSettings(encoder="", vae="")  # Of a training's settings, a reader asks for those of its dataset.
    settings = TrainSettings(model=nothing, dataset=Path()).over(options.dataset, options.storage)
    reader = open_reader(settings, options.split)
    return pairs_of_dataset(reader, options.count, options.seed, options.references)


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
            paint = PaintByExample.from_pretrained(source, device=device)
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


def paint_one(
    options: argparse.Namespace, paint: PaintByExample, pairs: PairSet, name: str, source: str, rank: int, world: int
) -> Painted:
    """What is missing of a model's row."""
    check_guidance(paint.run, options.guidance)
    how = SamplingSettings(options.guidance, options.steps, options.scheduler)
    recipe = make_recipe(
        paint,
        pairs,
        model=source,
        weights="ema",
        precision="fp32",
        how=how,
        size=options.size or paint.run.identity.view_size,
        seed=options.seed,
        window=options.window,
        blend=options.blend,
    )
    if isinstance(pairs, DatasetPairs) and pairs.trained(paint.run.identity.dataset_fingerprint) and rank == 0:
        print(f"warning: {name} was trained on these samples; its scores say nothing of new photos", file=sys.stderr)
    folder = options.out / "pictures" / _file_name(name)
    with Progress(f"painting, {name}", len(pairs.pairs), "pairs") as progress:
        paint_pairs(paint, pairs, recipe, folder, batch=options.batch, rank=rank, world=world, progress=progress)
    note = f"{how.steps} steps of {how.scheduler}, guidance {how.guidance:g}, at {recipe.size} px"
    return Painted(name, folder, source, recipe.step, recipe.encoder_sha256, note)


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


def look_at_all(
    options: argparse.Namespace,
    pairs: PairSet,
    rows: Sequence[Row],
    real: RealPhotos | None,
    judges: Sequence[Judge],
    rank: int,
    world: int,
) -> dict[str, Path]:
    """Extract the features of all rows, of the references and of the real photos; the folder of each."""
    others = draw_alike(pairs.pairs, DRAWS)
    count = len(pairs.pairs)
    seen = [f"{judge.identity.name} {judge.identity.sha256} {judge.identity.preparation}" for judge in judges]
    # A fingerprint knows neither the order of the pairs nor their labels, which decide who is compared with whom.
    order = [(pair.id, other) for pair, other in zip(pairs.pairs, others, strict=True)]
    same = [LOOKS, pairs.fingerprint, order, options.codec, *seen]
    passes = [(row.name, row.pictures, count, look_at_row(row, pairs, others, judges, options.codec)) for row in rows]
    passes.append(("references", "references", count, look_at_references(pairs, judges, options.codec)))
    if real:
        passes.append(("real photos", real.recipe, len(real.names), look_at_real(real, judges, options.codec)))
    folders = {}
    with Progress("looking", sum(share_of(each, rank, world) for _, _, each, _ in passes), "pictures") as progress:
        for name, pictures, each, look in passes:
            mark = hashlib.sha256(repr([*same, pictures]).encode()).hexdigest()[:16]
            folders[name] = options.out / "features" / f"{_file_name(name)}-{mark}"
            extract(look, each, judges, folders[name], threads=options.threads, rank=rank, world=world, progress=progress)
    return folders


def score(
    options: argparse.Namespace,
    pairs: PairSet,
    rows: Sequence[Row],
    painted: Sequence[Painted],
    real: RealPhotos | None,
    judges: Sequence[Judge],
    folders: dict[str, Path],
    recipe: dict[str, str],
) -> dict[str, Any]:
    """All scores, from the features: fields of an `Evaluation`."""
    count = len(pairs.pairs)
    features = {row.name: read_features(folders[row.name], count) for row in rows}
    against: Features = read_features(folders["real photos"], len(real.names)) if real else features["real view"]
    question = Question(
        pairs=pairs,
        judges=judges,
        references=read_features(folders["references"], count),
        candidates=draw_candidates(pairs.pairs, DRAWS),
        real=against,
        paired=real is None,
        seed=options.seed,
        replicates=options.replicates,
        infinity=options.extrapolate,
        mixtures=_mixtures(options, judges, against),
    )
    sources = {one.name: (one.model, one.step) for one in painted}
    scored = []
    with Progress("scoring", len(rows), "rows") as progress:
        for row in rows:
            model, step = sources.get(row.name, (None, None))
            scored.append(score_row(question, row.name, features[row.name], model, step))
            progress.update()
    of_pairs = {row.name: scores_of_pairs(question, features[row.name]) for row in rows}
    areas = features["real view"]["pixels/area"]
    return {
        "recipe": recipe | ({MIXTURE: next(iter(question.mixtures.values())).mark} if question.mixtures else {}),
        "rows": scored,
        "per_class": by_group(of_pairs, [pair.label for pair in pairs.pairs], options.seed),
        "per_size": by_group(of_pairs, sizes_of(areas), options.seed),
        "pairs": pair_rows(pairs, areas, of_pairs),
    }


def describe(
    options: argparse.Namespace,
    pairs: PairSet,
    painted: Sequence[Painted],
    real: RealPhotos | None,
    judges: Sequence[Judge],
) -> Evaluation:
    """What is scored, and how, before any score: all that another result must agree in."""
    count, size = len(pairs.pairs), _common_size(pairs)
    if count < FEWEST:
        raise InputError(f"{pairs.name}: {number_of(count, 'pair')}; sets are compared, which takes two at least")
    if options.mixture:
        check_mixture(options.mixture, judges, len(real.names) if real else count)
    return Evaluation(
        pairs_name=Path(pairs.name).name,
        pairs_fingerprint=pairs.fingerprint,
        count=count,
        recipe={
            "codec": options.codec,
            "size": f"{size} x {size} px" if size else "of several sizes",
            "count": str(count),
            "real set": real.recipe if real else "the pairs' own real views",
            **({LABELS: _labels(pairs)} if any(pair.label for pair in pairs.pairs) else {}),
            **({MIXTURE: Mixture.load(options.mixture).mark} if options.mixture and options.mixture.is_file() else {}),
        },
        judges=[judge.identity for judge in judges],
        independent={judge.identity.name: known for judge in judges if (known := is_independent(judge, painted)) is not None},
        rows=[],
        notes=[
            *notes_of(painted),
            *([] if options.judge else [NO_JUDGE]),
            *([] if draw_candidates(pairs.pairs, DRAWS) else [FEW_CLASSES]),
        ],
    )


def notes_of(painted: Sequence[Painted]) -> list[str]:
    """How rows were painted: a line for all that were painted alike, as the checkpoints of a run are."""
    return [
        f"{', '.join(one.name for one in painted if one.note == note)}: {note}"
        for note in dict.fromkeys(one.note for one in painted)
    ]


def check_mixture(path: Path, judges: Sequence[Judge], count: int) -> None:
    """Make sure that there will be a quality score.

    Args:
        path: of a mixture, or where one is to be written.
        judges: the first CLIP among them is its judge.
        count: of real pictures, which a new one is fitted on.

    Raises:
        InputError: no CLIP, a mixture of another one's features or none of ours, or one that cannot be fitted or written.
    """
    clip = next((judge.identity for judge in judges if judge.identity.kind == "clip"), None)
    if clip is None:
        raise InputError("--mixture: QS needs CLIP's features; give --judge clip=...")
    if path.is_file():
        if (width := Mixture.load(path).means.shape[1]) != clip.width:
            raise InputError(
                f"{path}: of features of {width} numbers, and {clip.name} has {clip.width}; give the CLIP it was made with"
            )
    elif path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--mixture {path}: no file can be written there; give a .npz, in a folder that is there")
    elif count < FEWEST_FOR_MIXTURE:
        raise InputError(
            f"--mixture {path}: no such file, and {count} real pictures are too few to fit one (of {FEWEST_FOR_MIXTURE}); "
            "give --real FOLDER with more, or leave --mixture out"
        )


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


def _mixtures(options: argparse.Namespace, judges: Sequence[Judge], real: Features) -> dict[str, Mixture]:
    clip = next((judge.identity.name for judge in judges if judge.identity.kind == "clip"), None)
    if options.mixture is None:
        return {}
    assert clip is not None, "`describe` has refused it"
    if options.mixture.is_file():
        return {clip: Mixture.load(options.mixture)}
    mixture = fit_mixture(real[f"whole/{clip}"], options.seed)
    mixture.save(options.mixture)
    return {clip: mixture}


def _named(word: str) -> tuple[str, str]:
    """NAME=PLACE, or a place, which has the name of its folder."""
    name, mark, place = word.partition("=")
    return (name, place) if mark and re.fullmatch(r"[\w .,+-]+", name) else (Path(word).resolve().name, word)


def check_folders(names: Sequence[str]) -> None:
    """Refuse rows whose pictures would lie in one folder, or in none that can be made."""
    folders = [_file_name(name) for name in names]
    for name, folder in zip(names, folders, strict=True):
        if not folder.strip("-") or len(folder.encode()) > LONGEST_NAME:
            raise InputError(f"row {name[:60]!r}: no name for a folder; give it one of some letters: NAME=...")
        # Some file systems know no case.
        if same := [other for other, one in zip(names, folders, strict=True) if one.lower() == folder.lower()][1:]:
            raise InputError(f"rows {name!r} and {same[0]!r} would share the folder {folder}; give one another name: NAME=...")


def check_out(out: Path) -> None:
    """Make the folder of results. Raises InputError where results could not be written."""
    for folder in (out, out / "pictures", out / "features"):
        make_folder(folder)
    if taken := [name for name in ("evaluation.json", "index.html") if (out / name).is_dir()]:
        raise InputError(f"{out / taken[0]}: is a folder, and a file is to be written there; give another --out")
    if not os.access(out, os.W_OK):
        raise InputError(f"{out}: nothing may be written there; give another --out")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).lstrip(".")


def _state(pairs: PairSet, folder: Path) -> str:
    """What tells the pictures of a folder from those of another one, or of another time: their contents."""
    paths = [picture_path(folder, pair.id) for pair in pairs.pairs]
    return hashlib.sha256("\n".join(file_hashes(paths, f"hashing {folder.name}")).encode()).hexdigest()


def _labels(pairs: PairSet) -> str:
    """What tells labels apart: they decide among which references one is looked for."""
    lines = "\n".join(sorted(f"{pair.id} {pair.label}" for pair in pairs.pairs))
    classes = len({pair.label for pair in pairs.pairs} - {""})
    return f"{number_of(classes, 'class', 'classes')}, {hashlib.sha256(lines.encode()).hexdigest()[:12]}"


def _common_size(pairs: PairSet) -> int | None:
    """The side of the photos, where all are squares of one size."""
    sizes = {pairs.size(number) for number in range(len(pairs.pairs))}
    height, width = next(iter(sizes))
    return height if len(sizes) == 1 and height == width else None


def _meet(world: int) -> None:
    """Wait for the other processes. Raises InputError where one of them has ended."""
    if world == 1:
        return
    try:
        dist.barrier()
    except RuntimeError as error:
        raise InputError(f"another process has ended, with a message of its own ({str(error).splitlines()[0][:120]})") from None
