"""Results of evaluations and pair sets as tests need them: random numbers, drawn pictures."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pbe_core.images import AnyPhoto
from pbe_core.judges.judge import JudgeIdentity
from pbe_train.evaluation.pair_sets import Pair, PairPictures, PairSet
from pbe_train.evaluation.results import SIZES, Evaluation, PairRow, RowScores, Value, size_of

SET_SCORES = {
    "FID (clean)": 14.0,
    "FID (legacy)": 15.5,
    "FD-DINOv2": 212.0,
    "KID (inception-clean)": 0.0042,
    "CMMD (clip)": 0.61,
    "QS": 71.3,
}
PAIR_SCORES = {
    "CLIP score": 82.1,
    "CLIP-I": 0.821,
    "DINO-I": 0.713,
    "recognised": 0.62,
    "copying": 0.31,
    "PSNR outside": np.inf,
    "seam": 0.012,
}
BOUND_SHIFTS = {"copy-paste": 0.3, "nothing painted": -0.5, "real view": 0.6, "VAE reconstruction": 0.5}


@dataclass(frozen=True)
class DrawnPairs(PairSet):
    """A pair set of drawn pictures: a field with a disc, an ellipse as the reference."""

    pairs: list[Pair]
    side: int = 256
    name: str = "drawn"
    fingerprint: str = "ab" * 32
    has_truth: bool = True

    def size(self, number: int) -> tuple[int, int]:
        return self.side, self.side * 5 // 4

    def read(self, number: int) -> PairPictures:
        random = np.random.default_rng(number)
        top, bottom = (random.integers(40, 255, 3).tolist() for _ in range(2))
        photo = np.linspace(top, bottom, self.side)[:, None].repeat(self.side * 5 // 4, 1).astype(np.uint8)
        for _ in range(12):
            place = random.integers(0, self.side, 2).tolist()
            cv2.circle(photo, place, int(random.integers(5, 40)), random.integers(0, 255, 3).tolist(), -1, cv2.LINE_AA)
        mask = np.zeros(photo.shape[:2], bool)
        y, x, side = (int(value * self.side) for value in random.uniform((0.1, 0.1, 0.15), (0.5, 0.5, 0.5)))
        mask[y : y + side, x : x + side] = True
        reference = np.full((160, 120, 3), 255, np.uint8)
        cv2.ellipse(reference, (60, 80), (50, 70), 0, 0, 360, random.integers(0, 255, 3).tolist(), -1, cv2.LINE_AA)
        return PairPictures(photo, mask, reference, photo)


def paint_drawn(pairs: DrawnPairs, folder: Path, seed: int = 0) -> Path:
    """A folder of pictures as a model paints them: the reference in the region, with some noise."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number, pair in enumerate(pairs.pairs):
        read = pairs.read(number)
        rows, columns = np.flatnonzero(read.mask.any(1)), np.flatnonzero(read.mask.any(0))
        painted: AnyPhoto = read.photo.copy()
        region = cv2.resize(read.reference, (len(columns), len(rows)), interpolation=cv2.INTER_AREA)
        noisy = np.clip(region + random.normal(0, 12, region.shape), 0, 255).astype(np.uint8)
        painted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = noisy
        cv2.imwrite(str(folder / f"{pair.id}.png"), painted[..., ::-1])
    return folder


def judge(name: str = "clip", kind: str = "clip", **changes: object) -> JudgeIdentity:
    known = {"source": f"weights/{name}", "sha256": f"{len(name):02x}" * 32, "input_size": 224, "width": 512}
    known["preparation"] = "resized with Pillow's bicubic, centre crop, CLIP's mean and deviation"
    return JudgeIdentity(**{"name": name, "kind": kind, **known, **changes})


def row(name: str, shift: float = 0.0, count: int = 300, model: str | None = None, step: int | None = None) -> RowScores:
    """Scores that get better as `shift` grows."""
    random = np.random.default_rng(int(1000 * abs(shift)) + count)

    def value(score: str, middle: float) -> Value:
        worse = score.startswith(("F", "KID", "CMMD", "seam", "copying"))
        moved = middle * (1 + (-shift if worse else 0.3 * shift)) * random.normal(1, 0.02)
        wide = abs(moved) * 0.6 / count**0.5
        return Value.of(moved, (moved - wide, moved + wide), count)

    sets, means = ({score: value(score, middle) for score, middle in of.items()} for of in (SET_SCORES, PAIR_SCORES))
    return RowScores(name=name, model=model, step=step, set_scores=sets, pair_scores=means)


def result(
    ids: list[Pair], count: int = 300, rows: list[RowScores] | None = None, seed: int = 0, **changes: object
) -> Evaluation:
    """A result with all parts: rows that bound, classes, sizes, pairs."""
    random = np.random.default_rng(seed)
    rows = rows or [row("model", 0.0, count, "models/ours", 2000)]
    bounds = [row(name, shift, count) for name, shift in BOUND_SHIFTS.items()]
    every = [*rows, *bounds]
    areas = random.uniform(0.01, 0.35, len(ids))
    scores = [
        {one.name: {score: _noisy(random, score, own) for score, own in one.pair_scores.items()} for one in every} for _ in ids
    ]
    labels = sorted({pair.label for pair in ids})

    def part(own: int) -> list[RowScores]:
        parts = [row(one.name, random.normal(0, 0.3), max(1, own), one.model, one.step) for one in every]
        return [one.model_copy(update={"set_scores": {}}) for one in parts]

    known = {
        "pairs_name": "drawn",
        "pairs_fingerprint": "ab" * 32,
        "count": count,
        "recipe": {"codec": "PNG", "size": "512 px", "resize": "Pillow, bicubic", "real set": "COCO test2017 (40,670 photos)"},
        "judges": [
            judge("clip"),
            judge("inception-clean", "inception-clean", input_size=299, width=2048),
            judge("dinov2", "dinov2"),
        ],
        "independent": {"clip": False, "inception-clean": True, "dinov2": True},
        "rows": every,
        "per_class": {label: part(sum(pair.label == label for pair in ids)) for label in labels},
        "per_size": {size: part(sum(size_of(area) == size for area in areas)) for size in SIZES},
        "pairs": [
            PairRow(id=pair.id, label=pair.label, area=area, scores=own)
            for pair, area, own in zip(ids, areas, scores, strict=True)
        ],
        "notes": ["no judge for FID (legacy): name one with --judge inception-legacy=FILE"],
    }
    return Evaluation(**known | changes)


def _noisy(random: np.random.Generator, score: str, value: Value) -> float | None:
    if score == "recognised":
        return float(random.random() < (value.value or 0))
    return np.inf if value.infinite else (value.value or 0) * random.normal(1, 0.15)
