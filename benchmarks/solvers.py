"""How near few steps come to the converged picture: every scheduler that fits, at equal numbers of passes of the U-Net.

    python -m benchmarks.solvers --work FOLDER [--edits 200] [--sweep 20] [--results FILE]

The tiny world's finished model paints held-out edits from the same noise by each scheduler. Compared with the converged solution
of the same differential equation, from the last timestep of the training to its first one, is what comes out: latents, and the
pictures that they are decoded to.

    start: noise ──converge, fp64 schedule──▶ solution ──────────────┐
       └───────── a scheduler, so many passes ──▶ latents ──error──▶ RMS beside the latents' own RMS, and in levels of 255

A pass is one prediction, under the reference and under the null vector: under guidance the U-Net computes twice for it. Where a
scheduler ends, its options say: with the noise of the first timestep still in (DDIM, PNDM as published), or at none. Each is
compared with the solution that ends at the same place, as the difference of both is 1.5 % and no solver's fault.

All ways are asked for the first edits, `--sweep` of them; what the default is chosen by (`DECISIVE`) for all. What is measured
lies in the folder, so that a run that was ended goes on.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import describe_machine, describe_versions, today
from pbe_core.errors import run_program
from pbe_core.progress import Progress
from pbe_core.randomness import name_hash
from pbe_train import PaintByExample
from pbe_train.config import TIMESTEPS
from pbe_train.data.latents import to_mask_channel, to_tensor
from pbe_train.model.diffusion import paint_latents
from pbe_train.model.guided import Guided
from pbe_train.model.pipeline import Run
from pbe_train.model.sampling import GUIDANCE, PUBLISHED_SCHEDULER, SCHEDULER, STEPS
from tiny_world.make_questions import questions

MODEL = "tiny_world/weights/model"
SCALES = (2.0, GUIDANCE)
"""Of guidance: the tiny world's own, and the published one."""
BLOCK = 10
"""Edits that are painted at once."""
CHECKED = 4
"""Edits by which the solution itself is checked, through every timestep."""
TO_FIRST, TO_NONE = "first timestep", "no noise"
"""How much noise is left at a scheduler's end."""


@dataclass(frozen=True)
class Way:
    """A scheduler with its options, where it ends, and for how many passes it is asked."""

    scheduler: str
    end: str = TO_NONE
    passes: Sequence[int] = (10, 15, 20)
    steps: Callable[[int], int] = int
    """How many steps take so many passes."""


def _two_a_step(passes: int) -> int:
    """The last step of Heun and KDPM2 takes one."""
    return (passes + 1) // 2


def _one_more(passes: int) -> int:
    """PLMS goes through its second timestep twice."""
    return passes - 1


PUBLISHED, BEFORE, CHOSEN = "PLMS, published", "DDIM", "UniPC, Karras"
_DPM, _SINGLE, _UNIPC, _DEIS, _KARRAS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "use_karras_sigmas=True",
)
WAYS = {
    CHOSEN: Way(SCHEDULER, passes=(8, 9, 10, 11, 12, 13, 14, 15, 20, 30)),
    PUBLISHED: Way(PUBLISHED_SCHEDULER, TO_FIRST, (10, 15, 20, 30, 51), _one_more),
    BEFORE: Way("DDIMScheduler", TO_FIRST, (10, 15, 20, 30, 50)),
    "PLMS": Way("PNDMScheduler", TO_FIRST, steps=_one_more),
    "Euler": Way("EulerDiscreteScheduler"),
    "Euler, Karras": Way(f"EulerDiscreteScheduler({_KARRAS})"),
    "Heun": Way("HeunDiscreteScheduler", steps=_two_a_step),
    "Heun, Karras": Way(f"HeunDiscreteScheduler({_KARRAS})", steps=_two_a_step),
    "KDPM2, Karras": Way(f"KDPM2DiscreteScheduler({_KARRAS})", steps=_two_a_step),
    "LMS, Karras": Way(f"LMSDiscreteScheduler({_KARRAS})"),
    "DPM-Solver, Karras": Way(f'{_DPM}(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", {_KARRAS})', TO_FIRST),
    "DPM-Solver++ 2M": Way(_DPM),
    "DPM-Solver++ 2M, to the first timestep": Way(f'{_DPM}(final_sigmas_type="sigma_min")', TO_FIRST),
    "DPM-Solver++ 2M, Karras": Way(f"{_DPM}({_KARRAS})", passes=(8, 10, 12, 15, 20)),
    "DPM-Solver++ 2M, lambdas": Way(f"{_DPM}(use_lu_lambdas=True)"),
    "DPM-Solver++ 2M, beta": Way(f"{_DPM}(use_beta_sigmas=True)"),
    "DPM-Solver++ 3M, Karras": Way(f"{_DPM}(solver_order=3, {_KARRAS})"),
    "DPM-Solver++ 2S, Karras": Way(f"{_SINGLE}({_KARRAS})"),
    "DPM-Solver++ 3S, Karras": Way(f"{_SINGLE}(solver_order=3, {_KARRAS})"),
    "UniPC": Way(_UNIPC),
    "UniPC 3, Karras": Way(f"{_UNIPC}(solver_order=3, {_KARRAS})"),
    "UniPC, exponential": Way(f"{_UNIPC}(use_exponential_sigmas=True)"),
    "UniPC, to the first timestep, Karras": Way(f'{_UNIPC}(final_sigmas_type="sigma_min", {_KARRAS})', TO_FIRST),
    "DEIS, Karras": Way(f"{_DEIS}({_KARRAS})"),
    "DEIS 3, Karras": Way(f"{_DEIS}(solver_order=3, {_KARRAS})"),
}
# Numbers of steps among which the default is the least that will do.
DECISIVE = (*((CHOSEN, passes) for passes in range(10, STEPS + 1)), (PUBLISHED, 51), (BEFORE, 50))


@dataclass(frozen=True)
class Block:
    """Edits that are painted together, as the model sees them."""

    masked: Tensor
    mask_channel: Tensor
    condition: Tensor
    seeds: Sequence[int]


def make_blocks(run: Run, edits: int) -> Iterator[Block]:
    """Held-out edits of the tiny world: views, each with mask and reference of an individual that no training has seen."""
    asked = iter(questions(edits, 0, "validation"))
    number = 0
    while some := list(islice(asked, BLOCK)):
        masks = np.stack([one.mask for one in some])
        pixels = to_tensor(np.stack([one.photo for one in some])).float() / 127.5 - 1
        pixels[torch.from_numpy(masks)[:, None].expand_as(pixels)] = 0
        masked = run.encode_pixels(pixels)
        channel = to_mask_channel(masks, (masked.shape[-2], masked.shape[-1]), run.settings.model.mask_to_latent)
        condition = run.condition([one.reference_picture for one in some])
        yield Block(masked, channel, condition, range(number, number + len(some)))
        number += len(some)


def fine_timesteps() -> list[int]:
    """Timesteps from the last one to 0 for the solution: every ninth, and where the noise is small far more.

    Those are the nearest to 60 noise levels of Karras et al., Elucidating the design space of diffusion-based generative models
    (2022), equation 5, rho = 7. They alone leave steps of 30 timesteps in the middle, where guidance 5 leads some edits astray.
    """
    points = 60
    ratios = schedule()[1] / schedule()[0]
    wanted = torch.linspace(float(ratios[-1]) ** (1 / 7), float(ratios[0]) ** (1 / 7), points, dtype=torch.float64) ** 7
    nearest = (ratios.log()[None] - wanted.log()[:, None]).abs().argmin(dim=1)
    return sorted({*range(TIMESTEPS - 1, -1, -9), *(time for time in nearest.tolist() if time < 100)}, reverse=True)


def schedule() -> tuple[Float64[Tensor, " timesteps"], Float64[Tensor, " timesteps"]]:
    """How much of the picture and of the noise is in the noisy latents of each timestep; squares add up to 1."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    shares = torch.cumprod(1 - betas, 0)
    return shares.sqrt(), (1 - shares).sqrt()


@torch.no_grad()
def converge(run: Run, block: Block, guidance: float, times: Sequence[int], order: int = 2) -> dict[str, Tensor]:
    """The solution of the probability flow: schedule and latents in fp64, the network in fp32.

    Order 1 is DDIM; order 2 is DPM-Solver++ (2M) of Lu et al. (2022), arXiv 2211.01095, algorithm 2.

    Args:
        run: the model.
        block: what is painted, from the same noise as `paint_latents` begins with.
        guidance: in every step.
        times: timesteps from 999 down to 0.
        order: 1 or 2.

    Returns:
        Scaled latents with the noise of timestep 0 in them, and those that the model then points to.
    """
    signal, noise = schedule()
    predict = Guided(run.model, block.masked, block.mask_channel, block.condition)
    generators = [torch.Generator().manual_seed(name_hash("paint", seed, bits=32)) for seed in block.seeds]
    latents = torch.stack([torch.randn(block.masked.shape[1:], generator=one) for one in generators]).double()

    def clean(at: int) -> Tensor:
        predicted = predict(latents.float(), torch.tensor(at), guidance).double()
        if run.settings.prediction == "epsilon":
            return (latents - noise[at] * predicted) / signal[at]
        return signal[at] * latents - noise[at] * predicted

    before: tuple[float, Tensor] | None = None
    for at, following in pairwise(times):
        found = towards = clean(at)
        length = float((signal[following] / noise[following]).log() - (signal[at] / noise[at]).log())
        if order == 2 and before:
            towards = found + (found - before[1]) * length / (2 * before[0])
        before = length, found
        latents = noise[following] / noise[at] * latents - signal[following] * np.expm1(-length) * towards
    return {TO_FIRST: latents, TO_NONE: clean(times[-1])}


def paint(run: Run, block: Block, guidance: float, way: Way, passes: int) -> tuple[Tensor, int]:
    """Latents as the library paints them, and how many passes that took."""
    took: list[int] = []
    latents = paint_latents(
        run.model,
        block.masked,
        block.mask_channel,
        block.condition,
        seeds=block.seeds,
        guidance=guidance,
        steps=way.steps(passes),
        scheduler=way.scheduler,
        prediction=run.settings.prediction,
        watch=lambda _, of, __: took.append(of),
    )
    return latents, len(took)


class Kept:
    """Results of tasks, each a file: what has been computed is not computed again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, task: object, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` makes of a task, or made of it before."""
        path = self.folder / f"{hashlib.sha256(repr(task).encode()).hexdigest()[:20]}.pt"
        if not path.exists():
            torch.save(make(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


class Measured:
    """One guidance: the blocks, their solutions, and what each way makes of them."""

    def __init__(self, run: Run, blocks: Sequence[Block], guidance: float, kept: Kept) -> None:
        self.run, self.blocks, self.guidance, self.kept = run, blocks, guidance, kept

    def solution(self, number: int) -> dict[str, Tensor]:
        """Of a block, converged."""
        task = ("solution", self.guidance, fine_timesteps(), number)
        return self.kept.get(task, lambda: converge(self.run, self.blocks[number], self.guidance, fine_timesteps()))

    def check(self) -> dict[str, float]:
        """Mean errors of the latents of the first few edits beside those of second order through every timestep."""
        first = self.blocks[0]
        few = Block(first.masked[:CHECKED], first.mask_channel[:CHECKED], first.condition[:CHECKED], first.seeds[:CHECKED])
        every = range(TIMESTEPS - 1, -1, -1)

        def solve(order: int) -> dict[str, Tensor]:
            return self.kept.get(("every", self.guidance, order), lambda: converge(self.run, few, self.guidance, every, order))

        second, ddim = solve(2), solve(1)
        taken = {end: made[:CHECKED] for end, made in self.solution(0).items()}
        return {
            "taken for converged": float(relative_error(taken[TO_NONE], second[TO_NONE]).mean()),
            "DDIM, a step for each timestep": float(relative_error(ddim[TO_NONE], second[TO_NONE]).mean()),
            "the noise of the first timestep": float(relative_error(second[TO_FIRST], second[TO_NONE]).mean()),
        }

    def errors(self, name: str, passes: int, number: int) -> dict[str, Tensor]:
        """Of a way's pictures of a block."""
        way = WAYS[name]

        def ask() -> dict[str, Tensor]:
            made, took = paint(self.run, self.blocks[number], self.guidance, way, passes)
            right = self.solution(number)[way.end]
            pictures = [self.run.decode(each.float()).astype(np.float64) for each in (made, right)]
            levels = torch.from_numpy(np.square(pictures[0] - pictures[1]).mean(axis=(1, 2, 3))).sqrt()
            return {"passes": torch.tensor(took), "latents": relative_error(made.double(), right), "levels": levels}

        return self.kept.get((way.scheduler, way.end, self.guidance, passes, number), ask)


def relative_error(made: Tensor, right: Tensor) -> Tensor:
    """RMS of each edit's error, over the RMS of the right latents."""
    return ((made - right).square().mean(dim=(1, 2, 3)) / right.square().mean(dim=(1, 2, 3))).sqrt()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows, and what the solution is worth that they are compared with."""
    run = PaintByExample.from_pretrained(MODEL, device="cpu").run
    # Half as fast again on a CPU; what comes out differs in the last bits.
    run.model.unet.to(memory_format=torch.channels_last)
    # Another number of edits is another choice among the kinds of object, from the first edit on.
    blocks, kept = list(make_blocks(run, options.edits)), Kept(options.work / f"{options.edits}-edits")
    sweep = max(1, options.sweep // BLOCK)
    asked = [
        (name, passes, number)
        for number in range(len(blocks))
        for name, way in WAYS.items()
        for passes in way.passes
        if number < sweep or (name, passes) in DECISIVE
    ]
    rows, checks = [], {}
    for guidance in options.guidance:
        measured = Measured(run, blocks, guidance, kept)
        found: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
        with Progress(f"guidance {guidance:g}", len(asked), "blocks") as progress:
            for name, passes, number in asked:
                found.setdefault((name, passes), []).append(measured.errors(name, passes, number))
                progress.update()
        rows += [make_row(name, guidance, parts) for (name, _), parts in found.items()]
        checks[f"guidance {guidance:g}"] = measured.check()
    return {"edits": options.edits, "solution": checks, "rows": rows}


def make_row(name: str, guidance: float, parts: Sequence[dict[str, Tensor]]) -> dict[str, object]:
    """Mean errors over edits, with 95 % intervals of the mean."""
    row: dict[str, object] = {"way": name, "scheduler": WAYS[name].scheduler, "guidance": guidance}
    row |= {"passes": int(parts[0]["passes"]), "edits": sum(len(part["latents"]) for part in parts)}
    for key in ("latents", "levels"):
        row[key] = interval(torch.cat([part[key] for part in parts]).double().numpy())
    return row


def interval(values: Float64[np.ndarray, " edits"]) -> dict[str, float]:
    """A mean, and its 95 % interval by the normal distribution."""
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {"mean": round(mean, 6), "low": round(mean - half, 6), "high": round(mean + half, 6)}


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people, the least error of each number of passes first."""
    table = Table(title="Error beside the converged solution", title_justify="left")
    for heading in ("guidance", "passes", "way", "edits", "latents, %", "95 %", "levels of 255"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in sorted(rows, key=lambda row: (row["guidance"], row["passes"], row["latents"]["mean"])):
        error, levels = ({name: 100 * value for name, value in row["latents"].items()}, row["levels"])
        span = f"{error['low']:.2f}-{error['high']:.2f}"
        shown = (f"{row['guidance']:g}", str(row["passes"]), row["way"], str(row["edits"]))
        table.add_row(*shown, f"{error['mean']:.2f}", span, f"{levels['mean']:.2f}")
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of what has been measured")
    parser.add_argument("--edits", type=int, default=200, help="for what the default is chosen by (default: 200)")
    parser.add_argument("--sweep", type=int, default=BLOCK, help=f"for all ways (default: {BLOCK})")
    parser.add_argument("--guidance", type=float, nargs="+", default=list(SCALES), help="default: 2 5")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--results", type=Path, help="JSON to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine, found = describe_machine(), measure(options)
    Console().print(found["solution"], make_table(found["rows"]))
    if options.results:
        content = {"date": today(), "machine": machine, "versions": describe_versions(["torch", "diffusers"]), **found}
        options.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
