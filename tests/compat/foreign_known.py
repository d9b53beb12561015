"""The foreign tools that `foreign_tools` tries: what each writes that we or another tool read, and what is known of how it does.

docs/own-data.md has the same in words. Versions: foreign_tools.txt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSIONS = Path(__file__).resolve().parent / "foreign_tools.txt"
# Single precision gives differences of 3e-5 px on these photos.
SLACK = 0.001


@dataclass(frozen=True)
class Format:
    """A format that a tool writes, and what is known of how it does."""

    kind: str
    """`coco`, `boxes` or `open_images`, as our settings say; or what other tools read: `voc`, `yolo`, `labelme`."""
    off: float = 0
    """Largest difference in px: the tool rounds."""
    from_one: bool = False
    """VOC: whether the first px of a photo is 1, and xmax and ymax are the last px of a box; else corners are as COCO's."""
    narrow: bool = False
    """Whether boxes of 1 px can become empty."""
    refused: str | None = None
    """Where the file cannot be read: what the message has in it."""
    breaks: tuple[str, ...] = ()
    """Tools that cannot read this one's files."""
    outlines: bool = False
    """Whether outlines go with the boxes, as far as they went in."""
    turned: bool = True
    """Whether photos that EXIF turns come out right; else they are left out."""
    remark: str = ""
    """What a user should know."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of our source."""


@dataclass(frozen=True)
class Tool:
    """One tool; its version is in foreign_tools.txt."""

    name: str
    frame: str
    """In which its sizes of photos are: `exif`, as viewers show them, or `stored`."""
    writes: Mapping[str, Format]
    reads: Sequence[str] = ()
    """Formats that it turns into COCO; `voc, one-based` counts from 1."""
    off: float = 0
    """How much it rounds then, in px."""
    repeats: int = 0
    """Boxes that its COCO has twice."""
    needs: tuple[str, ...] = ()
    """Packages that it imports and does not ask pip for."""


YOLO = Format("yolo", off=0.01)
IDS_ALONE = "ids of photos without folder or ending"
ROUNDED = {"off": 0.005, "remark": "rounds to 0.01 px"}
TOOLS = (
    Tool(
        "supervision",
        "exif",
        {
            "coco": Format("coco"),
            "coco, masks": Format("coco", outlines=True),
            "voc": Format("voc", off=0.5, from_one=True, narrow=True, remark="whole px"),
            "yolo": YOLO,
            "labelme": Format("labelme"),
        },
        ("voc, one-based", "yolo", "labelme"),
    ),
    Tool(
        "datumaro",
        "exif",
        {
            "coco": Format("coco", **ROUNDED),
            "coco, polygons": Format("coco", outlines=True, **ROUNDED),
            "open_images": Format("open_images", off=0.005, remark=IDS_ALONE, settings={"splits": ("train",)}),
            "voc": Format("voc", **ROUNDED),
            "voc, one-based": Format("voc", off=1, from_one=True, narrow=True, remark="whole px, outwards"),
            "yolo": YOLO,
        },
        ("voc", "voc, one-based"),
        off=0.005,
    ),
    Tool(
        "fiftyone",
        "exif",
        {"coco": Format("coco"), "voc": Format("voc", off=1, narrow=True, remark="whole px"), "yolo": YOLO},
        ("voc", "yolo"),
        off=1,
    ),
    Tool(
        "label-studio-sdk",
        "exif",
        {
            "coco, uploads": Format("coco", refused="leads out of the photo folder", remark="names lead to the server's folder"),
            "coco, local storage": Format("coco"),
            "coco, local paths": Format("coco"),
            "coco, polygons": Format(
                "coco", outlines=True, turned=False, remark="not where EXIF turns a photo: outlines by the size as stored"
            ),
            "voc": Format("voc", off=2, narrow=True, remark="whole px, corner and size cut off"),
            "yolo": YOLO,
        },
    ),
    Tool("labelme2coco", "exif", {"coco": Format("coco"), "coco, polygons": Format("coco", outlines=True)}, ("labelme",)),
    Tool(
        "globox",
        "stored",
        {
            "coco": Format("coco"),
            "open_images": Format("open_images", remark=IDS_ALONE, settings={"splits": ("train",)}),
            "voc": Format("voc"),
            "yolo": YOLO,
            "labelme": Format("labelme"),
        },
        ("voc", "yolo", "labelme"),
    ),
    Tool(
        "labelformat",
        "stored",
        {"coco": Format("coco"), "coco, polygons": Format("coco", outlines=True), "voc": Format("voc"), "yolo": YOLO},
        ("voc", "yolo"),
    ),
    Tool(
        "pylabel",
        "stored",
        {
            "coco": Format("coco", remark="a photo without boxes repeats the box before it"),
            "csv": Format("boxes", settings={"unit": "pixel"}, refused="line 1: columns img_filename, img_path"),
            "voc": Format("voc", off=1, breaks=("datumaro",), remark="whole px, cut off; an empty `difficult`"),
            "yolo": Format(
                "yolo", off=0.05, breaks=("fiftyone", "globox", "labelformat", "pylabel"), remark="numbers of classes as 1.0000"
            ),
        },
        ("voc", "yolo"),
        repeats=1,
    ),
    Tool(
        "imgann",
        "stored",
        {
            "coco": Format("coco", off=1, remark="whole px, cut off; with center=False"),
            "csv": Format("boxes", off=1, settings={"unit": "pixel"}, remark="right and bottom edge whole px; with center=False"),
            "voc": Format("voc", off=1, remark="right and bottom edge whole px; with center=False"),
        },
        needs=("scikit-learn",),
    ),
    Tool("sahi", "stored", {"coco": Format("coco"), "coco, polygons": Format("coco", outlines=True), "yolo": YOLO}),
)


def versions() -> dict[str, str]:
    """The version of each package that is installed, by its name."""
    lines = [line.partition("==") for line in VERSIONS.read_text().splitlines() if "==" in line]
    return {name.lower(): version for name, _, version in lines}
