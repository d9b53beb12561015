"""What every way of getting a photo gives, and whether its bytes are the photo that was asked for. Pure."""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pbe_core.images.decode import EndMark, Frame, PhotoError, PhotoFacts, check_photo
from pbe_core.words import number_of
from schemas.outcomes import OUTCOMES


@dataclass(frozen=True)
class Fetched:
    """An answer that may be a photo; nobody has looked at its bytes yet."""

    data: bytes
    """Empty where `not_modified`."""
    url: str
    """Where it came from in the end: after redirects."""
    http_status: int | None = None
    """Of the last answer; null for what is not HTTP."""
    etag: str | None = None
    last_modified: str | None = None
    not_modified: bool = False
    """The server says that what we have is still what it has."""


def code_of_status(status: int) -> str:
    """The outcome that an HTTP status means, where it is no success."""
    codes = {401: "http_403", 403: "http_403", 404: "http_404", 410: "http_410", 429: "http_429", 451: "http_410"}
    return codes.get(status) or {4: "http_4xx", 5: "http_5xx"}.get(status // 100, "http_other")


class FetchError(Exception):
    """A photo that did not come. `code` is a key of `OUTCOMES`, and not `ok`."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        http_status: int | None = None,
        retry_after: float | None = None,
        given_up: bool = False,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.http_status = http_status
        self.retry_after = retry_after
        """Seconds after which the server may be asked again (Retry-After), where it says so."""
        self.given_up = given_up
        """The host is left for another run: asking again in this one gains nothing."""

    @property
    def transient(self) -> bool:
        """Whether asking again may help."""
        return OUTCOMES[self.code].transient


@dataclass(frozen=True)
class Inspected:
    """A photo that can be used."""

    facts: PhotoFacts
    sha256: str
    verified: bool
    """The metadata's MD5 vouches for it."""


@dataclass(frozen=True)
class Demands:
    """What a photo must be like."""

    frame: Frame
    max_pixels: int
    min_side: int
    placeholders: frozenset[str]
    """SHA-256 of pictures that say that a photo is gone."""
    missing_end_mark: EndMark = "accept"


def inspect(data: bytes, photo: Mapping[str, Any], original: bool, demands: Demands) -> Inspected:
    """Look at a photo's bytes, all of them.

    Args:
        data: as they came.
        photo: row of `WANTED`.
        original: whether these must be the very file that the metadata's OriginalSize and OriginalMD5 are of.
        demands: what is asked of every photo.

    Raises:
        FetchError: `not_an_image`, `unsupported_format`, `size_mismatch`, `hash_mismatch`, `too_many_pixels`, `no_end_mark`,
            `decode_error`, `too_small` or `placeholder`.
    """
    trouble = None
    try:
        facts = check_photo(data, frame=demands.frame, max_pixels=demands.max_pixels, missing_end_mark=demands.missing_end_mark)
    except PhotoError as error:
        trouble = FetchError(error.code, error.detail)
        if error.code in ("not_an_image", "unsupported_format"):  # An error page has another hash too; what it is tells more.
            raise trouble from None
    verified = original and _matches_original(data, photo)
    if trouble:
        raise trouble
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 in demands.placeholders and not verified:
        raise FetchError("placeholder", f"these bytes (SHA-256 {sha256[:12]}...) came for many other ids")
    if min(facts.width, facts.height) < demands.min_side:
        raise FetchError("too_small", f"{facts.width}x{facts.height} px, crawl.min_side is {demands.min_side}")
    return Inspected(facts, sha256, verified)


def _matches_original(data: bytes, photo: Mapping[str, Any]) -> bool:
    """Whether the metadata has an MD5 and it is that of these bytes; raises if it, or the size, is another's."""
    expected_bytes, expected_md5 = photo["original_bytes"], photo["original_md5"]
    if expected_bytes is not None and expected_bytes != len(data):
        raise FetchError("size_mismatch", f"{number_of(len(data), 'byte')}, the metadata say {expected_bytes:,}")
    if not expected_md5:
        return False
    md5 = hashlib.md5(data, usedforsecurity=False).digest()
    try:
        same = base64.b64decode(expected_md5, validate=True) == md5
    except binascii.Error:
        raise FetchError("hash_mismatch", f"the metadata's OriginalMD5 {expected_md5[:40]!r} is no base64") from None
    if not same:
        raise FetchError("hash_mismatch", f"MD5 {base64.b64encode(md5).decode()}, the metadata say {expected_md5}")
    return True
