"""Files that browsers send: read within bounds, looked at before they are decoded, kept as they came.

body ──bytes counted──▶ file ──header──▶ pixels counted ──decode──▶ it is whole ──▶ kept
"""

import asyncio
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import unquote

import numpy as np
from aiohttp import web
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images.decode import MAX_PIXELS, PhotoError, check_photo, decode_photo, photo_size
from pbe_core.images.kinds import HEAD_BYTES, JPEG, kind_of
from pbe_core.words import number_of
from pbe_train.app.security import RefusedError
from pbe_train.app.sessions import Item, Kind, Session, Sessions
from pbe_train.editing.reading import read_mask, with_profile

UPLOAD_BYTES = 64 << 20
UPLOAD_PIXELS = MAX_PIXELS
SILENCE_SECONDS = 30.0
"""A body that brings nothing for so long is given up."""
LONGEST_SECONDS = 900.0
"""No body may take longer."""
UPLOADS_AT_ONCE = 4
"""Of one session."""
ALL_UPLOADS_AT_ONCE = 32
_WRITTEN_AT_ONCE = 1 << 20
_NAME_LENGTH = 80
_JPEG = {"quality": 95, "subsampling": 0}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# Decoding takes up to a gigabyte for a moment: two at once.
_threads = ThreadPoolExecutor(2, thread_name_prefix="decode")


@dataclass
class Photo(Item):
    """A photo or a reference as it was sent: `file` in its folder."""

    width: int = 0
    """As EXIF turns it."""
    height: int = 0


@dataclass
class Mask(Item):
    """A mask as a PNG of 8 bits, 255 = repaint: `mask.png` in its folder."""

    width: int = 0
    height: int = 0
    share: float = 0.0
    """Of its pixels that are repainted."""


async def in_thread(function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
    """Blocking work, of which little runs at once."""
    return await asyncio.get_running_loop().run_in_executor(_threads, lambda: function(*arguments, **named))


async def receive(request: web.Request, session: Session, sessions: Sessions, item: Item) -> Path:
    """Write a request's body to a file `file` in an item's folder.

    Raises:
        RefusedError: it is too long, or nothing comes, or others of this session are on their way.
    """
    if (request.content_length or 0) > UPLOAD_BYTES:
        raise too_long()
    path = item.folder / "file"
    deadline = asyncio.get_running_loop().time() + LONGEST_SECONDS
    with path.open("wb") as file:
        pending, chunk = bytearray(), b"more"
        while chunk:
            try:
                async with asyncio.timeout(SILENCE_SECONDS), asyncio.timeout_at(deadline):
                    chunk = await request.content.readany()
            except TimeoutError:
                raise RefusedError(408, "the file came too slowly; send it again, or a smaller one") from None
            pending += chunk
            if item.bytes + len(pending) > UPLOAD_BYTES:
                raise too_long()
            if len(pending) >= _WRITTEN_AT_ONCE or not chunk:
                sessions.make_room(session, len(pending))
                sessions.resize(session, item, item.bytes + len(pending))
                await asyncio.to_thread(file.write, bytes(pending))
                pending.clear()
    return path


async def read_body(request: web.Request) -> bytes:
    """A body that is no file, of at most the bytes that the server takes of such.

    Raises:
        RefusedError: it comes too slowly.
    """
    try:
        async with asyncio.timeout(SILENCE_SECONDS):
            return await request.read()
    except TimeoutError:
        raise RefusedError(408, "the request came too slowly; send it again") from None


async def read_json(request: web.Request) -> Any:
    """What a body that is no file says as JSON; null where it is none, whatever it is instead.

    Raises:
        RefusedError: it comes too slowly.
    """
    try:
        return json.loads(await read_body(request))
    except (ValueError, RecursionError):
        return None


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name, so that it is there when the first one is not any more."""
    try:
        os.link(source, target)
    except OSError:  # Not all file systems can.
        shutil.copyfile(source, target)


def too_long() -> RefusedError:
    """The refusal of too many bytes."""
    return RefusedError(413, f"the file has more than {UPLOAD_BYTES >> 20} MB; send a smaller one")


async def add_photo(request: web.Request, session: Session, sessions: Sessions) -> Photo:
    """Keep the photo of a request's body.

    Raises:
        RefusedError, InputError: it is too large, or no photo that can be read.
    """
    name = shown_name(request.headers.get("X-Name", ""), "photo")
    with _uploading(session, sessions, Photo) as photo:
        photo.name = name
        path = await receive(request, session, sessions, photo)
        photo.width, photo.height = await in_thread(check_file, path, name)
        return photo


async def add_mask(request: web.Request, session: Session, sessions: Sessions, photo: Photo | None) -> Mask:
    """Keep the mask of a request's body.

    Raises:
        RefusedError, InputError: it is too large, leaves in doubt what is meant, or does not fit the photo.
    """
    name = shown_name(request.headers.get("X-Name", ""), "the mask")
    with _uploading(session, sessions, Mask) as mask:
        path = await receive(request, session, sessions, mask)
        mask.width, mask.height, mask.share = await in_thread(_rewrite_mask, path, name, photo)
        sessions.resize(session, mask, (mask.folder / "mask.png").stat().st_size)
        return mask


@contextmanager
def _uploading(session: Session, sessions: Sessions, kind: type[Kind]) -> Iterator[Kind]:
    """An item that is busy within the block, and gone if the block fails."""
    if sum(each.uploads for each in sessions.all.values()) >= ALL_UPLOADS_AT_ONCE:
        raise RefusedError(429, "too many files are on their way; try again in a minute")
    if session.uploads >= UPLOADS_AT_ONCE:
        raise RefusedError(429, f"{number_of(UPLOADS_AT_ONCE, 'file')} are on their way already; wait for one")
    item = sessions.add(session, kind)
    session.uploads += 1
    try:
        yield item
    except BaseException:
        sessions.drop(session, item)
        raise
    finally:
        session.uploads -= 1
        item.release()


def shown_name(header: str, otherwise: str) -> str:
    """A file's name as people see it, without its folders and whatever is no printable character."""
    name = re.split(r"[/\\]", unquote(header, errors="replace"))[-1]
    return "".join(character for character in name if character.isprintable()).strip()[-_NAME_LENGTH:] or otherwise


def check_file(path: Path, name: str) -> tuple[int, int]:
    """Width and height of a photo, upright, after it was decoded once.

    Raises:
        InputError: it is too large or cannot be read.
    """
    data = path.read_bytes()
    try:
        size = photo_size(data, frame="exif", max_pixels=UPLOAD_PIXELS)
        check_photo(data, frame="exif", max_pixels=UPLOAD_PIXELS)
    except PhotoError as error:
        raise InputError(f"{name}: not a readable photo ({error}); give another one") from None
    return size


def shown_photo(path: Path, most: int | None) -> tuple[bytes, str]:
    """A photo as browsers show it, upright and with its colour profile, and its media type: JPEG of JPEG, else PNG.

    Args:
        path: of the file.
        most: px of its longer side; by default its own size.
    """
    data = path.read_bytes()
    made = with_profile(decode_photo(data, frame="exif", max_pixels=UPLOAD_PIXELS), path)
    profile = made.info.get("icc_profile")
    if most and max(made.size) > most:
        made.thumbnail((most, most))
    out = io.BytesIO()
    if kind_of(data[:HEAD_BYTES]) == JPEG:
        made.save(out, "JPEG", icc_profile=profile, **_JPEG)
        return out.getvalue(), "image/jpeg"
    made.save(out, "PNG", icc_profile=profile, compress_level=1)
    return out.getvalue(), "image/png"


def _rewrite_mask(path: Path, name: str, photo: Photo | None) -> tuple[int, int, float]:
    try:
        photo_size(path, frame="exif", max_pixels=UPLOAD_PIXELS)
        mask = read_mask(path)
    except PhotoError as error:
        raise InputError(f"{name}: not a readable picture ({error}); give another mask") from None
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from None
    height, width = mask.shape
    if photo and (photo.width, photo.height) != (width, height):
        raise InputError(
            f"{name}: the mask is {width}x{height} px, the photo {photo.name} is {photo.width}x{photo.height} px; draw the mask "
            "at the photo's size"
        )
    if not mask.any():
        raise InputError(f"{name}: the mask is empty; paint the region to be edited white")
    Image.fromarray(mask.astype(np.uint8) * 255).save(path.with_name("mask.png"), compress_level=1)
    path.unlink()
    return width, height, round(float(mask.mean()), 6)


def small_picture(path: Path, most: int) -> bytes:
    """A PNG of ours with a longer side of `most` px, or less where it has less."""
    with Image.open(path) as image:
        profile = image.info.get("icc_profile")
        image.thumbnail((most, most))
        out = io.BytesIO()
        image.save(out, "PNG", icc_profile=profile, compress_level=1)
    return out.getvalue()
