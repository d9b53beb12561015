"""The editing library, as its users call it: whatever goes in, the photo comes out edited, or one line says what is wrong."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn

from pbe_core.errors import InputError
from pbe_train import PaintByExample, sample
from pbe_train.editing.paint_by_example import Preview
from pbe_train.model.pipeline import Run
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from tests.pbe_train.small_world import World

SHAPE = (40, 60)


def photo(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*(shape or SHAPE), 3), np.uint8)


def region(*shape: int) -> np.ndarray:
    mask = np.zeros(shape or SHAPE, bool)
    mask[10:26, 12:30] = True
    return mask


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(world.settings(out, "--steps=2"), Distributed(0, 1, torch.device("cpu")))
    return out


@pytest.fixture(scope="module")
def paint(folder: Path) -> PaintByExample:
    return PaintByExample.from_pretrained(folder)


def levels(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def test_files_pictures_and_arrays_give_the_same_edit(paint: PaintByExample, tmp_path: Path):
    given = {"image": photo(1), "mask": region(), "reference": photo(2, 20, 30)}
    once = paint(**given, steps=2)
    assert isinstance(once, Image.Image)
    outside = ~region()
    assert np.array_equal(np.asarray(once)[outside], given["image"][outside])
    assert (np.asarray(once)[region()] != given["image"][region()]).mean() > 0.5
    pictures = {name: Image.fromarray(array) for name, array in given.items()}
    files = {name: tmp_path / f"{name}.png" for name in given}
    for name, picture in pictures.items():
        picture.save(files[name])
    for others in (
        pictures,
        files,
        {name: str(path) for name, path in files.items()},
        given | {"mask": region() * np.uint8(255)},
    ):
        assert levels(once, paint(**others, steps=2)) == 0
    assert levels(once, paint(**given, steps=2, seed=1)) > 0


def test_the_command_line_gives_the_same_bytes(paint: PaintByExample, folder: Path, tmp_path: Path, monkeypatch):
    files = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "reference", "out", "second")}
    for name, array in {"image": photo(1), "mask": region(), "reference": photo(2, 20, 30), "second": photo(3, 30, 20)}.items():
        Image.fromarray(array).save(files[name])
    more = ["--seed", "7", "--guidance", "3", "--steps", "3", "--scheduler", "DPMSolverMultistepScheduler", "--size", "48"]
    words = [word for name in ("image", "mask", "out") for word in (f"--{name}", str(files[name]))]
    words += ["--reference", str(files["reference"]), str(files["second"])]
    monkeypatch.setattr(sys, "argv", ["sample", "--model", str(folder), *words, *more])
    sample.main()
    references = [files["reference"], files["second"]]
    same = {"seed": 7, "guidance": 3.0, "steps": 3, "scheduler": "DPMSolverMultistepScheduler", "size": 48}
    assert levels(Image.open(files["out"]), paint(files["image"], files["mask"], references, **same)) == 0
    assert levels(Image.open(files["out"]), paint(files["image"], files["mask"], references[:1], **same)) > 0


def test_an_edit_is_the_same_alone_and_among_others(paint: PaintByExample):
    shapes = [SHAPE, (50, 35), (64, 64)]
    images = [photo(number, *shape) for number, shape in enumerate(shapes)]
    masks, references = [region(*shape) for shape in shapes], [photo(9 + number, 20, 30) for number in range(3)]
    together = paint(images, masks, references, seed=[3, 4, 5], steps=2)
    at_once = paint(images, masks, references, seed=[3, 4, 5], steps=2, batch_size=3)
    for number in range(3):
        alone = paint(images[number], masks[number], references[number], seed=3 + number, steps=2)
        assert levels(together[number], alone) == 0
        assert levels(at_once[number], alone) <= 1
    same_seed = paint(images[:1] * 2, masks[:1] * 2, references[:1] * 2, seed=8, steps=2)
    assert levels(*same_seed) == 0


def test_several_references_of_an_object_are_averaged(paint: PaintByExample):
    one, other = photo(2, 20, 30), photo(3, 30, 20)
    conditions = paint.run.condition([one, other, [one, other], [other, one]])
    torch.testing.assert_close(conditions[2], conditions[:2].mean(dim=0))
    torch.testing.assert_close(conditions[2], conditions[3])
    given = photo(1), region()
    assert levels(paint(*given, [one, one], steps=2), paint(*given, one, steps=2)) <= 1
    assert levels(paint(*given, [one, other], steps=2), paint(*given, one, steps=2)) > 0
    # For several photos, a list for each.
    both = paint([given[0]] * 2, [given[1]] * 2, [[one, other], one], steps=2)
    assert levels(both[0], paint(*given, [one, other], steps=2)) == 0
    assert levels(both[1], paint(*given, one, steps=2)) == 0


def test_several_references_need_class_tokens(paint: PaintByExample):
    seeing_all = paint.run.settings.model_copy(update={"model": paint.run.settings.model.model_copy(update={"tokens": "all"})})
    run = Run(paint.run.model, paint.run.vae, seeing_all, paint.run.identity, 2)
    with pytest.raises(InputError, match="several references of one object need a model of class tokens"):
        run.condition([[photo(1), photo(2)]])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_paints_nearly_the_same(folder: Path, paint: PaintByExample, precision: str):
    half = PaintByExample.from_pretrained(folder, precision=precision)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for network in (half.run.model, half.run.vae):
        assert {parameter.dtype for parameter in network.parameters()} == {kind}
    given = photo(1), region(), photo(2, 20, 30)
    edited = half(*given, steps=2)
    assert np.array_equal(np.asarray(edited)[~region()], given[0][~region()])
    inside = np.abs(np.asarray(edited).astype(int) - np.asarray(paint(*given, steps=2)).astype(int))[region()]
    assert 0 < inside.mean() < 8


def test_offloaded_networks_take_turns(folder: Path, paint: PaintByExample, monkeypatch: pytest.MonkeyPatch):
    """One at a time on the device; here that is the CPU as well, so what is looked at is who is moved when."""
    moves: list[tuple[str, str]] = []
    whole = nn.Module.to

    def to(self: nn.Module, *given: object, **more: object) -> nn.Module:
        moves.append((type(self).__name__, str(given[0]) if given else ""))
        return whole(self, *given, **more)

    offloaded = PaintByExample.from_pretrained(folder, offload=True)
    given = photo(1), region(), photo(2, 20, 30)
    monkeypatch.setattr(nn.Module, "to", to)
    edited = offloaded(*given, steps=3)
    monkeypatch.undo()
    brought = [name for name, _ in moves if name in ("Encoder", "Conditioner", "UNet2DConditionModel", "Decoder")]
    # Encoder in; out, conditioner in; out, U-Net in, for all steps; out, decoder in.
    assert brought == [
        "Encoder",
        "Encoder",
        "Conditioner",
        "Conditioner",
        "UNet2DConditionModel",
        "UNet2DConditionModel",
        "Decoder",
    ]
    assert levels(edited, paint(*given, steps=3)) == 0
    assert offloaded.run.device == torch.device("cpu")


@pytest.mark.parametrize("offload", [False, True])
def test_nothing_larger_than_it_is_to_be_reaches_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch, offload: bool):
    """A device that holds no numbers stands in for a small GPU: networks come to it halved, or not before they work."""
    moves: list[object] = []
    whole = nn.Module.to

    def to(self: nn.Module, *given: object, **more: object) -> nn.Module:
        if type(self).__name__ == "PaintByExampleModel":
            moves.append(given[0])
        return whole(self, *given, **more)

    monkeypatch.setattr(nn.Module, "to", to)
    paint = PaintByExample.from_pretrained(folder, device="meta", precision="fp16", offload=offload)
    there = {parameter.device.type for parameter in paint.run.model.parameters()}
    assert [str(given) for given in moves] == ["cpu", "torch.float16"] + ([] if offload else ["meta"])
    assert there == ({"cpu"} if offload else {"meta"})
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
    assert levels(pictures[0], pictures[2]) > 0
    inside = [np.abs(np.asarray(p).astype(int) - np.asarray(edited[0]).astype(int))[region()].mean() for p in pictures[:3]]
    assert inside[2] < inside[0], "it comes closer to what it will be"


def test_a_preview_knows_how_many_steps_there_are(paint: PaintByExample):
    """PNDM takes more than it is asked for."""
    seen: list[Preview] = []
    paint(photo(1), region(), photo(3, 20, 30), steps=4, scheduler="PNDMScheduler", callback=seen.append)
    assert len(seen) > 4
    assert [(preview.step, preview.steps) for preview in seen] == [(number + 1, len(seen)) for number in range(len(seen))]


def test_seeds_are_whole_numbers_of_any_kind(paint: PaintByExample):
    given = photo(1), region(), photo(3, 20, 30)
    once = paint(*given, steps=1, seed=3)
    assert levels(once, paint(*given, steps=1, seed=np.int64(3))) == 0
    both = paint(*([each] * 2 for each in given), steps=1, seed=np.array([3, 4]))
    assert levels(once, both[0]) == 0


def turned(path: Path) -> np.ndarray:
    """A photo whose EXIF says that it lies on its side, and how it is to be seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(4)).save(path, exif=exif)
    return np.rot90(photo(4), -1)


def test_a_photo_is_edited_as_it_is_seen(paint: PaintByExample, tmp_path: Path):
    seen = turned(tmp_path / "turned.png")
    edited = np.asarray(paint(tmp_path / "turned.png", region(60, 40), photo(2, 9, 9), steps=1))
    assert np.array_equal(edited[~region(60, 40)], seen[~region(60, 40)])
    assert np.array_equal(edited, np.asarray(paint(Image.open(tmp_path / "turned.png"), region(60, 40), photo(2, 9, 9), steps=1)))


@pytest.mark.parametrize("kind", ["one pixel", "CMYK", "EXIF"])
def test_references_are_read_as_photos(paint: PaintByExample, tmp_path: Path, kind: str):
    """The edit is that with the same reference as plain RGB."""
    path, plain = tmp_path / "reference.tif", photo(5, 24, 24)
    if kind == "one pixel":
        plain = photo(5, 1, 1)
        Image.fromarray(plain).save(path)
    elif kind == "CMYK":
        Image.fromarray(plain).convert("CMYK").save(path)
    else:
        path = tmp_path / "reference.png"
        plain = turned(path)
    given = photo(1), region()
    assert levels(paint(*given, path, steps=1), paint(*given, plain, steps=1)) == 0


def test_a_mask_that_is_all_white_repaints_the_whole_photo(paint: PaintByExample):
    for shape in (SHAPE, (32, 32)):
        edited = np.asarray(paint(photo(1, *shape), np.ones(shape, bool), photo(2, 20, 30), steps=2))
        assert (edited != photo(1, *shape)).any(axis=2).mean() > 0.8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": np.zeros(SHAPE, bool)}, r"^mask: the mask is empty; paint the region to be edited white$"),
        (
            {"mask": region(40, 61)},
            r"^mask: the mask is 61x40 px, the photo image is 60x40 px; draw the mask at the photo's size$",
        ),
        ({"mask": region()[None]}, r"^mask: an array of bool \[1, 40, 60\]; give uint8"),
        ({"image": photo(1) / 255}, r"^image: an array of float64 \[40, 60, 3\]; give uint8, 0-255"),
        (
            {"image": photo(1).transpose(2, 0, 1)},
            r"^image: an array of uint8 \[3, 40, 60\]; give uint8, 0-255, RGB \[height, width",
        ),
        ({"reference": Image.new("F", (4, 4))}, r"^reference: Pillow cannot read it .*floating-point numbers"),
        (
            {"reference": Image.new("I", (4, 4))},
            r"^reference: Pillow cannot read it .*32-bit numbers; convert it to 8",
        ),
        ({"reference": []}, r"^reference 0: an empty list; give a photo of what to paint$"),
        ({"reference": [photo(1), "nowhere.png"]}, r"^nowhere\.png: no such file; give the path of a photo$"),
        ({"image": [photo(1)], "mask": [region()] * 2}, r"^1 images, 2 masks, 1 references, 1 seeds: give as many of each"),
        ({"image": [], "mask": [], "reference": []}, r"^0 images, 0 masks, 0 references, 0 seeds: give as many of each"),
        ({"image": [photo(1)], "mask": [np.zeros(SHAPE, bool)]}, r"^mask 0: the mask is empty"),
        ({"seed": [1, 2]}, r"^1 images, 1 masks, 1 references, 2 seeds"),
        ({"steps": 0}, r"^steps 0: must be 1 or more$"),
        ({"batch_size": 0}, r"^batch_size 0: must be 1 or more$"),
        ({"size": 20}, r"^size 20: must be a multiple of 16 px"),
        ({"scheduler": "Fast"}, r"^Fast: diffusers has no such scheduler"),
    ],
)
def test_bad_input_is_one_line(paint: PaintByExample, changed: dict, message: str):
    with pytest.raises(InputError, match=message) as caught:
        paint(**{"image": photo(1), "mask": region(), "reference": photo(2, 20, 30), "steps": 1, **changed})
    assert "\n" not in str(caught.value)


WRONG_TYPES = """
import sys, numpy, torch
from diffusers import DDIMScheduler
from pbe_train import PaintByExample
from pbe_core.errors import InputError

def said(call, **given):
    try:
        call(**given)
    except InputError as error:
        return print(error)
    print("nothing")

photo = numpy.zeros((32, 32, 3), numpy.uint8)
whole = {"image": photo, "mask": numpy.ones((32, 32), bool), "reference": photo, "steps": 1}
for wrong in ({"weights": "EMA"}, {"precision": "int8"}, {"device": "gpu"}):
    said(PaintByExample.from_pretrained, source=sys.argv[1], **wrong)
paint = PaintByExample.from_pretrained(sys.argv[1])
for wrong in (
    {"scheduler": None}, {"scheduler": DDIMScheduler}, {"image": None}, {"mask": torch.zeros(3)}, {"reference": [[photo, photo]]},
    {"guidance": None}, {"guidance": float("nan")}, {"steps": 2.5}, {"batch_size": "2"}, {"size": 64.0}, {"seed": 1.7},
    {"seed": [1.9]}, {"seed": None}, {"seed": numpy.array(3)},
):
    said(paint, **{**whole, **wrong})
"""


def test_what_is_of_a_wrong_kind_is_one_line(folder: Path):
    """In a process of its own, where types are not checked on the way in."""
    done = subprocess.run([sys.executable, "-c", WRONG_TYPES, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].startswith("device gpu: not to be had here (")
    assert lines[:2] + lines[3:] == [
        "weights 'EMA': give one of ema, model",
        "precision 'int8': give one of fp32, bf16, fp16",
        "NoneType: diffusers has no such scheduler; for example DDIMScheduler or DPMSolverMultistepScheduler",
        "nothing",
        "image: NoneType is no picture; give a file, a picture of Pillow, or an array",
        "mask: Tensor is no picture; give a file, a picture of Pillow, or an array",
        "reference: list is no picture; give a file, a picture of Pillow, or an array",
        "guidance None: must be a finite number",
        "guidance nan: must be a finite number",
        "steps 2.5: must be a whole number",
        "batch_size '2': must be a whole number",
        "size 64.0: must be a whole number",
        "seed 1.7: must be a whole number",
        "seed 1.9: must be a whole number",
        "seed None: must be a whole number",
        "nothing",
    ]


def test_a_run_of_the_projects_own_tree_is_found_from_anywhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pbe_core.vae.REPOSITORY", folder.parent)
    monkeypatch.chdir(tmp_path)
    assert PaintByExample.from_pretrained(folder.name).run.step == 2


def test_the_photos_colour_profile_stays(paint: PaintByExample, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without it the same bytes would be other colours. That of a CMYK photo says nothing of RGB."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(photo(1)).save(tmp_path / "photo.png", icc_profile=profile)
    Image.fromarray(photo(1)).convert("CMYK").save(tmp_path / "cmyk.jpg", icc_profile=profile)
    given = {"mask": region(), "reference": photo(2, 20, 30), "steps": 1}
    with Image.open(tmp_path / "photo.png") as opened:
        for image in (tmp_path / "photo.png", opened):
            assert paint(image, **given).info["icc_profile"] == profile
    assert "icc_profile" not in paint(tmp_path / "cmyk.jpg", **given).info
    assert "icc_profile" not in paint(photo(1), **given).info
    Image.fromarray(region()).save(tmp_path / "mask.png")
    names = {
        "model": folder,
        "image": "photo.png",
        "mask": "mask.png",
        "reference": "photo.png",
        "out": "made/edited.jpg",
        "steps": 1,
    }
    options = [word for name, value in names.items() for word in (f"--{name}", str(value))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample", *options])
    sample.main()
    with Image.open(tmp_path / "made" / "edited.jpg") as edited:
        assert edited.info["icc_profile"] == profile


@pytest.mark.parametrize("out", ["folder.png", "file/edited.png"])
def test_a_place_that_cannot_be_written_to_is_told_before_painting(folder: Path, tmp_path: Path, monkeypatch, out: str):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    Image.fromarray(photo(1)).save(tmp_path / "photo.png")
    Image.fromarray(region()).save(tmp_path / "mask.png")
    pictures = [f"--{name}={tmp_path / file}" for name, file in (("image", "photo.png"), ("mask", "mask.png"), ("out", out))]
    monkeypatch.setattr(sys, "argv", ["sample", "--model", "nowhere", "--reference", str(tmp_path / "photo.png"), *pictures])
    with pytest.raises(InputError, match=rf"--out {tmp_path}/{out}: cannot be written to"):
        sample.main()


def test_nothing_is_imported_before_it_is_needed():
    program = "import sys, pbe_train as p; assert 'torch' not in sys.modules; p.PaintByExample; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
