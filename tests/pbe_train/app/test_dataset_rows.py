"""What the viewer tells of a dataset, beside what its tables and tars say when they are read by others' means."""

import asyncio
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from aiohttp import web
from PIL import Image

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError
from pbe_core.images.decode import decode_jpeg
from pbe_train.app import dataset_folder, dataset_rows
from pbe_train.app.dataset_folder import TILE_COLUMNS, DatasetFolder
from pbe_train.app.dataset_lists import Listed, Marks
from pbe_train.app.dataset_routes import Viewer, ViewerOptions
from pbe_train.app.dataset_rows import KINDS, Found, Query, Rows
from pbe_train.app.dataset_samples import Samples, Sources
from pbe_train.app.dataset_torch import Draw, TorchProcess, augment
from pbe_train.data.order import SampleLocation
from pbe_train.data.shards import ShardReader
from pbe_train.data.training_dataset import TrainingDataset
from schemas.tables import INDEX, SHARD_RECORDS
from tests.conftest import build_options, run_build
from tests.pbe_train.app.looked_into import MALLORY, NO_ADDRESS, RULES, built, photos_of, read  # noqa: F401
from tests.pbe_train.small_world import World


class InThisProcess(TorchProcess):
    """Tests have PyTorch already."""

    def call(self, function, *arguments):
        return function(*arguments)


@pytest.fixture(scope="module")
def folder(built: Path) -> DatasetFolder:  # noqa: F811
    return DatasetFolder(str(built), {}, built)


@pytest.fixture(scope="module")
def rows(folder: DatasetFolder, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return Rows(folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def samples(folder: DatasetFolder) -> Samples:
    return Samples(folder, Sources(), InThisProcess())


@pytest.fixture(scope="module")
def truth(built: Path) -> list[dict]:  # noqa: F811
    """The rows of the index with what the plan and each sample's own json say."""
    shares = {row["key"]: row["area_share"] for row in read(built, "plan").select(["key", "area_share"]).to_pylist()}
    records = {}
    for path in (built / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json") and not member.name.endswith(".mask.json"):
                    records[member.name.removesuffix(".json")] = json.load(tar.extractfile(member))
    index = read(built, "index").to_pylist()
    return [{**row, "share": np.float32(shares[row["key"]]), "record": records[row["key"]]} for row in index]


def finished(rows: Rows, query: Query) -> Found:
    """What is found when all is read."""
    while (found := rows.find(query)).read < 1:
        time.sleep(0.01)
    return found


def passes(row: dict, query: Query) -> bool:
    kinds = sum(KINDS[kind] for kind in set(row["record"]["mask_kinds"]))
    return (
        query.label in ("", row["label"])
        and query.split in ("", row["split"])
        and query.text in row["key"]
        and (not query.kinds or KINDS[query.kinds] == kinds)
        and np.float32(query.smallest) <= row["share"] <= np.float32(query.largest)
    )


def test_rows_are_the_same_to_many_who_read_at_once(folder, truth):
    """A page asks for a sample's parts at the same time; each is a thread of the server that reads the one open index."""
    places = list(range(0, folder.samples, max(1, folder.samples // 20)))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda place: folder.rows([place], INDEX.names)[0]["key"], places * 25))
    assert found == [truth[place]["key"] for place in places] * 25


def test_the_dataset_has_what_is_asked_for(built, truth):  # noqa: F811
    books = read_dataset(built).books
    assert books.failures["missing"] > 0
    assert len(books.rejects) > 1
    assert {len(set(row["record"]["mask_kinds"])) for row in truth} == {1, 2}


def test_filters_find_what_the_tables_say(rows, truth):
    """Each filter alone, pairs, and all of them, also those that nothing passes; counts by class leave the class aside."""
    label = Counter(row["label"] for row in truth).most_common(1)[0][0]
    text, share = truth[5]["key"][2:8], float(truth[7]["share"])
    while rows.count_classes(Query())[1] < 1:
        time.sleep(0.01)
    queries = [
        Query(),
        *(Query(label=one) for one in (label, "/m/none")),
        *(Query(split="validation"), Query(text=text), Query(smallest=share), Query(largest=share)),
        *(Query(kinds=kinds) for kinds in KINDS),
        Query(label, "train", "both"),
        Query(label, "train", "", text[:2], 0.03, 0.6),
        Query(kinds="box", smallest=0.9),
    ]
    for query in queries:
        expected = [place for place, row in enumerate(truth) if passes(row, query)]
        found = finished(rows, query)
        assert found.total == len(expected)
        assert found.page(0, len(truth)) == expected
        assert found.page(3, 4) == expected[3:7]
        counted, read_share = rows.count_classes(query)
        others = Counter(row["label"] for row in truth if passes(row, query._replace(label="")))
        assert {one: count for one, _, count in counted} == others
        assert read_share == 1
        assert [count for *_, count in counted] == sorted(others.values(), reverse=True)
    names = {row["label"]: row["label_name"] for row in truth}
    assert all(names[one] == name for one, name, _ in rows.count_classes(Query())[0])
    with pytest.raises(InputError, match="no split `test`"):
        rows.find(Query(split="test"))


def test_ranges_of_an_extended_dataset_are_cut_into_pages():
    """A split of an extended dataset lies in several places."""
    found = Found(((3, 6), (10, 11), (20, 30)), None, 1)
    places = [3, 4, 5, 10, *range(20, 30)]
    assert found.total == len(places)
    for first in range(16):
        for count in range(6):
            assert found.page(first, count) == places[first : first + count]


def test_what_was_read_once_is_in_the_cache(folder, rows, tmp_path, truth):
    query = Query(label=truth[0]["label"], smallest=0.05)
    expected = finished(rows, query).page(0, 1000)
    finished(Rows(folder, tmp_path), query)
    while len(list(tmp_path.glob("viewer/*/[a-z]*.json"))) < 2:
        time.sleep(0.01)
    again = Rows(folder, tmp_path)
    found = again.find(query)
    assert (found.read, found.page(0, 1000)) == (1, expected)
    for path in tmp_path.glob("viewer/*/*.npy"):
        path.write_bytes(b"\x93NUMPY of another kind")
    assert finished(Rows(folder, tmp_path), query).page(0, 1000) == expected


def test_a_large_dataset_is_read_by_parts_and_by_processes(built, tmp_path, truth, monkeypatch):  # noqa: F811
    monkeypatch.setattr(dataset_folder, "LARGE_FOOTER", 0)
    monkeypatch.setattr(dataset_rows, "LARGE_FOOTER", 0)
    copy = shutil.copytree(built, tmp_path / "copy")  # Others read the dataset itself meanwhile.
    large = DatasetFolder(str(copy), {}, copy)
    whole = (index := copy / "index.parquet").read_bytes()
    index.write_bytes(whole[-8:])
    assert large.rows([0, len(truth) - 1], ("key", "label")) == [
        {"key": truth[place]["key"], "label": truth[place]["label"], "place": place} for place in (0, len(truth) - 1)
    ]
    index.write_bytes(whole)
    rows = Rows(large, tmp_path)
    for query in (Query(label=truth[0]["label"]), Query(text=truth[3]["key"][:16])):
        assert finished(rows, query).page(0, 1000) == [place for place, row in enumerate(truth) if passes(row, query)]


def test_a_sample_is_told_with_all_it_has(folder, samples, truth):
    for place in (0, len(truth) - 1):
        row = folder.rows([place], INDEX.names)[0]
        facts, own = samples.describe(row), truth[place]["record"]
        assert facts["record"] == {name: own[name] for name in own if name not in ("mask_polygons", "reference_mask")}
        assert facts["members"]["ref.jpg"]["crc32"] == f"{truth[place]['ref_jpg']['crc32']:08x}"
        assert facts["share"] == pytest.approx(truth[place]["share"], rel=0.01)
    assert (facts["record"]["author"], facts["record"]["url"], facts["link"]) == (MALLORY, NO_ADDRESS, None)
    assert facts["licence_link"].startswith("https://")
    with pytest.raises(InputError, match=f"there are {len(truth)}, from 0"):
        folder.rows([len(truth)], ("key",))


def test_pictures_show_what_is_stored(folder, samples, truth, built):  # noqa: F811
    first, last = (folder.rows([place], INDEX.names)[0] for place in (0, len(truth) - 1))
    # Training samples keep no view: it is cut again; where photos are gone, it is decoded from the latent.
    (cut, from_photo), (kept, from_file) = samples.view(first), samples.view(last)
    assert (from_photo, from_file) == ("photo", "view.jpg")
    elsewhere = Samples(folder, Sources(photos=str(built / "nowhere")), InThisProcess())
    decoded, from_latent = elsewhere.view(first)
    assert from_latent == "latent"
    assert decoded == samples.latent(first, None)
    # The tiny VAE gives back what it was shown, but for detail.
    assert np.abs(decode_jpeg(cut).astype(int) - decode_jpeg(decoded)).mean() < 12
    assert np.abs(decode_jpeg(kept).astype(int) - decode_jpeg(samples.latent(last, None))).mean() < 12
    with pytest.raises(InputError, match="--photos says where photos are"):
        elsewhere.photo(first)
    width, height = truth[0]["record"]["photo_size"]
    assert decode_jpeg(samples.photo(first)).shape == (height, width, 3)
    tile = folder.rows([0], TILE_COLUMNS)[0]
    assert max(decode_jpeg(samples.tile(tile)).shape) <= 160
    for number, share in enumerate(samples.describe(first)["mask_shares"]):
        layer = np.asarray(Image.open(io.BytesIO(samples.mask(first, number))))
        assert (layer[..., 3] > 0).mean() == pytest.approx(share, abs=1e-4)
        under = decode_jpeg(samples.latent(first, number)).astype(int)
        assert np.abs(under[layer[..., 3] > 0] - 127).mean() < 12
    with pytest.raises(InputError, match="no mask 2; there are 2"):
        samples.mask(first, 2)


@pytest.mark.parametrize("preset", ["paper", "strong", "none"])
def test_draws_are_those_of_a_training(built, folder, world: World, tmp_path, preset):  # noqa: F811
    """The batch that the trainer makes of (step, slot), and the viewer's draw of the sample that it took there."""
    settings = world.settings(tmp_path, f"--augmentation.preset={preset}", "--seed=7")
    reader = ShardReader(built, "train")
    items = TrainingDataset(settings, reader, 224)
    step, slots = 3, range(settings.global_batch)
    batch = items[[(step, slot) for slot in slots]].batch
    for slot in slots:
        place: SampleLocation = items.order.at(step, slot, settings.global_batch)[1]
        row = folder.rows([folder.start(reader.shards[place.shard]) + place.position], INDEX.names)[0]
        reference = decode_jpeg(folder.members(row, ["ref.jpg"])["ref.jpg"])
        draw = Draw(preset, settings.model.reference_geometry, 7, step, slot)
        assert torch.equal(torch.from_numpy(augment(reference, None, draw)), batch.reference[slot])
    assert decode_jpeg(Samples(folder, Sources(), InThisProcess()).draw(row, draw)).shape == (224, 224, 3)


def test_damage_is_told_in_a_sentence(built, tmp_path, truth):  # noqa: F811
    copy = shutil.copytree(built, tmp_path / "copy")
    folder = DatasetFolder(str(copy), {}, copy)
    row = folder.rows([0], INDEX.names)[0]
    tar = copy / "shards" / f"{row['shard']}.tar"
    data = bytearray(tar.read_bytes())
    data[row["ref_jpg"]["offset"] + 30] ^= 1
    tar.write_bytes(data)
    with pytest.raises(InputError, match=r"ref\.jpg of sample .* is not what was written \(CRC-32\)"):
        Samples(folder, Sources(), InThisProcess()).tile(row)
    opened = Rows(folder, tmp_path / "cache")
    (copy / "index.parquet").unlink()
    for ask in (lambda: opened.find(Query(label="x")), lambda: opened.find(Query(text="x")), lambda: Rows(folder, tmp_path)):
        with pytest.raises(InputError, match=r"copy/index\.parquet: cannot be read \(No such file"):
            ask()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    for content in (b"PAR1", None):
        if content:
            (copy / "rejects.parquet").write_bytes(content)
        else:
            (copy / "rejects.parquet").unlink()
        with pytest.raises(InputError, match=r"rejects\.parquet: cannot be read"):
            Listed(copy / "rejects.parquet").row(0, ("photo_id",))
    tar.unlink()
    with pytest.raises(InputError, match=rf"{row['shard']}\.tar: missing; copy it here"):
        folder.members(row)
    records = read(copy, "shard_records").to_pylist()
    strange = [{**record, "shard": f"../{record['shard']}"} for record in records]
    pq.write_table(pa.Table.from_pylist(strange, SHARD_RECORDS), copy / "shard_records.parquet")
    with pytest.raises(InputError, match="which no build does"):
        DatasetFolder(str(copy), {}, copy)
    (copy / "dataset.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        DatasetFolder(str(copy), {}, copy)
    with pytest.raises(InputError, match="no dataset here"):
        DatasetFolder(str(tmp_path), {}, copy)


def test_a_dataset_that_is_built_again_is_opened_again(built, tmp_path):  # noqa: F811
    """While it is being built there is no dataset.json: until then what was there is shown."""
    copy = shutil.copytree(built, tmp_path / "copy")
    asked: Any = SimpleNamespace(match_info={"number": "0"})

    async def go() -> None:
        viewer = Viewer(ViewerOptions([str(copy)], cache=tmp_path / "cache", leave_out=tmp_path / "left_out.csv"))
        first = await viewer.open(asked)
        told = (copy / "dataset.json").read_bytes()
        (copy / "dataset.json").unlink()
        assert await viewer.open(asked) is first
        (copy / "dataset.json").write_bytes(told)
        os.utime(copy / "dataset.json", (1, 1))
        second = await viewer.open(asked)
        assert second is not first
        assert await viewer.open(asked) is second
        await viewer.close(web.Application())

    asyncio.run(go())


def test_a_store_that_is_silent_keeps_no_other_dataset_back(built, tmp_path):  # noqa: F811
    """However often people reload the page meanwhile."""

    async def go(url: str) -> None:
        viewer = Viewer(ViewerOptions([url, str(built)], cache=tmp_path / "cache", leave_out=tmp_path / "left_out.csv"))
        for _ in range(8):
            asking = asyncio.create_task(viewer.open(cast(Any, SimpleNamespace(match_info={"number": "0"}))))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            asking.cancel()
        opened = await asyncio.wait_for(viewer.open(cast(Any, SimpleNamespace(match_info={"number": "1"}))), 100)
        assert opened.folder.folder == built
        await viewer.close(web.Application())

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(go(f"http://127.0.0.1:{silent.getsockname()[1]}/dataset"))


def test_the_process_of_pytorch_ends_with_its_server(tmp_path):
    """However that ends: a VAE of gigabytes must not stay behind."""
    program = """if __name__ == "__main__":
    import os, signal
    from pbe_train.app.dataset_torch import TorchProcess
    print(TorchProcess().call(os.getpid), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "server.py").write_text(program)
    done = subprocess.run([sys.executable, tmp_path / "server.py"], stdout=subprocess.PIPE, text=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    # Its output is the server's too, so by now it has ended, or `run` would not have returned.
    assert not psutil.pid_exists(int(done.stdout)) or psutil.Process(int(done.stdout)).status() == psutil.STATUS_ZOMBIE


def test_rejects_and_failures_are_paged_by_what_they_say(built, tmp_path):  # noqa: F811
    rejects = read(built, "rejects").to_pylist()
    listed = Listed(built / "rejects.parquet")
    columns = ("photo_id", "reason", "label")
    some = rejects[4]
    for filters, texts in (
        ({}, {}),
        ({"reason": some["reason"]}, {}),
        ({"reason": some["reason"], "label": some["label"]}, {}),
        ({"split": "validation"}, {"photo_id": some["photo_id"][:2].upper()}),
        ({"reason": "no such reason"}, {}),
    ):
        expected = [
            {**{name: row[name] for name in columns}, "place": place}
            for place, row in enumerate(rejects)
            if all(row[name] == word for name, word in filters.items())
            and all(text.lower() in row[name].lower() for name, text in texts.items())
        ]
        assert listed.page(filters, texts, 1, 3, columns) == (len(expected), expected[1:4])
    failures = Listed(built / "failures.parquet").page({"code": "missing"}, {}, 0, 100, ("key", "detail"))
    assert failures[0] == read_dataset(built).books.failures["missing"] == len(failures[1])
    with pytest.raises(InputError, match="cannot be read"):
        Listed(tmp_path / "none.parquet").page({}, {}, 0, 1, columns)


def test_what_is_marked_is_left_out_of_the_next_build_and_counted(built, tmp_path, truth):  # noqa: F811
    """Marked in the viewer, one object and one photo; all else is built as before."""
    photo = truth[0]["record"]["photo_id"]
    single = next(row["object_id"] for row in truth if row["record"]["photo_id"] != photo)
    marks = Marks(tmp_path / "left_out.csv", [built])
    marks.mark("object", single, True)
    marks.mark("object", truth[1]["object_id"], True)
    marks.mark("photo", photo, True)
    assert marks.mark("object", truth[1]["object_id"], False).objects == {single}
    out = tmp_path / "anew"
    run_build(*build_options(photos_of(built), out), "--selection.leave_out", str(marks.path), *RULES)
    before, after = ({row["object_id"] for row in read(folder, "objects").to_pylist()} for folder in (built, out))
    gone = {name for name in before if name == single or name.startswith(f"{photo}-")}
    assert before - after == gone
    assert after <= before
    books, old = read_dataset(out).books, read_dataset(built).books
    # Of the photo, boxes that were rejected for something else as well are left out first.
    assert books.rejects["left_out"] >= len(gone)
    assert books.boxes == old.boxes
    with pytest.raises(InputError, match="stays as it was built"):
        Marks(built / "left_out.csv", [built])
    (tmp_path / "left_out.csv").write_text("what,id\nobject,x\n")
    with pytest.raises(InputError, match="line 2"):
        marks.mark("photo", photo, True)


@contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """A web server that gives files, whole or in ranges; its address."""
    started, loop = threading.Event(), asyncio.new_event_loop()
    told = []

    async def serve() -> None:
        app = web.Application()
        app.add_routes([web.static("/", folder)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        told.append(site._server.sockets[0].getsockname()[1])
        started.set()

    loop.create_task(serve())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    started.wait()
    try:
        yield f"http://127.0.0.1:{told[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def test_a_dataset_behind_a_url_is_the_same(built, folder, samples, truth, tmp_path):  # noqa: F811
    with file_server(built.parent) as address:
        remote = DatasetFolder(f"{address}/{built.name}/", {}, tmp_path)
        rows = Rows(remote, tmp_path)
        for query in (Query(label=truth[0]["label"]), Query(smallest=0.1)):
            assert finished(rows, query).page(0, 1000) == [place for place, row in enumerate(truth) if passes(row, query)]
        row = remote.rows([4], INDEX.names)[0]
        assert Samples(remote, Sources(), InThisProcess()).tile(row) == samples.tile(folder.rows([4], INDEX.names)[0])
        assert remote.table("rejects.parquet").read_bytes() == (built / "rejects.parquet").read_bytes()
        assert not list(tmp_path.rglob("*.tar"))
        with pytest.raises(InputError, match="filter a local copy"):
            rows.find(Query(kinds="box"))
        with pytest.raises(InputError, match="missing; is all of the dataset there"):
            remote.members({**row, "shard": "train-999999"})
        with pytest.raises(InputError, match="no dataset there"):
            DatasetFolder(f"{address}/nowhere", {}, tmp_path)
