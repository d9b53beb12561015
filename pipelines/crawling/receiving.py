"""Receiving an answer from a server that nobody vouches for: its headers and its body, each with an end."""

import zlib
from typing import Any

from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError

from pbe_core.words import noun
from pipelines.crawling.fetched import FetchError

# Of one answer. They bound the time for which a server keeps a process busy; real servers send one or two.
_MOST_INTERIM = 8
_HEAD_SLICE = 8192
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_UNPACKED_AT_ONCE = 2**20
# Of a photo in gzip, which bounds the time that unpacking takes; bgzip, which makes many, has one for each 64 kB of a photo.
_MOST_MEMBERS = 1000


class AnswerReader(ResponseHandler):
    """aiohttp's reader of answers, with a limit of interim ones (1xx: the answer will come), which it has none of.

    While they are parsed no other request of the process goes on. A few are enough, and few are parsed at once.
    """

    _interim = 0
    _answered = False

    def set_response_params(self, **params: Any) -> None:
        """Called as each request of a connection begins."""
        self._interim, self._answered = 0, False
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Slices, until the answer's headers are there, so that few interim ones are parsed at once."""
        while not self._answered and len(data) > _HEAD_SLICE and self.exception() is None:
            head, data = data[:_HEAD_SLICE], data[_HEAD_SLICE:]
            super().data_received(head)
        if self.exception() is None:
            super().data_received(data)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """An answer's headers are there, or those of an interim one."""
        if self.exception() is not None:  # Too many came before, even where the answer is behind them in the same slice.
            return
        self._interim += 1
        self._answered = not 100 <= data[0].code < 200
        if self._answered or self._interim <= _MOST_INTERIM:
            super().feed_data(data, size)
        else:
            if self.transport:
                self.transport.close()
            self.set_exception(HttpProcessingError(message=f"more than {_MOST_INTERIM} interim answers (1xx)"))


class AnswerBody:
    """The bytes of an answer as they come, unpacked, and never many more than `limit`."""

    def __init__(self, limit: int, packed: bool) -> None:
        self.received = 0
        self._limit = limit
        self._photo = bytearray()
        self._unpacker = zlib.decompressobj(_GZIP_OR_ZLIB) if packed else None
        self._members = 1

    def check(self, size: int) -> None:
        """Raises FetchError: too_large."""
        if size > self._limit:
            raise FetchError("too_large", f"{size} {noun(size, 'bytes')} or more, {self._limit} allowed (crawl.max_bytes)")

    def add(self, chunk: bytes) -> None:
        """Raises FetchError: too_large, or bad_response where unpacking fails."""
        self.received += len(chunk)
        self.check(self.received)
        if not self._unpacker:
            self._photo += chunk
            return
        while chunk:
            if self._unpacker.eof:
                # Members of a gzip file follow each other (RFC 1952, section 2.2).
                self._members += 1
                if self._members > _MOST_MEMBERS:
                    raise FetchError("bad_response", f"cannot be unpacked: more than {_MOST_MEMBERS:,} gzip members")
                self._unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
            try:
                self._photo += self._unpacker.decompress(chunk, _UNPACKED_AT_ONCE)
            except zlib.error as error:
                raise FetchError("bad_response", f"cannot be unpacked: {error}") from error
            self.check(len(self._photo))
            chunk = self._unpacker.unused_data or self._unpacker.unconsumed_tail

    def finished(self) -> bytes:
        """All of it. Raises FetchError: incomplete, or not_an_image where there is nothing."""
        if self.received and self._unpacker and not self._unpacker.eof:
            raise FetchError("incomplete", f"what is packed into {self.received} {noun(self.received, 'bytes')} has no end")
        if not self._photo:
            raise FetchError("not_an_image", "an empty answer")
        return bytes(self._photo)
