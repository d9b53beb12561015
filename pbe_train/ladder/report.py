"""What a ladder leaves for people: OUT/table.md, ablations.png, index.html; and ablations.json, which holds all of it."""

import json
from pathlib import Path

from pbe_core.files import atomic_file, write_atomically
from pbe_core.pages.page import render_template
from pbe_core.words import number_of
from pbe_train.evaluation.lines import header, show_interval, show_score, show_value
from pbe_train.ladder.comparison import Ladder, as_json
from pbe_train.ladder.intervals import Estimate
from pbe_train.ladder.plot import LIGHT, draw, draw_inline

DOTS_PER_INCH = 150
NOTE = (
    "Brackets hold 95 % intervals over seeds and pairs (docs/ablations.md). Of so many differences one in twenty would look "
    "clear by chance alone."
)


def write_reports(ladder: Ladder, out: Path) -> None:
    """Write all of them, each wholly or not at all, and print the tables."""
    out.mkdir(parents=True, exist_ok=True)
    table = markdown(ladder)
    write_atomically(out / "ablations.json", (json.dumps(as_json(ladder), indent=1, allow_nan=False) + "\n").encode())
    write_atomically(out / "table.md", table.encode())
    if ladder.scores:
        with atomic_file(out / "ablations.png") as temporary:
            draw(ladder, LIGHT).savefig(temporary, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    write_atomically(out / "index.html", render_page(ladder).encode())
    print(table)
    print(f"the table: {out / 'table.md'}; the page: {out / 'index.html'}; all numbers: {out / 'ablations.json'}")


def markdown(ladder: Ladder) -> str:
    """Arms by scores, and steps by scores with their verdicts, as Markdown."""
    parts = [about(ladder), ""]
    for title, scores in (("Pairs", ladder.means), ("Distributions", ladder.sets)):
        if scores:
            parts += [f"**{title}**", "", _row("arm", "seeds", *(header(score) for score in scores)), _line(len(scores) + 2)]
            for arm in ladder.arms:
                cells = (show_cell(score, ladder.cells[arm.name].get(score)) for score in scores)
                parts.append(_row(arm.title, str(len(ladder.seeds[arm.name])), *cells))
            for row in ladder.bounds:
                found = [row.scores.get(score) for score in scores]
                if any(found):
                    shown = (f"{show_value(key, one)} {show_interval(key, one)}" for key, one in zip(scores, found, strict=True))
                    parts.append(_row(f"*{row.name}*", "", *(one.strip() for one in shown)))
            parts.append("")
    if ladder.steps:
        parts += ["**Each arm less the arm before**", "", _row("score", *(step.title for step in ladder.steps))]
        parts.append(_line(len(ladder.steps) + 1))
        for score in ladder.scores:
            cells = (show_step(score, *step.differences[score]) if score in step.differences else "–" for step in ladder.steps)
            parts.append(_row(header(score), *cells))
        parts.append("")
    return "\n".join([*parts, NOTE, ""])


def about(ladder: Ladder) -> str:
    """What was run, in a sentence."""
    missing = [*ladder.failed, *ladder.missing]
    left_out = f" Without {', '.join(missing)}." if missing else ""
    return (
        f"{number_of(len(ladder.arms), 'arm')}, {ladder.settings.steps:,} steps of {ladder.settings.global_batch} samples each, "
        f"{number_of(ladder.evaluation.count, 'pair')}, {ladder.how.sampling_steps} denoising steps; guidance "
        f"{', '.join(f'{ladder.guidance[arm.name]:g}' for arm in ladder.arms)}.{left_out}"
    )


def show_cell(score: str, cell: Estimate | None) -> str:
    """A mean with its interval."""
    if cell is None or cell.value is None:
        return "–"
    ends = "" if cell.low is None else f" [{show_score(score, cell.low)}, {show_score(score, cell.high)}]"
    return f"{show_score(score, cell.value)}{ends}"


def show_difference(score: str, found: Estimate) -> str:
    """A difference with its sign and its interval."""

    def signed(value: float | None) -> str:
        text = show_score(score, value)
        return f"+{text}" if value is not None and value > 0 and text.strip("0.,") else text

    if found.value is None:
        return "–"
    ends = "" if found.low is None else f" [{signed(found.low)}, {signed(found.high)}]"
    return f"{signed(found.value)}{ends}"


def show_step(score: str, found: Estimate, verdict: str) -> str:
    """A difference and its verdict, in Markdown."""
    word = verdict if verdict == "not told apart" else f"**{verdict}**"
    return f"{show_difference(score, found)} {word}" if found.value is not None else "–"


def render_page(ladder: Ladder) -> str:
    """The page as HTML text: the same for the same ladder."""
    return render_template(
        Path(__file__).with_name("ladder.html.jinja"),
        {"header": header, "number_of": number_of},
        ladder=ladder,
        about=about(ladder),
        note=NOTE,
        chart=draw_inline(ladder) if ladder.scores else None,
        cell=show_cell,
        value=show_value,
        interval=show_interval,
        shown_difference=show_difference,
        seeds=max((len(seeds) for seeds in ladder.seeds.values()), default=0),
    )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _line(columns: int) -> str:
    return f"| {' | '.join(['---'] * columns)} |"
