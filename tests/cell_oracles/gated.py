"""Of the gated cells."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax as bptt
from cell_oracles import I, N, of_jax, of_keras, of_torch, restated, scanned, sigmoid


def gru(p: Any, h: Any, x: Any) -> Any:
    """Cho et al. 2014 with the reset after the product, gate by gate."""
    w_r, w_z, w_n = np.split(p.recurrent, 3)
    u_r, u_z, u_n = np.split(p.input, 3)
    b_r, b_z, b_n = np.split(p.bias, 3)
    r = sigmoid(w_r @ h + u_r @ x + b_r)
    z = sigmoid(w_z @ h + u_z @ x + b_z)
    n = np.tanh(u_n @ x + b_n + r * (w_n @ h + p.recurrent_bias))
    return (1 - z) * n + z * h


def gru_reset_before(p: Any, h: Any, x: Any) -> Any:
    """Cho et al. 2014, equations 5 to 8, gate by gate."""
    w_r, w_z, w = np.split(p.recurrent, 3)
    u_r, u_z, u = np.split(p.input, 3)
    b_r, b_z, b = np.split(p.bias, 3)
    r = sigmoid(u_r @ x + w_r @ h + b_r)
    z = sigmoid(u_z @ x + w_z @ h + b_z)
    return z * h + (1 - z) * np.tanh(u @ x + w @ (r * h) + b)


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


def reset_before(n: int, dtype: Any) -> bptt.Cell:
    return bptt.gru(n, reset_after=False, dtype=dtype)


def reordered(rows: Any, *order: int) -> Any:
    """Gates in another order."""
    gates = jnp.split(rows, len(order))
    return jnp.concatenate([gates[k] for k in order])


def linen_gru(p: Any, h: Any, xs: Any) -> Any:
    from flax import linen

    gates = zip(*(jnp.split(a, 3) for a in p[:3]), ("r", "z", "n"), strict=True)
    given: Any = {}
    for w, u, b, gate in gates:
        given |= {f"h{gate}": {"kernel": w.T}, f"i{gate}": {"kernel": u.T, "bias": b}}
    given["hn"]["bias"] = p.recurrent_bias
    return scanned(lambda h, x: linen.GRUCell(N).apply({"params": given}, h, x)[0])(h, xs)


def haiku_gru(p: Any, h: Any, xs: Any) -> Any:
    """Whose z is 1 minus the paper's, the sigmoid of the negative."""
    import haiku as hk

    w, u, b = (reordered(a, 1, 0, 2).at[:N].multiply(-1) for a in p[:3])
    core = hk.without_apply_rng(hk.transform(lambda x, h: hk.GRU(N)(x, h)[1]))
    return scanned(lambda h, x: core.apply({"gru": {"w_i": u.T, "w_h": w.T, "b": b}}, x, h))(h, xs)


def keras_gru(p: Any, h: Any, xs: Any) -> Any:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    w, u, b = (reordered(a, 1, 0, 2) for a in p[:3])
    after = p.recurrent_bias is not None
    b = jnp.stack([b, jnp.concatenate([jnp.zeros(2 * N), p.recurrent_bias])]) if after else b
    cell = keras.layers.GRUCell(N, reset_after=after)
    return of_keras(cell, [u.T, w.T, b], [h], xs)[0]


def linen_lstm(p: Any, state: Any, xs: Any) -> Any:
    from flax import linen

    given: Any = {}
    for w, u, b, gate in zip(*(jnp.split(a, 4) for a in p), ("i", "f", "g", "o"), strict=True):
        given |= {f"h{gate}": {"kernel": w.T, "bias": b}, f"i{gate}": {"kernel": u.T}}
    cell = linen.OptimizedLSTMCell(N)
    c, h = scanned(lambda carry, x: cell.apply({"params": given}, carry, x)[0])((state.c, state.h), xs)
    return bptt.cells.LSTMState(h, c)


def haiku_lstm(p: Any, state: Any, xs: Any) -> Any:
    import haiku as hk

    w, u, b = (reordered(a, 0, 2, 1, 3) for a in p)
    linear = {"w": jnp.concatenate([u, w], 1).T, "b": b.at[2 * N : 3 * N].add(-1.0)}  # 1 is in its equations
    core = hk.without_apply_rng(hk.transform(lambda x, state: hk.LSTM(N)(x, state)[1]))
    states = scanned(lambda s, x: core.apply({"lstm/linear": linear}, x, s))(hk.LSTMState(*state), xs)
    return bptt.cells.LSTMState(states.hidden, states.cell)


def keras_lstm(p: Any, state: Any, xs: Any) -> Any:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    cell = keras.layers.LSTMCell(N)
    return bptt.cells.LSTMState(*of_keras(cell, [p.input.T, p.recurrent.T, p.bias], state, xs))


ORACLES = {
    "gru": [
        restated(gru),
        restated(gru_reset_before, make=reset_before, note="reset_after=False"),
        of_torch("torch", torch_gru),
        of_jax("equinox", equinox_gru),
        of_jax("flax", linen_gru),
        of_jax("keras", keras_gru, tolerance=1e-5),
        of_jax("keras", keras_gru, tolerance=1e-5, make=reset_before, note="reset_after=False"),
        of_jax("dm-haiku", haiku_gru, make=reset_before, note="reset_after=False"),
    ],
    "lstm": [
        restated(lstm),
        of_torch("torch", torch_lstm),
        of_jax("equinox", equinox_lstm),
        of_jax("flax", linen_lstm),
        of_jax("keras", keras_lstm, tolerance=1e-5),
        of_jax("dm-haiku", haiku_lstm),
    ],
}
