"""Recurrent networks written by hand with `jax.lax.scan`: batched cells, kernels ``[in, out]``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import sigmoid
from measure import compiled

from peers import AT_ONCE, TrainingStep

Weights = dict[str, jax.Array]


def rnn_cell(w: Weights, h: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = jnp.tanh(a + h @ w["recurrent"])
    return h, h


def gru_cell(w: Weights, h: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    r_x, z_x, n_x = jnp.split(a, 3, axis=-1)
    r_h, z_h, n_h = jnp.split(h @ w["recurrent"], 3, axis=-1)
    r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
    n = jnp.tanh(n_x + r * (n_h + w["recurrent_bias"][None]))
    h = (1 - z) * n + z * h
    return h, h


def lstm_cell(w: Weights, state: Any, a: jax.Array) -> tuple[Any, jax.Array]:
    h, c = state
    i, f, g, o = jnp.split(a + h @ w["recurrent"], 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(c)
    return (h, c), h


CELLS: dict[str, Callable[..., Any]] = {"rnn": rnn_cell, "gru": gru_cell, "lstm": lstm_cell}


def training_step(cell: str, params: Any, xs: jax.Array, *, inputs_first: bool = False) -> TrainingStep:
    """With `inputs_first` the inputs of all steps are multiplied in one product before the loop."""
    weights = params._asdict() | {"input": params.input.T, "recurrent": params.recurrent.T}
    zeros = jnp.zeros((xs.shape[0], params.recurrent.shape[1]))
    h0 = (zeros, zeros) if cell == "lstm" else zeros

    def project(w: Weights, x: jax.Array) -> jax.Array:
        return jnp.add(x @ w["input"], w["bias"].reshape((1,) * (x.ndim - 1) + (-1,)))

    def loss(w: Weights, xs: jax.Array) -> jax.Array:
        def body(h: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            return CELLS[cell](w, h, x if inputs_first else project(w, x))

        time_first = jnp.swapaxes(xs, 0, 1)
        _, hs = jax.lax.scan(body, h0, project(w, time_first) if inputs_first else time_first, unroll=AT_ONCE)
        return jnp.mean(jnp.square(hs))

    run, seconds = compiled(jax.value_and_grad(loss), weights, xs)

    def as_ours(g: Weights) -> Any:
        return type(params)(**(g | {"input": g["input"].T, "recurrent": g["recurrent"].T}))

    return TrainingStep(lambda: run(weights, xs), as_ours, seconds)
