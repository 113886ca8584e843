"""Recurrent networks with Flax NNX: `nnx.RNN` over a cell, split, merged and jitted by JAX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from measure import compiled

from peers import AT_ONCE, TrainingStep

CELLS = {"rnn": nnx.SimpleCell, "gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell}


def training_step(cell: str, params: Any, xs: jax.Array) -> TrainingStep:
    size = params.recurrent.shape[1]
    module = CELLS[cell](xs.shape[-1], size, rngs=nnx.Rngs(0))
    module.dense_i.kernel[...] = params.input.T
    module.dense_h.kernel[...] = params.recurrent.T
    biased = module.dense_h if cell == "lstm" else module.dense_i
    biased.bias[...] = params.bias
    graph, weights, rest = nnx.split(nnx.RNN(module, unroll=AT_ONCE), nnx.Param, ...)

    def loss(weights: Any, rest: Any, xs: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graph, weights, rest, copy=True)(xs)))

    run, seconds = compiled(jax.value_and_grad(loss), weights, rest, xs)

    def as_ours(g: Any) -> Any:
        g = nnx.to_pure_dict(g)["cell"]
        bias = (g["dense_h"] if cell == "lstm" else g["dense_i"])["bias"]
        own = {"recurrent": g["dense_h"]["kernel"].T, "input": g["dense_i"]["kernel"].T, "bias": bias}
        return type(params)(**({"recurrent_bias": None} | own if cell == "gru" else own))  # NNX's GRU has no b_hn

    return TrainingStep(lambda: run(weights, rest, xs), as_ours, seconds)
