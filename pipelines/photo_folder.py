"""Photos in a local folder: <root>/<split>/<photo id>.jpg, or split by the id's first digit as Open Images' archives are."""

from collections.abc import Iterable
from pathlib import Path

from schemas.errors import InputError
from schemas.photos import PhotoError


def photo_path(root: Path, split: str, photo_id: str) -> Path:
    """Where a photo lies.

    Raises:
        PhotoError: with code `missing`, if it is in neither place.
    """
    candidates = [root / split / f"{photo_id}.jpg", root / f"{split}_{photo_id[0]}" / f"{photo_id}.jpg"]
    for path in candidates:
        if path.is_file():
            return path
    raise PhotoError("missing", f"no file {candidates[0]} (nor under {candidates[1].parent})")


def check_photo_folder(root: Path, splits: Iterable[str]) -> None:
    """Look before any work whether there is a photo at all for each split.

    Raises:
        InputError: a split's folder is missing or holds no .jpg.
    """
    for split in splits:
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
