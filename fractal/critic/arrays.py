"""Types of numpy arrays, as the critic's modules use them. N samples, D numbers of a state."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Half = NDArray[np.float16]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Groups = NDArray[np.int64]  # (N,) numbers of the problems, in their natural order
