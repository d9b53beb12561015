"""Properties of boxes, views, masks and references that the rest of the pipeline relies on, over random boxes and photos."""

import os
import subprocess
import sys
import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from pbe_core.buckets import Form
from pbe_core.images.crop import (
    LONGEST_PADDED_SIDE,
    Rectangle,
    Window,
    cut_mask,
    cut_view,
    is_padded,
    paste,
    resize,
    whole_photo,
)
from pbe_train.data.references import fit_reference
from pipelines.geometry import (
    Zoom,
    bessel_curves,
    bessel_polygon,
    box_in_photo,
    cut_reference,
    cut_reference_mask,
    extend_box,
    fill_box,
    fill_outline,
    fill_polygon,
    grey_background,
    reference_size,
    reference_window,
    square_window,
    turned,
    view_window,
)

JITTER = (1, 5)
ZOOMS: tuple[Zoom, ...] = ("published", "free")


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, int, Rectangle, np.random.Generator]:
    """A photo's width and height, a box in it (also slivers and whole photos), and a random generator."""
    width, height = draw(st.integers(24, 1400)), draw(st.integers(24, 1400))
    edges = [sorted(draw(st.lists(st.floats(0, 1), min_size=2, max_size=2))) for _ in range(2)]
    (x_min, x_max), (y_min, y_max) = ((low, max(high, min(1.0, low + 0.01))) for low, high in edges)
    row = {"x_min": min(x_min, x_max - 0.005), "x_max": x_max, "y_min": min(y_min, y_max - 0.005), "y_max": y_max}
    return width, height, box_in_photo(row, width, height), np.random.default_rng(draw(st.integers(0, 2**32)))


@given(scenes(), st.floats(0, 1))
def test_extended_boxes_hold_the_box_and_stay_in_the_photo(scene, max_extension):
    width, height, box, random = scene
    frame = whole_photo(width, height)
    extended = extend_box(box, frame, max_extension, random)
    assert extended.holds(box)
    assert frame.holds(extended)
    assert box.x_min - extended.x_min <= max_extension * box.x_min + 1e-9
    assert extended.y_max - box.y_max <= max_extension * (height - box.y_max) + 1e-9


def test_extension_is_uniform_on_each_side():
    box, frame = Rectangle(100, 200, 300, 300), Rectangle(0, 0, 1000, 800)
    random = np.random.default_rng(0)
    many = [extend_box(box, frame, 0.4, random) for _ in range(4000)]
    shares = np.array(
        [[(100 - e.x_min) / 100, (200 - e.y_min) / 200, (e.x_max - 300) / 700, (e.y_max - 300) / 500] for e in many]
    )
    assert shares.mean(axis=0) == pytest.approx([0.2] * 4, abs=0.01)
    assert shares.std(axis=0) == pytest.approx([0.4 / 12**0.5] * 4, abs=0.005)


@given(scenes(), st.sampled_from(ZOOMS), st.floats(0, 1))
def test_views_hold_the_extended_box_and_leave_the_photo_only_where_they_must(scene, zoom, max_zoom):
    width, height, box, random = scene
    extended = extend_box(box, whole_photo(width, height), 0.4, random)
    window = square_window(extended, width, height, zoom, max_zoom, random)
    x_min, y_min, x_max, y_max = extended.pixels()
    needed = max(x_max - x_min, y_max - y_min)
    assert window.rectangle().holds(extended)
    assert is_padded(window, width, height) == (needed > min(width, height))
    if needed <= min(width, height):
        assert min(width, height) - max_zoom * (min(width, height) - needed) - 1 <= window.side <= min(width, height)
    else:
        assert window.side == needed
        covered = window.rectangle().intersection(whole_photo(width, height))
        assert min(covered.width, covered.height) == min(width, height), "padded more than needed"


SHAPES = st.sampled_from([(1, 1), (640, 384), (384, 640), (1408, 704), (3, 2), (448, 576), (1, 4)])


@given(scenes(), SHAPES, st.sampled_from(ZOOMS), st.floats(0, 1))
def test_windows_of_any_shape_hold_the_box_and_leave_the_photo_only_where_they_must(scene, shape, zoom, max_zoom):
    """The laws of squares, for other shapes: inside the photo if any window of the shape can be, else the smallest there is."""
    width, height, box, random = scene
    extended = extend_box(box, whole_photo(width, height), 0.4, random)
    window = view_window(extended, width, height, shape, zoom, max_zoom, random)
    form = Form(*shape)
    x_min, y_min, x_max, y_max = extended.pixels()
    least, largest = form.holding(x_max - x_min, y_max - y_min), form.within(width, height)
    assert window.rectangle().holds(extended)
    assert (window.width, window.height) == form.sides(window.side)
    assert is_padded(window, width, height) == (least > largest)
    if least <= largest:
        assert largest - max_zoom * (largest - least) - 1 <= window.side <= largest
    else:
        assert window.side == least
        covered = window.rectangle().intersection(whole_photo(width, height))
        assert covered.width == min(width, window.width), "padded more than needed"
        assert covered.height == min(height, window.height)


@given(scenes(), SHAPES, st.sampled_from(ZOOMS), st.integers(1, 1500))
def test_windows_are_not_zoomed_in_below_what_may_be_resized_up(scene, shape, zoom, least):
    """They still hold the box; only a photo that is too small itself gives a smaller one."""
    width, height, box, random = scene
    window = view_window(box, width, height, shape, zoom, 1.0, random, least)
    x_min, y_min, x_max, y_max = box.pixels()
    form = Form(*shape)
    assert window.rectangle().holds(box)
    assert window.side >= min(least, max(form.within(width, height), form.holding(x_max - x_min, y_max - y_min)))


def published_square(
    extended: Rectangle, photo_width: int, photo_height: int, zoom: Zoom, max_zoom: float, random: np.random.Generator
) -> tuple[int, int, int]:
    """Left, top and side as they were drawn before windows had shapes, word by word: datasets of squares keep their bytes."""

    def place(low: int, high: int, side: int, frame_low: int, frame_high: int) -> int:
        first, last = max(frame_low, high - side), min(low, frame_high - side)
        if side > frame_high - frame_low:
            first, last = frame_high - side, frame_low
        return int(random.integers(first, last, endpoint=True))

    x_min, y_min, x_max, y_max = extended.pixels()
    side = max(x_max - x_min, y_max - y_min, min(photo_width, photo_height))
    left, top = place(x_min, x_max, side, 0, photo_width), place(y_min, y_max, side, 0, photo_height)
    if zoom == "free":
        zoomed = side - int(random.uniform(0, max_zoom) * (side - max(x_max - x_min, y_max - y_min)))
        return (place(x_min, x_max, zoomed, left, left + side), place(y_min, y_max, zoomed, top, top + side), zoomed)
    if photo_width == photo_height:
        return left, top, side
    margin = min(x_min - left, y_min - top, left + side - x_max, top + side - y_max)
    trim = int(random.integers(0, int(max_zoom * margin), endpoint=True))
    return left + trim, top + trim, side - 2 * trim


@given(scenes(), st.sampled_from(ZOOMS), st.floats(0, 1), st.sampled_from([1, 128, 512]))
def test_squares_are_drawn_as_before_there_were_shapes(scene, zoom, max_zoom, size):
    """The same numbers, and as many draws: whatever is drawn afterwards is the same, too."""
    width, height, box, random = scene
    extended = extend_box(box, whole_photo(width, height), 0.4, random)
    ours, before = (np.random.default_rng(7) for _ in range(2))
    window = view_window(extended, width, height, (size, size), zoom, max_zoom, ours)
    assert window.numbers() == published_square(extended, width, height, zoom, max_zoom, before)
    assert ours.integers(1 << 40) == before.integers(1 << 40)


@given(st.integers(20, 90), st.integers(20, 90), st.integers(8, 60), st.integers(8, 60), st.integers(0, 2**32))
def test_a_view_shows_its_box_where_the_record_says(width, height, view_width, view_height, seed):
    """A white box in a black photo: its pixels in the view are those between the corners that `to_view` gives, to one px."""
    random = np.random.default_rng(seed)
    left, top = int(random.integers(0, width - 8)), int(random.integers(0, height - 8))
    box = Rectangle(left, top, left + 8, top + 8)
    photo = np.zeros((height, width, 3), np.uint8)
    photo[top : top + 8, left : left + 8] = 255
    shape = (view_width, view_height)
    window = view_window(box, width, height, shape, "free", 0.9, random)
    view = cut_view(photo, window, shape)
    assert view.shape == (view_height, view_width, 3)
    corners = window.to_view(box.corners(), shape)
    drawn = fill_box(corners, shape)
    assert drawn.shape == view.shape[:2]
    assert np.array_equal(drawn, fill_outline("box", corners, shape))
    if not is_padded(window, width, height):  # Else its reflection is white, too.
        assert (view[..., 0] > 0).sum() >= 1
        rows, columns = (np.flatnonzero((view[..., 0] > 127).any(axis)) for axis in (1, 0))
        if len(rows) and len(columns):
            found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(found - [*corners[0], *corners[2]]).max() <= 1.5


@given(scenes(), SHAPES)
def test_masks_of_other_shapes_cover_what_squares_would(scene, shape):
    """A Bessel mask in a view of any shape is the polygon's, in its own scale along each side."""
    width, height, box, random = scene
    extended = extend_box(box, whole_photo(width, height), 0.4, random)
    size = (shape[0] * 64 // max(shape) + 8, shape[1] * 64 // max(shape) + 8)
    window = view_window(extended, width, height, size, "free", 0.6, random)
    polygon = window.to_view(bessel_polygon(box, extended, 20, JITTER, random), size)
    mask = fill_polygon(polygon, size)
    assert mask.shape == size[::-1]
    assert mask.any()
    turned_mask = fill_polygon(polygon[:, ::-1], size[::-1])
    # OpenCV's lines are not quite the same along the other axis.
    assert (mask != turned_mask.T).mean() < 0.1


def test_what_is_cut_from_a_photo_is_pasted_back_where_it_was():
    random = np.random.default_rng(0)
    photo = random.integers(0, 256, (60, 90, 3)).astype(np.uint8)
    for window in (Window(10, 5, 40, 20), Window(-6, 30, 30, 44), Window(70, -10, 30, 80)):
        view = cut_view(photo, window, (window.width, window.height))
        assert np.array_equal(paste(photo, view, None, window), photo)
        inside = np.zeros((60, 90), bool)
        inside[35:40, 72:80] = True
        part = cut_mask(inside, window, (window.width, window.height))
        assert part.shape == (window.height, window.width)
        assert part.any() == window.rectangle().holds(Rectangle(72, 35, 80, 40))


@pytest.mark.parametrize("zoom", ZOOMS)
def test_windows_take_every_place_that_holds_the_box(zoom):
    """A photo of 100 x 40 with a box in the middle: the square may start anywhere from 20 to 40."""
    random = np.random.default_rng(0)
    lefts = [square_window(Rectangle(40, 10, 60, 30), 100, 40, zoom, 0.0, random).left for _ in range(2000)]
    assert set(lefts) == set(range(20, 41))


def test_the_published_zoom_trims_all_sides_by_up_to_its_share_of_the_smallest_margin():
    """A photo of 100 x 300 with the box's margins 30 on the left, 20 on the right: 12 px at most, and every number of them."""
    random = np.random.default_rng(0)
    trims = []
    for _ in range(4000):
        window = square_window(Rectangle(30, 140, 80, 160), 100, 300, "published", 0.6, random)
        trim = window.left
        assert window.side == 100 - 2 * trim, "concentric: the square as wide as the photo began at 0"
        top = window.top - trim
        assert 60 <= top <= 140
        assert trim <= 0.6 * min(20, 140 - top, top + 100 - 160)
        trims.append(trim)
    assert set(trims) == set(range(13))


@given(st.integers(24, 1400), st.integers(0, 2**32))
def test_the_published_zoom_leaves_square_photos_and_the_only_square_alone(side, seed):
    random = np.random.default_rng(seed)
    middle = Rectangle(0.45 * side, 0.45 * side, 0.55 * side, 0.55 * side)
    assert square_window(middle, side, side, "published", 1.0, random) == Window(0, 0, side)
    at_the_edge = Rectangle(0, 0.4 * side, 0.5 * side, 0.5 * side)
    assert square_window(at_the_edge, 2 * side, side, "published", 1.0, random) == Window(0, 0, side)


def test_the_free_zoom_places_a_smaller_square_anywhere_also_in_square_photos():
    random = np.random.default_rng(0)
    windows = [square_window(Rectangle(40, 40, 60, 60), 100, 100, "free", 0.5, random) for _ in range(2000)]
    assert {window.side for window in windows} == set(range(61, 101))
    centres = np.array([(window.left + window.side / 2, window.top + window.side / 2) for window in windows])
    assert centres.std(axis=0).min() > 4


@given(st.integers(20, 90), st.integers(20, 90), st.integers(-40, 60), st.integers(-40, 60), st.integers(8, 120))
def test_views_show_the_photo_and_its_reflection_and_nothing_else(width, height, left, top, side):
    """Against indexing pixel by pixel, with the triangle wave that reflection without repeated edges is."""
    if left >= width or top >= height or left + side <= 0 or top + side <= 0:
        return
    photo = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)

    def reflected(start: int, length: int) -> np.ndarray:
        place = np.arange(start, start + side) % (2 * length - 2)
        return np.where(place < length, place, 2 * length - 2 - place)

    inside_only = (left >= 0 and left + side <= width) or (left <= 0 and left + side >= width)
    inside_only &= (top >= 0 and top + side <= height) or (top <= 0 and top + side >= height)
    if not inside_only:  # square_window never leaves the photo on one side while it cuts it on the other.
        return
    expected = photo[np.ix_(reflected(top, height), reflected(left, width))]
    assert np.array_equal(cut_view(photo, Window(left, top, side), side), expected)


def padded_in_full(photo: np.ndarray, window: Window, size: int) -> np.ndarray:
    """The view of a window as wide as its photo, with all of its reflection at the photo's scale."""
    below = window.top + window.side - photo.shape[0]
    return resize(cv2.copyMakeBorder(photo, -window.top, below, 0, 0, cv2.BORDER_REFLECT_101), size, size)


def smooth_photo(width: int, height: int) -> np.ndarray:
    return cv2.resize(np.random.default_rng(0).integers(0, 256, (8, 60, 3)).astype(np.uint8), (width, height))


def test_a_panorama_takes_no_more_memory_than_a_large_photo():
    """In full its window would take 430 MB; and the view still shows the photo where it lies, and its reflection around it."""
    small, window = smooth_photo(LONGEST_PADDED_SIDE, 700), Window(0, -3000, LONGEST_PADDED_SIDE)
    assert np.array_equal(cut_view(small, window, 64), padded_in_full(small, window, 64)), "bytes of views depend on it"
    photo, window = smooth_photo(12_000, 1800), Window(0, -5400, 12_000)
    tracemalloc.start()
    try:
        view = cut_view(photo, window, 256)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert view.nbytes < peak < 3 * LONGEST_PADDED_SIDE**2 + photo.nbytes
    assert np.abs(view.astype(int) - padded_in_full(photo, window, 256)).max() <= 3
    flat = np.full((1, 9_000_000, 3), 200, np.uint8)  # What is less than a pixel of the view is still one.
    assert (cut_view(flat, Window(0, -4_000_000, 9_000_000), 64) == 200).all()


def test_view_coordinates_map_the_window_onto_the_view():
    window = Window(30, -10, 60)
    mapped = window.to_view(window.rectangle().corners(), 120)
    assert mapped.tolist() == [[0, 0], [120, 0], [120, 120], [0, 120]]


@given(scenes())
def test_curves_run_between_the_box_and_the_extended_box(scene):
    width, height, box, random = scene
    extended = extend_box(box, whole_photo(width, height), 0.4, random)
    points = bessel_curves(box, extended, 20)
    assert len(points) == 80
    assert np.allclose(points[::20], box.corners()), "each edge starts at its corner"
    x, y = points.T
    tiny = 1e-7
    assert not ((x > box.x_min + tiny) & (x < box.x_max - tiny) & (y > box.y_min + tiny) & (y < box.y_max - tiny)).any()
    assert (points >= (extended.x_min - tiny, extended.y_min - tiny)).all()
    assert (points <= (extended.x_max + tiny, extended.y_max + tiny)).all()


def test_the_curve_is_the_quadratic_one():
    """The middle of the top curve lies halfway between the box's edge and the extended box's."""
    points = bessel_curves(Rectangle(10, 20, 30, 40), Rectangle(0, 0, 50, 60), 20)
    assert points[10] == pytest.approx([20, 10])
    assert points[5] == pytest.approx([15, 20 - 20 * 2 * 0.25 * 0.75])


@given(scenes())
def test_every_point_is_moved_by_one_to_five_pixels_on_each_axis(scene):
    width, height, box, random = scene
    extended = extend_box(box, whole_photo(width, height), 0.4, random)
    moved = (bessel_polygon(box, extended, 20, JITTER, random) - bessel_curves(box, extended, 20)).round(6)
    assert set(np.abs(moved).ravel().tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert moved.min() < 0 < moved.max()


@given(scenes(), st.sampled_from([64, 128, 512]))
def test_masks_cover_the_box_except_for_the_jitter_and_are_never_empty(scene, size):
    width, height, box, random = scene
    frame = whole_photo(width, height)
    extended = extend_box(box, frame, 0.4, random)
    window = square_window(extended, width, height, "free", 0.6, random)
    scale = size / window.side
    polygon = np.clip(bessel_polygon(box, extended, 20, JITTER, random), 0, (width, height))
    bessel = fill_polygon(window.to_view(polygon, size), size)
    assert bessel.any()

    core = window.to_view(np.array([[box.x_min + 5, box.y_min + 5], [box.x_max - 5, box.y_max - 5]]), size)
    low, high = np.ceil(core[0] - 0.5 + 0.02).astype(int), np.floor(core[1] - 0.5 - 0.02).astype(int)
    assert bessel[low[1] : high[1] + 1, low[0] : high[0] + 1].all() or (high < low).any()

    rows, columns = np.nonzero(bessel)
    reach = 5 * scale + 1
    (left, top), _, (right, bottom), _ = window.to_view(extended.corners(), size)
    assert columns.min() >= left - reach
    assert columns.max() <= right + reach
    assert rows.min() >= top - reach
    assert rows.max() <= bottom + reach


@given(scenes())
def test_box_masks_are_the_pixels_with_their_centres_in_the_extended_box(scene):
    """Or, where there is none, one pixel: masks are never empty."""
    width, height, box, random = scene
    extended = extend_box(box, whole_photo(width, height), 0.4, random)
    window = square_window(extended, width, height, "free", 0.6, random)
    corners = window.to_view(extended.corners(), 128)
    mask = fill_outline("box", corners, 128)
    (left, top), _, (right, bottom), _ = corners
    centres = np.arange(128) + 0.5
    rows, columns = (centres >= top) & (centres < bottom), (centres >= left) & (centres < right)
    for inside, found, low, high in ((rows, mask.any(axis=1), top, bottom), (columns, mask.any(axis=0), left, right)):
        if inside.any():
            assert np.array_equal(found, inside)
        else:
            assert abs(np.flatnonzero(found) + 0.5 - (low + high) / 2).max() <= 0.5 + 1e-9
    assert mask.sum() == mask.any(axis=0).sum() * mask.any(axis=1).sum()


@pytest.mark.parametrize("edges", [(-40, -30), (-0.2, 0.1), (31.9, 32.4), (50, 60), (5.5, 5.5), (-10, 90)])
def test_a_box_at_or_beyond_the_edge_has_a_pixel_and_none_beyond(edges):
    mask = fill_box(Rectangle(edges[0], 3, edges[1], 5).corners(), 32)
    assert mask.sum() == (64 if edges == (-10, 90) else 2)


@given(scenes(), st.integers(0, 30))
def test_references_are_the_padded_box_in_the_photo(scene, padding):
    width, height, box, _ = scene
    x_min, y_min, x_max, y_max = reference_window(box, width, height, padding)
    expected = (box.x_min - padding, box.y_min - padding, box.x_max + padding, box.y_max + padding)
    clipped = max(0, expected[0]), max(0, expected[1]), min(width, expected[2]), min(height, expected[3])
    assert np.abs(np.subtract((x_min, y_min, x_max, y_max), clipped)).max() < 1
    assert 0 <= x_min < x_max <= width
    assert 0 <= y_min < y_max <= height


NOISE = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8)


def without_antialias(picture: np.ndarray, size: int) -> np.ndarray:
    """As the published code resizes: PyTorch's bilinear interpolation of pixels."""
    planes = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    return interpolate(planes, (size, size), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [32, 256])
def test_views_are_resized_as_published_if_wished(size):
    window = Window(40, 10, 150)
    view = cut_view(NOISE, window, size, "published").astype(float)
    assert np.abs(view - without_antialias(NOISE[10:160, 40:190], size)).max() <= 1
    assert np.abs(view - cut_view(NOISE, window, size)).mean() > 5


@given(left=st.integers(0, 99), top=st.integers(0, 99), width=st.integers(1, 99), height=st.integers(1, 99))
@example(left=0, top=16, width=99, height=99)  # Where one value of noise is two levels off.
def test_what_shrinks_is_pillows_bicubic(left, top, width, height):
    """To one level, of photos that are read-only and of parts of them. Between its two directions either rounds in its own way,
    and cubic weights, of which some are negative, can make two levels of one: of noise in one of 10,000 values, at worst.
    """
    photo = NOISE.copy()
    photo.flags.writeable = False
    part = photo[top : top + 100, left : left + 150]
    expected = Image.fromarray(part).resize((width, height), Image.Resampling.BICUBIC)
    off = np.abs(resize(part, width, height).astype(int) - np.asarray(expected))
    assert off.max() <= 2
    assert (off > 1).sum() <= max(1, 1e-3 * off.size)


@pytest.mark.parametrize(("width", "height"), [(100, 700), (750, 66), (600, 100), (150, 400)])
def test_one_side_that_shrinks_does_not_alias_though_the_other_grows(width, height):
    """Whether there are more pixels after it than before says nothing of a single side. Pillow enlarges by a softer cubic."""
    expected = Image.fromarray(NOISE).resize((width, height), Image.Resampling.BICUBIC)
    assert np.abs(resize(NOISE, width, height).astype(int) - np.asarray(expected)).mean() < 1


def test_shrunk_pixels_are_the_same_on_every_cpu():
    """PyTorch has a way of its own for CPUs with AVX2; that for all others must give the same bytes."""
    program = (
        "import sys, numpy as np; from pbe_core.images.crop import resize;"
        "noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8);"
        "sys.stdout.buffer.write(resize(noise[3:, 5:], 128, 127).tobytes() + resize(noise, 40, 21).tobytes())"
    )
    plain = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", program], env=plain, capture_output=True, check=True)
    assert done.stdout == resize(NOISE[3:, 5:], 128, 127).tobytes() + resize(NOISE, 40, 21).tobytes()


@pytest.mark.parametrize("window", [(10, 20, 60, 50), (0, 0, 300, 100), (0, 0, 300, 200)])
def test_published_references_are_squares_at_once_and_the_trainer_leaves_them_so(window):
    """Smaller and larger than the square, and as long; `max_side` has no say."""
    reference = cut_reference(NOISE, window, 64, 20, "published")
    x_min, y_min, x_max, y_max = window
    assert np.abs(reference - without_antialias(NOISE[y_min:y_max, x_min:x_max], 64)).max() <= 1
    assert reference.shape[1::-1] == reference_size(x_max - x_min, y_max - y_min, 64, 20, "published")
    assert np.array_equal(fit_reference(reference, 64, "squash"), reference)


def test_references_are_shrunk_but_never_enlarged():
    assert np.array_equal(cut_reference(NOISE, (10, 20, 60, 50), 256, 448), NOISE[20:50, 10:60])
    assert cut_reference(NOISE, (0, 0, 300, 100), 80, 150).shape == (50, 150, 3)
    assert cut_reference(NOISE, (0, 0, 300, 200), 80, 150).shape == (80, 120, 3)
    assert reference_size(300, 1, 256, 150) == (150, 1)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 90, 180, 270]), st.randoms(use_true_random=False))
def test_boxes_turn_with_their_photo(width, height, rotation, random):
    """The pixels in the turned box are those of the box, turned."""
    x_min, y_min = random.randrange(width), random.randrange(height)
    box = Rectangle(x_min, y_min, random.randint(x_min + 1, width), random.randint(y_min + 1, height))
    photo = np.arange(width * height).reshape(height, width)
    upright = np.rot90(photo, rotation // 90)
    there = turned(box, width, height, rotation)
    assert whole_photo(upright.shape[1], upright.shape[0]).holds(there)
    inside = upright[there.y_min : there.y_max, there.x_min : there.x_max]
    assert np.array_equal(inside, np.rot90(photo[box.y_min : box.y_max, box.x_min : box.x_max], rotation // 90))


@pytest.mark.parametrize(("side", "resizing"), [(64, "antialiased"), (64, "published"), (512, "published")])
def test_an_objects_mask_is_cut_and_resized_as_its_reference_is(side, resizing):
    """A disc whose photo shows its own mask; also where the photo is a smaller copy of what was annotated."""
    y, x = np.mgrid[:300, :400]
    disc = (x - 200) ** 2 + (y - 150) ** 2 < 100**2
    photo = np.repeat(disc[..., None] * np.uint8(255), 3, axis=2)
    window = (60, 40, 320, 290)
    reference = cut_reference(photo, window, side, 448, resizing)
    mask = cut_reference_mask(disc, (400, 300), window, reference.shape[1::-1], resizing)
    assert np.array_equal(mask, reference[..., 0] > 127)
    larger = np.kron(disc, np.ones((2, 2), bool))
    assert np.array_equal(cut_reference_mask(larger, (400, 300), window, reference.shape[1::-1], resizing), mask)


def test_a_grey_background_leaves_the_object_alone():
    reference = np.random.default_rng(0).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    mask = np.zeros((5, 6), bool)
    assert np.array_equal(grey_background(reference, mask), reference)
    mask[1:3, 2:4] = True
    cut = grey_background(reference, mask)
    assert np.array_equal(cut[mask], reference[mask])
    assert (cut[~mask] == 127).all()
