"""What a plan will cost, from the tables alone; and tables for people: the selection, the estimate, and what the build made.

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
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pbe_core.errors import InputError
from pbe_core.machine import device_name
from pbe_core.settings import REPOSITORY
from pbe_core.words import number_of
from pipelines.config import BuildSettings
from pipelines.dataset.plan_shards import Plan
from pipelines.photos import check_photos, is_store, photo_keys
from pipelines.selection.objects import Selection
from schemas.dataset import DatasetInfo
from schemas.tables import REJECT_REASONS

ESTIMATE_RECORD = "estimate.json"
RATES = Path(__file__).parent / "rates"
# Published copies of Open Images have a long side of 1024 px; 4:3 is what cameras make most.
UNKNOWN_PHOTO_SIZE = (1024, 768)
# All boxable photos of Open Images as published at 1024 px: the card of https://huggingface.co/datasets/vikhyatk/openimages-bbox
OPEN_IMAGES_BYTES_PER_PHOTO = 597_325_671_307 / 1_892_542
_STABLE_DIFFUSION = "stable-diffusion-v1"  # As the table of rates calls it.
_TAR_BLOCK = 512
_NPY_HEADER = 128
_CLASSES = 15
# Below this a packing time is that of starting, and tells nothing about the next one.
_START_UP_SECONDS = 60
_CONSOLE = Console()


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
    """What a plan will cost. Sizes in bytes."""

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
    shards = Plan(settings.out / "plan.parquet").shards
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
        "mask.json": masks * size * rates["mask_bytes_per_view_side"],
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


def as_json(estimated: Estimate) -> bytes:
    """An estimate as JSON."""
    return json.dumps(asdict(estimated), indent=1).encode()


def print_selection(selection: Selection) -> None:
    """Where every box went, the largest classes, and the first malformed rows."""
    table = Table(title="Boxes", title_justify="left")
    table.add_column("outcome")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    table.add_column("meaning")
    table.add_row("read", f"{selection.boxes:,}", "", "")
    table.add_row("accepted: objects", f"{selection.objects:,}", _share(selection.objects, selection.boxes), "")
    for reason, count in selection.rejects.items():
        table.add_row(f"rejected: {reason}", f"{count:,}", _share(count, selection.boxes), REJECT_REASONS[reason])
    table.add_section()
    if selection.photos:
        table.add_row("photos in the tables", f"{selection.photos:,}", "", "")
        table.add_row(
            "without a box", f"{selection.photos_without_boxes:,}", _share(selection.photos_without_boxes, selection.photos), ""
        )
    table.add_row("photos with boxes", f"{selection.photos_with_boxes:,}", "", "")
    table.add_row(
        "photos with objects",
        f"{selection.photos_with_objects:,}",
        _share(selection.photos_with_objects, selection.photos_with_boxes),
        "",
    )
    for how, count in selection.same_photos.items():
        meaning = "of these in another split: a leak, if kept" if how == "across_splits" else f"found by {how}"
        table.add_row("photos under two ids" if how != "across_splits" else "across splits", f"{count:,}", "", meaning)
    _CONSOLE.print(table)
    _print_classes(selection)
    for note in selection.notes:
        _CONSOLE.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    for reason, examples in selection.examples.items():
        for example in examples:
            _CONSOLE.print(f"{reason}: {example}", highlight=False, markup=False, soft_wrap=True)


def print_estimate(plan: Estimate) -> None:
    """What the plan will make and cost."""
    table = Table(title="What the build will make", title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_column("how that is known")
    origin = f"at most: {number_of(plan.objects, 'object')} in {number_of(plan.photos, 'photo')}, as far as these can be used"
    table.add_row("samples", f"{plan.samples:,}", origin)
    table.add_row("shards", f"{plan.shards:,}", "")
    each = plan.bytes_on_disk / max(1, plan.samples) / 1e3
    table.add_row("on disk", _size(plan.bytes_on_disk), f"about {each:,.0f} kB a sample; JPEGs as measured on real photos")
    if plan.download is not None:
        which = f"{number_of(plan.photos_to_fetch, 'photo')} not here yet" if plan.photos_to_fetch < plan.photos else ""
        table.add_row(
            "download", _size(plan.download), f"the published copies of 1024 px, by their mean size{which and f': {which}'}"
        )
    if plan.download_originals is not None:
        table.add_row(
            "or, originals",
            _size(plan.download_originals),
            f"OriginalSize of {number_of(plan.photos_of_known_size, 'photo')}",
        )
    table.add_row(
        "pictures to encode",
        f"{plan.pictures:,}",
        f"views and masked views; a VAE of {plan.latent[0]} channels, f = {plan.latent[1]}",
    )
    for time in plan.encoder:
        how = "measured" if time.kind == "measured" else "computed from its peak, not measured"
        table.add_row(
            f"one {time.device}, {time.precision}", _time(time.hours), f"{time.pictures_per_second:,.1f} pictures/s, {how}"
        )
    if not plan.encoder:
        table.add_row("encoder's time", "?", "no rate of this VAE and precision; `python -m benchmarks.encoder_rate` measures it")
    _CONSOLE.print(table)


def print_comparison(estimated: Estimate, actual: DatasetInfo, packing_seconds: float | None = None) -> None:
    """The estimate beside what the build made, and how long packing took in this run, if it is known.

    The time is compared with that of one such device as this program sees, where the table of rates has it.
    """
    table = Table(title="Estimated and made", title_justify="left")
    for name in ("what", "estimate", "actual", "actual / estimate"):
        table.add_column(name, justify="left" if name == "what" else "right")
    made = actual.books.samples
    size = sum(split.bytes for split in actual.splits.values())
    shards = sum(len(split.shards) for split in actual.splits.values())
    table.add_row("samples", f"{estimated.samples:,}", f"{made:,}", _share(made, estimated.samples))
    table.add_row("shards", f"{estimated.shards:,}", f"{shards:,}", _share(shards, estimated.shards))
    table.add_row("bytes on disk", _size(estimated.bytes_on_disk), _size(size), _share(size, estimated.bytes_on_disk))
    pictures = made * (1 + actual.masks_per_view)
    table.add_row("pictures encoded", f"{estimated.pictures:,}", f"{pictures:,}", _share(pictures, estimated.pictures))
    if packing_seconds is not None and packing_seconds > _START_UP_SECONDS:
        device = device_name()
        expected = [time.hours for time in estimated.encoder if time.device == device]
        hours = packing_seconds / 3600
        share = f"{hours / expected[0]:.1%}" if expected else ""
        table.add_row(f"packing on {device}", _time(expected[0]) if expected else "?", _time(hours), share)
    _CONSOLE.print(table)


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
        # As pipelines/geometry.py does it, for columns.
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


def _print_classes(selection: Selection) -> None:
    splits = sorted(selection.objects_by_class)
    totals: dict[str, int] = {}
    for counts in selection.objects_by_class.values():
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    largest = sorted(totals, key=lambda name: (-totals[name], name))
    table = Table(title="Objects by class", title_justify="left")
    table.add_column("class")
    for split in splits:
        table.add_column(split, justify="right")
    for name in largest[:_CLASSES]:
        table.add_row(escape(name), *(f"{selection.objects_by_class[split].get(name, 0):,}" for split in splits))
    if len(largest) > _CLASSES:
        rest = [sum(selection.objects_by_class[split].get(name, 0) for name in largest[_CLASSES:]) for split in splits]
        table.add_row(number_of(len(largest) - _CLASSES, "other"), *(f"{count:,}" for count in rest))
    _CONSOLE.print(table)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.1f} TB"


def _time(hours: float) -> str:
    if hours < 1 / 30:
        return f"{hours * 3600:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours / 24:,.1f} days"
