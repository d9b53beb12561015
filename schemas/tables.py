"""The Arrow schema of every table that a stage hands to the next one, stored as Parquet.

    boxes ──selection──▶ objects + rejects ──plan──▶ plan ──pack──▶ shard records + index

Each field carries its meaning as metadata; `docs/data-format.md` is generated from it. Box coordinates are fractions of the
stored photo (x right, y down, origin at the top left). Flags are three-state as in Open Images: 1 yes, 0 no, -1 unknown.
"""

import pyarrow as pa

from schemas.photos import PHOTO_ERRORS

FLAGS = ("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside")


def _field(name: str, kind: pa.DataType, meaning: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})


_PHOTO = [
    _field("split", pa.string(), "the source's own split, e.g. train or validation"),
    _field("photo_id", pa.string(), "the source's id of the photo (Open Images: 16 hex digits)"),
]
_BOX = [
    _field("label", pa.string(), "class id as the source writes it (Open Images: a MID such as /m/01g317)"),
    _field("x_min", pa.float64(), "left edge, fraction of the width"),
    _field("x_max", pa.float64(), "right edge, fraction of the width"),
    _field("y_min", pa.float64(), "top edge, fraction of the height"),
    _field("y_max", pa.float64(), "bottom edge, fraction of the height"),
    _field("is_occluded", pa.int8(), "something covers a part of the object (1, 0, -1 unknown)"),
    _field("is_truncated", pa.int8(), "the object goes on beyond the photo's edge (1, 0, -1 unknown)"),
    _field("is_group_of", pa.int8(), "the box spans a group of objects (1, 0, -1 unknown)"),
    _field("is_depiction", pa.int8(), "a drawing or print of the object, not the object (1, 0, -1 unknown)"),
    _field("is_inside", pa.int8(), "the photo was taken from inside the object (1, 0, -1 unknown)"),
]
_OBJECT_ID = _field(
    "object_id", pa.string(), "<photo_id>-<12 hex digits of a hash of label and coordinates>: the same in every build"
)
_SOURCE = [
    _field("url", pa.string(), "where the photo was published; null if the source does not say", nullable=True),
    _field("author", pa.string(), "the photo's author; null if the source does not say", nullable=True),
    _field("licence", pa.string(), "the photo's licence, as a URL; null if the source does not say", nullable=True),
]

BOXES = pa.schema(
    [
        # A malformed row may lack anything; the selection rejects it by row.
        *[field.with_nullable(True) for field in (*_PHOTO, *_BOX)],
        _field("file", pa.string(), "name of the annotation file"),
        _field("row", pa.int64(), "1-based data row in it"),
    ],
    metadata={"about": "All boxes of the source, one row each, as the annotation reader yields them in record batches."},
)
OBJECTS = pa.schema(
    [
        *_PHOTO,
        _OBJECT_ID,
        *_BOX,
        _field("label_name", pa.string(), "class name for people; the class id where the source names none"),
        _field("area_share", pa.float64(), "box area / photo area"),
        *_SOURCE,
    ],
    metadata={"about": "Accepted boxes (`objects.parquet`), sorted by split, photo_id, object_id."},
)
REJECTS = pa.schema(
    [
        *BOXES,
        _field("reason", pa.string(), "the first rule that the box breaks"),
    ],
    metadata={"about": "Boxes that were not accepted (`rejects.parquet`), with the reason. objects + rejects = boxes."},
)
PLAN = pa.schema(
    [
        _field("shard", pa.string(), "name of the shard, <split>-<6 digits>; one row group per shard, in order"),
        _field("position", pa.int32(), "place of the sample in its shard"),
        _field("key", pa.string(), "key of the sample, <object_id>_<view>"),
        _field("view", pa.int32(), "number of the view of this object"),
        *OBJECTS,
    ],
    metadata={"about": "The frozen plan (`plan.parquet`): one row per sample to be made, all that packing needs to know."},
)
MEMBER_LOCATION = pa.struct([pa.field("offset", pa.int64(), nullable=False), pa.field("length", pa.int64(), nullable=False)])
INDEX = pa.schema(
    [
        _field("key", pa.string(), "key of the sample"),
        _field("split", pa.string(), "split of its photo"),
        _field("shard", pa.string(), "name of its shard; the file is shards/<shard>.tar"),
        _field("position", pa.int32(), "place in the shard"),
        _field("object_id", pa.string(), "the object it shows"),
        _field("label", pa.string(), "class id"),
        _field("label_name", pa.string(), "class name"),
        _field("latent_npy", MEMBER_LOCATION, "byte range of latent.npy in the tar"),
        _field("mask_png", MEMBER_LOCATION, "byte range of mask.png"),
        _field("masked_npy", MEMBER_LOCATION, "byte range of masked.npy"),
        _field("ref_jpg", MEMBER_LOCATION, "byte range of ref.jpg"),
        _field("json", MEMBER_LOCATION, "byte range of json"),
        _field("view_jpg", MEMBER_LOCATION, "byte range of view.jpg; null where views are not kept", nullable=True),
    ],
    metadata={"about": "Random access (`index.parquet`): where each member of each sample lies. Sorted by shard and position."},
)
SHARD_RECORDS = pa.schema(
    [
        _field("shard", pa.string(), "name of the shard"),
        _field("split", pa.string(), "split of its photos"),
        _field("fingerprint", pa.string(), "fingerprint of the plan it was packed from"),
        _field("planned", pa.int64(), "samples planned; planned = samples + failed"),
        _field("samples", pa.int64(), "samples in the tar"),
        _field("failed", pa.int64(), "samples that could not be made"),
        _field("bytes", pa.int64(), "size of the tar"),
        _field("sha256", pa.string(), "SHA-256 of the tar, hex"),
        _field("index_sha256", pa.string(), "SHA-256 of shards/<shard>.index.parquet, hex"),
        _field("failures", pa.map_(pa.string(), pa.int64()), "number of failed samples by code"),
        _field("masks", pa.map_(pa.string(), pa.int64()), "number of masks by kind"),
        _field("padded_views", pa.int64(), "views that no square inside the photo could hold, padded by reflection"),
    ],
    metadata={
        "about": "Commit records of shards. Each is written as `shards/<shard>.json` after its tar is on disk (that makes the "
        "shard done), and all are collected in `shard_records.parquet`."
    },
)
FAILURES = pa.schema(
    [
        _field("shard", pa.string(), "shard it was planned for"),
        _field("key", pa.string(), "key of the sample"),
        _field("split", pa.string(), "split of its photo"),
        _field("photo_id", pa.string(), "its photo"),
        _field("code", pa.string(), "what went wrong, as a code"),
        _field("detail", pa.string(), "what went wrong, in words"),
    ],
    metadata={"about": "Samples that could not be made (`failures.parquet`). planned = samples + failures."},
)

# Why a box is rejected, in the order in which the rules are asked.
REJECT_REASONS = {
    "bad_photo_id": "the photo's id is empty, too long, or has characters other than letters, digits, _ and -",
    "bad_box": "a coordinate is missing, not a number, outside [0, 1], or min >= max",
    "bad_flag": "a flag is missing or none of 1, 0, -1",
    "group_of": "the box spans a group of objects",
    "depiction": "a drawing or print of the object",
    "inside": "taken from inside the object",
    "occluded": "something covers a part of the object",
    "truncated": "the object goes on beyond the photo",
    "unknown_flag": "a flag that must not be set is unknown",
    "too_small": "area below selection.min_area",
    "too_large": "area above selection.max_area",
    "duplicate": "the same box, to the last digit and label, is in the source already",
}
# Why a sample cannot be made.
FAILURE_CODES = {
    **PHOTO_ERRORS,
    "no_square": "no square inside the photo holds the extended box, and views.no_square is reject",
}

TABLES = {
    "boxes": BOXES,
    "objects": OBJECTS,
    "rejects": REJECTS,
    "plan": PLAN,
    "shard records": SHARD_RECORDS,
    "failures": FAILURES,
    "index": INDEX,
}
