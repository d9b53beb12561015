"""What a training will cost: offline, against published figures, against a real forward pass, and from counts to hours."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY, load_settings, preset
from pbe_train.checkpoints.networks import CLIP, STABLE_DIFFUSION, encoder_config, unet_config, vae_sizes
from pbe_train.config import ModelSettings, TrainSettings
from pbe_train.cost import ASSUMED_UTILISATION, BATCHES, TIERS, VIEW, Cost, estimate_cost, main, show, view_size
from pbe_train.training.flops import GPUS, StepFlops, arithmetic_of, find_gpu, latent_cells, step_flops, utilisation
from pbe_train.training.memory import training_memory
from tests.pbe_train.small_world import World

PUBLISHED = ModelSettings(pretrained=STABLE_DIFFUSION, encoder=CLIP, vae=f"{STABLE_DIFFUSION}/vae", one_token_shortcut=False)


@pytest.fixture(scope="module")
def settings() -> TrainSettings:
    return load_settings(TrainSettings, "train", ["--steps", "2_000"], preset("open_images"))


@pytest.fixture(scope="module")
def cost(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Cost:
    """That of the paper's preset, counted without the hub and with an empty cache."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return estimate_cost(settings, VIEW, bf16=True)


@pytest.fixture(scope="module")
def plain() -> StepFlops:
    """A step of the published networks, without the shortcut."""
    return step_flops(PUBLISHED, 64)


def test_a_step_takes_the_published_arithmetic(plain: StepFlops, cost: Cost):
    """GFLOP at 512 px: 797 forward and 2,391 with backward in the U-Net, 162 in the encoder, 1,117 for each encoded view."""
    assert plain.unet_forward / 1e9 == pytest.approx(797, rel=0.002)
    assert (plain.unet_forward + plain.unet_backward) / 1e9 == pytest.approx(2391, rel=0.02)
    assert plain.encoder / 1e9 == pytest.approx(162, rel=0.005)
    assert cost.encode / 1e9 == pytest.approx(1117, rel=0.001)
    assert plain.total == sum((plain.unet_forward, plain.unet_backward, plain.conditioner, plain.encoder)), "no part is missing"


def test_the_shortcut_saves_the_published_share(plain: StepFlops, cost: Cost):
    """3.2 % of the U-Net's forward pass, and of its backward pass, too."""
    quick = cost.flops
    assert 1 - quick.unet_forward / plain.unet_forward == pytest.approx(0.032, abs=0.0005)
    assert quick.unet_backward < 0.98 * plain.unet_backward
    assert quick.conditioner < plain.conditioner


def test_sizes_are_those_of_the_published_networks(cost: Cost):
    """859.5 M parameters in the prior's U-Net, 303.2 M in the vision encoder; 32 M have no effect on one token."""
    assert cost.parameters["U-Net"] == 859_520_964 + 320 * 5 * 9
    assert cost.parameters["vision encoder"] == cost.frozen == 303_179_776
    assert cost.without_effect / 1e6 == pytest.approx(22.0 + 5 * 2 * (1024**2 + 1024) / 1e6, abs=0.05)
    assert cost.trained + cost.without_effect + cost.frozen == sum(cost.parameters.values())


def test_the_tables(cost: Cost, settings: TrainSettings):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(show(cost, settings, bf16=True))
    text = captured.get()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    table = {line[0]: line[1:] for line in lines}
    assert table["trained"] == ["890.8"]
    assert table["frozen (vision encoder)"] == ["303.2"]
    assert table["vision encoder, forward"][0] == "162"
    assert "128,000 samples (2,000 steps of 64)" in text
    assert table["A100 80GB"][:2] == ["bf16", "312"]
    assert table["T4"][-1] == "none"


@pytest.mark.long
def test_the_guides_tables_of_memory_are_what_is_counted(cost: Cost, settings: TrainSettings, capsys, monkeypatch):
    """That of batches, and that of the presets for small GPUs as `--tiers` prints it; each preset leaves a tenth of its card."""
    model = settings.model.model_copy(update={"gradient_checkpointing": True})
    cells = latent_cells(model, VIEW)
    again = training_memory(settings.model_copy(update={"model": model}), cells, BATCHES, bf16=True)
    guide = (REPOSITORY / "docs" / "training.md").read_text()
    for batch in BATCHES:
        assert f"\n| {batch} | {cost.memory[batch].device / 2**30:.1f} | {again[batch].device / 2**30:.1f} |\n" in guide
    monkeypatch.setenv("COLUMNS", "200")
    main(["--tiers"])
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line}
    assert list(rows) == [f"finetune_{gigabytes}gb" for gigabytes in TIERS]
    for gigabytes in TIERS:
        trained, batch, gpu, cpu, checkpoint = rows[f"finetune_{gigabytes}gb"]
        assert f"\n| `finetune_{gigabytes}gb.yaml` | {trained} | {batch} | {gpu} | {cpu} | {checkpoint} |" in guide
        assert float(gpu) * 2**30 < 0.9 * gigabytes * 1e9


def test_the_program_counts_the_tiny_preset_by_default(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["--dataset", str(tmp_path), "--global_batch=16"])
    said = capsys.readouterr().out
    assert "views of 128 px (build.views.size of" in said
    assert "(1,600 steps of 16)" in said
    with pytest.raises(InputError, match=r"someone/clip: no config\.json here, .*model\.encoder"):
        main(["--config", "configs/open_images.yaml", "--model.encoder=someone/clip"])


def test_hours_follow_from_counts_and_peak(cost: Cost):
    gpu = find_gpu("NVIDIA H200")
    assert cost.samples == 2000 * 64
    assert cost.hours(gpu, "bf16") == pytest.approx(cost.samples * cost.flops.total / (ASSUMED_UTILISATION * 989.5e12) / 3600)
    assert cost.hours(gpu, "fp32") == pytest.approx(989.5 / 67 * cost.hours(gpu, "bf16"), rel=1e-3)


def test_the_side_of_a_view_is_that_of_the_dataset_first(world: World, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text("build:\n  views:\n    size: 256\n")
    assert view_size(world.dataset, config) == (32, str(world.dataset / "dataset.json"))
    assert view_size(tmp_path, config) == (256, f"build.views.size of {config}")
    assert view_size(tmp_path, None) == (512, "the default")
    config.write_text("train:\n  steps: 3\n")
    assert view_size(tmp_path, config)[0] == 512
    config.write_text("build:\n  views:\n    size: much\n")
    with pytest.raises(InputError, match=r"build\.views\.size is 'much'"):
        view_size(tmp_path, config)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(InputError, match=r"dataset\.json: damaged"):
        view_size(tmp_path, config)


def test_counts_do_not_depend_on_how_the_step_is_run(world: World, tmp_path: Path):
    """Fused or plain attention, recomputed activations or not: the model's arithmetic is the same; a smaller one takes less."""
    model = world.settings(tmp_path).model
    counted = step_flops(model, 4)
    other = model.model_copy(update={"attention": "fused", "gradient_checkpointing": True, "compile": True})
    assert step_flops(other, 4) == counted
    small = model.unet.model_copy(update={"block_out_channels": (16, 16)})
    assert step_flops(model.model_copy(update={"unet": small}), 4).unet_forward < counted.unet_forward


def test_sizes_come_from_local_files(world: World, tmp_path: Path):
    """Folders of single networks, a whole pipeline, and a whole CLIP, of which the vision model counts; others are refused."""
    assert vae_sizes(str(world.vae))[2:5] == (4, 8, 0.5)
    assert latent_cells(ModelSettings(encoder="", vae=str(world.vae)), 32) == 4
    assert encoder_config(str(world.encoder)).hidden_size == 32
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"out_channels": 7}))
    assert unet_config(str(tmp_path)) == {"out_channels": 7}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"vision_config": {"hidden_size": 48}, "text_config": {"hidden_size": 5}}))
    assert encoder_config(str(tmp_path)).hidden_size == 48
    for read, setting in ((vae_sizes, "model.vae"), (unet_config, "model.pretrained")):
        with pytest.raises(InputError, match=rf"someone/other: no config\.json here.* set {setting} to a local folder"):
            read("someone/other")
    for content, said in (("{", "damaged"), ("{}", "not that of a CLIP vision model")):
        config.write_text(content)
        with pytest.raises(InputError, match=said):
            encoder_config(str(tmp_path))
    with pytest.raises(InputError, match=r"set model\.vae to another folder"):
        vae_sizes(str(tmp_path))


def test_gpus_and_their_arithmetic():
    """Found by the name that torch gives; one without cores for a precision computes in fp32; the best published rate is 28 %."""
    assert find_gpu("NVIDIA H200").known_as == "H200"
    assert find_gpu("some processor") is None
    names = [name for gpu in GPUS for name in gpu.names]
    assert len(names) == len(set(names))
    asked = ("auto", "bf16", "fp16", "fp32")
    found = {gpu.known_as: [arithmetic_of(gpu, precision) for precision in asked] for gpu in GPUS}
    assert found["A100 80GB"] == ["bf16", "bf16", "fp16", "fp32"]
    assert found["T4"] == found["V100 SXM2 32GB"] == ["fp16", "fp32", "fp16", "fp32"]
    # 36.3 samples/s of 2,391 GFLOP.
    peak = find_gpu("NVIDIA A100-SXM4-80GB").teraflops["bf16"] * 1e12
    assert utilisation(2391e9, 36.3, peak) == pytest.approx(ASSUMED_UTILISATION, abs=0.005)
