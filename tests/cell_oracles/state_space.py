"""Of the state-space models."""

import os
import sys
from contextlib import nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax as bptt
from cell_oracles import N, T, imported, in_double, of_jax, of_keras, of_torch, restated


def softplus(a: Any) -> Any:
    return np.log1p(np.exp(a))


def s4d(p: Any, h: Any, x: Any) -> Any:
    """Gu et al. 2022, section 3, by zero-order hold and with B = 1; feature by feature."""
    new = np.zeros_like(h)
    for feature, u in enumerate(p.input @ x):
        dt = np.exp(p.log_dt[feature])
        a = -np.exp(p.log_neg_re[feature]) + 1j * p.im[feature]
        a_bar = np.exp(dt * a)
        new[feature] = a_bar * h[feature] + (a_bar - 1) / a * u
    return new


def s4d_bilinear(p: Any, h: Any, x: Any) -> Any:
    new = np.zeros_like(h)
    for feature, u in enumerate(p.input @ x):
        half = np.exp(p.log_dt[feature]) / 2
        a = -np.exp(p.log_neg_re[feature]) + 1j * p.im[feature]
        new[feature] = ((1 + half * a) * h[feature] + 2 * half * u) / (1 - half * a)
    return new


def s5(p: Any, h: Any, x: Any) -> Any:
    """Smith et al. 2023, section 3, by zero-order hold."""
    lam, dt = p.re + 1j * p.im, np.exp(p.log_dt)
    a_bar = np.exp(lam * dt)
    return a_bar * h + (a_bar - 1) / lam * ((p.input_re + 1j * p.input_im) @ x)


def s5_pytorch(discretization: str, p: Any, h: Any, xs: Any) -> Any:
    import torch

    module = imported("s5.s5_model")

    class Step(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any, h: Any) -> Any:
            return self.model.forward_rnn(x, h)[1]

    inputs = xs.shape[1]
    vectors = torch.eye(N, dtype=torch.complex64)
    model = module.S5SSM(
        vectors[0], vectors, vectors, inputs, N, 0.001, 0.1, bcInit="dense", discretization=discretization
    )
    given = {
        "model.Lambda": torch.complex(p.re, p.im),
        "model.B": torch.stack([p.input_re, p.input_im], dim=-1),
        "model.log_step": p.log_dt,
    }
    given |= {f"model.{name}": 0 * getattr(model, name).to(h.dtype) for name in ("C", "D")}
    states = []
    with mock.patch.object(module, "as_complex", torch.view_as_complex):  # theirs goes to single precision
        for x in xs:
            h = torch.func.functional_call(Step(model), given, (x, h))
            states.append(h)
    return torch.stack(states)


def mamba(p: Any, h: Any, x: Any) -> Any:
    """Gu and Dao 2023, algorithm 2 and section 3.6, with B by Euler's rule, as in selective_scan_ref; by channels."""
    size = h.shape[1]
    u = p.input @ x
    down, b = p.select[:-size] @ u, p.select[-size:] @ u
    delta = softplus(p.dt @ down + p.dt_bias)
    new = np.zeros_like(h)
    for d in range(len(u)):
        new[d] = np.exp(delta[d] * -np.exp(p.a_log[d])) * h[d] + delta[d] * b * u[d]
    return new


def mambapy(p: Any, h: Any, xs: Any) -> Any:
    import torch
    from mambapy.mamba import MambaBlock, MambaConfig

    class Step(torch.nn.Module):
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.block = block

        def forward(self, u: Any, h: Any) -> Any:
            return self.block.ssm_step(u, h)[1]

    n, size = h.shape
    rank = p.dt.shape[1]
    block = MambaBlock(MambaConfig(d_model=n, n_layers=1, dt_rank=rank, d_state=size, expand_factor=1)).double()
    given = {
        "block.x_proj.weight": torch.cat([p.select, torch.zeros(size, n, dtype=h.dtype)]),  # C is a readout
        "block.dt_proj.weight": p.dt,
        "block.dt_proj.bias": p.dt_bias,
        "block.A_log": p.a_log,
    }
    states = []
    with in_double():
        for x in xs:
            h = torch.func.functional_call(Step(block), given, ((p.input @ x)[None], h[None]))[0]
            states.append(h)
    return torch.stack(states)


def mamba2(p: Any, h: Any, x: Any) -> Any:
    """Dao and Gu 2024, section 7, head by head."""
    heads = len(p.a_log)
    delta = softplus(p.dt @ x + p.dt_bias)
    b = p.key @ x
    new = []
    for head, u in enumerate(np.split(p.input @ x, heads)):
        new.append(np.exp(-delta[head] * np.exp(p.a_log[head])) * h[head] + np.outer(delta[head] * u, b))
    return np.stack(new)


def fla_mamba2(p: Any, h: Any, xs: Any) -> Any:
    """As gated linear attention: keys B, values Delta u, the gate of each head Delta A; one step at a time."""
    import torch

    run = imported("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
    heads, size = len(p.a_log), len(p.key)
    state, states = h.mT[None], []
    with in_double():
        for x in xs:
            delta = torch.nn.functional.softplus(p.dt @ x + p.dt_bias)
            values = delta[:, None] * (p.input @ x).reshape(heads, -1)
            keys = (p.key @ x).expand(heads, size)
            given = (a[None, None] for a in (keys, keys, values, -delta * p.a_log.exp()))
            _, state = run(*given, initial_state=state)
            states.append(state[0].mT)
    return torch.stack(states)


def lmu(order: int, theta: float, p: Any, state: Any, x: Any) -> Any:
    """Voelker et al. 2019, section 2; the matrix exponential by its series."""
    a, b = np.zeros((order, order)), np.zeros(order)
    for i in range(order):
        b[i] = (2 * i + 1) * (-1) ** i / theta
        for j in range(order):
            a[i, j] = (2 * i + 1) * (-1 if i < j else (-1) ** (i - j + 1)) / theta
    a_bar, integral, term = np.zeros((order, order)), np.zeros((order, order)), np.eye(order)
    for k in range(60):
        a_bar = a_bar + term
        integral = integral + term / (k + 1)
        term = term @ a / (k + 1)
    u = p.encode_input @ x + p.encode_hidden @ state.h + p.encode_memory @ state.m
    m = a_bar @ state.m + integral @ b * u
    return type(state)(np.tanh(p.input @ x + p.recurrent @ state.h + p.memory @ m), m)


def keras_lmu(order: int, theta: float, p: Any, state: Any, xs: Any) -> Any:
    """Its equations are in a dozen functions of TensorFlow, here those of JAX."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    module: Any = ModuleType("tensorflow")
    module.__version__ = "2.20.0"
    module.nest = SimpleNamespace(flatten=jax.tree.leaves)
    module.constant, module.reshape, module.pad = jnp.asarray, jnp.reshape, jnp.pad
    module.concat, module.expand_dims = jnp.concatenate, jnp.expand_dims
    module.matmul = lambda a, b, name="": a @ b
    module.linalg = SimpleNamespace(expm=jax.scipy.linalg.expm)
    module.name_scope = nullcontext
    with mock.patch.dict(sys.modules, tensorflow=module):
        layers = imported("keras_lmu.layers")
    hidden = keras.layers.SimpleRNNCell(N, use_bias=False)
    cell = layers.LMUCell(
        1, order, theta, hidden, hidden_to_memory=True, memory_to_memory=True, input_to_hidden=True
    )
    kernel = jnp.concatenate([p.encode_input, p.encode_hidden])[:, None]
    read = jnp.concatenate([p.memory, p.input], axis=1).T
    weights = [kernel, p.encode_memory[:, None], read, p.recurrent.T]
    m, h = of_keras(cell, weights, [state.m, state.h], xs)
    return type(state)(h, m)


bilinear_s4d = partial(bptt.cells.s4d, discretization="bilinear")
short_lmu = partial(bptt.cells.lmu, order=3, theta=float(T))

ORACLES = {
    "s4d": [restated(s4d), restated(s4d_bilinear, make=bilinear_s4d, note='discretization="bilinear"')],
    "s5": [
        restated(s5),
        of_torch("s5-pytorch", partial(s5_pytorch, "zoh")),
        of_torch(
            "s5-pytorch",
            partial(s5_pytorch, "bilinear"),
            make=partial(bptt.cells.s5, discretization="bilinear"),
            note='discretization="bilinear"',
        ),
    ],
    "mamba": [
        restated(mamba),
        of_torch("mambapy", mambapy),
    ],
    "mamba2": [
        restated(mamba2),
        of_torch("fla-core", fla_mamba2),
    ],
    "lmu": [
        restated(partial(lmu, 8, 100.0)),
        restated(partial(lmu, 3, float(T)), make=short_lmu, note="order=3, theta=5"),
        of_jax("keras-lmu", partial(keras_lmu, 8, 100.0), note="with JAX for TensorFlow", tolerance=1e-5),
    ],
}
