"""Settings that were given and that nothing would read: a person who gives one expects that it does something.

A value that differs from its default was given, by a config file or on the command line. (pydantic's `model_fields_set` does not
tell: pydantic-settings fills in the whole group where the command line names one of its keys.) The readers refuse what only the
annotations tell: COCO files with splits of their own, a column `split`, a column `Rotation`.
"""

from collections.abc import Iterator

from pydantic import BaseModel

from pbe_core.errors import InputError
from pipelines.config import BuildSettings


def refuse_unread(settings: BuildSettings) -> None:
    """Make sure that every setting that was given is read.

    Raises:
        InputError: names the first one that is not, why, and the way out.
    """
    for message in _unread(settings):
        raise InputError(message)


def flags_that_nobody_sets(settings: BuildSettings) -> list[str]:
    """Of `selection.reject_flags`, where they were given, those that boxes of this kind never have: nothing is rejected by them.

    They are no error: a preset for one kind of source is used with another one.
    """
    known = {"open_images": settings.selection.reject_flags, "coco": ("group_of",), "boxes": ()}[settings.source.kind]
    if "reject_flags" not in given(settings.selection):
        return []
    return [flag for flag in settings.selection.reject_flags if flag not in known]


def splits_are_their_own(name: str) -> InputError:
    """What to tell a person who gave `source.validation_share` for annotations that have splits of their own."""
    return InputError(
        f"build.source.validation_share: {name} has splits of its own, so no hash of the photos makes a validation split; leave "
        f"the setting out"
    )


def given(group: BaseModel) -> list[str]:
    """The names of the settings of a group that differ from their defaults."""
    fields = type(group).model_fields
    return [name for name, field in fields.items() if getattr(group, name) != field.get_default(call_default_factory=True)]


def _unread(settings: BuildSettings) -> Iterator[str]:
    source, crawl = settings.source, settings.crawl
    if source.kind == "open_images" and "validation_share" in given(source):
        raise splits_are_their_own("open_images")
    if source.storage and not source.photos_url:
        yield (
            f"build.source.storage: it is for a photo store behind a URL, and source.photos is {source.photos}; leave it out, or "
            f"give the URL (options for what is crawled belong into build.crawl.storage)"
        )
    if settings.storage and not settings.upload:
        yield "build.storage: it is for a dataset behind a URL, and there is none; leave it out, or give the URL as --out"
    if settings.references.background == "grey" and source.kind != "coco":
        yield (
            f"build.references.background: grey takes outlines of objects, and {source.kind} has none (coco has); leave it out"
        )
    if not crawl.sources and given(crawl):
        yield (
            f"build.crawl.{given(crawl)[0]}: nothing is crawled, as build.crawl.sources does not say where photos are "
            f"(docs/crawling.md); give it, or leave the setting out"
        )
