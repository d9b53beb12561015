"""The ablation presets: each changes one setting of configs/open_images.yaml, loads, and trains at the tiny size."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pbe_core.dataset_reader import read_dataset
from pbe_core.settings import REPOSITORY, load_settings, preset, read_section
from pbe_train.config import TrainSettings
from pbe_train.cost import BATCHES, VIEW, estimate_cost
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from pipelines.config import BuildSettings
from tests.conftest import build_options, run_build

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
# Of the tiny size, the least that goes through every part.
SHORT = ["--steps=2", "--log_every=1", "--global_batch=8", "--threads=1", "--loader.workers=0", "--checkpoint_every=2"]
SHORT += ["--pictures.every=0", "--validation.every=0"]


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


def difference(name: str) -> dict[str, Any]:
    """A preset's own sections as its file has them, without base and places."""
    content = yaml.safe_load(preset(f"ablations/{name}").read_text())
    assert content.pop("base") == "../open_images.yaml"
    for place in PLACES:
        section, key = place.split(".")
        content.get(section, {}).pop(key, None)
    return content


def tiny_config(name: str, folder: Path) -> Path:
    """configs/tiny.yaml with a preset's difference on it."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"base": str(preset("tiny")), **difference(name)}))
    return path


def train_tiny(config: Path, dataset: Path, out: Path) -> list[float]:
    """Two steps; their losses."""
    options = ["--config", str(config), f"--dataset={dataset}", f"--out={out}", *SHORT]
    assert train(load_settings(TrainSettings, "train", options), Distributed(0, 1, torch.device("cpu"))) == 0
    assert (out / "checkpoints" / "step-00000002" / "state.json").is_file()
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the tiny preset as it is."""
    return train_tiny(preset("tiny"), dataset, tmp_path_factory.mktemp("plain") / "run")


def test_these_are_all():
    assert {path.stem for path in (REPOSITORY / "configs" / "ablations").iterdir()} == CHANGES.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_a_preset_changes_one_setting_and_the_places(name: str):
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
def test_the_tiny_training_runs_with_it(name: str, plain: list[float], dataset: Path, tmp_path: Path):
    losses = train_tiny(tiny_config(name, tmp_path), dataset, tmp_path / "run")
    key, value = CHANGES[name]
    written = read_section(tmp_path / "run" / "settings.yaml", "train")
    assert flat({"train": written})[key] == value
    # The tiny preset has no prior to leave out; every other switch is felt from the first steps on.
    assert len(losses) == 2
    assert (losses == plain) == (name == "no_prior")


@pytest.mark.long
def test_the_tiny_build_runs_with_box_masks_only(photos: Path, plain: list[float], tmp_path: Path):
    config, out = tiny_config("box_masks_only", tmp_path), tmp_path / "dataset"
    run_build("--config", str(config), *build_options(photos, out))
    books = read_dataset(out).books
    assert {kind for kind, count in books.masks.items() if count} == {"box"}
    assert sum(books.masks.values()) > 0
    losses = train_tiny(config, out, tmp_path / "run")
    assert len(losses) == 2
    assert losses != plain


def test_the_guide_names_each_with_its_setting():
    guide = (REPOSITORY / "docs" / "training.md").read_text()
    for name, (key, value) in CHANGES.items():
        (row,) = (line for line in guide.splitlines() if line.startswith(f"| `{name}.yaml` |"))
        assert f"{key.partition('.')[2]}: {'null' if value is None else value}`" in row


def test_the_guides_table_of_memory_is_what_the_cost_table_computes():
    settings = load_settings(TrainSettings, "train", [], preset("open_images"))
    guide = (REPOSITORY / "docs" / "training.md").read_text()
    memory = []
    for again in (False, True):
        model = settings.model.model_copy(update={"gradient_checkpointing": again})
        memory.append(estimate_cost(settings.model_copy(update={"model": model}), VIEW, bf16=True).memory)
    for batch in BATCHES:
        plain, again = (one.at(batch) / 2**30 for one in memory)
        assert f"\n| {batch} | {plain:.1f} | {again:.1f} |\n" in guide
