"""Shards to batches: what the model sees at (step, slot)."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import interpolate

from pbe_core.errors import InputError
from pbe_train.data import shards as shards_module
from pbe_train.data import training_dataset as items_module
from pbe_train.data.latents import to_mask_channel
from pbe_train.data.order import SampleLocation
from pbe_train.data.references import PADDING, STRONG, Augmentation, fit_reference
from pbe_train.data.shards import ShardReader, decode_outline
from pbe_train.data.training_dataset import Batch, TrainingDataset, choose_timestep, kill_workers, load_batches, noise_seed
from pbe_train.training.distributed import Distributed
from pbe_train.training.validation import Validation
from tests.conftest import REPOSITORY
from tests.pbe_train.small_world import MASKS, SCALE, World, reference_outline
from tests.pbe_train.start_loaders import WORKERS


def items_of(world: World, tmp_path: Path, *options: str) -> TrainingDataset:
    settings = world.settings(tmp_path, *options)
    return TrainingDataset(settings, ShardReader(settings.dataset, "train"), 32)


def make(items: TrainingDataset, step: int, slot: int) -> Batch:
    """One item, as a batch without its first axis."""
    return Batch(*(tensor[0] for tensor in items[[(step, slot)]].batch))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        for field in Batch._fields:
            assert torch.equal(getattr(one, field), getattr(other, field)), field


def test_planes_hold_the_scaled_latents_and_the_mask_of_one_kind(world: World, tmp_path):
    items = items_of(world, tmp_path)
    for slot in range(4):
        planes = make(items, 2, slot).planes
        sample = items.reader.read(items.order.at(2, slot, 4)[1])
        masks = [to_mask_channel(sample.masks[kind : kind + 1], 4, "bilinear")[0, 0] for kind in range(MASKS)]
        kind = next(kind for kind in range(MASKS) if torch.equal(masks[kind], planes[8]))
        draws = [planes[9:]]
        for stored, drawn in ((sample.latent, planes[:4]), (sample.masked[kind], planes[4:8])):
            mean, deviation = torch.from_numpy(stored.astype(np.float32)).chunk(2)
            standardised = (drawn / SCALE - mean) / deviation
            assert 0.6 < standardised.std() < 1.4
            assert abs(standardised.mean()) < 0.5
            draws.append(standardised)
        # Shared draws would tie the posterior's noise to the noise that is to be predicted.
        correlations = torch.corrcoef(torch.stack([draw.flatten() for draw in draws])).fill_diagonal_(0)
        assert correlations.abs().max() < 0.6
    assert planes[9:].std() == pytest.approx(1, abs=0.4)


def test_the_mask_is_one_of_k_and_another_in_another_epoch(world: World, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A mask that were always the first, or fixed for a sample, would waste the others."""
    items, drawn = items_of(world, tmp_path), {}
    monkeypatch.setattr(
        items_module, "to_mask_channel", lambda masks, *_: drawn.update(masks=masks) or to_mask_channel(masks, *_)
    )
    seen: dict[str, set[int]] = {}
    for index in range(6 * items.order.samples):
        step, slot = divmod(index, 4)
        sample = items.reader.read(items.order.at(step, slot, 4)[1])
        make(items, step, slot)
        seen.setdefault(sample.key, set()).add(
            next(k for k in range(MASKS) if np.array_equal(sample.masks[k], drawn["masks"][0]))
        )
    assert len(seen) == items.order.samples
    assert sum(len(kinds) == MASKS for kinds in seen.values()) > 0.8 * len(seen)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_how_many_processes_make_them(world: World, tmp_path, workers):
    """Two epochs and more: keys (through planes that hold their latents), timesteps, noise, references, all of it."""
    alone = list(load_batches(items_of(world, tmp_path, "--steps=13"), 0, 1, 0))
    several = list(load_batches(items_of(world, tmp_path, "--steps=13", f"--loader.workers={workers}"), 0, 1, 0))
    assert_same(several, alone)


def test_backgrounds_are_erased_by_the_outlines_of_the_dataset(world: World, tmp_path, monkeypatch):
    """To the byte, before anything else is done; where no outline is known, nothing is. Else the record is not even read."""
    seen, fetch = [], shards_module._fetch
    monkeypatch.setattr(shards_module, "_fetch", lambda *given: seen.append(members := fetch(*given)) or members)
    items = items_of(world, tmp_path)
    make(items, 0, 0)
    assert set(seen.pop()) == {"latent_npy", "masked_npy", "mask_json", "ref_jpg"}
    items.augmentation = Augmentation(preset="strong", strong=dict.fromkeys(STRONG, 0.0) | {"erase": 1.0})
    known = 0
    for slot in range(24):
        sample = items.reader.read(items.order.at(0, slot, 4)[1])
        outline = reference_outline(int(sample.key[5:9]))
        expected = sample.reference if outline is None else np.where(outline[..., None], sample.reference, np.uint8(PADDING))
        assert np.array_equal(make(items, 0, slot).reference, fit_reference(expected, 32, "squash"))
        known += outline is not None
    assert "json" in seen[-1]
    assert 10 < known < 20


@pytest.mark.parametrize("record", [b"[]", b'{"reference_mask": 3}', b'{"reference_mask": "4"}', b"{", b"{}"])
def test_an_outline_that_is_not_the_references_is_damage(record):
    with pytest.raises(ValueError, match="reference_mask: "):
        decode_outline(record, 20, 20)


def test_references_are_padded_where_the_model_is_to_see_them_so(world: World, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """In training, under each preset, and in the fixed samples of the validation loss."""
    wide = np.full((10, 20, 3), 255, np.uint8)
    monkeypatch.setattr(shards_module, "decode_jpeg", lambda data: wide)
    still = Augmentation(preset="strong", strong=dict.fromkeys(STRONG, 0.0))
    for geometry in ("pad", "squash"):
        for augmentation in (Augmentation(preset="none"), still):
            items = items_of(world, tmp_path, f"--model.reference_geometry={geometry}")
            items.augmentation = augmentation
            assert np.array_equal(make(items, 0, 0).reference, fit_reference(wide, 32, geometry))
        options = ["--augmentation.preset=strong", f"--model.reference_geometry={geometry}"]
        fixed = Validation(world.settings(tmp_path, *options), Distributed(0, 1, torch.device("cpu")), 32)
        assert all(np.array_equal(one, fit_reference(wide, 32, geometry)) for batch in fixed.batches for one in batch.reference)


def test_references_without_an_aspect_are_not_padded(world: World, tmp_path):
    """Those of a build with references.resize: published."""
    reader = ShardReader(world.dataset, "train")
    settings = {**reader.info.settings, "references": {"resize": "published"}}
    reader.info = reader.info.model_copy(update={"settings": settings})
    TrainingDataset(world.settings(tmp_path), reader, 32)
    with pytest.raises(InputError, match=r"dataset\.json: its references are stored squashed .*; train with squash"):
        TrainingDataset(world.settings(tmp_path, "--model.reference_geometry=pad"), reader, 32)


def test_conditions_are_dropped_per_sample_and_times_cover_the_schedule(world: World, tmp_path):
    items = items_of(world, tmp_path, "--global_batch=20", "--condition_dropout=0.2")
    batches = [items[[(step, slot) for slot in range(20)]].batch for step in range(15)]
    dropped = torch.stack([batch.dropped for batch in batches])
    assert dropped.float().mean() == pytest.approx(0.2, abs=0.07)
    # Drawn once per batch, every row would be all or nothing.
    assert (dropped.any(1) & ~dropped.all(1)).float().mean() > 0.8
    times = torch.cat([batch.timestep for batch in batches])
    assert (times.min() >= 0) & (times.max() <= 999)
    assert np.histogram(times, 4, (0, 1000))[0].min() > 50


def test_stratified_times_are_one_of_each_part():
    for step in range(5):
        times = [choose_timestep(0, step, slot, 8) for slot in range(8)]
        assert sorted(time * 8 // 1000 for time in times) == list(range(8))
    assert times != [choose_timestep(0, 5, slot, 8) for slot in range(8)]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("cells", [4, 8, 16, 32, 5])
def test_a_mask_shrinks_as_torch_shrinks_it(cells, mode):
    """1 = keep. `bilinear` averages the 2 x 2 px at a cell's centre, `nearest` takes its top left px."""
    masks = np.random.default_rng(0).random((3, 32, 32)) < 0.4
    align = False if mode == "bilinear" else None
    expected = interpolate(torch.from_numpy(~masks)[:, None].float(), (cells, cells), mode=mode, align_corners=align)
    assert torch.equal(to_mask_channel(masks, cells, mode), expected)


def test_all_noise_is_different():
    """PyTorch keeps 32 bits of a seed: those of 2^32 samples in a row are different, and so are those of other runs."""
    seeds = [noise_seed(0, number) for number in [*range(5000), 2**32 - 1, 70_000_000]]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) < max(seeds) < 2**32
    assert noise_seed(0, 2**32 + 7) == noise_seed(0, 7) != noise_seed(1, 7)


def test_who_makes_the_next_batch_is_known(world: World, tmp_path):
    """Which of the loader's processes, and of which samples: what a watchdog has to say of data that does not come."""
    items = items_of(world, tmp_path, "--steps=3", "--accumulation=2", "--loader.workers=2")
    batches = load_batches(items, 1, 1, 0)
    micro = [(step, slots) for step in (1, 2) for slots in ([0, 1], [2, 3])]
    next(batches)
    processes = [worker.pid for worker in batches._loaded._workers]
    for number, (step, slots) in enumerate(micro[1:], start=1):
        keys = ", ".join(items.keys(step)[slot] for slot in slots)
        assert batches.describe_next() == f"worker {number % 2} (process {processes[number % 2]}), which makes the samples {keys}"
        next(batches)
    assert batches.describe_next() == "nothing more"
    alone = load_batches(items_of(world, tmp_path, "--steps=1"), 0, 1, 0)
    assert alone.describe_next() == f"this process, which makes the samples {', '.join(alone.items.keys(0))}"


def test_workers_leave_stopping_to_their_parent_and_one_that_hangs_is_killed_at_its_exit(world: World, tmp_path, monkeypatch):
    """Whatever the system would start processes by: Python 3.14 would have them from a server, each with tables of its own."""
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("spawn"))
    batches = load_batches(items_of(world, tmp_path, "--steps=40", "--loader.workers=2"), 0, 1, 0)
    next(batches)
    children = [child for child in multiprocessing.active_children() if child.pid in batches.workers]
    assert [type(child).__name__ for child in children] == ["ForkProcess"] * 2
    workers = [psutil.Process(worker) for worker in batches.workers]
    for worker in workers:
        worker.terminate()
        worker.send_signal(signal.SIGINT)
    for _ in range(10):  # A signal that ends a worker has done so before the worker makes another batch.
        next(batches)
    assert all(worker.is_running() for worker in workers)
    workers[1].suspend()
    child_ended = signal.getsignal(signal.SIGCHLD)
    kill_workers()
    assert not psutil.wait_procs(workers, timeout=600)[1]
    signal.signal(signal.SIGCHLD, child_ended)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_leave_stopping_to_their_parent_and_end_with_it(world: World, tmp_path, method: str):
    """Whatever kills it, and by whichever method they were started."""
    command = [sys.executable, "-m", "tests.pbe_train.start_loaders", str(world.config), str(tmp_path), method]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        told = json.loads(next(line for line in parent.stdout if line.startswith("{")))
        processes = psutil.Process(parent.pid).children(recursive=True)  # With a fork server, and Python's own helpers.
        try:
            workers = [process for process in processes if process.pid in told["workers"]]
            assert len(workers) == WORKERS
            assert told["threads"] == [1] * WORKERS
            for worker in workers:
                worker.terminate()
                worker.send_signal(signal.SIGINT)
            # A signal that ends a worker has done so before the worker makes another batch.
            parent.stdin.write("go on\n")
            parent.stdin.flush()
            assert parent.stdout.readline() == "another batch of each\n"
            assert all(worker.is_running() for worker in workers)
            parent.kill()
            _, alive = psutil.wait_procs(processes, timeout=600)
            assert not alive
        finally:
            parent.kill()
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def test_a_worker_that_runs_on_opens_no_more_files_and_takes_no_more_memory(world: World, tmp_path):
    """12 epochs over four shards of which it keeps two open; one more descriptor an epoch would be 6 in the second half."""
    gc.collect()  # A forked worker has what readers of other tests left open.
    items = items_of(world, tmp_path, "--steps=72", "--loader.workers=1", "--loader.window=1")
    items.reader.open_shards = 2
    batches = load_batches(items, 0, 1, 0)
    seen = []
    for step, _ in enumerate(batches):
        if step % 6 == 5:
            worker = psutil.Process(batches.workers[0])
            seen.append((worker.num_fds(), sum(".tar" in file.path for file in worker.open_files()), worker.memory_info().rss))
    descriptors, tars, memory = zip(*seen, strict=True)
    assert 1 <= max(tars) <= 2
    # Batches on their way hold a few for a moment.
    assert median(descriptors[6:]) <= median(descriptors[:6]) + 2
    assert memory[-1] < memory[3] + 20e6


def damaged_copy(world: World, tmp_path: Path) -> Path:
    return shutil.copytree(world.dataset, tmp_path / "dataset")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_one_line_that_names_it_and_says_how_to_go_on(world: World, tmp_path, workers):
    folder = damaged_copy(world, tmp_path)
    for path in folder.glob("shards/train*.tar"):
        os.truncate(path, 6000)
    batches = load_batches(items_of(world, tmp_path, f"--dataset={folder}", f"--loader.workers={workers}"), 0, 1, 0)
    wanted = r"train-00000\d\.tar: sample train\d+-abc_0 is damaged .*or train without it: --loader.on_corrupt replace$"
    with pytest.raises(InputError, match=wanted) as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert list(batches) == []
    assert not psutil.wait_procs([psutil.Process(pid) for pid in batches.workers if psutil.pid_exists(pid)], timeout=600)[1]


def spoil(folder: Path, shard: str, positions: list[int]) -> None:
    """Flip a bit in the latent of these samples."""
    index = pq.read_table(folder / "index.parquet", filters=[("shard", "==", shard)]).to_pylist()
    tar = folder / "shards" / f"{shard}.tar"
    data = bytearray(tar.read_bytes())
    for row in index:
        if row["position"] in positions:
            data[row["latent_npy"]["offset"] + row["latent_npy"]["length"] - 3] ^= 1
    tar.write_bytes(data)


def test_a_damaged_sample_gives_its_slot_to_another_one(world: World, tmp_path):
    """The same one whatever was met before and whoever looks; all other slots are as without damage, and all is told."""
    folder = damaged_copy(world, tmp_path)
    spoil(folder, "train-000001", [3, 5])
    (folder / "shards" / "train-000002.tar").unlink()
    options = f"--dataset={folder}", "--loader.on_corrupt=replace", "--steps=12"
    whole, told = list(load_batches(items_of(world, tmp_path, "--steps=12"), 0, 1, 0)), set()
    damaged = items_of(world, tmp_path, *options)
    straight = load_batches(damaged, 0, 1, 0)
    for step, (expected, found) in enumerate(zip(whole, straight, strict=True)):
        replaced = straight.take_replaced()
        told |= set(replaced)
        same = [torch.equal(*pair) for pair in zip(expected.planes, found.planes, strict=True)]
        places = [damaged.order.at(step, slot, 4)[1] for slot in range(4)]
        bad = [place.shard == 2 or place in (SampleLocation(1, 3), SampleLocation(1, 5)) for place in places]
        assert same == [not one for one in bad]
        assert len(replaced) >= sum(bad)
        assert torch.isfinite(found.planes).all()
    why = "latent.npy is not what was written (CRC-32)"
    assert {one[1:] for one in told if one.shard == "train-000001"} == {("train0008-abc_0", why), ("train0010-abc_0", why)}
    assert len([one for one in told if one.shard == "train-000002"]) == 6
    assert not straight.take_replaced()
    again = load_batches(items_of(world, tmp_path, *options, "--loader.workers=2", "--accumulation=2"), 7, 1, 0)
    parts = list(again)
    later = list(load_batches(items_of(world, tmp_path, *options), 7, 1, 0))
    assert torch.equal(torch.cat([part.planes for part in parts]), torch.cat([batch.planes for batch in later]))
    assert set(again.take_replaced()) <= told


def test_where_all_is_damaged_nothing_is_replaced_for_ever(world: World, tmp_path):
    folder = damaged_copy(world, tmp_path)
    shutil.rmtree(folder / "shards")
    items = items_of(world, tmp_path, f"--dataset={folder}", "--loader.on_corrupt=replace")
    with pytest.raises(InputError, match=r"the shard is missing.*10 samples that were to replace one another are all damaged"):
        next(load_batches(items, 0, 1, 0))
