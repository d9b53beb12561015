"""The solution that schedulers are compared with, where it is known; the default is no further from it than 50 steps of PLMS."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from benchmarks.solvers import (
    CHOSEN,
    MODEL,
    PUBLISHED,
    TO_FIRST,
    TO_NONE,
    WAYS,
    Block,
    converge,
    fine_timesteps,
    make_blocks,
    paint,
    relative_error,
)
from pbe_train import PaintByExample
from pbe_train.config import TIMESTEPS
from pbe_train.model.sampling import GUIDANCE, STEPS
from tests.pbe_train.test_schedulers import DEVIATION, MEAN, SHARES, NormalPictures, first_noise

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize(("times", "order", "most"), [(fine_timesteps(), 2, 1e-3), (range(TIMESTEPS - 1, -1, -1), 1, 5e-3)])
def test_the_solution_is_the_one_that_is_known_for_normal_pictures(times, order, most):
    """Normal numbers stay normal on their way: as many deviations from the mean at the end as at the beginning."""
    run = SimpleNamespace(model=NormalPictures(), settings=SimpleNamespace(prediction="epsilon"))
    block = Block(torch.zeros(1, 4, 16, 16), torch.ones(1, 1, 16, 16), torch.zeros(1, 1, 3), [0])
    first, last = SHARES[0], SHARES[-1]
    deviations = (first_noise() - last.sqrt() * MEAN) / (last * DEVIATION**2 + 1 - last).sqrt()
    right = first.sqrt() * MEAN + (first * DEVIATION**2 + 1 - first).sqrt() * deviations
    found = converge(run, block, 1.0, times, order)
    assert relative_error(found[TO_FIRST], right).item() < most
    assert 0 < relative_error(found[TO_NONE], right).item() < 0.02


def test_the_grid_has_each_timestep_once_and_most_where_the_noise_is_small():
    times = fine_timesteps()
    assert (times[0], times[-1]) == (TIMESTEPS - 1, 0)
    steps = [before - after for before, after in pairwise(times)]
    assert (max(steps), min(steps)) == (9, 1)
    assert steps[:50] == [9] * 50
    assert sum(time < 100 for time in times) > 20


def test_the_default_is_no_further_from_the_solution_than_50_steps_of_plms():
    """At the published guidance, which asks for more steps than a small one: 10 fail here."""
    run = PaintByExample.from_pretrained(MODEL, device="cpu").run
    (block,) = make_blocks(run, 2)
    right = converge(run, block, GUIDANCE, fine_timesteps())
    off = {}
    for name, passes in ((CHOSEN, STEPS), (PUBLISHED, 51)):
        made, took = paint(run, block, GUIDANCE, WAYS[name], passes)
        assert took == passes
        off[name] = relative_error(made, right[WAYS[name].end]).mean().item()
    assert off[CHOSEN] <= off[PUBLISHED]
