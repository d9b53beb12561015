"""The same photo under two ids: pairs, hashes of what a photo shows, and which photo is kept."""

import io
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images.decode import decode_photo
from pipelines.selection.duplicates import (
    MAX_DETAIL_DISTANCE,
    MAX_DISTANCE,
    are_among,
    by_place,
    keepers,
    near_pairs,
    perceptual_hash,
    read_scan,
    same_photos,
)
from pipelines.selection.rules import pairs_within
from schemas.tables import SAME_PHOTOS

HASHES = st.integers(0, 2**64 - 1)


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def saved_again(photo: np.ndarray, quality: int, scale: float) -> np.ndarray:
    """A copy as somebody would upload it: resized, compressed."""
    image = Image.fromarray(photo)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return decode_photo(file.getvalue(), frame="stored")


@pytest.fixture(scope="module")
def pictures(photos: Path) -> list[np.ndarray]:
    return [decode_photo(path.read_bytes(), frame="stored") for path in sorted(photos.glob("*/*.jpg"))]


@given(st.lists(st.integers(0, 5), max_size=30).map(sorted))
def test_every_pair_within_a_group_comes_once(groups):
    pairs = [pair for earlier, later in pairs_within(np.array(groups, np.int64)) for pair in zip(earlier, later, strict=True)]
    expected = [(i, j) for i, j in itertools.combinations(range(len(groups)), 2) if groups[i] == groups[j]]
    assert sorted(pairs) == expected


@given(
    seeds=st.lists(HASHES, min_size=1, max_size=8),
    flips=st.lists(st.sets(st.integers(0, 63), max_size=9), max_size=12),
    limit=st.integers(0, 8),
)
def test_near_pairs_are_those_that_brute_force_finds(seeds, flips, limit):
    """Hashes and slightly changed copies of them, so that many pairs lie on both sides of the limit."""
    changed = [seeds[number % len(seeds)] ^ sum(1 << bit for bit in bits) for number, bits in enumerate(flips)]
    hashes = seeds + changed
    expected = [[i, j] for i, j in itertools.combinations(range(len(hashes)), 2) if distance(hashes[i], hashes[j]) <= limit]
    assert near_pairs(np.array(hashes, np.uint64), limit).tolist() == expected


def test_copies_have_nearly_the_same_hash_and_other_photos_have_not(pictures):
    """The margin that all rests on. The tiny world is plainer than photographs: a few copies may be lost, but no pair made up."""
    hashes = [perceptual_hash(picture) for picture in pictures]
    assert all(hashes)
    for quality, scale in ((60, 0.7), (90, 0.5), (40, 1.0)):
        copies = [perceptual_hash(saved_again(picture, quality, scale)) for picture in pictures]
        found = [
            distance(hash.coarse, copy.coarse) <= MAX_DISTANCE and distance(hash.detail, copy.detail) <= MAX_DETAIL_DISTANCE
            for hash, copy in zip(hashes, copies, strict=True)
        ]
        assert np.mean(found) > 0.95
    others = list(itertools.combinations(hashes, 2))
    assert min(distance(one.coarse, other.coarse) for one, other in others) > MAX_DISTANCE
    assert np.mean([distance(one.detail, other.detail) for one, other in others]) == pytest.approx(32, abs=2)


def test_hashes_are_pinned():
    """A survey that is gone on with, or compared with another one, must hash as before."""
    squares = np.random.default_rng(0).integers(0, 255, (11, 13, 3)).astype(np.uint8)
    found = perceptual_hash(np.kron(squares, np.ones((30, 40, 1), np.uint8)))
    assert found == (0xCB07891FC1DE5B60, 0xADE74ED4AE814199)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(np.clip(levels, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize(
    "levels",
    [
        np.full((120, 160), 130.0),
        np.full((1, 1), 255.0),
        np.linspace(0, 255, 120)[:, None] * np.ones(160),
        np.linspace(60, 200, 120)[:, None] ** 1.01 * np.ones(160),
        np.random.default_rng(0).normal(128, 3, (300, 400)),
    ],
    ids=["flat", "one pixel", "gradient", "another gradient", "noise"],
)
def test_too_plain_a_photo_has_no_hash(levels):
    """Two skies would be declared the same photo; a gradient has a large variance, so that alone cannot tell."""
    assert perceptual_hash(grey(levels)) is None


PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(pairs=PAIRS, is_train=st.lists(st.booleans(), min_size=10, max_size=10), order=st.permutations(range(10)), data=st.data())
def test_the_photo_kept_is_the_best_that_pairs_lead_to(pairs, is_train, order, data):
    """Against plain search over the pairs, and whatever the order of the pairs is."""
    groups = [{number} for number in range(10)]
    for one, other in pairs:
        joined = groups[one] | groups[other]
        for member in joined:
            groups[member] = joined
    expected = [min(groups[number], key=lambda member: (is_train[member], order[member])) for number in range(10)]
    shuffled = data.draw(st.permutations(pairs))
    array = np.array(shuffled, np.int64).reshape(-1, 2)
    assert keepers(array, np.array(is_train), np.array(order, np.uint64)).tolist() == expected


def table(*rows: dict) -> pa.Table:
    schema = pa.schema(
        [
            *[(name, pa.string()) for name in ("split", "photo_id", "file_name", "original_md5", "url", "sha256")],
            *[(name, pa.uint64()) for name in ("perceptual_hash", "detail_hash")],
        ]
    )
    return pa.Table.from_pylist(list(rows), schema)


def photo(name: str, **hashes: object) -> dict:
    split, photo_id = name.split("/")
    return {"split": split, "photo_id": photo_id, **hashes}


def verdicts(photos: pa.Table) -> dict[str, tuple[str, str, int | None]]:
    """Photo -> photo kept, how it was found, distance."""
    found = same_photos(photos)
    assert found.schema.equals(SAME_PHOTOS)
    rows = found.to_pylist()
    return {
        f"{row['split']}/{row['photo_id']}": (f"{row['kept_split']}/{row['kept_photo_id']}", row["by"], row["distance"])
        for row in rows
    }


LOOKS = 0x0F1E_2D3C_4B5A_6978


def test_a_chain_over_several_hashes_is_one_photo_and_the_held_out_one_is_kept():
    """a, b, c and d agree only two by two, and each by something else; `by` tells the weakest hash that is needed."""
    photos = table(
        photo("validation/a", original_md5="m"),
        photo("train/b", original_md5="m", sha256="s"),
        photo("train/c", sha256="s", perceptual_hash=LOOKS, detail_hash=0),
        photo("train/d", perceptual_hash=LOOKS ^ 1, detail_hash=0),
        photo("train/e", original_md5="other", sha256="other", perceptual_hash=~LOOKS % 2**64, detail_hash=0),
        photo("test/f", perceptual_hash=LOOKS >> 8, detail_hash=7),
        photo("train/g", perceptual_hash=LOOKS >> 8 ^ 0b101, detail_hash=7 ^ 0b11),
    )
    assert verdicts(photos) == {
        "train/b": ("validation/a", "original_md5", None),
        "train/c": ("validation/a", "sha256", None),
        "train/d": ("validation/a", "perceptual_hash", None),
        "train/g": ("test/f", "perceptual_hash", 2),
    }


def test_a_file_name_in_two_splits_is_one_file_only_where_it_is_one(tmp_path):
    """`x.jpg` may lie in the photo folder, or be another file in each split's folder."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.jpg").write_bytes(b"")
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "x.jpg").write_bytes(b"")
    names = ["one/x.jpg", "one/x.jpg", "x.jpg", "x.jpg", "gone.jpg", "gone.jpg", "a\0b", "a\0b"]
    splits = ["train", "validation", "train", "validation", "train", "train", "train", "validation"]
    rows = [photo(f"{split}/{place}", file_name=name) for place, (split, name) in enumerate(zip(splits, names, strict=True))]
    places = ["one/x.jpg", "one/x.jpg", *(f"{split}/{name}" for split, name in list(zip(splits, names, strict=True))[2:])]
    assert by_place(table(*rows), tmp_path)["file_name"].to_pylist() == places


def test_what_is_not_known_is_not_the_same():
    """Nulls are no value: two photos of which nothing is known are two photos."""
    assert verdicts(table(photo("train/a", perceptual_hash=0, detail_hash=0), photo("train/b"), photo("train/c"))) == {}


def test_near_photos_are_the_same_only_if_their_detail_agrees():
    def found(coarse: int, detail: int) -> bool:
        one = photo("train/a", perceptual_hash=LOOKS, detail_hash=0)
        return bool(verdicts(table(one, photo("train/b", perceptual_hash=LOOKS ^ coarse, detail_hash=detail))))

    assert found((1 << MAX_DISTANCE) - 1, (1 << MAX_DETAIL_DISTANCE) - 1)
    assert not found((1 << (MAX_DISTANCE + 1)) - 1, 0)
    assert not found(0, (1 << (MAX_DETAIL_DISTANCE + 1)) - 1)


def test_tables_with_different_hashes_can_be_put_below_one_another():
    """Two rows of one photo join what both know, and are not two photos."""
    whole = photo("train/b", original_md5="m", sha256="s")
    rest = [photo("validation/a", original_md5="m"), photo("train/c", sha256="s")]
    divided = table(*rest, photo("train/b", original_md5="m"), photo("train/b", sha256="s"), photo("train/b"))
    assert verdicts(divided) == verdicts(table(*rest, whole))
    assert verdicts(divided.slice(0, 0)) == {}


def test_copies_by_the_thousand_do_not_make_pairs_by_the_million():
    """A placeholder of a photo that is gone: chained, not compared with one another (it would take minutes and 10 GB)."""
    count = 20_000
    rows = [photo(f"train/{number}", perceptual_hash=LOOKS, detail_hash=0) for number in range(count)]
    assert len(same_photos(table(*rows))) == count - 1


def test_a_scan_that_is_not_there_or_not_finished_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no survey here.*pipelines/survey\.py"):
        read_scan(tmp_path)
    (tmp_path / "photo_list.json").write_text("{}")
    pq.write_table(SAME_PHOTOS.empty_table(), tmp_path / "same_photos.parquet")
    with pytest.raises(InputError, match="not finished"):
        read_scan(tmp_path)
    (tmp_path / "survey.json").write_text("{}")
    assert len(read_scan(tmp_path).same) == 0


@given(few=st.lists(st.integers(0, 9), min_size=1), many=st.lists(st.integers(0, 12)))
def test_numbers_among_many(few, many):
    found = are_among(np.array(few, np.uint64), np.array(many, np.uint64))
    assert found.tolist() == [one in many for one in few]
