"""The attention to one token against the whole attention; which parameters that leaves without effect; layout and compilation."""

import re

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe_core.errors import InputError
from pbe_train.config import CHANGEABLE, ModelSettings, UNetSettings
from pbe_train.model.paint_model import PaintByExampleModel, SkippedNorm, assemble, laid_out_as, new_unet, prepare, uncompiled

SMALL = UNetSettings(
    block_out_channels=(16, 32),
    attention=(True, True),
    layers_per_block=1,
    attention_heads=2,
    norm_groups=8,
    cross_attention_dim=24,
)
ENCODER = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)
# What only queries and keys of the attention to the condition's one token depend on, by the names of parameters.
DEAD = re.compile(
    r"unet\..*\.transformer_blocks\.0\.(norm2|attn2\.to_[qk])\..*" r"|conditioner\.mapper\.blocks\.\d\.attn1\.to_[qk]\..*"
)


def make_model(seed: int = 0, **options) -> PaintByExampleModel:
    torch.manual_seed(seed)
    settings = ModelSettings(**{"encoder": "none", "vae": "none", "unet": SMALL, "conditioner_blocks": 2, **options})
    return assemble(settings, new_unet(settings.unet, 4), CLIPVisionModel(ENCODER)).train()


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


def test_how_it_is_computed_may_change_in_a_resumed_run():
    assert {"model.one_token_shortcut", "model.channels_last", "model.compile"} <= CHANGEABLE


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
