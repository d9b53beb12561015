"""Photos in a local folder, or a photo store: found, read, decoded, turned. The only place that knows where a photo lies."""

import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError, decode_photo, file_error
from pipelines.config import BuildSettings, SourceSettings
from pipelines.photo_store import check_store, fetch_store, is_store, open_photo_store


def photo_path(root: Path, split: str, photo_id: str, file_name: str | None = None) -> Path:
    """Where a photo lies.

    Args:
        root: the photo folder.
        split: of the photo.
        photo_id: for photos that are named by it, as those of Open Images: <root>/<split>/<id>.jpg, or
            <root>/<split>_<first digit of the id>/<id>.jpg.
        file_name: below the root, or below the root's folder of the split, where the source names files.

    Raises:
        PhotoError: with code `missing`, if it is in none of its places; `unreadable`, if one of them cannot be looked at.
    """
    if file_name is not None:
        candidates = [root / file_name, root / split / file_name]
    else:
        candidates = [root / split / f"{photo_id}.jpg", root / f"{split}_{photo_id[0]}" / f"{photo_id}.jpg"]
    failure = PhotoError("missing", f"no file {candidates[0]} (nor {candidates[1]})")
    for path in candidates:
        # The annotation readers refuse names that lead out of the folder; so do we.
        if not path.is_relative_to(root) or ".." in path.relative_to(root).parts:
            continue
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return path
        except ValueError:  # A name that no file can have, with a zero byte in it.
            continue
        except OSError as error:
            of_file = file_error(error, path)
            if not isinstance(of_file, PhotoError):
                raise
            if of_file.code != "missing":  # It may still lie in the other place.
                failure = of_file
    raise failure


def read_photo_file(row: Mapping[str, Any], source: SourceSettings) -> bytes:
    """A photo's file as it is.

    Args:
        row: of the plan, or of another table: split, photo_id, file_name.
        source: where the photos are.

    Raises:
        PhotoError: it is not there or cannot be read; of a store, also if it could not be crawled, or is not what was crawled.
    """
    if source.photos_url or is_store(source.photos):
        store = open_photo_store(source.photos, source.photos_url, source.storage)
        return store.read(row["split"], row["photo_id"])
    path = photo_path(source.photos, row["split"], row["photo_id"], row["file_name"])
    try:
        return path.read_bytes()
    except OSError as error:
        raise file_error(error, path) from None


def read_photo(row: Mapping[str, Any], source: SourceSettings) -> tuple[UInt8[np.ndarray, "height width 3"], str]:
    """A photo's pixels (RGB, in the frame of its boxes, then turned by `rotation`) and the SHA-256 of its file.

    Args:
        row: of the plan, or a sample's record as a mapping: split, photo_id, file_name, rotation.
        source: where photos are, the boxes' frame, and the largest size that is decoded.

    Raises:
        PhotoError: it is missing, or cannot be read or decoded.
    """
    data = read_photo_file(row, source)
    photo = decode_photo(
        data, frame=source.photo_frame, max_pixels=source.max_photo_pixels, missing_end_mark=source.missing_end_mark
    )
    upright = np.ascontiguousarray(np.rot90(photo, (row["rotation"] or 0) // 90))
    return upright, hashlib.sha256(data).hexdigest()


def check_photos(settings: BuildSettings) -> None:
    """Look before any work whether there are photos at all.

    Raises:
        InputError: the folder, or a split's folder, is missing or empty, the store is of other photos, or is still to be made.
    """
    source, root = settings.source, settings.source.photos
    if source.photos_url:
        fetch_store(source.photos_url, source.storage, root)
    if is_store(root):
        check_store(root, source.photos_of)
        return
    if settings.crawl.sources:
        raise InputError(f"{root}: the photos are still to be crawled; run pipelines/crawl.py with these settings first")
    if source.kind != "open_images":
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; set build.source.photos to the one that holds the photos")
        if next(root.iterdir(), None) is None:
            raise InputError(f"{root}: this photo folder is empty; put the photos there, or set build.source.photos")
        return
    for split in source.splits:
        folders = [folder for folder in (root / split, *sorted(root.glob(f"{split}_?"))) if folder.is_dir()]
        if not folders:
            raise InputError(
                f"{root / split}: no such folder (nor {split}_0 to {split}_f beside it); "
                f"put the photos there as <ImageID>.jpg, or set build.source.photos"
            )
        if not any(next(folder.glob("*.jpg"), None) for folder in folders):
            raise InputError(
                f"{folders[0]}: this photo folder is empty (no .jpg in it); "
                f"put the photos there as <ImageID>.jpg, or set build.source.photos"
            )
