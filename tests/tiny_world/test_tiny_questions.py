"""Questions to painters: the same bytes for the same seed, what the preset cuts, and a reference that is no copy of the photo."""

from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe_core.errors import InputError
from pbe_train.evaluation.pair_sets import CANDIDATES, draw_candidates, open_pairs
from tests.conftest import call_program
from tiny_world import make_questions as world
from tiny_world.kinds import INSTANCES_PER_KIND, KINDS, instance
from tiny_world.scenes import plan_scene

COUNT = 35


@pytest.fixture(scope="module")
def asked() -> list[world.Question]:
    return list(world.questions(COUNT, 3, "validation"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_set_has_the_same_bytes_twice_is_read_by_the_evaluation_and_others_by_another_seed(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        world.make_questions(tmp_path / name, 18, seed)
    one, other = files_of(tmp_path / "one"), files_of(tmp_path / "other")
    assert files_of(tmp_path / "two") == one
    assert not {data for name, data in one.items() if "photos" in name} & set(other.values())
    assert len(one) == 3 * 18 + 1
    pairs = open_pairs(tmp_path / "one")
    assert Counter(pair.label for pair in pairs.pairs).keys() == {kind.name for kind in KINDS}
    for number, candidates in enumerate(draw_candidates(pairs.pairs, 0) or pytest.fail("no candidates")):
        assert len({pairs.pairs[each].label for each in candidates}) == CANDIDATES, "each of another kind"
        assert pairs.read(number).photo.shape == (128, 128, 3)
    with pytest.raises(InputError, match="one: is there already"):
        world.make_questions(tmp_path / "one", 18, 3)
    with pytest.raises(InputError, match="--count 0: give 1 or more"):
        world.make_questions(tmp_path / "none", 0, 3)


def test_what_is_wrong_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, said in ((tmp_path / "file", "is there already"), (tmp_path / "file" / "set", "cannot be written to")):
        done = call_program(world.main, "--out", str(out), "--count", "1")
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {out}: {said}")
        assert done.stderr.count("\n") == 1


def test_questions_are_balanced_and_ask_for_individuals_that_no_training_saw(asked: list[world.Question]) -> None:
    assert set(Counter(each.who.kind for each in asked).values()) == {2, 3}
    assert len({each.id for each in asked}) == COUNT
    for each in asked:
        assert each.who.number < INSTANCES_PER_KIND["validation"]
        assert each.who == instance(3, "validation", each.who.kind, each.who.number)


def test_a_question_does_not_depend_on_how_many_follow(asked: list[world.Question]) -> None:
    """But on which kinds are wanted still; so of whole rounds, the first scenes give the same."""
    few = {each.id: each for each in world.questions(16, 3, "validation")}
    common = [each for each in asked if each.id in few]
    assert len(common) > 8
    for each in common:
        assert each.reference == few[each.id].reference
        assert np.array_equal(each.photo, few[each.id].photo)
        assert np.array_equal(each.mask, few[each.id].mask)


def test_the_mask_holds_the_individual_and_leaves_something_of_the_photo(asked: list[world.Question]) -> None:
    kinds = set()
    for each in asked:
        left, top, right, bottom = each.box
        # Curves of a Bessel mask begin at the box's corners, moved by up to 2 px of the photo.
        rows = slice(max(0, int(np.ceil(top)) + 4), int(bottom) - 4)
        columns = slice(max(0, int(np.ceil(left)) + 4), int(right) - 4)
        assert each.mask[rows, columns].all()
        assert 0.01 < each.mask.mean() < 1
        y, x = np.flatnonzero(each.mask.any(1)), np.flatnonzero(each.mask.any(0))
        kinds.add(bool(each.mask[y[0] : y[-1] + 1, x[0] : x[-1] + 1].all()))
    assert kinds == {True, False}, "boxes and Bessel masks"


def test_the_reference_shows_this_individual_elsewhere_whole_and_at_another_size() -> None:
    settings = world.settings_of(3)
    for number, size_px in enumerate((20, 40, 60, 90)):
        who = instance(3, "validation", number, 0)
        photo, box = world.another_look(who, size_px, number, 3, "validation", settings)
        side_px = max((box.x_max - box.x_min) * photo.shape[1], (box.y_max - box.y_min) * photo.shape[0])
        assert max(side_px, size_px) >= world.LEAST_SIZE_RATIO * min(side_px, size_px)
        assert not box.is_occluded
        assert not box.is_truncated
        # Another individual of the kind changes this photo in the box, and hardly elsewhere, as JPEG has it.
        other, box_of_other = world.another_look(replace(who, first=(0.5, 0.5, 0.5)), size_px, number, 3, "validation", settings)
        assert box_of_other == box
        difference = np.abs(photo.astype(int) - other).max(2)
        rows, columns = (
            slice(round(low * length), round(high * length))
            for low, high, length in zip((box.y_min, box.x_min), (box.y_max, box.x_max), photo.shape, strict=False)
        )
        assert difference[rows, columns].mean() > 10
        difference[rows, columns] = 0
        assert difference.mean() < 1


def test_the_reference_is_not_cut_from_the_photo(asked: list[world.Question]) -> None:
    for each in asked:
        reference = np.asarray(Image.open(BytesIO(each.reference)).resize((32, 32)), float)
        left, top, right, bottom = each.box
        own = np.asarray(
            Image.fromarray(each.photo).crop((round(left), round(top), round(right), round(bottom))).resize((32, 32))
        )
        assert np.abs(reference - own).mean() > 10


def test_scenes_are_none_of_a_world() -> None:
    """A world's photos are numbered from 0: nobody makes a million of them."""
    assert world.FIRST_SCENE >= 1_000_000
    assert plan_scene(0, "validation", world.FIRST_SCENE) != plan_scene(0, "validation", 0)
    reach = world.FIRST_REFERENCE - world.FIRST_SCENE
    assert reach > 100_000_000


def test_references_are_jpegs_of_the_presets_size(asked: list[world.Question]) -> None:
    for each in asked:
        picture = Image.open(BytesIO(each.reference))
        assert picture.format == "JPEG"
        assert max(picture.size) <= 128
