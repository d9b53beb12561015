"""What a ladder of ablations needs, small: a start with weights, a judge, and a set of pairs."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from transformers import Dinov2Config, Dinov2Model

from pbe_core.vae import load_vae
from tests.pbe_train.pair_worlds import box, picture, save, write_csv
from tests.pbe_train.published import Published, make_published, write_stable_diffusion
from tests.pbe_train.small_world import SIZE, World

PAIRS = 12
LABELS = 8


@dataclass(frozen=True)
class LadderWorld:
    """The small world with a start, a judge and pairs."""

    world: World
    start: Path
    judge: Path
    pairs: Path

    def options(self, out: Path, *more: str) -> list[str]:
        """Of `pbe_train.ablations`."""
        given = ["--config", str(self.world.config), "--model.pretrained", str(self.start), "--out", str(out)]
        given += ["--pairs", str(self.pairs), "--judge", f"eye:dinov2={self.judge}", "--sampling-steps", "2", "--threads", "2"]
        return [*given, *more]


def make_start(world: World, folder: Path, seed: int = 0) -> Path:
    """A text-to-image model of the sizes of the small world's U-Net, with its VAE."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=32,
    )
    parts: Published = replace(make_published(), unet=unet, vae=load_vae(str(world.vae)).network)
    return write_stable_diffusion(folder, parts)


def make_judge(folder: Path) -> Path:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1}
    Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14)).save_pretrained(folder)
    return folder


def make_pairs(folder: Path) -> Path:
    """A table of pairs; the truth is the photo, and some labels have two pairs."""
    rows = []
    for number in range(PAIRS):
        files = (
            save(folder / "p" / f"{number}.png", picture(number, SIZE, SIZE)),
            save(folder / "m" / f"{number}.png", box(number, SIZE, SIZE)),
            save(folder / "r" / f"{number}.png", np.asarray(picture(number + 1000, 20, 24))),
        )
        rows.append([*(str(path.relative_to(folder)) for path in files), f"{number:03d}", f"kind {number % LABELS}"])
    return write_csv(folder / "pairs.csv", "photo,mask,reference,id,label", rows)


def make_ladder_world(world: World, folder: Path) -> LadderWorld:
    return LadderWorld(world, make_start(world, folder / "start"), make_judge(folder / "judge"), make_pairs(folder / "pairs"))
