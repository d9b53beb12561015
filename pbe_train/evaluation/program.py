"""The story of an evaluation: paint, look, score, show. `pbe_train/evaluate.py` is its command line."""

import argparse
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from pbe_train.config import ModelSettings, TrainSettings
from pbe_train.data.remote_shards import open_reader
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
from pbe_train.evaluation.pair_sets import (
    CANDIDATES,
    PairSet,
    draw_alike,
    draw_candidates,
    open_pairs,
    pairs_of_dataset,
)
from pbe_train.evaluation.quality import FEWEST_FOR_MIXTURE, Mixture, fit_mixture
from pbe_train.evaluation.real_photos import RealPhotos, open_real_photos
from pbe_train.evaluation.report import Shown, write_report
from pbe_train.evaluation.results import LABELS, MIXTURE, Evaluation, check_comparable, read_evaluation
from pbe_train.evaluation.rows import Painted, check_names, file_name, find_rows, is_independent, notes_of, paint_all, rows_of
from pbe_train.evaluation.summary import FEWEST, Question, by_group, pair_rows, score_row, scores_of_pairs, sizes_of
from pbe_train.evaluation.tables import score_tables

DRAWS = 0
"""Seed of candidates and of other photos of a class: of the ruler, whatever seed a model paints with."""
PATIENCE = timedelta(days=1)
"""The other processes may still be painting."""
NO_JUDGE = (
    "no judge was given: nothing independent says whether the object is the reference's. "
    "CLIP: --judge clip=openai/clip-vit-base-patch32 fetches it, or give a folder that "
    "`hf download openai/clip-vit-base-patch32` made; docs/evaluation.md names the others"
)

FEW_CLASSES = f"labels of fewer than {CANDIDATES} classes: whether a reference is recognised among {CANDIDATES} is not asked"


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
        meet(world)
        described = describe(options, pairs, painted, real, given)
        check_comparable([described, *beside])
        rows = rows_of(pairs, painted, reconstructed)
        folders = look_at_all(options, pairs, rows, real, given, rank, world)
        meet(world)
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
            folders[name] = options.out / "features" / f"{file_name(name)}-{mark}"
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
    scored, of_pairs = [], {}
    with Progress("scoring", len(rows), "rows") as progress:
        for row in rows:
            of_pairs[row.name] = scores_of_pairs(question, features[row.name])
            scored.append(score_row(question, row.name, features[row.name], of_pairs[row.name], *sources.get(row.name, ())))
            progress.update()
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


def check_out(out: Path) -> None:
    """Make the folder of results. Raises InputError where results could not be written."""
    for folder in (out, out / "pictures", out / "features"):
        make_folder(folder)
    if taken := [name for name in ("evaluation.json", "index.html") if (out / name).is_dir()]:
        raise InputError(f"{out / taken[0]}: is a folder, and a file is to be written there; give another --out")
    if not os.access(out, os.W_OK):
        raise InputError(f"{out}: nothing may be written there; give another --out")


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


def meet(world: int) -> None:
    """Wait for the other processes. Raises InputError where one of them has ended."""
    if world == 1:
        return
    try:
        dist.barrier()
    except RuntimeError as error:
        raise InputError(f"another process has ended, with a message of its own ({str(error).splitlines()[0][:120]})") from None
