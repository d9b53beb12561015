"""Settings of `pipelines/benchmark.py`: those of a build, and a section of its own beside them."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from pbe_core.errors import InputError
from pbe_core.settings import Group
from pipelines.config import BuildSettings
from pipelines.readers import reader_of

PUBLISHED_COUNT = 3500


class PairSettings(Group):
    """Which pairs are made of the objects that selection accepts, and how."""

    out: Path
    """Folder of the pair set; not there yet, or empty."""
    count: int | None = Field(None, ge=1)
    """Pairs; 3,500 by default, as COCOEE has, or all of `ids`. A smaller set lies within a larger one."""
    split: Literal["train", "validation", "test", "all"] = "validation"
    """Whose photos are used, both as photos and for references."""
    size: int = Field(512, ge=64)
    """Side of a photo in px; references are no longer than that."""
    reference: Literal["nearest", "random"] = "nearest"
    """Which object of the same class in another photo is the reference: the one nearest to the object by the judge's features
    (cosine), or any."""
    judge: str | None = None
    """For `nearest`: the network that compares, as KIND=WHERE, such as mobilenet=FILE.safetensors or clip=FOLDER."""
    candidates: int = Field(50, ge=2)
    """References of a class are chosen among so many of its objects, each of another photo, drawn by name."""
    ids: Path | None = None
    """coco only: the photos and boxes of these annotation ids (.npy of whole numbers), such as COCOEE's id_list.npy, in this
    order; the rules of selection are asked of references alone."""
    threads: int | None = Field(None, ge=1)
    """Threads that decode, compare and encode; null means one for each CPU. No byte depends on it."""


class BenchmarkSettings(BuildSettings):
    """All settings of a pair set. Of a build's own, those of source, selection, crawl, seed and references.padding are read."""

    out: Path = Path("unused")
    """Not read: the dataset's folder, where a config file is also a build's. A pair set's is benchmark.out."""
    benchmark: PairSettings


def of_one_split(settings: BenchmarkSettings) -> BenchmarkSettings:
    """The settings with which boxes are read: only those of the photos that may be used.

    Raises:
        InputError: two settings do not go together.
    """
    pairs, source = settings.benchmark, settings.source
    if pairs.reference == "nearest" and pairs.judge is None:
        raise InputError(
            "build.benchmark.judge is not set: the nearest reference is found by a network's features, so give "
            "--benchmark.judge KIND=WHERE (mobilenet=FILE.safetensors, clip=FOLDER), or --benchmark.reference random"
        )
    if pairs.reference == "random" and pairs.judge is not None:
        raise InputError("build.benchmark.judge: nobody asks it, as build.benchmark.reference is random; leave one of them out")
    if pairs.ids is not None and not reader_of(source.kind).annotation_ids:
        raise InputError(f"build.benchmark.ids: annotation ids are COCO's, and source.kind is {source.kind}; leave it out")
    splits: tuple[str, ...] = source.splits if pairs.split == "all" else (pairs.split,)
    # One file has no splits of its own, and ids name its annotations wherever a hash would put their photos.
    if pairs.ids is not None and source.annotations.is_file():
        splits = ("train", "validation")
    return settings.model_copy(update={"source": source.model_copy(update={"splits": splits})})
