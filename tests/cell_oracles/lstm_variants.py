"""Of the variants of the long short-term memory."""

from typing import Any

import numpy as np

import bptt_jax as bptt
from cell_oracles import I, N, gates, in_order, of_torch, of_torchrecurrent, restated, sigmoid


def peephole_cell(p: Any, state: Any, x: Any) -> Any:
    """Graves 2013, equations 7 to 10: c_t and the output gate."""
    h, c = state
    p_i, p_f, p_o = np.split(p.peephole, 3)
    (w_i, u_i, b_i), (w_f, u_f, b_f), (w_c, u_c, b_c), (w_o, u_o, b_o) = gates(p)
    i = sigmoid(u_i @ x + w_i @ h + p_i * c + b_i)
    f = sigmoid(u_f @ x + w_f @ h + p_f * c + b_f)
    c = f * c + i * np.tanh(u_c @ x + w_c @ h + b_c)
    return c, sigmoid(u_o @ x + w_o @ h + p_o * c + b_o)


def peephole_lstm(p: Any, state: Any, x: Any) -> Any:
    c, o = peephole_cell(p, state, x)
    return type(state)(o * np.tanh(c), c)


def original_lstm(p: Any, state: Any, x: Any) -> Any:
    """Hochreiter and Schmidhuber 1997, section 4, in the paper's own units: twice our cell, twice our weights of g."""
    h, c = state.h, 2 * state.c
    (w_i, u_i, b_i), (w_g, u_g, b_g), (w_o, u_o, b_o) = gates(p)
    y_in = sigmoid(w_i @ h + u_i @ x + b_i)
    y_out = sigmoid(w_o @ h + u_o @ x + b_o)
    c = c + y_in * (4 * sigmoid(2 * (w_g @ h + u_g @ x + b_g)) - 2)
    return type(state)(y_out * (2 * sigmoid(c) - 1), c / 2)


def coupled_lstm(p: Any, state: Any, x: Any) -> Any:
    """Greff et al. 2017, section 2, with f = 1 - i."""
    h, c = state
    p_i, p_o = np.split(p.peephole, 2)
    (w_i, u_i, b_i), (w_z, u_z, b_z), (w_o, u_o, b_o) = gates(p)
    z = np.tanh(u_z @ x + w_z @ h + b_z)
    i = sigmoid(u_i @ x + w_i @ h + p_i * c + b_i)
    f = 1 - i
    c = z * i + c * f
    return type(state)(np.tanh(c) * sigmoid(u_o @ x + w_o @ h + p_o * c + b_o), c)


def wmc_lstm(p: Any, state: Any, x: Any) -> Any:
    """Landi et al. 2021, section 3."""
    h, c = state
    m_i, m_f, m_o = np.split(p.memory, 3)
    (w_i, u_i, b_i), (w_f, u_f, b_f), (w_g, u_g, b_g), (w_o, u_o, b_o) = gates(p)
    i = sigmoid(u_i @ x + w_i @ h + np.tanh(m_i @ c) + b_i)
    f = sigmoid(u_f @ x + w_f @ h + np.tanh(m_f @ c) + b_f)
    c = f * c + i * np.tanh(u_g @ x + w_g @ h + b_g)
    return type(state)(sigmoid(u_o @ x + w_o @ h + np.tanh(m_o @ c) + b_o) * np.tanh(c), c)


def janet(p: Any, h: Any, x: Any) -> Any:
    """Van der Westhuizen and Lasenby 2018, section 3, with beta = 1."""
    (w_f, u_f, b_f), (w_c, u_c, b_c) = gates(p)
    s = w_f @ h + u_f @ x + b_f
    return sigmoid(s) * h + (1 - sigmoid(s - 1)) * np.tanh(w_c @ h + u_c @ x + b_c)


def residual_lstm(p: Any, state: Any, x: Any) -> Any:
    """Kim et al. 2017, section 3."""
    c, o = peephole_cell(p, state, x)
    m = p.projection @ np.tanh(c)
    return type(state)(o * (m + p.shortcut @ x), c)


def multiplicative_lstm(p: Any, state: Any, x: Any) -> Any:
    """Krause et al. 2016, section 3, with biases."""
    m = (p.input_factor @ x) * (p.state_factor @ state.h)
    (w_i, u_i, b_i), (w_f, u_f, b_f), (w_h, u_h, b_h), (w_o, u_o, b_o) = gates(p)
    i, f, o = (sigmoid(u @ x + w @ m + b) for w, u, b in ((w_i, u_i, b_i), (w_f, u_f, b_f), (w_o, u_o, b_o)))
    c = f * state.c + i * np.tanh(u_h @ x + w_h @ m + b_h)
    return type(state)(np.tanh(c) * o, c)


def layer_norm_lstm(p: Any, state: Any, x: Any) -> Any:
    """Ba et al. 2016, equations 20 to 22, with 1e-5 below the root."""

    def normalized(v: Any) -> Any:
        mu = np.sum(v) / v.size
        return (v - mu) / np.sqrt(np.sum((v - mu) ** 2) / v.size + 1e-5)

    a = p.recurrent_gain * normalized(p.recurrent @ state.h) + p.input_gain * normalized(p.input @ x) + p.bias
    i, f, g, o = np.split(a, 4)
    c = sigmoid(f) * state.c + sigmoid(i) * np.tanh(g)
    return type(state)(sigmoid(o) * np.tanh(p.cell_gain * normalized(c) + p.cell_bias), c)


def torch_layer_norm(p: Any, state: Any, xs: Any) -> Any:
    """PyTorch's layer normalisation, before and after the nonlinear part of its lstm cell."""
    import torch
    from torch.nn.functional import layer_norm

    states = []
    for x in xs:
        wide = [(4 * len(state.h),), (len(state.h),)]
        a = layer_norm(p.recurrent @ state.h, wide[0], p.recurrent_gain) + p.bias
        a = a + layer_norm(p.input @ x, wide[0], p.input_gain)
        i, f, g, o = a.chunk(4)
        c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(layer_norm(c, wide[1], p.cell_gain, p.cell_bias))
        state = type(state)(h, c)
        states.append(state)
    return bptt.cells.LSTMState(*map(torch.stack, zip(*states, strict=True)))


def peepholes(p: Any) -> dict[str, Any]:
    return in_order(p) | {"weight_ph": p.peephole}


def residual(p: Any) -> dict[str, Any]:
    return peepholes(p) | {"weight_proj": p.projection, "weight_res": p.shortcut}


def multiplicative(p: Any) -> dict[str, Any]:
    import torch

    return {
        "weight_hh": p.state_factor,
        "weight_mh": p.recurrent,
        "weight_ih": torch.cat([p.input_factor, p.input]),
        "bias_mh": p.bias,
    }


def memories(p: Any) -> dict[str, Any]:
    return in_order(p) | {"weight_mh": p.memory}


def torch_janet(p: Any, h: Any, xs: Any) -> Any:
    """Its h and c are one."""
    import torch
    import torchrecurrent

    cell = torchrecurrent.JANETCell(I, N, dtype=torch.float64)
    states = []
    for x in xs:
        h = torch.func.functional_call(cell, in_order(p), (x, (h, h)))[0]
        states.append(h)
    return torch.stack(states)


ORACLES = {
    "original_lstm": [restated(original_lstm), of_torchrecurrent("OriginalLSTMCell", in_order)],
    "coupled_lstm": [restated(coupled_lstm)],
    "wmc_lstm": [restated(wmc_lstm), of_torchrecurrent("WMCLSTMCell", memories)],
    "janet": [restated(janet), of_torch("torchrecurrent", torch_janet)],
    "peephole_lstm": [restated(peephole_lstm), of_torchrecurrent("PeepholeLSTMCell", peepholes)],
    "layer_norm_lstm": [
        restated(layer_norm_lstm),
        of_torch("torch", torch_layer_norm, note="its layer_norm, in the equations"),
    ],
    "residual_lstm": [restated(residual_lstm), of_torchrecurrent("ResLSTMCell", residual)],
    "multiplicative_lstm": [
        restated(multiplicative_lstm),
        of_torchrecurrent("MultiplicativeLSTMCell", multiplicative),
    ],
}
