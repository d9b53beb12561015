"""A scene of the tiny world: a muted background, one light, and one to four objects, each with its own pose.

    plan_scene(seed, split, index) --> Scene --render_scene--> photo + what is visible of each object --boxes_of--> boxes

The plan is a pure function of its three names; nothing depends on which scenes were made before.
"""

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from tiny_world.kinds import INSTANCES_PER_KIND, KINDS, Colour, Instance, generator, instance, paint

Photo = Float32[np.ndarray, "height width 3"]

GROUP_SHARE = 0.04
CLOSE_UP_SHARE = 0.03
GROUP_SIZE = 6
# Below this share of an object's pixels, what another object hides of it is only the blend of two edges.
OCCLUDED_SHARE = 0.03


@dataclass(frozen=True)
class Pose:
    """How an instance is seen. Lengths are photo pixels, origin at the top left, x right, y down; the radius is that of the
    circle that holds the object. `stretch` and `shear` are an affine look, `tilt_x`, `tilt_y` a slight perspective.
    """

    x: float
    y: float
    radius: float
    angle_rad: float
    stretch: float = 1.0
    shear: float = 0.0
    tilt_x: float = 0.0
    tilt_y: float = 0.0


@dataclass(frozen=True)
class Light:
    """The one light of a scene: where it comes from, how strongly it shades (0..1) and how bright everything is (about 1)."""

    angle_rad: float
    shading: float
    brightness: float


@dataclass(frozen=True)
class Scene:
    """Everything needed to paint one photo. Objects are listed from the back to the front."""

    names: tuple[str | int, ...]
    width: int
    height: int
    light: Light
    objects: tuple[tuple[Instance, Pose], ...]
    is_group: bool = False


@dataclass(frozen=True)
class Box:
    """A tight box around what is visible, as fractions of the photo, with Open Images' flags."""

    kind: int
    x_min: float
    x_max: float
    y_min: float
    y_max: float
    is_occluded: bool
    is_truncated: bool
    is_group: bool


def muted(random: np.random.Generator) -> Colour:
    """A background colour (RGB 0..1): greyish, where every object has at least one saturated or extreme colour."""
    return colorsys.hsv_to_rgb(random.uniform(), random.uniform(0.05, 0.32), random.uniform(0.4, 0.85))


def background(random: np.random.Generator, height: int, width: int) -> Photo:
    """One of five muted grounds (RGB 0..1), with a vignette on every third."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, phase = random.uniform(0, 2 * np.pi), random.uniform(0, 1)
    along = (np.cos(angle) * (x - width / 2) + np.sin(angle) * (y - height / 2)).astype(np.float32)
    across = (np.cos(angle) * (y - height / 2) - np.sin(angle) * (x - width / 2)).astype(np.float32)
    period = random.uniform(36, 90)
    low, high = np.float32(muted(random)), np.float32(muted(random))
    near = low + 0.35 * (high - low)
    match random.choice(["fade", "floor", "clouds", "stripes", "checks"]):
        case "fade":
            share = 0.5 + along / (height + width)
        case "floor":
            share = np.clip((y - random.uniform(0.4, 0.75) * height) / 4, 0, 1) * 0.8 + 0.2 * y / height
        case "clouds":
            share = cv2.resize(random.uniform(0, 1, (5, 6)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        case "stripes":
            high, share = near, np.clip(0.5 + 3 * np.sin(2 * np.pi * (along / period + phase)), 0, 1)
        case "checks":
            wave = np.sin(np.pi * (along / period + phase)) * np.sin(np.pi * across / period)
            high, share = near, np.clip(0.5 + 4 * wave, 0, 1)
    ground = low + np.clip(share, 0, 1)[..., None].astype(np.float32) * (high - low)
    if random.uniform() < 1 / 3:
        distance = np.hypot(x / width - 0.5, y / height - 0.5)
        ground *= (1 - random.uniform(0.3, 0.7) * distance**2)[..., None]
    return ground


def add_object(
    photo: Photo, who: Instance, pose: Pose, light: Light
) -> tuple[tuple[slice, slice], Float32[np.ndarray, "rows columns"], bool]:
    """Paint one object and its soft shadow into the photo (in place).

    Returns the window of the photo that was touched, the object's opacity there, and whether the photo's edge cuts it off.
    """
    height, width = photo.shape[:2]
    reach = pose.radius * 1.45 + 4
    left, top = int(np.floor(pose.x - reach)), int(np.floor(pose.y - reach))
    side = int(np.ceil(2 * reach)) + 1
    opacity, colour, shade = seen_object(who, pose, light, left, top, side)
    shift = (pose.radius * 0.13 * np.array([-np.cos(light.angle_rad), -np.sin(light.angle_rad)])).round().astype(int)
    shadow = cv2.GaussianBlur(np.roll(opacity, (shift[1], shift[0]), (0, 1)), (0, 0), max(1.0, 0.09 * pose.radius))
    inner_y = slice(max(0, -top), min(side, height - top))
    inner_x = slice(max(0, -left), min(side, width - left))
    window = slice(inner_y.start + top, inner_y.stop + top), slice(inner_x.start + left, inner_x.stop + left)
    cover = opacity[inner_y, inner_x]
    ground = photo[window] * (1 - 0.4 * shadow[inner_y, inner_x, None])
    lit = np.clip(colour[inner_y, inner_x] * shade[inner_y, inner_x, None], 0, 1)
    photo[window] = ground + cover[..., None] * (lit - ground)
    is_truncated = bool((cover > 0.5).sum() < (opacity > 0.5).sum())
    return window, cover, is_truncated


def seen_object(
    who: Instance, pose: Pose, light: Light, left: int, top: int, side: int
) -> tuple[Float32[np.ndarray, "side side"], Float32[np.ndarray, "side side 3"], Float32[np.ndarray, "side side"]]:
    """Opacity, colour and light of an object in a square of photo pixels whose top left corner is (left, top)."""
    dx = np.arange(left, left + side, dtype=np.float32)[None, :] + np.float32(0.5 - pose.x)
    dy = np.arange(top, top + side, dtype=np.float32)[:, None] + np.float32(0.5 - pose.y)
    dx, dy = dx / np.float32(pose.radius), dy / np.float32(pose.radius)
    depth = 1 + np.float32(pose.tilt_x) * dx + np.float32(pose.tilt_y) * dy
    dx, dy = dx / depth, dy / depth
    cos, sin = np.float32(np.cos(pose.angle_rad)), np.float32(np.sin(pose.angle_rad))
    v = (cos * dy - sin * dx) * np.float32(pose.stretch)
    u = (cos * dx + sin * dy) / np.float32(pose.stretch) + np.float32(pose.shear) * v
    opacity, colour = paint(who, u, v, 1 / pose.radius)
    towards = np.float32(np.cos(light.angle_rad)) * dx + np.float32(np.sin(light.angle_rad)) * dy
    return opacity, colour, np.float32(light.brightness) * (1 + np.float32(light.shading) * towards)


def random_pose(random: np.random.Generator, x: float, y: float, radius: float) -> Pose:
    """A pose at a place and size: turned within 40 degrees, slightly stretched, sheared and tilted."""
    return Pose(
        x=x,
        y=y,
        radius=radius,
        angle_rad=random.uniform(-0.7, 0.7),
        stretch=random.uniform(0.9, 1.1),
        shear=random.uniform(-0.15, 0.15),
        tilt_x=random.uniform(-0.12, 0.12),
        tilt_y=random.uniform(-0.12, 0.12),
    )


def random_light(random: np.random.Generator) -> Light:
    """Light from anywhere, weak or strong, a little darker or brighter."""
    return Light(random.uniform(0, 2 * np.pi), random.uniform(0.05, 0.25), random.uniform(0.85, 1.05))


def random_size(random: np.random.Generator) -> tuple[int, int]:
    """Width and height of a photo: mostly 4:3 or 3:2, lying or standing, some squares and a few panoramas."""
    aspect = random.choice([1.0, 1.33, 1.5, 1.78, 2.3], p=[0.15, 0.4, 0.3, 0.1, 0.05])
    long_side = round(random.uniform(176, 256))
    short_side = round(long_side / aspect)
    return (long_side, short_side) if random.uniform() < 0.65 else (short_side, long_side)


def places(random: np.random.Generator, width: int, height: int, count: int) -> list[tuple[float, float, float]]:
    """Up to `count` circles (x, y, radius): they may touch, one in six may hide a part of another or leave the photo."""
    found: list[tuple[float, float, float]] = []
    for _ in range(count):
        radius = min(float(np.exp(random.uniform(np.log(17), np.log(62)))), 0.42 * min(width, height))
        apart, inside = (0.6, 0.3) if random.uniform() < 1 / 6 else (0.92, 1.0)
        margin = inside * radius
        for _ in range(12):
            x, y = random.uniform(margin, width - margin), random.uniform(margin, height - margin)
            if all(np.hypot(x - a, y - b) > apart * (radius + r) for a, b, r in found):
                found.append((x, y, radius))
                break
    return found


def plan_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of one photo: most have one to four objects of different kinds, some a group or a close-up."""
    random = generator(seed, "scene", split, index)
    width, height = random_size(random)
    light = random_light(random)
    chosen = [
        instance(seed, split, int(kind), int(random.integers(INSTANCES_PER_KIND[split])))
        for kind in random.choice(len(KINDS), 4, replace=False)
    ]
    sort = random.uniform()
    if sort < GROUP_SHARE:
        objects = [(chosen[0], pose) for pose in group_poses(random, width, height)]
    elif sort < GROUP_SHARE + CLOSE_UP_SHARE:
        objects = [(chosen[0], random_pose(random, width / 2, height / 2, 0.6 * max(width, height)))]
    else:
        circles = places(random, width, height, int(random.integers(1, 5)))
        objects = [(who, random_pose(random, *circle)) for who, circle in zip(chosen, circles, strict=False)]
    return Scene((seed, split, index), width, height, light, tuple(objects), sort < GROUP_SHARE)


def group_poses(random: np.random.Generator, width: int, height: int) -> list[Pose]:
    """A handful of small objects huddled around one place."""
    radius = min(random.uniform(11, 15), 0.16 * min(width, height))
    x, y = random.uniform(3 * radius, width - 3 * radius), random.uniform(2.2 * radius, height - 2.2 * radius)
    offsets = [(column * 1.7 * radius, row * 1.7 * radius) for row in (-0.5, 0.5) for column in (-1, 0, 1)]
    jitter = random.uniform(-0.25 * radius, 0.25 * radius, (GROUP_SIZE, 2))
    return [random_pose(random, x + a + i, y + b + j, radius) for (a, b), (i, j) in zip(offsets, jitter, strict=True)]


def render_scene(
    scene: Scene,
) -> tuple[UInt8[np.ndarray, "height width 3"], list[Bool[np.ndarray, "height width"]], list[bool], list[bool]]:
    """Paint the photo (RGB, 0-255).

    Returns also, for each object: the pixels where it is what one sees, whether another hides a part of it, and whether the
    photo's edge cuts it off.
    """
    photo = background(generator("background", *scene.names), scene.height, scene.width) * scene.light.brightness
    visible: list[Bool[np.ndarray, "height width"]] = []
    areas: list[int] = []
    truncated: list[bool] = []
    for who, pose in scene.objects:
        window, opacity, is_truncated = add_object(photo, who, pose, scene.light)
        mine = opacity > 0.5
        for other in visible:
            other[window] &= ~mine
        seen = np.zeros((scene.height, scene.width), bool)
        seen[window] = mine
        visible.append(seen)
        areas.append(int(mine.sum()))
        truncated.append(is_truncated)
    occluded = [bool(seen.sum() < (1 - OCCLUDED_SHARE) * area) for seen, area in zip(visible, areas, strict=True)]
    return (np.clip(photo, 0, 1) * 255 + 0.5).astype(np.uint8), visible, occluded, truncated


def boxes_of(scene: Scene, visible: list[np.ndarray], occluded: list[bool], truncated: list[bool]) -> list[Box]:
    """One box an object, or one around the whole group; an object of which nothing is visible has none."""
    if scene.is_group:
        seen = np.logical_or.reduce(visible)
        return [tight_box(scene.objects[0][0].kind, seen, any(occluded), any(truncated), True)]
    return [
        tight_box(who.kind, seen, *flags, False)
        for (who, _), seen, *flags in zip(scene.objects, visible, occluded, truncated, strict=True)
        if seen.any()
    ]


def tight_box(kind: int, seen: Bool[np.ndarray, "height width"], is_occluded: bool, is_truncated: bool, is_group: bool) -> Box:
    """The smallest box of whole pixels that holds all that is seen, as fractions."""
    height, width = seen.shape
    columns, rows = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
    x_min, x_max = int(columns[0]) / width, (int(columns[-1]) + 1) / width
    y_min, y_max = int(rows[0]) / height, (int(rows[-1]) + 1) / height
    return Box(kind, x_min, x_max, y_min, y_max, is_occluded, is_truncated, is_group)


def render_tile(
    who: Instance, neighbour: Instance, random: np.random.Generator, side: int
) -> tuple[UInt8[np.ndarray, "side side 3"], Box]:
    """A square photo (RGB, 0-255) of one instance in the middle of a ground, and its box; everything else is random.

    The object takes 28 to 50 % of the side; in every other tile a neighbour stands beside it, half out of sight.
    """
    light = random_light(random)
    tile = background(random, side, side) * light.brightness
    radius = random.uniform(0.14, 0.25) * side
    if random.uniform() < 0.5:
        direction, distance = random.uniform(0, 2 * np.pi), random.uniform(1.7, 2.3) * radius
        place = side / 2 + distance * np.cos(direction), side / 2 + distance * np.sin(direction)
        add_object(tile, neighbour, random_pose(random, *place, radius), light)
    window, opacity, is_truncated = add_object(tile, who, random_pose(random, side / 2, side / 2, radius), light)
    seen = np.zeros((side, side), bool)
    seen[window] = opacity > 0.5
    return (np.clip(tile, 0, 1) * 255 + 0.5).astype(np.uint8), tight_box(who.kind, seen, False, is_truncated, False)
