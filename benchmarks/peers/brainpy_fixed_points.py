"""Fixed points by BrainPy's `SlowPointFinder`: Adam on the speed of all starts, its default optimiser."""

from collections.abc import Callable
from typing import Any

import brainpy as bp
import jax
import numpy as np


def finder(step: Callable[[Any], Any], starts: jax.Array, iterations: int) -> Callable[[], np.ndarray]:
    """``() -> points [K, N]``; `step` is of one state."""

    def run() -> np.ndarray:
        found = bp.analysis.SlowPointFinder(f_cell=step, f_type=bp.analysis.constants.DISCRETE, verbose=False)
        found.find_fps_with_gd_method(
            candidates=bp.math.asarray(starts),
            tolerance=1e-12,
            num_batch=100,
            num_opt=iterations,
        )
        return np.asarray(found.fixed_points)

    return run
