"""The photo store itself: parts and rounds, tables made from them, what does not count, damage that is found. No network."""

import errno
import hashlib
import json
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pbe_core.errors import InputError
from pbe_core.files import lock_folder
from pbe_core.images.decode import PhotoError
from pbe_core.photo_files import PhotoStore, check_store, hash_bytes, is_store, open_photo_store, photo_keys
from pipelines.config import SourceSettings
from pipelines.crawling import rounds, tables
from pipelines.crawling.rounds import (
    PartWriter,
    SupersededError,
    freeze_round,
    open_store,
    part_name,
    photos_to_ask,
    quarantined,
    quarantined_keys,
    read_parts,
    sweep,
)
from pipelines.crawling.tables import count_codes, find_placeholders, merge, verify_store
from schemas.tables import PHOTO_INDEX, PHOTO_STATUS, STORED_PHOTOS, WANTED

HERE = "open_images"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def wanted_of(names: list[str]) -> pa.Table:
    photos = pa.table({"split": ["train"] * len(names), "photo_id": names})
    keys = photo_keys(photos)
    rows = [
        dict.fromkeys(WANTED.names) | {"key": int(key), "split": "train", "photo_id": name}
        for key, name in sorted(zip(keys, names, strict=True))
    ]
    return pa.Table.from_pylist(rows, WANTED)


def bytes_of(name: str) -> bytes:
    return f"the photo of {name}".encode() * 20


def row_of(photo: dict, code: str, data: bytes | None, verified: bool = False) -> dict:
    row = dict.fromkeys(STORED_PHOTOS.names) | {name: photo[name] for name in ("key", "split", "photo_id")}
    row |= {"code": code, "transient": code == "timeout", "attempts": 1, "asked_at": NOW, "source": "{url}", "url": "http://x"}
    if data is None:
        return row | {"detail": "why"}
    digest = hashlib.sha256(data).hexdigest()
    return row | {"sha256": digest, "width": 9, "height": 8, "verified": verified, "fetched_at": NOW, "etag": '"1"'}


def crawl(
    store: Path,
    wanted: pa.Table,
    codes: dict[str, str],
    data: dict[str, bytes] | None = None,
    *,
    again=(),
    per_unit: int = 4,
    **row,
):
    """One run of a crawl, with what becomes of each photo said beforehand; `ok` where nothing is."""
    parts = read_parts(store)
    sweep(store, parts)
    merge(store, parts)
    chosen = freeze_round(store, photos_to_ask(store, wanted, again), per_unit, parts, ())
    for unit in range(len(chosen.sizes)):
        writer = PartWriter(store, chosen.number, unit)
        for photo in chosen.read_unit(unit):
            code = codes.get(photo["photo_id"], "ok")
            if code == "not asked":
                continue
            body = None if code != "ok" else (data or {}).get(photo["photo_id"], bytes_of(photo["photo_id"]))
            writer.add(row_of(photo, code, body, **row), body, "jpeg")
        writer.commit()
    merge(store, read_parts(store))
    return chosen


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    open_store(folder, HERE)
    return folder


def table(store: Path, name: str) -> dict[str, dict]:
    return {row["photo_id"]: row for row in pq.read_table(store / f"{name}.parquet").to_pylist()}


def read_all(store: Path) -> list[bytes]:
    photos = PhotoStore(store)
    return [photos.read("train", name) for name in NAMES]


NAMES = [f"photo{number:03d}" for number in range(50)]


def test_every_photo_is_in_one_place_and_reads_back(store):
    wanted = wanted_of(NAMES)
    crawl(store, wanted, {"photo003": "http_404", "photo004": "timeout", "photo005": "not asked"})
    index, status = table(store, "index"), table(store, "status")
    assert sorted(index) == sorted(set(NAMES) - {"photo003", "photo004", "photo005"})
    assert sorted(status) == sorted(set(NAMES) - {"photo005"})
    failures = {name: row["code"] for name, row in table(store, "failures").items()}
    assert failures == {"photo003": "http_404", "photo004": "timeout"}
    assert count_codes(store, wanted["key"].combine_chunks()) == {"ok": 47, "timeout": 1, "http_404": 1, "": 1}
    assert pq.read_schema(store / "index.parquet").equals(PHOTO_INDEX)
    assert pq.read_schema(store / "status.parquet").equals(PHOTO_STATUS)
    photos = PhotoStore(store)
    for name in index:
        assert photos.read("train", name) == bytes_of(name)
    failed = {"photo003": "http_404", "photo004": "timeout", "photo005": "not_crawled", "stranger": "not_crawled"}
    for name, code in failed.items():
        with pytest.raises(PhotoError) as caught:
            photos.read("train", name)
        assert caught.value.code == code
    assert verify_store(store) == ([], 47)


def test_only_what_has_no_outcome_is_asked_for_and_codes_again_where_told(store):
    wanted = wanted_of(NAMES)
    crawl(store, wanted, {"photo003": "http_404", "photo004": "timeout", "photo005": "not asked"})

    def asked(*again: str) -> set[str]:
        return set(photos_to_ask(store, wanted, again)["photo_id"].to_pylist())

    assert asked() == {"photo005"}
    assert asked("timeout") == {"photo004", "photo005"}
    assert asked("timeout", "http_404") == {"photo003", "photo004", "photo005"}
    assert asked("ok") == set(NAMES) - {"photo003", "photo004"}
    refreshed = photos_to_ask(store, wanted, ["ok"]).to_pylist()
    index = table(store, "index")
    for row in refreshed:
        known = index.get(row["photo_id"])
        assert (row["before"] is None) == (row["photo_id"] == "photo005")
        if known:
            assert row["before"] == {name: known[name] for name in row["before"]}
            assert row["before"]["sha256"] == hashlib.sha256(bytes_of(row["photo_id"])).hexdigest()


def test_the_latest_outcome_counts_and_photos_of_other_builds_stay(store):
    crawl(store, wanted_of(NAMES[:20]), {"photo003": "timeout", "photo004": "timeout"})
    crawl(store, wanted_of(NAMES[:20]), {"photo003": "http_404"}, again=["timeout"])
    crawl(store, wanted_of(NAMES[10:30]), {})
    status, index = table(store, "status"), table(store, "index")
    assert len(status) == 30
    assert status["photo003"]["code"] == "http_404"
    assert status["photo004"]["code"] == "ok"
    assert len(index) == 29
    assert PhotoStore(store).read("train", "photo004") == bytes_of("photo004")
    assert verify_store(store) == ([], 29)
    # Sorted, so that a photo is found by halving.
    keys = pq.read_table(store / "index.parquet")["key"].to_numpy()
    assert (keys[1:] > keys[:-1]).all()


def test_tables_are_the_same_however_they_were_come_by(store, tmp_path, monkeypatch):
    """In ranges of keys of any size, and in one run or several."""
    crawl(store, wanted_of(NAMES), {"photo003": "http_404"})
    whole = {name: pq.read_table(store / name).to_pylist() for name in tables.STORE_TABLES}
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 3)
    (store / "status.parquet").unlink()
    merge(store, read_parts(store))
    assert {name: pq.read_table(store / name).to_pylist() for name in tables.STORE_TABLES} == whole
    other = tmp_path / "other"
    open_store(other, HERE)
    crawl(other, wanted_of(NAMES), dict.fromkeys(NAMES[20:], "not asked") | {"photo003": "http_404"})
    crawl(other, wanted_of(NAMES), {})
    for name, rows in whole.items():
        in_two = pq.read_table(other / name).to_pylist()
        for one, two in zip(rows, in_two, strict=True):
            assert {key for key in one if one[key] != two[key]} <= {"file", "offset"}


def test_a_part_that_comes_too_late_does_not_count(store):
    """A process that was thought dead: the photos are asked for again by the next run, and would be there twice."""
    wanted = wanted_of(NAMES[:8])
    late = freeze_round(store, wanted, 8, (), ())
    writer = PartWriter(store, late.number, 0)
    for photo in late.read_unit(0):
        writer.add(row_of(photo, "ok", b"late"), b"late", "jpeg")
    crawl(store, wanted, {})
    with pytest.raises(SupersededError):
        writer.commit()
    assert not list((store / "parts").glob(".*"))

    # Even where it is so quick that it does not notice: what the newest round does not name is not a part.
    writer = PartWriter(store, late.number, 0)
    for photo in late.read_unit(0):
        writer.add(row_of(photo, "ok", b"late"), b"late", "jpeg")
    record = store / "rounds" / "000002.json"
    hidden = record.rename(store / "hidden")
    writer.commit()
    hidden.rename(record)
    assert (store / "parts" / f"{part_name(1, 0)}.json").is_file()
    parts = read_parts(store)
    assert {part.round for part in parts} == {2}
    sweep(store, parts)
    assert not list((store / "parts").glob("000001-*"))
    merge(store, parts)
    assert PhotoStore(store).read("train", NAMES[0]) == bytes_of(NAMES[0])
    assert verify_store(store) == ([], 8)


def test_two_attempts_at_one_part_do_not_mix(store):
    chosen = freeze_round(store, wanted_of(NAMES[:6]), 6, (), ())
    writers = [PartWriter(store, 1, 0), PartWriter(store, 1, 0)]
    for number, writer in enumerate(writers):
        for photo in chosen.read_unit(0)[:: 1 - 2 * number]:  # In another order, and so at other places.
            data = bytes_of(photo["photo_id"])
            writer.add(row_of(photo, "ok", data), data, "jpeg")
    for writer in writers:
        writer.commit()
    parts = read_parts(store)
    assert [part.tars for part in parts] == [{f"000001-000000-{writers[1].attempt}.tar": next(iter(parts[0].tars.values()))}]
    sweep(store, parts)
    merge(store, parts)
    assert verify_store(store) == ([], 6)


def test_photos_of_a_damaged_part_are_asked_for_whatever_earlier_parts_say_of_them(store):
    """They had failed before they came; now the tar that has them is cut."""
    wanted = wanted_of(NAMES[:12])
    crawl(store, wanted, dict.fromkeys(NAMES[:12], "http_403"))
    crawl(store, wanted, {}, again=["http_403"], per_unit=6)
    merge(store, read_parts(store))
    cut = sorted((store / "parts").glob("000002-000000-*.tar"))[0]
    lost = {row["photo_id"] for row in table(store, "index").values() if row["file"] == f"parts/{cut.name}"}
    content = cut.read_bytes()[:-1]
    cut.write_bytes(content)
    for _ in range(2):  # As found, and on the next day.
        parts = read_parts(store)
        sweep(store, parts)
        merge(store, parts)
        assert len(lost) == 6
        assert set(photos_to_ask(store, wanted, ())["photo_id"].to_pylist()) == lost
        assert set(table(store, "status")) == set(NAMES[:12]) - lost
    assert (store / "damaged" / cut.name).read_bytes() == content, "what is left of it is put aside"
    assert {path.name[:13] for path in (store / "damaged").iterdir()} == {"000002-000000"}
    crawl(store, wanted, {})
    assert verify_store(store) == ([], 12)
    assert {row["code"] for row in table(store, "status").values()} == {"ok"}


def test_an_attempt_that_was_killed_leaves_nothing_that_counts(store):
    """Before the rename of its files, between them and the record: each time the photos are asked for again."""
    wanted = wanted_of(NAMES[:6])
    chosen = freeze_round(store, wanted, 6, (), ())
    writer = PartWriter(store, 1, 0)
    for photo in chosen.read_unit(0):
        writer.add(row_of(photo, "ok", b"x" * 9), b"x" * 9, "jpeg")
    assert read_parts(store) == []
    writer.commit()
    (store / "parts" / "000001-000000.json").unlink()  # As if killed just before it.
    (store / "parts" / ".000001-000001-abc.tar.tmp").write_bytes(b"begun")
    assert read_parts(store) == []
    sweep(store, [])
    assert not list((store / "parts").iterdir())
    merge(store, [])
    assert len(photos_to_ask(store, wanted, ())) == 6


def test_an_empty_attempt_makes_no_part(store):
    freeze_round(store, wanted_of(NAMES[:6]), 6, (), ())
    assert PartWriter(store, 1, 0).commit() is None
    assert not list((store / "parts").iterdir())


def test_a_part_goes_on_in_another_tar_where_one_is_full(store, monkeypatch):
    monkeypatch.setattr(rounds, "TAR_BYTES", 3000)
    crawl(store, wanted_of(NAMES), {}, per_unit=50)
    tars = sorted((store / "parts").glob("*.tar"))
    assert len(tars) > 5
    assert all(path.stat().st_size < 3000 + 2048 for path in tars)
    assert verify_store(store) == ([], 50)


def test_the_same_bytes_under_many_ids_are_a_placeholder(store):
    """Unless the metadata's MD5 says that they are the photo; the rows and the bytes are kept apart, and nothing is lost."""
    gone = b"this photo is no longer here"
    # Nine times is not so often.
    fakes = dict.fromkeys(NAMES[:10], gone) | dict.fromkeys(NAMES[10:19], b"a photo that was uploaded twice")
    wanted = wanted_of(NAMES)
    crawl(store, wanted, {}, fakes)
    parts = read_parts(store)
    merge(store, parts)
    assert sorted(table(store, "index")) == NAMES[10:]
    assert sorted(table(store, "quarantine")) == NAMES[:10]
    assert {row["code"] for row in table(store, "failures").values()} == {"placeholder"}
    assert sorted(table(store, "failures")) == NAMES[:10]
    assert count_codes(store, wanted["key"].combine_chunks()) == {"ok": 40, "placeholder": 10}
    with pytest.raises(PhotoError, match="placeholder"):
        PhotoStore(store).read("train", NAMES[0])
    place = table(store, "quarantine")[NAMES[0]]
    assert (store / place["file"]).read_bytes()[place["offset"] :][: place["length"]] == gone
    assert verify_store(store) == ([], 40)
    assert len(photos_to_ask(store, wanted, ["placeholder"])) == 10
    assert len(photos_to_ask(store, wanted, [])) == 0


def test_photos_that_their_md5_vouches_for_are_no_placeholders(store):
    crawl(store, wanted_of(NAMES), {}, dict.fromkeys(NAMES, b"same"), verified=True)
    assert len(table(store, "index")) == 50
    assert len(table(store, "quarantine")) == 0


def damaged(data: bytes) -> bytes:
    return data[:600] + bytes([data[600] ^ 1]) + data[601:]


@pytest.mark.parametrize(
    ("files", "damage", "said"),
    [
        ("parts/000001-000003-*.tar", lambda data: data[:-1], None),
        ("parts/000001-000003-*.tar", damaged, "remove this file and crawl again"),
        ("parts/000001-000003-*.parquet", damaged, "remove this file and crawl again"),
        ("parts/000001-000003.json", lambda _: b"{", None),
        ("parts/000001-000003-*.tar", None, None),
        ("index.parquet", None, None),
    ],
)
def test_verify_finds_damage_and_the_next_run_mends_what_it_can(store, files, damage, said):
    wanted = wanted_of(NAMES)
    crawl(store, wanted, {})
    [path] = store.glob(files)
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    problems, _ = verify_store(store)
    assert problems
    assert all(str(store) in problem for problem in problems)
    if said:
        assert any(problem.startswith(f"{path}: ") and said in problem for problem in problems)
        if path.suffix == ".tar":
            with pytest.raises(PhotoError, match="changed"):
                read_all(store)
        path.unlink()
    crawl(store, wanted, {})
    assert verify_store(store) == ([], 50)


def test_an_index_of_other_parts_is_told(store):
    crawl(store, wanted_of(NAMES), {})
    pq.write_table(pq.read_table(store / "index.parquet").slice(1), store / "index.parquet")
    problems, _ = verify_store(store)
    assert "remove both files and crawl again" in problems[0]
    for name in ("index", "status"):
        (store / f"{name}.parquet").unlink()
    crawl(store, wanted_of(NAMES), {})
    assert verify_store(store) == ([], 50)


def test_files_that_are_used_in_place_are_read_there_and_noticed_when_they_change(store, tmp_path):
    wanted = wanted_of(["a", "b"])
    chosen = freeze_round(store, wanted, 9, (), ())
    writer = PartWriter(store, 1, 0)
    for photo in chosen.read_unit(0):
        path = tmp_path / f"{photo['photo_id']}.jpg"
        path.write_bytes(b"skip" + bytes_of(photo["photo_id"]))
        length = len(bytes_of(photo["photo_id"]))
        writer.add(row_of(photo, "ok", bytes_of(photo["photo_id"])) | {"file": str(path), "offset": 4, "length": length})
    writer.commit()
    merge(store, read_parts(store))
    assert not list((store / "parts").glob("*.tar"))
    assert PhotoStore(store).read("train", "a") == bytes_of("a")
    assert verify_store(store) == ([], 2)
    (tmp_path / "a.jpg").write_bytes(b"another photo" * 99)
    (tmp_path / "b.jpg").unlink()
    for name in ("a", "b"):
        with pytest.raises(PhotoError, match="changed"):
            PhotoStore(store).read("train", name)
    assert len(verify_store(store)[0]) == 2


def test_a_store_that_was_only_begun_when_its_process_was_killed_is_one(tmp_path):
    for name in ("parts", "rounds"):
        (tmp_path / name).mkdir()
    (tmp_path / f".store.json.{'0' * 32}.tmp").write_text("{")
    open_store(tmp_path, HERE)
    assert is_store(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"parts", "rounds", "store.json"}


def test_a_folder_with_something_else_is_no_store(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds something else than a photo store.*--source\.photos"):
        open_store(tmp_path, HERE)
    assert not is_store(tmp_path)
    for content, message in (("{", "damaged"), ('{"version": 99, "photos_of": "open_images"}', "version 99")):
        other = tmp_path / message[:3]
        open_store(other, HERE)
        (other / "store.json").write_text(content)
        with pytest.raises(InputError, match=message):
            open_store(other, HERE)
    open_store(tmp_path / "new" / "one", HERE)
    assert is_store(tmp_path / "new" / "one")
    with pytest.raises(InputError, match="cannot be a folder"):
        open_store(tmp_path / "holiday.jpg" / "below", HERE)


def test_a_store_without_tables_says_so(store):
    with pytest.raises(InputError, match=r"no tables.*crawl\.py"):
        PhotoStore(store)


def test_a_file_system_without_locks_is_told_and_used(store, monkeypatch, capsys):
    """Lustre without `-o flock`: to say that another one is at work there would be wrong, and would never end."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("pbe_core.files.fcntl.flock", flock)
    with lock_folder(store, "in use"):
        (store / "written").touch()
    assert "no locks on this file system (Function not implemented)" in capsys.readouterr().err


def test_a_damaged_round_record_stops_and_is_not_taken_for_none(store):
    """It says which parts count: without it all would be asked for again."""
    crawl(store, wanted_of(NAMES[:8]), {})
    (store / "rounds" / "000001.json").write_text(json.dumps({"photos": 8}))
    with pytest.raises(InputError, match=r"000001\.json: damaged"):
        read_parts(store)


def test_photos_are_read_while_the_tables_are_replaced(store):
    """An opened store goes on; a new look sees the new tables."""
    crawl(store, wanted_of(NAMES[:8]), {"photo003": "timeout"})
    first = open_photo_store(store)
    assert open_photo_store(store) is first
    with pytest.raises(PhotoError, match="timeout"):
        first.read("train", "photo003")
    crawl(store, wanted_of(NAMES[:8]), {}, again=["timeout"])
    assert open_photo_store(store).read("train", "photo003") == bytes_of("photo003")


def test_photos_are_whole_in_the_tar_for_people_who_unpack_it(store):
    crawl(store, wanted_of(["a"]), {})
    with tarfile.open(next((store / "parts").glob("*.tar"))) as tar:
        assert tar.getnames() == ["train/a.jpeg"]
        assert tar.extractfile("train/a.jpeg").read() == bytes_of("a")


def test_a_photo_that_was_kept_is_asked_for_again_when_the_part_that_holds_it_is_lost(store):
    """Asked for again and unchanged, it is told by a later part than the one whose tar it lies in."""
    wanted = wanted_of(NAMES[:8])
    crawl(store, wanted, {})
    parts = read_parts(store)
    chosen = freeze_round(store, photos_to_ask(store, wanted, ["ok"]), 8, parts, ())
    writer = PartWriter(store, chosen.number, 0)
    for photo in chosen.read_unit(0):
        kept = {name: photo["before"][name] for name in ("file", "offset", "length", "sha256")}
        writer.add(row_of(photo, "ok", bytes_of(photo["photo_id"])) | kept)
    writer.commit()
    merge(store, read_parts(store))
    assert verify_store(store) == ([], 8)
    tar = next((store / "parts").glob("000001-000001-*.tar"))
    lost = {name for name, row in table(store, "index").items() if row["file"] == f"parts/{tar.name}"}
    assert len(lost) == 4
    tar.write_bytes(tar.read_bytes()[:-512])
    assert verify_store(store)[0]
    merge(store, read_parts(store))
    assert set(photos_to_ask(store, wanted, ())["photo_id"].to_pylist()) == lost
    assert count_codes(store, wanted["key"].combine_chunks()) == {"ok": 4, "": 4}
    crawl(store, wanted, {})
    assert verify_store(store) == ([], 8)


def test_a_folder_that_cannot_be_read_just_now_loses_no_part(store, monkeypatch):
    """A network file system that hiccups is not a part that is gone."""
    crawl(store, wanted_of(NAMES[:8]), {})
    real = Path.read_bytes

    def hiccup(path: Path) -> bytes:
        if path.name == "000001-000001.json":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", hiccup)
    with pytest.raises(OSError, match="Input/output"):
        read_parts(store)
    monkeypatch.undo()
    assert len(read_parts(store)) == 2


def test_a_store_is_for_one_source(store):
    """Photo 1 of one COCO file is not photo 1 of another."""

    def source(kind: str, annotations: str) -> SourceSettings:
        return SourceSettings(kind=kind, annotations=Path(annotations), photos=store)

    assert source("open_images", "here").photos_of == source("open_images", "/elsewhere").photos_of == HERE
    assert source("coco", "/a/instances.json").photos_of != source("coco", "/b/instances.json").photos_of
    for check in (open_store, check_store):
        check(store, HERE)
        with pytest.raises(
            InputError, match=r"holds photos of open_images.*in coco, /a/instances\.json; give another --source\.photos"
        ):
            check(store, source("coco", "/a/instances.json").photos_of)


def test_books_that_do_not_balance_are_noticed(store):
    wanted = wanted_of(NAMES[:8])
    crawl(store, wanted, {})
    rows = pq.read_table(store / "status.parquet")
    pq.write_table(pa.concat_tables([rows, rows]), store / "status.parquet")
    with pytest.raises(RuntimeError, match="the counts do not balance: 8 photos wanted"):
        count_codes(store, wanted["key"].combine_chunks())


def test_photos_are_read_in_the_middle_of_a_merge(store, monkeypatch):
    """Another build packs from the store while a crawl adds to it."""
    wanted = wanted_of(NAMES)
    crawl(store, wanted_of(NAMES[:8]), {})
    seen = []
    real = tables._latest_rows

    def watched(*arguments):
        for rows in real(*arguments):
            seen.append(PhotoStore(store).read("train", NAMES[0]))
            yield rows

    monkeypatch.setattr(tables, "_latest_rows", watched)
    crawl(store, wanted, {})
    assert set(seen) == {bytes_of(NAMES[0])}


def test_only_quarantined_photos_are_given_to_other_sources(store, monkeypatch):
    wanted = wanted_of(NAMES)
    crawl(store, wanted, {}, dict.fromkeys(NAMES[:10], b"gone"))
    merge(store, read_parts(store))
    new = quarantined(
        store, lambda: wanted, wanted["key"].combine_chunks(), pa.array([], pa.uint64()), ("{url}", "other")
    ).to_pylist()
    assert {row["photo_id"]: row["skip"] for row in new} == dict.fromkeys(NAMES[:10], 1)
    assert {row["before"]["sha256"] for row in new} == {hashlib.sha256(b"gone").hexdigest()}
    assert not len(quarantined(store, pytest.fail, wanted["key"].combine_chunks(), pa.array([], pa.uint64()), ("other", "{url}")))
    assert not len(quarantined(store, pytest.fail, wanted["key"].combine_chunks(), quarantined_keys(store), ("{url}", "other")))
    assert find_placeholders(store, read_parts(store)) == [hashlib.sha256(b"gone").hexdigest()]
    monkeypatch.setattr(tables, "_first_eight", lambda hashes: np.zeros(len(hashes), np.uint64))
    assert find_placeholders(store, read_parts(store)) == [hashlib.sha256(b"gone").hexdigest()], "all of a hash counts"


def test_hashes_become_bytes_whatever_pieces_the_table_comes_in():
    texts = [hashlib.sha256(bytes([number])).hexdigest() for number in range(7)]
    pieces = pa.chunked_array([pa.array(texts[:4])[2:], pa.array([], pa.string()), pa.array(texts[4:])])
    assert [each.tobytes() for each in hash_bytes(pieces)] == [bytes.fromhex(text) for text in texts[2:]]
    for wrong in (None, texts[0][:-1], "x" * 64):
        with pytest.raises(ValueError, match=r"SHA-256|hexadecimal"):
            hash_bytes(pa.chunked_array([[texts[0], wrong]], pa.string()))
