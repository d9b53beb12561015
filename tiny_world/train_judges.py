"""Train the two judges of the tiny world, by whose features `pbe evaluate` tells what a model painted.

    shape   sees luminance alone and learned sixteen shapes under patterns, colours, light and poses drawn apart from them: its
            features say which shape is there, and nothing of what the object wears
    look    sees colours and learned which individual is there, among others of its colours too

    tiles --region, light, blur--> [n, channels, 224, 224] --ResNetModel--> mean over places, 96 numbers --> cosines --> loss

Neither is the encoder that conditions models, nor a transformer: a model cannot please them by pleasing that. (A Dinov2Model of
this size learns the shapes, too, but far more slowly.) Half of the tiles went through the tiny autoencoder, so that painted
pictures are nothing new to them.

Usage:  python -m tiny_world.train_judges shape --out tiny_world/weights/judges/shape
        python -m tiny_world.train_judges look --out tiny_world/weights/judges/look
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn
from tqdm import trange
from transformers import ResNetConfig, ResNetModel

from tiny_world.kinds import KINDS, Instance, generator, instance, mixed_instance
from tiny_world.scenes import render_tile
from tiny_world.train_encoder import TILE_PX, looks, pair_loss, repaint_half
from tiny_world.train_vae import learning_rate

JUDGES = ("shape", "look")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (8 / 16, 16 / 16, 3 / 16)
"""How much the judge of shapes sees of each channel, normalised as above: 0.292 R + 0.597 G + 0.111 B, nearly Rec. 601's luma.
A kernel of nine significant bits times these numbers is exact in half precision, so that no colour leaks through rounding."""
KERNEL_BITS = 9
STEM = "embedder.embedder.convolution.weight"
# No individual of these is in a world's photos, and none of the validation split is near: all are drawn by names of their own.
INDIVIDUALS = {"shape": 4096, "look": 1024}
TILES_OF_EACH = {"shape": 2, "look": 4}
OF_KINDS = 512
FAMILY = 4
"""Individuals of `look` beyond the first `OF_KINDS` come in families: the same two colours on four shapes and patterns."""
CROP_PX = 112
SEEN_PX = 224
"""What the kind `resnet` of pbe_core/judges shows a network; crops are enlarged to it."""
MOST_BLUR = 1.3
CROPS_A_STEP = 64
TEMPERATURE = 0.1
SMOOTHING = 0.1
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
SAVE_EVERY_STEPS = 250

Tiles = UInt8[Tensor, "individuals tiles channels 128 128"]
Edges = Float32[np.ndarray, "individuals tiles 4"]


def train_judge(judge: str, out: Path, steps: int, seed: int, vae_folder: Path, first_step: int = 0) -> None:
    """Train one judge, and write it as `ResNetModel.from_pretrained` reads it, in half precision.

    Args:
        judge: `shape` or `look`.
        out: folder to write to.
        steps: of `CROPS_A_STEP` crops, those before `first_step` included.
        seed: of individuals, tiles and everything random in training.
        vae_folder: the autoencoder that half of the tiles go through.
        first_step: go on with this one from the judge that is in `out`.
    """
    torch.manual_seed(seed)
    tiles, edges = all_tiles(judge, seed)
    repaint_half(tiles.view(-1, 4, *tiles.shape[2:]), AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32).eval())
    if judge == "shape":
        tiles = luminance(tiles)
    network = tiny_judge(channels=tiles.shape[2]).train()
    shapes = nn.Parameter(torch.randn(len(KINDS), network.config.hidden_sizes[-1]))
    if first_step:
        go_on_from(network, ResNetModel.from_pretrained(out, dtype=torch.float32))
        if judge == "shape":
            shapes.data = mean_features(network, tiles, edges, generator(seed, "judge shapes"))
    optimizer = torch.optim.AdamW([*network.parameters(), shapes], weight_decay=WEIGHT_DECAY)
    progress = trange(first_step, steps, desc=judge, mininterval=10)
    for step in progress:
        random = generator(seed, "judge step", judge, step)
        if judge == "shape":
            loss, right = shape_loss(network, shapes, tiles, edges, random)
        else:
            loss, right = look_loss(network, tiles, edges, random)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, LEARNING_RATE, first_step)
        optimizer.step()
        if step % 25 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", right=f"{right.item():.2f}")
        if (step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == steps:
            finished_judge(network).half().save_pretrained(out)


def tiny_judge(channels: int) -> ResNetModel:
    """0.26 M parameters; a picture of 224 px costs about 1 ms on one core."""
    config = ResNetConfig(
        num_channels=channels,
        embedding_size=16,
        hidden_sizes=[24, 48, 64, 96],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        downsample_in_first_stage=True,
    )
    return ResNetModel(config).to(memory_format=torch.channels_last)


def shape_individual(index: int, seed: int) -> Instance:
    """One of the individuals that `shape` learns from; sixteen shapes in turn."""
    return mixed_instance(index % len(KINDS), generator(seed, "judge mixed", index))


def look_individual(index: int, seed: int) -> Instance:
    """One of the individuals that `look` learns from: first of the kinds of the world, in turn, then families of no kind."""
    if index < OF_KINDS:
        return instance(seed, "judge", index % len(KINDS), index // len(KINDS))
    random = generator(seed, "judge family member", index)
    coloured = mixed_instance(0, generator(seed, "judge family", (index - OF_KINDS) // FAMILY))
    return replace(mixed_instance(int(random.integers(len(KINDS))), random), first=coloured.first, second=coloured.second)


def all_tiles(judge: str, seed: int) -> tuple[Tiles, Edges]:
    """The tiles of all individuals of a judge, and the edges of their boxes (x_min, x_max, y_min, y_max, fractions)."""
    count, each = INDIVIDUALS[judge], TILES_OF_EACH[judge]
    individual = partial(shape_individual if judge == "shape" else look_individual, seed=seed)
    tiles = torch.empty(count, each, 3, TILE_PX, TILE_PX, dtype=torch.uint8)
    edges = np.empty((count, each, 4), np.float32)
    for index in trange(count, desc="tiles", mininterval=10):
        for number in range(each):
            random = generator(seed, "judge tile", judge, index, number)
            neighbour = individual(int(random.integers(count)))
            tile, box = render_tile(individual(index), neighbour, random, TILE_PX)
            tiles[index, number] = torch.from_numpy(tile).permute(2, 0, 1)
            edges[index, number] = box.x_min, box.x_max, box.y_min, box.y_max
    return tiles, edges


def luminance(tiles: Tiles) -> Tiles:
    """What the judge of shapes sees of tiles, rounded; one channel."""
    shares = torch.tensor(GREY) / torch.tensor(STD)
    shares = (shares / shares.sum())[:, None, None]
    return torch.stack([((each.float() * shares).sum(1, keepdim=True) + 0.5).to(torch.uint8) for each in tiles])


def normalised(crops: Float[Tensor, "n channels side side"]) -> Float[Tensor, "n channels side side"]:
    """Crops in 0..1 as ImageNet's mean and deviation have them; of a single channel the sum of these, each by its share."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    if crops.shape[1] == 3:
        return (crops - mean[:, None, None]) / std[:, None, None]
    shares = torch.tensor(GREY) / std
    return crops * shares.sum() - (shares * mean).sum()


def regions(
    tiles: UInt8[Tensor, "n channels 128 128"], edges: Float32[np.ndarray, "n 4"], random: np.random.Generator
) -> Float[Tensor, "n channels 112 112"]:
    """Crops (0..1) as masks and references cut them: upright, the object whole, with 45 to 108 % of each side."""
    centres = edges.reshape(-1, 2, 2).sum(2) - 1
    halves = edges[:, 1::2] - edges[:, ::2]
    squeeze = np.exp(random.uniform(-0.2, 0.2, halves.shape))
    reach = halves / np.clip(random.uniform(0.5, 1.05, (len(edges), 1)) * squeeze, 0.45, 1.08)
    centres = centres + random.uniform(-1, 1, halves.shape) * np.maximum(reach - halves, 0.03 * halves)
    windows = np.concatenate([reach[:, :, None] * np.eye(2), centres[:, :, None]], 2)
    return looks(tiles, np.float32(windows), random, CROP_PX, MOST_BLUR)


def features(network: ResNetModel, crops: Float[Tensor, "n channels 112 112"]) -> Float[Tensor, "n width"]:
    """Of crops in 0..1."""
    enlarged = F.interpolate(normalised(crops), (SEEN_PX, SEEN_PX), mode="bilinear", align_corners=False)
    with torch.autocast("cpu", torch.bfloat16):
        seen = network(enlarged.contiguous(memory_format=torch.channels_last)).pooler_output
    return seen.flatten(1).float()


def shape_loss(
    network: ResNetModel, shapes: Float[Tensor, "16 width"], tiles: Tiles, edges: Edges, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the cosines between features and a direction for each shape; and the share that is right."""
    chosen = random.choice(len(tiles), CROPS_A_STEP, replace=False)
    shown = random.integers(tiles.shape[1], size=CROPS_A_STEP)
    seen = features(network, regions(tiles[chosen, shown], edges[chosen, shown], random))
    cosines = F.normalize(seen, dim=1) @ F.normalize(shapes, dim=1).T
    truth = torch.from_numpy(chosen % len(KINDS))
    loss = F.cross_entropy(cosines / TEMPERATURE, truth, label_smoothing=SMOOTHING)
    return loss, (cosines.argmax(1) == truth).float().mean()


@torch.no_grad()
def mean_features(network: ResNetModel, tiles: Tiles, edges: Edges, random: np.random.Generator) -> Float[Tensor, "16 width"]:
    """The direction of each shape in a network that knows them: the mean of its features."""
    network.eval()
    means = []
    for shape in range(len(KINDS)):
        chosen = np.arange(shape, len(tiles), len(KINDS))[:64]
        seen = features(network, regions(tiles[chosen, 0], edges[chosen, 0], random))
        means.append(F.normalize(F.normalize(seen, dim=1).mean(0), dim=0))
    network.train()
    return torch.stack(means)


def look_loss(network: ResNetModel, tiles: Tiles, edges: Edges, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """InfoNCE between two looks at each individual of a batch, of which half are whole families; and the share that is right."""
    half = CROPS_A_STEP // 2
    families = random.choice((len(tiles) - OF_KINDS) // FAMILY, half // FAMILY, replace=False)
    members = OF_KINDS + families[:, None] * FAMILY + np.arange(FAMILY)
    chosen = np.concatenate([random.choice(OF_KINDS, half, replace=False), members.ravel()])
    shown = np.stack([random.choice(tiles.shape[1], 2, replace=False) for _ in chosen], 1)
    crops = torch.cat([regions(tiles[chosen, number], edges[chosen, number], random) for number in shown])
    return pair_loss(*features(network, crops).chunk(2))


def finished_judge(network: ResNetModel) -> ResNetModel:
    """The same network for three channels: what sees luminance alone sees each channel by its share in `GREY`."""
    finished = ResNetModel(ResNetConfig.from_dict(network.config.to_dict() | {"num_channels": 3})).eval()
    state = network.state_dict()
    if network.config.num_channels == 1:
        state[STEM] = significant(state[STEM], KERNEL_BITS) * torch.tensor(GREY)[:, None, None]
    finished.load_state_dict(state)
    return finished


@torch.no_grad()
def go_on_from(network: ResNetModel, finished: ResNetModel) -> None:
    """Give a network in training what a finished one has learnt: the inverse of `finished_judge`, but for its rounding."""
    state = finished.state_dict()
    if network.config.num_channels == 1:
        state[STEM] = state[STEM][:, 1:2]  # Green's share is 1.
    network.load_state_dict(state)


def significant(values: Tensor, bits: int) -> Tensor:
    """The values rounded to so many significant bits, and to whole multiples of 2^-20, of which half precision has sixteenths."""
    exponents = torch.frexp(values).exponent
    grain = torch.ldexp(torch.ones_like(values), (exponents - bits).clamp(min=-20))
    return (values / grain).round() * grain


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judge", choices=JUDGES)
    parser.add_argument("--out", type=Path, required=True, help="folder to write config and weights to")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, default=Path("tiny_world/weights/vae"), help="weights of the tiny autoencoder")
    parser.add_argument("--from-step", type=int, default=0, help="go on with the judge in --out, which has done so many steps")
    settings = parser.parse_args()
    train_judge(settings.judge, settings.out, settings.steps, settings.seed, settings.vae, settings.from_step)


if __name__ == "__main__":
    main()
