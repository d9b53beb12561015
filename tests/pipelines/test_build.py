"""The whole pipeline, by its command, on a real Ray: what it leaves, that it is reproducible, and what it does about damage."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file, save_file

from pbe_core.dataset_reader import find_imbalance, read_dataset
from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_core.images.crop import resize
from pbe_core.images.decode import decode_photo
from pbe_core.sample_codec import Sample, decode_sample
from pbe_core.settings import REPOSITORY
from pbe_core.vae import load_vae
from pipelines import build
from pipelines.dataset import pack
from pipelines.dataset.folder import ShardFolder, photos_came
from pipelines.dataset.pack import ShardPacker
from pipelines.dataset.plan_shards import Plan, plan_samples
from pipelines.dataset.write_plan import recorded_vae, select_and_plan
from pipelines.geometry import fill_outline
from pipelines.inspection import contact_sheet as preview
from schemas.sample import MEMBER_NAMES
from schemas.tables import FAILURES, INDEX, OBJECTS, PLAN, REJECTS, SHARD_RECORDS
from tests.conftest import VAE, build_options, run_build, settings_of

FIRST = "train-000000"


def hashes(dataset: Path) -> dict[str, str]:
    """SHA-256 of every shard, index part and record."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((dataset / "shards").iterdir())}


def stamps(dataset: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (dataset / "shards").iterdir()}


def stream(dataset: Path) -> list[dict]:
    """All samples through a plain WebDataset, undecoded."""
    shards = sorted(map(str, (dataset / "shards").glob("*.tar")))
    return list(webdataset.WebDataset(shards, shardshuffle=False))


@pytest.fixture(scope="module")
def samples(dataset) -> list[Sample]:
    members = [({name: each[name] for name in MEMBER_NAMES if name in each}, each["__key__"]) for each in stream(dataset)]
    return [decode_sample(*each) for each in members]


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    """A copy of the shared dataset, to be damaged."""
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


@pytest.fixture
def unpacked(dataset, tmp_path) -> Path:
    """A folder with the dataset's plan, of which nothing is packed."""
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    for name in ("plan.json", "selection.json", *(path.name for path in dataset.glob("*.parquet"))):
        shutil.copy(dataset / name, out)
    return out


def packer_for(photos: Path, out: Path, dataset: Path) -> ShardPacker:
    return ShardPacker(settings_of(photos, out), read_dataset(dataset).fingerprint, "cpu")


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


def test_any_webdataset_reader_streams_valid_samples(dataset, samples):
    plain = stream(dataset)
    keys = [sample["__key__"] for sample in plain]
    assert len(set(keys)) == len(keys) == read_dataset(dataset).books.samples
    assert [sample.record.key for sample in samples] == keys
    assert ["view.jpg" in each for each in plain] == [sample.record.split == "validation" for sample in samples]


def test_the_index_points_at_the_members(dataset):
    members: dict[str, dict[str, bytes]] = {}
    for path in (dataset / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            members[path.stem] = {member.name: tar.extractfile(member).read() for member in tar}
            assert all(member.mtime == 0 and member.uid == 0 for member in tar)
    for row in pq.read_table(dataset / "index.parquet").to_pylist():
        data = (dataset / "shards" / f"{row['shard']}.tar").read_bytes()
        for name in MEMBER_NAMES:
            place = row[name.replace(".", "_")]
            content = None if place is None else data[place["offset"] : place["offset"] + place["length"]]
            assert content == members[row["shard"]].pop(f"{row['key']}.{name}", None)
    assert not any(members.values()), "members that the index does not know"


def test_latents_are_those_of_the_view_and_of_the_view_under_each_mask(samples):
    """Decoded, a view's latent looks like its view; a masked one does so outside its mask and is grey inside."""
    vae = load_vae(VAE)
    for sample in [sample for sample in samples if sample.view][:4]:
        view = decode_photo(sample.view, frame="stored") / 127.5 - 1
        means = np.concatenate([sample.latent[None, :4], sample.masked[:, :4]]).astype(np.float32)
        with torch.inference_mode():
            pictures = vae.decode(torch.from_numpy(means)).numpy().transpose(0, 2, 3, 1)
        assert np.abs(pictures[0] - view).mean() < 0.15
        for picture, mask in zip(pictures[1:], sample.masks, strict=True):
            masked = view * ~mask[..., None]
            assert np.abs(picture - masked).mean() < min(0.15, np.abs(picture - view).mean())


def test_masks_are_the_outlines_in_the_record_and_lie_over_the_object(samples):
    for sample in samples:
        x_min, y_min, x_max, y_max = sample.record.box_in_view
        assert sample.masks[:, int((y_min + y_max) / 2), int((x_min + x_max) / 2)].all()
        outlines, kinds = sample.record.mask_polygons, sample.record.mask_kinds
        assert [len(outline) for outline in outlines] == [4 if kind == "box" else 80 for kind in kinds]
        for kind, outline, mask in zip(kinds, outlines, sample.masks, strict=True):
            assert np.array_equal(fill_outline(kind, np.array(outline), 128), mask)


def test_references_show_the_box_padded(samples, photos):
    for sample in samples[:20]:
        record = sample.record
        photo = decode_photo((photos / record.split / f"{record.photo_id}.jpg").read_bytes(), frame="stored")
        height, width = photo.shape[:2]
        x_min, y_min, x_max, y_max = record.reference_window
        low, high = np.floor(np.subtract(record.box[:2], 3)), np.ceil(np.add(record.box[2:], 3))
        assert (x_min, y_min) == tuple(np.maximum(low, 0))
        assert (x_max, y_max) == tuple(np.minimum(high, (width, height)))
        reference = decode_photo(sample.reference, frame="stored")
        assert reference.shape[:2] == (y_max - y_min, x_max - x_min) or max(reference.shape) == 128
        shown = resize(photo[y_min:y_max, x_min:x_max], reference.shape[1], reference.shape[0])
        assert np.abs(reference.astype(int) - shown).mean() < 4


def test_pictures_for_people_are_there(dataset, photos):
    stored = np.array(Image.open(io.BytesIO((dataset / "contact_sheet.png").read_bytes())))
    assert np.array_equal(stored, preview.contact_sheet(dataset, photos))
    assert (dataset / "report.html").stat().st_size > 10_000
    assert 0.05 < (preview.mask_sheet() == (255, 120, 160)).all(axis=2).mean() < 0.6


def test_what_is_lost_or_cut_is_made_again_to_the_same_bytes(dataset, photos, copy):
    """A tar without its record, and a record whose tar was cut, are redone; the rest is not touched."""
    shards = sorted((copy / "shards").glob("*.tar"))
    lost, cut, kept = shards[0], shards[1], shards[2]
    lost.with_suffix(".json").unlink()
    cut.write_bytes(cut.read_bytes()[:-512])
    (copy / "dataset.json").unlink()
    untouched = kept.stat().st_mtime_ns
    run_build(*build_options(photos, copy))
    assert hashes(copy) == hashes(dataset)
    assert kept.stat().st_mtime_ns == untouched
    assert read_dataset(copy).books == read_dataset(dataset).books


def test_a_bad_photo_costs_its_own_samples_and_nothing_else(dataset, photos, tmp_path):
    """One truncated, one that is text, one gone: each counted under its code, all others packed."""
    broken, out = Path(shutil.copytree(photos, tmp_path / "photos")), tmp_path / "out"
    objects = pq.read_table(dataset / "objects.parquet", columns=["split", "photo_id"]).to_pylist()
    names = [(row["split"], row["photo_id"]) for row in objects]
    victims, others = sorted(set(names))[:3], sorted(set(names))[3:]
    paths, gone = ([broken / split / f"{photo}.jpg" for split, photo in some] for some in (victims, others))
    paths[0].write_bytes(paths[0].read_bytes()[:-200])
    paths[1].write_bytes(b"<html>404</html>")
    paths[2].unlink()
    done = run_build(*build_options(broken, out))
    books = read_dataset(out).books
    codes = ["decode_error", "not_an_image", "missing"]
    assert books.failures == {code: names.count(victim) for code, victim in sorted(zip(codes, victims, strict=True))}
    assert books.planned == len(objects) == books.samples + sum(books.failures.values())
    assert "failed: decode_error" in done.stdout
    failures = pq.read_table(out / "failures.parquet").to_pylist()
    assert {row["photo_id"]: row["code"] for row in failures} == {
        photo: code for (_, photo), code in zip(victims, codes, strict=True)
    }

    # Photos come, and others of the same shards are gone meanwhile: what was packed stays.
    made = hashes(out)
    for path in paths:
        shutil.copy(photos / path.parent.name / path.name, path)
    for path in gone:
        path.rename(path.with_suffix(".away"))
    done = run_build(*build_options(broken, out))
    assert "photos of samples or references in it cannot be used any more" in done.stderr
    assert hashes(out) == made
    assert read_dataset(out).books == books
    for path in gone:
        path.with_suffix(".away").rename(path)
    run_build(*build_options(broken, out))
    assert hashes(out) == hashes(dataset)


def test_samples_are_not_given_up_because_their_photos_are_gone(photos, copy, tmp_path):
    """Neither in a shard that is whole, nor, without being told, in one that is damaged."""
    fewer = Path(shutil.copytree(photos, tmp_path / "photos"))
    plan = Plan(copy / "plan.parquet").rows(FIRST)
    gone = plan[0].photo_id
    (fewer / "train" / f"{gone}.jpg").unlink()
    before = stamps(copy)
    packer = packer_for(fewer, copy, copy)
    whole = packer.pack(0)
    assert (whole.name, stamps(copy)) == ("packed", before), "its worker may have died before it answered"

    packer.folder.forget(FIRST)
    with pytest.raises(InputError, match=rf"{FIRST} held \d+ samples? .*{gone}: missing.*put these photos back, or remove"):
        packer.pack(0)
    assert (copy / "shards" / f"{FIRST}.tar").stat().st_size == whole.record["bytes"]
    (copy / "shards" / f"{FIRST}.index.parquet").unlink()
    assert packer.pack(0).record["failures"] == {"missing": sum(row.photo_id == gone for row in plan)}


def test_shards_of_anybody_else_are_left_alone(photos, dataset, tmp_path):
    """`--out` at the folder of another dataset, by mistake."""
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    others = (f"{FIRST}.tar", "00000.json", "notes.json")
    for name in others:
        (out / "shards" / name).write_text("{}")
    with pytest.raises(InputError, match=r"shards: holds files, but neither plan\.json nor selection\.json is beside it"):
        select_and_plan(settings_of(photos, out))
    for name in ("plan.json", "selection.json"):
        shutil.copy(dataset / name, out / name)
    shards = ShardFolder(settings_of(photos, out))
    record = json.loads((dataset / "shards" / f"{FIRST}.json").read_text())
    for shard, count in (("train-000007", 0), ("train-000008", record["samples"])):
        for ending in (".tar", ".index.parquet"):
            shutil.copy(dataset / "shards" / f"{FIRST}{ending}", out / "shards" / f"{shard}{ending}")
        (out / "shards" / f"{shard}.json").write_text(json.dumps({**record, "shard": shard, "samples": count}))
    assert shards.unplanned({FIRST: 3}, [record["fingerprint"]]) == ["train-000007"]
    assert shards.unplanned({FIRST: 3}, ["another plan"]) == []
    shards.remove("train-000007")
    left = {path.name for path in (out / "shards").iterdir()}
    assert left == {*others, *(f"train-000008{ending}" for ending in (".tar", ".index.parquet", ".json"))}


def test_a_finished_build_starts_neither_ray_nor_pytorch(photos, copy):
    """PyTorch, diffusers and Ray take two thirds of its time to load: who runs a command again does not wait for them."""
    options = ["--config", "configs/tiny.yaml", *build_options(photos, copy)]
    heavy = {"torch", "diffusers", "transformers", "ray", "aiohttp", "scipy"}
    told = f"import sys; from pipelines.build import main; status = main(); print('loaded', sorted({heavy} & set(sys.modules)))"
    sheet = (copy / build.SHEET).stat().st_mtime_ns
    done = subprocess.run([sys.executable, "-c", told, *options], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert (copy / build.SHEET).stat().st_mtime_ns == sheet


def test_pictures_are_drawn_again_where_a_table_is_newer_or_one_is_lost(copy):
    assert build.are_drawn(copy)
    later = time.time_ns() + 10**9
    os.utime(copy / "rejects.parquet", ns=(later, later))
    assert not build.are_drawn(copy)
    for name in (build.REPORT, build.SHEET):
        os.utime(copy / name, ns=(later, later))
    assert build.are_drawn(copy)
    (copy / build.SHEET).unlink()
    assert not build.are_drawn(copy)


def test_a_vae_with_other_weights_is_noticed_though_it_is_not_loaded(photos, copy, tmp_path):
    """Its files are looked at: other contents under the same name are another VAE, and another config.json may be one."""
    vae = shutil.copytree(REPOSITORY / VAE, tmp_path / "vae")
    settings = settings_of(photos, copy, "--latents.vae", str(vae))
    known = recorded_vae(settings)
    assert known is not None
    assert known == read_dataset(copy).vae.model_copy(update={"source": str(vae)})
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor + 0.001 for name, tensor in weights.items()}, vae / "diffusion_pytorch_model.safetensors")
    assert recorded_vae(settings) is None
    done = run_build(*build_options(photos, copy), "--latents.vae", str(vae), check=False)
    assert done.returncode == 2
    assert "this folder was planned with other inputs or settings (vae: " in done.stderr


@pytest.mark.parametrize("known", [None, [], {"files": {}}, {"files": {}, "identity": {"sha256": 3}}])
def test_a_plan_that_says_nothing_sound_of_its_vae_has_it_loaded(known, photos, copy):
    """Planned before plans said it, or damaged."""
    plan = json.loads((copy / "plan.json").read_text())
    (copy / "plan.json").write_text(json.dumps({**plan, "vae": known}))
    assert recorded_vae(settings_of(photos, copy)) is None


def test_a_vae_that_is_gone_is_told_as_ever(photos, copy, tmp_path):
    """Though the dataset is finished: as a hub's cache of which a part was removed has it."""
    vae = shutil.copytree(REPOSITORY / VAE, tmp_path / "vae")
    weights = vae / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "removed")
    done = run_build(*build_options(photos, copy), "--latents.vae", str(vae), check=False)
    assert done.returncode == 2
    assert f"error: {weights}: cannot be read (No such file or directory)" in done.stderr


def test_what_was_cut_another_way_is_read_and_not_gone_on_with(photos, copy):
    """A plan from before the ways of cutting were counted, as that of a build that was interrupted, and of a finished one."""
    plan = json.loads((copy / "plan.json").read_text())
    del plan["fingerprint"]["versions"]["cutting"]
    (copy / "plan.json").write_text(json.dumps(plan))
    assert read_dataset(copy).books.samples
    before = stamps(copy)
    (copy / "shards" / f"{FIRST}.json").unlink()
    done = run_build(*build_options(photos, copy), check=False)
    assert done.returncode == 2
    told = 'planned by other versions of the program or its libraries (versions.cutting: null -> "2"); finish it with those, '
    assert told in done.stderr
    assert stamps(copy) == {name: stamp for name, stamp in before.items() if name != f"{FIRST}.json"}


def test_what_cannot_be_read_is_not_called_damaged(photos, copy):
    """A shard that is intact must not be thrown away because a disk or a network fails."""
    shards = ShardFolder(settings_of(photos, copy))
    records = shards.read_records([FIRST], [read_dataset(copy).fingerprint])
    tar = copy / "shards" / f"{FIRST}.tar"
    tar.unlink()
    assert shards.rehash(records.values()) == {FIRST: f"shards/{FIRST}.tar is not there"}
    tar.mkdir()  # Opening it is an error of its own.
    with pytest.raises(InputError, match=rf"shards/{FIRST}\.tar: cannot be read .* nothing was changed"):
        shards.rehash(records.values())


def test_a_shard_is_packed_again_only_if_a_photo_came_back(photos, dataset):
    settings = settings_of(photos, dataset)
    here = next((photos / "train").glob("*.jpg")).stem
    for photo, code, came in ((here, "missing", True), ("gone", "missing", False), (here, "no_square", False)):
        assert photos_came([{"split": "train", "photo_id": photo, "file_name": None, "code": code}], settings) == came
    assert not photos_came([], settings)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (f"{FIRST}.index.parquet", lambda data: data[:-1] + b"x"),
        (f"{FIRST}.tar", lambda data: data[:-1]),
        (f"{FIRST}.json", lambda _: b"{"),
    ],
)
def test_records_are_believed_only_while_they_fit(name, damage, photos, copy):
    identity, shards = read_dataset(copy).fingerprint, ShardFolder(settings_of(photos, copy))
    assert shards.read_records([FIRST], [identity])
    assert not shards.read_records([FIRST], ["another plan"])
    path = copy / "shards" / name
    path.write_bytes(damage(path.read_bytes()))
    assert not shards.read_records([FIRST], [identity])


def test_what_workers_answer_and_leave_decides_what_is_packed(photos, copy, monkeypatch):
    """While a shard is made again the dataset is unfinished, so that no index points into other bytes; records tell what is done.

    The time that a plan is compared with is packing alone, and of a part of the shards nothing is said.
    """
    identity, planned = read_dataset(copy).fingerprint, Plan(copy / "plan.parquet").shards
    packer, now, how = packer_for(photos, copy, copy), [0.0], {"packs": False, "error": "stopped"}
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def work(settings, identity, numbers, progress):
        now[0] += 600  # Ray's start.
        progress.begin()
        for number in numbers:
            now[0] += 30
            if how["packs"]:
                packer.pack(number)
            yield number, how["error"]

    monkeypatch.setattr(pack, "pack_on_ray", work)

    def pack_missing():
        return build.pack_missing(packer.settings, packer.folder, identity, planned)

    assert pack_missing()[1] == {}
    assert read_dataset(copy), "nothing was missing"
    packer.folder.forget(FIRST)
    assert pack_missing()[1] == {FIRST: "stopped"}
    with pytest.raises(InputError, match="not finished"):
        read_dataset(copy)
    how |= {"packs": True, "error": "the actor died on its way back"}
    records, errors, seconds = pack_missing()
    assert (records.keys(), errors, seconds) == (planned.keys(), {}, None)
    for shard in planned:
        packer.folder.forget(shard)
    assert pack_missing()[1:] == ({}, 30 * len(planned))
    assert packer.samples_done == list(planned.values())[-1], "what an actor tells of a shard while it packs"


def test_a_sample_that_is_not_finite_fails_its_shard(photos, unpacked, dataset, monkeypatch):
    """An encoder that overflows must not leave a dataset of NaN."""
    packer = packer_for(photos, unpacked, dataset)
    encode = pack.Encoder.encode
    monkeypatch.setattr(pack.Encoder, "encode", lambda self, pictures: encode(self, pictures) * np.float16(np.nan))
    with pytest.raises(ValueError, match=r"sample .*: a latent is not finite"):
        packer.pack(0)
    assert not list((unpacked / "shards").iterdir())


def test_an_unexpected_error_fails_the_shard_loudly(photos, dataset, unpacked):
    """The plan loses a column behind the program's back: every shard fails, the status says so, nothing is finalized."""
    plan = unpacked / "plan.parquet"
    table = pq.read_table(plan).drop_columns(["x_min"])
    with pq.ParquetWriter(plan, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"shards": json.dumps(Plan(dataset / "plan.parquet").shards)})
    record = json.loads((unpacked / "selection.json").read_text())
    record["sha256"]["plan.parquet"] = file_sha256(plan)
    (unpacked / "selection.json").write_text(json.dumps(record))
    done = run_build(*build_options(photos, unpacked), "--ray.attempts", "2", check=False)
    assert done.returncode == 1
    for part in ("KeyError: 'x_min'", "failed 2 times", "could not be packed; the others are kept, run again"):
        assert part in done.stderr
    assert not (unpacked / "dataset.json").exists()
    assert not list((unpacked / "shards").glob("*"))


def test_the_plan_holds_every_view_of_every_object_once(dataset):
    objects = pq.read_table(dataset / "objects.parquet")
    plan = pa.concat_tables(plan_samples([objects], views=3, samples=20))
    keys = [f"{name}_{view}" for name in objects["object_id"].to_pylist() for view in range(3)]
    assert sorted(plan["key"].to_pylist()) == sorted(keys)
    places = [(row["shard"], row["position"]) for row in plan.select(["shard", "position"]).to_pylist()]
    assert places == sorted(set(places))
    assert [shard.rpartition("-")[0] for shard, _ in places] == plan["split"].to_pylist()
    order = plan["photo_id"].to_pylist()
    assert order != sorted(order), "shards must mix photos"
    assert sum(a != b for a, b in itertools.pairwise(order)) < len(set(order)) + 2, "a photo's samples stand together"


@pytest.mark.parametrize(
    ("prepare", "options", "parts"),
    [
        (None, ["--view.size", "3"], ["--view.size", "did you mean"]),
        (None, ["--config", "nowhere.yaml"], ["nowhere.yaml: no such config file"]),
        (None, ["--latents.vae", "configs"], ["configs: no AutoencoderKL here"]),
        (None, ["--views.size", "100"], ["views.size 100", "downsampling, 8"]),
        (None, ["--selection.min_area", "0.79", "--selection.max_area", "0.7901"], ["none of the", "too_small"]),
        ("no photos", [], ["photos/train: no .jpg here", "build.source.photos"]),
        ("no folder", [], ["photos/train: no .jpg here", "build.source.photos"]),
        ("other photos", [], ["photos: none of the", "missing"]),
        ("no column", [], ["train-annotations-bbox.csv, line 1", "column XMax is missing"]),
        ("no csv", [], ["train-annotations-bbox.csv: no such file"]),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_a_status(prepare, options, parts, photos, tmp_path):
    here = Path(shutil.copytree(photos, tmp_path / "photos"))
    boxes = here / "train-annotations-bbox.csv"
    if prepare in ("no photos", "no folder"):
        shutil.rmtree(here / "train")
    if prepare == "no photos":
        (here / "train").mkdir()
    if prepare == "other photos":
        for path in here.glob("*/*.jpg"):
            path.rename(path.with_stem(f"{path.stem}x"))
    if prepare == "no column":
        boxes.write_text(boxes.read_text().replace("XMax", "Xmaximum", 1))
    if prepare == "no csv":
        boxes.unlink()
    done = run_build(*build_options(here, tmp_path / "out"), *options, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_a_shard_can_be_packed_twice_at_once(photos, dataset, unpacked):
    """Attempts have names of their own, so the last rename wins and nothing of the other is left."""
    packers = [packer_for(photos, unpacked, dataset) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda packer: packer.pack(0), packers))
    made = hashes(unpacked)
    assert made == {name: value for name, value in hashes(dataset).items() if name in made}
    assert len(made) == 3


def test_an_attempt_that_was_overtaken_leaves_what_is_recorded(photos, dataset, unpacked, monkeypatch):
    """A worker whose Ray has died may finish its shard while another one, which was given it, is still at it."""
    orphan, other = (packer_for(photos, unpacked, dataset) for _ in range(2))
    make, before = other._samples, {}

    def overtaken(rows, failures, shape):
        orphan.pack(0)
        before.update({name: stamp for name, stamp in stamps(unpacked).items() if name.startswith("train")})
        yield from make(rows, failures, shape)

    monkeypatch.setattr(other, "_samples", overtaken)
    record = other.pack(0).record
    assert stamps(unpacked) == before
    assert record["sha256"] == hashes(unpacked)[f"{FIRST}.tar"] == hashes(dataset)[f"{FIRST}.tar"]


def test_real_photos_build_and_every_box_is_accounted_for(real_data, tmp_path):
    """The paper's settings with the tiny VAE over real Open Images photos."""
    folder, out = str(real_data / "open_images_mini"), tmp_path / "real"
    folders = ["--source.annotations", folder, "--source.photos", folder, "--out", str(out)]
    run_build("--config", "configs/open_images.yaml", *folders, "--latents.vae", VAE, "--views.size", "128")
    books = read_dataset(out).books
    assert books.boxes == 189
    assert books.objects == books.planned == books.samples == 100
    assert books.rejects == {"too_large": 3, "too_small": 86}
    assert len(stream(out)) == 100
