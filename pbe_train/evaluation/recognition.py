"""Is the reference that was painted recognised among eight? Drawing the questions, asking them, and how sure the answer is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from pbe_core.errors import InputError
from pbe_core.images import AnyPhoto
from pbe_core.progress import Progress
from pbe_core.randomness import generator
from pbe_core.words import number_of
from pbe_train.data.order import SampleLocation
from pbe_train.data.shards import ShardReader
from pbe_train.evaluation.held_out import HeldOut, paint_held_out, read_held_out, reconstruct
from pbe_train.evaluation.pair_scores import cut_region
from pbe_train.model.pipeline import Run, SamplingSettings

CANDIDATES = 8


@dataclass(frozen=True)
class Score:
    """How often the painted reference was recognised. `low` and `high` bound the accuracy with 95 % confidence (Wilson).

    The bounds count views, not paintings: two paintings of one view are not independent.
    """

    recognised: int
    count: int
    accuracy: float
    low: float
    high: float
    mean_cosine: float


@dataclass(frozen=True)
class Question:
    """A sample with its candidates: places of eight samples of eight labels; number 0 is its own, `other` is another one's."""

    place: SampleLocation
    candidates: tuple[SampleLocation, ...]
    other: int


def draw_questions(reader: ShardReader, count: int, seed: int) -> list[Question]:
    """Draw samples of the split, each with its candidates; functions of the samples' keys and the seed.

    Raises:
        InputError: the split has fewer than eight labels.
    """
    rows = reader.labels()
    by_label: dict[str, list[SampleLocation]] = {}
    for place, _, label in rows:
        by_label.setdefault(label, []).append(place)
    if len(by_label) < CANDIDATES:
        raise InputError(
            f"{reader.folder}: split `{reader.split}` has {number_of(len(by_label), 'label')}; the test needs {CANDIDATES}"
        )
    questions = []
    for number in generator(seed, "evaluate", "samples").permutation(len(rows))[:count]:
        place, key, label = rows[number]
        random = generator(seed, "evaluate", key)
        others = sorted(by_label.keys() - {label})
        chosen = [others[index] for index in random.choice(len(others), CANDIDATES - 1, replace=False)]
        candidates = [by_label[name][random.integers(len(by_label[name]))] for name in chosen]
        questions.append(Question(place, (place, *candidates), int(random.integers(1, CANDIDATES))))
    return questions


def evaluate(
    run: Run, reader: ShardReader, questions: Sequence[Question], how: SamplingSettings, seed: int, batch: int = 16
) -> dict[str, Score]:
    """Paint each sample with its own and with another candidate's reference; the score of each row of the table.

    Memory grows with `batch`, not with the number of samples; the scores do not depend on it beyond rounding.

    Raises:
        InputError: the split keeps no views.
    """
    found: dict[str, list[tuple[bool, float]]] = {"own": [], "another": [], "real view": [], "VAE reconstruction": []}
    with Progress("painting", 2 * len(questions), "views") as progress:
        for start in range(0, len(questions), batch):
            part = questions[start : start + batch]
            samples = read_held_out(reader, [question.place for question in part], seed)
            views = [one.sample.view for one in samples if one.sample.view is not None]
            if len(views) < len(samples):
                raise InputError(f"{reader.folder}: split `{reader.split}` keeps no views; name it in the build's `views.keep`")
            references = [[reader.read(place).reference for place in question.candidates] for question in part]
            features = torch.stack([run.embed(candidates) for candidates in references])
            seeds = [seed + start + number for number in range(len(part))]
            right = [0] * len(part)
            for row, answers in (("own", right), ("another", [question.other for question in part])):
                chosen = [candidates[answer] for candidates, answer in zip(references, answers, strict=True)]
                painted = paint_held_out(run, samples, chosen, seeds, how, batch=batch, blend=False, progress=progress)
                found[row] += ask(run, samples, painted, features, answers)
            found["real view"] += ask(run, samples, views, features, right)
            found["VAE reconstruction"] += ask(run, samples, reconstruct(run, samples), features, right)
    scores = {row: make_score(answers, len(questions)) for row, answers in found.items()}
    both = make_score(found["own"] + found["another"], len(questions))
    return {"own": scores["own"], "another": scores["another"], "both": both, **scores}


def ask(
    run: Run,
    samples: Sequence[HeldOut],
    views: Sequence[AnyPhoto],
    features: Float[Tensor, "samples candidates hidden"],
    answers: Sequence[int],
) -> list[tuple[bool, float]]:
    """For each view: whether its region lies strictly nearest to the right candidate, and the cosine to that one."""
    regions = run.embed([cut_region(view, one.mask) for view, one in zip(views, samples, strict=True)])
    cosines = torch.einsum("sch,sh->sc", features, regions)
    right = torch.tensor(answers)[:, None]
    own = cosines.gather(1, right)[:, 0]
    # A tie, as between regions that all look alike, is no recognition, and nor is anything that is not a number.
    rest = cosines.scatter(1, right, -torch.inf).amax(1)
    return list(zip((own > rest).tolist(), own.tolist(), strict=True))


def make_score(answers: Sequence[tuple[bool, float]], views: int) -> Score:
    """Sum up (recognised, cosine) pairs; paintings of one view count as one observation for the interval."""
    recognised, count = sum(right for right, _ in answers), len(answers)
    low, high = wilson(recognised / count * views, views)
    return Score(recognised, count, recognised / count, low, high, float(np.mean([cosine for _, cosine in answers])))


def wilson(hits: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share, right also near 0 and 1.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    z = 1.959964
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def make_table(scores: dict[str, Score], step: int, guidance: float) -> Table:
    """The scores for people."""
    table = Table(
        title=f"Reference recognised among {CANDIDATES} (step {step}, guidance {guidance:g})",
        caption="judge: the encoder whose class token conditions the model; intervals count views",
    )
    for heading in ("painted", "samples", "recognised", "95 % interval", "mean cosine"):
        table.add_column(heading, justify="left" if heading == "painted" else "right")
    names = {"own": "own reference", "another": "another reference", "both": "both"}
    for row, score in scores.items():
        interval = f"{score.low:.1%} - {score.high:.1%}"
        table.add_row(names.get(row, row), str(score.count), f"{score.accuracy:.1%}", interval, f"{score.mean_cosine:.3f}")
        if row == "both":
            table.add_section()
    table.add_section()
    table.add_row("chance", "", f"{1 / CANDIDATES:.1%}", "", "")
    return table
