"""What verify.py says of datasets that are whole, and of those in which something is wrong."""

import json
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pbe_core.dataset_reader import member_places, read_dataset
from pbe_core.errors import InputError, run_program
from pbe_core.files import TarWriter, file_sha256, lock_folder
from pbe_core.sample_codec import decode_array, encode_array
from pipelines.dataset.finalize import finalize
from pipelines.dataset.folder import ShardFolder
from pipelines.dataset.pack import ShardPacker
from pipelines.dataset.plan_shards import Plan
from pipelines.dataset.verify import SHOWN, Finding, verify_dataset
from pipelines.dataset.write_plan import accepted_fingerprints
from pipelines.verify import main, repair
from schemas.dataset import DatasetInfo
from schemas.tables import INDEX
from tests.conftest import settings_of

SHARD, OTHER = "train-000001", "train-000000"
TAR, PART, RECORD = (f"shards/{SHARD}{ending}" for ending in (".tar", ".index.parquet", ".json"))
Act = Callable[[Path], object]


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: exit status, stdout and stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verify.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_program(main)
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def findings_of(dataset: Path) -> list[Finding]:
    return verify_dataset(dataset).findings


def rows_of(dataset: Path, shard: str = SHARD) -> list[dict]:
    return pq.read_table(dataset / "shards" / f"{shard}.index.parquet").to_pylist()


def edit(name: str, change: Callable[[bytes], bytes]) -> Act:
    return lambda dataset: (dataset / name).write_bytes(change((dataset / name).read_bytes()))


def remove(name: str) -> Act:
    return lambda dataset: (dataset / name).unlink()


def write(name: str, data: bytes) -> Act:
    return lambda dataset: (dataset / name).write_bytes(data)


def flip(name: str, place: float = 0.5) -> Act:
    def change(data: bytes) -> bytes:
        at = int(len(data) * place)
        return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]

    return edit(name, change)


def put(name: str, *place: str, value: object) -> Act:
    """Set a value in a JSON file."""

    def change(data: bytes) -> bytes:
        content = inner = json.loads(data)
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        return json.dumps(content).encode()

    return edit(name, change)


def change_rows(name: str, change: Callable[[list[dict]], list[dict]]) -> Act:
    """In index.parquet with a row group for each shard."""

    def act(dataset: Path) -> None:
        table = pq.read_table(dataset / name)
        rows = pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema)
        with pq.ParquetWriter(dataset / name, table.schema) as writer:
            for shard in rows["shard"].unique() if name == "index.parquet" else [None]:
                writer.write_table(rows.filter(pc.equal(rows["shard"], shard)) if shard else rows)

    return act


def append_another(dataset: Path) -> None:
    """`cat a.tar b.tar`: plain readers see the first alone."""
    with (dataset / TAR).open("ab") as file:
        file.write((dataset / f"shards/{OTHER}.tar").read_bytes())


def cut_at_a_header(dataset: Path) -> None:
    """Between two samples: plain readers take that for the end."""
    at = min(place["offset"] for place in member_places(rows_of(dataset)[5]).values()) - 512
    (dataset / TAR).write_bytes((dataset / TAR).read_bytes()[:at])


DAMAGES: dict[str, list[tuple[Act, str]]] = {
    "pack": [
        (remove(TAR), ".tar cannot be read"),
        (edit(TAR, lambda data: data + bytes(512)), ".tar has"),
        (append_another, ".tar has"),
        (cut_at_a_header, ".tar has"),
        (flip(TAR), ".tar is not what was written (SHA-256)"),
        (flip(TAR, 0.0), ".tar is not what was written (SHA-256)"),  # The first member's header.
        (remove(PART), "index.parquet cannot be read"),
        (flip(PART), "index.parquet is not what was written (SHA-256)"),
        (write(PART, b"PAR1"), "index.parquet has 4 bytes"),
        (remove(RECORD), "commit record is not whole"),
        (write(RECORD, b"[]"), "commit record is not whole"),
        (put(RECORD, "samples", value="20"), "commit record is not whole"),
        (put(RECORD, "failed_samples", value=[{"key": "x"}]), "commit record is not whole"),
        (put(RECORD, "fingerprint", value="0" * 64), "of plan 000000000000"),
        (put(RECORD, "shard", value=OTHER), f"it is of {OTHER}"),
        (put(RECORD, "masks", "box", value=1), "shard_records.parquet differ: masks"),
    ],
    "finalize": [
        (put("shards/sizes.json", f"{SHARD}.tar", value=3), "sizes.json is not what"),
        (remove("shards/sizes.json"), "sizes.json is not there"),
        (change_rows("shard_records.parquet", lambda rows: rows[::-1]), "shard_records.parquet is not what"),
        (remove("shard_records.parquet"), "shard_records.parquet is not there"),
        (change_rows("index.parquet", lambda rows: [{**rows[0], "label": "x"}, *rows[1:]]), "index.parquet is not what"),
        (change_rows("index.parquet", lambda rows: rows[20:]), "index.parquet is not what"),
        (write("index.parquet", b"PAR1"), "index.parquet cannot be read"),
        (write("failures.parquet", b""), "failures.parquet cannot be read"),
        (write("dataset.json", b"{"), "dataset.json is not what"),
        (put("dataset.json", "books", "masks", "box", value=1), "dataset.json is not what"),
        (put("dataset.json", "splits", "train", "bytes", value=1), "dataset.json is not what"),
        (put("dataset.json", "fingerprint", value="0" * 64), "dataset.json is not what"),
        (put("dataset.json", "vae", "sha256", value="00"), "dataset.json is not what"),
    ],
    "plan": [
        (remove("plan.parquet"), "plan.parquet is not there"),
        (flip("objects.parquet"), "objects.parquet is not what"),
        (remove("same_photos.parquet"), "same_photos.parquet is not there"),
        (write("selection.json", b"{"), "selection.json cannot be read"),
        (put("selection.json", "sha256", value={}), "selection.json has no hashes"),
        (remove("plan.json"), "remove plan.json and run the build again"),
    ],
    "remove": [
        (write("shards/train-000900.tar", b""), "train-000900.tar is of no planned shard"),
        (write(f"shards/.{SHARD}.tar.0123.tmp", b""), ".tmp is of no planned shard"),
    ],
}


@pytest.mark.parametrize(
    ("way", "damage", "words"),
    [pytest.param(way, *each, id=f"{way}: {each[1]}") for way, own in DAMAGES.items() for each in own],
)
def test_damage_is_told_with_its_repair_which_takes_away_no_more(copy, way, damage, words):
    damage(copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    findings = findings_of(copy)
    assert any(words in str(finding) for finding in findings), findings
    assert {(finding.repair, finding.shard) for finding in findings} == {(way, SHARD if way == "pack" else None)}
    assert repair(copy, findings) == [SHARD] * (way == "pack")
    left = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    gone = {"pack": {copy / RECORD, copy / "dataset.json"}, "finalize": {copy / "dataset.json"}}.get(way, set())
    assert left == {path: time for path, time in before.items() if path not in gone}


def test_a_damaged_member_is_told_by_sample(copy):
    """Those behind a cut, too; and no more than a page of one shard."""
    rows = rows_of(copy)
    place = rows[3]["ref_jpg"]["offset"]
    edit(TAR, lambda data: data[:place] + b"<" + data[place + 1 :])(copy)
    hurt = {finding.key: finding.problem for finding in findings_of(copy) if finding.key}
    assert hurt == {rows[3]["key"]: "member ref.jpg is not what was written (CRC-32)"}
    cut_at_a_header(copy)
    assert {finding.key for finding in findings_of(copy) if finding.key} == {row["key"] for row in [rows[3], *rows[5:]]}
    write(TAR, bytes((copy / TAR).stat().st_size))(copy)
    assert [finding.problem for finding in findings_of(copy)][SHOWN:] == ["and 1 more"]


def rewrite(dataset: Path, change: Callable[[list[tuple[dict, dict[str, bytes]]]], object]) -> None:
    """Write a shard's tar and part anew, all hashes right, from its samples (index row, members) as changed."""
    data, samples, rows = (dataset / TAR).read_bytes(), [], []
    for row in rows_of(dataset):
        places = member_places(row)
        samples.append((row, {name: data[at["offset"] : at["offset"] + at["length"]] for name, at in places.items()}))
    change(samples)
    with (dataset / TAR).open("wb") as file:
        tar = TarWriter(file)
        for row, members in samples:
            places = {name: tar.add(f"{row['key']}.{name}", data) for name, data in sorted(members.items())}
            members = {
                name.replace(".", "_"): {"offset": at, "length": len(members[name]), "crc32": zlib.crc32(members[name])}
                for name, at in places.items()
            }
            rows.append({**row, **members})
        tar.close()
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX), dataset / PART)
    index = {"index_bytes": (dataset / PART).stat().st_size, "index_sha256": file_sha256(dataset / PART)}
    sizes = {"bytes": tar.offset, "sha256": tar.digest.hexdigest(), **index}
    edit(RECORD, lambda record: json.dumps(json.loads(record) | sizes).encode())(dataset)
    (dataset / "shard_records.parquet").unlink()  # Its copy of the record is of before.


def spoil(samples: list[tuple[dict, dict[str, bytes]]]) -> None:
    """What training could not read."""
    latent = decode_array(samples[3][1]["latent.npy"]).copy()
    latent[0, 3, 3] = np.nan
    samples[3][1]["latent.npy"] = encode_array(latent)
    samples[4][1]["json"] = b"{}"
    samples[5][1].update(samples[6][1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil, {3: "a latent is not finite", 4: "member json is damaged", 5: "its record is of"}),
        (lambda samples: samples.pop(), {-1: "was planned and has not failed, but is not in the index"}),
        (lambda samples: samples[0][0].update(key="another_0"), {0: "was planned and has not failed"}),
        (lambda samples: samples.reverse(), {None: "its samples do not stand in the index as in the plan"}),
        (lambda samples: samples.append(samples[0]), {None: "its samples do not stand in the index as in the plan"}),
    ],
)
def test_what_is_wrong_though_all_hashes_are_right_is_told(copy, change, words):
    rows = rows_of(copy)
    rewrite(copy, change)
    told = {finding.key: finding.problem for finding in findings_of(copy) if finding.shard}
    for place, word in words.items():
        assert word in told[None if place is None else rows[place]["key"]]
    assert len(told) == len(words) + ("another_0" in told)


def build(dataset: Path, photos: Path, info: DatasetInfo) -> None:
    """What the build does, without Ray: it packs the shards that are missing, and finalizes."""
    settings = settings_of(photos, dataset)
    folder, planned, accepted = ShardFolder(settings), Plan(dataset / "plan.parquet").shards, accepted_fingerprints(dataset)
    packer = ShardPacker(settings, info.fingerprint, "cpu")
    for number, state in enumerate(folder.states(planned, accepted).values()):
        if state.name == "missing":
            packer.pack(number)
    records = folder.read_records(planned, accepted)
    finalize(settings, folder, info.fingerprint, info.vae, list(records.values()), planned)


def test_samples_that_failed_are_counted(copy, photos, tmp_path):
    fewer = Path(shutil.copytree(photos, tmp_path / "photos"))
    (fewer / "train" / f"{Plan(copy / 'plan.parquet').rows(SHARD)[0].photo_id}.jpg").unlink()
    for name in (PART, RECORD):  # Without the part nobody knows that the samples were there.
        (copy / name).unlink()
    build(copy, fewer, read_dataset(copy))
    assert read_dataset(copy).books.failures["missing"] > 0
    assert findings_of(copy) == []
    change_rows("failures.parquet", lambda rows: rows[1:])(copy)
    assert ["failures.parquet" in finding.problem for finding in findings_of(copy)] == [True]
    put(RECORD, "failed_samples", value=[])(copy)
    assert any("was planned and has not failed" in finding.problem for finding in findings_of(copy))


def test_all_damages_are_told_in_one_run_and_the_next_build_makes_every_byte_as_it_was(dataset, copy, photos, command):
    before = {path.name: path.read_bytes() for path in (dataset / "shards").iterdir()}
    status, printed, said = command(dataset)
    info = read_dataset(dataset)
    assert (status, said, printed.count("\n")) == (0, "", 1)
    assert f"{info.books.samples} samples in {len(before) // 3} shards, all of them whole" in printed

    flip(TAR)(copy)
    (copy / "shards" / f"{OTHER}.tar").unlink()
    (copy / "shards" / "validation-000000.index.parquet").unlink()
    status, printed, said = command(copy, "--repair")
    assert (status, said) == (1, "")
    for words in (f"{SHARD}: ", f"{OTHER}: ", "validation-000000: ", "pipelines/build.py"):
        assert words in printed
    left = {path.name for path in (copy / "shards").iterdir()}
    assert {f"{name}.json" for name in (SHARD, OTHER, "validation-000000")} <= before.keys() - left
    status, printed, said = command(copy)
    assert (status, printed) == (2, "")
    assert "not finished" in said
    build(copy, photos, info)
    assert {path.name: path.read_bytes() for path in (copy / "shards").iterdir()} == before
    assert findings_of(copy) == []


def test_a_quick_look_reads_some_samples_and_no_others(copy, command):
    rows = [row for shard in Plan(copy / "plan.parquet").shards for row in rows_of(copy, shard)]
    every = -(-len(rows) // 12)
    for number, row in ((0, rows[every * 5]), (1, rows[every * 5 + 1])):
        path = copy / "shards" / f"{row['shard']}.tar"
        data = path.read_bytes()
        path.write_bytes(data[: row["json"]["offset"]] + b"\0" + data[row["json"]["offset"] + 1 :])
        verified = verify_dataset(copy, 12)
        assert [finding.key for finding in verified.findings] == [row["key"]][number:]
        assert (verified.samples, verified.of_samples) == (len(rows[::every]), len(rows))
        path.write_bytes(data[:-512])
        assert [finding.shard for finding in verify_dataset(copy, 12).findings] == [row["shard"]], "a size is looked at"
        path.write_bytes(data)
    assert f"a quick look at {len(rows[::every])} of {len(rows)} samples" in command(copy, "--sample", "12")[1]
    assert command(copy, "--sample", "0")[0] == 2


def test_where_no_dataset_is_the_status_says_so(tmp_path, copy, command):
    status, _, said = command(tmp_path / "nowhere")
    assert (status, "no dataset here" in said) == (2, True)
    put("dataset.json", "format_version", value=1)(copy)
    with pytest.raises(InputError, match="format version 1"):
        verify_dataset(copy)


def test_a_copy_of_what_lies_behind_a_url_is_verified_and_not_repaired(copy, command):
    """The build would not look at it: what is there is whole, and what was taken away here is lost."""
    put("dataset.json", "settings", "upload", value="s3://bucket/dataset")(copy)
    assert findings_of(copy) == []
    (copy / TAR).write_bytes(b"")
    status, printed, _ = command(copy, "--repair")
    assert (status, "--verify-existing" in printed.splitlines()[-1]) == (1, True)
    assert (copy / "dataset.json").exists()
    assert (copy / RECORD).exists()
    shutil.rmtree(copy / "shards")
    with pytest.raises(InputError, match="the shards of this dataset are at s3://bucket/dataset"):
        verify_dataset(copy)


def test_a_dataset_without_its_shards_is_repaired_unless_a_build_is_at_work(copy, command):
    shutil.rmtree(copy / "shards")
    with lock_folder(copy, "taken"):
        status, _, said = command(copy, "--repair")
    assert (status, "a build is at work" in said) == (2, True)
    assert (copy / "dataset.json").exists()
    status, printed, _ = command(copy, "--repair")
    assert status == 1
    assert f"{SHARD}: its commit record was removed" in printed
    assert not (copy / "dataset.json").exists()
