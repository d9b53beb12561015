"""Shards to batches: what the model sees at (step, slot)."""

import errno
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing, suppress
from statistics import median
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pbe_train.data import shards as shards_module
from pbe_train.data import training_dataset as items_module
from pbe_train.data.corrupt_samples import CorruptSamples, Replaced
from pbe_train.data.latents import to_mask_channel
from pbe_train.data.order import SampleLocation
from pbe_train.data.references import PADDING, Augmentation, Strong, fit_reference
from pbe_train.data.shards import ShardReader, decode_outline
from pbe_train.data.training_dataset import Batch, TrainingDataset, load_batches, noise_seed
from pbe_train.training.distributed import Distributed
from pbe_train.training.validation import Validation
from tests.pbe_train.small_world import MASKS, SCALE, World, reference_outline
from tests.pbe_train.start_loaders import WORKERS


def items_of(world: World, tmp_path, *options: str) -> TrainingDataset:
    settings = world.settings(tmp_path, *options)
    return TrainingDataset(settings, ShardReader(settings.dataset, "train"), 32)


def test_planes_hold_the_scaled_latents_and_the_mask_of_one_kind(world: World, tmp_path):
    items = items_of(world, tmp_path)
    for slot in range(4):
        planes = items.make(2, slot).planes
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
        items.make(step, slot)
        seen.setdefault(sample.key, set()).add(
            next(k for k in range(MASKS) if np.array_equal(sample.masks[k], drawn["masks"][0]))
        )
    assert len(seen) == items.order.samples
    assert sum(len(kinds) == MASKS for kinds in seen.values()) > 0.8 * len(seen)


def test_workers_ranks_and_history_do_not_change_what_is_seen(world: World, tmp_path):
    """The batches of two ranks with a worker each, from step 1, are the slices of one process's batches."""
    whole = list(load_batches(items_of(world, tmp_path, "--steps=3"), 0, 1, 0))
    cut = items_of(world, tmp_path, "--steps=3", "--loader.workers=1", "--accumulation=2")
    parts = [list(load_batches(cut, 1, 2, rank)) for rank in (0, 1)]
    for step in (1, 2):
        joined = [batch for rank in parts for batch in rank[2 * (step - 1) : 2 * step]]
        for field, expected in zip(Batch._fields, whole[step], strict=True):
            assert torch.equal(torch.cat([getattr(batch, field) for batch in joined]), expected), field


def test_backgrounds_are_erased_by_the_outlines_of_the_dataset(world: World, tmp_path):
    """To the byte, before anything else is done; where no outline is known, nothing is."""
    items = items_of(world, tmp_path)
    items.augmentation = Augmentation(preset="strong", strong=Strong(**dict.fromkeys(Strong.model_fields, 0) | {"erase": 1}))
    known = 0
    for slot in range(24):
        sample = items.reader.read(items.order.at(0, slot, 4)[1])
        outline = reference_outline(int(sample.key[5:9]))
        expected = sample.reference if outline is None else np.where(outline[..., None], sample.reference, np.uint8(PADDING))
        assert np.array_equal(items.make(0, slot).reference, fit_reference(expected, 32, "squash"))
        known += outline is not None
    assert 10 < known < 20


@pytest.mark.parametrize(("options", "read"), [([], False), (["--augmentation.preset=strong"], True)])
def test_the_record_is_read_only_where_backgrounds_are_erased(world: World, tmp_path, monkeypatch, options, read):
    seen = []
    fetch = shards_module._fetch
    monkeypatch.setattr(shards_module, "_fetch", lambda *given: seen.append(members := fetch(*given)) or members)
    items_of(world, tmp_path, *options).make(0, 0)
    assert [("json" in members) for members in seen] == [read]
    assert {"latent_npy", "masked_npy", "mask_json", "ref_jpg"} == set(seen[0]) - {"json"}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (b"[]", "json has no field reference_mask"),
        (b'{"reference_mask": 3}', "reference_mask is no text but int"),
        (b'{"reference_mask": "4"}', "reference_mask is of 4 px"),
        (b"{", "Expecting"),
    ],
)
def test_an_outline_that_is_not_the_references_is_damage(record, problem):
    with pytest.raises(ValueError, match=problem):
        decode_outline(record, 20, 20)


def test_references_are_padded_where_the_model_is_to_see_them_so(world: World, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """In training, under each preset, and in the fixed samples of the validation loss."""
    wide = np.full((10, 20, 3), 255, np.uint8)
    monkeypatch.setattr(shards_module, "decode_jpeg", lambda data: wide)
    still = Augmentation(preset="strong", strong=Strong(**dict.fromkeys(Strong.model_fields, 0)))
    for augmentation in (Augmentation(preset="none"), still):
        for geometry in ("pad", "squash"):
            items = items_of(world, tmp_path, f"--model.reference_geometry={geometry}")
            items.augmentation = augmentation
            assert np.array_equal(items.make(0, 0).reference, fit_reference(wide, 32, geometry))
    for geometry in ("pad", "squash"):
        options = ["--augmentation.preset=strong", f"--model.reference_geometry={geometry}"]
        fixed = Validation(world.settings(tmp_path, *options), Distributed(0, 1, torch.device("cpu")), 32)
        assert all(np.array_equal(one, fit_reference(wide, 32, geometry)) for batch in fixed.batches for one in batch.reference)


def test_references_without_an_aspect_are_not_padded(world: World, tmp_path):
    """Those of a build with references.resize: published."""
    reader = ShardReader(world.settings(tmp_path).dataset, "train")
    settings = {**reader.info.settings, "references": {"resize": "published"}}
    reader.info = reader.info.model_copy(update={"settings": settings})
    TrainingDataset(world.settings(tmp_path), reader, 32)
    padding = world.settings(tmp_path, "--model.reference_geometry=pad")
    with pytest.raises(
        InputError, match=r"dataset\.json: its references are stored squashed .*; train with squash, or build with"
    ):
        TrainingDataset(padding, reader, 32)


def test_conditions_are_dropped_per_sample_at_the_rate_that_was_set(world: World, tmp_path):
    items = items_of(world, tmp_path, "--global_batch=20", "--condition_dropout=0.2")
    dropped = np.array([[items.make(step, slot).dropped for slot in range(20)] for step in range(30)])
    assert dropped.mean() == pytest.approx(0.2, abs=0.05)
    # Drawn once per batch, every row would be all or nothing.
    assert (dropped.any(1) & ~dropped.all(1)).mean() > 0.8


def test_timesteps_cover_the_schedule(world: World, tmp_path):
    items = items_of(world, tmp_path)
    times = [items.make(step, slot).timestep for step in range(60) for slot in range(4)]
    assert min(times) >= 0
    assert max(times) <= 999
    assert np.histogram(times, 4, (0, 1000))[0].min() > 35


def test_a_mask_shrinks_in_the_way_that_was_named():
    """1 = keep. `bilinear` averages the 2 x 2 px at a cell's centre, `nearest` takes its top left px."""
    mask = np.zeros((1, 16, 16), bool)
    mask[0, :4, :4] = True  # In the first cell: 1 of the 4 centre px (3, 3), and the top left px.
    assert to_mask_channel(mask, 2, "bilinear").flatten().tolist() == [0.75, 1, 1, 1]
    assert to_mask_channel(mask, 2, "nearest").flatten().tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("cells", [4, 8, 16, 32, 5])
def test_a_mask_shrinks_as_torch_shrinks_it(cells, mode):
    masks = np.random.default_rng(0).random((3, 32, 32)) < 0.4
    align = False if mode == "bilinear" else None
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(~masks)[:, None].float(), (cells, cells), mode=mode, align_corners=align
    )
    assert torch.equal(to_mask_channel(masks, cells, mode), expected)


@pytest.mark.parametrize(("workers", "method"), [(1, "fork"), (3, "fork"), (3, "spawn"), (1, "forkserver")])
def test_batches_do_not_depend_on_how_many_processes_make_them(world: World, tmp_path, workers, method):
    """Two epochs and more: keys (through planes that hold their latents), timesteps, noise, references, all of it."""
    alone = list(load_batches(items_of(world, tmp_path, "--steps=13"), 0, 1, 0))
    several = load_batches(items_of(world, tmp_path, "--steps=13", f"--loader.workers={workers}"), 0, 1, 0, method)
    count = 0
    for expected, found in zip(alone, several, strict=True):
        for field in Batch._fields:
            assert torch.equal(getattr(expected, field), getattr(found, field)), field
        count += 1
    assert count == 13


def test_all_noise_is_different(world: World, tmp_path):
    """PyTorch keeps 32 bits of a seed: those of 2^32 samples in a row are different, and so are those of other runs."""
    seeds = [noise_seed(0, number) for number in [*range(5000), 2**32 - 1, 70_000_000]]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) < max(seeds) < 2**32
    assert noise_seed(0, 2**32 + 7) == noise_seed(0, 7) != noise_seed(1, 7)
    items = items_of(world, tmp_path, "--steps=8")
    noises = {items.make(step, slot).planes[-4:].numpy().tobytes() for step in range(8) for slot in range(4)}
    assert len(noises) == 32


def test_who_owes_the_next_batch_is_known(world: World, tmp_path):
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


def test_workers_end_with_their_batches_and_one_that_hangs_is_killed(world: World, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """They hear no SIGTERM: at its exit Python would wait for them, without end."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    at_exit: list[tuple] = []
    monkeypatch.setattr(items_module, "atexit", SimpleNamespace(register=lambda *call: at_exit.append(call)))
    batches = load_batches(items_of(world, tmp_path, "--steps=40", "--loader.workers=2"), 0, 1, 0)
    next(batches)
    workers = [psutil.Process(worker.pid) for worker in batches._loaded._workers]
    workers[1].suspend()
    [(end, *given)] = at_exit
    end(*given)
    _, alive = psutil.wait_procs(workers, timeout=100)
    assert not alive
    assert list(batches) == []


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
            _, alive = psutil.wait_procs(processes, timeout=100)
            assert not alive
        finally:
            parent.kill()
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="others have another way")
def test_workers_are_forked_whatever_the_system_would_do(world: World, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Python 3.14 would have them from a fork server, each with tables of its own."""
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("spawn"))
    with closing(load_batches(items_of(world, tmp_path, "--loader.workers=1"), 0, 1, 0)) as batches:
        next(batches)
        assert [type(process).__name__ for process in batches._processes] == ["ForkProcess"]


@pytest.mark.parametrize("fault", ["another fork fails", "a second Ctrl-C"])
def test_whatever_fails_on_the_way_no_worker_is_left(world: World, tmp_path, monkeypatch: pytest.MonkeyPatch, fault: str):
    """While the workers are started (too many open files, say), and while they are ended."""
    kept = []

    def watch_no_more(iterator):
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False

    class Failing(DataLoader):
        def __iter__(self):
            kept.append(super().__iter__())  # As a traceback does.
            watch_no_more(kept[0])  # PyTorch watches over them only when all are there.
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def interrupted():
        watch_no_more(kept[0])  # Nor does it any more when an interrupt leaves this method.
        raise KeyboardInterrupt

    batches = load_batches(items_of(world, tmp_path, "--steps=40", "--loader.workers=2"), 0, 1, 0)
    if fault == "another fork fails":
        monkeypatch.setattr(items_module, "DataLoader", Failing)
        with pytest.raises(OSError, match="Too many open files"):
            next(batches)
    else:
        next(batches)
        kept.append(batches._loaded)
        monkeypatch.setattr(kept[0], "_shutdown_workers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batches.close()
        monkeypatch.undo()
    for worker in kept[0]._workers:
        worker.join(100)
        assert not worker.is_alive()


def test_a_worker_that_runs_on_opens_no_more_files_and_takes_no_more_memory(world: World, tmp_path):
    """24 epochs over four shards of which it keeps two open; one more descriptor an epoch would be 12 in the second half."""
    gc.collect()  # A forked worker has what readers of other tests left open.
    items = items_of(world, tmp_path, "--steps=144", "--loader.workers=1", "--loader.window=1")
    items.reader.open_shards = 2
    batches = load_batches(items, 0, 1, 0)
    seen = []
    for step, _ in enumerate(batches):
        if step % 6 == 5:
            worker = psutil.Process(batches._loaded._workers[0].pid)
            seen.append((worker.num_fds(), sum(".tar" in file.path for file in worker.open_files()), worker.memory_info().rss))
    descriptors, tars, memory = zip(*seen, strict=True)
    assert 1 <= max(tars) <= 2
    # Batches on their way hold a few for a moment.
    assert median(descriptors[12:]) <= median(descriptors[:12]) + 2
    assert memory[-1] < memory[3] + 20e6


def damaged_copy(world: World, tmp_path):
    shutil.copytree(world.dataset, tmp_path / "dataset")
    return tmp_path / "dataset"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_one_line_that_names_it(world: World, tmp_path, workers):
    folder = damaged_copy(world, tmp_path)
    for path in folder.glob("shards/train*.tar"):
        path.write_bytes(path.read_bytes()[:6000])
    items = items_of(world, tmp_path, f"--dataset={folder}", f"--loader.workers={workers}")
    wanted = r"train-00000\d\.tar: sample train\d+-abc_0 is damaged .*run the build again"
    with closing(load_batches(items, 0, 1, 0)) as batches, pytest.raises(InputError, match=wanted) as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def spoil(folder, shard: str, positions: list[int]) -> None:
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
    assert {one.key for one in told if one.shard == "train-000001"} == {"train0008-abc_0", "train0010-abc_0"}
    assert {one.why for one in told if one.shard == "train-000001"} == {"latent.npy is not what was written (CRC-32)"}
    assert len([one for one in told if one.shard == "train-000002"]) == 6
    assert not straight.take_replaced()
    again = load_batches(items_of(world, tmp_path, *options, "--loader.workers=2", "--accumulation=2"), 7, 1, 0)
    parts = list(again)
    later = list(load_batches(items_of(world, tmp_path, *options), 7, 1, 0))
    assert torch.equal(torch.cat([part.planes for part in parts]), torch.cat([batch.planes for batch in later]))
    assert set(again.take_replaced()) <= told


def test_where_all_is_damaged_nothing_is_replaced_for_ever(world: World, tmp_path):
    folder = damaged_copy(world, tmp_path)
    for path in folder.glob("shards/train*.tar"):
        path.unlink()
    items = items_of(world, tmp_path, f"--dataset={folder}", "--loader.on_corrupt=replace")
    with pytest.raises(InputError, match=r"the shard is missing.*10 samples that were to replace one another are all damaged"):
        next(load_batches(items, 0, 1, 0))


def test_damage_is_told_once_and_ends_the_run_beyond_the_limit():
    book = CorruptSamples(2)
    one, two, three = (Replaced("train-000001", f"key{number}_0", "CRC-32") for number in range(3))
    assert book.add([one, one, two]) == [
        "replaced: shard train-000001, sample key0_0: CRC-32",
        "replaced: shard train-000001, sample key1_0: CRC-32",
    ]
    assert book.add([two, one]) == []
    with pytest.raises(
        InputError,
        match=r"^3 samples are damaged, more than loader.max_corrupt_samples 2, in train-000001\.tar \(3\): key0_0 of .*key2_0",
    ):
        book.add([three])


def test_a_run_that_stops_at_damage_says_how_to_go_on(world: World, tmp_path):
    folder = damaged_copy(world, tmp_path)
    spoil(folder, "train-000000", [0, 1, 2, 3, 4])
    with pytest.raises(InputError, match=r"train-000000\.tar: sample .* or train without it: --loader.on_corrupt replace$"):
        list(load_batches(items_of(world, tmp_path, f"--dataset={folder}"), 0, 1, 0))
