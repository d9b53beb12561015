"""Where the files of a network lie: a folder of this machine, or the hub's cache. Without PyTorch, which takes seconds."""

from collections.abc import Collection
from pathlib import Path

from pbe_core.errors import InputError
from pbe_core.files import file_sha256
from pbe_core.settings import REPOSITORY
from pbe_core.vae_kinds import AUTOENCODER_KL, TAEF2_FILES, is_taef2, locate_vae
from pbe_core.weight_files import DIFFUSERS_FILES, weights_of


def local_folder(source: str) -> Path | None:
    """The folder of this machine that a name means, looked for here and then in the project's own tree; null: there is none."""
    return next((path for path in (Path(source).expanduser(), REPOSITORY / source) if path.is_dir()), None)


def locate_network(kind: str, source: str, subfolder: str, files: tuple[str, ...], beside: Collection[str] = ()) -> Path:
    """The folder with the config.json and the weights of a network, on this machine; fetched from the hub where it is there.

    Args:
        kind: what a message calls the network: its class.
        source: a folder that holds the network, or a pipeline that has it in `subfolder`; or such a hub id (owner/name, or
            owner/name/folder). A relative folder is looked for here, then in the project's own tree.
        subfolder: where a pipeline keeps it.
        files: names for its weights, the best first; pickles are left out.
        beside: names of further files to fetch from the hub, where it has them beside the network.

    Raises:
        InputError: no such folder or hub id, or the hub does not give it.
    """
    folder = local_folder(source)
    if folder is None:
        return _fetch_network(kind, source, subfolder, without_pickles(files), beside)
    inner = folder if (folder / "config.json").is_file() else folder / subfolder
    if not (inner / "config.json").is_file():
        raise InputError(f"{folder}: no {kind} here: there is no config.json in it, nor in {subfolder}/")
    return inner


def find_vae(source: str) -> Path:
    """The folder with a VAE's files, whichever kind it is of; arguments and errors as of `locate_network`."""
    folder = local_folder(source)
    return (folder and locate_vae(folder)) or locate_network(AUTOENCODER_KL, source, "vae", DIFFUSERS_FILES)


def hash_vae_files(source: str) -> dict[str, str]:
    """SHA-256 of each file that a VAE is loaded from, by name: the same files are the same VAE. Errors as of `find_vae`."""
    place = find_vae(source)
    present = [path.name for path in place.iterdir()]
    names = TAEF2_FILES if is_taef2(place) else ("config.json", *weights_of(present, without_pickles(DIFFUSERS_FILES)))
    return {name: file_sha256(place / name) for name in names if name in present}


def without_pickles(files: tuple[str, ...]) -> tuple[str, ...]:
    """Names for weights that nothing but numbers can be in."""
    return tuple(file for file in files if file.endswith(".safetensors"))


def _fetch_network(kind: str, source: str, subfolder: str, files: tuple[str, ...], beside: Collection[str]) -> Path:
    """The folder of the cache with a network of the hub's.

    Raises:
        InputError: this is no hub id, or the hub does not give it, or has no such network there.
    """
    from pbe_core.hub import fetch  # The hub's client takes a fifth of a second to load.

    if Path(source).expanduser().is_file():
        raise InputError(f"{source}: is a file; give the folder of a {kind}, with config.json and .safetensors weights")
    owner, name, *inside = source.split("/") if source.count("/") in (1, 2) else ("", "")
    if not owner or not name or owner.startswith((".", "~")):
        raise InputError(f"{source}: no such folder, and no hub id (owner/name) of a {kind}")
    places = inside or [subfolder, ""]

    def choose(names: Collection[str]) -> list[str]:
        place = next((place for place in places if f"{place}/config.json".lstrip("/") in names), None)
        if place is None:
            raise InputError(f"{source}: the hub has it, but no {kind} in it (config.json, {places[0]}/config.json)")
        start = f"{place}/" if place else ""
        weights = weights_of([name.removeprefix(start) for name in names if name.startswith(start)], files)
        if not weights:
            raise InputError(f"{source}: the hub has it, but no weights of a {kind} as .safetensors in {place or 'it'}")
        others = [file for file in beside if start + file in names]
        return [start + file for file in ("config.json", *weights, *others)]

    repository = fetch(f"{owner}/{name}", choose)
    assert repository is not None, "`choose` never returns nothing"
    return next(repository / place for place in places if (repository / place / "config.json").is_file())
