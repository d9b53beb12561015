"""Batches on the device before they are asked for."""

from collections.abc import Iterator

import torch

from pbe_train.data.items import Batch


class OnDevice(Iterator[Batch]):
    """The batches of an iterator, on the device; on a GPU the next one is copied on a stream of its own while a step computes."""

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: Batch | None = None

    def __next__(self) -> Batch:
        """The next batch."""
        if not self._stream:
            return Batch(*(tensor.to(self.device) for tensor in next(self.batches)))
        batch = self._next or self._copied()
        if batch is None:
            raise StopIteration
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        for tensor in batch:  # Its memory must not be given away while the step still reads it.
            tensor.record_stream(torch.cuda.current_stream(self.device))
        self._next = self._copied()
        return batch

    def _copied(self) -> Batch | None:
        host = next(self.batches, None)
        if host is None:
            return None
        with torch.cuda.stream(self._stream):
            return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in host))
