"""The kind that no network has seen: photos as a user would bring them, questions, and a table that counts by pairs."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe_core.settings import load_settings, preset
from pbe_train.config import TrainSettings
from pbe_train.evaluation.pair_sets import open_pairs
from pipelines.config import BuildSettings
from tests.conftest import call_program
from tiny_world import new_kind
from tiny_world.kinds import KINDS, NEW_KIND


def test_photos_boxes_and_questions_show_the_new_one_and_known_kinds(tmp_path: Path) -> None:
    """The same bytes twice; each photo's box is where the individual's colours are; known kinds are asked for beside it."""
    for name in ("one", "two"):
        new_kind.write(tmp_path / name, photos=3, known=3, new=2, others=16)
    files = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert all((tmp_path / "two" / name).read_bytes() == data for name, data in files.items())
    with (tmp_path / "one" / "boxes.csv").open() as file:
        boxes = list(csv.DictReader(file))
    rows = [row for row in boxes if row["label"] == NEW_KIND.name]
    assert [row["photo"] for row in rows] == ["00.jpg", "01.jpg", "02.jpg"]
    known = {row["photo"] for row in boxes if row["label"] in {kind.name for kind in KINDS}}
    assert known & {"03.jpg", "04.jpg", "05.jpg"}
    assert len(list((tmp_path / "one" / "photos").iterdir())) == 6
    turquoise = np.array(new_kind.the_new_one().first)
    for row in rows:
        photo = np.asarray(Image.open(tmp_path / "one" / "photos" / row["photo"])) / 255
        left, top, right, bottom = (int(row[edge]) for edge in ("x_min", "y_min", "x_max", "y_max"))
        near = np.abs(photo - turquoise).max(2) < 0.25
        assert near[top:bottom, left:right].mean() > 0.15
        assert max(right - left, bottom - top) >= new_kind.LEAST_SIDE_PX
    labels = [pair.label for pair in open_pairs(tmp_path / "one" / "questions").pairs]
    assert labels.count(NEW_KIND.name) == 2
    assert set(labels) == {NEW_KIND.name, *(kind.name for kind in KINDS)}
    done = call_program(new_kind.main, "--out", str(tmp_path / "one"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_table_counts_what_changed(tmp_path: Path) -> None:
    """Ten of the new kind, of which six are gained and none is lost; of the others one of each."""
    marks = [(0, 1)] * 6 + [(1, 1)] * 2 + [(0, 0)] * 2
    known = [(1, 0), (0, 1), (1, 1), (1, 1)]
    pairs = [
        {"label": label, "scores": {"before": {"recognised (shape)": old}, "after": {"recognised (shape)": new}}}
        for label, each in ((NEW_KIND.name, marks), ("Blue drop", known))
        for old, new in each
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"pairs": pairs}))
    new, others = new_kind.compare(tmp_path).splitlines()[2:]
    assert new.startswith("| new kind, shape | 10 | 20.0 [")
    assert "| 80.0 [" in new
    assert new.endswith("| 6, 0 | 0.031 |")
    assert others.endswith("| 1, 1 | 1 |")
    done = call_program(new_kind.main, "--compare", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "give the --out of pbe evaluate" in done.stderr


@pytest.mark.parametrize("name", ["lora", "lora_tiny"])
def test_the_presets_are_read(name: str) -> None:
    train = load_settings(TrainSettings, "train", [], preset(name))
    build = load_settings(BuildSettings, "build", [], preset(name))
    assert train.lora
    assert train.model.pretrained
    assert train.dataset == build.out
    assert build.source.kind == "boxes"
