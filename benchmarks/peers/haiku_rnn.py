"""Recurrent networks with Haiku: `hk.dynamic_unroll` of a core.

Its simple RNN is one of ReLU, and its GRU resets before the product and exchanges z and 1 - z: for these our cell of
the same equations comes along as a step, so that the same work can be compared.
"""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from measure import compiled

import bptt_jax as bptt
from peers import AT_ONCE, TrainingStep


def core(cell: str, size: int) -> Any:
    if cell == "rnn":
        return hk.VanillaRNN(size, double_bias=False)
    return {"gru": hk.GRU, "lstm": hk.LSTM}[cell](size)


def training_step(cell: str, params: Any, xs: jax.Array) -> TrainingStep:
    size, inputs = params.input.shape[0] // {"rnn": 1, "gru": 3, "lstm": 4}[cell], xs.shape[-1]

    def forward(xs: jax.Array) -> jax.Array:
        network = core(cell, size)
        start = network.initial_state(xs.shape[0])
        return hk.dynamic_unroll(network, xs, start, time_major=False, unroll=AT_ONCE)[0]

    network = hk.without_apply_rng(hk.transform(forward))
    order = {"rnn": [0], "gru": [1, 0, 2], "lstm": [0, 2, 1, 3]}[cell]  # its gates, of ours; each its own inverse

    def reordered(rows: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.split(rows, len(order))[k] for k in order])

    def negated(rows: jax.Array) -> jax.Array:
        """The gru's gate z, whose sigmoid is then 1 - z."""
        return rows.at[:size].multiply(-1)

    recurrent, inward, bias = (reordered(a) for a in params[:3])
    if cell == "rnn":
        weights = {
            "vanilla_rnn/linear": {"w": inward.T, "b": bias},
            "vanilla_rnn/linear_1": {"w": recurrent.T},
        }
    elif cell == "gru":
        weights = {"gru": {"w_i": negated(inward).T, "w_h": negated(recurrent).T, "b": negated(bias)}}
    else:
        bias = bias.at[2 * size : 3 * size].add(-1.0)  # it adds 1 to the forget gate itself
        weights = {"lstm/linear": {"w": jnp.concatenate([inward, recurrent], 1).T, "b": bias}}

    def loss(weights: Any, xs: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(network.apply(weights, xs)))

    run, seconds = compiled(jax.value_and_grad(loss), weights, xs)

    def as_ours(g: Any) -> Any:
        if cell == "rnn":
            return type(params)(
                g["vanilla_rnn/linear_1"]["w"].T, g["vanilla_rnn/linear"]["w"].T, g["vanilla_rnn/linear"]["b"]
            )
        if cell == "gru":
            return type(params)(*(reordered(negated(g["gru"][k].T)) for k in ("w_h", "w_i", "b")), None)
        linear = g["lstm/linear"]
        return type(params)(*(reordered(a) for a in (linear["w"][inputs:].T, linear["w"][:inputs].T, linear["b"])))

    before = bptt.gru(size, reset_after=False).step
    step = {"rnn": bptt.rnn(size, activation=jax.nn.relu).step, "gru": before, "lstm": None}[cell]
    # Of ReLU the derivative jumps by 1 where rounding moves a number across zero.
    return TrainingStep(lambda: run(weights, xs), as_ours, seconds, step, 1e-2 if cell == "rnn" else 1e-4)
