"""The command that tries foreign tools is run by hand: the docs say what it tries, and it can tell a box from another."""

import re

import pytest

from pbe_core.settings import REPOSITORY
from tests.compat import foreign_writers
from tests.compat.foreign_tools import TOOLS, compare, versions
from tests.compat.foreign_world import TrueBox, TruePhoto, as_stored


def test_the_docs_name_each_tool_as_it_was_tried():
    """Version, frame, and as what its files are read: a line of the table for each kind."""
    section = (REPOSITORY / "docs" / "own-data.md").read_text().partition("## From other tools")[2].partition("\n### ")[0]
    said: dict[str, set[tuple[str, str]]] = {}
    name = ""
    for line in re.findall(r"^\|(?! tool| ---)(.*)\|$", section, re.MULTILINE):
        tool, _, kind, frame, _ = (cell.strip() for cell in line.split("|"))
        name = tool or name
        said.setdefault(name, set()).add((kind.split("`")[1], frame.strip("`")))
    tried = {}
    for tool in TOOLS:
        assert callable(getattr(foreign_writers, f"write_{tool.name.replace('-', '_')}"))
        kinds = {form.kind for form in tool.writes.values() if form.refused is None}
        # Open Images' boxes are fractions: no setting says their frame.
        tried[f"{tool.name} {versions()[tool.name]}"] = {(kind, "" if kind == "open_images" else tool.frame) for kind in kinds}
    assert tried.items() <= said.items()


def row(label: str, *edges: float, file_name: str | None = "a/cat.jpg", photo_id: str = "1") -> dict[str, object]:
    names = ("x_min", "y_min", "x_max", "y_max")
    fractions = {name: edge / size for name, edge, size in zip(names, edges, (200, 100, 200, 100), strict=True)}
    return {"label_name": label, "file_name": file_name, "photo_id": photo_id, "width": None, "height": None, **fractions}


def test_boxes_are_compared_by_photo_and_label():
    boxes = (TrueBox("cat", (0, 0, 50, 60)), TrueBox("cat", (10, 10, 50, 60)), TrueBox("dog", (10, 10, 50, 60)))
    truth = [TruePhoto("a/cat.jpg", 200, 100, boxes)]
    found = [row("cat", 10, 10, 50, 60), row("dog", 10, 10, 50, 60), row("cat", 0, 0, 50, 60)]
    assert compare(truth, found) == (3, pytest.approx(0, abs=1e-9))
    assert compare(truth, [*found[:2], row("cat", 1, 0.25, 50, 60)]) == (3, pytest.approx(1))
    assert compare(truth, found[1:])[0] == 2
    assert compare(truth, [*found[:2], row("cat", 0, 0, 50, 60, file_name="a/other.jpg")])[0] == 2
    assert compare(truth, [*found[:2], row("cat", 0, 0, 50, 60, file_name="images/5d3f__cat.jpg")])[0] == 3
    assert compare(truth, [row("cat", 0, 0, 50, 60, file_name=None, photo_id="0" * 16)])[0] == 1


def test_a_box_on_a_turned_photo_is_one_on_its_stored_pixels():
    """The top right corner of a photo as shown is the top left one as stored, where it is turned clockwise for viewers."""
    shown = TruePhoto("a.jpg", 300, 400, (TrueBox("cat", (290, 0, 300, 30), ((290, 0), (300, 30))),), orientation=6)
    stored = as_stored(shown)
    assert (stored.width, stored.height) == (400, 300)
    assert stored.boxes == (TrueBox("cat", (0, 0, 30, 10), ((0, 10), (30, 0))),)
