"""Kinds of annotations: one `Reader` each, by the word that `source.kind` says. All that differs between kinds is asked of it.

    source.kind: yolo  ──reader_of──▶  Reader: masks, flags, splits, frame ...  ──open──▶  Source (pipelines.annotations.source)

A reader of one's own is a Python file with a `READER` (examples/own_source.py, docs/own-data.md). It is code, so neither a config
nor a dataset can name it: the environment variable PBE_READERS does, which only the person sets who runs the program.

Built-in readers are named by their modules and imported when they are opened: they import the settings, and those this module.
"""

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe_core.errors import InputError
from pbe_core.images.decode import Frame

OWN = "PBE_READERS"
ALL_FLAGS = ("occluded", "truncated", "group_of", "depiction", "inside")
# All boxable photos of Open Images as published at 1024 px: the card of https://huggingface.co/datasets/vikhyatk/openimages-bbox
OPEN_IMAGES_BYTES_PER_PHOTO = 597_325_671_307 / 1_892_542


@dataclass(frozen=True)
class Reader:
    """A kind of annotations, and what is known of all that are of this kind."""

    kind: str
    """The word for it in `source.kind`: lower-case letters, digits and `_`."""
    open: Callable[[Any], Any]
    """`BuildSettings` -> `Source`. It checks what can be checked without reading all; raises `InputError`."""
    frame: Frame = "exif"
    """Frame of the boxes where `source.frame` is not given: photos as viewers show them, or their pixels as `stored`."""
    masks: bool = False
    """Whether there may be object masks: else `references.background: grey` is refused. Of some files there are none all the
    same, as `Source.no_masks` says."""
    flags: tuple[str, ...] = ()
    """Flags (of `selection.reject_flags`) that boxes may have; the others are unknown of all of them."""
    own_splits: bool = False
    """Whether each photo has a split of its own, always: `source.validation_share` is refused then. A reader that finds out by
    the files refuses it itself (`splits_are_their_own`)."""
    takes_unit: bool = False
    """Whether `source.unit` must say what coordinates are; else it is refused."""
    takes_group_by: bool = False
    """Whether `source.group_by` says how boxes of one instance are told; else it is refused."""
    annotation_ids: bool = False
    """Whether the files are COCO's, with an `id` of each annotation, by which `pbe benchmark` may name boxes."""
    photos_by_id: bool = False
    """Whether photos go by their ids, <split>/<id>.jpg, and an id means the same photo in all annotations of this kind."""
    hierarchy_file: str = ""
    """Where a class hierarchy would be, for a note where there is none; empty where nobody expects one."""
    bytes_per_photo: float | None = None
    """Of a photo that is still to be fetched, on average; null where nobody knows."""
    file: Path | None = None
    """Of a reader of one's own: its source, whose hash is a part of a build's fingerprint."""


def reader_of(kind: str) -> Reader:
    """The reader of a kind: one of the project's, or one of those files that PBE_READERS names.

    Raises:
        InputError: there is none, or a file of PBE_READERS has none; with the way out.
    """
    if kind in READERS:
        return READERS[kind]
    own = own_readers()
    if kind in own:
        return own[kind]
    names = ", ".join([*READERS, *own])
    raise InputError(
        f"{kind[:40]!r} is none of {names}; a reader of your own is named by {OWN} (docs/own-data.md#a-reader-of-your-own)"
    )


def own_readers() -> dict[str, Reader]:
    """Readers of the Python files that the environment variable PBE_READERS names, divided as in PATH (`:`), by their kinds.

    Raises:
        InputError: a file is missing, fails, or has no `READER` with a kind of its own.
    """
    own: dict[str, Reader] = {}
    for text in filter(None, os.environ.get(OWN, "").split(os.pathsep)):
        reader = _load(Path(text).resolve())
        if reader.kind in own or reader.kind in READERS:
            raise InputError(f"{OWN}: {text}: there is another reader of the kind {reader.kind}; give this one another name")
        own[reader.kind] = reader
    return own


@functools.cache
def _load(path: Path) -> Reader:
    """Run a file and take its `READER`."""
    if not path.is_file() or path.suffix != ".py":
        raise InputError(f"{OWN}: {path}: no such Python file; it names files of readers, divided by {os.pathsep!r}")
    spec = importlib.util.spec_from_file_location(f"own_reader_{path.stem}", path)
    module = importlib.util.module_from_spec(spec) if spec else None
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr, arg-type]
    except Exception as error:
        raise InputError(f"{OWN}: {path}: it cannot be imported ({type(error).__name__}: {error})".replace("\n", " ")) from error
    reader = getattr(module, "READER", None)
    if not isinstance(reader, Reader) or not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", reader.kind):
        raise InputError(f"{OWN}: {path}: expected READER = Reader(kind=..., open=...), the kind in lower-case letters")
    return Reader(**{**reader.__dict__, "file": path})


def _in(module: str) -> Callable[[Any], Any]:
    """`open_source` of a module of pipelines.annotations."""

    def open_source(settings: Any) -> Any:
        return importlib.import_module(f"pipelines.annotations.{module}").open_source(settings)

    return open_source


READERS = {
    reader.kind: reader
    for reader in (
        Reader(
            "open_images",
            _in("open_images"),
            frame="stored",
            masks=True,
            flags=ALL_FLAGS,
            own_splits=True,
            photos_by_id=True,
            hierarchy_file="bbox_labels_600_hierarchy.json belongs beside the annotations; "
            "docs/selection.md#files-of-open-images",
            bytes_per_photo=OPEN_IMAGES_BYTES_PER_PHOTO,
        ),
        # Annotators of Open Images and COCO saw the pixels as stored, whatever a photo's EXIF says.
        Reader("coco", _in("coco"), frame="stored", masks=True, flags=("group_of",), annotation_ids=True),
        Reader("boxes", _in("own_boxes"), masks=True, takes_unit=True, takes_group_by=True),
        Reader("yolo", _in("yolo"), masks=True),
        Reader("voc", _in("voc"), masks=True, flags=("occluded", "truncated")),
        Reader("label_studio", _in("label_studio"), masks=True),
        Reader("cvat", _in("cvat"), masks=True, flags=("occluded",)),
        Reader("coco_panoptic", _in("coco_panoptic"), frame="stored", masks=True, flags=("group_of",)),
    )
}
