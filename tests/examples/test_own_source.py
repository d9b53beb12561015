"""A reader of one's own: the example of 50 lines reads LabelMe's files, and is run only where the environment names it."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pbe_core.dataset_reader import find_imbalance, read_dataset
from pbe_core.errors import InputError
from pipelines.annotations import open_source
from pipelines.config import BuildSettings
from pipelines.dataset.write_plan import hash_inputs
from pipelines.inspection.contact_sheet import photo_source
from pipelines.readers import OWN, reader_of
from tests.conftest import REPOSITORY, VAE, run_build
from tests.format_files import BOXES, labelme, write

EXAMPLE = REPOSITORY / "examples" / "own_source.py"
# A reader that leaves word of having been run.
TELLTALE = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nREADER = None\n"


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setenv(OWN, str(EXAMPLE))


def settings_of(folder: Path, **source: object) -> BuildSettings:
    source = {"kind": "labelme", "annotations": folder, "photos": folder, **source}
    return BuildSettings(out=folder.parent / "out", source=source)


def test_the_example_builds_to_shards_with_every_box_accounted_for(named, tmp_path, monkeypatch):
    """The file is small enough to be copied, its hash is an input, and the dataset is looked at where nobody has the reader."""
    assert len(EXAMPLE.read_text().splitlines()) <= 50
    annotations, photos = labelme(tmp_path / "set")
    shapes = [{"label": "cat", "shape_type": "circle", "points": [[1, 2], [3, 4]]}]
    size = {"imageHeight": 120, "imageWidth": 160}
    write(annotations / "more.json", json.dumps({"shapes": shapes, "imagePath": "t1.jpg", **size}))
    write(annotations / "broken.json", "{")
    out = tmp_path / "out"
    folders = ["--source.kind", "labelme", "--source.annotations", str(annotations), "--source.photos", str(photos)]
    rules = ["--source.validation_share", "0.4", "--seed", "2", "--selection.max_area", "1", "--references.background", "grey"]
    run_build(*folders, *rules, "--views.size", "64", "--latents.vae", VAE, "--out", str(out))
    info = read_dataset(out)
    assert find_imbalance(info.books) is None
    assert (info.books.boxes, info.books.objects) == (BOXES + 2, BOXES)
    assert pq.read_table(out / "rejects.parquet").column("reason").to_pylist() == ["bad_row", "bad_row"]
    assert hash_inputs(settings_of(annotations), open_source(settings_of(annotations))).keys() >= {"own_source.py"}
    monkeypatch.delenv(OWN)
    assert photo_source(info).photo_frame == "exif"


def test_workers_need_no_reader(named, tmp_path):
    """Settings go to them as they are: what packing asks of a reader is in these."""
    annotations, _ = labelme(tmp_path / "set")
    (tmp_path / "settings").write_bytes(pickle.dumps(settings_of(annotations)))
    there = (
        "import pickle, sys; source = pickle.load(open(sys.argv[1], 'rb')).source; print(source.photo_frame, source.photos_by_id)"
    )
    environment = {name: value for name, value in os.environ.items() if name != OWN} | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", there, str(tmp_path / "settings")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["exif", "False"], done.stderr


def test_no_config_and_no_dataset_runs_a_reader(tmp_path, monkeypatch):
    """Whatever a kind is called, nothing is imported by it: not the name of a file here, nor that of a module."""
    write(tmp_path / "stranger.py", TELLTALE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for kind in ("stranger", "stranger.py", "stranger:READER", str(tmp_path / "stranger.py")):
        with pytest.raises(ValueError, match="is none of open_images"):
            settings_of(tmp_path, kind=kind)
    assert not (tmp_path / "stranger.ran").exists()
    monkeypatch.setenv(OWN, str(tmp_path / "stranger.py"))
    with pytest.raises(InputError, match=r"stranger.py: expected READER = Reader"):
        reader_of("anything")
    assert (tmp_path / "stranger.ran").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such Python file"),
        ("READER = 5", "expected READER = Reader"),
        ("import nothing_of_this_name", "cannot be imported .ModuleNotFoundError"),
        ("from pipelines.readers import Reader\nREADER = Reader('coco', print)", "another reader of the kind coco"),
        ("from pipelines.readers import Reader\nREADER = Reader('My kind', print)", "the kind in lower-case letters"),
    ],
)
def test_a_file_that_is_no_reader_is_one_sentence(text, says, tmp_path, monkeypatch):
    if text is not None:
        write(tmp_path / "mine.py", text)
    monkeypatch.setenv(OWN, os.pathsep.join([str(EXAMPLE), str(tmp_path / "mine.py")]))
    with pytest.raises(InputError, match=says) as caught:
        reader_of("my_kind")
    assert "\n" not in str(caught.value)
