"""Datasets and photo stores behind URLs: a real S3 protocol server on the loopback."""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from pbe_core.errors import InputError, NetworkError, run_program
from pbe_core.images.decode import PhotoError
from pbe_core.photo_files import fetch_store, open_photo_store
from pbe_core.settings import REPOSITORY, load_settings, preset
from pbe_core.storage import RemoteFolder
from pipelines.config import BuildSettings, with_absolute_paths, work_folder
from pipelines.dataset.folder import ShardFolder, share_tables
from pipelines.dataset.pack import ShardPacker
from schemas.dataset import DatasetInfo
from tests.conftest import build_options, run_build
from tests.crawl_world import crawl_options, run_crawl, write_tables
from tests.hostile_server import HostileServer, good_photo
from tests.old_store import old_store
from tests.s3_server import S3Server, s3_server

BUCKET = "datasets"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        running.put(BUCKET, {})
        yield running


def upload_options(server: S3Server, photos: Path, work: Path, name: str) -> list[str]:
    url = f"s3://{BUCKET}/{name}"
    return [*build_options(photos, work), "--upload", url, "--storage", json.dumps(server.storage["s3"])]


def folder_of(server: S3Server, name: str) -> RemoteFolder:
    return RemoteFolder(f"s3://{BUCKET}/{name}", server.storage["s3"])


def stamps_of(server: S3Server, prefix: str) -> dict[str, datetime]:
    """When each object was last written, by S3's clock of whole seconds. What is written after this call bears another one."""
    listed = server.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
    stamps = {each["Key"].removeprefix(prefix): each["LastModified"] for each in listed}
    time.sleep(max(0.0, max(stamp.timestamp() for stamp in stamps.values()) + 1.1 - time.time()))
    return stamps


def hashes_of(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


@pytest.fixture(scope="module")
def uploaded(server, photos, tmp_path_factory) -> Path:
    """A build whose dataset goes to a bucket; its work folder."""
    work = tmp_path_factory.mktemp("upload") / "work"
    done = run_build(*upload_options(server, photos, work, "one"), pictures=True)
    assert f"s3://{BUCKET}/one" in done.stdout
    return work


def test_the_same_files_are_there_as_in_a_local_dataset(uploaded, server, dataset):
    remote = folder_of(server, "one")
    shards = {name: remote.read(name) for name in remote.sizes("shards")}
    local = {f"shards/{path.name}": path.read_bytes() for path in (dataset / "shards").iterdir()}
    assert hashes_of(shards) == hashes_of(local)
    for path in dataset.glob("*.parquet"):
        assert remote.read(path.name) == path.read_bytes(), path.name
    info = DatasetInfo.model_validate_json(remote.read("dataset.json"))
    assert info.fingerprint == DatasetInfo.model_validate_json((dataset / "dataset.json").read_bytes()).fingerprint
    assert remote.sizes()["report.html"] > 1000


def test_no_keys_are_kept_in_the_dataset_and_no_shards_on_the_disk(uploaded, server):
    remote = folder_of(server, "one")
    for name in (*remote.sizes(), *remote.sizes("shards")):
        assert server.secret.encode() not in remote.read(name)
    assert {path.name for path in (uploaded / "shards").iterdir()} == {"sizes.json"}


def test_what_is_there_is_not_made_again_and_what_is_lost_is(uploaded, server, photos, tmp_path):
    """From a machine that has nothing: another work folder."""
    remote = folder_of(server, "one")
    lost, damaged = "shards/train-000001.tar", "shards/train-000000.tar"
    before = {name: remote.read(name) for name in (*remote.sizes(), *remote.sizes("shards"))}
    remote.remove(lost)
    remote.write(damaged, before[damaged][:-600] + bytes([before[damaged][-600] ^ 1]) + before[damaged][-599:])
    stamps = stamps_of(server, "one/shards/")
    done = run_build(*upload_options(server, photos, tmp_path / "work", "one"), "--verify-existing")
    assert f"train-000000: {damaged} is not what was written (SHA-256); it will be made again" in done.stderr
    after = stamps_of(server, "one/shards/")
    made = {name for name in after if after[name] != stamps.get(name)}
    again = {f"train-00000{number}.{ending}" for number in (0, 1) for ending in ("tar", "index.parquet", "json")}
    assert made == {*again, "sizes.json"}
    for name in (lost, damaged):
        assert hashes_of({name: remote.read(name)}) == hashes_of({name: before[name]})
    assert remote.read("index.parquet") == before["index.parquet"]


def test_a_damaged_part_of_the_index_is_found_when_the_dataset_is_finalized(uploaded, server, photos, tmp_path):
    shards, remote, name = ShardFolder(settings_of(server, photos, tmp_path, "one")), folder_of(server, "one"), "train-000001"
    records = shards.read_records([name], [json.loads(remote.read("dataset.json"))["fingerprint"]])
    part, record = remote.read(f"shards/{name}.index.parquet"), remote.read(f"shards/{name}.json")
    remote.write(f"shards/{name}.index.parquet", part[:-600] + bytes([part[-600] ^ 1]) + part[-599:])
    for problem in ("is not what was written", "is not there"):
        with pytest.raises(InputError, match=f"shards/{name}.index.parquet {problem}"):
            shards.index_part(records[name])
        assert remote.size(f"shards/{name}.json") is None, "so that the next build packs the shard anew"
        remote.write(f"shards/{name}.json", record)
        remote.remove(f"shards/{name}.index.parquet")
    remote.write(f"shards/{name}.index.parquet", part)


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("s3://datasets/one", ["--seed", "7"], "planned with other inputs or settings (settings.seed: 0 -> 7)"),
        ("s3://datasets/theirs", [], "s3://datasets/theirs/shards: holds files, but neither plan.json nor selection.json"),
        ("s3://no-such-bucket/x", [], "no-such-bucket cannot be listed"),
        ("nope://b/x", [], "nope://b/x: cannot be opened"),
    ],
)
def test_a_url_that_a_build_cannot_use_is_one_line(url, options, said, uploaded, server, photos, tmp_path):
    server.put(BUCKET, {"theirs/shards/train-000000.tar": b"precious"})
    done = run_build(*upload_options(server, photos, tmp_path, "one"), "--upload", url, *options, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert folder_of(server, "theirs").read("shards/train-000000.tar") == b"precious"


def settings_of(server: S3Server, photos: Path, work: Path, name: str) -> BuildSettings:
    return with_absolute_paths(load_settings(BuildSettings, "build", upload_options(server, photos, work, name), preset("tiny")))


def test_a_shard_that_is_not_what_was_written_is_not_uploaded(uploaded, server, photos, tmp_path):
    settings = settings_of(server, photos, tmp_path / "work", "two")
    shards = ShardFolder(settings)
    shards.local.mkdir(parents=True)
    for name, data in {"s.tar": b"tar", "s.index.parquet": b"index", "s.json": b"{}"}.items():
        (shards.local / name).write_bytes(data)
    good = {"s.tar": hashlib.sha256(b"tar").hexdigest(), "s.index.parquet": hashlib.sha256(b"index").hexdigest()}
    record = {"shard": "s", "sha256": good["s.tar"], "index_sha256": good["s.index.parquet"]}
    (shards.local / "s.tar").write_bytes(b"tax")
    with pytest.raises(OSError, match=r"s\.tar on disk is not what was written"):
        shards.publish(record)
    assert not folder_of(server, "two").sizes("shards")
    (shards.local / "s.tar").write_bytes(b"tar")
    shards.publish(record)
    assert set(folder_of(server, "two").sizes("shards")) == {"shards/s.tar", "shards/s.index.parquet", "shards/s.json"}
    assert not list(shards.local.iterdir())


def test_a_url_as_out_is_uploading(tmp_path):
    settings = load_settings(BuildSettings, "build", ["--out", "s3://b/x", "--source.photos", "s3://b/store"], preset("tiny"))
    assert settings.upload == "s3://b/x"
    assert settings.out == work_folder("s3://b/x") != work_folder("s3://b/y")
    assert settings.source.photos_url == "s3://b/store"
    assert settings.source.photos == work_folder("s3://b/store")
    both = ["--out", str(tmp_path), "--upload", "s3://b/x"]
    assert load_settings(BuildSettings, "build", both, preset("tiny")).out == tmp_path
    with pytest.raises(InputError, match="two URLs"):
        load_settings(BuildSettings, "build", ["--out", "s3://b/x", "--upload", "s3://b/y"], preset("tiny"))


READS = ("ListBucket", "GetObject")
WRITES = (*READS, "PutObject", "DeleteObject")


@pytest.mark.parametrize(
    ("actions", "writing", "refused"),
    [
        (READS, False, None),
        (READS, True, "cannot be written to (PermissionError"),
        ((*READS, "PutObject"), True, "cannot be written to (PermissionError"),
        (WRITES, True, None),
        (("GetObject",), False, "datasets/checked cannot be listed (PermissionError"),
    ],
)
def test_what_credentials_are_not_for_is_told_before_any_work(server, actions, writing, refused):
    """None of these may look at the bucket itself, as those that are for one folder."""
    with server.checking_credentials(*actions) as checking:
        checked = folder_of(checking, "checked")
        if refused:
            with pytest.raises(InputError) as caught:
                checked.check(writing)
            assert refused in str(caught.value)
        else:
            checked.check(writing)


def test_a_check_asks_for_the_folder_and_leaves_nothing(server, monkeypatch):
    """Listing a bucket takes long where it is large, and is refused where credentials are for one folder."""
    remote = folder_of(server, "asked")
    remote.write("kept", b"1")
    listed, list_files = [], remote.files.ls
    monkeypatch.setattr(remote.files, "ls", lambda path, **options: listed.append(path) or list_files(path, **options))
    remote.check(writing=True)
    assert listed == [f"{BUCKET}/asked"]
    assert remote.sizes() == {"kept": 1}
    folder_of(server, "asked/not-there").check()
    with pytest.raises(InputError, match="no-such-bucket cannot be listed"):
        RemoteFolder("s3://no-such-bucket", server.storage["s3"]).check()


@pytest.mark.parametrize(("refuses", "said"), [(True, "cannot be written to"), (False, "bytes have arrived as")])
def test_stores_that_do_not_know_newer_checksums_are_told_and_served(tmp_path, refuses, said):
    """Over https, where such a checksum stands behind the body; the option that the message names goes through to the client."""
    way_out = "request_checksum_calculation: when_required (docs/building.md)"
    (documented,) = re.findall(r"--storage '(\{.*config_kwargs.*\})'", (REPOSITORY / "docs/building.md").read_text())
    with old_store(refuses=refuses, folder=tmp_path) as storage:
        with pytest.raises(InputError, match=re.escape(said)) as caught:
            RemoteFolder("s3://bucket/dataset", storage).check(writing=True)
        assert str(caught.value).endswith(way_out)
        remote = RemoteFolder("s3://bucket/dataset", {**json.loads(documented), **storage})
        remote.check(writing=True)
        remote.write("small", b"record")
        (tmp_path / "file").write_bytes(b"tar" * 1000)
        remote.upload(tmp_path / "file", "large")
        assert (remote.read("small"), remote.read("large")) == (b"record", b"tar" * 1000)


@pytest.fixture(scope="module")
def gone() -> RemoteFolder:
    """A folder behind a server that has ended."""
    with s3_server() as ended:
        options = {**ended.storage["s3"], "config_kwargs": {"connect_timeout": 1, "retries": {"total_max_attempts": 1}}}
    return RemoteFolder(f"s3://{BUCKET}/gone", options)


@pytest.mark.parametrize(
    "act",
    [
        lambda remote, path: remote.sizes("shards"),
        lambda remote, path: remote.size("a"),
        lambda remote, path: remote.read("a"),
        lambda remote, path: remote.read_all(["a", "b"]),
        lambda remote, path: remote.download("a", path.with_name("copy")),
        lambda remote, path: remote.upload(path, "a"),
        lambda remote, path: remote.write("a", b""),
        lambda remote, path: remote.remove("a"),
    ],
)
def test_a_network_that_fails_is_one_line_with_the_url(act, gone, tmp_path, capsys):
    """Those of botocore are no OSErrors."""
    path = tmp_path / "file"
    path.write_bytes(b"1")
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: act(gone, path))
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: s3://{BUCKET}/gone")
    assert "EndpointConnectionError" in said
    assert said.count("\n") == 1
    assert {each.name for each in tmp_path.iterdir()} == {"file"}


def test_what_is_not_there_and_what_the_disk_says_stay_as_they_are(server, tmp_path):
    remote = folder_of(server, "plain")
    remote.write("a", b"1")
    with pytest.raises(FileNotFoundError):
        remote.read("none")
    with pytest.raises(FileNotFoundError):
        remote.download("none", tmp_path / "copy")
    assert remote.read_all(["a", "none"]) == {"a": b"1"}
    assert remote.size("none") is None
    remote.remove("none")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels") as caught:
        remote.upload(tmp_path / "loop", "b")
    assert not isinstance(caught.value, NetworkError)
    with pytest.raises(AttributeError), remote._in_words():
        remote.no_such_method()


def test_a_refusal_is_one_line(server):
    with server.checking_credentials("ListBucket") as checking:
        remote = folder_of(checking, "refused")
        with pytest.raises(NetworkError, match="s3://datasets/refused/a: PermissionError"):
            remote.write("a", b"")


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_connection_that_breaks_is_one_line(error, capsys):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {str(error) or 'TimeoutError'}; what was finished is kept")


def test_photos_come_from_a_store_in_a_bucket(server, tmp_path):
    """As they come from the same store on disk; one that was indexed where it lies cannot."""
    inside = tmp_path / "inside" / "train"
    inside.mkdir(parents=True)
    (inside / "0007.jpg").write_bytes(good_photo("in place", 256, 256))
    store = tmp_path / "store"
    with HostileServer() as web:
        tables = write_tables(tmp_path / "tables", {f"{number:04d}": web.url(f"/good/{number}") for number in range(8)})
        sources = [str(inside.parent), "{url}"]
        run_crawl(crawl_options(tables, store, tmp_path / "planned", web.port, sources))
    remote = folder_of(server, "store")
    for path in store.rglob("*"):
        if path.is_file() and path.name != ".lock":
            remote.upload(path, str(path.relative_to(store)))
    here = tmp_path / "here"
    fetch_store(remote.url, server.storage["s3"], here)
    behind, local = open_photo_store(here, remote.url, server.storage["s3"]), open_photo_store(store)
    for number in range(7):
        assert behind.read("train", f"{number:04d}") == local.read("train", f"{number:04d}") == good_photo(f"/good/{number}")
    with pytest.raises(PhotoError, match="lies on the machine that crawled it"):
        behind.read("train", "0007")


def test_a_store_that_is_not_whole_is_told(server, tmp_path):
    with pytest.raises(InputError, match=r"s3://datasets/nothing: no photo store, there is no store\.json"):
        fetch_store(f"s3://{BUCKET}/nothing", server.storage["s3"], tmp_path / "here")


def test_tables_that_were_not_all_shared_are_planned_anew(uploaded, server, tmp_path, monkeypatch):
    """Of an extension whose upload was cut off there is no record, so that nobody takes the half of it for a plan."""
    work = tmp_path / "work"
    for path in uploaded.glob("*.parquet"):
        (work / path.name).parent.mkdir(exist_ok=True)
        (work / path.name).write_bytes(path.read_bytes())
    remote = folder_of(server, "cut-off")
    (work / "plan.json").write_bytes(b"{}")
    (work / "selection.json").write_bytes(b"{}")
    share_tables(remote, work)
    stamps = stamps_of(server, "cut-off/")
    share_tables(remote, work)
    assert stamps_of(server, "cut-off/") == stamps, "what is there was sent again"
    (work / "selection.json").write_bytes(b'{"extended": true}')
    whole = remote.upload

    def cut_off(file: Path, name: str) -> None:
        if name == "plan.parquet":
            raise OSError("the network is gone")
        whole(file, name)

    monkeypatch.setattr(remote, "upload", cut_off)
    with pytest.raises(OSError, match="the network is gone"):
        share_tables(remote, work)
    assert remote.size("selection.json") is None
    monkeypatch.undo()
    share_tables(remote, work)
    assert remote.read("selection.json") == b'{"extended": true}'


def test_a_node_takes_the_plan_that_is_recorded_whatever_it_kept(uploaded, server, photos, tmp_path):
    """An earlier plan of the same size, in the folder that belongs to the URL."""
    settings = settings_of(server, photos, tmp_path / "work", "one")
    right = folder_of(server, "one").read("plan.parquet")
    settings.out.mkdir()
    (settings.out / "plan.parquet").write_bytes(right[:-600] + bytes([right[-600] ^ 1]) + right[-599:])
    packer = ShardPacker(settings, "x", "cpu")
    assert (settings.out / "plan.parquet").read_bytes() == right
    assert len(packer.plan.rows("train-000000")) == packer.plan.shards["train-000000"]
