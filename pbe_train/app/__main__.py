"""Edit photos, and look into datasets, in a browser: one local server.

python -m pbe_train.app --model runs/tiny --dataset data/tiny/dataset
"""

import argparse
import asyncio
import errno
import json
import os
import signal
import socket
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pbe_core.errors import InputError, run_program
from pbe_core.progress import Progress

if TYPE_CHECKING:
    from pbe_train.app.dataset_routes import ViewerOptions
    from pbe_train.app.models import Choice
    from pbe_train.app.server import Options


# Of the command line, what is the painting process's business.
PAINTING = ("device", "precision", "channels_last", "prepacked", "compile", "offload", "threads")


def main() -> None:
    """Start the server and run it until it is told to end."""
    options = parse_options()
    # aiohttp and the photo formats take half a second to load: --help does not wait for them.
    from pbe_train.app.login import read_password
    from pbe_train.app.models import find_models
    from pbe_train.app.server import Options
    from pbe_train.app.sessions import private_folder

    if not 0 <= options.port <= 65535:
        raise InputError(f"--port {options.port}: give one from 1 to 65535, or 0 for any that is free")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads}: must be 1 or more")
    password = read_password(options.password_file, options.host)
    choices = find_models(options.model)
    painting = {name: getattr(options, name) for name in PAINTING}
    painting["loras"] = options.lora
    viewer = viewer_options(options)
    with private_folder() as folder:
        given = Options(choices, folder, viewer, options.host, options.port, options.allowed_host, password, painting)
        asyncio.run(serve(given, options.open))
    # Python would wait for threads: for a store that does not answer, say. What they do is nobody's any more.
    sys.stdout.flush()
    os._exit(0)


async def serve(options: "Options", open_browser: bool) -> None:
    """Run a server until SIGINT or SIGTERM.

    Raises:
        InputError: its address is not to be had, or a model is not.
    """
    from pbe_train.app.painter import Painter
    from pbe_train.app.server import make_runner, start_or_end

    over = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    listening = listen(options.host, options.port)
    port = listening.getsockname()[1]
    painter = Painter(options.choices, options.painting)
    with Progress("looking at the models"):
        started = await start_or_end(painter, over)
    if not started:
        return
    try:
        options = replace(options, choices=usable(options.choices, painter.wrong), port=port)
    except InputError:
        await painter.stop()
        raise
    for choice in options.choices:
        if not painter.models[choice.source]["here"]:
            print(f"{choice.source}: not on this machine; it is fetched from the Hugging Face hub when somebody wants it")
    runner = await make_runner(options, painter, listening)
    url = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{port}/"
    print(f"{url} (Ctrl-C ends it)", flush=True)
    # Without a screen Python would open a browser in the terminal, in the server's place.
    has_screen = not sys.platform.startswith("linux") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if open_browser and has_screen:
        await asyncio.to_thread(webbrowser.open, url)
    await over.wait()
    await runner.cleanup()


def usable(choices: "Sequence[Choice]", wrong: dict[str, str]) -> "list[Choice]":
    """The models without those that are damaged; of what only lies about here, that is told and no reason to stop.

    Raises:
        InputError: a model that was asked for is not to be had.
    """
    for choice in choices:
        if choice.source in wrong and choice.given:
            raise InputError(wrong[choice.source])
        if choice.source in wrong:
            print(f"left out: {wrong[choice.source]}", file=sys.stderr)
    return [choice for choice in choices if choice.source not in wrong]


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        InputError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)  # From now on nobody else takes it, though nobody is let in until the models are there.
    except UnicodeError:  # Of a name that cannot be one.
        raise InputError(f"--host {host}: no name of a host; give an address of this machine, such as 0.0.0.0") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            told = f"--port {port}: another program listens there; give another port, or --port 0 for any that is free"
            raise InputError(told) from None
        raise InputError(f"--host {host} --port {port}: cannot listen there ({error.strerror}); give another address") from None
    return made


def viewer_options(options: argparse.Namespace) -> "ViewerOptions":
    """What the dataset viewer is started with.

    Raises:
        InputError: `--storage` is no JSON object.
    """
    from pbe_train.app.dataset_routes import ViewerOptions
    from pbe_train.app.dataset_samples import Sources

    try:
        storage = json.loads(options.storage or "{}")
    except ValueError:
        storage = None
    if not isinstance(storage, dict):
        raise InputError('--storage: give a JSON object, such as \'{"endpoint_url": "https://..."}\'')
    sources = Sources(options.photos, storage, options.vae)
    return ViewerOptions(options.dataset, storage, sources, options.leave_out, options.cache.expanduser())


def parse_options() -> argparse.Namespace:
    """The command line."""
    from pbe_train.sample import add_speed_options, parse_switch

    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a model to offer: run, checkpoint, or published model, with a name or without; again for more "
        "(default: the finished tiny model, and the runs in runs/)",
    )
    parser.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="LORA[:WEIGHT]",
        help="LoRAs to add to every model that is offered: files, folders or runs, and how strongly, as cup.safetensors:0.8",
    )
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="FOLDER_OR_URL",
        help="a dataset to look into; again for more (default: none)",
    )
    parser.add_argument("--storage", help="options of fsspec, as JSON, for datasets and photos behind URLs (default: none)")
    parser.add_argument("--photos", help="folder or store of the datasets' photos, where they are not where the build had them")
    parser.add_argument("--vae", help="the datasets' VAE, where it is not where the build had it")
    parser.add_argument(
        "--leave-out", type=Path, default=Path("left_out.csv"), help="list that marks are written to, for selection.leave_out"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/paint-by-example"),
        help="folder for what comes from URLs, and for what is read once of a dataset",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; any but this machine's own needs a password")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at; 0 for any that is free")
    parser.add_argument("--password-file", type=Path, help="file with the password; or set PBE_APP_PASSWORD")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which a reverse proxy is asked (default: none)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the first GPU, else the CPU")
    add_speed_options(parser)
    parser.add_argument(
        "--offload", type=parse_switch, default=False, help="true: on the GPU only the network that works, for small GPUs"
    )
    parser.add_argument("--threads", type=int, help="on the CPU; by default 1 for small models, else PyTorch's own choice")
    parser.add_argument("--open", action="store_true", help="open a browser")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
