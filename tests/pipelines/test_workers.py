import pyarrow as pa
import pytest
import ray

from pbe_core.errors import InputError
from pipelines.config import RaySettings
from pipelines.dataset.pack import PackingActor, pack_on_ray, share_out
from pipelines.dataset.plan_shards import writing_plan
from schemas.tables import PLAN
from tests.conftest import settings_of


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


def test_an_actor_that_cannot_start_fails_its_shards_and_ends(photos, tmp_path):
    """A VAE that this node lacks: every shard is named once with the cause, and nothing waits for ever."""
    settings = settings_of(photos, tmp_path / "out", "--latents.vae", str(tmp_path / "nowhere"), "--ray.actors", "1")
    try:
        outcomes = list(pack_on_ray(settings, "x", [0, 1, 2]))
    finally:
        ray.shutdown()
    assert [group for group, _ in outcomes] == [0, 1, 2]
    assert all("nowhere" in error for _, error in outcomes)


def test_what_a_person_can_mend_is_told_in_one_line(photos, tmp_path):
    """A photo store without tables: a traceback would bury it."""
    settings = settings_of(photos, tmp_path / "out", "--source.photos", str(tmp_path / "store"))
    for folder in (settings.out, settings.source.photos):
        folder.mkdir()
    (settings.source.photos / "store.json").write_text("{}")
    row = {field.name: "" if pa.types.is_string(field.type) else None if field.nullable else 0 for field in PLAN}
    words = {field.name: "train" for field in PLAN if pa.types.is_dictionary(field.type)}
    plan = pa.Table.from_pylist([{**row, **words, "shard": "train-000000", "photo_id": "p"}], PLAN)
    with writing_plan(settings.out / "plan.parquet") as add:
        add(plan)
    said = PackingActor(settings, "x", "cpu").work(0)
    assert said.startswith(f"{settings.source.photos}: this photo store has no tables")
    assert "\n" not in said
