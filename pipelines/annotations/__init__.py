"""Annotation readers: a source's own files -> record batches of boxes and photos (`BOXES` and `PHOTOS` of schemas.tables)."""

from pipelines.annotations.boxes import open_boxes
from pipelines.annotations.coco import open_coco
from pipelines.annotations.open_images import open_open_images
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings


def open_source(settings: BuildSettings) -> Source:
    """Open the annotations that a build's settings name: headers are checked, nothing large is read.

    Raises:
        InputError: a file is missing or is not what it should be; names the file, the place and the fix.
    """
    if settings.source.kind == "coco":
        return open_coco(settings.source, settings.seed)
    if settings.source.kind == "boxes":
        return open_boxes(settings.source, settings.seed)
    return open_open_images(settings.source)
