"""Benchmarks put things in the place of a VAE and set threads, in their own process; here other tests share it."""

from collections.abc import Iterator

import pytest
import torch

import pipelines.dataset.pack


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(pipelines.dataset.pack, "load_encoder", pipelines.dataset.pack.load_encoder)
    yield
    torch.set_num_threads(threads)
