"""What takes long with much data is done while a thread draws how far it is, also where nothing is counted."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipelines.dataset import verify, write_plan
from tests.conftest import settings_of


def watched(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> dict[str, bool]:
    """Functions of a module -> whether a thread showed progress whenever they were called."""
    shown: dict[str, bool] = {}

    def watch(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            shown[name] = shown.get(name, True) and any(thread.name == "progress" for thread in threading.enumerate())
            return call(*arguments, **named)

        return called

    for name in names:
        monkeypatch.setattr(module, name, watch(name, getattr(module, name)))
    return shown


def test_a_plan_is_at_work_while_it_reads_annotations_and_hashes_tables(photos: Path, tmp_path: Path, monkeypatch):
    names = "open_source", "hash_inputs", "_hashes", "write_plan"
    shown = watched(monkeypatch, write_plan, *names)
    for _ in range(2):  # The second one finds the tables of the first.
        write_plan.select_and_plan(settings_of(photos, tmp_path / "out"))
    assert shown == dict.fromkeys(names, True)


def test_verify_is_at_work_from_the_plan_to_the_last_table(dataset: Path, monkeypatch):
    names = "_check_plan", "_read_records", "_check_shard"
    shown = watched(monkeypatch, verify, *names)
    assert not verify.verify_dataset(dataset).findings
    assert shown == dict.fromkeys(names, True)
