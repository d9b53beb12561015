"""A dataset in a bucket: the same batches as from a folder, and a cache that processes share and that stays within its bound."""

import hashlib
import json
import multiprocessing
import pickle
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pbe_core.errors import InputError
from pbe_core.settings import dump_settings, load_settings
from pbe_train import demo
from pbe_train.config import TRAIN_SPLIT, VALIDATION_SPLIT, TrainSettings
from pbe_train.data import remote_shards
from pbe_train.data.order import SampleLocation
from pbe_train.data.remote_shards import CachedShards, ShardContent, open_reader
from pbe_train.data.shards import ShardReader, UnreadableShard
from pbe_train.data.training_dataset import Batch, TrainingDataset, load_batches
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from schemas.tables import SHARD_RECORDS
from tests.pbe_train.small_world import World
from tests.s3_server import S3Server, s3_server

BUCKET, URL = "datasets", "s3://datasets/small"
FORK = multiprocessing.get_context("fork")
FIRST = SampleLocation(0, 0)
# Else its library tries each request for seconds.
IMPATIENT = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1}}
NOBODY = "http://127.0.0.1:9"


def contents(world: World, shards: str = "train*") -> dict[str, ShardContent]:
    tars = {path.stem: path.read_bytes() for path in sorted((world.dataset / "shards").glob(f"{shards}.tar"))}
    return {name: ShardContent(len(data), hashlib.sha256(data).hexdigest()) for name, data in tars.items()}


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[S3Server]:
    """With the small world's dataset, whose commit records are made here, as its build would."""
    counts = {"planned": 1, "samples": 1, "failed": 0, "index_bytes": 0, "padded_views": 0, "failures": {}, "masks": {}}
    records = [
        {"shard": name, "split": name[:-7], "fingerprint": "fixture", "index_sha256": "", **vars(content), **counts}
        for name, content in contents(world, "*").items()
    ]
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records, SHARD_RECORDS), table)
    files = {f"small/{path.relative_to(world.dataset)}": path.read_bytes() for path in world.dataset.rglob("*") if path.is_file()}
    with s3_server() as server:
        server.put(BUCKET, files | {"small/shard_records.parquet": table.getvalue().to_pybytes()})
        yield server


def storage_of(server: S3Server, **more: object) -> str:
    return json.dumps({**server.storage["s3"], **more})


def remote_settings(world: World, server: S3Server, tmp_path: Path, *options: str) -> TrainSettings:
    places = [f"--dataset={URL}", f"--storage={storage_of(server)}", f"--loader.cache={tmp_path / 'cache'}"]
    return world.settings(tmp_path, *places, *options)


def reader_of(settings: TrainSettings) -> ShardReader:
    return open_reader(settings, TRAIN_SPLIT)


def shards_in(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "shards").iterdir())


def shards_of(
    world: World, server: S3Server, tmp_path: Path, limit: int = 10**9, kind: type[CachedShards] = CachedShards
) -> CachedShards:
    for name in ("shards", "locks"):
        (tmp_path / "cache" / name).mkdir(parents=True, exist_ok=True)
    return kind(URL, server.storage["s3"], contents(world), tmp_path / "cache", limit)


def copied(server: S3Server, name: str) -> fsspec.AbstractFileSystem:
    """The file system of the bucket, with a copy of the dataset under this name."""
    files = fsspec.filesystem("s3", **server.storage["s3"])
    files.copy(f"{BUCKET}/small", f"{BUCKET}/{name}", recursive=True)
    return files


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_local_copy(world: World, server: S3Server, tmp_path: Path, workers: int):
    """Also through a reader that went to another process, and of another split."""
    local = world.settings(tmp_path, "--steps=9")
    expected = list(load_batches(TrainingDataset(local, ShardReader(local.dataset, "train"), 32), 0, 1, 0))
    settings = remote_settings(world, server, tmp_path, "--steps=9", f"--loader.workers={workers}")
    reader = pickle.loads(pickle.dumps(reader_of(settings)))
    found = list(load_batches(TrainingDataset(settings, reader, 32), 0, 1, 0))
    for one, other in zip(expected, found, strict=True):
        for field in Batch._fields:
            assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert shards_in(tmp_path) == sorted(f"{content.sha256}.tar" for content in contents(world).values())
    assert open_reader(settings, VALIDATION_SPLIT).read(FIRST).key == ShardReader(world.dataset, "validation").read(FIRST).key


def test_what_a_training_says_to_do_next_works_for_a_url(world: World, server: S3Server, tmp_path: Path, monkeypatch, capsys):
    """The demo reads the dataset as the training does; it needs only the options of the URL, which are printed nowhere."""
    settings = remote_settings(world, server, tmp_path, "--steps=1", "--validation.every=0", f"--out={tmp_path / 'a run'}")
    train(settings, Distributed(0, 1, torch.device("cpu")))
    said = capsys.readouterr().out
    assert server.secret not in said
    words = shlex.split(next(line for line in said.splitlines() if line.startswith("next: ")))
    assert words[words.index("--dataset") + 1] == URL
    words[words.index("--storage") + 1] = storage_of(server)
    words[words.index("--out") + 1] = str(tmp_path / "demo.png")
    assert words[1:4] == ["python", "-m", "pbe_train.demo"]
    monkeypatch.setattr(sys, "argv", [*words[3:], "--count=1", "--steps=1"])
    demo.main()
    assert (tmp_path / "demo.png").is_file()


def test_no_file_holds_a_key(world: World, server: S3Server, tmp_path: Path):
    """Settings are written and read back with the URL, and without what opens it; nor with a password in the URL."""
    settings = remote_settings(world, server, tmp_path)
    (tmp_path / "settings.yaml").write_text(dump_settings(settings, "train"))
    again = load_settings(TrainSettings, "train", ["--config", str(tmp_path / "settings.yaml")])
    assert (again.dataset_url, again.storage) == (URL, {})
    reader_of(settings).read(FIRST)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or server.secret.encode() not in path.read_bytes()
    assert server.secret in str(settings.storage)
    settings = TrainSettings(dataset="s3://user:password@bucket/small", model={"encoder": "e", "vae": "v"})
    assert settings.dataset_url == "s3://user:password@bucket/small"
    assert "password" not in dump_settings(settings, "train")


class Counted(CachedShards):
    """Writes a line for each shard that is fetched, and takes its time."""

    def _copy(self, shard: str, part: Path) -> str | None:
        with (self.folder / "fetched").open("a") as file:
            file.write(f"{shard}\n")
        time.sleep(0.1)
        return super()._copy(shard, part)


def open_all(shards: CachedShards, start) -> None:
    start.wait()
    for name in shards.contents:
        assert len(shards.open(name).read()) == shards.contents[name].bytes


def test_processes_that_want_the_same_shards_fetch_each_once(world: World, server: S3Server, tmp_path: Path):
    shards, start = shards_of(world, server, tmp_path, kind=Counted), FORK.Barrier(3)
    processes = [FORK.Process(target=open_all, args=(shards, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "cache" / "fetched").read_text().split()) == sorted(shards.contents)


class Stuck(CachedShards):
    """Brings half of a shard, and no more."""

    def _copy(self, shard: str, part: Path) -> str | None:
        with self._reserved(part, self.contents[shard].bytes) as file:
            file.write(b"x" * (self.contents[shard].bytes // 2))
            file.flush()
            (self.folder / "half").touch()
            time.sleep(600)
        return None


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_a_shard(world: World, server: S3Server, tmp_path: Path):
    """Its lock ends with it, and what it left is overwritten by the next fetch, or removed when room is made."""
    stuck = shards_of(world, server, tmp_path, kind=Stuck)
    name, other, *_ = stuck.contents
    for shard in (name, other):
        process = FORK.Process(target=stuck.open, args=(shard,))
        process.start()
        while not (tmp_path / "cache" / "half").exists():
            time.sleep(0.02)
        (tmp_path / "cache" / "half").unlink()
        process.kill()
        process.join()
    assert len(shards_in(tmp_path)) == 2
    shards = shards_of(world, server, tmp_path, max(content.bytes for content in stuck.contents.values()))
    with shards.open(name) as file:
        assert file.read() == (world.dataset / "shards" / f"{name}.tar").read_bytes()
    assert shards_in(tmp_path) == [f"{shards.contents[name].sha256}.tar"]


def test_the_cache_stays_within_its_bound_and_who_has_a_shard_open_reads_on(world: World, server: S3Server, tmp_path: Path):
    """The one goes that was opened longest ago."""
    limit = sum(content.bytes for content in contents(world).values()) - 1
    shards = shards_of(world, server, tmp_path, limit)
    one, two, three, four = shards.contents
    in_use = shards.open(one)
    for name in (two, three, two, four):  # two is used again, so that three comes to be older.
        shards.open(name).close()

    def here() -> set[str]:
        assert sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir()) <= limit
        return {name for name, content in shards.contents.items() if f"{content.sha256}.tar" in shards_in(tmp_path)}

    assert here() == {two, three, four}
    shards.open(one).close()
    assert here() == {one, two, four}
    assert in_use.read() == (world.dataset / "shards" / f"{one}.tar").read_bytes()


def test_a_shard_that_is_not_what_was_written_is_told(world: World, server: S3Server, tmp_path: Path, monkeypatch):
    """And asked for once. A network that fails is no damage: nothing is replaced for it."""
    shards = shards_of(world, server, tmp_path, kind=Counted)
    name, other, missing, short = shards.contents
    shards.contents[name] = ShardContent(shards.contents[name].bytes, "0" * 64)
    for _ in range(2):
        with pytest.raises(UnreadableShard, match=rf"{URL}/shards/{name}\.tar: the shard is not what was written \(SHA-256\)"):
            shards.open(name)
    assert (tmp_path / "cache" / "fetched").read_text().count(name) == 1
    shards.contents[short] = ShardContent(shards.contents[short].bytes + 1, shards.contents[short].sha256)
    with pytest.raises(UnreadableShard, match=r"the shard has [\d,]+ bytes, not [\d,]+ as written"):
        shards.open(short)
    shards.contents["train-000099"] = shards.contents[missing]
    with pytest.raises(UnreadableShard, match=r"train-000099\.tar: the shard is missing; run the build again"):
        shards.open("train-000099")
    monkeypatch.setattr(remote_shards, "PAUSES", (0.01,))
    there, shards.storage = shards.storage, {**shards.storage, **IMPATIENT, "endpoint_url": NOBODY}
    with pytest.raises(InputError, match=rf"^{URL}/shards/{other}\.tar: .*once the network is back") as caught:
        shards.open(other)
    assert not isinstance(caught.value, UnreadableShard)
    assert shards_in(tmp_path) == []
    shards.storage = there
    shards.open(other).close()


def test_a_damaged_copy_is_fetched_again(world: World, server: S3Server, tmp_path: Path):
    """A cache's disk may rot; the dataset is as it was, and must not be blamed. Whoever reads on has the new copy."""
    reader, other = (reader_of(remote_settings(world, server, tmp_path)) for _ in range(2))
    expected = reader.read(FIRST)
    assert other.read(FIRST).key == expected.key
    content = contents(world)[reader.shards[0]]
    path = tmp_path / "cache" / "shards" / f"{content.sha256}.tar"
    path.write_bytes(bytes(content.bytes))
    for each in (reader, other):  # The other one has the damaged copy open still.
        found = each.read(FIRST)
        assert (found.key, found.latent.tobytes()) == (expected.key, expected.latent.tobytes())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == content.sha256


def test_a_missing_shard_can_be_replaced(world: World, server: S3Server, tmp_path: Path):
    """Damage there is damage like any other: what takes its place is a function of step and slot."""
    copied(server, "holed").rm(f"{BUCKET}/holed/shards/train-000002.tar")
    options = ["--steps=7", f"--dataset=s3://{BUCKET}/holed", "--loader.on_corrupt=replace"]
    settings = remote_settings(world, server, tmp_path, *options)
    batches = load_batches(TrainingDataset(settings, reader_of(settings), 32), 0, 1, 0)
    assert len(list(batches)) == 7
    assert {one.shard for one in batches.take_replaced()} == {"train-000002"}


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        (["--dataset=s3://datasets/nowhere"], {}, r"^s3://datasets/nowhere: no dataset there, or not all of it"),
        (["--dataset=s3://nobucket/small"], {}, r"^s3://nobucket/small: no dataset there, or not all of it"),
        ([], {**IMPATIENT, "endpoint_url": NOBODY}, r"^s3://datasets/small/dataset\.json: .*are credentials set"),
        (["--loader.cache_gb=1e-6"], {}, r"loader\.cache_gb 1e-06 is too small for loader\.window 2: up to 0\.0 GB of shards"),
        (["--loader.cache={tmp_path}/file"], {}, r"cannot be written to \(.*\); give another folder, --loader\.cache"),
    ],
)
def test_a_url_that_leads_nowhere_or_a_bad_cache_is_one_line(world: World, server: S3Server, tmp_path: Path, options, more, said):
    (tmp_path / "file").touch()
    given = [option.format(tmp_path=tmp_path) for option in options]
    settings = remote_settings(world, server, tmp_path, *given, f"--storage={storage_of(server, **more)}")
    with pytest.raises(InputError, match=said) as caught:
        reader_of(settings)
    assert "\n" not in str(caught.value)
    assert server.secret not in str(caught.value)


def test_a_dataset_that_was_built_anew_is_fetched_anew(world: World, server: S3Server, tmp_path: Path):
    """Tables of another dataset.json go into another folder; shards that are the same are not fetched again."""
    files = copied(server, "changing")
    settings = remote_settings(world, server, tmp_path, f"--dataset=s3://{BUCKET}/changing")
    first = reader_of(settings)
    first.read(FIRST)
    inode = next((tmp_path / "cache" / "shards").iterdir()).stat().st_ino
    info = files.cat_file(f"{BUCKET}/changing/dataset.json").replace(b'"fixture"', b'"another"')
    files.pipe_file(f"{BUCKET}/changing/dataset.json", info)
    second = reader_of(settings)
    assert (first.info.fingerprint, second.info.fingerprint) == ("fixture", "another")
    assert first.folder != second.folder
    second.read(FIRST)
    assert [path.stat().st_ino for path in (tmp_path / "cache" / "shards").iterdir()] == [inode]
