"""A dataset in a bucket: the same batches as from a folder, and a cache that processes share and that stays within its bound."""

import hashlib
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
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
from pbe_train.config import TrainSettings
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


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[S3Server]:
    """With the small world's dataset, whose commit records are made here, as its build would."""
    with s3_server() as server:
        records = []
        for path in sorted((world.dataset / "shards").glob("*.tar")):
            data = path.read_bytes()
            counts = {"planned": 1, "samples": 1, "failed": 0, "index_bytes": 0, "padded_views": 0}
            texts = {"split": path.stem.split("-")[0], "fingerprint": "fixture", "index_sha256": ""}
            content = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            records.append({"shard": path.stem, **counts, **texts, **content, "failures": {}, "masks": {}})
        table = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(records, SHARD_RECORDS), table)
        files = {
            f"small/{path.relative_to(world.dataset)}": path.read_bytes() for path in world.dataset.rglob("*") if path.is_file()
        }
        server.put(BUCKET, files | {"small/shard_records.parquet": table.getvalue().to_pybytes()})
        yield server


def remote_settings(world: World, server: S3Server, tmp_path: Path, *options: str) -> TrainSettings:
    storage = fsspec_options(server)
    return world.settings(tmp_path, f"--dataset={URL}", f"--storage={storage}", f"--loader.cache={tmp_path / 'cache'}", *options)


def fsspec_options(server: S3Server) -> str:
    return str(server.storage["s3"]).replace("'", '"')


def shards_in(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "shards").iterdir())


def contents(world: World) -> dict[str, ShardContent]:
    found = {}
    for path in sorted((world.dataset / "shards").glob("train*.tar")):
        data = path.read_bytes()
        found[path.stem] = ShardContent(len(data), hashlib.sha256(data).hexdigest())
    return found


def shards_of(
    world: World, server: S3Server, tmp_path: Path, limit: int, kind: type[CachedShards] = CachedShards
) -> CachedShards:
    for name in ("shards", "locks"):
        (tmp_path / "cache" / name).mkdir(parents=True, exist_ok=True)
    return kind(URL, server.storage["s3"], contents(world), tmp_path / "cache", limit)


@pytest.mark.parametrize(("workers", "method"), [(0, "fork"), (2, "fork"), (2, "spawn")])
def test_batches_are_those_of_the_local_copy(world: World, server: S3Server, tmp_path: Path, workers, method):
    local = world.settings(tmp_path, "--steps=9")
    expected = list(load_batches(TrainingDataset(local, ShardReader(local.dataset, "train"), 32), 0, 1, 0))
    settings = remote_settings(world, server, tmp_path, "--steps=9", f"--loader.workers={workers}")
    found = list(load_batches(TrainingDataset(settings, open_reader(settings), 32), 0, 1, 0, method))
    for one, other in zip(expected, found, strict=True):
        for field in Batch._fields:
            assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert shards_in(tmp_path) == sorted(f"{content.sha256}.tar" for content in contents(world).values())


def test_another_split_comes_from_there_too(world: World, server: S3Server, tmp_path: Path):
    reader = open_reader(remote_settings(world, server, tmp_path), "validation")
    assert reader.read(SampleLocation(0, 3)).key == ShardReader(world.dataset, "validation").read(SampleLocation(0, 3)).key


def test_what_a_training_says_to_do_next_works_for_a_url(world: World, server: S3Server, tmp_path: Path, monkeypatch, capsys):
    """The demo reads the dataset as the training does; it needs only the options of the URL, which are printed nowhere."""
    settings = remote_settings(world, server, tmp_path, "--steps=1", "--validation.every=0", f"--out={tmp_path / 'a run'}")
    train(settings, Distributed(0, 1, torch.device("cpu")))
    said = capsys.readouterr().out
    assert server.secret not in said
    words = shlex.split(next(line for line in said.splitlines() if line.startswith("next: ")))
    assert words[words.index("--dataset") + 1] == URL
    words[words.index("--storage") + 1] = fsspec_options(server)
    words[words.index("--out") + 1] = str(tmp_path / "demo.png")
    assert words[1:4] == ["python", "-m", "pbe_train.demo"]
    monkeypatch.setattr(sys, "argv", [*words[3:], "--count=1", "--steps=1"])
    demo.main()
    assert (tmp_path / "demo.png").is_file()


def test_no_file_holds_a_key(world: World, server: S3Server, tmp_path: Path):
    """Settings are written and read back with the URL, and without what opens it."""
    settings = remote_settings(world, server, tmp_path)
    text = dump_settings(settings, "train")
    (tmp_path / "settings.yaml").write_text(text)
    again = load_settings(TrainSettings, "train", ["--config", str(tmp_path / "settings.yaml")])
    assert again.dataset_url == URL
    assert again.storage == {}
    open_reader(settings).read(SampleLocation(0, 0))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or server.secret.encode() not in path.read_bytes()
    assert server.secret in str(settings.storage)


def test_a_url_with_a_password_in_it_is_written_without():
    settings = TrainSettings(dataset="s3://user:password@bucket/small", model={"encoder": "e", "vae": "v"})
    assert settings.dataset_url == "s3://user:password@bucket/small"
    assert "password" not in dump_settings(settings, "train")


class Counted(CachedShards):
    """Writes a line for each shard that is fetched, and takes its time."""

    def _copy(self, name: str, content: ShardContent, part: Path) -> str | None:
        with (self.cache.folder / "fetched").open("a") as file:
            file.write(f"{name}\n")
        time.sleep(0.3)
        return super()._copy(name, content, part)


def open_all(shards: CachedShards, start) -> None:
    start.wait()
    for name in shards.contents:
        assert len(shards.open(name).read()) == shards.contents[name].bytes


def test_processes_that_want_the_same_shards_fetch_each_once(world: World, server: S3Server, tmp_path: Path):
    shards = shards_of(world, server, tmp_path, 10**9, Counted)
    start = FORK.Barrier(3)
    processes = [FORK.Process(target=open_all, args=(shards, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "cache" / "fetched").read_text().split()) == [f"shards/{name}.tar" for name in shards.contents]


class Stuck(CachedShards):
    """Brings half of a shard, and no more."""

    def _copy(self, name: str, content: ShardContent, part: Path) -> str | None:
        with part.open("r+b") as file:
            file.write(b"x" * (content.bytes // 2))
        (self.cache.folder / "half").touch()
        time.sleep(600)
        return None


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_a_shard(world: World, server: S3Server, tmp_path: Path):
    """Its lock ends with it, and what it left is overwritten by the next fetch, or removed when room is made."""
    stuck = shards_of(world, server, tmp_path, 10**9, Stuck)
    name, other, *_ = stuck.contents
    for shard in (name, other):
        process = FORK.Process(target=stuck.open, args=(shard,))
        process.start()
        while not (tmp_path / "cache" / "half").exists():
            time.sleep(0.02)
        (tmp_path / "cache" / "half").unlink()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert len(shards_in(tmp_path)) == 2
    size = max(content.bytes for content in stuck.contents.values())
    shards = shards_of(world, server, tmp_path, size)
    with shards.open(name) as file:
        assert file.read() == (world.dataset / "shards" / f"{name}.tar").read_bytes()
    assert shards_in(tmp_path) == [f"{shards.contents[name].sha256}.tar"]


def test_the_cache_stays_within_its_bound_and_keeps_what_is_in_use(world: World, server: S3Server, tmp_path: Path, monkeypatch):
    """Of shards that nobody has open, the one goes that was not used for longest."""
    limit = sum(content.bytes for content in contents(world).values()) - 1
    shards = shards_of(world, server, tmp_path, limit)
    names = {name: f"{content.sha256}.tar" for name, content in shards.contents.items()}
    one, two, three, four = shards.contents
    in_use = shards.open(one)
    shards.open(two).close()
    shards.open(three).close()
    shards.open(two).close()  # Used again: now three is the oldest that nobody has open.
    shards.open(four).close()
    assert shards_in(tmp_path) == sorted(names[name] for name in (one, two, four))
    in_use.close()
    shards.open(three).close()
    assert shards_in(tmp_path) == sorted(names[name] for name in (two, three, four))
    held = [shards.open(name) for name in (two, three, four)]
    monkeypatch.setattr(remote_shards, "PATIENCE_SECONDS", 1)
    with pytest.raises(InputError, match=r"no room for a shard of .* in use; raise loader.cache_gb, or lower loader.window"):
        shards.open(one)
    assert sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir()) <= limit
    # Where another process lets go of one meanwhile, it is waited for.
    monkeypatch.setattr(remote_shards, "PATIENCE_SECONDS", 30)
    threading.Timer(0.5, held.pop().close).start()
    shards.open(one).close()
    for file in held:
        file.close()


def test_a_shard_that_is_not_what_was_written_is_told(world: World, server: S3Server, tmp_path: Path):
    shards = shards_of(world, server, tmp_path, 10**9, Counted)
    name, other, missing, short = shards.contents
    size = shards.contents[name].bytes
    shards.contents[name] = ShardContent(size, "0" * 64)
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
    assert shards_in(tmp_path) == []
    shards.open(other).close()


def test_a_damaged_copy_is_fetched_again(world: World, server: S3Server, tmp_path: Path):
    """A cache's disk may rot; the dataset is as it was, and must not be blamed. Whoever reads on has the new copy."""
    reader, other = (open_reader(remote_settings(world, server, tmp_path)) for _ in range(2))
    expected = reader.read(SampleLocation(0, 1))
    assert other.read(SampleLocation(0, 1)).key == expected.key
    content = contents(world)[reader.shards[0]]
    path = tmp_path / "cache" / "shards" / f"{content.sha256}.tar"
    path.write_bytes(bytes(content.bytes))
    for each in (reader, other):  # The other one has the damaged copy open still.
        found = each.read(SampleLocation(0, 1))
        assert (found.key, found.latent.tobytes()) == (expected.key, expected.latent.tobytes())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == content.sha256


def test_a_missing_shard_can_be_replaced(world: World, server: S3Server, tmp_path: Path):
    """Damage there is damage like any other: what takes its place is a function of step and slot."""
    copy = f"s3://{BUCKET}/holed"
    files = fsspec.filesystem("s3", **server.storage["s3"])
    files.copy(f"{BUCKET}/small", f"{BUCKET}/holed", recursive=True)
    files.rm(f"{BUCKET}/holed/shards/train-000002.tar")
    settings = remote_settings(world, server, tmp_path, "--steps=7", f"--dataset={copy}", "--loader.on_corrupt=replace")
    batches = load_batches(TrainingDataset(settings, open_reader(settings), 32), 0, 1, 0)
    assert len(list(batches)) == 7
    assert {one.shard for one in batches.take_replaced()} == {"train-000002"}


@pytest.mark.parametrize(
    ("dataset", "endpoint", "said"),
    [
        ("s3://datasets/nowhere", None, r"^s3://datasets/nowhere: no dataset there, or not all of it"),
        ("s3://nobucket/small", None, r"^s3://nobucket/small: no dataset there, or not all of it"),
        (URL, "http://127.0.0.1:9", r"^s3://datasets/small/dataset\.json: .*are credentials set"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(world: World, server: S3Server, tmp_path: Path, dataset, endpoint, said):
    storage = fsspec_options(server).replace(server.endpoint, endpoint or server.endpoint)
    settings = remote_settings(world, server, tmp_path, f"--dataset={dataset}", f"--storage={storage}")
    with pytest.raises(InputError, match=said) as caught:
        open_reader(settings)
    assert "\n" not in str(caught.value)
    assert server.secret not in str(caught.value)


@pytest.mark.long
def test_a_network_that_fails_later_is_one_line(world: World, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is no damage: nothing is replaced for it."""
    monkeypatch.setattr(remote_shards, "PAUSES", (0.01,))
    shards = shards_of(world, server, tmp_path, 10**9)
    shards.storage["endpoint_url"] = "http://127.0.0.1:9"
    with pytest.raises(InputError, match=rf"^{URL}/shards/train-000000\.tar: .*once the network is back") as caught:
        shards.open("train-000000")
    assert not isinstance(caught.value, UnreadableShard)
    assert shards_in(tmp_path) == []


def test_a_cache_too_small_for_a_window_is_refused_at_once(world: World, server: S3Server, tmp_path: Path):
    with pytest.raises(InputError, match=r"loader\.cache_gb 1e-06 is too small for loader\.window 2: up to 0\.0 GB of shards"):
        open_reader(remote_settings(world, server, tmp_path, "--loader.cache_gb=1e-6"))


def test_a_cache_that_cannot_be_written_is_one_line(world: World, server: S3Server, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written to \(.*\); give another folder, --loader\.cache"):
        open_reader(remote_settings(world, server, tmp_path, f"--loader.cache={tmp_path / 'file'}"))


def test_a_dataset_that_was_built_anew_is_fetched_anew(world: World, server: S3Server, tmp_path: Path):
    """Tables of another dataset.json go into another folder; shards that are the same are not fetched again."""
    files = fsspec.filesystem("s3", **server.storage["s3"])
    files.copy(f"{BUCKET}/small", f"{BUCKET}/changing", recursive=True)
    settings = remote_settings(world, server, tmp_path, f"--dataset=s3://{BUCKET}/changing")
    first = open_reader(settings)
    first.read(SampleLocation(0, 0))
    inode = next((tmp_path / "cache" / "shards").iterdir()).stat().st_ino
    info = files.cat_file(f"{BUCKET}/changing/dataset.json").replace(b'"fixture"', b'"another"')
    files.pipe_file(f"{BUCKET}/changing/dataset.json", info)
    second = open_reader(settings)
    assert (first.info.fingerprint, second.info.fingerprint) == ("fixture", "another")
    assert first.folder != second.folder
    second.read(SampleLocation(0, 0))
    assert [path.stat().st_ino for path in (tmp_path / "cache" / "shards").iterdir()] == [inode]
    shutil.rmtree(tmp_path / "cache")
