"""The model's parts against their definitions and against diffusers; the attention to one token against the whole attention."""

import re

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe_core.errors import InputError
from pbe_train.checkpoints.from_pretrained import widened
from pbe_train.config import CHANGEABLE, ModelSettings, UNetSettings
from pbe_train.data.latents import normalise_reference
from pbe_train.data.training_dataset import Batch
from pbe_train.model.diffusion import noise_losses, paint_latents
from pbe_train.model.paint_model import (
    Conditioner,
    PaintByExampleModel,
    SkippedNorm,
    assemble,
    laid_out_as,
    new_unet,
    prepare,
    uncompiled,
)
from pbe_train.model.schedulers import training_schedule
from pbe_train.training.optimizer import EMA

SMALL = UNetSettings(
    block_out_channels=(16, 32),
    attention=(True, True),
    layers_per_block=1,
    attention_heads=2,
    norm_groups=8,
    cross_attention_dim=24,
)


def vision(**sizes: int) -> CLIPVisionModel:
    defaults = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**{**defaults, "image_size": 32, "patch_size": 8, **sizes}))


# What only queries and keys of the attention to the condition's one token depend on, by the names of parameters.
DEAD = re.compile(
    r"unet\..*\.transformer_blocks\.0\.(norm2|attn2\.to_[qk])\..*" r"|conditioner\.mapper\.blocks\.\d\.attn1\.to_[qk]\..*"
)


def make_model(seed: int = 0, **options) -> PaintByExampleModel:
    torch.manual_seed(seed)
    settings = ModelSettings(**{"encoder": "none", "vae": "none", "unet": SMALL, "conditioner_blocks": 2, **options})
    return assemble(settings, new_unet(settings.unet, 4), vision()).train()


def make_batch(dtype: torch.dtype = torch.float32, count: int = 3) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    planes = [torch.randn(count, channels, 8, 8, dtype=dtype) for channels in (4, 4, 1)]
    dropped = torch.arange(count) % 3 == 2
    return (*planes, torch.randint(0, 1000, (count,)), torch.randn(count, 3, 32, 32, dtype=dtype), dropped)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def agree(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture
def model() -> PaintByExampleModel:
    return make_model(conditioner_blocks=1).eval()


def test_sizes_are_those_of_the_paper():
    """859.5 M in the U-Net, 923 M saved in all, of which 32.5 M cannot have an effect on one token and are not trained.

    On the meta device, where weights take no memory.
    """
    with torch.device("meta"):
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        encoder = vision(**sizes, image_size=224, patch_size=14)
        model = PaintByExampleModel(new_unet(UNetSettings(), 4), Conditioner(encoder, 5, 768, "class"))
    unet = sum(parameter.numel() for parameter in model.unet.parameters())
    kept, trained = (sum(parameter.numel() for parameter in part.values()) for part in (model.kept(), model.trained()))
    assert unet == 859_520_964 + 320 * 5 * 9
    assert round(kept / 1e6) == 923
    # 22.0 M in the U-Net, and queries and keys of the mapper's five blocks.
    assert round((kept - trained - 5 * 2 * 1025 * 1024) / 1e6, 1) == 22.0


def test_what_is_kept(model: PaintByExampleModel):
    """The whole U-Net, mapper, normalisation, projection and null vector; nothing of the encoder."""
    names = set(model.kept())
    assert {name for name in names if name.startswith("unet.")} == {f"unet.{name}" for name, _ in model.unet.named_parameters()}
    rest = {name.split(".")[1] for name in names if not name.startswith("unet.")}
    assert rest == {"mapper", "final_layer_norm", "proj_out", "uncond_vector"}
    assert not model.train().conditioner.model.training
    assert model.trained().keys() < names


def test_the_conditioner_is_that_of_diffusers():
    """Same parameter names, same numbers as diffusers' encoder of the released checkpoint."""
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder

    torch.manual_seed(0)
    config = vision(num_hidden_layers=9).config
    theirs = PaintByExampleImageEncoder(config, proj_size=24).eval()
    ours = Conditioner(CLIPVisionModel(config), 2, 24, "class").eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=1e-6, atol=1e-6)


def test_without_the_bottleneck_every_token_conditions():
    """With no blocks between, the first of all tokens is the bottleneck's only one."""
    both = Conditioner(vision(), 0, 24, "all").eval()
    pixels = torch.randn(2, 3, 32, 32)
    everything = both(pixels)
    assert everything.shape == (2, 17, 24)
    both.tokens = "class"
    torch.testing.assert_close(everything[:, :1], both(pixels))


def test_widening_changes_nothing_at_first():
    """Whatever masked view and mask hold, the widened U-Net predicts what the prior predicts from the noisy latent."""
    torch.manual_seed(0)
    prior = UNet2DConditionModel.from_config({**new_unet(SMALL, 4).config, "in_channels": 4}).eval()
    wide = UNet2DConditionModel.from_config({**prior.config, "in_channels": 9}).eval()
    state = prior.state_dict()
    wide.load_state_dict({**state, "conv_in.weight": widened(state["conv_in.weight"])})
    noisy, rest, tokens = torch.randn(2, 4, 8, 8), 9 * torch.randn(2, 5, 8, 8), torch.randn(2, 1, 24)
    with torch.no_grad():
        expected = prior(noisy, 7, encoder_hidden_states=tokens).sample
        torch.testing.assert_close(wide(torch.cat([noisy, rest], 1), 7, encoder_hidden_states=tokens).sample, expected)


def test_inputs_stand_in_the_published_order(model: PaintByExampleModel):
    seen = []
    model.unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    parts = [torch.full((1, 4, 8, 8), 1.0), torch.full((1, 4, 8, 8), 2.0), torch.full((1, 1, 8, 8), 3.0)]
    with torch.no_grad():
        model.predict(*parts, torch.tensor([5]), torch.zeros(1, 1, 24))
    assert seen[0][0, :, 0, 0].tolist() == [1] * 4 + [2] * 4 + [3]


def test_a_dropped_condition_is_the_null_vector(model: PaintByExampleModel):
    """Item by item: where dropped, the reference has no influence; where not, it has."""
    noisy, masked, mask_channel = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.ones(2, 1, 8, 8)
    times, dropped = torch.tensor([10, 900]), torch.tensor([True, False])
    with torch.no_grad():
        first, second = (model(noisy, masked, mask_channel, times, torch.randn(2, 3, 32, 32), dropped) for _ in range(2))
        null = model.predict(noisy, masked, mask_channel, times, model.conditioner.uncond_vector.expand(2, 1, 24))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], null[0])
    assert not torch.allclose(first[1], second[1])


def test_every_trained_parameter_gets_a_gradient_even_without_dropout(model: PaintByExampleModel):
    """DDP waits for one from each."""
    planes = torch.randn(2, 13, 8, 8)
    batch = Batch(planes, torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([3, 700]), torch.tensor([False, False]))
    noise_losses(model, training_schedule("epsilon"), batch).mean().backward()
    assert [name for name, parameter in model.trained().items() if parameter.grad is None] == []
    assert all(parameter.grad is None for parameter in model.conditioner.model.parameters())


SHARES = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0)


class Oracle:
    """A denoiser that knows the latent, by the equations of the forward process."""

    class conditioner:
        uncond_vector = torch.zeros(1, 1, 3)

    def __init__(self, latent: torch.Tensor, prediction: str) -> None:
        self.latent, self.prediction = latent, prediction

    def predict(self, noisy, masked, keep, timestep, condition):
        share = SHARES[timestep.long()][:, None, None, None]
        noise = (noisy - share.sqrt() * self.latent) / (1 - share).sqrt()
        return noise if self.prediction == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * self.latent


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_error_of_what_is_predicted(prediction):
    """A denoiser that knows the noise by the forward process has no loss; one that says 0 has the target's power."""
    times, dropped = torch.tensor([0, 10, 500, 999]), torch.zeros(4).bool()
    batch = Batch(torch.randn(4, 13, 8, 8), torch.zeros(4, 8, 8, 3, dtype=torch.uint8), times, dropped)
    schedule = training_schedule(prediction)

    def oracle(noisy, masked, mask_channel, timestep, reference, dropped):
        assert torch.equal(masked, batch.planes[:, 4:8])
        assert torch.equal(mask_channel, batch.planes[:, 8:9])
        return Oracle(batch.planes[:, :4], prediction).predict(noisy, masked, mask_channel, timestep, reference)

    assert noise_losses(oracle, schedule, batch).tolist() == pytest.approx([0] * 4, abs=1e-6)
    nothing = noise_losses(lambda noisy, *_: torch.zeros_like(noisy), schedule, batch)
    noisy = schedule.add_noise(batch.planes[:, :4], batch.planes[:, 9:], batch.timestep)
    target = Oracle(batch.planes[:, :4], prediction).predict(noisy, None, None, batch.timestep, None)
    assert nothing.tolist() == pytest.approx(target.square().mean(dim=(1, 2, 3)).tolist(), rel=1e-4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_ends_where_a_perfect_denoiser_points(prediction):
    """A model that knows the latent leads any noise to it, for both kinds of prediction; taken for the other kind it does not."""
    latent = torch.randn(2, 4, 8, 8)
    oracle = Oracle(latent, prediction)
    how = {"seeds": [0, 1], "guidance": 2.0, "steps": 10, "scheduler": "DDIMScheduler"}
    given = torch.zeros(2, 4, 8, 8), torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 3)
    other = "v_prediction" if prediction == "epsilon" else "epsilon"
    apart = [(paint_latents(oracle, *given, **how, prediction=kind) - latent).abs().mean() for kind in (prediction, other)]
    assert apart[0] < 0.03  # What is left is the noise of the first timestep, at which sampling ends.
    assert apart[1] > 2 * apart[0]


def paint(model: PaintByExampleModel, number: int | slice, seeds: list[int], **options) -> torch.Tensor:
    torch.manual_seed(7)
    masked, mask_channel, references = torch.randn(3, 4, 8, 8), torch.ones(3, 1, 8, 8), torch.randn(3, 3, 32, 32)
    how = {"guidance": 3.0, "steps": 3, "scheduler": "DDIMScheduler", "prediction": "epsilon", **options}
    return paint_latents(model, masked[number], mask_channel[number], model.conditioner(references[number]), seeds=seeds, **how)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_an_item_does_not_depend_on_its_neighbours(model: PaintByExampleModel, scheduler):
    together = paint(model, slice(None), [4, 5, 6], scheduler=scheduler)
    alone = paint(model, slice(1, 2), [5], scheduler=scheduler)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(paint(model, slice(1, 2), [6], scheduler=scheduler), alone, atol=1e-2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_previews_show_where_the_model_is_going(scheduler, prediction):
    """An oracle foresees its latent at once, whatever is sampled with; each step is told."""
    latent, seen = torch.randn(1, 4, 8, 8), []
    paint_latents(
        *(Oracle(latent, prediction), torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 3)),
        seeds=[0],
        guidance=1.0,
        steps=6,
        scheduler=scheduler,
        prediction=prediction,
        watch=lambda step, of, foreseen: seen.append((step, of, (foreseen - latent).abs().mean().item())),
    )
    # Some take more steps than they are asked for, and say so.
    assert [(step, of) for step, of, _ in seen] == [(number, len(seen)) for number in range(1, len(seen) + 1)]
    assert len(seen) >= 6
    assert max(apart for *_, apart in seen) < 0.05


def test_what_comes_to_nothing_is_no_picture(model: PaintByExampleModel):
    model.unet.conv_out.weight.data.fill_(float("inf"))
    with pytest.raises(InputError, match="DDIMScheduler with 3 steps: came to infinite numbers"):
        paint(model, slice(0, 1), [1])


def test_guidance_extrapolates_from_the_null_vector(model: PaintByExampleModel):
    """Over one step the result is linear in the predicted noise, so r(s) = r(0) + s * (r(1) - r(0))."""
    at = {scale: paint(model, slice(0, 1), [1], guidance=scale, steps=1) for scale in (0.0, 1.0, 4.0)}
    assert not torch.allclose(at[0.0], at[1.0])
    torch.testing.assert_close(at[4.0], at[0.0] + 4 * (at[1.0] - at[0.0]), rtol=1e-3, atol=1e-3)


def test_the_average_follows_the_weights():
    weight = torch.nn.Parameter(torch.zeros(3))
    average = EMA({"weight": weight}, 0.9)
    with torch.no_grad():
        weight.fill_(1)
    average.update(1000)
    assert average.average["weight"].tolist() == pytest.approx([0.1] * 3)
    average.update(1)  # (1 + 1) / (10 + 1) of the old is kept
    assert average.average["weight"].tolist() == pytest.approx([1 - 0.9 * 2 / 11] * 3)
    with average.in_place():
        assert weight.tolist() == pytest.approx([1 - 0.9 * 2 / 11] * 3)
    assert weight.tolist() == [1, 1, 1]


def test_references_are_normalised_as_clip_expects():
    grey = torch.full((1, 2, 2, 3), 122, dtype=torch.uint8)
    expected = (122 / 255 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array([0.26862954, 0.26130258, 0.27577711])
    assert normalise_reference(grey)[0, :, 0, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_plain_and_fused_attention_agree(model: PaintByExampleModel):
    given = torch.randn(2, 9, 8, 8), torch.tensor([5, 500]), torch.randn(2, 1, 24)
    with torch.no_grad():
        fused = model.unet(*given).sample
        model.unet.set_attn_processor(AttnProcessor())
        plain = model.unet(*given).sample
        model.unet.set_default_attn_processor()
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_the_shortcut_is_the_attention_to_one_token(attention):
    """Output, and the gradient of every input and every trained parameter; its queries and keys are never computed."""
    results, computed = [], {True: set(), False: set()}
    for shortcut in (True, False):
        model = make_model(one_token_shortcut=shortcut, attention=attention).double()
        dead = {
            name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and DEAD.fullmatch(f"{name}.")
        }
        for name in dead:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name, to=computed[shortcut]: to.add(name))
        given = make_batch(torch.float64)
        for tensor in (*given[:3], given[4]):
            tensor.requires_grad_(True)
        predicted = model(*given)
        (predicted * torch.arange(predicted.numel(), dtype=torch.float64).sin().view_as(predicted)).sum().backward()
        inputs = {f"input {number}": given[number].grad for number in range(3)}
        results.append((predicted, gradients(model) | inputs, set(model.trained())))
    (with_it, its_gradients, trained), (without, other_gradients, also_trained) = results
    torch.testing.assert_close(with_it, without, rtol=1e-10, atol=1e-10)
    agree(its_gradients, other_gradients, 1e-10)
    assert trained == also_trained
    assert computed == {True: set(), False: dead}
    assert {name.partition(".")[0] for name in dead} == {"unet", "conditioner"}
    assert {name for name in its_gradients if not name.startswith("input")} == trained
    assert all(bool((value != 0).any()) for value in its_gradients.values())


@pytest.mark.parametrize("shortcut", [True, False])
def test_what_has_no_effect_is_not_trained_but_kept(shortcut):
    """Bit-identical after steps with weight decay, though all the rest moves; saved under the same names."""
    model = make_model(one_token_shortcut=shortcut)
    before = {name: value.detach().clone() for name, value in model.kept().items()}
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(3):
        model(*make_batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    still = {name for name, value in model.kept().items() if torch.equal(value, before[name])}
    assert still == model.kept().keys() - model.trained().keys()
    assert still == {name for name in model.kept() if DEAD.fullmatch(name)}
    assert len(still) == 7 * 4 + 2 * 4  # Seven blocks of the U-Net, two of the mapper.
    assert model.kept().keys() == make_model(tokens="all").trained().keys()


def test_the_norm_before_unasked_queries_is_skipped():
    """It returns its input and keeps its own parameters, so that weights of a plain model fit."""
    plain = make_model(one_token_shortcut=False)
    norm = plain.unet.mid_block.attentions[0].transformer_blocks[0].norm2
    skipped = SkippedNorm.of(norm)
    seen = torch.randn(2, 3, 32)
    assert skipped(seen) is seen
    assert skipped.weight is norm.weight
    assert skipped.bias is norm.bias
    quick = make_model(1)
    assert sum(isinstance(module, SkippedNorm) for module in quick.modules()) == 7
    quick.load_state_dict(plain.state_dict())
    assert not any(parameter.is_meta for parameter in quick.parameters())


def test_without_the_bottleneck_all_is_as_before():
    model = make_model(tokens="all", one_token_shortcut=True)
    assert model.kept().keys() == model.trained().keys()
    model(*make_batch()).square().mean().backward()
    assert gradients(model).keys() == model.trained().keys()
    assert all(bool((value != 0).any()) for name, value in gradients(model).items() if "to_q" in name)


def test_more_tokens_than_one_are_refused():
    model = make_model()
    given = torch.randn(2, 9, 8, 8), torch.tensor([5, 500])
    with pytest.raises(InputError, match=r"model\.one_token_shortcut: 17 condition tokens"):
        model.unet(*given, encoder_hidden_states=torch.randn(2, 17, 24))
    with pytest.raises(InputError, match="2 condition tokens"):
        model.conditioner.mapper(torch.randn(2, 2, 32))
    with pytest.raises(InputError, match="and a mask"):
        model.unet(*given, encoder_hidden_states=torch.randn(2, 1, 24), encoder_attention_mask=torch.ones(2, 1))


def test_gradients_are_recomputed_through_the_shortcut():
    """Gradient checkpointing finds the same ones."""
    results = []
    for checkpointing in (False, True):
        model = make_model(gradient_checkpointing=checkpointing)
        model(*make_batch()).square().mean().backward()
        results.append(gradients(model))
    agree(*results, 1e-6)


def test_channels_last_changes_the_layout_and_nothing_else():
    losses = []
    for channels_last in (False, True):
        model = make_model()
        prepare(model, ModelSettings(encoder="", vae="", channels_last=channels_last), torch.device("cpu"))
        layouts = []
        model.unet.conv_out.register_forward_pre_hook(
            lambda _, given, seen=layouts: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
        )
        losses.append(model(*make_batch()).square().mean())
        assert layouts == [channels_last]
        assert model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert model.unet.conv_in.weight.is_contiguous() != channels_last
    torch.testing.assert_close(*losses)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert {"model.one_token_shortcut", "model.channels_last", "model.compile"} <= CHANGEABLE, "also in a resumed run"


def test_moments_come_back_in_the_layout_of_their_parameter():
    """A fused AdamW goes by places in memory: moments from a file, which are contiguous, must be laid out as the parameter is."""
    steps = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=memory_format))
        parameter.grad = laid_out_as(parameter, torch.randn(8, 4, 3, 3))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        moments = {"exp_avg": torch.randn(8, 4, 3, 3), "exp_avg_sq": torch.rand(8, 4, 3, 3)}
        put_back = {name: laid_out_as(parameter, value) for name, value in moments.items()}
        optimizer.state[parameter] = {"step": torch.tensor(5.0), **put_back}
        optimizer.step()
        steps.append(parameter.detach())
    torch.testing.assert_close(*steps)


@pytest.mark.usefixtures("unchecked")
def test_a_compiled_model_computes_the_same(monkeypatch: pytest.MonkeyPatch):
    """Graphs are what differs from eager; kernels for them, which take a minute to make, are tested with the VAE."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compile_in_place(module, backend="aot_eager", **options)
    )
    smaller = SMALL.model_copy(update={"block_out_channels": (16,), "attention": (False,)})  # Its middle block attends.
    losses = []
    for compiles in (False, True):
        model = make_model(unet=smaller)
        prepare(model, ModelSettings(encoder="", vae="", compile=compiles), torch.device("cpu"))
        counters.clear()
        loss = model(*make_batch()).square().mean()
        loss.backward()
        losses.append((loss, torch.stack([gradient.norm() for gradient in gradients(model).values()]).norm()))
        assert not [name for name in (*model.kept(), *model.trained(), *model.state_dict()) if "_orig_mod" in name]
        compiled = counters["stats"]["unique_graphs"]
        assert bool(compiled) == compiles
        with uncompiled():
            model.unet(torch.randn(2, 9, 4, 4), torch.tensor([1, 2]), torch.randn(2, 1, 24))
        assert counters["stats"]["unique_graphs"] == compiled
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
