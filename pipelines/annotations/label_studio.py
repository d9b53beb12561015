"""Label Studio: its JSON and JSON-MIN. Its COCO, YOLO and VOC exports are read as those formats.

    [{"data": {"image": URL}, "annotations": [{"result": [{"value": {"x": %, "y": %, ..., "rectanglelabels": [...]}}]}]}, ...]
    rectangle   x, y, width, height in % of the photo; turned clockwise about its top left corner: its upright bounds count
    ellipse     its bounds
    polygon     its bounds and the outline
    brush       the bounds and px of the mask

Format: https://labelstud.io/guide/export and https://labelstud.io/guide/task_format. Of several annotations of a task one counts:
that which is marked as ground truth, else the one that was changed last; a note counts the boxes of the others. Cancelled
(skipped) annotations, drafts and predictions are not read. A region with several labels is a box for each.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from pbe_core.errors import InputError
from pipelines.annotations.brush import unpack_brush
from pipelines.annotations.per_photo import Box, PhotoBoxes, Unit, bounds, corners, only_label, open_photos, turned
from pipelines.annotations.photo_names import files_below
from pipelines.annotations.pixel_masks import box_of_pixels
from pipelines.annotations.source import PhotoPlaces, RowProblem, Source, as_number, photo_places, shown
from pipelines.annotations.yolo_files import PHOTO_SUFFIXES
from pipelines.config import BuildSettings

# What the server puts before the name of a file that was uploaded to it.
_UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")
_IMAGE_KEYS = ("image", "img", "photo", "picture", "url")
# Of JSON-MIN: not the work of an annotator on a region.
_ABOUT = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")

Region = Mapping[str, Any]
Task = dict[str, Any]


def open_source(settings: BuildSettings) -> Source:
    """Open Label Studio's JSON or JSON-MIN: the file, or a folder that holds no other JSON.

    Labels are names, and a hash divides photos. Those that were uploaded to its server are found below the photo folder by the
    server's name for them, or by their own.

    Raises:
        InputError: no such file, or not of these formats; a setting that it leaves without effect.
    """
    place = settings.source.annotations
    files = [place] if place.is_file() else sorted(place.glob("*.json"))
    if len(files) != 1:
        found = f"{len(files)} JSON files" if files else "no JSON file"
        raise InputError(f"{place}: {found} here; set build.source.annotations to the one that Label Studio exported")
    reader = _Reader(files[0], photo_places(settings))
    return open_photos(settings, reader.read, files, read_notes=reader.notes)


@dataclass
class _Reader:
    path: Path
    places: PhotoPlaces
    passed: Counter[str] = field(default_factory=Counter)
    """What was not read, of what was last read."""
    _brushes: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    """By row: edges and px of a mask, which take long to unpack."""
    _bases: set[str] | None = None

    def read(self) -> Iterator[PhotoBoxes]:
        """The photos of all tasks, in their order."""
        self.passed = Counter()
        row = 0
        for task in _tasks(self.path):
            name = _image_of(task)
            regions = self._regions(task)
            size = next(filter(None, map(_size, regions)), None)
            boxes = []
            for region in regions:
                for label in _labels(region):
                    row += 1
                    try:
                        box = self._box(region, size, row)
                    except RowProblem as problem:
                        box = Box(None, None, problem=problem)
                    boxes.append(Box(label, box.edges, row, box.unit, box.segmentation, problem=box.problem))
            yield PhotoBoxes(self._name(name), boxes, self.path.name, size=size)

    def notes(self) -> list[str]:
        """What a user should know about the tasks that were last read."""
        told = {
            "others": "boxes of other annotations of a task than the one that counts: {}",
            "cancelled": "annotations that were cancelled: {}; they are not read",
            "predicted": "tasks with predictions alone: {}; these are not read",
            "other": "regions that are no boxes (points, lines, texts): {}; they are not read",
        }
        return [text.format(f"{self.passed[what]:,}") for what, text in told.items() if self.passed[what]]

    def _regions(self, task: Task) -> list[Region]:
        """The regions of the annotation that counts, each once, with its labels."""
        lists = task.get("annotations", task.get("completions"))
        annotations = [one for one in lists if isinstance(one, dict)] if isinstance(lists, list) else []
        self.passed["predicted"] += not annotations and bool(task.get("predictions"))
        valid = [one for one in annotations if not one.get("was_cancelled")]
        self.passed["cancelled"] += len(annotations) - len(valid)
        ordered = sorted(valid, key=_importance)
        for other in ordered[:-1]:
            self.passed["others"] += sum(_is_box(region) for region in _merged(other.get("result")))
        regions = _merged(ordered[-1].get("result")) if ordered else []
        boxes = [region for region in regions if _is_box(region)]
        self.passed["other"] += len(regions) - len(boxes)
        return boxes

    def _box(self, region: Region, size: tuple[int, int] | None, row: int) -> Box:
        if as_number(region.get("image_rotation", 0)) not in (0, None):
            raise RowProblem(
                "bad_row", f"drawn on a photo that was turned in Label Studio by {shown(region['image_rotation'])} degrees"
            )
        value = region["value"]
        # In px where the size is known: angles are of px.
        scale = (size[0] / 100, size[1] / 100) if size else (0.01, 0.01)
        limits = (float(size[0]), float(size[1])) if size else (1.0, 1.0)
        unit: Unit = "pixel" if size else "fraction"
        if "rle" in value:
            edges, mask = self._brush(value["rle"], _size(region) or size, row)
            return Box(None, edges, segmentation=mask)
        if "points" in value:
            points = value["points"]
            if (
                not isinstance(points, list)
                or len(points) < 3
                or not all(isinstance(pair, list) and len(pair) == 2 for pair in points)
            ):
                raise RowProblem("bad_number", f"`points` are {shown(points)}, expected [x, y] of three or more")
            flat = _numbers({"points": [number for pair in points for number in pair]}, scale)
            return Box(None, (min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2])), 0, unit, [flat])
        degrees = as_number(value.get("rotation") or 0) or 0.0
        if degrees % 360 and not size:
            raise RowProblem("bad_row", "a turned region, of a photo whose original_width and original_height are missing")
        if "radiusX" in value:
            x, y, across, down = _numbers(value, (*scale, *scale), ("x", "y", "radiusX", "radiusY"))
            angle = np.radians(degrees)
            half_x = float(np.hypot(across * np.cos(angle), down * np.sin(angle)))
            half_y = float(np.hypot(across * np.sin(angle), down * np.cos(angle)))
            return Box(None, bounds([(x - half_x, y - half_y), (x + half_x, y + half_y)], *limits), unit=unit)
        x, y, width, height = _numbers(value, (*scale, *scale), ("x", "y", "width", "height"))
        if degrees % 360:
            return Box(None, bounds(turned(corners(x, y, x + width, y + height), (x, y), degrees), *limits))
        return Box(None, (x, y, x + width, y + height), unit=unit)

    def _brush(self, packed: Any, size: tuple[int, int] | None, row: int) -> tuple[Any, Any]:
        if row not in self._brushes:
            if size is None:
                raise RowProblem("bad_row", "a brush mask without original_width and original_height")
            try:
                mask = unpack_brush(packed, *size)
            except ValueError as error:
                raise RowProblem("bad_row", f"a brush mask {error}") from None
            self._brushes[row] = box_of_pixels(mask)
        return self._brushes[row]

    def _name(self, name: Any) -> Any:
        """What `PhotoNames` can read: of local storage the path, of an uploaded file its name, as it is there."""
        if not isinstance(name, str):
            return name
        parts = urlsplit(name)
        if parts.path.endswith("/local-files/") and (inside := parse_qs(parts.query).get("d")):
            return f"/{inside[0].lstrip('/')}" if self.places.here else inside[0]
        if "/upload/" not in parts.path:
            return name
        base = unquote(parts.path.rpartition("/")[2])
        own = _UPLOADED.fullmatch(base)
        if self.places.here and own and base not in self._there() and own[1] in self._there():
            base = own[1]
        return f"/{base}" if self.places.here else base

    def _there(self) -> set[str]:
        if self._bases is None:
            self._bases = {file.rpartition("/")[2] for root in self.places.roots if root.is_dir() for file in files_below(root)}
        return self._bases


# Tasks and regions.


def _tasks(path: Path) -> list[Task]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not JSON in UTF-8 that can be read, or cut off ({error}); export it again") from None
    if isinstance(content, dict) and {"images", "categories"} <= set(content):
        raise InputError(f"{path}: this is COCO's format; set source.kind: coco")
    if not isinstance(content, list) or not all(isinstance(task, dict) for task in content):
        raise InputError(f"{path}: expected a list of tasks; export JSON or JSON-MIN from Label Studio")
    return content if all("data" in task for task in content) else _of_min(content, path)


def _of_min(rows: Sequence[Task], path: Path) -> list[Task]:
    """Rows of JSON-MIN, one for each annotation, as tasks."""
    tasks: dict[str, Task] = {}
    for number, row in enumerate(rows):
        data = {key: value for key, value in row.items() if key not in _ABOUT and isinstance(value, str)}
        lists = [value for key, value in row.items() if key not in _ABOUT and isinstance(value, list)]
        result = [_as_result(value) for values in lists for value in values if isinstance(value, dict)]
        annotation = {"result": result, "updated_at": row.get("updated_at"), "id": row.get("annotation_id")}
        task = tasks.setdefault(str(row.get("id", f"row {number}")), {"data": data, "annotations": []})
        task["annotations"].append(annotation)
    if not any(_image_of(task) for task in tasks.values()):
        raise InputError(f"{path}: no task names an image; export JSON or JSON-MIN of a project of images from Label Studio")
    return list(tasks.values())


def _as_result(value: Mapping[str, Any]) -> Region:
    return {"value": value, "original_width": value.get("original_width"), "original_height": value.get("original_height")}


def _image_of(task: Task) -> Any:
    """The image of a task, among its data: called as the regions' `to_name`, or usually; else what ends as a photo does."""
    data = task["data"] if isinstance(task.get("data"), dict) else {}
    lists = task.get("annotations") or task.get("completions")
    results = [one.get("result") for one in lists if isinstance(one, dict)] if isinstance(lists, list) else []
    called = [
        region.get("to_name") for result in results if isinstance(result, list) for region in result if isinstance(region, dict)
    ]
    for key in (*called, *_IMAGE_KEYS):
        if isinstance(key, str) and isinstance(data.get(key), str):
            return data[key]
    texts = [value for value in data.values() if isinstance(value, str)]
    endings = tuple(PHOTO_SUFFIXES)
    return next((text for text in texts if urlsplit(text).path.casefold().endswith(endings)), None)


def _importance(annotation: Task) -> tuple[bool, str, float]:
    when = annotation.get("updated_at") or annotation.get("created_at")
    return bool(annotation.get("ground_truth")), str(when or ""), as_number(annotation.get("id")) or 0.0


def _merged(result: Any) -> list[Region]:
    """The regions of a result: what is said of one id in several entries (its shape, its label) is one region."""
    merged: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(result if isinstance(result, list) else []):
        if not isinstance(entry, dict) or not isinstance(entry.get("value"), dict):
            continue
        region = merged.setdefault(str(entry.get("id") or f"entry {number}"), {**entry, "value": {}})
        region["value"] = {**region["value"], **entry["value"]}
    return list(merged.values())


def _is_box(region: Region) -> bool:
    value = region["value"]
    kinds = " ".join(str(key) for key in (*value, region.get("type", "")))
    if "keypoint" in kinds or "vector" in kinds or value.get("closed") is False:
        return False
    return "rle" in value or "points" in value or ({"x", "y"} <= set(value) and bool({"width", "radiusX"} & set(value)))


def _labels(region: Region) -> list[str]:
    found = [value for key, value in region["value"].items() if key.endswith("labels") and isinstance(value, list)]
    names = [name.strip() for names in found for name in names if isinstance(name, str) and name.strip()]
    return list(dict.fromkeys(names)) or [only_label(None)]


def _size(region: Region) -> tuple[int, int] | None:
    sides = [as_number(region.get(f"original_{side}")) for side in ("width", "height")]
    whole = [round(side) for side in sides if side is not None and 0 < side < 2**31]
    return (whole[0], whole[1]) if len(whole) == 2 else None


def _numbers(value: Mapping[str, Any], scale: Sequence[float], names: Sequence[str] = ()) -> list[float]:
    """Percentages of a shape, or of its points (x, y, x, y, ...), each times its scale."""
    given = [value.get(name) for name in names] if names else value["points"]
    numbers = [as_number(number) for number in given]
    if None in numbers:
        wrong = numbers.index(None)
        raise RowProblem("bad_number", f"`{names[wrong] if names else 'points'}` is {shown(given[wrong])}, no finite number")
    return [float(number) * scale[place % len(scale)] for place, number in enumerate(numbers) if number is not None]
