"""Of the recurrent highway network."""

from typing import Any

import numpy as np

from cell_oracles import restated, sigmoid


def rhn(p: Any, h: Any, x: Any) -> Any:
    """Zilly et al. 2017, equations 6 to 9, with c = 1 - t."""
    u_h, u_t = np.split(p.input, 2)
    for layer, (weights, bias) in enumerate(zip(p.recurrent, p.bias, strict=True)):
        (r_h, r_t), (b_h, b_t) = np.split(weights, 2), np.split(bias, 2)
        first = float(layer == 0)
        n = np.tanh(first * (u_h @ x) + r_h @ h + b_h)
        t = sigmoid(first * (u_t @ x) + r_t @ h + b_t)
        h = n * t + h * (1 - t)
    return h


ORACLES = {"rhn": [restated(rhn)]}
