"""The numbers of the report, from the tables of a dataset folder.

objects.parquet ──┐                   classes, areas, aspects, positions, objects per photo, flags
rejects.parquet ──┼──counts.py──────▶ rejects by rule, malformed rows
plan.parquet    ──┘                   samples and shards by split
a seeded sample of objects ──the build's own geometry──▶ shares of the view that masks cover

Of a finished dataset, classes and all that follows are counted of the objects that have samples, and a seeded sample of these is
read from the shards.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import ValidationError

from pbe_core.buckets import Shape, nearest_bucket
from pbe_core.dataset_reader import read_dataset, read_sample, take_rows
from pbe_core.errors import InputError
from pbe_core.images.crop import is_padded, whole_photo
from pbe_core.randomness import generator
from pbe_core.sample_codec import Sample
from pbe_core.words import number_of
from pipelines.config import BuildSettings, MaskSettings, SelectionSettings, ViewSettings
from pipelines.dataset.counts import (
    SHARE_EDGES,
    bin_counts,
    binned,
    choose,
    count_objects,
    count_plan,
    count_rejects,
    hash_unmade,
    in_order,
    sample_rows,
)
from pipelines.geometry import POINTS_PER_EDGE, bessel_polygon, box_in_photo, extend_box, fill_box, fill_polygon, view_window
from schemas.dataset import DatasetInfo, SplitCounts
from schemas.tables import COORDINATES

SAMPLED_OBJECTS = 2000
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
UNKNOWN_PHOTO_SIZE = (1024, 768)


@dataclass(frozen=True)
class KnownSettings:
    """The settings that the figures depend on; where a folder does not tell them, the defaults."""

    seed: int
    selection: SelectionSettings
    views: ViewSettings
    masks: MaskSettings
    selection_from: str | None
    """What told the seed and the selection's settings; null if these are defaults."""
    masks_from: str | None
    """What told those of views and masks; null if these are defaults."""


def collect_figures(folder: Path, settings: BuildSettings | None = None) -> dict[str, Any]:
    """All numbers of the report.

    Args:
        folder: where objects.parquet, rejects.parquet and plan.parquet lie and, if the build was finished, dataset.json.
        settings: of the build; null takes those that the folder itself tells.

    Raises:
        InputError: a table is missing, cannot be read or lacks a column, or dataset.json tells of other tables than these.
    """
    for name in ("objects.parquet", "rejects.parquet", "plan.parquet"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such table; run `python pipelines/plan.py` or the build for this folder first")
    info = read_dataset(folder) if (folder / "dataset.json").is_file() else None
    known = find_settings(folder, settings, info)
    unmade = hash_unmade(folder / "failures.parquet", known.views.per_object) if info else None
    objects = count_objects(folder / "objects.parquet", unmade)
    rejects = count_rejects(folder / "rejects.parquet")
    splits = _by_split(objects["accepted"], count_plan(folder / "plan.parquet"), info)

    accepted, rejected = sum(objects["accepted"]["objects"].values()), rejects["rejected"]
    planned = sum(split["planned"] for split in splits)
    if info and (info.books.boxes, info.books.planned) != (accepted + rejected, planned):
        raise InputError(
            f"{folder / 'dataset.json'}: tells of {number_of(info.books.boxes, 'box', 'boxes')} and "
            f"{number_of(info.books.planned, 'planned sample')}, "
            f"but the tables beside it hold {accepted + rejected} and {planned}; run the same build command again"
        )
    return {
        # Two names, since the last one is often `dataset`.
        "dataset": "/".join(folder.resolve().parts[1:][-2:]),
        "fingerprint": info.fingerprint if info else None,
        "settings_from": {"selection": known.selection_from, "masks": known.masks_from},
        "summary": {
            "boxes": accepted + rejected,
            "objects": accepted,
            "rejected": rejected,
            "photos": sum(split["photos"] for split in splits),
            "planned": planned,
            "shards": sum(split["shards"] for split in splits),
            "packed": _packed(objects, info) if info else None,
        },
        "splits": splits,
        "failures": info.books.failures if info else None,
        "rejects": rejects,
        "classes": objects["classes"],
        "areas": {**objects["areas"], **_rules(known, "min_area", "max_area")},
        "aspects": {**objects["aspects"], **_rules(known, "max_aspect")},
        "positions": objects["positions"],
        "objects_per_photo": objects["photos"]["per_photo"],
        "flags": objects["flags"],
        "masks": (info and packed_masks(folder, info, known.seed)) or mask_shares(folder / "objects.parquet", known),
    }


def find_settings(folder: Path, settings: BuildSettings | None, info: DatasetInfo | None) -> KnownSettings:
    """The settings given, else those that the folder's records tell: dataset.json, plan.json or (no masks yet) selection.json."""
    told: dict[str, Any] = {}
    origin = None
    if settings:
        told, origin = settings.model_dump(mode="json"), "as given"
    elif info:
        told, origin = info.settings, "dataset.json"
    for name in () if origin else ("selection.json", "plan.json"):
        # Missing, or of another version: the tables can be shown all the same, without the rules that made them.
        with suppress(OSError, ValueError, KeyError, TypeError):
            told, origin = dict(json.loads((folder / name).read_bytes())["fingerprint"]["settings"]), name
    try:
        seed, selection = int(told["seed"]), SelectionSettings.model_validate(told["selection"])
    except (KeyError, TypeError, ValueError):
        return KnownSettings(0, SelectionSettings(), ViewSettings(), MaskSettings(), None, None)
    try:
        views, masks = ViewSettings.model_validate(told["views"]), MaskSettings.model_validate(told["masks"])
    except (KeyError, ValidationError):
        return KnownSettings(seed, selection, ViewSettings(), MaskSettings(), origin, None)
    return KnownSettings(seed, selection, views, masks, origin, origin)


def mask_shares(path: Path, settings: KnownSettings, count: int = SAMPLED_OBJECTS) -> dict[str, Any]:
    """How much of the view masks cover, of a seeded sample of `count` objects.

    Each object's first mask is drawn twice, as a box and as Bessel curves, in the view that the build gives it. Where the tables
    do not tell the photo's size, it is taken as `UNKNOWN_PHOTO_SIZE`. Turning a photo does not change these distributions, so
    photos stay in the frame of their boxes.
    """
    rows = sample_rows(path, ("object_id", *COORDINATES, "width", "height"), count, settings.seed).to_pylist()
    drawn = [draw_mask_shares(row, settings) for row in rows]
    seen = [shares for shares, padded in drawn if not padded or settings.views.no_square == "reflect"]
    columns = zip(("object", "box", "bessel"), np.array(seen).reshape(-1, 3).T, strict=True)
    return {
        "of": "objects",
        "sampled": len(rows),
        "size_unknown": sum(not (row["width"] and row["height"]) for row in rows),
        "assumed_size": list(UNKNOWN_PHOTO_SIZE),
        "padded": sum(padded for _, padded in drawn),
        "padded_are_dropped": settings.views.no_square == "reject",
        "view_size": settings.views.nominal_size,
        "views": _shapes_in_words(settings.views.shapes),
        **_binned_shares(dict(columns)),
    }


def packed_masks(folder: Path, info: DatasetInfo, seed: int, count: int = SAMPLED_OBJECTS) -> dict[str, Any] | None:
    """The same of a seeded sample of `count` samples of a finished dataset; nothing where its shards are not in the folder.

    Raises:
        InputError: a part of the index or a sample is damaged.
    """
    shares: dict[str, list[float]] = {"object": [], "box": [], "bessel": []}
    try:
        for sample in _read_some(folder, info, count, seed):
            left, top, right, bottom = sample.record.box_in_view
            shares["object"].append((right - left) * (bottom - top) / sample.masks[0].size)
            for kind, mask in zip(sample.record.mask_kinds, sample.masks, strict=True):
                shares[kind].append(float(mask.mean()))
    except FileNotFoundError:  # As of a build into a bucket.
        return None
    return {
        "of": "samples",
        "sampled": len(shares["object"]),
        "view_size": info.view_size,
        "views": _shapes_in_words(info.buckets or ((info.view_size, info.view_size),)),
        **_binned_shares({kind: np.array(own) for kind, own in shares.items()}),
    }


def _shapes_in_words(shapes: Sequence[Shape]) -> str:
    return ", ".join(f"{width} × {height}" for width, height in shapes) + " px"


def _read_some(folder: Path, info: DatasetInfo, count: int, seed: int) -> Iterator[Sample]:
    """A choice of samples, by their shards' parts of the index: the footer of index.parquet grows with the shards."""
    sizes = json.loads((folder / "shards" / "sizes.json").read_bytes())
    tars, starts = list(sizes), np.cumsum([0, *sizes.values()])
    places = choose(int(starts[-1]), count, seed, "index.parquet")
    numbers = np.searchsorted(starts, places, side="right") - 1
    for number in np.unique(numbers).tolist():
        tar = folder / "shards" / tars[number]
        if not tar.is_file():
            raise FileNotFoundError(tar)
        rows = take_rows(tar.with_suffix(".index.parquet"), (places[numbers == number] - starts[number]).tolist())
        yield from (read_sample(folder, row, means_only=info.vae.deterministic) for row in rows)


def _binned_shares(shares: Mapping[str, Float[np.ndarray, " shares"]]) -> dict[str, Any]:
    return {
        "edges": SHARE_EDGES.tolist(),
        "percentiles": list(PERCENTILES),
        **{
            kind: {
                **binned(bin_counts(own, SHARE_EDGES)),
                "at_percentile": np.percentile(own, PERCENTILES).tolist() if len(own) else None,
            }
            for kind, own in shares.items()
        },
    }


def draw_mask_shares(row: dict[str, Any], settings: KnownSettings) -> tuple[tuple[float, float, float], bool]:
    """Shares of the view's area that an object's box, its box mask and its Bessel mask cover; whether the view is padded.

    The same draws by name as in packing (view 0, mask 0), outlines rounded and filled at the view's size as there.
    """
    width, height = (row["width"], row["height"]) if row["width"] and row["height"] else UNKNOWN_PHOTO_SIZE
    names = (settings.seed, row["object_id"], "view", 0)
    frame, box, views, options = whole_photo(width, height), box_in_photo(row, width, height), settings.views, settings.masks
    extended = extend_box(box, frame, options.max_extension, generator(*names, "mask", 0, "extension"))
    shape = nearest_bucket(width, height, views.shapes)
    window = view_window(
        extended, width, height, shape, views.zoom, views.max_zoom, generator(*names, "window"), views.least_side(shape)
    )
    visible = window.rectangle().intersection(frame)

    random = generator(*names, "mask", 0, "shape")
    random.random()  # Packing draws the mask's kind first.
    polygon = bessel_polygon(box, extended, POINTS_PER_EDGE, options.jitter, random)
    polygon = np.clip(polygon, (visible.x_min, visible.y_min), (visible.x_max, visible.y_max))
    corners, polygon = (np.round(window.to_view(points, shape), 2) for points in (extended.corners(), polygon))
    masks = fill_box(corners, shape), fill_polygon(polygon, shape)
    object_share = float(box.width * box.height / (window.width * window.height))
    # Counted, which takes a tenth of the time of a mean.
    box_share, bessel_share = (int(np.count_nonzero(mask)) / mask.size for mask in masks)
    return (object_share, box_share, bessel_share), is_padded(window, width, height)


def _rules(known: KnownSettings, *names: str) -> dict[str, Any]:
    """Settings of the selection, null where they are switched off or not known."""
    return {name: getattr(known.selection, name) if known.selection_from else None for name in names}


def _by_split(photos: dict[str, Any], plan: dict[str, Any], info: DatasetInfo | None) -> list[dict[str, Any]]:
    """One row a split; what came is null where nothing is packed, and 0 where nothing of a finished dataset's split is."""
    rows = []
    for split in in_order({*photos["photos"], *plan["samples"]}):
        came = info.splits.get(split, SplitCounts(shards=[], samples=0, bytes=0)) if info else None
        rows.append(
            {
                "split": split,
                "photos": photos["photos"].get(split, 0),
                "objects": photos["objects"].get(split, 0),
                "planned": plan["samples"][split],
                "shards": plan["shards"][split],
                "samples": came and came.samples,
                "packed_shards": len(came.shards) if came else None,
                "bytes": came and came.bytes,
            }
        )
    return rows


def _packed(objects: dict[str, Any], info: DatasetInfo) -> dict[str, Any]:
    """What came, over all splits."""
    return {
        "objects": objects["classes"]["objects"],
        "photos": objects["photos"]["per_photo"]["photos"],
        "samples": info.books.samples,
        "shards": sum(len(counts.shards) for counts in info.splits.values()),
        "bytes": sum(counts.bytes for counts in info.splits.values()),
        "padded": info.books.padded_views,
        "masks": info.books.masks,
        **({"references": info.books.references} if info.books.references else {}),
    }
