"""Random access to samples."""

import json
import pickle
import shutil
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pbe_core.errors import InputError
from pbe_core.sample_codec import encode_array, encode_masks, latents_problem
from pbe_train.data.corrupt_samples import CorruptSample
from pbe_train.data.order import SampleLocation
from pbe_train.data.shards import READ, ShardReader
from schemas.tables import INDEX
from tests.pbe_train.small_world import MASKS, World, make_sample, make_vae


def test_a_sample_is_read_back_as_it_was_written(world: World, tmp_path):
    reader = ShardReader(world.dataset, "train", open_shards=1)
    vae = make_vae(tmp_path / "vae", 0)
    for place, number in (
        (SampleLocation(1, 3), 8),
        (SampleLocation(3, 4), 23),
        (SampleLocation(0, 0), 0),
        (SampleLocation(1, 7), 12),
    ):
        read, written = reader.read(place), make_sample(vae, "train", number)
        assert read.key == written.record.key
        assert np.array_equal(read.latent, written.latent)
        assert np.array_equal(read.masked, written.masked)
        assert np.array_equal(read.masks, written.masks)
    assert ShardReader(world.dataset, "validation").read(SampleLocation(0, 2)).view.shape == (32, 32, 3)


def test_training_reads_what_evaluation_reads(world: World):
    """Of one of the masks; and a worker that is not forked reads the same through its own files."""
    reader = ShardReader(world.dataset, "train", open_shards=1)
    copy = pickle.loads(pickle.dumps(reader))
    for place in (SampleLocation(1, 3), SampleLocation(3, 4), SampleLocation(0, 0)):
        for kind in range(MASKS):
            whole, part = reader.read(place), copy.read_for_training(place, lambda key, masks, kind=kind: kind)
            assert part.key == whole.key
            assert np.array_equal(part.latent, whole.latent)
            assert np.array_equal(part.masked, whole.masked[kind])
            assert np.array_equal(part.mask, whole.masks[kind])
            assert np.array_equal(part.reference, whole.reference)


def damaged_copy(world: World, tmp_path):
    shutil.copytree(world.dataset, tmp_path / "dataset")
    return tmp_path / "dataset"


def put(folder, member: str, data: bytes) -> None:
    """Write other bytes into a member of sample 3 of shard 1, padded to its length, with their CRC-32 in the index."""
    table = pq.read_table(folder / "index.parquet").to_pylist()
    row = next(row for row in table if row["shard"] == "train-000001" and row["position"] == 3)
    assert len(data) <= row[member]["length"]
    tar = folder / "shards" / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[row[member]["offset"] : row[member]["offset"] + len(data)] = data
    tar.write_bytes(content)
    row[member] = {**row[member], "length": len(data), "crc32": zlib.crc32(data)}
    pq.write_table(pa.Table.from_pylist(table, INDEX), folder / "index.parquet")


def array(change) -> bytes:
    latent = np.abs(np.random.default_rng(0).standard_normal((8, 4, 4))).astype(np.float16)
    return encode_array(change(latent))


@pytest.mark.parametrize(
    ("member", "data", "problem"),
    [
        (
            "latent_npy",
            array(lambda latent: np.where(latent > latent.mean(), np.float16("nan"), latent)),
            "a latent is not finite",
        ),
        (
            "latent_npy",
            array(lambda latent: np.where(latent > latent.mean(), np.float16("inf"), latent)),
            "a latent is not finite",
        ),
        ("latent_npy", array(lambda latent: -latent), "a standard deviation is negative"),
        ("latent_npy", array(lambda latent: latent[:4].astype(np.float32)), "float32|fit dataset"),
        ("latent_npy", array(lambda latent: latent[:7]), r"\[7, 4, 4\]|fit dataset|expected float16"),
        ("latent_npy", b"not an array", "pickle|not an array|magic"),
        ("mask_json", encode_masks(np.zeros((MASKS, 32, 32), bool)), "a mask is empty"),
        ("mask_json", encode_masks(np.ones((1, 32, 32), bool)), "1 mask of 32 px"),
        ("mask_json", b"[1]", "RLE"),
        ("ref_jpg", b"not a picture", "not_an_image"),
    ],
)
def test_what_is_read_is_checked_even_where_its_checksum_fits(world: World, tmp_path, member, data, problem):
    """Both ways of reading refuse what no build writes."""
    folder = damaged_copy(world, tmp_path)
    put(folder, member, data)
    reader = ShardReader(folder, "train")
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


@pytest.mark.parametrize("member", [name for name in READ if name != "view_jpg"])
def test_one_flipped_bit_is_noticed(world: World, tmp_path, member):
    """Of a latent, say: it would be another number, and nothing else would tell."""
    folder = damaged_copy(world, tmp_path)
    rows = pq.read_table(folder / "index.parquet", filters=[("shard", "==", "train-000001"), ("position", "==", 3)]).to_pylist()
    tar = folder / "shards" / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[rows[0][member]["offset"] + rows[0][member]["length"] - 3] ^= 1
    tar.write_bytes(data)
    reader = ShardReader(folder, "train")
    reader.read(SampleLocation(1, 2))
    with pytest.raises(
        InputError, match=rf"sample train0008-abc_0 is damaged \({member.replace('_', '.')} is not what was written"
    ):
        reader.read(SampleLocation(1, 3))


def test_a_missing_shard_is_named(world: World, tmp_path):
    folder = damaged_copy(world, tmp_path)
    (folder / "shards" / "train-000002.tar").unlink()
    with pytest.raises(InputError, match=r"train-000002\.tar: the shard is missing"):
        ShardReader(folder, "train").read(SampleLocation(2, 0))


def test_an_index_that_does_not_fit_is_refused(world: World, tmp_path):
    folder = damaged_copy(world, tmp_path)
    info = json.loads((folder / "dataset.json").read_text())
    info["splits"]["train"]["samples"] += 1
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"index\.parquet: 24 samples of split `train`, dataset\.json says 25"):
        ShardReader(folder, "train")
