"""The HTTP API of the edit page: photos, masks, edits. docs/app.md has the table.

photo + mask + references ──POST /api/edits──▶ its place in the queue ──events──▶ results, mask, settings, archive
"""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pbe_core.errors import InputError
from pbe_train.app.archive import safe_names, settings_of, write_archive
from pbe_train.app.edit_queue import Edit, EditQueue
from pbe_train.app.models import GONE, Choice
from pbe_train.app.painter import Painter
from pbe_train.app.security import RefusedError
from pbe_train.app.sessions import Session, Sessions
from pbe_train.app.uploads import (
    UPLOAD_BYTES,
    UPLOAD_PIXELS,
    Mask,
    Photo,
    add_mask,
    add_photo,
    in_thread,
    link_or_copy,
    read_body,
    shown_photo,
    small_picture,
)
from pbe_train.model.sampling import EVERYWHERE, GUIDANCE, SCHEDULER, STEPS, check_interval

MOST_REFERENCES = 8
REFERENCE_SIDE = 8
"""Px that a reference needs in width and height to show anything."""
MOST_SEEDS = 16
MOST_STEPS = 1000
HEARTBEAT_SECONDS = 15.0
LISTENERS_OF_SESSION = 24
LISTENERS = 256
DEFAULTS = {"guidance": GUIDANCE, "steps": STEPS, "scheduler": SCHEDULER}
# The guidance that the tiny world's README paints with.
TINY_DEFAULTS = {"guidance": 2.0}
SMALL_VIEW = 256


class Wanted(BaseModel):
    """The body of `POST /api/edits`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    photo: str
    mask: str
    references: list[str] = Field(min_length=1, max_length=MOST_REFERENCES)
    seeds: list[int] = Field(default=[0], min_length=1, max_length=MOST_SEEDS)
    guidance: float = Field(default=GUIDANCE, ge=-100, le=100)
    guidance_interval: tuple[float, float] = EVERYWHERE
    steps: int = Field(default=STEPS, ge=1, le=MOST_STEPS)
    reuse: int = Field(default=1, ge=1, le=MOST_STEPS)
    scheduler: str = Field(default=SCHEDULER, max_length=500)


class EditRoutes:
    """The handlers.

    Args:
        choices: models to offer.
        painter: the painting process.
        sessions: of all browsers.
        datasets: names of datasets, for the page's link.
        remote: whether people of other machines are here: then no path of this one is told.
    """

    def __init__(self, choices: list[Choice], painter: Painter, sessions: Sessions, datasets: list[str], remote: bool) -> None:
        self.choices, self.painter, self.sessions, self.datasets, self.remote = choices, painter, sessions, datasets, remote
        self.queue = EditQueue(painter, self._finished)
        self.ending = asyncio.Event()
        self.listeners = 0

    def routes(self) -> list[web.RouteDef]:
        """All of them."""
        return [
            web.get("/api/models", self.models),
            web.post("/api/photos", self.post_photo),
            web.get("/api/photos/{id}", self.get_photo),
            web.delete("/api/photos/{id}", self.delete_photo),
            web.post("/api/masks", self.post_mask),
            web.get("/api/masks/{id}", self.get_mask),
            web.post("/api/edits", self.post_edit),
            web.get("/api/edits", self.edits),
            web.get("/api/edits/{id}", self.get_edit),
            web.delete("/api/edits/{id}", self.delete_edit),
            web.get("/api/edits/{id}/events", self.events),
            web.get("/api/edits/{id}/preview", self.preview),
            web.get("/api/edits/{id}/results/{number:\\d{1,4}}", self.result),
            web.get("/api/edits/{id}/mask", self.edit_mask),
            web.get("/api/edits/{id}/settings", self.settings),
            web.get("/api/edits/{id}/archive", self.archive),
        ]

    async def models(self, _: web.Request) -> web.Response:
        """What there is to choose from, and the limits."""
        told = []
        for choice in self.choices:
            facts = self.painter.models[choice.source]
            small = facts["view_size"] <= SMALL_VIEW
            defaults = DEFAULTS | (TINY_DEFAULTS if small else {}) | ({} if facts["guidance"] else {"guidance": 1.0})
            told.append({"id": choice.id, "name": choice.name, "note": choice.note, **told_of(facts), "defaults": defaults})
        limits = {
            "bytes": UPLOAD_BYTES,
            "pixels": UPLOAD_PIXELS,
            "references": MOST_REFERENCES,
            "reference_side": REFERENCE_SIDE,
            "seeds": MOST_SEEDS,
            "steps": MOST_STEPS,
        }
        return web.json_response(
            {"models": told, "schedulers": self.painter.schedulers, "limits": limits, "datasets": self.datasets}
        )

    async def post_photo(self, request: web.Request) -> web.Response:
        """Keep a photo."""
        photo = await add_photo(request, request["session"], self.sessions)
        return web.json_response(_told_of_photo(photo))

    async def get_photo(self, request: web.Request) -> web.Response:
        """A photo as browsers show it."""
        photo, most = _session(request).find(Photo, request.match_info["id"], "photo"), _most(request)
        with photo.in_use():
            body, kind = await in_thread(shown_photo, photo.folder / "file", most)
        return web.Response(body=body, content_type=kind)

    async def delete_photo(self, request: web.Request) -> web.Response:
        """Forget a photo."""
        session = _session(request)
        self.sessions.drop(session, session.find(Photo, request.match_info["id"], "photo"))
        return web.json_response({})

    async def post_mask(self, request: web.Request) -> web.Response:
        """Keep a mask."""
        session, given = _session(request), request.query.get("photo")
        photo = session.find(Photo, given, "photo") if given else None
        mask = await add_mask(request, session, self.sessions, photo)
        return web.json_response({"id": mask.id, "width": mask.width, "height": mask.height, "share": mask.share})

    async def get_mask(self, request: web.Request) -> web.StreamResponse:
        """A mask, 255 = repaint."""
        mask = _session(request).find(Mask, request.match_info["id"], "mask")
        return web.FileResponse(_file(mask.folder / "mask.png"))

    async def post_edit(self, request: web.Request) -> web.Response:
        """Let an edit wait for its turn. It has copies of all it needs."""
        session, wanted = _session(request), await _wanted(request)
        choice = next((each for each in self.choices if each.id == wanted.model), None)
        if not choice:
            raise RefusedError(400, f"model {wanted.model[:50]!r}: give one of {', '.join(each.id for each in self.choices)}")
        photo, mask = session.find(Photo, wanted.photo, "photo"), session.find(Mask, wanted.mask, "mask")
        references = [session.find(Photo, id, "reference") for id in wanted.references]
        self._check(wanted, self.painter.models[choice.source], photo, mask, references)
        self.queue.check_room(session)
        files = [photo.folder / "file", mask.folder / "mask.png", *(each.folder / "file" for each in references)]
        size = sum(file.stat().st_size for file in files)
        with contextlib.ExitStack() as kept:
            for item in (photo, mask, *references):
                kept.enter_context(item.in_use())
            self.sessions.make_room(session, size)
            edit = self.sessions.add(session, Edit)
        names = safe_names([photo.name, "mask.png", *(each.name for each in references)], len(wanted.seeds))
        try:
            for file, name in zip(files, names, strict=True):
                link_or_copy(file, edit.folder / name)
        except OSError:
            self.sessions.drop(session, edit)
            edit.release()
            raise
        self.sessions.resize(session, edit, size)
        edit.owner, edit.choice, edit.of = session.id, choice, _told_of_photo(photo)
        edit.photo, edit.mask, *edit.references = names
        edit.how = wanted.model_dump(include={"seeds", "guidance", "guidance_interval", "steps", "reuse", "scheduler"})
        edit.steps = wanted.steps
        self.queue.add(edit)
        return web.json_response({"id": edit.id, "place": edit.place})

    def _check(self, wanted: Wanted, facts: dict[str, Any], photo: Photo, mask: Mask, references: list[Photo]) -> None:
        if (photo.width, photo.height) != (mask.width, mask.height):
            raise RefusedError(
                400,
                f"the mask is {mask.width}x{mask.height} px, the photo {photo.name} is {photo.width}x{photo.height} px; draw the "
                "mask at the photo's size",
            )
        small = next((each for each in references if min(each.width, each.height) < REFERENCE_SIDE), None)
        if small:
            size = f"{small.width} × {small.height} px"
            least = f"at least {REFERENCE_SIDE} px wide and high"
            raise RefusedError(400, f"{small.name}: {size} show too little of anything; give a photo of what to paint, {least}")
        if wanted.scheduler.partition("(")[0].strip() not in self.painter.schedulers:
            raise RefusedError(400, f"scheduler {wanted.scheduler[:60]!r}: give one of {', '.join(self.painter.schedulers)}")
        try:
            check_interval(wanted.guidance_interval)
        except InputError as error:
            raise RefusedError(400, str(error)) from None
        if len(wanted.references) > 1 and not facts["several_references"]:
            raise RefusedError(400, "this model takes one reference; give one")
        if wanted.guidance != 1 and not facts["guidance"]:
            raise RefusedError(400, "this model was trained without guidance; give guidance 1")

    async def edits(self, request: web.Request) -> web.Response:
        """The session's edits, oldest first, with what was asked for: a page that was left finds them again."""
        found = [item for item in _session(request).items.values() if isinstance(item, Edit) and item.of]
        told = [{**self.state_of(edit), "photo": edit.of, "model": edit.choice.id, **edit.how} for edit in found]
        return web.json_response({"edits": told})

    async def get_edit(self, request: web.Request) -> web.Response:
        """How far an edit is."""
        return web.json_response(self.state_of(_edit(request)))

    async def delete_edit(self, request: web.Request) -> web.Response:
        """Cancel an edit, or forget one that is over."""
        edit = _edit(request)
        if edit.is_over:
            self.sessions.drop(_session(request), edit)
        else:
            self.queue.cancel(edit)
        return web.json_response({})

    async def events(self, request: web.Request) -> web.StreamResponse:
        """The state of an edit whenever it changes, as Server-Sent Events; ends with the edit."""
        session, edit = _session(request), _edit(request)
        if session.listeners >= LISTENERS_OF_SESSION or self.listeners >= LISTENERS:
            raise RefusedError(429, "too many pages look on at edits; close some")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        await response.prepare(request)
        session.listeners += 1
        self.listeners += 1
        self.queue.watch(edit, 1)
        try:
            while True:
                changed, over = edit.changed, edit.is_over  # Before the state is read: what changes while it is sent counts.
                await response.write(f"data: {json.dumps(self.state_of(edit))}\n\n".encode())
                if over or self.ending.is_set():
                    return response
                await self._wait(changed, response)
        finally:
            session.listeners -= 1
            self.listeners -= 1
            self.queue.watch(edit, -1)

    async def _wait(self, changed: asyncio.Event, response: web.StreamResponse) -> None:
        """Until something changes or the server ends; meanwhile a comment now and then, which fails where nobody listens."""
        waits = [asyncio.create_task(event.wait()) for event in (changed, self.ending)]
        try:
            while not (await asyncio.wait(waits, timeout=HEARTBEAT_SECONDS, return_when="FIRST_COMPLETED"))[0]:
                await response.write(b": still here\n\n")
        finally:
            for wait in waits:
                wait.cancel()

    async def preview(self, request: web.Request) -> web.StreamResponse:
        """The newest preview."""
        edit = _edit(request)
        if not edit.previews:
            raise RefusedError(404, "there is no preview of this edit yet; wait for one")
        return web.FileResponse(_file(edit.folder / "preview.jpg"))

    async def result(self, request: web.Request) -> web.StreamResponse:
        """A result at the photo's full size."""
        edit, number = _edit(request), int(request.match_info["number"])
        if number >= edit.results:
            raise RefusedError(404, f"result {number} of this edit is not painted; it has {edit.results}")
        path = _file(edit.folder / f"result-{number}.png")
        if most := _most(request):
            with edit.in_use():
                return web.Response(body=await in_thread(small_picture, path, most), content_type="image/png")
        return web.FileResponse(path)

    async def edit_mask(self, request: web.Request) -> web.StreamResponse:
        """The mask of an edit."""
        edit = _edit(request)
        return web.FileResponse(_file(edit.folder / edit.mask))

    async def settings(self, request: web.Request) -> web.Response:
        """With what `pbe edit --settings` repeats an edit."""
        edit = _begun(request)
        with edit.in_use():
            made = await in_thread(settings_of, edit, self.remote)
        return web.Response(
            text=made, content_type="application/json", headers={"Content-Disposition": 'attachment; filename="settings.json"'}
        )

    async def archive(self, request: web.Request) -> web.StreamResponse:
        """A zip of all that went into an edit and came out."""
        edit = _begun(request)
        headers = {"Content-Type": "application/zip", "Content-Disposition": 'attachment; filename="edit.zip"'}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        with edit.in_use():
            await write_archive(edit, self.remote, response)
        return response

    def state_of(self, edit: Edit) -> dict[str, Any]:
        """An edit as the API tells it."""
        results = [
            {"seed": seed, "url": f"/api/edits/{edit.id}/results/{number}"}
            for number, seed in enumerate(edit.how["seeds"][: edit.results])
        ]
        return {
            "id": edit.id,
            "state": edit.state,
            "place": edit.place,
            "seed_number": edit.seed_number,
            "step": edit.step,
            "steps": edit.steps,
            "seconds_left": self.queue.seconds_left(edit),
            "error": edit.error,
            "previews": edit.previews,
            "results": results,
        }

    def _finished(self, edit: Edit) -> None:
        """Count what an edit has come to, and let others go for it."""
        session = self.sessions.all.get(edit.owner)
        (edit.folder / "preview.tmp").unlink(missing_ok=True)
        if session:
            self.sessions.resize(session, edit, sum(file.stat().st_size for file in edit.folder.glob("*")))
            with edit.in_use(), contextlib.suppress(RefusedError):
                self.sessions.make_room(session, 0)


def told_of(facts: dict[str, Any]) -> dict[str, Any]:
    """What the page is told of a model."""
    known = ("view_size", "buckets", "licence", "several_references", "guidance")
    return {name: facts[name] for name in known if name != "buckets" or name in facts}


async def _wanted(request: web.Request) -> Wanted:
    try:
        return Wanted.model_validate_json(await read_body(request))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise RefusedError(400, f"{where}: {first['msg'][:200]}; docs/app.md says what an edit takes") from None


def _told_of_photo(photo: Photo) -> dict[str, Any]:
    return {"id": photo.id, "name": photo.name, "width": photo.width, "height": photo.height}


def _session(request: web.Request) -> Session:
    session: Session = request["session"]
    return session


def _edit(request: web.Request) -> Edit:
    return _session(request).find(Edit, request.match_info["id"], "edit")


def _begun(request: web.Request) -> Edit:
    edit = _edit(request)
    if not edit.results:
        raise RefusedError(404, "nothing of this edit is painted yet; wait for its first result")
    for name in (edit.photo, edit.mask, *edit.references, *(f"result-{number}.png" for number in range(edit.results))):
        _file(edit.folder / name)
    return edit


def _file(path: Path) -> Path:
    """A file of ours, which somebody may have taken away all the same."""
    if not path.is_file():
        raise RefusedError(410, f"{GONE}; give all of it again")
    return path


def _most(request: web.Request) -> int | None:
    given = request.query.get("most")
    if given is None:
        return None
    if not given.isascii() or not given.isdigit() or not 1 <= int(given[:9]) <= 100_000:
        raise RefusedError(400, f"most {given[:20]!r}: give a number of px, from 1")
    return int(given)
