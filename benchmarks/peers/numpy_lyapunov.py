"""Lyapunov exponents with NumPy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from peers import qr_recursion


def recursion(
    cell: str, params: Any, xs: jax.Array, frame: jax.Array, when: np.ndarray
) -> Callable[[], np.ndarray]:
    """``() -> exponents``, descending; `frame` ``[D, num]``, `when` ``[T]``: whether QR follows on the step."""
    weights, inputs, columns = jax.tree.map(np.array, (params, xs, frame))
    advance = partial(qr_recursion.step_and_jacobian, np, cell, weights)
    start = np.zeros(len(frame), np.float32)
    return lambda: np.sort(qr_recursion.exponents(np, advance, start, inputs, columns, when))[::-1]
