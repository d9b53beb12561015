"""Contact sheets: with photos and without, at random and by class."""

import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from pbe_core.dataset_reader import read_classes
from pbe_core.errors import InputError, run_program
from pbe_core.images.sheets import PINK
from pipelines import inspect_dataset
from pipelines.inspection import contact_sheet as preview
from tests.conftest import VAE


def cell(picture: np.ndarray, row: int, column: int, size: int) -> np.ndarray:
    """A picture of a sheet that has headings and captions."""
    top, left = 18 + 6 + row * (size + 6 + 18) + 18, 6 + column * (size + 6)
    return picture[top : top + size, left : left + size].astype(int)


def call(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["inspect_dataset.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        run_program(inspect_dataset.main)
    return int(caught.value.code or 0), *capsys.readouterr()


def test_without_photos_a_sheet_shows_the_same_samples(dataset, photos):
    """Views come from view.jpg or the latent: nearly those that are cut from the photos; references are the same."""
    with_photos, alone = preview.contact_sheet(dataset, photos, 8), preview.contact_sheet(dataset, None, 8)
    assert with_photos.shape == alone.shape
    for row in range(8):
        assert np.array_equal(cell(with_photos, row, 3, 200), cell(alone, row, 3, 200)), "the reference"
        for column in (1, 2):
            assert np.abs(cell(with_photos, row, column, 200) - cell(alone, row, column, 200)).mean() < 20
        assert (cell(alone, row, 0, 200) == PINK).all(axis=2).any(), "the box"
    assert not np.array_equal(with_photos, preview.contact_sheet(dataset, photos, 8, seed=1))


def test_a_vae_that_made_no_latents_of_the_dataset_is_refused(dataset, tmp_path):
    vae = AutoencoderKL.from_pretrained(VAE)
    vae.decoder.conv_in.bias.data += 0.01
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match=r"those that made the latents [0-9a-f]{12}\.\.\.; give the dataset's VAE with --vae"):
        preview.contact_sheet(dataset, None, vae=str(tmp_path / "vae"))
    with pytest.raises(InputError, match=r"nowhere: no such folder.*give the dataset's VAE with --vae"):
        preview.contact_sheet(dataset, None, vae="nowhere")


def test_by_class_each_row_is_of_one_class_the_largest_first(dataset, photos, monkeypatch):
    """What is read for each row, by the label of what was read."""
    read, kept = preview.read_sample, []
    monkeypatch.setattr(preview, "read_sample", lambda folder, row: kept.append(row) or read(folder, row))
    picture = preview.class_sheet(dataset, photos, count=3, each=2)
    counts = Counter(row["label"] for row in pq.read_table(dataset / "index.parquet").to_pylist())
    largest = sorted(counts, key=lambda label: (-counts[label], label))[:3]
    assert [row["label"] for row in kept] == [label for label in largest for _ in range(2)]
    assert len({row["key"] for row in kept}) == 6
    assert picture.shape[:2] == (18 + 3 * (160 + 6 + 18) + 6, 4 * (160 + 6) + 6)
    assert all((cell(picture, row, column, 160) == PINK).all(axis=2).any() for row in range(3) for column in (0, 2))
    assert np.abs(picture.astype(int) - preview.class_sheet(dataset, None, count=3, each=2)).mean() < 10


def test_a_class_shows_the_same_samples_whatever_else_is_shown(dataset):
    classes = read_classes(dataset)
    first, second = (classes.names[place] for place in classes.by_frequency()[:2])
    both = preview.class_sheet(dataset, labels=[first, second], each=3)
    one = preview.class_sheet(dataset, labels=[second], each=3)
    for column in range(6):
        assert np.array_equal(cell(both, 1, column, 160), cell(one, 0, column, 160))


def test_views_that_are_decoded_latents_are_called_so(dataset, photos, monkeypatch):
    """A view that is cut from the photo needs no word."""
    drawn, captions = preview.sheet, []
    monkeypatch.setattr(preview, "sheet", lambda *given, **named: captions.append(given[2]) or drawn(*given, **named))
    each = 6
    preview.class_sheet(dataset, None, count=20, each=each)
    preview.class_sheet(dataset, photos, count=2)
    preview.contact_sheet(dataset, None, 4)
    by_class, with_photos, at_random = captions
    classes, rows = read_classes(dataset), pq.read_table(dataset / "index.parquet").to_pylist()
    assert len(by_class) == len(classes.labels)
    for caption, place in zip(by_class, classes.by_frequency(), strict=True):
        assert caption.startswith(classes.names[place])
        own = {row["view_jpg"] is None for row in rows if row["label"] == classes.labels[place]}
        if classes.counts()[place] <= each:  # All are shown.
            assert ("decoded latent" in caption, "view.jpg" in caption) == (True in own, False in own)
    assert not any("latent" in caption or "view.jpg" in caption for caption in with_photos)
    assert all(("decoded latent" in caption) != ("view.jpg" in caption) for caption in at_random)


def test_classes_are_found_by_name_and_id(dataset):
    classes = read_classes(dataset)
    for place, (label, name) in enumerate(zip(classes.labels, classes.names, strict=True)):
        assert preview.find_classes(dataset, classes, [label, f" {name.upper()} "]) == [place]
    wrong = f"{classes.names[0]}s"
    with pytest.raises(InputError, match=rf"no sample is of a class `{wrong}` \(did you mean {classes.names[0]}"):
        preview.find_classes(dataset, classes, [wrong])


def test_the_command_writes_what_the_functions_draw(dataset, photos, tmp_path, capsys, monkeypatch):
    name = read_classes(dataset).names[0]
    out = tmp_path / "sheet.png"
    for options, expected in (
        (["--photos", photos, "--count", 2], preview.contact_sheet(dataset, photos, 2)),
        (["--count", 2, "--seed", 3], preview.contact_sheet(dataset, None, 2, seed=3)),
        (["--by", "class", "--count", 2, "--each", 1], preview.class_sheet(dataset, count=2, each=1)),
        (["--labels", name], preview.class_sheet(dataset, labels=[name])),
    ):
        status, printed, _ = call(capsys, monkeypatch, "preview", dataset, "--out", out, *options)
        assert status == 0
        assert printed == f"{out}\n"
        assert np.array_equal(np.array(Image.open(out)), expected)
    assert call(capsys, monkeypatch, "preview", dataset, "--out", out, "--count", 0) == (
        2,
        "",
        "error: --count 0, --each 4: must be 1 or more\n",
    )
    status, _, said = call(capsys, monkeypatch, "preview", dataset, "--out", out, "--photos", tmp_path)
    assert status == 2
    assert f"{tmp_path}: photo " in said
