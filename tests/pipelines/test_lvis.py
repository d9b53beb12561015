"""LVIS v1 as it is published: no file names, no crowds, photos of both of COCO's folders in one file, classes with synonyms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbe_core.errors import InputError
from pipelines.annotations.source import Source
from pipelines.selection.rules import below
from tests.coco_files import boxes_of, opened, photos_of
from tests.conftest import VAE, run_build
from tests.mask_files import HEIGHT, WIDTH, build_samples, check_reference, ellipse, photo_of, save_photo

BOX = (0.2, 0.15, 0.8, 0.85)
CATEGORIES = [
    {
        "id": 1, "name": "aerosol_can", "synset": "aerosol.n.02", "synonyms": ["aerosol_can", "spray_can"],
        "def": "a dispenser that holds a substance under pressure", "frequency": "c", "image_count": 64, "instance_count": 109,
    },
    {
        "id": 2, "name": "air_conditioner", "synset": "air_conditioner.n.01", "synonyms": ["air_conditioner"],
        "def": "a machine that keeps air cool and dry", "frequency": "f", "image_count": 364, "instance_count": 1910,
    },
    {
        "id": 3, "name": "applesauce", "synset": "applesauce.n.01", "synonyms": ["applesauce", "spray_can"],
        "def": "puree of stewed apples", "frequency": "r", "image_count": 7, "instance_count": 7,
    },
]  # fmt: skip


def image(number: int, folder: str) -> dict[str, Any]:
    return {
        "id": number, "coco_url": f"http://images.cocodataset.org/{folder}/{number:012}.jpg", "license": 4,
        "flickr_url": "http://farm1.staticflickr.com/1/2_3_z.jpg", "date_captured": "2013-11-14 17:02:52",
        "width": WIDTH, "height": HEIGHT, "neg_category_ids": [2], "not_exhaustive_category_ids": [1],
    }  # fmt: skip


def annotation(number: int, image_id: int, category_id: int) -> dict[str, Any]:
    """A diamond."""
    x, y, right, low = BOX[0] * WIDTH, BOX[1] * HEIGHT, BOX[2] * WIDTH, BOX[3] * HEIGHT
    middle, half = (x + right) / 2, (y + low) / 2
    return {
        "id": number, "image_id": image_id, "category_id": category_id, "area": (right - x) * (low - y) / 2,
        "bbox": [x, y, right - x, low - y], "segmentation": [[middle, y, right, half, middle, low, x, half]],
    }  # fmt: skip


@pytest.fixture
def files(tmp_path) -> Path:
    """LVIS's val has photos of COCO's train2017 too."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    both = {"train": [(9, "train2017"), (25, "train2017")], "val": [(30, "val2017"), (34, "train2017")]}
    for split, places in both.items():
        document = {
            "info": {"version": "v1_20200305"},
            "licenses": [{"id": 4, "name": "by", "url": "http://creativecommons.org/licenses/by/2.0/"}],
            "categories": CATEGORIES,
            "images": [image(*place) for place in places],
            "annotations": [annotation(place + 1, number, place + 1) for place, (number, _) in enumerate(places)],
        }
        (folder / f"lvis_v1_{split}.json").write_text(json.dumps(document))
        for number, photos in places:
            save_photo(tmp_path / "photos" / photos / f"{number:012}.jpg", photo_of(diamond()))
    return folder


def diamond() -> np.ndarray:
    return ellipse(*BOX, WIDTH, HEIGHT, power=1)


def test_published_files_build_with_their_masks(files):
    out = files.parent / "out"
    options = ["--source.kind", "coco", "--source.annotations", str(files), "--out", str(out), "--latents.vae", VAE]
    run_build(*options, "--source.photos", str(files.parent / "photos"), "--references.background", "grey")
    samples = build_samples(out)
    assert sorted(samples, key=int) == ["9", "25", "30", "34"]
    for photo_id, (sample,) in samples.items():
        check_reference(sample, diamond())
        assert sample.record.split == ("train" if photo_id in ("9", "25") else "validation")
        assert sample.record.label_name == ("aerosol_can" if photo_id in ("9", "30") else "air_conditioner")
        assert sample.record.licence == "http://creativecommons.org/licenses/by/2.0/"


def test_classes_go_by_synonyms_synsets_and_frequencies(files):
    source = opened(files, files.parent / "photos", splits=("train", "validation"))
    assert below(["spray_can"], opened_with(files, 2), "include_labels") == {"1"}
    assert below(["aerosol.n.02"], source, "include_labels") == {"1"}
    assert below(["Applesauce"], source, "include_labels") == {"3"}
    assert below(["frequency:r"], source, "include_labels") >= {"3"}
    assert below(["frequency:f", "frequency:c"], source, "include_labels") - set(source.subclasses) == {"1", "2"}
    with pytest.raises(InputError, match="several classes are called 'spray_can': 1, 3"):
        below(["spray_can"], source, "include_labels")
    assert {row["label"] for row in boxes_of(source)} == {"1", "2"}
    assert {row["is_group_of"] for row in boxes_of(source)} == {-1}, "LVIS does not say"
    assert photos_of(source)[3]["file_name"] == "train2017/000000000034.jpg"


def opened_with(files: Path, categories: int) -> Source:
    """The first categories alone."""
    few = files.parent / "few"
    for path in files.iterdir():
        document = json.loads(path.read_text())
        path.with_name(path.name.replace("v1", "v1_few")).write_text(
            json.dumps({**document, "categories": CATEGORIES[:categories]})
        )
    few = files.parent / "few"
    few.mkdir()
    for path in files.glob("*few*"):
        path.rename(few / path.name)
    return opened(few, files.parent / "photos", splits=("train", "validation"))
