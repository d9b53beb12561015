"""COCOEE's `id_list.npy`: the annotation ids that name a pair set's files, padded with zeros to 12 digits."""

from pathlib import Path

import numpy as np

from pbe_core.errors import InputError

ID_DIGITS = 12
LARGEST_ID = 10**ID_DIGITS - 1
"""Files are named by an id of 12 digits."""
_WAY_OUT = "save the ids with numpy.save, as one row of whole numbers"


def read_id_list(path: Path) -> list[int]:
    """The ids of a list, in its order; one may stand there twice. Nothing that is loaded runs code.

    Raises:
        InputError: not there, damaged, Python objects, other numbers than ids, or no id at all.
    """
    try:
        with path.open("rb") as file:
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: missing: it says which pairs there are; {_WAY_OUT}") from None
    # A header that lies about its length asks for more memory than there is.
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read: no list of ids ({str(error).splitlines()[0][:150]}); {_WAY_OUT}") from None
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise InputError(f"{path}: an array of {ids.dtype} {list(ids.shape)}; {_WAY_OUT}")
    if not ids.size:
        raise InputError(f"{path}: no id, so no pair in it; {_WAY_OUT}")
    for end in (int(ids.min()), int(ids.max())):
        if not 0 <= end <= LARGEST_ID:
            raise InputError(f"{path}: {end} is no id; files are named by ids from 0 to {LARGEST_ID}")
    found: list[int] = ids.tolist()
    return found
