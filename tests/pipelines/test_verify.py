"""What verify.py says of datasets that are whole, and of those in which something is wrong."""

import json
import shutil
import subprocess
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
from pbe_core.errors import InputError
from pbe_core.files import TarWriter, file_sha256, lock_folder
from pbe_core.randomness import hash_column
from pbe_core.sample_codec import decode_array, encode_array
from pbe_core.settings import REPOSITORY
from pipelines.dataset.finalize import finalize
from pipelines.dataset.folder import ShardFolder
from pipelines.dataset.pack import ShardPacker
from pipelines.dataset.plan_shards import Plan
from pipelines.dataset.verify import SHOWN, Finding, choose, find_duplicates, verify_dataset
from pipelines.dataset.write_plan import accepted_fingerprints
from pipelines.verify import lines, repair, summary
from schemas.tables import INDEX
from tests.conftest import build_options, run_build, settings_of

SHARD, OTHER = "train-000001", "train-000000"
TAR, PART, RECORD = (f"shards/{SHARD}{ending}" for ending in (".tar", ".index.parquet", ".json"))
Act = Callable[[Path], object]


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def findings_of(dataset: Path) -> list[Finding]:
    return verify_dataset(dataset).findings


def rows_of(dataset: Path, shard: str = SHARD) -> list[dict]:
    return pq.read_table(dataset / "shards" / f"{shard}.index.parquet").to_pylist()


def run_verify(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pipelines/verify.py", *map(str, options)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def remove(name: str) -> Act:
    return lambda dataset: (dataset / name).unlink()


def write(name: str, data: bytes) -> Act:
    return lambda dataset: (dataset / name).write_bytes(data)


def edit(name: str, change: Callable[[bytes], bytes]) -> Act:
    return lambda dataset: (dataset / name).write_bytes(change((dataset / name).read_bytes()))


def flip(name: str, place: float = 0.5) -> Act:
    def change(data: bytes) -> bytes:
        at = int(len(data) * place)
        return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]

    return edit(name, change)


def change_json(name: str, change: Callable[[dict], object]) -> Act:
    def act(dataset: Path) -> None:
        content = json.loads((dataset / name).read_bytes())
        change(content)
        (dataset / name).write_text(json.dumps(content))

    return act


def change_table(name: str, change: Callable[[list[dict]], list[dict]], per_shard: bool = False) -> Act:
    """With `per_shard`, a row group for each shard, as index.parquet has."""

    def act(dataset: Path) -> None:
        table = pq.read_table(dataset / name)
        rows = pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema)
        with pq.ParquetWriter(dataset / name, table.schema) as writer:
            for shard in rows["shard"].unique() if per_shard else [None]:
                writer.write_table(rows.filter(pc.equal(rows["shard"], shard)) if per_shard else rows)

    return act


def first(**changes) -> Callable[[list[dict]], list[dict]]:
    return lambda rows: [{**rows[0], **changes}, *rows[1:]]


def test_a_good_dataset_passes_with_one_line(dataset):
    done = run_verify(dataset)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stdout + done.stderr
    info = read_dataset(dataset)
    shards = sum(len(split.shards) for split in info.splits.values())
    assert f"{info.books.samples} samples in {shards} shards, all of them whole" in done.stdout


def append_another(dataset: Path) -> None:
    """`cat a.tar b.tar`: plain readers see the first alone."""
    with (dataset / TAR).open("ab") as file:
        file.write((dataset / f"shards/{OTHER}.tar").read_bytes())


def cut_at_a_header(dataset: Path) -> None:
    """Between two samples: plain readers take that for the end."""
    at = min(place["offset"] for place in member_places(rows_of(dataset)[5]).values()) - 512
    (dataset / TAR).write_bytes((dataset / TAR).read_bytes()[:at])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove(TAR), ["tar", "cannot be read"]),
        (edit(TAR, lambda data: data[:-512]), ["tar has", "bytes"]),
        (edit(TAR, lambda data: data + bytes(512)), ["tar has", "bytes"]),
        (append_another, ["tar has", "bytes"]),
        (cut_at_a_header, ["tar has", "bytes"]),
        (flip(TAR), ["tar", "SHA-256"]),
        (flip(TAR, 0.0), ["tar", "SHA-256"]),  # The first member's header.
        (remove(PART), ["index.parquet cannot be read"]),
        (flip(PART), ["index.parquet", "SHA-256"]),
        (write(PART, b"PAR1"), ["index.parquet", "SHA-256"]),
        (remove(RECORD), ["commit record cannot be read"]),
        (write(RECORD, b"{"), ["commit record cannot be read"]),
        (write(RECORD, b"[]"), ["commit record cannot be read"]),
        (change_json(RECORD, lambda record: record.update(samples="20")), ["commit record cannot be read"]),
        (change_json(RECORD, lambda record: record.update(failed_samples=[{"key": "x"}])), ["commit record cannot be read"]),
        (change_json(RECORD, lambda record: record.update(fingerprint="0" * 64)), ["another plan"]),
        (change_json(RECORD, lambda record: record.update(shard=OTHER)), [f"it is of {OTHER}"]),
        (change_json(RECORD, lambda record: record.update(samples=19)), ["counts 19 samples"]),
        (change_json(RECORD, lambda record: record.update(failed=1)), ["1 failed"]),
        (change_json(RECORD, lambda record: record["masks"].update(box=1)), ["shard_records.parquet differ (masks)"]),
        (change_json(RECORD, lambda record: record.update(sha256="0" * 64)), ["tar", "SHA-256"]),
    ],
)
def test_damage_to_a_shard_is_told_and_the_build_packs_it_again(copy, damage, words):
    damage(copy)
    findings = [finding for finding in findings_of(copy) if finding.shard]
    assert {(finding.shard, finding.repair) for finding in findings} == {(SHARD, "pack")}, findings
    assert any(all(word in finding.problem for word in words) for finding in findings), findings
    assert repair(copy, findings) == [SHARD]
    assert not (copy / RECORD).exists()
    assert not (copy / "dataset.json").exists()


def test_a_damaged_member_is_told_by_sample(copy):
    """Those behind a cut, too."""
    rows = rows_of(copy)
    edit(TAR, lambda data: data[: rows[3]["ref_jpg"]["offset"]] + b"<" + data[rows[3]["ref_jpg"]["offset"] + 1 :])(copy)
    hurt = {finding.key: finding.problem for finding in findings_of(copy) if finding.key}
    assert hurt == {rows[3]["key"]: "member ref.jpg is not what was written (CRC-32)"}
    cut_at_a_header(copy)
    assert {finding.key for finding in findings_of(copy) if finding.key} == {row["key"] for row in [rows[3], *rows[5:]]}


def rewrite(dataset: Path, change: Callable[[list[tuple[dict, dict[str, bytes]]]], object]) -> None:
    """Write a shard's tar, part and record anew, all hashes right, from its samples (index row, members) as changed."""
    data, samples, rows = (dataset / TAR).read_bytes(), [], []
    for row in rows_of(dataset):
        places = member_places(row)
        samples.append((row, {name: data[at["offset"] : at["offset"] + at["length"]] for name, at in places.items()}))
    change(samples)
    with (dataset / TAR).open("wb") as file:
        tar = TarWriter(file)
        for position, (row, members) in enumerate(samples):
            places = {
                name.replace(".", "_"): {
                    "offset": tar.add(f"{row['key']}.{name}", members[name]),
                    "length": len(members[name]),
                    "crc32": zlib.crc32(members[name]),
                }
                for name in sorted(members)
            }
            rows.append({**row, "position": position, **places})
        tar.close()
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX), dataset / PART)
    sizes = {"bytes": tar.offset, "sha256": tar.digest.hexdigest(), "samples": len(rows), "planned": len(rows)}
    index = {"index_bytes": (dataset / PART).stat().st_size, "index_sha256": file_sha256(dataset / PART)}
    change_json(RECORD, lambda record: record.update({**sizes, **index}))(dataset)


def test_what_training_could_not_read_is_told_though_all_hashes_are_right(copy):
    def overflow(samples):
        latent = decode_array(samples[3][1]["latent.npy"]).copy()
        latent[0, 3, 3] = np.nan
        samples[3][1]["latent.npy"] = encode_array(latent)
        samples[4][1]["json"] = b"{}"
        samples[5][1].update(samples[6][1])
        keys.extend(row["key"] for row, _ in samples[3:6])

    keys: list[str] = []
    rewrite(copy, overflow)
    told = {finding.key: finding.problem for finding in findings_of(copy) if finding.key}
    assert list(told) == keys
    for key, word in zip(keys, ("a latent is not finite", "member json is damaged", "its record is of"), strict=True):
        assert word in told[key]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda samples: samples.pop(), {"was planned and has not failed, but is not in the index"}),
        (lambda samples: samples.reverse(), {"its samples do not stand in the index as in the plan"}),
        (lambda samples: samples[0][0].update(key="other_0"), {"is in the index, and has failed or was not planned"}),
        (lambda samples: samples.append(samples[0]), {"its samples do not stand in the index", f"is in {SHARD} too"}),
    ],
)
def test_an_index_that_does_not_fit_the_plan_is_told(copy, change, words):
    rewrite(copy, change)
    told = [finding.problem for finding in findings_of(copy) if finding.shard]
    assert all(any(word in problem for problem in told) for word in words), told


def test_keys_that_two_shards_have_are_found(copy):
    hashes = {shard: hash_column(pa.array([row["key"] for row in rows_of(copy, shard)]), "key") for shard in (OTHER, SHARD)}
    assert list(find_duplicates(copy, hashes)) == []
    shutil.copy(copy / PART, copy / "shards" / "train-000900.index.parquet")
    found = list(find_duplicates(copy, {**hashes, "train-000900": hashes[SHARD]}))
    assert [(finding.shard, finding.key) for finding in found] == [("train-000900", row["key"]) for row in rows_of(copy)]
    assert all(f"the same key is in {SHARD} too" in finding.problem for finding in found)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_json("shards/sizes.json", lambda sizes: sizes.update({f"{SHARD}.tar": 3})), "sizes.json is not what"),
        (change_json("shards/sizes.json", lambda sizes: sizes.pop(f"{SHARD}.tar")), "sizes.json is not what"),
        (remove("shards/sizes.json"), "sizes.json is not there"),
        (change_table("shard_records.parquet", lambda rows: rows[::-1]), "shard_records.parquet is not what"),
        (remove("shard_records.parquet"), "shard_records.parquet is not there"),
        (change_table("index.parquet", lambda rows: rows[1:], per_shard=True), f"rows of {OTHER} are not"),
        (change_table("index.parquet", first(label="x"), per_shard=True), f"rows of {OTHER} are not"),
        (change_table("index.parquet", lambda rows: rows[20:], per_shard=True), "index.parquet is not what"),
        (remove("index.parquet"), "index.parquet is not there"),
        (write("index.parquet", b"PAR1"), "index.parquet cannot be read"),
        (write("failures.parquet", b""), "failures.parquet cannot be read"),
        (write("dataset.json", b"{"), "dataset.json cannot be read"),
        (change_json("dataset.json", lambda info: info["books"].update(boxes=1)), "the counts do not balance"),
        (change_json("dataset.json", lambda info: info["books"]["masks"].update(box=1)), "dataset.json: books are not"),
        (change_json("dataset.json", lambda info: info["splits"]["train"].update(bytes=1)), "dataset.json: splits are not"),
        (change_json("dataset.json", lambda info: info.update(fingerprint="0" * 64)), "of another plan"),
        (change_json("dataset.json", lambda info: info["vae"].update(sha256="00")), "of another plan"),
    ],
)
def test_what_finalizing_makes_is_checked_and_made_again(copy, damage, words):
    damage(copy)
    findings = findings_of(copy)
    assert any(words in finding.problem for finding in findings), findings
    assert {finding.repair for finding in findings} == {"finalize"}
    assert repair(copy, findings) == []
    assert not (copy / "dataset.json").exists()
    assert len(list((copy / "shards").glob("*.json"))) >= len(list((copy / "shards").glob("*.tar")))


def test_samples_that_failed_are_counted_and_their_table_is_checked(copy, photos, tmp_path):
    fewer = shutil.copytree(photos, tmp_path / "photos")
    settings = settings_of(Path(fewer), copy)
    plan, identity = Plan(copy / "plan.parquet"), read_dataset(copy).fingerprint
    (Path(fewer) / "train" / f"{plan.rows(SHARD)[0].photo_id}.jpg").unlink()
    for name in (PART, RECORD):  # Without the part nobody knows that the samples were there.
        (copy / name).unlink()
    ShardPacker(settings, identity, "cpu").pack(list(plan.shards).index(SHARD))
    folder = ShardFolder(settings)
    records = folder.read_records(plan.shards, accepted_fingerprints(copy))
    finalize(settings, folder, identity, read_dataset(copy).vae, list(records.values()), plan.shards)
    assert read_dataset(copy).books.failures["missing"] > 0
    assert findings_of(copy) == []
    for change in (lambda rows: rows[1:], first(detail="another")):
        change_table("failures.parquet", change)(copy)
        assert [(finding.shard, finding.repair) for finding in findings_of(copy)] == [(SHARD, "pack")]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("plan.parquet"), "plan.parquet is not there"),
        (flip("plan.parquet"), "plan.parquet is not what"),
        (flip("objects.parquet"), "objects.parquet is not what"),
        (flip("rejects.parquet"), "rejects.parquet is not what"),
        (remove("same_photos.parquet"), "same_photos.parquet is not there"),
        (remove("selection.json"), "selection.json is not there"),
        (write("selection.json", b"{"), "selection.json cannot be read"),
        (remove("plan.json"), "remove plan.json and run the build again"),
        (write("plan.json", b"{"), "remove plan.json and run the build again"),
    ],
)
def test_damage_to_the_plan_is_told_with_the_way_out_and_nothing_is_touched(copy, damage, words):
    damage(copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    verified = verify_dataset(copy)
    assert any(words in finding.problem for finding in verified.findings), verified.findings
    assert {finding.repair for finding in verified.findings} == {"plan"}
    assert verified.shards == 0
    assert repair(copy, verified.findings) == []
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_files_of_no_shard_are_told_and_never_removed(copy):
    strays = [copy / "shards" / name for name in ("train-000900.tar", f".{SHARD}.tar.0123.tmp")]
    for path in strays:
        path.write_bytes(b"")
    findings = findings_of(copy)
    assert {finding.repair for finding in findings} == {"remove"}
    assert len(findings) == 2
    assert repair(copy, findings) == []
    assert all(path.exists() for path in [*strays, copy / "dataset.json"])


def test_all_damages_are_told_in_one_run_and_the_next_build_makes_every_byte_as_it_was(dataset, copy, photos):
    before = {path.name: path.read_bytes() for path in (dataset / "shards").iterdir()}
    flip(TAR)(copy)
    (copy / "shards" / f"{OTHER}.tar").unlink()
    (copy / "shards" / "validation-000000.index.parquet").unlink()
    change_json("dataset.json", lambda info: info["books"].update(padded_views=999))(copy)
    done = run_verify(copy, "--repair")
    assert (done.returncode, done.stderr) == (1, "")
    for words in (f"{SHARD}: ", f"{OTHER}: ", "validation-000000: ", "dataset.json: books", "pipelines/build.py"):
        assert words in done.stdout
    left = {path.name for path in (copy / "shards").iterdir()}
    assert {f"{name}.json" for name in (SHARD, OTHER, "validation-000000")} <= before.keys() - left
    again = run_verify(copy)
    assert (again.returncode, again.stdout) == (2, "")
    assert "not finished" in again.stderr
    run_build(*build_options(photos, copy))
    assert {path.name: path.read_bytes() for path in (copy / "shards").iterdir()} == before
    assert findings_of(copy) == []


def test_a_quick_look_reads_the_samples_it_says_and_no_others(copy):
    names = list(Plan(copy / "plan.parquet").shards)
    counts = [len(rows_of(copy, shard)) for shard in names]
    chosen = choose(counts, 12)
    assert sum(map(len, chosen)) == 12
    assert chosen == choose(counts, 12)
    assert [len(places) for places in choose(counts, 10**6)] == counts
    everything = {(shard, place) for shard, count in zip(names, counts, strict=True) for place in range(count)}
    seen = {(shard, place) for shard, places in zip(names, chosen, strict=True) for place in places}
    assert seen < everything
    for (shard, place), found in ((min(everything - seen), False), (min(seen), True)):
        path, row = copy / "shards" / f"{shard}.tar", rows_of(copy, shard)[place]
        data = path.read_bytes()
        path.write_bytes(data[: row["json"]["offset"]] + b"\0" + data[row["json"]["offset"] + 1 :])
        verified = verify_dataset(copy, 12)
        assert {finding.key for finding in verified.findings} == ({row["key"]} if found else set())
        assert (verified.samples, verified.of_samples) == (12, sum(counts))
        assert "a quick look at 12 of" in summary(verified, 12)
        path.write_bytes(data[:-512])
        assert [finding.shard for finding in verify_dataset(copy, 12).findings][:1] == [shard], "a size is looked at"
        path.write_bytes(data)


def test_no_more_than_a_page_is_said_of_one_shard(copy):
    size = (copy / TAR).stat().st_size
    (copy / TAR).write_bytes(bytes(size))
    verified = verify_dataset(copy)
    told = list(lines(verified))
    assert len(verified.findings) == SHOWN
    assert told[-1].startswith(f"{SHARD}: and ")
    assert len(told) == SHOWN + 1


def test_where_no_dataset_is_the_status_says_so(tmp_path, copy):
    done = run_verify(tmp_path / "nowhere")
    assert done.returncode == 2
    assert "no dataset here" in done.stderr
    change_json("dataset.json", lambda info: info.update(format_version=1))(copy)
    with pytest.raises(InputError, match="format version 1"):
        verify_dataset(copy)


def test_a_copy_of_what_lies_behind_a_url_is_verified_and_not_repaired(copy):
    """The build would not look at it: what is there is whole, and what was taken away here is lost."""
    change_json("dataset.json", lambda info: info["settings"].update(upload="s3://bucket/dataset"))(copy)
    assert findings_of(copy) == []
    (copy / TAR).write_bytes(b"")
    done = run_verify(copy, "--repair")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--verify-existing" in done.stderr
    assert (copy / "dataset.json").exists()
    assert (copy / RECORD).exists()
    done = run_verify(copy, "--sample", "1")
    assert done.returncode == 1
    assert "--verify-existing" in done.stdout.splitlines()[-1]
    shutil.rmtree(copy / "shards")
    with pytest.raises(InputError, match="the shards of this dataset are at s3://bucket/dataset"):
        verify_dataset(copy)


def test_a_dataset_without_its_shards_is_repaired_unless_a_build_is_at_work(copy):
    shutil.rmtree(copy / "shards")
    with lock_folder(copy, "taken"):
        done = run_verify(copy, "--repair")
    assert done.returncode == 2
    assert "a build is at work" in done.stderr
    assert (copy / "dataset.json").exists()
    done = run_verify(copy, "--repair")
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 0), done.stderr
    assert f"{SHARD}: its commit record was removed" in done.stdout
    assert not (copy / "dataset.json").exists()
