"""Questions to painters of the tiny world: a pair set whose references show the individual of the photo elsewhere.

    DIR/photos/<id>.png      a view, 128 px, of a scene of its own: the truth, since the individual is there
    DIR/masks/<id>.png       where to paint, 0 or 255
    DIR/references/<id>.jpg  the same individual in another scene: another pose, size, light and ground
    DIR/pairs.csv            id,label

Views, masks and references are cut by the code and the settings of the tiny preset's build. Scenes are drawn by names that no
world on disk has, so nobody was trained on one; individuals are by default those of the validation split. A question's bytes
depend on the seed, the split, its place and that preset alone.

Usage:  python -m tiny_world.make_questions --out DIR --count 400
        pbe evaluate --pairs DIR --model MODEL --judge shape:resnet=tiny_world/weights/judges/shape --out RESULT
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import count
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from tqdm import tqdm

from pbe_core.errors import InputError, run_program
from pbe_core.files import temporary_folder
from pbe_core.settings import preset, read_section
from pipelines.config import BuildSettings
from pipelines.dataset.plan_shards import PlanRow
from pipelines.dataset.samples import Prepared, prepare_sample
from tiny_world.kinds import ALL_KINDS, INSTANCES_PER_KIND, KINDS, Instance
from tiny_world.make_photos import jpeg
from tiny_world.scenes import Box, Scene, boxes_of, plan_scene, render_scene

Photo = UInt8[np.ndarray, "height width 3"]

FIRST_SCENE = 1_000_000
"""Scenes of questions are numbered from here on, those of a world from 0."""
FIRST_REFERENCE = 1_000_000_000
PLACES_A_REFERENCE = 1000
LEAST_SIZE_RATIO = 1.25
"""Between the longer sides of the individual's two boxes, in px; either may be the larger."""


@dataclass(frozen=True)
class Question:
    """What to paint where; the photo shows how it ought to look."""

    id: str
    who: Instance
    photo: UInt8[np.ndarray, "128 128 3"]
    mask: Bool[np.ndarray, "128 128"]
    box: tuple[float, float, float, float]
    """Of the individual in the photo: left, top, right, bottom in px of it."""
    reference: bytes
    """A JPEG, as builds store it."""

    @property
    def reference_picture(self) -> Photo:
        """RGB, 0-255."""
        return np.asarray(Image.open(BytesIO(self.reference)))


def make_questions(out: str | Path, number: int, seed: int = 0, split: str = "validation") -> None:
    """Write a pair set as `pbe evaluate --pairs` reads it; the same arguments give the same bytes.

    Raises:
        InputError: `out` is there already, or there is to be no question in it.
    """
    out = Path(out)
    if number < 1:
        raise InputError(f"--count {number}: give 1 or more")
    if out.exists():
        raise InputError(f"{out}: is there already; give another --out, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written to ({error.strerror}); give another --out") from None
    write_questions(out, tqdm(questions(number, seed, split), "questions", number, mininterval=1))


def write_questions(out: Path, asked: Iterable[Question]) -> None:
    """Write a pair set, whole or not at all."""
    with temporary_folder(out.parent, out.name) as folder:
        for name in ("photos", "masks", "references"):
            (folder / name).mkdir()
        with (folder / "pairs.csv").open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("id", "label"))
            for question in asked:
                Image.fromarray(question.photo).save(folder / "photos" / f"{question.id}.png")
                Image.fromarray(question.mask).convert("L").save(folder / "masks" / f"{question.id}.png")
                (folder / "references" / f"{question.id}.jpg").write_bytes(question.reference)
                rows.writerow((question.id, ALL_KINDS[question.who.kind].name))
        folder.rename(out)


def questions(number: int, seed: int, split: str, disguise: Callable[[Instance], Instance] | None = None) -> Iterator[Question]:
    """As many of each kind, or one more of some; each from a scene of its own, in the order of the scenes.

    Args:
        number: of questions.
        seed: of scenes, individuals and masks.
        split: whose individuals are asked for.
        disguise: what photos show in place of an individual, with the shape of that; references show it as it is.
    """
    settings = settings_of(seed)
    wanted = [number // len(KINDS) + (kind < number % len(KINDS)) for kind in range(len(KINDS))]
    made = 0
    for index in count(FIRST_SCENE):
        if made == number:
            return
        scene = plan_scene(seed, split, index)
        if not any(wanted[who.kind] for who, _ in scene.objects):
            continue
        photo, seen = look_at(scene, settings)
        who, box = max(seen, key=lambda each: wanted[each[0].kind], default=(None, None))
        if who is None or not wanted[who.kind]:
            continue
        wanted[who.kind] -= 1
        if disguise:
            disguised = tuple((disguise(each) if each == who else each, pose) for each, pose in scene.objects)
            photo, _ = look_at(replace(scene, objects=disguised), settings)
        name = f"{KINDS[who.kind].name.lower().replace(' ', '-')}-{index - FIRST_SCENE:06d}"
        view = cut(name, split, photo, box, settings)
        elsewhere, other = another_look(who, longer_side_px(scene, box), index - FIRST_SCENE, seed, split, settings)
        reference = cut(f"{name}-elsewhere", split, elsewhere, other, settings).reference
        yield Question(name, who, view.view, view.masks[0], view.record.box_in_view, reference)
        made += 1


def settings_of(seed: int) -> BuildSettings:
    """The tiny preset's, with another seed."""
    return BuildSettings(**read_section(preset("tiny"), "build")).model_copy(update={"seed": seed})


def look_at(scene: Scene, settings: BuildSettings) -> tuple[Photo, list[tuple[Instance, Box]]]:
    """A photo as a world stores it, and the individuals that the build's rules of area accept, each with its box."""
    pixels, *told = render_scene(scene)
    rules = settings.selection
    shown = [] if scene.is_group else [who for (who, _), seen in zip(scene.objects, told[0], strict=True) if seen.any()]
    seen = [
        (who, box)
        for who, box in zip(shown, boxes_of(scene, *told), strict=False)
        if rules.min_area <= (box.x_max - box.x_min) * (box.y_max - box.y_min) <= rules.max_area
    ]
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(jpeg(pixels), np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), seen


def another_look(who: Instance, size_px: float, number: int, seed: int, split: str, settings: BuildSettings) -> tuple[Photo, Box]:
    """A photo of another scene with the individual in front, whole and of another size than `size_px`, and its box."""
    first = FIRST_REFERENCE + number * PLACES_A_REFERENCE
    for index in range(first, first + PLACES_A_REFERENCE):
        scene = plan_scene(seed, split, index)
        others = [each for each in scene.objects[:-1] if each[0].kind != who.kind]
        scene = replace(scene, objects=(*others, (who, scene.objects[-1][1])))
        photo, seen = look_at(scene, settings)
        for shown, box in seen:
            ratio = longer_side_px(scene, box) / size_px
            whole = not box.is_occluded and not box.is_truncated
            if shown == who and whole and not 1 / LEAST_SIZE_RATIO < ratio < LEAST_SIZE_RATIO:
                return photo, box
    raise AssertionError("every other scene is of another size")


def longer_side_px(scene: Scene, box: Box) -> float:
    """Of a box, in px of the photo."""
    return max((box.x_max - box.x_min) * scene.width, (box.y_max - box.y_min) * scene.height)


def cut(name: str, split: str, photo: Photo, box: Box, settings: BuildSettings) -> Prepared:
    """View, masks and reference of an object as the build cuts them; all draws go by its name."""
    row = PlanRow(
        key=name,
        view=0,
        split=split,
        photo_id=name,
        object_id=name,
        label=ALL_KINDS[box.kind].mid,
        label_name=ALL_KINDS[box.kind].name,
        x_min=box.x_min,
        x_max=box.x_max,
        y_min=box.y_min,
        y_max=box.y_max,
        segmentation=None,
        file_name=None,
        width=photo.shape[1],
        height=photo.shape[0],
        rotation=None,
        url=None,
        author=None,
        licence=None,
    )
    prepared = prepare_sample(row, photo, "", settings)
    assert isinstance(prepared, Prepared), prepared
    return prepared


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not be there")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--split", choices=sorted(INSTANCES_PER_KIND), default="validation", help="whose individuals are asked for"
    )
    settings = parser.parse_args()
    make_questions(settings.out, settings.count, settings.seed, settings.split)


if __name__ == "__main__":
    run_program(main)
