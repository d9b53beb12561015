"""Shards to batches: what the model sees at (step, slot)."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pbe_train.data import items as items_module
from pbe_train.data import shards
from pbe_train.data.items import Batch, Items, SlotSampler, load_batches
from pbe_train.data.latents import keep_map
from pbe_train.data.order import Place
from pbe_train.data.shards import ShardReader
from schemas.errors import InputError
from tests.pbe_train.small_world import MASKS, SCALE, World, make_sample, make_vae


def items_of(world: World, tmp_path, *options: str) -> Items:
    settings = world.settings(tmp_path, *options)
    return Items(settings, ShardReader(settings.dataset, "train"), 32)


def test_a_sample_is_read_back_as_it_was_written(world: World, tmp_path):
    reader = ShardReader(world.dataset, "train", open_shards=1)
    vae = make_vae(tmp_path / "vae", 0)
    for place, number in ((Place(1, 3), 8), (Place(3, 4), 23), (Place(0, 0), 0), (Place(1, 7), 12)):
        read, written = reader.read(place), make_sample(vae, "train", number)
        assert read.key == written.record.key
        assert np.array_equal(read.latent, written.latent)
        assert np.array_equal(read.masked, written.masked)
        assert np.array_equal(read.masks, written.masks)
    assert ShardReader(world.dataset, "validation").read(Place(0, 2)).view.shape == (32, 32, 3)


def test_planes_hold_the_scaled_latents_and_the_mask_of_one_kind(world: World, tmp_path):
    items = items_of(world, tmp_path)
    for slot in range(4):
        planes, _, _, _ = items.make(2, slot)
        sample = items.reader.read(items.order.at(2, slot, 4)[1])
        masks = [keep_map(sample.masks[kind : kind + 1], 4, "bilinear")[0, 0] for kind in range(MASKS)]
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
    monkeypatch.setattr(items_module, "keep_map", lambda masks, *_: drawn.update(masks=masks) or keep_map(masks, *_))
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


def test_conditions_are_dropped_per_sample_at_the_rate_that_was_set(world: World, tmp_path):
    items = items_of(world, tmp_path, "--global_batch=20", "--guidance_dropout=0.2")
    dropped = np.array([[items.make(step, slot)[3] for slot in range(20)] for step in range(30)])
    assert dropped.mean() == pytest.approx(0.2, abs=0.05)
    # Drawn once per batch, every row would be all or nothing.
    assert (dropped.any(1) & ~dropped.all(1)).mean() > 0.8


def test_timesteps_cover_the_schedule(world: World, tmp_path):
    items = items_of(world, tmp_path)
    times = [items.make(step, slot)[2] for step in range(60) for slot in range(4)]
    assert min(times) >= 0
    assert max(times) <= 999
    assert np.histogram(times, 4, (0, 1000))[0].min() > 35


def test_a_mask_shrinks_in_the_way_that_was_named():
    """1 = keep. `bilinear` averages the 2 x 2 px at a cell's centre, `nearest` takes its top left px."""
    mask = np.zeros((1, 16, 16), bool)
    mask[0, :4, :4] = True  # In the first cell: 1 of the 4 centre px (3, 3), and the top left px.
    assert keep_map(mask, 2, "bilinear").flatten().tolist() == [0.75, 1, 1, 1]
    assert keep_map(mask, 2, "nearest").flatten().tolist() == [0, 1, 1, 1]


def test_the_sampler_counts_what_it_yields():
    sampler = SlotSampler(3, 7, [[0, 1], [2, 3]])
    assert len(list(sampler)) == len(sampler) == 8


def damaged_copy(world: World, tmp_path):
    shutil.copytree(world.dataset, tmp_path / "dataset")
    return tmp_path / "dataset"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_one_line_that_names_it(world: World, tmp_path, workers):
    folder = damaged_copy(world, tmp_path)
    for path in folder.glob("shards/train*.tar"):
        path.write_bytes(path.read_bytes()[:6000])
    items = items_of(world, tmp_path, f"--dataset={folder}", f"--loader.workers={workers}")
    with pytest.raises(InputError, match=r"train-00000\d\.tar: sample train\d+-abc_0 is damaged .*run the build again") as caught:
        list(load_batches(items, 0, 1, 0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("member", [name for name in shards.READ if name != "view_jpg"])
def test_one_flipped_bit_is_noticed(world: World, tmp_path, member):
    """Of a latent, say: it would be another number, and nothing else would tell."""
    folder = damaged_copy(world, tmp_path)
    rows = pq.read_table(folder / "index.parquet", filters=[("shard", "==", "train-000001"), ("position", "==", 3)]).to_pylist()
    tar = folder / "shards" / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[rows[0][member]["offset"] + rows[0][member]["length"] - 3] ^= 1
    tar.write_bytes(data)
    reader = ShardReader(folder, "train")
    reader.read(Place(1, 2))
    with pytest.raises(
        InputError, match=rf"sample train0008-abc_0 is damaged \({member.replace('_', '.')} is not what was written"
    ):
        reader.read(Place(1, 3))


@pytest.mark.parametrize(
    ("decoder", "spoil", "problem"),
    [
        ("decode_array", lambda array: np.where(array > array.mean(), np.float16("nan"), array), "a latent is not finite"),
        ("decode_array", lambda array: -np.abs(array), "a standard deviation is negative"),
        ("decode_array", lambda array: array.astype(np.float32), r"latent\.npy is float32"),
        ("decode_array", lambda array: array[:-1], "does not fit dataset"),
        ("decode_masks", np.zeros_like, "a mask is empty"),
    ],
)
def test_what_is_read_is_checked_like_what_is_written(world: World, monkeypatch: pytest.MonkeyPatch, decoder, spoil, problem):
    decode = getattr(shards, decoder)
    monkeypatch.setattr(shards, decoder, lambda data: spoil(decode(data)))
    with pytest.raises(InputError, match=rf"train-000001\.tar: sample train0008-abc_0 is damaged \(.*{problem}"):
        ShardReader(world.dataset, "train").read(Place(1, 3))


def test_a_missing_shard_is_named(world: World, tmp_path):
    folder = damaged_copy(world, tmp_path)
    (folder / "shards" / "train-000002.tar").unlink()
    with pytest.raises(InputError, match=r"train-000002\.tar: the shard is missing"):
        ShardReader(folder, "train").read(Place(2, 0))


def test_an_index_that_does_not_fit_is_refused(world: World, tmp_path):
    folder = damaged_copy(world, tmp_path)
    info = json.loads((folder / "dataset.json").read_text())
    info["splits"]["train"]["samples"] += 1
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"index\.parquet: 24 samples of split `train`, dataset\.json says 25"):
        ShardReader(folder, "train")
