"""Measure the tiny weights on the tiny world's validation split, whose instances no training has seen.

    PSNR            of views through the autoencoder, whole and with a grey hole
    kNN accuracy    the kind of a held-out object by its 5 nearest crops of the train split (cosine of class tokens)
    identification  an object is cut loosely from a view that went through the autoencoder; which of 8 references, cut from other
                    photos, shows the same object? Seven are of other kinds, or (hard) five of the same kind.
    judges          `recognised` of `pbe evaluate` on questions, for photos as they are, through the autoencoder, with another
                    kind's pattern, and in other colours; and how far colours of one luminance change the features

Usage:  python -m tiny_world.measure        prints the numbers and writes tiny_world/weights/quality.json
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from transformers import CLIPVisionModel

from pbe_core.judges.judge import Judge, load_judge
from pbe_train.evaluation.pair_scores import cut_region, recognised
from pbe_train.evaluation.pair_sets import Pair, draw_candidates
from tiny_world.kinds import KINDS, Instance, generator, mixed_instance
from tiny_world.make_questions import Question, questions
from tiny_world.scenes import Box, boxes_of, plan_scene, render_scene
from tiny_world.train_encoder import CROP_PX, normalised
from tiny_world.train_judges import GREY, JUDGES
from tiny_world.train_vae import VIEW_PX, Photo, cut_views, stored_photo, to_tensor

WEIGHTS = Path(__file__).parent / "weights"
REFERENCE_PAD_PX = 7
LOOSE_SHARE = 0.65
NEIGHBOURS = 5
CANDIDATES = 8
AREA_RANGE = (0.02, 0.8)

Tokens = Float[Tensor, "n width"]
Squares = UInt8[np.ndarray, "n 64 64 3"]


def load_vae(folder: Path = WEIGHTS / "vae") -> AutoencoderKL:
    """The tiny autoencoder in single precision."""
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()


def load_encoder(folder: Path = WEIGHTS / "encoder") -> CLIPVisionModel:
    """The tiny encoder in single precision."""
    return CLIPVisionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()


@dataclass(frozen=True)
class Sighting:
    """One object in one photo: who it is, and its box in pixels (x_min, x_max, y_min, y_max)."""

    who: Instance
    photo: int
    edges_px: tuple[float, float, float, float]


def sightings(seed: int, split: str, photos: range) -> list[Sighting]:
    """All objects whose box the area rule accepts; groups are left out, since they show more than one."""
    found = []
    for index in photos:
        scene = plan_scene(seed, split, index)
        if scene.is_group:
            continue
        _, visible, occluded, truncated = render_scene(scene)
        shown = [who for (who, _), seen in zip(scene.objects, visible, strict=True) if seen.any()]
        for who, box in zip(shown, boxes_of(scene, visible, occluded, truncated), strict=True):
            if AREA_RANGE[0] <= (box.x_max - box.x_min) * (box.y_max - box.y_min) <= AREA_RANGE[1]:
                found.append(Sighting(who, index, edges_in_pixels(box, scene.width, scene.height)))
    return found


def edges_in_pixels(box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    """The edges of a box (x_min, x_max, y_min, y_max) in photo pixels."""
    return box.x_min * width, box.x_max * width, box.y_min * height, box.y_max * height


def cut(photo: Photo, edges_px: tuple[float, float, float, float], pad_x: float, pad_y: float) -> UInt8[np.ndarray, "64 64 3"]:
    """The padded box, clipped to the photo and resized to the encoder's square without keeping its aspect."""
    height, width = photo.shape[:2]
    left, right = max(0, round(edges_px[0] - pad_x)), min(width, round(edges_px[1] + pad_x))
    top, bottom = max(0, round(edges_px[2] - pad_y)), min(height, round(edges_px[3] + pad_y))
    shrinks = (right - left) * (bottom - top) > CROP_PX**2
    return cv2.resize(
        photo[top:bottom, left:right], (CROP_PX, CROP_PX), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


@torch.no_grad()
def class_tokens(encoder: CLIPVisionModel, squares: Squares) -> Tokens:
    """Class tokens of length 1."""
    crops = normalised(torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255)
    return F.normalize(torch.cat([encoder(batch).pooler_output for batch in crops.split(128)]), dim=1)


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, views: Float[Tensor, "n 3 side side"]) -> Float[Tensor, "n 3 side side"]:
    """Views in [-1, 1] through the mean of the posterior and back."""
    batches = [vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in views.split(32)]
    return torch.cat(batches).clamp(-1, 1)


def psnr_db(vae: AutoencoderKL, views: Float[Tensor, "n 3 side side"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each view; the peak is the whole range, 2."""
    error = (reconstructed(vae, views) - views).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error)


@torch.no_grad()
def latent_spread(vae: AutoencoderKL, views: Float[Tensor, "n 3 side side"]) -> dict[str, float]:
    """Standard deviation of scaled latents (aim: 1), the least and the greatest over channels, and the posterior's own."""
    posterior = vae.encode(views).latent_dist
    scaled = posterior.mean * vae.config.scaling_factor
    per_channel = scaled.std((0, 2, 3))
    return {
        "scaled_latent_std": scaled.std().item(),
        "least_channel_std": per_channel.min().item(),
        "greatest_channel_std": per_channel.max().item(),
        "posterior_std": (posterior.std * vae.config.scaling_factor).mean().item(),
    }


def reference_squares(seen: list[Sighting], photo_of: Callable[[int], Photo]) -> Squares:
    """The reference crop of every sighting."""
    return np.stack([cut(photo_of(each.photo), each.edges_px, REFERENCE_PAD_PX, REFERENCE_PAD_PX) for each in seen])


def knn_kinds(
    tokens: Tokens, known_tokens: Tokens, known_kinds: Int[Tensor, " known"], neighbours: int = NEIGHBOURS
) -> Int[Tensor, " n"]:
    """The commonest kind among the nearest known class tokens."""
    nearest = (tokens @ known_tokens.T).topk(neighbours, dim=1).indices
    return known_kinds[nearest].mode(dim=1).values


def kinds_of(seen: list[Sighting]) -> Int[Tensor, " n"]:
    """Which kind each sighting shows."""
    return torch.tensor([each.who.kind for each in seen])


def painted_square(vae: AutoencoderKL, photo: Photo, each: Sighting) -> UInt8[np.ndarray, "64 64 3"]:
    """A loose cut of the object from a square view that went through the autoencoder."""
    height, width = photo.shape[:2]
    side = min(height, width)
    x_min, x_max, y_min, y_max = each.edges_px
    left = int(np.clip((x_min + x_max - side) / 2, 0, width - side))
    top = int(np.clip((y_min + y_max - side) / 2, 0, height - side))
    view = cv2.resize(photo[top : top + side, left : left + side], (VIEW_PX, VIEW_PX), interpolation=cv2.INTER_AREA)
    painted = reconstructed(vae, to_tensor([view]))[0].permute(1, 2, 0).numpy()
    scale = VIEW_PX / side
    edges = ((x_min - left) * scale, (x_max - left) * scale, (y_min - top) * scale, (y_max - top) * scale)
    edges = tuple(np.clip(edges, 0, VIEW_PX))
    loose = (1 / LOOSE_SHARE - 1) / 2
    pad_x, pad_y = loose * (edges[1] - edges[0]), loose * (edges[3] - edges[2])
    return cut(((painted + 1) * 127.5 + 0.5).astype(np.uint8), edges, pad_x, pad_y)


def identified(seen: list[Sighting], queries: Tokens, references: Tokens, random: np.random.Generator, same_kind: bool) -> float:
    """Share of queries whose nearest candidate is the same instance in another photo.

    The other candidates are references of other kinds, or other instances of the same kind.
    """
    hits = []
    for i, each in enumerate(seen):
        own = [j for j, other in enumerate(seen) if other.who == each.who and other.photo != each.photo]
        others = [j for j, other in enumerate(seen) if other.who != each.who and (other.who.kind == each.who.kind) == same_kind]
        if same_kind:
            others = list({seen[j].who.number: j for j in random.permutation(others)}.values())
        if not own or len(others) < (2 if same_kind else CANDIDATES - 1):
            continue
        candidates = [random.choice(own), *random.permutation(others)[: CANDIDATES - 1]]
        hits.append(int((references[candidates] @ queries[i]).argmax()) == 0)
    return float(np.mean(hits))


def named_judge(name: str, folder: Path = WEIGHTS / "judges") -> Judge:
    """A judge as `pbe evaluate` loads it."""
    return load_judge(f"{name}:resnet={folder / name}")


def in_another_pattern(who: Instance) -> Instance:
    """The individual in the pattern of the first kind from half-way round on that has another."""
    kinds = ((who.kind + len(KINDS) // 2 + step) % len(KINDS) for step in range(len(KINDS)))
    return replace(who, pattern_of=next(kind for kind in kinds if KINDS[kind].pattern is not KINDS[who.kind].pattern))


def in_other_colours(who: Instance) -> Instance:
    """The individual in two colours of anything; the same two at each call."""
    other = mixed_instance(who.kind, generator("other colours", who.kind, who.number))
    return replace(who, first=other.first, second=other.second)


def share_recognised(judge: Judge, asked: list[Question], photos: list[Photo]) -> float:
    """How often the region of the mask in a photo is nearest to its own reference among eight kinds', as `pbe evaluate` asks."""
    regions = judge.features([cut_region(photo, each.mask) for each, photo in zip(asked, photos, strict=True)])
    references = judge.features([each.reference_picture for each in asked])
    candidates = draw_candidates([Pair(each.id, KINDS[each.who.kind].name) for each in asked], seed=0)
    assert candidates is not None, "too few questions"
    return float(np.mean([recognised(one, references[list(of)]) for one, of in zip(regions, candidates, strict=True)]))


def colour_leak(judge: Judge, pictures: list[Photo]) -> float:
    """Largest change of a feature, relative to the largest, when colours change and what the judge of shapes sees does not."""
    prepared = np.stack([judge.prepare(picture) for picture in pictures])
    red, green, blue = np.array(GREY, np.float32)
    others = [prepared + np.float32(turn)[:, None, None] for turn in ((green, -red, 0), (-blue / 4, 0, red / 4), (-1, 0.5, 0))]
    features = judge.embed(prepared)
    return float(max(np.abs(judge.embed(other) - features).max() for other in others) / np.abs(features).max())


def measure_judges(seed: int, count: int) -> dict[str, float]:
    """The numbers of both judges, for individuals of the validation split in scenes that no world has."""
    asked = {
        "": list(questions(count, seed, "validation")),
        "_other_pattern": list(questions(count, seed, "validation", in_another_pattern)),
        "_other_colours": list(questions(count, seed, "validation", in_other_colours)),
    }
    photos = {how: [each.photo for each in these] for how, these in asked.items()}
    views = reconstructed(load_vae(), to_tensor(photos[""])).permute(0, 2, 3, 1)
    photos["_reconstructed"] = list(((views + 1) * 127.5 + 0.5).to(torch.uint8).numpy())
    found: dict[str, float] = {"questions": count}
    for name in JUDGES:
        judge = named_judge(name)
        for how, pictures in photos.items():
            found[f"{name}_recognised{how}"] = share_recognised(judge, asked[""], pictures)
        found[f"{name}_colour_leak"] = colour_leak(judge, photos[""][:32])
        found[f"{name}_megabytes"] = megabytes(WEIGHTS / "judges" / name)
    return found


def megabytes(folder: Path) -> float:
    """Size of all files below a folder, in units of 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def measure(seed: int, train_photos: int, validation_photos: int) -> dict[str, float]:
    """All numbers. The known crops come from the train split, everything asked from the validation split."""
    vae, encoder = load_vae(), load_encoder()
    photo_of = {split: partial(stored_photo, seed=seed, split=split) for split in ("train", "validation")}
    photos = [photo_of["validation"](index) for index in range(validation_photos)]
    whole = cut_views(photos, generator(seed, "measure whole"), 2 * validation_photos, hole_share=0)
    masked = cut_views(photos, generator(seed, "measure masked"), 2 * validation_photos, hole_share=1)
    whole_db, masked_db = psnr_db(vae, whole), psnr_db(vae, masked)

    known = sightings(seed, "train", range(train_photos))
    seen = sightings(seed, "validation", range(validation_photos))
    known_tokens = class_tokens(encoder, reference_squares(known, photo_of["train"]))
    references = class_tokens(encoder, reference_squares(seen, photos.__getitem__))
    queries = class_tokens(encoder, np.stack([painted_square(vae, photos[each.photo], each) for each in seen]))
    right = (knn_kinds(references, known_tokens, kinds_of(known)) == kinds_of(seen)).float()
    right_painted = (knn_kinds(queries, known_tokens, kinds_of(known)) == kinds_of(seen)).float()
    return {
        "psnr_whole_db": whole_db.mean().item(),
        "psnr_whole_worst_tenth_db": whole_db.quantile(0.1).item(),
        "psnr_masked_db": masked_db.mean().item(),
        "psnr_masked_worst_tenth_db": masked_db.quantile(0.1).item(),
        **latent_spread(vae, whole),
        "knn_accuracy": right.mean().item(),
        "knn_accuracy_reconstructed": right_painted.mean().item(),
        "identification_other_kinds": identified(seen, queries, references, generator(seed, "candidates"), False),
        "identification_same_kind": identified(seen, queries, references, generator(seed, "candidates"), True),
        "views": len(whole),
        "known_crops": len(known),
        "held_out_crops": len(seen),
        "vae_megabytes": megabytes(WEIGHTS / "vae"),
        "encoder_megabytes": megabytes(WEIGHTS / "encoder"),
    }


def main() -> None:
    """Read the command line, print and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=600, help="photos that the known crops are cut from")
    parser.add_argument("--validation", type=int, default=150, help="photos that everything asked is cut from")
    parser.add_argument("--questions", type=int, default=400, help="to the judges")
    parser.add_argument("--of", choices=("all", "judges"), default="all", help="`judges` leaves the other numbers as they are")
    settings = parser.parse_args()
    path = WEIGHTS / "quality.json"
    if settings.of == "all":
        found = measure(settings.seed, settings.train, settings.validation)
    else:
        found = json.loads(path.read_text())
    found |= measure_judges(settings.seed, settings.questions)
    quality = {name: float(f"{value:.4g}") if abs(value) < 1 else round(value, 4) for name, value in found.items()}
    for name, value in quality.items():
        print(f"{name:32s}{value:10.4g}")
    path.write_text(json.dumps(quality, indent=2) + "\n")


if __name__ == "__main__":
    main()
