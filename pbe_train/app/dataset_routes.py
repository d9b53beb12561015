"""The HTTP API of the dataset viewer. A browser names datasets by number, samples by place and shards not at all.

GET  /api/datasets                                     which there are, and what they hold
GET  /api/datasets/N/classes|rows?label=&split=&kinds=&text=&smallest=&largest=      counts by class; a page of rows
GET  /api/datasets/N/rejects|failures?reason=&label=&code=&text=                     pages of boxes and samples that are not there
GET  /api/datasets/N/samples/PLACE                     all facts of a sample
GET  /api/datasets/N/samples/PLACE/tile|reference|view|photo|latent|mask/K|masked/K|draws
GET  /api/datasets/N/rejects/PLACE/photo               the photo of a rejected box
GET  /api/left-out, POST /api/left-out                 the list of what is left out
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from aiohttp import web

from pbe_core.errors import InputError
from pbe_core.leave_out import LeftOut, is_id
from pbe_core.storage import is_url, public_url
from pbe_train.app.dataset_folder import ALL_COLUMNS, TILE_COLUMNS, DatasetFolder, Row
from pbe_train.app.dataset_lists import Listed, Marks
from pbe_train.app.dataset_rows import KINDS, Query, Rows
from pbe_train.app.dataset_samples import Samples, Sources
from pbe_train.app.dataset_torch import Draw, TorchProcess
from pbe_train.app.security import RefusedError
from pbe_train.app.uploads import read_json
from schemas.tables import FAILURE_CODES, REJECT_REASONS, REJECTS

MOST_ROWS = 500
"""Of a page."""
MOST_CLASSES = 5_000
_SHOWN = ("key", "label", "label_name", "split", "object_id")
_REJECTED = [name for name in REJECTS.names if name != "reasons"]
_FAILED = ["shard", "key", "split", "photo_id", "file_name", "code", "detail"]
_KEPT_SECONDS = 3600

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ViewerOptions:
    """What the viewer is started with.

    Args:
        datasets: folders or URLs.
        storage: options of fsspec for URLs.
        sources: of pictures, beside the datasets.
        leave_out: the list that marks are written to.
        cache: folder for what comes from URLs, and for what is read once of a dataset.
    """

    datasets: Sequence[str] = ()
    storage: Mapping[str, Any] = field(default_factory=dict)
    sources: Sources = field(default_factory=Sources)
    leave_out: Path = Path("left_out.csv")
    cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "paint-by-example")


class Opened:
    """A dataset that is looked into."""

    def __init__(self, place: str, options: ViewerOptions, torch: TorchProcess) -> None:
        self.build = build_of(place)
        self.folder = DatasetFolder(place, options.storage, options.cache)
        self.rows = Rows(self.folder, options.cache)
        self.samples = Samples(self.folder, options.sources, torch)
        self.lists: dict[str, Listed] = {}

    def listed(self, name: str) -> Listed:
        """One of the tables that are paged through."""
        if name not in self.lists:
            self.lists[name] = Listed(self.folder.table(name))
        return self.lists[name]


class Viewer:
    """The datasets of a server. Each is opened when it is asked for, so that one that is not finished keeps no other back.

    Args:
        options: of the viewer.

    Raises:
        InputError: the list of what is left out is damaged, or lies in a dataset.
    """

    def __init__(self, options: ViewerOptions) -> None:
        self.options = options
        self.marks = Marks(options.leave_out, [Path(place) for place in options.datasets if not is_url(place)])
        if options.datasets:
            self.marks.read()
        self.torch = TorchProcess()
        self._opened: dict[int, Opened] = {}
        self._opening: dict[int, asyncio.Task[Opened]] = {}
        # What takes seconds, a VAE or a photo from far away, must not keep tiles waiting.
        self._quick = ThreadPoolExecutor(4, thread_name_prefix="tiles")
        self._slow = ThreadPoolExecutor(4, thread_name_prefix="pictures")

    async def open(self, request: web.Request) -> Opened:
        """The dataset that a request is about.

        Raises:
            RefusedError: there is none of that number.
            InputError: it cannot be opened.
        """
        number = _whole(request.match_info["number"], "the dataset's number")
        if number >= len(self.options.datasets):
            raise RefusedError(404, f"no dataset {number} here; give it with --dataset")
        known = self._opened.get(number)
        if known and build_of(self.options.datasets[number]) in (None, known.build):
            return known
        if number not in self._opening:
            self._opening[number] = asyncio.create_task(self._open_anew(number))
            self._opening[number].add_done_callback(lambda task: task.cancelled() or task.exception())
        # Who goes away meanwhile ends nothing: else each reload of a page would keep one more thread at a store that is silent.
        return await asyncio.shield(self._opening[number])

    async def _open_anew(self, number: int) -> Opened:
        known = self._opened.get(number)
        try:
            opened = await self.slowly(Opened, self.options.datasets[number], self.options, self.torch)
        finally:
            del self._opening[number]
        self._opened[number] = opened
        if known:
            known.rows.close()
        return opened

    async def quickly(
        self, function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Result:
        """Call a function off the event loop that takes milliseconds."""
        return await asyncio.get_running_loop().run_in_executor(self._quick, lambda: function(*arguments, **named))

    async def slowly(
        self, function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Result:
        """Call a function off the event loop that may take long."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, lambda: function(*arguments, **named))

    async def close(self, _: web.Application) -> None:
        """End what runs beside the server."""
        for opened in self._opened.values():
            opened.rows.close()
        self.torch.close()
        for pool in (self._quick, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)


def build_of(place: str) -> tuple[int, int] | None:
    """What another build of a local dataset changes; null behind a URL, and while there is no finished one."""
    try:
        told = None if is_url(place) else (Path(place) / "dataset.json").stat()
    except OSError:
        return None
    return told and (told.st_mtime_ns, told.st_ino)


def dataset_routes(viewer: Viewer) -> list[web.RouteDef]:
    """The handlers of the viewer's API."""

    def of_dataset(answer: Callable[[Viewer, Opened, web.Request], Awaitable[web.StreamResponse]]) -> Handler:
        async def get(request: web.Request) -> web.StreamResponse:
            return await answer(viewer, await viewer.open(request), request)

        return get

    async def get_datasets(_: web.Request) -> web.StreamResponse:
        names = [public_url(place).rstrip("/") for place in viewer.options.datasets]
        return web.json_response({"datasets": [{"number": number, "name": name} for number, name in enumerate(names)]})

    async def get_left_out(_: web.Request) -> web.StreamResponse:
        return web.json_response(_marked(viewer, await viewer.quickly(viewer.marks.read)))

    async def post_left_out(request: web.Request) -> web.StreamResponse:
        what, name, leave = _read_mark(await _read_json(request))
        return web.json_response(_marked(viewer, await viewer.quickly(viewer.marks.mark, what, name, leave)))

    one = "/api/datasets/{number}"
    pictures = "tile|reference|view|photo|latent|mask|masked|draws"
    return [
        web.get("/api/datasets", get_datasets),
        web.get(one, of_dataset(get_dataset)),
        web.get(f"{one}/classes", of_dataset(get_classes)),
        web.get(f"{one}/rows", of_dataset(get_rows)),
        web.get(f"{one}/rejects", of_dataset(get_rejects)),
        web.get(f"{one}/rejects/{{place}}/photo", of_dataset(get_reject_photo)),
        web.get(f"{one}/failures", of_dataset(get_failures)),
        web.get(f"{one}/samples/{{place}}", of_dataset(get_sample)),
        web.get(f"{one}/samples/{{place}}/{{picture:{pictures}}}", of_dataset(get_picture)),
        web.get(f"{one}/samples/{{place}}/{{picture:{pictures}}}/{{part:[0-9]{{1,9}}}}", of_dataset(get_picture)),
        web.get("/api/left-out", get_left_out),
        web.post("/api/left-out", post_left_out),
    ]


async def get_dataset(viewer: Viewer, opened: Opened, request: web.Request) -> web.StreamResponse:
    """What a dataset is and holds."""
    info = opened.folder.info
    return web.json_response(
        {
            "name": opened.folder.name,
            "fingerprint": info.fingerprint,
            "samples": opened.folder.samples,
            "splits": {name: counts.samples for name, counts in info.splits.items()},
            "books": info.books.model_dump(mode="json"),
            "view_size": info.view_size,
            "buckets": info.buckets,
            "masks_per_view": info.masks_per_view,
            "vae": {"source": info.vae.source, "kind": info.vae.kind, "channels": info.vae.latent_channels},
            "reasons": {reason: REJECT_REASONS.get(reason, "") for reason in info.books.rejects},
            "codes": {code: FAILURE_CODES.get(code, "") for code in info.books.failures},
            "remote": opened.folder.remote is not None,
        }
    )


async def get_classes(viewer: Viewer, opened: Opened, request: web.Request) -> web.StreamResponse:
    """Samples by class, among those that pass the other filters."""
    counted, read = await viewer.quickly(opened.rows.count_classes, _query(request))
    classes = [{"label": label, "name": name, "count": count} for label, name, count in counted[:MOST_CLASSES]]
    return web.json_response({"classes": classes, "all": len(counted), "read": read})


async def get_rows(viewer: Viewer, opened: Opened, request: web.Request) -> web.StreamResponse:
    """How many samples pass the filters, and some of them."""
    first, count = _page(request)

    def find() -> dict[str, Any]:
        found = opened.rows.find(_query(request))
        rows = opened.folder.rows(found.page(first, count), _SHOWN)
        return {"total": found.total, "read": found.read, "first": first, "rows": rows}

    return web.json_response(await viewer.quickly(find))


async def get_rejects(viewer: Viewer, opened: Opened, request: web.Request) -> web.StreamResponse:
    """Boxes that were not accepted."""
    return await _listed(viewer, opened, request, "rejects.parquet", ("reason", "label", "split"), "photo_id", _REJECTED)


async def get_failures(viewer: Viewer, opened: Opened, request: web.Request) -> web.StreamResponse:
    """Samples that could not be made."""
    return await _listed(viewer, opened, request, "failures.parquet", ("code", "split"), "key", _FAILED)


async def _listed(
    viewer: Viewer, opened: Opened, request: web.Request, table: str, words: Sequence[str], text: str, columns: Sequence[str]
) -> web.StreamResponse:
    first, count = _page(request)
    filters = {name: word for name in words if (word := request.query.get(name, ""))}
    texts = {text: word} if (word := _text(request)) else {}

    def find() -> dict[str, Any]:
        total, rows = opened.listed(table).page(filters, texts, first, count, columns)
        return {"total": total, "first": first, "rows": rows}

    return web.json_response(await viewer.slowly(find))


async def get_sample(viewer: Viewer, opened: Opened, request: web.Request) -> web.StreamResponse:
    """All facts of a sample."""

    def describe() -> dict[str, Any]:
        return opened.samples.describe(_row(opened, request))

    return web.json_response(await viewer.quickly(describe))


async def get_picture(viewer: Viewer, opened: Opened, request: web.Request) -> web.StreamResponse:
    """One of a sample's pictures."""
    picture, part = request.match_info["picture"], request.match_info.get("part")
    if (part is None) != (picture not in ("mask", "masked", "draws")):
        raise RefusedError(404, f"no picture {picture}{'' if part is None else f'/{part}'}; docs/app.md lists what there is")
    number = int(part or 0)
    samples = opened.samples
    makers: dict[str, Callable[[Row], bytes]] = {
        "tile": samples.tile,
        "reference": lambda row: samples.reference(row, number),
        "photo": samples.photo,
        "latent": lambda row: samples.latent(row, None),
        "mask": lambda row: samples.mask(row, number),
        "masked": lambda row: samples.latent(row, number),
        "draws": lambda row: samples.draw(row, _draw(request, number)),
    }
    columns = TILE_COLUMNS if picture == "tile" else ALL_COLUMNS
    run = viewer.quickly if picture in ("tile", "reference", "mask") else viewer.slowly
    made_from = ""
    if picture == "view":
        data, made_from = await run(lambda: samples.view(_row(opened, request, columns)))
    else:
        data = await run(lambda: makers[picture](_row(opened, request, columns)))
    return _picture(request, data, "image/png" if picture == "mask" else "image/jpeg", made_from)


async def get_reject_photo(viewer: Viewer, opened: Opened, request: web.Request) -> web.StreamResponse:
    """The photo of a rejected box."""
    place = _whole(request.match_info["place"], "the row's place")

    def make() -> bytes:
        return opened.samples.photo_of_reject(opened.listed("rejects.parquet").row(place, ("split", "photo_id")))

    return _picture(request, await viewer.slowly(make), "image/jpeg")


def _picture(request: web.Request, data: bytes, kind: str, made_from: str = "") -> web.Response:
    # The page names the build in the address, so another build has other addresses.
    kept = f"private, max-age={_KEPT_SECONDS}" if request.query.get("build") else "no-store"
    return web.Response(body=data, content_type=kind, headers={"Cache-Control": kept, "X-Made-From": made_from})


def _row(opened: Opened, request: web.Request, columns: Sequence[str] = ALL_COLUMNS) -> Row:
    place = _whole(request.match_info["place"], "the sample's place")
    return opened.folder.rows([place], columns)[0]


def _query(request: web.Request) -> Query:
    given = request.query
    if (kinds := given.get("kinds", "")) and kinds not in KINDS:
        raise InputError(f"kinds {kinds[:40]!r}: give one of {', '.join(KINDS)}, or nothing for any")
    smallest, largest = (_share(given.get(name, ""), name, none) for name, none in (("smallest", 0.0), ("largest", 1.0)))
    return Query(given.get("label", ""), given.get("split", ""), kinds, _text(request), smallest, largest)


def _draw(request: web.Request, slot: int) -> Draw:
    given = request.query
    preset, geometry = given.get("preset", "paper"), given.get("geometry", "squash")
    if preset not in ("paper", "strong", "none") or geometry not in ("squash", "pad"):
        raise InputError(f"preset {preset[:40]!r}, geometry {geometry[:40]!r}: give paper, strong or none, and squash or pad")
    seed, step = (_whole(given.get(name, "0"), name) for name in ("seed", "step"))
    return Draw(preset, geometry, seed, step, slot)  # type: ignore[arg-type]  # mypy does not narrow by `in`.


def _page(request: web.Request) -> tuple[int, int]:
    first, count = (_whole(request.query.get(name, none), name) for name, none in (("first", "0"), ("count", "60")))
    return first, min(count, MOST_ROWS)


def _text(request: web.Request) -> str:
    return request.query.get("text", "").strip().lower()[:100]


def _whole(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InputError(f"{name} {text[:40]!r}: give a whole number from 0")
    return int(text)


def _share(text: str, name: str, none: float) -> float:
    try:
        share = float(text) if text else none
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InputError(f"{name} {text[:40]!r}: give a share of the photo, 0 to 1")
    return share


async def _read_json(request: web.Request) -> dict[str, Any]:
    content = await read_json(request)
    if not isinstance(content, dict):
        raise InputError("the request's body is no JSON object")
    return content


def _read_mark(content: dict[str, Any]) -> tuple[str, str, bool]:
    what, name, leave = (content.get(key) for key in ("what", "id", "leave"))
    if not isinstance(what, str) or not isinstance(name, str) or not isinstance(leave, bool) or not is_id(what, name):
        raise InputError("a mark is `what` (object or photo), its `id`, and `leave` (true or false)")
    return what, name, leave


def _marked(viewer: Viewer, marked: LeftOut) -> dict[str, Any]:
    file = os.path.relpath(viewer.marks.path)
    return {"file": file, "objects": sorted(marked.objects), "photos": sorted(marked.photos)}
