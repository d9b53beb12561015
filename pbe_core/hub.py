"""The one place that fetches from the Hugging Face hub: in bounded time, and with one line that says what was wrong.

    names of the repository's files ─▶ `choose` ─▶ those that the cache lacks: may they be had? ─▶ into the cache ─▶ its folder

The library bounds each wait for bytes of a file, but tries for minutes where a server says nothing or is busy; so names and the
headers of a first file are asked for in calls of one attempt before it may fetch. Where the hub gives nothing, the copy in the
cache is used if it is complete.
"""

import errno
import sys
import time
from collections.abc import Callable, Collection, Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import huggingface_hub.utils
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from pbe_core.errors import InputError
from pbe_core.storage import public_url

ANSWER_S = max(20.0, constants.HF_HUB_ETAG_TIMEOUT)
"""The longest wait for an answer that is no file: an address, a list of names, headers."""
PAUSES_S = (2.0, 8.0)
"""Before the second and third attempt at a hub that is busy: many processes of one run may ask at once."""

NOT_THE_HUB = "what answers there is no hub, perhaps a page to log in to the network"

Chooser = Callable[[Collection[str]], list[str]]
T = TypeVar("T")

# Of what the library retries and why, the one line at the end says enough.
huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


class _Fault(Exception):
    """Why the hub gives nothing, and the way out."""

    def __init__(self, what: str, way_out: str, busy: bool = False) -> None:
        super().__init__(what)
        self.what, self.way_out, self.busy = what, way_out, busy


def fetch(repository: str, choose: Chooser) -> Path | None:
    """A folder of the cache with files of a repository; null where `choose` chooses none of them.

    Args:
        repository: owner/name.
        choose: names of all files of the repository (with / between) -> those to fetch. It may raise an InputError.

    Raises:
        InputError: no network, no such name, not allowed, busy, or offline, and the cache has not got them.
    """
    try:
        return _fetch(repository, choose)
    except _Fault as error:
        fault = error
    try:
        cached = _in_cache(repository, choose)
    except (OSError, ValueError, InputError):
        # Not in the cache, or not all of it: then the hub is what is wrong.
        raise InputError(
            f"{repository}: no such folder here, and {fault.what}; {fault.way_out}, or give a local folder"
        ) from None
    if cached and not constants.HF_HUB_OFFLINE:
        print(f"{repository}: {fault.what}; the copy in the cache is used", file=sys.stderr)
    return cached


def _fetch(repository: str, choose: Chooser) -> Path | None:
    info = _ask(lambda: huggingface_hub.HfApi().model_info(repository, timeout=ANSWER_S))
    wanted = choose([file.rfilename for file in info.siblings or []])
    if not wanted:
        return None
    missing = [name for name in wanted if not _cached_file(repository, name, info.sha)]
    if missing:
        url = huggingface_hub.hf_hub_url(repository, missing[0])
        if _ask(lambda: huggingface_hub.get_hf_file_metadata(url, timeout=ANSWER_S)).commit_hash is None:
            raise _no_network(NOT_THE_HUB)
    for name in missing:
        _ask(lambda name=name: huggingface_hub.hf_hub_download(repository, name, etag_timeout=ANSWER_S))  # type: ignore[misc]
    places = [_cached_file(repository, name, info.sha) for name in wanted]
    if None in places:
        raise _Fault("the model changed on the hub while it was fetched", "run the same command again")
    # The snapshot's folder, from the place of one of its files.
    return Path(str(places[0])).parents[wanted[0].count("/")]


def _ask(call: Callable[[], T]) -> T:
    """The result of a call to the hub. Raises _Fault: with what was wrong."""
    pauses = iter(PAUSES_S)
    while True:
        try:
            return call()
        except Exception as error:
            fault = _fault_of(error)
        pause = next(pauses, None) if fault.busy else None
        if pause is None:
            raise fault
        time.sleep(pause)


def _fault_of(error: Exception) -> _Fault:
    """What an error of the library means. Raises it again where it is of a disk that is full or broken.

    The HTTP libraries under the hub's have errors of their own, few of which are OSErrors: everything else is the network's.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return _Fault(
            f"it is not, or not whole, in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to ask the hub",
            "fetch it once without HF_HUB_OFFLINE",
        )
    for each in chain:
        response: Any = getattr(each, "response", None)
        if isinstance(getattr(response, "status_code", None), int):
            return _fault_of_answer(response.status_code, response.headers)
    # An error of the disk has the name of a file.
    if isinstance(error, OSError) and error.filename:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise error
        return _Fault(f"the cache cannot be written to ({error.filename}: {error.strerror})", "set HF_HOME to a folder that can")
    if isinstance(error, HFValidationError):
        return _Fault("this is no name of a repository of the hub (owner/name)", "check the name")
    if isinstance(error, JSONDecodeError | LookupError | TypeError | AttributeError):
        return _no_network(NOT_THE_HUB)
    if "Timeout" in type(error).__name__:
        return _no_network("it does not answer in time")
    return _no_network(f"{type(error).__name__}: {' '.join(str(error).split())}"[:160])


def _fault_of_answer(status: int, headers: Mapping[str, str]) -> _Fault:
    """What an HTTP status means."""
    endpoint, log_in = public_url(constants.ENDPOINT), "log in with `hf auth login`, or set HF_TOKEN"
    if status in (401, 403):
        return _Fault(
            f"not allowed: the hub refuses it, as it does gated and private models and some that it has not (HTTP {status})",
            f"check the name, agree to the terms on its page on {endpoint}, and {log_in}",
        )
    if status == 404:
        return _Fault("no such name: the hub has no such model, or hides it (HTTP 404)", f"check the name, or {log_in}")
    if status >= 500 or status in (408, 429):
        after = headers.get("Retry-After", "")
        when = f"in {after} s" if after.isdigit() else "in some minutes"
        return _Fault(f"the hub is busy or out of order (HTTP {status})", f"try again {when}", busy=True)
    return _Fault(f"the hub at {endpoint} answers HTTP {status}", "check HF_ENDPOINT and the proxy")


def _no_network(cause: str) -> _Fault:
    return _Fault(
        f"no network: the hub, {public_url(constants.ENDPOINT)}, cannot be reached ({cause})",
        "mend that (HTTPS_PROXY and HTTP_PROXY name a proxy, SSL_CERT_FILE certificates, HF_ENDPOINT another hub)",
    )


def _in_cache(repository: str, choose: Chooser) -> Path | None:
    """The folder of what was fetched before. Raises an OSError or InputError where it is not all there."""
    folder = Path(huggingface_hub.snapshot_download(repository, local_files_only=True, allow_patterns=[]))
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    if not names:
        raise FileNotFoundError(f"{folder}: empty, as a download that failed leaves it")
    return folder if choose(names) else None


def _cached_file(repository: str, name: str, commit: str | None) -> str | None:
    place = huggingface_hub.try_to_load_from_cache(repository, name, revision=commit)
    return place if isinstance(place, str) else None
