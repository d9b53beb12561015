"""The net itself: what it must see, on files of a few bytes. tests/faults/net.py records whole checkouts."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.faults.net import compare, member_hashes, table_entries, tensors_hash

BEFORE = {"tiny/members/json": "a", "tiny/shards/one": "b" * 64, "losses/step 01/loss": 1.5}


@pytest.mark.parametrize(
    ("after", "name", "told"),
    [
        ({**BEFORE, "losses/step 01/loss": 1.25}, "losses/step 01/loss", "1.25"),
        ({name: BEFORE[name] for name in list(BEFORE)[1:]}, "tiny/members/json", "(not there)"),
        ({**BEFORE, "help/build.py/text": "c"}, "help/build.py/text", "(not there)"),
        ({**BEFORE, "tiny/failed": "failed: status 1"}, "tiny/failed", "failed: status 1"),
    ],
    ids=["changed", "missing", "added", "failed"],
)
def test_what_differs_is_told_and_counts_unless_it_is_meant(after, name, told, capsys):
    assert compare(BEFORE, after, []) == 1
    said = capsys.readouterr().out
    assert name in said
    assert told in said
    assert compare(BEFORE, after, [name]) == compare(BEFORE, after, [f"{name[:5]}*"]) == 0
    assert compare(BEFORE, after, ["tiny/shards/*"]) == 1
    assert "--moved tiny/shards/*: nothing of this name differs" in capsys.readouterr().out


def test_the_same_is_the_same_but_a_failure_in_both_is_none(capsys):
    assert compare(BEFORE, dict(reversed(BEFORE.items())), []) == 0
    assert capsys.readouterr().out == "3 entries: 0 differ, 0 of these without --moved\n"
    failed = {**BEFORE, "edit/failed": "failed: status 1"}
    assert compare(failed, failed, []) == 1


def test_a_value_that_stands_under_another_name_is_found_there(capsys):
    after = {("tiny/shards/two" if name == "tiny/shards/one" else name): value for name, value in BEFORE.items()}
    assert compare(BEFORE, after, ["*/one"]) == 1
    assert "moved, now tiny/shards/two" in capsys.readouterr().out


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_one_byte_of_one_member_changes_the_hash_of_its_extension_alone(tmp_path):
    members = {"a_0.json": b'{"key": "a_0", "seed": 0}', "a_0.ref.jpg": b"reference", "a_0.mask.png": b"mask"}
    first = member_hashes([write_tar(tmp_path / "first.tar", members)])
    assert first.keys() == {"json", "json/key", "json/seed", "ref.jpg", "mask.png"}
    assert member_hashes([write_tar(tmp_path / "order.tar", dict(reversed(members.items())))]) == first
    for name, data, changed in (
        ("a_0.ref.jpg", b"referencf", {"ref.jpg"}),
        ("a_0.json", b'{"key": "a_0", "seed": 1}', {"json", "json/seed"}),
    ):
        second = member_hashes([write_tar(tmp_path / "second.tar", {**members, name: data})])
        assert {extension for extension in first if first[extension] != second[extension]} == changed


def test_a_renamed_column_keeps_its_hash_and_another_encoding_changes_the_type_alone(tmp_path):
    tables = {"plain": {"label": ["a", "b", "a"]}, "renamed": {"kind": ["a", "b", "a"]}, "other": {"label": ["a", "b", "b"]}}
    entries = {}
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / name)
        entries[name] = table_entries([tmp_path / name])
    pq.write_table(pa.table({"label": pa.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "encoded")
    encoded = table_entries([tmp_path / "encoded"])
    plain = entries["plain"]
    assert entries["renamed"]["columns/kind"] == plain["columns/label"] != entries["other"]["columns/label"]
    assert {name for name in plain if plain[name] != encoded[name]} == {"types/label"}


def test_tensors_are_told_apart_by_name_type_shape_and_bits():
    one = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0, dtype=torch.bfloat16)}
    assert tensors_hash(dict(reversed(one.items()))) == tensors_hash(one)
    others = [{**one, "a": torch.zeros(3, 2)}, {**one, "a": torch.zeros(2, 3).int()}, {"c": one["a"], "b": one["b"]}]
    others.append({**one, "a": torch.tensor([[0, 0, 0], [0, 0, -0.0]])})
    assert len({tensors_hash(tensors) for tensors in (one, *others)}) == 5
