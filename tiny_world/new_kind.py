"""A new kind of object, which no network of the tiny world has seen: ten photos of one individual, and questions about it.

    DIR/photos/00.jpg ... 09.jpg    scenes with the individual among objects of known kinds; then some of known kinds alone
    DIR/boxes.csv                   photo,x_min,y_min,x_max,y_max,label: in px, around all that is whole in them
    DIR/questions/                  a pair set: that individual elsewhere (its label: the new kind's name), and the known kinds

So a LoRA of a few photos is asked two things: does the model know the new object now, and does it still know the others? The
photos are what a user would bring, as `source.kind: boxes` reads them; scenes are numbered beyond all other ones. Known things
have boxes too, in photos of their own: a model that is shown one object alone paints it whatever it is asked for.

Usage:  python -m tiny_world.new_kind --out DIR                              # photos and questions: half a minute
        pbe build --config lora_tiny --source.annotations DIR/boxes.csv --source.photos DIR/photos --out DIR/dataset
        pbe train --config lora_tiny --dataset DIR/dataset --out DIR/run
        pbe evaluate --pairs DIR/questions --model before=tiny_world/weights/model after=DIR/run --guidance 2 --out DIR/result \\
            --judge shape:resnet=tiny_world/weights/judges/shape look:resnet=tiny_world/weights/judges/look
        python -m tiny_world.new_kind --compare DIR/result                   # the table of docs/fine-tuning.md
"""

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from scipy.stats import binomtest
from tqdm import tqdm

from pbe_core.errors import InputError, run_program
from pbe_core.files import temporary_folder
from tiny_world.kinds import ALL_KINDS, NEW_KIND, Instance, instance
from tiny_world.make_photos import jpeg
from tiny_world.make_questions import Photo, Question, another_look, cut, longer_side_px, look_at, questions, settings_of
from tiny_world.make_questions import write_questions as write_pairs
from tiny_world.scenes import Box, Scene, plan_scene, render_scene

SPLIT, BESIDE = "validation", "train"
"""Whose individuals of known kinds the questions are about, which no training saw; and whose stand beside the new one in the
photos to learn from, which the model knows."""
FIRST_PHOTO, FIRST_KNOWN, FIRST_QUESTION = 2_000_000, 2_500_000, 3_000_000
LEAST_SIDE_PX = 40
"""Of the individual in a photo to learn from: people who want an object known photograph it from near."""
OTHERS_SEED = 1


def the_new_one() -> Instance:
    """The individual that the photos show."""
    return instance(0, "new", ALL_KINDS.index(NEW_KIND), 0)


def scenes_with(who: Instance, first: int, split: str) -> Iterator[tuple[int, Scene]]:
    """Scenes in which an individual stands in front of others of a split, in the place of one, and their numbers."""
    for index in count(first):
        scene = plan_scene(0, split, index)
        if not scene.is_group:
            yield index, replace(scene, objects=(*scene.objects[:-1], (who, scene.objects[-1][1])))


def box_of(who: Instance, seen: Sequence[tuple[Instance, Box]]) -> Box | None:
    """Its box, if it was seen."""
    return next((box for shown, box in seen if shown == who), None)


def new_photos(number: int) -> Iterator[tuple[Photo, list[Box]]]:
    """Photos with the individual, whole and not small (RGB, 0-255); its box, and those of what else is whole."""
    who, settings = the_new_one(), settings_of(0)
    for _, scene in scenes_with(who, FIRST_PHOTO, BESIDE):
        if number == 0:
            return
        _, seen = look_at(scene, settings)
        box = box_of(who, seen)
        if box and is_whole(box) and longer_side_px(scene, box) >= LEAST_SIDE_PX:
            yield render_scene(scene)[0], [box, *(other for shown, other in seen if shown != who and is_whole(other))]
            number -= 1


def known_photos(number: int) -> Iterator[tuple[Photo, list[Box]]]:
    """Photos of known kinds (RGB, 0-255), and the boxes of all that is whole in them; some photos have none."""
    for index in range(FIRST_KNOWN, FIRST_KNOWN + number):
        photo, seen = look_at(plan_scene(0, BESIDE, index), settings_of(0))
        yield photo, [box for _, box in seen if is_whole(box)]


def is_whole(box: Box) -> bool:
    """Whether all of an object is seen."""
    return not (box.is_truncated or box.is_occluded or box.is_group)


def new_questions(number: int) -> Iterator[Question]:
    """Questions as `tiny_world.make_questions` asks them, of the individual alone; also where the photo's edge cuts it off."""
    who, settings = the_new_one(), settings_of(0)
    for index, scene in scenes_with(who, FIRST_QUESTION, SPLIT):
        if number == 0:
            return
        photo, seen = look_at(scene, settings)
        box = box_of(who, seen)
        if box is None:
            continue
        name = f"{NEW_KIND.name.lower().replace(' ', '-')}-{index - FIRST_QUESTION:06d}"
        view = cut(name, SPLIT, photo, box, settings)
        elsewhere, other = another_look(who, longer_side_px(scene, box), index, 0, SPLIT, settings)
        reference = cut(f"{name}-elsewhere", SPLIT, elsewhere, other, settings).reference
        yield Question(name, who, view.view, view.masks[0], view.record.box_in_view, reference)
        number -= 1


def write(out: Path, photos: int, known: int, new: int, others: int) -> None:
    """Write photos, boxes and questions; the same arguments give the same bytes.

    Raises:
        InputError: `out` is there already.
    """
    if out.exists():
        raise InputError(f"{out}: is there already; give another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(out.parent, out.name) as folder:
        (folder / "photos").mkdir()
        with (folder / "boxes.csv").open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("photo", "x_min", "y_min", "x_max", "y_max", "label"))
            for number, (photo, boxes) in enumerate(chain(new_photos(photos), known_photos(known))):
                sides = photo.shape[1::-1] * 2
                (folder / "photos" / f"{number:02d}.jpg").write_bytes(jpeg(photo))
                for box in boxes:
                    fractions = (box.x_min, box.y_min, box.x_max, box.y_max)
                    edges = [round(fraction * side) for fraction, side in zip(fractions, sides, strict=True)]
                    rows.writerow((f"{number:02d}.jpg", *edges, ALL_KINDS[box.kind].name))
        asked = chain(new_questions(new), questions(others, OTHERS_SEED, SPLIT))
        write_pairs(folder / "questions", tqdm(asked, "questions", new + others, mininterval=1))
        folder.rename(out)


def compare(result: Path) -> str:
    """A table of how often each model was known, of the new kind and of the others, and whether the change is more than chance.

    Raises:
        InputError: no evaluation of two models there.
    """
    try:
        pairs = json.loads((result / "evaluation.json").read_bytes())["pairs"]
        before, after = list(pairs[0]["scores"])[:2]
        scores = [name for name in pairs[0]["scores"][before] if name.startswith("recognised")]
    except (OSError, ValueError, KeyError, IndexError):
        raise InputError(f"{result}: no evaluation of two models here; give the --out of pbe evaluate") from None
    rows = [("recognised among eight, %", "pairs", before, after, "gained, lost", "p (McNemar)"), ("---",) * 6]
    for score in scores:
        judge = score.partition("(")[2].rstrip(")")
        for label, chosen in (("new kind", True), ("known kinds", False)):
            asked = [pair["scores"] for pair in pairs if (pair["label"] == NEW_KIND.name) is chosen]
            marks = [(bool(each[before][score]), bool(each[after][score])) for each in asked]
            gained, lost = marks.count((False, True)), marks.count((True, False))
            p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
            shown = [share(sum(mark[side] for mark in marks), len(marks)) for side in (0, 1)]
            rows.append((f"{label}, {judge}", str(len(marks)), *shown, f"{gained}, {lost}", f"{p:.2g}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def share(hits: int, of: int) -> str:
    """In per cent with its 95 % interval (Wilson)."""
    if of == 0:
        return "none"
    low, high = binomtest(hits, of).proportion_ci(method="wilson")
    return f"{100 * hits / of:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder to write; must not be there")
    what.add_argument("--compare", type=Path, metavar="RESULT", help="the --out of an evaluation of two models on the questions")
    parser.add_argument("--photos", type=int, default=10, help="of the new one")
    parser.add_argument("--known", type=int, default=24, help="photos of known kinds beside them")
    parser.add_argument("--new", type=int, default=160, help="questions about the new kind")
    parser.add_argument("--others", type=int, default=240, help="questions about the known kinds")
    settings = parser.parse_args()
    if settings.compare:
        print(compare(settings.compare))
    else:
        write(settings.out, settings.photos, settings.known, settings.new, settings.others)


if __name__ == "__main__":
    run_program(main)
