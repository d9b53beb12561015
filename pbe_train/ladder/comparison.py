"""Arms beside one another, and each beside the one before: what the numbers of an evaluation say."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float64

from pbe_core.machine import device_name
from pbe_train.config import TrainSettings
from pbe_train.evaluation.lines import kind_of, lower_is_better, score_names
from pbe_train.evaluation.results import Evaluation, RowScores
from pbe_train.ladder.arms import Arm
from pbe_train.ladder.intervals import Better, Estimate, Verdict, difference, estimate
from pbe_train.ladder.runs import TrainingRun
from pbe_train.ladder.scores import HowPainted, Scored, guidance_of, stacked

FORMAT = 1
PACKAGES = ("paint-by-example", "torch", "diffusers", "transformers", "numpy", "albumentations", "opencv-python-headless")
# Both ends of these are bad: a model that paints noise copies less than nothing, and has no seam either.
NEITHER = ("copying", "seam")
LIMITS = {"recognised": (0.0, 1.0), "FID": (0.0, np.inf), "FD": (0.0, np.inf)}
"""Of a mean; elsewhere none."""


@dataclass(frozen=True)
class Step:
    """An arm less the arm before."""

    before: Arm
    arm: Arm
    differences: Mapping[str, tuple[Estimate, Verdict]]
    """By score; over the seeds that both have."""

    @property
    def title(self) -> str:
        """The settings that differ: of arms that were left out between the two, too."""
        return self.arm.title


@dataclass(frozen=True)
class Ladder:
    """All that is shown of a ladder."""

    arms: Sequence[Arm]
    """Those that have a finished run."""
    seeds: Mapping[str, Sequence[int]]
    """Arm -> the seeds whose runs are finished."""
    guidance: Mapping[str, float]
    """Arm -> guidance that it was painted with."""
    sets: Sequence[str]
    """Scores of sets of pictures."""
    means: Sequence[str]
    """Scores of pairs."""
    cells: Mapping[str, Mapping[str, Estimate]]
    """Arm -> score -> its mean over seeds and pairs."""
    steps: Sequence[Step]
    bounds: Sequence[RowScores]
    """Rows that bound the arms', copy-paste among them."""
    settings: TrainSettings
    how: HowPainted
    evaluation: Evaluation
    ids: Sequence[str]
    numbers: Mapping[str, Mapping[str, Float64[np.ndarray, " pairs"]]]
    """Score -> run -> a number for each pair."""
    failed: Mapping[str, str]
    """Run -> why it has no scores."""
    missing: Sequence[str]
    """Runs that are not finished."""

    @property
    def scores(self) -> list[str]:
        """All of them, those of pairs first."""
        return [*self.means, *self.sets]


def compare(
    scored: Scored,
    runs: Sequence[TrainingRun],
    how: HowPainted,
    settings: TrainSettings,
    failed: Mapping[str, str],
    replicates: int,
) -> Ladder:
    """Estimate each arm's scores, and each arm's difference from the one before.

    Args:
        scored: the evaluation of the finished runs.
        runs: all of the ladder, finished or not.
        how: they were painted.
        settings: of the last arm.
        failed: runs and why.
        replicates: of the bootstrap beside each interval.
    """
    names = {row.name for row in scored.evaluation.rows}
    done = [run for run in runs if run.name in names]
    arms = list(dict.fromkeys(run.arm for run in runs if run in done))
    seeds = {arm.name: sorted(run.seed for run in done if run.arm is arm) for arm in arms}
    own = [row for row in scored.evaluation.rows if not row.is_bound]
    sets, means = score_names(own, scored.evaluation.count)
    shown = [key for key in (*means, *sets) if key in scored.rows]

    def numbers(arm: Arm, key: str, chosen: Sequence[int]) -> Float64[np.ndarray, "seeds pairs"]:
        return stacked(scored.rows[key], done, arm.name, chosen)

    def cell(arm: Arm, key: str) -> Estimate:
        return estimate(numbers(arm, key, seeds[arm.name]), replicates).within(*LIMITS.get(kind_of(key), (-np.inf, np.inf)))

    steps = []
    for before, arm in pairwise(arms):
        both = [seed for seed in seeds[arm.name] if seed in seeds[before.name]]
        found = {
            key: difference(numbers(arm, key, both), numbers(before, key, both), better_of(key), replicates)
            for key in shown
            if both
        }
        steps.append(Step(before, arm, found))
    return Ladder(
        arms=arms,
        seeds=seeds,
        guidance={run.arm.name: guidance_of(run, how) for run in done},
        sets=[key for key in sets if key in shown],
        means=[key for key in means if key in shown],
        cells={arm.name: {key: cell(arm, key) for key in shown} for arm in arms},
        steps=steps,
        bounds=[row for row in scored.evaluation.rows if row.is_bound],
        settings=settings,
        how=how,
        evaluation=scored.evaluation,
        ids=scored.ids,
        numbers=scored.rows,
        failed=failed,
        missing=[run.name for run in runs if run not in done and run.name not in failed],
    )


def better_of(score: str) -> Better:
    """Which way a score is the better one."""
    if kind_of(score) in NEITHER:
        return "neither"
    return "down" if lower_is_better(score) else "up"


def as_json(ladder: Ladder) -> dict[str, Any]:
    """The content of ablations.json: settings, versions, scores of arms, runs and pairs, differences with their verdicts."""
    evaluation = ladder.evaluation
    return {
        "format": FORMAT,
        "arms": [
            {
                "name": arm.name,
                "title": arm.title,
                "setting": arm.key or None,
                "guidance": ladder.guidance[arm.name],
                "seeds": list(ladder.seeds[arm.name]),
                "scores": {key: asdict(cell) for key, cell in ladder.cells[arm.name].items()},
            }
            for arm in ladder.arms
        ],
        "steps": [
            {
                "from": step.before.name,
                "to": step.arm.name,
                "differences": {key: {**asdict(found), "verdict": verdict} for key, (found, verdict) in step.differences.items()},
            }
            for step in ladder.steps
        ],
        "failed": dict(ladder.failed),
        "missing": list(ladder.missing),
        "settings": ladder.settings.model_dump(mode="json"),
        "painting": {
            "sampling_steps": ladder.how.sampling_steps,
            "guidance of the last arm": ladder.how.guidance,
            "notes": list(evaluation.notes),
        },
        "pairs": {"name": evaluation.pairs_name, "fingerprint": evaluation.pairs_fingerprint, "count": evaluation.count},
        "recipe": evaluation.recipe,
        "judges": [judge.model_dump(mode="json") for judge in evaluation.judges],
        "independent": evaluation.independent,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "evaluated on": device_name(),
        "ids": list(ladder.ids),
        "numbers": {
            key: {row: [None if np.isnan(one) else float(f"{one:.7g}") for one in values] for row, values in rows.items()}
            for key, rows in ladder.numbers.items()
        },
    }
