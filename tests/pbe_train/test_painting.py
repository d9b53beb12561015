"""Painting a pair set: the same bytes however it is shared out, nothing twice, and what is wrong costs itself alone."""

import errno
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbe_core.errors import InputError
from pbe_core.images.crop import Window
from pbe_core.progress import Progress
from pbe_train.editing.paint_by_example import PaintByExample, choose_window
from pbe_train.evaluation import filling, painting
from pbe_train.evaluation.painting import (
    PaintingRecipe,
    check_pictures,
    make_recipe,
    paint_pairs,
    read_picture,
    reconstruct_pairs,
)
from pbe_train.evaluation.pair_sets import Pair, PairPictures, PairSet, open_pairs
from pbe_train.model.pipeline import Run, SamplingSettings
from tests.pbe_train.pair_worlds import box, make_cocoee, make_rows, picture, save, write_jsonl

IDS = list(range(7))
HOW = SamplingSettings(guidance=2.0, steps=2)


@pytest.fixture(scope="module")
def paint(run_folder: Path) -> PaintByExample:
    return PaintByExample.from_pretrained(run_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pairs, one of them of another size."""
    folder = make_cocoee(tmp_path_factory.mktemp("pairs"), IDS)
    for part, made in (("GT_7/{}_GT.png", picture(6, 33, 90)), ("Mask_bbox_7/{}_mask.png", box(6, 33, 90))):
        save(folder / part.format(f"{6:012d}"), made)
    return folder


@pytest.fixture(scope="module")
def pairs(folder: Path) -> PairSet:
    return open_pairs(folder)


@pytest.fixture(scope="module")
def recipe(paint: PaintByExample, pairs: PairSet) -> PaintingRecipe:
    return recipe_of(paint, pairs)


@pytest.fixture(scope="module")
def painted(paint: PaintByExample, pairs: PairSet, recipe: PaintingRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as one process paints it, which no test changes."""
    out = tmp_path_factory.mktemp("painted")
    paint_pairs(paint, pairs, recipe, out, batch=2)
    return out


def recipe_of(paint: PaintByExample, pairs: PairSet, size: int = 32, seed: int = 3) -> PaintingRecipe:
    return make_recipe(paint, pairs, model="run", weights="ema", precision="fp32", how=HOW, size=size, seed=seed)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.png")}


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many photos each call to the model edits."""
    seen: list[int] = []
    whole = painting.edit
    monkeypatch.setattr(
        painting, "edit", lambda run, photos, *rest, **named: seen.append(len(photos)) or whole(run, photos, *rest, **named)
    )
    return seen


def test_each_pair_is_painted_as_an_edit_is(paint, pairs, recipe, painted):
    """All but the region is the photo's; inside, it is what an edit by itself makes with the seed of the pair's id."""
    assert sorted(contents(painted)) == [*(f"{number:012d}.png" for number in IDS), "recipe.json"]
    for number, pair in enumerate(pairs.pairs):
        shown, made = pairs.read(number), read_picture(painted, pair.id)
        seed = painting.name_hash(recipe.seed, "pair", pair.id, bits=32)
        alone = paint(shown.photo, shown.mask, shown.reference, seed=seed, guidance=2.0, steps=2)
        assert np.abs(made.astype(int) - np.asarray(alone)).max() <= 1
        assert np.array_equal(made[~shown.mask], shown.photo[~shown.mask])
        assert (made[shown.mask] != shown.photo[shown.mask]).mean() > 0.5
    assert PaintingRecipe.model_validate_json((painted / "recipe.json").read_text()) == recipe


def test_all_of_a_recipe_reaches_the_model(paint, pairs, recipe, tmp_path, monkeypatch):
    """Guidance, its interval, steps, scheduler, size and blending; unblended, the model's own px are outside the mask, too."""
    asked: list[tuple[SamplingSettings, dict[str, object]]] = []
    whole = painting.edit
    monkeypatch.setattr(painting, "edit", lambda *given, **named: asked.append((given[5], named)) or whole(*given, **named))
    other = recipe.model_copy(update={"guidance": 3.0, "steps": 3, "scheduler": "DDIMScheduler", "size": 64, "blend": False})
    other = other.model_copy(update={"guidance_interval": (0.2, 0.7)})
    paint_pairs(paint, pairs, other, tmp_path, batch=7)
    ((how, named),) = asked
    assert how == SamplingSettings(3.0, 3, "DDIMScheduler", (0.2, 0.7))
    assert (named["size"], named["blend"]) == (64, False)
    shown = pairs.read(0)
    made = read_picture(tmp_path, pairs.pairs[0].id)
    assert (made[~shown.mask] != shown.photo[~shown.mask]).any()


@pytest.mark.parametrize(("batch", "ranks"), [(1, 1), (2, 2), (3, 1), (7, 3), (1, 9)])
def test_batches_and_ranks_change_no_picture(paint, pairs, recipe, painted, tmp_path, batch, ranks):
    for rank in range(ranks):
        paint_pairs(paint, pairs, recipe, tmp_path, batch=batch, rank=rank, world=ranks)
        made = {path.name for path in tmp_path.glob("*.png")}
        assert made == {f"{number:012d}.png" for number in IDS if number % ranks <= rank}
    for pair in pairs.pairs:
        assert np.abs(read_picture(tmp_path, pair.id).astype(int) - read_picture(painted, pair.id)).max() <= 1
    assert len({path.name for path in tmp_path.iterdir()}) == len(IDS) + 1


def test_the_seed_of_a_pair_is_its_own(paint, folder, painted, tmp_path):
    """In another set with other numbers a pair's noise stays: so does its picture. Another seed is another picture."""
    shutil.copytree(folder, tmp_path / "set")
    np.save(tmp_path / "set" / "id_list.npy", np.array([4, 2]))
    pairs = open_pairs(tmp_path / "set")
    paint_pairs(paint, pairs, recipe_of(paint, pairs), tmp_path / "same", batch=2)
    paint_pairs(paint, pairs, recipe_of(paint, pairs, seed=4), tmp_path / "other", batch=2)
    for pair in pairs.pairs:
        assert np.abs(read_picture(tmp_path / "same", pair.id).astype(int) - read_picture(painted, pair.id)).max() <= 1
        assert not np.array_equal(read_picture(tmp_path / "other", pair.id), read_picture(painted, pair.id))


def test_what_is_painted_is_not_painted_again(paint, pairs, recipe, painted, tmp_path, edits):
    out = shutil.copytree(painted, tmp_path / "out")
    before = stamps(out)
    paint_pairs(paint, pairs, recipe, out, batch=2)
    assert not edits
    (out / f"{3:012d}.png").unlink()
    paint_pairs(paint, pairs, recipe, out, batch=2)
    assert edits == [2]  # Its batch, whole: rounding beside other neighbours could differ.
    after = stamps(out)
    assert {name for name in after if after[name] != before[name]} == {f"{3:012d}.png"}
    assert contents(out) == contents(painted)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda data: data[:-40], flipped, lambda data: b"", lambda data: data[: len(data) // 2]])
def test_damaged_pictures_and_those_of_another_size_are_painted_again(
    paint, pairs, recipe, painted, tmp_path, damage: Callable[[bytes], bytes]
):
    out = shutil.copytree(painted, tmp_path / "out")
    path = out / f"{2:012d}.png"
    path.write_bytes(damage(path.read_bytes()))
    save(out / f"{5:012d}.png", picture(5, 20, 20))
    before = stamps(out)
    paint_pairs(paint, pairs, recipe, out, batch=1)
    assert contents(out) == contents(painted)
    changed = {name for name, stamp in stamps(out).items() if stamp != before[name]}
    assert changed == {f"{2:012d}.png", f"{5:012d}.png"}


def test_another_recipe_is_refused_with_what_differs(paint, pairs, recipe, painted, tmp_path, edits):
    for changed, told in (
        ({"guidance": 3.0, "steps": 4}, f"{painted}: its pictures were made with guidance 2.0, now 3.0, steps 2, now 4; give "),
        ({"model_sha256": "f" * 64}, f"model_sha256 {recipe.model_sha256[:12]}..., now ffffffffffff...; "),
        (
            {"pairs": "e" * 64},
            f"pairs {pairs.fingerprint[:12]}..., now eeeeeeeeeeee...; give another --out, or remove the folder",
        ),
    ):
        with pytest.raises(InputError) as refused:
            paint_pairs(paint, pairs, recipe.model_copy(update=changed), painted, batch=2)
        assert told in str(refused.value)
    with pytest.raises(InputError, match=r"made None, now VAE reconstruction"):
        reconstruct_pairs(paint.run, pairs, painted, batch=2)
    assert not edits
    # The same weights from another place are the same model.
    paint_pairs(paint, pairs, recipe.model_copy(update={"model": "copy/of/run"}), painted, batch=2)
    save(tmp_path / "foreign" / "1.png", picture(1))
    with pytest.raises(InputError, match=r"1.png and no recipe.json"):
        paint_pairs(paint, pairs, recipe, tmp_path / "foreign", batch=2)
    with pytest.raises(InputError, match=r"1.png: no folder can be made there"):
        paint_pairs(paint, pairs, recipe, tmp_path / "foreign" / "1.png", batch=2)
    for text in ("{", "[]", '"a"'):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "recipe.json").write_text(text)
        with pytest.raises(InputError, match=r"recipe.json: cannot be read"):
            paint_pairs(paint, pairs, recipe, tmp_path / "damaged", batch=2)


def test_sizes_and_guidance_that_the_model_has_not_are_refused_before_anything_is_written(paint, pairs, recipe, tmp_path):
    for changed in ({"size": 33}, {"guidance": float("nan")}):
        with pytest.raises(InputError):
            paint_pairs(paint, pairs, recipe.model_copy(update=changed), tmp_path / "out", batch=2)
    assert not (tmp_path / "out").exists()


def test_the_model_works_at_the_size_of_the_recipe(paint, pairs, tmp_path):
    paint_pairs(paint, pairs, recipe_of(paint, pairs, size=48), tmp_path, batch=4)
    shown, pair = pairs.read(0), pairs.pairs[0]
    seed = painting.name_hash(3, "pair", pair.id, bits=32)
    alone = paint(shown.photo, shown.mask, shown.reference, seed=seed, guidance=2.0, steps=2, size=48)
    assert np.abs(read_picture(tmp_path, pair.id).astype(int) - np.asarray(alone)).max() <= 1


def test_pictures_that_cannot_be_written_end_the_painting(paint, pairs, recipe, tmp_path, monkeypatch, edits):
    """A full disk is told as soon as the next batch is to be written, and never passed over."""

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space")

    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    monkeypatch.setattr(filling, "write_atomically", full)
    with pytest.raises(OSError, match="no space"):
        paint_pairs(paint, pairs, recipe, tmp_path, batch=2)
    assert edits == [2, 2]


def test_a_pair_that_cannot_be_read_costs_itself_alone(paint, tmp_path, edits):
    rows = make_rows(tmp_path, range(5), truth=False)
    save(tmp_path / "m" / "1.png", box(1, 32, 64))
    (tmp_path / "r" / "3.png").write_bytes(b"<html>")
    pairs = open_pairs(write_jsonl(tmp_path / "rows.jsonl", rows))
    recipe = recipe_of(paint, pairs)
    told = r"^2 pairs cannot be read and have no picture in .*out, all others of 5 have: 2: .*m/1.png.*; 4: .*r/3.png"
    for _ in range(2):
        with pytest.raises(InputError, match=told) as line:
            paint_pairs(paint, pairs, recipe, tmp_path / "out", batch=2)
        assert "\n" not in str(line.value)
        assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == ["1", "3", "5"]
    assert edits == [1, 1, 1]
    save(tmp_path / "m" / "1.png", box(1))
    save(tmp_path / "r" / "3.png", picture(1))
    mended = open_pairs(tmp_path / "rows.jsonl")
    # Other pictures make another set, with another fingerprint.
    with pytest.raises(InputError, match="pairs "):
        paint_pairs(paint, mended, recipe_of(paint, mended), tmp_path / "out", batch=2)


def test_temporary_files_of_the_dead_are_swept(paint, pairs, recipe, painted, tmp_path):
    out = shutil.copytree(painted, tmp_path / "out")
    (out / f".{1:012d}.png.{'0' * 32}.tmp").write_bytes(b"half")
    (out / f".{'x' * 4}.png.{'1' * 32}.tmp").write_bytes(b"of a pair that is not in the set any more")
    paint_pairs(paint, pairs, recipe, out, batch=2)
    assert contents(out) == contents(painted)


def test_progress_counts_what_is_left(paint, pairs, recipe, painted, tmp_path):
    out = shutil.copytree(painted, tmp_path / "out")
    for number in (0, 1, 4):
        (out / f"{number:012d}.png").unlink()
    seen = []

    class Watched(Progress):
        def partly(self, at_hand: float) -> None:
            super().partly(at_hand)
            seen.append((self.before, self.done + at_hand, self.total))

    progress = Watched("painting")
    paint_pairs(paint, pairs, recipe, out, batch=2, progress=progress)
    # Two batches: one of two that are missing, and one of a missing and a present one; each of two steps.
    assert seen == [(4, done, 7) for done in (5, 6, 4 + 0, 6.5, 7, 6)]
    assert (progress.done, progress.total) == (7, 7)


def test_a_reconstruction_is_the_photo_through_the_vae(paint, pairs, tmp_path):
    reconstruct_pairs(paint.run, pairs, tmp_path, batch=3)
    for number, pair in enumerate(pairs.pairs):
        shown, made = pairs.read(number), read_picture(tmp_path, pair.id)
        assert np.array_equal(made[~shown.mask], shown.photo[~shown.mask])
        assert (made[shown.mask] != shown.photo[shown.mask]).mean() > 0.5
    before = stamps(tmp_path)
    reconstruct_pairs(paint.run, pairs, tmp_path, batch=3, rank=1, world=2)
    assert stamps(tmp_path) == before


def test_a_reconstruction_sees_the_photo_inside_the_mask_too(paint, tmp_path):
    """Of a window of just the model's size nothing but the VAE stands between the photo and the middle of the region."""
    (row,) = make_rows(tmp_path, [1], truth=False)
    mask = np.zeros((48, 64), np.uint8)
    mask[10:26, 20:36] = 255
    save(tmp_path / "m" / "1.png", mask)
    pairs = open_pairs(write_jsonl(tmp_path / "rows.jsonl", [row]))
    reconstruct_pairs(paint.run, pairs, tmp_path / "out", batch=1)
    assert choose_window(mask > 0) == Window(12, 2, 32)
    pixels = torch.from_numpy(picture(1)[2:34, 12:44]).permute(2, 0, 1)[None].float() / 127.5 - 1
    decoded = paint.run.decode(paint.run.encode_pixels(pixels))[0]
    assert np.array_equal(read_picture(tmp_path / "out", "1")[12:24, 22:34], decoded[10:22, 10:22])


class Many(PairSet):
    """Pairs that are made when they are read, and that know how many of their photos somebody holds."""

    name, has_truth = "many", False

    def __init__(self, count: int, fingerprint: str) -> None:
        self.pairs, self.fingerprint = [Pair(f"p{number}") for number in range(count)], fingerprint
        self.alive: dict[int, weakref.ref] = {}
        self.most = 0

    def size(self, number: int) -> tuple[int, int]:
        return 32, 32

    def read(self, number: int) -> PairPictures:
        read = PairPictures(picture(number, 32, 32), box(1, 32, 32) == 255, picture(1, 16, 16), None)
        self.alive[number] = weakref.ref(read.photo)
        self.most = max(self.most, sum(photo() is not None for photo in list(self.alive.values())))
        return read


def test_memory_does_not_grow_with_the_set(paint, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(painting, "edit", lambda run, photos, *_, **__: [photo.copy() for photo in photos])
    many = Many(120, recipe.pairs)
    paint_pairs(paint, many, recipe, tmp_path, batch=4)
    assert len(list(tmp_path.glob("*.png"))) == 120
    assert many.most <= 3 * 4


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp"])
def test_pictures_of_another_program_are_read(pairs, tmp_path, suffix):
    for number in IDS:
        save(tmp_path / (f"{number:012d}{suffix}" if number % 2 else f"{number}{suffix}"), pairs.read(number).photo)
    check_pictures(pairs, tmp_path)
    for number, pair in enumerate(pairs.pairs):
        made = read_picture(tmp_path, pair.id)
        assert np.array_equal(made, np.asarray(Image.open(next(tmp_path.glob(f"*{number}{suffix}"))).convert("RGB")))


def test_pictures_that_do_not_fit_are_told_in_one_line(pairs, tmp_path):
    for number in (0, 1):
        save(tmp_path / f"{number}.png", picture(1, 20, 30))
    save(tmp_path / "1.jpg", picture(1, 20, 30))
    with pytest.raises(InputError) as line:
        check_pictures(pairs, tmp_path)
    told = str(line.value)
    assert "\n" not in told
    assert "5 pictures of 7 missing (named <id>.png): 000000000002, 000000000003, 000000000004 and 2 more" in told
    assert "2 pictures painted at another size: 0.png is 30x20, its photo 64x48 px" in told
    assert "more than one picture of an id: 1.png and 1.jpg" in told
    with pytest.raises(InputError, match="no such folder"):
        check_pictures(pairs, tmp_path / "none")
    with pytest.raises(InputError, match=r"there is no picture 000000000005.png"):
        read_picture(tmp_path, "000000000005")
    (tmp_path / "5.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"5.png: not a readable photo"):
        read_picture(tmp_path, "000000000005")


def test_a_damaged_photo_of_the_set_is_no_fault_of_the_pictures(folder, pairs, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / "GT_7" / f"{3:012d}_GT.png").write_bytes(b"<html>")
    for number in IDS:
        save(tmp_path / "pictures" / f"{number}.png", pairs.read(number).photo)
    check_pictures(open_pairs(tmp_path / "set"), tmp_path / "pictures")


def test_16_bit_models_paint(run_folder, pairs, tmp_path):
    half = PaintByExample.from_pretrained(run_folder, precision="bf16")
    assert isinstance(half.run, Run)
    reconstruct_pairs(half.run, pairs, tmp_path, batch=4)
    assert '"precision": "bfloat16"' in (tmp_path / "recipe.json").read_text()
