"""The processes that train together. Under torchrun there are several, started by it; otherwise there is one."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from pbe_core.errors import InputError
from pbe_core.progress import Progress
from pbe_core.words import number_of
from pbe_train.model.paint_model import PaintByExampleModel

# Pictures and checkpoints are made by rank 0 while the others wait: minutes at full size.
PATIENCE = timedelta(hours=1)
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def start(cls, threads: int | None, precision: str) -> "Ranks":
        """Join the others (NCCL on GPUs, gloo on CPUs), choose the device, share out the CPU threads.

        Raises:
            InputError: more processes on this machine than GPUs.
        """
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank, local_count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            gpus = torch.cuda.device_count()
            if local_rank >= gpus:
                raise InputError(
                    f"--nproc-per-node {local_count}: this machine shows {number_of(gpus, 'GPU')} and each process "
                    f"needs one; start {gpus}, "
                    "or hide them (CUDA_VISIBLE_DEVICES=) to train on the CPU"
                )
            torch.cuda.set_device(device)
            # What autocast leaves in fp32 may use TF32; who asks for fp32 gets it, also of convolutions.
            torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
            torch.backends.cudnn.allow_tf32 = precision != "fp32"
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_count))
        if count > 1:
            with Progress("waiting for the other processes") if rank == 0 else nullcontext():
                # torchrun's ranks of a second start would find the addresses of the first ones in the store that they share.
                store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
                store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
                backend = "nccl" if cuda else "gloo"
                dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
        return cls(rank, count, device)

    def stop(self) -> None:
        """Leave the others, after a run that went well; after a failure torchrun ends them."""
        if self.count > 1:
            dist.destroy_process_group()

    def wrap(self, model: PaintByExampleModel) -> DistributedDataParallel | PaintByExampleModel:
        """The model with its gradients averaged over the ranks."""
        if self.count == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def hold_gradients(self, model: DistributedDataParallel | PaintByExampleModel, hold: bool) -> AbstractContextManager[None]:
        """Keep gradients local inside the block where `hold`; for all micro-batches of a step but the last."""
        return model.no_sync() if hold and isinstance(model, DistributedDataParallel) else nullcontext()

    def lost_peer(self, error: RuntimeError) -> bool:
        """Whether an error says that another rank has left, which then has its own message."""
        lost = ("Connection closed by", "Connection reset by peer", "Broken pipe", "remote process exited", "was aborted")
        return self.count > 1 and any(word in str(error) for word in lost)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in its place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, on every rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """The arithmetic of forward and backward pass that `TrainSettings.precision` asks for."""
        chosen = self.choose_precision(precision)
        return torch.autocast(self.device.type, _HALVES[chosen]) if chosen in _HALVES else nullcontext()

    def choose_precision(self, precision: str) -> str:
        """What `auto` means here: bf16 on a GPU that has it, fp16 on another one, fp32 on the CPU."""
        if precision != "auto":
            return precision
        if self.device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
