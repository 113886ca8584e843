"""The QR recursion behind Lyapunov exponents as one writes it by hand, in NumPy's words or PyTorch's."""

from collections.abc import Callable
from typing import Any

import numpy as np


def step(lib: Any, cell: str, p: Any, h: Any, x: Any) -> tuple[Any, tuple[Any, ...]]:
    """h_t, and what its Jacobian needs besides."""
    a = p.input @ x + p.bias
    if cell == "rnn":
        return lib.tanh(p.recurrent @ h + a), ()
    size = len(h)
    r_h, z_h, n_h = (p.recurrent[i * size : (i + 1) * size] @ h for i in range(3))
    r = 1 / (1 + lib.exp(-(r_h + a[:size])))
    z = 1 / (1 + lib.exp(-(z_h + a[size : 2 * size])))
    inner = n_h + p.recurrent_bias
    n = lib.tanh(a[2 * size :] + r * inner)
    return (1 - z) * n + z * h, (r, z, n, inner)


def step_and_jacobian(lib: Any, cell: str, p: Any, h: Any, x: Any) -> tuple[Any, Any]:
    """h_t and dh_t/dh_{t-1}."""
    new, parts = step(lib, cell, p, h, x)
    if cell == "rnn":
        return new, (1 - new * new)[:, None] * p.recurrent
    r, z, n, inner = parts
    w_r, w_z, w_n = (p.recurrent[i * len(h) : (i + 1) * len(h)] for i in range(3))
    through_n = (1 - z) * (1 - n * n)
    j = (through_n * r)[:, None] * w_n + (through_n * inner * r * (1 - r))[:, None] * w_r
    return new, j + ((h - n) * z * (1 - z))[:, None] * w_z + lib.diag(z)


def exponents(lib: Any, advance: Callable[[Any, Any], Any], h: Any, xs: Any, frame: Any, when: np.ndarray) -> Any:
    """In no order; QR follows on the steps where `when` says so."""
    total = 0 * frame[0]
    for x, now in zip(xs, when, strict=True):
        h, j = advance(h, x)
        frame = j @ frame
        if now:
            frame, r = lib.linalg.qr(frame)
            total += lib.log(lib.abs(lib.diagonal(r)))
    return total / len(xs)
