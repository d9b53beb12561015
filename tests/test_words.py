"""What programs say where there is one of everything: `1 sample`, and never `1 samples`."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pbe_core.dataset_reader import find_imbalance
from pbe_core.errors import InputError
from pbe_train.checkpoints.init_from_pretrained import LoadReport
from pbe_train.data.corrupt_samples import CorruptSamples
from pbe_train.data.order import rank_slots
from pipelines.annotations.own_boxes import open_boxes
from pipelines.config import RaySettings, SourceSettings
from pipelines.dataset.pack import share_out
from schemas.dataset import Books

PLURALS = re.compile(r"(?<![\d.,])1 (?:[a-z-]+ )?[a-zA-Z-]+(?<!s)(?:s|es)(?<! is)(?<! was)(?<! has)\b|\(e?s\)")


def books(**counts: int) -> Books:
    nothing = {"objects": 0, "rejects": {}, "samples": 0, "failures": {}, "masks": {}, "padded_views": 0}
    return Books.model_validate({**nothing, "boxes": 0, "planned": 0, **counts})


def own_table(folder: Path, row: str, unit: str, header: str = "photo,x_min,y_min,x_max,y_max") -> str:
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    (folder / "boxes.csv").write_text(f"{header}\n{row}\n")
    source = open_boxes(SourceSettings(kind="boxes", annotations=folder / "boxes.csv", photos=folder, unit=unit), 0)
    return "; ".join(str(row["detail"]) for batch in source.read_boxes() for row in batch.to_pylist())


SAID: dict[str, Callable[[Path], str | None]] = {
    "books of boxes": lambda _: find_imbalance(books(boxes=1)),
    "books of samples": lambda _: find_imbalance(books(planned=1)),
    "actors": lambda _: str(share_out(RaySettings(gpus_per_actor=1), {"CPU": 1})),
    "ranks": lambda _: str(rank_slots(0, 1, 1, 0)),
    "damage": lambda _: str(CorruptSamples(0).add([("a", "b", "torn")])),
    "start": lambda _: LoadReport("a", "b", {"U-Net": 1}, [], {}, None).lines(),
    "fractions": lambda folder: own_table(folder, "a.png,0.1,0.1,0.3,0.3", "pixel"),
    "px": lambda folder: own_table(folder, "a.png,1,1,30,30", "fraction"),
    "a short row": lambda folder: own_table(folder, "a.png,1,1,30,30\na.png", "pixel"),
}


@pytest.mark.parametrize("what", SAID)
def test_one_of_a_kind_is_told_in_the_singular(tmp_path, what):
    try:
        told = SAID[what](tmp_path)
    except (InputError, ValueError) as error:
        told = str(error)
    assert told is not None
    assert re.search(r"\b1 \w", told), told
    assert not PLURALS.search(told), told
