"""Of the cells that are linear in their state, or nearly so."""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax as bptt
from cell_oracles import (
    I,
    N,
    T,
    imported,
    in_double,
    of_jax,
    of_torch,
    of_torchrecurrent,
    restated,
    scanned,
    sigmoid,
)


def lru(p: Any, h: Any, x: Any) -> Any:
    """Orvieto et al. 2023, eq. 7."""
    lam = np.exp(-np.exp(p.nu_log) + 1j * np.exp(p.theta_log))
    return lam * h + np.exp(p.gamma_log) * ((p.input_re + 1j * p.input_im) @ x)


def min_gru(p: Any, h: Any, x: Any) -> Any:
    """Feng et al. 2024, section 3.1, with biases."""
    w_z, w_h = np.split(p.input, 2)
    b_z, b_h = np.split(p.bias, 2)
    z = sigmoid(w_z @ x + b_z)
    return (1 - z) * h + z * (w_h @ x + b_h)


def min_lstm(p: Any, h: Any, x: Any) -> Any:
    """Feng et al. 2024, section 3.2.3."""
    w_f, w_i, w_h = np.split(p.input, 3)
    b_f, b_i, b_h = np.split(p.bias, 3)
    f, i = sigmoid(w_f @ x + b_f), sigmoid(w_i @ x + b_i)
    return f / (f + i) * h + i / (f + i) * (w_h @ x + b_h)


def sru(p: Any, c: Any, x: Any) -> Any:
    """Lei et al. 2018, eq. 1 and 2."""
    w_f, w = np.split(p.input, 2)
    f = sigmoid(w_f @ x + p.recurrent * c + p.bias)
    return f * c + (1 - f) * (w @ x)


def qrnn(p: Any, state: Any, x: Any) -> Any:
    """Bradbury et al. 2017, eq. 2 and 3."""
    v_f, v_z = np.split(p.past, 2)
    w_f, w_z = np.split(p.input, 2)
    b_f, b_z = np.split(p.bias, 2)
    past_f, past_z = np.split(state.past, 2)
    z = np.tanh(past_z + w_z @ x + b_z)
    f = sigmoid(past_f + w_f @ x + b_f)
    return bptt.cells.linear.QRNNState(f * state.h + (1 - f) * z, np.concatenate([v_f @ x, v_z @ x]))


def hgrn(p: Any, h: Any, x: Any) -> Any:
    """Qin et al. 2023, section 3, with gamma of the second of two layers."""
    gamma = np.exp(p.bound) / (1 + np.exp(p.bound))
    w_f, w_re, w_im = np.split(p.input, 3)
    b_f, b_re, b_im = np.split(p.bias, 3)
    f = gamma + (1 - gamma) * sigmoid(w_f @ x + b_f)
    re, im = w_re @ x + b_re, w_im @ x + b_im
    c = re * sigmoid(re) + 1j * im * sigmoid(im)
    return f * np.exp(1j * p.theta) * h + (1 - f) * c


def rg_lru(p: Any, h: Any, x: Any) -> Any:
    """De et al. 2024, eq. 1 to 4, with the sign of their appendix A."""
    w_a, w_i = np.split(p.gates, 2)
    b_a, b_i = np.split(p.bias, 2)
    u = p.input @ x
    r, i = sigmoid(w_a @ u + b_a), sigmoid(w_i @ u + b_i)
    a = sigmoid(-p.decay) ** (8 * r)
    return a * h + np.sqrt(1 - a**2) * (i * u)


def memax_lru(p: Any, h: Any, xs: Any) -> Any:
    import equinox as eqx

    module = imported("memax.equinox.semigroups.lru")
    names = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im")
    with jax.numpy_dtype_promotion("standard"):
        layer = module.LRU(recurrent_size=N, hidden_size=I, key=jax.random.key(0))
        layer = eqx.tree_at(lambda layer: [getattr(layer, name) for name in names], layer, list(p))
        algebra = module.LRUSemigroup(N)

        def step(h: Any, x: Any) -> Any:
            given, _ = layer.forward_map((x, jnp.array(False)))
            return algebra((jnp.ones_like(h), h), given)[1].astype(h.dtype)

        return scanned(step)(h, xs)


def strongly_typed(p: Any) -> dict[str, Any]:
    import torch

    (w_z, w_h), (b_z, b_h) = torch.chunk(p.input, 2), torch.chunk(p.bias, 2)
    return {"weight_ih": torch.cat([w_h, -w_z]), "bias_ih": torch.cat([b_h, -b_z])}


def keras_min_gru(p: Any, h: Any, xs: Any) -> Any:
    """What was in the state comes as a candidate before the sequence, let in as a whole."""
    os.environ["KERAS_BACKEND"] = "jax"
    from mingru_keras import MinGRU, core

    layer = MinGRU(N)
    layer.build((1, T, I))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        weights, bias, h, xs = (a.astype(jnp.float32) for a in (p.input, p.bias, h, xs))
        z, candidates = (
            dense.stateless_call([w.T, b], [], xs)[0]
            for dense, w, b in zip(
                (layer.gate, layer.candidate), jnp.split(weights, 2), jnp.split(bias, 2), strict=True
            )
        )
        z, candidates = jnp.concatenate([jnp.ones_like(h)[None], z]), jnp.concatenate([h[None], candidates])
        return core.Blellochs_method(candidates[None], z[None])[0, 1:].astype(jnp.float64)


def fla_hgrn(p: Any, h: Any, xs: Any) -> Any:
    """In a frame that turns by theta, real and imaginary part are two real recurrences. What was in the state comes as
    an input before the sequence."""
    import torch

    naive_recurrent_hgrn = imported("fla.ops.hgrn.naive").naive_recurrent_hgrn
    gate, re, im = (xs @ p.input.T + p.bias).tensor_split(3, dim=-1)
    gamma = torch.sigmoid(p.bound)
    f = gamma + (1 - gamma) * torch.sigmoid(gate)
    candidates = (1 - f) * torch.complex(torch.nn.functional.silu(re), torch.nn.functional.silu(im))
    angle = torch.arange(1, len(xs) + 1, dtype=p.theta.dtype)[:, None] * p.theta
    turn = torch.polar(torch.ones_like(angle), angle)
    inputs = torch.view_as_real(torch.cat([h[None], candidates / turn])).permute(2, 0, 1)
    log_gates = torch.cat([torch.zeros_like(f[:1]), f.log()]).expand(2, -1, -1)
    with in_double():
        found, _ = naive_recurrent_hgrn(inputs, log_gates)
    return torch.complex(*found[:, 1:]) * turn


def griffin(p: Any, h: Any, xs: Any) -> Any:
    import torch

    layers = recurrentgemma()
    n = len(p.decay)
    layer = layers.RGLRU(width=n, num_heads=1).to(p.decay.dtype)
    given = {"a_param": p.decay}
    for name, w, b in zip(("a_gate", "input_gate"), p.gates.tensor_split(2), p.bias.tensor_split(2), strict=True):
        given |= {f"{name}.w": w.T[None], f"{name}.b": b[None]}
    position = torch.arange(1, len(xs) + 1)[None]  # not from 0, where the released code has no square root
    return torch.func.functional_call(layer, given, ((xs @ p.input.T)[None], position, h[None]))[0][0]


def recurrentgemma() -> Any:
    """Its PyTorch layers alone, without what the package imports beside, and with sums in double precision."""
    import sys
    from importlib import metadata
    from types import ModuleType

    import torch

    folder = metadata.distribution("recurrentgemma").locate_file("recurrentgemma")
    for name, path in (("recurrentgemma", folder), ("recurrentgemma.torch", f"{folder}/torch")):
        if name not in sys.modules:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
    from recurrentgemma.torch import layers

    if not isinstance(layers.rnn_scan, partial):
        layers.rnn_scan = partial(layers.rnn_scan, acc_dtype=torch.float64)
    return layers


ORACLES = {
    "lru": [restated(lru), of_jax("memax", memax_lru, note="inputs in single precision alone", tolerance=1e-6)],
    "min_gru": [
        restated(min_gru),
        of_jax("mingru-keras", keras_min_gru, tolerance=1e-5),
        of_torchrecurrent(
            "TRNNCell",
            strongly_typed,
            note="the strongly typed network (Balduzzi and Ghifary 2016), which is this cell with 1 - z for its gate",
        ),
    ],
    "min_lstm": [restated(min_lstm)],
    "sru": [restated(sru)],
    "qrnn": [restated(qrnn)],
    "hgrn": [
        restated(hgrn),
        of_torch("fla-core", fla_hgrn, note="real"),
    ],
    "rg_lru": [
        restated(rg_lru),
        of_torch("recurrentgemma", griffin, note="without the square root at the beginning of a sequence"),
    ],
}
