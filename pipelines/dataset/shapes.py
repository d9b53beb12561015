"""Which shape the views of each object have, where views are not all squares: a function of its photo's width and height alone.

    objects (width, height, rotation) ──unknown? the survey's──▶ aspect ──nearest──▶ number of a bucket

Tables of COCO say how large photos are. Those of Open Images do not, nor do most people's own; a survey of the photos does.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64

from pbe_core.buckets import Shape, nearest_buckets
from pbe_core.photo_files import photo_keys


class PhotoShapes:
    """Buckets, and sizes of photos that a survey has read: 16 bytes for each of these.

    Args:
        buckets: shapes of views, px.
        survey: folder of a survey, if there is one.
    """

    def __init__(self, buckets: tuple[Shape, ...], survey: Path | None) -> None:
        self.buckets = buckets
        self.known = 0
        """Objects so far whose photo's size is known."""
        self.unknown = 0
        """Objects so far whose photo is taken for a square."""
        self._keys, self._sizes = _surveyed(survey)

    def of(self, objects: pa.Table) -> Int64[np.ndarray, " objects"]:
        """Number of the bucket of each of these rows of the objects table."""
        sizes = np.stack([pc.fill_null(objects[name], 0).to_numpy() for name in ("width", "height")], axis=1).astype(np.int64)
        missing = np.flatnonzero((sizes <= 0).any(axis=1))
        if len(missing) and len(self._keys):
            wanted = photo_keys(objects.take(pa.array(missing)))
            places = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
            sizes[missing] = np.where((self._keys[places] == wanted)[:, None], self._sizes[places], 0)
        turned = pc.fill_null(objects["rotation"], 0).to_numpy() % 180 != 0
        sizes[turned] = sizes[turned, ::-1]
        unknown = int((sizes <= 0).any(axis=1).sum())
        self.unknown += unknown
        self.known += len(sizes) - unknown
        return nearest_buckets(sizes[:, 0], sizes[:, 1], self.buckets)


def _surveyed(survey: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys of a survey's photos, and their width and height, px; nothing without a survey."""
    keys, sizes = [np.zeros(0, np.uint64)], [np.zeros((0, 2), np.int32)]
    if survey is None:
        return keys[0], sizes[0]
    with pq.ParquetFile(survey / "photos.parquet") as file:
        for batch in file.iter_batches(columns=["split", "photo_id", "width", "height"]):
            rows = pa.Table.from_batches([batch])
            rows = rows.filter(pc.is_valid(rows["width"]))
            keys.append(photo_keys(rows))
            sizes.append(np.stack([rows[name].to_numpy() for name in ("width", "height")], axis=1))
    all_keys = np.concatenate(keys)
    order = np.argsort(all_keys, kind="stable")
    return all_keys[order], np.concatenate(sizes)[order]
