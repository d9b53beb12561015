"""Programs started by fork: a process that has imported PyTorch, diffusers and Ray once becomes each of them.

A build imports for 5 CPU seconds before it works for one, and the tests run about a hundred. What a program does after its
imports is the same; that it starts from a shell, too, is tested where that is what a test is about.
"""

import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IMPORTS = ("ray", "torch", "scipy.stats", "diffusers.models.autoencoders.autoencoder_kl", "pyarrow.parquet", "matplotlib.figure")


def run_forked(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run(command, cwd=..., env=..., capture_output=True, text=True)` returns, for a script of ours.

    Args:
        command: `[sys.executable, script, *options]`.
        cwd: its working folder.
        environment: all of its variables.
    """
    server = _server()
    assert server.stdin
    assert server.stdout
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        order = {"command": list(command[1:]), "cwd": str(cwd), "env": dict(environment)}
        files = {"out": f"/proc/{os.getpid()}/fd/{out.fileno()}", "err": f"/proc/{os.getpid()}/fd/{err.fileno()}"}
        server.stdin.write(json.dumps(order | files) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(list(command), status, out.read(), err.read())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends when this process does: its standard input ends."""
    command = [sys.executable, "-m", "tests.forked"]
    root = Path(__file__).resolve().parent.parent
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve() -> None:
    """Become what is ordered, one program at a time, and answer its exit status."""
    for name in IMPORTS:
        __import__(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def _become(order: dict[str, Any]) -> None:
    """Run the script as `python script` does, and end this process."""
    for number, name in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
        file = os.open(name, os.O_RDWR if number else os.O_RDONLY)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.argv = order["command"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    status: Any = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        # As Python ends: what was registered with atexit, Ray's farewell among it.
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(status or 0))


if __name__ == "__main__":
    serve()
