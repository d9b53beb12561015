"""A machine to reach over SSH that is this one: an SSH server of our own, and a cluster file for it made from the example.

The server listens on the loopback address alone, knows one key, made for it, and gives its sessions a home of their own. It
stands in a PID namespace (`machines.py`), so that the `ray stop` of `ray up` and `ray down` finds its Ray and no other.
"""

import contextlib
import getpass
import hashlib
import os
import shlex
import socket
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pbe_core.settings import REPOSITORY
from tests.cluster.machines import Machine, free_ports

PROGRAMS = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "rsync": "rsync"}
SBIN = "/usr/sbin:/sbin"
"""Where sshd is, which few have on their path."""


@contextlib.contextmanager
def server(folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[Machine, int]]:
    """A running SSH server and its port; keys, configuration and the sessions' home lie in `folder`, which is made."""
    home = folder / "home"
    home.mkdir(parents=True)
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized_keys").write_bytes((folder / "user_key.pub").read_bytes())
    # What the setup_commands of a real cluster leave behind: an environment with the project.
    (home / ".bashrc").write_text(f"export PATH={shlex.quote(environment['PATH'])}\n")
    port = free_ports(1)[0]
    sessions = {"HOME": str(home), "TMPDIR": environment["TMPDIR"], "RAY_TMPDIR": environment["RAY_TMPDIR"]}
    lines = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "AllowUsers": getpass.getuser(),
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "UsePAM": "no",
        # The folder is ours alone, but the one that it lies in is everybody's.
        "StrictModes": "no",
        "PidFile": "none",
        "X11Forwarding": "no",
        "AllowTcpForwarding": "no",
        "SetEnv": " ".join(f"{name}={value}" for name, value in sessions.items()),
    }
    configuration = folder / "sshd_config"
    configuration.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
    sshd = next(path for path in (f"{place}/sshd" for place in SBIN.split(":")) if os.access(path, os.X_OK))
    with (
        _privilege_separation_folder(),
        Machine([sshd, "-D", "-e", "-f", str(configuration)], environment, folder / "sshd.log") as machine,
    ):
        while not _listens(port):
            if machine.has_ended():
                raise RuntimeError(f"{machine.log}: sshd has ended")
        yield machine, port


def cluster_file(folder: Path, port: int, token: str) -> Path:
    """The example for one's own machines, changed for the server in `folder` where it has to be; returns its path."""
    relay = folder / "relay"
    # What `nc 127.0.0.1 PORT` would do, which not every machine has.
    relay.write_text(f"#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/{port}\ncat <&0 >&3 &\ncat <&3\nkill $!\n")
    relay.chmod(stat.S_IRWXU)
    secret = folder / "auth_token"
    secret.touch(mode=0o600)
    secret.write_text(token)
    cluster: dict[str, Any] = yaml.safe_load((REPOSITORY / "clusters" / "own-machines.yaml").read_text())
    gcs, client, agent = free_ports(3)
    cluster["cluster_name"] = f"check-{folder.parent.name}"
    cluster["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
    cluster["auth"] = {
        "ssh_user": getpass.getuser(),
        "ssh_private_key": str(folder / "user_key"),
        "ssh_proxy_command": str(relay),
    }
    cluster["file_mounts"]["~/.ray/auth_token"] = str(secret)
    # This machine has the project and its environment already.
    cluster["setup_commands"] = []
    small = f"--port={gcs} --ray-client-server-port={client} --dashboard-agent-listen-port={agent} --num-cpus=1 --num-gpus=0 "
    small += "--object-store-memory=100000000 --min-worker-port=0 --max-worker-port=0 --include-dashboard=false"
    cluster["head_start_ray_commands"] = [command.replace("--port=6379", small) for command in cluster["head_start_ray_commands"]]
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return path


def remove_sockets(cluster: Path) -> None:
    """Remove the sockets that Ray's SSH clients share, which it always puts into /tmp."""
    name = yaml.safe_load(cluster.read_text())["cluster_name"]
    user, own = (hashlib.sha256(text.encode()).hexdigest()[:10] for text in (getpass.getuser(), name))
    folder = Path(f"/tmp/ray_ssh_{user}") / own
    for path in folder.glob("*"):
        # The client that holds it goes by itself, for its server has gone.
        path.unlink(missing_ok=True)
    for path in (folder, folder.parent):
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def _privilege_separation_folder() -> Iterator[None]:
    """The empty folder that Debian's sshd asks for as root, where its service has not made it."""
    folder = Path("/run/sshd")
    made = os.geteuid() == 0 and not folder.exists()
    if made:
        folder.mkdir(mode=0o755)
    try:
        yield
    finally:
        if made:
            folder.rmdir()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False
