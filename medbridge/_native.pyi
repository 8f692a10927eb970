"""Types of the C++ extension; its documentation stands in medbridge.support.passk."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

def pass_at_k(n: ArrayLike, c: ArrayLike, ks: ArrayLike) -> NDArray[np.float64]: ...
def mean_curve(n: ArrayLike, c: ArrayLike, ks: ArrayLike, weights: ArrayLike | None = None) -> NDArray[np.float64]: ...
