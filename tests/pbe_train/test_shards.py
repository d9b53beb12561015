"""Random access to samples."""

import json
import pickle
import shutil
import zlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pbe_core.autoencoder import Autoencoder
from pbe_core.errors import InputError
from pbe_core.sample_codec import encode_array, encode_masks, latents_problem
from pbe_train.data.order import SampleLocation
from pbe_train.data.shards import READ, CorruptSample, ShardReader
from schemas.tables import INDEX
from tests.pbe_train.small_world import MASKS, World, make_sample, make_vae


def test_a_sample_is_read_back_as_it_was_written(world: World, tmp_path):
    """For training, of one of the masks; and a worker that is not forked reads the same through its own files."""
    reader, vae = ShardReader(world.dataset, "train", open_shards=1), Autoencoder(make_vae(tmp_path / "vae", 0))
    copy = pickle.loads(pickle.dumps(reader))
    for place, number in (((1, 3), 8), ((3, 4), 23), ((0, 0), 0), ((1, 7), 12)):
        read, written = reader.read(SampleLocation(*place)), make_sample(vae, "train", number)
        assert read.key == written.record.key
        for field in ("latent", "masked", "masks"):
            assert np.array_equal(getattr(read, field), getattr(written, field))
        for kind in range(MASKS):
            part = copy.read_for_training(SampleLocation(*place), lambda key, masks, kind=kind: kind)
            assert part.key == read.key
            for found, expected in (
                (part.latent, read.latent),
                (part.masked, read.masked[kind]),
                (part.mask, read.masks[kind]),
                (part.reference, read.reference),
            ):
                assert np.array_equal(found, expected)
    assert ShardReader(world.dataset, "validation").read(SampleLocation(0, 2)).view.shape == (32, 32, 3)


def put(folder, member: str, change: Callable[[bytes], bytes], with_checksum: bool) -> None:
    """Change a member of sample 3 of shard 1, and its length and CRC-32 in the index where these are to fit."""
    with pq.ParquetFile(folder / "index.parquet") as index:
        groups = [index.read_row_group(number).to_pylist() for number in range(index.num_row_groups)]
    row = next(row for rows in groups for row in rows if row["shard"] == "train-000001" and row["position"] == 3)
    place, tar = row[member], folder / "shards" / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    data = change(bytes(content[place["offset"] : place["offset"] + place["length"]]))
    assert len(data) <= place["length"]
    content[place["offset"] : place["offset"] + len(data)] = data
    tar.write_bytes(content)
    if with_checksum:
        row[member] = {**place, "length": len(data), "crc32": zlib.crc32(data)}
        with pq.ParquetWriter(folder / "index.parquet", INDEX) as writer:
            for rows in groups:
                writer.write_table(pa.Table.from_pylist(rows, INDEX))


def array(change) -> bytes:
    latent = np.abs(np.random.default_rng(0).standard_normal((8, 4, 4))).astype(np.float16)
    return encode_array(change(latent))


def flip_a_bit(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


CHANGED = "is not what was written"


@pytest.mark.parametrize(
    ("member", "data", "problem"),
    [
        ("latent_npy", array(lambda one: np.where(one > one.mean(), np.float16("nan"), one)), "a latent is not finite"),
        ("latent_npy", array(lambda one: np.where(one > one.mean(), np.float16("inf"), one)), "a latent is not finite"),
        ("latent_npy", array(lambda one: -one), "a standard deviation is negative"),
        ("latent_npy", array(lambda one: one[:4].astype(np.float32)), "float32|fit dataset"),
        ("latent_npy", array(lambda one: one[:7]), r"\[7, 4, 4\]|fit dataset|expected float16"),
        ("latent_npy", b"not an array", "pickle|not an array|magic"),
        ("mask_json", encode_masks(np.zeros((MASKS, 32, 32), bool)), "a mask is empty"),
        ("mask_json", encode_masks(np.ones((1, 32, 32), bool)), "1 mask of 32x32 px"),
        ("mask_json", b"[1]", "RLE"),
        ("ref_jpg", b"not a picture", "not_an_image"),
        *((member, None, f"{member.replace('_', '.')} {CHANGED}") for member in READ if member != "view_jpg"),
    ],
)
def test_what_is_read_is_checked_even_where_its_checksum_fits(world: World, tmp_path, member, data, problem):
    """Both ways of reading refuse what no build writes; and one flipped bit, which nothing but the checksum would tell."""
    folder = shutil.copytree(world.dataset, tmp_path / "dataset")
    put(folder, member, flip_a_bit if data is None else lambda _: data, with_checksum=data is not None)
    reader = ShardReader(folder, "train")
    reader.read(SampleLocation(1, 2))
    match = rf"train-000001\.tar: sample train0008-abc_0 is damaged \(.*({problem})"
    with pytest.raises(CorruptSample, match=match) as caught:
        reader.read_for_training(SampleLocation(1, 3), lambda key, masks: 0)
    assert caught.value.replaced[:2] == ("train-000001", "train0008-abc_0")
    with pytest.raises(InputError, match=match):
        reader.read(SampleLocation(1, 3))


def test_minus_zero_is_no_negative_deviation():
    latent = np.abs(np.random.default_rng(0).standard_normal((8, 4, 4))).astype(np.float16)
    latent[6] = np.float16(-0.0)
    assert latents_problem(latent) is None
    latent[6, 2, 2] = np.float16(-6e-8)  # The smallest there is.
    assert latents_problem(latent) == "a standard deviation is negative"


def test_a_missing_shard_and_an_index_that_does_not_fit_are_named(world: World, tmp_path):
    folder = shutil.copytree(world.dataset, tmp_path / "dataset")
    (folder / "shards" / "train-000002.tar").unlink()
    with pytest.raises(InputError, match=r"train-000002\.tar: the shard is missing"):
        ShardReader(folder, "train").read(SampleLocation(2, 0))
    info = json.loads((folder / "dataset.json").read_text())
    info["splits"]["train"]["samples"] += 1
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"index\.parquet: 24 samples of split `train`, dataset\.json says 25"):
        ShardReader(folder, "train")
