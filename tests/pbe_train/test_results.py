"""The result's file: what is written is read, what is not a result is refused, and recipes that differ are named."""

import json
import math

import pytest
from pydantic import ValidationError

from pbe_core.errors import InputError
from pbe_train.evaluation.pair_sets import Pair
from pbe_train.evaluation.results import SIZES, Evaluation, Value, check_comparable, differing_recipes, read_evaluation, size_of
from tests.pbe_train.evaluation_results import judge, result, row

IDS = [Pair("one", "cat"), Pair("two", "dog"), Pair("three", "cat")]


def test_what_is_written_is_read_infinite_and_undefined_values_too(tmp_path):
    written = result(IDS, 3)
    written.pairs[0].scores["model"] |= {"PSNR outside": math.inf, "seam": None}
    path = tmp_path / "new" / "evaluation.json"
    written.write(path)
    assert read_evaluation(path) == read_evaluation(path.parent) == written

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    told = json.loads(path.read_text(), parse_constant=refuse)
    assert told["pairs"][0]["scores"]["model"]["PSNR outside"] == {"infinite": True}
    assert told["pairs"][0]["scores"]["model"]["seam"] is None
    (value,) = (one["pair_scores"]["PSNR outside"] for one in told["rows"] if one["name"] == "model")
    assert (value["value"], value["infinite"], value["count"]) == (None, True, 3)


def test_values_of_arithmetic_that_are_not_finite():
    assert Value.of(math.inf, (3.0, math.inf), 5) == Value(value=None, low=3.0, high=None, count=5, infinite=True)
    assert Value.of(math.nan, (math.nan, 1.0), 5) == Value(value=None, low=None, high=1.0, count=5)
    assert Value.of(1.5, None, 5) == Value(value=1.5, count=5)
    with pytest.raises(ValidationError, match="finite"):
        Value(value=math.nan, count=5)


def test_what_is_not_a_result_is_refused_in_one_line(tmp_path):
    path = tmp_path / "evaluation.json"
    result(IDS, 3).write(path)
    told = json.loads(path.read_text())
    broken = {
        r"count: Input should be a valid integer": told | {"count": "many"},
        r"unheard_of: Extra inputs": told | {"unheard_of": 1},
        r"rows\.0\.set_scores: Field required": told | {"rows": [{"name": "model", "pair_scores": {}}]},
        r"format 7, this version reads 1": told | {"format": 7},
    }
    for message, content in broken.items():
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"evaluation\.json: .*{message}") as caught:
            read_evaluation(path)
        assert "\n" not in str(caught.value)
    for content in ("", "no JSON", '{"count": NaN}', "[]"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"evaluation\.json: not a result"):
            read_evaluation(path)
    path.unlink()
    for missing in (path, tmp_path):
        with pytest.raises(InputError, match=r"evaluation\.json|no result of an evaluation there"):
            read_evaluation(missing)


@pytest.mark.parametrize(
    ("changes", "field", "values"),
    [
        ({"recipe": {"codec": "JPEG q95"}}, "codec", ["PNG", "JPEG q95"]),
        ({"recipe": {"resize": "area"}}, "resize", ["Pillow, bicubic", "area"]),
        ({"recipe": {"window": "yes"}}, "window", ["not given", "yes"]),
        ({"count": 4}, "count", ["3", "4"]),
        ({"pairs_fingerprint": "cd" * 32}, "pairs' fingerprint", ["abababababab", "cdcdcdcdcdcd"]),
        ({"judges": [judge("clip", sha256="12" * 32)]}, "judge clip", ["weights 040404040404", "weights 121212121212"]),
        ({"judges": [judge("clip", preparation="squeezed")]}, "judge clip", ["centre crop", "squeezed"]),
    ],
)
def test_recipes_that_differ_are_named(changes, field, values):
    one = result(IDS, 3)
    changed = changes | ({"recipe": one.recipe | changes["recipe"]} if "recipe" in changes else {})
    other = one.model_copy(update=changed)
    (difference,) = differing_recipes([one, one, other])
    assert difference.startswith(f"{field}: ")
    assert all(value in difference for value in values)
    with pytest.raises(InputError, match=f"they differ in {field}: ") as caught:
        check_comparable([one, other])
    assert "\n" not in str(caught.value)


def test_models_notes_a_set_s_place_and_judges_that_one_result_lacks_are_no_difference():
    one = result(IDS, 3)
    other = result(IDS, 3, [row("model", 0.4, 3, "another", 7)], judges=[judge("mobilenet", "mobilenet")], notes=["x"])
    other = other.model_copy(update={"pairs_name": "elsewhere"})
    assert differing_recipes([one, other]) == []
    assert differing_recipes([]) == differing_recipes([one]) == []
    check_comparable([one, other])


def test_sizes_have_no_gap():
    assert [size_of(area) for area in (0, 0.0499, 0.05, 0.1999, 0.2, 1)] == ["small"] * 2 + ["medium"] * 2 + ["large"] * 2
    assert [limits[0] for limits in SIZES.values()][1:] == [limits[1] for limits in SIZES.values()][:-1]


def test_rows_of_a_result_know_what_they_are():
    told: Evaluation = result(IDS, 3)
    assert [one.name for one in told.rows if not one.is_bound] == ["model"]
    assert list(told.rows[0].scores)[:2] == ["FID (clean)", "FID (legacy)"]
