"""The whole pipeline, by its command, on a real Ray: what it leaves, that it is reproducible, and what it does about damage."""

import glob
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from pbe_core.dataset_reader import find_imbalance, read_dataset
from pbe_core.errors import InputError, run_program
from pbe_core.files import file_sha256
from pbe_core.images.crop import resize
from pbe_core.images.decode import decode_photo
from pbe_core.sample_codec import decode_sample
from pbe_core.settings import REPOSITORY, preset
from pbe_core.vae import load_vae
from pipelines import build
from pipelines.dataset import pack
from pipelines.dataset.folder import ShardFolder, ShardState, photos_came
from pipelines.dataset.pack import ShardPacker
from pipelines.dataset.plan_shards import Plan, PlanRow, plan_samples
from pipelines.dataset.samples import Failure, prepare_photo, prepare_sample
from pipelines.dataset.write_plan import select_and_plan
from pipelines.geometry import fill_outline
from pipelines.inspection import contact_sheet as preview
from schemas.sample import MEMBER_NAMES
from schemas.tables import FAILURES, INDEX, OBJECTS, PLAN, REJECTS, SHARD_RECORDS
from tests.conftest import VAE, build_options, run_build, settings_of


def hashes(dataset: Path) -> dict[str, str]:
    """SHA-256 of every shard, index part and record."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((dataset / "shards").iterdir())}


def a_row(dataset: Path) -> PlanRow:
    return Plan(dataset / "plan.parquet").rows("train-000000")[0]


def stream(dataset: Path) -> list[dict]:
    """All samples through a plain WebDataset, undecoded."""
    shards = sorted(glob.glob(str(dataset / "shards" / "*.tar")))
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def call_build(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, str]:
    """build.py's main in this process: exit status and stderr."""
    monkeypatch.setattr(sys, "argv", ["build.py", "--config", str(preset("tiny")), *options])
    with pytest.raises(SystemExit) as caught:
        run_program(build.main)
    return int(caught.value.code or 0), capsys.readouterr().err


def test_tables_have_their_schemas_and_the_books_balance(dataset):
    for name, schema in [
        ("objects", OBJECTS), ("rejects", REJECTS), ("plan", PLAN), ("index", INDEX),
        ("shard_records", SHARD_RECORDS), ("failures", FAILURES),
    ]:  # fmt: skip
        assert pq.read_schema(dataset / f"{name}.parquet").equals(schema), name
    info = read_dataset(dataset)
    rows = sum(len(path.read_text().splitlines()) - 1 for path in Path(info.settings["source"]["annotations"]).glob("*-bbox.csv"))
    assert info.books.boxes == rows
    assert find_imbalance(info.books) is None
    assert info.books.objects == len(pq.read_table(dataset / "objects.parquet"))
    assert info.books.samples == len(pq.read_table(dataset / "index.parquet")) == sum(s.samples for s in info.splits.values())
    assert sum(info.books.masks.values()) == 2 * info.books.samples
    assert set(info.splits) == {"train", "validation"}


def test_any_webdataset_reader_streams_valid_samples(dataset):
    samples = stream(dataset)
    assert len(samples) == read_dataset(dataset).books.samples
    keys = [sample["__key__"] for sample in samples]
    assert len(set(keys)) == len(keys)
    for sample in samples:
        members = {name: sample[name] for name in MEMBER_NAMES if name in sample}
        decoded = decode_sample(members, sample["__key__"])
        assert decoded.record.key == sample["__key__"]
        assert ("view.jpg" in sample) == (decoded.record.split == "validation")


def test_the_index_points_at_the_members(dataset):
    table = pq.read_table(dataset / "index.parquet").to_pylist()
    by_shard: dict[str, dict[str, bytes]] = {}
    for row in table:
        shard = dataset / "shards" / f"{row['shard']}.tar"
        if row["shard"] not in by_shard:
            with tarfile.open(shard) as tar:
                by_shard[row["shard"]] = {member.name: tar.extractfile(member).read() for member in tar}
                assert all(member.mtime == 0 and member.uid == 0 for member in tar)
        data = shard.read_bytes()
        for name in MEMBER_NAMES:
            place = row[name.replace(".", "_")]
            content = None if place is None else data[place["offset"] : place["offset"] + place["length"]]
            assert content == by_shard[row["shard"]].pop(f"{row['key']}.{name}", None)
    assert not any(by_shard.values()), "members that the index does not know"


def test_latents_are_those_of_the_view_and_of_the_view_under_each_mask(dataset):
    """Decoded, a view's latent looks like its view; a masked one does so outside its mask and is grey inside."""
    vae = load_vae(VAE)
    kept = [sample for sample in stream(dataset) if "view.jpg" in sample][:8]
    for sample in kept:
        decoded = decode_sample({name: sample[name] for name in MEMBER_NAMES}, "here")
        view = decode_photo(sample["view.jpg"], frame="stored") / 127.5 - 1
        means = np.concatenate([decoded.latent[None, :4], decoded.masked[:, :4]]).astype(np.float32)
        with torch.inference_mode():
            pictures = vae.decode(torch.from_numpy(means)).sample.numpy().transpose(0, 2, 3, 1)
        assert np.abs(pictures[0] - view).mean() < 0.15
        for picture, mask in zip(pictures[1:], decoded.masks, strict=True):
            masked = view * ~mask[..., None]
            assert np.abs(picture - masked).mean() < 0.15
            assert np.abs(picture - masked).mean() < np.abs(picture - view).mean()


def test_masks_are_the_outlines_in_the_record_and_lie_over_the_object(dataset):
    for sample in stream(dataset):
        decoded = decode_sample({name: sample[name] for name in MEMBER_NAMES if name in sample}, "here")
        x_min, y_min, x_max, y_max = decoded.record.box_in_view
        centre = int((y_min + y_max) / 2), int((x_min + x_max) / 2)
        assert decoded.masks[:, centre[0], centre[1]].all()
        outlines = decoded.record.mask_polygons
        assert [len(outline) for outline in outlines] == [4 if kind == "box" else 80 for kind in decoded.record.mask_kinds]
        for kind, outline, mask in zip(decoded.record.mask_kinds, outlines, decoded.masks, strict=True):
            assert np.array_equal(fill_outline(kind, np.array(outline), 128), mask)


def test_references_show_the_box_padded(dataset, photos):
    for sample in stream(dataset)[:20]:
        record = json.loads(sample["json"])
        photo = decode_photo((photos / record["split"] / f"{record['photo_id']}.jpg").read_bytes(), frame="stored")
        height, width = photo.shape[:2]
        x_min, y_min, x_max, y_max = record["reference_window"]
        low, high = np.floor(np.subtract(record["box"][:2], 3)), np.ceil(np.add(record["box"][2:], 3))
        assert (x_min, y_min) == tuple(np.maximum(low, 0))
        assert (x_max, y_max) == tuple(np.minimum(high, (width, height)))
        reference = decode_photo(sample["ref.jpg"], frame="stored")
        assert reference.shape[:2] == (y_max - y_min, x_max - x_min) or max(reference.shape) == 128
        shown = resize(photo[y_min:y_max, x_min:x_max], reference.shape[1], reference.shape[0])
        assert np.abs(reference.astype(int) - shown).mean() < 4


def test_it_runs_from_any_folder_and_as_a_copy(photos, tmp_path):
    """`ray submit` copies build.py alone to the cluster and starts it there, in another folder."""
    script = tmp_path / "build.py"
    shutil.copy(REPOSITORY / "pipelines" / "build.py", script)
    chosen = ["--latents.vae", "tiny_world/weights/vae", "--source.splits", "validation"]
    relative = os.path.relpath(photos, tmp_path)
    folders = ["--source.annotations", relative, "--source.photos", relative, "--out", "out"]
    options = ["--config", "configs/tiny.yaml", *build_options(photos, tmp_path / "out"), *folders, *chosen]
    done = subprocess.run([sys.executable, str(script), *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(read_dataset(tmp_path / "out").splits) == {"validation"}


def test_what_is_lost_or_cut_is_made_again_to_the_same_bytes(dataset, photos, tmp_path):
    """A tar without its record, and a record whose tar was cut, are redone; the rest is not touched."""
    before = hashes(dataset)
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shards = sorted((copy / "shards").glob("*.tar"))
    lost, cut, kept = shards[0], shards[1], shards[2]
    lost.with_suffix(".json").unlink()
    cut.write_bytes(cut.read_bytes()[:-512])
    (copy / "dataset.json").unlink()
    untouched = kept.stat().st_mtime_ns
    run_build(*build_options(photos, copy))
    assert hashes(copy) == before
    assert kept.stat().st_mtime_ns == untouched
    assert read_dataset(copy).books == read_dataset(dataset).books


def test_other_settings_in_the_same_folder_are_refused_with_the_difference(dataset, photos, capsys, monkeypatch):
    before = hashes(dataset)
    status, said = call_build(capsys, monkeypatch, *build_options(photos, dataset), "--masks.per_view", "3")
    assert status == 2
    assert "settings.masks.per_view: 2 -> 3" in said
    assert hashes(dataset) == before


def test_a_bad_photo_costs_its_own_samples_and_nothing_else(dataset, photos, tmp_path):
    """One truncated, one that is text, one gone: each counted under its code, all others packed."""
    broken = tmp_path / "photos"
    shutil.copytree(photos, broken)
    objects = pq.read_table(dataset / "objects.parquet").to_pylist()
    victims = sorted({(row["split"], row["photo_id"]) for row in objects})[:3]
    paths = [broken / split / f"{photo}.jpg" for split, photo in victims]
    paths[0].write_bytes(paths[0].read_bytes()[:-200])
    paths[1].write_bytes(b"<html>404</html>")
    paths[2].unlink()
    settings = settings_of(broken, tmp_path / "out")
    outcomes = []
    for split, photo in sorted({(row["split"], row["photo_id"]) for row in objects}):
        rows = [PlanRow.of({**row, "view": 0, "key": f"{row['object_id']}_0"}) for row in objects if row["photo_id"] == photo]
        outcomes += prepare_photo(rows, settings)
        assert {row.split for row in rows} == {split}
    codes = {outcome.photo_id: outcome.code for outcome in outcomes if isinstance(outcome, Failure)}
    assert codes == dict(zip((photo for _, photo in victims), ["decode_error", "not_an_image", "missing"], strict=True))
    assert len(outcomes) == len(objects)

    done = run_build(*build_options(broken, tmp_path / "out"))
    books = read_dataset(tmp_path / "out").books
    lost = sum(isinstance(outcome, Failure) for outcome in outcomes)
    assert set(books.failures) == {"decode_error", "not_an_image", "missing"}
    assert (books.planned, books.samples) == (len(objects), len(objects) - lost)
    assert "failed: decode_error" in done.stdout
    failures = pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    assert {row["photo_id"] for row in failures} == {photo for _, photo in victims}

    # Photos come, and others of the same shards are gone meanwhile: what was packed stays.
    made = hashes(tmp_path / "out")
    for path in paths:
        path.write_bytes((photos / path.parent.name / path.name).read_bytes())
    packed = {(row["split"], row["photo_id"]) for row in objects} - set(victims)
    gone = [broken / split / f"{photo}.jpg" for split, photo in packed]
    for path in gone:
        path.rename(path.with_suffix(".away"))
    done = run_build(*build_options(broken, tmp_path / "out"))
    assert "photos of samples that are in it cannot be used any more" in done.stderr
    assert hashes(tmp_path / "out") == made
    assert read_dataset(tmp_path / "out").books == books

    for path in gone:
        path.with_suffix(".away").rename(path)
    run_build(*build_options(broken, tmp_path / "out"))
    assert hashes(tmp_path / "out") == hashes(dataset)


def test_a_shard_that_is_whole_is_not_packed_again(photos, dataset, tmp_path):
    """Its worker may have died between its commit record and its answer."""
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    packer = ShardPacker(settings_of(photos, out), read_dataset(out).fingerprint, "cpu")
    record = json.loads((out / "shards" / "train-000000.json").read_text())
    assert packer.pack(0) == ShardState("packed", {name: record[name] for name in SHARD_RECORDS.names})
    assert {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()} == stamps


def test_samples_are_not_given_up_because_their_photos_are_gone(photos, dataset, tmp_path):
    """Neither in a shard that is whole, nor, without being told, in one that is damaged."""
    out, fewer = tmp_path / "out", tmp_path / "photos"
    shutil.copytree(dataset, out)
    shutil.copytree(photos, fewer)
    plan = Plan(out / "plan.parquet").rows("train-000000")
    gone = plan[0].photo_id
    (fewer / "train" / f"{gone}.jpg").unlink()
    made, record = hashes(out), json.loads((out / "shards" / "train-000000.json").read_text())
    packer = ShardPacker(settings_of(fewer, out), read_dataset(out).fingerprint, "cpu")
    assert packer.pack(0).name == "packed"
    assert hashes(out) == made
    assert json.loads((out / "shards" / "train-000000.json").read_text()) == record

    packer.folder.forget("train-000000")
    with pytest.raises(InputError, match=rf"train-000000 held \d+ samples? .*{gone}: missing.*put these photos back, or remove"):
        packer.pack(0)
    assert (out / "shards" / "train-000000.tar").stat().st_size == record["bytes"]
    (out / "shards" / "train-000000.index.parquet").unlink()
    assert packer.pack(0).record["failures"] == {"missing": sum(row.photo_id == gone for row in plan)}


def test_shards_of_anybody_else_are_left_alone(photos, dataset, tmp_path):
    """`--out` at the folder of another dataset, by mistake."""
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    others = ("train-000000.tar", "00000.json", "notes.json")
    for name in others:
        (out / "shards" / name).write_text("{}")
    with pytest.raises(InputError, match=r"shards: holds files, but neither plan\.json nor selection\.json is beside it"):
        select_and_plan(settings_of(photos, out))
    for name in ("plan.json", "selection.json"):
        shutil.copy(dataset / name, out / name)
    shards = ShardFolder(settings_of(photos, out))
    record = json.loads((dataset / "shards" / "train-000000.json").read_text())
    for shard, samples in (("train-000007", 0), ("train-000008", record["samples"])):
        for ending in (".tar", ".index.parquet"):
            shutil.copy(dataset / "shards" / f"train-000000{ending}", out / "shards" / f"{shard}{ending}")
        (out / "shards" / f"{shard}.json").write_text(json.dumps({**record, "shard": shard, "samples": samples}))
    assert shards.unplanned({"train-000000": 3}, [record["fingerprint"]]) == ["train-000007"]
    assert shards.unplanned({"train-000000": 3}, ["another plan"]) == []
    shards.remove("train-000007")
    left = {path.name for path in (out / "shards").iterdir()}
    assert left == {*others, *(f"train-000008{ending}" for ending in (".tar", ".index.parquet", ".json"))}


def test_what_cannot_be_read_is_not_called_damaged(photos, dataset, tmp_path):
    """A shard that is intact must not be thrown away because a disk or a network fails."""
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    shards = ShardFolder(settings_of(photos, out))
    records = shards.read_records(["train-000000"], [read_dataset(out).fingerprint])
    tar = out / "shards" / "train-000000.tar"
    tar.unlink()
    assert shards.rehash(records.values()) == {"train-000000": "shards/train-000000.tar is not there"}
    tar.mkdir()  # Opening it is an error of its own.
    with pytest.raises(InputError, match=r"shards/train-000000\.tar: cannot be read .* nothing was changed"):
        shards.rehash(records.values())


def test_a_shard_is_packed_again_only_if_a_photo_came_back(photos, dataset, tmp_path):
    settings = settings_of(photos, dataset)
    photo = next((photos / "train").glob("*.jpg")).stem

    def failed(photo_id: str, code: str) -> list[dict]:
        return [{"split": "train", "photo_id": photo_id, "file_name": None, "code": code}]

    assert photos_came(failed(photo, "missing"), settings)
    assert not photos_came(failed("gone", "missing"), settings)
    assert not photos_came(failed(photo, "no_square"), settings)
    assert not photos_came([], settings)


def test_records_are_believed_only_while_they_fit(dataset, photos, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(dataset / "shards", folder)
    identity = read_dataset(dataset).fingerprint
    shards = ShardFolder(settings_of(photos, tmp_path))

    def believed(fingerprint: str = identity) -> bool:
        return bool(shards.read_records(["train-000000"], [fingerprint]))

    assert believed()
    assert not believed("another plan")
    index = folder / "train-000000.index.parquet"
    kept = index.read_bytes()
    index.write_bytes(kept[:-1] + b"x")
    assert not believed()
    index.write_bytes(kept)
    assert believed()
    tar = folder / "train-000000.tar"
    kept = tar.read_bytes()
    tar.write_bytes(kept[:-1])
    assert not believed()
    tar.write_bytes(kept)
    (folder / "train-000000.json").write_text("{")
    assert not believed()


def test_a_dataset_is_unfinished_while_a_shard_is_made_again(dataset, photos, tmp_path, monkeypatch):
    """Otherwise a stopped repacking would leave an index that points into other bytes."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    identity, planned = read_dataset(copy).fingerprint, Plan(copy / "plan.parquet").shards
    monkeypatch.setattr(pack, "pack_on_ray", lambda settings, identity, groups, _: [(group, "stopped") for group in groups])
    settings = settings_of(photos, copy)
    build.pack_missing(settings, ShardFolder(settings), identity, planned)
    assert read_dataset(copy), "nothing was missing"
    (copy / "shards" / "train-000000.json").unlink()
    _, errors, _ = build.pack_missing(settings, ShardFolder(settings), identity, planned)
    assert errors == {"train-000000": "stopped"}
    with pytest.raises(InputError, match="not finished"):
        read_dataset(copy)


def test_a_shard_of_a_worker_that_was_lost_on_its_way_back_is_done(dataset, photos, tmp_path, monkeypatch):
    """Its record tells, whatever Ray says of the worker; nothing is made twice."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    identity, planned = read_dataset(copy).fingerprint, Plan(copy / "plan.parquet").shards
    settings = settings_of(photos, copy)
    packer, packed = ShardPacker(settings, identity, "cpu"), []

    def pack_and_die(settings, identity, groups, progress):
        for group in groups:
            packed.append(packer.pack(group).record["shard"])
            yield group, "the actor died"

    monkeypatch.setattr(pack, "pack_on_ray", pack_and_die)
    (copy / "shards" / "train-000000.json").unlink()
    records, errors, _ = build.pack_missing(settings, ShardFolder(settings), identity, planned)
    assert packed == ["train-000000"]
    assert not errors
    assert records.keys() == planned.keys()


def test_the_time_that_a_plan_is_compared_with_is_packing_alone(dataset, photos, tmp_path, monkeypatch):
    """How long Ray takes to start, and how long one waits for a place on a cluster, says nothing about an encoder."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    identity, planned = read_dataset(copy).fingerprint, Plan(copy / "plan.parquet").shards
    settings, now = settings_of(photos, copy), [0.0]
    packer = ShardPacker(settings, identity, "cpu")
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait_and_pack(settings, identity, groups, progress):
        now[0] += 600
        progress.begin()
        for group in groups:
            now[0] += 30
            packer.pack(group)
            yield group, ""

    monkeypatch.setattr(pack, "pack_on_ray", wait_and_pack)
    (copy / "shards" / "train-000000.json").unlink()
    assert build.pack_missing(settings, ShardFolder(settings), identity, planned)[1:] == ({}, None), "of a part nothing is said"
    for shard in planned:
        (copy / "shards" / f"{shard}.json").unlink()
    assert build.pack_missing(settings, ShardFolder(settings), identity, planned)[1:] == ({}, 30 * len(planned))
    assert packer.samples_done == list(planned.values())[-1], "what an actor tells of a shard while it packs"


def test_a_sample_that_is_not_finite_fails_its_shard(photos, dataset, tmp_path, monkeypatch):
    """An encoder that overflows must not leave a dataset of NaN."""
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    shutil.copy(dataset / "plan.parquet", out)
    packer = ShardPacker(settings_of(photos, out), "x", "cpu")
    encode = type(packer.encoder).encode
    monkeypatch.setattr(type(packer.encoder), "encode", lambda self, pictures: encode(self, pictures) * np.float16(np.nan))
    with pytest.raises(ValueError, match=r"sample .*: a latent is not finite"):
        packer.pack(0)
    assert not list((out / "shards").iterdir())


def test_an_unexpected_error_fails_the_shard_loudly(photos, dataset, tmp_path, capsys, monkeypatch):
    """The plan loses a column behind the program's back: every shard fails, the status says so, nothing is finalized."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("plan.json", "selection.json", *(path.name for path in dataset.glob("*.parquet"))):
        shutil.copy(dataset / name, out / name)
    table = pq.read_table(out / "plan.parquet")
    position = table.schema.get_field_index("x_min")
    with pq.ParquetWriter(out / "plan.parquet", table.schema.remove(position)) as writer:
        writer.write_table(table.remove_column(position))
        writer.add_key_value_metadata({"shards": json.dumps(Plan(dataset / "plan.parquet").shards)})
    record = json.loads((out / "selection.json").read_text())
    record["sha256"]["plan.parquet"] = file_sha256(out / "plan.parquet")
    (out / "selection.json").write_text(json.dumps(record))
    done = run_build(*build_options(photos, out), "--ray.attempts", "2", check=False)
    assert done.returncode == 1
    assert "KeyError: 'x_min'" in done.stderr
    assert "failed 2 times" in done.stderr
    assert not (out / "dataset.json").exists()
    assert not list((out / "shards").glob("*"))


def test_the_plan_does_not_depend_on_the_order_of_rows(dataset, photos, tmp_path):
    shuffled = tmp_path / "photos"
    shutil.copytree(photos, shuffled)
    for path in shuffled.glob("*-bbox.csv"):
        header, *rows = path.read_text().splitlines()
        path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    settings = settings_of(shuffled, tmp_path / "out")
    select_and_plan(settings)
    for name in ("plan", "objects"):
        assert pq.read_table(tmp_path / "out" / f"{name}.parquet").equals(pq.read_table(dataset / f"{name}.parquet")), name


def test_the_plan_holds_every_view_of_every_object_once(photos, dataset):
    objects = pq.read_table(dataset / "objects.parquet")
    settings = settings_of(photos, dataset, "--views.per_object", "3")
    plan = pa.concat_tables(plan_samples([objects], settings.views.per_object, settings.shards.samples))
    assert sorted(plan["key"].to_pylist()) == sorted(
        f"{name}_{view}" for name in objects["object_id"].to_pylist() for view in range(3)
    )
    places = list(zip(plan["shard"].to_pylist(), plan["position"].to_pylist(), strict=True))
    assert places == sorted(set(places))
    assert all(
        shard.rpartition("-")[0] == split for shard, split in zip(*(plan[c].to_pylist() for c in ("shard", "split")), strict=True)
    )
    order = plan["photo_id"].to_pylist()
    assert order != sorted(order), "shards must mix photos"
    assert sum(a != b for a, b in itertools.pairwise(order)) < len(set(order)) + 2, "a photo's samples stand together"


def test_mask_kinds_come_in_the_configured_share(photos, dataset):
    """150 views with 2 masks: the share of Bessel masks lies within four standard deviations of the setting."""
    row = a_row(dataset)
    photo = np.zeros((200, 240, 3), np.uint8)
    for share in (0.5, 0.2):
        settings = settings_of(photos, dataset, "--masks.arbitrary_mask_prob", str(share))
        made = [prepare_sample(replace(row, object_id=f"x-{n}"), photo, "00", settings) for n in range(150)]
        kinds = [kind for sample in made for kind in sample.record.mask_kinds]
        assert abs(kinds.count("bessel") / 300 - share) < 4 * (share * (1 - share) / 300) ** 0.5


def test_views_that_no_square_holds_are_padded_and_counted_or_rejected(photos, dataset):
    row = replace(a_row(dataset), x_min=0.05, x_max=0.95, y_min=0.2, y_max=0.8)
    photo = np.random.default_rng(0).integers(0, 255, (100, 300, 3)).astype(np.uint8)
    padded = prepare_sample(row, photo, "00", settings_of(photos, dataset))
    assert padded.record.padded
    assert padded.view.shape == (128, 128, 3)
    rejected = prepare_sample(row, photo, "00", settings_of(photos, dataset, "--views.no_square", "reject"))
    assert rejected.code == "no_square"


def test_masks_stay_on_the_photo_in_padded_views(photos, dataset):
    row = replace(a_row(dataset), x_min=0.02, x_max=0.98, y_min=0.0, y_max=1.0)
    photo = np.zeros((100, 300, 3), np.uint8)
    for number in range(20):
        sample = prepare_sample(replace(row, object_id=f"x-{number}"), photo, "00", settings_of(photos, dataset))
        _, top, side = sample.record.window
        rows = np.flatnonzero(sample.masks.any(axis=(0, 2)))
        assert rows.min() >= (0 - top) / side * 128 - 1
        assert rows.max() <= (100 - top) / side * 128 + 1


@pytest.mark.parametrize(
    ("prepare", "options", "parts"),
    [
        (None, ["--view.size", "3"], ["--view.size", "did you mean"]),
        (None, ["--config", "nowhere.yaml"], ["nowhere.yaml: no such config file"]),
        (None, ["--latents.vae", "configs"], ["configs: no AutoencoderKL here"]),
        (None, ["--views.size", "100"], ["views.size 100", "downsampling, 8"]),
        ("no photos", [], ["train", "photo folder is empty", "build.source.photos"]),
        ("no folder", [], ["train: no such folder", "build.source.photos"]),
        ("no column", [], ["train-annotations-bbox.csv, line 1", "column XMax is missing"]),
        ("no csv", [], ["train-annotations-bbox.csv: no such file"]),
        ("none accepted", [], ["none of the", "too_small", "docs/data-format.md#reasons-of-rejects"]),
    ],
)
def test_wrong_input_is_one_line_and_a_status(prepare, options, parts, photos, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    boxes = copy / "train-annotations-bbox.csv"
    if prepare == "no photos":
        shutil.rmtree(copy / "train")
        (copy / "train").mkdir()
    if prepare == "no folder":
        shutil.rmtree(copy / "train")
    if prepare == "no column":
        boxes.write_text(boxes.read_text().replace("XMax", "Xmaximum", 1))
    if prepare == "no csv":
        boxes.unlink()
    if prepare == "none accepted":
        options = ["--selection.min_area", "0.79", "--selection.max_area", "0.7901"]
    status, said = call_build(capsys, monkeypatch, *build_options(copy, tmp_path / "out"), *options)
    assert status == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    for part in parts:
        assert part in said


def test_photos_that_all_fail_are_an_error_that_names_the_folder(photos, tmp_path, capsys, monkeypatch):
    other = tmp_path / "photos"
    for split in ("train", "validation"):
        (other / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(other / split / "unrelated.jpg")
    done = run_build(*build_options(photos, tmp_path / "out"), "--source.photos", str(other), check=False)
    assert done.returncode == 2
    assert f"{other}: none of the" in done.stderr
    assert "missing" in done.stderr


def test_photos_split_by_their_first_digit_are_found(photos, dataset, tmp_path):
    """The folders train_0 to train_f that Open Images' archives unpack to give the same sample."""
    digits = tmp_path / "photos"
    for path in (photos / "train").glob("*.jpg"):
        folder = digits / f"train_{path.name[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    row = a_row(dataset)
    made = [prepare_photo([row], settings_of(root, dataset))[0] for root in (photos, digits)]
    assert made[0].record == made[1].record
    assert np.array_equal(made[0].view, made[1].view)


def test_a_shard_can_be_packed_twice_at_once(photos, dataset, tmp_path):
    """Attempts have names of their own, so the last rename wins and nothing of the other is left."""
    from concurrent.futures import ThreadPoolExecutor

    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    shutil.copy(dataset / "plan.parquet", out)
    identity = read_dataset(dataset).fingerprint
    packers = [ShardPacker(settings_of(photos, out), identity, "cpu") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda packer: packer.pack(0), packers))
    made = hashes(out)
    assert made == {name: value for name, value in hashes(dataset).items() if name in made}
    assert len(made) == 3


def test_an_attempt_that_was_overtaken_leaves_what_is_recorded(photos, dataset, tmp_path, monkeypatch):
    """A worker whose Ray has died may finish its shard while another one, which was given it, is still at it."""
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    shutil.copy(dataset / "plan.parquet", out)
    identity = read_dataset(dataset).fingerprint
    orphan, other = (ShardPacker(settings_of(photos, out), identity, "cpu") for _ in range(2))
    samples, stamps = other._samples, []

    def overtaken(rows, failures):
        orphan.pack(0)
        stamps.extend(path.stat().st_mtime_ns for path in sorted((out / "shards").glob("train*")))
        yield from samples(rows, failures)

    monkeypatch.setattr(other, "_samples", overtaken)
    record = other.pack(0).record
    assert [path.stat().st_mtime_ns for path in sorted((out / "shards").glob("*"))] == stamps
    assert record["sha256"] == hashes(out)["train-000000.tar"] == hashes(dataset)["train-000000.tar"]


def test_contact_sheets_show_what_is_there(dataset, photos, tmp_path):
    picture = preview.contact_sheet(dataset, photos, count=3)
    assert picture.shape[1] == 4 * 206 + 6
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000
    stored = np.array(Image.open(io.BytesIO((dataset / "contact_sheet.png").read_bytes())))
    assert np.array_equal(stored, preview.contact_sheet(dataset, photos))
    masks = preview.mask_sheet()
    assert masks.shape == (8 * 134 + 6, 8 * 134 + 6, 3)
    assert 0.05 < (masks == (255, 120, 160)).all(axis=2).mean() < 0.6


def test_real_photos_build_and_every_box_is_accounted_for(real_data, tmp_path):
    """The paper's settings with the tiny VAE over real Open Images photos."""
    folder = str(real_data / "open_images_mini")
    out = tmp_path / "real"
    options = [
        "--config",
        "configs/open_images.yaml",
        "--source.annotations",
        folder,
        "--source.photos",
        folder,
        "--out",
        str(out),
    ]
    run_build(*options, "--latents.vae", VAE, "--views.size", "128")
    books = read_dataset(out).books
    assert books.boxes == 189
    assert books.objects == books.planned == books.samples == 100
    assert books.rejects == {"too_large": 3, "too_small": 86}
    assert len(stream(out)) == 100
