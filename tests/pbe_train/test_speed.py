"""In which way a machine edits: what is chosen from which measurement, that it is measured once, and what is told."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pbe_core.errors import InputError
from pbe_train import PaintByExample
from pbe_train.editing import placing, speed
from pbe_train.editing.prepacked import can_prepack, prepack
from pbe_train.editing.speed import PLAIN, Way, choose, fastest_way, measure, ways_of
from tests.pbe_train.test_editing import call, levels, photo, region
from tests.pbe_train.test_editing import files as files
from tests.pbe_train.test_editing import paint as paint
from tests.pbe_train.test_model import make_model

LAST, PACKED, FP16 = Way("fp32", True), Way("fp32", True, True), Way("fp16", True)
CPU = torch.device("cpu")
# A processor without AVX-512 packs no weights of 16 bits.
BF16, BF16_PACKED = Way("bf16", True), Way("bf16", True, can_prepack(CPU, torch.bfloat16))


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({PLAIN: 1.0, LAST: 0.95, BF16: 2.0}, PLAIN),  # A CPU without bf16, where the layout gains next to nothing.
        ({PLAIN: 1.0, LAST: 0.8, BF16: 0.75}, LAST),  # What bf16 gains beyond the layout is not worth its rounding.
        ({PLAIN: 1.0, LAST: 0.8, BF16: 0.4}, BF16),
        ({PLAIN: 1.0, LAST: 1.1, BF16: 0.3, FP16: 0.29}, BF16),  # A GPU with both.
        ({PLAIN: 1.0, LAST: 1.1, BF16: 1.5, FP16: 0.3}, FP16),  # A GPU before Ampere.
        ({PLAIN: 1.0}, PLAIN),
    ],
)
def test_what_is_chosen(seconds: dict[Way, float], chosen: Way):
    assert choose(seconds) == chosen


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is small."""
    monkeypatch.setattr(speed, "SMALL_PARAMETERS", 1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What is measured, on a machine where bf16 takes a third."""
    asked: list[tuple] = []

    def forced(*what):
        asked.append(what)
        return {PLAIN: 0.3, LAST: 0.25, PACKED: 0.2, BF16: 0.15, BF16_PACKED: 0.1}

    monkeypatch.setattr(speed, "measure", forced)
    return asked


def test_a_way_is_measured_once_for_a_kind_of_model(large, measured, tmp_path: Path):
    unet, cpu = make_model().unet, torch.device("cpu")
    way, note = fastest_way(unet, cpu, 16, folder=tmp_path)
    assert way == BF16_PACKED
    assert note is not None
    assert note.startswith(f"computing in {BF16_PACKED}: 3.0 x as fast as fp32 here ({tmp_path / 'speed.json'})")
    assert "\n" not in note
    assert fastest_way(unet, cpu, 16, folder=tmp_path) == (way, note)
    assert len(measured) == 1
    fastest_way(unet, cpu, 32, folder=tmp_path)
    assert len(measured) == 2
    # torch.compile packs weights itself: what is left out for it is measured all the same.
    way, note = fastest_way(unet, cpu, 16, compile=True, folder=tmp_path)
    assert way == BF16
    assert f"computing in {BF16}: " in str(note)
    way, note = fastest_way(unet, cpu, 16, folder=tmp_path)
    assert len(measured) == 2
    # A file that is damaged, of other ways, or cannot be written, is a measurement more and nothing worse.
    file = tmp_path / "speed.json"
    known = json.loads(file.read_text())
    nought, nothing = ({name: dict.fromkeys(ways, seconds) for name, ways in known.items()} for seconds in (0, math.nan))
    for content in ("[]", "{", json.dumps({name: {"fp32": 1} for name in known}), json.dumps(nought), json.dumps(nothing)):
        file.write_text(content)
        assert fastest_way(unet, cpu, 16, folder=tmp_path) == (way, note)
        assert json.loads(file.read_text())
    assert len(measured) == 7
    shutil.rmtree(tmp_path)
    tmp_path.write_text("no folder")
    assert fastest_way(unet, cpu, 16, folder=tmp_path)[0] == BF16_PACKED


def test_who_has_no_home_has_a_way_too(large, measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a container that runs under a number without a name."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unnamed(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unnamed)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert fastest_way(make_model().unet, torch.device("cpu"), 16)[0] == BF16_PACKED
    assert [path.name for path in tmp_path.rglob("*.json")] == ["speed.json"]


def test_small_models_and_other_devices_compute_as_ever(measured, tmp_path: Path):
    unet = make_model().unet
    assert fastest_way(unet, torch.device("cpu"), 16, folder=tmp_path) == (PLAIN, None)
    speed_before = speed.SMALL_PARAMETERS
    assert sum(parameter.numel() for parameter in unet.parameters()) < speed_before
    assert fastest_way(unet, torch.device("meta"), 16, folder=tmp_path) == (PLAIN, None)
    assert not measured


def test_a_measurement_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    """Each way is timed, as it is; the weights are drawn apart from the generator of others, and no gradient is kept."""
    packed: list[torch.dtype] = []
    monkeypatch.setattr(speed, "prepack", lambda layer: (packed.append(layer.convolution.weight.dtype), prepack(layer)))
    state = torch.get_rng_state()
    seconds = measure(64, 8, CPU, ways_of(CPU))
    assert list(seconds) == list(dict.fromkeys([PLAIN, LAST, PACKED, BF16, BF16_PACKED]))
    assert all(0 < needed < 60 for needed in seconds.values())
    assert packed == [speed.TYPES[way.precision] for way in seconds if way.prepacked]
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_loads_what_was_measured(large, measured, run_folder: Path, files, tmp_path, monkeypatch, capsys):
    """In the library and on the command line; whoever says fp32 has it, and nothing is measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paint = PaintByExample.from_pretrained(run_folder, device="cpu")
    assert paint.way == BF16_PACKED
    assert paint.run.model.unet.dtype == torch.bfloat16
    assert paint.run.model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    given = {name: files[name] for name in ("image", "mask", "reference", "out")}
    call(monkeypatch, model=run_folder, steps=2, device="cpu", **given)
    assert capsys.readouterr().err.count(f"computing in {BF16_PACKED}: 3.0 x as fast as fp32 here") == 1
    painted = paint(files["image"], files["mask"], files["reference"], steps=2)
    assert levels(painted, Image.open(files["out"])) == 0
    assert len(measured) == 1
    call(monkeypatch, "--precision", "fp32", model=run_folder, steps=2, device="cpu", **given)
    assert "computing in" not in capsys.readouterr().err
    plain = PaintByExample.from_pretrained(run_folder, device="cpu", precision="fp32")
    assert plain.way == PLAIN
    assert levels(plain(files["image"], files["mask"], files["reference"], steps=2), Image.open(files["out"])) == 0
    assert 0 < levels(painted, Image.open(files["out"])) <= 40


@pytest.mark.parametrize(
    ("asked", "way"),
    [
        ({"precision": "fp32"}, PLAIN),
        ({"precision": "fp32", "channels_last": True}, LAST),
        ({"precision": "fp32", "channels_last": True, "prepacked": True}, PACKED),
        ({"precision": "bf16"}, BF16_PACKED),
        ({"precision": "bf16", "prepacked": False}, BF16),
        ({"precision": "bf16", "channels_last": False}, Way("bf16", False)),
        ({"precision": "fp32", "channels_last": False, "prepacked": True}, Way("fp32", False, True)),
        ({"channels_last": False}, Way("bf16", False)),
        ({"prepacked": False}, BF16),
        ({"compile": True}, BF16),
        ({"precision": "bf16", "compile": True}, BF16),
    ],
)
def test_what_is_asked_for_wins(large, measured, run_folder: Path, tmp_path, monkeypatch, asked: dict, way: Way):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("pbe_train.editing.paint_by_example.check_compiler", lambda offload: None)
    paint = PaintByExample.from_pretrained(run_folder, device="cpu", **asked)
    assert paint.way == way
    # The network's own layout: of kernels with one position, both are one.
    kernel = paint.run.model.unet.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last if way.channels_last else torch.contiguous_format)
    if way == PLAIN:
        paint.check_exact()
    else:
        with pytest.raises(
            InputError, match=rf"exact published: the model computes in {way}(, compiled)?; load it with precision fp32"
        ):
            paint.check_exact()


def test_the_layout_changes_a_pixel_by_rounding_alone(run_folder: Path, paint: PaintByExample):
    last = PaintByExample.from_pretrained(run_folder, device="cpu", precision="fp32", channels_last=True)
    given = photo(1), region(), photo(2, 20, 30)
    assert levels(last(*given, steps=3), paint(*given, steps=3)) <= 1


def test_compiling_needs_a_compiler(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    # Others that are there are no use: PyTorch calls this one, or what CXX says, as one word.
    monkeypatch.setattr(placing.shutil, "which", lambda name: None if name.endswith("g++") else f"/usr/bin/{name}")
    with pytest.raises(InputError, match=r"compile: torch.compile needs a C\+\+ compiler, and g\+\+ is not to be found; install"):
        PaintByExample.from_pretrained(run_folder, compile=True)
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(InputError, match=r"and ccache g\+\+ is not to be found; install one"):
        PaintByExample.from_pretrained(run_folder, compile=True)
    monkeypatch.undo()
    with pytest.raises(InputError, match="compile: compiled passes cannot move to a GPU and back"):
        PaintByExample.from_pretrained(run_folder, compile=True, offload=True)


def test_a_pass_is_one_program_for_all_steps_and_edits():
    """What torch.compile is given has no breaks, and neither the next step nor the next edit compiles anew."""
    done = subprocess.run([sys.executable, "-m", "tests.pbe_train.compiled_passes"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    programs, apart = done.stdout.split()
    assert programs == "2"  # A whole pass, and one that keeps features.
    assert float(apart) < 1e-4


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_compiled_passes_paint_the_same(run_folder: Path, paint: PaintByExample, files):
    """`pbe edit --compile`, from its command to its picture: minutes of a CPU."""
    words = ["--model", run_folder, "--steps", 4, "--reuse", 2, "--device", "cpu", "--compile"]
    words += [word for name in ("image", "mask", "reference", "out") for word in (f"--{name}", files[name])]
    done = subprocess.run([sys.executable, "-m", "pbe_train.sample", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    painted = paint(files["image"], files["mask"], files["reference"], steps=4, reuse=2)
    assert levels(painted, Image.open(files["out"])) <= 1
