"""The YAML head of a dataset card, by which the Hugging Face hub shows a dataset and `datasets.load_dataset` reads it.

Without `configs`, `load_dataset` takes the Parquet tables for the data. Without `dataset_info`, it guesses types from the first
samples, and fails at a licence further on if there is none in these.

Format: https://huggingface.co/docs/hub/datasets-manual-configuration; features are as in the YAML that `datasets` itself writes.
"""

import re
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pipelines.dataset.counts import in_order
from schemas.dataset import DatasetInfo
from schemas.sample import SampleRecord

# Creative Commons licences that the Hugging Face hub has an identifier for.
_CC = {
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0"),
    *("cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    *("cc-by-nc-sa-4.0", "cc0-1.0"),
}
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B")
_SCALARS = {str: "string", int: "int64", float: "float64", bool: "bool"}


def card_head(info: DatasetInfo, licences: set[str | None]) -> dict[str, Any]:
    """What stands in the head.

    Args:
        info: of the dataset.
        licences: of its photos; null where one is not known.
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
            "features": sample_features(info),
            # By these, `load_dataset` refuses what it read short. `datasets` reads them only if all three are there.
            "splits": [
                {"name": split, "num_bytes": info.splits[split].bytes, "num_examples": info.splits[split].samples}
                for split in splits
            ],
        },
    }


def sample_features(info: DatasetInfo) -> list[dict[str, Any]]:
    """Name and type of all that `datasets` makes of a sample, in its YAML: each member, the tar's path and the key."""
    cells = info.view_size // info.vae.downsampling
    latent = [2 * info.vae.latent_channels, cells, cells]
    fields = [{"name": name, **_feature(field.annotation)} for name, field in SampleRecord.model_fields.items()]
    return [
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
        {"name": "json", "struct": fields},
        {"name": "latent.npy", "dtype": {"array3_d": {"shape": latent, "dtype": "float16"}}},
        {"name": "mask.json", "list": [{"name": "size", "list": "int64"}, {"name": "counts", "dtype": "string"}]},
        {"name": "masked.npy", "dtype": {"array4_d": {"shape": [info.masks_per_view, *latent], "dtype": "float16"}}},
        {"name": "ref.jpg", "dtype": "image"},
        {"name": "view.jpg", "dtype": "image"},
    ]


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
    inner = [own for own in get_args(annotation) if own not in (NoneType, Ellipsis)]
    if get_origin(annotation) is Literal:
        return _feature(type(inner[0]))
    if get_origin(annotation) is not tuple:  # X | None
        return _feature(inner[0])
    # As `datasets` writes it: `list: float64`, and a list of lists in full.
    item = _feature(inner[0])
    return {"list": item["dtype"] if list(item) == ["dtype"] else item}
