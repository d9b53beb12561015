"""The Arrow schema of every table that a stage hands to the next one, stored as Parquet.

    boxes ──selection──▶ objects + rejects ──plan──▶ plan ──pack──▶ shard records + index
                                  └──crawl──▶ photo status + photo index ──┘

Each field carries its meaning as metadata; `docs/data-format.md` is generated from it. Box coordinates are fractions of the
stored photo (x right, y down, origin at the top left). Flags are three-state as in Open Images: 1 yes, 0 no, -1 unknown.
"""

import pyarrow as pa

from schemas.outcomes import OK, OUTCOMES, PHOTO_ERRORS

FLAGS = ("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside")
COORDINATES = ("x_min", "x_max", "y_min", "y_max")
# Few different values, many rows: stored once each, and compared as numbers.
WORD = pa.dictionary(pa.int32(), pa.string())


def one_word(word: str, count: int) -> pa.DictionaryArray:
    """A column of type `WORD` that says one word `count` times."""
    return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), count), pa.array([word]))


# Nearly each row has another value, or that of the row before it: a dictionary of them would be begun, and found too large.
_AS_THEY_ARE = frozenset({"photo_id", "object_id", "key", *COORDINATES, "area_share", "row", "position"})


def with_dictionary(schema: pa.Schema) -> list[str]:
    """The columns that Parquet shall look for repeated values in; what `use_dictionary` of a writer takes."""
    return [name for name in schema.names if name not in _AS_THEY_ARE]


def with_plain_words(schema: pa.Schema) -> pa.Schema:
    """Fields of type `WORD` as strings: the dictionaries of many tables would have to be made one."""
    return pa.schema([field.with_type(pa.string()) if field.type == WORD else field for field in schema])


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"meaning": meaning})


def _nullable(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning})


def _plain(field: pa.Field) -> pa.Field:
    """A field within a struct, which may be null as a whole: nullable, and a word is a string there."""
    return pa.field(field.name, pa.string() if field.type == WORD else field.type, metadata=field.metadata)


_PHOTO = [
    _field("split", WORD, "train, validation or test: the source's own split, or by a hash of the photo where it has none"),
    _field("photo_id", pa.string(), "the photo's id: letters, digits, _ and - (Open Images: 16 hex digits)"),
]
_BOX = [
    _field("label", WORD, "class id as the source writes it (Open Images: a MID such as /m/01g317)"),
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
_SEGMENTATION = _nullable(
    "segmentation",
    pa.string(),
    "the object's own pixels: COCO's compressed RLE over the photo (column by column, `width` x `height`); null if not known",
)
_OBJECT_ID = _field(
    "object_id", pa.string(), "<photo_id>-<12 hex digits of a hash of label and coordinates>: the same in every build"
)
_GROUP = _nullable(
    "group", pa.string(), "the instance that the box shows: boxes of one group show one and the same; null where nobody says"
)
_SOURCE = [
    _nullable("file_name", pa.string(), "the photo's file below the photo folder; null where the id alone tells it"),
    _nullable("width", pa.int32(), "the photo's width in px, in the frame of its boxes; null if the tables do not say"),
    _nullable("height", pa.int32(), "the photo's height in px, likewise"),
    _nullable(
        "rotation",
        pa.int16(),
        "degrees counterclockwise (0, 90, 180, 270) by which photo and boxes are turned before use; null if unknown",
    ),
    _nullable("url", pa.string(), "where the photo was published; null if the source does not say"),
    _nullable("author", pa.string(), "the photo's author; null if the source does not say"),
    _nullable("licence", WORD, "the photo's licence, as a URL; null if the source does not say"),
]
# A reference from another photo, with all that cutting it takes; the fields mean what the columns of these names do.
REFERENCE = pa.struct(
    [
        pa.field("photo_id", pa.string()),
        *[pa.field(name, pa.float64()) for name in COORDINATES],
        pa.field("segmentation", pa.string()),
        *[pa.field(field.name, pa.string() if field.type == WORD else field.type) for field in _SOURCE],
    ]
)
_REFERENCES = _nullable(
    "references",
    pa.list_(REFERENCE),
    "boxes of other photos that show the same instance, in the order of ref_1.jpg, ref_2.jpg, ...; empty if there is none",
)

BOXES = pa.schema(
    [
        # A malformed row may lack anything; the selection rejects it by row.
        *[field.with_nullable(True) for field in (*_PHOTO, *_BOX)],
        _SEGMENTATION,
        _GROUP,
        _REFERENCES,
        _field("file", WORD, "name of the annotation file"),
        _field(
            "row",
            pa.int64(),
            "from 1: the line less one, for the header (CSV), the line (JSON Lines), or the place in `annotations` (COCO)",
        ),
        _nullable("problem", WORD, "what is wrong with the row by itself: a reason below; null if nothing is"),
        _nullable("detail", pa.string(), "what is wrong, in words, with the cell or key"),
    ],
    metadata={"about": "All boxes of the source, one row each, as the annotation reader yields them in record batches."},
)
MASKS = pa.schema(
    [
        *[field.with_nullable(True) for field in (*_PHOTO, *_BOX[:5])],
        # Said here alone: the meaning of the field in other tables is a part of their files, which stay as they are.
        _nullable(
            "segmentation",
            pa.string(),
            "the object's own pixels as the place of a PNG, of the photo's shape at any scale: `png:` and a list in JSON of "
            "where it counts from (`annotations`, `above`, the folder that holds that one, or `photos`), its path and, in a zip, "
            "name, start and length of its entry. `segmentation` of boxes, objects and plan may hold such a place, too",
        ),
    ],
    metadata={
        "about": "Object masks that the source has in tables of their own, as the annotation reader yields them in record "
        "batches: each belongs to the box of its photo, label and edges (to 1e-6)."
    },
)
PHOTOS = pa.schema(
    [
        *_PHOTO,
        *_SOURCE,
        _nullable("thumbnail_url", pa.string(), "where a smaller copy was published; null if the source does not say"),
        _nullable("original_md5", pa.string(), "MD5 of the published original, in base64; null if not known"),
        _nullable("original_bytes", pa.int64(), "size of the published original; null if not known"),
    ],
    metadata={"about": "What the source's tables say about its photos, as the annotation reader yields them in record batches."},
)
SURVEY = pa.schema(
    [
        *_PHOTO,
        _field("code", WORD, "`ok`, or why it cannot be used: a code of failures below"),
        _nullable("detail", pa.string(), "what is wrong, in words; null if nothing is"),
        _nullable("sha256", pa.string(), "SHA-256 of the file, hex; null if there is none"),
        _nullable("bytes", pa.int64(), "size of the file; null if there is none"),
        _nullable("width", pa.int32(), "width in px, in the frame of the boxes; null if it cannot be decoded"),
        _nullable("height", pa.int32(), "height in px, likewise"),
        _nullable(
            "perceptual_hash",
            pa.uint64(),
            "64-bit pHash of what the photo shows, by which copies are found; null if it cannot be decoded or shows too little",
        ),
        _nullable("detail_hash", pa.uint64(), "64 bits of finer detail, by which a copy is confirmed; null likewise"),
    ],
    metadata={
        "about": "What the photos' files are like (`photos.parquet` of a survey, and its `parts/`), one row per photo that has "
        "boxes, sorted by split and id."
    },
)
SAME_PHOTOS = pa.schema(
    [
        *_PHOTO,
        _field("kept_split", WORD, "split of the photo that is kept instead"),
        _field("kept_photo_id", pa.string(), "id of the photo that is kept instead"),
        _field(
            "by",
            WORD,
            "how the two were found to be the same: `file_name` if both are one file, `original_md5` if it takes equal hashes of "
            "the originals too, `url` if it takes equal URLs, `sha256` if it takes equal hashes of the files, "
            "`perceptual_hash` if it takes similar ones; each may lead through a third photo. `photo_id` if one id is in two "
            "splits",
        ),
        _nullable(
            "distance",
            pa.int8(),
            "where `by` is perceptual_hash: bits in which the two perceptual hashes differ, if both have one; else null",
        ),
    ],
    metadata={
        "about": "Photos that are there under another id too (`same_photos.parquet`), one row for each that is not the one kept. "
        "Kept is one of validation or test rather than train, then the one with the smallest hash of its name."
    },
)
OBJECTS = pa.schema(
    [
        *_PHOTO,
        _OBJECT_ID,
        *_BOX,
        _field("label_name", WORD, "class name for people; the class id where the source names none"),
        _field("area_share", pa.float64(), "box area / photo area"),
        _SEGMENTATION,
        *_SOURCE,
    ],
    metadata={
        "about": "Accepted boxes (`objects.parquet`), sorted by split, then by a hash of the photo, then by a hash of the object."
    },
)
REJECTS = pa.schema(
    [
        *[field for field in BOXES if field.name not in ("problem", "detail", "segmentation", "group", "references")],
        _field("reason", WORD, "the first rule that the box breaks, in the order below"),
        _nullable("reasons", pa.list_(pa.string()), "all rules that it breaks, where `selection.all_reasons` is set; else null"),
        _nullable("detail", pa.string(), "for malformed rows: what is wrong, in words; else null"),
    ],
    metadata={"about": "Boxes that were not accepted (`rejects.parquet`), with the reason. objects + rejects = boxes."},
)
PLAN = pa.schema(
    [
        _field("shard", pa.string(), "name of the shard, <split>-<6 digits>; a shard's rows stand together, in one row group"),
        _field("position", pa.int32(), "place of the sample in its shard"),
        _field("key", pa.string(), "key of the sample, <object_id>_<view>"),
        _field("view", pa.int32(), "number of the view of this object"),
        *OBJECTS,
    ],
    metadata={
        "about": "The plan (`plan.parquet`): one row per sample to be made, all that packing needs to know. The footer's "
        "metadata have `shards`, a JSON object: shard -> planned samples, in order."
    },
)
PAIRED = (_GROUP, _REFERENCES)
"""Further columns of objects and plan, in datasets whose source says which boxes show the same instance."""


def paired(schema: pa.Schema) -> pa.Schema:
    """`OBJECTS` or `PLAN` with the columns `PAIRED`."""
    return pa.schema([*schema, *PAIRED], metadata=schema.metadata)


_PHOTO_KEY = _field("key", pa.uint64(), "hash of split and id: photos are sorted by it, so that hosts and classes are mixed")
_TIME = pa.timestamp("ms", tz="UTC")
_STATUS = [
    _field("code", WORD, "what became of the photo, as a code below"),
    _field("transient", pa.bool_(), "whether asking again may help"),
    _nullable("detail", pa.string(), "what went wrong, in words, at each source; null if nothing did"),
    _field("attempts", pa.int16(), "how often it was asked for, over all sources, when it was last wanted"),
    _field("asked_at", _TIME, "when it was last asked for"),
    _field("source", WORD, "the entry of crawl.sources that gave it, or that was asked last"),
    _nullable("url", pa.string(), "what was asked for last, after redirects; null for local files"),
    _nullable("http_status", pa.int16(), "of the last answer; null if there was none"),
]
_PLACE = [
    _field("file", WORD, "the tar that holds the photo, below the store; or the absolute path of a file that is used in place"),
    _field("offset", pa.int64(), "where the photo's bytes begin in it"),
    _field("length", pa.int64(), "how many bytes these are"),
    _field("sha256", pa.string(), "SHA-256 of these, hex; checked whenever they are read"),
    _field("width", pa.int32(), "width in px, as stored"),
    _field("height", pa.int32(), "height in px, as stored"),
    _nullable("exif_orientation", pa.int8(), "EXIF orientation, 1 to 8; null if there is none"),
    _field("verified", pa.bool_(), "whether the metadata's OriginalMD5 vouches for these bytes"),
    _field("fetched_at", _TIME, "when these bytes came"),
    _nullable("etag", pa.string(), "the answer's ETag; null if it had none"),
    _nullable("last_modified", pa.string(), "the answer's Last-Modified; null if it had none"),
]
PHOTO_STATUS = pa.schema(
    [_PHOTO_KEY, *_PHOTO, *_STATUS],
    metadata={
        "about": "What became of every photo that was ever wanted (`status.parquet` of a photo store), one row each; "
        "`failures.parquet` holds those rows whose code is not `ok`."
    },
)
PHOTO_INDEX = pa.schema(
    [_PHOTO_KEY, *_PHOTO, *_PLACE, *[field for field in _STATUS if field.name in ("source", "url", "http_status")]],
    metadata={
        "about": "Where each photo lies (`index.parquet` of a photo store), one row for each with code `ok`; "
        "`quarantine.parquet` likewise for those with code `placeholder`."
    },
)
STORED_PHOTOS = pa.schema(
    [_PHOTO_KEY, *_PHOTO, *_STATUS, *[field.with_nullable(True) for field in _PLACE]],
    metadata={"about": "What one part of a crawl found (`parts/*.parquet` of a photo store): status and place of its photos."},
)
WANTED = pa.schema(
    [
        _PHOTO_KEY,
        *_PHOTO,
        *[field for field in PHOTOS if field.name in ("file_name", "url", "thumbnail_url", "original_md5", "original_bytes")],
        _nullable("tar", WORD, "a tar of photos that has it, as an absolute path; null if none has"),
        _nullable("tar_offset", pa.int64(), "where the photo's bytes begin in it"),
        _nullable("tar_length", pa.int64(), "how many bytes these are"),
        _nullable("skip", pa.int16(), "how many of crawl.sources are passed over: they gave a placeholder"),
        _nullable(
            "before",
            pa.struct([_plain(field) for field in PHOTO_INDEX if field.name not in ("key", "split", "photo_id")]),
            "where it is asked for again: its row of the photo index, or of the quarantine",
        ),
    ],
    metadata={
        "about": "What one run of a crawl sets out to get (`rounds/*.parquet` of a photo store), frozen before it begins; each "
        "row group becomes one part."
    },
)
MEMBER_LOCATION = pa.struct(
    [
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),
    ]
)
INDEX = pa.schema(
    [
        _field("key", pa.string(), "key of the sample"),
        _field("split", pa.string(), "split of its photo"),
        _field("shard", pa.string(), "name of its shard; the file is shards/<shard>.tar"),
        _field("position", pa.int32(), "place in the shard"),
        _field("object_id", pa.string(), "the object it shows"),
        _field("label", pa.string(), "class id"),
        _field("label_name", pa.string(), "class name"),
        _field("latent_npy", MEMBER_LOCATION, "byte range of latent.npy in the tar, and CRC-32 of these bytes"),
        _field("mask_json", MEMBER_LOCATION, "byte range of mask.json"),
        _field("masked_npy", MEMBER_LOCATION, "byte range of masked.npy"),
        _field("ref_jpg", MEMBER_LOCATION, "byte range of ref.jpg"),
        _field("json", MEMBER_LOCATION, "byte range of json"),
        _nullable("view_jpg", MEMBER_LOCATION, "byte range of view.jpg; null where views are not kept"),
    ],
    metadata={
        "about": "Random access (`index.parquet`): where each member of each sample lies, and the CRC-32 of its bytes "
        "(that of zlib). Sorted by shard and position."
    },
)
REFERENCE_PLACES = _nullable(
    "refs_jpg", pa.list_(MEMBER_LOCATION), "byte ranges of ref_1.jpg, ref_2.jpg, ...; empty where there is no other photo"
)
"""A further column of the index, in datasets with references from other photos."""
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
        _field("index_bytes", pa.int64(), "size of shards/<shard>.index.parquet"),
        _field("index_sha256", pa.string(), "its SHA-256, hex"),
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
        _nullable("file_name", pa.string(), "the photo's file, where the source names files"),
        _field("code", pa.string(), "what went wrong, as a code"),
        _field("detail", pa.string(), "what went wrong, in words"),
    ],
    metadata={"about": "Samples that could not be made (`failures.parquet`). planned = samples + failures."},
)

# Why a box is rejected, in the order in which the first reason is looked for.
REJECT_REASONS = {
    "bad_row": "the row cannot be read: too few or too many cells, a missing key, text that is no UTF-8",
    "bad_photo_id": "the photo's id is empty, too long, or has characters other than letters, digits, _ and -",
    "no_label": "the label is empty",
    "bad_number": "a coordinate is missing or not a number",
    "outside_photo": "a coordinate lies outside the photo",
    "empty_box": "the box has no area: min >= max",
    "bad_flag": "a flag is none of 1, 0, -1; an empty one is unknown",
    "unknown_label": "the label is not in the source's list of classes",
    "unknown_photo": "the photo is not in the source's list of photos, or its file, whose size is needed, cannot be read",
    "left_out": "the object or its photo is in the list selection.leave_out",
    "same_photo": "the photo is there under another id too, and that one is kept",
    "group_in_two_splits": "the group has boxes in a split that is kept rather than this one (test, validation, train)",
    "not_in_subset": "the photo is not in the seeded subset",
    "label_excluded": "the label is not in selection.include_labels, or in selection.exclude_labels",
    "group_of": "the box spans a group of objects",
    "depiction": "a drawing or print of the object",
    "inside": "taken from inside the object",
    "occluded": "something covers a part of the object",
    "truncated": "the object goes on beyond the photo",
    "unknown_flag": "a flag that must not be set is unknown",
    "too_small": "area below selection.min_area",
    "too_large": "area above selection.max_area",
    "reference_too_small": "the box's shorter side is below selection.min_side px",
    "too_elongated": "the box's longer side is more than selection.max_aspect times the shorter one",
    "reference_too_empty": "the outline covers less than selection.min_object_share of a reference that is cut out by it",
    "duplicate": "the same box, to the last digit and label, is in the source already",
    "near_duplicate": "a larger box of the photo overlaps this one by selection.near_duplicate_iou or more",
    "nested": "a larger box of the photo holds selection.nested_share or more of this one",
    "over_photo_cap": "the photo has selection.max_per_photo objects already",
    "over_class_cap": "the class has as many objects as selection.max_per_class and class_smoothing allow",
    "no_other_photo": "no other photo shows the instance, and references.alone is reject",
}
# Why a sample cannot be made.
FAILURE_CODES = {
    **PHOTO_ERRORS,
    **{code: outcome.meaning for code, outcome in OUTCOMES.items() if code != OK and code not in PHOTO_ERRORS},
    "not_crawled": "the photo store has no word of it: the crawl was stopped before, or is of other objects",
    "changed": "the photo is not what it was when it was crawled: its bytes have another SHA-256, or are gone",
    "shape_mismatch": "the photo has another shape than the annotations say: boxes and pixels do not belong together",
    "bad_mask": "the file of the object's mask is gone, is damaged, or has another shape than the photo",
    "reference_too_empty": "the outline covers less than selection.min_object_share of the reference, known only from the mask's "
    "file",
    "reference_too_small": "the box's shorter side is below selection.min_side px, known only from the photo itself",
    "too_elongated": "the box is more elongated than selection.max_aspect, known only from the photo itself",
    "no_square": "no square inside the photo holds the extended box, and views.no_square is reject",
    "no_reference": "none of its references from other photos can be cut, and references.alone is reject",
    "enlarged": "the photo is so small that its view would be resized up by more than views.max_enlargement",
}

TABLES = {
    "boxes": BOXES,
    "masks": MASKS,
    "photos": PHOTOS,
    "survey": SURVEY,
    "same photos": SAME_PHOTOS,
    "objects": OBJECTS,
    "rejects": REJECTS,
    "plan": PLAN,
    "shard records": SHARD_RECORDS,
    "failures": FAILURES,
    "index": INDEX,
    "wanted photos": WANTED,
    "stored photos": STORED_PHOTOS,
    "photo status": PHOTO_STATUS,
    "photo index": PHOTO_INDEX,
}
