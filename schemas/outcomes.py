"""What can become of a wanted photo: `ok`, or why it is not in the store, and whether asking again may help."""

from dataclasses import dataclass

PHOTO_ERRORS = {
    "missing": "no file at the expected path",
    "unreadable": "the file's name is too long or leads in a circle, or the file may not be read or its disk fails",
    "not_an_image": "the bytes are no picture: an error page, an empty file, another kind of data",
    "unsupported_format": "a picture or video of a format that is not read (docs/own-data.md lists those that are)",
    "too_many_pixels": "the header announces more pixels than allowed",
    "no_end_mark": "a JPEG that lacks its end mark and no pixels, and source.missing_end_mark is refuse",
    "decode_error": "the pixels cannot be decoded: a damaged or truncated file, or a variant of its format that is not read",
}
# What a crawl finds as a build does.
_AS_READ = ("not_an_image", "unsupported_format", "no_end_mark", "decode_error")


@dataclass(frozen=True)
class Outcome:
    """One code of a photo store's status table."""

    meaning: str
    transient: bool
    """Whether the same request may well succeed later: `crawl.py --retry transient` asks for these again."""


OK = "ok"
OUTCOMES = {
    OK: Outcome("the photo is in the store, or was found where it lies", transient=False),
    # On the way to the server.
    "dns": Outcome("the host's name cannot be resolved", transient=True),
    "connect": Outcome("no connection to the host: refused, unreachable, or cut before an answer began", transient=True),
    "tls": Outcome("no encrypted connection: the certificate or the handshake is wrong", transient=True),
    "timeout": Outcome("no connection, no answer or not all of it in time (crawl.total_seconds)", transient=True),
    "too_slow": Outcome("the answer came more slowly than crawl.slow_bytes_per_second", transient=True),
    "incomplete": Outcome("the answer ended before its announced length, or was cut off", transient=True),
    "bad_response": Outcome("the answer is no HTTP, or is compressed in a way that it must not be", transient=True),
    # What the server says.
    "credentials": Outcome("the object store does not know our credentials, has got none, or they have expired", transient=True),
    "http_403": Outcome("forbidden: HTTP 401 or 403, or a bucket that refuses access", transient=False),
    "http_404": Outcome("not found: HTTP 404, or no such object in the bucket", transient=False),
    "http_410": Outcome("gone for good: HTTP 410 or 451", transient=False),
    "http_429": Outcome("too many requests: HTTP 429, also after waiting", transient=True),
    "http_4xx": Outcome("another HTTP 4xx", transient=False),
    "http_5xx": Outcome("the server failed: HTTP 5xx", transient=True),
    "http_other": Outcome("a success or redirect that is none: HTTP 204, 206, 300, ...", transient=False),
    "redirect_loop": Outcome("redirects that come back to where they were, or more than five", transient=False),
    "opted_out": Outcome("the server's X-Robots-Tag or tdm-reservation says that this is not for such use", transient=False),
    # What must not be asked.
    "bad_url": Outcome("there is no URL, or it cannot be read as one", transient=False),
    "blocked_scheme": Outcome("the URL, or a redirect, is neither http nor https", transient=False),
    "blocked_address": Outcome("the host, or a redirect, resolves to an address that is not public", transient=False),
    # What came.
    "missing": Outcome("no such file in the local folders or tars", transient=False),
    "too_large": Outcome("more bytes than crawl.max_bytes, as announced, as sent or as unpacked", transient=False),
    "size_mismatch": Outcome("another number of bytes than the metadata's OriginalSize", transient=False),
    "hash_mismatch": Outcome("another MD5 than the metadata's OriginalMD5", transient=False),
    **{code: Outcome(PHOTO_ERRORS[code], transient=False) for code in _AS_READ},
    "too_many_pixels": Outcome("the header announces more pixels than source.max_photo_pixels", transient=False),
    "too_small": Outcome("the shorter side is below crawl.min_side px", transient=False),
    "placeholder": Outcome("the same bytes came for many ids: a picture that says that the photo is gone", transient=False),
    "unexpected": Outcome("an error that nobody foresaw; its text is the detail", transient=True),
}
TRANSIENT = tuple(code for code, outcome in OUTCOMES.items() if outcome.transient)
