"""Tars of photos: what the index says of real and of hostile archives, and which member a photo is."""

import gzip
import io
import itertools
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError
from pipelines.crawling import tar_files
from pipelines.crawling.tar_files import MEMBERS, match_members, scan_tar, scan_tars
from pipelines.photos import photo_path

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Members = Iterable[tuple[str, bytes]]


def make_tar(path: Path, members: Members, kind: str = "gnu") -> Path:
    with tarfile.open(path, "w", format=FORMATS[kind]) as archive:
        for name, data in members:
            add(archive, name, data)
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def names(path: Path) -> list[str]:
    return scan_tar(path)["member"].to_pylist()


def in_place(path: Path) -> list[tuple[str, bytes]]:
    """Names and bytes, read from where the index says."""
    data = path.read_bytes()
    return [(row["member"], data[row["offset"] : row["offset"] + row["length"]]) for row in scan_tar(path).to_pylist()]


def extracted(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive if member.isreg()]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_index_points_at_the_bytes_that_tarfile_extracts(tmp_path, kind):
    draw = random.Random(1)
    sizes = [0, 1, 511, 512, 513, 1024, 5000, 70_000]
    folders = ["", "./", "train/", "train_0/", f"{'deep/' * 20}", "ünï/"]
    members = [
        (f"{folder}{number}.jpg", draw.randbytes(size)) for number, (folder, size) in enumerate(itertools.product(folders, sizes))
    ]
    path = make_tar(tmp_path / "photos.tar", members, kind)
    assert in_place(path) == extracted(path) == members
    assert scan_tar(path).schema == MEMBERS


def test_long_names_are_read_in_both_ways_to_write_them(tmp_path):
    long = "a" * 150 + "/" + "b" * 200 + "/photo.jpg"
    for kind in ("gnu", "pax"):
        path = make_tar(tmp_path / f"{kind}.tar", [(long, b"photo"), ("next.jpg", b"next")], kind)
        assert in_place(path) == [(long, b"photo"), ("next.jpg", b"next")]


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar command")
@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar", "v7"])
def test_what_the_tar_command_writes_is_read(tmp_path, kind):
    """Of all kinds of files: only the regular ones that lie in one piece are photos, under each of their names."""
    folder = tmp_path / "folder"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "one.jpg").write_bytes(b"one" * 1000)
    (folder / "train" / "symbolic.jpg").symlink_to("one.jpg")
    (folder / "train" / "two.jpg").write_bytes(b"two")
    (folder / "train" / "z.jpg").hardlink_to(folder / "train" / "two.jpg")
    with (folder / "train" / "sparse.jpg").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    sparse = ["--sparse"] if kind in ("gnu", "pax") else []
    command = ["tar", "--create", f"--format={kind}", *sparse, "--sort=name", "--file", str(tmp_path / "photos.tar"), "."]
    subprocess.run(command, cwd=folder, check=True)
    found = dict(in_place(tmp_path / "photos.tar"))
    assert found["./train/one.jpg"] == b"one" * 1000
    assert found["./train/two.jpg"] == b"two"
    assert found["./train/z.jpg"] == b"two"
    plain = {"./train/one.jpg", "./train/two.jpg", "./train/z.jpg"}
    assert found.keys() - plain == (set() if sparse else {"./train/sparse.jpg"})


def test_a_hard_link_is_the_member_before_it_of_that_name(tmp_path):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "ahead.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(archive, "a.jpg", b"first")
        add(archive, "b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(archive, "a.jpg", b"second")
        add(archive, "c.jpg", type=tarfile.LNKTYPE, linkname="b.jpg")
        add(archive, "d.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(archive, "b.jpg", b"third")
    assert in_place(path) == [
        ("a.jpg", b"first"),
        ("b.jpg", b"first"),
        ("a.jpg", b"second"),
        ("c.jpg", b"first"),
        ("d.jpg", b"second"),
        ("b.jpg", b"third"),
    ]


def test_links_out_of_the_tar_devices_and_folders_are_left_out(tmp_path):
    path = tmp_path / "photos.tar"
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    with tarfile.open(path, "w") as archive:
        for number, kind in enumerate(kinds):
            add(archive, f"{number}.jpg", type=kind, linkname="/etc/passwd")
        add(archive, "photo.jpg", b"photo")
        add(archive, "contiguous.jpg", b"photo", type=tarfile.CONTTYPE)
    assert in_place(path) == [("photo.jpg", b"photo"), ("contiguous.jpg", b"photo")]


@pytest.mark.parametrize("sparse", ["0.0", "0.1", "1.0"])
def test_sparse_files_of_pax_are_left_out(tmp_path, sparse):
    """Their bytes are a map and pieces, and no photo."""
    headers = {
        "0.0": {"GNU.sparse.size": "5", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "5"},
        "0.1": {"GNU.sparse.size": "5", "GNU.sparse.map": "0,5"},
        "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5", "GNU.sparse.name": "a.jpg"},
    }[sparse]
    data = b"1\n0\n5\n".ljust(512, b"\0") + b"photo" if sparse == "1.0" else b"photo"
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "sparse.jpg", data, pax_headers=headers)
        add(archive, "photo.jpg", b"photo")
    assert in_place(path) == [("photo.jpg", b"photo")]


def test_names_are_text_and_no_paths(tmp_path):
    members = [("../../etc/passwd", b"1"), ("/etc/passwd", b"2"), ("a/../b.jpg", b"3"), ("new\nline.jpg", b"4"), (" ", b"5")]
    path = make_tar(tmp_path / "photos.tar", members)
    assert in_place(path) == members


@pytest.mark.parametrize("kind", FORMATS)
def test_names_that_are_no_utf8_do_not_stop_the_index(tmp_path, kind):
    path = make_tar(tmp_path / "photos.tar", [("caf\udce9.jpg", b"photo"), ("next.jpg", b"next")], kind)
    assert b"caf\xe9.jpg" in path.read_bytes()
    assert in_place(path) == [("caf\\xe9.jpg", b"photo"), ("next.jpg", b"next")]


def test_a_name_that_comes_again_is_in_the_index_again(tmp_path):
    path = make_tar(tmp_path / "photos.tar", [("a.jpg", b"old"), ("b.jpg", b"b"), ("a.jpg", b"new")])
    assert in_place(path) == [("a.jpg", b"old"), ("b.jpg", b"b"), ("a.jpg", b"new")]


def test_no_member_and_many_members_are_read(tmp_path, monkeypatch):
    empty = make_tar(tmp_path / "empty.tar", [])
    assert scan_tar(empty).schema == MEMBERS
    assert len(scan_tar(empty)) == 0
    monkeypatch.setattr(tar_files, "MEMBERS_PER_BATCH", 7)
    for count in (6, 7, 8, 22):
        path = make_tar(tmp_path / "photos.tar", [(f"{number}.jpg", b"%d" % number) for number in range(count)])
        assert in_place(path) == [(f"{number}.jpg", b"%d" % number) for number in range(count)]


def whole(tmp_path: Path) -> bytes:
    """Of a tar with two photos: header, 1,024 bytes of data, header, 512 bytes, end mark."""
    return make_tar(tmp_path / "whole.tar", [("one.jpg", b"1" * 700), ("two.jpg", b"2" * 10)]).read_bytes()


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "not a tar: the file is empty"),
        (100, "not a tar (truncated header)"),
        (600, "cut off: the member at byte 0 ('one.jpg') has 700 bytes, and the file ends at byte 600; fetch it again"),
        (512 + 700, "cut off: the member at byte 0 "),
        (512 + 1024, "damaged or cut off at byte 1,536 (no end mark; where this is all of it, `truncate -s +1024` adds one)"),
        (512 + 1024 + 300, "damaged or cut off at byte 1,536 (no end mark"),
        (512 + 1024 + 512, "cut off: the member at byte 1,536 ('two.jpg') has 10 bytes"),
        (512 + 1024 + 1024, "damaged or cut off at byte 2,560 (no end mark"),
        (512 + 1024 + 1024 + 100, "damaged or cut off at byte 2,560 (no end mark"),
    ],
)
def test_a_tar_that_is_cut_off_is_an_error_wherever_it_is_cut(tmp_path, length, message):
    path = tmp_path / "cut.tar"
    path.write_bytes(whole(tmp_path)[:length])
    with pytest.raises(InputError) as raised:
        scan_tar(path)
    assert str(raised.value).startswith(f"{path}: {message}")
    path.write_bytes(whole(tmp_path)[: 512 + 1024 + 1024 + 512])  # One block of the end mark is enough.
    assert names(path) == ["one.jpg", "two.jpg"]


def test_a_damaged_header_is_an_error_and_not_the_end(tmp_path):
    path = tmp_path / "damaged.tar"
    data = bytearray(whole(tmp_path))
    data[1536] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged\.tar: damaged or cut off at byte 1,536 \(no header there\); fetch it again"):
        scan_tar(path)
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged\.tar: not a tar \(bad checksum\)"):
        scan_tar(path)


def test_what_follows_the_end_mark_is_not_read_as_tar_does_not(tmp_path):
    path = tmp_path / "two.tar"
    path.write_bytes(whole(tmp_path) * 2)
    assert names(path) == ["one.jpg", "two.jpg"]


def test_compressed_tars_say_what_to_do(tmp_path):
    path = tmp_path / "photos.tar.gz"
    path.write_bytes(gzip.compress(whole(tmp_path)))
    with pytest.raises(InputError, match=r"photos\.tar\.gz: compressed with gzip, .*; run gunzip on it first"):
        scan_tar(path)
    for kind, tool in (("bz2", "bunzip2"), ("xz", "unxz")):
        with tarfile.open(path, f"w:{kind}") as archive:
            add(archive, "one.jpg", b"photo")
        with pytest.raises(InputError, match=f"run {tool} on it first"):
            scan_tar(path)
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(1000))
    with pytest.raises(InputError, match="run unzstd on it first"):
        scan_tar(path)
    assert names(make_tar(tmp_path / "photos.tar", [("BZhello.jpg", b"a tar all the same")])) == ["BZhello.jpg"]


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.tar: No such file"):
        scan_tar(tmp_path / "nothing.tar")
    with pytest.raises(InputError, match="Is a directory"):
        scan_tar(tmp_path)
    (tmp_path / "photo.tar").write_bytes(b"\xff\xd8\xff\x1f\x8bBZh" + bytes(2000))
    with pytest.raises(InputError, match=r"photo\.tar: not a tar \(bad checksum\)"):
        scan_tar(tmp_path / "photo.tar")


def header(name: str, kind: bytes, size: bytes = b"%011o\0" % 0) -> bytes:
    """A header block with any bytes for the size."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)[:512])
    block[124:136] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base_256(number: int) -> bytes:
    """A size as GNU tar writes what octal digits cannot: large or negative."""
    return (0x80 if number >= 0 else 0xFF).to_bytes(1, "big") + (number % 256**11).to_bytes(11, "big")


def pax(*records: str) -> bytes:
    body = b""
    for record in records:
        length = len(record.encode()) + 2
        while len(text := f"{length} {record}\n".encode()) != length:
            length = len(text)
        body += text
    return header("pax", b"x", b"%011o\0" % len(body)) + body.ljust(-(-len(body) // 512) * 512, b"\0")


PHOTO = header("photo.jpg", b"0", b"%011o\0" % 5) + b"photo".ljust(512, b"\0")


FEW = 8 << 10
"""What tests allow one member's headers in bytes, so that reading an archive takes little memory whatever its headers say."""
MORE = FEW + 512


@pytest.mark.parametrize(
    "odd",
    [
        header("a", b"0", base_256(-1)),
        header("a", b"0", base_256(MORE)),
        header("a", b"x", base_256(MORE)),
        header("a", b"x", base_256(-1)),
        header("a", b"L", base_256(MORE)),
        header("a", b"L", base_256(-1)),
        header("a", b"K", base_256(MORE)),
        header("a", b"0", b"zz9999999999"),
        pax("size=-1") + PHOTO,
        pax(f"size={MORE}") + PHOTO,
        pax("size=1e400") + PHOTO,
        pax("size=many") + PHOTO,
        pax("hdrcharset=BINARY"),
        header("a", b"x", b"%011o\0" % 512) + b"0 path=x\n".ljust(512, b"\0") + PHOTO,
        header("a", b"x", b"%011o\0" % 512) + (b"9" * 400 + b" path=x\n").ljust(512, b"\0"),
        pax("GNU.sparse.major=1", "GNU.sparse.minor=0") + PHOTO,
        pax("GNU.sparse.map=a,b") + PHOTO,
        pax("size=-1") + header("a", b"0"),
        header("a", b"S", base_256(-1)),
        header("a", b"A", base_256(-1)),
        header("g", b"g", b"%011o\0" % 15) + b"15 size=100000\n".ljust(512, b"\0") + PHOTO,
        pax("path=x") * 12 + PHOTO,
        header("a", b"S", b"%011o\0" % 5)[:482],
        b"".join(header("a", b"L", b"%011o\0" % 512) + b"name".ljust(512, b"\0") for _ in range(12)) + PHOTO,
    ],
)
def test_odd_headers_are_an_error_or_harmless_and_never_more(tmp_path, odd, monkeypatch):
    """Behind a photo and before one: an `InputError` that names the file, or members that lie within it."""
    monkeypatch.setattr(tar_files, "LARGEST_HEADERS", FEW)
    path = tmp_path / "odd.tar"
    for before in (b"", PHOTO):
        path.write_bytes(before + odd + PHOTO + bytes(1024))
        rows, error = [], f"{path}: "
        try:
            rows = scan_tar(path).to_pylist()
        except InputError as raised:
            error = str(raised)
        assert error.startswith(f"{path}: ")
        assert "\n" not in error
        assert all(0 <= row["offset"] <= row["offset"] + row["length"] <= path.stat().st_size for row in rows)


def test_a_reader_that_does_not_move_on_is_stopped(tmp_path, monkeypatch):
    """`tarfile` goes where lengths lead it; each member must lie behind the one before, so that a scan has an end."""
    path = make_tar(tmp_path / "photos.tar", [("one.jpg", b"1"), ("two.jpg", b"2")])
    move_on = tarfile.TarFile.next
    times = []

    def stay(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        times.append(archive.offset)
        member = move_on(archive)
        archive.offset = 0
        return member if len(times) < 5 else None

    monkeypatch.setattr(tarfile.TarFile, "next", stay)
    with pytest.raises(InputError, match="a length is negative"):
        scan_tar(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_makes_anything_else_than_an_input_error(tmp_path_factory, data):
    """Bytes of real tars turned at random: the index is an error, or lies within the file."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    folder = tmp_path_factory.mktemp("damaged")
    kind = data.draw(st.sampled_from(sorted(FORMATS)))
    tar = bytearray(make_tar(folder / "t.tar", [("a" * 120 + "/" + "b" * 30, b"1" * 600), ("two.jpg", b"2")], kind).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        tar[draw.randrange(4096)] = draw.choice([0, 0x20, 0x30, 0x37, 0x80, 0xFF, draw.randrange(256)])
    (folder / "t.tar").write_bytes(tar)
    try:
        rows = scan_tar(folder / "t.tar").to_pylist()
    except InputError:
        rows = []
    assert all(0 <= row["offset"] <= row["offset"] + row["length"] <= len(tar) for row in rows)
    shutil.rmtree(folder)


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes that Python had at once for some work."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_long_names_cost_no_memory(tmp_path):
    """Names that are longer than a path may be are not kept: 100 of them would be 5 MB in Python, and 10 MB in Arrow."""
    path = tmp_path / "long.tar"
    with path.open("wb") as file:
        for number in range(100):
            file.write(pax(f"path={number}{'é' * 50_000}") + PHOTO)
        file.write(pax("path=last.jpg") + PHOTO + bytes(1024))
    before = pa.default_memory_pool().max_memory()
    assert peak_memory(lambda: scan_tar(path)) < 3e6
    assert names(path) == ["last.jpg"]
    assert pa.default_memory_pool().max_memory() < before + 3e6


def test_a_member_is_forgotten_when_it_is_indexed(tmp_path):
    """Python's tarfile keeps 1 KB of each, which is 2 GB for Open Images."""
    path = make_tar(tmp_path / "photos.tar", [(f"{number}.jpg", b"") for number in range(1000)])
    assert peak_memory(lambda: scan_tar(path)) < 0.5e6


@pytest.mark.parametrize(("kind", "each", "count"), [(b"x", FEW + 512, 1), (b"L", 2048, 5)])
def test_headers_that_are_too_large_are_not_read(tmp_path, kind, each, count, monkeypatch):
    """One, and some before one member that are so together."""
    monkeypatch.setattr(tar_files, "LARGEST_HEADERS", FEW)
    path = tmp_path / "large.tar"
    headers = [header("a", kind, b"%011o\0" % each) + bytes(each)] * count
    path.write_bytes(PHOTO + b"".join(headers) + PHOTO + bytes(1024))
    message = r"damaged or cut off at byte 1,024 \(headers of one member take more than 8,192 bytes, or less than none\)"
    with pytest.raises(InputError, match=message):
        scan_tar(path)


def test_global_headers_cannot_pile_up(tmp_path):
    path = tmp_path / "global.tar"
    blocks = [pax(f"key{number}=x") for number in range(101)]
    members = [header("global", b"g", block[124:136]) + block[512:] + PHOTO for block in blocks]
    path.write_bytes(b"".join(members[:100]) + bytes(1024))
    assert len(names(path)) == 100
    path.write_bytes(b"".join(members) + bytes(1024))
    with pytest.raises(InputError, match="more than 100 global headers"):
        scan_tar(path)


def test_tars_are_indexed_one_after_the_other(tmp_path):
    one = make_tar(tmp_path / "one.tar", [("a.jpg", b"a"), ("b.jpg", b"bb")])
    none = make_tar(tmp_path / "none.tar", [])
    two = make_tar(tmp_path / "two.tar", [("a.jpg", b"ccc")])
    table = scan_tars([two, none, one])
    assert table.column_names == ["tar", *MEMBERS.names]
    rows = [(row["tar"], row["member"], row["length"]) for row in table.to_pylist()]
    assert rows == [(str(two), "a.jpg", 3), (str(one), "a.jpg", 1), (str(one), "b.jpg", 2)]
    assert pa.types.is_dictionary(table.schema.field("tar").type)
    assert len(scan_tars([])) == 0


# Matching.


def member_table(tars: Iterable[tuple[str, Iterable[str]]]) -> pa.Table:
    """Members of length 1 at offsets that tell them apart."""
    rows = [(tar, name) for tar, members in tars for name in members]
    columns = {"tar": pa.array([tar for tar, _ in rows], pa.string()).dictionary_encode()}
    columns["member"] = pa.array([name for _, name in rows], pa.string())
    columns["offset"] = pa.array(range(len(rows)), pa.int64())
    return pa.table({**columns, "length": pa.array([1] * len(rows), pa.int64())})


def wanted_table(photos: Iterable[tuple[str, str, str | None]]) -> pa.Table:
    splits, ids, files = zip(*photos, strict=True) if photos else ((), (), ())
    columns = {"split": pa.array(splits, pa.string()).dictionary_encode(), "photo_id": pa.array(ids, pa.string())}
    return pa.table({**columns, "file_name": pa.array(files, pa.string())})


def find(tars: dict[str, list[str]], *photos: tuple[str, str, str | None]) -> list[tuple[str, str] | int]:
    """Tar and member of each photo, or how many members fit."""
    members = member_table(tars.items())
    matched = match_members(members, wanted_table(photos)).to_pylist()
    names = members["member"].to_pylist()
    return [(row["tar"], names[row["offset"]]) if row["tar"] else row["fits"] for row in matched]


def by_hand(
    tars: Iterable[tuple[str, Iterable[str]]], photos: Iterable[tuple[str, str, str | None]]
) -> list[tuple[int | None, int]]:
    """`match_members` as its docstring says it, a photo at a time: the row of each photo's member, and how many fit."""

    def cut(path: str) -> tuple[str, ...]:
        return tuple(part for part in path.split("/") if part not in ("", "."))

    places: dict[tuple[str, tuple[str, ...]], int] = {}
    for row, (tar, name) in enumerate((tar, name) for tar, members in tars for name in members):
        places[tar, cut(name)] = row
    found: list[tuple[int | None, int]] = []
    for split, photo_id, file_name in photos:
        if file_name is None:
            forms = [(split, f"{photo_id}.jpg"), (f"{split}_{photo_id[:1]}", f"{photo_id}.jpg")]
        else:
            forms = [cut(file_name), cut(f"{split}/{file_name}")]
        result: int | None = None
        for form, look in (*((form, "alone") for form in forms), *((form, "first") for form in forms), (forms[0][-1:], "last")):
            fitting = [row for (_, path), row in places.items() if form and path[-len(form) :] == form]
            exact = [row for (_, path), row in places.items() if form and path == form] if look != "last" else []
            fitting = exact if look == "alone" else exact or fitting
            if len(fitting) == 1:
                result = fitting[0]
                break
        found.append((result, len(fitting)))
    return found


PARTS = st.sampled_from(["train", "validation", "train_0", "train_a", "0.jpg", "a.jpg", "a0.jpg", ".", "", "..", "x", "é"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
TARS = st.lists(st.tuples(st.sampled_from(["one.tar", "two.tar"]), st.lists(PATHS, max_size=8)), max_size=4)
PHOTOS = st.lists(
    st.tuples(st.sampled_from(["train", "validation"]), st.sampled_from(["0", "a", "a0"]), st.none() | PATHS), max_size=8
)


@settings(max_examples=300, deadline=None)
@given(tars=TARS, photos=PHOTOS)
def test_photos_are_found_as_one_would_by_hand(tars, photos):
    matched = match_members(member_table(tars), wanted_table(photos))
    rows = list(zip(matched["offset"].to_pylist(), matched["fits"].to_pylist(), strict=True))
    assert rows == by_hand(tars, photos)
    tar_of_row = [tar for tar, members in tars for _ in members]
    assert matched["tar"].to_pylist() == [None if row is None else tar_of_row[row] for row, _ in rows]
    assert matched["length"].to_pylist() == [None if row is None else 1 for row, _ in rows]


@settings(max_examples=100, deadline=None)
@given(paths=st.sets(PATHS.filter(lambda path: not {"", ".", "..", "x"} & set(path.split("/"))), max_size=6), photos=PHOTOS)
def test_what_lies_in_a_folder_lies_in_its_tar(tmp_path_factory, paths, photos):
    """A tar of a photo folder gives every photo that the folder gives."""
    folder = tmp_path_factory.mktemp("folder")
    kept = []
    for path in sorted(paths):
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch(exist_ok=False)
            kept.append(path)
        except OSError:  # A folder has this name, or a file has the name of the folder.
            continue
    photos = [photo for photo in photos if photo[2] is None or (photo[2] in kept and not photo[2].endswith("/"))]
    for photo, found in zip(photos, find({"folder.tar": [f"./{path}" for path in kept]}, *photos), strict=True):
        try:
            expected = photo_path(folder, *photo).relative_to(folder)
        except PhotoError:
            continue
        assert found == ("folder.tar", f"./{expected}")


def test_open_images_tars_are_found_by_id():
    """train_0.tar holds train_0/<id>.jpg, validation.tar holds validation/<id>.jpg, wherever somebody packed them."""
    tars = {
        "train_0.tar": ["train_0/00a.jpg", "train_0/00b.jpg"],
        "train_f.tar": ["data/oi/train_f/f00.jpg"],
        "v.tar": ["x/00a.jpg"],
    }
    assert find(tars, ("train", "00a", None), ("train", "f00", None), ("train", "00c", None), ("validation", "00a", None)) == [
        ("train_0.tar", "train_0/00a.jpg"),
        ("train_f.tar", "data/oi/train_f/f00.jpg"),
        0,
        2,
    ]


def test_the_order_of_places_is_that_of_photo_folders():
    everywhere = ["x/b.jpg", "train_i/id.jpg", "train/a/b.jpg", "train/id.jpg", "a/b.jpg", "id.jpg"]
    for here, by_name, by_id in (
        (everywhere, "a/b.jpg", "train/id.jpg"),
        (everywhere[:4], "train/a/b.jpg", "train/id.jpg"),
        (everywhere[:2], "x/b.jpg", "train_i/id.jpg"),
        (["id.jpg"], None, "id.jpg"),
    ):
        named, unnamed = find({"t.tar": here}, ("train", "id", "a/b.jpg"), ("train", "id", None))
        assert named == (("t.tar", by_name) if by_name else 0)
        assert unnamed == ("t.tar", by_id)


def test_an_exact_name_of_the_second_place_goes_before_one_that_ends_like_the_first():
    """As the folder has it, in which train/0.jpg is not there."""
    assert find({"t.tar": ["./train/train/0.jpg", "./train_0/0.jpg"]}, ("train", "0", None)) == [("t.tar", "./train_0/0.jpg")]


def test_two_photos_of_one_name_are_told_apart_by_their_splits_or_not_at_all():
    photos = [("train", "1", "1.jpg"), ("validation", "2", "1.jpg")]
    assert find({"t.tar": ["x/train/1.jpg", "x/validation/1.jpg"]}, *photos) == [
        ("t.tar", "x/train/1.jpg"),
        ("t.tar", "x/validation/1.jpg"),
    ]
    assert find({"train.tar": ["1.jpg"], "validation.tar": ["1.jpg"]}, *photos) == [2, 2]


def test_the_last_of_a_name_in_a_tar_is_the_one():
    members = member_table([("t.tar", ["a.jpg", "b.jpg", "./a.jpg"])])
    assert match_members(members, wanted_table([("train", "1", "a.jpg")]))["offset"].to_pylist() == [2]


def test_matching_takes_what_scanning_gives(tmp_path):
    one = make_tar(tmp_path / "one.tar", [("train/a.jpg", b"first"), ("train/b.jpg", b"second")])
    two = make_tar(tmp_path / "two.tar", [("./validation/c.jpg", b"third"), ("train/a.jpg.txt", b"no")])
    wanted = wanted_table([("validation", "c", None), ("train", "b", None), ("train", "nowhere", None)])
    matched = match_members(scan_tars([one, two]), pa.concat_tables([wanted.slice(0, 1), wanted.slice(1)]))
    read = [
        Path(row["tar"]).read_bytes()[row["offset"] :][: row["length"]] if row["tar"] else None for row in matched.to_pylist()
    ]
    assert read == [b"third", b"second", None]
    assert pa.types.is_dictionary(matched.schema.field("tar").type)
    apart = pa.concat_tables([scan_tars([one]), scan_tars([two])])
    assert match_members(apart, wanted).to_pylist() == matched.to_pylist()
    nothing = match_members(scan_tars([]), wanted)
    assert nothing["tar"].to_pylist() == [None, None, None]
    assert len(match_members(scan_tars([one]), wanted.slice(0, 0))) == 0
