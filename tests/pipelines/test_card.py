"""The dataset card: its numbers against the tables, its snippets run, nothing of the builder's machine in it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pbe_train.config import TrainSettings
from pipelines.config import BuildSettings
from pipelines.packing.card import card_text, count_photos, hub_licence, public_settings, write_card
from schemas.dataset import DatasetInfo, read_dataset
from schemas.settings import REPOSITORY, load_settings
from schemas.tables import INDEX, PLAN
from tests.conftest import settings_of

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


def test_the_head_says_licence_task_and_size(card):
    assert head_of(card) == {
        "pretty_name": "Paint by Example training samples",
        "license": "cc0-1.0",
        "task_categories": ["image-to-image"],
        "tags": ["image-editing", "inpainting", "paint-by-example", "latents", "webdataset"],
        "size_categories": ["n<1K"],
    }


def test_the_numbers_are_those_of_the_tables(dataset, info, card):
    index = pq.read_table(dataset / "index.parquet").to_pylist()
    photos = {(row["split"], row["object_id"].rpartition("-")[0]) for row in index}
    expected = [
        [
            split,
            str(sum(row["split"] == split for row in index)),
            str(sum(own == split for own, _ in photos)),
            str(len(list((dataset / "shards").glob(f"{split}-*.tar")))),
            f"{sum(path.stat().st_size for path in (dataset / 'shards').glob(f'{split}-*.tar')):,}",
        ]
        for split in ("train", "validation")
    ]
    assert rows_of(card, "Splits")[1:3] == expected
    assert rows_of(card, "Splits")[3][:3] == ["all", str(len(index)), str(len(photos))]

    counts = Counter((row["label_name"], row["label"]) for row in index)
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0][1]))
    assert f"{len(counts)} classes" in card
    shown = rows_of(card, "Classes")[1:]
    plain = [[cell.replace("\\", "") for cell in row] for row in shown]
    assert plain[:20] == [[name, label, str(count)] for (name, label), count in largest[:20]]
    assert sum(int(row[2]) for row in shown) == len(index)

    books = {row[0]: int(row[1].replace(",", "")) for row in rows_of(card, "Where everything went") if row[1] != "count"}
    assert books["boxes read"] == books["accepted: objects"] + sum(n for name, n in books.items() if name.startswith("rejected"))
    assert books["samples planned"] == books["in the shards"] + sum(n for name, n in books.items() if name.startswith("failed"))
    assert {name: n for name, n in books.items() if name.startswith("rejected")} == {
        f"rejected: `{reason}`": count for reason, count in info.books.rejects.items()
    }
    assert rows_of(card, "Licences of the photos")[1:] == [
        ["https://creativecommons.org/publicdomain/zero/1.0/", str(len(photos))]
    ]
    assert info.fingerprint in card
    assert info.vae.sha256 in card


def test_the_card_is_of_the_dataset_and_not_of_the_machine(dataset, info, photos, card, tmp_path):
    """The same bytes wherever the dataset lies, and no folder of this machine but by its last name."""
    shutil.copytree(dataset, tmp_path / "moved")
    write_card(tmp_path / "moved", info)
    assert (tmp_path / "moved" / "README.md").read_text() == card
    for folder in {dataset.parent, photos.parent, REPOSITORY, Path.home(), Path(info.vae.source).parent}:
        assert str(folder) not in card
    block = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["build"]
    assert block["source"]["photos"] == photos.name
    assert block["out"] == dataset.name
    assert block["latents"] == {**info.settings["latents"], "vae": "vae"}
    assert block["masks"] == info.settings["masks"]
    assert block["seed"] == info.settings["seed"]
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
    source = given["source"] | {"photos_url": "s3://key:pw@bucket/store?token=1", "storage": {"secret": "SK"}}
    changed = {"upload": "s3://key:pw@bucket/dataset?token=1", "storage": {"secret": "SK"}, "crawl": crawl, "source": source}
    told = BuildSettings(**{**given, **changed}).told()
    assert told["crawl"]["sources"] == [*kept, "https://example.org/{image_id}.jpg", "HTTP://example.org"]
    assert told["upload"] == "s3://bucket/dataset"
    assert told["source"]["photos_url"] == "s3://bucket/store"
    assert not re.search(r":pw|ann@|sig=|token=|\bAK\b|\bSK\b", json.dumps(told))
    assert BuildSettings(**told).crawl.contact is None


def test_the_snippet_loads_the_dataset(dataset, info, card):
    snippet = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=dataset, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = pq.read_table(dataset / "index.parquet").slice(0, 1).to_pylist()[0]
    cells = info.view_size // info.vae.downsampling
    assert done.stdout.startswith(f"{first['key']} {first['label_name']} ({info.vae.latent_channels}, {cells}, {cells}) ")


def test_the_commands_are_those_of_the_project(card):
    train, trace = [shlex.split(block.split("```")[0]) for block in card.split("```sh\n")[1:]]
    assert (REPOSITORY / train[1]).is_file()
    settings = load_settings(TrainSettings, "train", train[2:])
    assert (settings.dataset, settings.model.vae, settings.out) == (Path("DATASET"), "VAE", Path("RUN"))
    assert (REPOSITORY / trace[1]).is_file()


@pytest.mark.parametrize(
    ("licences", "name"),
    [
        ({BY_2}, "cc-by-2.0"),
        ({BY_4}, "cc-by-4.0"),
        ({"http://creativecommons.org/licenses/by-nc-sa/2.0"}, "cc-by-nc-sa-2.0"),
        ({"https://creativecommons.org/publicdomain/zero/1.0/"}, "cc0-1.0"),
        ({BY_2, BY_4}, "other"),
        ({BY_2, None}, "other"),
        ({None}, "other"),
        (set(), "other"),
        ({"https://creativecommons.org/licenses/by/9.9/"}, "other"),
        ({"https://flickr.com/commons/usage/"}, "other"),
    ],
)
def test_the_hubs_identifier_is_given_only_for_one_licence_of_all(licences, name):
    assert hub_licence(licences) == name


def write_tables(folder: Path, shards: dict[str, list[tuple[str, str | None, bool]]], name: str = "Cat") -> None:
    """Plan and index: shard -> (photo, licence, whether its sample could be made)."""
    with pq.ParquetWriter(folder / "plan.parquet", PLAN) as plan, pq.ParquetWriter(folder / "index.parquet", INDEX) as index:
        for number, (shard, samples) in enumerate(shards.items()):
            rows = []
            for position, (photo, licence, made) in enumerate(samples):
                row = {field.name: 0 if not pa.types.is_string(field.type) else "" for field in PLAN} | {"label": "/m/1"}
                key = f"{photo}-{number:06d}{position:06d}_0"
                row |= {"shard": shard, "split": shard.split("-")[0], "key": key, "object_id": key[:-2], "photo_id": photo}
                rows.append((row | {"licence": licence, "label_name": name, "rotation": 0}, made))
            words = {field.name: "" for field in PLAN if pa.types.is_dictionary(field.type)}
            plan.write_table(pa.Table.from_pylist([words | row for row, _ in rows], PLAN))
            place = {"offset": 0, "length": 1, "crc32": 0}
            members = {field.name: place for field in INDEX if pa.types.is_struct(field.type)}
            index.write_table(pa.Table.from_pylist([{**row, **members} for row, made in rows if made], INDEX))


def test_photos_are_counted_once_each_and_only_if_samples_were_cut_from_them(tmp_path):
    write_tables(
        tmp_path,
        {
            "train-000000": [("a", BY_2, True), ("a", BY_2, True), ("b", None, True), ("c", BY_4, True)],
            "train-000001": [("c", BY_4, True), ("d", BY_4, False), ("e", " ", True)],
            "train-000002": [("f", BY_2, False)],
            "train-000003": [("a", BY_2, True), ("g", BY_2, True), ("d", BY_4, False)],
            "validation-000000": [("a", BY_2, True)],
        },
    )
    assert count_photos(tmp_path) == {
        ("train", BY_2): 2,
        ("train", None): 2,
        ("train", BY_4): 1,
        ("validation", BY_2): 1,
    }


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


def test_sizes_are_those_of_the_hub(info, tmp_path):
    write_tables(tmp_path, {"train-000000": [("a", BY_2, True)]})
    for samples, size in ((999, "n<1K"), (1000, "1K<n<10K"), (1_740_000, "1M<n<10M")):
        books = info.books.model_copy(update={"samples": samples})
        assert head_of(card_text(tmp_path, info.model_copy(update={"books": books})))["size_categories"] == [size]
