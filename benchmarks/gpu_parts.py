"""What `python -m benchmarks.gpu` measures, part by part; each runs in a process of its own and hands over rows as they come.

A row says what it is, a figure with its unit, and the goal where there is one; what else belongs to it stands beside.
"""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

import benchmarks.tiers as small_gpus
from benchmarks.machine import describe_machine, describe_versions
from benchmarks.train_step import ENCODED_AT_ONCE, WAYS, Bench, Way, encode, measured
from pbe_core.errors import InputError
from pbe_core.settings import load_settings, preset
from pbe_train.checkpoints.networks import unloaded_model, unloaded_vae
from pbe_train.checkpoints.trainer_checkpoint import CheckpointWriter
from pbe_train.config import TRAIN_SPLIT, TrainSettings
from pbe_train.cost import TIERS, configured_view
from pbe_train.data.remote_shards import open_reader
from pbe_train.data.training_dataset import DevicePrefetcher, TrainingDataset, load_batches
from pbe_train.editing.paint_by_example import PaintByExample
from pbe_train.model.paint_model import prepare
from pbe_train.model.pipeline import Run, RunIdentity
from pbe_train.model.schedulers import training_schedule
from pbe_train.train import compute, train, train_step
from pbe_train.training.cuda_graph import RepeatedStep, prepare_device
from pbe_train.training.distributed import Distributed, Watchdog
from pbe_train.training.metrics import Metrics, PendingMetrics
from pbe_train.training.optimizer import EMA, make_optimizer, parts_of
from pbe_train.training.setup import identify

RECORD_RATE, RECORD_MFU = 128.9, 0.314  # MLPerf Training v4.0, Stable Diffusion on 8 x H200, batch 64 a GPU.
BATCH, LARGER = 64, (96, 128, 192, 256)
LONG_SECONDS = 60
WORKERS = 12
LINE = 10
"""Steps between two lines of metrics; the host runs ahead of the device by two lines at most, as in a training."""
PARITY_STEPS = 40

Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Task:
    """What a part is told."""

    device: str
    """`cuda` or `cpu`."""
    preset: str
    seconds: float
    """For the whole part."""
    dataset: Path
    """Of views of the preset's size."""
    tiny: Path
    """Dataset of the tiny preset."""
    work: Path
    """Folder that stays from one call to the next."""
    results: Path
    """Folder of the parts' JSONs."""

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device == "cuda"

    def settings(self, *options: str) -> TrainSettings:
        """The preset's."""
        return load_settings(TrainSettings, "train", ["--config", str(preset(self.preset)), *options])

    def wait(self) -> None:
        """Until the device has done all."""
        if self.cuda:
            torch.cuda.synchronize()

    def bench(self, seconds: float) -> Bench:
        """The ladder's measurement of so many seconds."""
        torch.set_float32_matmul_precision("high")
        config = preset(self.preset)
        return Bench(self.preset, self.settings().model, configured_view(config)[0], torch.device(self.device), seconds)


def row(what: str, figure: float | None, unit: str, goal: str = "", **more: Any) -> dict[str, Any]:
    """A row; no figure where the memory did not suffice."""
    return {"what": what, "figure": None if figure is None else float(f"{figure:.4g}"), "unit": unit, "goal": goal, **more}


def environment(task: Task, keep: Keep) -> None:
    """What is here, and what the device does at best: products of matrices, copies."""
    machine = {**describe_machine(), **describe_versions(("torch", "diffusers", "transformers"))}
    if task.cuda:
        wanted = "name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,memory.total"
        with_tool = shutil.which("nvidia-smi")
        asked = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() if with_tool else ""
        machine |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), wanted: told}
    side = 8192 if task.cuda else 256
    a, b = (torch.randn(side, side, device=task.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = seconds_of(task, lambda: a @ b, min(5.0, task.seconds / 3))
    keep(row(f"product of matrices, {side} x {side}, bf16", 2 * side**3 / seconds / 1e12, "TFLOP/s", machine=machine))
    values = torch.empty(2**30 if task.cuda else 2**20, device=task.device)
    seconds = seconds_of(task, lambda: values.clone(), min(5.0, task.seconds / 3))
    keep(row("copy on the device, read and written", 2 * values.nbytes / seconds / 1e9, "GB/s"))


def seconds_of(task: Task, work: Callable[[], object], seconds: float) -> float:
    """Seconds of one call: of many that are not waited for, between two waits."""
    for _ in range(3):
        work()
    task.wait()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or not calls:
        for _ in range(10):
            work()
        task.wait()
        calls += 10
    return (time.perf_counter() - start) / calls


def parity(task: Task, keep: Keep) -> None:
    """Whether steps repeated from a recording are the plain ones: losses and weights of the tiny preset, to the bit.

    A second plain run tells whether this device computes the same twice at all.
    """
    ranks = Distributed.start(None, "bf16")
    found: dict[str, tuple[list[float], str]] = {}
    for name in ("plain", "plain again", "recorded"):
        out = task.work / "parity" / name.replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        options = [f"--dataset={task.tiny}", f"--out={out}", f"--steps={PARITY_STEPS}", "--log_every=1", "--pictures.every=0"]
        options += ["--validation.every=0", "--loader.workers=2", f"--cuda_graph={str(name == 'recorded').lower()}"]
        train(load_settings(TrainSettings, "train", options, preset("tiny")), ranks)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        weights = json.loads((out / "finished.json").read_text(encoding="utf-8"))["weights_sha256"][0]
        found[name] = [line["loss"] for line in lines], weights
    losses, weights = found["plain"]
    for name in ("plain again", "recorded"):
        apart = max(abs(one - other) / one for one, other in zip(losses, found[name][0], strict=True))
        same = {"same_weights": found[name][1] == weights, "steps": PARITY_STEPS}
        keep(row(f"{name} beside plain: largest difference of a loss", apart, "relative", "0", **same))


def ladder(task: Task, keep: Keep) -> None:
    """Each way upon the other at one batch, then larger batches, then the fastest for long. Goes on where it was stopped."""
    until = time.monotonic() + task.seconds - LONG_SECONDS if task.cuda else math.inf
    known = {one["what"]: one for one in rows_of(task, "ladder")}
    ways = [way for way in WAYS if task.cuda or not (way.recorded or way.options["compile"])]
    first, larger = (BATCH, LARGER) if task.cuda else (1, (2,))
    short = min(10.0, task.seconds / 20)

    def rate(way: Way, batch: int) -> float:
        """0 where it does not work or there is no time left."""
        name = f"{way.name}, batch {batch}"
        if name not in known and time.monotonic() < until:
            try:
                known[name] = step_row(name, measured(task.bench(short), way, batch)[-1])
            except RuntimeError as error:  # Of a recording, say; the others are worth measuring all the same.
                known[name] = row(name, None, "samples/s", error=" ".join(str(error).split())[:500])
            keep(known[name])
        return known[name]["figure"] or 0.0 if name in known else 0.0

    rates = [rate(way, first) for way in ways]
    way = ways[rates.index(max(rates))]
    by_batch = {first: max(rates)}
    for batch in larger:
        by_batch[batch] = rate(way, batch)
        if not by_batch[batch]:
            break
    batch = max(by_batch, key=lambda one: by_batch[one])
    long = max(LONG_SECONDS, until - time.monotonic()) if task.cuda else short
    keep(step_row(f"for long: {way.name}, batch {batch}", measured(task.bench(long), way, batch)[-1]))


def step_row(name: str, told: dict[str, Any]) -> dict[str, Any]:
    """A row of the ladder from one of `benchmarks.train_step`."""
    goal = f">= {RECORD_RATE}, MFU >= {RECORD_MFU:.1%}; 40 %" if "for long" in name else ""
    return row(name, told.pop("samples_per_second"), "samples/s", goal, **told)


def rows_of(task: Task, part: str) -> list[dict[str, Any]]:
    """What an earlier call has left of a part."""
    path = task.results / f"{part}.json"
    found: list[dict[str, Any]] = json.loads(path.read_bytes())["rows"] if path.is_file() else []
    return found


def fastest(task: Task) -> tuple[Way, int]:
    """The fastest way and batch of the ladder, or of a sure kind where it was not measured."""
    ways = {way.name: way for way in WAYS}
    rows = [one for one in rows_of(task, "ladder") if one["figure"] and "for long" not in one["what"]]
    if not rows:
        return (ways["+ channels-last"], BATCH) if task.cuda else (ways["+ channels-last"], 2)
    best = max(rows, key=lambda one: one["figure"])
    return ways[best["way"]], best["batch"]


def loop(task: Task, keep: Keep) -> None:
    """The trainer's own step on batches of worker processes: samples, waiting for data, and what a checkpoint holds up."""
    way, batch = fastest(task)
    settings = loop_settings(task, way, batch)
    run = bare_run(settings, task)
    watchdog = Watchdog(0, run.batches.batches.describe_next)
    step = partial(compute, run, watchdog)
    once = partial(train_step, run, RepeatedStep(step, 1) if settings.cuda_graph else step, watchdog)
    lines = in_lines(run, once, task)
    for _ in range(2):  # The workers start, and what is compiled or recorded is.
        next(lines)
    task.wait()
    run.batches.take_seconds()
    start, first = time.perf_counter(), run.step
    while time.perf_counter() - start < task.seconds / 3:
        next(lines)
    task.wait()
    seconds, steps = time.perf_counter() - start, run.step - first
    more = {"way": way.name, "batch": batch, "steps": steps, "workers": settings.loader.workers}
    keep(row("trainer's step, from shards", steps * batch / seconds, "samples/s", **more))
    keep(row("waiting for data", run.batches.take_seconds() / seconds, "share", "< 0.01", **more))
    with CheckpointWriter(settings, identify(run.model, run.reader, settings.precision), 0) as writer:
        parts = parts_of(run.model, run.optimizer, run.ema)
        start = time.perf_counter()
        writer.save(run.step, parts, run.step)
        held = time.perf_counter() - start
        size = sum(tensor.nbytes for part in parts.values() for tensor in part.values()) / 1e9
        keep(row("a checkpoint holds up the steps", held, "s", "<= 0.3", gigabytes=round(size, 2)))
    shutil.rmtree(settings.out)


def loop_settings(task: Task, way: Way, batch: int) -> TrainSettings:
    """The preset's, computed in this way, at this batch, on the task's dataset."""
    workers = WORKERS if task.cuda else 1
    shape = [f"--global_batch={batch}", "--accumulation=1", f"--loader.workers={workers}", f"--steps={10**6}"]
    ways = [f"--model.{name}={str(value).lower()}" for name, value in way.options.items()]
    ways += [f"--cuda_graph={str(way.recorded).lower()}", f"--precision={'bf16' if way.bf16 else 'fp32'}"]
    places = [f"--dataset={task.dataset}", f"--out={task.work / 'loop'}", "--ema_decay=0.999"]
    return task.settings(*shape, *ways, *places)


def bare_run(settings: TrainSettings, task: Task) -> SimpleNamespace:
    """What `train_step` works on, of a model with random weights: of `Training`, all but what reads networks from disk."""
    device = torch.device(task.device)
    torch.set_float32_matmul_precision("high")
    if settings.cuda_graph:
        prepare_device(device)
    with device:
        model = prepare(unloaded_model(settings.model), settings.model, device).train()
    run = SimpleNamespace(settings=settings, model=model, parallel=model, trained=model.trained(), step=0)
    run.distributed, run.metrics = Distributed(0, 1, device), Metrics(device)
    run.optimizer = make_optimizer(run.trained, settings.optimizer, recorded=settings.cuda_graph)
    run.ema = EMA(run.trained, settings.ema_decay, recorded=settings.cuda_graph)
    run.schedule = training_schedule(settings.prediction)
    run.scaler = torch.amp.GradScaler(task.device, enabled=False)
    run.reader = open_reader(settings, TRAIN_SPLIT)
    items = TrainingDataset(settings, run.reader, model.conditioner.model.config.image_size)
    run.batches = DevicePrefetcher(load_batches(items, 0, 1, 0), device)
    return run


def in_lines(run: SimpleNamespace, once: Callable[[], None], task: Task) -> Iterator[None]:
    """Steps, a line of metrics at a time; the line before is read then, as the trainer does."""
    pending: PendingMetrics | None = None
    while True:
        for _ in range(LINE if task.cuda else 1):
            once()
        if pending:
            pending.figures()
        pending = run.metrics.collect(run.distributed)
        yield


def latents(task: Task, keep: Keep) -> None:
    """Latents that lie ready, beside view and masked view encoded in each step."""
    way, batch = fastest(task)
    way = replace(way, recorded=False)
    for told in measured(task.bench(task.seconds / 4), way, batch, encodes=True):
        keep(step_row(f"{told['way']}, batch {batch}", told))


@torch.no_grad()
def encoder(task: Task, keep: Keep) -> None:
    """Pictures a second through the VAE's encoder, from the CPU's memory and back, as a build does it."""
    bench, names = task.bench(0), {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if not task.cuda:
        del names["fp16"]
    for name, kind in names.items():
        with bench.device:
            vae = unloaded_vae(bench.model.vae).to(kind, memory_format=torch.channels_last)
        pictures = torch.rand(ENCODED_AT_ONCE, 3, bench.view, bench.view) * 2 - 1
        work = partial(to_latents, vae, pictures, bench.device)
        work()
        start, batches = time.perf_counter(), 0
        while time.perf_counter() - start < task.seconds / (2 * len(names)) or not batches:
            work()
            batches += 1
        rate = batches * ENCODED_AT_ONCE / (time.perf_counter() - start)
        keep(row(f"encoder, {name}", rate, "pictures/s", batch=ENCODED_AT_ONCE, view_px=bench.view))


def to_latents(vae: Any, pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """One batch, there and back."""
    return encode(vae, pictures.to(device)).cpu()


def edits(task: Task, keep: Keep) -> None:
    """One edit by the library with its defaults, from pictures in memory to a picture in memory; random weights."""
    settings, bench = task.settings(), task.bench(0)
    torch.set_float32_matmul_precision("highest")  # As the library finds it.
    size, device = bench.view, torch.device(task.device)
    generator = np.random.default_rng(0)
    photo, reference = (Image.fromarray(generator.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(2))
    mask = np.zeros((size, size), bool)
    mask[size // 4 : -size // 4, size // 4 : -size // 4] = True
    for name, kind in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        with device:
            model = unloaded_model(settings.model).eval().requires_grad_(False).to(kind)
            vae = unloaded_vae(settings.model.vae).to(kind)
        run = Run(model, vae, settings, without_dataset(model, vae, size), 0)
        paint = partial(PaintByExample(run), photo, mask, reference, **({} if task.cuda else {"steps": 2}))
        paint()
        times = []
        until = time.perf_counter() + task.seconds / 4
        while not times or time.perf_counter() < until:
            start = time.perf_counter()
            paint()
            times.append(time.perf_counter() - start)
        keep(row(f"an edit, {name}", sorted(times)[len(times) // 2], "s", edits=len(times), view_px=size))
        del run, paint, model, vae
        gc.collect()


def without_dataset(model: Any, vae: Any, view: int) -> RunIdentity:
    """Of a model that nothing was trained on."""
    return RunIdentity(
        dataset_fingerprint="",
        dataset_samples="",
        precision="fp32",
        vae_sha256="",
        encoder_sha256="",
        unet={key: value for key, value in model.unet.config.items() if not key.startswith("_")},
        latent_channels=vae.sizes.latent_channels,
        scaling_factor=vae.sizes.scaling_factor,
        view_size=view,
    )


def tiers(task: Task, keep: Keep) -> None:
    """Peak memory of the presets for small GPUs, beside what `pbe cost` counts."""
    world = None if task.cuda else preset(task.preset)
    for gigabytes in sorted(TIERS, reverse=True) if task.cuda else (8,):
        if task.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        told = small_gpus.measure(gigabytes, task.device, 5 if task.cuda else 1, world)
        peak, counted = told["peak_gb"], told["counted_gb"]
        keep(row(f"{told['preset']}: peak", peak, "GB", f"{counted:g} counted, a tenth more at most", **told))


def tiny(task: Task, keep: Keep) -> None:
    """A training of the tiny preset with pictures, for as long as there is time; goes on where it was stopped."""
    out = task.work / "tiny"
    options = ["--config", str(preset("tiny")), f"--dataset={task.tiny}", f"--out={out}"]
    if task.cuda:
        options += ["--steps=20000", "--pictures.every=1000", "--checkpoint_every=1000", "--loader.workers=4"]
    else:
        options += ["--steps=2", "--pictures.every=0", "--validation.every=0", "--global_batch=4", "--loader.workers=0"]
    settings = load_settings(TrainSettings, "train", options)
    start = time.perf_counter()
    # As a batch system does it whose time is up: the step is finished and saved.
    clock = threading.Timer(0.8 * task.seconds, os.kill, (os.getpid(), signal.SIGTERM))
    if task.cuda:
        clock.start()
    train(settings, Distributed.start(settings.threads, settings.precision))
    clock.cancel()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    more = {"seconds": round(time.perf_counter() - start, 1), "steps": lines[-1]["step"], "first_loss": losses[0]}
    more["validation_loss"] = next((line["validation_loss"] for line in reversed(lines) if "validation_loss" in line), None)
    keep(row("loss of the tiny preset, last line", losses[-1], "", **more))
    for picture in sorted((out / "pictures").glob("*.png"))[-1:]:
        shutil.copy(picture, task.results / "tiny.png")


def check(task: Task, part: str) -> None:
    """Raises InputError where what a part needs is not there: before time goes into it."""
    needed = {"loop": task.dataset, "parity": task.tiny, "tiny": task.tiny}.get(part)
    if needed and not (needed / "dataset.json").is_file():
        raise InputError(f"{needed}: no dataset here; `make shards` makes the tiny one, and --dataset names another")
