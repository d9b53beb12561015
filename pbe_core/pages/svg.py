"""Figures of matplotlib as inline SVG: no ids that clash, no network names, colours of the page's style sheet, text left as text.

matplotlib draws with the placeholder colours below; each becomes a CSS variable, so that one chart serves light and dark pages.
"""

import io
import re
import warnings
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

INK, FAINT, FIRST, SECOND, THIRD = (f"#01020{number}" for number in range(3, 8))
SERIES = (FIRST, SECOND, THIRD)
_VARIABLES = {INK: "ink", FAINT: "faint", FIRST: "first", SECOND: "second", THIRD: "third"}
WIDTH = 7.6  # inches of 72 pt: as wide as the page's column at its normal text size
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # A class may be called "$".
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def inline_svg(figure: Figure, name: str) -> Markup:
    """A figure as an <svg> element that can stand in an HTML page beside others."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": name}):
        # Text is set in the reader's fonts; that ours lack a glyph of a class's name matters to its measured length alone.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    head, end, body = drawing.partition(">")
    head = re.sub(r' xmlns(:\w+)?="[^"]*"', "", head).replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    used = set(re.findall(r"#([\w.-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", body)
    body = re.sub(r"font-family: [^;]*; ", "", body)  # The page's.
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    return Markup(head + end + body)
