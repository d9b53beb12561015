"""Annotation readers: a source's own files -> record batches of boxes and photos (`BOXES` and `PHOTOS` of schemas.tables)."""

from pathlib import Path

from pbe_core.errors import InputError
from pbe_core.photo_files import is_store
from pipelines.annotations.coco import open_coco
from pipelines.annotations.open_images import open_open_images
from pipelines.annotations.own_boxes import open_boxes
from pipelines.annotations.source import Source, refuse_unread
from pipelines.config import BuildSettings


def open_source(settings: BuildSettings) -> Source:
    """Open the annotations that a build's settings name: headers are checked, nothing large is read.

    Raises:
        InputError: a file is missing or is not what it should be, or a setting was given that nothing reads; names the file, the
            place and the fix.
    """
    refuse_unread(settings)
    opened = _open(settings)
    if settings.references.background == "grey" and opened.no_masks:
        raise InputError(f"build.references.background: grey takes object masks, and {opened.name} has none: {opened.no_masks}")
    return opened


def _open(settings: BuildSettings) -> Source:
    source, crawled = settings.source, settings.crawl.sources
    here = not (crawled or source.photos_url or is_store(source.photos))
    if source.kind == "coco":
        folders = [Path(text) for text in crawled if Path(text).is_dir()]
        return open_coco(source, settings.seed, [source.photos, *folders], bool(crawled) and not folders, here)
    if source.kind == "boxes":
        return open_boxes(source, settings.seed, here)
    return open_open_images(source)
