"""Planning: cutting objects into shards, what a plan says it will cost, and the command that says so."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError, run_program
from pbe_core.images.crop import Rectangle
from pbe_core.photo_files import photo_keys
from pbe_core.settings import preset
from pipelines import plan
from pipelines.config import BuildSettings
from pipelines.dataset import estimate as estimates
from pipelines.dataset import plan_shards
from pipelines.dataset.estimate import UNKNOWN_PHOTO_SIZE, Estimate, _reference_pixels, encoder_times, estimate, latent_layout
from pipelines.dataset.plan_shards import Plan, plan_samples, write_plan, writing_plan
from pipelines.dataset.write_plan import read_selection, select_and_plan
from pipelines.geometry import reference_size, reference_window
from pipelines.selection.objects import Selection
from schemas.tables import OBJECTS, PHOTO_STATUS, PLAN
from tests.coco_files import annotation, write
from tests.conftest import build_options, settings_of


def objects(split: str, count: int) -> pa.Table:
    known = {"label": "/m/1", "label_name": "Disc", "area_share": 0.1, **dict.fromkeys(("x_min", "x_max", "y_min", "y_max"), 0.5)}
    flags = dict.fromkeys(("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside"), 0)
    rows = [{"split": split, "photo_id": f"{n // 2}", "object_id": f"{split}-{n}", **known, **flags} for n in range(count)]
    return pa.Table.from_pylist(rows, schema=OBJECTS)


@settings(deadline=None)
@given(st.integers(0, 23), st.integers(0, 23), st.integers(1, 3), st.integers(1, 9), st.integers(1, 8))
def test_samples_are_cut_into_full_shards_whatever_the_parts(first, second, views, samples, part):
    table = pa.concat_tables([objects("train", first), objects("validation", second)])
    parts = [table.slice(start, part) for start in range(0, len(table), part)]
    shards = list(plan_samples(parts, views, samples))
    rows = [row for shard in shards for row in shard.to_pylist()]
    assert all(shard.schema.equals(PLAN) for shard in shards)
    assert [row["key"] for row in rows] == [f"{name}_{view}" for name in table["object_id"].to_pylist() for view in range(views)]
    for split, count in (("train", first * views), ("validation", second * views)):
        own = [shard for shard in shards if shard["split"][0].as_py() == split]
        assert [shard["shard"][0].as_py() for shard in own] == [f"{split}-{number:06d}" for number in range(-(-count // samples))]
        assert [len(shard) for shard in own] == [min(samples, count - start) for start in range(0, count, samples)]
        assert all(shard["position"].to_pylist() == list(range(len(shard))) for shard in own)


def call_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", ["plan.py", "--config", str(preset("tiny")), *options])
    with pytest.raises(SystemExit) as caught:
        run_program(plan.main)
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


def test_a_plan_needs_no_photo_and_no_weights_and_a_build_goes_on_from_it(photos, dataset, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    tables = tmp_path / "tables"
    shutil.copytree(photos, tables, ignore=shutil.ignore_patterns("*.jpg"))
    missing = ["--latents.vae", "CompVis/stable-diffusion-v1-4", "--source.photos", str(tmp_path / "none")]
    status, said, err = call_plan(capsys, monkeypatch, *build_options(tables, out), *missing)
    assert (status, err) == (0, "")
    books = read_dataset(dataset).books
    for count in (books.boxes, books.objects, books.planned, *books.rejects.values()):
        assert f"{count:,}" in said
    for name in ("objects", "rejects", "plan"):
        assert (out / f"{name}.parquet").read_bytes() == (dataset / f"{name}.parquet").read_bytes(), name
    assert (out / "report.html").is_file()
    assert not (out / "plan.json").exists()
    stamp = (out / "objects.parquet").stat().st_mtime_ns
    select_and_plan(settings_of(tables, out))
    assert (out / "objects.parquet").stat().st_mtime_ns == stamp, "tables that fit are taken as they are"
    select_and_plan(settings_of(tables, out, "--selection.min_area", "0.05"))
    assert (out / "objects.parquet").stat().st_mtime_ns != stamp, "and made anew for other settings"


def test_what_the_plan_said_is_near_what_came(dataset, photos, capsys, monkeypatch):
    """Arrays to the byte: latent.npy and masked.npy with header and padding, as they lie in the tars."""
    said = json.loads((dataset / "estimate.json").read_text())
    info = read_dataset(dataset)
    shards = sum(len(split.shards) for split in info.splits.values())
    counts = {"samples": info.books.samples, "shards": shards, "pictures": 3 * info.books.samples, "latent": [4, 8]}
    assert {name: said[name] for name in counts} == counts
    came = sum(split.bytes for split in info.splits.values())
    # The rates of JPEGs come from photos of 512 px and more; these drawn ones have 128.
    assert 0.6 < said["bytes_on_disk"] / came < 1.6
    row = pq.read_table(dataset / "index.parquet").to_pylist()[0]
    for name in ("latent_npy", "masked_npy"):
        assert said["bytes_per_sample"][name.replace("_", ".")] == 512 + -(-row[name]["length"] // 512) * 512, name
    estimates.print_comparison(Estimate(**{**said, "latent": (4, 8), "encoder": []}), info)
    assert "100.0%" in capsys.readouterr().out


def test_only_what_is_downloaded_is_called_a_download(dataset, photos, tmp_path):
    """Photos that are here, in a folder, in a store or in tars, cost nothing."""
    selection = read_selection(dataset)
    everything = selection.photos_with_objects
    store = tmp_path / "store"
    store.mkdir()
    (store / "store.json").write_text("{}")
    objects = pq.read_table(dataset / "objects.parquet", columns=["split", "photo_id"])
    there = np.unique(photo_keys(objects))[:7]
    status = {field.name: pa.nulls(len(there), field.type) for field in PHOTO_STATUS} | {"key": pa.array(there)}
    nullable = pa.schema(field.with_nullable(True) for field in PHOTO_STATUS)
    pq.write_table(pa.table(status, schema=nullable), store / "status.parquet")
    for place, sources, expected in (
        (photos, [], 0),
        (tmp_path / "none", [], everything),
        (tmp_path / "none", [str(photos)], 0),
        (tmp_path / "none", [str(photos), "{url}"], everything),
        (store, ["s3://bucket/{split}/{image_id}.jpg"], everything - 7),
    ):
        options = ["--source.photos", str(place), "--crawl.sources", json.dumps(sources)]
        said = estimate(settings_of(photos, dataset, *options), selection)
        assert said.photos_to_fetch == expected, options
        assert (said.download is None) == (expected == 0), options


@pytest.mark.parametrize(("side", "max_side"), [(30, 448), (224, 40), (224, 448)])
def test_references_are_estimated_as_they_are_cut(dataset, photos, side, max_side):
    """Whichever of their sides is what they are shrunk by."""
    settings = settings_of(photos, dataset)
    asked = settings.references.model_copy(update={"side": side, "max_side": max_side})
    said = _reference_pixels(settings.model_copy(update={"references": asked}))
    pixels = []
    for row in pq.read_table(dataset / "objects.parquet").to_pylist():
        width, height = row["width"] or UNKNOWN_PHOTO_SIZE[0], row["height"] or UNKNOWN_PHOTO_SIZE[1]
        box = Rectangle(row["x_min"] * width, row["y_min"] * height, row["x_max"] * width, row["y_max"] * height)
        x_min, y_min, x_max, y_max = reference_window(box, width, height, asked.padding)
        pixels.append(math.prod(reference_size(x_max - x_min, y_max - y_min, side, max_side)))
    assert said == pytest.approx(np.mean(pixels), rel=0.1)
    assert _reference_pixels(settings_of(photos, dataset, "--references.resize", "published")) == 224**2


def test_encoder_times_scale_with_pictures_and_px(tmp_path, monkeypatch):
    known = (
        ("measured", "A", "stable-diffusion-v1", "fp32", 10),
        ("computed", "A", "stable-diffusion-v1", "fp32", 99),
        ("computed", "B", "stable-diffusion-v1", "fp32", 40),
        ("measured", "C", "stable-diffusion-v1", "bf16", 70),
        ("measured", "D", "some/other", "fp32", 70),
    )
    names = ("kind", "device", "vae", "precision", "pictures_per_second")
    rows = [{**dict(zip(names, row, strict=True)), "size_px": 512} for row in known]
    (tmp_path / "encoder_rates.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(estimates, "RATES", tmp_path)
    found = {time.device: (time.hours, time.kind) for time in encoder_times(36_000, "stable-diffusion-v1", "fp32", 512)}
    assert found == {"B": (0.25, "computed"), "A": (1.0, "measured")}
    half = {time.device: time.hours for time in encoder_times(36_000, "stable-diffusion-v1", "fp32", 256)}
    assert half["A"] == pytest.approx(0.25)


def test_the_tables_of_rates_are_there_and_a_missing_one_is_named(tmp_path, monkeypatch):
    assert len({time.device for time in encoder_times(1000, "stable-diffusion-v1", "bf16", 512)}) >= 3
    monkeypatch.setattr(estimates, "RATES", tmp_path)
    with pytest.raises(InputError, match=r"encoder_rates\.json: .*python -m benchmarks\.encoder_rate"):
        encoder_times(1000, "stable-diffusion-v1", "bf16", 512)


def test_a_vae_is_known_by_its_config(tmp_path):
    assert latent_layout("CompVis/stable-diffusion-v1-4") == (4, 8, 8, "stable-diffusion-v1")
    assert latent_layout("tiny_world/weights/vae") == (4, 8, 8, "tiny_world/weights/vae")
    (tmp_path / "vae").mkdir()
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({"latent_channels": 16, "block_out_channels": [8, 16]}))
    assert latent_layout(str(tmp_path)) == (16, 32, 2, str(tmp_path))
    config.write_text(json.dumps({"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}))
    assert latent_layout(str(tmp_path)).vae == "stable-diffusion-v1"
    config.write_text("{}")
    with pytest.raises(InputError, match="not the config of an AutoencoderKL"):
        latent_layout(str(tmp_path))


@pytest.mark.parametrize("rows_per_group", [1, 12, 10_000])
def test_a_plan_is_read_shard_by_shard(tmp_path, monkeypatch, rows_per_group):
    """However many shards share a row group."""
    monkeypatch.setattr(plan_shards, "ROWS_PER_GROUP", rows_per_group)
    path, table = tmp_path / "plan.parquet", pa.concat_tables([objects("train", 23), objects("validation", 9)])
    pq.write_table(table, tmp_path / "objects.parquet")
    write_plan(tmp_path / "objects.parquet", path, 2, 5)
    plan, whole = Plan(path), pq.read_table(path)
    assert plan.shards == {name: 5 if name != "train-000009" else 1 for name in plan.shards} | {"validation-000003": 3}
    assert [shard for shard, rows in plan.tables(["key"]) for _ in range(len(rows))] == whole["shard"].to_pylist()
    assert [row.key for shard in plan.shards for row in plan.rows(shard)] == whole["key"].to_pylist()
    assert {row.split for row in plan.rows("validation-000001")} == {"validation"}
    assert pq.read_metadata(path).num_row_groups == {1: 14, 12: 5, 10_000: 1}[rows_per_group]


def test_the_footer_of_a_plan_stays_small(tmp_path):
    """Every packing actor reads it: 5 MB at the 7,309 shards of Open Images."""
    (shard,) = plan_samples([objects("train", 1000)], 1, 1000)
    with writing_plan(tmp_path / "plan.parquet") as add:
        for number in range(50):
            add(shard.set_column(0, PLAN.field("shard"), pa.repeat(f"train-{number:06d}", 1000)))
    assert len(Plan(tmp_path / "plan.parquet").shards) == 50
    assert pq.read_metadata(tmp_path / "plan.parquet").serialized_size / 50 * 7309 < 5e6


def test_a_plan_of_another_version_is_one_line(tmp_path):
    pq.write_table(PLAN.empty_table(), tmp_path / "plan.parquet")
    with pytest.raises(InputError, match=r"plan\.parquet: .*remove selection\.json"):
        Plan(tmp_path / "plan.parquet")


def test_no_selection_is_an_error_that_names_the_folder(tmp_path: Path):
    with pytest.raises(InputError, match=r"selection\.json: no selection here; run"):
        read_selection(tmp_path)


def test_tables_of_a_packed_folder_are_not_made_anew_for_other_rules(dataset, photos, tmp_path):
    """Also where the tables' own record is gone: the plan of the shards tells."""
    out = tmp_path / "out"
    shutil.copytree(dataset, out, ignore=shutil.ignore_patterns("shards"))
    before = (out / "objects.parquet").read_bytes()
    for left in (True, False):
        if not left:
            (out / "selection.json").unlink()
        with pytest.raises(InputError, match=r"plan\.json: this folder was planned .*selection\.min_area: 0\.02 -> 0\.05"):
            select_and_plan(settings_of(photos, out, "--selection.min_area", "0.05"))
        assert (out / "objects.parquet").read_bytes() == before
    selection, _ = select_and_plan(settings_of(photos, out, "--selection.all_reasons", "true"))
    assert selection.objects == read_dataset(out).books.objects
    assert (out / "objects.parquet").read_bytes() == before
    assert pq.read_table(out / "rejects.parquet")["reasons"].null_count == 0


def test_what_outlines_are_asked_of_is_a_part_of_the_tables(photos, tmp_path):
    """selection.min_object_share looks at two settings of references; the others change no table."""
    out = tmp_path / "out"
    instances = write(tmp_path / "instances.json", [annotation(1)])
    source = ["--source.kind", "coco", "--source.annotations", str(instances)]
    select_and_plan(settings_of(photos, out, *source))
    stamp = (out / "objects.parquet").stat().st_mtime_ns
    select_and_plan(settings_of(photos, out, *source, "--references.side", "100"))
    assert (out / "objects.parquet").stat().st_mtime_ns == stamp
    for option in (("background", "grey"), ("padding", "4")):
        select_and_plan(settings_of(photos, out, *source, f"--references.{option[0]}", option[1]))
        assert (out / "objects.parquet").stat().st_mtime_ns != stamp
        stamp = (out / "objects.parquet").stat().st_mtime_ns


def test_an_input_that_is_gone_is_a_difference_too(photos, dataset, tmp_path):
    """Fewer files would plan fewer boxes: a packed folder must not be planned anew for them."""
    tables, out = tmp_path / "tables", tmp_path / "out"
    shutil.copytree(photos, tables, ignore=shutil.ignore_patterns("*.jpg"))
    shutil.copytree(dataset, out, ignore=shutil.ignore_patterns("shards"))
    before = (out / "objects.parquet").read_bytes()
    (tables / "class-descriptions-boxable.csv").unlink()
    with pytest.raises(InputError, match=r"inputs\.class-descriptions-boxable\.csv: .* -> null"):
        select_and_plan(settings_of(tables, out))
    assert (out / "objects.parquet").read_bytes() == before


def test_tables_that_are_gone_or_cut_are_made_again(photos, dataset, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(dataset, out, ignore=shutil.ignore_patterns("shards"))
    (out / "objects.parquet").unlink()
    (out / "plan.parquet").write_bytes((dataset / "plan.parquet").read_bytes()[:-10])
    select_and_plan(settings_of(photos, out))
    for name in ("objects", "rejects", "plan"):
        assert (out / f"{name}.parquet").read_bytes() == (dataset / f"{name}.parquet").read_bytes(), name
    for text in ("[]", "{}", "{"):
        (out / "selection.json").write_text(text)
        with pytest.raises(InputError, match=r"selection\.json: damaged"):
            select_and_plan(settings_of(photos, out))


def test_a_plan_with_other_packing_settings_leaves_a_packed_folder_alone(photos, dataset, capsys, monkeypatch):
    before = (dataset / "estimate.json").read_bytes()
    status, _, err = call_plan(capsys, monkeypatch, *build_options(photos, dataset), "--masks.per_view", "9")
    assert status == 2
    assert "settings.masks.per_view: 2 -> 9" in err
    assert (dataset / "estimate.json").read_bytes() == before


def test_class_names_are_text_and_no_markup(capsys, monkeypatch):
    monkeypatch.setattr(estimates, "_CONSOLE", Console(file=None, width=120))
    estimates.print_selection(Selection(boxes=2, objects=2, objects_by_class={"train": {"[/red]": 1, "[red]x": 1}}))
    said = capsys.readouterr().out
    assert "[/red]" in said
    assert "[red]x" in said


def test_own_boxes_in_px_are_planned_anew_when_a_photo_comes(tmp_path):
    """Their fractions depend on the photos' sizes, which no annotation file tells."""
    photos, late = tmp_path / "photos", tmp_path / "b.jpg"
    photos.mkdir()
    for path in (photos / "a.jpg", late):
        Image.new("RGB", (200, 100)).save(path)
    rows = ["photo,x_min,y_min,x_max,y_max", "a.jpg,20,20,120,80", "b.jpg,20,20,120,80", "b.jpg,20,20,320,80", "b.jpg,20,20,5,80"]
    (tmp_path / "boxes.csv").write_text("\n".join(rows) + "\n")
    source = {"kind": "boxes", "unit": "pixel", "validation_share": 0, "annotations": tmp_path / "boxes.csv", "photos": photos}
    settings_now = BuildSettings(out=tmp_path / "out", source=source)
    assert select_and_plan(settings_now)[0].rejects == {"unknown_photo": 3}
    late.rename(photos / "b.jpg")
    selection, _ = select_and_plan(settings_now)
    assert (selection.objects, selection.rejects) == (2, {"outside_photo": 1, "empty_box": 1})
    assert selection.examples["outside_photo"] == ["boxes.csv, line 4, column x_max: 320, and the photo is 200 px wide"]
    assert selection.notes == ["validation has no object: nothing to judge a model by"]


def test_out_must_be_a_folder(photos, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match=r"out: cannot be a folder .*--out"):
        select_and_plan(settings_of(photos, tmp_path / "out"))


def test_a_view_that_the_vae_cannot_encode_is_refused_by_the_plan(photos, tmp_path, capsys, monkeypatch):
    status, _, err = call_plan(capsys, monkeypatch, *build_options(photos, tmp_path / "out"), "--views.size", "100")
    assert status == 2
    assert "views.size 100 is no multiple" in err
