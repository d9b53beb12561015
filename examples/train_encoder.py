"""Train a small vision encoder on the references of a dataset, without labels: what a crop shows, whatever its cut and light.

For photos for which no CLIP is at hand, or none that is small enough for two cores (docs/real-photos.md). Each step shows two
looks at each of many references of the train split, and asks that they find each other among all others (InfoNCE):

    reference --window, turn, flip, light, colour, blur--> [n, 3, 64, 64] --encoder--> class token --head--> 64 numbers --+
                                                                                                                       cosine
    the same reference ------- the same, drawn anew -----> [n, 3, 64, 64] --encoder--> class token --head--> 64 numbers --+

The head is thrown away: what it ignores (a part of colour and light) the class token still tells. Left is a CLIPVisionModel in
half precision, which `model.encoder` reads: the moving average of the weights. Labels serve the measurement at the end alone: the
class of held-out references, by their neighbours.

The same command goes on where it stopped, with more --steps also from its end; the same references, settings and threads give the
same weights, whether a training stopped or not.

Source: Chen et al., A simple framework for contrastive learning of visual representations (SimCLR, ICML 2020).

Usage:  python -m examples.train_encoder --dataset DATASET --out ENCODER
"""

import argparse
import copy
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, UInt8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm, trange
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError, run_program
from pbe_core.files import atomic_file, write_atomically
from pbe_core.randomness import generator
from pbe_train.config import TRAIN_SPLIT, VALIDATION_SPLIT
from pbe_train.data.latents import CLIP_MEAN, CLIP_STD
from pbe_train.data.references import resize
from pbe_train.data.shards import ShardReader
from tiny_world.train_encoder import pair_loss, save_encoder

CROP_PX = 64
STORED_PX = 96
HEAD_WIDTH = 64
# Constant, and the weights averaged, so that a training can go on from its end.
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 50
AVERAGE_DECAY = 0.99
WEIGHT_DECAY = 0.05
SAVE_EVERY_STEPS = 200
NEIGHBOURS = 10
# RGB -> luma and two axes of colour (NTSC's YIQ): hue is an angle between these, saturation their length.
TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])

Squares = UInt8[Tensor, "n 3 96 96"]
Crops = Float[Tensor, "n 3 64 64"]


@dataclass(frozen=True)
class Settings:
    """What decides the weights, beside the dataset's references."""

    batch: int
    width: int
    seed: int


def train_encoder(dataset: Path, out: Path, steps: int, settings: Settings) -> None:
    """Train, or go on, to so many steps; then measure. Leaves config.json, model.safetensors and quality.json in `out`.

    Raises:
        InputError: no dataset, no second reference in it, or `out` holds a training with other settings.
    """
    squares, _ = read_squares(dataset, TRAIN_SPLIT)
    if len(squares) < 2:
        raise InputError(f"{dataset}: {len(squares)} references to train on; two must be told apart: build it from more photos")
    torch.manual_seed(settings.seed)
    student = Student(settings.width)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    begun = {**asdict(settings), "references": hashlib.sha256(squares.numpy().data).hexdigest()[:16]}
    first = resume(out, begun, student, optimizer)
    progress = trange(first, steps, initial=first, total=steps, desc="encoder", mininterval=10)
    for step in progress:
        random = generator(settings.seed, "encoder step", step)
        shown = squares[chosen(len(squares), settings, step)]
        looks = torch.cat([looked_at(shown, random), looked_at(shown, random)])
        with torch.autocast("cpu", torch.bfloat16):
            tokens = student(looks)
        loss, found = pair_loss(*tokens.float().chunk(2))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP_STEPS)
        optimizer.step()
        student.follow(step)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", found=f"{found.item():.2f}")
        if (step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == steps:
            save(out, begun, step + 1, student, optimizer)
    save_encoder(student.average, out)
    quality = measure(student.average, dataset)
    write_atomically(out / "quality.json", (json.dumps(quality, indent=1) + "\n").encode())
    print("\n".join(f"{name}: {value}" for name, value in quality.items()))


class Student(nn.Module):
    """The encoder, the moving average of its weights, and the head that is thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = CLIPVisionModel(
            CLIPVisionConfig(
                image_size=CROP_PX,
                patch_size=8,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=4,
                num_attention_heads=width // 32,
                projection_dim=width,
            )
        )
        # On a CPU in bfloat16 the plain products of 65 tokens are twice as fast as the fused kernel.
        self.encoder.set_attn_implementation("eager")
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, HEAD_WIDTH))

    def forward(self, crops: Crops) -> Float[Tensor, "n width"]:
        """RGB in 0..1 -> what is compared."""
        return self.head(self.encoder(normalised(crops)).pooler_output)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the average towards the weights; in the first steps by more, so that it forgets where they began."""
        decay = min(AVERAGE_DECAY, step / (step + 10))
        for average, now in zip(self.average.parameters(), self.encoder.parameters(), strict=True):
            average.lerp_(now, 1 - decay)


def normalised(crops: Crops) -> Crops:
    """RGB in 0..1 -> CLIP's zero mean and unit deviation."""
    return (crops - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def read_squares(dataset: Path, split: str) -> tuple[Squares, list[str]]:
    """All references of a split, stretched to squares as the trainer does it, and their labels.

    Raises:
        InputError: no dataset, or no such split.
    """
    reader = ShardReader(dataset, split)
    squares, labels = [], []
    for place, _, label in tqdm(reader.labels(), f"references of {split}", mininterval=10):
        reference = reader.read_for_training(place, lambda key, count: 0).reference
        squares.append(resize(reference, STORED_PX, STORED_PX))
        labels.append(label)
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous(), labels


def chosen(count: int, settings: Settings, step: int) -> Int[Tensor, " batch"]:
    """The references of a step: each comes once an epoch, in an order of that epoch; the rest of an epoch is left out."""
    batch = min(settings.batch, count)
    epoch, place = divmod(step, count // batch)
    order = generator(settings.seed, "encoder epoch", epoch).permutation(count)
    return torch.from_numpy(order[place * batch : (place + 1) * batch])


def looked_at(squares: Squares, random: np.random.Generator) -> Crops:
    """One random look at each reference, RGB in 0..1: a window on it, in another light and colour, perhaps less sharp."""
    windows = torch.from_numpy(np.stack([random_window(random) for _ in squares]))
    grid = F.affine_grid(windows, [len(squares), 3, CROP_PX, CROP_PX], align_corners=False)
    crops = F.grid_sample(squares.float() / 255, grid, padding_mode="reflection", align_corners=False)
    soft = F.interpolate(F.avg_pool2d(crops, 2), crops.shape[-2:], mode="bilinear", align_corners=False)
    blur = torch.from_numpy(random.uniform(-2, 1, (len(squares), 1, 1, 1))).float().clamp(0, 1)
    return recoloured(crops + blur * (soft - crops), random)


def random_window(random: np.random.Generator) -> Float32[np.ndarray, "2 3"]:
    """An affine map from the crop's square [-1, 1]^2 to the reference's: 20 to 115 % of its area, turned by up to 15 degrees."""
    side = math.sqrt(random.uniform(0.2, 1.15)) * np.exp(np.array([1, -1]) * random.uniform(-0.2, 0.2))
    centre = random.uniform(-1, 1, 2) * np.abs(1 - side)
    angle = random.uniform(-0.26, 0.26) * (random.uniform() < 0.5)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = np.array([random.choice([-1, 1]), 1])
    return np.float32(np.concatenate([turn * (side * mirror), centre[:, None]], 1))


def recoloured(crops: Crops, random: np.random.Generator) -> Crops:
    """The crops with brightness, contrast and saturation changed by up to 40 % and hues by up to 20 degrees; a sixth is grey.

    Hues turn little: another colour is often another thing, and is to be painted.
    """
    count = len(crops)
    brightness, contrast, saturation = torch.from_numpy(random.uniform(0.6, 1.4, (3, count))).float()
    saturation = saturation * torch.from_numpy(random.uniform(size=count) > 1 / 6)
    hue = torch.from_numpy(random.uniform(-0.35, 0.35, count)).float()
    turn = torch.zeros(count, 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * hue.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -saturation * hue.sin(), saturation * hue.sin()
    colours = torch.linalg.inv(TO_YIQ) @ turn @ TO_YIQ
    crops = torch.einsum("nij,njhw->nihw", colours, crops)
    mean = crops.mean((1, 2, 3), keepdim=True)
    return (((crops - mean) * contrast[:, None, None, None] + mean) * brightness[:, None, None, None]).clamp(0, 1)


def save(out: Path, begun: dict[str, object], step: int, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Write what a training goes on from, whole or not at all; the moments are AdamW's two of each parameter."""
    out.mkdir(parents=True, exist_ok=True)
    moments = optimizer.state_dict()["state"]
    tensors = {f"model.{name}": value for name, value in student.state_dict().items()}
    tensors |= {f"moments.{number}.{name}": value for number, state in moments.items() for name, value in state.items()}
    with atomic_file(out / "training.safetensors") as path:
        save_file(tensors, path, metadata={"begun": json.dumps(begun), "step": str(step)})


def resume(out: Path, begun: dict[str, object], student: Student, optimizer: torch.optim.Optimizer) -> int:
    """Load what `save` wrote, if it is there, and return the steps done.

    Raises:
        InputError: it belongs to other settings or another dataset.
    """
    path = out / "training.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    before = json.loads(metadata["begun"])
    if differing := [f"{name} {before.get(name)}, now {value}" for name, value in begun.items() if before.get(name) != value]:
        raise InputError(f"{out}: holds a training with {', '.join(differing)}; give another --out, or remove the folder")
    tensors = load_file(path)
    student.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items() if name[:6] == "model."})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("moments."):
            _, number, moment = name.split(".")
            state.setdefault(int(number), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


@torch.no_grad()
def class_tokens(encoder: CLIPVisionModel, squares: Squares) -> Float[Tensor, "n width"]:
    """The class tokens of whole references, of length 1."""
    small = (F.interpolate(some / 255, (CROP_PX, CROP_PX), mode="bilinear", antialias=True) for some in squares.split(256))
    return F.normalize(torch.cat([encoder(normalised(some)).pooler_output for some in small]), dim=1)


def measure(encoder: CLIPVisionModel, dataset: Path) -> dict[str, float | int]:
    """How often the nearest train references have a held-out reference's class, and how often it is the commonest class.

    Empty where the dataset holds no validation split.
    """
    if VALIDATION_SPLIT not in read_dataset(dataset).splits:
        return {}
    known, known_labels = read_squares(dataset, TRAIN_SPLIT)
    asked, asked_labels = read_squares(dataset, VALIDATION_SPLIT)
    names = sorted({*known_labels, *asked_labels})
    known_codes, codes = (torch.tensor([names.index(one) for one in labels]) for labels in (known_labels, asked_labels))
    encoder.eval()
    similarity, nearest = (class_tokens(encoder, asked) @ class_tokens(encoder, known).T).topk(min(NEIGHBOURS, len(known)), dim=1)
    # A nearer neighbour has more of a say (Wu et al. 2018, with their temperature).
    votes = torch.zeros(len(asked), len(names)).scatter_add_(1, known_codes[nearest], (similarity / 0.07).exp())
    return {
        "held-out references": len(asked),
        "classes": len(names),
        "class by neighbours, %": round(100 * (votes.argmax(1) == codes).float().mean().item(), 1),
        "the commonest class always, %": round(100 * (codes == known_codes.mode().values).float().mean().item(), 1),
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="folder of a finished build")
    parser.add_argument("--out", type=Path, required=True, help="folder for the encoder; what is there is gone on with")
    parser.add_argument("--steps", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="references of a step (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of a token, a multiple of 32 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train_encoder(given.dataset, given.out, given.steps, Settings(given.batch, given.width, given.seed))


if __name__ == "__main__":
    run_program(main)
