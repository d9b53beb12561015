"""Is what the field's tools write read box for box? By command, as it installs each tool in an environment of its own:

    python -m tests.compat.foreign_tools [--tools supervision datumaro ...] [--keep FOLDER]

Each tool writes one small dataset in all its formats that we read, our readers read it, and every box is compared with what
went in. Formats that we do not read (Pascal VOC, YOLO, LabelMe) are turned into COCO by every tool that reads them, whoever
wrote them: there the tools differ by a pixel. Prints tables; ends with status 1 where a box is lost or farther off than is known
of the tool.

    foreign_world ──▶ photos, boxes ──foreign_writers, in the tool's environment──▶ COCO, CSV ──our readers──▶ compared
                                            └──▶ VOC, YOLO, LabelMe ──foreign_converters, of another tool──▶ COCO ──┘

Takes 5 GB of disk, and 20 minutes on two cores; 5 where `--keep` has the environments.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from tests.compat.foreign_known import SLACK, TOOLS, VERSIONS, Format, Tool, versions
from tests.compat.foreign_world import TruePhoto, as_stored, make_world

HERE = Path(__file__).resolve().parent
SECONDS = 600  # A tool that waits for a server or the network is given up.


@dataclass(frozen=True)
class Found:
    """What was read of one file."""

    tool: Tool
    format: str
    boxes: int
    """That went in."""
    outlined: int
    """Those of them that have an outline."""
    known: Format
    """What is known of the tool."""
    reader: str = ""
    """The tool that turned it into COCO, and how; empty where we read the file itself."""
    written: int | None = None
    read: int = 0
    outlines: int = 0
    """Boxes that have one, as read."""
    off: float = 0.0
    problem: str = ""

    @property
    def as_known(self) -> bool:
        """Whether no box is lost, new or farther off than is known of the tool."""
        if self.known.refused is not None:
            return bool(self.problem) and self.known.refused in self.problem
        if self.known.outlines and not self.reader and self.outlines < self.outlined:
            return False
        return not self.problem and self.boxes - self.read <= int(self.known.narrow) and self.off <= self.known.off + SLACK


def main() -> int:
    """All tools, or those that are named; returns 1 where one of them is not as known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=[tool.name for tool in TOOLS], default=[tool.name for tool in TOOLS])
    parser.add_argument("--keep", type=Path, help="folder for environments and all files; kept, and its environments used again")
    options = parser.parse_args()
    tools = [tool for tool in TOOLS if tool.name in options.tools]
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.keep or Path(scratch)).absolute()
        for name in ("world", "world without turned", "written", "laid out", "converted", "read"):
            shutil.rmtree(folder / name, ignore_errors=True)
        shown = make_world(folder / "world")
        make_world(folder / "world without turned", turned=False)
        bench = Bench(folder, {"exif": shown, "stored": [as_stored(photo) for photo in shown]})
        found = [*bench.read_own(tools), *bench.read_crossed(tools)]
    print_own([one for one in found if not one.reader])
    for kind in ("voc", "yolo", "labelme"):
        print_crossed(kind, [one for one in found if one.reader and one.tool.writes[one.format].kind == kind])
    wrong = [one for one in found if not one.as_known]
    for one in wrong:
        print(
            f"not as known: {one.tool.name}, {one.format}{one.reader}: {one.read} of {one.boxes}, {one.off:.4f} px {one.problem}"
        )
    print(f"{len(found)} files, {len(found) - len(wrong)} as known, {len(wrong)} not")
    return int(bool(wrong))


@dataclass
class Bench:
    """Where tools work, and what they are given."""

    folder: Path
    worlds: Mapping[str, Sequence[TruePhoto]]
    """The photos, in each frame."""
    foreign: list[tuple[Tool, str, Path, Sequence[str]]] = field(default_factory=list)
    """What is not ours to read: the tool, the format, where it is, and the classes in the tool's order."""

    def read_own(self, tools: Sequence[Tool]) -> Iterator[Found]:
        """Let each tool write, and read what it wrote, where that is a format of ours."""
        for tool in tools:
            for name, known in tool.writes.items():
                out = self.folder / "written" / tool.name / name
                world = self.folder / ("world" if known.turned else "world without turned")
                photos = [photo for photo in self.worlds[tool.frame] if known.turned or photo.orientation == 1]
                made = self.run_tool("writers", tool, name, world, out)
                start = Found(tool, name, *count(photos), known)
                if isinstance(made, str):
                    yield replace(start, problem=made)
                elif known.kind in ("coco", "boxes", "open_images"):
                    yield self.read(start, tool, made, out, photos)
                else:
                    self.foreign.append((tool, name, out / made["annotations"], made["labels"]))

    def read_crossed(self, tools: Sequence[Tool]) -> Iterator[Found]:
        """Let each tool turn into COCO what all of them wrote, and read that."""
        for writer, name, annotations, labels in self.foreign:
            known = writer.writes[name]
            ways = [(tool, way) for tool in tools for way in tool.reads if way.split(",")[0] == known.kind]
            for reader, way in ways:
                # A photo that EXIF turns has another size for each of the two: left out.
                photos = [photo for photo in self.worlds[writer.frame] if writer.frame == reader.frame or photo.orientation == 1]
                files = self.folder / "laid out" / f"{writer.name}, {name}, {len(photos)} photos"
                if not files.exists():
                    lay_out(known.kind, annotations, self.folder / "world" / "photos", files, labels, photos)
                out = self.folder / "converted" / f"{writer.name}, {name} by {reader.name}, {way}"
                made = self.run_tool("converters", reader, way, files, out)
                by = f" by {reader.name}{way.removeprefix(known.kind)}"
                start = Found(writer, name, *count(photos), crossed(known, reader, way), by)
                yield replace(start, problem=made) if isinstance(made, str) else self.read(start, reader, made, out, photos)

    def run_tool(self, script: str, tool: Tool, format_: str, source: Path, out: Path) -> dict[str, Any] | str:
        """What the tool says it wrote; or, where it fails, the last line of its error."""
        python = make_environment(self.folder / "venv" / tool.name, tool)
        print(f"{tool.name}, {script} of {format_}", flush=True)
        # Tools keep settings and data bases at home, and ask the network for news.
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        quiet = {"FIFTYONE_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "SUPERVISION_DEPRECATION_WARNING": "0"}
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **quiet}
        # -I: nothing of this environment, and not this project's folder, is on the path.
        words = [str(python), "-I", str(HERE / f"foreign_{script}.py"), tool.name, format_, str(source), str(out)]
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

    def read(self, start: Found, maker: Tool, made: Mapping[str, Any], out: Path, truth: Sequence[TruePhoto]) -> Found:
        """Read a file that a tool made with our readers, as pipelines/plan.py does, and compare it with the truth."""
        kind, annotations = "coco" if start.reader else start.known.kind, out / made["annotations"]
        photos = out / made["photos"] if made.get("photos") else self.folder / "world" / "photos"
        written = None
        if kind == "coco":
            document = json.loads(annotations.read_text(encoding="utf-8"))
            written = len(document["annotations"])
            if not made.get("photos") and not any("/" in image["file_name"] for image in document["images"]):
                photos = self._flat_photos()
        source: dict[str, Any] = {"kind": kind, "annotations": annotations, "photos": photos, **start.known.settings}
        if kind != "open_images":
            source["frame"] = start.tool.frame
        everything = {"min_area": 0, "max_area": 1, "reject_flags": (), "near_duplicate_iou": None}
        target = self.folder / "read" / f"{start.tool.name}, {start.format}{start.reader}"
        try:
            select_and_plan(BuildSettings.model_validate({"out": target, "source": source, "selection": everything}))
        except InputError as error:
            return replace(start, written=written, problem=str(error))
        objects = pq.read_table(target / "objects.parquet").to_pylist()
        rejects = pq.read_table(target / "rejects.parquet", columns=["reason", "detail"]).to_pylist()
        matched, off = compare(truth, objects)
        outlines = sum(row["segmentation"] is not None for row in objects)
        problem = problem_of(start, maker, matched, objects, rejects)
        return replace(start, written=written, read=matched, outlines=outlines, off=off, problem=problem)

    def _flat_photos(self) -> Path:
        """The photos in one folder, as users of tools have them that know no others."""
        flat = self.folder / "world" / "flat"
        if not flat.is_dir():
            flat.mkdir()
            for path in (self.folder / "world" / "photos").rglob("*.*"):
                shutil.copy(path, flat)
        return flat


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


def lay_out(kind: str, annotations: Path, source: Path, folder: Path, labels: Sequence[str], photos: Sequence[TruePhoto]) -> None:
    """What a tool wrote for each photo, in one layout for all readers: photos and annotations flat, each in its folder."""
    ending = {"voc": ".xml", "yolo": ".txt", "labelme": ".json"}[kind]
    stems = {Path(photo.name).stem for photo in photos}
    for name, place, wanted in (("photos", source, ""), ("annotations", annotations, ending)):
        (folder / name).mkdir(parents=True)
        for path in place.rglob("*.*"):
            if path.name.endswith(wanted) and path.stem in stems:
                shutil.copy(path, folder / name)
    (folder / "classes.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    (folder / "labelmap.txt").write_text("".join(f"{label}:::\n" for label in labels), encoding="utf-8")
    names = json.dumps(list(labels), ensure_ascii=False)  # JSON is YAML.
    (folder / "data.yaml").write_text(f"train: photos\nnc: {len(labels)}\nnames: {names}\n", encoding="utf-8")


def crossed(known: Format, reader: Tool, way: str) -> Format:
    """What is known of a tool's files as another tool reads them."""
    if reader.name in known.breaks:
        return replace(known, refused=reader.name)
    reads_from_one = way == "voc, one-based"
    # Boxes of 1 px have xmax = xmin in files that count from 1: whoever reads these as edges has an empty box.
    narrow = known.narrow and not (known.from_one and reads_from_one)
    return replace(known, off=known.off + reader.off + abs(known.from_one - reads_from_one), narrow=narrow)


def problem_of(start: Found, maker: Tool, matched: int, objects: Sequence[Any], rejects: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with what was read, beside what is known of who wrote and who made it; empty if nothing is."""
    # Boxes that became empty are counted as lost.
    known = Counter(duplicate=maker.repeats, empty_box=int(start.known.narrow))
    others = [reject for reject in rejects if not known[reject["reason"]]]
    if others:
        return f"{len(others)} rejected: {others[0]['reason']}, {others[0]['detail']}"
    if len(objects) > matched:
        return f"{len(objects) - matched} boxes that never went in"
    more = Counter(reject["reason"] for reject in rejects) - known
    return ", ".join(f"{count} rejected as {reason}" for reason, count in more.items())


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


def count(photos: Sequence[TruePhoto]) -> tuple[int, int]:
    """Boxes of all photos, and those of them that have an outline."""
    boxes = [box for photo in photos for box in photo.boxes]
    return len(boxes), sum(bool(box.polygon) for box in boxes)


def print_own(found: Sequence[Found]) -> None:
    """What we read ourselves, a row for each file."""
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


def print_crossed(kind: str, found: Sequence[Found]) -> None:
    """What other tools turned into COCO: a row for each writer, a column for each reader."""
    readers = list(dict.fromkeys(one.reader for one in found))
    table = Table(f"{kind} of", *readers, title="boxes read of those that went in, and px that the worst of them is off")
    for writer in dict.fromkeys((one.tool.name, one.format) for one in found):
        cells = {one.reader: one for one in found if (one.tool.name, one.format) == writer}
        table.add_row(f"{writer[0]}{writer[1].removeprefix(kind)}", *(_cell(cells[reader]) for reader in readers))
    if found:
        Console(width=200).print(table)


def _cell(one: Found) -> str:
    said = "cannot read it" if one.problem and not one.read else f"{one.read}/{one.boxes} {one.off:.2f}"
    return said if one.as_known else f"{said} NOT AS KNOWN"


if __name__ == "__main__":
    run_program(main)
