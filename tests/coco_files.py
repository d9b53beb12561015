"""Small files of COCO's format, and what a reader makes of its source."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.annotations.coco import open_coco
from pipelines.annotations.source import Source
from pipelines.config import SourceSettings
from schemas.tables import BOXES, PHOTOS

CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 3, "name": "car", "supercategory": "vehicle"},
    {"id": 6, "name": "bus", "supercategory": "vehicle"},
]


def image(number: Any, **changes: Any) -> dict[str, Any]:
    """Without what is `...`."""
    entry = {"id": number, "file_name": f"{number:0>12}.jpg", "width": 40, "height": 20, **changes}
    return {key: value for key, value in entry.items() if value is not ...}


def annotation(number: Any, **changes: Any) -> dict[str, Any]:
    """Without what is `...`."""
    entry = {"id": number, "image_id": 7, "category_id": 3, "bbox": [4, 5, 20, 10], "iscrowd": 0, **changes}
    return {key: value for key, value in entry.items() if value is not ...}


def write(path: Path, annotations: Any, images: list[Any] | None = None, categories: Any = CATEGORIES, **more: Any) -> Path:
    document = {"images": [image(7)] if images is None else images, "annotations": annotations, "categories": categories, **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))
    return path


def opened(path: Path, photos: Path = Path("/no/photos"), seed: int = 0, **settings: Any) -> Source:
    return open_coco(SourceSettings(kind="coco", annotations=path, photos=photos, **settings), seed)


def boxes_of(source: Source) -> list[dict[str, Any]]:
    return pa.Table.from_batches(source.read_boxes(), schema=BOXES).to_pylist()


def photos_of(source: Source) -> list[dict[str, Any]]:
    return pa.Table.from_batches(source.read_photos(), schema=PHOTOS).to_pylist()
