"""The small parts of the contract: randomness, atomic files, weights' identity, dataset.json, pictures, the generated page."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pbe_core.dataset_reader import find_imbalance, read_dataset
from pbe_core.errors import InputError, run_program
from pbe_core.files import atomic_file, write_atomically
from pbe_core.images.sheets import PINK, WHITE, fit, frame, outline, sheet, tint
from pbe_core.randomness import generator, name_hash, uniform
from pbe_core.settings import REPOSITORY
from pbe_core.vae import load_vae, weights_sha256
from schemas.dataset import Books
from schemas.document import document


def test_the_page_on_the_format_is_what_the_schemas_say():
    page = (REPOSITORY / "docs" / "data-format.md").read_text()
    assert page == document(), "docs/data-format.md is stale: run `make docs`"


def test_random_streams_are_pinned():
    """These numbers may never change: every dataset and every training run would."""
    assert name_hash(0, "photo order", "abc") == 2173592768969061212
    assert uniform(0, "photo order", "abc") == 2173592768969061212 // 2**11 / 2**53
    draws = [uniform("test", number) for number in range(4000)]
    assert 0 < min(draws) < 0.01 < 0.99 < max(draws) < 1
    assert sum(draws) / 4000 == pytest.approx(0.5, abs=0.02)
    assert generator(0, "abc", "view", 0).integers(0, 1000, 4).tolist() == [726, 116, 833, 694]
    names = [(0, "a"), (1, "a"), (0, "b"), ("0", "a"), (0, "a", 0), ("ab",), ("a", "b")]
    assert len({tuple(generator(*name).integers(0, 2**60, 2).tolist()) for name in names}) == len(names)


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    with pytest.raises(RuntimeError, match="crash"), atomic_file(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half of the n")
        assert temporary.parent == tmp_path
        raise RuntimeError("crash")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_the_identity_of_weights_is_their_values():
    state = {"a": torch.rand(2, 3).half().float(), "b": torch.zeros(4)}
    assert weights_sha256(state) == weights_sha256({name: tensor.half() for name, tensor in reversed(state.items())})
    assert weights_sha256(state) != weights_sha256({**state, "b": torch.tensor([0, 0, 0, 1e-6])})
    assert weights_sha256(state) != weights_sha256({**state, "b": torch.zeros(2, 2)})


def test_no_vae_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}.*no AutoencoderKL here"):
        load_vae(str(tmp_path))


def test_books_that_do_not_balance_are_told():
    balanced = Books(
        boxes=5, objects=3, rejects={"too_small": 2}, planned=6, samples=5, failures={"missing": 1}, masks={}, padded_views=0
    )
    assert find_imbalance(balanced) is None
    assert "5 boxes" in (find_imbalance(balanced.model_copy(update={"rejects": {}})) or "")
    assert "6 samples" in (find_imbalance(balanced.model_copy(update={"failures": {}})) or "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other", "", "no dataset here"),
        ("plan.parquet", "", "not finished"),
        ("dataset.json", "{", "damaged"),
        ("dataset.json", '{"format_version": 1, "old": 1}', "format version 1, this program reads .*build the dataset again"),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [(InputError("a.csv: bad"), 2, "error: a.csv: bad\n"), (None, 0, ""), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_programs_end_with_a_line_and_a_status(capsys, raised, status, said):
    def main() -> None:
        if raised:
            raise raised

    with pytest.raises(SystemExit) as caught:
        run_program(main)
    assert caught.value.code == status
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(("raised", "status"), [("", 141), ("raise BrokenPipeError(32, 'of a server')", 1)])
def test_a_program_whose_reader_has_enough_says_nothing(raised: str, status: int):
    """As in `plan.py --help | head`. That a server has ended its connection is another matter."""
    program = (
        f"import sys; from pbe_core.errors import run_program\ndef main():\n    print('much')\n    {raised}\nrun_program(main)"
    )
    reads, writes = os.pipe()
    if status == 141:
        os.close(reads)
    done = subprocess.run([sys.executable, "-c", program], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert done.returncode == status
    assert done.stderr.startswith("error: [Errno 32] of a server") if status == 1 else not done.stderr


def test_pictures_keep_their_aspect_and_place():
    red = np.zeros((10, 20, 3), np.uint8)
    red[...] = (255, 0, 0)
    fitted = fit(red, 40)
    assert (fitted[20] == (255, 0, 0)).all()
    assert (fitted[5] == 255).all()
    laid = sheet([[red, red], [red]], ["one", "two"], ["first", "second"], cell=40, gap=2)
    assert laid.shape[1] == 2 * 42 + 2
    assert (laid == (255, 0, 0)).all(axis=2).sum() == 3 * 40 * 20
    mask = np.zeros((10, 20), bool)
    mask[2:5, 2:5] = True
    changed = (tint(red, mask) != red).any(axis=2)
    around = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)  # The outline has a dark side.
    assert changed[mask].all()
    assert not changed[~around].any()


@pytest.mark.parametrize("side", [128, 1024, 4000])
@pytest.mark.parametrize("background", [PINK, WHITE, (230, 20, 40)], ids=str)
def test_lines_are_seen_on_things_of_their_own_colour(side, background):
    """A pink box around something red, a white one on snow: in a cell of a sheet, as people look at it."""
    picture = np.full((side, side, 3), background, np.uint8)
    low, high = side // 4, 3 * side // 4
    mask = np.zeros((side, side), bool)
    mask[low:high, low:high] = True
    cells = [frame(picture, (low, low, high, high), colour) for colour in (PINK, WHITE)]
    if side <= 1024:  # As views and references are.
        cells += [outline(picture, mask), tint(picture, mask)]
    for drawn in cells:
        across = np.abs(fit(drawn, 160)[80].astype(int) - background).max(axis=1)
        # Where the row crosses the left and the right side.
        for crossing in (40, 120):
            assert across[crossing - 4 : crossing + 4].max() > 60
