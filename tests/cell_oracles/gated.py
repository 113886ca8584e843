"""Of the gated cells."""

from typing import Any

import jax
import numpy as np

import bptt_jax as bptt
from cell_oracles import I, N, of_jax, of_torch, restated


def sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def gru(p: Any, h: Any, x: Any) -> Any:
    """Cho et al. 2014 with the reset after the product, gate by gate."""
    w_r, w_z, w_n = np.split(p.recurrent, 3)
    u_r, u_z, u_n = np.split(p.input, 3)
    b_r, b_z, b_n = np.split(p.bias, 3)
    r = sigmoid(w_r @ h + u_r @ x + b_r)
    z = sigmoid(w_z @ h + u_z @ x + b_z)
    n = np.tanh(u_n @ x + b_n + r * (w_n @ h + p.recurrent_bias))
    return (1 - z) * n + z * h


def lstm(p: Any, state: Any, x: Any) -> Any:
    """Gers et al. 2000 without peepholes, gate by gate."""
    h, c = state
    i, f, g, o = np.split(p.recurrent @ h + p.input @ x + p.bias, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return type(state)(sigmoid(o) * np.tanh(c), c)


def torch_gru(p: Any, h: Any, xs: Any) -> Any:
    import torch

    zeros = torch.zeros(2 * len(p.recurrent_bias), dtype=h.dtype)
    given = [p.input, p.recurrent, p.bias, torch.cat([zeros, p.recurrent_bias])]
    return torch.gru(xs[:, None], h[None, None], given, True, 1, 0.0, False, False, False)[0][:, 0]


def torch_lstm(p: Any, state: Any, xs: Any) -> Any:
    import torch

    states = []
    for x in xs:
        state = torch.lstm_cell(x[None], [a[None] for a in state], p.input, p.recurrent, p.bias, 0 * p.bias)
        state = [a[0] for a in state]
        states.append(state)
    return bptt.cells.LSTMState(*map(torch.stack, zip(*states, strict=True)))


def equinox_gru(p: Any, h: Any, xs: Any) -> Any:
    import equinox as eqx

    cell = eqx.filter_eval_shape(eqx.nn.GRUCell, I, N, key=jax.random.key(0))
    cell = eqx.tree_at(lambda c: (c.weight_hh, c.weight_ih, c.bias, c.bias_n), cell, tuple(p))
    return jax.lax.scan(lambda h, x: (new := cell(x, h), new), h, xs)[1]


def equinox_lstm(p: Any, state: Any, xs: Any) -> Any:
    import equinox as eqx

    cell = eqx.filter_eval_shape(eqx.nn.LSTMCell, I, N, key=jax.random.key(0))
    cell = eqx.tree_at(lambda c: (c.weight_hh, c.weight_ih, c.bias), cell, tuple(p))
    return jax.lax.scan(lambda state, x: (new := bptt.cells.LSTMState(*cell(x, state)), new), state, xs)[1]


ORACLES = {
    "gru": [restated(gru), of_torch("torch", torch_gru), of_jax("equinox", equinox_gru)],
    "lstm": [restated(lstm), of_torch("torch", torch_lstm), of_jax("equinox", equinox_lstm)],
}
