"""Builds on clusters that are real but for standing on this machine alone: what a lost node costs, and what `ray submit` does.

    python -m tests.cluster.check_cluster

1. A build in one process of this machine, to compare with.
2. A cluster of two nodes, closed by a token. The build comes in through the job API; the second node is killed while it packs.
3. A cluster that `ray up` makes over SSH, from clusters/own-machines.yaml. The build comes in through `ray submit`.

All shards must be the same bytes each time. Prints a table; status 1 if anything is wrong. What was started ends with
this program.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError, run_program
from tests.cluster import ssh
from tests.cluster.machines import PROGRAMS, Machine, check_programs, free_ports
from tiny_world.make_photos import make_world

PATIENCE_SECONDS = 180
HEAD, SECOND = "127.0.0.2", "127.0.0.3"
"""Addresses of the two nodes; all of 127.0.0.0/8 is this machine."""
_SMALL = ["--num-cpus=1", "--num-gpus=0", "--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]

Rows = list[tuple[str, str]]


class World:
    """A folder with photos, a token and an environment in which nothing of the user's own Ray is seen or touched."""

    def __init__(self, folder: Path, train: int, validation: int) -> None:
        """Draw the photos, make the token."""
        self.folder = folder
        self.photos = folder / "photos"
        make_world(self.photos, train, validation, 7)
        self.token = secrets.token_hex(32)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(self.token)
        temporary = folder / "t"
        temporary.mkdir()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TMPDIR": str(temporary),
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def options(self, out: Path) -> list[str]:
        """Of a build of small shards into `out`."""
        folders = ["--source.annotations", str(self.photos), "--source.photos", str(self.photos), "--out", str(out)]
        return ["--config", "configs/tiny.yaml", *folders, "--shards.samples", "8", "--ray.gpus_per_actor", "0"]

    def run(self, log: str, *command: str) -> float:
        """Run a command to its end; returns how long it took, in s.

        Raises:
            RuntimeError: it failed; with the end of what it said.
        """
        with self.start(log, *command) as machine:
            return wait_until(machine.has_ended, f"the end of {' '.join(command[:4])}")

    def start(self, log: str, *command: str) -> Machine:
        """Start a command on a machine of its own, in this environment."""
        return Machine(command, self.environment, self.folder / log)


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of each shard of a dataset, which must be finished."""
    read_dataset(out)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "shards").glob("*.tar"))}


def wait_until(true: Callable[[], bool], what: str, *machines: Machine) -> float:
    """Wait for something to come to pass while machines run; returns how long that took, in s.

    Raises:
        RuntimeError: one of them ended, or it did not come to pass.
    """
    began = time.monotonic()
    while not true():
        for machine in machines:
            if machine.has_ended():
                raise RuntimeError(f"{machine.log}: the command ended too early")
        if time.monotonic() - began > PATIENCE_SECONDS:
            raise RuntimeError(f"{what}: not within {PATIENCE_SECONDS} s")
        time.sleep(0.05)
    return time.monotonic() - began


class JobApi:
    """The job API of a head node, as its HTTP clients see it."""

    def __init__(self, port: int) -> None:
        """On this machine's loopback address."""
        self.address = f"http://127.0.0.1:{port}"

    def ask(self, path: str, token: str | None, body: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Status and content of an answer; status 0 where there is none."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        data = json.dumps(body).encode() if body else None
        try:
            with urllib.request.urlopen(urllib.request.Request(self.address + path, data, headers), timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, b""
        except OSError:
            return 0, b""

    def nodes(self, token: str) -> int:
        """How many nodes of the cluster are alive."""
        status, content = self.ask("/nodes?view=summary", token)
        if status != 200:
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in json.loads(content)["data"]["summary"])


def check_job(world: World, expected: dict[str, str]) -> Rows:
    """Submit the build to two nodes, kill the second while it packs, and compare what comes out."""
    gcs, dashboard, client, *agents = free_ports(5)
    start = ["ray", "start", "--block", *_SMALL]
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    head = [*start, "--head", f"--node-ip-address={HEAD}", *ports, f"--temp-dir={world.folder}", "--dashboard-host=127.0.0.1"]
    head.append(f"--dashboard-agent-listen-port={agents[0]}")
    second = [*start, f"--address={HEAD}:{gcs}", f"--node-ip-address={SECOND}", f"--dashboard-agent-listen-port={agents[1]}"]
    api, out = JobApi(dashboard), world.folder / "job"
    with world.start("head.log", *head) as first:
        wait_until(lambda: api.nodes(world.token) == 1, "the head node", first)
        with world.start("second.log", *second) as lost:
            wait_until(lambda: api.nodes(world.token) == 2, "the second node", first, lost)
            refused = [api.ask("/api/jobs/", token, {"entrypoint": "true"})[0] for token in (None, "0" * 64)]
            build = ["python", "pipelines/build.py", *world.options(out)]
            submit = ["ray", "job", "submit", "--address", api.address, "--working-dir", ".", "--", *build]
            with world.start("job.log", *submit) as job:
                until = wait_until(lambda: is_packing(out, lost), "packing on the second node", first, lost, job)
                done = len(records(out))
                lost.kill()
                went_on = wait_until(job.has_ended, "the end of the job", first)
    if refused != [401, 403]:
        raise RuntimeError(f"a job without a token, and one with a wrong one: statuses {refused}, not 401 and 403")
    if not 0 < done < len(expected):
        raise RuntimeError(f"the node was killed after {done} of {len(expected)} shards, which is not in the middle")
    compare(expected, hashes(out))
    return [
        ("a job without a token, with a wrong one", f"refused: {refused[0]}, {refused[1]}"),
        ("second node killed", f"after {done} of {len(expected)} shards, {until:.0f} s after the job was submitted"),
        ("the job", f"went on for {went_on:.0f} s and succeeded"),
        ("shards", f"{len(expected)}, the same bytes"),
    ]


def records(out: Path) -> list[Path]:
    """Commit records of the shards that are done."""
    return [path for path in (out / "shards").glob("*.json") if path.name != "sizes.json"]


def is_packing(out: Path, machine: Machine) -> bool:
    """Whether shards are done already, and the machine is at work on another one."""
    return bool(records(out)) and machine.runs("ray::PackingActor.work")


def check_submit(world: World, expected: dict[str, str]) -> Rows:
    """`ray up`, `ray submit` and `ray down` over SSH, and compare what came out."""
    out = world.folder / "submitted"
    with ssh.server(world.folder / "ssh", world.environment) as (machine, port):
        cluster = ssh.cluster_file(world.folder / "ssh", port, world.token)
        try:
            up = world.run("up.log", "ray", "up", "--yes", str(cluster))
            if not machine.runs("raylet"):
                raise RuntimeError("ray up: there is no raylet")
            submit = world.run("submit.log", "ray", "submit", str(cluster), "pipelines/build.py", "--", *world.options(out))
            down = world.run("down.log", "ray", "down", "--yes", str(cluster))
            if machine.runs("raylet"):
                raise RuntimeError("ray down: a raylet lives on")
        finally:
            ssh.remove_sockets(cluster)
    compare(expected, hashes(out))
    return [
        ("ray up, ray submit, ray down", f"{up:.0f} s, {submit:.0f} s, {down:.0f} s"),
        ("shards", f"{len(expected)}, the same bytes"),
    ]


def compare(expected: dict[str, str], found: dict[str, str]) -> None:
    """Raise where shards differ.

    Raises:
        RuntimeError: names them.
    """
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(expected)} shards are not those of one process, as {wrong[0]}")


def main() -> int:
    """Check, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=150, help="photos of the train split (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=12, help="of the validation split (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and datasets, and say where it is")
    given = parser.parse_args()
    check_programs({**PROGRAMS, **ssh.PROGRAMS}, ssh.SBIN)
    if importlib.util.find_spec("aiohttp_cors") is None:
        raise InputError("ray[default]: not installed, and the job API needs it: pip install -c constraints.txt -e '.[cluster]'")
    # Short, since sockets lie in it, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="pbe"))
    table = Table(title="A build on clusters", title_justify="left")
    for name in ("what", "outcome"):
        table.add_column(name)
    wrong = False
    try:
        world = World(folder, given.train, given.validation)
        local = world.run("local.log", "python", "pipelines/build.py", *world.options(folder / "local"), "--ray.actors", "1")
        expected = hashes(folder / "local")
        table.add_row("one process, no cluster", f"{len(expected)} shards in {local:.0f} s")
        for title, check in (("two nodes, ray job submit", check_job), ("one node over SSH, ray submit", check_submit)):
            table.add_section()
            try:
                rows = check(world, expected)
            except RuntimeError as error:
                wrong = True
                table.add_row(title, "WRONG")
                print(f"WRONG: {title}: {error}", file=sys.stderr)
            else:
                table.add_row(title, "")
                for what, outcome in rows:
                    table.add_row(f"  {what}", outcome)
    except KeyboardInterrupt:
        return 130
    finally:
        if given.keep:
            print(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    Console(width=130).print(table)
    return int(wrong)


if __name__ == "__main__":
    run_program(main)
