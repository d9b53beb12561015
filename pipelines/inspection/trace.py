"""From a sample back to where it came from: its box, its photo and author, how it was cut, where it lies."""

import difflib
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pbe_core.dataset_reader import find_places, member_places, read_dataset, read_sample, take_rows
from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError
from pbe_core.images.sheets import Picture, save_picture
from pbe_core.progress import Progress
from pbe_core.recorded_vae import decode_means, load_recorded_vae
from pbe_core.sample_codec import Sample
from pipelines.inspection.contact_sheet import photo_source, trace_sheet
from pipelines.photos import read_photo
from pipelines.selection.objects import rejected_boxes
from schemas.dataset import DatasetInfo, VaeIdentity
from schemas.sample import SampleRecord, other_reference
from schemas.tables import COORDINATES, FAILURE_CODES, FLAGS, OBJECTS, REJECT_REASONS

Row = dict[str, Any]
Sections = dict[str, dict[str, str]]

# Keys that are looked at where a name means none, or several.
_CANDIDATES = 2000
_LISTED = 4
_FLAG_STATES = {1: "yes", 0: "no", -1: "unknown"}


def trace(name: str, dataset: Path, photos: Path | None = None, out: Path | None = None, vae: str | None = None) -> None:
    """Print all that is known of a sample and, where `out` says so, draw all parts of it.

    Args:
        name: a sample's key, the beginning of one, or an object's id.
        dataset: its folder.
        photos: the photo folder or photo store, if not where the build had it.
        out: PNG to write.
        vae: where the dataset's VAE is, if not where the build had it.

    Raises:
        InputError: no sample is meant, or several.
    """
    info = read_dataset(dataset)
    with Progress("looking for the sample"):
        row, others = find_sample(dataset, name)
        sample = read_sample(dataset, row, means_only=info.vae.deterministic)
        found = read_object(dataset, row["object_id"])
    photo, about_photo = read_recorded_photo(sample.record, info, photos)
    sections = describe(row, others, found, sample, info)
    sections["photo"]["file"] = about_photo
    if out:
        decoded: list[Picture] = []
        try:
            with Progress("decoding the latents"):
                decoded = decode_means(load_recorded_vae(info, vae), np.concatenate([sample.latent[None], sample.masked]))
            sections["VAE"]["here"] = "the very weights that made the latents"
        except InputError as error:
            sections["VAE"]["here"] = f"not used, and the picture shows no decoded latents: {error}"
        save_picture(trace_sheet(sample, photo, decoded), out)
    print_sections(sections)


def find_sample(dataset: Path, name: str) -> tuple[Row, list[str]]:
    """The row of the index that a name means, and the keys of the object's other views.

    Args:
        dataset: its folder.
        name: a key, an object's id, or the beginning of one object's keys; of several views of it the first.

    Raises:
        InputError: no sample has such a key, with the reason if it is known and the nearest keys if not; or several have.
    """
    index = dataset / "index.parquet"
    if not name:
        raise InputError("KEY is empty; give a sample's key, its beginning, or an object's id")
    found = find_places(index, "key", lambda keys: pc.starts_with(keys, name), _CANDIDATES)
    if not found:
        raise InputError(_explain_unknown(dataset, name))
    exact = [place for place, key in found.items() if name in (key, _object_id(key))]
    if not exact and len({_object_id(key) for key in found.values()}) > 1:
        count = f"{_CANDIDATES:,} or more" if len(found) == _CANDIDATES else f"{len(found):,}"
        raise InputError(f"{index}: {count} keys begin with `{name}` ({_listed(list(found.values()))}); give more of the key")
    place = min(exact or found, key=lambda place: _by_number(found[place]))
    key, object_id = found[place], _object_id(found[place])
    views = find_places(index, "key", lambda keys: pc.starts_with(keys, f"{object_id}_"), _CANDIDATES)
    return take_rows(index, [place])[0], sorted((view for view in views.values() if view != key), key=_by_number)


def read_object(dataset: Path, object_id: str) -> Row:
    """The row of objects.parquet of an accepted box, without its segmentation.

    Raises:
        InputError: the table has no such object, so it is of another dataset.
    """
    path = dataset / "objects.parquet"
    places = find_places(path, "object_id", lambda ids: pc.equal(ids, object_id), 1)
    if not places:
        raise InputError(f"{path}: no object {object_id}, which index.parquet tells of; the two are of different builds")
    return take_rows(path, places, [name for name in OBJECTS.names if name != "segmentation"])[0]


def read_recorded_photo(record: SampleRecord, info: DatasetInfo, photos: Path | None) -> tuple[Picture | None, str]:
    """The photo that a sample was cut from, if it is there and still the same, and a sentence about it.

    Args:
        record: of the sample.
        info: of the dataset.
        photos: the photo folder or photo store; the build's own by default.
    """
    source = photo_source(info, photos)
    try:
        photo, sha256 = read_photo(record.model_dump(), source)
    except (PhotoError, InputError) as error:  # The latter of a photo store that is damaged, or cannot be reached.
        return None, f"not here ({error}); --photos says where photos are"
    if sha256 != record.photo_sha256:
        return None, f"another one lies in {source.photos}: its SHA-256 is {sha256}"
    return photo, f"in {source.photos}, the very bytes that the sample was cut from"


def describe(row: Row, others: list[str], found: Row, sample: Sample, info: DatasetInfo) -> Sections:
    """All that is known of a sample, in sections of names and values.

    Args:
        row: of the index.
        others: keys of other views of the object.
        found: the object's row of objects.parquet.
        sample: itself.
        info: of the dataset.
    """
    record, vae = sample.record, info.vae
    height, width = sample.masks.shape[1:]
    padded = ", reaches beyond the photo, padded by reflection" if record.padded else ""
    masks = zip(record.mask_kinds, sample.masks.mean(axis=(1, 2)).tolist(), record.mask_polygons, strict=True)
    return {
        "sample": {
            "key": record.key,
            "object": record.object_id,
            "other views": ", ".join(others) or "none",
            **({"group": record.group} if record.group else {}),
            "split": record.split,
            "shard": f"shards/{row['shard']}.tar, position {row['position']}",
            "seed": f"{record.seed}",
        },
        "box": {
            "label": f"{record.label_name} ({record.label})",
            "fractions of the photo": "  ".join(f"{name} {found[name]:.6g}" for name in COORDINATES),
            "area": f"{found['area_share']:.2%} of the photo",
            **{name.removeprefix("is_").replace("_", " "): _FLAG_STATES[found[name]] for name in FLAGS},
        },
        "photo": {
            "id": record.photo_id,
            "file name": record.file_name or "by its id",
            **{name: getattr(record, name.lower()) or "unknown" for name in ("URL", "author", "licence")},
            "SHA-256": record.photo_sha256,
            "rotation": "unknown, not turned" if found["rotation"] is None else f"{record.rotation} degrees counterclockwise",
            "size": f"{record.photo_size[0]} x {record.photo_size[1]} px, as turned",
        },
        "cut": {
            "box": f"{_corners(record.box)} in px of the photo",
            "window": _window(record) + padded,
            "view": f"{width} x {height} px, the box at {_corners(record.box_in_view)}",
            "reference": f"{_corners(record.reference_window)} in px of the photo",
            **{
                f"mask {number}": f"{kind}, {share:.1%} of the view, {len(polygon)} points"
                for number, (kind, share, polygon) in enumerate(masks)
            },
        },
        **({"other photos": _describe_references(record)} if record.references or record.lost_references else {}),
        "members": {name: f"offset {place['offset']:,}, {place['length']:,} bytes" for name, place in member_places(row).items()},
        "VAE": {
            "source": vae.source,
            "weights' SHA-256": vae.sha256,
            "scaling factor": f"{vae.scaling_factor:g} (latents are stored unscaled)",
            "latent": f"{vae.latent_channels} channels, {vae.downsampling} px of the view to a cell" + _how_stored(vae),
        },
    }


def _window(record: SampleRecord) -> str:
    names = ("left", "top", "side") if len(record.window) == 3 else ("left", "top", "width", "height")
    return ", ".join(f"{name} {number}" for name, number in zip(names, record.window, strict=True)) + " px of the photo"


def _describe_references(record: SampleRecord) -> dict[str, str]:
    """What references from other photos show, and which of the planned ones there are not."""
    shown = {
        other_reference(number): (
            f"photo {one.photo_id} ({one.file_name or 'by its id'}), box {_corners(one.box)}, cut at {_corners(one.window)} px; "
            f"URL {one.url or 'unknown'}, author {one.author or 'unknown'}, licence {one.licence or 'unknown'}; "
            f"SHA-256 {one.photo_sha256}"
        )
        for number, one in enumerate(record.references, start=1)
    }
    lost = {f"not cut: {one.photo_id}": f"{one.code}: {one.detail}" for one in record.lost_references}
    return shown | lost


def _how_stored(vae: VaeIdentity) -> str:
    """What is not as with a VAE that gives distributions around 0, in words."""
    return ", without deviations" * vae.deterministic + ", shifted and divided by channel" * bool(vae.normalisation)


def print_sections(sections: Sections) -> None:
    """One table. On a terminal long values are folded to its width; into a file or pipe each stands on one line."""
    table = Table(show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for heading, values in sections.items():
        for number, (name, value) in enumerate(values.items()):
            # Names of authors and classes come from foreign files: no markup, and nothing that steers a terminal.
            printable = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in value)
            table.add_row("" if number else heading, name, Text(printable))
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def _explain_unknown(dataset: Path, name: str) -> str:
    """Why no sample has a key that begins with a name: it failed, its box was rejected, or there is no such thing."""
    index, rejects, path = (dataset / f"{table}.parquet" for table in ("index", "rejects", "failures"))
    failures = take_rows(path, find_places(path, "key", lambda keys: pc.starts_with(keys, name), _CANDIDATES))
    if failures:
        failure = next((failure for failure in failures if failure["key"] == name), failures[0])
        meaning = FAILURE_CODES.get(failure["code"], "an unknown code")
        others = f"; {len(failures) - 1:,} more that begin so failed, too" if len(failures) > 1 else ""
        return (
            f"{path}: {failure['key']} was planned, but could not be made: {failure['code']}, {meaning} "
            f"({' '.join(failure['detail'].split())}){others}"
        )
    none = f"no sample has a key that begins with `{name}`"
    rejected = rejected_boxes(rejects, name)
    if len(rejected) > 1:
        reasons = Counter(reject["reason"] for reject in rejected)
        counted = ", ".join(f"{reason} {reasons[reason]}" for reason in REJECT_REASONS if reason in reasons)
        return f"{rejects}: {none}; {len(rejected)} such boxes were rejected ({counted})"
    for reject in rejected:
        return (
            f"{rejects}: the box {reject['object_id']} was rejected: {reject['reason']}, {REJECT_REASONS[reject['reason']]} "
            f"(row {reject['row']} of {reject['file']})"
        )
    near = _nearest(index, name)
    known = f"the nearest are {_listed(near)}" if near else f"a key looks like {take_rows(index, [0], ['key'])[0]['key']}"
    return f"{index}: {none}; {known}"


def _nearest(index: Path, name: str) -> list[str]:
    """Keys that are nearly this one: of those that begin or end alike, no more than `_CANDIDATES` are compared."""
    beginning, end = name[:6], re.sub(r"_\d*$", "", name)[-6:]

    def alike(keys: Any) -> Any:
        return pc.or_(pc.starts_with(keys, beginning), pc.match_substring(keys, end))

    candidates = list(find_places(index, "key", alike, _CANDIDATES).values())
    return difflib.get_close_matches(name, candidates, n=_LISTED, cutoff=0.5)


def _object_id(key: str) -> str:
    return key.rpartition("_")[0]


def _by_number(key: str) -> tuple[int, str]:
    """Sorts views of one object: 2 comes before 10."""
    return len(key), key


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:_LISTED]) + (", ..." if len(keys) > _LISTED else "")


def _corners(rectangle: tuple[float, float, float, float]) -> str:
    x_min, y_min, x_max, y_max = (f"{round(value, 1):g}" for value in rectangle)
    return f"({x_min}, {y_min}) to ({x_max}, {y_max})"
