"""Editing, as users call it: whatever goes in, the photo comes out edited, or one line says what is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis.strategies import data, floats, integers
from PIL import Image, ImageCms
from torch import nn

from pbe_core.errors import InputError
from pbe_core.images.crop import Rectangle, Window, cut, cut_mask, paste
from pbe_train import PaintByExample, sample
from pbe_train.checkpoints.from_pretrained import load_run
from pbe_train.editing.paint_by_example import Preview, choose_window
from pbe_train.model.paint_model import attention_to_condition
from pbe_train.model.pipeline import Run

SHAPE = (40, 60)


def photo(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*(shape or SHAPE), 3), np.uint8)


def rectangle(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def region(*shape: int) -> np.ndarray:
    return rectangle(*(shape or SHAPE), 10, 12, 26, 30)


@pytest.fixture(scope="module")
def paint(run_folder: Path) -> PaintByExample:
    return PaintByExample.from_pretrained(run_folder)


def levels(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


@settings(max_examples=60)
@given(
    height=integers(1, 90),
    width=integers(1, 90),
    top=integers(0, 89),
    left=integers(0, 89),
    tall=integers(1, 90),
    wide=integers(1, 90),
)
def test_the_window_holds_the_region_and_the_photo_holds_the_window(height, width, top, left, tall, wide):
    top, left = top % height, left % width
    mask = rectangle(height, width, top, left, top + tall, left + wide)
    window = choose_window(mask)
    # Marked wherever it is to be repainted, also in what is mirrored: the model sees none of it.
    marked = np.repeat(mask[..., None], 3, axis=2) * np.uint8(255)
    shown = cut_mask(mask, window, window.side)
    assert np.array_equal(cut(marked, window)[..., 0] > 0, shown)
    if window.side <= min(height, width):
        assert shown.sum() == mask.sum()
        assert window.left >= 0 <= window.top
        assert window.left + window.side <= width
        assert window.top + window.side <= height
    else:  # Only because the region itself is longer than the photo's short side.
        assert window.side == max(mask.any(1).sum(), mask.any(0).sum())


def test_a_thin_region_survives_shrinking():
    assert cut_mask(rectangle(100, 100, 50, 0, 51, 100), Window(0, 0, 100), 16).any(1).sum() == 1


@settings(max_examples=30)
@given(height=integers(2, 40), width=integers(2, 40), seed=integers(0, 99))
def test_pasting_changes_the_region_and_nothing_else(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    mask[0, 0] = True
    window, picture = choose_window(mask), photo(seed, height, width)
    edited = paste(picture, np.full((window.side, window.side, 3), 255, np.uint8), mask, window)
    assert np.array_equal(edited[~mask], picture[~mask])
    # The weakest share of the view, at the region's border, is 1 / 1.5.
    assert (edited[mask].astype(int) >= picture[mask].astype(int) + (255 - picture[mask].astype(int)) * 0.6 - 1).all()


@settings(max_examples=60)
@given(height=integers(1, 30), width=integers(1, 30), share=floats(0, 1), seed=integers(0, 9999), data=data())
def test_pasting_fades_by_the_distance_to_what_is_kept(height, width, share, seed, data):
    """Whatever the mask and the window: the rule, written over the whole photo, gives the same bytes."""
    draws = np.random.default_rng(seed)
    mask = cv2.blur(draws.random((height, width)), (3, 3)) < share
    window = Window(data.draw(integers(-5, width - 1)), data.draw(integers(-5, height - 1)), data.draw(integers(6, 40)))
    picture, view = photo(seed, height, width), draws.integers(0, 256, (window.side, window.side, 3), np.uint8)
    weight = np.clip(cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5) / 1.5, 0, 1)[..., None]
    laid = picture.copy()
    for y, x in np.argwhere(mask).tolist():
        if window.rectangle().holds(Rectangle(x, y, x + 1, y + 1)):
            laid[y, x] = np.rint(weight[y, x] * view[y - window.top, x - window.left] + (1 - weight[y, x]) * picture[y, x])
    assert np.array_equal(paste(picture, view, mask, window), laid)


@pytest.mark.parametrize("shape", [(50, 90), (32, 32), (20, 120)])
def test_outside_the_mask_every_byte_is_the_photos_own(paint: PaintByExample, shape: tuple[int, int]):
    """Also where no square fits (20 x 120 with a long region), at any photo size."""
    picture, mask = photo(1, *shape), rectangle(*shape, 5, 10, 18, shape[1] - 5)
    edited = np.asarray(paint(picture, mask, photo(2, 20, 30), steps=1))
    assert edited.shape == picture.shape
    assert np.array_equal(edited[~mask], picture[~mask])
    assert (edited[mask] != picture[mask]).mean() > 0.5
    whole = np.asarray(paint(picture, np.ones(shape, bool), photo(2, 20, 30), steps=1))
    assert (whole != picture).any(axis=2).mean() > 0.8


def test_blending_can_be_switched_off(paint: PaintByExample):
    edited, window = np.asarray(paint(photo(1), region(), photo(2, 20, 30), steps=1, blend=False)), choose_window(region())
    inside = rectangle(*SHAPE, window.top, window.left, window.top + window.side, window.left + window.side)
    assert np.array_equal(edited[~inside], photo(1)[~inside])
    assert (edited[inside & ~region()] != photo(1)[inside & ~region()]).mean() > 0.5


def test_the_view_the_model_sees_is_grey_where_it_is_repainted(paint: PaintByExample, monkeypatch: pytest.MonkeyPatch):
    """As the masked images of the training: 0 in [-1, 1] where the mask is True, the photo elsewhere."""
    seen = []
    monkeypatch.setattr(Run, "encode_pixels", lambda _, pixels: seen.append(pixels) or torch.zeros(len(pixels), 4, 4, 4))
    mask, picture = rectangle(32, 32, 8, 8, 24, 24), photo(1, 32, 32)
    paint(picture, mask, picture, steps=1)
    assert (seen[0][0][:, mask] == 0).all()
    assert torch.equal(seen[0][0][:, ~mask], torch.from_numpy(picture).permute(2, 0, 1)[:, ~mask].float() / 127.5 - 1)


def test_averaged_weights_are_the_default(paint: PaintByExample, run_folder: Path):
    plain = load_run(run_folder, "model")
    assert not torch.equal(plain.model.unet.conv_in.weight, paint.run.model.unet.conv_in.weight)


def test_files_pictures_and_arrays_give_the_same_edit(paint: PaintByExample, tmp_path: Path):
    given = {"image": photo(1), "mask": region(), "reference": photo(2, 20, 30)}
    once = paint(**given, steps=1)
    assert isinstance(once, Image.Image)
    pictures = {name: Image.fromarray(array) for name, array in given.items()}
    files = {name: tmp_path / f"{name}.png" for name in given}
    for name, picture in pictures.items():
        picture.save(files[name])
    for others in (pictures, files, {name: str(path) for name, path in files.items()}):
        assert levels(once, paint(**others, steps=1)) == 0
    assert levels(once, paint(**given, steps=1, seed=1)) > 0
    assert levels(once, paint(**given, steps=1, seed=np.int64(0))) == 0


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A photo with a colour profile, a mask, a reference, and a place for the edit; beside them another reference and mask."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(photo(1)).save(tmp_path / "image.png", icc_profile=profile)
    others = {"mask": region(), "reference": photo(2, 20, 30), "second": photo(3, 30, 20), "small": region(20, 30)}
    for name, array in others.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in ("image", "mask", "reference", "out")}


def call(monkeypatch: pytest.MonkeyPatch, *words: object, **options: object) -> None:
    """`pbe edit`, with these options and words behind them."""
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["sample", *given, *map(str, words)])
    sample.main()


def test_the_command_line_gives_the_same_bytes(paint: PaintByExample, run_folder: Path, files, tmp_path, monkeypatch):
    how = {"seed": 7, "guidance": 3.0, "steps": 2, "scheduler": "DPMSolverMultistepScheduler", "size": 48}
    references = files["reference"], tmp_path / "second.png"
    given = {name: files[name] for name in ("image", "mask", "out")}
    call(monkeypatch, "--reference", *references, model=run_folder, **given, **how)
    same = paint(files["image"], files["mask"], list(references), **how)
    assert levels(Image.open(files["out"]), same) == 0
    assert (
        Image.open(files["out"]).info["icc_profile"] == same.info["icc_profile"] == Image.open(files["image"]).info["icc_profile"]
    )
    assert levels(same, paint(files["image"], files["mask"], references[0], **how)) > 0


def test_a_profile_goes_with_rgb_alone(paint: PaintByExample, files: dict[str, Path], tmp_path: Path):
    """Without it the same bytes would be other colours. That of a CMYK photo says nothing of RGB."""
    with Image.open(files["image"]) as opened:
        profile = opened.info["icc_profile"]
        assert paint(opened, region(), photo(2), steps=1).info["icc_profile"] == profile
        opened.convert("CMYK").save(tmp_path / "cmyk.jpg", icc_profile=profile)
    for image in (tmp_path / "cmyk.jpg", photo(1)):
        assert "icc_profile" not in paint(image, region(), photo(2), steps=1).info


def test_an_edit_is_the_same_alone_and_among_others(paint: PaintByExample):
    shapes = [SHAPE, (50, 35), (64, 64)]
    images = [photo(number, *shape) for number, shape in enumerate(shapes)]
    masks, references = [region(*shape) for shape in shapes], [photo(9 + number, 20, 30) for number in range(3)]
    together = paint(images, masks, references, seed=np.array([3, 4, 5]), steps=2)
    at_once = paint(images, masks, references, seed=[3, 4, 5], steps=2, batch_size=3)
    for number in range(3):
        alone = paint(images[number], masks[number], references[number], seed=3 + number, steps=2)
        assert levels(together[number], alone) == 0
        assert levels(at_once[number], alone) <= 1


def test_several_references_of_an_object_are_averaged(paint: PaintByExample):
    one, other = photo(2, 20, 30), photo(3, 30, 20)
    conditions = paint.run.condition([one, other, [one, other], [other, one]])
    torch.testing.assert_close(conditions[2], conditions[:2].mean(dim=0))
    torch.testing.assert_close(conditions[2], conditions[3])
    given = photo(1), region()
    both = paint([given[0]] * 2, [given[1]] * 2, [[one, other], one], steps=1)  # For several photos, a list for each.
    assert levels(both[0], paint(*given, [one, other], steps=1)) == 0
    assert levels(both[1], paint(*given, one, steps=1)) == 0
    assert levels(*both) > 0
    seeing_all = paint.run.settings.model_copy(update={"model": paint.run.settings.model.model_copy(update={"tokens": "all"})})
    with pytest.raises(InputError, match="several references of one object need a model of class tokens"):
        Run(paint.run.model, paint.run.vae, seeing_all, paint.run.identity, 2).condition([[photo(1), photo(2)]])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_paints_nearly_the_same(run_folder: Path, paint: PaintByExample, precision: str):
    half = PaintByExample.from_pretrained(run_folder, precision=precision)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {parameter.dtype for network in (half.run.model, half.run.vae) for parameter in network.parameters()} == {kind}
    given = photo(1), region(), photo(2, 20, 30)
    edited, whole = (np.asarray(each(*given, steps=1)).astype(int) for each in (half, paint))
    assert 0 < np.abs(edited - whole)[region()].mean() < 8


def test_offloaded_networks_take_turns(run_folder: Path, paint: PaintByExample, monkeypatch: pytest.MonkeyPatch):
    """One at a time on the device; here that is the CPU as well, so what is looked at is who is moved when."""
    moves: list[str] = []
    whole = nn.Module.to

    def to(self: nn.Module, *given: object, **more: object) -> nn.Module:
        moves.append(type(self).__name__)
        return whole(self, *given, **more)

    offloaded = PaintByExample.from_pretrained(run_folder, offload=True)
    given = photo(1), region(), photo(2, 20, 30)
    monkeypatch.setattr(nn.Module, "to", to)
    edited = offloaded(*given, steps=2)
    monkeypatch.undo()
    networks = ("Encoder", "Conditioner", "UNet2DConditionModel", "Decoder")
    # Encoder in; out, conditioner in; out, U-Net in, for all steps; out, decoder in.
    assert [name for name in moves if name in networks] == [name for name in networks for _ in range(2)][:-1]
    assert levels(edited, paint(*given, steps=2)) == 0
    assert offloaded.run.device == torch.device("cpu")


def test_an_offloaded_network_is_there_when_guidance_begins(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """After a look at what is being painted the decoder has its place; what attention to no condition comes to is new then."""
    moves: list[str] = []
    whole = nn.Module.to

    def to(self: nn.Module, *given: object, **more: object) -> nn.Module:
        moves.append(f"{type(self).__name__} to the {given[0]}")
        return whole(self, *given, **more)

    offloaded = PaintByExample.from_pretrained(run_folder, device="cpu", offload=True)
    unet = offloaded.run.model.unet
    there: list[str] = []
    projection = next(attention_to_condition(unet)).to_v
    projection.register_forward_hook(lambda *_: there.append([move for move in moves if "Block" not in move][-1]))
    monkeypatch.setattr(nn.Module, "to", to)
    offloaded(photo(1), region(), photo(2, 20, 30), steps=4, guidance_interval=(0.5, 1), callback=lambda now: now.photos())
    # Once for the condition, and once without one.
    assert there == ["UNet2DConditionModel to the cpu"] * 2


@pytest.mark.parametrize("offload", [False, True])
def test_nothing_larger_than_it_is_to_be_reaches_the_device(run_folder: Path, monkeypatch: pytest.MonkeyPatch, offload: bool):
    """A device that holds no numbers stands in for a small GPU: networks come to it halved, or not before they work."""
    moves: list[object] = []
    whole = nn.Module.to

    def to(self: nn.Module, *given: object, **more: object) -> nn.Module:
        if type(self).__name__ == "PaintByExampleModel":
            moves.append(given[0])
        return whole(self, *given, **more)

    monkeypatch.setattr(nn.Module, "to", to)
    paint = PaintByExample.from_pretrained(run_folder, device="meta", precision="fp16", offload=offload)
    assert [str(given) for given in moves] == ["cpu", "torch.float16"] + ([] if offload else ["meta"])
    assert {parameter.device.type for parameter in paint.run.model.parameters()} == ({"cpu"} if offload else {"meta"})
    assert paint.run.device.type == "meta"


def test_previews_come_with_each_step(paint: PaintByExample):
    seen: list[Preview] = []
    pictures: list[Image.Image] = []

    def watch(preview: Preview) -> None:
        seen.append(preview)
        pictures.extend(preview.photos())

    given = [photo(1), photo(2)], [region(), region()], [photo(3, 20, 30)] * 2
    edited = paint(*given, steps=3, callback=watch)
    assert [(preview.step, preview.steps, preview.first) for preview in seen] == [(s, 3, f) for f in (0, 1) for s in (1, 2, 3)]
    for number, picture in enumerate(pictures):
        assert np.array_equal(np.asarray(picture)[~region()], given[0][number // 3][~region()])
    inside = [np.abs(np.asarray(p).astype(int) - np.asarray(edited[0]).astype(int))[region()].mean() for p in pictures[:3]]
    assert inside[2] < inside[0], "it comes closer to what it will be"


def turned(path: Path) -> np.ndarray:
    """A photo whose EXIF says that it lies on its side, and how it is to be seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(4)).save(path, exif=exif)
    return np.rot90(photo(4), -1)


def test_a_photo_is_edited_as_it_is_seen(paint: PaintByExample, tmp_path: Path):
    path = tmp_path / "turned.png"
    seen, mask = turned(path), region(60, 40)
    edited = np.asarray(paint(path, mask, photo(2, 9, 9), steps=1))
    assert np.array_equal(edited[~mask], seen[~mask])
    for image, reference in ((Image.open(path), photo(2, 9, 9)), (seen, photo(2, 9, 9))):
        assert np.array_equal(edited, np.asarray(paint(image, mask, reference, steps=1)))
    assert levels(paint(seen, mask, path, steps=1), paint(seen, mask, seen, steps=1)) == 0, "and so is a reference"


def test_views_are_decoded_a_few_at_a_time(paint: PaintByExample, monkeypatch: pytest.MonkeyPatch):
    whole, sizes = paint.run.vae.decode, []
    monkeypatch.setattr(paint.run.vae, "decode", lambda latents: sizes.append(len(latents)) or whole(latents))
    assert paint.run.decode(torch.randn(9, 4, 4, 4)).shape == (9, 32, 32, 3)
    assert sizes == [4, 4, 1]


ARRAY = "an array of .*; give uint8"
WHOLE = "must be a whole number"
PICTURE = "is no picture; give a file"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": np.zeros(SHAPE, bool)}, "mask: the mask is empty"),
        ({"mask": region(40, 61)}, "mask: the mask is 61x40 px, the photo image is 60x40 px; draw"),
        ({"mask": region()[None]}, f"mask: {ARRAY}"),
        ({"mask": torch.zeros(3)}, f"mask: Tensor {PICTURE}"),
        ({"image": photo(1) / 255}, f"image: {ARRAY}"),
        ({"image": photo(1).transpose(2, 0, 1)}, f"image: {ARRAY}"),
        ({"image": None}, f"image: NoneType {PICTURE}"),
        ({"image": "nowhere.png"}, r"nowhere\.png: cannot be read"),
        ({"image": __file__}, r".*test_editing\.py: not a readable photo \(not_an_image"),
        ({"reference": Image.new("F", (4, 4))}, "reference: not a readable photo .*floating-point numbers"),
        ({"reference": Image.new("I", (4, 4))}, "reference: not a readable photo .*32-bit numbers; convert it to 8"),
        ({"reference": [[photo(1), photo(2)]]}, f"reference: list {PICTURE}"),
        ({"reference": []}, "1 images, 1 masks, 1 references, 1 seeds: give as many of each, and at least one"),
        ({"image": [photo(1)], "mask": [region()] * 2}, "1 images, 2 masks, 1 references, 1 seeds: give as many of each"),
        ({"image": [], "mask": [], "reference": []}, "0 images, 0 masks, 0 references, 0 seeds: give as many of each"),
        ({"image": [photo(1)], "mask": [np.zeros(SHAPE, bool)]}, "mask 0: the mask is empty"),
        ({"seed": [1, 2]}, "1 images, 1 masks, 1 references, 2 seeds"),
        ({"seed": 1.7}, f"seed 1.7: {WHOLE}"),
        ({"seed": [1.9]}, f"seed 1.9: {WHOLE}"),
        ({"seed": None}, f"seed None: {WHOLE}"),
        ({"steps": 0}, "steps 0: must be 1 or more"),
        ({"steps": 2.5}, f"steps 2.5: {WHOLE}"),
        ({"batch_size": "2"}, f"batch_size '2': {WHOLE}"),
        ({"size": 20}, "size 20: must be a multiple of 16 px"),
        ({"size": 64.0}, f"size 64.0: {WHOLE}"),
        ({"guidance": None}, "guidance None: must be a finite number"),
        ({"guidance": float("nan")}, "guidance nan: must be a finite number"),
        ({"scheduler": "Fast"}, "Fast: no scheduler"),
        ({"scheduler": DDIMScheduler}, "<class .*: no scheduler"),
        ({"scheduler": None}, "None: no scheduler"),
        ({"weights": "EMA"}, "weights 'EMA': give one of ema, model"),
        ({"precision": "int8"}, "precision 'int8': give one of auto, fp32, bf16, fp16"),
        ({"device": "gpu"}, "device gpu: not to be had here"),
    ],
)
def test_bad_input_is_one_line(paint: PaintByExample, changed: dict, message: str):
    given = {"image": photo(1), "mask": region(), "reference": photo(2, 20, 30), "steps": 1, **changed}
    with pytest.raises(InputError, match=f"^{message}") as caught:
        PaintByExample.from_pretrained("nowhere", **changed) if {"weights", "precision", "device"} & {*changed} else paint(
            **given
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": "small.png"}, r"small\.png: the mask is 30x20 px, the photo .*image\.png is 60x40 px"),
        ({"reference": "gone.png"}, r"gone\.png: cannot be read"),
        ({"out": "result.gif"}, r"result\.gif: write a \.png"),
        ({"out": "image.png/edited.png"}, r"edited\.png: cannot be written to"),
        ({}, r"gone: no such file or folder, and no hub id"),
    ],
)
def test_the_command_line_names_what_is_wrong_before_a_model_is_read(files, tmp_path, monkeypatch, changed, message):
    given = {**files, **{name: tmp_path / value for name, value in changed.items()}}
    with pytest.raises(InputError, match=message):
        call(monkeypatch, model=tmp_path / "gone", **given)
    assert not files["out"].exists()


def test_a_run_is_found_from_anywhere_and_checked_against_its_frozen_networks(run_folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pbe_core.network_files.REPOSITORY", run_folder.parent)
    assert PaintByExample.from_pretrained(run_folder.name).run.step == 2
    shutil.copytree(run_folder, tmp_path / "run")
    state = next((tmp_path / "run").glob("checkpoints/*/state.json"))
    content = json.loads(state.read_text())
    content["identity"]["encoder_sha256"] = "f" * 64
    state.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"model\.encoder .* now has other weights"):
        load_run(tmp_path / "run")


def test_nothing_is_imported_before_it_is_needed():
    subprocess.run([sys.executable, "-c", "import sys, pbe_train; assert 'torch' not in sys.modules"], check=True)
