"""Train the tiny autoencoder (f = 8, 4 latent channels) on square views of the tiny world, whole and with a grey hole.

    photos --cut--> views [n, 3, 128, 128] --hole in a third--> VAE --> views again
    loss = L1 + squared error + L1 of differences between neighbours + KL_WEIGHT x KL(posterior || N(0, 1))

It is trained on 64 px pieces of views first and on whole views last: group normalisation looks at the whole picture, so
the last word must be spoken at the size of use. The mid-block has no attention, so that any size costs in proportion to
its pixels.

Usage:  python -m tiny_world.train_vae --out tiny_world/weights/vae
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import trange

from tiny_world.kinds import generator
from tiny_world.make_photos import jpeg
from tiny_world.scenes import plan_scene, render_scene

VIEW_PX = 128
PIECE_PX = 64
PIECES_A_STEP = 16
WHOLE_VIEWS_A_STEP = 5
WHOLE_VIEWS_SHARE = 0.3
HOLE_SHARE = 1 / 3
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 100
KL_WEIGHT = 2e-4
SAVE_EVERY_STEPS = 500

Photo = UInt8[np.ndarray, "height width 3"]
Views = Float[Tensor, "n 3 side side"]


def stored_photo(index: int, seed: int, split: str) -> Photo:
    """Photo `index` of a split (RGB, 0-255) as a reader of the written world sees it, with the marks of JPEG."""
    data = jpeg(render_scene(plan_scene(seed, split, index))[0])
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def stored_photos(seed: int, split: str, count: int, processes: int = 2) -> list[Photo]:
    """The first `count` photos of a split."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(partial(stored_photo, seed=seed, split=split), range(count), chunksize=16))


def random_view(photo: Photo, random: np.random.Generator) -> UInt8[np.ndarray, "128 128 3"]:
    """A square of the photo, from its short side down to 45 % of it, at the size of use."""
    height, width = photo.shape[:2]
    side = int(random.uniform(0.45, 1) * min(height, width))
    top, left = random.integers(height - side + 1), random.integers(width - side + 1)
    square = photo[top : top + side, left : left + side]
    return cv2.resize(square, (VIEW_PX, VIEW_PX), interpolation=cv2.INTER_AREA if side > VIEW_PX else cv2.INTER_LINEAR)


def random_hole(random: np.random.Generator, side: int = VIEW_PX) -> UInt8[np.ndarray, "side side"]:
    """A region to be painted (1 inside): a rectangle, or a blob whose outline wanders around one."""
    width, height = random.uniform(0.2, 0.8, 2) * side
    x, y = random.uniform(0.2, 0.8, 2) * side
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    if random.uniform() < 0.5:
        outline = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) / 2
    else:
        outline = np.stack([np.cos(angles), np.sin(angles)], 1) * random.uniform(0.4, 0.6, (24, 1))
    corners = (outline * (width, height) + (x, y)).round().astype(np.int32)
    return cv2.fillPoly(np.zeros((side, side), np.uint8), [corners], 1)


def to_tensor(squares: list[UInt8[np.ndarray, "side side 3"]]) -> Views:
    """RGB 0-255 -> [-1, 1], channels first."""
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1


def cut_views(photos: list[Photo], random: np.random.Generator, count: int, hole_share: float) -> Views:
    """Views in [-1, 1] of photos drawn at random; in a share of them a region is 0, mid grey."""
    views = to_tensor([random_view(photos[random.integers(len(photos))], random) for _ in range(count)])
    holes = np.stack([random_hole(random) * (random.uniform() < hole_share) for _ in range(count)])
    return views * (1 - torch.from_numpy(holes)[:, None].float())


def pieces(views: Views, random: np.random.Generator) -> Float[Tensor, "n 3 piece piece"]:
    """One square piece of each view, on the grid of latent cells."""
    corners = 8 * random.integers(0, (VIEW_PX - PIECE_PX) // 8 + 1, (len(views), 2))
    return torch.stack([view[:, y : y + PIECE_PX, x : x + PIECE_PX] for view, (y, x) in zip(views, corners, strict=True)])


def tiny_vae() -> AutoencoderKL:
    """0.94 M parameters; an encode of a 128 px view costs about 7 ms on one core."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=VIEW_PX,
        mid_block_add_attention=False,
    )


def reconstruction_loss(painted: Views, views: Views) -> Tensor:
    """L1 for sharpness, squared error for PSNR, and L1 of the differences of neighbours for edges."""
    error = painted - views
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def learning_rate(step: int, steps: int, peak: float, first_step: int = 0) -> float:
    """A half cosine from the peak to zero; the first steps of a run, when Adam knows little, rise to it linearly."""
    return peak * min(1, (step - first_step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def level_latents(vae: AutoencoderKL, views: Views) -> None:
    """Give all latent channels mean 0 and the same spread, and set `scaling_factor` so that scaled latents have std 1.

    Exact: the 1x1 convolution after the encoder takes on the change, and that before the decoder its inverse, so
    reconstructions stay as they are. A diffusion model then has no channel that its noise drowns first.
    """
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in views.split(32)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    overall_std = std.square().mean().sqrt()
    gain = overall_std / std
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    # Channels 0-3 of the posterior are means, 4-7 log-variances, which a gain of the latent shifts.
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.bias[4:] += 2 * gain.log()
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1 / overall_std.item(), 5))


def save_vae(vae: AutoencoderKL, out: Path, views: Views) -> None:
    """Write a levelled half-precision copy in the layout of `AutoencoderKL.from_pretrained`."""
    # Not a deep copy: a model that was loaded carries the path it came from into its config.
    finished = tiny_vae().eval()
    finished.load_state_dict(vae.state_dict())
    level_latents(finished, views)
    finished.half().save_pretrained(out)


def train_vae(out: Path, steps: int, photo_count: int, seed: int, first_step: int = 0) -> None:
    """Train from nothing, or from the weights that an interrupted run left in `out`; write usable weights now and then."""
    torch.manual_seed(seed)
    photos = stored_photos(seed, "train", photo_count)
    vae = AutoencoderKL.from_pretrained(out, torch_dtype=torch.float32).train() if first_step else tiny_vae()
    optimizer = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99))
    levelling_views = cut_views(photos, generator(seed, "vae levelling"), 256, HOLE_SHARE)
    progress = trange(first_step, steps, desc="VAE", mininterval=10)
    for step in progress:
        random = generator(seed, "vae step", step)
        if step < (1 - WHOLE_VIEWS_SHARE) * steps:
            views = pieces(cut_views(photos, random, PIECES_A_STEP, HOLE_SHARE), random)
        else:
            views = cut_views(photos, random, WHOLE_VIEWS_A_STEP, HOLE_SHARE)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(views).latent_dist
            painted = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(painted.float(), views)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (loss + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, LEARNING_RATE, first_step)
        optimizer.step()
        if step % 50 == 0:
            psnr_db = -10 * math.log10(F.mse_loss(painted.float(), views).item() / 4)
            progress.set_postfix(loss=f"{loss.item():.4f}", psnr_db=f"{psnr_db:.1f}", kl=f"{kl.item():.2f}")
        if (step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == steps:
            save_vae(vae, out, levelling_views)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write config and weights to")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--from-step", type=int, default=0, help="go on from this step with the weights in --out")
    parser.add_argument("--photos", type=int, default=2000, help="photos of the train split to learn from")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    train_vae(settings.out, settings.steps, settings.photos, settings.seed, settings.from_step)


if __name__ == "__main__":
    main()
