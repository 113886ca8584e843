"""Jacobians of the cells by their closed formulas, coded by hand for all states of a trajectory at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import sigmoid

import bptt_jax as bptt


def _before(h0: jax.Array, hs: jax.Array) -> jax.Array:
    return jnp.concatenate([h0[None], hs[:-1]])


def rnn(step: bptt.Step, p: Any, h0: jax.Array, xs: jax.Array) -> jax.Array:
    """``diag(1 - h_t^2) W``."""
    return (1 - bptt.unroll(step, p, h0, xs) ** 2)[:, :, None] * p.recurrent[None]


def gru(step: bptt.Step, p: Any, h0: jax.Array, xs: jax.Array) -> jax.Array:
    """``diag(z) + diag((h - n) z') W_z + diag((1 - z) n') (diag(r) W_n + diag(a r') W_r)``, a = W_n h + c_n."""
    h = _before(h0, bptt.unroll(step, p, h0, xs))
    r_h, z_h, n_h = jnp.split(h @ p.recurrent.T, 3, axis=-1)
    r_x, z_x, n_x = jnp.split(xs @ p.input.T + p.bias[None], 3, axis=-1)
    w_r, w_z, w_n = jnp.split(p.recurrent, 3)
    a = n_h + p.recurrent_bias[None]
    r, z = sigmoid(r_h + r_x), sigmoid(z_h + z_x)
    n = jnp.tanh(n_x + r * a)
    through_n = (1 - z) * (1 - n**2)
    return (
        z[:, :, None] * jnp.eye(h0.size)[None]
        + ((h - n) * z * (1 - z))[:, :, None] * w_z[None]
        + (through_n * r)[:, :, None] * w_n[None]
        + (through_n * a * r * (1 - r))[:, :, None] * w_r[None]
    )


def lstm(step: bptt.Step, p: Any, state0: Any, xs: jax.Array) -> jax.Array:
    """Rows of c: ``diag(g i') [W_i 0] + diag(c f') [W_f 0] + diag(i g') [W_g 0] + diag(f) [0 1]``.

    Rows of h: ``diag(tanh(c) o') [W_o 0] + diag(o tanh'(c))`` times those.
    """
    states = bptt.unroll(step, p, state0, xs)
    h, c = _before(state0.h, states.h), _before(state0.c, states.c)
    i, f, g, o = jnp.split(h @ p.recurrent.T + xs @ p.input.T + p.bias[None], 4, axis=-1)
    i, f, g, o = sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o)
    w_i, w_f, w_g, w_o = jnp.split(jnp.pad(p.recurrent, ((0, 0), (0, h.shape[1]))), 4)
    squashed = jnp.tanh(states.c)
    c_rows = (
        (g * i * (1 - i))[:, :, None] * w_i[None]
        + (c * f * (1 - f))[:, :, None] * w_f[None]
        + (i * (1 - g**2))[:, :, None] * w_g[None]
        + f[:, :, None] * jnp.eye(h.shape[1], 2 * h.shape[1], h.shape[1])[None]
    )
    through_o, through_c = squashed * o * (1 - o), o * (1 - squashed**2)
    h_rows = through_o[:, :, None] * w_o[None] + through_c[:, :, None] * c_rows
    return jnp.concatenate([h_rows, c_rows], axis=1)


JACOBIANS: dict[str, Callable[..., jax.Array]] = {"rnn": rnn, "gru": gru, "lstm": lstm}
