"""Of the cells that oscillate, or have several time scales."""

from functools import partial
from typing import Any

import numpy as np

from cell_oracles import I, N, of_torch, of_torchrecurrent, restated, sigmoid


def cornn(p: Any, state: Any, x: Any, dt: float = 0.042, gamma: float = 2.7, epsilon: float = 4.7) -> Any:
    """Rusch and Mishra 2021 (coRNN), damped explicitly."""
    y, z = state
    w, v = p.recurrent[:, :N], p.recurrent[:, N:]
    z_new = z + dt * np.tanh(w @ y + v @ z + p.input @ x + p.bias) - dt * gamma * y - dt * epsilon * z
    return type(state)(y + dt * z_new, z_new)


def unicornn(p: Any, state: Any, x: Any, dt: float = 0.19, alpha: float = 30.65) -> Any:
    """Rusch and Mishra 2021 (UnICORNN), one layer."""
    y, z = state
    own = dt * sigmoid(p.control)
    z_new = z - own * (np.tanh(p.recurrent * y + p.input @ x + p.bias) + alpha * y)
    return type(state)(y + own * z_new, z_new)


def lem(p: Any, state: Any, x: Any) -> Any:
    """Rusch et al. 2022, with the largest time step 1."""
    y, z = state
    w_1, w_2, w_z = np.split(p.recurrent, 3)
    v_1, v_2, v_z, v_y = np.split(p.input, 4)
    b_1, b_2, b_z, b_y = np.split(p.bias, 4)
    slow = sigmoid(w_2 @ y + v_2 @ x + b_2)
    bar = sigmoid(w_1 @ y + v_1 @ x + b_1)
    z_new = (1 - slow) * z + slow * np.tanh(w_z @ y + v_z @ x + b_z)
    return type(state)((1 - bar) * y + bar * np.tanh(p.memory @ z_new + v_y @ x + b_y), z_new)


def clockwork(p: Any, state: Any, x: Any, modules: int = 7) -> Any:
    """Koutnik et al. 2014, section 3, unit by unit: of the slower or equally slow to those whose turn it is."""
    h, t = state
    n = len(h)
    period = [2 ** (modules * j // n) for j in range(n)]
    new = np.array(h)
    for j in range(n):
        if t % period[j] == 0:
            heard = sum(p.recurrent[j, k] * h[k] for k in range(n) if period[k] >= period[j])
            new[j] = np.tanh(heard + p.input[j] @ x + p.bias[j])
    return type(state)(new, t + 1)


def cfc(p: Any, h: Any, x: Any) -> Any:
    """Hasani et al. 2022, as released: the gate of one unit of time."""
    y = 1.7159 * np.tanh(0.666 * (p.recurrent @ h + p.input @ x + p.bias))
    f_1, f_2, t_a, t_b = np.split(p.heads, 4)
    b_1, b_2, b_a, b_b = np.split(p.heads_bias, 4)
    gate = sigmoid((t_a @ y + b_a) * 1.0 + t_b @ y + b_b)
    return np.tanh(f_1 @ y + b_1) * (1 - gate) + gate * np.tanh(f_2 @ y + b_2)


def tau_gru(p: Any, state: Any, x: Any) -> Any:
    """Erichson et al. 2022, with biases."""
    h, past = state
    w_u, w_g, w_a = np.split(p.recurrent, 3)
    v_u, v_g, v_a, v_z = np.split(p.input, 4)
    b_u, b_g, b_a, b_z = np.split(p.bias, 4)
    u = np.tanh(w_u @ h + v_u @ x + b_u)
    z = np.tanh(p.delayed @ past[4] + v_z @ x + b_z)
    g = sigmoid(w_g @ h + v_g @ x + b_g)
    a = sigmoid(w_a @ h + v_a @ x + b_a)
    return type(state)((1 - g) * h + g * (u + a * z), np.stack([h, past[0], past[1], past[2], past[3]]))


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


def ncps_cfc(p: Any, h: Any, xs: Any) -> Any:
    import torch
    from ncps.torch import CfCCell

    cell = CfCCell(I, N, backbone_units=len(p.bias)).double()
    named = {"backbone.0.weight": torch.cat([p.input, p.recurrent], 1), "backbone.0.bias": p.bias}
    for name, weight, bias in zip(
        ("ff1", "ff2", "time_a", "time_b"), p.heads.chunk(4), p.heads_bias.chunk(4), strict=True
    ):
        named |= {f"{name}.weight": weight, f"{name}.bias": bias}
    states = []
    for x in xs:
        h = torch.func.functional_call(cell, named, (x[None], h[None], 1.0))[0][0]
        states.append(h)
    return torch.stack(states)


def torchrecurrent_tau_gru(p: Any, state: Any, xs: Any) -> Any:
    import torch
    import torchrecurrent

    cell = torchrecurrent.tauGRUCell(I, N, dtype=torch.float64)

    def in_order(u: Any, g: Any, a: Any, z: Any) -> Any:
        return torch.cat([u, z, g, a])

    named = {
        "weight_ih": in_order(*p.input.chunk(4)),
        "weight_hh": in_order(*p.recurrent.chunk(3), p.delayed),
        "bias_ih": in_order(*p.bias.chunk(4)),
        "bias_hh": torch.zeros_like(p.bias),
    }
    states = []
    for x in xs:
        h = torch.func.functional_call(cell, named, (x, state.h, state.past[-1]))
        state = type(state)(h, torch.cat([state.h[None], state.past[:-1]]))
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
    "cfc": [restated(cfc), of_torch("ncps", ncps_cfc)],
    "tau_gru": [
        restated(tau_gru),
        of_torch("torchrecurrent", torchrecurrent_tau_gru, note="its cell is given the delayed state"),
    ],
}
