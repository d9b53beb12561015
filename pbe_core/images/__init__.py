"""Photos: bytes to pixels, with limits; squares cut from them; pictures of them for people."""

import numpy as np
from jaxtyping import Bool, UInt8

AnyPhoto = UInt8[np.ndarray, "_ _ 3"]
AnyMask = Bool[np.ndarray, "_ _"]
"""True = repaint."""
