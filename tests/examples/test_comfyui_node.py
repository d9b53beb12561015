"""The ComfyUI nodes, called as ComfyUI's documentation says that it calls them, with real tensors and a real model.

ComfyUI itself is not on PyPI. Of it only the progress bar and the cancel button have a stand-in here.
"""

import importlib.util
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pbe_train import PaintByExample
from pbe_train.model.schedulers import SCHEDULERS

EXAMPLE = REPOSITORY / "tiny_world" / "example"
SETTINGS = {"guidance": 2.0, "steps": 2, "scheduler": "DPMSolverMultistepScheduler"}
COMFY_UTILS = """
told = []
class ProgressBar:
    def __init__(self, total):
        told.clear()
    def update_absolute(self, value, total=None, preview=None):
        told.append((value, total))
"""
COMFY_MANAGEMENT = """
interrupted = False
class InterruptProcessingException(Exception):
    pass
def throw_exception_if_processing_interrupted():
    if interrupted:
        raise InterruptProcessingException()
"""


def load_as_comfyui_does(folder: Path) -> dict[str, type]:
    """A folder of custom_nodes is a module of some name of its own, loaded from its __init__.py."""
    spec = importlib.util.spec_from_file_location("custom_nodes_x_paint_by_example", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    return module.NODE_CLASS_MAPPINGS


NODES = load_as_comfyui_does(REPOSITORY / "examples" / "comfyui")


def run(name: str, **inputs: object) -> object:
    """The only output of a node, with the defaults of what is not given, checked and called as ComfyUI's executor does."""
    node = NODES[name]
    for key, (kind, *options) in node.INPUT_TYPES()["required"].items():
        default = options[0].get("default") if options else None
        value = inputs.setdefault(key, kind[0] if isinstance(kind, list) else default)
        assert value in kind if isinstance(kind, list) else value is not None, key
    with torch.inference_mode():
        outputs = getattr(node(), node.FUNCTION)(**inputs)
    assert isinstance(outputs, tuple)
    assert len(outputs) == len(node.RETURN_TYPES) == 1
    return outputs[0]


def tensor(picture: Path | np.ndarray) -> torch.Tensor:
    """As ComfyUI's Load Image makes it."""
    pixels = np.array(Image.open(picture).convert("RGB")) if isinstance(picture, Path) else picture
    return torch.from_numpy(pixels.astype(np.float32) / 255.0)[None]


def as_bytes(batch: torch.Tensor) -> np.ndarray:
    """As ComfyUI's Save Image writes it."""
    return np.clip(255.0 * batch.numpy(), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> PaintByExample:
    return run("PaintByExampleLoader", device="cpu")


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    return (tensor(EXAMPLE / "mask.png")[..., 0] > 0.5).float()


PHOTO, REFERENCE = tensor(EXAMPLE / "photo.png"), tensor(EXAMPLE / "reference.png")


def directly(model: PaintByExample, photo: torch.Tensor, mask: torch.Tensor, reference: object, seed: int) -> np.ndarray:
    return np.asarray(model(as_bytes(photo), mask.numpy() > 0.5, reference, seed=seed, **SETTINGS))


def test_the_interface_is_whole():
    for node in NODES.values():
        inputs = node.INPUT_TYPES()["required"]
        assert list(inspect.signature(getattr(node, node.FUNCTION)).parameters)[1:] == list(inputs)
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        assert node.CATEGORY
    schedulers = NODES["PaintByExampleEdit"].INPUT_TYPES()["required"]["scheduler"][0]
    assert {name.partition("(")[0] for name in schedulers} <= set(SCHEDULERS)


def test_an_edit_is_the_librarys_and_keeps_every_value_outside_the_mask(model, mask):
    edited = run("PaintByExampleEdit", model=model, photo=PHOTO, mask=mask, reference=REFERENCE, seed=7, **SETTINGS)
    assert edited.shape == PHOTO.shape
    assert edited.dtype == torch.float32
    outside = mask[0] < 0.5
    assert torch.equal(edited[0][outside], PHOTO[0][outside])
    assert not torch.equal(edited, PHOTO)
    expected = directly(model, PHOTO[0], mask[0], EXAMPLE / "reference.png", 7)
    assert np.array_equal(np.asarray(edited[0] * 255).round().astype(np.uint8), expected)

    # Between two levels of 8 bits, as other nodes leave them.
    finer = (PHOTO + 0.3 / 255).clamp(0, 1)
    edited = run("PaintByExampleEdit", model=model, photo=finer, mask=mask, reference=REFERENCE, seed=7, **SETTINGS)
    assert torch.equal(edited[0][outside], finer[0][outside])


def test_a_batch_is_edited_photo_by_photo_and_references_are_of_one_object(model, mask):
    photos, references = torch.cat([PHOTO, PHOTO.flip(2)]), torch.cat([REFERENCE, REFERENCE.flip(2)])
    for masks in (mask, mask[0], torch.cat([mask, mask.flip(2)])):
        edited = run(
            "PaintByExampleEdit", model=model, photo=photos, mask=masks, reference=references, seed=2**64 - 1, **SETTINGS
        )
        each = masks.reshape(-1, *mask.shape[1:]).expand(2, -1, -1)
        shown = [as_bytes(one) for one in references]
        for number, seed in ((0, 2**64 - 1), (1, 0)):
            expected = directly(model, photos[number], each[number], shown, seed)
            assert np.array_equal(np.asarray(edited[number] * 255).round().astype(np.uint8), expected)


def test_what_does_not_fit_is_one_sentence(model, mask):
    def edit(**changed: object) -> None:
        run("PaintByExampleEdit", **{"model": model, "photo": PHOTO, "mask": mask, "reference": REFERENCE, **SETTINGS, **changed})

    for changed, sentence in (
        (
            {"mask": torch.zeros(1, 64, 64)},
            "the mask is 64x64 px, the photo image is 128x128 px; draw the mask at the photo's size",
        ),
        ({"mask": torch.zeros_like(mask)}, "the mask is empty; paint the region to be edited white"),
        ({"mask": mask.expand(3, -1, -1)}, "3 masks for 1 photos: give one for all, or one each"),
        ({"photo": PHOTO[..., :1]}, r"image: an array of uint8 \[128, 128, 1\]; give uint8"),
    ):
        with pytest.raises(InputError, match=sentence):
            edit(**changed)
    with pytest.raises(InputError, match="no/such/model"):
        run("PaintByExampleLoader", source="no/such/model")


def test_comfyuis_progress_bar_moves_and_its_cancel_button_ends_the_edit(model, mask, tmp_path, monkeypatch):
    (tmp_path / "comfy").mkdir()
    for name, code in (("__init__", ""), ("utils", COMFY_UTILS), ("model_management", COMFY_MANAGEMENT)):
        (tmp_path / "comfy" / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        import comfy.model_management
        import comfy.utils

        inputs = {"model": model, "photo": PHOTO.expand(2, -1, -1, -1), "mask": mask, "reference": REFERENCE, **SETTINGS}
        run("PaintByExampleEdit", **inputs)
        assert comfy.utils.told == [(1, 4), (2, 4), (3, 4), (4, 4)]
        comfy.model_management.interrupted = True
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run("PaintByExampleEdit", **inputs)
        assert comfy.utils.told == []
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "comfy"]:
            del sys.modules[name]
