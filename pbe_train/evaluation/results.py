"""The result of an evaluation, `evaluation.json`: rows of scores with their intervals, and all that decides what they mean.

A row is one set of pictures for the pairs. Four rows bound the others (`BOUNDS`); each other row is a model, named by `model` and
`step`. Scores of two results stand in one table only where their recipes are the same (`check_comparable`).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from pbe_core.errors import InputError
from pbe_core.files import write_atomically
from pbe_core.judges.judge import JudgeIdentity

FORMAT = 1
BOUNDS = ("copy-paste", "nothing painted", "real view", "VAE reconstruction")
LABELS, MIXTURE = "labels", "mixture"
"""Fields of a recipe that a result may lack: then it has no scores that they decide."""
FEW_PAIRS = 2048
"""Below so many pictures the bias of a Frechet distance is larger than most effects: Inception has as many features."""
Size = Literal["small", "medium", "large"]
SIZES: dict[Size, tuple[float, float]] = {"small": (0.0, 0.05), "medium": (0.05, 0.2), "large": (0.2, 1.0)}
"""Object sizes by the share of the photo that the mask covers: from the first number to below the second."""


def _from_json(value: Any) -> Any:
    return math.inf if value == {"infinite": True} else value


def _to_json(value: float | None) -> Any:
    return {"infinite": True} if value == math.inf else value


Score = Annotated[
    float | None,
    Field(allow_inf_nan=True),
    BeforeValidator(_from_json),
    PlainSerializer(_to_json, when_used="json"),
]
"""A pair's score; null = not defined. JSON has no infinity: there it is `{"infinite": true}`."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Value(_Part):
    """A score with its 95 % interval; `low` and `high` are null where none is known, all three where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int
    """Pairs that it is of."""
    infinite: bool = False
    """The score is infinite (PSNR of equal pictures); `value` is null then."""

    @classmethod
    def of(cls, value: float | None, interval: tuple[float, float] | None, count: int) -> "Value":
        """A value from arithmetic, which may be infinite or NaN (that is: not defined), as the interval's ends may be."""
        low, high = (_finite(end) for end in interval or (None, None))
        return cls(value=_finite(value), low=low, high=high, count=count, infinite=value == math.inf)


class RowScores(_Part):
    """One row of the table."""

    name: str
    """One of `BOUNDS`, or a model's row; unique in one list of rows."""
    model: str | None = None
    step: int | None = None
    set_scores: dict[str, Value]
    pair_scores: dict[str, Value]
    """Means over pairs."""

    @property
    def is_bound(self) -> bool:
        """Whether the row bounds the models' rows."""
        return self.name in BOUNDS

    @property
    def scores(self) -> dict[str, Value]:
        """All of them, those of the set first."""
        return {**self.set_scores, **self.pair_scores}


class PairRow(_Part):
    """One pair: the scores of each row's picture."""

    id: str
    label: str = ""
    area: float
    """Share of the photo that the mask covers, 0-1."""
    scores: dict[str, dict[str, Score]]
    """Row name -> score name -> score."""


class Evaluation(_Part):
    """The content of `evaluation.json`."""

    format: int = FORMAT
    pairs_name: str
    pairs_fingerprint: str
    count: int
    recipe: dict[str, str]
    """What decides the numbers besides pictures and judges: codec, size, resize filter, count, real set."""
    judges: list[JudgeIdentity]
    independent: dict[str, bool]
    """Judge name -> its weights are not the conditioner's."""
    rows: list[RowScores]
    per_class: dict[str, list[RowScores]] = {}
    per_size: dict[Size, list[RowScores]] = {}
    pairs: list[PairRow] = []
    notes: list[str] = []

    def write(self, path: Path) -> None:
        """Write it as JSON, wholly or not at all; folders above it are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.model_dump_json(indent=1).encode())


def read_evaluation(path: Path) -> Evaluation:
    """Read a result; a folder stands for the `evaluation.json` in it.

    Raises:
        InputError: no file there, another format, or not a result.
    """
    path = path / "evaluation.json" if path.is_dir() else path
    try:
        evaluation = Evaluation.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: no result of an evaluation there ({error.strerror}); `pbe evaluate` writes one") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        wrong = f"{place}: {first['msg']}" if place else first["msg"]
        raise InputError(f"{path}: not a result of `pbe evaluate` of this version ({wrong}); evaluate again") from None
    if evaluation.format != FORMAT:
        raise InputError(f"{path}: a result of format {evaluation.format}, this version reads {FORMAT}; evaluate again")
    return evaluation


def differing_recipes(results: Sequence[Evaluation]) -> list[str]:
    """In what results differ so that their scores cannot stand in one table: one phrase a field, empty if in nothing.

    Compared: the pair set's fingerprint, the count, each field of the recipe, and judges of one name. A judge that one of them
    lacks is no difference, and nor are labels or a mixture.
    """
    named = [_comparable(result) for result in results]
    differing = []
    for field in dict.fromkeys(field for fields in named for field in fields):
        optional = field.startswith(("judge ", LABELS, MIXTURE))
        values = dict.fromkeys(fields.get(field, "not given") for fields in named if field in fields or not optional)
        if len(values) > 1:
            differing.append(f"{field}: {' / '.join(values)}")
    return differing


def check_comparable(results: Sequence[Evaluation]) -> None:
    """Refuse to show results in one table whose scores mean different things.

    Raises:
        InputError: with the differences.
    """
    if differing := differing_recipes(results):
        raise InputError(
            f"results of other recipes cannot stand in one table; they differ in {'; '.join(differing)}: "
            "evaluate both in the same way, or show each alone"
        )


def size_of(area: float) -> Size:
    """`small`, `medium` or `large`, by the share of the photo that the mask covers."""
    return next(name for name, (_, end) in SIZES.items() if area < end or name == "large")


def _comparable(result: Evaluation) -> dict[str, str]:
    fields = {"pairs' fingerprint": result.pairs_fingerprint[:12], "count": str(result.count), **result.recipe}
    for judge in result.judges:
        fields[f"judge {judge.name}"] = f"{judge.kind}, weights {judge.sha256[:12]}, {judge.input_size} px, {judge.preparation}"
    return fields


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
