"""Is what the field's tools write read box for box? By command, as it installs each tool in an environment of its own:

    python -m tests.compat.foreign_tools [--tools supervision datumaro ...] [--keep FOLDER]

Each tool writes one small dataset in all its formats that we read, our readers read it, and every box is compared with what went
in. Formats that we do not read (Pascal VOC, YOLO, LabelMe) are turned into COCO by every tool that reads them, whoever wrote them:
there the tools differ by a pixel. Prints a table; ends with status 1 where a box is lost or farther off than is known of the tool.

    foreign_world ──▶ photos, boxes ──foreign_writers, in the tool's environment──▶ COCO, CSV ──our readers──▶ compared
                                            └──▶ VOC, YOLO, LabelMe ──another tool──▶ COCO ──┘

Needs network for pip, 3 GB of disk and half an hour on two cores. Versions: foreign_tools.txt.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from pipelines.config import BuildSettings
from pipelines.planning.freeze import freeze_tables
from schemas.errors import InputError, run_program
from tests.compat.foreign_world import TrueBox, TruePhoto, as_stored, make_world

HERE = Path(__file__).resolve().parent
VERSIONS = HERE / "foreign_tools.txt"
SECONDS = 600  # A tool that waits for a server or the network is given up.
# Beyond this, in px, a box is not the one that went in: single precision gives 3e-5 on these photos.
EXACT = 0.001


@dataclass(frozen=True)
class Format:
    """A format that a tool writes."""

    kind: str
    """`coco`, `boxes` or `open_images`, as our settings say; or what other tools read: `voc`, `yolo`, `labelme`."""
    off: float = EXACT
    """Largest difference in px that is known of the tool."""
    lost: int = 0
    """Boxes that the tool itself is known to leave out."""
    remark: str = ""
    """Why."""
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
    """Formats that it turns into COCO."""


TOOLS = (
    Tool(
        "supervision",
        "exif",
        {
            "coco": Format("coco"),
            "coco, masks": Format("coco"),
            "voc": Format("voc"),
            "yolo": Format("yolo"),
            "labelme": Format("labelme"),
        },
        ("voc", "yolo", "labelme"),
    ),
    Tool(
        "datumaro",
        "exif",
        {
            "coco": Format("coco"),
            "coco, polygons": Format("coco"),
            "open_images": Format("open_images", settings={"splits": ("train",)}),
            "voc": Format("voc"),
            "voc, one-based": Format("voc"),
            "yolo": Format("yolo"),
        },
        ("voc", "voc, one-based"),
    ),
    Tool(
        "label-studio-sdk",
        "exif",
        {
            "coco": Format("coco"),
            "coco, polygons": Format("coco"),
            "coco, local paths": Format("coco"),
            "voc": Format("voc"),
            "yolo": Format("yolo"),
        },
    ),
    Tool(
        "labelme2coco",
        "exif",
        {"coco": Format("coco"), "coco, polygons": Format("coco")},
        ("labelme",),
    ),
    Tool(
        "globox",
        "stored",
        {
            "coco": Format("coco"),
            "open_images": Format("open_images", settings={"splits": ("train",)}),
            "voc": Format("voc"),
            "yolo": Format("yolo"),
            "labelme": Format("labelme"),
        },
        ("voc", "yolo", "labelme"),
    ),
    Tool(
        "labelformat",
        "stored",
        {"coco": Format("coco"), "coco, polygons": Format("coco"), "voc": Format("voc"), "yolo": Format("yolo")},
        ("voc", "yolo"),
    ),
    Tool(
        "pylabel",
        "stored",
        {"coco": Format("coco"), "csv": Format("boxes", settings={"unit": "pixel"}), "voc": Format("voc"), "yolo": Format("yolo")},
        ("voc", "yolo"),
    ),
    Tool("sahi", "stored", {"coco": Format("coco"), "coco, polygons": Format("coco"), "yolo": Format("yolo")}),
)


@dataclass(frozen=True)
class Found:
    """What was read of one file."""

    tool: str
    format: str
    boxes: int
    written: int | None = None
    read: int = 0
    off: float = 0.0
    problem: str = ""
    known: Format | None = None

    @property
    def as_known(self) -> bool:
        """Whether no box is lost or farther off than is known of the tool."""
        known = self.known or Format("")
        return not self.problem and self.read >= self.boxes - known.lost and self.off <= known.off


def main() -> int:
    """All tools, or those that are named; returns 1 where one of them is not as known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=[tool.name for tool in TOOLS], default=[tool.name for tool in TOOLS])
    parser.add_argument("--keep", type=Path, help="folder for environments and all files; kept, and its environments used again")
    options = parser.parse_args()
    tools = [tool for tool in TOOLS if tool.name in options.tools]
    with tempfile.TemporaryDirectory() as scratch:
        found = list(try_tools(tools, (options.keep or Path(scratch)).absolute()))
    print_table(found, versions())
    return int(not all(one.as_known for one in found))


def try_tools(tools: Sequence[Tool], folder: Path) -> Iterator[Found]:
    """Let each tool write, and read what it wrote; then let each turn into COCO what all of them wrote."""
    for name in ("world", "written", "converted", "read"):
        shutil.rmtree(folder / name, ignore_errors=True)
    shown = make_world(folder / "world")
    worlds = {"exif": shown, "stored": [as_stored(photo) for photo in shown]}
    pythons = {tool.name: make_environment(folder / "venv" / tool.name, tool.name) for tool in tools}
    foreign: list[tuple[Tool, str, Path, dict[str, Any]]] = []
    for tool in tools:
        for name, format_ in tool.writes.items():
            out = folder / "written" / tool.name / name
            made = run_tool(pythons[tool.name], folder, "writers", tool.name, name, folder / "world", out)
            if isinstance(made, str):
                yield Found(tool.name, name, count(shown), problem=made, known=format_)
            elif format_.kind in ("coco", "boxes", "open_images"):
                yield read(tool, name, format_, made, out, folder, worlds[tool.frame])
            else:
                foreign.append((tool, name, out, made))
    for writer, name, out, made in foreign:
        files = folder / "written" / writer.name / f"{name}, laid out"
        lay_out(writer.writes[name].kind, out / made["annotations"], folder / "world" / "photos", files, made.get("labels", []))
        for reader in tools:
            for way in (way for way in reader.reads if way.split(",")[0] == writer.writes[name].kind):
                converted = folder / "converted" / f"{writer.name} {name} by {reader.name} {way}"
                done = run_tool(pythons[reader.name], folder, "converters", reader.name, way, files, converted)
                how = f"{name} -> {reader.name}{way.removeprefix(writer.writes[name].kind)} -> coco"
                if isinstance(done, str):
                    yield Found(writer.name, how, count(shown), problem=done)
                else:
                    yield read(writer, how, Format("coco"), done, converted, folder, worlds[writer.frame])


def versions() -> dict[str, str]:
    """The version of each package, as foreign_tools.txt pins it."""
    lines = [line.partition("==") for line in VERSIONS.read_text().splitlines() if "==" in line]
    return {name: version for name, _, version in lines}


def make_environment(folder: Path, tool: str) -> Path:
    """The Python of an environment that has one tool and nothing of this one's.

    Raises:
        InputError: it cannot be installed.
    """
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        print(f"installing {tool} {versions()[tool]}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--constraint", str(VERSIONS), tool], check=False)
        if done.returncode:
            raise InputError(f"{folder}: pip cannot install {tool}; see above")
        (folder / "installed").touch()
    return python


def run_tool(python: Path, folder: Path, script: str, tool: str, format_: str, source: Path, out: Path) -> dict[str, Any] | str:
    """What the tool says it wrote; or, where it fails, the last line of its error."""
    print(f"{tool}, {script.removesuffix('s')} of {format_}", flush=True)
    # Tools keep settings and data bases at home, and ask the network for news.
    home = folder / "home"
    home.mkdir(exist_ok=True)
    quiet = {"FIFTYONE_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **quiet}
    words = [str(python), "-I", str(HERE / f"foreign_{script}.py"), tool, format_, str(source), str(out)]
    try:
        done = subprocess.run(words, env=environment, cwd=home, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s"
    out.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode:
        return f"{tool}: {(done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def lay_out(kind: str, annotations: Path, photos: Path, folder: Path, labels: Sequence[str]) -> None:
    """What a tool wrote for each photo, in one layout for all readers: photos and annotations flat, each in its folder."""
    ending = {"voc": ".xml", "yolo": ".txt", "labelme": ".json"}[kind]
    for name, source, wanted in (("photos", photos, ""), ("annotations", annotations, ending)):
        (folder / name).mkdir(parents=True)
        for path in source.rglob("*"):
            if path.is_file() and path.name.endswith(wanted):
                shutil.copy(path, folder / name / path.name)
    (folder / "classes.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    (folder / "labelmap.txt").write_text("".join(f"{label}:::\n" for label in labels), encoding="utf-8")
    names = json.dumps(list(labels), ensure_ascii=False)  # JSON is YAML.
    (folder / "data.yaml").write_text(f"train: photos\nnc: {len(labels)}\nnames: {names}\n", encoding="utf-8")


def read(tool: Tool, name: str, format_: Format, made: dict[str, Any], out: Path, folder: Path, truth: list[TruePhoto]) -> Found:
    """Read a tool's files with our readers, as pipelines/plan.py does, and compare."""
    annotations = out / made["annotations"]
    written = None
    photos = folder / "world" / "photos"
    if made.get("photos"):
        photos = out / made["photos"]
    if format_.kind == "coco":
        document = json.loads(annotations.read_text(encoding="utf-8"))
        written = len(document["annotations"])
        if not made.get("photos"):
            photos = flat_photos(folder, [image["file_name"] for image in document["images"]])
    source: dict[str, Any] = {"kind": format_.kind, "annotations": annotations, "photos": photos, **format_.settings}
    if format_.kind != "open_images":
        source["frame"] = tool.frame
    everything = {"min_area": 0, "max_area": 1, "reject_flags": (), "near_duplicate_iou": None}
    target = folder / "read" / f"{tool.name} {name.replace('/', ' ')}"
    try:
        freeze_tables(BuildSettings.model_validate({"out": target, "source": source, "selection": everything}))
    except InputError as error:
        return Found(tool.name, name, count(truth), written, problem=str(error), known=format_)
    objects = pq.read_table(target / "objects.parquet").to_pylist()
    rejects = pq.read_table(target / "rejects.parquet", columns=["reason", "detail"]).to_pylist()
    matched, off = compare(truth, objects)
    problem = f"{len(rejects)} rejected: {rejects[0]['reason']}, {rejects[0]['detail']}" if rejects else ""
    if len(objects) > matched:
        problem += f"{len(objects) - matched} boxes that never went in"
    return Found(tool.name, name, count(truth), written, matched, off, problem, format_)


def flat_photos(folder: Path, names: Sequence[str]) -> Path:
    """The photo folder that a user of these names has: with folders in it, or without."""
    nested, flat = folder / "world" / "photos", folder / "world" / "flat"
    if not flat.is_dir():
        lay = [path for path in nested.rglob("*") if path.is_file()]
        flat.mkdir()
        for path in lay:
            shutil.copy(path, flat / path.name)
    return nested if any("/" in name for name in names) else flat


def compare(truth: Sequence[TruePhoto], objects: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """How many boxes have their counterpart, of the same photo and label, and how far the worst is off in px."""
    matched, off = 0, 0.0
    for photo in truth:
        stem = Path(photo.name).stem
        here = [row for row in objects if Path(row["file_name"] or row["photo_id"]).stem == stem]
        for label in {box.label for box in photo.boxes}:
            wanted = np.array([box.edges for box in photo.boxes if box.label == label])
            got = np.array([_edges(row, photo) for row in here if row["label_name"] == label]).reshape(-1, 4)
            distance = np.abs(wanted[:, None] - got[None]).max(-1)
            rows, columns = linear_sum_assignment(distance)
            matched += len(rows)
            off = max(off, float(distance[rows, columns].max(initial=0)))
    return matched, off


def _edges(row: Mapping[str, Any], photo: TruePhoto) -> tuple[float, float, float, float]:
    width, height = row["width"] or photo.width, row["height"] or photo.height
    return row["x_min"] * width, row["y_min"] * height, row["x_max"] * width, row["y_max"] * height


def count(photos: Sequence[TruePhoto]) -> int:
    """Boxes of all photos."""
    return sum(len(photo.boxes) for photo in photos)


def print_table(found: Sequence[Found], pinned: Mapping[str, str]) -> None:
    """A row for each file."""
    table = Table("tool", "version", "format", "boxes in", "written", "read", "off, px", "remarks")
    for one in found:
        remarks = [one.problem, one.known.remark if one.known else "", "" if one.as_known else "NOT AS KNOWN"]
        row = [one.tool, pinned[one.tool], one.format, one.boxes, "" if one.written is None else one.written, one.read, f"{one.off:.4f}"]
        table.add_row(*map(str, row), "; ".join(filter(None, remarks)))
    Console(width=240).print(table)


if __name__ == "__main__":
    run_program(main)
