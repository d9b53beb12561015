"""Photos in object stores (s3://, gs://), through fsspec: one ranged request for each photo.

    url ──▶ file system of its protocol (a connection pool) ──▶ bytes 0 to max_bytes ──▶ Fetched, or FetchError

Buckets and endpoints are those of the user's own settings, so there is no guard here against private addresses, and no limit per
host: what a busy store says (503 SlowDown) comes back as http_429.
"""

import asyncio
import contextlib
import importlib
import json
import logging
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

import aiohttp
import fsspec

from pbe_core.errors import InputError
from pbe_core.words import number_of
from pipelines.config import CrawlSettings
from pipelines.crawling import web
from pipelines.crawling.answers import Fetched, FetchError, code_of_status

# Where the classes are. For gs not the one that fsspec would take: that asks Google's control plane what kind of bucket this is,
# and again before each photo where it gets no answer (of a bucket of somebody else), with a warning each time (gcsfs 2026.6).
FILE_SYSTEMS = {"s3": ("s3fs", "S3FileSystem"), "gs": ("gcsfs.core", "GCSFileSystem")}
INSTALL = {"gs": "pip install -c constraints.txt '.[gcs]'"}
PUBLIC: dict[str, dict[str, Any]] = {"s3": {"anon": True}, "gs": {"token": "anon"}}

# What exceptions mean, by the names of their classes: libraries wrap each other's, and not all of them are installed. The first
# line that has a name of anything in the chain of causes counts.
MEANINGS = (
    ("dns", {"gaierror", "ClientConnectorDNSError"}),
    ("tls", {"SSLError", "ClientSSLError"}),
    ("timeout", {"TimeoutError", "ConnectTimeoutError", "ReadTimeoutError"}),
    ("incomplete", {"ClientPayloadError", "IncompleteReadError", "IncompleteRead", "ResponseStreamingError", "ChecksumError"}),
    ("bad_response", {"ResponseParserError", "ClientResponseError"}),
    ("connect", {"ConnectionError", "ClientConnectionError", "EndpointConnectionError", "ProxyConnectionError"}),
    ("credentials", {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "GoogleAuthError"}),
    ("http_403", {"PermissionError"}),
    ("http_404", {"FileNotFoundError"}),
    ("bad_url", {"ParamValidationError"}),
)
_BUSY = ("SlowDown", "Throttling", "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests")
_CREDENTIALS = (
    *("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestExpired", "InvalidSecurity"),
    *("InvalidAccessKeyId", "SignatureDoesNotMatch"),
)
# Codes of S3 of which the HTTP status (400, 503) says less. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
S3_CODES = {**dict.fromkeys(_BUSY, "http_429"), **dict.fromkeys(_CREDENTIALS, "credentials")}
# Options that are no secrets, and help in a message.
TELLING = ("endpoint_url", "region_name", "project")
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class ObjectStores:
    """Photos from object stores; holds a connection pool for each protocol. It belongs to the event loop that first uses it."""

    def __init__(self, settings: CrawlSettings) -> None:
        self._settings = settings
        self._systems: dict[str, Any] = {}
        self._opening = asyncio.Lock()
        self._closing = contextlib.AsyncExitStack()

    async def fetch(self, url: str, *, expected_bytes: int | None = None) -> Fetched:
        """Ask once for an object, for at most crawl.max_bytes + 1 bytes of it, and wait at most crawl.total_seconds.

        Args:
            url: <protocol>://<bucket>/<key>; the key is taken as it is (no %20). The protocol is s3, gs, or another one of
                fsspec for which crawl.storage has options.
            expected_bytes: any other length is refused.

        Raises:
            FetchError: bad_url, blocked_scheme, dns, connect, tls, timeout, incomplete, bad_response, credentials, http_403,
                http_404, http_429, http_5xx or another of HTTP, too_large, size_mismatch, unexpected. No detail has credentials
                in it.
        """
        protocol, _, path = url.partition("://")
        bucket, _, key = path.partition("/")
        if protocol not in FILE_SYSTEMS and protocol not in self._settings.storage:
            raise FetchError("blocked_scheme", f"{protocol[:20]!r} is no object store (they are {', '.join(FILE_SYSTEMS)})")
        if not bucket or not key:
            raise FetchError("bad_url", "no bucket or no key: it should be <protocol>://<bucket>/<key>")
        try:
            async with asyncio.timeout(self._settings.total_seconds):
                data = await self._read(protocol, url)
        except Exception as error:
            raise fetch_error(error, protocol, self._settings) from None
        if len(data) > self._settings.max_bytes:
            raise FetchError("too_large", f"more than {self._settings.max_bytes:,} bytes")
        if expected_bytes is not None and len(data) != expected_bytes:
            raise FetchError("size_mismatch", f"{number_of(len(data), 'byte')}, not {expected_bytes:,}")
        return Fetched(data, url)

    async def close(self) -> None:
        """Close all connections."""
        self._systems.clear()
        await self._closing.aclose()

    async def _read(self, protocol: str, url: str) -> bytes:
        async with self._opening:
            if protocol not in self._systems:
                # In a thread, because looking for credentials may ask the network.
                system = await asyncio.to_thread(_make_file_system, protocol, self._settings)
                await self._closing.enter_async_context(_connected(system, protocol))
                self._systems[protocol] = system
        system, end = self._systems[protocol], self._settings.max_bytes + 1
        try:
            if system.async_impl:
                return bytes(await system._cat_file(url, start=0, end=end))
            return bytes(await asyncio.to_thread(system.cat_file, url, start=0, end=end))
        except Exception as error:
            # An empty object has no byte 0 (RFC 9110, section 15.5.17).
            if _status(error) == 416:
                return b""
            raise


def check_object_stores(sources: Iterable[str], settings: CrawlSettings) -> None:
    """Look before any work whether object stores can be asked at all. Asks none of them; not to be called in an event loop.

    Args:
        sources: as crawl.sources has them, or protocols; what is no object store is passed over.
        settings: with the stores' options.

    Raises:
        InputError: a library is missing, or the options in crawl.storage are not those of the protocol.
    """

    async def connect(protocol: str) -> None:
        async with _connected(_make_file_system(protocol, settings), protocol):
            pass

    protocols = {source.partition("://")[0] for source in sources}
    for protocol in sorted(protocols & (FILE_SYSTEMS.keys() | settings.storage.keys())):
        try:
            asyncio.run(connect(protocol))
        except ImportError as error:
            install = INSTALL.get(protocol, "a library that is not installed")
            raise InputError(f"crawl.sources: {protocol}:// needs {install} ({_without_secrets(error, settings)})") from None
        except Exception as error:
            why = _without_secrets(error, settings)
            raise InputError(f"crawl.storage: the options of {protocol} cannot be used ({why})") from None


def fetch_error(error: Exception, protocol: str, settings: CrawlSettings) -> FetchError:
    """What an exception of fsspec, or of a library below it, means; with the HTTP status and Retry-After where it has them."""
    answer, status = _s3_answer(error), _status(error)
    answered = answer.get("Error", {})
    code = S3_CODES.get(str(answered.get("Code"))) or (_meaning(error) if status is None else code_of_status(status))
    detail = _without_secrets(f"{answered['Code']}: {answered.get('Message', '')}" if "Code" in answered else error, settings)
    options, public = settings.storage.get(protocol, {}), PUBLIC.get(protocol, {})
    if code in ("http_403", "credentials") and any(options.get(name) != value for name, value in public.items()):
        detail += f" (if the bucket is public, set crawl.storage: {json.dumps({protocol: public})})"
    after = str(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after"))
    return FetchError(code, detail, http_status=status, retry_after=float(after) if after.isdecimal() else None)


def _meaning(error: Exception) -> str:
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    return next((code for code, kinds in MEANINGS if names & kinds), "unexpected")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _s3_answer(error: Exception) -> Mapping[str, Any]:
    """What S3 answered: botocore's ClientError has it, of which s3fs makes other exceptions."""
    answers = (getattr(cause, "response", None) for cause in _causes(error))
    return next((answer for answer in answers if isinstance(answer, dict)), {})


def _status(error: Exception) -> int | None:
    """The HTTP status, where the exception has one, or gcsfs says it in its own way (gcsfs.retry.validate_response)."""
    status = str(_s3_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", getattr(error, "code", None)))
    if status.isdecimal():
        return int(status)
    return 403 if str(error).startswith("Forbidden: ") else None


def _without_secrets(text: str | Exception, settings: CrawlSettings) -> str:
    """A text, or an exception's type and text, on one line of a bearable length and without options that may be secret."""
    text = f"{type(text).__name__}: {text}" if isinstance(text, Exception) else text
    secrets = [*_texts(settings.storage), *(os.environ.get(name, "") for name in SECRETS)]
    for secret in sorted(secrets, key=len, reverse=True):
        # What is shorter is no secret, but may be a part of any word.
        text = text.replace(secret, "***") if len(secret) >= 4 else text
    return " ".join(text.split())[:200]


def _texts(options: Mapping[str, Any]) -> Iterator[str]:
    """All texts in options, however deep, but those whose names say that they are no secrets."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _texts(value)
        elif isinstance(value, str) and name not in TELLING:
            yield value


def _make_file_system(protocol: str, settings: CrawlSettings) -> Any:
    options = dict(settings.storage.get(protocol, {}))
    if protocol == "s3":
        config = {
            "connect_timeout": web.CONNECT_SECONDS,
            "read_timeout": settings.total_seconds,
            "max_pool_connections": settings.connections,
            "retries": {"total_max_attempts": 1},
        }
        options["config_kwargs"] = {**config, **options.get("config_kwargs", {})}
    if protocol == "gs":
        options.setdefault("requests_timeout", aiohttp.ClientTimeout(sock_connect=web.CONNECT_SECONDS))
        # Bytes as they are stored: unpacked they may be any number.
        options["session_kwargs"] = {"auto_decompress": False, **options.get("session_kwargs", {})}
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # It logs a traceback for each photo that is not there.
    if protocol in FILE_SYSTEMS:
        module, name = FILE_SYSTEMS[protocol]
        kind = getattr(importlib.import_module(module), name)
    else:
        kind = fsspec.get_filesystem_class(protocol)
    if kind.async_impl:
        options["asynchronous"] = True
    # Else fsspec would hand out the same one again, also in another event loop.
    return kind(**options, skip_instance_cache=True)


@contextlib.asynccontextmanager
async def _connected(system: Any, protocol: str) -> AsyncIterator[None]:
    """A file system's connection pool, in the running event loop.

    Whether, when and how often to ask again is for the crawl to decide: else a busy store would look like a slow one. gcsfs has
    no setting for that, and asks again by itself as long as crawl.total_seconds lets it.
    """
    session = None
    if protocol == "s3":
        system.retries = 1
        session = await system.set_session()
    try:
        yield
    finally:
        if protocol == "gs":
            with contextlib.suppress(RuntimeError):  # It opens one with the first request.
                session = system.session
        if session:
            await session.close()
