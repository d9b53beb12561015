"""Models of the published architecture with random weights, narrow enough for a test, in every layout that is published.

Four levels, the block types of Stable Diffusion 1.x, 8 heads, 32 groups; only channels and, if not asked for, layers are fewer.
Foreign layouts are written here name by name, from what their files hold, and not by the code under test.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig

from pbe_core.vae import load_vae, weights_sha256
from pbe_train.checkpoints.from_pretrained import init_from_pretrained
from pbe_train.checkpoints.load_report import write_report
from pbe_train.checkpoints.trainer_checkpoint import save_checkpoint
from pbe_train.config import TrainSettings
from pbe_train.model.pipeline import RunIdentity

HIDDEN = 64


@dataclass(frozen=True)
class Published:
    """The parts of a Paint by Example model (9 input channels), or of a text-to-image one (4)."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encoder: PaintByExampleImageEncoder


def make_published(channels: int = 9, layers: int = 4, seed: int = 0, blocks: int = 1) -> Published:
    """Random weights; `layers` of the encoder, whose mapper has (layers + 1) // 5 blocks; `blocks` a level (published: 24, 2)."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        in_channels=channels,
        out_channels=4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=blocks,
        cross_attention_dim=HIDDEN,
        attention_head_dim=8,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        layers_per_block=blocks,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 1}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, hidden_act="quick_gelu")
    encoder = PaintByExampleImageEncoder(config, proj_size=HIDDEN)
    with torch.no_grad():  # All of them random: a bias or a norm that is 0 or 1 everywhere could land in another's place unseen.
        for network in (unet, vae, encoder):
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return Published(unet.eval(), vae.eval(), encoder.eval())


def make_comparable(parts: Published) -> Published:
    """The same model, such that two programs paint the same with it but for rounding, and rounding does not grow.

    diffusers' pipeline draws from the VAE's posterior, ours takes its mean: the deviation is set to next to nothing. And a random
    U-Net is far rougher than a trained one: through ten steps under guidance, differences of 1e-5 grew to 4 grey levels; it is
    made to predict less, and the reference to count for more.
    """
    with torch.no_grad():
        parts.vae.quant_conv.weight[4:] = 0
        parts.vae.quant_conv.bias[4:] = -30
        parts.unet.conv_out.weight *= 0.1
        parts.encoder.proj_out.weight *= 20
    return parts


def write_network(folder: Path, network: torch.nn.Module, config: dict, *, file: str, attention: str = "new") -> None:
    """A network's folder in diffusers' layout; `file` ends in .safetensors or .bin."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if attention == "old":
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        for new_name, old_name in old.items():
            # Some have the weights of these layers as 1 x 1 kernels.
            state |= {
                name.replace(new_name, old_name): tensor[..., None, None] if name.endswith("q.weight") else tensor
                for name, tensor in state.items()
                if "attentions.0." in name
            }
            state = {name: tensor for name, tensor in state.items() if new_name not in name}
    write_tensors(folder / file, state)


def write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)


def write_in_shards(folder: Path, shards: int = 3) -> Path:
    """Each file of weights in a model's folder as shards with an index, named as diffusers and transformers name them."""
    for path in [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin")]:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        stem, variant = (path.stem.removesuffix(".fp16"), ".fp16" if path.stem.endswith(".fp16") else "")
        names = sorted(state)
        places = {name: f"{stem}{variant}-{1 + i % shards:05}-of-{shards:05}{path.suffix}" for i, name in enumerate(names)}
        for file in set(places.values()):
            write_tensors(path.parent / file, {name: state[name] for name in names if places[name] == file})
        content = json.dumps({"metadata": {"total_size": 0}, "weight_map": places})
        (path.parent / f"{stem}{path.suffix}.index{variant}.json").write_text(content)
        path.unlink()
    return folder


def config_of(network: UNet2DConditionModel | AutoencoderKL) -> dict:
    return {"_class_name": type(network).__name__, "_diffusers_version": "0.8.0.dev0", **json.loads(network.to_json_string())}


def encoder_state(encoder: PaintByExampleImageEncoder, transformers: int) -> dict[str, Tensor]:
    """Its tensors as transformers 4 or 5 names them."""
    inside = "model.vision_model." if transformers == 4 else "model."
    return {re.sub(r"^model\.(vision_model\.)?", inside, name): tensor for name, tensor in encoder.state_dict().items()}


def write_hub(
    folder: Path, parts: Published, *, transformers: int = 4, pickles: bool = False, position_ids: bool = False, vae: str = "new"
) -> Path:
    """Paint by Example as the hub has it; the VAE's attention under `new` or `old` names."""
    file = "diffusion_pytorch_model.bin" if pickles else "diffusion_pytorch_model.safetensors"
    write_network(folder / "unet", parts.unet, config_of(parts.unet), file=file)
    write_network(folder / "vae", parts.vae, config_of(parts.vae), file=file, attention=vae)
    inside = folder / "image_encoder"
    inside.mkdir()
    config = {**parts.encoder.config.to_dict(), "architectures": ["PaintByExampleImageEncoder"]}
    (inside / "config.json").write_text(json.dumps(config))
    state = encoder_state(parts.encoder, transformers)
    if position_ids:
        state["model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    write_tensors(inside / ("pytorch_model.bin" if pickles else "model.safetensors"), state)
    write_scheduler(folder, "epsilon")
    (folder / "safety_checker").mkdir()
    index = {"_class_name": "PaintByExamplePipeline", "image_encoder": ["paint_by_example", "PaintByExampleImageEncoder"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def broken_hub(change: Callable[[dict[str, Tensor]], object], part: str = "unet") -> Callable[[Path, Published], Path]:
    """Writes that layout with the tensors of one part changed."""

    def write(folder: Path, parts: Published) -> Path:
        where = write_hub(folder / "m", parts)
        path = where / part / ("model.safetensors" if part == "image_encoder" else "diffusion_pytorch_model.safetensors")
        state = load_file(path)
        change(state)
        save_file(state, path)
        return where

    return write


def make_run(
    out: Path,
    hub: Path,
    start: Path,
    average: float | None = None,
    blocks: int = 1,
    more: Mapping[str, str] | None = None,
    **changes: object,
) -> Path:
    """A run folder as training leaves it, at step 3, its weights those of the pretrained model."""
    model = {
        "pretrained": str(start),
        "encoder": str(hub),
        "vae": str(hub / "vae"),
        "conditioner_blocks": blocks,
        "mask_to_latent": "nearest",
        **(more or {}),
    }
    settings = TrainSettings.model_validate({"dataset": "data", "out": str(out), "model": model, **changes})
    vae = load_vae(str(hub / "vae"))
    trained, report = init_from_pretrained(settings, vae)
    identity = RunIdentity(
        dataset_fingerprint="fingerprint",
        dataset_samples="samples",
        precision="fp32",
        vae_sha256=weights_sha256(vae.state_dict()),
        encoder_sha256=weights_sha256(trained.conditioner.model.state_dict()),
        unet={key: value for key, value in trained.unet.config.items() if not key.startswith("_")},
        latent_channels=4,
        scaling_factor=0.18215,
        view_size=64,
        mask_channel=trained.mask_channel,
    )
    kept: dict[str, Mapping[str, Tensor]] = {"model": trained.kept()}
    if average is not None:
        kept["ema"] = {name: tensor.detach() + average for name, tensor in trained.kept().items()}
    save_checkpoint(out, 3, settings, identity, kept, 3)
    assert report
    write_report(report, out)
    return out


def write_stable_diffusion(folder: Path, parts: Published, prediction: str = "epsilon", **changes: object) -> Path:
    """A text-to-image model in diffusers' layout; `changes` to the U-Net's configuration."""
    file = "diffusion_pytorch_model.safetensors"
    write_network(folder / "unet", parts.unet, {**config_of(parts.unet), **changes}, file=file)
    write_network(folder / "vae", parts.vae, config_of(parts.vae), file=file)
    (folder / "text_encoder").mkdir()
    write_scheduler(folder, prediction)
    return folder


def write_scheduler(folder: Path, prediction: str) -> None:
    (folder / "scheduler").mkdir()
    content = {"_class_name": "PNDMScheduler", "prediction_type": prediction}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))


def original_state(parts: Published, *, text: bool = False) -> dict[str, Tensor]:
    """The original code's dictionary: Paint by Example's, or with `text` Stable Diffusion's.

    U-Net and VAE by the walk of the original modules, whose order and names are written out here once more.
    """
    state = {name: torch.rand(1000) for name in ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "posterior_mean_coef2")}
    state["model_ema.decay"] = torch.tensor(0.9999)
    state["model_ema.diffusion_modelinput_blocks00weight"] = torch.rand(3)
    state |= {f"model.diffusion_model.{name}": tensor for name, tensor in original_unet(parts.unet).items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in original_vae(parts.vae).items()}
    if text:
        return state | {"cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.rand(8)}
    vision = "cond_stage_model.transformer.vision_model."
    encoder = encoder_state(parts.encoder, 4)
    state |= {vision + name.removeprefix("model.vision_model."): t for name, t in encoder.items() if name.startswith("model.")}
    state[vision + "embeddings.position_ids"] = torch.arange(17)[None]
    for number, block in enumerate(parts.encoder.mapper.blocks):
        at, attention = f"cond_stage_model.mapper.resblocks.{number}.", block.attn1
        modules = {"attn.c_proj": attention.to_out[0], "ln_1": block.norm1, "ln_2": block.norm3}
        modules |= {"mlp.c_fc": block.ff.net[0].proj, "mlp.c_proj": block.ff.net[2]}
        state |= _states({f"{at}{name}": module for name, module in modules.items()})
        for kind in ("weight", "bias"):
            parted = [getattr(layer, kind).data for layer in (attention.to_q, attention.to_k, attention.to_v)]
            state[f"{at}attn.c_qkv.{kind}"] = torch.cat(parted)
    state |= _states({"cond_stage_model.final_ln": parts.encoder.final_layer_norm, "proj_out": parts.encoder.proj_out})
    state["learnable_vector"] = parts.encoder.uncond_vector.data
    return state


def _states(modules: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    return {f"{at}.{name}": tensor for at, module in modules.items() for name, tensor in module.state_dict().items()}


def original_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A U-Net's tensors in the original code's order of modules: blocks are numbered through all levels."""
    modules = {"time_embed.0": unet.time_embedding.linear_1, "time_embed.2": unet.time_embedding.linear_2}
    modules |= {"input_blocks.0.0": unet.conv_in, "out.0": unet.conv_norm_out, "out.2": unet.conv_out}
    number = 0
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            number += 1
            modules |= _original_resnet(f"input_blocks.{number}.0", resnet)
            if attention is not None:
                modules[f"input_blocks.{number}.1"] = attention
        if block.downsamplers:
            number += 1
            modules[f"input_blocks.{number}.0.op"] = block.downsamplers[0].conv
    modules |= _original_resnet("middle_block.0", unet.mid_block.resnets[0])
    modules["middle_block.1"] = unet.mid_block.attentions[0]
    modules |= _original_resnet("middle_block.2", unet.mid_block.resnets[1])
    number = -1
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            number += 1
            modules |= _original_resnet(f"output_blocks.{number}.0", resnet)
            last = 1
            if attention is not None:
                modules[f"output_blocks.{number}.1"] = attention
                last = 2
        if block.upsamplers:
            modules[f"output_blocks.{number}.{last}.conv"] = block.upsamplers[0].conv
    return _states(modules)


def original_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    """A VAE's tensors in the original layout, whose attention is made of 1 x 1 convolutions."""
    state = {}
    modules = {"quant_conv": vae.quant_conv, "post_quant_conv": vae.post_quant_conv}
    for name, side in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        modules |= {f"{name}.conv_in": side.conv_in, f"{name}.conv_out": side.conv_out, f"{name}.norm_out": side.conv_norm_out}
        for number, resnet in enumerate(side.mid_block.resnets):
            modules |= _original_vae_resnet(f"{name}.mid.block_{number + 1}", resnet)
        attention = side.mid_block.attentions[0]
        modules[f"{name}.mid.attn_1.norm"] = attention.group_norm
        layers = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "proj_out": attention.to_out[0]}
        for letter, layer in layers.items():
            state[f"{name}.mid.attn_1.{letter}.weight"] = layer.weight.data[:, :, None, None]
            state[f"{name}.mid.attn_1.{letter}.bias"] = layer.bias.data
    for level, block in enumerate(vae.encoder.down_blocks):
        for number, resnet in enumerate(block.resnets):
            modules |= _original_vae_resnet(f"encoder.down.{level}.block.{number}", resnet)
        if block.downsamplers:
            modules[f"encoder.down.{level}.downsample.conv"] = block.downsamplers[0].conv
    for level, block in enumerate(reversed(vae.decoder.up_blocks)):
        for number, resnet in enumerate(block.resnets):
            modules |= _original_vae_resnet(f"decoder.up.{level}.block.{number}", resnet)
        if block.upsamplers:
            modules[f"decoder.up.{level}.upsample.conv"] = block.upsamplers[0].conv
    return state | _states(modules)


def _original_resnet(at: str, resnet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    modules = {
        f"{at}.in_layers.0": resnet.norm1,
        f"{at}.in_layers.2": resnet.conv1,
        f"{at}.emb_layers.1": resnet.time_emb_proj,
        f"{at}.out_layers.0": resnet.norm2,
        f"{at}.out_layers.3": resnet.conv2,
    }
    return modules | ({f"{at}.skip_connection": resnet.conv_shortcut} if resnet.conv_shortcut is not None else {})


def _original_vae_resnet(at: str, resnet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    modules = {f"{at}.{name}": getattr(resnet, name) for name in ("norm1", "conv1", "norm2", "conv2")}
    return modules | ({f"{at}.nin_shortcut": resnet.conv_shortcut} if resnet.conv_shortcut is not None else {})
