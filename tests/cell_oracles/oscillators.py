"""Of the cells that oscillate, or have several time scales."""

from functools import partial
from typing import Any

import numpy as np

from cell_oracles import I, N, of_torch, of_torchrecurrent, restated


def sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def cornn(p: Any, state: Any, x: Any, dt: float = 0.042, gamma: float = 2.7, epsilon: float = 4.7) -> Any:
    """Rusch and Mishra 2021, eq. 3 of the coRNN, damped explicitly."""
    y, z = state
    w, v = p.recurrent[:, :N], p.recurrent[:, N:]
    z_new = z + dt * np.tanh(w @ y + v @ z + p.input @ x + p.bias) - dt * gamma * y - dt * epsilon * z
    return type(state)(y + dt * z_new, z_new)


def unicornn(p: Any, state: Any, x: Any, dt: float = 0.19, alpha: float = 30.65) -> Any:
    """Rusch and Mishra 2021, eq. 4 of the UnICORNN, one layer."""
    y, z = state
    own = dt * sigmoid(p.control)
    z_new = z - own * (np.tanh(p.recurrent * y + p.input @ x + p.bias) + alpha * y)
    return type(state)(y + own * z_new, z_new)


def lem(p: Any, state: Any, x: Any) -> Any:
    """Rusch et al. 2022, eq. 3, with the largest time step 1."""
    y, z = state
    w_1, w_2, w_z = np.split(p.recurrent, 3)
    v_1, v_2, v_z, v_y = np.split(p.input, 4)
    b_1, b_2, b_z, b_y = np.split(p.bias, 4)
    slow = sigmoid(w_2 @ y + v_2 @ x + b_2)
    bar = sigmoid(w_1 @ y + v_1 @ x + b_1)
    z_new = (1 - slow) * z + slow * np.tanh(w_z @ y + v_z @ x + b_z)
    return type(state)((1 - bar) * y + bar * np.tanh(p.memory @ z_new + v_y @ x + b_y), z_new)


def clockwork(p: Any, state: Any, x: Any, modules: int = 7) -> Any:
    """Koutnik et al. 2014, eq. 1, unit by unit: of the slower or equally slow to those whose turn it is."""
    h, t = state
    n = len(h)
    period = [2 ** (modules * j // n) for j in range(n)]
    new = np.array(h)
    for j in range(n):
        if t % period[j] == 0:
            heard = sum(p.recurrent[j, k] * h[k] for k in range(n) if period[k] >= period[j])
            new[j] = np.tanh(heard + p.input[j] @ x + p.bias[j])
    return type(state)(new, t + 1)


def of_cornn(p: Any) -> dict[str, Any]:
    w, v = p.recurrent[:, :N], p.recurrent[:, N:]
    return {"weight_ih": p.input, "weight_hh": w, "weight_ch": v, "bias_ih": p.bias}


def of_unicornn(p: Any) -> dict[str, Any]:
    return {"weight_ih": p.input, "weight_hh": p.recurrent, "weight_ch": p.control, "bias_ih": p.bias}


def of_lem(p: Any) -> dict[str, Any]:
    return {"weight_ih": p.input, "weight_hh": p.recurrent, "weight_ch": p.memory, "bias_ih": p.bias}


def torchrecurrent_lem(p: Any, state: Any, xs: Any) -> Any:
    """Its candidate of h reads z of the step before; called again, it has the new one."""
    import torch
    import torchrecurrent

    cell = torchrecurrent.LEMCell(I, N, dtype=torch.float64)
    zeros = {name: torch.zeros_like(leaf) for name, leaf in cell.state_dict().items()}
    step = partial(torch.func.functional_call, cell, zeros | of_lem(p))
    states = []
    for x in xs:
        z = step((x, tuple(state)))[1]
        state = type(state)(step((x, (state.h, z)))[0], z)
        states.append(state)
    return type(state)(*map(torch.stack, zip(*states, strict=True)))


ORACLES = {
    "cornn": [
        restated(cornn),
        of_torchrecurrent(
            "coRNNCell",
            of_cornn,
            lambda: {"dt": 0.042, "gamma": 2.7, "epsilon": 4.7},
            note="its docstring damps c(t), its code c(t-1), as ours",
        ),
    ],
    "unicornn": [
        restated(unicornn),
        of_torchrecurrent("UnICORNNCell", of_unicornn, lambda: {"dt": 0.19, "alpha": 30.65}),
    ],
    "lem": [
        restated(lem),
        of_torch(
            "torchrecurrent",
            torchrecurrent_lem,
            note="its h(t) reads c(t-1), the paper's c(t): called twice for each step",
        ),
    ],
    "clockwork": [restated(clockwork)],
}
