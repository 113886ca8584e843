"""Recurrent networks with Keras on its JAX backend: a layer, called without state inside `jax.jit`."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from measure import compiled

from peers import TrainingStep

os.environ["KERAS_BACKEND"] = "jax"
import keras

LAYERS = {"rnn": keras.layers.SimpleRNN, "gru": keras.layers.GRU, "lstm": keras.layers.LSTM}


def training_step(cell: str, params: Any, xs: jax.Array) -> TrainingStep:
    size = params.recurrent.shape[1]
    layer = LAYERS[cell](size, return_sequences=True)
    layer.build(xs.shape)

    def reordered(rows: jax.Array) -> jax.Array:
        """Gates z, r, h for r, z, n; its own inverse."""
        if cell != "gru":
            return rows
        r, z, n = jnp.split(rows, 3)
        return jnp.concatenate([z, r, n])

    recurrent, inward, bias = (reordered(a) for a in params[:3])
    if cell == "gru":
        bias = jnp.stack([bias, jnp.concatenate([jnp.zeros(2 * size), params.recurrent_bias])])
    layer.set_weights([inward.T, recurrent.T, bias])
    trainable = [v.value for v in layer.trainable_variables]
    rest = [v.value for v in layer.non_trainable_variables]

    def loss(trainable: Any, xs: jax.Array) -> jax.Array:
        outputs, _ = layer.stateless_call(trainable, rest, xs)
        return jnp.mean(jnp.square(outputs))

    run, seconds = compiled(jax.value_and_grad(loss), trainable, xs)

    def as_ours(g: Any) -> Any:
        inward, recurrent, bias = g
        if cell != "gru":
            return type(params)(recurrent.T, inward.T, bias)
        return type(params)(reordered(recurrent.T), reordered(inward.T), reordered(bias[0]), bias[1, 2 * size :])

    return TrainingStep(lambda: run(trainable, xs), as_ours, seconds)
