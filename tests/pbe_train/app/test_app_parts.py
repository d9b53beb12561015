"""What an app is made of, without a server: turns, room, names, the settings of an edit."""

import asyncio
import errno
import hashlib
import io
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pbe_train import PaintByExample, sample
from pbe_train.app.archive import safe_names, settings_of
from pbe_train.app.edit_queue import MOST_WAITING, Edit, EditQueue
from pbe_train.app.edit_routes import EditRoutes
from pbe_train.app.models import FINISHED, Choice, Facts, find_models
from pbe_train.app.painter import Message, Painter
from pbe_train.app.security import RefusedError
from pbe_train.app.sessions import SESSION_SECONDS, Item, Room, Session, Sessions, private_folder
from pbe_train.app.uploads import Mask, Photo, shown_name
from pbe_train.app.worker import Worker, free_share, in_words
from pbe_train.editing.edit_settings import EditSettings, PictureRecord, find_picture, read_settings
from pbe_train.model.sampling import SCHEDULER, check_published
from tests.conftest import call_program

TINY = REPOSITORY / FINISHED
HOW = {"seeds": [0, 1], "guidance": 2.0, "guidance_interval": (0.0, 1.0), "steps": 10, "reuse": 1, "scheduler": "DDIMScheduler"}


class Recorder(Painter):
    """Paints nothing and says what it was asked for; each edit ends when it is told to."""

    def __init__(self) -> None:
        super().__init__([], {})
        self.painted: list[str] = []
        self.orders: list[Message] = []
        self.going_on = asyncio.Semaphore(0)

    async def paint(self, job: Message, hear) -> None:
        self.painted.append(job["edit"])
        await self.going_on.acquire()
        hear({"is": "done", "edit": job["edit"]})

    def tell(self, order: Message) -> None:
        self.orders.append(order)


class Told(Painter):
    """Hears what a test says, whatever its process does."""

    def __init__(self, *said: Message | None) -> None:
        super().__init__([], {})
        self.said = list(said)

    async def _hear(self) -> Message | None:
        return self.said.pop(0)


def ready(**models: Facts) -> Message:
    return {"is": "ready", "models": models, "wrong": {}, "schedulers": []}


def make_edit(id: str, owner: str) -> Edit:
    return Edit(id, Path(id), users=1, owner=owner, how=dict(HOW))


@settings(max_examples=40)
@given(arrivals=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 2)), max_size=24))
def test_nobody_has_two_turns_while_another_waits(arrivals: list[tuple[str, int]]):
    """Edits arrive, and between them some are painted: between two turns of one session, each that waited meanwhile has had one.

    The places that are told are those that the edits then have.
    """

    async def go() -> None:
        painter, finished = Recorder(), []
        queue = EditQueue(painter, finished.append)
        running = asyncio.create_task(queue.run())
        owners, waits_since = {}, {}
        for number, (owner, done) in enumerate(arrivals):
            edit = make_edit(str(number), owner)
            owners[edit.id] = owner
            queue.add(edit)
            waits_since[edit.id] = len(painter.painted)
            await settle()
            for _ in range(done):
                painter.going_on.release()
            await settle()
            waiting = queue.order()
            assert [each.place for each in waiting] == list(range(1, len(waiting) + 1))
        expected = [each.id for each in queue.order()]
        before = len(painter.painted)
        for _ in arrivals:
            painter.going_on.release()
        await settle()
        running.cancel()
        assert painter.painted[before:] == expected
        assert sorted(edit.id for edit in finished) == sorted(owners)
        assert all(edit.users == 0 for edit in finished)
        turns = [owners[id] for id in painter.painted]
        for later, owner in enumerate(turns):
            if owner not in turns[:later]:
                continue
            earlier = later - 1 - turns[:later][::-1].index(owner)
            waited = {owners[id] for id in painter.painted[later + 1 :] if waits_since[id] <= earlier}
            assert waited - {owner} <= set(turns[earlier + 1 : later])

    asyncio.run(go())


async def settle() -> None:
    """Let all that can go on go on."""
    for _ in range(40):
        await asyncio.sleep(0)


def test_previews_are_asked_for_only_while_somebody_listens():
    async def go() -> None:
        painter = Recorder()
        queue = EditQueue(painter, lambda _: None)
        running = asyncio.create_task(queue.run())
        edit = make_edit("1", "a")
        queue.add(edit)
        await settle()
        for more in (1, 1, -1, -1):
            queue.watch(edit, more)
        assert [order["on"] for order in painter.orders] == [True, False]
        running.cancel()

    asyncio.run(go())


def test_the_time_left_is_that_of_all_before():
    """By the pace of an edit's own steps, or else that of its model: 20 passes of one edit took 20 seconds."""

    async def go() -> None:
        painter = Recorder()
        queue = EditQueue(painter, lambda _: None)
        running = asyncio.create_task(queue.run())
        edits = [make_edit(str(number), "a") for number in range(3)]
        for edit in edits:
            queue.add(edit)
        await settle()
        assert [queue.seconds_left(edit) for edit in edits] == [None] * 3
        edits[0].began, edits[0].heard, edits[0].steps_since = 100.0, 120.0, 10
        edits[0].step, edits[0].steps, edits[0].seed_number = 1, 10, 1
        # Nine steps of two seconds; the others are not known yet.
        assert [queue.seconds_left(edit) for edit in edits] == [18.0, None, None]
        painter.going_on.release()
        await settle()
        # Two seeds of ten steps of two passes each.
        assert [queue.seconds_left(edit) for edit in edits] == [None, 40.0, 80.0]
        # Of two steps one is whole, and the other a quarter of one.
        edits[2].how["reuse"] = 2
        assert [queue.seconds_left(edit) for edit in edits] == [None, 40.0, 65.0]
        running.cancel()

    asyncio.run(go())


def test_the_queue_of_all_is_bounded():
    async def go() -> None:
        queue = EditQueue(Recorder(), lambda _: None)
        for number in range(MOST_WAITING):
            queue.add(make_edit(str(number), f"session {number // 8}"))
        with pytest.raises(RefusedError, match="64 edits are waiting already"):
            queue.check_room(Session("new", Path(), 0.0))

    asyncio.run(go())


def put(sessions: Sessions, session: Session, size: int) -> Item:
    """An item of so many bytes, as an upload makes it."""
    item = sessions.add(session, Photo)
    sessions.make_room(session, size)
    sessions.resize(session, item, size)
    (item.folder / "file").write_bytes(bytes(size))
    item.users = 0
    return item


def test_the_oldest_make_room_of_the_same_session_first_and_what_is_in_use_stays(tmp_path: Path):
    sessions = Sessions(tmp_path, Room(session_bytes=100, all_bytes=150, session_items=4))
    ann, bob = sessions.new(), sessions.new()
    first, second = put(sessions, ann, 60), put(sessions, ann, 30)
    put(sessions, ann, 20)  # 110 > 100.
    assert [item.bytes for item in ann.items.values()] == [30, 20]
    assert not first.folder.exists()
    with pytest.raises(RefusedError, match="not kept any more") as gone:
        ann.find(Photo, first.id, "photo")
    assert gone.value.status == 410
    with pytest.raises(RefusedError, match="no such photo") as unknown:
        bob.find(Photo, second.id, "photo")
    assert unknown.value.status == 404
    with second.in_use():
        put(sessions, bob, 100)  # 150 in all.
        put(sessions, bob, 0)
        put(sessions, bob, 25)
        # Of Bob's own the oldest: 100. Then nothing more had to go.
        assert (ann.bytes, bob.bytes, sessions.bytes) == (50, 25, 75)
        put(sessions, bob, 75)
        put(sessions, sessions.new(), 40)  # Of all the oldest that is idle: Ann's 20.
        assert [item.bytes for item in ann.items.values()] == [30]
        with pytest.raises(RefusedError, match="no room is left"):
            sessions.make_room(ann, 80)
    assert ann.bytes == sum(path.stat().st_size for path in ann.folder.rglob("file"))
    for _ in range(6):
        put(sessions, bob, 1)
    assert len(bob.items) == 4


def test_what_is_deleted_while_somebody_reads_it_stays_until_then(tmp_path: Path):
    """A zip that is on its way comes to its end."""
    sessions = Sessions(tmp_path)
    ann = sessions.new()
    item = put(sessions, ann, 5)
    with item.in_use(), item.in_use():
        sessions.drop(ann, item)
        assert (sessions.bytes, ann.items) == (0, {})
        assert (item.folder / "file").read_bytes() == bytes(5)
    assert not item.folder.exists()


def test_an_edit_whose_files_make_trouble_keeps_no_other_waiting():
    async def go() -> None:
        painter, finished = Recorder(), []

        def lose(edit: Edit) -> None:
            finished.append(edit.id)
            raise FileNotFoundError(edit.folder)

        queue = EditQueue(painter, lose)
        running = asyncio.create_task(queue.run())
        for id in ("1", "2"):
            queue.add(make_edit(id, "ann"))
            painter.going_on.release()
        await settle()
        running.cancel()
        assert finished == ["1", "2"]

    asyncio.run(go())


def test_a_model_that_vanished_is_still_told_of_by_a_later_painting_process(monkeypatch: pytest.MonkeyPatch):
    """Else the page, which shows all models, would show none to anybody."""
    monkeypatch.setattr("sys.executable", shutil.which("true"))

    async def go() -> None:
        painter = Told(ready(a={}, b={}), ready(a={}))
        for _ in range(2):
            await painter.start()
            await painter.stop()
        assert painter.models == {"a": {}, "b": {}}

    asyncio.run(go())


def test_a_painting_process_that_died_between_two_edits_takes_none_with_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.executable", shutil.which("true"))

    async def paint(*said: Message | None) -> list[str]:
        heard: list[Message] = []
        await Told(*said).paint({"edit": "1"}, heard.append)
        return [message["is"] for message in heard]

    loading, done = {"is": "loading", "edit": "1"}, {"is": "done", "edit": "1"}
    assert asyncio.run(paint(ready(), None, ready(), loading, done)) == ["loading", "done"]
    # It may be this very edit that kills it: once is enough.
    assert asyncio.run(paint(ready(), loading, None)) == ["loading", "failed"]
    assert asyncio.run(paint(ready(), None, ready(), None)) == ["failed"]


def test_an_edit_for_which_the_disk_has_no_room_is_gone_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sessions = Sessions(tmp_path)
    ann = sessions.new()
    photo, mask = put(sessions, ann, 5), sessions.add(ann, Mask)
    mask.release()
    (mask.folder / "mask.png").write_bytes(b"x")
    photo.width = photo.height = mask.width = mask.height = 20

    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "full", str(target))

    monkeypatch.setattr("pbe_train.app.edit_routes.link_or_copy", fail)
    painter = Recorder()
    painter.models = {"a": {"several_references": True, "guidance": True}}
    painter.schedulers = [SCHEDULER.partition("(")[0]]
    wanted = {"model": "a", "photo": photo.id, "mask": mask.id, "references": [photo.id]}

    async def ask() -> None:
        request = make_mocked_request("POST", "/api/edits", payload=StreamReader(BaseProtocol(asyncio.get_running_loop()), 2**16))
        request["session"] = ann
        request.content.feed_data(json.dumps(wanted).encode())
        request.content.feed_eof()
        await EditRoutes([Choice("a", "a", "a")], painter, sessions, [], False).post_edit(request)

    with pytest.raises(OSError, match="full"):
        asyncio.run(ask())
    assert list(ann.items.values()) == [photo, mask]
    assert not ann.busy


def test_the_last_change_of_an_edit_is_sent_though_it_comes_while_another_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sessions = Sessions(tmp_path)
    ann = sessions.new()
    edit = sessions.add(ann, Edit)
    edit.state, edit.how = "painting", {"seeds": [0], "guidance": 2.0, "steps": 2}
    sent: list[bytes] = []

    async def prepare(self: web.StreamResponse, request: web.BaseRequest) -> None: ...

    async def write(self: web.StreamResponse, data: bytes) -> None:
        sent.append(data)
        if len(sent) == 1:
            edit.hear({"is": "cancelled"})

    monkeypatch.setattr(web.StreamResponse, "prepare", prepare)
    monkeypatch.setattr(web.StreamResponse, "write", write)
    request = make_mocked_request("GET", f"/api/edits/{edit.id}/events", match_info={"id": edit.id})
    request["session"] = ann
    asyncio.run(EditRoutes([Choice("a", "a", "a")], Recorder(), sessions, [], False).events(request))
    assert [json.loads(one.removeprefix(b"data: "))["state"] for one in sent] == ["painting", "cancelled"]


def test_sessions_are_forgotten_with_all_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pbe_train.app.sessions.MOST_SESSIONS", 3)
    sessions = Sessions(tmp_path)
    ann, bob, idle = sessions.new(), sessions.new(), sessions.new()
    kept, busy = put(sessions, ann, 5), put(sessions, bob, 5)
    # Too many: who has nothing goes first.
    sessions.new()
    assert idle.id not in sessions.all
    assert sessions.find(idle.id) is sessions.find(None) is sessions.find("chosen") is None
    with busy.in_use():
        for session in sessions.all.values():
            session.seen = time.monotonic() - SESSION_SECONDS - 1
        assert sessions.find(bob.id) is bob  # Seen now.
        bob.seen = time.monotonic() - SESSION_SECONDS - 1  # A machine may have begun to count an hour ago.
        sessions.expire()
        assert list(sessions.all.values()) == [bob]
    assert not kept.folder.exists()
    assert (sessions.bytes, busy.folder.exists()) == (5, True)
    sessions.expire()
    assert (sessions.bytes, sessions.all, list(tmp_path.iterdir())) == (0, {}, [])


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with private_folder() as folder:
        parent = folder.parent
        with private_folder() as second:
            assert folder.is_dir()
            assert second != folder
    assert list(parent.iterdir()) == []
    parent.chmod(0o755)
    with pytest.raises(InputError, match="others can read or write there"), private_folder():
        pass
    parent.rmdir()
    parent.symlink_to(tmp_path)
    with pytest.raises(InputError, match="others can read or write there"), private_folder():
        pass


@given(names=st.lists(st.text(max_size=120), min_size=1, max_size=10), results=st.integers(0, 3))
def test_names_in_archives_are_plain_and_each_is_there_once(names: list[str], results: int):
    safe = safe_names(names, results)
    own = {"settings.json", *(f"result-{number}.png" for number in range(results))}
    assert len({name.lower() for name in safe} | own) == len(names) + len(own)
    for name in safe:
        assert name.isascii()
        assert name.isprintable()
        assert len(name) <= 80
        assert not set(name) & set('/\\:*?"<>| ')
        assert not name.startswith((".", "-"))
        assert Path(name).name == name
        PictureRecord(name=name, sha256="")


def test_names_in_archives_keep_what_can_be_kept():
    given = ["photo.jpg", "../../etc/passwd", "PHOTO.JPG", "con.png", "Über mich.png", "result-0.png", ".png", ""]
    made = ["photo.jpg", "_.._etc_passwd", "PHOTO-2.JPG", "_con.png", "_ber_mich.png", "result-0-2.png", "png", "file"]
    assert safe_names(given, 1) == made


@given(header=st.text(st.characters(max_codepoint=126), max_size=200))
def test_a_shown_name_is_one_short_line_without_folders(header: str):
    name = shown_name(header, "photo")
    assert name.isprintable()
    assert 1 <= len(name) <= 80
    assert not set(name) & set("/\\")


def test_models_are_named_by_who_starts_the_server_or_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for run, step in (("mine", 10), ("empty", None)):
        folder = tmp_path / "runs" / run / "checkpoints"
        folder.mkdir(parents=True)
        if step:
            (folder / f"step-{step:08d}").mkdir()
            (folder / f"step-{step:08d}" / "state.json").touch()
    assert [tuple(choice) for choice in find_models([])] == [
        ("tiny-world", "tiny world", "tiny_world/weights/model", False),
        ("mine", "mine", "runs/mine", False),
    ]
    (tmp_path / "a=b").mkdir()
    given = ["My Größe!=runs/mine", "runs/mine", "a=b", "my-gr-e=runs/mine"]
    assert [tuple(choice)[:3] for choice in find_models(given)] == [
        ("my-gr-e", "My Größe!", "runs/mine"),
        ("mine", "mine", "runs/mine"),
        ("a-b", "a=b", "a=b"),
        ("my-gr-e-2", "my-gr-e", "runs/mine"),
    ]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Of an edit whose files lie beside it; they need be no pictures to be looked for."""
    records = {}
    for name in ("photo.jpg", "mask.png", "one.png", "other.png"):
        (tmp_path / name).write_bytes(name.encode())
        records[name] = {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}
    content = {
        "model": {"name": "mine", "source": "runs/mine", "sha256": None},
        "seeds": [5, 6],
        "guidance": 3.5,
        "steps": 12,
        "scheduler": "PNDMScheduler",
        "size": 128,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "photo": records["photo.jpg"],
        "mask": records["mask.png"],
        "references": [records["one.png"], records["other.png"]],
    }
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(content))
    return path


def options_of(monkeypatch: pytest.MonkeyPatch, *options: str):
    monkeypatch.setattr("sys.argv", ["edit", "--out", "x.png", *options])
    return sample.parse_options()


def test_settings_are_taken_and_options_win(written: Path, monkeypatch: pytest.MonkeyPatch):
    options, read = options_of(monkeypatch, "--settings", str(written))
    assert read
    sample.find_pictures(options, read)
    folder = written.parent
    assert (options.model, options.seed, options.guidance, options.steps) == (Path("runs/mine"), 5, 3.5, 12)
    assert (options.scheduler, options.size, options.threads, options.device) == ("PNDMScheduler", 128, 1, "cpu")
    assert (options.image, options.mask) == (folder / "photo.jpg", folder / "mask.png")
    assert options.reference == [folder / "one.png", folder / "other.png"]
    # Files of before there was an interval are of edits with guidance everywhere.
    assert options.guidance_interval == (0.0, 1.0)

    moved = folder / "elsewhere"
    (folder / "photo.jpg").rename(moved)
    given = ["--image", str(moved), "--seed", "6", "--model", "runs/other", "--steps", "3"]
    options, read = options_of(monkeypatch, "--settings", str(written), *given)
    assert read
    sample.find_pictures(options, read)
    assert (options.image, options.seed, options.model, options.steps, options.guidance) == (moved, 6, Path("runs/other"), 3, 3.5)


def test_the_published_way_wins_over_what_the_file_says_of_it(written: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps and scheduler of the file are not the person's own words; those beside the option are, and are refused."""
    written.write_text(json.dumps(json.loads(written.read_text()) | {"precision": "bf16", "guidance_interval": [0, 0.5]}))
    options, _ = options_of(monkeypatch, "--settings", str(written), "--exact-published")
    check_published(options.steps, options.scheduler, options.guidance_interval)
    assert (options.precision, options.compile, options.guidance, options.size) == ("auto", False, 3.5, 128)
    options, _ = options_of(monkeypatch, "--settings", str(written), "--exact-published", "--steps", "12")
    with pytest.raises(InputError, match=r"^exact published: 50 steps of PLMS"):
        check_published(options.steps, options.scheduler, options.guidance_interval)


def test_an_interval_of_guidance_is_written_and_read_where_there_is_one(written: Path, monkeypatch: pytest.MonkeyPatch):
    content = json.loads(written.read_text())
    whole = read_settings(written)
    assert "guidance_interval" not in json.loads(whole.model_dump_json())
    written.write_text(whole.model_copy(update={"guidance_interval": (0.2, 0.7)}).model_dump_json())
    assert json.loads(written.read_text())["guidance_interval"] == [0.2, 0.7]
    options, _ = options_of(monkeypatch, "--settings", str(written))
    assert options.guidance_interval == (0.2, 0.7)
    assert content.items() <= json.loads(written.read_text()).items()


def test_a_layout_that_the_file_leaves_out_is_taken_as_it_was(written: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a word about it, what has 16 bits is channels-last; such a file is of an edit that was not."""
    written.write_text(json.dumps(json.loads(written.read_text()) | {"precision": "bf16"}))
    options, _ = options_of(monkeypatch, "--settings", str(written))
    assert (options.precision, options.channels_last, options.prepacked, options.compile) == ("bf16", False, False, False)
    options, _ = options_of(monkeypatch, "--settings", str(written), "--channels-last", "true")
    assert options.channels_last
    packed = read_settings(written).model_copy(update={"prepacked": True})
    written.write_text(packed.model_dump_json())
    assert '"prepacked":true' in written.read_text()
    assert options_of(monkeypatch, "--settings", str(written))[0].prepacked


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"steps": "many"}, [], "{settings}: steps: Input should be a valid integer"),
        ({"more": 1}, [], "{settings}: more: Extra inputs are not permitted"),
        (
            {"photo": {"name": "../photo.jpg", "sha256": ""}},
            [],
            "{settings}: photo.name: must be the name of a file",
        ),
        ({"photo": {"name": "/etc/passwd", "sha256": ""}}, [], "{settings}: photo.name: must be the name of a file"),
        (
            {"photo": {"name": "gone.jpg", "sha256": ""}},
            [],
            "{folder}/gone.jpg: cannot be read (No such file or directory); give",
        ),
        ({}, ["--mask", "{folder}/one.png"], "{folder}/one.png: is not the mask.png that {settings} names (SHA-256 "),
        ({}, ["--reference", "{folder}/one.png"], "--reference: 1 file, and {settings} names 2; give as many"),
        ({"model": {"name": "mine"}}, [], "{settings}: does not say where the model 'mine' lies; give it with --model"),
        ({}, ["--threads", "0"], "--threads 0: must be 1 or more"),
        ({}, ["--settings", "{folder}/gone.json"], "{folder}/gone.json: cannot be read (No such file or directory)"),
        ({}, ["--settings", "{folder}/one.png"], "{folder}/one.png: it: Invalid JSON"),
    ],
)
def test_settings_that_do_not_fit_are_refused(written: Path, changed: dict, options: list[str], message: str):
    written.write_text(json.dumps(json.loads(written.read_text()) | changed))
    names = {"settings": written, "folder": written.parent}
    given = ["--settings", str(written), "--out", str(written.parent / "x.png"), *(each.format(**names) for each in options)]
    done = call_program(sample.main, *given)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message.format(**names)}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_picture_must_be_the_one_of_the_edit(written: Path):
    read = read_settings(written)
    assert isinstance(read, EditSettings)
    (written.parent / "one.png").write_bytes(b"changed")
    with pytest.raises(InputError, match=r"one\.png: is not the one\.png that .* names"):
        find_picture(read.references[0], None, written, "--reference")


def test_models_stay_loaded_while_memory_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those unused for longest go first; a run is its newest checkpoint when it is loaded, whatever a training writes later."""
    run = tmp_path / "run" / "checkpoints"
    shutil.copytree(TINY, run / "step-00000001")
    worker = Worker({"device": "cpu", "precision": "fp32", "offload": False, "threads": None}, io.StringIO())
    monkeypatch.setattr("pbe_train.app.worker.free_share", lambda device: 0.6)
    tiny, mine = worker.load(FINISHED), worker.load(str(run.parent))
    (run / "step-00000002").mkdir()
    assert worker.load(str(run.parent)) is mine
    assert mine.source == str(run / "step-00000001")
    assert (tiny.source, tiny.sha256) == (FINISHED, mine.sha256)
    assert worker.load(FINISHED) is tiny
    assert list(worker.loaded) == [str(run.parent), FINISHED]
    monkeypatch.setattr("pbe_train.app.worker.free_share", lambda device: 0.4)
    shutil.copytree(TINY, tmp_path / "other")
    worker.load(str(tmp_path / "other"))
    assert list(worker.loaded) == [str(tmp_path / "other")]


def test_how_much_memory_is_free():
    assert 0 < free_share("cpu") < 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InputError("mask.png: is empty"), "mask.png: is empty"),
        (MemoryError(), "the memory is full; "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the memory is full; "),
        (OSError(errno.ENOSPC, "no room", "/x/y"), "No space left on device: /x; try again"),
        (FileNotFoundError(errno.ENOENT, "gone", "/edit/result-0.png"), "a file of this edit is gone from the server's folder"),
        (FileNotFoundError(errno.ENOENT, "gone", "/model/x"), "a defect of this program (FileNotFoundError); "),
        (KeyError("x"), "a defect of this program (KeyError); "),
    ],
)
def test_what_goes_wrong_in_painting_is_a_sentence(error: Exception, told: str, capsys: pytest.CaptureFixture[str]):
    assert in_words(error, "/edit").startswith(told)
    assert ("Traceback" in capsys.readouterr().err or "Error)" in told) == ("defect" in told)


def test_other_weights_than_those_of_the_edit_are_told(
    written: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Refused where the settings themselves name the model; only told where somebody chose another one."""
    paint = PaintByExample.from_pretrained(FINISHED, device="cpu")
    content = json.loads(written.read_text())
    there = hashlib.sha256((TINY / "model.safetensors").read_bytes()).hexdigest()[:12]
    for source, sha256, options, told in (
        (FINISHED, "f" * 64, [], "has other weights"),
        ("runs/mine", "f" * 64, ["--model", FINISHED], "has other weights"),
        (FINISHED, None, [], ""),
    ):
        written.write_text(json.dumps(content | {"model": {"name": "mine", "source": source, "sha256": sha256}}))
        options_given, read = options_of(monkeypatch, "--settings", str(written), *options)
        if told and not options:
            with pytest.raises(InputError, match=rf"model: {told} \({there}\) than the model of .* \(ffffffffffff\)"):
                sample.prepare(paint, options_given, read)
        else:
            sample.prepare(paint, options_given, read)
            assert told in capsys.readouterr().err


def test_a_small_model_takes_one_thread_unless_it_is_told_otherwise(written: Path, monkeypatch: pytest.MonkeyPatch):
    paint = PaintByExample.from_pretrained(FINISHED, device="cpu")
    given = ["--model", FINISHED, "--image", "x", "--mask", "x", "--reference", "x"]
    for options, threads in (([], 1), (["--threads", "2"], 2), (["--settings", str(written)], 1)):
        torch.set_num_threads(2)
        parsed, read = options_of(monkeypatch, *given, *options)
        sample.prepare(paint, parsed, read)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)


def test_loras_of_the_server_are_painted_with_and_recorded(tmp_path: Path):
    """Whoever is on another machine is not told where they lie."""
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = PaintByExample.from_pretrained(TINY, device="cpu").run.model.kept()[f"{layer}.weight"]
    lora = {f"{layer}.lora_A.weight": torch.ones(1, weight.shape[1]), f"{layer}.lora_B.weight": torch.ones(len(weight), 1)}
    file = tmp_path / "cup.safetensors"
    save_file(lora, file)
    for name in ("photo", "mask", "reference"):
        shutil.copy(REPOSITORY / "tiny_world" / "example" / f"{name}.png", tmp_path)
    said = io.StringIO()
    given = {"device": "cpu", "precision": "fp32", "offload": False, "threads": 1, "loras": [f"{file}:0.25"]}
    job = {"edit": "e", "folder": str(tmp_path), "photo": "photo.png", "mask": "mask.png", "references": ["reference.png"]}
    worker = Worker(given, said)
    worker.paint(job | {"source": FINISHED} | HOW | {"seeds": [0], "steps": 1})
    torch.testing.assert_close(worker.load(FINISHED).paint.run.model.kept()[f"{layer}.weight"], weight + 0.25)
    edit = Edit("e", tmp_path, users=1, choice=Choice("a", "a", FINISHED), photo="photo.png", mask="mask.png")
    edit.references, edit.how = ["reference.png"], HOW
    edit.hear(next(message for message in map(json.loads, said.getvalue().splitlines()) if message["is"] == "begun"))
    for remote, source in ((False, str(file)), (True, None)):
        (record,) = EditSettings.model_validate_json(settings_of(edit, remote)).loras
        assert (record.name, record.source, record.weight) == ("cup.safetensors", source, 0.25)
        assert record.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
