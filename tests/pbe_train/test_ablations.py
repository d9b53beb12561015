"""The ablation presets: each changes one setting of configs/open_images.yaml, loads, and trains."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pbe_core.settings import REPOSITORY, load_settings, preset, read_section
from pbe_train.config import TrainSettings
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from pipelines.config import BuildSettings
from tests.pbe_train.small_world import World

# What each of them changes, as the paper's table and docs/training.md name it.
CHANGES = {
    "box_masks_only": ("build.masks.arbitrary_mask_prob", 0),
    "no_augmentation": ("train.augmentation.preset", "none"),
    "no_bottleneck": ("train.model.tokens", "all"),
    "no_condition_dropout": ("train.condition_dropout", 0),
    "no_prior": ("train.model.pretrained", None),
}
# Where a run reads and writes: its own places keep it from going on with another one's checkpoints.
PLACES = {"build.out", "train.out", "train.dataset"}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def loaded(config: Path) -> dict[str, Any]:
    """All settings of both programs, as the programs understand the file, by dotted key."""
    given = ["--config", str(config)]
    build = load_settings(BuildSettings, "build", given).model_dump(mode="json")
    return flat({"build": build, "train": load_settings(TrainSettings, "train", given).model_dump(mode="json")})


def train_small(world: World, out: Path, config: Path) -> list[float]:
    """Two steps; their losses."""
    options = ["--config", str(config), f"--out={out}", "--steps=2", "--log_every=1", "--global_batch=8", "--validation.every=0"]
    assert train(load_settings(TrainSettings, "train", options), Distributed(0, 1, torch.device("cpu"))) == 0
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses without any of the changes."""
    return train_small(world, tmp_path_factory.mktemp("plain") / "run", world.config)


@pytest.mark.parametrize("name", CHANGES)
def test_a_preset_changes_one_setting_and_the_places(name: str):
    assert {path.stem for path in (REPOSITORY / "configs" / "ablations").iterdir()} == CHANGES.keys()
    whole, own = loaded(preset("open_images")), loaded(preset(f"ablations/{name}"))
    changed = {key: own[key] for key in whole if own[key] != whole[key] and key not in PLACES}
    assert changed == dict([CHANGES[name]])
    assert own["train.dataset"] == own["build.out"]


def test_no_run_and_no_build_goes_on_with_anothers():
    """What a resumed run may change holds `model.pretrained`: in one folder, `no_prior` would go on with the whole training."""
    settings = {name: loaded(preset(name)) for name in ("open_images", *(f"ablations/{name}" for name in CHANGES))}
    assert len({own["train.out"] for own in settings.values()}) == len(settings)
    builds: dict[str, set[str]] = {}
    for own in settings.values():
        build = {key: value for key, value in own.items() if key.startswith("build.") and key not in PLACES}
        builds.setdefault(own["build.out"], set()).add(json.dumps(build, sort_keys=True))
    assert [len(different) for different in builds.values()] == [1, 1]


@pytest.mark.parametrize("name", [name for name, (key, _) in CHANGES.items() if key.startswith("train.")])
def test_a_training_runs_with_it(name: str, plain: list[float], world: World, tmp_path: Path):
    """The preset's own section on the small world's settings."""
    content = yaml.safe_load(preset(f"ablations/{name}").read_text())
    assert content["base"] == "../open_images.yaml"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**content, "base": str(world.config)}))
    losses = train_small(world, tmp_path / "run", config)
    key, value = CHANGES[name]
    assert flat({"train": read_section(tmp_path / "run" / "settings.yaml", "train")})[key] == value
    # The small world has no prior to leave out; every other switch is felt from the first steps on.
    assert len(losses) == 2
    assert (losses == plain) == (name == "no_prior")


def test_the_guide_names_each_with_its_setting():
    guide = (REPOSITORY / "docs" / "training.md").read_text()
    for name, (key, value) in CHANGES.items():
        (row,) = (line for line in guide.splitlines() if line.startswith(f"| `{name}.yaml` |"))
        assert f"{key.partition('.')[2]}: {'null' if value is None else value}`" in row
