"""What exists in the tiny world: sixteen kinds of object and their instances.

A *kind* fixes a shape, a pattern and two colour families ("red striped disc"). An *instance* is one individual of a kind: its own
two colours, pattern period, phase and direction, and its own proportions. Shapes and patterns are functions on the object's own
plane, whose unit disc |(u, v)| <= 1 holds the object (u to the right, v down), so that one instance can be seen at any scale and
from any side:

    (u, v) --shape--> inside > 0 > outside        (u, v) --pattern--> share of the second colour, 0..1
"""

import colorsys
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

Plane = Float32[np.ndarray, "height width"]
Shape = Callable[[Plane, Plane, float], Plane]
Colour = tuple[float, float, float]

INSTANCES_PER_KIND = {"train": 24, "validation": 6}


def generator(*names: str | int) -> np.random.Generator:
    """The random generator of these names: the same on every machine, whatever was drawn before."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))


# --- Shapes: (u, v, proportion in 0..1) -> a field that is positive inside. Only its zero line and its slope there matter. ---


def disc(u: Plane, v: Plane, proportion: float) -> Plane:
    """A circle, or an ellipse a little flatter."""
    return 1 - np.hypot(u, v / (0.8 + 0.2 * proportion))


def hoop(u: Plane, v: Plane, proportion: float) -> Plane:
    """A ring, thinner or thicker."""
    radius = np.hypot(u, v)
    return np.minimum(1 - radius, radius - (0.3 + 0.2 * proportion))


def star(u: Plane, v: Plane, proportion: float) -> Plane:
    """Five points: each of the ten half-points is bounded by the line from its tip to its notch."""
    half_point = np.pi / 5
    notch = 0.42 + 0.16 * proportion
    angle = np.abs((np.arctan2(u, -v) + half_point) % (2 * half_point) - half_point)
    radius = np.hypot(u, v)
    notch_x, notch_y = notch * np.cos(half_point), notch * np.sin(half_point)
    normal = np.array([notch_y, 1 - notch_x]) / np.hypot(notch_y, 1 - notch_x)
    return (normal[0] * (1 - radius * np.cos(angle)) - normal[1] * radius * np.sin(angle)).astype(np.float32)


def heart(u: Plane, v: Plane, proportion: float) -> Plane:
    """Two lobes above a point; narrower or wider."""
    x, y = np.abs(u) * (1.15 + 0.2 * proportion), 0.15 - 1.15 * v
    return 0.85 - np.hypot(x, y - 0.62 * np.sqrt(x + 0.01))


def cross(u: Plane, v: Plane, proportion: float) -> Plane:
    """Four equal arms, thinner or thicker."""
    arm = 0.28 + 0.14 * proportion
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(arm - u, 0.95 - v), np.minimum(arm - v, 0.95 - u))


def leaf(u: Plane, v: Plane, proportion: float) -> Plane:
    """Two discs overlap; the tips are at v = -1 and v = 1."""
    half_width = 0.45 + 0.2 * proportion
    offset = (1 - half_width**2) / (2 * half_width)
    return offset + half_width - np.hypot(np.abs(u) + offset, v)


def crescent(u: Plane, v: Plane, proportion: float) -> Plane:
    """A disc less a disc beside it."""
    return np.minimum(1 - np.hypot(u, v), np.hypot(u - 0.55 - 0.15 * proportion, v) - 0.78)


def hexagon(u: Plane, v: Plane, proportion: float) -> Plane:
    """Six sides, upright or a little flattened."""
    v = v / (0.82 + 0.18 * proportion)
    return 0.87 - np.maximum(0.866 * np.abs(v) + 0.5 * np.abs(u), np.abs(u))


def arrow(u: Plane, v: Plane, proportion: float) -> Plane:
    """A head on a shaft, pointing up."""
    shaft = np.minimum(0.25 + 0.1 * proportion - np.abs(u), np.minimum(v + 0.3, 0.95 - v))
    head = np.minimum(0.75 * (v + 0.98) - 0.8 * np.abs(u), 0.05 + 0.15 * proportion - v)
    return np.maximum(shaft, head)


def drop(u: Plane, v: Plane, proportion: float) -> Plane:
    """A tip above a round belly, slimmer or fuller."""
    inside = np.clip(v, -1, 1)
    width = (0.42 + 0.12 * proportion) * (1 + inside) * np.sqrt(1.02 - inside)
    return np.minimum(width - np.abs(u), np.minimum(1 + v, 1 - v))


def flower(u: Plane, v: Plane, proportion: float) -> Plane:
    """Five or six petals."""
    petals = 5 if proportion < 0.5 else 6
    return 0.76 + 0.22 * np.cos(petals * np.arctan2(u, -v)) - np.hypot(u, v)


def mushroom(u: Plane, v: Plane, proportion: float) -> Plane:
    """A half-round cap on a stem, thinner or thicker."""
    cap = np.minimum(0.95 - np.hypot(u, (v - 0.1) * 0.92), 0.15 - v)
    stem = np.minimum(0.24 + 0.14 * proportion - np.abs(u), np.minimum(v + 0.2, 0.92 - v))
    return np.maximum(cap, stem)


def triangle(u: Plane, v: Plane, proportion: float) -> Plane:
    """Point up, slimmer or wider."""
    flank = 0.8 + 0.1 * proportion
    return np.minimum(0.62 - v, 0.52 - flank * np.abs(u) + 0.5 * v)


def shield(u: Plane, v: Plane, proportion: float) -> Plane:
    """Flat above, pointed below."""
    depth = np.clip((v + 0.2) / 1.15, 0, 1)
    return np.minimum((0.7 + 0.15 * proportion) * (1 - depth**2) - np.abs(u), np.minimum(v + 0.85, 0.95 - v))


def fish(u: Plane, v: Plane, proportion: float) -> Plane:
    """A round body with a tail to the right."""
    body = 0.68 - np.hypot(u + 0.3, v / (0.65 + 0.15 * proportion))
    tail = np.minimum(0.95 - u, 0.85 * (u - 0.15) - np.abs(v) + 0.05)
    return np.maximum(body, tail)


def gear(u: Plane, v: Plane, proportion: float) -> Plane:
    """Seven or nine teeth."""
    teeth = 7 if proportion < 0.5 else 9
    return 0.84 + 0.12 * np.clip(2.5 * np.cos(teeth * np.arctan2(u, -v)), -1, 1) - np.hypot(u, v)


def hourglass(u: Plane, v: Plane, proportion: float) -> Plane:
    """Two triangles tip to tip, joined by a thin waist."""
    return np.minimum(0.1 + 0.08 * proportion + 0.75 * np.abs(v) - np.abs(u), 0.72 - np.abs(v))


# --- Patterns: a wave that is positive where the second colour shows. Period and phase are in units of the plane. ---


def stripes(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """Straight bands."""
    return np.sin(2 * np.pi * (u / period + phase))


def checks(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """A chessboard."""
    return np.sin(2 * np.pi * (u / period + phase) / 1.4) * np.sin(2 * np.pi * (v / period + phase) / 1.4) * 1.4


def dots(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """Round dots on a square grid."""
    return np.cos(2 * np.pi * (u / period + phase)) + np.cos(2 * np.pi * v / period) - 0.55


def rings(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """Rings around the middle."""
    return np.sin(2 * np.pi * (np.hypot(u, v) / period + phase))


def eye(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """One disc in the middle."""
    return 3 * (0.6 * period + 0.1 + 0.08 * phase - np.hypot(u, v))


def fade(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """A smooth change from side to side."""
    return 0.12 * (u + 0.3 * (phase - 0.5))


def halves(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """One edge near the middle."""
    return 3 * (u + 0.3 * (phase - 0.5))


def quarters(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """Four quarters in turn."""
    return 6 * np.where(np.abs(u) < np.abs(v), np.abs(u), np.abs(v)) * np.sign(u * v)


def zigzag(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """Bands that are bent sharply."""
    return np.sin(2 * np.pi * (u / period + phase + 0.35 * np.abs((v / (1.6 * period)) % 1 - 0.5) * 2))


def veins(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """Chevrons about the axis."""
    return np.sin(2 * np.pi * ((v + np.abs(u)) / period + phase))


def spokes(u: Plane, v: Plane, period: float, phase: float) -> Plane:
    """Three or four rays of each colour."""
    return np.hypot(u, v) * 2 * np.sin((3 if period > 0.5 else 4) * np.arctan2(u, -v) + 2 * np.pi * phase)


@dataclass(frozen=True)
class Kind:
    """One class of the world. Colours are (hue in degrees, saturation 0..1, value 0..1), the middle of a family.

    `turns` says whether the pattern lies at any angle on the shape, or is bound to it (the veins of a leaf).
    """

    name: str
    shape: Shape
    pattern: Callable[[Plane, Plane, float, float], Plane]
    first: Colour
    second: Colour
    turns: bool = True

    @property
    def mid(self) -> str:
        """The label in the box CSV, in the style of Open Images' machine ids."""
        return f"/m/0tiny{ALL_KINDS.index(self) + 1:02d}"


KINDS = (
    Kind("Red striped disc", disc, stripes, (358, 0.85, 0.85), (45, 0.15, 0.97)),
    Kind("Blue checked hoop", hoop, checks, (222, 0.85, 0.75), (195, 0.25, 0.97)),
    Kind("Yellow dotted star", star, dots, (51, 0.85, 0.97), (20, 0.75, 0.35)),
    Kind("Pink zigzag heart", heart, zigzag, (335, 0.4, 1.0), (340, 0.9, 0.6)),
    Kind("Green halved cross", cross, halves, (145, 0.85, 0.55), (120, 0.08, 0.97)),
    Kind("Veined leaf", leaf, veins, (88, 0.75, 0.85), (125, 0.8, 0.33), turns=False),
    Kind("Ringed moon", crescent, rings, (56, 0.35, 1.0), (238, 0.75, 0.4), turns=False),
    Kind("Orange hexagon", hexagon, dots, (30, 0.95, 1.0), (280, 0.3, 0.15)),
    Kind("Purple striped arrow", arrow, stripes, (278, 0.7, 0.65), (290, 0.12, 0.97)),
    Kind("Blue drop", drop, fade, (186, 0.75, 0.95), (212, 0.95, 0.4)),
    Kind("Magenta flower", flower, eye, (308, 0.8, 0.85), (50, 0.8, 0.98), turns=False),
    Kind("Brown mushroom", mushroom, dots, (20, 0.75, 0.5), (42, 0.22, 0.97)),
    Kind("Checked sail", triangle, checks, (170, 0.6, 0.9), (200, 0.6, 0.16)),
    Kind("Quartered shield", shield, quarters, (350, 0.85, 0.42), (43, 0.85, 0.93), turns=False),
    Kind("Banded fish", fish, stripes, (12, 0.72, 1.0), (225, 0.75, 0.4), turns=False),
    Kind("Violet gear", gear, spokes, (256, 0.65, 0.9), (72, 0.75, 0.95)),
)
NEW_KIND = Kind("Turquoise hourglass", hourglass, stripes, (176, 0.8, 0.75), (5, 0.25, 1.0))
"""In no world, and no network was trained on it: what `tiny_world.new_kind` teaches a finished model."""
ALL_KINDS = (*KINDS, NEW_KIND)


@dataclass(frozen=True)
class Instance:
    """One individual: everything about its look that stays when pose, scale, light and place change. Colours are RGB 0..1."""

    kind: int
    split: str
    number: int
    first: Colour
    second: Colour
    period: float
    phase: float
    direction_rad: float
    proportion: float
    pattern_of: int | None = None
    """The kind whose pattern it wears, where that is not its own kind's. No photo of a world shows such an individual."""


def individual_colour(family: Colour, random: np.random.Generator) -> Colour:
    """A colour (RGB 0..1) of the family: hue within 12 degrees, so that neighbours on the wheel stay apart."""
    hue, saturation, value = family
    hue += random.uniform(-12, 12)
    saturation = np.clip(saturation * random.uniform(0.85, 1.12), 0, 1)
    value = np.clip(value * random.uniform(0.85, 1.15), 0, 1)
    return colorsys.hsv_to_rgb(hue / 360 % 1, float(saturation), float(value))


def instance(seed: int, split: str, kind: int, number: int) -> Instance:
    """Individual `number` of a kind; splits share none, since the split is a part of the name the look is drawn from."""
    random = generator(seed, "instance", split, kind, number)
    return Instance(
        kind=kind,
        split=split,
        number=number,
        first=individual_colour(ALL_KINDS[kind].first, random),
        second=individual_colour(ALL_KINDS[kind].second, random),
        period=random.uniform(0.4, 0.75),
        phase=random.uniform(0, 1),
        direction_rad=random.uniform(0, np.pi) if ALL_KINDS[kind].turns else 0.0,
        proportion=random.uniform(0, 1),
    )


def mixed_instance(shape: int, random: np.random.Generator) -> Instance:
    """An individual whose looks tell nothing of its shape: any pattern at any angle, or none (1 in 8), in any two colours."""
    first, second = (colorsys.hsv_to_rgb(*random.uniform((0, 0, 0.1), 1)) for _ in range(2))
    return Instance(
        kind=shape,
        split="mixed",
        number=0,
        first=first,
        second=first if random.uniform() < 1 / 8 else second,
        period=random.uniform(0.4, 0.75),
        phase=random.uniform(0, 1),
        direction_rad=random.uniform(0, np.pi),
        proportion=random.uniform(0, 1),
        pattern_of=int(random.integers(len(KINDS))),
    )


def paint(who: Instance, u: Plane, v: Plane, pixel: float) -> tuple[Plane, Float32[np.ndarray, "height width 3"]]:
    """Opacity (0..1) and colour (RGB 0..1, without light) of an instance at points of its plane.

    `pixel` is the size of a picture element in units of the plane: edges are blended over about one, so that nothing aliases.
    """
    pattern = ALL_KINDS[who.kind if who.pattern_of is None else who.pattern_of].pattern
    inside = ALL_KINDS[who.kind].shape(u, v, who.proportion)
    slope_y, slope_x = np.gradient(inside, pixel)
    opacity = np.clip(inside / (np.hypot(slope_x, slope_y) + 0.05) / pixel + 0.5, 0, 1).astype(np.float32)
    cos, sin = np.float32(np.cos(who.direction_rad)), np.float32(np.sin(who.direction_rad))
    wave = pattern(cos * u + sin * v, cos * v - sin * u, who.period, who.phase)
    share = np.clip(0.5 + wave * who.period / (2 * np.pi * 1.2 * max(pixel, 0.02)), 0, 1)[..., None].astype(np.float32)
    first, second = np.float32(who.first), np.float32(who.second)
    return opacity, first + share * (second - first)
