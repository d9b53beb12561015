"""Looking at a dataset: contact sheets, and one sample traced back to its box and photo."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from pbe_core.dataset_reader import find_places, read_classes, read_dataset, read_sample, take_rows
from pbe_core.errors import InputError, run_program
from pbe_core.images.decode import decode_photo
from pbe_core.images.sheets import PINK
from pbe_core.sample_codec import Sample
from pbe_core.settings import REPOSITORY
from pipelines import inspect_dataset
from pipelines.dataset.samples import encode_segmentation
from pipelines.dataset.write_plan import select_and_plan
from pipelines.inspection import contact_sheet as pictures
from pipelines.inspection import trace
from schemas.dataset import DatasetInfo
from schemas.tables import COORDINATES, FAILURES, INDEX
from tests.conftest import VAE, settings_of


@pytest.fixture(scope="module")
def index(dataset) -> list[dict]:
    return pq.read_table(dataset / "index.parquet").to_pylist()


@pytest.fixture(scope="module")
def info(dataset, photos) -> DatasetInfo:
    """With the photo folder's whole path, from wherever the build was started."""
    told = read_dataset(dataset)
    return told.model_copy(update={"settings": {**told.settings, "source": {**told.settings["source"], "photos": str(photos)}}})


@pytest.fixture(scope="module")
def kept(dataset, index) -> Sample:
    """A sample of validation, which keeps its view."""
    return read_sample(dataset, next(row for row in index if row["split"] == "validation"))


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory) -> Path:
    vae = AutoencoderKL.from_pretrained(VAE)
    vae.decoder.conv_in.bias.data += 0.01
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def tables(dataset, tmp_path) -> Path:
    """The dataset's tables, to be changed; no shards."""
    for name in ("index", "objects", "rejects", "failures", "plan"):
        shutil.copy(dataset / f"{name}.parquet", tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: exit status, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect_dataset.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_program(inspect_dataset.main)
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def cell(picture: np.ndarray, row: int, column: int, size: int, lines: int = 1, head: int = 18) -> np.ndarray:
    """A picture of a sheet, in cells of so many px, under so many lines of 18 px."""
    top, left = head + 6 + row * (size + 6 + 18 * lines) + 18 * lines, 6 + column * (size + 6)
    return picture[top : top + size, left : left + size].astype(int)


def has_pink(picture: np.ndarray) -> bool:
    return bool((picture == PINK).all(axis=2).any())


def test_without_photos_a_sheet_shows_the_same_samples(dataset, photos):
    """Views come from view.jpg or the latent: nearly those that are cut from the photos; references are the same."""
    with_photos, alone = pictures.contact_sheet(dataset, photos, 8), pictures.contact_sheet(dataset, None, 8)
    assert with_photos.shape == alone.shape
    for row in range(8):
        assert np.array_equal(cell(with_photos, row, 3, 200), cell(alone, row, 3, 200)), "the reference"
        for column in (1, 2):
            assert np.abs(cell(with_photos, row, column, 200) - cell(alone, row, column, 200)).mean() < 20
        assert has_pink(cell(alone, row, 0, 200)), "the box"
    assert not np.array_equal(with_photos, pictures.contact_sheet(dataset, photos, 8, seed=1))


def test_by_class_each_row_is_of_one_class_the_largest_first(dataset, photos, index, monkeypatch):
    """Captions call decoded latents so, since they are softer than their photo; what is cut from the photo needs no word."""
    read, drawn, kept, captions = pictures.read_sample, pictures.sheet, [], []
    monkeypatch.setattr(pictures, "read_sample", lambda folder, row, **how: kept.append(row) or read(folder, row, **how))
    monkeypatch.setattr(pictures, "sheet", lambda *given, **named: captions.append(given[2]) or drawn(*given, **named))
    picture = pictures.class_sheet(dataset, photos, count=3, each=2)
    counts = Counter(row["label"] for row in index)
    largest = sorted(counts, key=lambda label: (-counts[label], label))
    assert [row["label"] for row in kept] == [label for label in largest[:3] for _ in range(2)]
    assert len({row["key"] for row in kept}) == 6
    assert picture.shape[:2] == (18 + 3 * (160 + 6 + 18) + 6, 4 * (160 + 6) + 6)
    assert all(has_pink(cell(picture, row, column, 160)) for row in range(3) for column in (0, 2))

    pictures.class_sheet(dataset, None, count=20, each=6)
    pictures.contact_sheet(dataset, None, 4)
    with_photos, by_class, at_random = captions
    for caption, label in zip(by_class, largest, strict=True):
        own = {row["view_jpg"] is None for row in index if row["label"] == label}
        # Otherwise not all are shown.
        assert counts[label] > 6 or ("decoded latent" in caption, "view.jpg" in caption) == (True in own, False in own)
    assert not any("latent" in caption or "view.jpg" in caption for caption in with_photos)
    assert all(("decoded latent" in caption) != ("view.jpg" in caption) for caption in at_random)


def test_classes_are_found_by_name_and_id_and_show_the_same_samples_whatever_else_is_shown(dataset):
    classes = read_classes(dataset)
    for place, (label, name) in enumerate(zip(classes.labels, classes.names, strict=True)):
        assert pictures.find_classes(dataset, classes, [label, f" {name.upper()} "]) == [place]
    with pytest.raises(InputError, match=rf"`{classes.names[0]}s` \(did you mean {classes.names[0]}"):
        pictures.find_classes(dataset, classes, [f"{classes.names[0]}s"])
    first, second = (classes.names[place] for place in classes.by_frequency()[:2])
    both = pictures.class_sheet(dataset, labels=[first, second], each=3)
    one = pictures.class_sheet(dataset, labels=[second], each=3)
    assert all(np.array_equal(cell(both, 1, column, 160), cell(one, 0, column, 160)) for column in range(6))


def test_the_command_writes_what_the_functions_draw(dataset, photos, tables, tmp_path, command):
    assert command("report", tables)[:2] == (0, f"{tables / 'report.html'}\n")
    assert (tables / "report.json").is_file()
    name = read_classes(dataset).names[0]
    out = tmp_path / "sheet.png"
    for options, expected in (
        (["--photos", photos, "--count", 2], pictures.contact_sheet(dataset, photos, 2)),
        (["--count", 2, "--seed", 3], pictures.contact_sheet(dataset, None, 2, seed=3)),
        (["--by", "class", "--count", 2, "--each", 1], pictures.class_sheet(dataset, count=2, each=1)),
        (["--labels", name], pictures.class_sheet(dataset, labels=[name])),
    ):
        assert command("preview", dataset, "--out", out, *options)[:2] == (0, f"{out}\n")
        assert np.array_equal(np.array(Image.open(out)), expected)
    assert command("preview", dataset, "--out", out, "--count", 0)[::2] == (2, "error: --count 0, --each 4: must be 1 or more\n")
    status, _, said = command("preview", dataset, "--out", out, "--photos", tmp_path)
    assert (status, f"{tmp_path}: photo " in said) == (2, True)


def test_rows_are_found_and_taken_by_place_across_row_groups(tmp_path):
    path = tmp_path / "table.parquet"
    names = [f"{number % 7}-{number}" for number in range(1000)]
    pq.write_table(pa.table({"name": [*names[:-1], None], "number": range(1000)}), path, row_group_size=64)
    found = find_places(path, "name", lambda values: pc.starts_with(values, "3-"), 1000)
    assert found == {place: name for place, name in enumerate(names[:-1]) if name.startswith("3-")}
    assert list(find_places(path, "name", lambda values: pc.starts_with(values, "3-"), 5)) == list(found)[:5]
    taken = [{"name": names[place], "number": place} for place in (3, 63, 64, 700)]
    assert take_rows(path, [700, 3, 64, 63, 999]) == [*taken, {"name": None, "number": 999}]
    assert take_rows(path, [64], ["number"]) == [{"number": 64}]
    assert take_rows(path, []) == []
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"table.parquet: cannot be read"):
        take_rows(path, [0])


def test_a_key_its_beginning_and_an_object_mean_the_sample(tables, index):
    """`x_1` is the beginning of `x_10`, and an object's id that of all its views."""
    for row in index[::17]:
        for name in (row["key"], row["object_id"], row["key"][:-4]):
            assert trace.find_sample(tables, name) == (row, [])
    table = pq.read_table(tables / "index.parquet")
    first = index[0]
    views = [{**first, "key": f"{first['object_id']}_{view}"} for view in (10, 2, 0, 1)]
    pq.write_table(pa.concat_tables([table.slice(1), pa.Table.from_pylist(views, table.schema)]), tables / "index.parquet")
    key, object_id = first["key"], first["object_id"]
    assert trace.find_sample(tables, f"{object_id}_1")[0]["key"] == f"{object_id}_1"
    row, others = trace.find_sample(tables, object_id)
    assert (row["key"], others) == (key, [f"{object_id}_{view}" for view in (1, 2, 10)])
    assert trace.find_sample(tables, f"{object_id}_")[0]["key"] == key


def test_a_name_that_means_no_sample_or_several_is_told_with_the_nearest(dataset, index):
    key = index[5]["key"]
    for wrong in (f"{key[:-5]}{'0' if key[-5] != '0' else '1'}{key[-4:]}", key.replace("-", "_", 1), f"x{key[1:]}"):
        with pytest.raises(InputError, match=f"no sample has a key that begins with.*{key}"):
            trace.find_sample(dataset, wrong)
    alike = [row["key"] for row in index if row["key"].startswith(key[0])]
    for name, words in {
        "zzz": f"looks like {index[0]['key']}",
        "": "empty",
        key[0]: rf"{len(alike)} keys .* \({alike[0]}",
    }.items():
        with pytest.raises(InputError, match=words):
            trace.find_sample(dataset, name)


def test_a_sample_that_failed_is_told_with_the_reason(tables, index):
    lost = index[3]
    table = pq.read_table(tables / "index.parquet")
    pq.write_table(table.filter(pc.not_equal(table["key"], lost["key"])), tables / "index.parquet")
    failure = {name: lost.get(name, "x") for name in FAILURES.names} | {"code": "decode_error", "detail": "cut\nshort"}
    pq.write_table(pa.Table.from_pylist([failure], FAILURES), tables / "failures.parquet")
    for name in (lost["key"], lost["object_id"]):
        with pytest.raises(InputError, match=rf"{lost['key']} was planned, but .* decode_error, .* \(cut short\)"):
            trace.find_sample(tables, name)


def test_rejected_boxes_are_told_with_the_rule(photos, tmp_path):
    """The ids of rejected boxes are those that a build with no rules gives them."""
    strict, loose = tmp_path / "strict", tmp_path / "loose"
    select_and_plan(settings_of(photos, strict, "--selection.min_area", "0.15"))
    for name, schema in (("index", INDEX), ("failures", FAILURES)):
        pq.write_table(schema.empty_table(), strict / f"{name}.parquet")
    no_rules = ["--selection.min_area", "0", "--selection.max_area", "1", "--selection.near_duplicate_iou", "null"]
    select_and_plan(settings_of(photos, loose, *no_rules, "--selection.reject_flags", "[]"))

    def box(row: dict) -> tuple:
        return tuple(row[name] for name in ("photo_id", "label", *COORDINATES))

    ids = {box(row): row["object_id"] for row in pq.read_table(loose / "objects.parquet").to_pylist()}
    rejects = pq.read_table(strict / "rejects.parquet").to_pylist()
    known = [reject for reject in rejects if box(reject) in ids]
    assert len(known) > 20
    for reject in known[:20]:
        object_id = ids[box(reject)]
        for name in (object_id, f"{object_id}_0", object_id[:-3]):
            with pytest.raises(InputError, match=f"the box {object_id} was rejected: {reject['reason']}, ") as caught:
                trace.find_sample(strict, name)
            assert f"(row {reject['row']} of {reject['file']})" in str(caught.value)
    photo = Counter(reject["photo_id"] for reject in rejects).most_common(1)[0][0]
    reasons = Counter(reject["reason"] for reject in rejects if reject["photo_id"] == photo)
    with pytest.raises(InputError, match=rf"{reasons.total()} such boxes were rejected \(") as caught:
        trace.find_sample(strict, photo)
    assert all(f"{reason} {count}" in str(caught.value) for reason, count in reasons.items())


def test_what_is_printed_is_what_lies_there(dataset, photos, index, command, tmp_path, kept, other_vae):
    row = index[-1]
    status, printed, said = command("trace", row["key"], dataset, "--photos", photos)
    assert (status, said) == (0, "")
    data, place = (dataset / "shards" / f"{row['shard']}.tar").read_bytes(), row["json"]
    record = json.loads(data[place["offset"] : place["offset"] + place["length"]])
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
        f"weights' SHA-256 {read_dataset(dataset).vae.sha256}",
    ):
        assert any(line.endswith(expected) for line in lines), expected
    for number, kind in enumerate(record["mask_kinds"]):
        assert any(f"mask {number} {kind}, " in line for line in lines)

    out = tmp_path / "picture.png"
    status, printed, _ = command("trace", kept.record.key, dataset, "--out", out, "--vae", other_vae, "--photos", tmp_path)
    assert (status, "shows no decoded latents" in printed, "not here (missing: " in printed) == (0, True, True)
    assert np.array_equal(np.array(Image.open(out)), pictures.trace_sheet(kept, None))


def test_what_is_unknown_stays_so_and_text_of_strangers_cannot_steer_the_terminal(dataset, index, info, capsys):
    row = index[0]
    found = trace.read_object(dataset, row["object_id"]) | {"is_occluded": -1, "is_inside": 0, "rotation": None}
    sections = trace.describe(row, [], found, read_sample(dataset, row), info)
    assert (sections["box"]["occluded"], sections["box"]["inside"]) == ("unknown", "no")
    assert sections["photo"]["rotation"] == "unknown, not turned"
    trace.print_sections({"photo": {"author": "[red]\x1b[2J\nx[/]"}})
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"[red]\x1b[2J\nx[/]" in printed


def test_the_picture_shows_all_parts(photos, info, kept):
    """Each part's cell holds what the part holds."""
    photo, about = trace.read_recorded_photo(kept.record, info, photos)
    assert "the very bytes" in about
    decoded = pictures.decode_means(pictures.load_recorded_vae(info), np.concatenate([kept.latent[None], kept.masked]))
    for mask, region in zip(kept.masks, decoded[1:], strict=True):
        assert np.abs(region[mask].astype(int) - 127).mean() < 25, "the region is grey"
    picture = pictures.trace_sheet(kept, photo, decoded)
    rows = [[cell(picture, row, column, 256, 2, 0) for column in range(5)] for row in range(1 + len(kept.masks))]
    whole, cut, kept_view, latent, reference = rows[0]
    assert has_pink(whole), "the box"
    assert np.abs(kept_view - cv2.resize(decode_photo(kept.view, frame="stored"), (256, 256))).mean() < 5
    assert np.abs(cut - kept_view).mean() < 8
    assert np.abs(latent - kept_view).mean() < 20
    assert len(np.unique(reference.reshape(-1, 3), axis=0)) > 50
    for mask, region, row in zip(kept.masks, decoded[1:], rows[1:], strict=True):
        assert np.array_equal(row[2], cv2.resize(region, (256, 256), interpolation=cv2.INTER_NEAREST))
        assert ((row[0] > 127).all(axis=2).mean() - mask.mean()) ** 2 < 1e-4
        assert (row[3] == 255).all(), "nothing more in this row"
    alone = pictures.trace_sheet(kept, None)
    assert alone.shape[1] == 2 * (256 + 6) + 6
    assert np.abs(cell(alone, 0, 0, 256, 2, 0) - kept_view).mean() < 1


def test_the_reference_bears_its_outline_where_it_is_known(kept):
    reference = decode_photo(kept.reference, frame="stored")
    mask = np.zeros(reference.shape[:2], np.uint8)
    cv2.circle(mask, (mask.shape[1] // 2, mask.shape[0] // 2), min(mask.shape) // 3, 1, -1)
    assert np.array_equal(pictures.reference_with_outline(kept), reference)
    record = kept.record.model_copy(update={"reference_mask": encode_segmentation(mask.astype(bool))})
    drawn = pictures.reference_with_outline(dataclasses.replace(kept, record=record))
    changed = (drawn != reference).any(axis=2)
    edge = cv2.dilate(mask, np.ones((3, 3), np.uint8)) - cv2.erode(mask, np.ones((5, 5), np.uint8))
    assert changed.any()
    assert not changed[edge == 0].any()


def test_another_photo_and_another_vae_are_told_and_not_shown(dataset, info, kept, photos, tmp_path, other_vae):
    record = kept.record
    path = tmp_path / record.split / f"{record.photo_id}.jpg"
    path.parent.mkdir()
    shutil.copy(next(path for path in (photos / "train").glob("*.jpg") if path.stem != record.photo_id), path)
    photo, about = trace.read_recorded_photo(record, info, tmp_path)
    assert (photo, "another one" in about, hashlib.sha256(path.read_bytes()).hexdigest() in about) == (None, True, True)
    assert trace.read_recorded_photo(record, info, None)[0] is not None, "the build's own folder is the default"
    with pytest.raises(InputError, match=r"those that made the latents [0-9a-f]{12}\.\.\.; give the dataset's VAE with --vae"):
        pictures.contact_sheet(dataset, None, vae=str(other_vae))
    with pytest.raises(InputError, match=r"nowhere: no such folder.*give the dataset's VAE with --vae"):
        pictures.contact_sheet(dataset, None, vae="nowhere")


def test_the_command_runs_as_readers_start_it(tmp_path):
    """By path: the folder of scripts comes first on Python's path then."""
    script = str(REPOSITORY / "pipelines" / "inspect_dataset.py")
    subprocess.run([sys.executable, script, "masks", "--out", "new/masks.png"], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "new" / "masks.png").size == (8 * (128 + 6) + 6, 8 * (128 + 6) + 6)
