"""The ladder of ablations: what differs between its arms, and what it refuses."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pbe_core.errors import InputError
from pbe_core.settings import load_settings, preset
from pbe_train import ablations
from pbe_train.checkpoints.from_pretrained import init_from_pretrained
from pbe_train.checkpoints.networks import STABLE_DIFFUSION, load_vae, unet_config
from pbe_train.config import TrainSettings, UNetSettings
from pbe_train.ladder import runs as runs_module
from pbe_train.ladder.arms import ARMS, choose_arms, flat, settings_of, sizes_of, with_sizes_of_start
from pbe_train.ladder.runs import claim
from pbe_train.model.sampling import STEPS
from tests.conftest import call_program
from tests.pbe_train.ladder_world import LABELS, LadderWorld, make_ladder_world
from tests.pbe_train.small_world import World

# Of each run by what it is, whatever the preset says.
OF_RUNS = {"out", "seed", "keep_last", "pictures.every"}


@pytest.fixture(scope="module")
def small(world: World, tmp_path_factory: pytest.TempPathFactory) -> LadderWorld:
    return make_ladder_world(world, tmp_path_factory.mktemp("ladder"))


def of_arms(settings: TrainSettings) -> list[TrainSettings]:
    settings = with_sizes_of_start(settings)
    return [settings_of(arm, settings, 1, Path("runs") / arm.name) for arm in ARMS]


@pytest.mark.parametrize("name", ["small", "open_images"])
def test_each_arm_has_one_setting_more_and_the_last_is_the_preset(name: str, small: LadderWorld):
    given = ["--config", str(preset(name) if name == "open_images" else small.world.config)]
    more = [] if name == "open_images" else [f"--model.pretrained={small.start}"]
    settings = load_settings(TrainSettings, "train", [*given, *more])
    arms = [flat(one.model_dump(mode="json")) for one in of_arms(settings)]
    keys = [arm.key for arm in ARMS[1:]]
    assert keys == ["model.pretrained", "augmentation.preset", "model.tokens", "condition_dropout"]
    for place, (before, arm) in enumerate(pairwise(arms)):
        assert [key for key in arm if arm[key] != before[key] and key != "out"] == [keys[place]]
    whole = flat(settings.model_dump(mode="json"))
    assert {key for key in whole if whole[key] != arms[-1][key]} <= OF_RUNS
    assert [arms[0][key] for key in keys] == [None, "none", "all", 0]


def test_without_a_prior_only_the_weights_differ(small: LadderWorld):
    """Whatever sizes the preset names for a U-Net from scratch."""
    options = [f"--model.pretrained={small.start}", "--model.unet.layers_per_block=2"]
    scratch, begun, *_ = of_arms(small.world.settings(Path("unused"), *options))
    models = [init_from_pretrained(one, load_vae(str(small.world.vae)))[0] for one in (scratch, begun)]
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    same = torch.equal(*(model.unet.conv_out.weight for model in models))
    assert not same


def test_sizes_of_a_start(small: LadderWorld):
    assert sizes_of(unet_config(STABLE_DIFFUSION), "here") == UNetSettings()
    config = unet_config(str(small.start))
    sizes = sizes_of(config, "here")
    assert sizes == small.world.settings(Path("unused")).model.unet
    assert sizes_of({**config, "attention_head_dim": [2, 2], "sample_size": 64}, "here") == sizes
    for change, cause in (
        ({"attention_head_dim": [2, 4]}, "attention_head_dim"),
        ({"use_linear_projection": True}, "use_linear_projection True, not False"),
        ({"layers_per_block": [1, 2]}, "layers_per_block"),
    ):
        with pytest.raises(InputError, match=f"here: no U-Net from scratch has its sizes.*{cause}"):
            sizes_of({**config, **change}, "here")


def test_an_arm_that_adds_nothing_is_refused(small: LadderWorld):
    whole = [f"--model.pretrained={small.start}"]
    settings = small.world.settings(Path("unused"), *whole)
    assert choose_arms([], settings) == list(ARMS)
    assert [arm.name for arm in choose_arms(["guidance", "prior"], settings)] == ["prior", "guidance"]
    for options, names, cause in (
        ([], [], r"`\+ prior` adds model.pretrained.*--model.pretrained FOLDER.*--arms baseline augmentation"),
        ([*whole, "--augmentation.preset=none"], [], "--augmentation.preset paper"),
        ([*whole, "--condition_dropout=0"], ["guidance"], "adds condition_dropout"),
        (whole, ["gidance"], "--arms gidance: no such arm; there are baseline, prior"),
    ):
        with pytest.raises(InputError, match=cause):
            choose_arms(names, small.world.settings(Path("unused"), *options))
    assert choose_arms(["baseline"], small.world.settings(Path("unused")))


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--seed", "3"], "--seed: each run gets its own"),
        (["--seeds", "0"], "--seeds 0: must be 1 or more"),
        (["--only", "evaluate", "--launch", "torchrun"], "torchrun ... --only evaluate"),
        (["--only", "evaluate"], "no run is finished"),
        (["--optimiser.learning_rate", "1"], "did you mean"),
        (["--judge", "eye:dinov3=there"], "dinov3"),
        (["--out", __file__], "test_ladder.py: no folder can be made there"),
    ],
)
def test_what_is_wrong_is_one_line(options: list[str], cause: str, small: LadderWorld, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(runs_module, "start_program", lambda *_: pytest.fail("a training was started"))
    done = call_program(ablations.main, *small.options(tmp_path / "ladder", *options))
    assert done.returncode == 2
    assert cause in done.stderr
    assert done.stderr.count("error:") == 1


def test_a_folder_may_be_called_as_an_option():
    _, trainer = ablations.parse_options(["--pairs", "p", "--judge", "clip=c", "--dataset", "out", "--model.pretrained", "seed"])
    assert trainer == ["--dataset", "out", "--model.pretrained", "seed"]


def test_settings_of_runs_that_never_began_bind_nobody(small: LadderWorld, tmp_path: Path):
    """A wrong setting fails all runs at their start; put right, the same folder takes it. With a checkpoint it does not."""
    wrong, right = (small.world.settings(tmp_path / "unused", f"--optimizer.learning_rate={rate}") for rate in (1, 0.001))
    out = tmp_path / "ladder"
    claim(out, wrong)
    (out / "runs" / "baseline-seed0").mkdir(parents=True)
    claim(out, right)
    (out / "runs" / "baseline-seed0" / "checkpoints" / "step-00000001").mkdir(parents=True)
    claim(out, right)
    with pytest.raises(InputError, match=r"made with optimizer\.learning_rate 0\.001, now 1\.0"):
        claim(out, wrong)


def test_quick_asks_less_and_what_is_given_counts():
    given = ["--pairs", "p", "--judge", "clip=c"]
    options, trainer = ablations.parse_options([*given, "--quick", "--count", "50", "--dataset", "d", "--ema_decay=0.9"])
    assert (options.steps, options.seeds, options.count) == (40, 2, 50)
    assert options.out.name == "ablations-quick"
    assert trainer == ["--dataset", "d", "--ema_decay=0.9"]
    options, _ = ablations.parse_options(given)
    assert (options.steps, options.seeds, options.count, options.sampling_steps) == (None, 3, None, STEPS)
    assert LABELS >= 8, "else nobody is recognised among eight"
