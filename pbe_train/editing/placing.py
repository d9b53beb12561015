"""Where a model computes, and in what: its device, the precision and layout of its weights, one network at a time on small GPUs.

device ──▶ precision, layout ──▶ the same run, its networks changed in place
"""

import os
import shutil
import sys
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from pbe_core.errors import InputError
from pbe_core.machine import give_memory_back
from pbe_train.editing.prepacked import can_prepack, prepack
from pbe_train.editing.speed import TYPES, Precision, Way, fastest_way, is_small
from pbe_train.model.pipeline import Run


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


def choose_way(
    run: Run,
    device: torch.device,
    precision: Precision | Literal["auto"],
    channels_last: bool | None,
    prepacked: bool | None,
    compile: bool,
) -> tuple[Way, str | None]:
    """The precision and layout to compute in, and a line about it where it was not asked for.

    Raises:
        InputError: weights are to be packed, and cannot be.
    """
    if precision == "auto":
        way, note = fastest_way(run.model.unet, device, run.identity.view_size // run.vae.sizes.downsampling, compile)
    else:
        halved = precision != "fp32" and not is_small(run.model.unet)
        way, note = Way(precision, halved, halved and can_prepack(device, TYPES[precision])), None
    if compile or channels_last is False:  # What is packed is made for channels-last.
        way = way._replace(prepacked=False)
    if channels_last is not None:
        way = way._replace(channels_last=channels_last)
    if prepacked is not None:
        way = way._replace(prepacked=prepacked)
    if prepacked and (compile or not can_prepack(device, TYPES[way.precision])):
        lacking = f"for {way.precision} it takes an x86 CPU that oneDNN has kernels for, which {device} is not"
        cause = "torch.compile packs them itself" if compile else lacking
        raise InputError(f"prepacked: weights cannot be packed here ({cause}); leave it out, or give false")
    return way, note


def check_compiler(offload: bool) -> None:
    """Refuse to compile where it cannot be done.

    Raises:
        InputError: there is no C++ compiler, or the networks are to move.
    """
    if offload:
        raise InputError("compile: compiled passes cannot move to a GPU and back; leave out compile, or offload")
    # The one that PyTorch calls, whatever others are there; what CXX says is one word to it.
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if not shutil.which(name):
        raise InputError(
            f"compile: torch.compile needs a C++ compiler, and {name} is not to be found; install one (such as Debian's package "
            "g++), name it in CXX, or leave out compile"
        )


def place(run: Run, device: torch.device, way: Way, offload: bool) -> Run:
    """The same run, its networks' weights in this precision and layout and on this device; with `offload`, one at a time.

    The networks are changed in place: they are too large for a second copy. What is to be smaller on the device is made so before
    it gets there.
    """
    for network in (run.model, run.vae):
        network.to(TYPES[way.precision])
        if not offload:
            network.to(device)
    if way.channels_last:
        run.model.unet.to(memory_format=torch.channels_last)
        run.vae.to(memory_format=torch.channels_last)
    if device.type == "cpu" and not is_small(run.model.unet):
        run.vae.network.decoder.register_forward_pre_hook(lambda *_: give_memory_back())
    if way.prepacked:
        prepack(run.model.unet)
    if not offload:
        return run
    OneAtATime(device, [[run.model.conditioner], [run.model.unet], *run.vae.halves()])
    return replace(run, offloaded_from=device)


class OneAtATime:
    """Keeps networks in the CPU's memory, and on the device only the one that was called last.

    Args:
        device: where they compute.
        groups: networks that work together; some may be None.
    """

    def __init__(self, device: torch.device, groups: list[list[nn.Module | None]]) -> None:
        self.device = device
        self.there: list[nn.Module] = []
        for group in ([network for network in each if network is not None] for each in groups):
            for network in group:
                network.to("cpu")
                # Its parts, too, down to the smallest: the passes of an edit go through the U-Net's one by one.
                for part in network.modules():
                    part.register_forward_pre_hook(lambda *_, group=group: self._bring(group))

    def _bring(self, group: list[nn.Module]) -> None:
        if self.there is not group:
            for network in self.there:
                network.to("cpu")
            for network in group:
                network.to(self.device)
            self.there = group
