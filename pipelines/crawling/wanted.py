"""Which photos a build wants, and where each may be: objects.parquet and the source's tables -> one row for each photo.

    objects, metadata ──▶ photos, each once ──find_in_tars──▶ a table of `WANTED`
                                                   ▲
                              tars ──scan_tar──▶ members: tar, member, offset, length

A source of photos is a text of `crawl.sources`: a folder, tars, or a URL template. This is the only place that reads these texts.
Tars are indexed in place: nothing is unpacked, and a photo is later read at its offset. Names in them are text to be compared,
and never used as paths.
"""

import difflib
import glob
import re
import string
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from pbe_core.errors import InputError
from pbe_core.photo_files import photo_keys
from pipelines.annotations.source import Source
from pipelines.config import CrawlSettings
from pipelines.crawling.answers import FetchError
from pipelines.photos import as_listed, each_once, known_about
from pipelines.selection.groups import named_photos
from schemas.tables import WANTED, WORD, one_word, with_plain_words

PLACEHOLDERS = ("split", "image_id", "file_name", "url", "thumbnail_url")
_WEB = ("http", "https")
_BUCKETS = ("s3", "gs")
_TABLES_KNOW = ("split", "photo_id", "file_name", "url", "thumbnail_url", "original_md5", "original_bytes")
_LISTED = with_plain_words(pa.schema([WANTED.field(name).remove_metadata() for name in _TABLES_KNOW]))

_MEMBERS = pa.schema([("tar", WORD), ("member", pa.large_string()), ("offset", pa.int64()), ("length", pa.int64())])
# What leads nowhere in a path: "./" and "/" at its beginning, "/./" and "//" within it.
_LEADS_NOWHERE = r"(^|/)(?:\.?/)+"

PhotoSourceKind = Literal["folder", "tars", "bucket", "web"]


@dataclass(frozen=True)
class PhotoSource:
    """One place to look for photos."""

    kind: PhotoSourceKind
    text: str
    """As the settings say it."""
    paths: tuple[Path, ...] = ()
    """The folder, or the tars."""
    original: bool = False
    """Whether it gives the very files that the metadata's OriginalMD5 and OriginalSize are of."""

    def url_of(self, photo: Mapping[str, Any]) -> str:
        """The URL of a wanted photo.

        Raises:
            FetchError: `bad_url`, if the tables do not say what the template asks for.
        """
        values = {"split": photo["split"], "image_id": photo["photo_id"]}
        for name in ("file_name", "url", "thumbnail_url"):
            if f"{{{name}}}" in self.text:
                if not photo[name]:
                    raise FetchError("bad_url", f"the tables give this photo no {name}")
                # A URL is one already; a file's name becomes a part of one, and an object's key is taken as it is.
                values[name] = quote(photo[name]) if name == "file_name" and self.kind == "web" else photo[name]
        return self.text.format_map(values)


def read_sources(settings: CrawlSettings) -> list[PhotoSource]:
    """`crawl.sources`, understood and looked at.

    Raises:
        InputError: a source that is none of the kinds, a folder or tar that is not there, or no contact for web servers.
    """
    sources = [_read_source(text) for text in settings.sources]
    if any(source.kind == "web" for source in sources) and not settings.contact:
        raise InputError(
            "build.crawl.contact is not set: web servers are told whom to write to about this crawl; "
            "give --crawl.contact, an e-mail address or a web page"
        )
    return sources


def list_wanted(objects: Path, source: Source, sources: list[PhotoSource]) -> pa.Table:
    """The photos of a build's objects, each once, sorted by key: a table of `WANTED`, none of them asked for before.

    Args:
        objects: objects.parquet.
        source: annotations, which know the photos' URLs and hashes.
        sources: where photos may be; tars are scanned here.
    """
    file = pq.ParquetFile(objects)
    photos = known_about(source.read_photos(), each_once(_photos_of(file), _LISTED), _LISTED)
    photos = photos.append_column("key", pa.array(photo_keys(photos)))
    tars = [path for photo_source in sources if photo_source.kind == "tars" for path in photo_source.paths]
    if tars:
        found = find_in_tars(scan_tars(tars), photos)
        for name in ("tar", "offset", "length"):
            photos = photos.append_column(name if name == "tar" else f"tar_{name}", found[name])
    missing = [field for field in WANTED if field.name not in photos.schema.names]
    for field in missing:
        photos = photos.append_column(field.name, pa.nulls(len(photos), field.type))
    return pa.table([photos[field.name].cast(field.type) for field in WANTED], schema=WANTED)


def _photos_of(objects: pq.ParquetFile) -> Iterator[pa.Table]:
    """The photos of objects, and those of their references."""
    columns = ["split", "photo_id", "file_name", "url"]
    paired = "references" in objects.schema_arrow.names
    for group in range(objects.num_row_groups):
        part = objects.read_row_group(group, [*columns, "references"] if paired else columns)
        yield as_listed(part.select(columns), _LISTED)
        if named := named_photos(part):
            yield as_listed(pa.Table.from_pylist(named, pa.schema([(name, pa.string()) for name in columns])), _LISTED)


def scan_tars(paths: Iterable[Path]) -> pa.Table:
    """The members of several tars: tar (the path, dictionary-encoded), and member, offset and length as of `scan_tar`."""
    tables = [_MEMBERS.empty_table()]
    for path in paths:
        places = scan_tar(path)
        offsets, lengths = np.array(list(places.values()), np.int64).reshape(-1, 2).T
        columns = [one_word(str(path), len(places)), pa.array(places, pa.large_string()), offsets, lengths]
        tables.append(pa.table(columns, schema=_MEMBERS))
    return pa.concat_tables(tables).unify_dictionaries()


def scan_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Where each regular file of a tar lies: its name -> offset of its first byte, and length, both in bytes.

    Names are without "./", "//" and a leading "/"; bytes that are no UTF-8 appear as \\xNN. Of a name that comes more than once
    (in an archive that was appended to) the last one counts, as for tar. A hard link lies where the member before it lies that it
    names: so tar writes a file that has several names. Other links, folders, devices and sparse files are left out.

    Raises:
        InputError: the file cannot be read, is no tar, is a compressed one, is damaged or cut off, or has no end mark.
    """
    places: dict[str, tuple[int, int]] = {}
    end = 0
    try:
        with path.open("rb") as file, tarfile.TarFile(fileobj=file, encoding="utf-8", errors="backslashreplace") as archive:
            while member := archive.next():
                if archive.offset <= end or member.size < 0:  # It would go in a circle.
                    raise tarfile.HeaderError("a length is negative")
                end = archive.offset
                archive.members.clear()  # type: ignore[attr-defined]  # Else 1 KB stays for each.
                place = (member.offset_data, member.size) if member.isreg() and not member.issparse() else None
                if member.islnk():
                    place = places.get(re.sub(_LEADS_NOWHERE, r"\1", member.linkname))
                if place:
                    places[re.sub(_LEADS_NOWHERE, r"\1", member.name)] = place
            # `tarfile` takes a damaged header for the end.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.HeaderError(f"no end mark at byte {archive.offset:,}")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # What tarfile raises on damaged headers is not listed.
        why = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise InputError(
            f"{path}: no whole tar ({why}); if it is compressed, unpack it first (gunzip, unxz, unzip), since photos are read in "
            f"the middle of it; if it is damaged or cut off, fetch it again"
        ) from None
    return places


def find_in_tars(members: pa.Table, wanted: pa.Table) -> pa.Table:
    """Find photos among the members of tars, by the rules of `photos.photo_path` and then some.

    Args:
        members: of `scan_tars`: tar, member, offset, length.
        wanted: a row for each photo: split, photo_id, and file_name, null for photos that are named by their id.

    A photo lies at <file_name>, else <split>/<file_name>, else at the base name of <file_name>; one without a file name at
    <split>/<photo_id>.jpg, else <split>_<first digit of photo_id>/<photo_id>.jpg, else <photo_id>.jpg. Whatever folders an
    archive puts before these are ignored; but a member that is named exactly as one of the first two goes before others, as in a
    folder. Where several members fit (of different folders or tars), nobody can know which is meant: the next of the three is
    tried, and in the end the photo is not found. It is not guessed, because a wrong photo under a right box would go unnoticed.

    Returns:
        A row for each of `wanted`: tar (dictionary-encoded), offset, length, null where it is not found.
    """
    names = members["member"].combine_chunks()
    first, second, base_name = _names_in_tars(wanted)
    rows = np.full(len(wanted), -1, np.int64)
    for form in (first, second):
        rows = np.where(rows < 0, _only_rows(names, form), rows)
    for form in (first, second, base_name):
        depths = pc.fill_null(pc.count_substring(form, "/"), 0).to_numpy()
        for depth in np.unique(depths[rows < 0]).tolist():
            todo = np.flatnonzero((rows < 0) & (depths == depth))
            rows[todo] = _only_rows(_last_parts(names, depth + 1), form.take(pa.array(todo)))
    return members.select(["tar", "offset", "length"]).take(pa.array(rows, mask=rows < 0))


def _names_in_tars(wanted: pa.Table) -> tuple[pa.LargeStringArray, pa.LargeStringArray, pa.LargeStringArray]:
    """The three names under which each photo is looked for, in this order."""
    split, photo_id, file_name = (pc.cast(wanted[name], pa.large_string()) for name in ("split", "photo_id", "file_name"))
    file_name = pc.replace_substring_regex(file_name, _LEADS_NOWHERE, r"\1")
    slash, none = pa.scalar("/", pa.large_string()), pa.scalar("", pa.large_string())
    by_id = pc.binary_join_element_wise(photo_id, pa.scalar(".jpg", pa.large_string()), none)
    folder = pc.binary_join_element_wise(split, pc.utf8_slice_codeunits(photo_id, 0, 1), pa.scalar("_", pa.large_string()))
    named = pc.is_valid(file_name)
    first = pc.if_else(named, file_name, pc.binary_join_element_wise(split, by_id, slash))
    second = pc.binary_join_element_wise(pc.if_else(named, split, folder), pc.coalesce(file_name, by_id), slash)
    return first.combine_chunks(), second.combine_chunks(), _last_parts(pc.coalesce(file_name, by_id).combine_chunks(), 1)


def _last_parts(paths: pa.LargeStringArray, count: int) -> pa.LargeStringArray:
    """The last `count` components of each path; null where it has fewer."""
    return pc.struct_field(pc.extract_regex(paths, rf"(?P<end>[^/]+(?:/[^/]+){{{count - 1}}})$"), "end")


def _only_rows(names: pa.LargeStringArray, asked: pa.LargeStringArray) -> Int[np.ndarray, " asked"]:
    """The row of the one name that is each asked one; -1 where none or several are."""
    distinct = names.dictionary_encode()
    rows = np.flatnonzero(names.is_valid().to_numpy(zero_copy_only=False))
    codes = distinct.indices.drop_null().to_numpy()
    # One more, for those that are not there.
    times = np.bincount(codes, minlength=len(distinct.dictionary) + 1)
    row = np.full(len(times), -1, np.int64)
    row[codes] = rows
    place = pc.fill_null(pc.index_in(asked, distinct.dictionary), -1).to_numpy()
    return np.where(times[place] == 1, row[place], -1)


def _read_source(text: str) -> PhotoSource:
    scheme = urlsplit(text).scheme
    names = _placeholders(text)
    if text in ("{url}", "{thumbnail_url}"):
        return PhotoSource("web", text, original=text == "{url}")
    if scheme in (*_WEB, *_BUCKETS):
        if not names:
            raise InputError(
                f"build.crawl.sources: {text} is the same for every photo; "
                f"put {{split}} and {{image_id}} (or {{file_name}}) into it"
            )
        if "url" in names or "thumbnail_url" in names:
            raise InputError(f"build.crawl.sources: {text}: {{url}} is a whole URL; give it alone")
        if "{" in urlsplit(text).netloc:
            raise InputError(f"build.crawl.sources: {text}: the host must be the same for every photo")
        return PhotoSource("bucket" if scheme in _BUCKETS else "web", text)
    if "://" in text:
        raise InputError(
            f"build.crawl.sources: {text}: {scheme}:// is not read; use https://, http://, s3:// or gs://, or a folder"
        )
    if text.endswith((".tar", ".tar.gz", ".tgz", ".zip")):
        paths = tuple(Path(path).resolve() for path in sorted(glob.glob(text)))
        if not paths:
            raise InputError(f"build.crawl.sources: {text}: no such file")
        return PhotoSource("tars", text, paths)
    if not Path(text).is_dir():
        raise InputError(f"build.crawl.sources: {text}: no such folder")
    return PhotoSource("folder", text, (Path(text).resolve(),))


def _placeholders(text: str) -> set[str]:
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise InputError(f"build.crawl.sources: {text}: {error}") from None
    for name in names - set(PLACEHOLDERS):
        near = difflib.get_close_matches(name, PLACEHOLDERS, n=1)
        hint = f" (did you mean {{{near[0]}}}?)" if near else ""
        raise InputError(
            f"build.crawl.sources: {text}: nothing is called {{{name}}}{hint}; there are "
            f"{', '.join(f'{{{known}}}' for known in PLACEHOLDERS)}"
        )
    return names
