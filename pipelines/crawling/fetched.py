"""What every way of getting a photo gives: its bytes and where they are from, or a `FetchError` with a code."""

from dataclasses import dataclass

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
        """Seconds after which the server wants to be asked again, where it says so."""
        self.given_up = given_up
        """The host is left for another run: asking again in this one gains nothing."""

    @property
    def transient(self) -> bool:
        """Whether asking again may help."""
        return OUTCOMES[self.code].transient
