"""Train the tiny prior: a diffusion U-Net that paints views of the tiny world and has never seen a reference.

What Stable Diffusion is to the method, this is to the tiny world: 4 input channels, latents of the tiny autoencoder, no text. It
learns from the views of a dataset that the pipeline built, so that it knows pictures as the trainer will show them:

    shards ──latents of views──▶ noise added ──U-Net under one token of zeros──▶ velocity;   loss = mean squared error

Where a condition will come in, the output layer of the attention to it starts at zero and stays there, since a token of zeros
gives it no gradient: whatever a new conditioner says at first, the U-Net paints as before.

Usage:  python -m tiny_world.make_photos --out PHOTOS --train 12000 --validation 150
        python pipelines/build.py --config configs/tiny.yaml --source.annotations PHOTOS --source.photos PHOTOS --out DATASET
        torchrun --nproc-per-node 2 -m tiny_world.train_prior --dataset DATASET --out tiny_world/weights/prior --work runs/prior
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm, trange

from pbe_core.errors import InputError, run_program
from pbe_core.files import atomic_file
from pbe_train.checkpoints.pretrained import METADATA_FILE
from pbe_train.config import TIMESTEPS
from pbe_train.data.order import SampleLocation
from pbe_train.data.shards import ShardReader
from pbe_train.model.paint_model import copy_values
from pbe_train.model.schedulers import training_schedule
from pbe_train.training.distributed import Distributed
from pbe_train.training.optimizer import EMA
from tiny_world.kinds import generator
from tiny_world.train_vae import learning_rate

CHANNELS_OF_LATENTS = 4
CHANNELS = (64, 96)
ATTENTION = (False, True)
CONDITION_WIDTH = 128
BATCH = 32
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
EMA_DECAY = 0.999
SAVE_EVERY_STEPS = 500
HELD_OUT = 256
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def tiny_unet() -> UNet2DConditionModel:
    """2.5 M parameters: convolutions at 16 x 16 cells, attention at 8 x 8; Stable Diffusion's layout otherwise."""
    unet = UNet2DConditionModel(
        in_channels=CHANNELS_OF_LATENTS,
        out_channels=CHANNELS_OF_LATENTS,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in ATTENTION),
        up_block_types=tuple("CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(ATTENTION)),
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=CONDITION_WIDTH,
    )
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            nn.init.zeros_(block.attn2.to_out[0].weight)
    return unet


def view_latents(dataset: Path, split: str, scale: float, most: int | None = None) -> Float[Tensor, "n 4 side side"]:
    """Scaled latents (posterior means) of the views of a split, all of them or the first `most`."""
    reader = ShardReader(dataset, split)
    places = [SampleLocation(shard, row) for shard, count in enumerate(reader.counts) for row in range(count)][:most]
    latents = [
        reader.read_for_training(place, lambda key, count: 0).latent[:4]
        for place in tqdm(places, f"{split} latents", mininterval=5)
    ]
    return torch.from_numpy(np.stack(latents).astype(np.float32)) * scale


def velocity_losses(
    unet: nn.Module,
    schedule: DDPMScheduler,
    latents: Float[Tensor, "n 4 side side"],
    noise: Float[Tensor, "n 4 side side"],
    times: Int64[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Mean squared error of the predicted velocity, of each view."""
    nothing = torch.zeros(len(latents), 1, CONDITION_WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(schedule.add_noise(latents, noise, times), times, nothing).sample
    target = schedule.get_velocity(latents, noise, times)
    return F.mse_loss(predicted.float(), target, reduction="none").mean((1, 2, 3))


def draw(
    random: np.random.Generator, latents: Float[Tensor, "n 4 side side"], count: int
) -> tuple[Float[Tensor, "count 4 side side"], Float[Tensor, "count 4 side side"], Int64[Tensor, " count"]]:
    """Views, noise, and diffusion times, one from each of `count` equal parts of the range."""
    chosen = torch.from_numpy(random.integers(len(latents), size=count))
    noise = torch.from_numpy(random.standard_normal((count, *latents.shape[1:]), np.float32))
    times = torch.from_numpy(((np.arange(count) + random.uniform(size=count)) * TIMESTEPS / count).astype(np.int64))
    return latents[chosen], noise, times


@torch.no_grad()
def held_out_loss(unet: UNet2DConditionModel, schedule: DDPMScheduler, latents: Float[Tensor, "n 4 side side"]) -> float:
    """The loss on held-out views with noise and times that are always the same."""
    views, noise, times = draw(generator("prior held out"), latents, HELD_OUT)
    parts = zip(*(torch.split(each, BATCH) for each in (views, noise, times)), strict=True)
    return float(torch.cat([velocity_losses(unet, schedule, *part) for part in parts]).mean())


def train_prior(
    dataset: Path, out: Path, work: Path, steps: int, seed: int, distributed: Distributed, *, compiled: bool = False
) -> None:
    """Train, or go on from what a run that was stopped left in `work`; write the average of the weights to `out` now and then."""
    torch.manual_seed(seed)
    vae = ShardReader(dataset, "train").info.vae
    if vae.latent_channels != CHANNELS_OF_LATENTS:
        raise InputError(
            f"{dataset}: its latents have {vae.latent_channels} channels, the tiny prior's {CHANNELS_OF_LATENTS}; give a "
            "dataset of the tiny autoencoder"
        )
    scale = vae.scaling_factor
    latents, held_out = view_latents(dataset, "train", scale), view_latents(dataset, "validation", scale)
    # On a CPU in bfloat16 plain products are faster for 64 cells than the fused kernel.
    unet = tiny_unet().to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    average = EMA(dict(unet.named_parameters()), EMA_DECAY)
    schedule = training_schedule("v_prediction")
    saved, first_step = work / "state.pt", 0
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        copy_values(state["average"], average.average)
        first_step = state["step"]
    parallel = torch.compile(unet) if compiled else unet
    if distributed.world_size > 1:
        parallel = DistributedDataParallel(parallel)
    mine = slice(distributed.rank, None, distributed.world_size)
    progress = trange(first_step, steps, desc="prior", initial=first_step, total=steps, mininterval=10, disable=mine.start > 0)
    for step in progress:
        batch = draw(generator(seed, "prior step", step), latents, BATCH)
        loss = velocity_losses(parallel, schedule, *(part[mine] for part in batch)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, LEARNING_RATE)
        optimizer.step()
        average.update(step + 1)
        if distributed.rank == 0 and ((step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == steps):
            with average.in_place():
                progress.write(f"step {step + 1}: held-out loss {held_out_loss(unet, schedule, held_out):.4f}")
                save_prior(unet, out)
            work.mkdir(parents=True, exist_ok=True)
            state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "average": average.average, "step": step + 1}
            with atomic_file(saved) as temporary:
                torch.save(state, temporary)


def save_prior(unet: UNet2DConditionModel, out: Path) -> None:
    """Write a half-precision copy in the layout of a Stable Diffusion model, as far as the trainer reads it."""
    finished = tiny_unet()
    finished.load_state_dict(unet.state_dict())
    finished.half().save_pretrained(out / "unet")
    training_schedule("v_prediction").save_pretrained(out / "scheduler")
    # What the trainer reads of a start's licence: without it, it takes a U-Net in this layout for Stable Diffusion's.
    size = (out / WEIGHTS).stat().st_size
    metadata = {"licence": "apache-2.0", "licence_guessed": False, "files": {WEIGHTS: {"bytes": size}}}
    (out / METADATA_FILE).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="dataset that the tiny preset built from many photos")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run's state, from which it goes on")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the U-Net first: a minute, then a fifth less time a step")
    settings = parser.parse_args()
    distributed = Distributed.start(None, "bf16")
    train_prior(
        settings.dataset, settings.out, settings.work, settings.steps, settings.seed, distributed, compiled=settings.compile
    )


if __name__ == "__main__":
    run_program(main)
