"""From what the user names to a model: which kind of file or folder is it?"""

from pathlib import Path

from pbe_core.errors import InputError
from pbe_train.checkpoints.diffusers_folder import is_diffusers_folder, locate_folder, read_diffusers
from pbe_train.checkpoints.ldm_file import read_original
from pbe_train.checkpoints.own_run import read_own
from pbe_train.checkpoints.source import Source


def read_source(source: str) -> Source:
    """The model in a file in the original layout, a folder or hub id in diffusers' layout, or a run of this trainer.

    Raises:
        InputError: none of these, or damaged.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return read_original(path)
    folder = locate_folder(source)
    if folder is None:
        raise InputError(f"{source}: no such file or folder, and no hub id (owner/name); give one of these")
    if is_diffusers_folder(folder):
        return read_diffusers(folder)
    own = read_own(folder)
    if own is None:
        raise InputError(
            f"{folder}: neither a model in diffusers' layout (unet/config.json), nor a run of this trainer (checkpoints/), "
            "nor one of its checkpoints (state.json)"
        )
    return own
