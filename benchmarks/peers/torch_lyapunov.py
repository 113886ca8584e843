"""Lyapunov exponents with PyTorch, by Jacobians coded by hand or by `torch.func.jacrev`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch

from bptt_jax.experiments.timing import seconds
from peers import qr_recursion
from peers.torch_device import moved

THREADS = torch.get_num_threads()


def recursion(
    cell: str, params: Any, xs: jax.Array, frame: jax.Array, when: np.ndarray, jacrev: bool = False
) -> Callable[[], np.ndarray]:
    """``() -> exponents``, descending; `frame` ``[D, num]``, `when` ``[T]``: whether QR follows on the step."""
    weights, inputs, columns = jax.tree.map(moved, (params, xs, frame))

    def automatic(h: Any, x: Any) -> Any:
        j, new = torch.func.jacrev(lambda h: (qr_recursion.step(torch, cell, weights, h, x)[0],) * 2, has_aux=True)(
            h
        )
        return new, j

    advance = automatic if jacrev else partial(qr_recursion.step_and_jacobian, torch, cell, weights)
    start = 0 * columns[:, 0]

    def run() -> np.ndarray:
        return np.sort(qr_recursion.exponents(torch, advance, start, inputs, columns, when).cpu().numpy())[::-1]

    return run


def quickest_threads(run: Callable[[], Any]) -> int:
    """One thread, or PyTorch's default: whichever is faster is set."""
    times = {}
    for threads in {1, THREADS}:
        torch.set_num_threads(threads)
        run()
        times[threads] = min(seconds(run) for _ in range(3))
    best = min(times, key=times.__getitem__)
    torch.set_num_threads(best)
    return best
