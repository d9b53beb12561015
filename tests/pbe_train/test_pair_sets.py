"""Pair sets: each layout gives the same pairs, contents alone make the fingerprint, and one line tells all that is wrong."""

import csv
import errno
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pbe_core.errors import InputError
from pbe_train.data.order import SampleLocation
from pbe_train.data.shards import ShardReader
from pbe_train.evaluation import pair_sets
from pbe_train.evaluation.held_out import read_held_out
from pbe_train.evaluation.pair_files import safe_id
from pbe_train.evaluation.pair_sets import Pair, draw_alike, draw_candidates, open_pairs, pairs_of_dataset
from tests.pbe_train.pair_worlds import box, make_cocoee, make_rows, picture, save, write_csv, write_jsonl
from tests.pbe_train.small_world import LABELS, World

IDS = [7, 12345, 3, 999999999999]


def same(one, other) -> bool:
    return all(np.array_equal(getattr(one, part), getattr(other, part)) for part in ("photo", "mask", "reference", "truth"))


def refusal(source: Path) -> str:
    """The one line that refuses a set."""
    with pytest.raises(InputError) as told:
        open_pairs(source)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_the_published_layout_is_read(tmp_path):
    pairs = open_pairs(make_cocoee(tmp_path / "set", IDS))
    assert [one.id for one in pairs.pairs] == ["000000000007", "000000012345", "000000000003", "999999999999"]
    assert (pairs.has_truth, pairs.name, {one.label for one in pairs.pairs}) == (False, str(tmp_path / "set"), {""})
    read = pairs.read(1)
    assert np.array_equal(read.photo, picture(12345))
    assert np.array_equal(read.mask, box(12345) == 255)
    assert np.array_equal(read.reference, picture(13345, 30, 24))
    assert read.truth is None
    assert pairs.size(1) == (48, 64)


def test_labels_stand_in_a_table_beside_the_folders(tmp_path):
    """Whatever else the table tells; ids with or without zeros."""
    make_cocoee(tmp_path, IDS)
    plain = open_pairs(tmp_path).fingerprint
    rows = [["7", "cat", "a.jpg", "coco"], ["000000012345", "dog", "b.jpg", "coco"], ["3", "cat", "c.jpg", "coco"]]
    write_csv(tmp_path / "pairs.csv", "id, label, photo, source", rows)
    labelled = open_pairs(tmp_path)
    assert [one.label for one in labelled.pairs] == ["cat", "dog", "cat", ""]
    assert labelled.fingerprint == plain


def test_every_layout_of_the_same_pictures_gives_the_same_pairs(tmp_path):
    rows = make_rows(tmp_path, range(1, 6))
    named = [{"id": f"0{number}", **row, "label": f"kind {number}"} for number, row in enumerate(rows, 1)]
    table = pa.Table.from_pylist([{"ID": number, **dict(list(row.items())[1:])} for number, row in enumerate(named, 1)])
    pq.write_table(table, tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", named)
    header = "id , image, Mask ,exemplar , ground_truth, category"
    write_csv(tmp_path / "rows.csv", f"\ufeff{header}", [list(row.values()) for row in named])
    for folder, role in (("photos", "p"), ("masks", "m"), ("references", "r"), ("truths", "t")):
        shutil.copytree(tmp_path / role, tmp_path / "own" / folder)
        for path in (tmp_path / "own" / folder).iterdir():
            path.rename(path.with_name(f"0{path.name}"))
    sets = {name: open_pairs(tmp_path / name) for name in ("rows.csv", "rows.jsonl", "own", "rows.parquet")}
    assert [one.id for one in sets["rows.csv"].pairs] == ["01", "02", "03", "04", "05"]
    assert [one.id for one in sets["rows.parquet"].pairs] == ["1", "2", "3", "4", "5"]
    assert sets["rows.csv"].pairs == sets["rows.jsonl"].pairs
    assert sets["rows.csv"].pairs[2] == Pair("03", "kind 3")
    assert len({one.fingerprint for name, one in sets.items() if name != "rows.parquet"}) == 1
    for number in range(5):
        first = sets["rows.csv"].read(number)
        assert np.array_equal(first.truth, picture(number + 2001))
        assert all(same(first, other.read(number)) and other.has_truth for other in sets.values())


def test_rows_without_ids_and_truths_are_numbered(tmp_path):
    rows = make_rows(tmp_path, range(3), truth=False)
    pairs = open_pairs(write_csv(tmp_path / "rows.csv", "photo,mask,ref,target", [[*row.values(), ""] for row in rows]))
    assert [one.id for one in pairs.pairs] == ["1", "2", "3"]
    assert not pairs.has_truth


def test_ids_become_names_of_files_and_stay_apart():
    names = ["cat 1", "cat/1", "cat_1", "cat.1", "../cat", "é", "x" * 300, "x" * 301, ""]
    ids = [safe_id(name) for name in names]
    assert len(set(ids)) == len(names)
    assert all(set(one) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for one in ids)
    assert all(0 < len(one) < 200 for one in ids)
    assert safe_id("validation0001-abc_0") == "validation0001-abc_0"


def test_the_fingerprint_is_that_of_ids_and_contents(tmp_path):
    print_of = {}
    for place in ("one", "other/place"):
        print_of[place] = open_pairs(make_cocoee(tmp_path / place, IDS)).fingerprint
    assert print_of["one"] == print_of["other/place"]
    shutil.copytree(tmp_path / "one", tmp_path / "shuffled")
    np.save(tmp_path / "shuffled" / "id_list.npy", np.array(IDS[::-1]))
    assert open_pairs(tmp_path / "shuffled").fingerprint == print_of["one"]
    np.save(tmp_path / "shuffled" / "id_list.npy", np.array(IDS[:3]))
    assert open_pairs(tmp_path / "shuffled").fingerprint != print_of["one"]
    # Reference and photo of a pair exchanged: the same files, another set.
    rows = [{"photo": "r/1.png", "mask": "m/1.png", "reference": "p/1.png"}]
    plain = [{"photo": "p/1.png", "mask": "m/1.png", "reference": "r/1.png"}]
    make_rows(tmp_path, [1])
    turned, straight = (open_pairs(write_jsonl(tmp_path / "rows.jsonl", each)).fingerprint for each in (rows, plain))
    assert turned != straight
    save(tmp_path / "one" / "GT_4" / f"{7:012d}_GT.png", picture(8))
    assert open_pairs(tmp_path / "one").fingerprint != print_of["one"]


def test_ids_without_files_are_told_in_one_line_and_files_without_ids_in_another(tmp_path, capsys):
    make_cocoee(tmp_path, range(100, 110))
    np.save(tmp_path / "id_list.npy", np.arange(102, 110))
    assert len(open_pairs(tmp_path).pairs) == 8
    told = capsys.readouterr().err
    assert told == f"{tmp_path}: files of 2 ids that id_list.npy does not name are left out: 000000000100, 000000000101\n"
    for number in range(103, 108):
        (tmp_path / "Ref_10" / f"{number:012d}_ref.png").unlink()
    (tmp_path / "Mask_bbox_10" / f"{102:012d}_mask.png").unlink()
    line = refusal(tmp_path)
    assert "1 in Mask_bbox_10 (000000000102)" in line
    assert "5 in Ref_10 (000000000103, 000000000104, 000000000105 and 2 more)" in line


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (np.array([1.5, 2]), "array of float64"),
        (np.array([[1, 2]]), r"array of int64 \[1, 2\]"),
        (np.array([{"a": 1}], dtype=object), "allow_pickle"),
        (np.array([3, -1]), "-1 is no id"),
        (np.array([3, 4, 3]), "1 id there more than once: 000000000003"),
        (np.array([], int), "no pair in it"),
    ],
)
def test_id_lists_that_are_none_are_refused(tmp_path, ids, told):
    make_cocoee(tmp_path, [3, 4])
    np.save(tmp_path / "id_list.npy", ids, allow_pickle=True)
    with pytest.raises(InputError, match=told):
        open_pairs(tmp_path)


def test_a_hostile_or_cut_id_list_is_one_line(tmp_path):
    make_cocoee(tmp_path, [3, 4])
    path = tmp_path / "id_list.npy"
    whole = path.read_bytes()
    lying = whole.replace(b"(2,), }" + b" " * 10, b"(2222222222,), }" + b" ")
    assert lying != whole
    for data in (whole[:100], whole[:-3], b"", b"PK\3\4", b"1\n2\n", lying):
        path.write_bytes(data)
        assert "id_list.npy: cannot be read" in refusal(tmp_path)
    path.unlink()
    assert "id_list.npy: missing" in refusal(tmp_path)


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    make_cocoee(tmp_path, [3, 4])

    def closed(path: Path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read (Permission denied)"


def test_folders_that_are_no_pair_set_are_refused(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "none")
    assert "no pair set" in refusal(tmp_path)
    make_cocoee(tmp_path / "set", [1, 2])
    (tmp_path / "set" / "GT_3500").mkdir()
    shutil.rmtree(tmp_path / "set" / "Ref_2")
    line = refusal(tmp_path / "set")
    assert "GT_2, GT_3500 both may be GT_*" in line
    assert "Ref_* is missing" in line
    save(tmp_path / "own" / "photos" / "a.png", picture(0))
    assert "no folder masks, references" in refusal(tmp_path / "own")
    save(tmp_path / "own" / "masks" / "a.png", box(0))
    save(tmp_path / "own" / "references" / "b.png", picture(0))
    assert "1 in references (a)" in refusal(tmp_path / "own")
    save(tmp_path / "own" / "photos" / "a.jpg", picture(0))
    assert "a.jpg and a.png are of one id" in refusal(tmp_path / "own")


def test_all_that_is_wrong_with_a_table_is_told_at_once(tmp_path):
    rows = make_rows(tmp_path, range(4))
    path = tmp_path / "rows.csv"
    write_csv(path, "picture,Mask,id,gt,target", [["a"] * 5])
    line = refusal(path)
    for part in ("`gt` and `target` both mean the truth", "no column `photo` and `reference`", "it has picture, Mask, id"):
        assert part in line
    write_csv(path, "photo,mask,reference", [["p/0.png", "m/0.png", "r/9.png"], ["", "m/1.png", "r/1.png"], *[["x"] * 3] * 3])
    line = refusal(path)
    for part in ("row 1: `reference`: there is no file", "r/9.png", "row 2: `photo` is empty", "3 other rows"):
        assert part in line
    write_csv(path, "photo,mask,reference", [["p/0.png", "m/0.png", "r/0.png", "r/1.png"]])
    assert "line 2: 4 cells, the header has 3" in refusal(path)
    several = [{**rows[0], "reference": ["r/0.png", "r/1.png"]}]
    assert "several references" in refusal(write_jsonl(tmp_path / "rows.jsonl", several))
    write_csv(path, "photo,mask,reference", [["p/0.png", "m/0.png", "r/0.png;r/1.png"]])
    assert "several references" in refusal(path)
    assert "row 1: `photo` is int" in refusal(write_jsonl(tmp_path / "rows.jsonl", [{**rows[0], "photo": 3}]))
    pq.write_table(pa.Table.from_pylist([{**rows[0], "image": {"bytes": b"", "path": ""}}]), tmp_path / "rows.parquet")
    assert "holds pictures themselves" in refusal(tmp_path / "rows.parquet")
    twice = [{**row, "id": "a"} for row in rows]
    assert "1 id there more than once: a" in refusal(write_jsonl(tmp_path / "rows.jsonl", twice))


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("rows.txt", b"", "must end in .csv, .jsonl, .parquet"),
        ("rows.csv", b"", "no column"),
        ("rows.csv", b"photo,mask,reference\n", "no pair in it"),
        ("rows.csv", "photo,mask,reference\n".encode("utf-16"), "no UTF-8"),
        ("rows.csv", b"photo,mask,reference\na\0,b,c\n", "no file|not CSV"),
        ("rows.csv", b"photo,mask,reference\n" + b"a" * 200_000 + b",b,c\n", "not CSV"),
        ("rows.jsonl", b'{"photo": "a"\n', "line 1: not JSON"),
        ("rows.jsonl", b"[1]\n", "no JSON object"),
        ("rows.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("rows.parquet", b"PAR1", "not Parquet"),
    ],
)
def test_tables_that_cannot_be_read_are_one_line(tmp_path, request, name, data, told):
    # Python's own limit of a cell: the pipeline's readers, which this process may have imported, raise it for theirs.
    request.addfinalizer(partial(csv.field_size_limit, csv.field_size_limit(131_072)))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=told) as line:
        open_pairs(tmp_path / name)
    assert "\n" not in str(line.value)


def test_pictures_that_do_not_fit_name_both_files(tmp_path):
    rows = make_rows(tmp_path, range(4))
    save(tmp_path / "m" / "0.png", box(0, 32, 64))
    save(tmp_path / "t" / "1.png", picture(0, 32, 64))
    (tmp_path / "r" / "2.png").write_bytes(b"<html>")
    save(tmp_path / "m" / "3.png", np.full((48, 64), 90, np.uint8))
    pairs = open_pairs(write_jsonl(tmp_path / "rows.jsonl", rows))
    told = [r"m/0.png: the mask is 64x32 px, the photo .*p/0.png is 64x48 px", r"t/1.png: the truth is 64x32.*p/1.png is 64x48"]
    told += ["r/2.png: not a readable photo", "m/3.png: the mask's values are 90"]
    for number, each in enumerate(told):
        with pytest.raises(InputError, match=each):
            pairs.read(number)


@pytest.fixture
def reader(world: World) -> ShardReader:
    return ShardReader(world.dataset, "validation", open_shards=1)


@pytest.mark.parametrize("references", ["own", "another"])
def test_a_split_of_a_dataset_is_a_pair_set(reader, references, monkeypatch):
    monkeypatch.setattr(ShardReader, "label_names", lambda _: {label: f"name of {label}" for label in LABELS})
    pairs = pairs_of_dataset(reader, 9, 1, references)
    places = {key: (place, label) for place, key, label in reader.labels()}
    shown = {reader.read(place).reference.tobytes(): label for place, label in places.values()}
    assert len({one.id for one in pairs.pairs}) == 9
    for number, pair in enumerate(pairs.pairs):
        read, (place, label) = pairs.read(number), places[pair.id]
        sample = reader.read(place)
        assert np.array_equal(read.photo, sample.view)
        assert np.array_equal(read.mask, read_held_out(reader, [place], 1)[0].mask)
        assert read.photo.shape[:2] == pairs.size(number)
        assert np.array_equal(read.reference, sample.reference) == (references == "own")
        assert (pair.label == f"name of {label}") == (references == "own")
        assert pair.label == f"name of {shown[read.reference.tobytes()]}"
    again = pairs_of_dataset(reader, 5, 1, references)
    assert again.pairs == pairs.pairs[:5]
    assert all(same(again.read(number), pairs.read(number)) for number in range(5))
    prints = {pairs_of_dataset(reader, count, seed, references).fingerprint for count, seed in ((9, 1), (5, 1), (9, 2))}
    assert len(prints) == 3
    assert pairs.fingerprint in prints


def test_a_split_without_views_is_refused(world: World):
    with pytest.raises(InputError, match=r"split `train` keeps no views; name it in the build's `views.keep`"):
        pairs_of_dataset(ShardReader(world.dataset, "train"), 3, 0)


def test_threads_read_the_same(tmp_path, reader, monkeypatch):
    """One at a time, of a dataset: a reader closes files that another thread would be reading."""
    inside, whole = threading.Semaphore(1), ShardReader.read

    def alone_in(reader: ShardReader, place: SampleLocation):
        assert inside.acquire(blocking=False), "two threads in one reader"
        time.sleep(0.001)
        try:
            return whole(reader, place)
        finally:
            inside.release()

    monkeypatch.setattr(ShardReader, "read", alone_in)
    for pairs in (open_pairs(make_cocoee(tmp_path, range(12))), pairs_of_dataset(reader, 12, 0, "another")):
        alone = [pairs.read(number) for number in range(12)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(pairs.read, list(range(12)) * 2))
        assert all(same(alone[place % 12], one) for place, one in enumerate(together))


def test_label_names_are_the_indexs(reader):
    assert reader.label_names() == {label: label for label in LABELS}


def test_candidates_are_of_eight_labels_and_functions_of_names():
    pairs = [Pair(f"id{number}", f"kind {number % 10}" if number != 5 else "") for number in range(40)]
    drawn = draw_candidates(pairs, 0)
    assert drawn[5] == ()
    for number, candidates in enumerate(drawn):
        if number != 5:
            assert candidates[0] == number
            assert len({pairs[each].label for each in candidates}) == pair_sets.CANDIDATES == len(candidates)
    turned = draw_candidates(pairs[::-1], 0)
    assert [tuple(39 - each for each in one) for one in turned[::-1]] == drawn
    assert draw_candidates(pairs, 1) != drawn
    assert draw_candidates([Pair(str(number), f"kind {number % 7}") for number in range(40)], 0) is None


def test_alike_are_others_of_the_same_label():
    pairs = [Pair(f"id{number}", f"kind {number % 3}" if number else "") for number in range(10)] + [Pair("alone", "rare")]
    drawn = draw_alike(pairs, 0)
    assert (drawn[0], drawn[10]) == (None, None)
    for number in range(1, 10):
        assert drawn[number] != number
        assert pairs[drawn[number]].label == pairs[number].label
    assert [each if each is None else 10 - each for each in draw_alike(pairs[::-1], 0)[::-1]] == drawn
    assert any(draw_alike(pairs, seed) != drawn for seed in range(1, 4))


def test_cells_that_no_line_can_show_are_shown_by_their_escapes(tmp_path):
    """Line breaks, null bytes and half characters, which JSON can hold; of labels and ids, too."""
    (row,) = make_rows(tmp_path, [1])
    odd = "a\n\0\ud800"
    with pytest.raises(InputError, match=r"there is no file .*/a\\n\\x00\\ud800$"):
        open_pairs(write_jsonl(tmp_path / "pairs.jsonl", [{**row, "photo": odd}]))
    with pytest.raises(InputError, match=r"no column .* it has a\\n\\x00\\ud800;"):
        open_pairs(write_jsonl(tmp_path / "pairs.jsonl", [{odd: 1}]))
    (pair,) = open_pairs(write_jsonl(tmp_path / "pairs.jsonl", [{**row, "id": odd, "label": odd}])).pairs
    assert pair.label == r"a\n\x00\ud800"
    assert pair.id.isascii()


def test_damaged_parquet_is_one_line_wherever_it_is_damaged(tmp_path):
    (row,) = make_rows(tmp_path, [1])
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({name: [file] for name, file in row.items()}), path)
    whole = path.read_bytes()
    told = []
    for place in range(4, len(whole) - 8, 7):
        path.write_bytes(whole[:place] + bytes([whole[place + k] ^ 255 for k in range(8)]) + whole[place + 8 :])
        try:
            open_pairs(path)
        except InputError as error:
            told.append(str(error))
    assert told
    assert not any("\n" in line for line in told)
