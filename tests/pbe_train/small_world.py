"""A small dataset and small random networks, made directly through schemas/: tests need neither pipelines nor weights."""

import itertools
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from diffusers import AutoencoderKL
from pycocotools import mask as coco_mask
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe_core.autoencoder import Autoencoder
from pbe_core.files import TarWriter
from pbe_core.sample_codec import Sample, encode_sample, jpeg_bytes
from pbe_core.settings import load_settings
from pbe_core.vae import identify_vae
from pbe_train.config import TrainSettings
from schemas.dataset import Books, DatasetInfo, SplitCounts
from schemas.sample import SampleRecord
from schemas.tables import INDEX

SIZE = 32
MASKS = 2
SCALE = 0.5
LABELS = [f"/m/{number:02d}" for number in range(10)]


@dataclass(frozen=True)
class World:
    """Where the fixture's parts lie."""

    dataset: Path
    vae: Path
    encoder: Path
    config: Path

    def settings(self, out: Path, *options: str) -> TrainSettings:
        """The fixture's settings with some overridden, as on a command line."""
        return load_settings(TrainSettings, "train", ["--config", str(self.config), f"--out={out}", *options])


def make_vae(folder: Path, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=SCALE,
    )
    vae.save_pretrained(folder)
    return vae.eval()


def reference_outline(number: int) -> np.ndarray | None:
    """Which pixels of the reference are sample `number`'s object; of every third one that is not known."""
    return None if number % 3 == 0 else np.tri(20, k=number % 5, dtype=bool)


def outline_counts(number: int) -> str | None:
    outline = reference_outline(number)
    return None if outline is None else coco_mask.encode(np.asfortranarray(outline, np.uint8))["counts"].decode()


def make_sample(vae: Autoencoder, split: str, number: int) -> Sample:
    random = np.random.default_rng([number, len(split)])
    view = np.repeat(np.repeat(random.integers(0, 256, (4, 4, 3), np.uint8), 8, 0), 8, 1)
    masks = np.zeros((MASKS, SIZE, SIZE), bool)
    for mask in masks:
        left, top = random.integers(0, 12, 2)
        mask[top : top + 16, left : left + 18] = True
    pixels = torch.from_numpy(view).permute(2, 0, 1).float() / 127.5 - 1
    views = torch.stack([pixels, *(torch.where(torch.from_numpy(mask), torch.zeros(()), pixels) for mask in masks)])
    with torch.no_grad():
        latents = vae.encode(views).stacked().numpy().astype(np.float16)
    key = f"{split}{number:04d}-abc_0"
    record = SampleRecord(
        key=key,
        object_id=key[:-2],
        split=split,
        photo_id=f"{split}{number:04d}",
        file_name=None,
        rotation=0,
        photo_size=(SIZE, SIZE),
        photo_sha256="0" * 64,
        label=LABELS[number % len(LABELS)],
        label_name=f"kind {number % len(LABELS)}",
        box=(8, 8, 24, 24),
        window=(0, 0, SIZE),
        box_in_view=(8, 8, 24, 24),
        padded=False,
        mask_kinds=("box",) * MASKS,
        mask_polygons=(((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)),) * MASKS,
        reference_window=(6, 6, 26, 26),
        reference_mask=outline_counts(number),
        url=None,
        author=None,
        licence=None,
        seed=0,
    )
    kept = jpeg_bytes(view, 95) if split == "validation" else None
    return Sample(record, latents[0], latents[1:], masks, jpeg_bytes(view[6:26, 6:26], 95), kept)


def make_dataset(folder: Path, network: AutoencoderKL, vae_source: str, splits: dict[str, list[int]]) -> None:
    """Write a dataset; `splits` says how many samples each shard of a split has."""
    vae = Autoencoder(network)
    (folder / "shards").mkdir(parents=True)
    counts = {}
    with pq.ParquetWriter(folder / "index.parquet", INDEX) as index:
        for split, sizes in splits.items():
            samples = iter([make_sample(vae, split, number) for number in range(sum(sizes))])
            names = [f"{split}-{number:06d}" for number in range(len(sizes))]
            for name, size in zip(names, sizes, strict=True):
                rows = write_shard(folder, name, itertools.islice(samples, size))
                index.write_table(pa.Table.from_pylist(rows, INDEX))
            counts[split] = SplitCounts(shards=names, samples=sum(sizes), bytes=0)
    total = sum(count.samples for count in counts.values())
    identity = identify_vae(vae, vae_source)
    info = DatasetInfo(
        fingerprint="fixture",
        view_size=SIZE,
        masks_per_view=MASKS,
        vae=identity,
        splits=counts,
        books=Books(
            boxes=total,
            objects=total,
            rejects={},
            planned=total,
            samples=total,
            failures={},
            masks={"box": total * MASKS},
            padded_views=0,
        ),
        settings={},
    )
    (folder / "dataset.json").write_text(info.model_dump_json())


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> list[dict[str, object]]:
    """Write a shard; its rows of the index."""
    rows = []
    with (folder / "shards" / f"{name}.tar").open("wb") as file:
        tar = TarWriter(file)
        for position, sample in enumerate(samples):
            record = sample.record
            row = {"key": record.key, "split": record.split, "shard": name, "position": position, "object_id": record.object_id}
            row |= {"label": record.label, "label_name": record.label, "view_jpg": None}
            for member, data in encode_sample(sample).items():
                place = {"offset": tar.add(f"{record.key}.{member}", data), "length": len(data), "crc32": zlib.crc32(data)}
                row[member.replace(".", "_")] = place
            rows.append(row)
        tar.close()
    return rows


def make_world(folder: Path) -> World:
    """Dataset, networks and a config file in a folder."""
    vae = make_vae(folder / "vae", 0)
    torch.manual_seed(1)
    encoder = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(encoder).save_pretrained(folder / "encoder")
    make_dataset(folder / "dataset", vae, "vae", {"train": [5, 8, 6, 5], "validation": [12]})
    settings = {
        "dataset": str(folder / "dataset"),
        "steps": 6,
        "global_batch": 4,
        "model": {
            "vae": str(folder / "vae"),
            "encoder": str(folder / "encoder"),
            "conditioner_blocks": 1,
            "unet": {
                "block_out_channels": [16, 32],
                "attention": [False, True],
                "layers_per_block": 1,
                "attention_heads": 2,
                "norm_groups": 8,
                "cross_attention_dim": 32,
            },
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4},
        "loader": {"workers": 0, "window": 2},
        "threads": 1,
        "log_every": 2,
        "pictures": {"every": 0},
        "ema_decay": 0.99,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": settings}))
    return World(folder / "dataset", folder / "vae", folder / "encoder", folder / "config.yaml")
