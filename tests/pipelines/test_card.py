"""The dataset card: its numbers against the tables, its snippets run, nothing of the builder's machine in it."""

import io
import json
import re
import shlex
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from pycocotools import mask as coco_mask

from pbe_core.dataset_reader import read_dataset, read_sample
from pbe_core.images.decode import decode_photo
from pbe_core.sample_codec import encode_sample
from pbe_core.settings import REPOSITORY, load_settings
from pbe_train.config import TrainSettings
from pipelines.config import BuildSettings
from pipelines.dataset.card import card_head, card_text, count_photos, hub_licence, public_settings
from pipelines.dataset.plan_shards import writing_plan
from pipelines.dataset.verify import verify_dataset
from schemas.dataset import DatasetInfo, SplitCounts
from schemas.sample import MEMBER_NAMES, SampleRecord
from schemas.tables import INDEX, PLAN
from tests.conftest import settings_of

LICENCE = "https://creativecommons.org/publicdomain/zero/1.0/"
BY_2, BY_4 = (f"https://creativecommons.org/licenses/by/{version}/" for version in ("2.0", "4.0"))


@pytest.fixture(scope="module")
def info(dataset) -> DatasetInfo:
    return read_dataset(dataset)


@pytest.fixture(scope="module")
def card(dataset, info) -> str:
    return card_text(dataset, info)


def head_of(card: str) -> dict:
    """The YAML head, as the hub reads it."""
    return yaml.safe_load(card.split("---\n")[1])


def rows_of(card: str, heading: str) -> list[list[str]]:
    """Cells of the tables in a section."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_head_says_licence_task_size_and_where_samples_are(card, info):
    head = head_of(card)
    told = head["dataset_info"]
    assert [feature["name"] for feature in told["features"]][2:] == sorted(MEMBER_NAMES)
    splits = {each["name"]: (each["num_bytes"], each["num_examples"]) for each in told["splits"]}
    assert splits == {split: (own.bytes, own.samples) for split, own in info.splits.items()}
    assert (head["license"], head["task_categories"], head["size_categories"]) == ("cc0-1.0", ["image-to-image"], ["n<1K"])
    files = [{"split": split, "path": f"shards/{split}-*.tar"} for split in ("train", "validation")]
    assert head["configs"] == [{"config_name": "default", "data_files": files}]
    for samples, size in ((999, "n<1K"), (1000, "1K<n<10K"), (1_740_000, "1M<n<10M")):
        larger = info.model_copy(update={"books": info.books.model_copy(update={"samples": samples})})
        assert card_head(larger, {None})["size_categories"] == [size]


def test_the_numbers_are_those_of_the_tables(dataset, info, card):
    index = pq.read_table(dataset / "index.parquet").to_pylist()
    photos = {(row["split"], row["object_id"].rpartition("-")[0]) for row in index}
    for split, samples, cut_from, shards, size in rows_of(card, "Splits")[1:3]:
        tars = list((dataset / "shards").glob(f"{split}-*.tar"))
        assert int(samples) == sum(row["split"] == split for row in index)
        assert int(cut_from) == sum(own == split for own, _ in photos)
        assert (int(shards), size) == (len(tars), f"{sum(path.stat().st_size for path in tars):,}")
    assert rows_of(card, "Splits")[3][:3] == ["all", str(len(index)), str(len(photos))]

    counts = Counter((row["label_name"], row["label"]) for row in index)
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0][1]))
    shown = [[cell.replace("\\", "") for cell in row] for row in rows_of(card, "Classes")[1:]]
    assert f"{len(counts)} classes" in card
    assert shown[:20] == [[name, label, str(count)] for (name, label), count in largest[:20]]
    assert sum(int(row[2]) for row in shown) == len(index)

    told = {row[0]: int(row[1].replace(",", "")) for row in rows_of(card, "Where everything went") if row[1] != "count"}
    assert told["boxes read"] == told["accepted: objects"] + sum(n for name, n in told.items() if name.startswith("rejected"))
    assert told["samples planned"] == told["in the shards"] + sum(n for name, n in told.items() if name.startswith("failed"))
    assert told.items() >= {f"rejected: `{reason}`": count for reason, count in info.books.rejects.items()}.items()
    assert rows_of(card, "Licences of the photos")[1:] == [[LICENCE, str(len(photos))]]
    assert info.fingerprint in card
    assert info.vae.sha256 in card


def test_the_card_is_of_the_dataset_and_not_of_the_machine(dataset, info, photos, card, tmp_path):
    """The same bytes wherever the dataset lies, and no folder of this machine but by its last name."""
    assert (dataset / "README.md").read_text() == card
    for name in ("plan.parquet", "index.parquet"):
        shutil.copy(dataset / name, tmp_path)
    assert card_text(tmp_path, info) == card
    for folder in {dataset.parent, photos.parent, REPOSITORY, Path.home(), Path(info.vae.source).parent}:
        assert str(folder) not in card
    block = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["build"]
    assert (block["source"]["photos"], block["out"]) == (photos.name, dataset.name)
    assert block["latents"] == {**info.settings["latents"], "vae": "vae"}
    assert (block["masks"], block["seed"]) == (info.settings["masks"], info.settings["seed"])
    assert set(block) == set(info.settings)


def test_what_is_private_is_not_shown():
    told = {
        "out": "/home/ann/data/dataset",
        "upload": "s3://key:secret@bucket/dataset?token=1",
        "source": {"annotations": "data/open_images", "photos": "C:\\Users\\ann\\photos", "survey": None, "splits": ["train"]},
        "latents": {"vae": "CompVis/stable-diffusion-v1-4"},
        "crawl": {
            "sources": ["/mnt/ann/*.tar", "{url}", "https://ann:pw@example.org/{image_id}.jpg?sig=abc", "file:///home/ann/x"],
            "contact": "ann@example.org",
            "allowed_addresses": [],
            "storage": {"s3": {"key": "AK", "secret": "SK"}},
        },
        "ray": {"address": "10.1.2.3:6379", "attempts": 3},
    }
    assert public_settings(told) == {
        "out": "dataset",
        "upload": "s3://bucket/dataset",
        "source": {"annotations": "open_images", "photos": "photos", "survey": None, "splits": ["train"]},
        "latents": {"vae": "CompVis/stable-diffusion-v1-4"},
        "crawl": {
            "sources": ["*.tar", "{url}", "https://example.org/{image_id}.jpg", "x"],
            "contact": "not shown",
            "allowed_addresses": [],
            "storage": "not shown",
        },
        "ray": {"address": "not shown", "attempts": 3},
    }


def test_no_password_is_kept_in_the_dataset(photos, tmp_path):
    """Nor the builder's address; what is left is as it was given, and can be read as settings again."""
    kept = ["/mnt/photos/*.tar", "{url}", "file:///mnt/photos", str(tmp_path), "s3://bucket/{split}/{image_id}.jpg"]
    secret = ["https://ann:pw@example.org/{image_id}.jpg?sig=abc#x", "HTTP://ann@example.org?sig=abc"]
    crawl = {"sources": [*kept, *secret], "contact": "ann@example.org", "storage": {"s3": {"key": "AK"}}}
    given = settings_of(photos, tmp_path).model_dump()
    source = given["source"] | {"photos": "s3://key:pw@bucket/store?token=1", "storage": {"secret": "SK"}}
    changed = {"upload": "s3://key:pw@bucket/dataset?token=1", "storage": {"secret": "SK"}, "crawl": crawl, "source": source}
    told = BuildSettings(**{**given, **changed}).told()
    assert told["crawl"]["sources"] == [*kept, "https://example.org/{image_id}.jpg", "HTTP://example.org"]
    assert told["upload"] == "s3://bucket/dataset"
    assert told["source"]["photos"] == "s3://bucket/store"
    assert not re.search(r":pw|ann@|sig=|token=|\bAK\b|\bSK\b", json.dumps(told))
    assert BuildSettings(**told).crawl.contact is None


@pytest.mark.filterwarnings("error::UserWarning:webdataset")
def test_the_snippets_load_the_dataset(dataset, info, card, capsys, monkeypatch, datasets_cache):
    """Each runs as a program that a reader made of it."""
    plain, hugging_face = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    first = pq.read_table(dataset / "index.parquet").slice(0, 1).to_pylist()[0]
    channels, cells = info.vae.latent_channels, info.view_size // info.vae.downsampling
    monkeypatch.chdir(dataset)
    exec(plain, {})
    assert capsys.readouterr().out.startswith(f"{first['key']} {first['label_name']} ({channels}, {cells}, {cells}) ")
    exec(hugging_face.replace("DATASET", str(dataset)), {})
    masks = f"({info.masks_per_view}, {info.view_size}, {info.view_size})"
    expected = f"{first['label_name']} {LICENCE} ({2 * channels}, {cells}, {cells}) {masks} "
    assert capsys.readouterr().out.startswith(expected)


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch) -> Path:
    """A cache of `datasets` that goes away, and no progress bar and no network."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def hugging_face(datasets_cache) -> Callable[[Path], Any]:
    """`datasets.load_dataset` of a folder."""
    import datasets

    return lambda folder: datasets.load_dataset(str(folder), cache_dir=str(datasets_cache))


def test_hugging_face_reads_samples_with_all_their_members(dataset, info, hugging_face):
    """Not the tables beside them; and view.jpg of validation, which train does not keep."""
    loaded = hugging_face(dataset)
    index = {row["key"]: row for row in pq.read_table(dataset / "index.parquet").to_pylist()}
    assert {split: len(samples) for split, samples in loaded.items()} == {
        split: counts.samples for split, counts in info.splits.items()
    }
    for split, samples in loaded.items():
        first, arrays = samples[0], samples.with_format("numpy")[0]
        own = read_sample(dataset, index[first["__key__"]])
        assert SampleRecord(**first["json"]) == own.record
        assert np.array_equal(arrays["latent.npy"], own.latent)
        assert np.array_equal(arrays["masked.npy"], own.masked)
        assert np.array_equal(coco_mask.decode(first["mask.json"]).transpose(2, 0, 1), own.masks)
        assert np.array_equal(arrays["ref.jpg"], decode_photo(own.reference, frame="stored"))
        assert (first["view.jpg"] is None) == (split == "train")


def write_foreign_dataset(folder: Path, dataset: Path, info: DatasetInfo, records: list[dict]) -> None:
    """A train split of one shard: one real sample again and again, its record changed, and a card's head."""
    row = pq.read_table(dataset / "index.parquet").slice(0, 1).to_pylist()[0]
    sample = read_sample(dataset, row)
    (folder / "shards").mkdir(parents=True)
    with tarfile.open(folder / "shards" / "train-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, changed in enumerate(records):
            key = f"{sample.record.object_id}_{number}"
            record = sample.record.model_copy(update={"key": key, **changed})
            for name, data in encode_sample(replace(sample, record=record)).items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    own = info.model_copy(update={"splits": {"train": SplitCounts(shards=["train-000000"], samples=len(records), bytes=1)}})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card_head(own, {None}))}---\n")


def test_hugging_face_reads_what_is_null_at_first_and_set_later(dataset, info, hugging_face, tmp_path):
    """It makes tables of 100 samples: types that are guessed from the first of them fit no later one."""
    names = ("file_name", "url", "author", "licence", "reference_mask")
    records = [dict.fromkeys(names)] * 101 + [{name: f"known {name}" for name in names}]
    write_foreign_dataset(tmp_path / "foreign", dataset, info, records)
    loaded = hugging_face(tmp_path / "foreign")["train"]
    assert [loaded[0]["json"][name] for name in names] == [None] * len(names)
    assert [loaded[101]["json"][name] for name in names] == [f"known {name}" for name in names]


def shorten(copy: Path, how: str) -> Path:
    """Damage the first shard in one of the two ways that a reader of tars cannot see."""
    first, second = (copy / "shards" / f"train-{number:06d}.tar" for number in range(2))
    if how == "put together":
        first.write_bytes(first.read_bytes() + second.read_bytes())
    else:
        with tarfile.open(first) as tar:
            third_sample = tar.getmembers()[2 * 5].offset
        first.write_bytes(first.read_bytes()[:third_sample])
    return first


@pytest.mark.parametrize(("how", "read"), [("put together", 20), ("cut off", 2)])
def test_tars_that_plain_readers_read_short_are_found(dataset, card, hugging_face, tmp_path, how, read):
    """What the card says of such tars: no error of webdataset's; `sizes.json`, `verify` and the card's head tell."""
    from datasets.exceptions import NonMatchingSplitsSizesError

    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    tar = shorten(copy, how)
    assert sum(1 for _ in webdataset.WebDataset(str(tar), shardshuffle=False)) == read
    assert json.loads((copy / "shards" / "sizes.json").read_text())[tar.name] == 20
    assert any(f"{tar.name} has" in str(finding) for finding in verify_dataset(copy).findings)
    assert {"put together": "cat a.tar b.tar", "cut off": "cut off at a member's header"}[how] in card
    if read < 20:
        with pytest.raises(NonMatchingSplitsSizesError):
            hugging_face(copy)


def test_what_the_card_says_of_plain_readers_is_so(dataset, card, monkeypatch):
    tar = str(dataset / "shards" / "validation-000000.tar")
    with pytest.warns(UserWarning, match="shardshuffle"):
        webdataset.WebDataset(tar)
    assert "`shardshuffle=False`" in card
    # The second of two workers, as webdataset is told where it is not PyTorch that starts them.
    monkeypatch.setenv("WORKER", "1")
    monkeypatch.setenv("NUM_WORKERS", "2")
    with pytest.raises(ValueError, match="No samples found in dataset"):
        list(webdataset.WebDataset(tar, shardshuffle=False))
    assert not list(webdataset.WebDataset(tar, shardshuffle=False, empty_check=False))
    assert "more workers than the split has shards" in card


def test_the_commands_are_those_of_the_project(card):
    train, trace = [shlex.split(block.split("```")[0]) for block in card.split("```sh\n")[1:]]
    assert (REPOSITORY / train[1]).is_file()
    settings = load_settings(TrainSettings, "train", train[2:])
    assert (settings.dataset, settings.model.vae, settings.out) == (Path("DATASET"), "VAE", Path("RUN"))
    assert trace == ["pbe", "inspect", "trace", "KEY", "DATASET"]


@pytest.mark.parametrize(
    ("licences", "name"),
    [
        ({BY_2}, "cc-by-2.0"),
        ({"http://creativecommons.org/licenses/by-nc-sa/2.0"}, "cc-by-nc-sa-2.0"),
        ({LICENCE}, "cc0-1.0"),
        ({BY_2, BY_4}, "other"),
        ({BY_2, None}, "other"),
        (set(), "other"),
        ({"https://creativecommons.org/licenses/by/9.9/"}, "other"),
        ({"https://flickr.com/commons/usage/"}, "other"),
    ],
)
def test_the_hubs_identifier_is_given_only_for_one_licence_of_all(licences, name):
    assert hub_licence(licences) == name


def write_tables(folder: Path, shards: dict[str, list[tuple[str, str | None, bool]]], name: str = "Cat") -> None:
    """Plan and index: shard -> (photo, licence, whether its sample could be made)."""
    with writing_plan(folder / "plan.parquet") as add, pq.ParquetWriter(folder / "index.parquet", INDEX) as index:
        for number, (shard, samples) in enumerate(shards.items()):
            rows = []
            for position, (photo, licence, made) in enumerate(samples):
                row = {field.name: 0 if not pa.types.is_string(field.type) else "" for field in PLAN} | {"label": "/m/1"}
                key = f"{photo}-{number:06d}{position:06d}_0"
                row |= {"shard": shard, "split": shard.split("-")[0], "key": key, "object_id": key[:-2], "photo_id": photo}
                rows.append((row | {"licence": licence, "label_name": name, "rotation": 0}, made))
            words = {field.name: "" for field in PLAN if pa.types.is_dictionary(field.type)}
            add(pa.Table.from_pylist([words | row for row, _ in rows], PLAN))
            place = {"offset": 0, "length": 1, "crc32": 0}
            members = {field.name: place for field in INDEX if pa.types.is_struct(field.type)}
            index.write_table(pa.Table.from_pylist([{**row, **members} for row, made in rows if made], INDEX))


def test_photos_are_counted_once_each_and_only_if_samples_were_cut_from_them(tmp_path):
    shards = {
        "train-000000": [("a", BY_2, True), ("a", BY_2, True), ("b", None, True), ("c", BY_4, True)],
        "train-000001": [("c", BY_4, True), ("d", BY_4, False), ("e", " ", True)],
        "train-000002": [("f", BY_2, False)],
        "train-000003": [("a", BY_2, True), ("g", BY_2, True), ("d", BY_4, False)],
        "validation-000000": [("a", BY_2, True)],
    }
    write_tables(tmp_path, shards)
    train = {("train", BY_2): 2, ("train", None): 2, ("train", BY_4): 1}
    assert count_photos(tmp_path) == {**train, ("validation", BY_2): 1}


def test_names_from_foreign_files_do_not_break_the_card(info, tmp_path):
    hostile = "cat | <script>\n## [x](y) `z` *"
    write_tables(tmp_path, {"train-000000": [("a", "own | licence\n---", True)]}, hostile)
    card = card_text(tmp_path, info)
    assert head_of(card)["license"] == "other"
    assert rows_of(card, "Classes")[1:] == [[r"cat \| \<script\> \#\# \[x\](y) \`z\` \*", "/m/1", "1"]]
    assert "\nown" not in card
    assert "<script>" not in card
    licences = card.split("## Licences of the photos\n")[1].split("\n## ")[0]
    assert r"| own \| licence --- | 1 |" in licences
