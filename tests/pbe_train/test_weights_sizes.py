"""The sizes of a start are known before it is loaded, in whatever layout it comes."""

from pathlib import Path

import pytest

from pbe_core.errors import InputError
from pbe_train.checkpoints.known_sizes import PAINT_BY_EXAMPLE, STABLE_DIFFUSION, encoder_config, unet_config, unloaded_model
from pbe_train.config import ModelSettings
from tests.pbe_train.published import make_published, original_state, write_hub, write_tensors

COMPARED = ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels", "attention_head_dim", "out_channels")


def test_a_file_tells_what_the_folder_does(tmp_path: Path):
    """Sizes read off the tensors of an original file are those that diffusers' layout writes down."""
    parts = make_published(9)
    hub = str(write_hub(tmp_path / "hub", parts))
    write_tensors(tmp_path / "model.ckpt", original_state(parts))
    file = str(tmp_path / "model.ckpt")
    theirs, ours = unet_config(hub), unet_config(file)
    assert {key: ours[key] for key in COMPARED} == {key: theirs[key] for key in COMPARED}
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "hidden_act",
    )
    assert all(getattr(encoder_config(file), key) == getattr(encoder_config(hub), key) for key in keys)
    model = unloaded_model(ModelSettings(pretrained=file, encoder=file, vae=f"{hub}/vae", conditioner_blocks=1))
    expected = {name: tensor.shape for name, tensor in parts.unet.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.unet.state_dict().items()} == expected


def test_the_released_models_are_known_without_a_download():
    assert unet_config(PAINT_BY_EXAMPLE) == unet_config(STABLE_DIFFUSION)
    assert encoder_config(PAINT_BY_EXAMPLE).num_hidden_layers == 24


def test_a_file_without_a_vision_encoder(tmp_path: Path):
    parts = make_published(4)
    write_tensors(tmp_path / "sd.safetensors", original_state(parts, text=True))
    with pytest.raises(InputError, match="no vision encoder here"):
        encoder_config(str(tmp_path / "sd.safetensors"))
