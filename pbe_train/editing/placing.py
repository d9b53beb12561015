"""Where a loaded model computes and in which precision: for GPUs that are fast, and for those that are small."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from pbe_core.errors import InputError
from pbe_train.model.pipeline import Run

Precision = Literal["fp32", "bf16", "fp16"]
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(device: torch.device | str | None) -> torch.device:
    """A device that is there; by default the first GPU, else the CPU.

    Raises:
        InputError: this machine, or this PyTorch, has no such device.
    """
    try:
        there = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=there)
    except (RuntimeError, AssertionError, TypeError) as error:
        cause = str(error).partition("\n")[0]
        raise InputError(f"device {device}: not to be had here ({cause}); give cpu, cuda or cuda:1, or leave it out") from None
    return there


def place(run: Run, device: torch.device, precision: Precision, offload: bool) -> Run:
    """The same run, its networks' weights in this precision and on this device; with `offload`, one at a time.

    The networks are changed in place: they are too large for a second copy. What is to be smaller on the device is made so before
    it gets there.
    """
    for network in (run.model, run.vae):
        network.to(_TYPES[precision])
        if not offload:
            network.to(device)
    if not offload:
        return run
    OneAtATime(device, [[run.model.conditioner], [run.model.unet], *_halves(run.vae)])
    return replace(run, offloaded_from=device)


class OneAtATime:
    """Keeps networks in the CPU's memory, and on the device only the one that was called last.

    Args:
        device: where they compute.
        groups: networks that work together.
    """

    def __init__(self, device: torch.device, groups: list[list[nn.Module]]) -> None:
        self.device = device
        self.there: list[nn.Module] = []
        for group in groups:
            for network in group:
                network.to("cpu")
                network.register_forward_pre_hook(self._bring(group))

    def _bring(self, group: list[nn.Module]) -> Any:
        def bring(*_: Any) -> None:
            if self.there is group:
                return
            for network in self.there:
                network.to("cpu")
            for network in group:
                network.to(self.device)
            self.there = group

        return bring


def _halves(vae: Any) -> list[list[nn.Module]]:
    """What a VAE's `encode` and `decode` call; neither calls the VAE itself."""
    encoding, decoding = [vae.encoder, vae.quant_conv], [vae.post_quant_conv, vae.decoder]
    return [[part for part in half if part is not None] for half in (encoding, decoding)]
