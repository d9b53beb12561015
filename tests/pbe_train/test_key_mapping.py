"""The table of names, against diffusers' own conversion and in both directions."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from pbe_train.checkpoints.key_mapping import conditioner_table, unet_table, vae_table
from pbe_train.checkpoints.ldm_format import levels_of
from pbe_train.config import UNetSettings
from pbe_train.model.paint_model import new_unet
from tests.pbe_train.published import Published, make_published, original_state, original_unet, original_vae

ATTENTION = (True, True, True, False)


@pytest.fixture(scope="module")
def parts() -> Published:
    return make_published(blocks=2)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        assert torch.equal(found[name], expected[name]), name


def test_u_net_and_vae_are_renamed_as_diffusers_does_it(parts: Published):
    """Both against the networks themselves and against diffusers' converters, which have another author."""
    ldm = original_unet(parts.unet)
    ours, unknown = unet_table(ATTENTION, 2).to_diffusers(ldm)
    theirs = convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": v for k, v in ldm.items()}, {"layers_per_block": 2})
    assert unknown == []
    assert_same(ours, theirs)
    assert_same(ours, parts.unet.state_dict())
    ldm = original_vae(parts.vae)
    ours, unknown = vae_table(4, 2).to_diffusers(ldm)
    config = {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
    theirs = convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v for k, v in ldm.items()}, config)
    assert unknown == []
    assert_same(ours, theirs)
    assert_same(ours, parts.vae.state_dict())


@pytest.mark.parametrize("layers", [4, 24])
def test_the_conditioner_is_found_under_its_original_names(layers: int):
    """One stacked layer becomes queries, keys and values, in this order."""
    parts = make_published(layers=layers)
    ldm = {name: tensor for name, tensor in original_state(parts).items() if "mapper" in name or "final_ln" in name}
    ours, unknown = conditioner_table((layers + 1) // 5).to_diffusers(ldm)
    assert unknown == []
    expected = parts.encoder.state_dict()
    assert_same(ours, {name: expected[name] for name in expected if name.startswith(("mapper.", "final_layer_norm."))})


@pytest.mark.parametrize("part", ["unet", "vae", "conditioner"])
def test_the_table_is_read_in_both_directions(parts: Published, part: str):
    """There and back, and no two names of one side share a name of the other."""
    conditioner = {
        k: v for k, v in original_state(parts).items() if k.startswith(("cond_stage_model.mapper.", "learnable", "proj"))
    }
    table, ldm = {
        "unet": (unet_table(ATTENTION, 2), original_unet(parts.unet)),
        "vae": (vae_table(4, 2), original_vae(parts.vae)),
        "conditioner": (conditioner_table(1), conditioner),
    }[part]
    back, unknown = table.to_ldm(table.to_diffusers(ldm)[0])
    assert unknown == []
    assert_same(back, ldm)
    names = [name for entry in table.entries for name in entry.diffusers]
    assert len(set(names)) == len(names)
    assert len({entry.ldm for entry in table.entries}) == len(table.entries)


@pytest.mark.parametrize("attention", [(False, True), (True,), (False, False, True)])
def test_the_table_fits_other_numbers_of_levels(attention: tuple[bool, ...]):
    widths = (16, 32, 32)[: len(attention)]
    sizes = UNetSettings(block_out_channels=widths, attention=attention, layers_per_block=1, attention_heads=2, norm_groups=8)
    unet = new_unet(sizes, 4)
    ldm, unknown = unet_table(attention, 1).to_ldm(unet.state_dict())
    assert unknown == []
    assert_same(ldm, original_unet(unet))
    assert levels_of(ldm) == (attention, 1)


def test_what_the_table_does_not_know_comes_back_by_name():
    tensors = {"conv_in.weight": torch.zeros(1), "add_embedding.linear_1.weight": torch.zeros(1)}
    assert unet_table(ATTENTION, 2).to_ldm(tensors)[1] == ["add_embedding.linear_1.weight"]
