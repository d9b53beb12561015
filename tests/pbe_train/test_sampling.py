"""The defaults of whatever paints: guidance in an interval, and the published way, which stays to be had byte for byte."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbe_core.errors import InputError
from pbe_train import PaintByExample, sample
from pbe_train.config import TIMESTEPS
from pbe_train.model.diffusion import paint_latents
from pbe_train.model.sampling import PUBLISHED_SCHEDULER, PUBLISHED_STEPS, SCHEDULER, STEPS, check_interval, guided_at
from pbe_train.model.schedulers import SCHEDULERS

PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
MASK = np.zeros((48, 64), bool)
MASK[12:30, 20:44] = True


@pytest.fixture(scope="module")
def paint(run_folder: Path) -> PaintByExample:
    return PaintByExample.from_pretrained(run_folder)


def edited(paint: PaintByExample, **how: object) -> bytes:
    picture = paint(PHOTO, MASK, PHOTO[::-1], seed=3, **how)
    assert isinstance(picture, Image.Image)
    return picture.tobytes()


@pytest.fixture
def asked(paint: PaintByExample) -> Iterator[Counter[int]]:
    """Timestep -> predictions for one item, whatever batches they come in."""
    counted: Counter[int] = Counter()
    times: list[int] = []
    unet = paint.run.model.unet
    # Each pass begins with the embedding of its time, and ends with what is predicted for each item.
    began = unet.time_proj.register_forward_hook(lambda _, inputs, __: times.append(int(inputs[0][0])))
    ended = unet.conv_out.register_forward_hook(lambda _, inputs, __: counted.update([times[-1]] * len(inputs[0])))
    yield counted
    began.remove()
    ended.remove()


def test_outside_its_interval_guidance_takes_no_second_pass(paint: PaintByExample, asked: Counter[int]):
    """Ten steps, at 999, 899, ...: a share of the schedule of 0, 0.1, ... is behind them. The start is in, the end is not."""
    edited(paint, guidance=3.0, guidance_interval=(0.2, 0.7), steps=10, scheduler="DDIMScheduler")
    assert asked == {999: 1, 899: 1, 799: 2, 699: 2, 599: 2, 499: 2, 399: 2, 299: 1, 199: 1, 99: 1}


def test_an_interval_of_everything_is_guidance_everywhere_and_one_of_nothing_is_none(paint: PaintByExample):
    how = {"steps": 4, "scheduler": "DDIMScheduler"}
    everywhere = edited(paint, guidance=3.0, **how)
    assert edited(paint, guidance=3.0, guidance_interval=(0, 1), **how) == everywhere
    part = edited(paint, guidance=3.0, guidance_interval=(0.5, 1), **how)
    nowhere = edited(paint, guidance=3.0, guidance_interval=(0.1, 0.2), **how)  # Steps lie at 0, 0.25, 0.5, 0.75.
    assert len({everywhere, part, nowhere}) == 3
    assert nowhere == edited(paint, guidance=1.0, **how)


@pytest.mark.parametrize("timestep", [TIMESTEPS - 1, 500.5, 0])
def test_each_timestep_lies_in_one_of_the_intervals_that_meet(timestep: float):
    assert [guided_at(timestep, each, TIMESTEPS) for each in ((0.0, 0.3), (0.3, 0.6), (0.6, 1.0))].count(True) == 1
    assert guided_at(timestep, (0.0, 1.0), TIMESTEPS)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [(0.8, 0.2), (0.5, 0.5), (-0.1, 1), (0, 1.5), (0,), (0, float("nan")), "all", 0.5, (0, "a")])
def test_what_is_no_interval_is_one_line(wrong: object):
    with pytest.raises(InputError, match=r"^guidance interval .*: give two shares of the schedule"):
        check_interval(wrong)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", ["01", ("0", "1"), (False, True)])
def test_what_could_be_read_as_numbers_is_no_interval_either(wrong: object):
    with pytest.raises(InputError, match=r"^guidance interval .*: give two shares of the schedule"):
        check_interval(wrong)  # type: ignore[arg-type]


def test_the_published_way_is_50_steps_of_plms_at_guidance_5(paint: PaintByExample, asked: Counter[int]):
    """What these settings paint by name, but for rounding: its passes are diffusers' own. The default is another picture."""
    exact = edited(paint, exact_published=True)
    # 981, 961, ..., 1: PLMS goes through the second one twice, and guidance takes two passes.
    assert asked == {time: 4 if time == 961 else 2 for time in range(981, 0, -20)}
    named = edited(paint, guidance=5.0, steps=50, scheduler='PNDMScheduler(timestep_spacing="leading")')
    assert np.abs(np.frombuffer(exact, np.uint8).astype(int) - np.frombuffer(named, np.uint8)).max() <= 1
    assert (PUBLISHED_SCHEDULER, PUBLISHED_STEPS) == ('PNDMScheduler(timestep_spacing="leading")', 50)
    assert exact != edited(paint)


@pytest.mark.parametrize("other", [{"steps": 20}, {"scheduler": "DDIMScheduler"}, {"guidance_interval": (0, 0.5)}])
def test_the_published_way_goes_with_nothing_else(paint: PaintByExample, other: dict[str, object]):
    with pytest.raises(InputError, match=r"^exact published: 50 steps of PLMS"):
        edited(paint, exact_published=True, **other)


def test_the_published_way_takes_no_16_bits(run_folder: Path):
    paint = PaintByExample.from_pretrained(run_folder, precision="bf16")
    with pytest.raises(InputError, match=r"^exact published: the model computes in bf16; load it with precision fp32"):
        edited(paint, exact_published=True)
    with pytest.raises(InputError, match=r"^exact published: no features are kept in it; leave reuse 2 out"):
        edited(PaintByExample.from_pretrained(run_folder), exact_published=True, reuse=2)


@pytest.fixture
def command(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`pbe edit` of the same photo, mask and reference; gives the picture's bytes."""
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    Image.fromarray(PHOTO[::-1]).save(tmp_path / "reference.png")
    files = [
        word
        for name, file in (("image", "photo"), ("mask", "mask"), ("reference", "reference"))
        for word in (f"--{name}", f"{tmp_path / file}.png")
    ]

    def run(*options: str) -> bytes:
        given = ["sample", "--model", str(run_folder), *files, "--seed", "3", "--out", str(tmp_path / "out.png"), *options]
        monkeypatch.setattr("sys.argv", given)
        sample.main()
        return Image.open(tmp_path / "out.png").tobytes()

    return run


def test_the_command_paints_what_the_library_paints(command, paint: PaintByExample):
    assert command("--exact-published") == edited(paint, exact_published=True)
    assert command("--guidance-interval", "0.2", "0.7", "--steps", "6") == edited(paint, guidance_interval=(0.2, 0.7), steps=6)
    assert command() == edited(paint, steps=STEPS, scheduler=SCHEDULER)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--exact-published", "--steps", "20"], "exact published: 50 steps of PLMS"),
        (["--guidance-interval", "0.7", "0.2"], r"guidance interval 0.7 0.2: give two shares"),
    ],
)
def test_what_does_not_go_together_is_told_before_a_model_is_read(command, options, told, monkeypatch):
    monkeypatch.setattr(PaintByExample, "from_pretrained", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(InputError, match=f"^{told}"):
        command(*options)


@pytest.mark.usefixtures("unchecked")
def test_the_default_begins_at_the_last_timestep_in_so_many_passes():
    """Whatever scheduler is chosen, one prediction a step: what it costs is told by `steps`."""
    seen = []

    class Watching:
        class conditioner:
            uncond_vector = torch.zeros(1, 1, 3)

        @staticmethod
        def predict(noisy, masked, mask_channel, timestep, condition):
            seen.append(float(timestep[0]))
            return torch.zeros_like(noisy)

    given = torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 3)
    paint_latents(Watching(), *given, seeds=[0], guidance=1.0, steps=STEPS, scheduler=SCHEDULER, prediction="epsilon")
    assert (seen[0], len(seen)) == (999, STEPS)
    assert SCHEDULER.partition("(")[0] in SCHEDULERS
