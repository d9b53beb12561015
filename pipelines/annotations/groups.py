"""Instances: which boxes show one and the same thing, and which photos must therefore be in one split.

    photo ── group ── photo ── another group ── photo        all of them are linked, and have one name that decides their split

A photo that shows two instances links them, as a reference's photo is linked to the photo that it is for: so no instance and no
photo is in two splits. Pure functions of names; the folder's own order does not matter.
"""

import os
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path

from pbe_core.randomness import name_hash

_PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2")


def split_names(links: Iterable[tuple[str, str | None, str | None]]) -> dict[str, str]:
    """The name by whose hash each linked photo is put into a split; other photos go by their own ids and are not in it.

    Args:
        links: photo, group and photo of a reference; the last two null where there is none.

    Returns:
        Photo -> 16 hex digits: of one group, a hash of its name, so that photos that come later change nothing; of several
        that are linked, the smallest of their hashes.
    """
    above: dict[str, str] = {}

    def root(node: str) -> str:
        while above.setdefault(node, node) != node:
            above[node] = above[above[node]]  # Shorter each time: nearly constant time (Tarjan & van Leeuwen 1984).
            node = above[node]
        return node

    photos: set[str] = set()
    for photo, group, other in links:
        ends = [f"group {group}"] * (group is not None) + [f"photo {other}"] * (other is not None)
        for end in ends:
            above[root(f"photo {photo}")] = root(end)
        photos.update([photo] * bool(ends), [other] if other is not None else [])
    names: dict[str, tuple[bool, str]] = {}
    for node in above:
        # A group counts before a photo.
        name = not node.startswith("group "), f"{name_hash('instance', node):016x}"
        names[root(node)] = min(names.get(root(node), name), name)
    return {photo: names[root(f"photo {photo}")][1] for photo in photos}


def folder_of(file_name: str) -> str:
    """The folder of a photo below the photo folder; empty for one that lies in none."""
    return posixpath.dirname(file_name)


def photos_below(folder: Path) -> Iterator[str]:
    """Paths of the photos in a folder and in folders below it, from there, by name; hidden ones are left out."""
    for place, folders, files in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        above = Path(place).relative_to(folder).as_posix()
        for name in sorted(files):
            if name.lower().endswith(_PHOTOS) and not name.startswith("."):
                yield posixpath.normpath(posixpath.join(above, name))
