"""A reader of one's own: LabelMe's JSON files, one for each photo. Copy it, and change what reads your files.

    PBE_READERS=examples/own_source.py .venv/bin/python pipelines/plan.py --source.kind labelme --source.annotations FOLDER ...

It yields every photo with all its boxes. Names of photos, ids, splits, sizes in px, object masks and the books are the project's
work; what cannot be read is a box with a `problem`, so that it is counted (docs/own-data.md#a-reader-of-your-own).
"""

import json
from collections.abc import Iterator
from typing import Any

from pipelines.annotations.per_photo import Box, PhotoBoxes, open_photos
from pipelines.annotations.source import RowProblem, Source
from pipelines.config import BuildSettings
from pipelines.readers import Reader


def open_labelme(settings: BuildSettings) -> Source:
    """Open a folder of LabelMe's files."""
    folder = settings.source.annotations
    files = sorted(folder.rglob("*.json"))

    def read() -> Iterator[PhotoBoxes]:
        for path in files:
            name = path.relative_to(folder).as_posix()
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                boxes = [box_of(shape, row) for row, shape in enumerate(content["shapes"], start=1)]
                photo = f"{path.parent.relative_to(folder).as_posix()}/{content['imagePath']}"
                yield PhotoBoxes(photo, boxes, name, size=(content["imageWidth"], content["imageHeight"]))
            except (ValueError, KeyError, TypeError) as error:
                broken = Box(None, None, problem=RowProblem("bad_row", f"no file of LabelMe ({error!r})"))
                yield PhotoBoxes(f"{path.stem}.jpg", [broken], name)

    return open_photos(settings, read, many_files=lambda: ((path.relative_to(folder).as_posix(), path) for path in files))


def box_of(shape: dict[str, Any], row: int) -> Box:
    """A rectangle (two corners) or a polygon; its points are [x, y] in px."""
    xs, ys = [float(x) for x, _ in shape["points"]], [float(y) for _, y in shape["points"]]
    outline = [[value for point in shape["points"] for value in point]] if shape["shape_type"] == "polygon" else None
    if shape["shape_type"] not in ("rectangle", "polygon"):
        return Box(shape["label"], None, row, problem=RowProblem("bad_row", f"a {shape['shape_type']} is no box"))
    return Box(shape["label"], (min(xs), min(ys), max(xs), max(ys)), row, segmentation=outline)


READER = Reader(kind="labelme", open=open_labelme, masks=True)
