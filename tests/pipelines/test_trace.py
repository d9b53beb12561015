"""Tracing a sample back to its box and photo: what is told, what is shown, and what is said of names that mean no sample."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from pbe_core.dataset_reader import find_places, read_dataset, read_sample, take_rows
from pbe_core.errors import InputError, run_program
from pbe_core.images.decode import decode_photo
from pbe_core.images.sheets import PINK
from pbe_core.sample_codec import Sample
from pbe_core.settings import REPOSITORY
from pipelines import inspect_dataset
from pipelines.dataset.samples import encode_segmentation
from pipelines.dataset.write_plan import select_and_plan
from pipelines.inspection import trace
from pipelines.inspection.sample_pictures import decode_means, load_recorded_vae, reference_with_outline, trace_sheet
from pipelines.selection.objects import rejected_boxes
from schemas.dataset import DatasetInfo
from schemas.tables import COORDINATES, FAILURES, INDEX
from tests.conftest import VAE, settings_of

TABLES = ("index", "objects", "rejects", "failures", "plan")


@pytest.fixture(scope="module")
def index(dataset) -> list[dict]:
    return pq.read_table(dataset / "index.parquet").to_pylist()


@pytest.fixture(scope="module")
def info(dataset) -> DatasetInfo:
    return read_dataset(dataset)


@pytest.fixture(scope="module")
def kept(dataset, index) -> Sample:
    """A sample of validation, which keeps its view."""
    return read_sample(dataset, next(row for row in index if row["split"] == "validation"))


@pytest.fixture
def tables(dataset, tmp_path) -> Path:
    """The dataset's tables, to be changed; no shards."""
    for name in TABLES:
        shutil.copy(dataset / f"{name}.parquet", tmp_path)
    shutil.copy(dataset / "dataset.json", tmp_path)
    return tmp_path


def call(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit status, what it printed, what it said on stderr."""
    monkeypatch.setattr(sys, "argv", ["inspect_dataset.py", "trace", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        run_program(inspect_dataset.main)
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


def test_rows_are_found_and_taken_by_place_across_row_groups(tmp_path):
    path = tmp_path / "table.parquet"
    names = [f"{number % 7}-{number}" for number in range(1000)]
    pq.write_table(pa.table({"name": [*names[:-1], None], "number": range(1000)}), path, row_group_size=64)
    found = find_places(path, "name", lambda values: pc.starts_with(values, "3-"), 1000)
    assert found == {place: name for place, name in enumerate(names[:-1]) if name.startswith("3-")}
    assert list(find_places(path, "name", lambda values: pc.starts_with(values, "3-"), 5)) == list(found)[:5]
    assert take_rows(path, [700, 3, 64, 63, 999]) == [
        {"name": None if place == 999 else names[place], "number": place} for place in (3, 63, 64, 700, 999)
    ]
    assert take_rows(path, [64], ["number"]) == [{"number": 64}]
    assert take_rows(path, []) == []
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"table.parquet: cannot be read"):
        take_rows(path, [0])


def test_a_key_its_beginning_and_an_object_mean_the_sample(dataset, index):
    for row in index[::17]:
        key = row["key"]
        for name in (key, row["object_id"], key[:-4]):
            assert trace.find_sample(dataset, name) == (row, [])


def test_of_several_views_the_exact_one_or_the_first_is_meant(tables):
    """`x_1` is the beginning of `x_10`, and an object's id that of all its views."""
    table = pq.read_table(tables / "index.parquet")
    first = table.slice(0, 1).to_pylist()[0]
    views = [{**first, "key": f"{first['object_id']}_{view}"} for view in (10, 2, 0, 1)]
    pq.write_table(pa.concat_tables([table.slice(1), pa.Table.from_pylist(views, table.schema)]), tables / "index.parquet")
    key, object_id = first["key"], first["object_id"]
    assert trace.find_sample(tables, f"{object_id}_1")[0]["key"] == f"{object_id}_1"
    row, others = trace.find_sample(tables, object_id)
    assert (row["key"], others) == (key, [f"{object_id}_{view}" for view in (1, 2, 10)])
    assert trace.find_sample(tables, f"{object_id}_")[0]["key"] == key


def test_a_beginning_of_several_objects_is_refused_with_some_of_them(dataset, index):
    beginning = index[0]["key"][0]
    alike = [row["key"] for row in index if row["key"].startswith(beginning)]
    assert len(alike) > 1
    with pytest.raises(InputError, match=rf"{len(alike)} keys begin with `{beginning}` \({alike[0]}, .*give more of the key"):
        trace.find_sample(dataset, beginning)


def test_an_unknown_key_is_told_with_the_nearest(dataset, index):
    key = index[5]["key"]
    for wrong in (f"{key[:-5]}{'0' if key[-5] != '0' else '1'}{key[-4:]}", key.replace("-", "_", 1), f"x{key[1:]}"):
        with pytest.raises(InputError, match="no sample has a key that begins with") as caught:
            trace.find_sample(dataset, wrong)
        assert key in str(caught.value)
    with pytest.raises(InputError, match=f"a key looks like {index[0]['key']}"):
        trace.find_sample(dataset, "zzzzzz")
    with pytest.raises(InputError, match="KEY is empty"):
        trace.find_sample(dataset, "")


def test_a_sample_that_failed_is_told_with_the_reason(tables, index):
    lost = index[3]
    table = pq.read_table(tables / "index.parquet")
    pq.write_table(table.filter(pc.not_equal(table["key"], lost["key"])), tables / "index.parquet")
    failure = {name: lost.get(name, "x") for name in FAILURES.names} | {"code": "decode_error", "detail": "cut\nshort"}
    pq.write_table(pa.Table.from_pylist([failure], FAILURES), tables / "failures.parquet")
    for name in (lost["key"], lost["object_id"]):
        with pytest.raises(InputError) as caught:
            trace.find_sample(tables, name)
        message = str(caught.value)
        assert f"{lost['key']} was planned, but could not be made: decode_error, the pixels cannot be decoded" in message
        assert "(cut short)" in message
        assert "\n" not in message


@pytest.fixture(scope="module")
def strict(dataset, photos, tmp_path_factory) -> Path:
    """A folder in which most boxes were rejected, and none became a sample."""
    folder = tmp_path_factory.mktemp("strict")
    select_and_plan(settings_of(photos, folder, "--selection.min_area", "0.15"))
    pq.write_table(INDEX.empty_table(), folder / "index.parquet")
    pq.write_table(FAILURES.empty_table(), folder / "failures.parquet")
    return folder


def test_a_rejected_box_is_told_with_the_rule(strict, photos, tmp_path):
    """The ids of rejected boxes are those that a build with no rules gives them."""
    loose = ["--selection.min_area", "0", "--selection.max_area", "1", "--selection.near_duplicate_iou", "null"]
    select_and_plan(settings_of(photos, tmp_path, *loose, "--selection.reject_flags", "[]"))

    def box(row: dict) -> tuple:
        return tuple(row[name] for name in ("photo_id", "label", *COORDINATES))

    ids = {box(row): row["object_id"] for row in pq.read_table(tmp_path / "objects.parquet").to_pylist()}
    known = [reject for reject in pq.read_table(strict / "rejects.parquet").to_pylist() if box(reject) in ids]
    assert len(known) > 20
    for reject in known[:20]:
        object_id = ids[box(reject)]
        for name in (object_id, f"{object_id}_0", object_id[:-3]):
            found = rejected_boxes(strict / "rejects.parquet", name)
            assert [(row["row"], row["file"], row["reason"]) for row in found] == [
                (reject["row"], reject["file"], reject["reason"])
            ]
        with pytest.raises(InputError, match=f"the box {object_id} was rejected: {reject['reason']}, ") as caught:
            trace.find_sample(strict, f"{object_id}_0")
        assert f"(row {reject['row']} of {reject['file']})" in str(caught.value)


def test_a_photo_whose_boxes_were_all_rejected_is_told_with_the_rules(strict):
    by_photo: dict[str, list[str]] = {}
    for row in pq.read_table(strict / "rejects.parquet", columns=["photo_id", "reason"]).to_pylist():
        by_photo.setdefault(row["photo_id"], []).append(row["reason"])
    photo, reasons = max(by_photo.items(), key=lambda item: (len(set(item[1])), len(item[1])))
    assert len(reasons) > 1
    with pytest.raises(InputError, match=rf"{len(reasons)} such boxes were rejected \(") as caught:
        trace.find_sample(strict, photo)
    assert all(f"{reason} {reasons.count(reason)}" in str(caught.value) for reason in reasons)


def test_what_is_printed_is_what_lies_there(dataset, photos, index, capsys, monkeypatch):
    row = index[-1]
    status, printed, said = call(capsys, monkeypatch, row["key"], dataset)
    assert (status, said) == (0, "")
    record = json.loads(_bytes(dataset, row, "json"))
    found = next(each for each in pq.read_table(dataset / "objects.parquet").to_pylist() if each["object_id"] == row["object_id"])
    file = photos / record["split"] / f"{record['photo_id']}.jpg"
    lines = [" ".join(line.replace("│", " ").split()) for line in printed.splitlines()]
    for expected in (
        f"sample key {row['key']}",
        f"shard shards/{row['shard']}.tar, position {row['position']}",
        f"label {record['label_name']} ({record['label']})",
        "fractions of the photo " + " ".join(f"{name} {found[name]:.6g}" for name in COORDINATES),
        f"truncated { {1: 'yes', 0: 'no', -1: 'unknown'}[found['is_truncated']] }",
        f"photo id {record['photo_id']}",
        f"URL {record['url']}",
        f"author {record['author']}",
        f"licence {record['licence']}",
        f"SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}",
        f"file in {photos}, the very bytes that the sample was cut from",
        "rotation 0 degrees counterclockwise",
        "window left {}, top {}, side {} px of the photo".format(*record["window"])
        + (", reaches beyond the photo, padded by reflection" if record["padded"] else ""),
        f"latent.npy offset {row['latent_npy']['offset']:,}, {row['latent_npy']['length']:,} bytes",
        f"view.jpg offset {row['view_jpg']['offset']:,}, {row['view_jpg']['length']:,} bytes",
        f"weights' SHA-256 {read_dataset(dataset).vae.sha256}",
    ):
        assert any(line.endswith(expected) for line in lines), expected
    for number, kind in enumerate(record["mask_kinds"]):
        assert any(f"mask {number} {kind}, " in line for line in lines)


def _bytes(dataset: Path, row: dict, member: str) -> bytes:
    data = (dataset / "shards" / f"{row['shard']}.tar").read_bytes()
    place = row[member.replace(".", "_")]
    return data[place["offset"] : place["offset"] + place["length"]]


def test_unknown_flags_and_rotation_stay_unknown(dataset, index, info):
    row = index[0]
    found = trace.read_object(dataset, row["object_id"]) | {"is_occluded": -1, "is_inside": 0, "rotation": None}
    sections = dict(trace.describe(row, [], found, read_sample(dataset, row), info))
    assert sections["box"]["occluded"] == "unknown"
    assert sections["box"]["inside"] == "no"
    assert sections["photo"]["rotation"] == "unknown, not turned"


def test_text_of_strangers_cannot_steer_the_terminal(capsys):
    trace.print_sections([("photo", {"author": "[red]\x1b[2J\nx[/]"})])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"[red]\x1b[2J\nx[/]" in printed


def test_the_picture_shows_all_parts(dataset, photos, index, info, kept):
    """Each part's cell holds what the part holds."""
    photo, about = trace.read_recorded_photo(kept.record, info, photos)
    assert "the very bytes" in about
    vae = load_recorded_vae(info)
    decoded = decode_means(vae, np.concatenate([kept.latent[None], kept.masked]))
    view = decode_photo(kept.view, frame="stored").astype(int)
    assert np.abs(decoded[0] - view).mean() < 20
    for number, mask in enumerate(kept.masks):
        assert np.abs(decoded[1 + number][mask].astype(int) - 127).mean() < 25, "the region is grey"

    picture = trace_sheet(kept, photo, decoded)
    cells = [[_cell(picture, row, column) for column in range(5)] for row in range(1 + len(kept.masks))]
    whole, cut, kept_view, latent, reference = cells[0]
    assert (whole == PINK).all(axis=2).any(), "the box"
    assert np.abs(cut - kept_view).mean() < 8
    assert np.abs(latent - kept_view).mean() < 20
    assert len(np.unique(reference.reshape(-1, 3), axis=0)) > 50
    for mask, row in zip(kept.masks, cells[1:], strict=True):
        assert ((row[0] > 127).all(axis=2).mean() - mask.mean()) ** 2 < 1e-4
        assert (row[3] == 255).all(), "nothing more in this row"

    alone = trace_sheet(kept, None)
    assert alone.shape[1] == 2 * (256 + 6) + 6
    assert np.abs(_cell(alone, 0, 0) - kept_view).mean() < 1


def _cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = 6 + row * (256 + 6 + 36) + 36, 6 + column * (256 + 6)
    return picture[top : top + 256, left : left + 256].astype(int)


def test_the_reference_bears_its_outline_where_it_is_known(kept):
    reference = decode_photo(kept.reference, frame="stored")
    mask = np.zeros(reference.shape[:2], np.uint8)
    cv2.circle(mask, (mask.shape[1] // 2, mask.shape[0] // 2), min(mask.shape) // 3, 1, -1)
    assert np.array_equal(reference_with_outline(kept), reference)
    record = kept.record.model_copy(update={"reference_mask": encode_segmentation(mask.astype(bool))})
    drawn = reference_with_outline(dataclasses.replace(kept, record=record))
    changed = (drawn != reference).any(axis=2)
    edge = cv2.dilate(mask, np.ones((3, 3), np.uint8)) - cv2.erode(mask, np.ones((5, 5), np.uint8))
    assert changed.any()
    assert not changed[edge == 0].any()


def test_another_photo_and_none_are_told_and_not_shown(info, kept, photos, tmp_path):
    record = kept.record
    path = tmp_path / record.split / f"{record.photo_id}.jpg"
    path.parent.mkdir()
    photo, about = trace.read_recorded_photo(record, info, tmp_path)
    assert photo is None
    assert about.startswith("not here (missing: ")
    shutil.copy(next(path for path in (photos / "train").glob("*.jpg") if path.stem != record.photo_id), path)
    photo, about = trace.read_recorded_photo(record, info, tmp_path)
    assert photo is None
    assert hashlib.sha256(path.read_bytes()).hexdigest() in about
    assert "another one" in about
    assert trace.read_recorded_photo(record, info, None)[0] is not None, "the build's own folder is the default"


def test_another_vae_is_told_and_decodes_nothing(dataset, index, kept, tmp_path, capsys, monkeypatch):
    vae = AutoencoderKL.from_pretrained(VAE)
    vae.decoder.conv_in.bias.data += 0.01
    vae.save_pretrained(tmp_path / "vae")
    out = tmp_path / "picture.png"
    status, printed, _ = call(
        capsys, monkeypatch, kept.record.key, dataset, "--out", out, "--vae", tmp_path / "vae", "--photos", tmp_path
    )
    assert status == 0
    assert "shows no decoded latents" in printed
    assert read_dataset(dataset).vae.sha256[:12] in printed
    assert np.array_equal(np.array(Image.open(out)), trace_sheet(kept, None))


def test_the_command_runs_as_readers_start_it(dataset, index, tmp_path):
    """By path: the folder of scripts comes first on Python's path then."""
    command = [sys.executable, str(REPOSITORY / "pipelines" / "inspect_dataset.py"), "trace", index[0]["object_id"], str(dataset)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "new" / "picture.png")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the very weights that made the latents" in done.stdout
    assert Image.open(tmp_path / "new" / "picture.png").size[0] == 4 * (256 + 6) + 6
