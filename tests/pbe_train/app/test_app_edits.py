"""Edits over HTTP: a real server, the tiny model, and people with sessions of their own."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image, ImageCms

from pbe_core.images.decode import decode_photo
from pbe_train.model.sampling import SCHEDULER, STEPS
from tests.pbe_train.app.serving import EXAMPLE, QUICK, REPOSITORY, Person, Served, serve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("server")) as served:
        yield served


@pytest.fixture
def ann(server: Served) -> Person:
    return server.person()


@pytest.fixture
def bob(server: Served) -> Person:
    return server.person()


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_models_and_limits(ann: Person):
    told = ann.get("/api/models").json()
    assert "drawn world" in told["models"][0].pop("note")  # Or else people judge the method by what it makes of their photos.
    assert told["models"] == [
        {
            "id": "tiny-world",
            "name": "tiny world",
            "view_size": 128,
            "licence": "apache-2.0",
            "several_references": True,
            "guidance": True,
            "defaults": {"guidance": 2.0, "steps": STEPS, "scheduler": SCHEDULER},
        }
    ]
    assert "DDIMScheduler" in told["schedulers"]
    assert told["datasets"] == []
    assert {"bytes", "pixels", "references", "seeds", "steps"} < told["limits"].keys()


@dataclass(frozen=True)
class Painted:
    """An edit of two seeds and two references, of a photo that EXIF turns and that has a colour profile."""

    by: Person
    photo: bytes
    photo_id: str
    region: np.ndarray
    edit: str
    states: list[dict[str, Any]]

    def get(self, path: str) -> bytes:
        answer = self.by.get(f"/api/edits/{self.edit}{path}")
        assert answer.status == 200, answer.body
        return answer.body


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def painted(server: Served) -> Painted:
    person = server.person()
    exif = Image.Exif()
    exif[274] = 6  # Turned by 90 degrees.
    photo = encoded(noise(1, 150, 90), "JPEG", quality=95, exif=exif, icc_profile=PROFILE)
    region = np.zeros((150, 90), np.uint8)
    region[40:90, 20:70] = 255
    kept = person.give("photos", photo, "päth/../my photo.jpg").json()
    assert (kept["name"], kept["width"], kept["height"]) == ("my photo.jpg", 90, 150)
    mask = person.give("masks", encoded(Image.fromarray(region)), query=f"?photo={kept['id']}").json()
    assert mask == {"id": mask["id"], "width": 90, "height": 150, "share": pytest.approx(2500 / 13500, abs=1e-6)}
    references = [person.give("photos", EXAMPLE / "reference.png").json()["id"] for _ in range(2)]
    given = {"model": "tiny-world", "photo": kept["id"], "mask": mask["id"], "references": references}
    edit = person.edit(given, seeds=[7, 8], guidance_interval=[0.5, 1.0])
    return Painted(person, photo, kept["id"], region, edit, list(person.follow(edit)))


def test_a_page_that_was_left_finds_its_edits_again(painted: Painted, ann: Person):
    """With what was asked for and of which photo; other people's are not among them."""
    [told] = painted.by.get("/api/edits").json()["edits"]
    assert told["photo"] == {"id": painted.photo_id, "name": "my photo.jpg", "width": 90, "height": 150}
    assert told["model"] == "tiny-world"
    assert told["seeds"] == [7, 8]
    assert painted.states[-1].items() <= told.items()
    assert ann.get("/api/edits").json() == {"edits": []}


def test_an_edit_tells_how_far_it_is(painted: Painted):
    states, last = painted.states, painted.states[-1]
    assert {state["id"] for state in states} == {painted.edit}
    assert last == json.loads(painted.get(""))
    assert last["state"] == "done"
    assert last["results"] == [
        {"seed": seed, "url": f"/api/edits/{painted.edit}/results/{number}"} for number, seed in enumerate((7, 8))
    ]
    steps = [(state["seed_number"], state["step"]) for state in states if state["state"] == "painting"]
    assert steps == sorted(steps)
    assert {(0, 1), (0, 2), (1, 1), (1, 2)} <= set(steps)
    # The first step of an edit is always seen where somebody listens.
    assert last["previews"] >= 1
    assert Image.open(io.BytesIO(painted.get("/preview"))).size == (90, 150)


def test_all_but_the_masks_region_is_the_photos_own(painted: Painted):
    own = decode_photo(painted.photo, frame="exif")
    pictures = [painted.by.result(painted.edit, number) for number in (0, 1)]
    for picture in pictures:
        np.testing.assert_array_equal(picture[painted.region == 0], own[painted.region == 0])
        assert (picture[painted.region > 0] != own[painted.region > 0]).mean() > 0.5
    assert (pictures[0] != pictures[1]).any()
    assert Image.open(io.BytesIO(painted.get("/results/0"))).info["icc_profile"] == PROFILE
    assert max(Image.open(io.BytesIO(painted.get("/results/0?most=40"))).size) == 40
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(painted.get("/mask")))), painted.region)


def test_the_archive_repeats_the_edit_by_command_line(painted: Painted, tmp_path: Path):
    """After its photo was forgotten, too: an edit keeps its own."""
    shown = Image.open(io.BytesIO(painted.by.get(f"/api/photos/{painted.photo_id}").body))
    assert (shown.format, shown.size, shown.info["icc_profile"]) == ("JPEG", (90, 150), PROFILE)
    assert painted.by.ask("DELETE", f"/api/photos/{painted.photo_id}").status == 200
    assert painted.by.get(f"/api/photos/{painted.photo_id}").status == 410

    archive = zipfile.ZipFile(io.BytesIO(painted.get("/archive")))
    assert archive.testzip() is None
    names = ["my_photo.jpg", "mask.png", "reference.png", "reference-2.png", "result-0.png", "result-1.png", "settings.json"]
    assert archive.namelist() == names
    assert archive.read("my_photo.jpg") == painted.photo
    archive.extractall(tmp_path)
    assert (tmp_path / "settings.json").read_bytes() == painted.get("/settings")

    command = [sys.executable, "-m", "pbe_cli", "edit", "--settings", "settings.json", "--out", "again.png", "--seed", "8"]
    # More threads than the server had: the settings say how many.
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.png").read_bytes() == archive.read("result-1.png")


def test_two_people_at_once(ann: Person, bob: Person):
    """Each gets what they asked for, and nothing of the other's."""
    red, blue = encoded(Image.new("RGB", (40, 40), "red")), encoded(Image.new("RGB", (40, 40), "blue"))
    edits = {}
    for person, colour in ((ann, red), (bob, blue)):
        given = person.give_example() | {"references": [person.give("photos", colour, "colour.png").json()["id"]]}
        edits[person] = given, person.edit(given, seeds=[1], steps=3)
    for person in (ann, bob):
        assert person.wait(edits[person][1])["state"] == "done"
    of_ann, of_bob = (person.result(edits[person][1]) for person in (ann, bob))
    assert (of_ann != of_bob).any()
    # Alone, Bob gets the same.
    again = bob.edit(edits[bob][0], seeds=[1], steps=3)
    assert bob.wait(again)["state"] == "done"
    np.testing.assert_array_equal(bob.result(again), of_bob)

    given, edit = edits[ann]
    for path in ("", "/events", "/preview", "/results/0", "/mask", "/settings", "/archive"):
        assert bob.get(f"/api/edits/{edit}{path}").status == 404
    for kind in ("photos", "masks"):
        assert bob.get(f"/api/{kind}/{given[kind[:-1]]}").status == 404
    assert bob.ask("DELETE", f"/api/photos/{given['photo']}").status == 404
    assert bob.ask("DELETE", f"/api/edits/{edit}").status == 404
    assert bob.give("masks", EXAMPLE / "mask.png", query=f"?photo={given['photo']}").status == 404
    for name in ("photo", "mask", "references"):
        mixed = edits[bob][0] | {name: given[name]} | QUICK
        assert bob.ask("POST", "/api/edits", mixed).status == 404
    assert ann.get(f"/api/edits/{edit}").json()["state"] == "done"


def test_places_turns_and_cancelling(ann: Person, bob: Person):
    """Who has had a turn waits for who has not; what is cancelled ends at once or at its next step; others move up."""
    of_ann, of_bob = ann.give_example(), bob.give_example()
    long = ann.edit(of_ann, steps=1000)
    following = ann.follow(long)
    while next(following)["step"] < 1:
        pass
    second, third = ann.edit(of_ann, seeds=[2]), ann.edit(of_ann, seeds=[3])
    mine = bob.edit(of_bob, seeds=[4])
    places = {
        edit: person.get(f"/api/edits/{edit}").json()["place"] for person, edit in ((ann, second), (ann, third), (bob, mine))
    }
    assert places == {mine: 1, second: 2, third: 3}
    told = ann.get(f"/api/edits/{second}").json()
    assert (told["state"], told["step"], told["results"]) == ("waiting", 0, [])
    assert ann.get(f"/api/edits/{second}/results/0").error == "result 0 of this edit is not painted; it has 0"
    assert ann.get(f"/api/edits/{second}/settings").status == 404

    assert ann.ask("DELETE", f"/api/edits/{second}").status == 200
    assert ann.get(f"/api/edits/{second}").json()["state"] == "cancelled"
    assert ann.get(f"/api/edits/{third}").json()["place"] == 2
    assert ann.ask("DELETE", f"/api/edits/{long}").status == 200
    states = list(following)
    assert states[-1]["state"] == "cancelled"
    assert states[-1]["step"] < 1000
    assert ann.wait(third)["state"] == bob.wait(mine)["state"] == "done"
    # What is over is forgotten by the same request.
    assert ann.ask("DELETE", f"/api/edits/{long}").status == 200
    assert ann.get(f"/api/edits/{long}").status == 410


def test_the_queue_is_bounded(ann: Person, bob: Person):
    given = ann.give_example()
    edits = [ann.edit(given, steps=1000)]
    following = ann.follow(edits[0])
    while next(following)["state"] != "painting":
        pass
    edits += [ann.edit(given) for _ in range(8)]
    full = ann.ask("POST", "/api/edits", given | QUICK)
    assert (full.status, full.error) == (429, "8 edits of yours are waiting already; wait for one, or cancel one")
    others = bob.edit(bob.give_example())
    for edit in reversed(edits):
        ann.ask("DELETE", f"/api/edits/{edit}")
    assert bob.wait(others)["state"] == "done"


def test_a_painting_process_that_dies_takes_one_edit_with_it(server: Served, ann: Person):
    given = ann.give_example()
    edit = ann.edit(given, steps=1000)
    following = ann.follow(edit)
    while next(following)["step"] < 1:
        pass
    (worker,) = psutil.Process(server.process.pid).children()
    worker.kill()
    last = list(following)[-1]
    assert last["state"] == "failed"
    assert last["error"].startswith(
        "the painting process was killed (for want of memory, most likely) in the middle of this edit"
    )
    assert ann.wait(ann.edit(given))["state"] == "done"


def test_what_somebody_has_removed_from_the_servers_folder_is_told(server: Served, ann: Person):
    """By hand, or a program that cleans folders for temporary files."""
    given = ann.give_example()
    edit = ann.edit(given)
    assert ann.wait(edit)["state"] == "done"
    (folder,) = server.folder.rglob(edit)
    shutil.rmtree(folder)
    for what in ("mask", "results/0", "results/0?most=5", "settings", "archive"):
        answer = ann.get(f"/api/edits/{edit}/{what}")
        assert (answer.status, answer.error[:29]) == (410, "a file of this edit is gone f")
    again = ann.edit(given, steps=1000)
    following = ann.follow(again)
    while next(following)["state"] != "painting":
        pass
    (folder,) = server.folder.rglob(again)
    shutil.rmtree(folder)
    ann.ask("DELETE", f"/api/edits/{again}")
    assert list(following)[-1]["state"] in ("cancelled", "failed")
    assert ann.wait(ann.edit(given))["state"] == "done"
    assert not [line for line in server.said if "Traceback" in line]


BAD_EDITS: list[tuple[dict[str, Any], str]] = [
    ({"model": "../../etc"}, "model '../../etc': give one of tiny-world"),
    ({"seeds": []}, "seeds: "),
    ({"seeds": list(range(17))}, "seeds: "),
    ({"steps": 0}, "steps: "),
    ({"steps": 1001}, "steps: "),
    ({"reuse": 0}, "reuse: "),
    ({"guidance": "much"}, "guidance: "),
    ({"guidance_interval": [0.7, 0.2]}, "guidance interval 0.7 0.2: give two shares of the schedule"),
    ({"references": []}, "references: "),
    ({"scheduler": "os.system"}, "scheduler 'os.system': give one of DDIMScheduler"),
    ({"more": 1}, "more: "),
]


@pytest.mark.parametrize(("changed", "message"), BAD_EDITS)
def test_what_is_wrong_with_an_edit_is_a_sentence(ann: Person, changed: dict[str, Any], message: str):
    answer = ann.ask("POST", "/api/edits", ann.give_example() | QUICK | changed)
    assert answer.status == 400
    assert answer.error.startswith(message)


def test_what_only_the_model_can_say_is_a_sentence_too(ann: Person):
    edit = ann.edit(ann.give_example(), scheduler="DDIMScheduler(threshold=1)")
    last = ann.wait(edit)
    assert last["state"] == "failed"
    assert last["error"].startswith("DDIMScheduler: threshold is no option that may be chosen")


def header_of_png(width: int, height: int) -> bytes:
    """All that a PNG says before its pixels, of which there are none."""
    small = encoded(Image.new("L", (1, 1)))
    chunk = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + small[24:29]
    return small[:12] + chunk + zlib.crc32(chunk).to_bytes(4) + small[33:]


def test_what_is_wrong_with_a_file_is_a_sentence_and_nothing_of_it_stays(server: Served, ann: Person):
    before = sorted(server.folder.rglob("*"))
    wide = header_of_png(20_000, 20_000)
    photo = ann.give_example()["photo"]
    kept = len(sorted(server.folder.rglob("*"))) - len(before)
    for kind, data, status, message in (
        (
            "photos",
            wide,
            400,
            "x.png: not a readable photo (too_many_pixels: 20000x20000 px, more than 100,000,000); give another",
        ),
        ("photos", EXAMPLE.joinpath("photo.png").read_bytes()[:3000], 400, "x.png: not a readable photo (decode_error: "),
        ("photos", b"<html>", 400, "x.png: not a readable photo (not_an_image: "),
        ("photos", b"", 400, "x.png: not a readable photo (not_an_image: "),
        ("masks", wide, 400, "x.png: not a readable picture (too_many_pixels: 20000x20000 px"),
        ("masks", b"GIF89a", 400, "x.png: not a readable picture (decode_error: "),
        ("masks", encoded(Image.new("L", (128, 128))), 400, "x.png: the mask is empty"),
        (
            "masks",
            encoded(Image.new("L", (128, 127), 255)),
            400,
            "x.png: the mask is 128x127 px, the photo photo.png is 128x128 px",
        ),
        ("masks", encoded(Image.new("RGB", (128, 128), (90, 0, 0))), 400, "x.png: the mask's colours are #5a0000"),
    ):
        answer = ann.give(kind, data, "x.png", f"?photo={photo}" if kind == "masks" else "")
        assert (answer.status, answer.error[: len(message)]) == (status, message)
    assert len(sorted(server.folder.rglob("*"))) - len(before) == kept
    dot = ann.give("photos", encoded(Image.new("RGB", (1, 1))), "dot.png").json()
    refused = ann.ask("POST", "/api/edits", ann.give_example() | QUICK | {"references": [dot["id"]]})
    assert refused.error.startswith("dot.png: 1 × 1 px show too little of anything")


def test_an_upload_is_counted_while_it_is_read(server: Served, ann: Person):
    told = ann.ask("POST", "/api/photos", b"", Content_Length=str(70 << 20))
    assert (told.status, told.error) == (413, "the file has more than 64 MB; send a smaller one")
    largest = 0

    def parts() -> Iterator[bytes]:
        nonlocal largest
        for _ in range(80):
            largest = max([largest, *(path.stat().st_size for path in server.folder.rglob("file"))])
            yield bytes(1 << 20)

    # Whose length nobody tells beforehand.
    assert ann.ask("POST", "/api/photos", parts()).status == 413  # type: ignore[arg-type]
    assert 1 << 20 <= largest <= 64 << 20
    assert all(path.stat().st_size < 1 << 20 for path in server.folder.rglob("file"))
    assert ann.give("photos", EXAMPLE / "photo.png").status == 200
