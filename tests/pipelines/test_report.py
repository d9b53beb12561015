"""The report: its numbers against brute force over small tables, and a page that is whole, self-contained and safe to open."""

import base64
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pbe_core.dataset_reader import read_dataset, read_sample
from pbe_core.errors import InputError
from pipelines.config import BuildSettings
from pipelines.dataset import counts as counting
from pipelines.dataset.counts import ASPECT_EDGES, CELLS, SHARE_EDGES, hash_unmade, sample_rows
from pipelines.dataset.plan_shards import PlanRow, writing_plan
from pipelines.dataset.samples import prepare_sample
from pipelines.inspection import charts
from pipelines.inspection.figures import PERCENTILES, collect_figures, draw_mask_shares, find_settings, packed_masks
from pipelines.inspection.report import render_page, show_count, show_percent, show_size, write_report
from schemas.dataset import Books, DatasetInfo, SplitCounts
from schemas.tables import COORDINATES, FAILURES, FLAGS, OBJECTS, PLAN, REJECT_REASONS, REJECTS
from tests.conftest import settings_of
from tests.html_page import Page

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
        split = "train" if number < 0.7 * count else "validation" if number < 0.85 * count else "test"
        names = {"split": split, "photo_id": f"photo{photo:04d}", "object_id": f"photo{photo:04d}-{number:012x}"}
        box = {"x_min": low[0], "x_max": high[0], "y_min": low[1], "y_max": high[1], "area_share": float(np.prod(high - low))}
        flags = {flag: int(random.integers(-1, 2)) for flag in FLAGS}
        of_class = {"label": f"/m/{label}", "label_name": f"class {label}"}
        rows.append({**names, **of_class, **box, **flags, "width": size[0], "height": size[1]})
    return rows


def reject_rows(*reasons: str, detail: str | None = None) -> list[dict]:
    rest = {"label": "/m/1", "split": "train", "photo_id": "p", **dict.fromkeys(COORDINATES, 0.5), **dict.fromkeys(FLAGS, -1)}
    rest |= {"file": "boxes.csv", "detail": detail}
    return [{**rest, "row": row, "reason": reason} for row, reason in enumerate(reasons, 1)]


def write_folder(folder: Path, objects: list[dict], rejects: list[dict] = (), settings: dict | None = SETTINGS) -> Path:
    """A folder as the plan stage leaves it: ten samples a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, schema in (("objects", objects, OBJECTS), ("rejects", list(rejects), REJECTS)):
        # A few row groups, each with a dictionary of its own.
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{name}.parquet", row_group_size=50)
    with writing_plan(folder / "plan.parquet") as add:
        for split in ("train", "validation", "test"):
            own = [row for row in objects if row["split"] == split]
            for start in range(0, len(own), 10):
                shard = {"shard": f"{split}-{start // 10:06d}", "position": 0, "view": 0}
                rows = [{**row, **shard, "key": f"{row['object_id']}_0"} for row in own[start : start + 10]]
                add(pa.Table.from_pylist(rows, schema=PLAN))
    if settings:
        (folder / "plan.json").write_text(json.dumps({"fingerprint": {"settings": settings}}))
    return folder


def finish_folder(folder: Path, info: DatasetInfo, objects: list[dict], rejected: int, failed: int = 1) -> None:
    """A dataset.json that fits such a folder, else like another; samples of the last objects failed. The shards are elsewhere."""
    made = len(objects) - failed
    totals = {"boxes": len(objects) + rejected, "objects": len(objects), "planned": len(objects), "samples": made}
    kinds = {"rejects": {"too_small": rejected}, "failures": {"shape_mismatch": failed}, "masks": {"box": 3, "bessel": 1}}
    changes = {
        "fingerprint": "0123456789abcdef" * 4,
        "splits": {"train": SplitCounts(shards=["train-000000"], samples=made, bytes=12_345_678)},
        "books": Books(**totals, **kinds, padded_views=17),
        "settings": SETTINGS,
    }
    (folder / "dataset.json").write_text(info.model_copy(update=changes).model_dump_json())
    write_failures(folder / "failures.parquet", [f"{row['object_id']}_0" for row in objects[made:]])


def write_failures(path: Path, keys: list[str]) -> None:
    failure = dict.fromkeys(FAILURES.names, "x")
    pq.write_table(pa.Table.from_pylist([failure | {"key": key} for key in keys], schema=FAILURES), path, row_group_size=2)


@pytest.fixture(scope="module", params=[7, 65_536], ids=["in batches of 7", "in one batch"])
def counted(request, tmp_path_factory) -> tuple[list[dict], dict]:
    """Objects and their figures, which must not depend on where one batch ends and the next begins."""
    rows = object_rows(230)
    folder = write_folder(tmp_path_factory.mktemp("counted"), rows, reject_rows("too_small", "too_large"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_BATCH_ROWS", request.param)
        return rows, collect_figures(folder)


def test_classes_are_counted_by_split_largest_first(counted):
    rows, figures = counted
    told = figures["classes"]
    expected = Counter(row["label"] for row in rows)
    assert {entry["label"]: entry["objects"] for entry in told["classes"]} == expected
    assert [entry["objects"] for entry in told["classes"]] == sorted(expected.values(), reverse=True)
    assert told["splits"] == ["train", "validation", "test"]
    by_split = Counter((row["label"], row["split"]) for row in rows)
    for entry in told["classes"]:
        assert entry["name"] == f"class {entry['label'].removeprefix('/m/')}"
        assert entry["by_split"] == [by_split[entry["label"], split] for split in told["splits"]]


def test_histograms_agree_with_numpy(counted):
    rows, told = counted
    assert told["areas"]["counts"] == np.histogram([row["area_share"] for row in rows], SHARE_EDGES)[0].tolist()
    assert told["areas"]["below"] + sum(told["areas"]["counts"]) + told["areas"]["above"] == len(rows)
    for unit, known in (("pixels", True), ("fractions", False)):
        chosen = [row for row in rows if (row["width"] is not None) == known]
        scales = [row["width"] / row["height"] if known else 1 for row in chosen]
        boxes = [(row["x_max"] - row["x_min"]) / (row["y_max"] - row["y_min"]) for row in chosen]
        aspects = [box * scale for box, scale in zip(boxes, scales, strict=True)]
        binned = told["aspects"][unit]
        assert binned["counts"] == np.histogram(aspects, ASPECT_EDGES)[0].tolist()
        assert binned["below"] == sum(aspect < ASPECT_EDGES[0] for aspect in aspects)
        assert binned["above"] == sum(aspect > ASPECT_EDGES[-1] for aspect in aspects)


def test_heat_maps_sum_over_batches(counted):
    rows, told = counted
    coverage, centres = np.zeros((CELLS, CELLS), int), np.zeros((CELLS, CELLS), int)
    for row in rows:
        left, right, top, bottom = (row[name] * CELLS for name in COORDINATES)
        coverage[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] += 1
        centres[min(CELLS - 1, int((top + bottom) / 2)), min(CELLS - 1, int((left + right) / 2))] += 1
    assert told["positions"]["coverage"] == coverage.tolist()
    assert told["positions"]["centres"] == centres.tolist()


def test_photos_flags_and_shards_are_counted_across_batches(counted):
    rows, told = counted
    sizes = Counter((row["split"], row["photo_id"]) for row in rows)
    lengths = Counter(sizes.values())
    photos = told["objects_per_photo"]
    assert photos["counts"] == [lengths[number] for number in photos["objects"]]
    assert photos["above"] == sum(count for number, count in lengths.items() if number > len(photos["counts"])) > 0
    assert photos["largest"] == max(lengths)
    assert photos["mean"] == pytest.approx(len(rows) / len(sizes))
    for split in told["splits"]:
        own = sum(row["split"] == split["split"] for row in rows)
        assert split["photos"] == sum(name == split["split"] for name, _ in sizes)
        assert split["objects"] == split["planned"] == own
        assert split["shards"] == -(-own // 10)
    for flag in FLAGS:
        counts = Counter(row[flag] for row in rows)
        assert told["flags"][flag] == {"yes": counts[1], "no": counts[0], "unknown": counts[-1]}
    assert told["summary"]["boxes"] == 232 == told["summary"]["objects"] + told["summary"]["rejected"]
    assert (told["summary"]["planned"], told["summary"]["packed"]) == (230, None)


@pytest.mark.parametrize("batch", [7, 65_536])
def test_rejects_stand_in_the_documented_order_with_their_first_rows(tmp_path, batch, monkeypatch):
    monkeypatch.setattr(counting, "_BATCH_ROWS", batch)
    malformed = reject_rows(*["bad_number"] * 9, *["bad_row"] * 2, *["bad_number"] * 3, detail="XMax is 'a'" + "!" * 999)
    rejects = [*malformed, *reject_rows("too_small", "of_tomorrow", "group_of", "too_small")]
    rejects[-2]["reasons"] = ["group_of", "too_small"]
    told = collect_figures(write_folder(tmp_path, object_rows(1), rejects))["rejects"]
    assert [entry["reason"] for entry in told["reasons"]] == [*REJECT_REASONS, "of_tomorrow"]
    by_reason = {entry["reason"]: entry for entry in told["reasons"]}
    counts = {reason: entry["boxes"] for reason, entry in by_reason.items() if entry["boxes"]}
    assert counts == {"bad_row": 2, "bad_number": 12, "group_of": 1, "too_small": 2, "of_tomorrow": 1}
    assert [by_reason[reason]["broken"] for reason in ("group_of", "too_small", "nested")] == [1, 1, 0]
    assert [example["row"] for example in by_reason["bad_number"]["examples"]] == [1, 2, 3, 4, 5]
    assert [example["row"] for example in by_reason["bad_row"]["examples"]] == [10, 11]
    assert by_reason["too_small"] | {"boxes": 2} == by_reason["too_small"] | {
        "meaning": REJECT_REASONS["too_small"],
        "examples": [],
    }
    example = by_reason["bad_row"]["examples"][0]
    assert (example["file"], example["detail"][:13], len(example["detail"])) == ("boxes.csv", "XMax is 'a'!!", 300)


def test_mask_shares_are_those_that_a_build_would_store(tmp_path, photos):
    """Otherwise the report would tell of other masks than training sees."""
    given = settings_of(photos, tmp_path / "out", "--masks.arbitrary_mask_prob", "1", "--masks.jitter", "[20, 60]")
    # The last one fills its photo, so that its view is padded and its jitter leads out of the photo.
    whole = object_rows(1)[0] | {"x_min": 0.0, "x_max": 1.0, "y_min": 0.0, "y_max": 1.0, "width": 900, "height": 300}
    rows = [*(row for row in object_rows(40) if row["width"]), whole]
    drawn = [draw_mask_shares(row, find_settings(tmp_path, given, None)) for row in rows]
    for row, (shares, padded) in zip(rows, drawn, strict=True):
        full = PlanRow.of({name: row.get(name) for name in OBJECTS.names} | {"view": 0, "key": "key"})
        prepared = prepare_sample(full, np.zeros((row["height"], row["width"], 3), np.uint8), "", given)
        left, top, right, bottom = prepared.record.box_in_view
        assert shares[0] == pytest.approx((right - left) * (bottom - top) / given.views.size**2)
        assert shares[2] == pytest.approx(prepared.masks[0].mean())
        assert padded == prepared.record.padded
    assert padded

    told = collect_figures(write_folder(tmp_path, rows), given)["masks"]
    assert (told["sampled"], told["size_unknown"], told["padded"]) == (len(rows), 0, sum(padded for _, padded in drawn))
    for place, kind in enumerate(("object", "box", "bessel")):
        shares = [shares[place] for shares, _ in drawn]
        assert told[kind]["at_percentile"] == pytest.approx(np.percentile(shares, PERCENTILES))
        assert told[kind]["counts"] == np.histogram(shares, SHARE_EDGES)[0].tolist()


def test_views_that_the_build_rejects_are_left_out(tmp_path):
    wide = object_rows(1)[0] | {"x_min": 0.0, "x_max": 1.0, "y_min": 0.25, "y_max": 0.5, "width": 900, "height": 300}
    for policy, shown in (("reflect", 1), ("reject", 0)):
        folder = write_folder(tmp_path, [wide], settings=SETTINGS | {"views": {"size": 64, "no_square": policy}})
        figures = collect_figures(folder)
        told = figures["masks"]
        assert (told["padded"], told["sampled"], sum(told["box"]["counts"])) == (1, 1, shown)
    assert "There is no mask" in render_page(figures)


def test_the_sample_is_seeded_and_spans_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "_BATCH_ROWS", 7)
    path = write_folder(tmp_path, object_rows(230)) / "objects.parquet"
    ids = [row["object_id"] for row in object_rows(230)]

    def chosen(count: int, seed: int) -> list[int]:
        return [ids.index(name) for name in sample_rows(path, ["object_id"], count, seed)["object_id"].to_pylist()]

    places = chosen(40, 3)
    assert places == sorted(set(places)) == chosen(40, 3) != chosen(40, 4)
    assert (len(places), max(places) > 150, chosen(999, 3)) == (40, True, list(range(230)))


def test_settings_come_from_whatever_tells_them(tmp_path, photos):
    folder = write_folder(tmp_path, object_rows(5), settings=None)

    def told(given: BuildSettings | None = None) -> tuple:
        figures = collect_figures(folder, given)
        return *figures["settings_from"].values(), figures["areas"]["min_area"], figures["aspects"]["max_aspect"]

    assert told() == (None, None, None, None)
    partly = {"seed": 3, "selection": {"min_area": 0.25, "max_aspect": None}, "views": {"per_object": 2}}
    (folder / "selection.json").write_text(json.dumps({"fingerprint": {"settings": partly}}))
    assert told() == ("selection.json", None, 0.25, None)
    assert "drawn with the defaults" in render_page(collect_figures(folder))
    (folder / "plan.json").write_text(json.dumps({"fingerprint": {"settings": SETTINGS}}))
    assert told() == ("plan.json", "plan.json", 0.01, 5)
    changed = settings_of(photos, tmp_path / "out", "--selection.min_area", "0.125", "--selection.max_aspect", "7")
    assert told(changed) == ("as given", "as given", 0.125, 7)


def words_of(page: str) -> str:
    """The page's text on one line."""
    return " ".join("".join(Page(page).text).split())


def test_a_finished_dataset_is_shown_with_what_was_packed(tmp_path, dataset):
    """And not with what was planned: charts are of objects that have samples."""
    rows = [row | {"split": "train"} for row in object_rows(50)]
    rows[-1] |= {"label": "/m/lost", "label_name": "lost class"}
    folder = write_folder(tmp_path, rows, reject_rows("too_small"))
    planned = collect_figures(folder)
    finish_folder(folder, read_dataset(dataset), rows, 1, failed=9)
    told = collect_figures(folder)
    assert told["settings_from"]["masks"] == "dataset.json"
    photos = {row["photo_id"] for row in rows[:-9]}
    packed = told["summary"]["packed"]
    assert (packed["objects"], packed["photos"], packed["samples"], packed["shards"]) == (41, len(photos), 41, 1)
    (split,) = told["splits"]
    assert (split["objects"], split["planned"], split["samples"]) == (50, 50, 41)
    assert (split["shards"], split["packed_shards"], split["bytes"]) == (5, 1, 12_345_678)

    alone = collect_figures(write_folder(tmp_path / "alone", rows[:-9]))
    for name in ("classes", "positions", "objects_per_photo", "flags", "areas", "aspects"):
        assert told[name] == alone[name] != planned[name]

    text = words_of(render_page(told))
    assert "drawn with the defaults" not in text
    assert "pbe app --dataset FOLDER" in text
    assert "pbe app" not in words_of(render_page(planned)), "the viewer wants shards"
    for words in ("12.3 MB", "shape_mismatch", "0123456789ab", "The shards are not in this folder"):
        assert words in text
    assert f"Samples came of 41 of the 50 objects, in {len(photos)} of the {told['summary']['photos']} photos" in text
    assert "padded by reflection: 17 of 41. Masks in all shards: 3 boxes, 1 Bessel curve." in text
    assert "lost class" not in text
    assert "lost class" in {entry["name"] for entry in planned["classes"]["classes"]}


def test_an_object_has_no_sample_only_if_all_its_views_failed(tmp_path):
    write_failures(tmp_path / "failures.parquet", ["a-1_0", "a-2_0", "a-1_1", "b-1_10", "b-1_2"])
    assert len(hash_unmade(tmp_path / "failures.parquet", 2)) == 2
    assert len(hash_unmade(tmp_path / "failures.parquet", 1)) == 3


def test_masks_of_a_finished_dataset_are_those_in_its_shards(dataset, tmp_path):
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
    text = words_of(render_page(figures))
    assert f"as it is in the shards: all masks of all {len(rows)} samples." in text
    assert f"padded by reflection: {padded} of {len(rows)}." in text
    some = packed_masks(dataset, info, 3, 7)
    assert some["sampled"] == 7
    assert some == packed_masks(dataset, info, 3, 7) != packed_masks(dataset, info, 4, 7)

    copy = shutil.copytree(dataset, tmp_path / "copy")
    tar = copy / "shards" / f"{rows[3]['shard']}.tar"
    data = bytearray(tar.read_bytes())
    data[rows[3]["json"]["offset"]] = 0
    tar.write_bytes(data)
    with pytest.raises(InputError, match=rf"{tar.name}, key {rows[3]['key']}: member json is damaged"):
        collect_figures(copy)


@pytest.mark.parametrize(("name", "column"), [("objects", "is_inside"), ("rejects", "detail"), ("plan", "shard")])
def test_tables_that_cannot_be_read_are_named(tmp_path, name, column):
    folder = write_folder(tmp_path, object_rows(5))
    path = folder / f"{name}.parquet"
    pq.write_table(pq.read_table(path).drop_columns([column]).replace_schema_metadata(None), path)
    with pytest.raises(InputError, match=rf"{name}.parquet: (no column {column}|made by another version)"):
        collect_figures(folder)
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(InputError, match=rf"{name}.parquet: not a readable Parquet table"):
        collect_figures(folder)
    path.unlink()
    with pytest.raises(InputError, match=rf"{name}.parquet: no such table"):
        collect_figures(folder)


def test_a_dataset_beside_other_tables_is_refused(tmp_path, dataset):
    rows = object_rows(30)
    folder = write_folder(tmp_path, rows, reject_rows("too_small"))
    finish_folder(folder, read_dataset(dataset), [*rows, rows[0]], 1)
    with pytest.raises(InputError, match=r"dataset.json: .* 32 boxes and 31 planned samples, but .* 31 and 30"):
        collect_figures(folder)


def test_the_page_is_whole_loads_nothing_and_shows_foreign_text_without_running_it(tmp_path):
    """Class names, files and details come from outside; they end up in tables, in alternative texts and in the charts."""
    rows = [row | {"label": HOSTILE, "label_name": HOSTILE} for row in object_rows(60)]
    rejects = [row | {"file": HOSTILE, "reasons": ["bad_row"]} for row in reject_rows("bad_row", "too_small", detail=HOSTILE)]
    folder = write_folder(tmp_path / "<script>alert(2)<-script>", rows, rejects)
    out = tmp_path / "new" / "report.html"
    write_report(folder, None, out)
    text = out.read_text()
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
    assert "break it" in text
    assert any("default-src 'none'" in content for content in page.values("content"))

    assert "".join(page.text).count(HOSTILE) == 6  # Class, its id, and two rows' file and detail.
    assert charts.short_name(HOSTILE) in "".join(page.text)
    assert any(HOSTILE in alternative for alternative in page.values("aria-label"))
    assert folder.name in "".join(page.text)

    write_report(folder, None, out)
    assert (out.read_text(), len(text) < 1_500_000) == (text, True)
    assert sorted(path.name for path in out.parent.iterdir()) == ["report.html", "report.json"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(out.with_suffix(".json").read_text(), parse_constant=refuse) == collect_figures(folder)
    with pytest.raises(InputError, match=r"report.json: the page is HTML"):
        write_report(folder, None, tmp_path / "report.json")


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
    page = render_page(collect_figures(write_folder(tmp_path, rows)))
    assert (">max_aspect : 1<" in page) == ("The ratio is one of px." in page) == known
    assert ">min_area<" in page


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


@pytest.mark.parametrize("count", [0, 1])
def test_little_or_nothing_to_show_is_shown(tmp_path, count):
    figures = collect_figures(write_folder(tmp_path, object_rows(count)))
    page = Page(render_page(figures))
    assert [figures["summary"][name] for name in ("boxes", "objects", "photos", "planned", "shards")] == [count] * 5
    assert f"0 of {count} box" in " ".join("".join(page.text).split())
    # Without objects there is nothing to draw but what was rejected; with one, all but that.
    assert page.tags["svg"] == 7 * count


def test_numbers_are_shown_in_their_units():
    shares = {None: "–", 0.0: "0.0 %", 0.0004: "< 0.1 %", 0.0213: "2.1 %", 1.0: "100.0 %"}
    sizes = {None: "–", 0: "0.0 kB", 999: "1.0 kB", 12_345_678: "12.3 MB", 8_200 * 1000**4: "8,200.0 TB"}
    for show, values in ((show_percent, shares), (show_size, sizes), (show_count, {None: "–", 1234: "1,234"})):
        assert {value: show(value).replace("\N{NO-BREAK SPACE}", " ") for value in values} == values
