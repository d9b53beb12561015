"""Training on references from other photos: which one a sample is shown, several at once, going on."""

import dataclasses
import itertools
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pbe_core.dataset_reader import read_sample
from pbe_core.errors import InputError
from pbe_core.sample_codec import jpeg_bytes
from pbe_train.data.latents import normalise_reference
from pbe_train.data.order import SampleLocation, choose_references
from pbe_train.data.shards import ShardReader
from pbe_train.data.training_dataset import TrainingDataset
from pbe_train.model.diffusion import noise_losses
from pbe_train.model.schedulers import training_schedule
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from pbe_train.training.setup import Training
from schemas.sample import ReferenceRecord
from schemas.tables import INDEX, REFERENCE_PLACES
from tests.conftest import run_build
from tests.pbe_train.small_world import World, write_shard
from tests.pipelines.test_pairs import SMALL, rows_of, write_photos, write_table

ONE = Distributed(0, 1, torch.device("cpu"))
SCHEMA = pa.schema([*INDEX, REFERENCE_PLACES])
GREY = 40
"""Reference n of a sample is all of `GREY * n`, so that it can be told."""


def with_others(sample, count: int):
    """The sample with references from other photos, of 20 x 20 px; the right half of each is the object's."""
    one = {"photo_id": "x", "file_name": None, "rotation": 0, "photo_size": (32, 32), "photo_sha256": "0" * 64}
    one |= {"box": (6, 6, 26, 26), "window": (6, 6, 26, 26), "mask": None, "url": None, "author": None, "licence": None}
    record = sample.record.model_copy(update={"references": (ReferenceRecord(**one),) * count})
    greys = (np.full((20, 20, 3), GREY * number, np.uint8) for number in range(1, count + 1))
    return dataclasses.replace(sample, record=record, others=tuple(jpeg_bytes(grey, 100) for grey in greys))


@pytest.fixture(scope="module")
def paired(world: World, tmp_path_factory) -> World:
    """The small world with 0, 1, 2, 3, 0, ... references from other photos in its samples."""
    folder = tmp_path_factory.mktemp("paired") / "dataset"
    shutil.copytree(world.dataset, folder)
    index = pq.read_table(world.dataset / "index.parquet").to_pylist()
    written = []
    for name, rows in itertools.groupby(index, key=lambda row: row["shard"]):
        samples = [with_others(read_sample(world.dataset, row), int(row["key"][-10:-6]) % 4) for row in rows]
        written.append(write_shard(folder, name, samples))
        for row in written[-1]:
            others = sorted(key for key in row if key.startswith("ref_") and key != "ref_jpg")
            row["refs_jpg"] = [row.pop(key) for key in others]
    with pq.ParquetWriter(folder / "index.parquet", SCHEMA) as index:
        for rows in written:
            index.write_table(pa.Table.from_pylist(rows, SCHEMA))
    return dataclasses.replace(world, dataset=folder)


def settings_of(world: World, out: Path, *options: str):
    return world.settings(out, f"--dataset={world.dataset}", "--augmentation.preset=none", *options)


def items_of(world: World, out: Path, *options: str) -> TrainingDataset:
    settings = settings_of(world, out, *options)
    return TrainingDataset(settings, ShardReader(settings.dataset, "train"), 32)


def shown(items: TrainingDataset, steps: int) -> list[tuple[str, int, int]]:
    """Of each slot: key, references that the sample has, and which one was shown, by its grey; 0 for the own crop."""
    found = []
    for step in range(steps):
        references = items[[(step, slot) for slot in range(4)]].batch.reference
        for key, picture in zip(items.keys(step), references.float(), strict=True):
            number = round(float(picture.mean()) / GREY) if picture.std() < 1 else 0
            found.append((key, int(key[5:9]) % 4, number))
    return found


def test_which_reference_is_drawn_by_seed_epoch_and_key():
    names = [(epoch, f"key{number}") for epoch in range(5) for number in range(400)]
    drawn = [choose_references(3, epoch, key, 4, 0.3, 1)[0] for epoch, key in names]
    assert drawn == [choose_references(3, epoch, key, 4, 0.3, 1)[0] for epoch, key in names]
    assert drawn != [choose_references(4, epoch, key, 4, 0.3, 1)[0] for epoch, key in names]
    counts = Counter(drawn)
    assert 0.26 < 1 - counts[0] / len(drawn) < 0.34
    assert all(105 < counts[number] < 195 for number in (1, 2, 3, 4))
    assert len({choose_references(3, epoch, "key", 4, 1.0, 1) for epoch in range(40)}) == 4, "another one in another epoch"
    for others in (1, 2, 5):
        several = choose_references(3, 0, "key", others, 1.0, 3)
        assert sorted(Counter(several).values()) == {1: [3], 2: [1, 2], 5: [1, 1, 1]}[others]
        assert set(several) <= set(range(1, others + 1))
    assert choose_references(3, 0, "key", 0, 1.0, 2) == choose_references(3, 0, "key", 5, 0.0, 2) == (0, 0)


def test_samples_are_shown_another_photo_where_there_is_one(paired: World, tmp_path):
    for _, others, number in shown(items_of(paired, tmp_path), 12):
        assert (number == 0) == (others == 0)
        assert number <= others
    assert {number for _, others, number in shown(items_of(paired, tmp_path), 12) if others == 3} == {1, 2, 3}
    assert all(number == 0 for *_, number in shown(items_of(paired, tmp_path, "--references.cross_photo=0"), 6))
    half = [number > 0 for _, others, number in shown(items_of(paired, tmp_path, "--references.cross_photo=0.5"), 24) if others]
    assert 0.3 < np.mean(half) < 0.7


def test_without_pairs_nothing_changes(world: World, paired: World, tmp_path):
    """The very batches of a dataset without references from other photos, and no word of it in settings that older runs lack."""
    plain, own = items_of(world, tmp_path), items_of(paired, tmp_path, "--references.cross_photo=0")
    for step in range(3):
        pairs = [(step, slot) for slot in range(4)]
        for one, other in zip(plain[pairs].batch, own[pairs].batch, strict=True):
            assert torch.equal(one, other)
    assert "references" not in world.settings(tmp_path).model_dump(mode="json")
    assert own.settings.model_dump(mode="json")["references"] == {"cross_photo": 0.0, "per_sample": 1}


def test_the_condition_of_several_is_the_mean_of_theirs(paired: World, tmp_path):
    items = items_of(paired, tmp_path, "--references.per_sample=2", "--condition_dropout=0")
    batch = items[[(0, slot) for slot in range(4)]].batch
    assert batch.reference.shape == (8, 32, 32, 3)
    model = Training(settings_of(paired, tmp_path, "--references.per_sample=2"), ONE).model
    seen = []
    model.predict = lambda noisy, *rest: seen.append(rest[-1]) or noisy
    noise_losses(model, training_schedule("epsilon"), batch)
    with torch.no_grad():
        each = model.conditioner(normalise_reference(batch.reference))
    assert torch.equal(seen[0], torch.stack([each[place : place + 2].mean(0) for place in (0, 2, 4, 6)]))
    with pytest.raises((InputError, ValidationError, SystemExit)):
        settings_of(paired, tmp_path, "--references.per_sample=2", "--model.tokens=all")


def test_held_out_samples_are_shown_by_another_photo(paired: World):
    reader = ShardReader(paired.dataset, "validation")
    for position in range(12):
        reference = reader.read(SampleLocation(0, position)).reference
        assert (abs(float(reference.mean()) - GREY) < 1 and float(reference.std()) < 1) == (position % 4 > 0)


def test_a_damaged_reference_of_another_photo_is_told(paired: World, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(paired.dataset, copy)
    row = pq.read_table(copy / "index.parquet").to_pylist()[3]
    tar = copy / "shards" / f"{row['shard']}.tar"
    data = bytearray(tar.read_bytes())
    data[row["refs_jpg"][2]["offset"] + 100] ^= 255
    tar.write_bytes(data)
    reader = ShardReader(copy, "train")
    reader.read_for_training(SampleLocation(0, 3), lambda key, masks: 0, choose_references=lambda key, others: (2,))
    with pytest.raises(InputError, match=r"ref_3\.jpg is not what was written"):
        reader.read_for_training(SampleLocation(0, 3), lambda key, masks: 0, choose_references=lambda key, others: (3,))


def test_a_stopped_run_goes_on_bit_for_bit(paired: World, tmp_path):
    options = ("--references.cross_photo=0.7", "--references.per_sample=2", "--validation.every=2", "--log_every=1")
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    train(settings_of(paired, calm, *options, "--steps=4"), ONE)
    train(settings_of(paired, stopped, *options, "--steps=2"), ONE)
    train(settings_of(paired, stopped, *options, "--steps=4"), ONE)
    for part in ("model", "optimizer"):
        one, other = (load_file(out / "checkpoints" / "step-00000004" / f"{part}.safetensors") for out in (calm, stopped))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InputError, match=r"references\.cross_photo 0\.7 -> 0\.2"):
        train(settings_of(paired, stopped, "--references.cross_photo=0.2", "--references.per_sample=2", "--steps=5"), ONE)


def test_from_a_table_to_two_steps_of_training(world: World, tmp_path):
    """All of it: boxes with a column of instances, shards, and a model that has seen other photos."""
    rows = rows_of(6, 3)
    write_photos(tmp_path, {row["photo"] for row in rows})
    folders = ["--source.annotations", str(write_table(tmp_path / "boxes.csv", rows)), "--source.photos", str(tmp_path)]
    run_build(*SMALL, *folders, "--out", str(tmp_path / "dataset"), "--references.others", "2", "--latents.vae", str(world.vae))
    train(world.settings(tmp_path / "run", f"--dataset={tmp_path / 'dataset'}", "--steps=2", "--validation.every=0"), ONE)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
