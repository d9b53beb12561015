"""The viewer's pictures that PyTorch makes, in a process of its own, which is started for the first of them.

    reference ──augmentation──▶ what the encoder would see       latent ──VAE──▶ picture

The server itself loads no PyTorch: it stays small, and outlives a VAE that is too large for the machine.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float16, UInt8

from pbe_core.errors import InputError
from pbe_core.recorded_vae import decode_means, load_recorded_vae
from schemas.dataset import DatasetInfo

if TYPE_CHECKING:
    from pbe_core.autoencoder import Autoencoder

REFERENCE_SIZE = 224
"""Side of CLIP's square, px."""
Result = TypeVar("Result")


class Draw(NamedTuple):
    """What decides one draw of the augmentation in a training."""

    preset: Literal["paper", "strong", "none"]
    geometry: Literal["squash", "pad"]
    seed: int
    step: int
    slot: int


class TorchProcess:
    """One process that calls functions of this module, one at a time."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function returns there, or raises.

        Raises:
            InputError: the process ended, for want of memory it seems; the next call starts another one.
        """
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_set_up)
            pool = self._pool
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            with self._lock:
                if self._pool is pool:
                    self._pool = None
            raise InputError("the process that loads PyTorch has ended; has this machine enough memory for the VAE?") from None

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._pool:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None


def augment(
    reference: UInt8[np.ndarray, "height width 3"], outline: Bool[np.ndarray, "height width"] | None, draw: Draw
) -> UInt8[np.ndarray, "size size 3"]:
    """What the encoder would see of a reference in this slot of this step, as `TrainingDataset` makes it."""
    from pbe_train.data.references import Augmentation, prepare_reference

    names = (draw.seed, "train", draw.step, draw.slot, "augmentation")
    return prepare_reference(Augmentation(preset=draw.preset), draw.geometry, reference, outline, REFERENCE_SIZE, *names)


def decode(
    info: DatasetInfo, source: str | None, latents: Float16[np.ndarray, "pictures stored height width"]
) -> UInt8[np.ndarray, "view_height view_width 3"]:
    """What the VAE of a dataset makes of the first of some latents.

    Args:
        info: of the dataset.
        source: as in `load_recorded_vae`, whose errors it raises.
        latents: as they are stored.
    """
    return decode_means(_vae(info.model_dump_json(), source), latents[:1])[0]


@lru_cache(maxsize=1)
def _vae(info: str, source: str | None) -> "Autoencoder":
    return load_recorded_vae(DatasetInfo.model_validate_json(info), source)


def _set_up() -> None:
    import signal

    threading.Thread(target=_end_with_server, daemon=True).start()

    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # A terminal's Ctrl-C is for the server, which then ends this process.
    cv2.setNumThreads(1)


def _end_with_server() -> None:
    """Whatever the server dies of: nobody else ends this process, which holds a VAE, and maybe a GPU."""
    server = multiprocessing.parent_process()
    assert server
    server.join()
    os._exit(0)
