"""Is what the field's tools write read box for box? By command, as it installs each tool in an environment of its own:

    python -m tests.compat.foreign_tools [--tools supervision datumaro ...] [--keep FOLDER]

Each of six tools writes one small dataset in its formats that we read, our readers read it, and every box is compared with
what went in. Prints a table; ends with status 1 where a box is lost or farther off than is known of the tool. docs/own-data.md
has what is known in words; versions are in foreign_tools.txt.

    foreign_world ──▶ photos, boxes ──foreign_writers, in the tool's environment──▶ its formats ──our readers──▶ compared

Takes 3 GB of disk, and 10 minutes on two cores; less where `--keep` has the environments.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from pbe_core.errors import InputError, run_program
from pipelines.config import BuildSettings
from pipelines.dataset.write_plan import select_and_plan
from tests.compat.foreign_world import TruePhoto, as_stored, make_world

HERE = Path(__file__).resolve().parent
VERSIONS = HERE / "foreign_tools.txt"
SECONDS = 600  # A tool that waits for a server or the network is given up.
# Single precision gives differences of 3e-5 px on these photos.
SLACK = 0.001


@dataclass(frozen=True)
class Format:
    """A format that a tool writes, and what is known of how it does."""

    kind: str = "coco"
    """As our settings say."""
    off: float = 0
    """Largest difference in px: the tool rounds."""
    refused: str | None = None
    """Where the file cannot be read: what the message has in it."""
    outlines: bool = False
    """Whether outlines go with the boxes, as far as they went in."""
    turned: bool = True
    """Whether photos that EXIF turns come out right; else they are left out."""
    remark: str = ""
    """What a user should know."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of our source."""
    rejects: Mapping[str, int] = field(default_factory=dict)
    """Boxes that the tool makes none of, by our reason for them."""


@dataclass(frozen=True)
class Tool:
    """One tool; its version is in foreign_tools.txt."""

    name: str
    frame: str
    """In which its sizes of photos are: `exif`, as viewers show them, or `stored`."""
    writes: Mapping[str, Format]
    repeats: int = 0
    """Boxes that its COCO has twice."""
    needs: tuple[str, ...] = ()
    """Packages that it imports and does not ask pip for."""


COCO, OUTLINES, ROUNDED = Format(), Format(outlines=True), {"off": 0.005, "remark": "rounds to 0.01 px"}
IDS_ALONE = {"kind": "open_images", "remark": "ids of photos without folder or ending", "settings": {"splits": ("train",)}}
YOLO = Format("yolo", off=0.006, remark="rounds to 0.01 px or less")
FROM_ONE = "whole px that count from 1, which nothing in the file says"
ONE_SPLIT = {"splits": ("train",)}
NOT_TURNED = "not where EXIF turns a photo: outlines by the size as stored"
EDGES = "right and bottom edge whole px; with center=False"
REPEATS = Format(remark="a photo without boxes repeats the box before it")
TOOLS = (
    Tool(
        "supervision",
        "exif",
        {
            "coco": COCO,
            "coco, masks": OUTLINES,
            "yolo": YOLO,
            "voc": Format("voc", off=1.5, rejects={"empty_box": 1}, remark=FROM_ONE),
        },
    ),
    Tool(
        "datumaro",
        "exif",
        {
            "coco": Format(**ROUNDED),
            "coco, polygons": Format(outlines=True, **ROUNDED),
            "open_images": Format(off=0.005, **IDS_ALONE),
            "yolo": YOLO,
            "yolo, ultralytics": YOLO,
            "voc": Format("voc", settings=ONE_SPLIT, **ROUNDED),
            "cvat": Format("cvat", **ROUNDED),
            "cvat, polygons": Format("cvat", outlines=True, **ROUNDED),
        },
    ),
    Tool(
        "label-studio-sdk",
        "exif",
        {
            "coco, uploads": Format(refused="leads out of the photo folder", remark="names lead to the server's folder"),
            "coco, local storage": COCO,
            "coco, local paths": COCO,
            "coco, polygons": Format(outlines=True, turned=False, remark=NOT_TURNED),
            "json, uploads": Format("label_studio"),
            "json, polygons": Format("label_studio", outlines=True),
            "json min": Format("label_studio"),
            "yolo": Format("yolo"),
            "voc": Format("voc", off=2, rejects={"empty_box": 1}, remark="whole px, corners and sizes cut off"),
        },
    ),
    Tool("globox", "stored", {"coco": COCO, "open_images": Format(**IDS_ALONE), "yolo": YOLO, "voc": Format("voc")}),
    Tool(
        "pylabel",
        "stored",
        {"coco": REPEATS, "csv": Format("boxes", settings={"unit": "pixel"}, refused="columns img_filename, img_path")},
        repeats=1,
    ),
    Tool(
        "imgann",
        "stored",
        {
            "coco": Format(off=1, remark="whole px, cut off; with center=False"),
            "csv": Format("boxes", off=1, settings={"unit": "pixel"}, remark=EDGES),
        },
        needs=("scikit-learn",),
    ),
)


@dataclass(frozen=True)
class Found:
    """What was read of one file."""

    tool: Tool
    format: str
    boxes: int
    """That went in."""
    outlined: int
    """Those of them that have an outline."""
    written: int | None = None
    read: int = 0
    outlines: int = 0
    """Boxes that have one, as read."""
    off: float = 0.0
    problem: str = ""

    @property
    def known(self) -> Format:
        """What is known of the tool."""
        return self.tool.writes[self.format]

    @property
    def as_known(self) -> bool:
        """Whether no box is lost, new or farther off than is known of the tool."""
        if self.known.refused is not None:
            return bool(self.problem) and self.known.refused in self.problem
        if self.known.outlines and self.outlines < self.outlined:
            return False
        return (
            not self.problem and self.boxes == self.read + sum(self.known.rejects.values()) and self.off <= self.known.off + SLACK
        )


def main() -> int:
    """All tools, or those that are named; returns 1 where one of them is not as known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=[tool.name for tool in TOOLS], default=[tool.name for tool in TOOLS])
    parser.add_argument("--keep", type=Path, help="folder for environments and all files; kept, and its environments used again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.keep or Path(scratch)).absolute()
        for name in ("world", "world without turned", "written", "read"):
            shutil.rmtree(folder / name, ignore_errors=True)
        shown = make_world(folder / "world")
        make_world(folder / "world without turned", turned=False)
        worlds = {"exif": shown, "stored": [as_stored(photo) for photo in shown]}
        tools = [tool for tool in TOOLS if tool.name in options.tools]
        found = [try_format(folder, worlds[tool.frame], tool, name) for tool in tools for name in tool.writes]
    table = Table(
        "tool", "version", "format", "frame", "boxes in", "written", "read", "outlines", "off, px", "as known", "remarks"
    )
    for one in found:
        outlines = f"{one.outlines} of {one.outlined}" if one.known.outlines else ""
        counts = [one.boxes, "" if one.written is None else one.written, one.read, outlines, f"{one.off:.4f}"]
        remarks = "; ".join(filter(None, [one.known.remark, one.problem]))
        names = [one.tool.name, versions()[one.tool.name], one.format, one.tool.frame]
        table.add_row(*names, *map(str, counts), "yes" if one.as_known else "NO", remarks)
    Console(width=200).print(table)
    wrong = sum(not one.as_known for one in found)
    print(f"{len(found)} files, {len(found) - wrong} as known, {wrong} not")
    return int(bool(wrong))


def try_format(folder: Path, world: Sequence[TruePhoto], tool: Tool, name: str) -> Found:
    """Let a tool write, read what it wrote with our readers, as pipelines/plan.py does, and compare it with the truth."""
    known = tool.writes[name]
    photos = [photo for photo in world if known.turned or photo.orientation == 1]
    boxes = [box for photo in photos for box in photo.boxes]
    out = folder / "written" / tool.name / name
    start = Found(tool, name, len(boxes), sum(bool(box.polygon) for box in boxes))
    made = run_tool(folder, tool, name, folder / ("world" if known.turned else "world without turned"), out)
    if isinstance(made, str):
        return replace(start, problem=made)
    annotations = out / made["annotations"]
    place = out / made["photos"] if made.get("photos") else folder / "world" / "photos"
    written = None
    if known.kind == "coco":
        written = len(json.loads(annotations.read_text(encoding="utf-8"))["annotations"])
    source: dict[str, Any] = {"kind": known.kind, "annotations": annotations, "photos": place, **known.settings}
    if known.kind != "open_images":
        source["frame"] = tool.frame
    everything = {"min_area": 0, "max_area": 1, "reject_flags": (), "near_duplicate_iou": None}
    target = folder / "read" / f"{tool.name}, {name}"
    try:
        select_and_plan(BuildSettings.model_validate({"out": target, "source": source, "selection": everything}))
    except InputError as error:
        return replace(start, written=written, problem=str(error))
    objects = pq.read_table(target / "objects.parquet").to_pylist()
    rejects = pq.read_table(target / "rejects.parquet", columns=["reason", "detail"]).to_pylist()
    matched, off = compare(photos, objects)
    outlines = sum(row["segmentation"] is not None for row in objects)
    others = Counter(reject["reason"] for reject in rejects) - Counter(duplicate=tool.repeats) - Counter(known.rejects)
    problem = f"rejected: {dict(others)}, {rejects[0]['detail']}" if others else ""
    if len(objects) > matched:
        problem = f"{len(objects) - matched} boxes that never went in"
    return replace(start, written=written, read=matched, outlines=outlines, off=off, problem=problem)


def run_tool(folder: Path, tool: Tool, format_: str, source: Path, out: Path) -> dict[str, Any] | str:
    """What the tool says it wrote; or, where it fails, the last line of its error."""
    python = make_environment(folder / "venv" / tool.name, tool)
    print(f"{tool.name}, {format_}", flush=True)
    # Tools keep settings and data bases at home, and ask the network for news.
    home = folder / "home"
    home.mkdir(exist_ok=True)
    quiet = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "SUPERVISION_DEPRECATION_WARNING": "0"}
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **quiet}
    # -I: nothing of this environment, and not this project's folder, is on the path.
    words = [str(python), "-I", str(HERE / "foreign_writers.py"), tool.name, format_, str(source), str(out)]
    try:
        done = subprocess.run(words, env=environment, cwd=home, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s"
    out.with_name(f"{out.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line or "Fail" in line]
        return f"{tool.name}: {(errors or [f'status {done.returncode}'])[-1]}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def make_environment(folder: Path, tool: Tool) -> Path:
    """The Python of an environment that has one tool and nothing of this one's.

    Raises:
        InputError: it cannot be installed.
    """
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        print(f"installing {tool.name} {versions()[tool.name]}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--quiet", "--constraint", str(VERSIONS)]
        if subprocess.run([*pip, tool.name, *tool.needs], check=False).returncode:
            raise InputError(f"{folder}: pip cannot install {tool.name}; see above")
        (folder / "installed").touch()
    return python


def versions() -> dict[str, str]:
    """The version of each package that is installed, by its name."""
    lines = [line.partition("==") for line in VERSIONS.read_text().splitlines() if "==" in line]
    return {name.lower(): version for name, _, version in lines}


def compare(truth: Sequence[TruePhoto], objects: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """How many boxes have their counterpart, of the same photo and label, and how far the worst is off in px."""
    matched, off = 0, 0.0
    for number, photo in enumerate(truth):
        here = [row for row in objects if _is_of(row, photo, number)]
        for label in {box.label for box in photo.boxes}:
            wanted = np.array([box.edges for box in photo.boxes if box.label == label])
            got = np.array([_edges(row, photo) for row in here if row["label_name"] == label]).reshape(-1, 4)
            distance = np.abs(wanted[:, None] - got[None]).max(-1)
            rows, columns = linear_sum_assignment(distance)
            matched += len(rows)
            off = max(off, float(distance[rows, columns].max(initial=0)))
    return matched, off


def _is_of(row: Mapping[str, Any], photo: TruePhoto, number: int) -> bool:
    """Whether a row is of a photo: its base name, after what tools put before it; or its number, where photos have no names."""
    if row["file_name"] is None:
        return bool(row["photo_id"] == f"{number:016x}")
    return Path(row["file_name"]).stem.rpartition("__")[2] == Path(photo.name).stem


def _edges(row: Mapping[str, Any], photo: TruePhoto) -> tuple[float, float, float, float]:
    width, height = row["width"] or photo.width, row["height"] or photo.height
    return row["x_min"] * width, row["y_min"] * height, row["x_max"] * width, row["y_max"] * height


if __name__ == "__main__":
    run_program(main)
