import pytest

from pipelines.config import RaySettings
from pipelines.workers import share_out
from schemas.errors import InputError


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "expected"),
    [
        ({}, 2, 0, (2, 0.0)),
        ({}, 16, 4, (4, 1.0)),
        ({}, 2, 4, (2, 1.0)),
        ({"gpus_per_actor": 0.5}, 16, 4, (8, 0.5)),
        ({"gpus_per_actor": 0}, 16, 4, (16, 0)),
        ({"cpus_per_actor": 4}, 16, 0, (4, 0.0)),
        ({"actors": 3}, 16, 0, (3, 0.0)),
    ],
)
def test_actors_fill_the_cluster(settings, cpus, gpus, expected):
    assert share_out(RaySettings(**settings), {"CPU": cpus, "GPU": gpus}) == expected


@pytest.mark.parametrize(("settings", "cpus"), [({"gpus_per_actor": 1}, 8), ({"cpus_per_actor": 16}, 8), ({"actors": 9}, 8)])
def test_actors_that_would_wait_for_ever_are_refused(settings, cpus):
    """Ray itself would queue them without a word."""
    with pytest.raises(InputError, match="do not fit"):
        share_out(RaySettings(**settings), {"CPU": cpus})
