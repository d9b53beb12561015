"""Train the tiny vision encoder: its class token says what object it sees, and nothing of pose, light, scale or background.

No label is used. Each step shows two tiles of each of many instances (another pose, light and ground each time), cut loosely or
closely around the object, and asks that the two class tokens of one instance find each other among all (InfoNCE):

    tile a --window, flip, turn, light, blur--> [n, 3, 64, 64] --encoder--> class token --+
                                                                                          +--> cosine --> cross-entropy
    tile b ------------------- the same, drawn anew ----------------------> class token --+

Half of the tiles went through the tiny autoencoder at a small size (so train that first): the encoder must also know an object
in a picture that a diffusion model painted, and small objects come out of latents soft and a little changed.

There is no projection head: the class token (`pooler_output`) itself carries the similarity. Hues are never turned, since
colour is a part of what an object is.

Usage:  python -m tiny_world.train_encoder --out tiny_world/weights/encoder
"""

import argparse
import copy
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from tqdm import tqdm, trange
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tiny_world.kinds import KINDS, generator, instance
from tiny_world.scenes import render_tile
from tiny_world.train_vae import learning_rate

CROP_PX = 64
TILE_PX = 128
# More individuals than the photos show: held-out ones are then recognised by what they are, not by the company they keep.
INSTANCES_PER_KIND = 64
TILES_PER_INSTANCE = 8
PAIRS_A_STEP = 64
TEMPERATURE = 0.1
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
SAVE_EVERY_STEPS = 250

Crops = Float[Tensor, "n 3 64 64"]
Tiles = UInt8[np.ndarray, "tiles 3 128 128"]
BoxEdges = Float32[np.ndarray, "4"]


def tiny_encoder() -> CLIPVisionModel:
    """0.83 M parameters; 64 patch tokens and a class token, 128 wide."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            image_size=CROP_PX,
            patch_size=8,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            projection_dim=128,
        )
    )


def normalised(crops: Crops) -> Crops:
    """RGB in 0..1 -> CLIP's zero mean and unit deviation."""
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    return (crops - mean[:, None, None]) / std[:, None, None]


def tiles_of_instance(index: int, seed: int) -> tuple[Tiles, Float32[np.ndarray, "tiles 4"]]:
    """All tiles of one individual, with the edges of its box (x_min, x_max, y_min, y_max as fractions of the tile)."""
    kind, number = divmod(index, INSTANCES_PER_KIND)
    who = instance(seed, "train", kind, number)
    tiles, edges = [], []
    for tile_number in range(TILES_PER_INSTANCE):
        random = generator(seed, "tile", kind, number, tile_number)
        neighbour = instance(seed, "train", int(random.integers(len(KINDS))), int(random.integers(INSTANCES_PER_KIND)))
        tile, box = render_tile(who, neighbour, random, TILE_PX)
        tiles.append(tile.transpose(2, 0, 1))
        edges.append((box.x_min, box.x_max, box.y_min, box.y_max))
    return np.stack(tiles), np.float32(edges)


def all_tiles(
    seed: int, processes: int = 2
) -> tuple[UInt8[Tensor, "instances tiles 3 128 128"], Float32[np.ndarray, "instances tiles 4"]]:
    """The tiles of all individuals, and the edges of their boxes."""
    count = len(KINDS) * INSTANCES_PER_KIND
    with ProcessPoolExecutor(processes) as pool:
        painted = pool.map(partial(tiles_of_instance, seed=seed), range(count), chunksize=16)
        tiles, edges = zip(*tqdm(painted, "tiles", count, unit="instance"), strict=True)
    return torch.from_numpy(np.stack(tiles)), np.stack(edges)


@torch.no_grad()
def repaint(tiles: UInt8[Tensor, "n 3 128 128"], vae: AutoencoderKL, side: int) -> UInt8[Tensor, "n 3 128 128"]:
    """The tiles as they come out of the autoencoder when they are shrunk to `side` pixels first."""
    views = F.interpolate(tiles.float() / 127.5 - 1, (side, side), mode="bilinear", antialias=True)
    painted = vae.decode(vae.encode(views).latent_dist.mean).sample.clamp(-1, 1)
    painted = F.interpolate(painted, tiles.shape[-2:], mode="bilinear", align_corners=False)
    return ((painted + 1) * 127.5 + 0.5).to(torch.uint8)


def repaint_half(tiles: UInt8[Tensor, "instances tiles 3 128 128"], vae: AutoencoderKL) -> None:
    """Replace (in place) every fourth tile by what the autoencoder makes of it at 64 px, and every fourth at 96 px."""
    for first, side in ((1, 64), (3, 96)):
        for some in tqdm(tiles.split(16), f"repainting at {side} px", unit="instances", unit_scale=16):
            some[:, first::4] = repaint(some[:, first::4].flatten(0, 1), vae, side).unflatten(0, (len(some), -1))


def random_window(edges: BoxEdges, random: np.random.Generator) -> Float32[np.ndarray, "2 3"]:
    """An affine map from the crop's square [-1, 1]^2 to the tile's: a window in which the object takes 40-105 % of each side.

    The object stays (almost) inside whatever its place in the window; half of the windows are mirrored, all are slightly turned.
    """
    centre = edges.reshape(2, 2).sum(1) - 1
    half = edges.reshape(2, 2)[:, 1] - edges.reshape(2, 2)[:, 0]
    share = np.clip(random.uniform(0.4, 1.05) * np.exp(random.uniform(-0.15, 0.15, 2)), 0.4, 1.05)
    half_window = half / share
    centre = centre + random.uniform(-1, 1, 2) * np.maximum(half_window - half, 0.05 * half)
    angle = random.uniform(-0.35, 0.35) * (random.uniform() < 0.5)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = np.array([random.choice([-1, 1]), 1])
    return np.float32(np.concatenate([turn * (half_window * mirror), centre[:, None]], 1))


def coarse(crops: Float[Tensor, "n channels side side"], cell_px: int) -> Float[Tensor, "n channels side side"]:
    """The crops with no more detail than one value for each square of `cell_px` pixels."""
    return F.interpolate(F.avg_pool2d(crops, cell_px), crops.shape[-2:], mode="bilinear", align_corners=False)


def augmented(tiles: UInt8[Tensor, "n 3 128 128"], edges: Float32[np.ndarray, "n 4"], random: np.random.Generator) -> Crops:
    """One random look (RGB, 0..1) at each tile: window, brightness, contrast, and blur as of an enlarged or painted picture."""
    return looks(tiles, np.stack([random_window(each, random) for each in edges]), random)


def looks(
    tiles: UInt8[Tensor, "n channels 128 128"],
    windows: Float32[np.ndarray, "n 2 3"],
    random: np.random.Generator,
    side: int = CROP_PX,
    most_blur: float = 2,
) -> Float[Tensor, "n channels side side"]:
    """What is seen of each tile (0..1) through its window, in crops of `side` px; a blur of 1 leaves detail of 28 px, 2 of 16."""
    grid = F.affine_grid(torch.from_numpy(windows), [len(tiles), 1, side, side], align_corners=False)
    crops = F.grid_sample(tiles.float() / 255, grid, padding_mode="reflection", align_corners=False)
    # Small objects leave the autoencoder with the detail of 16 x 16 pixels, so a third of the looks has hardly more.
    blur = torch.from_numpy(random.uniform(-1, most_blur, (len(tiles), 1, 1, 1))).float()
    crops = crops + blur.clamp(0, 1) * (coarse(crops, side // 28) - crops)
    crops = crops + (blur - 1).clamp(0, 1) * (coarse(crops, side // 16) - crops)
    contrast, brightness = torch.from_numpy(random.uniform(0.8, 1.2, (2, len(tiles), 1, 1, 1))).float()
    return (((crops - 0.5) * contrast + 0.5) * brightness).clamp(0, 1)


def pair_loss(first: Float[Tensor, "n width"], second: Float[Tensor, "n width"]) -> tuple[Tensor, Tensor]:
    """InfoNCE in both directions, and the share of class tokens that found their partner."""
    similarity = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / TEMPERATURE
    partner = torch.arange(len(first))
    loss = (F.cross_entropy(similarity, partner) + F.cross_entropy(similarity.T, partner)) / 2
    return loss, (similarity.argmax(1) == partner).float().mean()


def save_encoder(encoder: CLIPVisionModel, out: Path) -> None:
    """Write a half-precision copy in the layout of `CLIPVisionModel.from_pretrained`."""
    copy.deepcopy(encoder).half().save_pretrained(out)


def train_encoder(out: Path, steps: int, seed: int, vae_folder: Path) -> None:
    """Train from nothing, writing usable weights every few hundred steps."""
    torch.manual_seed(seed)
    tiles, edges = all_tiles(seed)
    repaint_half(tiles, AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32).eval())
    encoder = tiny_encoder().train()
    # On a CPU in bfloat16 the plain products of 65 tokens are twice as fast as the fused kernel.
    encoder.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=WEIGHT_DECAY)
    progress = trange(steps, desc="encoder", mininterval=10)
    for step in progress:
        random = generator(seed, "encoder step", step)
        chosen = random.choice(len(tiles), PAIRS_A_STEP, replace=False)
        shown = np.stack([random.choice(TILES_PER_INSTANCE, 2, replace=False) for _ in chosen], 1)
        looks = torch.cat([augmented(tiles[chosen, number], edges[chosen, number], random) for number in shown])
        with torch.autocast("cpu", torch.bfloat16):
            tokens = encoder(normalised(looks)).pooler_output
        loss, found = pair_loss(*tokens.float().chunk(2))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, LEARNING_RATE)
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", found=f"{found.item():.2f}")
        if (step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == steps:
            save_encoder(encoder, out)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write config and weights to")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, default=Path("tiny_world/weights/vae"), help="weights of the tiny autoencoder")
    settings = parser.parse_args()
    train_encoder(settings.out, settings.steps, settings.seed, settings.vae)


if __name__ == "__main__":
    main()
