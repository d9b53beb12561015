"""The counts of a training step against published figures, against a real forward pass, and against each other."""

import json

import pytest
import torch

from pbe_core.errors import InputError
from pbe_core.settings import load_settings, preset
from pbe_train.checkpoints.networks import CLIP, STABLE_DIFFUSION, encoder_config, unet_config, unloaded_model, vae_config
from pbe_train.config import ModelSettings, TrainSettings, UNetSettings
from pbe_train.training import flops
from pbe_train.training.flops import (
    GPUS,
    arithmetic_of,
    encode_flops,
    find_gpu,
    latent_cells,
    step_flops,
    step_memory,
    utilisation,
)
from tests.pbe_train.small_world import World

PUBLISHED = ModelSettings(pretrained=STABLE_DIFFUSION, encoder=CLIP, vae=f"{STABLE_DIFFUSION}/vae", one_token_shortcut=False)


def test_a_step_takes_the_published_arithmetic():
    """GFLOP at 512 px: 797 forward and 2,391 with backward in the U-Net, 162 in the encoder, 1,117 for each encoded view."""
    counted = step_flops(PUBLISHED, 64)
    assert counted.unet_forward / 1e9 == pytest.approx(797, rel=0.002)
    assert (counted.unet_forward + counted.unet_backward) / 1e9 == pytest.approx(2391, rel=0.02)
    assert counted.encoder / 1e9 == pytest.approx(162, rel=0.005)
    assert encode_flops(PUBLISHED.vae, 512) / 1e9 == pytest.approx(1117, rel=0.001)
    assert counted.total == sum((counted.unet_forward, counted.unet_backward, counted.conditioner, counted.encoder)), (
        "no part is missing"
    )


def test_the_shortcut_saves_the_published_share():
    """3.2 % of the U-Net's forward pass, and of its backward pass, too."""
    plain = step_flops(PUBLISHED, 64)
    quick = step_flops(PUBLISHED.model_copy(update={"one_token_shortcut": True}), 64)
    assert 1 - quick.unet_forward / plain.unet_forward == pytest.approx(0.032, abs=0.0005)
    assert quick.unet_backward < 0.98 * plain.unet_backward
    assert quick.conditioner < plain.conditioner


def test_counts_do_not_depend_on_how_the_step_is_run():
    """Fused or plain attention, recomputed activations or not: the model's arithmetic is the same."""
    settings = load_settings(TrainSettings, "train", [], preset("tiny")).model
    other = settings.model_copy(update={"attention": "fused", "gradient_checkpointing": True, "compile": True})
    assert step_flops(settings, 16) == step_flops(other, 16)


def test_sizes_are_those_of_the_published_networks():
    """859.5 M parameters in the prior's U-Net, 303.2 M in the vision encoder, on the meta device."""
    with torch.device("meta"):
        model = unloaded_model(PUBLISHED)
    assert sum(parameter.numel() for parameter in model.unet.parameters()) == 859_520_964 + 320 * 5 * 9
    assert sum(parameter.numel() for parameter in model.conditioner.model.parameters()) == 303_179_776
    assert (sum(value.numel() for value in model.kept().values()) - sum(v.numel() for v in model.trained().values())) / 1e6 == (
        pytest.approx(22.0 + 5 * 2 * (1024**2 + 1024) / 1e6, abs=0.05)
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_activations_are_those_of_a_real_forward_pass(world: World, tmp_path, bf16, attention):
    """What real tensors of a real pass take is what is counted without them; and it is linear in the batch."""
    settings = world.settings(tmp_path, f"--model.attention={attention}").model
    counted = step_memory(settings, 4, bf16=bf16, average=True)
    model = unloaded_model(settings).train()
    for batch in (1, 5):
        real = flops._saved_bytes(model, settings, 4, batch, bf16)
        # Shapes do not tell that normalisations of bf16 keep their statistics in fp32: 800 bytes a sample here.
        assert real == pytest.approx(counted.casts + batch * counted.activations_per_sample, rel=0.01 if bf16 else 0)
    assert (counted.casts > 0) == bf16
    trained, whole = (sum(value.numel() for value in values) for values in (model.trained().values(), model.parameters()))
    assert counted.at(3) == 4 * whole + (4 + 8 + 4) * trained + counted.casts + 3 * counted.activations_per_sample
    assert step_memory(settings, 4, bf16=bf16, average=False).average == 0


def test_sizes_come_from_local_files(world: World, tmp_path):
    """Folders of single networks, a whole pipeline, and a whole CLIP, of which the vision model counts."""
    assert vae_config(str(world.vae))["block_out_channels"] == [8, 8, 8, 8]
    assert latent_cells(ModelSettings(encoder="", vae=str(world.vae)), 32) == 4
    assert encoder_config(str(world.encoder)).hidden_size == 32
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"out_channels": 7}))
    assert unet_config(str(tmp_path)) == {"out_channels": 7}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_size": 48}, "text_config": {"hidden_size": 5}}))
    assert encoder_config(str(tmp_path)).hidden_size == 48


def test_unknown_sizes_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(
        InputError, match=r"someone/some-vae: no config\.json here.* set model\.vae to a local folder or CompVis/"
    ):
        vae_config("someone/some-vae")
    with pytest.raises(InputError, match=r"set model\.pretrained"):
        unloaded_model(PUBLISHED.model_copy(update={"pretrained": "someone/other"}))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not the config of such a network; set model\.encoder"):
        encoder_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not that of a CLIP vision model"):
        encoder_config(str(tmp_path))


def test_gpus_are_found_by_the_name_that_torch_gives():
    assert find_gpu("NVIDIA H200").known_as == "H200"
    assert find_gpu("NVIDIA A100-SXM4-40GB").memory_gb == 40
    assert find_gpu("some processor") is None
    names = [name for gpu in GPUS for name in gpu.names]
    assert len(names) == len(set(names))


def test_a_gpu_without_cores_for_a_precision_computes_in_fp32():
    asked = ("auto", "bf16", "fp16", "fp32")
    found = {gpu.known_as: [arithmetic_of(gpu, precision) for precision in asked] for gpu in GPUS}
    assert found["A100 80GB"] == ["bf16", "bf16", "fp16", "fp32"]
    assert found["T4"] == found["V100 SXM2 32GB"] == ["fp16", "fp32", "fp16", "fp32"]


def test_the_best_published_rate_has_the_published_utilisation():
    """36.3 samples/s of 2,391 GFLOP are 28 % of an A100."""
    peak = find_gpu("NVIDIA A100-SXM4-80GB").teraflops["bf16"] * 1e12
    assert utilisation(2391e9, 36.3, peak) == pytest.approx(0.28, abs=0.005)


def test_from_scratch_the_sizes_of_the_settings_count():
    small = UNetSettings(block_out_channels=(32, 64), attention=(False, True), layers_per_block=1)
    settings = PUBLISHED.model_copy(update={"pretrained": None, "unet": small})
    assert step_flops(settings, 64).unet_forward < 0.05 * step_flops(PUBLISHED, 64).unet_forward
