"""What a training will cost, before it starts: `python -m pbe_train.cost [--tiers] --config FILE [--key value ...]`.

    settings ──▶ sizes of the networks ──▶ parameters, GFLOP a sample, memory by batch ──datasheets──▶ hours by GPU

Reads no weights and nothing from the network: sizes come from local config files, or are built in for Stable Diffusion v1-4 and
CLIP ViT-L/14. The side of a view is that of the dataset, or what the config's `build:` section asks for.

With `--tiers` it prints one table: the memory of each preset for a small GPU, `configs/finetune_*.yaml`, under the keys given.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe_core.settings import find_config, help_first, load_settings, preset, read_section
from pbe_train.config import Precision, TrainSettings

if __name__ == "__main__":  # PyTorch and its libraries take seconds to load: not for --help.
    help_first(TrainSettings, "train", __doc__, preset("tiny"))

import torch
from rich.console import Console, Group
from rich.table import Table

from pbe_core.errors import InputError, run_program
from pbe_core.words import number_of
from pbe_train.checkpoints.networks import unloaded_model
from pbe_train.training.flops import (
    GPUS,
    Gpu,
    StepFlops,
    arithmetic_of,
    encode_flops,
    latent_cells,
    step_flops,
)
from pbe_train.training.memory import TrainingMemory, training_memory

BATCHES = (1, 2, 4, 8, 16, 32, 64)
# Gigabytes of the GPUs that there are presets for.
TIERS = (24, 16, 12, 8)
# The view's default side in a build.
VIEW = 512
# 36.3 samples/s of 2,391 GFLOP, the best published training rate of Stable Diffusion's U-Net at 512 px on an A100.
ASSUMED_UTILISATION = 0.28


@dataclass(frozen=True)
class Cost:
    """What a run costs."""

    view: int
    """Side of a view in px."""
    parameters: dict[str, int]
    """By part of the model: `U-Net`, `conditioner`, `encoder`."""
    trained: int
    without_effect: int
    """Saved, but not trained: queries, keys and norms of the attention to the one token."""
    frozen: int
    """Of the encoder; beside a LoRA, of all else, too."""
    flops: StepFlops
    encode: float
    """FLOPs of encoding one view; not a part of a step, since latents are made before."""
    memory: dict[int, TrainingMemory]
    """By batch of a rank."""
    samples: int
    """Of the whole run."""

    def hours(self, gpu: Gpu, precision: Precision) -> float:
        """Hours of one GPU of this kind for the whole run, at the assumed utilisation."""
        rate = ASSUMED_UTILISATION * gpu.teraflops[arithmetic_of(gpu, precision)] * 1e12 / self.flops.total
        return self.samples / rate / 3600


def estimate_cost(settings: TrainSettings, view: int, bf16: bool) -> Cost:
    """Count all of it, on shapes alone. Raises InputError: a network whose sizes are not known."""
    cells = latent_cells(settings.model, view)
    with torch.device("meta"):
        model = unloaded_model(settings.model, settings.lora)
    encoder, unet, whole = (
        sum(parameter.numel() for parameter in part.parameters()) for part in (model.conditioner.model, model.unet, model)
    )
    kept, trained = (sum(parameter.numel() for parameter in part.values()) for part in (model.kept(), model.trained()))
    return Cost(
        view=view,
        parameters={"U-Net": unet, "conditioner": whole - unet - encoder, "vision encoder": encoder},
        trained=trained,
        without_effect=kept - trained,
        frozen=whole - trained if settings.lora else encoder,
        flops=step_flops(settings.model, cells, settings.lora),
        encode=encode_flops(settings.model.vae, view),
        memory=training_memory(settings, cells, sorted({*BATCHES, own_batch(settings)}), bf16=bf16),
        samples=settings.steps * settings.global_batch,
    )


def own_batch(settings: TrainSettings) -> int:
    """Samples that one rank alone computes at once under these settings."""
    return max(1, settings.global_batch // settings.accumulation)


def show_tiers(arguments: Sequence[str]) -> Table:
    """What the presets for small GPUs take, each with these options over it. Raises as `estimate_cost`, and for bad options."""
    note = (
        "Counted, not measured. A preset leaves a tenth of its card free, for CUDA and workspaces of kernels. While a checkpoint "
        "is written, the CPU's memory has it as well. All parts of a preset's memory: --config finetune_8gb."
    )
    columns = ("preset", "weights trained", "batch", "GPU peak", "CPU", "checkpoint")
    table = _table("Fine-tuning on small GPUs, memory in GiB", *columns, caption=note)
    for gigabytes in TIERS:
        path = preset(f"finetune_{gigabytes}gb")
        settings = load_settings(TrainSettings, "train", ["--config", str(path), *arguments])
        view, _ = view_size(settings.dataset, path)
        batch, bf16 = own_batch(settings), settings.precision != "fp32"
        memory = training_memory(settings, latent_cells(settings.model, view), [batch], bf16=bf16)[batch]
        sizes = [_gib(size) for size in (memory.device, memory.host, memory.checkpoint)]
        table.add_row(path.stem, f"{memory.trained / 1e6:,.1f} M", str(batch), *sizes)
    return table


def view_size(dataset: Path, config: Path | None) -> tuple[int, str]:
    """Side of a view in px, and where that is from: the dataset if it is there, else the config. Raises as `configured_view`."""
    path = dataset / "dataset.json"
    if path.is_file():
        try:
            return int(json.loads(path.read_bytes())["view_size"]), str(path)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: damaged, it has no view_size; build the dataset again") from None
    return configured_view(config)


def configured_view(config: Path | None) -> tuple[int, str]:
    """Side of a view in px that a config's build asks for, the default without one, and where that is from.

    Raises:
        InputError: it is not a number of px.
    """
    if config is None:
        return VIEW, "the default"
    views: Any = read_section(config, "build").get("views")
    size = views.get("size", VIEW) if isinstance(views, dict) else VIEW
    if not isinstance(size, int) or size < 1:
        raise InputError(f"{config}: build.views.size is {size!r}; give a number of px")
    return size, f"build.views.size of {config}"


def show(cost: Cost, settings: TrainSettings, bf16: bool) -> Group:
    """The tables to print."""
    parts = {
        **cost.parameters,
        "trained": cost.trained,
        "without effect on one token, kept as they are": cost.without_effect,
        "frozen (all but the LoRA)" if settings.lora else "frozen (vision encoder)": cost.frozen,
    }
    parameters = _table("Parameters", "part", "million")
    for number, (part, count) in enumerate(parts.items()):
        parameters.add_row(part, f"{count / 1e6:,.1f}", end_section=number == len(cost.parameters) - 1)
    return Group(parameters, _arithmetic(cost, settings), _memory(cost, settings, bf16), _hours(cost, settings))


def _table(title: str, *columns: str, caption: str = "") -> Table:
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.4g}" if flops < 1e12 else f"{flops / 1e9:,.0f}"


def _arithmetic(cost: Cost, settings: TrainSettings) -> Table:
    flops, total, encoding = cost.flops, cost.flops.total, 2 * cost.encode
    way = "on" if settings.model.one_token_shortcut and settings.model.tokens == "class" else "off"
    note = (
        f"Counted. Latents are made before: encoding view and masked view in each step would be {_giga(encoding)} GFLOP more, "
        f"{encoding / (encoding + total):.0%} of such a step."
    )
    title = f"Arithmetic per sample at {cost.view} px (one-token shortcut {way})"
    table = _table(title, "part", "GFLOP", "share", caption=note)
    parts = {
        "U-Net, forward": flops.unet_forward,
        "U-Net, backward": flops.unet_backward,
        "conditioner, forward and backward": flops.conditioner,
        "vision encoder, forward": flops.encoder,
        "training step": total,
    }
    for part, count in parts.items():
        table.add_row(part, _giga(count), f"{count / total:.1%}")
    return table


# Which part of TrainingMemory a column shows, and its heading.
MEMORY = {
    "weights": "weights",
    "moments": "moments",
    "average": "average",
    "working": "passes",
    "step": "step",
    "device": "GPU",
    "host": "CPU",
}


def _memory(cost: Cost, settings: TrainSettings, bf16: bool) -> Table:
    note = (
        "Counted, not measured: a step on tensors that know their sizes alone. Weights, moments and average are those on the "
        "GPU; passes: activations and gradients of forward and backward pass; step: what the optimizer takes; GPU: the peak. "
        "CUDA and workspaces of kernels come on top, count on a tenth more; on the CPU, a checkpoint's copy of what it saves."
    )
    title = f"Memory of one rank in GiB ({'bf16 autocast' if bf16 else 'fp32'})"
    table = _table(title, "batch per rank", *MEMORY.values(), caption=note)
    for batch, memory in cost.memory.items():
        table.add_row(str(batch), *(_gib(_shown(memory, part)) for part in MEMORY))
    return table


def _shown(memory: TrainingMemory, part: str) -> int:
    elsewhere = (part == "moments" and memory.optimizer_on_cpu) or (part == "average" and memory.average_on_cpu)
    return 0 if elsewhere else int(getattr(memory, part))


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3g}" if size < 2**30 else f"{size / 2**30:,.1f}"


def _hours(cost: Cost, settings: TrainSettings) -> Table:
    note = (
        f"Estimated: an MFU of {ASSUMED_UTILISATION:.0%} is assumed of every GPU, that of the best published rate of this U-Net "
        "on an A100; right to a factor of two perhaps. `python -m benchmarks.train_step` measures yours. Largest batch: a power "
        f"of two per rank, global_batch and {BATCHES[-1]} at most, that leaves a tenth of the memory free."
    )
    title = f"{number_of(cost.samples, 'sample')} ({number_of(settings.steps, 'step')} of {settings.global_batch})"
    columns = ("GPU", "arithmetic", "peak TFLOP/s", "samples/s", "GPU hours", "largest batch")
    table = _table(title, *columns, caption=note)
    for gpu in sorted(GPUS, key=lambda gpu: cost.hours(gpu, settings.precision)):
        arithmetic, hours = arithmetic_of(gpu, settings.precision), cost.hours(gpu, settings.precision)
        batches = [batch for batch in BATCHES if batch <= settings.global_batch]
        fitting = [batch for batch in batches if cost.memory[batch].device < 0.9 * gpu.memory_gb * 1e9]
        table.add_row(
            gpu.known_as,
            arithmetic,
            f"{gpu.teraflops[arithmetic]:.4g}",
            f"{cost.samples / hours / 3600:,.3g}",
            f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}",
            str(fitting[-1]) if fitting else "none",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the settings, count, print."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    if "--tiers" in arguments:
        console.print(show_tiers([argument for argument in arguments if argument != "--tiers"]))
        return
    settings = load_settings(TrainSettings, "train", arguments, preset("tiny"))
    view, origin = view_size(settings.dataset, find_config(arguments, preset("tiny"))[0])
    # `auto` is bf16 or, which takes as much memory, fp16 on a GPU.
    bf16 = settings.precision != "fp32"
    cost = estimate_cost(settings, view, bf16)
    console.print(f"views of {view} px ({origin}), latents of {latent_cells(settings.model, view)} cells a side", soft_wrap=True)
    console.print(show(cost, settings, bf16))


if __name__ == "__main__":
    run_program(main)
