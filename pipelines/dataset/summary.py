"""Tables for people: what was selected, what a plan says, and what came."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pbe_core.machine import device_name
from pbe_core.words import number_of
from pipelines.dataset.estimate import Estimate
from pipelines.selection.objects import Selection
from schemas.dataset import DatasetInfo
from schemas.tables import REJECT_REASONS

_CLASSES = 15
# Below this a packing time is that of starting, and tells nothing about the next one.
_START_UP_SECONDS = 60
_CONSOLE = Console()


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


def print_estimate(said: Estimate) -> None:
    """What the plan will make and cost."""
    table = Table(title="What the build will make", title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_column("how that is known")
    origin = f"at most: {number_of(said.objects, 'object')} in {number_of(said.photos, 'photo')}, as far as these can be used"
    table.add_row("samples", f"{said.samples:,}", origin)
    table.add_row("shards", f"{said.shards:,}", "")
    each = said.bytes_on_disk / max(1, said.samples) / 1e3
    table.add_row("on disk", _size(said.bytes_on_disk), f"about {each:,.0f} kB a sample; JPEGs as measured on real photos")
    if said.download is not None:
        which = f"{number_of(said.photos_to_fetch, 'photo')} not here yet" if said.photos_to_fetch < said.photos else ""
        table.add_row(
            "download", _size(said.download), f"the published copies of 1024 px, by their mean size{which and f': {which}'}"
        )
    if said.download_originals is not None:
        table.add_row(
            "or, originals", _size(said.download_originals), f"OriginalSize of {number_of(said.photos_of_known_size, 'photo')}"
        )
    table.add_row(
        "pictures to encode",
        f"{said.pictures:,}",
        f"views and masked views; a VAE of {said.latent[0]} channels, f = {said.latent[1]}",
    )
    for time in said.encoder:
        how = "measured" if time.kind == "measured" else "computed from its peak, not measured"
        table.add_row(
            f"one {time.device}, {time.precision}", _time(time.hours), f"{time.pictures_per_second:,.1f} pictures/s, {how}"
        )
    if not said.encoder:
        table.add_row("encoder's time", "?", "no rate of this VAE and precision; `python -m benchmarks.encoder_rate` measures it")
    _CONSOLE.print(table)


def print_comparison(said: Estimate, came: DatasetInfo, packing_seconds: float | None = None) -> None:
    """What the plan said beside what the build made, and how long packing took in this run, if it is known.

    The time is compared with that of one such device as this program sees, where the table of rates has it.
    """
    table = Table(title="What the plan said, and what came", title_justify="left")
    for name in ("what", "said", "came", "came / said"):
        table.add_column(name, justify="left" if name == "what" else "right")
    made = came.books.samples
    size = sum(split.bytes for split in came.splits.values())
    shards = sum(len(split.shards) for split in came.splits.values())
    table.add_row("samples", f"{said.samples:,}", f"{made:,}", _share(made, said.samples))
    table.add_row("shards", f"{said.shards:,}", f"{shards:,}", _share(shards, said.shards))
    table.add_row("bytes on disk", _size(said.bytes_on_disk), _size(size), _share(size, said.bytes_on_disk))
    pictures = made * (1 + came.masks_per_view)
    table.add_row("pictures encoded", f"{said.pictures:,}", f"{pictures:,}", _share(pictures, said.pictures))
    if packing_seconds is not None and packing_seconds > _START_UP_SECONDS:
        device = device_name()
        expected = [time.hours for time in said.encoder if time.device == device]
        hours = packing_seconds / 3600
        share = f"{hours / expected[0]:.1%}" if expected else ""
        table.add_row(f"packing on {device}", _time(expected[0]) if expected else "?", _time(hours), share)
    _CONSOLE.print(table)


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
