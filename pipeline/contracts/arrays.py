"""The types of arrays of numbers."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
