"""Write `docs/data-format.md` from the schemas: `python -m schemas.document > docs/data-format.md` (or `make docs`)."""

from collections.abc import Iterable

import pyarrow as pa
from pydantic import BaseModel

from schemas import dataset, sample
from schemas.outcomes import OUTCOMES
from schemas.tables import FAILURE_CODES, PAIRED, REFERENCE_PLACES, REJECT_REASONS, TABLES

LAYOUT = """\
| path | what |
| --- | --- |
| `dataset.json` | what the dataset is and holds; read this first |
| `objects.parquet`, `rejects.parquet` | every box of the source is in exactly one of the two |
| `same_photos.parquet` | photos that are there under another id too |
| `plan.parquet` | what is to be packed |
| `selection.json` | record of the tables above: what was read and counted, and the fingerprint of inputs and rules |
| `plan.json` | the fingerprint of all that determines the shards' bytes, the VAE too, and the hashes of this one's files |
| `estimate.json` | what the build was estimated to make and cost |
| `report.html`, `report.json` | classes, sizes, places, rejects, masks to look at, and the numbers; once built, of what came |
| `shards/<shard>.tar` | samples, as a WebDataset |
| `shards/<shard>.index.parquet` | the shard's part of the index |
| `shards/<shard>.json` | the shard's commit record: the shard is done when this is there and fits the tar |
| `shards/sizes.json` | samples per tar, as open_clip reads it |
| `index.parquet`, `shard_records.parquet` | the parts put together |
| `failures.parquet` | samples that could not be made |
| `README.md` | the dataset's card: counts, licences, settings, how to load it; Hugging Face `datasets` reads its head |
| `contact_sheet.png` | photo with box, view with mask, reference |
"""

STORE_LAYOUT = """\
| path | what |
| --- | --- |
| `store.json` | says that this is a photo store, and of which version |
| `index.parquet` | where each photo lies: read photos by it |
| `status.parquet`, `failures.parquet` | what became of every photo that was ever wanted; those that are not here |
| `quarantine.parquet` | photos that are placeholders: their bytes are here, the index leaves them out |
| `parts/<round>-<part>.json` | commit record of a part: the part is done when this is there and fits its files |
| `parts/<round>-<part>-<attempt>.tar` | its photos as they came, uncompressed, `<split>/<photo id>.<format>` |
| `parts/<round>-<part>-<attempt>.parquet` | what became of each of its photos |
| `rounds/<round>.parquet`, `rounds/<round>.json` | what one run set out to get; which parts count that were there before it |
| `damaged/` | parts that were found damaged, and the keys of their photos, which are asked for again |
| `.lock` | held by the crawl that is running |
"""


def _table(columns: str, rows: Iterable[tuple[object, ...]]) -> list[str]:
    """A table as Markdown, and an empty line."""
    names = columns.split(", ")
    cells = [names, ["---"] * len(names), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return [*(f"| {' | '.join(row)} |" for row in cells), ""]


def _fields(model: type[BaseModel]) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        kind = str(field.annotation)
        if isinstance(field.annotation, type) and "[" not in kind:
            kind = field.annotation.__name__
        rows.append(
            (
                f"`{name}`",
                f"`{kind.replace('typing.', '').replace('schemas.dataset.', '').replace('schemas.sample.', '')}`",
                field.description or "",
            )
        )
    return _table("field, type, meaning", rows)


def _meaning(field: pa.Field) -> str:
    return str(field.metadata[b"meaning"].decode())


def document() -> str:
    """The whole page as Markdown."""
    members = (
        (f"`{m.name}`", m.layout, f"{m.meaning}{' (optional)' if m.optional else ''}")
        for m in (*sample.MEMBERS, sample.OTHER_REFERENCE)
    )
    lines = [
        "# Data format",
        "",
        "Generated from `schemas/` by `make docs`; do not edit.",
        "",
        "## A dataset folder",
        "",
        LAYOUT,
        "## A sample in a shard",
        "",
        "One object in one view with its K masks. The key is `<object id>_<view>`: ASCII, no dots, unique in the dataset, stable",
        "between builds. C channels and h × w cells are those of the VAE's latent; S is the view's side in px.",
        "",
        *_table("member, layout, what", members),
        "Where dataset.json says `vae.deterministic`, a view has one latent and no distribution: `latent.npy` is [C, h, w],",
        "`masked.npy` [K, C, h, w]. Where it has a `vae.normalisation`, latents (and deviations) are stored so normalised.",
        "",
        "Fields of `json`:",
        "",
        *_fields(sample.SampleRecord),
        "Each of `references`:",
        "",
        *_fields(sample.ReferenceRecord),
        "Each of `lost_references`:",
        "",
        *_fields(sample.LostReference),
        "## dataset.json",
        "",
    ]
    for part in (dataset.DatasetInfo, dataset.VaeIdentity, dataset.SplitCounts, dataset.Books):
        lines += [f"`{part.__name__}`: {part.__doc__}", "", *_fields(part)]
    lines += ["## A photo store", "", STORE_LAYOUT, "## Tables", ""]
    lines += [
        "Where the source says which boxes show the same instance, objects and plan have two further columns,",
        f"`{PAIRED[0].name}` ({_meaning(PAIRED[0])}) and `{PAIRED[1].name}` ({_meaning(PAIRED[1])}:",
        f"photo, box, outline and source of each), and the index has `{REFERENCE_PLACES.name}`",
        f"({_meaning(REFERENCE_PLACES)}).",
        "Commit records (`shards/<shard>.json`) then have `references` (how many the shard has), `lost_references` (how many",
        "could not be cut, by code) and `lost` (which ones: sample, photo, code, detail).",
        "",
    ]
    for name, schema in TABLES.items():
        fields = (
            (f"`{field.name}`", f"`{field.type}`", "yes" if field.nullable else "no", field.metadata[b"meaning"].decode())
            for field in schema
        )
        lines += [f"### {name}", "", schema.metadata[b"about"].decode(), "", *_table("column, type, null, meaning", fields)]
    for heading, codes in (("Reasons of rejects", REJECT_REASONS), ("Codes of failures", FAILURE_CODES)):
        lines += [f"## {heading}", "", *_table("code, meaning", ((f"`{code}`", meaning) for code, meaning in codes.items()))]
    outcomes = ((f"`{code}`", "yes" if outcome.transient else "no", outcome.meaning) for code, outcome in OUTCOMES.items())
    lines += ["## Outcomes of photos", "", *_table("code, asking again may help, meaning", outcomes)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(document(), end="")
