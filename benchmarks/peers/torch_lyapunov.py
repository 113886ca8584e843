"""Lyapunov exponents with PyTorch on the CPU, by Jacobians coded by hand or by `torch.func.jacrev`."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch

from peers import qr_recursion

THREADS = torch.get_num_threads()


def recursion(
    cell: str, params: Any, xs: jax.Array, frame: jax.Array, when: np.ndarray, jacrev: bool = False
) -> Callable[[], np.ndarray]:
    """``() -> exponents``; `frame` ``[D, num]``, `when` ``[T]``: whether QR follows on the step."""
    weights, inputs, columns = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), (params, xs, frame))

    def automatic(h: Any, x: Any) -> Any:
        j, new = torch.func.jacrev(lambda h: (qr_recursion.step(torch, cell, weights, h, x)[0],) * 2, has_aux=True)(
            h
        )
        return new, j

    advance = automatic if jacrev else partial(qr_recursion.step_and_jacobian, torch, cell, weights)
    start = torch.zeros(len(frame))
    return lambda: qr_recursion.exponents(torch, advance, start, inputs, columns, when)


def quickest_threads(run: Callable[[], Any]) -> int:
    """One thread, or PyTorch's default: whichever is faster is set."""
    times = {}
    for threads in {1, THREADS}:
        torch.set_num_threads(threads)
        run()
        tries = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            tries.append(time.perf_counter() - start)
        times[threads] = min(tries)
    best = min(times, key=times.__getitem__)
    torch.set_num_threads(best)
    return best
