"""What a plan will cost, from the tables alone; and tables for people: the selection, the estimate, and what the build made.

    objects, settings ──▶ samples, shards, bytes on disk, bytes to download, pictures to encode ──rates──▶ hours by device

Arrays are counted exactly. What depends on pictures is estimated from `sample_sizes.json`, the encoder's time from
`encoder_rates.json`, both in the folder `rates`: programs in benchmarks/ measure them and write them anew.
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from pbe_core.errors import InputError
from pbe_core.machine import device_name
from pbe_core.photo_files import is_store, photo_keys
from pbe_core.settings import REPOSITORY
from pbe_core.vae_kinds import AUTOENCODER_KL, locate_vae, read_vae_sizes
from pbe_core.words import number_of
from pipelines.config import BuildSettings
from pipelines.dataset.plan_shards import Plan
from pipelines.photos import check_photos
from pipelines.readers import reader_of
from pipelines.selection.objects import Selection
from schemas.dataset import DatasetInfo
from schemas.sample import OTHER_REFERENCE
from schemas.tables import COORDINATES, REJECT_REASONS

ESTIMATE_RECORD = "estimate.json"
RATES = Path(__file__).parent / "rates"
# Published copies of Open Images have a long side of 1024 px; 4:3 is what cameras make most.
UNKNOWN_PHOTO_SIZE = (1024, 768)
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
    layout = latent_layout(settings.latents.vae)
    if settings.views.size % layout.downsampling:
        raise InputError(f"views.size {settings.views.size} is no multiple of the VAE's downsampling, {layout.downsampling}")
    members = member_sizes(settings, layout.stored_channels, layout.downsampling, _reference_pixels(settings))
    if selection.references:
        members[OTHER_REFERENCE.name] = members["ref.jpg"] * selection.references / selection.objects
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
        download=round(to_fetch * (reader_of(settings.source.kind).bytes_per_photo or 0)) or None,
        download_originals=selection.original_bytes or None if to_fetch == selection.photos_with_objects else None,
        photos_of_known_size=selection.photos_of_known_size,
        pictures=pictures,
        latent=(layout.channels, layout.downsampling),
        encoder=encoder_times(pictures, layout.vae, settings.latents.precision, settings.views.size),
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
        channels: that are stored of a latent.
        downsampling: view px per latent cell.
        reference_pixels: mean px of a reference.
    """
    rates = _read_rates(RATES / "sample_sizes.json", "benchmarks.sample_sizes")
    size, masks = settings.views.size, settings.masks.per_view
    latent = channels * (size // downsampling) ** 2 * np.dtype(np.float16).itemsize
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


class LatentLayout(NamedTuple):
    """What a plan asks of a VAE."""

    channels: int
    stored_channels: int
    """Twice as many, or as many where the VAE is deterministic."""
    downsampling: int
    """View px per latent cell."""
    vae: str
    """As the table of rates calls it."""


def latent_layout(vae: str) -> LatentLayout:
    """The latents of a VAE by its files, if they lie here; else those of Stable Diffusion 1."""
    place = next((found for folder in (Path(vae), REPOSITORY / vae) if (found := locate_vae(folder))), None)
    if place is None:
        return LatentLayout(4, 8, 8, _STABLE_DIFFUSION)
    try:
        sizes = read_vae_sizes(place)
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise InputError(f"{place / 'config.json'}: {cause}; get the file again, or set latents.vae") from None
    known = sizes.kind == AUTOENCODER_KL and list(sizes.config["block_out_channels"]) == [128, 256, 512, 512]
    stored = sizes.latent_channels * (1 if sizes.deterministic else 2)
    return LatentLayout(sizes.latent_channels, stored, sizes.downsampling, _STABLE_DIFFUSION if known else vae)


def encoder_times(pictures: int, vae: str, precision: str, size: int) -> list[EncoderTime]:
    """Hours to encode so many pictures, for each device in the table of rates, fastest first.

    Rates of the same VAE at another size are scaled by the number of px: the encoder is nearly all convolutions.
    """
    table = _read_rates(RATES / "encoder_rates.json", "benchmarks.encoder_rate")
    best: dict[tuple[str, str], EncoderTime] = {}
    for row in sorted(table["rows"], key=lambda row: abs(row["size_px"] - size), reverse=True):
        if Path(row["vae"]).parts[-2:] != Path(vae).parts[-2:] or row["precision"] != precision:
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
    found = selection
    table = Table("outcome", _right("count"), _right("share"), "meaning", title="Boxes", title_justify="left")
    table.add_row("read", f"{found.boxes:,}")
    for outcome, count, whole, meaning in (
        ("accepted: objects", found.objects, found.boxes, ""),
        *((f"rejected: {reason}", count, found.boxes, REJECT_REASONS[reason]) for reason, count in found.rejects.items()),
        ("photos in the tables", found.photos, 0, ""),
        ("without a box", found.photos_without_boxes, found.photos, ""),
        ("photos with boxes", found.photos_with_boxes, 0, ""),
        ("photos with objects", found.photos_with_objects, found.photos_with_boxes, ""),
        ("references from other photos", found.references, 0, ""),
        ("objects that have one or more", found.objects_with_references, found.objects if found.references else 0, ""),
        *((f"photos under two ids: {how}", count, 0, "") for how, count in found.same_photos.items()),
    ):
        if count or whole:  # Some tables list no photos.
            table.add_row(outcome, f"{count:,}", _share(count, whole), meaning)
    _CONSOLE.print(table)
    _print_classes(found)
    examples = [f"{reason}: {example}" for reason, shown in found.examples.items() for example in shown]
    for line in [*(f"note: {note}" for note in found.notes), *examples]:
        _CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)


def print_estimate(plan: Estimate) -> None:
    """What the plan will make and cost."""
    each = plan.bytes_on_disk / max(1, plan.samples) / 1e3
    missing = f": {number_of(plan.photos_to_fetch, 'photo')} not here yet" if plan.photos_to_fetch < plan.photos else ""
    origin = f"at most: {number_of(plan.objects, 'object')} in {number_of(plan.photos, 'photo')}, as far as these can be used"
    latents = f"views and masked views; a VAE of {plan.latent[0]} channels, f = {plan.latent[1]}"
    rows = [
        ("samples", f"{plan.samples:,}", origin),
        ("shards", f"{plan.shards:,}", ""),
        ("on disk", _size(plan.bytes_on_disk), f"about {each:,.0f} kB a sample; JPEGs as measured on real photos"),
    ]
    if plan.download is not None:
        rows.append(("download", _size(plan.download), f"the published copies of 1024 px, by their mean size{missing}"))
    if plan.download_originals is not None:
        known = f"OriginalSize of {number_of(plan.photos_of_known_size, 'photo')}"
        rows.append(("or, originals", _size(plan.download_originals), known))
    rows.append(("pictures to encode", f"{plan.pictures:,}", latents))
    for time in plan.encoder:
        how = "measured" if time.kind == "measured" else "computed from its peak, not measured"
        rate = f"{time.pictures_per_second:,.1f} pictures/s, {how}"
        rows.append((f"one {time.device}, {time.precision}", _time(time.hours), rate))
    if not plan.encoder:
        no_rate = "no rate of this VAE and precision; `python -m benchmarks.encoder_rate` measures it"
        rows.append(("encoder's time", "?", no_rate))
    table = Table("what", _right("how much"), "how that is known", title="What the build will make", title_justify="left")
    for row in rows:
        table.add_row(*row)
    _CONSOLE.print(table)


def print_comparison(estimated: Estimate, actual: DatasetInfo, packing_seconds: float | None = None) -> None:
    """The estimate beside what the build made, and how long packing took in this run, if it is known.

    The time is compared with that of one such device as this program sees, where the table of rates has it.
    """
    columns = (_right(name) for name in ("estimate", "actual", "actual / estimate"))
    table = Table("what", *columns, title="Estimated and made", title_justify="left")
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
    columns = [*COORDINATES, "width", "height"]
    for batch in pq.ParquetFile(settings.out / "objects.parquet").iter_batches(columns=columns):
        sides = []
        for axis, side, unknown in zip("xy", ("width", "height"), UNKNOWN_PHOTO_SIZE, strict=True):
            length = batch.column(side).fill_null(unknown).to_numpy(zero_copy_only=False)
            share = batch.column(f"{axis}_max").to_numpy() - batch.column(f"{axis}_min").to_numpy()
            sides.append(np.minimum(share * length + 2 * settings.references.padding, length))
        # As pipelines/geometry.py does it, for columns.
        scale = np.minimum(1, settings.references.side / np.minimum(*sides))
        scale = np.minimum(scale, settings.references.max_side / np.maximum(*sides))
        total += float((sides[0] * sides[1] * scale**2).sum())
        count += len(batch)
    return total / max(1, count)


def _read_rates(path: Path, program: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        raise InputError(f"{path}: no such table, or not JSON; make it with `python -m {program}`") from None
    return content


def _print_classes(selection: Selection) -> None:
    splits = sorted(selection.objects_by_class)
    totals = sum((Counter(counts) for counts in selection.objects_by_class.values()), Counter[str]())
    largest = sorted(totals, key=lambda name: (-totals[name], name))
    table = Table("class", *map(_right, splits), title="Objects by class", title_justify="left")
    for name in largest[:_CLASSES]:
        table.add_row(escape(name), *(f"{selection.objects_by_class[split].get(name, 0):,}" for split in splits))
    if len(largest) > _CLASSES:
        rest = [sum(selection.objects_by_class[split].get(name, 0) for name in largest[_CLASSES:]) for split in splits]
        table.add_row(number_of(len(largest) - _CLASSES, "other"), *(f"{count:,}" for count in rest))
    _CONSOLE.print(table)


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _size(count: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(1, count))) // 3, len(units) - 1)
    return f"{count / 1000**power:.{min(power, 1)}f} {units[power]}"


def _time(hours: float) -> str:
    if hours < 1 / 30:
        return f"{hours * 3600:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours / 24:,.1f} days"
