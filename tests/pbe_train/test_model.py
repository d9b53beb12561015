"""The model's parts against their definitions and against diffusers."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe_core.errors import InputError
from pbe_train.checkpoints.from_pretrained import widened
from pbe_train.config import UNetSettings
from pbe_train.data.latents import normalise_reference
from pbe_train.data.training_dataset import Batch
from pbe_train.model.diffusion import noise_losses, paint_latents
from pbe_train.model.paint_model import Conditioner, PaintByExampleModel, new_unet
from pbe_train.model.schedulers import training_schedule
from pbe_train.training.optimizer import EMA

SMALL = UNetSettings(
    block_out_channels=(16, 32),
    attention=(False, True),
    layers_per_block=1,
    attention_heads=2,
    norm_groups=8,
    cross_attention_dim=24,
)


def vision(**sizes: int) -> CLIPVisionModel:
    defaults = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**{**defaults, "image_size": 32, "patch_size": 8, **sizes}))


@pytest.fixture
def model() -> PaintByExampleModel:
    torch.manual_seed(0)
    return PaintByExampleModel(new_unet(SMALL, 4), Conditioner(vision(), 1, 24, "class")).eval()


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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_error_of_what_is_predicted(prediction):
    """A denoiser that knows the noise by the forward process has no loss; one that says 0 has the target's power."""
    batch = Batch(
        torch.randn(4, 13, 8, 8),
        torch.zeros(4, 8, 8, 3, dtype=torch.uint8),
        torch.tensor([0, 10, 500, 999]),
        torch.zeros(4).bool(),
    )
    schedule = training_schedule(prediction)

    def oracle(noisy, masked, mask_channel, timestep, reference, dropped):
        assert torch.equal(masked, batch.planes[:, 4:8])
        assert torch.equal(mask_channel, batch.planes[:, 8:9])
        return Oracle(batch.planes[:, :4], prediction).predict(noisy, masked, mask_channel, timestep, reference)

    assert noise_losses(oracle, schedule, batch).tolist() == pytest.approx([0] * 4, abs=1e-6)
    nothing = noise_losses(lambda noisy, *_: torch.zeros_like(noisy), schedule, batch)
    target = oracle(schedule.add_noise(batch.planes[:, :4], batch.planes[:, 9:], batch.timestep), *_given(batch))
    assert nothing.tolist() == pytest.approx(target.square().mean(dim=(1, 2, 3)).tolist(), rel=1e-4)


# Without the check of argument types that tests put around it: the oracle is no `PaintByExampleModel`.
paint_unchecked = inspect.unwrap(paint_latents)


def _given(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.planes[:, 4:8], batch.planes[:, 8:9], batch.timestep, batch.reference, batch.dropped


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_ends_where_a_perfect_denoiser_points(prediction):
    """A model that knows the latent leads any noise to it, for both kinds of prediction; taken for the other kind it does not."""
    latent = torch.randn(2, 4, 8, 8)
    oracle = Oracle(latent, prediction)
    how = {"seeds": [0, 1], "guidance": 2.0, "steps": 10, "scheduler": "DDIMScheduler"}
    given = torch.zeros(2, 4, 8, 8), torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 3)
    other = "v_prediction" if prediction == "epsilon" else "epsilon"
    apart = [(paint_unchecked(oracle, *given, **how, prediction=kind) - latent).abs().mean() for kind in (prediction, other)]
    assert apart[0] < 0.03  # What is left is the noise of the first timestep, at which sampling ends.
    assert apart[1] > 2 * apart[0]


def paint(model: PaintByExampleModel, number: int | slice, seeds: list[int], **options) -> torch.Tensor:
    torch.manual_seed(7)
    masked, mask_channel, references = torch.randn(3, 4, 8, 8), torch.ones(3, 1, 8, 8), torch.randn(3, 3, 32, 32)
    how = {"guidance": 3.0, "steps": 3, "scheduler": "DDIMScheduler", "prediction": "epsilon", **options}
    return paint_latents(model, masked[number], mask_channel[number], model.conditioner(references[number]), seeds=seeds, **how)


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"]
)
def test_an_item_does_not_depend_on_its_neighbours(model: PaintByExampleModel, scheduler):
    together = paint(model, slice(None), [4, 5, 6], scheduler=scheduler)
    alone = paint(model, slice(1, 2), [5], scheduler=scheduler)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(paint(model, slice(1, 2), [6], scheduler=scheduler), alone, atol=1e-2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_previews_show_where_the_model_is_going(scheduler, prediction):
    """An oracle foresees its latent at once, whatever is sampled with; each step is told."""
    latent, seen = torch.randn(1, 4, 8, 8), []
    paint_unchecked(
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


def test_what_comes_to_nothing_is_no_picture(model: PaintByExampleModel, monkeypatch):
    monkeypatch.setattr(PaintByExampleModel, "predict", lambda _, noisy, *rest: noisy * float("inf"))
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
