"""Annotation readers: a source's own files -> record batches of boxes and photos (`BOXES` and `PHOTOS` of schemas.tables).

Which there are, and what is known of each: `pipelines.readers`.
"""

from dataclasses import replace

from pbe_core.errors import InputError
from pipelines.annotations.source import Source, refuse_no_groups, refuse_unread
from pipelines.config import BuildSettings
from pipelines.readers import reader_of


def open_source(settings: BuildSettings) -> Source:
    """Open the annotations that a build's settings name: headers are checked, nothing large is read.

    Raises:
        InputError: a file is missing or is not what it should be, or a setting was given that nothing reads; names the file, the
            place and the fix.
    """
    refuse_unread(settings)
    reader = reader_of(settings.source.kind)
    source: Source = reader.open(settings)
    refuse_no_groups(source, settings)
    if settings.references.background == "grey" and source.no_masks:
        raise InputError(f"build.references.background: grey takes object masks, and {source.name} has none: {source.no_masks}")
    # What an own reader makes of the files depends on its code.
    return replace(source, files=(*source.files, reader.file)) if reader.file else source
