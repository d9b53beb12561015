"""The dataset card, README.md in a dataset's folder: what is in it, from what, under which licences, how to load it.

A function of the dataset alone: no dates, no folders of the machine that built it.
"""

import re
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from pbe_core.dataset_reader import read_classes
from pbe_core.files import write_atomically
from pbe_core.storage import public_url
from pbe_core.words import number_of
from pipelines.dataset.card_head import card_head
from pipelines.dataset.counts import in_order
from pipelines.dataset.plan_shards import planned_shards
from pipelines.photo_list import photo_keys
from schemas.dataset import Books, DatasetInfo
from schemas.sample import MEMBERS, SampleRecord
from schemas.tables import FAILURE_CODES, REJECT_REASONS, one_word

CARD = "README.md"
_CLASSES = 20
# Of these, what was said is nobody's business but the builder's.
_PRIVATE = {
    *(("storage",), ("source", "storage"), ("crawl", "storage")),
    *(("crawl", "contact"), ("crawl", "allowed_addresses"), ("ray", "address")),
}
_FOLDERS = {("out",), ("source", "annotations"), ("source", "photos"), ("source", "survey")}

_INTRODUCTION = """\
# Paint by Example: training samples

Samples to train an exemplar-based image editor (*Paint by Example*, Yang et al., CVPR 2023). Each shows one object of a photo: a
square view of the photo that holds the object, as the latent of a VAE; {masks} over the object, and the view under each of
them, as latents too; and the reference, a crop of the photo that shows the object itself. A model learns to paint the reference
into the region that a mask leaves open.
"""

_LOAD = """\
## Load it

The shards are plain [WebDataset](https://github.com/webdataset/webdataset); nothing else is needed. In the dataset's folder:

```python
import glob
import io
import json

import numpy as np
import webdataset
from PIL import Image

shards = sorted(glob.glob("shards/{split}-*.tar"))
for sample in webdataset.WebDataset(shards, shardshuffle=False):
    record = json.loads(sample["json"])  # label, box, window, author, licence, ...
    mean, deviation = np.split(np.load(io.BytesIO(sample["latent.npy"])), 2)  # [{channels}, {cells}, {cells}] each, float16
    masked = np.load(io.BytesIO(sample["masked.npy"]))  # [{masks}, {both}, {cells}, {cells}]: the same under each mask
    masks = np.asarray(Image.open(io.BytesIO(sample["mask.png"]))).reshape({masks}, {size}, {size})  # True: to be painted
    reference = Image.open(io.BytesIO(sample["ref.jpg"]))
    latent = (mean + deviation * np.random.standard_normal(mean.shape)) * {scale}  # what a diffusion model sees
    print(sample["__key__"], record["label_name"], latent.shape, reference.size)
    break
```

`index.parquet` says where each member of each sample lies in its tar, for random access.

What to know of plain readers (webdataset 1.0.2):

- Say `shardshuffle=False`, or a number of shards to shuffle among; otherwise the reader warns.
- `.decode("pil")`, `"rgb"` and `"rgb8"` make three equal channels of the 1-bit `mask.png`; `.decode("pill")` and `"l8"` make
  one, of 0 and 255.
- A `DataLoader` with more workers than the split has shards ends with `ValueError: No samples found in dataset`: take fewer
  workers, or `WebDataset(..., empty_check=False)`.
- Two kinds of damage give no error: a tar that was cut off at a member's header ends there, its last sample perhaps without some
  members; and of `cat a.tar b.tar` only a.tar is read. `shards/sizes.json` says how many samples each tar holds. The toolkit's
  `python pipelines/verify.py DATASET` finds both: size and SHA-256 of the tar are not those of its record.

With [Hugging Face datasets](https://huggingface.co/docs/datasets), where DATASET is this folder or its name on the hub:

```python
import numpy as np
from datasets import load_dataset

for sample in load_dataset("DATASET", split="{split}", streaming=True):
    latent = np.asarray(sample["latent.npy"], np.float16)  # [{both}, {cells}, {cells}], as above
    masks = np.asarray(sample["mask.png"]).reshape({masks}, {size}, {size})
    print(sample["json"]["label_name"], sample["json"]["licence"], latent.shape, masks.shape, sample["ref.jpg"].size)
    break
```

Without `streaming=True` it makes a copy of its own, and refuses a split that has fewer samples than the head of this card says.
`view.jpg` is null where the dataset does not keep it.

To train on it with the toolkit that made it, from its repository:

```sh
torchrun pbe_train/train.py --config configs/open_images.yaml --dataset DATASET --model.vae VAE --out RUN
```

VAE is the one named above, as a folder or hub id: the trainer compares its weights' SHA-256.

## Attribution

Each sample's `json` member names the photo's `author`, `licence` and `url`, as far as the source of the photos told them. With
the toolkit installed, this shows them for a sample's key, and where all of its parts come from:

```sh
pbe inspect trace KEY DATASET
```

References and kept views are parts of the photos and latents are made from them: the photos' licences hold for them. Boxes and
labels come from the annotations, which have a licence of their own.
"""


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
    photos = count_photos(out)
    per_view = number_of(info.masks_per_view, "mask")
    cells = info.view_size // info.vae.downsampling
    load = {
        "split": "train" if "train" in info.splits else next(iter(info.splits)),
        "channels": info.vae.latent_channels,
        "both": 2 * info.vae.latent_channels,
        "cells": cells,
        "masks": info.masks_per_view,
        "size": info.view_size,
        "scale": info.vae.scaling_factor,
    }
    parts = [
        f"---\n{_yaml(card_head(info, {licence for _, licence in photos}))}---\n",
        _INTRODUCTION.format(masks=per_view),
        f"Fingerprint of all that determines the samples: `{info.fingerprint}`\n",
        _splits(info, photos),
        _classes(out),
        _books(info.books),
        _licences(photos),
        _layout(info, cells),
        _LOAD.format(**load),
        _settings(info),
    ]
    return "\n".join(parts)


def count_photos(out: Path) -> Counter[tuple[str, str | None]]:
    """Photos that samples were cut from, each counted once, by split and licence (null where it is not known).

    Streams plan and index, shard by shard; holds 12 bytes for each photo.
    """
    kinds: dict[tuple[str, str | None], int] = {}
    keys, codes = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
    with pq.ParquetFile(out / "plan.parquet") as plan, pq.ParquetFile(out / "index.parquet") as index:
        packed = {}
        for group in range(index.num_row_groups):
            if index.metadata.row_group(group).num_rows:
                packed[index.read_row_group(group, columns=["shard"])["shard"][0].as_py()] = group
        for group, shard in enumerate(planned_shards(out / "plan.parquet")):
            if shard not in packed:  # None of its samples could be made.
                continue
            made = index.read_row_group(packed[shard], columns=["key"])["key"].combine_chunks()
            rows = plan.read_row_group(group, columns=["key", "split", "photo_id", "licence"])
            rows = rows.filter(pc.is_in(rows["key"], value_set=made))
            rows = rows.set_column(3, "licence", rows["licence"].cast(pa.string()))
            photos = rows.select(["photo_id", "licence"]).group_by("photo_id").aggregate([("licence", "min")])
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


def _splits(info: DatasetInfo, photos: Counter[tuple[str, str | None]]) -> str:
    rows = []
    for split in in_order(set(info.splits)):
        counts = info.splits[split]
        of_split = sum(count for (own, _), count in photos.items() if own == split)
        rows.append([split, _number(counts.samples), _number(of_split), _number(len(counts.shards)), _number(counts.bytes)])
    everything = info.splits.values()
    rows.append(
        [
            "all",
            _number(sum(counts.samples for counts in everything)),
            _number(photos.total()),
            _number(sum(len(counts.shards) for counts in everything)),
            _number(sum(counts.bytes for counts in everything)),
        ]
    )
    return _section("Splits", _table(["split", "samples", "photos", "shards", "bytes"], rows))


def _classes(out: Path) -> str:
    classes = read_classes(out)
    counts, largest = classes.counts(), classes.by_frequency()
    rows = [
        [_text(classes.names[place]), _text(classes.labels[place]), _number(int(counts[place]))] for place in largest[:_CLASSES]
    ]
    rest = largest[_CLASSES:]
    if rest:
        rows.append([number_of(len(rest), "other"), "", _number(int(counts[rest].sum()))])
    words = f"{number_of(len(largest), 'class', 'classes')}; those with most samples:\n"
    return _section("Classes", words, _table(["class", "id", "samples"], rows))


def _books(books: Books) -> str:
    boxes = [["boxes read", _number(books.boxes), ""], ["accepted: objects", _number(books.objects), ""]]
    boxes += [
        [f"rejected: `{reason}`", _number(count), REJECT_REASONS.get(reason, "")] for reason, count in books.rejects.items()
    ]
    samples = [["samples planned", _number(books.planned), ""], ["in the shards", _number(books.samples), ""]]
    samples += [[f"failed: `{code}`", _number(count), FAILURE_CODES.get(code, "")] for code, count in books.failures.items()]
    heading = ["outcome", "count", "meaning"]
    return _section(
        "Where everything went",
        "Every box is an object or rejected, by the first rule that it breaks (`objects.parquet`, `rejects.parquet`):\n",
        _table(heading, boxes),
        "Every planned sample is in the shards or failed (`failures.parquet`):\n",
        _table(heading, samples),
    )


def _licences(photos: Counter[tuple[str, str | None]]) -> str:
    counts: Counter[str | None] = Counter()
    for (_, licence), count in photos.items():
        counts[licence] += count
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0] or ""))
    rows = [["unknown" if licence is None else _text(licence), _number(count)] for licence, count in ordered]
    return _section(
        "Licences of the photos", "Each photo that samples were cut from, once:\n", _table(["licence", "photos"], rows)
    )


def _layout(info: DatasetInfo, cells: int) -> str:
    masks = sum(info.books.masks.values())
    kinds = ", ".join(f"{count:,} {kind} ({count / masks:.0%})" for kind, count in sorted(info.books.masks.items()))
    shape = f"{info.vae.latent_channels} × {cells} × {cells}"
    lines = [
        f"- View: {info.view_size} × {info.view_size} px; {info.books.padded_views:,} of {info.books.samples:,} reach beyond "
        "their photo and are padded by reflection",
        f"- Masks: {info.masks_per_view} of each view: {kinds}",
        f"- Latents: {shape}, mean and standard deviation of the VAE's posterior, not scaled",
        f"- VAE: {_text(_public_text(info.vae.source))}, scaling factor {info.vae.scaling_factor:g}, "
        f"SHA-256 of its weights `{info.vae.sha256}`",
        "",
    ]
    members = [
        [f"`{member.name}`", member.layout, member.meaning + (" (optional)" if member.optional else "")] for member in MEMBERS
    ]
    fields = [[f"`{name}`", field.description or ""] for name, field in SampleRecord.model_fields.items()]
    symbols = f"C = {info.vae.latent_channels}, h = w = {cells}, K = {info.masks_per_view}, S = {info.view_size}"
    return _section(
        "A sample",
        "\n".join(lines),
        f"Members of a sample; {symbols}:\n",
        _table(["member", "layout", "what"], members),
        "Fields of `json`:\n",
        _table(["field", "meaning"], fields),
    )


def _settings(info: DatasetInfo) -> str:
    words = "Of folders the last name is shown; credentials, contacts and addresses of machines are not.\n"
    return _section("Settings of the build", words, f"```yaml\n{_yaml({'build': public_settings(info.settings)})}```\n")


def _section(heading: str, *parts: str) -> str:
    return "\n".join([f"## {heading}\n", *parts])


def _table(heading: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heading, ["---"] * len(heading), *rows))


def _text(text: str) -> str:
    """Text from foreign files, so that Markdown shows it as it is, in one cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&$])", r"\\\1", " ".join(text.split()))


def _number(count: int) -> str:
    return f"{count:,}"


def _yaml(content: dict[str, Any]) -> str:
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
