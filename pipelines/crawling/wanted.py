"""Which photos a build wants, and where each may be: objects.parquet and the source's tables -> one row for each photo.

A source of photos is a text of `crawl.sources`: a folder, tars, or a URL template. This is the only place that reads these texts.
"""

import difflib
import glob
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pbe_core.errors import InputError
from pipelines.annotations.source import Source
from pipelines.config import CrawlSettings
from pipelines.crawling.answers import FetchError
from pipelines.crawling.tar_files import match_members, scan_tars
from pipelines.photos import as_listed, each_once, known_about, photo_keys
from schemas.tables import WANTED, with_plain_words

PLACEHOLDERS = ("split", "image_id", "file_name", "url", "thumbnail_url")
_WEB = ("http", "https")
_BUCKETS = ("s3", "gs")
_TABLES_KNOW = ("split", "photo_id", "file_name", "url", "thumbnail_url", "original_md5", "original_bytes")
_LISTED = with_plain_words(pa.schema([WANTED.field(name).remove_metadata() for name in _TABLES_KNOW]))

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
    columns = ["split", "photo_id", "file_name", "url"]
    parts = (as_listed(file.read_row_group(group, columns), _LISTED) for group in range(file.num_row_groups))
    photos = known_about(source.read_photos(), each_once(parts, _LISTED), _LISTED)
    keys = photo_keys(photos)
    if len(np.unique(keys)) < len(keys):
        raise RuntimeError("two photos have the same key: rename one of them")
    photos = photos.append_column("key", pa.array(keys)).sort_by("key")
    tars = [path for photo_source in sources if photo_source.kind == "tars" for path in photo_source.paths]
    if tars:
        found = match_members(scan_tars(tars), photos)
        for name, known in (("tar", "tar"), ("tar_offset", "offset"), ("tar_length", "length")):
            photos = photos.append_column(name, found[known])
    missing = [field for field in WANTED if field.name not in photos.schema.names]
    for field in missing:
        photos = photos.append_column(field.name, pa.nulls(len(photos), field.type))
    return pa.table([photos[field.name].cast(field.type) for field in WANTED], schema=WANTED)


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
