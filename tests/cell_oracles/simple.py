"""Of the simple cells."""

import os
from typing import Any

import jax
import numpy as np

import bptt_jax as bptt
from cell_oracles import N, of_jax, of_keras, of_torch, restated, scanned


def rnn(p: Any, h: Any, x: Any) -> Any:
    return np.tanh(p.recurrent @ h + p.input @ x + p.bias)


def leaky_rnn(p: Any, h: Any, x: Any) -> Any:
    """Yang et al. 2019 at alpha = dt / tau = 1 / 5, without noise."""
    return 0.8 * h + 0.2 * np.tanh(p.recurrent @ h + p.input @ x + p.bias)


def torch_rnn(p: Any, h: Any, xs: Any) -> Any:
    import torch

    zeros = torch.zeros_like(p.bias)
    given = [p.input, p.recurrent, p.bias, zeros]
    return torch.rnn_tanh(xs[:, None], h[None, None], given, True, 1, 0.0, False, False, False)[0][:, 0]


def linen_rnn(p: Any, h: Any, xs: Any) -> Any:
    from flax import linen

    given = {"params": {"i": {"kernel": p.input.T, "bias": p.bias}, "h": {"kernel": p.recurrent.T}}}
    return scanned(lambda h, x: linen.SimpleCell(N).apply(given, h, x)[0])(h, xs)


def haiku_rnn(p: Any, h: Any, xs: Any) -> Any:
    import haiku as hk

    core = hk.without_apply_rng(hk.transform(lambda x, h: hk.VanillaRNN(N, double_bias=False)(x, h)[1]))
    given = {
        "vanilla_rnn/linear": {"w": p.input.T, "b": p.bias},
        "vanilla_rnn/linear_1": {"w": p.recurrent.T},
    }
    return scanned(lambda h, x: core.apply(given, x, h))(h, xs)


def keras_rnn(p: Any, h: Any, xs: Any) -> Any:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    weights = [p.input.T, p.recurrent.T, p.bias]
    return of_keras(keras.layers.SimpleRNNCell(N), weights, [h], xs)[0]


def relu_rnn(n: int, dtype: Any) -> bptt.Cell:
    return bptt.rnn(n, activation=jax.nn.relu, dtype=dtype)


ORACLES = {
    "rnn": [
        restated(rnn),
        of_torch("torch", torch_rnn),
        of_jax("flax", linen_rnn),
        of_jax("dm-haiku", haiku_rnn, make=relu_rnn, note="its activation is ReLU"),
        of_jax("keras", keras_rnn, tolerance=1e-5),
    ],
    "leaky_rnn": [restated(leaky_rnn)],
}
