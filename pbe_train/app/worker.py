"""The painting process: `python -m pbe_train.app.worker SETTINGS`, started by the server and ended with it.

    stdin: one JSON a line   {"do": "paint", ...} {"do": "cancel"} {"do": "watch", "on": true}
    stdout: one JSON a line  {"is": "ready", ...} {"is": "step", ...} {"is": "preview"} {"is": "result", ...} {"is": "done"}

Pictures are files in the edit's folder. It paints one edit at a time; what is to be cancelled ends at the next step. PyTorch is
in here alone: whatever happens to it, out of memory or worse, the server is still there and starts another one.
"""

import contextlib
import gc
import io
import json
import os
import queue
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image

from pbe_core.errors import InputError, machine_error
from pbe_core.network_files import local_folder
from pbe_train.app.models import GONE, Facts
from pbe_train.checkpoints.from_pretrained import RELEASED
from pbe_train.checkpoints.load_report import OPEN_RAIL, read_report
from pbe_train.checkpoints.trainer_checkpoint import locate_checkpoint, read_state
from pbe_train.editing.edit_settings import weights_hash
from pbe_train.editing.paint_by_example import PaintByExample, Preview
from pbe_train.editing.placing import find_device
from pbe_train.editing.reading import check_mask, read_mask, read_photo, save_picture, with_profile
from pbe_train.editing.threads import default_threads
from pbe_train.model.schedulers import SCHEDULERS

PREVIEW_SECONDS = 1.0
"""At least between two previews; and so many times what one takes."""
PREVIEW_SHARE = 4
PREVIEW_PX = 1024
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FREE_SHARE = 0.5
"""Another model stays loaded beside the one that is wanted while so much of the memory is free."""


class Cancelled(Exception):
    """Nobody wants this edit any more."""


class Loaded(NamedTuple):
    """A model in memory."""

    paint: PaintByExample
    source: str
    """Where from: of a run, the checkpoint."""
    sha256: str | None
    """Of its weights, where they say it."""


class Worker:
    """Paints what it is told to.

    Args:
        settings: device, offload, threads; and precision, channels_last, prepacked, compile where they are not as usual.
        answers: where its messages go.
    """

    def __init__(self, settings: dict[str, Any], answers: io.TextIOBase) -> None:
        self.settings, self.answers = settings, answers
        self.jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.cancelled: set[str] = set()
        self.watched: set[str] = set()
        self.loaded: dict[str, Loaded] = {}
        self.preview_due = 0.0

    def listen(self, orders: TextIO) -> None:
        """Take orders until the server is gone; then nothing is worth going on with."""
        for line in orders:
            order = json.loads(line)
            if order["do"] == "paint":
                self.jobs.put(order)
            elif order["do"] == "cancel":
                self.cancelled.add(order["edit"])
            elif order["do"] == "watch":
                (self.watched.add if order["on"] else self.watched.discard)(order["edit"])
        os._exit(0)

    def work(self) -> None:
        """Paint one edit after the other, for ever."""
        while True:
            job = self.jobs.get()
            try:
                self.paint(job)
            except Cancelled:
                self.say("cancelled", job["edit"])
            except Exception as error:
                self.say("failed", job["edit"], error=in_words(error, job["folder"]).replace(f"{job['folder']}/", ""))
                if is_memory(error):
                    self.loaded.clear()
                    _free()
            # Of this edit alone: an order about the next one may be here already.
            self.cancelled.discard(job["edit"])
            self.watched.discard(job["edit"])

    def paint(self, job: dict[str, Any]) -> None:
        """One edit: each of its seeds."""
        edit, folder = job["edit"], Path(job["folder"])
        self._stop_if_cancelled(edit)
        photo, mask = read_photo(folder / job["photo"]), read_mask(folder / job["mask"])
        check_mask(mask, photo, "the mask", "to edit")
        references = [read_photo(folder / name) for name in job["references"]]
        self.say("loading", edit)
        loaded = self.load(job["source"])
        paint = loaded.paint
        threads = self.settings["threads"] or default_threads(paint.run)
        torch.set_num_threads(threads)
        known: dict[str, Any] = {"source": loaded.source, "sha256": loaded.sha256}
        known |= paint.way._asdict()
        known["compile"] = paint.run.model.compiled_edits
        known["loras"] = [{"source": lora.source, "weight": lora.weight, "sha256": lora.sha256} for lora in paint.loras]
        width, height = paint.run.identity.view_shape(photo.shape[1], photo.shape[0])
        size = width if width == height else (width, height)
        known |= {"size": size, "device": paint.run.device.type, "threads": threads}
        self.say("begun", edit, facts=known)
        for number, seed in enumerate(job["seeds"]):

            def watch(preview: Preview, number: int = number) -> None:
                self._stop_if_cancelled(edit)
                self.say("step", edit, seed_number=number, step=preview.step, steps=preview.steps)
                if edit in self.watched and time.monotonic() >= self.preview_due and preview.step < preview.steps:
                    self._save_preview(preview, edit, folder)

            how = {name: job[name] for name in ("guidance", "guidance_interval", "steps", "reuse", "scheduler")}
            edited = paint(photo, mask, references, seed=seed, callback=watch, **how)
            assert isinstance(edited, Image.Image)
            save_picture(with_profile(np.asarray(edited), folder / job["photo"]), folder / f"result-{number}.png")
            self.say("result", edit, number=number)
        self.say("done", edit)

    def load(self, source: str) -> "Loaded":
        """A model, from memory where it is there. While too little of the memory is free, those unused for longest go."""
        if source in self.loaded:
            self.loaded[source] = self.loaded.pop(source)
            return self.loaded[source]
        while self.loaded and free_share(self.settings["device"]) < FREE_SHARE:
            del self.loaded[next(iter(self.loaded))]
            _free()
        names = ("device", "precision", "channels_last", "prepacked", "compile", "offload")
        chosen = {name: self.settings[name] for name in names if name in self.settings}
        # A training may write another checkpoint meanwhile: this is the one, and its settings name it.
        folder = local_folder(source)
        checkpoint = folder and locate_checkpoint(folder)
        named = str(Path(source) / checkpoint.relative_to(folder)) if folder and checkpoint else source
        paint = PaintByExample.from_pretrained(named, loras=self.settings.get("loras", ()), **chosen)
        for note in ([paint.note] if paint.note else []) + [note for lora in paint.loras for note in lora.notes]:
            print(note, file=sys.stderr, flush=True)
        self.loaded[source] = Loaded(paint, named, weights_hash(named))
        return self.loaded[source]

    def say(self, what: str, edit: str = "", **more: object) -> None:
        """Tell the server something."""
        with contextlib.suppress(BrokenPipeError):  # `listen` notices.
            self.answers.write(json.dumps({"is": what, "edit": edit, **more}) + "\n")
            self.answers.flush()

    def _save_preview(self, preview: Preview, edit: str, folder: Path) -> None:
        began = time.monotonic()
        made = preview.photos()[0]
        made.thumbnail((PREVIEW_PX, PREVIEW_PX))
        made.save(folder / "preview.tmp", "JPEG", quality=85)
        (folder / "preview.tmp").replace(folder / "preview.jpg")
        took = time.monotonic() - began
        self.preview_due = time.monotonic() + max(PREVIEW_SECONDS, PREVIEW_SHARE * took)
        self.say("preview", edit)

    def _stop_if_cancelled(self, edit: str) -> None:
        if edit in self.cancelled:
            raise Cancelled


def in_words(error: Exception, folder: str) -> str:
    """One sentence for who asked for an edit; what is a defect goes to the log, too."""
    if isinstance(error, InputError):
        return str(error)
    if is_memory(error):
        return "the memory is full; try a smaller photo, or start the server with --precision fp16 or --offload true"
    if isinstance(error, FileNotFoundError) and str(error.filename).startswith(folder):
        return f"{GONE}; try again"
    if isinstance(error, OSError) and (said := machine_error(error)):
        return f"{said}; try again, and tell who runs this server"
    traceback.print_exception(error)
    return f"a defect of this program ({type(error).__name__}); the server's log says more: please report that"


def is_memory(error: Exception) -> bool:
    """Whether an error is for want of memory; on CPUs PyTorch says so in words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def describe(source: str) -> Facts:
    """What an app shows of a model before it is loaded.

    Raises:
        InputError: it lies on this machine and cannot be read.
    """
    folder = local_folder(source)
    checkpoint = folder and locate_checkpoint(folder)
    if checkpoint:
        state = read_state(checkpoint)
        report = read_report(checkpoint) or {}
        return {
            "view_size": state.identity.view_size,
            **({"buckets": state.identity.buckets} if state.identity.buckets else {}),
            "licence": report.get("licence"),
            "several_references": state.settings.get("model", {}).get("tokens", "class") == "class",
            "guidance": bool(state.settings.get("condition_dropout", 0.2)),
            "here": True,
        }
    if Path(source).expanduser().exists() and not Path(source).is_file() and not (folder and (folder / "unet").is_dir()):
        raise InputError(f"{source}: no run of train.py, no checkpoint, and no model in diffusers' or the original layout")
    here = Path(source).expanduser().exists()
    if not here and not HUB_ID.fullmatch(source):
        raise InputError(f"{source}: no such file or folder, and no hub id (owner/name)")
    return {"view_size": RELEASED["view_size"], "licence": OPEN_RAIL, "several_references": True, "guidance": True, "here": here}


def free_share(device: str | None) -> float:
    """How much of the memory is free that networks take: the GPU's, or else this machine's; 0 where it is not known."""
    if torch.cuda.is_available() and device != "cpu":
        free, there = torch.cuda.mem_get_info()
        return free / there
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) / int(lines["MemTotal"].split()[0])
    except (OSError, ValueError, KeyError):
        return 0.0


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Say what there is, and work."""
    # Libraries print; what they print goes to the log and not between the messages.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    worker = Worker(settings, answers)
    try:
        find_device(settings["device"])
    except InputError as error:
        worker.say("refused", error=str(error))
        return
    models, wrong = {}, {}
    for source in settings["sources"]:
        try:
            models[source] = describe(source)
        except InputError as error:
            wrong[source] = str(error)
    threading.Thread(target=worker.listen, args=(sys.stdin,), daemon=True).start()
    worker.say("ready", models=models, wrong=wrong, schedulers=list(SCHEDULERS))
    worker.work()


if __name__ == "__main__":
    main()
