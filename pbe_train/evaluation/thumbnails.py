"""The best and the worst pairs as small pictures, for a page that holds them itself."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pbe_core.errors import InputError
from pbe_core.images import AnyMask, AnyPhoto
from pbe_core.images.sheets import outline
from pbe_train.evaluation.lines import lower_is_better, pair_score
from pbe_train.evaluation.painting import read_picture
from pbe_train.evaluation.pair_sets import PairSet
from pbe_train.evaluation.results import PairRow

SIDE = 192
"""Longest side of a small picture, px: sharp at 96 px on a screen of double density."""

_QUALITIES = ((SIDE, 85), (SIDE, 70), (160, 60), (128, 50), (96, 40), (64, 30))
"""Longest side in px and JPEG quality; the first that fits is taken."""


@dataclass(frozen=True)
class ShownPair:
    """A pair with its small pictures: RGB by title; None where there is no picture."""

    pair: PairRow
    pictures: Mapping[str, AnyPhoto | None]


@dataclass(frozen=True)
class Card:
    """A pair with its pictures as data: URIs by title; empty where there is no picture."""

    pair: PairRow
    pictures: Mapping[str, str]

    @property
    def length(self) -> int:
        """Bytes of its pictures in the page."""
        return sum(len(source) for source in self.pictures.values())


def extremes(pairs: Sequence[PairRow], row: str, score: str, most: int) -> tuple[list[PairRow], list[PairRow]]:
    """The best and the worst pairs by a row's score, best first and worst first; none in both, of equal ones by their ids.

    Pairs of which the score is not defined are in neither.
    """
    found = [(value, pair.id, pair) for pair in pairs if (value := pair_score(pair, row, score)) is not None]
    sign = 1 if lower_is_better(score) else -1
    ordered = [pair for _, _, pair in sorted(found, key=lambda one: (sign * one[0], one[1]))]
    best = ordered[: min(most, math.ceil(len(ordered) / 2))]
    return best, ordered[len(best) :][-most:][::-1]


def read_thumbnails(chosen: Sequence[PairRow], pairs: PairSet, folders: Mapping[str, Path]) -> list[ShownPair]:
    """Small pictures of pairs: the photo with its mask's outline, the reference, and each folder's picture, by its title.

    Pairs that the set has not, and folders without a pair's picture, have none.

    Raises:
        InputError: a photo, mask or reference cannot be read.
    """
    numbers = {pair.id: number for number, pair in enumerate(pairs.pairs)}
    shown = []
    for pair in chosen:
        pictures: dict[str, AnyPhoto | None] = {}
        if pair.id in numbers:
            read = pairs.read(numbers[pair.id])
            pictures = {"photo": outline_small(read.photo, read.mask), "reference": shrink(read.reference)}
            pictures |= {title: _painted(folder, pair.id) for title, folder in folders.items()}
        shown.append(ShownPair(pair, pictures))
    return shown


def shrink(picture: AnyPhoto, side: int = SIDE) -> AnyPhoto:
    """A picture of at most `side` px; a small one stays as it is."""
    size = _size(picture, side)
    small: AnyPhoto = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return small


def outline_small(photo: AnyPhoto, mask: AnyMask) -> AnyPhoto:
    """A photo of at most `SIDE` px with its mask's outline, some 2 px wide whatever the photo's size."""
    size = _size(photo, 2 * SIDE)
    # Any share of a px counts: a thin region must not be lost.
    region = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    return shrink(outline(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), region))


def encode_within(shown: Sequence[ShownPair], room: int) -> list[Card]:
    """Pairs with their pictures as they stand in a page: as large and as good as fits into `room` bytes, all alike.

    Where even the smallest do not fit, there are none.
    """
    for side, quality in _QUALITIES if room > 0 else ():
        cards = [Card(one.pair, {title: _data_uri(own, side, quality) for title, own in one.pictures.items()}) for one in shown]
        if sum(card.length for card in cards) <= room:
            return cards
    return [Card(one.pair, dict.fromkeys(one.pictures, "")) for one in shown]


def _data_uri(picture: AnyPhoto | None, side: int, quality: int) -> str:
    if picture is None:
        return ""
    small = cv2.cvtColor(shrink(picture, side), cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


def _size(picture: AnyPhoto, side: int) -> tuple[int, int]:
    """Width and height, px."""
    scale = min(1.0, side / max(picture.shape[:2]))
    return max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))


def _painted(folder: Path, pair_id: str) -> AnyPhoto | None:
    try:
        return shrink(read_picture(folder, pair_id))
    except InputError:
        return None
