"""A short set of the kills; the full one is `python -m tests.faults.kill_train`."""

from pathlib import Path

import pytest

from tests.faults.kill_train import problems_at_the_end, results, run


@pytest.mark.long
def test_a_training_that_is_killed_leaves_the_same_bytes(tmp_path: Path):
    report = run(kills=2, steps=12, seed=1, folder=tmp_path)
    assert not report.problems
    assert len(report.kills) == 2
    assert report.runs >= 1
    assert any(0 < kill.step < 12 for kill in report.kills), "one of them came in the middle"

    # The comparison sees a byte, a figure and a leftover.
    out, calm = tmp_path / "run-1", results(tmp_path / "calm", 12)
    assert set(calm) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "metrics"}
    model = out / "checkpoints" / "step-00000012" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    lines = (out / "metrics.jsonl").read_text().replace('"loss": 0.', '"loss": 1.').replace('"loss": 1.', '"loss": 2.')
    (out / "metrics.jsonl").write_text(lines)
    (out / "checkpoints" / ".step-00000013.partial").mkdir()
    wrong = [problem.partition(":")[0] for problem in problems_at_the_end(out, 12, calm)]
    assert [Path(path).name for path in wrong] == ["metrics", "model.safetensors", ".step-00000013.partial"]
