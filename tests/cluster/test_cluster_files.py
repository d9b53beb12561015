"""The example cluster files and docs/clusters.md: Ray and AWS know every key, and all that they name is there."""

import copy
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import click
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from pbe_core.settings import REPOSITORY, field_names
from pipelines.config import BuildSettings

CLUSTERS = REPOSITORY / "clusters"
DOCS = REPOSITORY / "docs" / "clusters.md"
RAY_VERSION = re.search(r"^ray==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]
LAUNCHED = ("cloud", "own-machines")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())


def ray_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command of Ray's command line that these words name, and the rest of the words."""
    command: click.Command = scripts.cli
    while isinstance(command, click.Group):
        assert words[0] in command.commands, f"ray has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check_ray(words: list[str]) -> None:
    """Ray's command line knows each option before `--`."""
    command, rest = ray_command(words)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    own = rest[: rest.index("--")] if "--" in rest else rest
    for word in own:
        if word.startswith("-"):
            assert word.partition("=")[0] in known, f"ray {command.name} has no option {word}"


def check_program(words: list[str]) -> None:
    """A program of ours: script and preset are there, and each option is a setting."""
    assert (REPOSITORY / words[0]).is_file(), words[0]
    known = {"config", *field_names(BuildSettings)}
    for word, following in zip(words[1:], [*words[2:], ""], strict=True):
        if word.startswith("--") and word != "--":
            assert word.removeprefix("--").partition("=")[0] in known, f"{words[0]} has no option {word}"
        if word == "--config":
            assert (REPOSITORY / following).is_file(), following


def check_command(command: str) -> None:
    """Whatever in a line of shell is Ray's or ours."""
    for part in re.split(r";|&&|\|\|", command):
        words = [word for word in shlex.split(part, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if words and Path(words[0]).name == "ray":
            check_ray(words[1:])
        ours = [place for place, word in enumerate(words) if word.startswith("pipelines/")]
        if ours:
            check_program(words[ours[0] :])


def commands_of(cluster: dict[str, Any]) -> Iterator[str]:
    for name, value in cluster.items():
        if name.endswith("_commands"):
            yield from value


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_the_cluster_files(name):
    cluster = read(name)
    validate_config(prepare_config(cluster))
    for command in commands_of(cluster):
        check_command(command)


@pytest.mark.parametrize("place", [(), ("auth",), ("available_node_types", "gpu")])
def test_a_key_that_ray_does_not_know_would_be_seen(place):
    """Otherwise the test above could not fail."""
    cluster = read("cloud")
    inner = cluster
    for key in place:
        inner = inner[key]
    inner["min_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(prepare_config(cluster))


def test_aws_knows_every_key_of_the_nodes():
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    types = read("cloud")["available_node_types"]
    for node_type in types.values():
        botocore.validate.validate_parameters({"MinCount": 1, "MaxCount": 1, **node_type["node_config"]}, shape)
    wrong = copy.deepcopy(types["gpu"]["node_config"])
    wrong["BlockDeviceMappings"][0]["Ebs"]["Size"] = 1
    with pytest.raises(botocore.exceptions.ParamValidationError, match="Size"):
        botocore.validate.validate_parameters({"MinCount": 1, "MaxCount": 1, **wrong}, shape)


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_node_gets_all_that_an_installation_needs_and_no_data(name):
    """`ray up` reads every byte below a mounted folder, so the root, with its data and runs, must not be one."""
    mounts = read(name)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert mounts == {f"~/paint-by-example/{path}": path for path in mounts.values()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = {pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = {*packages, *project["project"]["license-files"], project["project"]["readme"], "pyproject.toml", "constraints.txt"}
    assert needed == set(mounts.values())
    assert all((REPOSITORY / path).exists() for path in mounts.values())
    copied = re.findall(r"^COPY --chown=ray (.+) \S+$", (CLUSTERS / "Dockerfile").read_text(), re.MULTILINE)
    assert set(" ".join(copied).split()) == set(mounts.values())


def test_the_job_of_kubernetes_is_one():
    job = read("rayjob")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9-]{1,47}", job["metadata"]["name"])
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == RAY_VERSION
    assert cluster["authOptions"] == {"mode": "token"}
    workers = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(workers) == {"gpu", "cpu"}
    claims = set()
    for group in (cluster["headGroupSpec"], *workers.values()):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay wants them as text"
        check_ray(["start", *(f"--{name}" for name in group["rayStartParams"])])
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"].endswith(f":{RAY_VERSION}")
        assert container["workingDir"] == "/home/ray/paint-by-example"
        volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        claims |= {(mount["mountPath"], volumes[mount["name"]]) for mount in container["volumeMounts"]}
        limits = container["resources"]["limits"]
        assert container["resources"]["requests"] == limits
        assert ("nvidia.com/gpu" in limits) == (group is workers["gpu"])
    for group in workers.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert len(claims) == 1, "all pods mount the same volume at the same place"
    mount = next(iter(claims))[0]
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[0] == "python"
    check_program(words[1:])
    paths = dict(zip(words[4::2], words[5::2], strict=True))
    assert set(paths) == {"--source.annotations", "--source.photos", "--out"}
    assert all(path.startswith(f"{mount}/") for path in paths.values())


def test_the_image_has_the_same_ray():
    docker = (CLUSTERS / "Dockerfile").read_text()
    assert re.search(r"^FROM rayproject/ray:(\S+)-py3\d+-gpu$", docker, re.MULTILINE)[1] == RAY_VERSION
    assert re.search(r"^WORKDIR (.+)$", docker, re.MULTILINE)[1] == "/home/ray/paint-by-example"


def test_the_commands_of_the_docs_exist():
    text = DOCS.read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert sum(line.startswith("ray ") for line in lines) > 5
    for line in lines:
        check_command(line)
    for path in re.findall(r"(?<![\w/~.-])(?:clusters|configs|docs|pipelines|tests)/[\w./-]*\w", text):
        assert (REPOSITORY / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (DOCS.parent / link).exists(), link
    for setting in re.findall(r"`build\.([\w.]+)`", text):
        assert setting in field_names(BuildSettings), setting
