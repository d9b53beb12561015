"""The Gradio space: what it paints is what the library paints; its page is made where Gradio is installed."""

import ast
import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.gradio_space import app
from pbe_core.errors import InputError
from pbe_train import PaintByExample

EXAMPLE = Path(__file__).resolve().parents[2] / "tiny_world" / "example"
PHOTO, REFERENCE = str(EXAMPLE / "photo.png"), str(EXAMPLE / "reference.png")


def editor_value() -> dict[str, object]:
    """What Gradio's ImageEditor gives: arrays RGBA, strokes on a layer that is transparent elsewhere."""
    photo = np.asarray(Image.open(PHOTO).convert("RGBA"))
    layer = np.zeros_like(photo)
    layer[40:80, 30:90] = 255
    return {"background": photo, "layers": [layer, np.zeros_like(photo)], "composite": photo}


def test_a_stroke_becomes_the_edit_that_the_library_paints_and_progress_is_told():
    told = []
    edited = app.edit(PHOTO, editor_value(), [REFERENCE], 7, 2.0, 2, told.append)
    mask = np.zeros((128, 128), bool)
    mask[40:80, 30:90] = True
    how = {"seed": 7, "guidance": 2.0, "steps": 2}
    expected = PaintByExample.from_pretrained(app.MODEL)(PHOTO, mask, REFERENCE, **how)
    assert np.array_equal(edited, expected)
    photo = np.asarray(Image.open(PHOTO).convert("RGB"))
    assert np.array_equal(np.asarray(edited)[~mask], photo[~mask])
    assert told == [(1, 2), (2, 2)]


def test_a_large_photo_is_brushed_on_a_small_copy_and_edited_at_full_size(tmp_path):
    large = Image.open(PHOTO).convert("RGB").resize((3000, 1500))
    exif = Image.Exif()
    exif[0x0112] = 6  # To be shown turned by a quarter.
    large.save(tmp_path / "large.png", exif=exif)
    copy = app.for_editor(str(tmp_path / "large.png"))
    assert copy.size == (512, 1024)
    layer = np.zeros((1024, 512, 4), np.uint8)
    layer[400:500, 100:200] = 255
    edited = np.asarray(app.edit(str(tmp_path / "large.png"), {"layers": [layer]}, [REFERENCE], 0, 2.0, 2, print))
    upright = np.rot90(np.asarray(large), -1)
    assert edited.shape == upright.shape == (3000, 1500, 3)
    rows, columns = np.nonzero((edited != upright).any(2))
    assert 400 * 3000 // 1024 <= rows.min() < rows.max() <= 500 * 3000 // 1024
    assert 100 * 1500 // 512 <= columns.min() < columns.max() <= 200 * 1500 // 512 + 1
    assert app.for_editor(None) is None


def test_what_is_missing_is_one_sentence():
    for photo, drawn, references in (
        (None, editor_value(), [REFERENCE]),
        (PHOTO, None, [REFERENCE]),
        (PHOTO, editor_value(), None),
    ):
        with pytest.raises(InputError, match="choose a photo, brush over what is to be repainted, and give a reference"):
            app.edit(photo, drawn, references, 0, 2.0, 2, print)
    nothing = editor_value()["layers"][1:]
    with pytest.raises(InputError, match="the mask is empty"):
        app.edit(PHOTO, {"layers": nothing}, [REFERENCE], 0, 2.0, 2, print)


def test_what_it_imports_is_there_and_gradio_waits_for_its_page():
    tree = ast.parse(Path(app.__file__).read_text())
    named = [(node.module, one.name) for node in tree.body if isinstance(node, ast.ImportFrom) for one in node.names]
    assert ("pbe_train", "PaintByExample") in named
    assert all(hasattr(importlib.import_module(module), name) for module, name in named)
    assert not any("gradio" in ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))


def test_where_gradio_is_installed_its_page_is_made():
    gradio = pytest.importorskip("gradio", reason="no Gradio here: examples/gradio_space/requirements.txt")
    blocks = app.page()
    assert isinstance(blocks, gradio.Blocks)
    labels = {block.label for block in blocks.blocks.values() if getattr(block, "label", None)}
    assert {"Photo", "References of one object", "Result", "Seed", "Guidance", "Steps"} <= labels
