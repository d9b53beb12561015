"""Annotation readers: a source's own files -> record batches of boxes and photos (`BOXES` and `PHOTOS` of schemas.tables)."""

from pathlib import Path

from pipelines.annotations.coco import open_coco
from pipelines.annotations.open_images import open_open_images
from pipelines.annotations.own_boxes import check_sizes, open_boxes
from pipelines.annotations.source import Source, refuse_unread
from pipelines.config import BuildSettings
from pipelines.photos import is_store


def open_source(settings: BuildSettings) -> Source:
    """Open the annotations that a build's settings name: headers are checked, nothing large is read.

    Raises:
        InputError: a file is missing or is not what it should be, or a setting was given that nothing reads; names the file, the
            place and the fix.
    """
    refuse_unread(settings)
    here = not (settings.crawl.sources or settings.source.photos_url or is_store(settings.source.photos))
    if settings.source.kind == "coco":
        folders = [Path(text) for text in settings.crawl.sources if Path(text).is_dir()]
        elsewhere = len(folders) < len(settings.crawl.sources)
        return open_coco(settings.source, settings.seed, [settings.source.photos, *folders], elsewhere and not folders, here)
    if settings.source.kind == "boxes":
        if settings.crawl.sources or is_store(settings.source.photos):
            check_sizes(settings.source)
        return open_boxes(settings.source, settings.seed, here)
    return open_open_images(settings.source)
