"""One evaluation of all finished runs, with one ruler; and its scores as one number for each seed and pair.

    runs ──paint, guidance by arm──▶ OUT/evaluation/pictures ──judges──▶ features ──▶ score: arm: [seeds, pairs]

Scores of sets, Fréchet distances and KID, become such numbers too: the distance, and how each pair moves it (`influences`).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from pbe_core.errors import InputError
from pbe_core.judges.judge import Judge, load_judge
from pbe_core.progress import Progress
from pbe_core.randomness import generator
from pbe_train.evaluate import parse_options
from pbe_train.evaluation.distances import frechet_distance, influences, kernel_distance
from pbe_train.evaluation.features import Features, Row, read_features
from pbe_train.evaluation.pair_sets import FilePairs, PairSet, open_pairs
from pbe_train.evaluation.program import check_out, describe, look_at_all, meet, processes, score
from pbe_train.evaluation.report import Shown, write_report
from pbe_train.evaluation.results import Evaluation
from pbe_train.evaluation.rows import Painted, check_names, find_rows, paint_all, rows_of
from pbe_train.evaluation.summary import frechet_name
from pbe_train.ladder.runs import TrainingRun

FOLDER = "evaluation"
NO_GUIDANCE = 1.0
# The same for blended edits: infinite.
_LEFT_OUT = "PSNR"


@dataclass(frozen=True)
class HowPainted:
    """How all runs are asked: the same for each, but for the guidance, which is an arm's own."""

    pairs: Path
    judges: Sequence[str]
    guidance: float
    """Of the arms that were trained with dropped conditions; the others know no null vector and are painted at 1."""
    sampling_steps: int
    count: int | None
    """Pairs of the set, drawn; null for all."""
    batch: int
    threads: int

    def options(self, models: Mapping[str, Path], guidance: float, out: Path) -> argparse.Namespace:
        """As `pbe evaluate` takes them."""
        given = ["--pairs", str(self.pairs), "--out", str(out), "--guidance", str(guidance), "--judge", *self.judges]
        given += ["--steps", str(self.sampling_steps), "--batch", str(self.batch), "--threads", str(self.threads)]
        return parse_options([*given, "--model", *(f"{name}={folder}" for name, folder in models.items())])


@dataclass(frozen=True)
class Scored:
    """What an evaluation of the ladder gives."""

    evaluation: Evaluation
    ids: Sequence[str]
    """Of the pairs, in the order of the numbers."""
    rows: Mapping[str, Mapping[str, Float64[np.ndarray, " pairs"]]]
    """Score -> row, which has its run's name -> a number for each pair; NaN where it has none."""


def guidance_of(run: TrainingRun, how: HowPainted) -> float:
    """What a run is painted with."""
    return how.guidance if run.settings.condition_dropout > 0 else NO_GUIDANCE


def score_runs(runs: Sequence[TrainingRun], how: HowPainted, out: Path) -> Scored | None:
    """Paint what is missing, look at it, and score it; also writes OUT/evaluation.json and OUT/index.html of `pbe evaluate`.

    Under torchrun the processes share the work; null on all but the first.

    Args:
        runs: finished ones.
        how: they are asked.
        out: folder of the evaluation.

    Raises:
        InputError: as `pbe evaluate`.
    """
    groups: dict[float, dict[str, Path]] = {}
    for run in runs:
        groups.setdefault(guidance_of(run, how), {})[run.name] = run.folder
    asked = [how.options(models, guidance, out) for guidance, models in groups.items()]
    with processes(how.threads) as (rank, world, device):
        pairs = draw_pairs(open_pairs(how.pairs), how.count)
        judges = [load_judge(spec, device) for spec in how.judges]
        check_names([judge.identity.name for judge in judges], "judges")
        found = [find_rows(options, pairs)[0] for options in asked]
        describe(asked[0], pairs, [], None, judges)
        check_out(out)
        painted: list[Painted] = []
        for options, models in zip(asked, found, strict=True):
            more, reconstructed, _ = paint_all(options, pairs, models, [], rank, world, device)
            painted += more
        meet(world)
        rows = rows_of(pairs, painted, reconstructed)
        folders = look_at_all(asked[0], pairs, rows, None, judges, rank, world)
        meet(world)
        if rank:
            return None
        described = describe(asked[0], pairs, painted, None, judges)
        result = described.model_copy(update=score(asked[0], pairs, rows, painted, None, judges, folders, described.recipe))
    result.write(out / "evaluation.json")
    with Progress("drawing the evaluation's page"):
        write_report([Shown(result, {row.name: row.folder for row in rows if row.folder})], out / "index.html", pairs)
    return Scored(result, [pair.id for pair in pairs.pairs], tabulate(result, rows, judges, folders))


def check_evaluation(how: HowPainted) -> None:
    """Open pairs and judges, so that what is wrong with them is known before the trainings. Raises InputError: something is."""
    judges = [load_judge(spec, "cpu") for spec in how.judges]
    check_names([judge.identity.name for judge in judges], "judges")
    draw_pairs(open_pairs(how.pairs), how.count).read(0)


def draw_pairs(pairs: PairSet, count: int | None) -> PairSet:
    """So many pairs of a set of files, drawn by name and in the set's order; all where it has no more."""
    if count is None or count >= len(pairs.pairs) or not isinstance(pairs, FilePairs):
        return pairs
    drawn = generator(0, "ladder", "pairs").permutation(len(pairs.files))[:count]
    return FilePairs(pairs.name, [pairs.files[number] for number in sorted(drawn)])


def tabulate(
    result: Evaluation, rows: Sequence[Row], judges: Sequence[Judge], folders: Mapping[str, Path]
) -> dict[str, dict[str, Float64[np.ndarray, " pairs"]]]:
    """Each score of each row as a number for each pair: their mean is the row's score."""
    table: dict[str, dict[str, Float64[np.ndarray, " pairs"]]] = {}
    names = [row.name for row in rows]
    for name in names:
        for key in next(one for one in result.rows if one.name == name).pair_scores:
            if not key.startswith(_LEFT_OUT):
                values = [pair.scores[name].get(key) for pair in result.pairs]
                table.setdefault(key, {})[name] = np.array([np.nan if one is None else one for one in values], np.float64)
    real = read_features(folders["real view"], result.count)
    with Progress("weighing the pairs", len(names), "rows") as progress:
        for name in names:
            if name != "real view":
                for key, moved in distances(judges, read_features(folders[name], result.count), real).items():
                    table.setdefault(key, {})[name] = moved
            progress.update()
    return table


def distances(judges: Sequence[Judge], made: Features, real: Features) -> dict[str, Float64[np.ndarray, " pairs"]]:
    """Fréchet distance and KID to the real views by each judge, as a number for each pair."""
    found = {}
    for judge in judges:
        name, kind = judge.identity.name, judge.identity.kind
        a, b = (side[f"whole/{name}"] for side in (made, real))
        found[frechet_name(kind, name)] = frechet_distance(a, b) + influences("frechet", a, b)
        found[f"KID ({name})"] = kernel_distance(a, b, paired=True) + influences("kernel", a, b)
    return found


def stacked(
    rows: Mapping[str, Float64[np.ndarray, " pairs"]], runs: Sequence[TrainingRun], arm: str, seeds: Sequence[int]
) -> Float64[np.ndarray, "seeds pairs"]:
    """A score's numbers for an arm's runs, in the order of the seeds.

    Raises:
        InputError: a run is missing.
    """
    by_seed = {run.seed: rows[run.name] for run in runs if run.arm.name == arm}
    if missing := [seed for seed in seeds if seed not in by_seed]:
        raise InputError(f"arm {arm}: no run of seed {missing[0]}")
    return np.stack([by_seed[seed] for seed in seeds])
