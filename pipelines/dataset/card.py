"""The dataset card, README.md in a dataset's folder: what is in it, from what, under which licences, how to load it.

    plan, index, dataset.json ──▶ head (YAML) + values ──card.md.jinja──▶ README.md

A function of the dataset alone: no dates, no folders of the machine that built it. The Hugging Face hub and `load_dataset` of
`datasets` read the head. Without `configs`, the latter takes the Parquet tables for the data. Without `dataset_info`, it guesses
types from the first samples, and fails at a licence further on if there is none in these.

Format: https://huggingface.co/docs/hub/datasets-manual-configuration; features are as in the YAML that `datasets` itself writes.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pbe_core.dataset_reader import Classes, read_classes
from pbe_core.files import write_atomically
from pbe_core.photo_files import photo_keys
from pbe_core.storage import public_url
from pbe_core.words import number_of
from pipelines.dataset.counts import in_order
from pipelines.dataset.plan_shards import Plan
from schemas.dataset import DatasetInfo
from schemas.sample import MEMBERS, OTHER_REFERENCE, Member, SampleRecord, other_reference
from schemas.tables import FAILURE_CODES, REJECT_REASONS, one_word

CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_CLASSES = 20
# Of these, what was said is nobody's business but the builder's.
_PRIVATE = {
    *(("storage",), ("source", "storage"), ("crawl", "storage")),
    *(("crawl", "contact"), ("crawl", "allowed_addresses"), ("ray", "address")),
}
_FOLDERS = {("out",), ("source", "annotations"), ("source", "photos"), ("source", "survey")}
# Creative Commons licences that the Hugging Face hub has an identifier for.
_CC = {
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0"),
    *("cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    *("cc-by-nc-sa-4.0", "cc0-1.0"),
}
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B")
_SCALARS = {str: "string", int: "int64", float: "float64", bool: "bool"}


def write_card(out: Path, info: DatasetInfo) -> None:
    """Write the card of a dataset into its folder."""
    write_atomically(out / CARD, card_text(out, info).encode())


def card_text(out: Path, info: DatasetInfo) -> str:
    """The dataset card as Markdown, with a YAML head as the Hugging Face hub reads it.

    Args:
        out: the dataset's folder; plan.parquet and index.parquet are read.
        info: what dataset.json holds, or will hold.

    Raises:
        InputError: the index cannot be read.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    photos, references = count_photos(out), most_references(out)
    head = DatasetCardData(**card_head(info, {licence for _, licence in photos}, references))
    classes = read_classes(out)
    licences: Counter[str | None] = Counter()
    for (_, licence), count in photos.items():
        licences[licence] += count
    books, kinds, vae = info.books, info.books.masks, info.vae
    boxes = {"boxes read": books.boxes, "accepted: objects": books.objects}
    samples = {"samples planned": books.planned, "in the shards": books.samples}
    values: dict[str, Any] = {
        "info": info,
        "masks_of_a_view": number_of(info.masks_per_view, "mask"),
        "splits": _split_rows(info, photos),
        "count_of_classes": number_of(len(classes.labels), "class", "classes"),
        "classes": _class_rows(classes),
        "boxes": _count_rows(boxes, "rejected", books.rejects, REJECT_REASONS),
        "samples": _count_rows(samples, "failed", books.failures, FAILURE_CODES),
        "licences": [
            ["unknown" if licence is None else _text(licence), f"{count:,}"]
            for licence, count in sorted(licences.items(), key=lambda item: (-item[1], item[0] or ""))
        ],
        "padded": f"{books.padded_views:,}",
        "packed": f"{books.samples:,}",
        "mask_kinds": ", ".join(f"{kinds[kind]:,} {kind} ({kinds[kind] / sum(kinds.values()):.0%})" for kind in sorted(kinds)),
        "vae": _text(_public_text(vae.source)),
        "members": [[f"`{each.name}`", *_member(each, vae.deterministic)] for each in members_of(references)],
        "fields": [[f"`{name}`", field.description or ""] for name, field in fields_of(references).items()],
        "references": f"{books.references:,}" if references else "",
        "most_references": references,
        "split": "train" if "train" in info.splits else next(iter(info.splits)),
        "channels": vae.latent_channels,
        "both": vae.stored_channels,
        "deterministic": vae.deterministic,
        "normalised": "; shifted and divided by channel (`vae.normalisation` of dataset.json)" if vae.normalisation else "",
        **_shapes(info),
        "masks": info.masks_per_view,
        "scale": vae.scaling_factor,
        "scale_short": f"{vae.scaling_factor:g}",
        "settings": yaml.safe_dump({"build": public_settings(info.settings)}, sort_keys=False, allow_unicode=True, width=120),
    }
    return f"{DatasetCard.from_template(head, template_path=str(_TEMPLATE), **values)}\n"


def fields_of(references: int | None) -> dict[str, FieldInfo]:
    """The fields of `json`, as far as this dataset may have them: those with a default are of pairs alone."""
    fields = SampleRecord.model_fields
    return {name: field for name, field in fields.items() if field.is_required() or references is not None}


def members_of(references: int | None) -> list[Member]:
    """The members of its samples."""
    return [*MEMBERS, OTHER_REFERENCE] if references else [*MEMBERS]


def most_references(out: Path) -> int | None:
    """The largest number of references from other photos that a sample has; null where the source does not tell of instances."""
    most = 0
    with pq.ParquetFile(out / "index.parquet") as index:
        if "refs_jpg" not in index.schema_arrow.names:
            return None
        for batch in index.iter_batches(columns=["refs_jpg"]):
            most = max(most, pc.max(pc.list_value_length(batch["refs_jpg"])).as_py() or 0)
    return most


def card_head(info: DatasetInfo, licences: set[str | None], references: int | None = None) -> dict[str, Any]:
    """What stands in the head.

    Args:
        info: of the dataset.
        licences: of its photos; null where one is not known.
        references: from other photos, the most that a sample has; null where nothing tells of instances.
    """
    splits = in_order(set(info.splits))
    files = [{"split": split, "path": f"shards/{split}-*.tar"} for split in splits]
    return {
        "pretty_name": "Paint by Example training samples",
        "license": hub_licence(licences),
        "task_categories": ["image-to-image"],
        "tags": ["image-editing", "inpainting", "paint-by-example", "latents", "webdataset"],
        "size_categories": [next(name for power, name in enumerate(_SIZES, start=3) if info.books.samples < 10**power)],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {
            "features": sample_features(info, references),
            # By these, `load_dataset` refuses what it read short. `datasets` reads them only if all three are there.
            "splits": [
                {"name": split, "num_bytes": info.splits[split].bytes, "num_examples": info.splits[split].samples}
                for split in splits
            ],
        },
    }


def sample_features(info: DatasetInfo, references: int | None = None) -> list[dict[str, Any]]:
    """Name and type of all that `datasets` makes of a sample, in its YAML: each member, the tar's path and the key."""
    latent = [info.vae.stored_channels, *[info.view_size // info.vae.downsampling] * 2]
    fields = [{"name": name, **_feature(field.annotation)} for name, field in fields_of(references).items()]
    return [
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
        {"name": "json", "struct": fields},
        {"name": "latent.npy", **_array(latent, info)},
        {"name": "mask.json", "list": [{"name": "size", "list": "int64"}, {"name": "counts", "dtype": "string"}]},
        {"name": "masked.npy", **_array([info.masks_per_view, *latent], info)},
        {"name": "ref.jpg", "dtype": "image"},
        *({"name": other_reference(number), "dtype": "image"} for number in range(1, (references or 0) + 1)),
        {"name": "view.jpg", "dtype": "image"},
    ]


def _shapes(info: DatasetInfo) -> dict[str, str]:
    """Sizes of views and latents, in words."""
    size, cells = info.view_size, info.view_size // info.vae.downsampling
    if not info.buckets:
        return {
            "view": f"{size} × {size} px",
            "rows_columns": f"{cells}, {cells}",
            "high_wide": f"{size}, {size}",
            "sides": f"h = w = {cells}, K = {info.masks_per_view}, S = {size}",
        }
    shapes = ", ".join(f"{width} × {height}" for width, height in info.buckets)
    return {
        "view": f"{shapes} px (width × height), one of them in a shard, whose name has it",
        "rows_columns": "h, w",
        "high_wide": "H, W",
        "sides": f"K = {info.masks_per_view}; h, w = H, W / {info.vae.downsampling} of a view W px wide and H px high",
    }


def _array(shape: list[int], info: DatasetInfo) -> dict[str, Any]:
    """An array's type for `datasets`: those of its arrays are of one shape, so that of several shapes it makes lists."""
    if not info.buckets:
        return {"dtype": {f"array{len(shape)}_d": {"shape": shape, "dtype": "float16"}}}
    lists: dict[str, Any] = {"list": "float16"}
    for _ in shape[1:]:
        lists = {"list": lists}
    return lists


def hub_licence(licences: set[str | None]) -> str:
    """The hub's identifier of the one licence that all photos have; `other` where there are several, or one that it has not."""
    if len(licences) != 1:
        return "other"
    address = (next(iter(licences)) or "").lower()
    licence = re.search(r"creativecommons\.org/licenses/(by(?:-nc)?(?:-nd|-sa)?)/(\d\.\d)(?:/|$)", address)
    dedication = re.search(r"creativecommons\.org/publicdomain/zero/(\d\.\d)(?:/|$)", address)
    name = f"cc-{licence[1]}-{licence[2]}" if licence else f"cc0-{dedication[1]}" if dedication else ""
    return name if name in _CC else "other"


def _feature(annotation: Any) -> dict[str, Any]:
    """The type of a field of `json`; all of them may be null for `datasets`."""
    if annotation in _SCALARS:
        return {"dtype": _SCALARS[annotation]}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"struct": [{"name": name, **_feature(field.annotation)} for name, field in annotation.model_fields.items()]}
    inner = [own for own in get_args(annotation) if own not in (NoneType, Ellipsis)]
    if get_origin(annotation) is Literal:
        return _feature(type(inner[0]))
    if get_origin(annotation) is not tuple:  # X | None
        return _feature(inner[0])
    # As `datasets` writes it: `list: float64`, and a list of lists in full.
    item = _feature(inner[0])
    if list(item) == ["struct"]:
        return {"list": item["struct"]}
    return {"list": item["dtype"] if list(item) == ["dtype"] else item}


def count_photos(out: Path) -> Counter[tuple[str, str | None]]:
    """Photos that samples were cut from, each counted once, by split and licence (null where it is not known).

    Streams plan and index, shard by shard; holds 12 bytes for each photo.
    """
    kinds: dict[tuple[str, str | None], int] = {}
    keys, codes = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
    with pq.ParquetFile(out / "index.parquet") as index:
        places = {}
        for group in range(index.num_row_groups):
            if index.metadata.row_group(group).num_rows:
                places[index.read_row_group(group, columns=["shard"])["shard"][0].as_py()] = group
        plan = Plan(out / "plan.parquet")
        for shard, rows in plan.tables(
            ["key", "split", "photo_id", "licence", *(["references"] * ("references" in plan.columns))]
        ):
            if shard not in places:  # None of its samples could be made.
                continue
            made = index.read_row_group(places[shard], columns=["key"])["key"].combine_chunks()
            rows = rows.filter(pc.is_in(rows["key"], value_set=made))
            rows = rows.set_column(3, "licence", rows["licence"].cast(pa.string()))
            named = rows.select(["photo_id", "licence"])
            if "references" in rows.column_names:
                others = pc.list_flatten(rows["references"]).combine_chunks()
                columns = [pc.struct_field(others, name) for name in named.column_names]
                named = pa.concat_tables([named, pa.table(columns, schema=named.schema)])
            photos = named.group_by("photo_id").aggregate([("licence", "min")])
            split, licences = rows["split"][0].as_py(), photos["licence_min"].combine_chunks().dictionary_encode()
            names = [(licence or "").strip() or None for licence in [*licences.dictionary.to_pylist(), None]]
            own = np.array([kinds.setdefault((split, name), len(kinds)) for name in names], np.int32)
            codes.append(own[licences.indices.fill_null(len(names) - 1).to_numpy()])
            keys.append(photo_keys(photos.append_column("split", one_word(split, len(photos)))))
    # A photo's samples may lie in several shards.
    _, first = np.unique(np.concatenate(keys), return_index=True)
    counts = np.bincount(np.concatenate(codes)[first], minlength=len(kinds)).tolist()
    return +Counter({kind: counts[code] for kind, code in kinds.items()})


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a build as they can be shown to anyone: folders by their last name, nothing private."""
    return {name: _public(value, (name,)) for name, value in settings.items()}


def _public(value: Any, place: tuple[str, ...]) -> Any:
    if place in _PRIVATE:
        return "not shown" if value else value
    if isinstance(value, dict):
        return {name: _public(inner, (*place, name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(inner, place) for inner in value]
    return _public_text(value, folder=place in _FOLDERS) if isinstance(value, str) else value


def _public_text(text: str, *, folder: bool = False) -> str:
    """A path by its last name; a URL without what may be a key or a password."""
    if "://" in text and not text.startswith("file:"):
        return public_url(text)
    windows = PureWindowsPath(text)
    if folder or text.startswith(("/", "~", "file:")) or windows.is_absolute():
        return (windows if windows.drive else PurePosixPath(text)).name
    return text


def _member(member: Member, means_only: bool) -> tuple[str, str]:
    """Layout and meaning of a file of a sample; of a deterministic VAE latents are no distributions."""
    layout, meaning = member.layout, member.meaning + " (optional)" * member.optional
    if not means_only:
        return layout, meaning
    meaning = meaning.replace("VAE posterior", "the VAE's latent").replace(": mean, then standard deviation", "")
    return layout.replace("2C", "C"), meaning


def _split_rows(info: DatasetInfo, photos: Counter[tuple[str, str | None]]) -> list[list[str]]:
    counts: dict[str, tuple[int, ...]] = {}
    for split in in_order(set(info.splits)):
        own = info.splits[split]
        counts[split] = (own.samples, sum(n for (name, _), n in photos.items() if name == split), len(own.shards), own.bytes)
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    return [[split, *(f"{count:,}" for count in own)] for split, own in counts.items()]


def _class_rows(classes: Classes) -> list[list[str]]:
    """The largest classes, and all others in one row."""
    counts, largest = classes.counts(), classes.by_frequency()
    rows = [[_text(classes.names[at]), _text(classes.labels[at]), f"{counts[at]:,}"] for at in largest[:_CLASSES]]
    rest = largest[_CLASSES:]
    return [*rows, [number_of(len(rest), "other"), "", f"{counts[rest].sum():,}"]] if rest else rows


def _count_rows(totals: dict[str, int], outcome: str, counts: dict[str, int], meanings: Mapping[str, str]) -> list[list[str]]:
    rows = [[name, f"{count:,}", ""] for name, count in totals.items()]
    return rows + [[f"{outcome}: `{code}`", f"{count:,}", meanings.get(code, "")] for code, count in counts.items()]


def _text(text: str) -> str:
    """Text from foreign files, so that Markdown shows it as it is, in one cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&$])", r"\\\1", " ".join(text.split()))
