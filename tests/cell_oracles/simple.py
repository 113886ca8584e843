"""Of the simple cells, and of those made stable."""

import os
import sys
from functools import partial
from types import ModuleType
from typing import Any

import jax
import numpy as np

import bptt_jax as bptt
from cell_oracles import (
    I,
    N,
    Oracle,
    in_order,
    of_jax,
    of_keras,
    of_torch,
    of_torchrecurrent,
    restated,
    scanned,
    sigmoid,
)


def rnn(p: Any, h: Any, x: Any) -> Any:
    return np.tanh(p.recurrent @ h + p.input @ x + p.bias)


def leaky_rnn(p: Any, h: Any, x: Any) -> Any:
    """Yang et al. 2019 at alpha = dt / tau = 1 / 5, without noise."""
    return 0.8 * h + 0.2 * np.tanh(p.recurrent @ h + p.input @ x + p.bias)


def irnn(p: Any, h: Any, x: Any) -> Any:
    """Le et al. 2015."""
    return np.maximum(p.recurrent @ h + p.input @ x + p.bias, 0)


def indrnn(p: Any, h: Any, x: Any) -> Any:
    """Li et al. 2018, eq. 2."""
    return np.maximum(p.input @ x + p.recurrent * h + p.bias, 0)


def scrn(p: Any, state: Any, x: Any) -> Any:
    """Mikolov et al. 2014, section 3.2, at alpha = 0.95."""
    s = 0.05 * p.to_context @ x + 0.95 * state.s
    return type(state)(sigmoid(p.from_context @ s + p.input @ x + p.recurrent @ state.h), s)


def minimal_rnn(p: Any, h: Any, x: Any) -> Any:
    """Chen 2017, section 2."""
    z = np.tanh(p.input @ x + p.input_bias)
    u = sigmoid(p.recurrent @ h + p.latent @ z + p.bias)
    return u * h + (1 - u) * z


def fastrnn(p: Any, h: Any, x: Any) -> Any:
    """Kusupati et al. 2018, section 3.1."""
    candidate = np.tanh(p.input @ x + p.recurrent @ h + p.bias)
    return sigmoid(p.alpha) * candidate + sigmoid(p.beta) * h


def antisymmetric(p: Any, h: Any, x: Any) -> Any:
    """Chang et al. 2019 at epsilon = 0.1, gamma = 0.01."""
    kept = p.recurrent - p.recurrent.T - 0.01 * np.eye(N)
    return h + 0.1 * np.tanh(kept @ h + p.input @ x + p.bias)


def gated_antisymmetric(p: Any, h: Any, x: Any) -> Any:
    """Chang et al. 2019 at epsilon = 0.1, gamma = 0.01."""
    kept = p.recurrent - p.recurrent.T - 0.01 * np.eye(N)
    (v_z, v_h), (b_z, b_h) = np.split(p.input, 2), np.split(p.bias, 2)
    z = sigmoid(kept @ h + v_z @ x + b_z)
    return h + 0.1 * z * np.tanh(kept @ h + v_h @ x + b_h)


def lipschitz(p: Any, h: Any, x: Any) -> Any:
    """Erichson et al. 2021 at epsilon = 0.03, beta = 0.75, gamma = 0.001."""

    def made(m: Any) -> Any:
        return 0.25 * (m + m.T) + 0.75 * (m - m.T) - 0.001 * np.eye(N)

    a, w = made(p.linear), made(p.recurrent)
    return h + 0.03 * a @ h + 0.03 * np.tanh(w @ h + p.input @ x + p.bias)


def reservoirpy_leaky(leak: float, p: Any, h: Any, x: Any) -> Any:
    from reservoirpy.nodes import Reservoir

    peer = Reservoir(W=p.recurrent, Win=p.input, bias=p.bias, lr=leak)
    peer.initialize(x)
    return peer._step({"out": h}, x)["out"]


def torch_rnn(nonlinearity: str, p: Any, h: Any, xs: Any) -> Any:
    import torch

    zeros = torch.zeros_like(p.bias)
    run = getattr(torch, f"rnn_{nonlinearity}")
    given = [p.input, p.recurrent, p.bias, zeros]
    return run(xs[:, None], h[None, None], given, True, 1, 0.0, False, False, False)[0][:, 0]


def torchrecurrent_scrn(p: Any, state: Any, xs: Any) -> Any:
    """It feeds its readout ``tanh(U h + V s)`` back, where the paper has h: U = I, V = 0, and the tanh undone."""
    import torch
    import torchrecurrent as peers

    h, s = state
    eye, zeros = torch.eye(N, dtype=h.dtype), torch.zeros(N, N, dtype=h.dtype)
    nothing, cell = torch.zeros(2 * N, dtype=h.dtype), peers.SCRNCell(I, N)
    given = {
        "weight_ih": torch.cat([p.to_context, p.input]),
        "weight_hh": torch.cat([p.recurrent, eye]),
        "weight_ch": torch.cat([p.from_context, zeros]),
        "bias_ih": nothing,
        "bias_hh": nothing,
        "bias_ch": nothing,
        "alpha": torch.tensor(0.95, dtype=h.dtype),
    }
    states = []
    for x in xs:
        y, s = torch.func.functional_call(cell, given, (x, (h, s)))
        h = torch.atanh(y)
        states.append((h, s))
    return type(state)(*map(torch.stack, zip(*states, strict=True)))


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


def edgeml_fastrnn(p: Any, h: Any, xs: Any) -> Any:
    """The authors' own; its kernel for GPUs is not needed."""
    import torch

    sys.modules.setdefault("fastgrnn_cuda", ModuleType("fastgrnn_cuda"))
    from edgeml_pytorch.graph.rnn import FastRNNCell

    given = {
        "W": p.input.T,
        "U": p.recurrent.T,
        "bias_update": p.bias[None],
        "alpha": p.alpha.reshape(1, 1),
        "beta": p.beta.reshape(1, 1),
    }
    cell, h, states = FastRNNCell(I, N).double(), h[None], []
    for x in xs:
        h = torch.func.functional_call(cell, given, (x[None], h))
        states.append(h[0])
    return torch.stack(states)


def rnn_jax_lipschitz(p: Any, h: Any, xs: Any) -> Any:
    """The module alone: the package around it wants Python 3.12."""
    import equinox as eqx
    import rnn_jax

    package = ModuleType("rnn_jax.cells")
    package.__path__ = [f"{rnn_jax.__path__[0]}/cells"]
    sys.modules.setdefault("rnn_jax.cells", package)
    from rnn_jax.cells.lipschitz import LipschitzRNNCell

    cell = eqx.filter_eval_shape(LipschitzRNNCell, I, N, 0.75, 0.0, 0.75, 0.0, 0.03, 1.0, key=jax.random.key(0))
    given = p.linear, p.recurrent, p.input, p.bias
    cell = eqx.tree_at(lambda c: (c.M_a, c.M_w, c.W_in, c.b), cell, given)

    def step(h: Any, x: Any) -> Any:
        drive = cell(x, (h, h))[0][1]
        return cell(x, (h, drive))[1]

    return scanned(step)(h, xs)


def stepped() -> dict[str, Any]:
    return {"epsilon": 0.1, "gamma": 0.01}


ORACLES = {
    "rnn": [
        restated(rnn),
        of_torch("torch", partial(torch_rnn, "tanh")),
        of_jax("flax", linen_rnn),
        of_jax("dm-haiku", haiku_rnn, make=relu_rnn, note="its activation is ReLU"),
        of_jax("keras", keras_rnn, tolerance=1e-5),
    ],
    "leaky_rnn": [restated(leaky_rnn), Oracle("reservoirpy", "numpy", partial(reservoirpy_leaky, 0.2))],
    "irnn": [restated(irnn), of_torch("torch", partial(torch_rnn, "relu"))],
    "indrnn": [
        restated(indrnn),
        of_torchrecurrent(
            "IndRNNCell",
            lambda p: {"vector_u": p.recurrent, "weight_ih": p.input, "bias_ih": p.bias},
            lambda: {"nonlinearity": "relu"},
        ),
    ],
    "scrn": [
        restated(scrn),
        of_torch(
            "torchrecurrent",
            torchrecurrent_scrn,
            note="feeds its readout back, where the paper has the hidden units; undone by weights and an atanh",
        ),
    ],
    "minimal_rnn": [
        restated(minimal_rnn),
        of_torchrecurrent(
            "MinimalRNNCell",
            lambda p: {
                "weight_hh": p.recurrent,
                "weight_mm": p.latent,
                "bias_hh": p.bias,
                "weight_ih": p.input,
                "bias_ih": p.input_bias,
            },
        ),
    ],
    "fastrnn": [
        restated(fastrnn),
        of_torchrecurrent(
            "FastRNNCell",
            lambda p: in_order(p) | {"alpha": p.alpha, "beta": p.beta},
            note="starts with alpha = 3, beta = -3; the authors' code with the opposite",
        ),
        of_torch("edgeml-pytorch", edgeml_fastrnn),
    ],
    "antisymmetric": [restated(antisymmetric), of_torchrecurrent("AntisymmetricRNNCell", in_order, stepped)],
    "gated_antisymmetric": [
        restated(gated_antisymmetric),
        of_torchrecurrent(
            "GatedAntisymmetricRNNCell",
            in_order,
            stepped,
            note="its recurrent bias is in the candidate alone, against its docstring; here it is zero",
        ),
    ],
    "lipschitz": [
        restated(lipschitz),
        of_jax(
            "rnn-jax",
            rnn_jax_lipschitz,
            make=partial(bptt.cells.lipschitz, gamma=0.0),
            note="takes the tanh of the step before, and gamma for gamma h; called twice, with gamma = 0",
        ),
    ],
}
