"""Shapes of views: which one a photo has, windows of a ratio, and lists of shapes that make sense."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbe_core.buckets import Form, by_shape, nearest_bucket, nearest_buckets, square_side, suggest_buckets
from pipelines import buckets
from tests.conftest import call_program

SIDES = st.integers(1, 4000)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@given(SIDES, SIDES, st.lists(SHAPES, min_size=1, max_size=8))
def test_a_photo_has_the_shape_that_loses_least_of_it(width, height, shapes):
    """The share of a photo that the largest window of a shape shows: one aspect by the other, the smaller by the larger."""

    def kept(shape: tuple[int, int]) -> Fraction:
        ratio = Fraction(width * shape[1], height * shape[0])
        return min(ratio, 1 / ratio)

    assert nearest_bucket(width, height, shapes) == max(shapes, key=kept)  # `max` is the first of several, too.


def test_many_photos_are_sorted_as_each_alone_and_one_of_unknown_size_is_a_square():
    shapes = ((640, 384), (512, 512), (384, 640))
    sizes = np.random.default_rng(0).integers(1, 2000, (200, 2))
    numbers = nearest_buckets(sizes[:, 0], sizes[:, 1], shapes)
    assert [shapes[number] for number in numbers] == [nearest_bucket(*size, shapes) for size in sizes.tolist()]
    assert set(numbers.tolist()) == {0, 1, 2}
    assert nearest_buckets(np.array([0, 900]), np.array([0, 0]), shapes).tolist() == [1, 1]


@given(SHAPES, SIDES, SIDES)
def test_windows_of_a_ratio_are_the_smallest_that_hold_and_the_largest_that_fit(shape, width, height):
    form = Form(*shape)
    holds = form.sides(form.holding(width, height))
    assert holds[0] >= width
    assert holds[1] >= height
    smaller = form.sides(form.holding(width, height) - 1)
    assert form.holding(width, height) == 1 or smaller[0] < width or smaller[1] < height
    fits, larger = form.sides(form.within(width, height)), form.sides(form.within(width, height) + 1)
    assert max(fits) == 1 or (fits[0] <= width and fits[1] <= height)
    assert larger[0] > width or larger[1] > height


@given(SHAPES, SIDES)
def test_a_window_has_its_ratio_to_half_a_pixel_of_its_shorter_side(shape, longer):
    width, height = Form(*shape).sides(longer)
    short, long = min(shape), max(shape)
    assert max(width, height) == longer
    assert (width >= height) if shape[0] >= shape[1] else (height >= width)
    assert min(width, height) == 1 or abs(min(width, height) - Fraction(longer * short, long)) <= Fraction(1, 2)


@given(SIDES, SIDES, st.integers(1, 9))
def test_squares_are_exact(width, height, unit):
    form = Form(unit, unit)
    assert form.holding(width, height) == max(width, height)
    assert form.within(width, height) == min(width, height)
    assert form.sides(width) == (width, width)


@given(st.integers(1, 20), st.floats(1, 4), st.sampled_from([8, 16, 64]))
def test_suggested_shapes_have_about_one_area_and_no_aspect_twice(cells, max_aspect, step):
    size = cells * step
    shapes = suggest_buckets(size, max_aspect, step)
    assert (size, size) in shapes
    assert {(height, width) for width, height in shapes} == set(shapes)
    for width, height in shapes:
        assert width % step == height % step == 0
        assert width * height <= size * size
        assert max(width, height) <= max_aspect * min(width, height)
        assert max(width, height) * (min(width, height) + step) > size * size
    assert square_side(shapes) == size


def test_the_helper_prints_a_list_that_the_settings_take():
    done = call_program(buckets.main, "512", "--max-aspect", "1.7")
    assert done.stdout == "buckets: [[640, 384], [576, 448], [512, 512], [448, 576], [384, 640]]\n"


@pytest.mark.parametrize("options", [("100",), ("0",), ("512", "--max-aspect", "0.5"), ("512", "--max-aspect", "inf")])
def test_the_helper_refuses_in_one_line(options):
    done = call_program(buckets.main, *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: size ")
    assert done.stderr.count("\n") == 1


def test_what_has_one_shape_is_one_batch():
    assert by_shape([(2, 1), (1, 1), (2, 1), (1, 2)]) == [[0, 2], [1], [3]]


def test_the_square_of_shapes_is_as_large_as_the_largest_and_a_size_that_networks_take():
    assert square_side([(640, 384)]) == 512
    assert square_side([(96, 96)]) == 96
    assert square_side([(1024, 512), (768, 768)]) == 768
    assert math.prod((160, 112)) <= square_side([(160, 112), (128, 128)]) ** 2
