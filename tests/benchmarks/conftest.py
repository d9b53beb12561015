"""Benchmarks put things in the place of a VAE, in their own process; here other tests share it."""

import pytest

import pipelines.dataset.pack


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipelines.dataset.pack, "load_encoder", pipelines.dataset.pack.load_encoder)
