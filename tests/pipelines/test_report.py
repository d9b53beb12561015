"""The report: its numbers against brute force over small tables, and a page that is whole, self-contained and safe to open."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbe_core.dataset_reader import read_dataset, read_sample
from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY
from pipelines.dataset import counts as counting
from pipelines.dataset.counts import ASPECT_EDGES, CELLS, SHARE_EDGES, count_coverage, sample_rows
from pipelines.dataset.plan_shards import PlanRow
from pipelines.dataset.samples import prepare_sample
from pipelines.inspection import charts
from pipelines.inspection.figures import PERCENTILES, collect_figures, draw_mask_shares, find_settings, packed_mask_shares
from pipelines.inspection.report import render_page, show_count, show_percent, show_size, write_report
from schemas.dataset import Books, DatasetInfo, SplitCounts, VaeIdentity
from schemas.tables import COORDINATES, FLAGS, INDEX, OBJECTS, PLAN, REJECT_REASONS, REJECTS
from tests.conftest import settings_of

HOSTILE = "</text><script>alert('$x_{1}$')</script> --> \"onload=\" & ünï 車"
SETTINGS = {"seed": 3, "selection": {"min_area": 0.01, "max_area": 0.9, "max_aspect": 5}, "views": {"size": 64}, "masks": {}}


def object_rows(count: int, seed: int = 0) -> list[dict]:
    """Objects in the order of objects.parquet: three splits, photos of 1 to 40 objects, half of them of known size."""
    random = np.random.default_rng(seed)
    rows = []
    photo, left, size = 0, 0, (None, None)
    for number in range(count):
        if not left:
            photo, left = photo + 1, int(random.choice([1, 2, 3, 40]))
            size = (int(random.integers(100, 999)), int(random.integers(100, 999))) if random.random() < 0.5 else (None, None)
        left -= 1
        low, high = np.sort(random.integers(0, 65, (2, 2)) / 64, axis=0)  # Edges often fall on the grid's.
        high = np.minimum(1, np.maximum(high, low + 1 / 64))
        low = np.minimum(low, high - 1 / 64)
        label = int(random.geometric(0.3))
        rows.append(
            {
                "split": "train" if number < 0.7 * count else "validation" if number < 0.85 * count else "test",
                "photo_id": f"photo{photo:04d}",
                "object_id": f"photo{photo:04d}-{number:012x}",
                "label": f"/m/{label}",
                "label_name": f"class {label}",
                "x_min": low[0],
                "x_max": high[0],
                "y_min": low[1],
                "y_max": high[1],
                "area_share": float(np.prod(high - low)),
                **{flag: int(random.integers(-1, 2)) for flag in FLAGS},
                "width": size[0],
                "height": size[1],
            }
        )
    return rows


def reject_rows(*reasons: str, detail: str | None = None) -> list[dict]:
    unknown = {"label": "/m/1", "split": "train", "photo_id": "p", **dict.fromkeys(COORDINATES, 0.5), **dict.fromkeys(FLAGS, -1)}
    return [
        {**unknown, "file": "boxes.csv", "row": row, "reason": reason, "detail": detail} for row, reason in enumerate(reasons, 1)
    ]


def write_folder(folder: Path, objects: list[dict], rejects: list[dict] = (), settings: dict | None = None) -> Path:
    """A folder as the plan stage leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = [
        {**row, "shard": f"{row['split']}-{number // 10:06d}", "position": number % 10, "key": f"{row['object_id']}_0", "view": 0}
        for number, row in enumerate(objects)
    ]
    for name, rows, schema in (("objects", objects, OBJECTS), ("rejects", list(rejects), REJECTS), ("plan", plan, PLAN)):
        # A few row groups, each with a dictionary of its own.
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{name}.parquet", row_group_size=50)
    if settings:
        (folder / "plan.json").write_text(json.dumps({"fingerprint": {"settings": settings}}))
    return folder


def seal_folder(folder: Path, objects: list[dict], rejected: int, failed: int = 1) -> None:
    """A dataset.json and an index that fit such a folder; samples of the last objects failed. The shards are elsewhere."""
    made = objects[: len(objects) - failed]
    books = Books(
        boxes=len(objects) + rejected,
        objects=len(objects),
        rejects={"too_small": rejected},
        planned=len(objects),
        samples=len(made),
        failures={"shape_mismatch": failed},
        masks={"box": 3, "bessel": 1},
        padded_views=17,
    )
    info = DatasetInfo(
        fingerprint="0123456789abcdef" * 4,
        view_size=64,
        masks_per_view=2,
        vae=VaeIdentity(source="", sha256="", scaling_factor=1, latent_channels=4, downsampling=8, config={}),
        splits={"train": SplitCounts(shards=["train-000000"], samples=len(made), bytes=12_345_678)},
        books=books,
        settings=SETTINGS,
    )
    (folder / "dataset.json").write_text(info.model_dump_json())
    place = {"offset": 0, "length": 1, "crc32": 0}
    members = {field.name: place for field in INDEX if pa.types.is_struct(field.type)}
    rows = [
        {**row, **members, "key": f"{row['object_id']}_0", "shard": "train-000000", "position": number}
        for number, row in enumerate(made)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX), folder / "index.parquet")


@pytest.fixture(params=[7, 65_536], ids=["in batches of 7", "in one batch"])
def batch_rows(request, monkeypatch):
    """Counts must not depend on where one batch ends and the next begins."""
    monkeypatch.setattr(counting, "_BATCH_ROWS", request.param)


def test_classes_are_counted_by_split_largest_first(tmp_path, batch_rows):
    rows = object_rows(230)
    told = collect_figures(write_folder(tmp_path, rows))["classes"]
    expected = Counter(row["label"] for row in rows)
    assert {entry["label"]: entry["objects"] for entry in told["classes"]} == expected
    assert [entry["objects"] for entry in told["classes"]] == sorted(expected.values(), reverse=True)
    assert told["splits"] == ["train", "validation", "test"]
    for entry in told["classes"]:
        assert entry["name"] == f"class {entry['label'].removeprefix('/m/')}"
        by_split = [sum(row["split"] == split and row["label"] == entry["label"] for row in rows) for split in told["splits"]]
        assert entry["by_split"] == by_split


def test_histograms_agree_with_numpy(tmp_path, batch_rows):
    rows = object_rows(230)
    told = collect_figures(write_folder(tmp_path, rows))
    areas = [row["area_share"] for row in rows]
    assert told["areas"]["counts"] == np.histogram(areas, SHARE_EDGES)[0].tolist()
    assert told["areas"]["below"] + sum(told["areas"]["counts"]) + told["areas"]["above"] == 230

    for unit, known in (("pixels", True), ("fractions", False)):
        chosen = [row for row in rows if (row["width"] is not None) == known]
        scale = [row["width"] / row["height"] if known else 1 for row in chosen]
        aspects = [
            (row["x_max"] - row["x_min"]) / (row["y_max"] - row["y_min"]) * factor
            for row, factor in zip(chosen, scale, strict=True)
        ]
        binned = told["aspects"][unit]
        assert chosen
        assert binned["counts"] == np.histogram(aspects, ASPECT_EDGES)[0].tolist()
        assert binned["below"] == sum(aspect < ASPECT_EDGES[0] for aspect in aspects)
        assert binned["above"] == sum(aspect > ASPECT_EDGES[-1] for aspect in aspects)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[float, float]:
    """Ends in [0, 1], often on the lines of a grid of 8."""
    ends = st.one_of(st.floats(0, 1, width=32), st.integers(0, 8).map(lambda eighth: eighth / 8))
    return tuple(sorted(draw(st.lists(ends, min_size=2, max_size=2, unique=True))))


@given(st.lists(st.tuples(intervals(), intervals()), min_size=1, max_size=12))
def test_coverage_counts_the_boxes_that_overlap_each_cell(boxes):
    x, y = (np.array(axis, np.float64).T for axis in zip(*boxes, strict=True))
    coverage = count_coverage(x[0], x[1], y[0], y[1], 8)
    for row in range(8):
        for column in range(8):
            in_column = (x[0] * 8 < column + 1) & (x[1] * 8 > column)
            in_row = (y[0] * 8 < row + 1) & (y[1] * 8 > row)
            assert coverage[row, column] == np.sum(in_column & in_row)


def test_heat_maps_sum_over_batches(tmp_path, batch_rows):
    rows = object_rows(120)
    told = collect_figures(write_folder(tmp_path, rows))["positions"]
    coverage, centres = np.zeros((CELLS, CELLS), int), np.zeros((CELLS, CELLS), int)
    for row in rows:
        left, right, top, bottom = (row[name] * CELLS for name in COORDINATES)
        coverage[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] += 1
        centres[min(CELLS - 1, int((top + bottom) / 2)), min(CELLS - 1, int((left + right) / 2))] += 1
    assert told["coverage"] == coverage.tolist()
    assert told["centres"] == centres.tolist()


def test_photos_are_counted_across_batches(tmp_path, batch_rows):
    rows = object_rows(230)
    told = collect_figures(write_folder(tmp_path, rows))
    sizes = Counter((row["split"], row["photo_id"]) for row in rows)
    lengths = Counter(sizes.values())
    photos = told["objects_per_photo"]
    assert photos["counts"] == [lengths[number] for number in photos["objects"]]
    assert photos["above"] == sum(count for number, count in lengths.items() if number > len(photos["counts"])) > 0
    assert photos["largest"] == max(lengths)
    assert photos["mean"] == pytest.approx(230 / len(sizes))
    for split in told["splits"]:
        assert split["photos"] == sum(name == split["split"] for name, _ in sizes)
        assert split["objects"] == split["planned"] == sum(row["split"] == split["split"] for row in rows)


def test_flags_keep_their_three_states(tmp_path, batch_rows):
    rows = object_rows(90)
    told = collect_figures(write_folder(tmp_path, rows))["flags"]
    for flag in FLAGS:
        counts = Counter(row[flag] for row in rows)
        assert told[flag] == {"yes": counts[1], "no": counts[0], "unknown": counts[-1]}


def test_shards_and_summary_balance(tmp_path, batch_rows):
    rows = object_rows(95)
    told = collect_figures(write_folder(tmp_path, rows, reject_rows("too_small", "too_large")))
    # Ten samples a shard; the split changes within the seventh and the ninth ten.
    assert [split["shards"] for split in told["splits"]] == [7, 3, 2]
    assert told["summary"]["shards"] == 12
    assert told["summary"]["boxes"] == 97 == told["summary"]["objects"] + told["summary"]["rejected"]
    assert told["summary"]["planned"] == 95
    assert told["summary"]["packed"] is None


def test_rejects_stand_in_the_documented_order_with_their_first_rows(tmp_path, batch_rows):
    malformed = reject_rows(*["bad_number"] * 9, *["bad_row"] * 2, *["bad_number"] * 3, detail="XMax is 'a'" + "!" * 999)
    rejects = [*malformed, *reject_rows("too_small", "of_tomorrow", "group_of", "too_small")]
    told = collect_figures(write_folder(tmp_path, object_rows(5), rejects))["rejects"]
    assert [entry["reason"] for entry in told["reasons"]] == [*REJECT_REASONS, "of_tomorrow"]
    by_reason = {entry["reason"]: entry for entry in told["reasons"]}
    counts = {reason: entry["boxes"] for reason, entry in by_reason.items() if entry["boxes"]}
    assert counts == {"bad_row": 2, "bad_number": 12, "group_of": 1, "too_small": 2, "of_tomorrow": 1}
    assert by_reason["too_small"]["meaning"] == REJECT_REASONS["too_small"]
    assert [example["row"] for example in by_reason["bad_number"]["examples"]] == [1, 2, 3, 4, 5]
    assert [example["row"] for example in by_reason["bad_row"]["examples"]] == [10, 11]
    assert by_reason["too_small"]["examples"] == []
    example = by_reason["bad_row"]["examples"][0]
    assert example["file"] == "boxes.csv"
    assert example["detail"].startswith("XMax is 'a'!!")
    assert len(example["detail"]) == 300


def test_all_reasons_are_counted_where_they_were_written(tmp_path, batch_rows):
    rejects = reject_rows(*["group_of"] * 8)
    for row in rejects[2:]:
        row["reasons"] = ["group_of", "too_small"]
    told = collect_figures(write_folder(tmp_path, object_rows(5), rejects))
    broken = {entry["reason"]: entry["broken"] for entry in told["rejects"]["reasons"]}
    assert (broken["group_of"], broken["too_small"], broken["nested"]) == (6, 6, 0)
    assert "break it" in render_page(told)


def test_mask_shares_are_those_that_a_build_would_store(tmp_path, photos):
    """Otherwise the report would tell of other masks than training sees."""
    settings = settings_of(photos, tmp_path / "out", "--masks.arbitrary_mask_prob", "1", "--masks.jitter", "[20, 60]")
    # The last one fills its photo, so that its view is padded and its jitter leads out of the photo.
    whole = object_rows(1)[0] | {"x_min": 0.0, "x_max": 1.0, "y_min": 0.0, "y_max": 1.0, "width": 900, "height": 300}
    rows = [*(row for row in object_rows(60) if row["width"]), whole]
    drawn = [draw_mask_shares(row, find_settings(tmp_path, settings, None)) for row in rows]
    packed = []
    for row in rows:
        full = PlanRow.of({name: row.get(name) for name in OBJECTS.names} | {"view": 0, "key": "key"})
        prepared = prepare_sample(full, np.zeros((row["height"], row["width"], 3), np.uint8), "", settings)
        left, top, right, bottom = prepared.record.box_in_view
        share = (right - left) * (bottom - top) / settings.views.size**2
        packed.append((share, prepared.masks[0].mean(), prepared.record.padded))
    assert [(share, bessel) for (share, _, bessel), _ in drawn] == [pytest.approx(expected[:2]) for expected in packed]
    assert [padded for _, padded in drawn] == [padded for _, _, padded in packed]
    assert packed[-1][2]

    told = collect_figures(write_folder(tmp_path, rows), settings)["masks"]
    assert (told["sampled"], told["size_unknown"], told["padded"]) == (len(rows), 0, sum(padded for _, padded in drawn))
    for place, kind in enumerate(("object", "box", "bessel")):
        shares = [shares[place] for shares, _ in drawn]
        assert told[kind]["at_percentile"] == pytest.approx(np.percentile(shares, PERCENTILES))
        assert told[kind]["counts"] == np.histogram(shares, SHARE_EDGES)[0].tolist()


def test_views_that_the_build_rejects_are_left_out(tmp_path):
    wide = object_rows(1)[0] | {"x_min": 0.0, "x_max": 1.0, "y_min": 0.25, "y_max": 0.5, "width": 900, "height": 300}
    for policy, shown in (("reflect", 1), ("reject", 0)):
        settings = SETTINGS | {"views": {"size": 64, "no_square": policy}}
        told = collect_figures(write_folder(tmp_path / policy, [wide], settings=settings))["masks"]
        assert (told["padded"], told["sampled"]) == (1, 1)
        assert sum(told["box"]["counts"]) == shown
        assert ("There is no mask" in render_page(collect_figures(tmp_path / policy))) != bool(shown)


def test_the_sample_is_seeded_and_spans_batches(tmp_path, batch_rows):
    rows = object_rows(230)
    path = write_folder(tmp_path, rows) / "objects.parquet"
    chosen = sample_rows(path, ["object_id"], 40, 3)["object_id"].to_pylist()
    ids = [row["object_id"] for row in rows]
    places = [ids.index(name) for name in chosen]
    assert places == sorted(set(places))
    assert len(places) == 40
    assert max(places) > 150
    assert sample_rows(path, ["object_id"], 40, 3)["object_id"].to_pylist() == chosen
    assert sample_rows(path, ["object_id"], 40, 4)["object_id"].to_pylist() != chosen
    assert sample_rows(path, ["object_id"], 999, 3)["object_id"].to_pylist() == ids


def test_settings_come_from_whatever_tells_them(tmp_path, photos):
    folder = write_folder(tmp_path, object_rows(5))
    told = collect_figures(folder)
    assert told["settings_from"] == {"selection": None, "masks": None}
    assert (told["areas"]["min_area"], told["aspects"]["max_aspect"]) == (None, None)

    partly = {"seed": 3, "selection": {"min_area": 0.25}, "views": {"per_object": 2}}
    (folder / "selection.json").write_text(json.dumps({"fingerprint": {"settings": partly}}))
    told = collect_figures(folder)
    assert told["settings_from"] == {"selection": "selection.json", "masks": None}
    assert told["areas"]["min_area"] == 0.25
    assert "drawn with the defaults" in render_page(told)

    write_folder(tmp_path, object_rows(5), settings=SETTINGS)
    told = collect_figures(folder)
    assert told["settings_from"] == {"selection": "plan.json", "masks": "plan.json"}
    assert (told["areas"]["min_area"], told["areas"]["max_area"], told["aspects"]["max_aspect"]) == (0.01, 0.9, 5)
    assert told["masks"]["view_size"] == 64
    assert "drawn with the defaults" not in render_page(told)

    given = settings_of(photos, tmp_path / "out", "--selection.min_area", "0.125")
    assert collect_figures(folder, given)["areas"]["min_area"] == 0.125


def words_of(page: str) -> str:
    """The page's text on one line."""
    return " ".join("".join(Page(page).text).split())


def test_a_finished_dataset_is_shown_with_what_was_packed(tmp_path, batch_rows):
    """And not with what was planned: charts are of objects that have samples."""
    rows = [row | {"split": "train"} for row in object_rows(50)]
    rows[-1] |= {"label": "/m/lost", "label_name": "lost class"}
    folder = write_folder(tmp_path, rows, reject_rows("too_small"))
    planned = collect_figures(folder)
    seal_folder(folder, rows, 1, failed=9)
    told = collect_figures(folder)
    assert told["settings_from"]["masks"] == "dataset.json"
    photos = {row["photo_id"] for row in rows[:-9]}
    assert told["summary"]["packed"] == {
        "objects": 41,
        "photos": len(photos),
        "samples": 41,
        "shards": 1,
        "bytes": 12_345_678,
        "padded": 17,
        "masks": {"box": 3, "bessel": 1},
    }
    (split,) = told["splits"]
    assert (split["objects"], split["planned"], split["samples"]) == (50, 50, 41)
    assert (split["shards"], split["packed_shards"], split["bytes"]) == (5, 1, 12_345_678)

    write_folder(tmp_path / "alone", rows[:-9])
    alone = collect_figures(tmp_path / "alone")
    for name in ("classes", "positions", "objects_per_photo", "flags"):
        assert told[name] == alone[name] != planned[name]
    for name in ("areas", "aspects"):
        assert {key: told[name][key] for key in alone[name] if not key.startswith("m")} == {
            key: value for key, value in alone[name].items() if not key.startswith("m")
        }

    page = render_page(told)
    text = words_of(page)
    assert "12.3 MB" in text
    assert "shape_mismatch" in text
    assert "0123456789ab" in text
    assert f"Samples came of 41 of the 50 objects, in {len(photos)} of the {told['summary']['photos']} photos" in text
    assert "lost class" not in text
    assert "padded by reflection: 17 of 41. Masks in all shards: 3 boxes, 1 Bessel curve." in text
    assert "The shards are not in this folder" in text
    assert "lost class" in words_of(render_page(planned))
    assert "What the selection made of the source's boxes, and what is planned." in words_of(render_page(planned))


def test_masks_of_a_finished_dataset_are_those_in_its_shards(dataset):
    """Not drawn anew: what was turned, padded or failed in packing is not known from the tables."""
    info = read_dataset(dataset)
    rows = pq.read_table(dataset / "index.parquet").to_pylist()
    samples = [read_sample(dataset, row) for row in rows]
    shares = {"object": [], "box": [], "bessel": []}
    for sample in samples:
        left, top, right, bottom = sample.record.box_in_view
        shares["object"].append((right - left) * (bottom - top) / info.view_size**2)
        for kind, mask in zip(sample.record.mask_kinds, sample.masks, strict=True):
            shares[kind].append(mask.mean())
    figures = collect_figures(dataset)
    told = figures["masks"]
    assert (told["of"], told["sampled"], told["view_size"]) == ("samples", len(rows), info.view_size)
    for kind, own in shares.items():
        assert told[kind]["counts"] == np.histogram(own, SHARE_EDGES)[0].tolist()
        assert told[kind]["at_percentile"] == pytest.approx(np.percentile(own, PERCENTILES))
    padded = sum(sample.record.padded for sample in samples)
    assert figures["summary"]["packed"]["padded"] == padded
    text = words_of(render_page(figures))
    assert f"as it is in the shards: all masks of all {len(rows)} samples." in text
    assert f"padded by reflection: {padded} of {len(rows)}." in text
    some = packed_mask_shares(dataset, 7, 3)
    assert len(some["object"]) == 7
    assert some == packed_mask_shares(dataset, 7, 3) != packed_mask_shares(dataset, 7, 4)


def test_a_damaged_sample_is_named(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    row = pq.read_table(tmp_path / "copy" / "index.parquet").slice(3, 1).to_pylist()[0]
    tar = tmp_path / "copy" / "shards" / f"{row['shard']}.tar"
    data = bytearray(tar.read_bytes())
    data[row["json"]["offset"]] = 0
    tar.write_bytes(data)
    with pytest.raises(InputError, match=rf"{row['shard']}.tar, key {row['key']}: damaged \(.*pipelines/verify.py"):
        collect_figures(tmp_path / "copy")


@pytest.mark.parametrize("name", ["objects", "rejects", "plan"])
def test_tables_that_cannot_be_read_are_named_with_a_way_out(tmp_path, name):
    folder = write_folder(tmp_path, object_rows(5))
    path = folder / f"{name}.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([{"objects": "is_inside", "rejects": "detail", "plan": "shard"}[name]]), path)
    with pytest.raises(InputError, match=rf"{name}.parquet: no column (is_inside|detail|shard)"):
        collect_figures(folder)
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(InputError, match=rf"{name}.parquet: not a readable Parquet table"):
        collect_figures(folder)
    path.unlink()
    with pytest.raises(InputError, match=rf"{name}.parquet: no such table"):
        collect_figures(folder)


def test_a_dataset_beside_other_tables_is_refused(tmp_path):
    rows = object_rows(30)
    folder = write_folder(tmp_path, rows, reject_rows("too_small"))
    seal_folder(folder, [*rows, rows[0]], 1)
    with pytest.raises(InputError, match=r"dataset.json: .* 32 boxes and 31 planned samples, but .* 31 and 30"):
        collect_figures(folder)


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and keeps text, attributes and ids."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


def hostile_folder(folder: Path) -> Path:
    rows = [row | {"label": HOSTILE, "label_name": HOSTILE} for row in object_rows(60)]
    rejects = [row | {"file": HOSTILE} for row in reject_rows("bad_row", "too_small", detail=HOSTILE)]
    return write_folder(folder / "<script>alert(2)</script>".replace("/", "-"), rows, rejects, SETTINGS)


def test_the_page_is_whole_loads_nothing_and_shows_foreign_text_without_running_it(tmp_path):
    """Class names, files and details come from outside; they end up in tables, in alternative texts and in the charts."""
    folder = hostile_folder(tmp_path)
    text = render_page(collect_figures(folder))
    page = Page(text)
    ids = page.values("id")
    assert len(ids) == len(set(ids)), "a clip path that two charts name alike would cut the second to the size of the first"
    targets = [*page.values("href"), *page.values("xlink:href"), *re.findall(r"url\(([^)]*)\)", str(page.attributes))]
    assert sum(target.startswith("#") for target in targets) > 20
    assert all(target.startswith("data:image/png;base64,") or target.removeprefix("#") in ids for target in targets)
    assert page.tags["svg"] == sum(key == "role" and value == "img" for _, key, value in page.attributes) == 8
    assert all(len(alternative) > 30 for alternative in page.values("aria-label") if alternative != "Contents")

    assert page.tags.keys().isdisjoint({"script", "link", "iframe", "object", "embed", "img"})
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert "@import" not in text
    assert any("default-src 'none'" in content for content in page.values("content"))

    assert "".join(page.text).count(HOSTILE) == 6  # Class, its id, and two rows' file and detail.
    assert charts.short_name(HOSTILE) in "".join(page.text)
    assert any(HOSTILE in alternative for alternative in page.values("aria-label"))
    assert folder.name in "".join(page.text)


def test_bars_are_as_long_as_their_counts_and_parts_stand_end_to_end():
    chart = charts.bar_chart("bars", ["a", "b"], {"x": [300, 100], "y": [50, 0]})
    spans = {}
    for variable in ("first", "second"):
        bars = re.findall(rf'd="M (\S+) \S+ \nL (\S+) [^"]*"[^>]*clip-path[^>]*fill: var\(--{variable}\)', chart)
        spans[variable] = [(float(start), float(end)) for start, end in bars]
    (start, end), (_, shorter) = spans["first"]
    assert end - start == pytest.approx(3 * (shorter - start))
    assert spans["second"][0] == pytest.approx((end, end + (end - start) / 6))
    assert ">350<" in chart


@pytest.mark.parametrize("known", [True, False])
def test_a_rule_about_px_is_not_drawn_over_fractions(tmp_path, known):
    rows = [row | {"width": 800 if known else None, "height": 600 if known else None} for row in object_rows(20)]
    page = render_page(collect_figures(write_folder(tmp_path, rows, settings=SETTINGS)))
    assert (">max_aspect : 1<" in page) == known
    assert ("The ratio is one of px." in page) == known


def test_rules_are_drawn_where_they_are_known():
    edges, series = SHARE_EDGES.tolist(), {"objects": [1] * 100}
    drawn = charts.share_histogram("areas", edges, series, "photo", "objects", {"min_area": 0.02, "max_area": None})
    assert ">min_area<" in drawn
    assert "max_area" not in drawn
    aspects = charts.aspect_histogram("aspects", ASPECT_EDGES.tolist(), {"px": [1] * 40}, {"max_aspect : 1": 6})
    assert all(f">{text}<" in aspects for text in ("max_aspect : 1", "1:8", "1:1", "4:1"))


def test_heat_maps_are_bright_where_there_is_most():
    grid = np.zeros((CELLS, CELLS), int)
    grid[0, -1] = 9
    data, place = re.search(r'base64,([^"]*)"([^>]*)', charts.maps("maps", {"one": grid.tolist()})).groups()
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR).astype(int).sum(axis=-1)
    if "scale(1 -1)" in place:  # Stored bottom up, and turned over by the SVG.
        picture = picture[::-1]
    assert picture[2, -3] > 2 * picture[-3, 2] == 2 * picture[2, 2] == 2 * picture[-3, -3]


def test_what_is_beyond_the_last_number_is_one_bar_more():
    assert "&gt; 3" in charts.count_chart("photos", [5, 2, 1], 4, "x", "y")
    assert "&gt;" not in charts.count_chart("photos", [5, 2, 1], 0, "x", "y")


def test_the_files_are_written_whole_and_the_same_each_time(tmp_path):
    folder = hostile_folder(tmp_path)
    out = tmp_path / "new" / "report.html"
    write_report(folder, None, out)
    first = out.read_bytes()
    write_report(folder, None, out)
    assert out.read_bytes() == first
    assert sorted(path.name for path in out.parent.iterdir()) == ["report.html", "report.json"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    told = json.loads(out.with_suffix(".json").read_text(), parse_constant=refuse)
    assert told == collect_figures(folder)
    assert len(first) < 1_500_000
    with pytest.raises(InputError, match=r"report.json: the page is HTML"):
        write_report(folder, None, tmp_path / "report.json")


@pytest.mark.parametrize("count", [0, 1])
def test_little_or_nothing_to_show_is_shown(tmp_path, count):
    out = tmp_path / "report.html"
    write_report(write_folder(tmp_path, object_rows(count)), None, out)
    page = Page(out.read_text())
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["summary"] == {
        "boxes": count,
        "objects": count,
        "rejected": 0,
        "photos": count,
        "planned": count,
        "shards": count,
        "packed": None,
    }
    assert f"0 of {count} box" in " ".join("".join(page.text).split())
    # Without objects there is nothing to draw but what was rejected; with one, all but that.
    assert page.tags["svg"] == 7 * count


def test_numbers_are_shown_in_their_units():
    shares = {None: "–", 0.0: "0.0 %", 0.0004: "< 0.1 %", 0.0213: "2.1 %", 1.0: "100.0 %"}
    sizes = {None: "–", 0: "0.0 kB", 999: "1.0 kB", 12_345_678: "12.3 MB", 8_200 * 1000**4: "8,200.0 TB"}
    for show, values in ((show_percent, shares), (show_size, sizes), (show_count, {None: "–", 1234: "1,234"})):
        assert {value: show(value).replace("\N{NO-BREAK SPACE}", " ") for value in values} == values


def test_the_command_writes_both_files_and_names_what_is_missing(tmp_path):
    folder = write_folder(tmp_path / "dataset", object_rows(20))
    command = [sys.executable, str(REPOSITORY / "pipelines" / "inspect_dataset.py"), "report", str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(folder / "report.html")), done.stderr
    assert (folder / "report.json").is_file()
    (folder / "plan.parquet").unlink()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder / 'plan.parquet'}: no such table")
    assert "Traceback" not in done.stderr
