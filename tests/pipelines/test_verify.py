"""What verify.py says of datasets that are whole, and of those in which one thing is wrong, and all hashes are right."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError
from pbe_core.files import TarWriter, file_sha256, lock_folder
from pbe_core.sample_codec import Sample, decode_array, decode_masks, decode_sample, encode_array, encode_masks, jpeg_bytes
from pbe_core.settings import REPOSITORY
from pipelines.dataset.object_mask import encode_segmentation
from pipelines.dataset.plan_shards import planned_shards
from pipelines.dataset.verify_dataset import Finding, check_shard, find_duplicates, key_hashes
from pipelines.dataset.verify_samples import Expected, check_masks, check_reference, expected_of
from pipelines.dataset.verify_tables import ROOT_FILES
from pipelines.dataset.write_plan import accepted_fingerprints
from pipelines.geometry import fill_box, fill_polygon, reference_size
from pipelines.verify import SHOWN, Verified, choose, repair, summary, told, verify_dataset
from schemas.document import LAYOUT
from schemas.sample import MEMBER_NAMES, SampleRecord
from schemas.tables import FAILURES, INDEX, SHARD_RECORDS
from tests.conftest import build_options, run_build

SHARD, VALIDATION = "train-000001", "validation-000000"


@dataclass
class Stored:
    """One sample of a tar, and how it is written."""

    row: dict
    members: dict[str, bytes]
    order: list[str] = field(default_factory=list)

    def json(self) -> dict:
        return json.loads(self.members["json"])

    def change_json(self, **changes) -> None:
        self.members["json"] = json.dumps({**self.json(), **changes}).encode()


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    return folder


def read_shard(dataset: Path, shard: str) -> list[Stored]:
    data = (dataset / "shards" / f"{shard}.tar").read_bytes()
    samples = []
    for row in pq.read_table(dataset / "shards" / f"{shard}.index.parquet").to_pylist():
        places = {name: row[name.replace(".", "_")] for name in MEMBER_NAMES}
        members = {name: data[at["offset"] : at["offset"] + at["length"]] for name, at in places.items() if at}
        samples.append(Stored(row, members))
    return samples


def write_shard(dataset: Path, shard: str, samples: list[Stored], change_tar=None, change_rows=None, **record_changes) -> None:
    """Write a shard, its index part and its record so that all of them agree, then let `settle` do the same for the tables."""
    folder = dataset / "shards"
    rows = []
    with (folder / f"{shard}.tar").open("wb") as file:
        tar = TarWriter(file)
        for position, sample in enumerate(samples):
            places = dict.fromkeys(name.replace(".", "_") for name in MEMBER_NAMES)
            for name in sample.order or sorted(sample.members):
                offset = tar.add(f"{sample.row['key']}.{name}", sample.members[name])
                places[name.replace(".", "_")] = {
                    "offset": offset,
                    "length": len(sample.members[name]),
                    "crc32": zlib.crc32(sample.members[name]),
                }
            rows.append({**sample.row, "position": position, **places})
        tar.close()
    data = bytearray((folder / f"{shard}.tar").read_bytes())
    if change_tar:
        change_tar(data, rows)
    if change_rows:
        change_rows(rows)
    (folder / f"{shard}.tar").write_bytes(data)
    index = folder / f"{shard}.index.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX), index)
    records = [sample.json() for sample in samples]
    path = folder / f"{shard}.json"
    record = json.loads(path.read_text())
    record |= {
        "samples": len(samples),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
        "masks": dict(sorted(Counter(kind for each in records for kind in each["mask_kinds"]).items())),
        "padded_views": sum(each["padded"] for each in records),
    }
    if "index_bytes" in record:
        record["index_bytes"] = index.stat().st_size
    path.write_text(json.dumps({**record, **record_changes}, indent=1))
    settle(dataset)


def change_record(dataset: Path, shard: str, **changes) -> None:
    path = dataset / "shards" / f"{shard}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=1))
    settle(dataset)


def settle(dataset: Path) -> None:
    """Make the tables and dataset.json anew from the shards as they are."""
    names = list(json.loads((dataset / "shards" / "sizes.json").read_text()))
    records = [json.loads((dataset / "shards" / f"{name.removesuffix('.tar')}.json").read_text()) for name in names]
    parts = [pq.read_table(dataset / "shards" / f"{name.removesuffix('.tar')}.index.parquet") for name in names]
    pq.write_table(pa.concat_tables(parts), dataset / "index.parquet")
    rows = [{name: record[name] for name in SHARD_RECORDS.names} for record in records]
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARD_RECORDS), dataset / "shard_records.parquet")
    failures = [{"shard": record["shard"], **failed} for record in records for failed in record["failed_samples"]]
    pq.write_table(pa.Table.from_pylist(failures, schema=FAILURES), dataset / "failures.parquet")
    sizes = {name: record["samples"] for name, record in zip(names, records, strict=True)}
    (dataset / "shards" / "sizes.json").write_text(json.dumps(sizes))
    info = json.loads((dataset / "dataset.json").read_text())
    for counted in ("failures", "masks"):
        info["books"][counted] = dict(sum((Counter(record[counted]) for record in records), Counter()))
    for name in ("samples", "padded_views"):
        info["books"][name] = sum(record[name] for record in records)
    for split in info["splits"]:
        own = [record for record in records if record["split"] == split]
        info["splits"][split] |= {name: sum(record[name] for record in own) for name in ("samples", "bytes")}
    (dataset / "dataset.json").write_text(json.dumps(info))


def look(dataset: Path, sample: int | None = None) -> Verified:
    return verify_dataset(dataset, sample)


def look_at(dataset: Path, shard: str) -> list[Finding]:
    """Findings in one shard, without the tables around it."""
    plan = dataset / "plan.parquet"
    rows = pq.ParquetFile(plan).read_row_group(list(planned_shards(plan)).index(shard)).to_pylist()
    expected = expected_of(read_dataset(dataset), accepted_fingerprints(dataset))
    return check_shard(dataset, expected, shard, rows).findings


def problems(dataset: Path) -> list[str]:
    return [str(finding) for finding in look(dataset).findings]


def run_verify(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pipelines/verify.py", *map(str, options)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_a_good_dataset_passes_with_one_line(dataset):
    done = run_verify(dataset)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stdout + done.stderr
    info = read_dataset(dataset)
    shards = sum(len(split.shards) for split in info.splits.values())
    assert f"{info.books.samples} samples in {shards} shards, all of them whole" in done.stdout


def test_writing_a_shard_by_hand_changes_nothing_of_a_good_one(copy, dataset):
    """The tests below rest on it: what they are told is what they have broken."""
    for shard in (SHARD, VALIDATION):
        write_shard(copy, shard, read_shard(copy, shard))
        assert (copy / "shards" / f"{shard}.tar").read_bytes() == (dataset / "shards" / f"{shard}.tar").read_bytes()
    assert problems(copy) == []


# --- One sample is wrong, and all hashes are right -----------------------------------------------------------------------------


def _array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Stored], None]:
    def act(sample: Stored) -> None:
        sample.members[name] = encode_array(change(decode_array(sample.members[name]).copy()))

    return act


def _with(array: np.ndarray, place: tuple, value: float) -> np.ndarray:
    array[place] = value
    return array


def _masks(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Stored], None]:
    def act(sample: Stored) -> None:
        sample.members["mask.json"] = encode_masks(change(decode_masks(sample.members["mask.json"]).copy()))

    return act


def _json(**changes) -> Callable[[Stored], None]:
    return lambda sample: sample.change_json(**changes)


def _member(name: str, data: bytes) -> Callable[[Stored], None]:
    return lambda sample: sample.members.update({name: data})


def _other_cells(sample: Stored) -> None:
    for name in ("latent.npy", "masked.npy"):
        sample.members[name] = encode_array(decode_array(sample.members[name])[..., :4, :4])


def _other_masks(sample: Stored) -> None:
    """One mask fewer, in all members alike."""
    content = sample.json()
    sample.change_json(mask_kinds=content["mask_kinds"][:1], mask_polygons=content["mask_polygons"][:1])
    sample.members["masked.npy"] = encode_array(decode_array(sample.members["masked.npy"])[:1])
    sample.members["mask.json"] = encode_masks(decode_masks(sample.members["mask.json"])[:1])


def _smaller_box(sample: Stored) -> None:
    content = sample.json()
    (left, _, side), box, in_view = content["window"], content["box"], content["box_in_view"]
    box[0] += 0.01
    in_view[0] = (box[0] - left) * 128 / side
    sample.change_json(box=box, box_in_view=in_view)


def _box_in_view(sample: Stored) -> None:
    sample.change_json(box_in_view=[value + 1e-4 for value in sample.json()["box_in_view"]])


def _outline_elsewhere(sample: Stored) -> None:
    """A box mask that its outline agrees with, but beside the object."""
    content = sample.json()
    masks = decode_masks(sample.members["mask.json"]).copy()
    for number in range(len(masks)):
        content["mask_polygons"][number] = [[1.0, 1.0], [3.0, 1.0], [3.0, 3.0], [1.0, 3.0]]
        masks[number] = fill_box(np.array(content["mask_polygons"][number]), 128)
    sample.change_json(mask_kinds=["box"] * len(masks), mask_polygons=content["mask_polygons"][: len(masks)])
    sample.members["mask.json"] = encode_masks(masks)


def _short_outline(sample: Stored) -> None:
    content = sample.json()
    sample.change_json(mask_polygons=[content["mask_polygons"][0][:-1], *content["mask_polygons"][1:]])


def _not_a_number(sample: Stored) -> None:
    content = sample.json()
    content["mask_polygons"][0][0][0] = float("nan")
    sample.change_json(mask_polygons=content["mask_polygons"])


def _padded(sample: Stored) -> None:
    sample.change_json(padded=not sample.json()["padded"])


def _reference(width_more: int) -> Callable[[Stored], None]:
    def act(sample: Stored) -> None:
        picture = cv2.imdecode(np.frombuffer(sample.members["ref.jpg"], np.uint8), cv2.IMREAD_COLOR)
        height, width = picture.shape[:2]
        sample.members["ref.jpg"] = jpeg_bytes(cv2.resize(picture, (width + width_more, height)), 95)

    return act


def _reference_window_beside(sample: Stored) -> None:
    """As large as before, but shifted, so that it shows another part of the photo."""
    content = sample.json()
    x_min, y_min, x_max, y_max = content["reference_window"]
    shift = max(-x_min, content["photo_size"][0] - x_max, key=abs)
    assert abs(shift) > 10
    sample.change_json(reference_window=[x_min + shift, y_min, x_max + shift, y_max])


def _cut(name: str) -> Callable[[Stored], None]:
    return lambda sample: sample.members.update({name: sample.members[name][:-150]})


@pytest.mark.parametrize(
    ("shard", "change", "message"),
    [
        (SHARD, _array("latent.npy", lambda a: _with(a, (0, 3, 3), np.nan)), "a latent is not finite"),
        (SHARD, _array("masked.npy", lambda a: _with(a, (1, 0, 3, 3), np.inf)), "a latent is not finite"),
        (SHARD, _array("masked.npy", lambda a: _with(a, (0, -1, 3, 3), -1)), "a standard deviation is negative"),
        (SHARD, _array("latent.npy", lambda a: a.astype(np.float32)), "latent.npy is float32"),
        (SHARD, _other_cells, "latent.npy is [8, 4, 4], dataset.json says [8, 16, 16]"),
        (SHARD, _other_masks, "mask.json holds [1, 128, 128], dataset.json says [2, 128, 128]"),
        (SHARD, _masks(np.zeros_like), "a mask is empty"),
        (SHARD, _masks(lambda masks: _with(masks, (0, 0, 0), ~masks[0, 0, 0])), "mask 0 is not what its outline encloses"),
        (SHARD, _masks(lambda masks: masks[::-1]), "is not what its outline encloses"),
        (SHARD, _short_outline, "points, not"),
        (SHARD, _not_a_number, "the outline of mask 0 has a point that is not finite"),
        (SHARD, _outline_elsewhere, "no rectangle around the object's box"),
        (SHARD, _json(key="other-0_0"), "its record says key 'other-0_0', the plan"),
        (SHARD, _json(label_name="Something else"), "its record says label_name 'Something else'"),
        (SHARD, _json(url="http://example.org"), "its record says url"),
        (SHARD, _json(photo_sha256="00"), "photo_sha256 '00' is no SHA-256"),
        (SHARD, _json(window=[0, 0, 0]), "window [0, 0, 0] has no side"),
        (SHARD, _json(surplus=1), "member json is damaged"),
        (SHARD, _smaller_box, "is not the planned one"),
        (SHARD, _box_in_view, "is not where the window shows the box"),
        (SHARD, _padded, "and window"),
        (SHARD, _json(reference_window=[-1, 0, 20, 20]), "reference_window [-1, 0, 20, 20] lies not in a photo"),
        (SHARD, _json(reference_mask="0"), "it has a reference_mask, unlike the plan"),
        (SHARD, _reference(3), "member ref.jpg has"),
        (SHARD, _cut("ref.jpg"), "member ref.jpg cannot be decoded"),
        (SHARD, _member("ref.jpg", b"<html>"), "member ref.jpg is no JPEG"),
        (SHARD, _member("view.jpg", b"\xff\xd8"), "member view.jpg is there, and train does not keep its views"),
        (VALIDATION, lambda sample: sample.members.pop("view.jpg"), "member view.jpg is missing"),
        (VALIDATION, _cut("view.jpg"), "member view.jpg cannot be decoded"),
    ],
)
def test_what_was_wrong_before_it_was_hashed_is_told_by_sample(copy, shard, change, message):
    samples = read_shard(copy, shard)
    change(samples[3])
    write_shard(copy, shard, samples)
    verified = look(copy)
    told = [finding.problem for finding in verified.findings]
    found = {(finding.shard, finding.key, finding.mend) for finding in verified.findings}
    assert found == {(shard, samples[3].row["key"], "pack")}, told
    assert any(message in problem for problem in told), told
    # A few such changes cannot but break a second rule; none of them may set off everything.
    assert len(told) <= 2, told


def test_a_reference_beside_its_object_is_told(copy):
    samples = read_shard(copy, SHARD)
    _reference_window_beside(samples[0])
    write_shard(copy, SHARD, samples)
    assert [finding for finding in look_at(copy, SHARD) if "does not hold the box" in finding.problem]


def test_reference_masks_are_those_of_the_reference(dataset):
    stored = read_shard(dataset, SHARD)[0]
    sample = decode_sample(stored.members, "here")
    planned = {row["key"]: row for row in pq.read_table(dataset / "plan.parquet").to_pylist()}[stored.row["key"]]
    expected = expected_of(read_dataset(dataset), frozenset())
    x_min, y_min, x_max, y_max = sample.record.reference_window
    width, height = reference_size(x_max - x_min, y_max - y_min, *expected.reference_sides)

    def told(mask: str | None) -> list[str]:
        record = SampleRecord(**{**sample.record.model_dump(), "reference_mask": mask})
        changed = Sample(record, sample.latent, sample.masked, sample.masks, sample.reference, sample.view)
        return list(check_reference(changed, {**planned, "segmentation": "an outline"}, expected))

    assert told(encode_segmentation(np.ones((height, width), bool))) == []
    assert told(encode_segmentation(np.ones((height + 1, width), bool))) == [
        f"reference_mask is of {(height + 1) * width} px, the reference has {width}x{height}"
    ]
    assert told(None) == ["it has no reference_mask, unlike the plan"]
    assert "characters that RLE does not use" in told("~~")[0]


def test_references_that_are_squares_are_right_where_the_settings_say_so(dataset):
    """`references.resize: published`."""
    stored = read_shard(dataset, SHARD)[0]
    sample = decode_sample(stored.members, "here")
    planned = {row["key"]: row for row in pq.read_table(dataset / "plan.parquet").to_pylist()}[stored.row["key"]]
    info = read_dataset(dataset)
    references = {**info.settings["references"], "resize": "published"}
    settings = {**info.settings, "references": references}
    expected = expected_of(info.model_copy(update={"settings": settings}), frozenset())
    side = references["side"]
    assert f"its record says {side}x{side}" in next(check_reference(sample, planned, expected))
    square = replace(sample, reference=jpeg_bytes(np.zeros((side, side, 3), np.uint8), 95))
    assert list(check_reference(square, planned, expected)) == []


def test_box_masks_with_their_outline_are_those_of_older_datasets(dataset):
    """A pixel wider and higher than today's, mostly; not at another place."""
    samples = [decode_sample(stored.members, "here") for stored in read_shard(dataset, SHARD)]
    sample = next(sample for sample in samples if "box" in sample.record.mask_kinds)
    number = sample.record.mask_kinds.index("box")
    expected = expected_of(read_dataset(dataset), frozenset())
    older = fill_polygon(np.array(sample.record.mask_polygons[number]), 128)
    assert older.sum() > sample.masks[number].sum()
    for mask, wrong in ((sample.masks[number], 0), (older, 0), (np.roll(older, 1, axis=0), 1)):
        masks = sample.masks.copy()
        masks[number] = mask
        assert len(list(check_masks(replace(sample, masks=masks), {}, expected))) == wrong


# --- The tar, its index and its record are wrong, and all hashes are right -----------------------------------------------------


def _newer(data: bytearray, rows: list[dict]) -> None:
    """Another time in the third sample's first header, with a checksum that fits."""
    start = rows[2]["json"]["offset"] - 512
    header = data[start : start + 512]
    header[136:147] = b"00000000001"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[start : start + 512] = header


def _padding(data: bytearray, rows: list[dict]) -> None:
    end = rows[2]["json"]["offset"] + rows[2]["json"]["length"]
    assert end % 512
    data[end] = 1


def _last_bit(data: bytearray, rows: list[dict]) -> None:
    """Of a latent: any 16 bits are a number, so nothing but the checksum tells."""
    at = rows[2]["latent_npy"]
    data[at["offset"] + at["length"] - 2] ^= 1


@pytest.mark.parametrize(
    ("change_tar", "message", "named"),
    [
        (_last_bit, "member latent.npy is not what was written (CRC-32)", True),
        (_newer, "the tar's header of member json is not as written (time, checksum)", True),
        (_padding, "the bytes between member json and the next one are not zero", True),
        (lambda data, rows: data.__setitem__(-1, 1), "the end of its tar is not zero", False),
        (lambda data, rows: data.extend(b"\0" * 512), "by the index its tar ends at byte", False),
    ],
)
def test_a_tar_that_is_not_as_our_writer_writes_it_is_told(copy, change_tar, message, named):
    samples = read_shard(copy, SHARD)
    write_shard(copy, SHARD, samples, change_tar)
    findings = look_at(copy, SHARD)
    assert [finding.shard for finding in findings] == [SHARD]
    assert message in findings[0].problem
    assert findings[0].key == (samples[2].row["key"] if named else None)


def test_members_that_are_not_sorted_are_told(copy):
    samples = read_shard(copy, SHARD)
    samples[4].order = ["latent.npy", "json", "mask.json", "masked.npy", "ref.jpg"]
    write_shard(copy, SHARD, samples)
    findings = look_at(copy, SHARD)
    assert {finding.key for finding in findings} == {samples[4].row["key"]}
    assert all("should begin at byte" in finding.problem for finding in findings)


def test_samples_that_do_not_stand_where_the_plan_puts_them_are_told(copy):
    samples = read_shard(copy, SHARD)
    samples[2], samples[3] = samples[3], samples[2]
    write_shard(copy, SHARD, samples)
    assert problems(copy) == [f"{SHARD}, sample {samples[2].row['key']}: does not stand where the plan puts it"]


def test_a_sample_that_is_there_twice_is_told(copy):
    samples = read_shard(copy, SHARD)
    write_shard(copy, SHARD, [*samples[:-1], samples[0]])
    told = problems(copy)
    assert f"{SHARD}, sample {samples[0].row['key']}: is 2 times in the index" in told
    assert f"{SHARD}, sample {samples[-1].row['key']}: was planned and has not failed, but is not in the index" in told


def test_a_sample_of_another_shard_is_told(copy):
    samples, others = read_shard(copy, SHARD), read_shard(copy, "train-000000")
    write_shard(copy, SHARD, [*samples[:-1], others[0]])
    told = problems(copy)
    assert f"{SHARD}, sample {others[0].row['key']}: is in the index, but was not planned for this shard" in told
    assert any("the index says shard 'train-000000', the plan 'train-000001'" in problem for problem in told)


def test_keys_that_two_shards_have_are_found(copy):
    keys = {shard: [stored.row["key"] for stored in read_shard(copy, shard)] for shard in ("train-000000", SHARD)}
    hashes = {shard: key_hashes(own) for shard, own in keys.items()}
    assert list(find_duplicates(hashes, copy)) == []
    again = copy / "shards" / "train-000900.index.parquet"
    shutil.copy(copy / "shards" / f"{SHARD}.index.parquet", again)
    found = list(find_duplicates({**hashes, "train-000900": hashes[SHARD]}, copy))
    assert [(finding.shard, finding.key) for finding in found] == [("train-000900", key) for key in keys[SHARD]]
    assert all(finding.problem.startswith(f"the same key is in {SHARD} too") for finding in found)


def test_one_key_in_two_planned_shards_is_told_though_each_of_them_is_whole(copy):
    """As a plan would do it that names a sample twice: plan, shards and tables agree, and only the keys can tell."""
    plan = pq.ParquetFile(copy / "plan.parquet")
    groups = [plan.read_row_group(group) for group in range(plan.num_row_groups)]
    shards = list(planned_shards(copy / "plan.parquet"))
    first, second = shards.index("train-000000"), shards.index(SHARD)
    twice = groups[first].slice(0, 1).to_pylist()[0]
    rows = groups[second].to_pylist()
    rows[0] = {**twice, "shard": SHARD, "position": 0}
    groups[second] = pa.Table.from_pylist(rows, schema=plan.schema_arrow)
    with pq.ParquetWriter(copy / "plan.parquet", plan.schema_arrow, write_statistics=["shard"]) as writer:
        for group in groups:
            writer.write_table(group)
    changed = file_sha256(copy / "plan.parquet")
    _change_json("selection.json", lambda record: record["sha256"].update({"plan.parquet": changed}))(copy)
    samples, others = read_shard(copy, SHARD), read_shard(copy, "train-000000")
    samples[0] = Stored({**others[0].row, "shard": SHARD}, others[0].members)
    write_shard(copy, SHARD, samples)
    (told,) = problems(copy)
    assert told.startswith(f"{SHARD}, sample {twice['key']}: the same key is in train-000000 too")


@pytest.mark.parametrize(
    ("change_rows", "message"),
    [
        (lambda rows: rows[1].update(label="/m/other"), "the index says label '/m/other', the plan"),
        (lambda rows: rows[1].update(position=7), "the index says position 7, the plan 1"),
        (
            lambda rows: rows[1]["ref_jpg"].update(length=rows[1]["ref_jpg"]["length"] - 1),
            "header of member ref.jpg is not as written",
        ),
        (lambda rows: rows[1]["ref_jpg"].update(offset=10**12), "ref.jpg beyond the end of the tar, by the index"),
        (lambda rows: rows[1]["ref_jpg"].update(offset=-5), "ref.jpg beyond the end of the tar, by the index"),
        (lambda rows: rows[1].update(view_jpg=rows[1]["ref_jpg"]), "member view.jpg should begin at byte"),
    ],
)
def test_an_index_that_does_not_fit_is_told_by_sample(copy, change_rows, message):
    samples = read_shard(copy, SHARD)
    write_shard(copy, SHARD, samples, change_rows=change_rows)
    findings = [finding for finding in look_at(copy, SHARD) if message in finding.problem]
    assert [(finding.shard, finding.key) for finding in findings] == [(SHARD, samples[1].row["key"])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "0" * 64}, "its commit record is of another plan (000000000000...)"),
        ({"shard": "train-000777"}, "its commit record is of train-000777"),
        ({"split": "test"}, "its commit record says split test, the plan train"),
        ({"planned": 21}, "its commit record says 21 planned samples, the plan 20"),
        ({"samples": 19}, "its index has 20 samples, its commit record says 19"),
        ({"failed": 1}, "its commit record says 20 planned samples, but 20 packed and 1 failed"),
        ({"failures": {"missing": 1}}, "its commit record counts 0 failed samples as {'missing': 1} and lists {}"),
        ({"masks": {"box": 1}}, "its commit record counts masks {'box': 1}, its samples have"),
        ({"padded_views": 20}, "its commit record counts 20 padded views"),
        ({"bytes": 1}, "its commit record says 1"),
        ({"sha256": "0" * 64}, f"shards/{SHARD}.tar is not what was written (SHA-256)"),
        ({"index_sha256": "0" * 64}, f"shards/{SHARD}.index.parquet is not what was written (SHA-256)"),
        ({"samples": "20"}, "its commit record cannot be read"),
        ({"surplus": 1}, "its commit record cannot be read"),
        ({"failed_samples": [{"key": "x"}]}, "its commit record cannot be read"),
    ],
)
def test_a_wrong_commit_record_is_told(copy, changes, message):
    path = copy / "shards" / f"{SHARD}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    told = look_at(copy, SHARD)
    assert any(message in finding.problem for finding in told), told
    assert {finding.mend for finding in told} == {"pack"}


def fail_a_sample(dataset: Path, number: int = 2, **changes) -> dict:
    """As if the photo of one sample had been missing: the dataset is whole, but for what `changes` makes of the failure."""
    samples = read_shard(dataset, SHARD)
    lost = samples.pop(number)
    content = lost.json()
    failed = {name: content[name] for name in ("key", "split", "photo_id", "file_name")}
    failed = {**failed, "code": "missing", "detail": "no file", **changes}
    write_shard(dataset, SHARD, samples, failed=1, failures={failed["code"]: 1}, failed_samples=[failed])
    return failed


def test_samples_that_failed_are_a_part_of_the_books(copy):
    fail_a_sample(copy)
    assert problems(copy) == []
    assert read_dataset(copy).books.failures == {"missing": 1}


def test_a_shard_of_which_nothing_could_be_made_is_whole(copy):
    failed = [
        {**{name: sample.json()[name] for name in ("key", "split", "photo_id", "file_name")}, "code": "missing", "detail": ""}
        for sample in read_shard(copy, SHARD)
    ]
    write_shard(copy, SHARD, [], failed=len(failed), failures={"missing": len(failed)}, failed_samples=failed)
    assert (copy / "shards" / f"{SHARD}.tar").stat().st_size == 1024
    assert problems(copy) == []


def test_an_extended_dataset_is_whole_though_older_shards_count_what_failed_in_them(copy):
    """What failed is planned elsewhere then; the old shard keeps its record, and the plan only what is in it."""
    failed = fail_a_sample(copy)
    plan = pq.ParquetFile(copy / "plan.parquet")
    groups = [plan.read_row_group(group) for group in range(plan.num_row_groups)]
    with pq.ParquetWriter(copy / "plan.parquet", plan.schema_arrow, write_statistics=["shard"]) as writer:
        for group in groups:
            writer.write_table(group.filter(pc.not_equal(group["key"], failed["key"])))
    changed = file_sha256(copy / "plan.parquet")
    _change_json("selection.json", lambda record: record["sha256"].update({"plan.parquet": changed}))(copy)
    old = "0" * 64
    _change_json("plan.json", lambda record: record.update(extends=[old]))(copy)
    _change_json("dataset.json", lambda info: info["books"].update(planned=info["books"]["planned"] - 1, failures={}))(copy)
    pq.write_table(FAILURES.empty_table(), copy / "failures.parquet")
    told = problems(copy)
    assert told, "a shard of this plan must have all that is planned"
    path = copy / "shards" / f"{SHARD}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": old}))
    _change_table("shard_records.parquet", lambda rows: _with_fingerprint(rows, old))(copy)
    assert problems(copy) == []


def _with_fingerprint(rows: list[dict], fingerprint: str) -> list[dict]:
    return [{**row, "fingerprint": fingerprint} if row["shard"] == SHARD else row for row in rows]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "nobody_0"}, "lists the failed sample nobody_0, which the plan does not know"),
        ({"photo_id": "another"}, "with another photo than the plan"),
        ({"code": "bored"}, "has the unknown code bored"),
    ],
)
def test_failures_that_the_plan_does_not_know_are_told(copy, changes, message):
    fail_a_sample(copy, **changes)
    assert any(message in problem for problem in problems(copy))


def test_a_sample_that_failed_and_is_there_is_told(copy):
    key = read_shard(copy, SHARD)[5].row["key"]
    fail_a_sample(copy, key=key)
    assert f"{SHARD}, sample {key}: is in the index, but its commit record says that it failed" in problems(copy)


# --- The tables around the shards ----------------------------------------------------------------------------------------------


def _change_table(name: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def act(dataset: Path) -> None:
        path = dataset / name
        schema = pq.read_schema(path)
        rows = change(pq.read_table(path).to_pylist())
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)

    return act


def _change_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def act(dataset: Path) -> None:
        content = json.loads((dataset / name).read_text())
        change(content)
        (dataset / name).write_text(json.dumps(content))

    return act


def _first(rows: list[dict], **changes) -> list[dict]:
    return [{**rows[0], **changes}, *rows[1:]]


def _flip(name: str, place: float = 0.5) -> Callable[[Path], None]:
    def act(dataset: Path) -> None:
        data = bytearray((dataset / name).read_bytes())
        data[int(len(data) * place)] ^= 0x40
        (dataset / name).write_bytes(data)

    return act


def _remove(name: str) -> Callable[[Path], None]:
    return lambda dataset: (dataset / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_change_json("shards/sizes.json", lambda sizes: sizes.update({f"{SHARD}.tar": 3})), "shards/sizes.json is not what"),
        (_change_json("shards/sizes.json", lambda sizes: sizes.pop(f"{SHARD}.tar")), "shards/sizes.json is not what"),
        (_remove("shards/sizes.json"), "shards/sizes.json is not there"),
        (
            _change_table("shard_records.parquet", lambda rows: _first(rows, bytes=1)),
            "shard_records.parquet: bytes of train-000000",
        ),
        (_change_table("shard_records.parquet", lambda rows: rows[::-1]), "shard_records.parquet has not one row for each shard"),
        (_change_table("index.parquet", lambda rows: rows[1:]), "index.parquet: rows of train-000000 not as in its part"),
        (_change_table("index.parquet", lambda rows: _first(rows, label="x")), "index.parquet: rows of train-000000"),
        (
            _change_table("index.parquet", lambda rows: [*rows[30:], *rows[:30]]),
            "index.parquet does not hold the rows of each shard",
        ),
        (_remove("index.parquet"), "index.parquet is not there"),
        (lambda dataset: (dataset / "index.parquet").write_bytes(b"PAR1"), "index.parquet cannot be read"),
        (lambda dataset: (dataset / "failures.parquet").write_bytes(b""), "failures.parquet cannot be read"),
        (_remove("shard_records.parquet"), "shard_records.parquet is not there"),
        (lambda dataset: (dataset / "dataset.json").write_text("{"), "dataset.json cannot be read"),
        (_change_json("dataset.json", lambda info: info["books"].update(boxes=1)), "the books do not balance"),
        (_change_json("dataset.json", lambda info: info["books"]["masks"].update(box=1)), "books.masks is"),
        (_change_json("dataset.json", lambda info: info["books"].update(padded_views=999)), "books.padded_views is 999"),
        (_change_json("dataset.json", lambda info: info["splits"]["train"].update(bytes=1)), "splits are not what"),
        (_change_json("dataset.json", lambda info: info.update(fingerprint="0" * 64)), "dataset.json is of another plan"),
        (
            _change_json("dataset.json", lambda info: info.update(view_size=256)),
            "dataset.json cannot be read (ValueError: views of 256",
        ),
        (_change_json("dataset.json", lambda info: info["vae"].update(sha256="00")), "dataset.json says vae.sha256 00"),
        (
            _change_json("dataset.json", lambda info: info["vae"].update(downsampling=3)),
            "dataset.json cannot be read (ValueError: a VAE",
        ),
    ],
)
def test_what_sealing_makes_is_checked_and_made_again(copy, damage, message):
    damage(copy)
    findings = look(copy).findings
    assert any(message in finding.problem for finding in findings), findings
    assert {finding.mend for finding in findings} == {"seal"}
    assert repair(copy, findings) == []
    assert not (copy / "dataset.json").exists()
    assert len(list((copy / "shards").glob("*.json"))) >= len(list((copy / "shards").glob("*.tar")))


def test_failures_that_were_lost_or_reworded_are_told(copy):
    fail_a_sample(copy)
    path = copy / "failures.parquet"
    whole = pq.read_table(path)
    pq.write_table(whole.slice(0, 0), path)
    assert [finding.mend for finding in look(copy).findings] == ["seal"]
    place = whole.schema.get_field_index("detail")
    pq.write_table(whole.set_column(place, whole.schema.field(place), pa.array(["no fire"])), path)
    findings = look(copy).findings
    assert [(finding.shard, finding.mend) for finding in findings] == [(SHARD, "pack")]
    assert "differ in details" in findings[0].problem


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("plan.parquet"), "plan.parquet is not there"),
        (lambda dataset: (dataset / "plan.parquet").write_bytes(b"PAR1" * 9), "plan.parquet cannot be read"),
        (_flip("plan.parquet"), "plan.parquet"),
        (_flip("objects.parquet"), "objects.parquet"),
        (_flip("rejects.parquet"), "rejects.parquet"),
        (_remove("objects.parquet"), "objects.parquet is not there"),
        (_remove("same_photos.parquet"), "same_photos.parquet is not there"),
        (_change_table("objects.parquet", lambda rows: _first(rows, x_min=0.123)), "plan.parquet and objects.parquet disagree"),
        (_change_table("objects.parquet", lambda rows: [rows[0], *rows]), "objects.parquet has an object twice"),
        (_remove("selection.json"), "selection.json is not there"),
        (lambda dataset: (dataset / "selection.json").write_text("{"), "selection.json cannot be read"),
        (_remove("plan.json"), "remove plan.json and run the build again"),
        (lambda dataset: (dataset / "plan.json").write_text("{"), "remove plan.json and run the build again"),
    ],
)
def test_damage_to_the_plan_is_told_with_what_to_do_and_nothing_is_touched(copy, damage, message):
    damage(copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    verified = look(copy)
    assert any(message in finding.problem for finding in verified.findings), verified.findings
    assert {finding.mend for finding in verified.findings} <= {"select", "freeze"}
    assert verified.shards == 0
    assert repair(copy, verified.findings) == []
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_a_plan_that_says_other_things_than_its_objects_is_told_by_shard(copy):
    """Each of its columns counts, since every one of them goes into samples."""
    plan = pq.ParquetFile(copy / "plan.parquet")
    groups = [plan.read_row_group(group) for group in range(plan.num_row_groups)]
    values = {
        "x_max": 0.987,
        "rotation": 90,
        "url": "http://example.org",
        "label_name": "X",
        "view": 5,
        "position": 3,
        "key": "k_0",
    }
    for name, value in values.items():
        rows = groups[1].to_pylist()
        changed = pa.Table.from_pylist([{**rows[0], name: value}, *rows[1:]], schema=plan.schema_arrow)
        with pq.ParquetWriter(copy / "plan.parquet", plan.schema_arrow) as writer:
            for number, group in enumerate(groups):
                writer.write_table(changed if number == 1 else group)
        told = [problem for problem in problems(copy) if "disagree on shard train-000001" in problem]
        assert len(told) == 1, name


def test_what_does_not_belong_there_is_told_and_never_removed(copy):
    strays = [copy / "notes.txt", copy / "shards" / "train-000900.tar", copy / "shards" / f".{SHARD}.tar.0123.tmp"]
    for path in strays:
        path.write_bytes(b"")
    told = problems(copy)
    assert len(told) == len(strays)
    assert "notes.txt is none of a dataset's files; remove it, or move it elsewhere" in told
    assert any("a killed run left it; remove it, or let the next build do so" in problem for problem in told)
    repair(copy, look(copy).findings)
    assert all(path.exists() for path in strays)
    assert (copy / "dataset.json").exists()


def test_every_file_that_the_documentation_names_is_known():
    named = {path for line in LAYOUT.splitlines() for path in re.findall(r"`([^`]+)`", line.split("|")[1])} if LAYOUT else set()
    assert {path for path in named if "/" not in path} <= ROOT_FILES
    assert "plan.parquet" in named


@pytest.mark.parametrize("lost", [".tar", ".index.parquet", ".json"])
def test_a_lost_file_of_a_shard_is_told(copy, lost):
    (copy / "shards" / f"{SHARD}{lost}").unlink()
    findings = look(copy).findings
    assert {(finding.shard, finding.mend) for finding in findings} == {(SHARD, "pack")}
    assert len(findings) == 1, findings


# --- Quick looks, repair, the command ------------------------------------------------------------------------------------------


def test_a_quick_look_reads_the_samples_it_says_and_no_others(copy):
    names = read_dataset(copy).splits["train"].shards + read_dataset(copy).splits["validation"].shards
    counts = [len(read_shard(copy, shard)) for shard in names]
    chosen = choose(counts, 12)
    assert sum(map(len, chosen)) == 12
    assert all(0 <= place < count for places, count in zip(chosen, counts, strict=True) for place in places)
    assert chosen == choose(counts, 12)
    assert [len(places) for places in choose(counts, 10**6)] == counts

    seen = {(shard, place) for shard, places in zip(names, chosen, strict=True) for place in places}
    inside = next((shard, place) for shard, place in seen)
    outside = next(
        (shard, place) for shard, count in zip(names, counts, strict=True) for place in range(count) if (shard, place) not in seen
    )
    for (shard, place), found in ((outside, False), (inside, True)):
        path = copy / "shards" / f"{shard}.tar"
        data = path.read_bytes()
        row = read_shard(copy, shard)[place].row
        changed = bytearray(data)
        changed[row["json"]["offset"]] = 0
        path.write_bytes(changed)
        verified = look(copy, 12)
        assert {finding.key for finding in verified.findings} == ({row["key"]} if found else set())
        assert (verified.samples, verified.of_samples) == (12, sum(counts))
        assert "a quick look at 12 of" in summary(verified, 12)
        path.write_bytes(data[:-512])
        assert [finding.shard for finding in look(copy, 12).findings][:1] == [shard], "a size is looked at"
        path.write_bytes(data)


def test_no_more_than_a_page_is_said_of_one_shard(copy):
    samples = read_shard(copy, SHARD)
    for sample in samples:
        sample.change_json(photo_sha256="0", label="/m/x")
    write_shard(copy, SHARD, samples)
    verified = look(copy)
    assert len(verified.findings) == SHOWN
    lines = list(told(verified))
    assert lines[-1] == f"{SHARD}: and {2 * len(samples) - SHOWN} more"
    assert len(lines) == SHOWN + 1


def test_repair_and_the_next_build_make_every_byte_as_it_was(dataset, copy, photos):
    before = {path.name: path.read_bytes() for path in (dataset / "shards").iterdir()}
    flipped = copy / "shards" / f"{SHARD}.tar"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    samples = read_shard(copy, VALIDATION)
    samples[0].members["latent.npy"] = encode_array(decode_array(samples[0].members["latent.npy"]) * np.float16(np.nan))
    write_shard(copy, VALIDATION, samples)
    done = run_verify(copy, "--repair")
    assert done.returncode == 1
    assert f"{SHARD}: its commit record was removed" in done.stdout
    assert f"{VALIDATION}, sample {samples[0].row['key']}: a latent is not finite" in done.stdout
    assert "pipelines/build.py" in done.stdout
    left = {path.name for path in (copy / "shards").iterdir()}
    assert before.keys() - left == {f"{SHARD}.json", f"{VALIDATION}.json"}
    again = run_verify(copy)
    assert (again.returncode, again.stdout) == (2, "")
    assert "the build in this folder is not finished" in again.stderr
    run_build(*build_options(photos, copy))
    assert {path.name: path.read_bytes() for path in (copy / "shards").iterdir()} == before
    assert problems(copy) == []


def test_where_no_dataset_is_the_status_says_so(tmp_path, copy):
    done = run_verify(tmp_path / "nowhere")
    assert done.returncode == 2
    assert "no dataset here" in done.stderr
    content = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**content, "format_version": 1}))
    with pytest.raises(InputError, match="format version 1"):
        look(copy)


def test_a_dataset_whose_shards_are_elsewhere_is_not_called_damaged(copy):
    _change_json("dataset.json", lambda info: info["settings"].update(upload="s3://bucket/dataset"))(copy)
    assert problems(copy) == [], "a copy of such a dataset is one like any other"
    shutil.rmtree(copy / "shards")
    with pytest.raises(InputError, match="the shards of this dataset are at s3://bucket/dataset"):
        look(copy)


def test_a_copy_of_what_lies_behind_a_url_is_not_repaired(copy):
    """The build would not look at it: what is there is whole, and what was taken away here is lost."""
    _change_json("dataset.json", lambda info: info["settings"].update(upload="s3://bucket/dataset"))(copy)
    (copy / "shards" / f"{SHARD}.tar").write_bytes(b"")
    done = run_verify(copy, "--repair")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "--verify-existing" in done.stderr
    assert (copy / "dataset.json").exists()
    assert (copy / "shards" / f"{SHARD}.json").exists()
    done = run_verify(copy, "--sample", "1")
    assert done.returncode == 1
    assert "--verify-existing" in done.stdout.splitlines()[-1]
    assert "--repair" not in done.stdout


def test_a_dataset_without_its_shards_is_repaired(copy):
    shutil.rmtree(copy / "shards")
    done = run_verify(copy, "--repair")
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 0), done.stderr
    assert f"{SHARD}: its commit record was removed" in done.stdout
    assert not (copy / "dataset.json").exists()


def test_nothing_is_repaired_while_a_build_is_at_work(copy):
    (copy / "shards" / f"{SHARD}.tar").write_bytes(b"")
    with lock_folder(copy, "taken"):
        done = run_verify(copy, "--repair", "--sample", "1")
    assert done.returncode == 2
    assert "a build is at work in this folder" in done.stderr
    assert (copy / "dataset.json").exists()
    assert (copy / "shards" / f"{SHARD}.json").exists()


def test_expectations_come_from_dataset_json(dataset):
    info = read_dataset(dataset)
    right = Expected("", frozenset(), 128, 2, (8, 16, 16), 20, (224, 128), "antialiased", ("validation",))
    assert replace(expected_of(info, frozenset()), fingerprint="") == right
    assert pc.count_distinct(pq.read_table(dataset / "index.parquet")["key"]).as_py() == info.books.samples
