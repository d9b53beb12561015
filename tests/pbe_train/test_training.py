"""The loop as users run it: torchrun, resuming, and what goes wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pbe_train.ranks import Ranks
from pbe_train.train import train
from schemas.errors import InputError
from schemas.weights import weights_sha256
from tests.pbe_train.small_world import World, make_vae

REPOSITORY = Path(__file__).resolve().parents[2]


def run(world: World, out: Path, *options: str) -> None:
    torch.manual_seed(len(options))  # The run must not depend on the generator it finds.
    train(world.settings(out, *options), Ranks(0, 1, torch.device("cpu")))


def weights(out: Path, step: int, part: str = "model") -> str:
    return weights_sha256(load_file(out / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors"))


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with pictures and a checkpoint each 3."""
    out = tmp_path_factory.mktemp("run")
    pictures = ["--pictures.every=6", "--pictures.count=2", "--pictures.sampling_steps=2"]
    run(world, out, "--checkpoint_every=3", "--log_every=1", *pictures)
    return out


def test_a_run_leaves_what_it_promises(finished: Path):
    from PIL import Image

    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert [step for step, _ in losses(finished)] == [1, 2, 3, 4, 5, 6]
    assert list((finished / "tensorboard").glob("events*"))
    assert yaml.safe_load((finished / "settings.yaml").read_text())["train"]["global_batch"] == 4
    # Two rows and five columns: source, masked, reference, two guidance scales.
    assert Image.open(finished / "pictures" / "step-00000006.png").width == 5 * 166 + 6


def test_a_stopped_run_goes_on_bit_for_bit(world: World, finished: Path, tmp_path: Path):
    """6 steps straight = 3 steps, stop, 3 steps: weights, their average, moments and losses."""
    run(world, tmp_path, "--steps=3", "--log_every=1")
    run(world, tmp_path, "--steps=6", "--log_every=1")
    for part in ("model", "ema", "optimizer"):
        assert weights(tmp_path, 6, part) == weights(finished, 6, part), part
    assert losses(tmp_path) == losses(finished)


def test_lines_beyond_the_checkpoint_are_dropped(world: World, finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    run(world, out, "--log_every=1", f"--resume={out / 'checkpoints' / 'step-00000003'}")
    assert losses(out) == losses(finished)


def test_a_short_run_learns(world: World, tmp_path: Path):
    """From a random start the loss falls by a fifth within a hundred steps; a broken optimizer or loss does not get there."""
    run(world, tmp_path, "--steps=100", "--log_every=20", "--optimizer.learning_rate=3e-3", "--global_batch=8")
    found = [loss for _, loss in losses(tmp_path)]
    assert found[-1] < 0.8 * found[0]


def launch(*arguments: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """train.py by path, from another folder; under torchrun if `ranks`."""
    program = str(REPOSITORY / "pbe_train" / "train.py")
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0", "--standalone"]
    return subprocess.run([*start, program, *arguments], capture_output=True, text=True, cwd="/", timeout=200, check=False)


def test_two_ranks_train_one_model(world: World, tmp_path: Path):
    """20 steps under torchrun with accumulation; the ranks hold equal weights, and those of one rank up to rounding."""
    options = ["--steps=20", "--global_batch=8", "--ema_decay=0"]
    config = ["--config", str(world.config), "--out", str(tmp_path / "two")]
    done = launch(*config, *options, "--accumulation=2", "--loader.workers=1", ranks=2)
    assert done.returncode == 0, done.stderr
    hashes = json.loads((tmp_path / "two" / "finished.json").read_text())["weights_sha256"]
    assert len(hashes) == 2
    assert hashes[0] == hashes[1] == weights(tmp_path / "two", 20)

    run(world, tmp_path / "one", *options)
    one, two = (load_file(tmp_path / name / "checkpoints/step-00000020/model.safetensors") for name in ("one", "two"))
    # AdamW divides by the gradient's size, so that rounding of gradients near zero shows as a step of the learning rate.
    apart = [float((one[name] - two[name]).abs().mean()) for name in one]
    assert max(apart) < 1e-3


def test_errors_are_one_line_and_status_2(world: World, tmp_path: Path):
    done = launch("--config", str(world.config), "--dataset", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: {tmp_path}/nowhere/dataset.json: no dataset here; build one first (`make shards`, or python pipelines/build.py "
        "--config ...)"
    ]


def test_another_vae_is_refused(world: World, tmp_path: Path):
    make_vae(tmp_path / "other", 1)
    with pytest.raises(InputError, match=r"dataset\.json: the latents were made by vae .* set model\.vae to that VAE"):
        run(world, tmp_path / "run", f"--model.vae={tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--global_batch=8"], r"was trained otherwise: global_batch 4 -> 8\."),
        (["--optimizer.learning_rate=0.5"], r"optimizer\.learning_rate 0\.001 -> 0\.5\."),
        (["--model.tokens=all"], r"model\.tokens 'class' -> 'all'"),
        (["--steps=5"], r"is at step 6 already"),
        (["--resume=never"], r"this run folder is in use"),
    ],
)
def test_a_run_is_not_continued_as_another(world: World, finished: Path, options: list[str], message: str):
    with pytest.raises(InputError, match=message):
        run(world, finished, *options)


@pytest.mark.parametrize("damage", ["no state", "no file", "short file", "other bytes"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(world: World, finished: Path, tmp_path: Path, damage: str):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    folder = out / "checkpoints" / "step-00000006"
    file = folder / ("state.json" if damage == "no state" else "optimizer.safetensors")
    data = bytearray(file.read_bytes())
    if damage in ("no state", "no file"):
        file.unlink()
    elif damage == "short file":
        file.write_bytes(data[:-100])
    else:
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(InputError) as caught:
        run(world, out, "--steps=7")
    assert str(caught.value).startswith(str(file))
    assert f"delete {folder} to go on" in str(caught.value)
    shutil.rmtree(folder)
    run(world, out, "--steps=6")
    assert weights(out, 6) == weights(finished, 6)


def test_a_half_written_checkpoint_is_no_checkpoint(world: World, finished: Path, tmp_path: Path):
    """What a killed save leaves bears no step's name; the run goes on from the one before and clears it away."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "checkpoints" / "step-00000006").rename(out / "checkpoints" / ".step-00000006.partial")
    run(world, out)
    assert weights(out, 6) == weights(finished, 6)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]


def test_only_the_newest_checkpoints_are_kept(world: World, tmp_path: Path):
    run(world, tmp_path, "--checkpoint_every=1", "--checkpoints_kept=2", "--steps=4")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_an_uneven_batch_is_refused(world: World, tmp_path: Path):
    with pytest.raises(InputError, match="global_batch 4 cannot be cut evenly into 1 ranks x 3 micro-batches"):
        run(world, tmp_path, "--accumulation=3")
