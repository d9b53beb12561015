"""One wanted photo: asked for at each source in order, again where that may help, and looked at. Its outcome is a row, no error.

for each source:  ask ──▶ bytes ──▶ inspect ──▶ ok, with the bytes to store
                   ▲ │                 │
                   │ └─────▶ a code ◀──┘
                   │            │
                   └── wait ◀── may pass, else the next source
"""

import asyncio
import contextlib
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pbe_core.images.decode import PhotoError
from pbe_core.photo_files import photo_path
from pipelines.config import CrawlSettings
from pipelines.crawling.answers import Demands, Fetched, FetchError, inspect
from pipelines.crawling.buckets import ObjectStores
from pipelines.crawling.hosts import HostLimits
from pipelines.crawling.wanted import PhotoSource
from pipelines.crawling.web import WebClient
from schemas.outcomes import OK, OUTCOMES
from schemas.tables import PHOTO_INDEX, STORED_PHOTOS

_LONGEST_DETAIL = 1000
# By these a source takes a photo back.
_GONE = ("http_404", "http_410", "opted_out", "missing")
BACKOFF_SECONDS = 1.0
"""Longest wait before the second attempt, doubled before each further one; a random share of it is waited."""
_LONGEST_WAIT = 60.0
_PLACE = [name for name in PHOTO_INDEX.names if name not in ("key", "split", "photo_id", "url", "source", "http_status")]


@dataclass(frozen=True)
class PhotoResult:
    """What became of a wanted photo."""

    row: dict[str, Any]
    """Of `STORED_PHOTOS`; without a place where there are bytes to be stored."""
    data: bytes | None = None
    """To be stored; none where it failed, lies elsewhere, or is stored already."""
    extension: str = ""


class Fetcher:
    """Gets photos, for one process; an async context manager. Opens no connection before the first photo that needs one.

    `settings.per_host` are the limits of this process.
    """

    def __init__(self, sources: Sequence[PhotoSource], settings: CrawlSettings, demands: Demands) -> None:
        self.sources = sources
        self.settings = settings
        self.demands = demands
        self.limits = HostLimits(settings.per_host, settings.connections)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="inspect")
        self.closing = contextlib.AsyncExitStack()
        self.web: WebClient | None = None
        self.buckets: ObjectStores | None = None

    async def __aenter__(self) -> "Fetcher":
        kinds = {source.kind for source in self.sources}
        if "web" in kinds:
            self.web = await self.closing.enter_async_context(WebClient(self.settings, self.limits))
        if "bucket" in kinds:
            self.buckets = ObjectStores(self.settings)
            self.closing.push_async_callback(self.buckets.close)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.closing.aclose()
        self.pool.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, photo: Mapping[str, Any]) -> PhotoResult:
        """What becomes of a wanted photo, a row of `WANTED`. Raises nothing but `CancelledError` and `MemoryError`."""
        failures: list[tuple[PhotoSource, str | None, FetchError]] = []
        attempts = 0
        for source in self.sources[photo["skip"] or 0 :]:
            url, failure = None, None
            try:
                url = source.url_of(photo) if source.kind in ("web", "bucket") else None
                for number in range(self.settings.attempts):
                    if number:
                        # A host's Retry-After is kept by `HostLimits`, for all photos of that host.
                        await asyncio.sleep(random.uniform(0, min(BACKOFF_SECONDS * 2.0 ** (number - 1), _LONGEST_WAIT)))
                    attempts += 1
                    try:
                        return await self._ask(source, url, photo, attempts)
                    except FetchError as error:
                        failure = _alone(error)
                    if not failure.transient or failure.given_up:
                        break
            except FetchError as error:
                failure = error
            except MemoryError:
                raise
            except Exception as error:  # One photo must never end a run; what nobody foresaw is at least recorded.
                failure = FetchError("unexpected", f"{type(error).__name__}: {error}"[:_LONGEST_DETAIL])
            assert failure
            failures.append((source, url, failure))
            if failure.code == "opted_out":  # Whoever says no at one place says no to copies, too.
                break
        return self._failed(photo, failures, attempts)

    async def _ask(self, source: PhotoSource, url: str | None, photo: Mapping[str, Any], attempts: int) -> PhotoResult:
        before = photo["before"]
        original = source.original and self.settings.check_originals
        file, offset = None, 0
        if source.kind in ("folder", "tars"):
            file, offset, length = self._find(source, photo)
            async with self.limits.slot():
                data = await asyncio.get_running_loop().run_in_executor(
                    self.pool, _read_range, file, offset, length, self.settings.max_bytes
                )
            fetched = Fetched(data, url="")
        else:
            fetched = await self._download(source, str(url), photo, original)
        if fetched.not_modified:
            return self._kept(photo, attempts, fetched)
        with self.limits.inspecting():
            try:
                found = await asyncio.get_running_loop().run_in_executor(
                    self.pool, inspect, fetched.data, photo, original, self.demands
                )
            except FetchError as error:
                error.http_status = fetched.http_status
                raise
        if before and file is None and found.sha256 == before["sha256"]:
            return self._kept(photo, attempts, fetched)
        row = self._row(photo, source.text, OK, attempts, fetched.url or None, fetched.http_status)
        row |= {
            "sha256": found.sha256,
            "width": found.facts.width,
            "height": found.facts.height,
            "exif_orientation": found.facts.exif_orientation,
            "verified": found.verified,
            "fetched_at": row["asked_at"],
            "etag": fetched.etag,
            "last_modified": fetched.last_modified,
        }
        if file is not None:
            return PhotoResult(row | {"file": str(file), "offset": offset, "length": len(fetched.data)})
        return PhotoResult(row, fetched.data, found.facts.format)

    async def _download(self, source: PhotoSource, url: str, photo: Mapping[str, Any], original: bool) -> Fetched:
        expected = photo["original_bytes"] if original else None
        if source.kind == "bucket":
            assert self.buckets is not None
            async with self.limits.slot():
                return await self.buckets.fetch(url, expected_bytes=expected)
        assert self.web is not None
        before = photo["before"]
        # An ETag means something at the place that gave it only.
        known = before if before and before["source"] == source.text else {}
        return await self.web.fetch(
            url, expected_bytes=expected, etag=known.get("etag"), last_modified=known.get("last_modified")
        )

    def _find(self, source: PhotoSource, photo: Mapping[str, Any]) -> tuple[Path, int, int | None]:
        """File, offset and length (null: to its end) of a photo that lies here."""
        if source.kind == "tars":
            if photo["tar"] is None:
                raise FetchError("missing", f"not in {source.text}")
            return Path(photo["tar"]), photo["tar_offset"], photo["tar_length"]
        try:
            return photo_path(source.paths[0], photo["split"], photo["photo_id"], photo["file_name"]), 0, None
        except PhotoError as error:
            raise FetchError("missing", error.detail) from None

    def _kept(self, photo: Mapping[str, Any], attempts: int, fetched: Fetched) -> PhotoResult:
        """It was asked for again, and is what we have."""
        before = photo["before"]
        row = self._row(photo, before["source"], OK, attempts, fetched.url or before["url"], fetched.http_status)
        kept = {name: before[name] for name in _PLACE}
        validators = {"etag": fetched.etag or before["etag"], "last_modified": fetched.last_modified or before["last_modified"]}
        return PhotoResult(row | kept | validators)

    def _failed(
        self, photo: Mapping[str, Any], failures: Sequence[tuple[PhotoSource, str | None, FetchError]], attempts: int
    ) -> PhotoResult:
        """Recorded is the failure that may pass, if there is one, else by the last source for which the tables give a URL."""
        candidates = [failed for failed in failures if failed[2].code != "bad_url"] or failures
        candidates = candidates[-1:] if candidates[-1][2].code == "opted_out" else candidates
        source, url, failure = next((failed for failed in reversed(candidates) if failed[2].transient), candidates[-1])
        several = len(failures) > 1
        detail = "; ".join(f"{other.text}: {error}" if several else error.detail for other, _, error in failures)[
            :_LONGEST_DETAIL
        ]
        row = self._row(photo, source.text, failure.code, attempts, url, failure.http_status) | {"detail": detail}
        before = photo["before"]
        if before and before["sha256"] in self.demands.placeholders and not before["verified"]:
            # No source has anything else; the placeholder stays where it is.
            return PhotoResult(row | {"code": "placeholder", "transient": False} | {name: before[name] for name in _PLACE})
        if before and failure.code not in _GONE:  # What we have is not lost because a server is down, or asks for a login, today.
            return PhotoResult(
                row | {"code": OK, "transient": False} | {name: before[name] for name in (*_PLACE, "source", "url")}
            )
        return PhotoResult(row)

    @staticmethod
    def _row(
        photo: Mapping[str, Any], source: str, code: str, attempts: int, url: str | None, http_status: int | None
    ) -> dict[str, Any]:
        return dict.fromkeys(STORED_PHOTOS.names) | {
            "key": photo["key"],
            "split": photo["split"],
            "photo_id": photo["photo_id"],
            "code": code,
            "transient": OUTCOMES[code].transient,
            "attempts": attempts,
            "asked_at": datetime.now(UTC).replace(microsecond=0),
            "source": source,
            "url": url,
            "http_status": http_status,
        }


def _alone(error: FetchError) -> FetchError:
    """The error without its traceback, which would hold the photo's bytes until memory is next collected."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _read_range(file: Path, offset: int, length: int | None, max_bytes: int) -> bytes:
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            data = opened.read(max_bytes + 1 if length is None else min(length, max_bytes + 1))
    except FileNotFoundError as error:  # Any other error is the machine's, and may pass.
        raise FetchError("missing", f"{file}: {error.strerror}") from None
    if len(data) > max_bytes:
        raise FetchError("too_large", f"{file}: more than {max_bytes:,} bytes")
    if length is not None and len(data) < length:
        raise FetchError("missing", f"{file}: the archive is shorter than when it was scanned")
    return data
