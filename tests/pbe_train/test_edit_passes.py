"""The passes of an edit: what diffusers' own forward gives, with nothing computed that was computed before."""

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D

from pbe_core.errors import InputError
from pbe_train.config import LoraSettings, UNetSettings
from pbe_train.model.diffusion import paint_latents
from pbe_train.model.edit_passes import REDONE, passes_apart
from pbe_train.model.guided import Guided
from pbe_train.model.paint_model import PaintByExampleModel, attention_to_condition, take_shortcuts, with_lora
from tests.pbe_train.test_model import SMALL, make_model

# In fp32, relative to predictions of size 1: a sum of 9 x 9 products is split in two, and matrix products of another number of
# rows may add in another order. What is measured is below 1e-6; a token or a plane in the wrong place changes 0.01 and more.
ROUNDING = 1e-5
CLOSE = {"rtol": ROUNDING, "atol": ROUNDING}

MODELS = {
    "one token": {},
    "one token, attended to as by others": {"one_token_shortcut": False},
    "all tokens": {"tokens": "all"},
    "no attention in the first level": {"unet": SMALL.model_copy(update={"attention": (False, True)})},
    "two layers a level": {"unet": SMALL.model_copy(update={"layers_per_block": 2})},
    "a mask that means repaint": {"repaint": True},
    "a LoRA beside it": {"lora": LoraSettings(rank=2, targets=("attention", "convolutions"))},
    "linear projections, as in XL": {"linear": True},
}


def changed(unet: UNet2DConditionModel, **more: object) -> UNet2DConditionModel:
    """A new one of another configuration. diffusers forgets what it is given where its own note says that it was a default."""
    return UNet2DConditionModel.from_config({key: value for key, value in unet.config.items() if key[0] != "_"} | more)


def make(kind: str) -> PaintByExampleModel:
    """A model of this kind in eval mode, whose condition counts."""
    options = dict(MODELS[kind])
    lora, repaint, linear = options.pop("lora", None), options.pop("repaint", False), options.pop("linear", False)
    model = make_model(**options)
    if linear:
        torch.manual_seed(3)
        unet = changed(model.unet, use_linear_projection=True, transformer_layers_per_block=[1, 2])
        model = PaintByExampleModel(unet, model.conditioner)
        take_shortcuts(unet, torch.nn.Module())
    if repaint:
        model.mask_channel = "repaint"
    if lora:
        with_lora(model, lora, "0")
        with torch.no_grad():  # At first a LoRA does nothing.
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
    return model.eval()


def given_to(model: PaintByExampleModel, count: int, side: int = 8) -> tuple[torch.Tensor, ...]:
    """Masked latents, mask, condition tokens."""
    torch.manual_seed(5)
    mask = (torch.rand(count, 1, side, side) < 0.5).float()
    with torch.no_grad():
        return torch.randn(count, 4, side, side), mask, model.conditioner(torch.randn(count, 3, 32, 32))


def by_itself(model: PaintByExampleModel, given: tuple[torch.Tensor, ...], noisy: torch.Tensor, time: float, guidance: float):
    """Each pass on its own, through diffusers' forward."""
    masked, mask, condition = given
    nothing = model.conditioner.uncond_vector.expand_as(condition)
    times = torch.tensor(time).expand(len(noisy))
    under, without = (model.predict(noisy, masked, mask, times, each) for each in (condition, nothing))
    return without + guidance * (under - without)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_a_pass_is_that_of_diffusers(kind: str, count: int):
    model = make(kind)
    given = given_to(model, count)
    predict = Guided(model, *given)
    assert predict.apart
    # Guidance may come and go from step to step, and some samplers stop between two timesteps.
    for time, guidance in ((999.0, 1), (612.25, 4.0), (300.0, 4.0), (20.0, 1), (0.0, 0.0)):
        noisy = torch.randn(count, 4, 8, 8)
        expected = by_itself(model, given, noisy, time, guidance)
        torch.testing.assert_close(predict(noisy, torch.tensor(time), guidance), expected, **CLOSE)
    other = by_itself(model, (given[0], given[1], -given[2]), noisy, 0.0, 4.0)
    assert (other - by_itself(model, given, noisy, 0.0, 4.0)).abs().max() > 100 * ROUNDING


@torch.no_grad()
def test_other_u_nets_and_sizes_go_through_diffusers():
    """A U-Net with more inputs than ours, and a size at which it interpolates: neither is taken apart, both are right."""
    model = make("one token")
    given, noisy = given_to(model, 2, side=7), torch.randn(2, 4, 7, 7)
    predict = Guided(model, *given)
    assert not predict.apart
    torch.testing.assert_close(predict(noisy, torch.tensor(5), 3.0), by_itself(model, given, noisy, 5, 3.0), **CLOSE)
    assert passes_apart(model.unet, 8, 8)
    for more in ({"class_embed_type": "timestep"}, {"center_input_sample": True}, {"mid_block_type": "UNetMidBlock2D"}):
        assert not passes_apart(changed(model.unet, **more), 8, 8), more
    assert not passes_apart(object(), 8, 8)


def calls(model: PaintByExampleModel) -> Counter:
    """Counts how often each part of the U-Net is called, by its name, and how many items it is given in all."""
    counts: Counter = Counter()

    def counted(name: str):
        def hook(_, inputs, __):
            counts[name] += 1
            counts[f"{name}, items"] += len(inputs[0])

        return hook

    for name, module in model.unet.named_modules():
        module.register_forward_hook(counted(name))
    return counts


def paint(model: PaintByExampleModel, count: int = 1, **how) -> torch.Tensor:
    given = {"guidance": 3.0, "steps": 6, "scheduler": "DDIMScheduler", "prediction": "epsilon", **how}
    return paint_latents(model, *given_to(model, count), seeds=range(count), **given)


def test_nothing_is_computed_twice():
    """Six steps of two edits: what does not change once, what both halves share once a step, all else as one batch."""
    model = make("one token")
    counts = calls(model)
    paint(model, 2)
    attended = [name for name, module in model.unet.named_modules() if module in set(attention_to_condition(model.unet))]
    assert len(attended) == 7  # Of each of two levels one on the way down and two on the way up, and one in the middle.
    for name in attended:
        # Once for the references and once for nothing, in all steps.
        assert counts[f"{name}.to_v"] == counts[f"{name}.to_out.0"] == 2
    assert counts["conv_in"] == 1
    assert counts["time_embedding"] == counts["time_embedding, items"] == 6
    first = "down_blocks.0.resnets.0"
    assert (counts[first], counts[f"{first}, items"]) == (6, 6 * 2)
    assert (counts["mid_block"], counts["mid_block, items"]) == (6, 6 * 4)
    assert (counts["conv_out"], counts["conv_out, items"]) == (6, 6 * 4)


def test_without_guidance_nothing_is_predicted_without_the_reference():
    model = make("one token")
    counts = calls(model)
    paint(model, 2, guidance=1.0)
    assert counts["conv_out, items"] == 6 * 2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["one token", "all tokens", "two layers a level"])
def test_features_that_are_kept_are_those_of_the_pass_before(kind: str):
    """At the same latents and time a pass that keeps them is the whole pass; at others it is near, and nearer than none."""
    model = make(kind)
    given, noisy = given_to(model, 2), torch.randn(2, 4, 8, 8)
    kept, counts = Guided(model, *given, reuse=2), calls(model)
    whole = kept(noisy, torch.tensor(500), 3.0)
    assert counts["mid_block"] == 1
    assert torch.equal(kept(noisy, torch.tensor(500), 3.0), whole)
    assert counts["mid_block"] == 1
    assert counts["down_blocks.0.resnets.0"] == 2
    moved, time = noisy + 0.1 * torch.randn(2, 4, 8, 8), torch.tensor(480)
    kept(noisy, torch.tensor(500), 3.0)
    assert counts["mid_block"] == 2
    near, expected = kept(moved, time, 3.0), Guided(model, *given)(moved, time, 3.0)
    assert 0 < (near - expected).abs().mean() < (whole - expected).abs().mean()


def test_every_so_many_th_step_is_whole():
    model = make("two layers a level")
    for reuse, whole in ((1, 6), (2, 3), (3, 2), (4, 2), (100, 1)):
        counts = calls(model)
        paint(model, reuse=reuse)
        assert (counts["mid_block"], counts["conv_out"]) == (whole, 6)
        assert counts["up_blocks.1.resnets.2"] == 6
        redone = sum(isinstance(module, ResnetBlock2D) for module in model.unet.up_blocks[1].modules())
        assert counts["up_blocks.1.resnets.0"] == (whole if redone > REDONE else 6)


def test_a_shape_that_its_own_passes_do_not_know_keeps_and_compiles_nothing_and_says_so():
    model = make("two layers a level")
    given = torch.randn(1, 4, 7, 8), torch.ones(1, 1, 7, 8), torch.randn(1, 1, SMALL.cross_attention_dim)
    Guided(model, *given)
    with pytest.raises(
        InputError, match=r"^reuse 2: this works with U-Nets in Stable Diffusion's layout .*UNet2DConditionModel, 8x7"
    ):
        Guided(model, *given, reuse=2)
    model.compiled_edits = True
    with pytest.raises(InputError, match=r"^compile: this works with"):
        Guided(model, *given)
    Guided(model, *given, exact=True)


@torch.no_grad()
def test_kept_features_where_guidance_comes_and_goes():
    """Where it ends, those under the condition are enough; where it begins, the others were never computed."""
    model = make("two layers a level")
    given, noisy = given_to(model, 2), torch.randn(2, 4, 8, 8)
    expected = by_itself(model, given, noisy, 5, 1)
    predict, counts, whole, made = Guided(model, *given, reuse=4), calls(model), [], []
    for guidance in (1, 3.0, 3.0, 1, 1, 1):
        made.append(predict(noisy, torch.tensor(5), guidance))
        whole.append(counts["mid_block"])
    assert whole == [1, 2, 2, 2, 2, 3]
    torch.testing.assert_close(made[3], expected, **CLOSE)


@torch.no_grad()
def test_exact_passes_are_the_very_bits_of_diffusers():
    model = make("one token")
    given, noisy = given_to(model, 2), torch.randn(2, 4, 8, 8)
    found = Guided(model, *given, reuse=9, exact=True)(noisy, torch.tensor(500), 3.0)
    assert torch.equal(found, by_itself(model, given, noisy, 500, 3.0))
    assert not torch.equal(found, Guided(model, *given)(noisy, torch.tensor(500), 3.0))


def test_a_shape_of_three_levels_with_the_sizes_of_the_tiny_preset():
    """The tiny preset's shape, at two shapes of view."""
    settings = UNetSettings(
        block_out_channels=(16, 32, 32), attention=(True, True, False), attention_heads=2, norm_groups=8, cross_attention_dim=24
    )
    torch.manual_seed(0)
    model = make_model(unet=settings).eval()
    for height, width in ((8, 16), (16, 8)):
        given = torch.randn(1, 4, height, width), torch.ones(1, 1, height, width), torch.randn(1, 1, 24)
        noisy = torch.randn(1, 4, height, width)
        with torch.no_grad():
            found = Guided(model, *given)(noisy, torch.tensor(400), 2.0)
            torch.testing.assert_close(found, by_itself(model, given, noisy, 400, 2.0), **CLOSE)
