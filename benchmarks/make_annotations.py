"""Write annotations of Open Images' size and shape, made up from a seed: something to measure with, and to share.

    OUT/train-annotations-bbox.csv                    14.6 M boxes; with --files N: train-annotations-bbox-00000-of-0000N.csv, ...
    OUT/train-images-boxable-with-rotation.csv        1.74 M photos
    OUT/class-descriptions-boxable.csv                600 classes, the most frequent first
    OUT/bbox_labels_600_hierarchy.json                which class is a kind or a part of which

Usage:  python -m benchmarks.make_annotations --out DIR --rows 14_600_000 --photos 1_743_042 --seed 0

There are no photos behind them: what is made is what a selection reads. The shares below are Open Images' own where those are
published (Kuznetsova et al., The Open Images Dataset V4, IJCV 2020); the rest is set so that, as there, the paper's area rule
accepts half of the boxes and leaves one photo in three without any. All shares hold for any size with the same boxes per photo.

Rows are drawn chunk by chunk of photos, each from a generator named after seed and chunk, so the same arguments give the same
bytes. Grouped (as published: sorted by photo) they are written as they are drawn; shuffled, the same rows are all held first,
28 bytes a box.
"""

import argparse
import gzip
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32, Int64, UInt8, UInt64
from tqdm import tqdm

from pbe_core.randomness import generator, mix, name_hash

BOX_FILE = "train-annotations-bbox"
PHOTO_FILE = "train-images-boxable-with-rotation"
CLASS_FILE = "class-descriptions-boxable.csv"
HIERARCHY_FILE = "bbox_labels_600_hierarchy.json"
EDGES = ("XMin", "XMax", "YMin", "YMax")
# Frequencies among boxes whose flags are known, as published.
FLAG_SHARES = {"IsOccluded": 0.6606, "IsTruncated": 0.2509, "IsGroupOf": 0.0599, "IsDepiction": 0.0545, "IsInside": 0.0024}
BOX_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence", *EDGES, *FLAG_SHARES)
PHOTO_COLUMNS = (
    *("ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title"),
    *("OriginalSize", "OriginalMD5", "Thumbnail300KURL", "Rotation"),
)
TRAIN_ROWS = 14_600_000
TRAIN_PHOTOS = 1_743_042

CLASSES = 600
# The leaders in their published order, then roots of the larger groups; all others are numbered.
NAMED_CLASSES = (
    *("Clothing", "Man", "Tree", "Person", "Woman", "Human face", "Footwear", "Flower", "Plant", "Car"),
    *("Building", "Food", "Furniture", "Animal", "Vehicle"),
)
PARENTS = {"Man": "Person", "Woman": "Person", "Footwear": "Clothing", "Tree": "Plant", "Flower": "Plant", "Car": "Vehicle"}
PARTS = {"Human face": "Person"}
ROOT = "Entity"  # Stands in the hierarchy alone, as there: no box has it.
INNER_EVERY = 9  # Every ninth numbered class has others below it; 90 of 600 there.
ROOT_SHARE = 0.15
PART_SHARE = 0.03
SECOND_PARENT_SHARE = 0.03
DEEPEST = 5

MOST_BOXES = 700  # In one photo.
BOXES_SPREAD = 1.1  # Standard deviation of the logarithm of a photo's number of boxes.
# log(area / rest of the photo) of a box: for a photo's only box; less by this, times log(boxes); spread between, within photos.
AREA_ODDS = 0.5
CROWDING = 1.3
PHOTO_SPREAD = 3.0
BOX_SPREAD = 0.6
SMALLEST_AREA = 2e-5
ASPECT_SPREAD = 0.5
NEAR_DUPLICATE_SHARE = 0.02
NESTED_SHARE = 0.06
DUPLICATE_SHARE = 2e-4
JITTER = 0.005  # Of the box's side, each way.
SAME_LABEL_SHARE = 0.5  # A box has the label of the one before it in its photo: windows come in rows.
FLAGLESS_SHARE = 0.08  # "activemil" boxes: all their flags are -1.

SHARED_MD5_SHARE = 0.001
ROTATIONS = {"0.0": 0.969, "90.0": 0.012, "180.0": 0.001, "270.0": 0.013, "": 0.005}
PHOTOS_PER_AUTHOR = 20

CHUNK_PHOTOS = 16_384
CHUNK_ROWS = 131_072  # Of shuffled rows.
FILE_BUFFER_BYTES = 1 << 20
NOTHING, EMPTY_LABEL, EMPTY_EDGE, EMPTY_FLAG, EDGES_SWAPPED, NOT_A_NUMBER = range(6)
DEFECTS = NOT_A_NUMBER
BOX = np.dtype(
    [("photo", "<i4"), ("label", "<i2"), ("edges", "<i4", 4), ("flags", "i1", len(FLAG_SHARES)), ("defect", "i1")], align=False
)
Order = Literal["grouped", "shuffled"]
Boxes = np.ndarray  # One record of BOX each: photo and class by number, edges in millionths in the order of EDGES.


@dataclass(frozen=True)
class Vocabulary:
    """The classes, most frequent first."""

    ids: tuple[str, ...]
    names: tuple[str, ...]
    shares: tuple[float, ...]
    hierarchy: dict[str, Any]


@cache
def vocabulary() -> Vocabulary:
    """The 600 classes: always the same, so that settings may name them."""
    names = tuple(NAMED_CLASSES) + tuple(f"Thing {number:03d}" for number in range(len(NAMED_CLASSES), CLASSES))
    ids = {name: class_id(name) for name in (*names, ROOT)}
    if len(set(ids.values())) != len(ids):
        raise AssertionError("two classes have the same id: change class_id")
    # Zipf-Mandelbrot with an exponential tail: the first class has a tenth of all boxes, the last ones some dozens of 14.6 M.
    rank = np.arange(CLASSES)
    weights = (rank + 5.0) ** -1.3 * np.exp(-rank / 150)
    return Vocabulary(tuple(ids[name] for name in names), names, tuple(weights / weights.sum()), hierarchy(names, ids))


def class_id(name: str) -> str:
    """A made-up id of the form of Open Images' MIDs, such as /m/04yx4."""
    letters, number = "0123456789bcdfghjklmnpqrstvwxyz_", name_hash("class id", name)
    return "/m/0" + "".join(letters[number >> shift & 31] for shift in (0, 5, 10, 15, 20))


def hierarchy(names: tuple[str, ...], ids: dict[str, str]) -> dict[str, Any]:
    """Open Images' nested objects: `LabelName`, then `Subcategory` and `Part` where there are any. Some classes stand in two."""
    random = generator("class hierarchy")
    below: dict[str, dict[str, list[str]]] = {name: {"Subcategory": [], "Part": []} for name in (*names, ROOT)}
    depth = {ROOT: 0}
    inner: list[str] = []
    for number, name in enumerate(sorted(names, key=lambda name: name in PARENTS or name in PARTS)):
        if name in NAMED_CLASSES:
            parent, kind = PARENTS.get(name) or PARTS.get(name) or ROOT, "Part" if name in PARTS else "Subcategory"
        else:
            parent = ROOT if random.random() < ROOT_SHARE else inner[random.integers(len(inner))]
            kind = "Part" if random.random() < PART_SHARE and parent != ROOT else "Subcategory"
        below[parent][kind].append(name)
        depth[name] = depth[parent] + 1
        if parent != ROOT and random.random() < SECOND_PARENT_SHARE:
            # A second place above all that may hold it, so that no class can come to lie below itself.
            below[ROOT]["Subcategory"].append(name)
        is_group = name in NAMED_CLASSES and parent == ROOT
        if is_group or (name not in NAMED_CLASSES and number % INNER_EVERY == 0 and depth[name] < DEEPEST):
            inner.append(name)

    def node(name: str) -> dict[str, Any]:
        children = {kind: [node(child) for child in below[name][kind]] for kind in ("Subcategory", "Part")}
        return {"LabelName": ids[name], **{kind: nodes for kind, nodes in children.items() if nodes}}

    return node(ROOT)


def boxes_per_photo(rows: int, photos: int, seed: int) -> Int64[np.ndarray, " photos"]:
    """How many boxes each photo has: at least 1, log-normal, `rows` in all."""
    random = generator("boxes per photo", seed)
    mean = np.log(rows / photos) - BOXES_SPREAD**2 / 2
    counts = np.clip(np.rint(random.lognormal(mean, BOXES_SPREAD, photos)), 1, MOST_BOXES).astype(np.int64)
    while missing := rows - int(counts.sum()):
        able = np.flatnonzero(counts > 1) if missing < 0 else np.flatnonzero(counts < MOST_BOXES)
        counts[random.choice(able, min(abs(missing), len(able)), replace=False)] += np.sign(missing)
    return counts


def photo_ids(photos: int, seed: int) -> UInt64[np.ndarray, " photos"]:
    """Ascending 64-bit numbers without repetition: one at a random place in each of `photos` equal stretches."""
    stretch = 2**64 // photos
    places = generator("photo ids", seed).integers(0, stretch, photos, np.uint64)
    ids: np.ndarray = np.arange(photos, dtype=np.uint64) * np.uint64(stretch) + places
    return ids


def draw_boxes(counts: Int64[np.ndarray, " photos"], first_photo: int, seed: int) -> Boxes:
    """The boxes of one chunk of photos, sorted by photo; `first_photo` is the number of the first of them."""
    random = generator("boxes", seed, first_photo)
    photos, rows = len(counts), int(counts.sum())
    photo = np.repeat(np.arange(photos), counts)
    opens_photo = np.zeros(rows, bool)
    opens_photo[np.cumsum(counts) - counts] = True

    photo_odds = AREA_ODDS - CROWDING * np.log(counts) + PHOTO_SPREAD * random.standard_normal(photos)
    odds = photo_odds[photo] + BOX_SPREAD * random.standard_normal(rows)
    log_area = np.maximum(-np.log1p(np.exp(-odds)), np.log(SMALLEST_AREA))
    # An aspect beyond the area's own would make a side longer than the photo's.
    log_aspect = np.clip(ASPECT_SPREAD * random.standard_normal(rows), log_area, -log_area)
    width, height = np.exp((log_area + log_aspect) / 2), np.exp((log_area - log_aspect) / 2)
    truncated = random.random(rows) < FLAG_SHARES["IsTruncated"]
    edge = random.integers(0, 4, rows)
    # A truncated object ends where the photo does.
    left = np.where(truncated & (edge < 2), edge, random.random(rows)) * (1 - width)
    top = np.where(truncated & (edge >= 2), edge - 2, random.random(rows)) * (1 - height)
    corners = np.stack([left, left + width, top, top + height], axis=1)

    derived = np.where(opens_photo, 1.0, random.random(rows))
    near = derived < NEAR_DUPLICATE_SHARE
    nested = ~near & (derived < NEAR_DUPLICATE_SHARE + NESTED_SHARE)
    same = ~near & ~nested & (derived < NEAR_DUPLICATE_SHARE + NESTED_SHARE + DUPLICATE_SHARE)
    original = ~(near | nested | same)
    # The nearest row before each that was drawn by itself; the photo's first row always was.
    model = np.maximum.accumulate(np.where(original, np.arange(rows), 0))
    corners = corners[model]
    sides = np.stack([corners[:, 1] - corners[:, 0]] * 2 + [corners[:, 3] - corners[:, 2]] * 2, axis=1)
    corners[near] += sides[near] * random.uniform(-JITTER, JITTER, (int(near.sum()), 4))
    shares = random.uniform(0.3, 0.9, (int(nested.sum()), 2))
    places = random.random(shares.shape) * (1 - shares)
    corners[nested] = corners[nested][:, [0, 0, 2, 2]] + sides[nested] * np.stack(
        [places[:, 0], places[:, 0] + shares[:, 0], places[:, 1], places[:, 1] + shares[:, 1]], axis=1
    )

    label = random.choice(CLASSES, rows, p=vocabulary().shares)
    repeats = ~opens_photo & (random.random(rows) < SAME_LABEL_SHARE)
    label = label[np.maximum.accumulate(np.where(repeats, 0, np.arange(rows)))]
    label = np.where(same, label[model], label)
    label = np.where(near & (label == label[model]), (label + 1) % CLASSES, label)

    flags = random.random((rows, len(FLAG_SHARES))) < np.array(list(FLAG_SHARES.values()))
    flags[:, list(FLAG_SHARES).index("IsTruncated")] = truncated
    boxes = np.zeros(rows, BOX)
    boxes["photo"] = photo + first_photo
    boxes["label"] = label
    boxes["edges"] = np.rint(np.clip(corners, 0, 1) * 1_000_000)
    boxes["flags"] = np.where(random.random((rows, 1)) < FLAGLESS_SHARE, -1, flags)[np.where(same, model, np.arange(rows))]
    return boxes


def chunks_of_boxes(counts: Int64[np.ndarray, " photos"], seed: int, malformed_share: float) -> Iterator[Boxes]:
    """All boxes in the order of their photos, some rows marked as malformed: each kind of defect in its turn."""
    rows = int(counts.sum())
    malformed = np.zeros(rows, np.int8)
    count = max(round(rows * malformed_share), int(malformed_share > 0))
    places = generator("malformed", seed).choice(rows, count, replace=False)
    malformed[places] = 1 + np.arange(len(places)) % DEFECTS
    done = 0
    for first in range(0, len(counts), CHUNK_PHOTOS):
        boxes = draw_boxes(counts[first : first + CHUNK_PHOTOS], first, seed)
        boxes["defect"] = malformed[done : done + len(boxes)]
        done += len(boxes)
        yield boxes


def shuffled(chunks: Iterator[Boxes], rows: int, seed: int) -> Iterator[Boxes]:
    """The same rows in random order. Holds all of them."""
    everything = np.empty(rows, BOX)
    done = 0
    for boxes in chunks:
        everything[done : done + len(boxes)] = boxes
        done += len(boxes)
    order = generator("order", seed).permutation(np.arange(rows, dtype=np.int32))
    for first in range(0, rows, CHUNK_ROWS):
        yield everything[order[first : first + CHUNK_ROWS]]


def box_lines(boxes: Boxes, ids: UInt64[np.ndarray, " photos"]) -> pa.Array:
    """The CSV's lines, each with its line feed."""
    defect = boxes["defect"]
    edges = boxes["edges"].copy()
    swapped = defect == EDGES_SWAPPED
    edges[swapped, :2] = edges[swapped, 1::-1]
    texts = [decimals(edges[:, place]) for place in range(len(EDGES))]
    texts[0] = pc.if_else(pa.array(defect == EMPTY_EDGE), "", texts[0])
    texts[0] = pc.if_else(pa.array(defect == NOT_A_NUMBER), "NaN", texts[0])
    flags = [pa.array(["-1", "0", "1"]).take(pa.array(flag + 1)) for flag in boxes["flags"].T]
    flags[0] = pc.if_else(pa.array(defect == EMPTY_FLAG), "", flags[0])
    label = pc.if_else(pa.array(defect == EMPTY_LABEL), "", pa.array(vocabulary().ids).take(pa.array(boxes["label"])))
    source = pa.array(["activemil", "xclick"]).take(pa.array((boxes["flags"][:, 0] >= 0).astype(np.int8)))
    return lines(len(boxes), hexadecimal(ids[boxes["photo"]]), source, label, "1", *texts, *flags)


def photo_lines(numbers: Int64[np.ndarray, " rows"], md5_of: Int64[np.ndarray, " rows"], ids: pa.Array, seed: int) -> pa.Array:
    """The CSV's lines for a chunk of photos.

    Args:
        numbers: of the photos.
        md5_of: the number of the photo whose published original each one is: its own, or that of a photo it repeats.
        ids: of the photos, as text.
        seed: the same for all.
    """
    random = generator("photo table", seed, int(numbers[0]))
    count = len(numbers)
    number = pa.array(numbers).cast(pa.string())
    author = pa.array((random.random(count) ** 2 * max(1, TRAIN_PHOTOS // PHOTOS_PER_AUTHOR)).astype(np.int64)).cast(pa.string())
    # RFC 2606 keeps .example for such uses: nobody's server is asked for a photo that never was.
    page = pc.binary_join_element_wise("https://photos.example/", author, "/", number, "")
    profile = pc.binary_join_element_wise("https://photos.example/people/", author, "/", "")
    name = pc.binary_join_element_wise("Author ", author, "")
    quoted_name = pc.binary_join_element_wise('"', name, ', the ""younger"""', "")
    name = pc.if_else(pa.array(random.random(count) < 0.05), quoted_name, name)
    title = titles().take(pa.array(random.integers(0, len(titles()), count)))
    original = mix(md5_of.astype(np.uint64) ^ np.uint64(name_hash("original", seed)))
    size = pa.array((200_000 + original % np.uint64(6_000_000)).astype(np.int64)).cast(pa.string())
    rotation = pa.array(list(ROTATIONS)).take(pa.array(random.choice(len(ROTATIONS), count, p=list(ROTATIONS.values()))))
    return lines(
        count,
        *(ids, "train"),
        pc.binary_join_element_wise("https://files.photos.example/", ids, "_o.jpg", ""),
        page,
        "https://creativecommons.org/licenses/by/2.0/",
        *(profile, name, title, size, base64_digests(original)),
        pc.binary_join_element_wise("https://thumbnails.photos.example/", ids, "_z.jpg", ""),
        rotation,
    )


@cache
def titles() -> pa.Array:
    """Titles as they stand in a CSV: some empty, some quoted for their commas or quotes."""
    places = ("Harbour", "Old mill", "Market", "Bridge", "Garden", "Station", "Lake", "Museum", "Park", "Hill", "Beach", "Tower")
    plain = [f"{place} {number}" for place in places for number in range(60)]
    commas = [f'"{place}, {number}"' for place in places for number in range(20)]
    quotes = [f'"The ""{place}"" again, {number}"' for place in places for number in range(4)]
    return pa.array([*plain, *commas, *quotes, *[""] * 10])


def originals(photos: int, seed: int) -> Int64[np.ndarray, " photos"]:
    """For each photo the number of the one whose original it shows: mostly its own; some photos are there twice."""
    pairs = generator("shared originals", seed).choice(photos, (round(photos * SHARED_MD5_SHARE / 2), 2), replace=False)
    of = np.arange(photos)
    of[pairs[:, 0]] = pairs[:, 1]
    return of


def lines(rows: int, *columns: pa.Array | str) -> pa.Array:
    """Cells joined by commas. As published, a cell is quoted only where it must be; Arrow's own writer quotes all text."""
    whole = pc.binary_join_element_wise(*columns, ",")
    return pc.binary_join_element_wise(whole, pa.repeat("\n", rows), "")


def decimals(millionths: Int32[np.ndarray, " rows"]) -> pa.Array:
    """Numbers from 0 to 1 with six decimals."""
    digits = np.empty((len(millionths), 8), np.uint8)
    rest = millionths.astype(np.int64)
    for place in (7, 6, 5, 4, 3, 2, 0):
        rest, digit = np.divmod(rest, 10)
        digits[:, place] = digit + ord("0")
    digits[:, 1] = ord(".")
    return fixed_width(digits)


def hexadecimal(numbers: UInt64[np.ndarray, " rows"]) -> pa.Array:
    """Sixteen hexadecimal digits each."""
    octets = numbers.astype(">u8").view(np.uint8).reshape(-1, 8)
    nibbles = np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1, 16)
    return fixed_width(np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles])


def base64_digests(numbers: UInt64[np.ndarray, " rows"]) -> pa.Array:
    """A made-up digest of 16 bytes for each number, in base64: 24 letters."""
    octets = np.zeros((len(numbers), 18), np.uint8)
    octets[:, :8] = numbers.astype(">u8").view(np.uint8).reshape(-1, 8)
    octets[:, 8:16] = mix(numbers).astype(">u8").view(np.uint8).reshape(-1, 8)
    triples = octets.reshape(-1, 6, 3).astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    sextets = triples[:, :, None] >> np.array([18, 12, 6, 0], np.uint32) & np.uint32(63)
    letters = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", np.uint8)
    digests = letters[sextets.reshape(-1, 24)]
    digests[:, 22:] = ord("=")
    return fixed_width(digests)


def fixed_width(letters: UInt8[np.ndarray, "rows width"]) -> pa.Array:
    """ASCII letters as an Arrow string array."""
    rows, width = letters.shape
    offsets = np.arange(0, (rows + 1) * width, width, dtype=np.int32)
    return pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(letters)))


def text_of(array: pa.Array) -> memoryview:
    """The bytes of all strings of an array, one after the other, without a copy."""
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int32)
    return memoryview(data)[bounds[array.offset] : bounds[array.offset + len(array)]]


def open_table(path: Path, stack: ExitStack, compress: bool) -> BinaryIO | gzip.GzipFile:
    """Open a CSV for writing, with .gz behind its name where compressed; closed with the stack."""
    if not compress:
        return stack.enter_context(path.open("wb", buffering=FILE_BUFFER_BYTES))
    file = stack.enter_context(path.with_name(f"{path.name}.gz").open("wb", buffering=FILE_BUFFER_BYTES))
    # No name and no time in the header: the same arguments give the same bytes.
    return stack.enter_context(gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=file, mtime=0))


def write_boxes(
    out: Path, chunks: Iterator[Boxes], rows: int, ids: UInt64[np.ndarray, " photos"], files: int, compress: bool
) -> None:
    """Write the box CSV, or cut it into `files` of equal length: a photo's boxes may then lie in two."""
    names = [f"{BOX_FILE}-{number:05d}-of-{files:05d}.csv" for number in range(files)] if files > 1 else [f"{BOX_FILE}.csv"]
    ends = [rows * (number + 1) // files for number in range(files)]
    done, current = 0, -1
    with ExitStack() as stack, tqdm(total=rows, desc="boxes", unit=" boxes", unit_scale=True) as progress:
        for boxes in chunks:
            text = box_lines(boxes, ids)
            start = 0
            while start < len(boxes):
                if current < 0 or done == ends[current]:
                    current += 1
                    stack.close()
                    file = open_table(out / names[current], stack, compress)
                    file.write((",".join(BOX_COLUMNS) + "\n").encode())
                taken = min(len(boxes) - start, ends[current] - done)
                file.write(text_of(text.slice(start, taken)))
                start, done = start + taken, done + taken
            progress.update(len(boxes))


def write_photos(out: Path, ids: UInt64[np.ndarray, " photos"], seed: int, compress: bool) -> None:
    """Write the photo CSV."""
    shown = originals(len(ids), seed)
    with ExitStack() as stack, tqdm(total=len(ids), desc="photos", unit=" photos", unit_scale=True) as progress:
        file = open_table(out / f"{PHOTO_FILE}.csv", stack, compress)
        file.write((",".join(PHOTO_COLUMNS) + "\n").encode())
        for first in range(0, len(ids), CHUNK_PHOTOS):
            numbers = np.arange(first, min(first + CHUNK_PHOTOS, len(ids)))
            file.write(text_of(photo_lines(numbers, shown[numbers], hexadecimal(ids[numbers]), seed)))
            progress.update(len(numbers))


def make_annotations(
    out: Path,
    rows: int = TRAIN_ROWS,
    photos: int = TRAIN_PHOTOS,
    *,
    seed: int = 0,
    compress: bool = False,
    files: int = 1,
    order: Order = "grouped",
    malformed_share: float = 1e-5,
) -> None:
    """Write all files to a folder.

    Args:
        out: the folder; made if need be.
        rows: boxes in all, malformed ones among them.
        photos: photos in all; each has at least one box.
        seed: of all random choices.
        compress: gzip the box and photo CSVs.
        files: number of box CSVs.
        order: `grouped` by photo, or `shuffled`.
        malformed_share: share of rows with an empty cell, XMin >= XMax or NaN.

    Raises:
        ValueError: there are fewer rows than photos, or more than `MOST_BOXES` a photo.
    """
    if not photos <= rows <= photos * MOST_BOXES:
        raise ValueError(f"{rows} boxes do not fit {photos} photos: each has 1 to {MOST_BOXES}")
    out.mkdir(parents=True, exist_ok=True)
    classes = vocabulary()
    with (out / CLASS_FILE).open("w", newline="\n") as file:
        file.writelines(f"{label},{name}\n" for label, name in zip(classes.ids, classes.names, strict=True))
    (out / HIERARCHY_FILE).write_text(json.dumps(classes.hierarchy, indent=4) + "\n")
    ids = photo_ids(photos, seed)
    chunks = chunks_of_boxes(boxes_per_photo(rows, photos, seed), seed, malformed_share)
    write_boxes(out, shuffled(chunks, rows, seed) if order == "shuffled" else chunks, rows, ids, files, compress)
    write_photos(out, ids, seed, compress)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS, help="boxes in all (default: %(default)s)")
    parser.add_argument("--photos", type=int, default=TRAIN_PHOTOS, help="photos in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gzip", action="store_true", help="compress the box and photo CSVs")
    parser.add_argument("--files", type=int, default=1, help="number of box CSVs (default: %(default)s)")
    parser.add_argument("--order", choices=("grouped", "shuffled"), default="grouped", help="of the boxes (default: %(default)s)")
    parser.add_argument("--malformed", type=float, default=1e-5, help="share of malformed rows (default: %(default)s)")
    given = parser.parse_args()
    sizes = {"rows": given.rows, "photos": given.photos, "files": given.files, "malformed_share": given.malformed}
    try:
        make_annotations(given.out, seed=given.seed, compress=given.gzip, order=given.order, **sizes)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
