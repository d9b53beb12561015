"""Photos: bytes to pixels, with limits; pictures of them for people."""

import numpy as np
from jaxtyping import UInt8

AnyPhoto = UInt8[np.ndarray, "_ _ 3"]
