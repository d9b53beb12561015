"""Places of photos: the texts of `crawl.sources`, and tars: whole, damaged and hostile ones, and which member a photo is."""

import gzip
import io
import itertools
import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbe_core.errors import InputError
from pbe_core.images.decode import PhotoError
from pbe_core.photo_files import photo_path
from pipelines.config import CrawlSettings
from pipelines.crawling.wanted import find_in_tars, read_sources, scan_tar, scan_tars

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(path: Path, members: Iterable[tuple[str, bytes]], kind: str = "gnu") -> Path:
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


def in_place(path: Path) -> dict[str, bytes]:
    """Names and bytes, read from where the index says."""
    data = path.read_bytes()
    return {name: data[offset : offset + length] for name, (offset, length) in scan_tar(path).items()}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_index_points_at_the_bytes_of_each_member(tmp_path, kind):
    draw = random.Random(1)
    sizes = [0, 1, 511, 512, 513, 1024, 5000, 70_000]
    folders = ["", "./", "train//", "/train_0/./", f"{'deep/' * 20}", "ünï/", "../../etc/"]
    members = {
        f"{folder}{number}.jpg": draw.randbytes(size) for number, (folder, size) in enumerate(itertools.product(folders, sizes))
    }
    if kind != "ustar":
        members["a" * 150 + "/" + "b" * 200 + "/photo.jpg"] = b"long"
    members["caf\udce9.jpg"] = b"no UTF-8"
    path = make_tar(tmp_path / "photos.tar", members.items(), kind)
    plain = {name.replace("./", "") if name[0] != "." or name[1] == "/" else name: data for name, data in members.items()}
    plain = {name.replace("//", "/").lstrip("/").replace("\udce9", "\\xe9"): data for name, data in plain.items()}
    assert in_place(path) == plain


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar command")
@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar", "v7"])
def test_what_the_tar_command_writes_is_read(tmp_path, kind):
    """Of all kinds of files: only the regular ones that lie in one piece are photos, under each of their names."""
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    (folder / "one.jpg").write_bytes(b"one" * 1000)
    (folder / "symbolic.jpg").symlink_to("one.jpg")
    (folder / "two.jpg").write_bytes(b"two")
    (folder / "z.jpg").hardlink_to(folder / "two.jpg")
    with (folder / "sparse.jpg").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    sparse = ["--sparse"] if kind in ("gnu", "pax") else []
    command = ["tar", "--create", f"--format={kind}", *sparse, "--sort=name", "--file", str(tmp_path / "photos.tar"), "."]
    subprocess.run(command, cwd=folder.parent, check=True)
    found = in_place(tmp_path / "photos.tar")
    if not sparse:
        del found["train/sparse.jpg"]
    assert found == {"train/one.jpg": b"one" * 1000, "train/two.jpg": b"two", "train/z.jpg": b"two"}


def test_the_last_of_a_name_counts_and_a_hard_link_is_the_member_before_it(tmp_path):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "ahead.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(archive, "a.jpg", b"first")
        add(archive, "b.jpg", type=tarfile.LNKTYPE, linkname="./a.jpg")
        add(archive, "./a.jpg", b"second")
        add(archive, "c.jpg", type=tarfile.LNKTYPE, linkname="b.jpg")
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)):
            add(archive, f"{number}.jpg", type=kind, linkname="/etc/passwd")
    assert in_place(path) == {"a.jpg": b"second", "b.jpg": b"first", "c.jpg": b"first"}


def whole(tmp_path: Path) -> bytes:
    """Of a tar with two photos: header, 1,024 bytes of data, header, 512 bytes, end mark."""
    return make_tar(tmp_path / "whole.tar", [("one.jpg", b"1" * 700), ("two.jpg", b"2" * 10)]).read_bytes()


def test_a_tar_that_is_not_whole_is_an_error_and_never_a_shorter_one(tmp_path):
    path, data = tmp_path / "odd.tar", whole(tmp_path)
    damaged = bytearray(data)
    damaged[1536] ^= 1
    odd = [data[:length] for length in (0, 100, 600, 1212, 1536, 1836, 2048, 2560, 2660)]
    odd += [bytes(damaged), gzip.compress(data), b"\xff\xd8\xff" + bytes(2000), b"PK\3\4" + bytes(3000)]
    for each in odd:
        path.write_bytes(each)
        with pytest.raises(InputError, match=r"odd\.tar: no whole tar \(.*\); if it is compressed, unpack it first") as raised:
            scan_tar(path)
        assert "\n" not in str(raised.value)
    path.write_bytes(data[: 2560 + 512])  # One block of the end mark is enough, and what follows it is not read.
    assert list(scan_tar(path)) == ["one.jpg", "two.jpg"]
    path.write_bytes(data * 2)
    assert list(scan_tar(path)) == ["one.jpg", "two.jpg"]
    with pytest.raises(InputError, match=r"nothing\.tar: No such file"):
        scan_tar(tmp_path / "nothing.tar")


@settings(max_examples=100)
@given(st.data())
def test_no_damage_makes_anything_else_than_an_input_error(tmp_path_factory, data):
    """Bytes of real tars turned at random: the index is an error, or lies within the file."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    kind = data.draw(st.sampled_from(sorted(FORMATS)))
    tar = bytearray(make_tar(path, [("a" * 120 + "/" + "b" * 30, b"1" * 600), ("two.jpg", b"2")], kind).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        tar[draw.randrange(4096)] = draw.choice([0, 0x20, 0x30, 0x37, 0x80, 0xFF, draw.randrange(256)])
    path.write_bytes(tar)
    try:
        places = scan_tar(path)
    except InputError:
        places = {}
    assert all(0 <= offset <= offset + length <= len(tar) for offset, length in places.values())


@pytest.mark.parametrize("size", [b"\xff" * 11 + b"\0", b"\xff" * 10 + b"\xf0\0"])
def test_a_length_that_leads_backwards_has_an_end(tmp_path, size):
    """Negative ones, in base 256 as GNU tar writes large ones."""
    block = bytearray(tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT)[:512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "odd.tar").write_bytes(whole(tmp_path)[:2560] + bytes(block) + bytes(1024))
    with pytest.raises(InputError, match="no whole tar"):
        scan_tar(tmp_path / "odd.tar")


# Matching.


def wanted_table(photos: Iterable[tuple[str, str, str | None]]) -> pa.Table:
    splits, ids, files = zip(*photos, strict=True) if photos else ((), (), ())
    columns = {"split": pa.array(splits, pa.string()).dictionary_encode(), "photo_id": pa.array(ids, pa.string())}
    return pa.table({**columns, "file_name": pa.array(files, pa.string())})


def find(tars: dict[str, list[str]], *photos: tuple[str, str, str | None]) -> list[tuple[str, str] | None]:
    """Tar and member of each photo."""
    rows = [(tar, name) for tar, members in tars.items() for name in members]
    members = {"tar": pa.array([tar for tar, _ in rows], pa.string()).dictionary_encode()}
    members["member"] = pa.array([name for _, name in rows], pa.large_string())
    members["offset"] = members["length"] = pa.array(range(len(rows)), pa.int64())
    found = find_in_tars(pa.table(members), wanted_table(photos))["offset"].to_pylist()
    return [None if row is None else rows[row] for row in found]


PARTS = st.sampled_from(["train", "validation", "train_0", "train_a", "0.jpg", "a.jpg", "a0.jpg"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
PHOTOS = st.lists(
    st.tuples(st.sampled_from(["train", "validation"]), st.sampled_from(["0", "a", "a0"]), st.none() | PATHS), max_size=8
)


@settings(max_examples=50)
@given(paths=st.sets(PATHS, max_size=6), photos=PHOTOS)
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
    for photo, found in zip(photos, find({"folder.tar": kept}, *photos), strict=True):
        try:
            expected = photo_path(folder, *photo).relative_to(folder)
        except PhotoError:
            continue
        assert found == ("folder.tar", str(expected))


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
        None,
        None,  # Two have its base name.
    ]


def test_the_order_of_places_is_that_of_photo_folders():
    everywhere = ["x/b.jpg", "train_i/id.jpg", "train/a/b.jpg", "train/id.jpg", "a/b.jpg", "id.jpg"]
    for here, by_name, by_id in (
        (everywhere, "a/b.jpg", "train/id.jpg"),
        (everywhere[:4], "train/a/b.jpg", "train/id.jpg"),
        (everywhere[:2], "x/b.jpg", "train_i/id.jpg"),
        (["id.jpg"], None, "id.jpg"),
    ):
        named, unnamed = find({"t.tar": here}, ("train", "id", "./a//b.jpg"), ("train", "id", None))
        assert named == (("t.tar", by_name) if by_name else None)
        assert unnamed == ("t.tar", by_id)
    # As the folder has it, in which train/0.jpg is not there.
    assert find({"t.tar": ["train/train/0.jpg", "train_0/0.jpg"]}, ("train", "0", None)) == [("t.tar", "train_0/0.jpg")]


def test_two_photos_of_one_name_are_told_apart_by_their_splits_or_not_at_all():
    photos = [("train", "1", "1.jpg"), ("validation", "2", "1.jpg")]
    assert find({"t.tar": ["x/train/1.jpg", "x/validation/1.jpg"]}, *photos) == [
        ("t.tar", "x/train/1.jpg"),
        ("t.tar", "x/validation/1.jpg"),
    ]
    assert find({"train.tar": ["1.jpg"], "validation.tar": ["1.jpg"]}, *photos) == [None, None]


def test_matching_takes_what_scanning_gives(tmp_path):
    one = make_tar(tmp_path / "one.tar", [("train/a.jpg", b"first"), ("train/b.jpg", b"second")])
    two = make_tar(tmp_path / "two.tar", [("./validation/c.jpg", b"third"), ("train/a.jpg.txt", b"no")])
    wanted = wanted_table([("validation", "c", None), ("train", "b", None), ("train", "nowhere", None)])
    found = find_in_tars(scan_tars([one, two]), pa.concat_tables([wanted.slice(0, 1), wanted.slice(1)]))
    read = [Path(row["tar"]).read_bytes()[row["offset"] :][: row["length"]] if row["tar"] else None for row in found.to_pylist()]
    assert read == [b"third", b"second", None]
    assert pa.types.is_dictionary(found.schema.field("tar").type)
    empty = make_tar(tmp_path / "empty.tar", [])
    assert find_in_tars(scan_tars([empty]), wanted)["tar"].to_pylist() == [None] * 3
    assert len(find_in_tars(scan_tars([one]), wanted.slice(0, 0))) == 0


# Sources.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://host/photos/", r"the same for every photo; put \{split\} and \{image_id\}"),
        ("https://host/{imag_id}.jpg", r"nothing is called \{imag_id\} \(did you mean \{image_id\}\?\)"),
        ("https://host/{}.jpg", r"nothing is called \{\}"),
        ("https://host/{split", "expected '}'"),
        ("https://{split}.host/{image_id}", "the host must be the same"),
        ("https://host/{url}", "is a whole URL; give it alone"),
        ("ftp://host/{image_id}.jpg", "ftp:// is not read"),
        ("/no/such/folder", "no such folder"),
        ("/no/such/*.tar", "no such file"),
        ("{url}", r"build\.crawl\.contact is not set.*--crawl\.contact"),
        ("https://host/{image_id}", r"build\.crawl\.contact is not set.*--crawl\.contact"),
    ],
)
def test_sources_that_are_none(source, message):
    with pytest.raises(InputError, match=message):
        read_sources(CrawlSettings(sources=(source,)))


def test_paths_of_sources_do_not_depend_on_where_a_worker_starts(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    [source] = read_sources(CrawlSettings(sources=("photos",)))
    assert source.paths == (tmp_path / "photos",)
