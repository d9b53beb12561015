"""The report as one HTML page: figures, charts of them, and the template `page.html.jinja`.

Class names and details of malformed rows come from foreign files: the template escapes all text, and the page forbids itself
scripts and network (its Content-Security-Policy), should anything slip through.
"""

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pbe_core.errors import InputError
from pbe_core.files import write_atomically
from pbe_core.pages.page import render_template
from pbe_core.words import number_of
from pipelines.config import BuildSettings
from pipelines.inspection import charts
from pipelines.inspection.figures import collect_figures
from schemas.tables import FAILURE_CODES

SHOWN_CLASSES = 40
_SECTIONS = {
    "splits": "Splits",
    "rejects": "Rejected boxes",
    "classes": "Classes",
    "areas": "Sizes",
    "masks": "Masks",
    "aspects": "Shapes",
    "positions": "Positions",
    "photos": "Objects per photo",
    "flags": "Flags",
}
_FLAG_NAMES = {
    "is_occluded": "occluded",
    "is_truncated": "truncated",
    "is_group_of": "group of",
    "is_depiction": "depiction",
    "is_inside": "inside",
}
_MASK_NAMES = {"object": "object's box", "box": "box masks", "bessel": "Bessel masks"}
# What the curves of masks count.
_MASKS_OF = {"objects": "objects of the sample", "samples": "samples, masks"}


def write_report(folder: Path, settings: BuildSettings | None, out: Path) -> None:
    """Write the page to `out` and its numbers beside it, with the suffix `.json`; each wholly or not at all.

    Args:
        folder: of the dataset, or of a plan that is not packed yet.
        settings: of the build; null takes those that the folder itself tells.
        out: the HTML file.

    Raises:
        InputError: a table is missing or cannot be read, or `out` has the name of the JSON file.
    """
    if out.suffix == ".json":
        raise InputError(f"{out}: the page is HTML, its numbers go to the JSON beside it; give a name that ends in .html")
    figures = collect_figures(folder, settings)
    page = render_page(figures)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out.with_suffix(".json"), json.dumps(figures, allow_nan=False, indent=1).encode())
    write_atomically(out, page.encode())


def render_page(figures: dict[str, Any]) -> str:
    """The page as HTML text: the same for the same figures."""
    classes = figures["classes"]["classes"]
    shown = classes[:SHOWN_CLASSES]
    return render_template(
        Path(__file__).with_name("page.html.jinja"),
        {"count": show_count, "percent": show_percent, "size": show_size, "number_of": number_of},
        figures=figures,
        sections=_SECTIONS,
        charts=draw_charts(figures),
        classes=shown,
        rest_objects=sum(entry["objects"] for entry in classes[SHOWN_CLASSES:]),
        rest_classes=len(classes) - len(shown),
        flag_names=_FLAG_NAMES,
        mask_names=_MASK_NAMES,
        mask_kinds={"box": ("box", "boxes"), "bessel": ("Bessel curve", None)},
        drawn=[kind for kind in _MASK_NAMES if figures["masks"][kind]["at_percentile"]],
        failure_codes=FAILURE_CODES,
    )


def draw_charts(figures: dict[str, Any]) -> dict[str, Markup]:
    """All charts, as SVG, by the name of their section."""
    areas, aspects, masks, flags, photos = (figures[name] for name in ("areas", "aspects", "masks", "flags", "objects_per_photo"))
    classes = figures["classes"]["classes"][:SHOWN_CLASSES]
    by_split = {
        split: [entry["by_split"][place] for entry in classes] for place, split in enumerate(figures["classes"]["splits"])
    }
    broken = [entry for entry in figures["rejects"]["reasons"] if entry["boxes"]]
    # A rule about px says nothing about fractions.
    longest = aspects["max_aspect"] if any(aspects["pixels"]["counts"]) else None
    units = {"px": aspects["pixels"]["counts"], "fractions of the photo": aspects["fractions"]["counts"]}
    curves = {title: masks[kind]["counts"] for kind, title in _MASK_NAMES.items()}
    limits = {name: areas[name] for name in ("min_area", "max_area")}
    maps = {
        "boxes that overlap the cell": figures["positions"]["coverage"],
        "boxes with their centre in it": figures["positions"]["centres"],
    }
    answers = {answer: [flags[flag][answer] for flag in _FLAG_NAMES] for answer in ("yes", "no", "unknown")}
    return {
        "rejects": charts.bar_chart(
            "rejects", [entry["reason"] for entry in broken], {"boxes": [entry["boxes"] for entry in broken]}
        ),
        "classes": charts.bar_chart("classes", [entry["name"] for entry in classes], by_split),
        "areas": charts.share_histogram("areas", areas["edges"], {"objects": areas["counts"]}, "photo's area", "objects", limits),
        "masks": charts.share_histogram("masks", masks["edges"], curves, "view's area", _MASKS_OF[masks["of"]], {}),
        "aspects": charts.aspect_histogram(
            "aspects",
            aspects["edges"],
            {unit: counts for unit, counts in units.items() if any(counts)},
            {"1 : max_aspect": 1 / longest, "max_aspect : 1": longest} if longest else {},
        ),
        "positions": charts.maps("positions", maps),
        "photos": charts.count_chart("photos", photos["counts"], photos["above"], "objects in the photo", "photos"),
        "flags": charts.share_chart("flags", list(_FLAG_NAMES.values()), answers),
    }


def show_count(number: float | None) -> str:
    """1234567 -> 1,234,567; a dash where nothing was counted."""
    return "–" if number is None else f"{number:,}"


def show_percent(share: float | None) -> str:
    """0.0213 -> 2.1 %; what is there but too little to show is not shown as nothing."""
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "< 0.1\N{NO-BREAK SPACE}%"
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def show_size(size: int | None) -> str:
    """Bytes -> kB, MB, GB or TB, of 1,000 each."""
    if size is None:
        return "–"
    power = min(4, max(1, (len(str(size)) - 1) // 3))
    return f"{size / 1000**power:,.1f}\N{NO-BREAK SPACE}{('', 'kB', 'MB', 'GB', 'TB')[power]}"
