"""A finished dataset gets more samples, and keeps what it has."""

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists, text

from pbe_core.dataset_reader import find_imbalance, read_dataset
from pbe_core.errors import InputError
from pbe_core.randomness import hash_column
from pipelines.dataset import plan_shards as shards_module
from pipelines.dataset.folder import ShardFolder
from pipelines.dataset.plan_shards import PackedKeys, Plan, extend_plan
from pipelines.dataset.verify import verify_dataset
from pipelines.dataset.write_plan import accepted_fingerprints, select_and_plan
from schemas.dataset import DatasetInfo
from tests.conftest import build_options, run_build, settings_of

HALF = ("--selection.subset", "0.5")


@dataclass(frozen=True)
class Extended:
    """A dataset of half of the photos, before and after the others came."""

    out: Path
    before: Path
    hidden: str
    """The photo that was not there at first."""
    photos: Path


def members_of(dataset: Path) -> dict[str, bytes]:
    """Name of each member of all shards -> its bytes. Names are unique."""
    found: dict[str, bytes] = {}
    for shard in sorted((dataset / "shards").glob("*.tar")):
        with tarfile.open(fileobj=io.BytesIO(shard.read_bytes())) as tar:
            for member in tar:
                assert member.name not in found, f"{member.name} is there twice"
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def hashes_of(shards: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.iterdir()}


@pytest.fixture(scope="module")
def extended(photos, tmp_path_factory) -> Extended:
    folder = tmp_path_factory.mktemp("extended")
    here = folder / "photos"
    shutil.copytree(photos, here)
    out = folder / "dataset"
    options = build_options(here, out)
    settings = settings_of(here, out, *HALF)
    select_and_plan(settings)
    first = pq.read_table(out / "plan.parquet")
    hidden = first.filter([split == "train" for split in first["split"].to_pylist()])["photo_id"][0].as_py()
    away = folder / "away.jpg"
    shutil.move(here / "train" / f"{hidden}.jpg", away)
    run_build(*options, *HALF)
    shutil.copytree(out, folder / "before")
    shutil.move(away, here / "train" / f"{hidden}.jpg")
    run_build(*options, "--extend")
    return Extended(out, folder / "before", hidden, here)


def test_what_was_there_stays_as_it_was(extended):
    before, after = hashes_of(extended.before / "shards"), hashes_of(extended.out / "shards")
    kept = {name for name in before if name != "sizes.json"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    for name in kept:
        assert (extended.out / "shards" / name).stat().st_mtime_ns == (extended.before / "shards" / name).stat().st_mtime_ns


def test_all_samples_are_those_of_a_dataset_made_in_one_go(extended, dataset):
    """Each member, byte by byte: a sample is the same whatever was packed before it, and where."""
    assert members_of(extended.out) == members_of(dataset)
    keys = pq.read_table(extended.out / "index.parquet", columns=["key"])["key"].to_pylist()
    assert len(set(keys)) == len(keys)


def test_new_shards_are_numbered_on_and_the_photo_that_came_later_is_in_them(extended):
    info, old = read_dataset(extended.out), read_dataset(extended.before)
    for split, counts in info.splits.items():
        shards = old.splits[split].shards
        assert counts.shards[: len(shards)] == shards
        assert counts.shards == [f"{split}-{number:06d}" for number in range(len(counts.shards))]
    assert len(info.splits["train"].shards) > len(old.splits["train"].shards)
    index = pq.read_table(extended.out / "index.parquet").to_pylist()
    late = {row["shard"] for row in index if row["object_id"].startswith(f"{extended.hidden}-")}
    assert late
    assert not late & set(old.splits["train"].shards)
    plan = pq.read_table(extended.out / "plan.parquet")["key"].to_pylist()
    assert len(set(plan)) == len(plan) == info.books.planned


def test_the_dataset_is_whole_and_its_books_balance_over_both_builds(extended, dataset):
    info, old, whole = (read_dataset(folder) for folder in (extended.out, extended.before, dataset))
    assert old.books.failures == {"missing": old.books.planned - old.books.samples}
    assert info.books == whole.books
    assert find_imbalance(info.books) is None
    assert verify_dataset(extended.out).findings == []
    assert not pq.read_table(extended.out / "failures.parquet").num_rows
    records = pq.read_table(extended.out / "shard_records.parquet").to_pylist()
    assert (
        {record["fingerprint"] for record in records}
        == {info.fingerprint, old.fingerprint}
        == accepted_fingerprints(extended.out)
    )


def test_the_same_command_again_finds_nothing_to_do(extended):
    settings = settings_of(extended.photos, extended.out)
    stamps = {path: path.stat().st_mtime_ns for path in extended.out.rglob("*")}
    select_and_plan(settings, extend=True)
    select_and_plan(settings)
    assert {path: path.stat().st_mtime_ns for path in extended.out.rglob("*")} == stamps


def copy_of(extended: Extended, tmp_path: Path) -> Path:
    return Path(shutil.copytree(extended.before, tmp_path / "dataset"))


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--seed", "3"), "settings.seed: 0 -> 3"), (("--views.per_object", "5"), "settings.views.per_object")],
)
def test_what_would_change_a_sample_is_refused(extended, tmp_path, options, said):
    before = hashes_of(extended.before / "shards")
    out = copy_of(extended, tmp_path)
    done = run_build(*build_options(extended.photos, out), *options, "--extend", check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "give another --out, or remove" in done.stderr
    assert hashes_of(out / "shards") == before


def test_without_being_asked_nothing_is_added(extended, tmp_path):
    with pytest.raises(
        InputError, match=r"settings\.selection\.subset: 0\.5 -> 1\.0\); give another --out, or --extend, which keeps"
    ):
        select_and_plan(settings_of(extended.photos, copy_of(extended, tmp_path)))


def test_fewer_objects_are_no_extension(extended, tmp_path):
    """Nothing is taken away, and what was there can be planned again."""
    out = copy_of(extended, tmp_path)
    plan = (out / "plan.parquet").read_bytes()
    with pytest.raises(
        InputError, match=r"\d+ samples of the dataset belong to boxes that these settings or annotations do not accept"
    ):
        select_and_plan(settings_of(extended.photos, out, "--selection.subset", "0.1"), extend=True)
    assert (out / "plan.parquet").read_bytes() == plan
    select_and_plan(settings_of(extended.photos, out, *HALF))
    assert (out / "plan.parquet").read_bytes() == plan
    assert (out / "selection.json").read_bytes() == (extended.before / "selection.json").read_bytes()


def test_an_unfinished_build_cannot_be_extended(extended, tmp_path):
    out = copy_of(extended, tmp_path)
    (out / "dataset.json").unlink()
    with pytest.raises(InputError, match="the build in this folder is not finished"):
        select_and_plan(settings_of(extended.photos, out), extend=True)


def test_an_extension_that_was_killed_between_its_tables_is_made_again(extended, tmp_path):
    """The plan was replaced, its record was not."""
    out = copy_of(extended, tmp_path)
    settings = settings_of(extended.photos, out)
    select_and_plan(settings, extend=True)
    plan = (out / "plan.parquet").read_bytes()
    assert plan == (extended.out / "plan.parquet").read_bytes()
    (out / "selection.json").unlink()
    select_and_plan(settings, extend=True)
    assert (out / "plan.parquet").read_bytes() == plan
    assert isinstance(DatasetInfo.model_validate(json.loads((out / "dataset.json").read_bytes())), DatasetInfo)


def test_a_shard_into_which_nothing_could_be_packed_gives_its_number_to_no_other(extended, tmp_path):
    """All photos of the first shard were missing at first."""
    out = copy_of(extended, tmp_path)
    packed = pq.read_table(out / "index.parquet", columns=["key", "shard"])
    packed = packed.filter([shard != "train-000000" for shard in packed["shard"].to_pylist()])["key"].combine_chunks()
    before = Plan(out / "plan.parquet").shards
    settings = settings_of(extended.photos, out)
    sizes = settings.views.per_object, settings.shards.samples
    extend_plan(out / "objects.parquet", out / "plan.parquet", before.keys(), packed, *sizes)
    after = Plan(out / "plan.parquet").shards
    assert before.keys() - after.keys() == {"train-000000"}
    assert sum(after.values()) == sum(before.values())
    record = out / "shards" / "train-000000.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "samples": 0}))
    shards = ShardFolder(settings)
    for shard in shards.unplanned(after, accepted_fingerprints(out)):
        shards.remove(shard)
    left = {path.name.partition(".")[0] for path in (out / "shards").iterdir()}
    assert left == (before.keys() - {"train-000000"}) | {"sizes"}


@given(packed=lists(text("ab", max_size=4), unique=True), asked=lists(text("ab", max_size=4)), bits=integers(1, 64))
def test_packed_keys_are_a_set(packed, asked, bits):
    """Also where different keys have the same hash."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "hash_column", lambda keys, *names: hash_column(keys, *names) >> np.uint64(64 - bits))
        known = PackedKeys(pa.array(packed, pa.string()))
        assert known.hold(pa.array(asked, pa.string())).tolist() == [key in packed for key in asked]
