"""What a plan will cost, from the tables alone, and afterwards what came of it.

    objects, settings ──▶ samples, shards, bytes on disk, bytes to download, pictures to encode ──rates──▶ hours by device

Arrays are counted exactly. What depends on pictures is estimated from `sample_sizes.json`, the encoder's time from
`encoder_rates.json`, both in the folder `rates`: programs in benchmarks/ measure them and write them anew.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pipelines.config import BuildSettings
from pipelines.dataset.plan_shards import planned_shards
from pipelines.photo_folder import check_photos
from pipelines.photo_list import photo_keys
from pipelines.photo_store import is_store
from pipelines.selection.objects import Selection

ESTIMATE_RECORD = "estimate.json"
RATES = Path(__file__).parent / "rates"
# Published copies of Open Images have a long side of 1024 px; 4:3 is what cameras make most.
UNKNOWN_PHOTO_SIZE = (1024, 768)
# All boxable photos of Open Images as published at 1024 px: the card of https://huggingface.co/datasets/vikhyatk/openimages-bbox
OPEN_IMAGES_BYTES_PER_PHOTO = 597_325_671_307 / 1_892_542
_STABLE_DIFFUSION = "stable-diffusion-v1"  # As the table of rates calls it.
_TAR_BLOCK = 512
_NPY_HEADER = 128


@dataclass(frozen=True)
class EncoderTime:
    """How long one device takes to encode a plan's pictures."""

    device: str
    precision: str
    hours: float
    pictures_per_second: float
    kind: str
    """`measured`, or `computed` from the device's peak arithmetic."""


@dataclass(frozen=True)
class Estimate:
    """What a plan says. Sizes in bytes."""

    photos: int
    """To fetch and decode: those with objects."""
    objects: int
    samples: int
    """At most: photos that cannot be used cost their samples."""
    shards: int
    bytes_on_disk: int
    bytes_per_sample: dict[str, float]
    """By member, with headers and padding."""
    photos_to_fetch: int
    """Of these, those that are not in the photo folder or store yet, nor in folders or tars that they would come from."""
    download: int | None
    """Published copies of the photos to fetch, where their size is known; null where nothing is downloaded."""
    download_originals: int | None
    """The originals, as far as the metadata give their sizes (`photos_of_known_size` of the photos), where all are to fetch."""
    photos_of_known_size: int
    pictures: int
    """To encode: a view and K masked views for each sample."""
    latent: tuple[int, int]
    """Channels and downsampling assumed of the VAE."""
    encoder: list[EncoderTime]


def estimate(settings: BuildSettings, selection: Selection) -> Estimate:
    """Estimate what a folder's plan will cost. Reads objects.parquet and the plan's footer, no photo and no weights."""
    shards = planned_shards(settings.out / "plan.parquet")
    samples = sum(shards.values())
    kept = sum(count for shard, count in shards.items() if shard.rpartition("-")[0] in settings.views.keep)
    channels, downsampling, vae = latent_layout(settings.latents.vae)
    if settings.views.size % downsampling:
        raise InputError(f"views.size {settings.views.size} is no multiple of the VAE's downsampling, {downsampling}")
    members = member_sizes(settings, channels, downsampling, _reference_pixels(settings))
    view = members.pop("view.jpg")
    total = samples * sum(members.values()) + kept * view + len(shards) * 2 * _TAR_BLOCK
    members["view.jpg"] = view
    pictures = samples * (1 + settings.masks.per_view)
    to_fetch = photos_to_fetch(settings, selection.photos_with_objects)
    return Estimate(
        photos=selection.photos_with_objects,
        objects=selection.objects,
        samples=samples,
        shards=len(shards),
        bytes_on_disk=round(total),
        bytes_per_sample=members,
        photos_to_fetch=to_fetch,
        download=round(to_fetch * OPEN_IMAGES_BYTES_PER_PHOTO) or None if settings.source.kind == "open_images" else None,
        download_originals=selection.original_bytes or None if to_fetch == selection.photos_with_objects else None,
        photos_of_known_size=selection.photos_of_known_size,
        pictures=pictures,
        latent=(channels, downsampling),
        encoder=encoder_times(pictures, vae, settings.latents.precision, settings.views.size),
    )


def photos_to_fetch(settings: BuildSettings, photos: int) -> int:
    """How many of a plan's photos a network has still to bring.

    Args:
        settings: of the build; its objects.parquet is read where a photo store has a part of the photos.
        photos: with objects.
    """
    source, sources = settings.source, settings.crawl.sources
    if source.photos_url or (sources and not any("://" in text or text in ("{url}", "{thumbnail_url}") for text in sources)):
        return 0
    status = source.photos / "status.parquet"
    if is_store(source.photos) and status.is_file():
        known = np.sort(pq.read_table(status, columns=["key"])["key"].to_numpy())
        objects = pq.ParquetFile(settings.out / "objects.parquet")
        parts = (objects.read_row_group(group, ["split", "photo_id"]) for group in range(objects.num_row_groups))
        # Rows of a photo stand together, in one row group or in two.
        keys = np.unique(np.concatenate([np.unique(photo_keys(part)) for part in parts]))
        return int((~np.isin(keys, known)).sum())
    if sources:
        return photos
    try:
        check_photos(settings)
    except InputError:  # They are not here yet: whoever fetches them is told how much that is.
        return photos
    return 0


def member_sizes(settings: BuildSettings, channels: int, downsampling: int, reference_pixels: float) -> dict[str, float]:
    """Mean bytes that each member of a sample takes in a tar, with its header and padding.

    Args:
        settings: of the build.
        channels: of a latent.
        downsampling: view px per latent cell.
        reference_pixels: mean px of a reference.
    """
    rates = _read_rates(RATES / "sample_sizes.json", "benchmarks.sample_sizes")
    size, masks = settings.views.size, settings.masks.per_view
    latent = 2 * channels * (size // downsampling) ** 2 * np.dtype(np.float16).itemsize
    contents = {
        "json": rates["json_bytes"] + masks * rates["json_bytes_per_mask"],
        "latent.npy": _NPY_HEADER + latent,
        "mask.png": masks * size * rates["mask_bytes_per_view_side"],
        "masked.npy": _NPY_HEADER + masks * latent,
        "ref.jpg": reference_pixels * rates["reference_bytes_per_pixel"],
        "view.jpg": size * size * rates["view_bytes_per_pixel"],
    }
    # Half a block is the mean of what padding adds to a length that may be anything.
    exact = {"latent.npy", "masked.npy"}
    return {
        name: _TAR_BLOCK + (-(-content // _TAR_BLOCK) * _TAR_BLOCK if name in exact else content + _TAR_BLOCK / 2)
        for name, content in contents.items()
    }


def latent_layout(vae: str) -> tuple[int, int, str]:
    """Channels, downsampling and name of a VAE, from its config if it lies here; else those of Stable Diffusion 1."""
    for folder in (Path(vae), REPOSITORY / vae):
        for path in (folder / "config.json", folder / "vae" / "config.json"):
            if path.is_file():
                try:
                    config = json.loads(path.read_bytes())
                    widths = config["block_out_channels"]
                    name = _STABLE_DIFFUSION if widths == [128, 256, 512, 512] else vae
                    return config["latent_channels"], 2 ** (len(widths) - 1), name
                except (ValueError, KeyError, TypeError):
                    raise InputError(
                        f"{path}: not the config of an AutoencoderKL; get the file again, or set latents.vae"
                    ) from None
    return 4, 8, _STABLE_DIFFUSION


def encoder_times(pictures: int, vae: str, precision: str, size: int) -> list[EncoderTime]:
    """Hours to encode so many pictures, for each device in the table of rates, fastest first.

    Rates of the same VAE at another size are scaled by the number of px: the encoder is nearly all convolutions.
    """
    table = _read_rates(RATES / "encoder_rates.json", "benchmarks.encoder_rate")
    best: dict[tuple[str, str], EncoderTime] = {}
    for row in sorted(table["rows"], key=lambda row: abs(row["size_px"] - size), reverse=True):
        known = Path(row["vae"]).name == Path(vae).name and Path(row["vae"]).parent.name == Path(vae).parent.name
        if not known or row["precision"] != precision:
            continue
        rate = row["pictures_per_second"] * (row["size_px"] / size) ** 2
        # The nearest size comes last and stays.
        best[row["device"], row["kind"]] = EncoderTime(row["device"], precision, pictures / rate / 3600, rate, row["kind"])
    measured = {device for device, kind in best if kind == "measured"}
    times = [time for (device, kind), time in best.items() if kind == "measured" or device not in measured]
    return sorted(times, key=lambda time: time.hours)


def as_json(said: Estimate) -> bytes:
    """An estimate as JSON."""
    return json.dumps(asdict(said), indent=1).encode()


def _reference_pixels(settings: BuildSettings) -> float:
    """Mean px of the references, from boxes and photo sizes; `UNKNOWN_PHOTO_SIZE` where the tables do not say."""
    if settings.references.resize == "published":
        return settings.references.side**2
    total, count = 0.0, 0
    columns = ["x_min", "x_max", "y_min", "y_max", "width", "height"]
    for batch in pq.ParquetFile(settings.out / "objects.parquet").iter_batches(columns=columns):
        photo = [
            batch.column(name).fill_null(unknown).to_numpy(zero_copy_only=False)
            for name, unknown in zip(("width", "height"), UNKNOWN_PHOTO_SIZE, strict=True)
        ]
        sides = [
            np.minimum(
                (batch.column(f"{axis}_max").to_numpy() - batch.column(f"{axis}_min").to_numpy()) * length
                + 2 * settings.references.padding,
                length,
            )
            for axis, length in zip("xy", photo, strict=True)
        ]
        # As geometry/references.py does it, for columns.
        scale = np.minimum(1, settings.references.side / np.minimum(*sides))
        scale = np.minimum(scale, settings.references.max_side / np.maximum(*sides))
        total += float((sides[0] * sides[1] * scale**2).sum())
        count += len(batch)
    return total / max(1, count)


def _read_rates(path: Path, program: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such table; make it with `python -m {program}` (see benchmarks/README.md)") from None
    except ValueError:
        raise InputError(f"{path}: not JSON; make it again with `python -m {program}`") from None
    return content
