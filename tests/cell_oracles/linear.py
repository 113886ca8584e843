"""Of the cells that are linear in their state, unit by unit."""

from typing import Any

import numpy as np

from cell_oracles import restated


def lru(p: Any, h: Any, x: Any) -> Any:
    """Orvieto et al. 2023, eq. 7."""
    lam = np.exp(-np.exp(p.nu_log) + 1j * np.exp(p.theta_log))
    return lam * h + np.exp(p.gamma_log) * ((p.input_re + 1j * p.input_im) @ x)


def min_gru(p: Any, h: Any, x: Any) -> Any:
    """Feng et al. 2024, section 3.1, with biases."""
    w_z, w_h = np.split(p.input, 2)
    b_z, b_h = np.split(p.bias, 2)
    z = 1 / (1 + np.exp(-(w_z @ x + b_z)))
    return (1 - z) * h + z * (w_h @ x + b_h)


ORACLES = {"lru": [restated(lru)], "min_gru": [restated(min_gru)]}
