"""Results as tables and as a page: every value is there, bounds stand apart, foreign text runs nothing, nothing is loaded."""

import base64
import hashlib
import io
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pbe_core.errors import InputError
from pbe_train.evaluation import report
from pbe_train.evaluation.curves import step_curves
from pbe_train.evaluation.lines import (
    dependent_scores,
    header,
    judges_of,
    lines_of,
    lower_is_better,
    show_interval,
    show_pair_score,
    show_score,
    show_value,
)
from pbe_train.evaluation.pair_sets import Pair, PairPictures
from pbe_train.evaluation.report import LARGEST_PAGE, SHOWN_CLASSES, Shown, write_report
from pbe_train.evaluation.results import BOUNDS, Evaluation, PairRow, Value
from pbe_train.evaluation.tables import score_tables
from pbe_train.evaluation.thumbnails import extremes, outline_small
from tests.browser import open_tab
from tests.html_page import Page
from tests.pbe_train.evaluation_results import DrawnPairs, judge, paint_drawn, result, row

HOSTILE = "</title><script>alert('$x_{1}$')</script> --> \"onload=\" [red] & ünï 車"
IDS = [Pair(f"pair-{number:03d}", ("cat", "dog", "horse")[number % 3]) for number in range(50)]


def words(page: str) -> str:
    return " ".join("".join(Page(page).text).split())


def printed(results: list[Evaluation], width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(score_tables(results))
    return console.file.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[DrawnPairs, Path]:
    pairs = DrawnPairs(IDS)
    return pairs, paint_drawn(pairs, tmp_path_factory.mktemp("painted") / "model")


@pytest.fixture(scope="module")
def page(pictures, tmp_path_factory) -> tuple[Evaluation, Path]:
    """The page of one result with pictures."""
    pairs, folder = pictures
    told = result(IDS)
    out = tmp_path_factory.mktemp("page") / "new" / "report.html"
    write_report([Shown(told, {"model": folder})], out, pairs)
    return told, out


def test_tables_and_page_have_every_value_with_its_interval_and_bounds_apart(page):
    told, out = page
    text, terminal = words(out.read_text()), printed([told])
    for where in (text, terminal):
        for one in told.rows:
            for score, value in one.scores.items():
                assert show_value(score, value) in where
                assert show_interval(score, value) in where
                assert header(score).split()[0] in where
        places = [where.index(name) for name in ("model, step 2,000", *BOUNDS)]
        assert places == sorted(places)
    assert "∞" in show_value("PSNR outside", told.rows[0].pair_scores["PSNR outside"])
    assert len(re.findall("├", terminal)) == 2, "one line between models and what bounds them, in each of the two tables"
    for one in told.judges:
        assert all(part in text for part in (one.name, one.source, one.sha256[:12], one.preparation, f"{one.width:,}"))
    assert all(f"{name}{value}" in text for name, value in told.recipe.items())
    assert told.notes[0] in text
    assert told.notes[0] in terminal
    assert "pbe app --dataset FOLDER" in text


def test_of_few_pictures_is_warned_first_and_the_less_biased_scores_lead(tmp_path):
    for count, warned in ((2047, True), (2048, False)):
        told = result(IDS, count)
        write_report([Shown(told)], tmp_path / "report.html")
        for text in (words((tmp_path / "report.html").read_text()), " ".join(printed([told]).split())):
            assert ("2,047 pictures, fewer than 2,048: the bias of FID" in text) == warned
            table = text[text.index("Distributions") :]
            scores = ("KID (inception-clean)", "CMMD (clip)", "FID (clean)", "FD-DINOv2")
            order = sorted(scores, key=table.index)
            assert order[0] == ("KID (inception-clean)" if warned else "FID (clean)")
            assert order[1] == ("CMMD (clip)" if warned else "FD-DINOv2")
            assert not warned or text.index("fewer than 2,048") < text.index("Distributions")


def test_results_of_other_recipes_are_refused_with_the_field(tmp_path):
    one, other = result(IDS), result(IDS, recipe={"codec": "JPEG q87"})
    for show in (lambda: score_tables([one, other]), lambda: write_report([Shown(one), Shown(other)], tmp_path / "out.html")):
        with pytest.raises(InputError, match=r"they differ in codec: PNG / JPEG q87; size: 512 px / not given"):
            show()
    assert not list(tmp_path.iterdir())


def test_foreign_text_is_shown_and_runs_nothing(tmp_path, pictures):
    pairs, folder = pictures
    ids = [Pair(pair.id, HOSTILE) for pair in IDS]
    told = result(
        ids,
        rows=[row("model", 0, 300, HOSTILE, step) for step in (1, 2)][:1],
        recipe={HOSTILE: HOSTILE},
        judges=[judge(HOSTILE, source=HOSTILE, preparation=HOSTILE)],
        notes=[HOSTILE],
        pairs_name=HOSTILE,
    )
    hostile_id = told.pairs[0].model_copy(update={"id": HOSTILE})
    told = told.model_copy(update={"pairs": [hostile_id, *told.pairs[1:]]})
    write_report([Shown(told, {"model": folder})], tmp_path / "report.html", pairs)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.tags.keys().isdisjoint({"link", "iframe", "object", "embed", "form"})
    assert (page.tags["script"], page.tags["title"]) == (1, 1)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:image/jpeg;base64,") for value in page.values("src"))
    assert "".join(page.text).count(HOSTILE) > 30
    assert HOSTILE in " ".join(printed([told], 400).split())


def test_the_script_that_may_run_is_the_one_in_the_page(page):
    text = page[1].read_text()
    (policy,) = [value for value in Page(text).values("content") if "default-src" in value]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


def test_each_result_s_classes_stand_under_its_own_title(tmp_path):
    one, other = (
        result(IDS, rows=[row(name, shift, 300, name)], seed=seed) for shift, name, seed in ((0, "a", 1), (0.2, "b", 2))
    )
    write_report([Shown(one), Shown(other)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    table = text[text.index('<table class="sortable">') :].partition("</table>")[0]
    titles = re.findall(r'<th scope="col" class="number">([^<]*)</th>', table)
    assert titles[:3] == ["pairs", "a", "b"]
    shown = re.findall(r'<td class="number" data-value="([^"]*)">', table[table.index(">cat<") :])[1:3]
    assert [float(value) for value in shown] == [
        told.per_class["cat"][0].pair_scores["CLIP score"].value for told in (one, other)
    ]


def test_undefined_and_infinite_values(tmp_path):
    values = {
        ("KID (clip)", 0.00421): "4.21",
        ("KID (clip)", -0.0000001): "0.00",
        ("copying", -0.25): "\N{MINUS SIGN}0.250",
        ("FID (clean)", 1234.5): "1,234.50",
        ("recognised", 0.625): "62.5",
        ("PSNR outside", math.inf): "∞",
        ("DINO-I", None): "–",
        ("a new score", 0.5): "0.500",
    }
    assert {key: show_score(*key) for key in values} == values
    assert [show_pair_score("recognised", value) for value in (1.0, 0.0, None)] == ["yes", "no", "–"]
    assert show_interval("seam", Value(value=1.0, low=0.5, high=None, count=3)) == ""
    told = result(IDS)
    nothing = Value(value=None, count=0)
    told.rows[1].set_scores["QS"] = nothing
    for one in told.rows:
        one.pair_scores["never there"] = nothing
    write_report([Shown(told)], tmp_path / "report.html")
    for text in (words((tmp_path / "report.html").read_text()), printed([told])):
        assert "–" in text
        assert "never there" not in text


def test_arrows_and_judges_of_scores():
    assert {name: lower_is_better(name) for name in ("FID (clean)", "FD-DINOv2", "FD (x)", "KID (x)", "CMMD (x)", "seam")} == (
        dict.fromkeys(("FID (clean)", "FD-DINOv2", "FD (x)", "KID (x)", "CMMD (x)", "seam"), True)
    )
    assert not any(lower_is_better(name) for name in ("QS", "CLIP score", "CLIP-I", "mobilenet-I", "PSNR outside", "recognised"))
    judges = [
        judge("clip"),
        judge("dinov2", "dinov2"),
        judge("mobilenet", "mobilenet"),
        judge("inception-clean", "inception-clean"),
    ]
    known = {
        "QS": "clip",
        "CLIP-I": "clip",
        "CLIP score": "clip",
        "CMMD (clip)": "clip",
        "DINO-I": "dinov2",
        "FD-DINOv2": "dinov2",
    }
    known |= {
        "FID (clean)": "inception-clean",
        "FID∞ (clean)": "inception-clean",
        "KID (mobilenet)": "mobilenet",
        "mobilenet-I": "mobilenet",
    }
    assert {score: judges_of(score, judges) for score in known} == {score: [name] for score, name in known.items()}
    assert judges_of("seam", judges) == judges_of("FID (legacy)", judges) == []
    told = result(IDS, independent={"clip": False, "dinov2": True})
    assert dependent_scores([*known, "seam"], told) == {"QS", "CLIP-I", "CLIP score", "CMMD (clip)"}


def test_several_results_share_the_rows_that_bound_them_and_names_differ():
    one, other = (result(IDS, rows=[row("model", shift, 300, "runs/a", step)]) for shift, step in ((0.0, 1), (0.2, 2)))
    titles = [line.title for line in lines_of([one, other])]
    assert titles == ["model, step 1", "model, step 2", *[line.name for line in one.rows[1:]]]
    changed = other.rows[-1].model_copy(update={"pair_scores": {"seam": Value(value=0.5, count=300)}})
    third = other.model_copy(update={"rows": [*other.rows[:-1], changed]})
    titles = [line.title for line in lines_of([one, third])]
    assert titles[-2:] == ["VAE reconstruction (model, step 1)", "VAE reconstruction (model, step 2)"]
    same = [line.title for line in lines_of([one, one])]
    assert same[:2] == ["model, step 1 (result 1)", "model, step 1 (result 2)"]
    twice = result(IDS, rows=[row("guidance 3", 0, 300, "a"), row("guidance 5", 0, 300, "a")])
    assert [line.title for line in lines_of([twice])][:2] == ["guidance 3", "guidance 5"]


def test_the_best_and_the_worst_pairs_are_chosen_by_the_scores_direction():
    scores = [3.0, None, 1.0, 2.0, math.inf, 2.0]
    pairs = [
        PairRow(id=str(number), area=0.1, scores={"model": {"x": value, "seam": value}}) for number, value in enumerate(scores)
    ]

    def chosen(score: str, most: int) -> list[list[str]]:
        return [[pair.id for pair in part] for part in extremes(pairs, "model", score, most)]

    assert chosen("x", 2) == [["4", "0"], ["2", "5"]]
    assert chosen("seam", 2) == [["2", "3"], ["4", "0"]]
    assert chosen("x", 20) == [["4", "0", "3"], ["2", "5"]]
    assert chosen("never there", 20) == [[], []]


def test_pictures_of_the_page_are_those_of_the_pairs(page, pictures):
    told, out = page
    pairs, folder = pictures
    shown = Page(out.read_text())
    best, worst = extremes(told.pairs, "model", "CLIP score", 20)
    assert shown.tags["img"] == 3 * (len(best) + len(worst)) == 120
    alternatives = [value for tag, name, value in shown.attributes if (tag, name) == ("img", "alt")]
    for place, pair in enumerate([*best, *worst]):
        titles = ("Photo of pair {}, the mask outlined", "Reference of pair {}", "model, step 2,000: pair {}")
        assert alternatives[3 * place : 3 * place + 3] == [title.format(pair.id) for title in titles]
    number = next(place for place, pair in enumerate(IDS) if pair.id == best[0].id)
    read = pairs.read(number)
    photo, reference, painted = (_decode(source) for source in shown.values("src")[:3])
    assert (
        _difference(photo, outline_small(read.photo, read.mask))
        < 6
        < _difference(photo, outline_small(read.photo, ~read.mask[::-1]))
    )
    assert _difference(reference, read.reference) < 6
    assert _difference(painted, np.asarray(Image.open(folder / f"{best[0].id}.png"))) < 9
    text = words(out.read_text())
    for pair in (best[0], worst[0]):
        own = pair.scores["model"]
        assert f"{pair.id} · {pair.label} · mask {100 * pair.area:.1f} % CLIP score {own['CLIP score']:.2f}" in text
    with pytest.raises(InputError, match="no pair score is called 'QS'; there are: CLIP score, CLIP-I"):
        write_report([Shown(told)], out, pairs, by="QS")


def _decode(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def _difference(small: np.ndarray, picture: np.ndarray) -> float:
    """Mean difference to a picture shrunk by another program."""
    shrunk = np.asarray(Image.fromarray(picture).resize(small.shape[1::-1], Image.Resampling.BOX))
    return float(np.abs(small.astype(float) - shrunk).mean())


def test_a_missing_picture_is_said_and_pairs_of_another_set_have_none(tmp_path, pictures):
    pairs, folder = pictures
    told = result(IDS)
    write_report([Shown(told, {"model": tmp_path / "nowhere"})], tmp_path / "report.html", pairs)
    assert words((tmp_path / "report.html").read_text()).count("no picture") == 40
    write_report([Shown(told, {"model": folder})], tmp_path / "report.html", DrawnPairs(IDS[:1]))
    assert words((tmp_path / "report.html").read_text()).count("not in the pair set") in (39, 40)
    write_report([Shown(told)], tmp_path / "report.html")
    assert "Best and worst" not in (tmp_path / "report.html").read_text()


@dataclass(frozen=True)
class Noise(DrawnPairs):
    """Pictures that no codec makes small."""

    def read(self, number: int) -> PairPictures:
        photo = np.random.default_rng(number).integers(0, 256, (512, 512, 3), np.uint8)
        mask = np.zeros((512, 512), bool)
        mask[100:300, 100:300] = True
        return PairPictures(photo, mask, photo, photo)


@pytest.mark.parametrize(("limit", "pictures"), [(LARGEST_PAGE, True), (2_000_000, True), (100_000, False)])
def test_the_page_stays_below_its_limit_however_much_there_is_to_show(tmp_path, monkeypatch, limit, pictures):
    monkeypatch.setattr(report, "LARGEST_PAGE", limit)
    many_classes = limit > 1_000_000
    many = [Pair(f"{number}", "noise") for number in range(40)]
    (tmp_path / "painted").mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 192, 3), np.uint8))
    for pair in many:
        picture.save(tmp_path / "painted" / f"{pair.id}.png")
    rows = [row(f"step {step}", step / 100, 3500, "runs/noise", step) for step in range(1, 9 if many_classes else 3)]
    told = result(many, 3500, rows)
    classes = {f"class {number}": told.per_class["noise"] for number in range(SHOWN_CLASSES + 100 if many_classes else 1)}
    told = told.model_copy(update={"per_class": classes})
    out = tmp_path / "report.html"
    write_report([Shown(told, dict.fromkeys((one.name for one in rows), tmp_path / "painted"))], out, Noise(many))
    assert (out.stat().st_size <= limit) == pictures
    text = out.read_text()
    each = 8 if many_classes else 4  # Photo, reference, and the six newest checkpoints at most.
    assert text.count("<img") == (40 * each if pictures else 0)
    assert ("The 200 classes with most pairs of 300" in text) == many_classes


def test_a_result_with_little_in_it_is_shown(tmp_path):
    """Pixels alone, no model, no judge, no class: nothing to choose pairs by."""
    told = result(IDS[:1], 1, judges=[], independent={}, per_class={}, per_size={}, pairs=[], notes=[], recipe={})
    for rows in ([], told.rows[1:2], [told.rows[0].model_copy(update={"set_scores": {}, "pair_scores": {}})]):
        little = told.model_copy(update={"rows": rows})
        write_report([Shown(little, {"model": tmp_path})], tmp_path / "report.html", DrawnPairs(IDS[:1]))
        assert "No judge was named" in words((tmp_path / "report.html").read_text())
        assert "1 picture, fewer than" in printed([little])


def test_curves_have_their_points_where_the_values_are():
    rows = [row(f"step {step}", 0, 300, "runs/a", step) for step in (1000, 2000, 4000)]
    for one, value in zip(rows, (30.0, 20.0, 10.0), strict=True):
        one.set_scores["FID (clean)"] = Value(value=value, low=value - 1, high=value + 1, count=300)
    told = result(IDS, rows=rows[::-1])
    curves = step_curves(lines_of([told]), ["FID (clean)", "PSNR outside"])
    assert [curve.score for curve in curves] == ["FID (clean)"], "what is infinite at each step has no curve"
    assert curves[0].told == "runs/a: 30.00 at step 1,000, 10.00 at step 4,000, best 10.00 at step 4,000"
    line = re.search(
        r'd="M (\S+) (\S+) \nL (\S+) (\S+) \nL (\S+) (\S+) \n"[^>]*style="fill: none; stroke: var\(--first\)', curves[0].drawing
    )
    x, y = np.array(line.groups(), float).reshape(3, 2).T
    assert np.diff(x)[1] == pytest.approx(2 * np.diff(x)[0])
    assert np.diff(y) == pytest.approx(np.full(2, np.diff(y)[0])), "equal steps down"
    assert np.diff(y)[0] > 0
    assert step_curves(lines_of([result(IDS, rows=rows[:1])]), ["FID (clean)"]) == []


def test_classes_and_sizes_are_shown_with_the_most_pairs_first(page):
    told, out = page
    text = out.read_text()
    table = text[text.index('<table class="sortable">') :]
    names = re.findall(r'<th scope="row">(\w+)</th><td class="number" data-value="(\d+)">', table.partition("</table>")[0])
    assert names == [("cat", "17"), ("dog", "17"), ("horse", "16")]
    for label, rows in told.per_class.items():
        for one in rows:
            assert show_value("CLIP score", one.pair_scores["CLIP score"]) in words(text), label
    assert all(limits in words(text) for limits in ("small: below 5 %", "medium: 5 to 20 %", "large: 20 % and more"))
    shown = Page(text)
    headers = [value for tag, name, value in shown.attributes if tag == "th" and name == "scope"]
    assert Counter(headers).keys() == {"col", "row", "rowgroup"}
    assert len(headers) == shown.tags["th"]


def test_in_a_browser_the_page_loads_nothing_complains_of_nothing_fits_a_phone_and_sorts(page, browser, tmp_path):
    told, out = page
    rows = [row(f"step {step}", step / 10_000, 300, "runs/a", step) for step in (1000, 2000, 4000)]
    curved = tmp_path / "curves.html"
    write_report([Shown(result(IDS, rows=rows))], curved)
    for path in (out, curved):
        for width, dark in ((1280, False), (390, True)):
            with open_tab(browser, path.as_uri(), width=width, dark=dark) as tab:
                ask = tab.page.evaluate
                assert ask("document.documentElement.scrollWidth") <= width
                assert ask("getComputedStyle(document.body).backgroundColor") == (
                    "rgb(23, 25, 28)" if dark else "rgb(253, 253, 252)"
                )
                assert ask("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
                assert ask("[...document.querySelectorAll('.chart svg')].every((one) => one.clientWidth > 200)")
                assert tab.complaints == []
                assert tab.requests == [path.as_uri()]
    # The control: a page that asks and complains is seen to do so.
    guilty = tmp_path / "guilty.html"
    guilty.write_text(out.read_text().replace("</main>", "<img src='http://127.0.0.1:9/x.png'><script>1</script></main>"))
    with open_tab(browser, guilty.as_uri()) as tab:
        assert len(tab.complaints) >= 2
        assert "http://127.0.0.1:9/x.png" in tab.requests

    with open_tab(browser, out.as_uri()) as tab:
        table = tab.page.locator("table.sortable").first
        buttons, cells = table.locator("thead button"), table.locator("tbody tr > :first-child")
        values = {label: own[0].pair_scores["CLIP score"].value or 0 for label, own in told.per_class.items()}
        best_first = sorted(values, key=values.__getitem__, reverse=True)
        for order in (best_first, best_first[::-1]):
            buttons.nth(2).click()
            assert cells.all_inner_texts() == order
        buttons.nth(0).click()
        assert cells.all_inner_texts() == sorted(values, reverse=True)
        assert tab.page.locator("[aria-sort]").count() == 1
