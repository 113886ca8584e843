"""Of the variants of the gated recurrent unit."""

from typing import Any

import jax
import numpy as np

from cell_oracles import I, N, exchanged, in_order, of_jax, of_torch, of_torchrecurrent, restated, sigmoid


def mgu(p: Any, h: Any, x: Any) -> Any:
    """Zhou et al. 2016."""
    w_f, w_n = np.split(p.recurrent, 2)
    u_f, u_n = np.split(p.input, 2)
    b_f, b_n = np.split(p.bias, 2)
    f = sigmoid(w_f @ h + u_f @ x + b_f)
    n = np.tanh(w_n @ (f * h) + u_n @ x + b_n)
    return (1 - f) * h + f * n


def ugrnn(p: Any, h: Any, x: Any) -> Any:
    """Collins et al. 2017."""
    w_g, w_c = np.split(p.recurrent, 2)
    u_g, u_c = np.split(p.input, 2)
    b_g, b_c = np.split(p.bias, 2)
    g = sigmoid(w_g @ h + u_g @ x + b_g)
    c = np.tanh(w_c @ h + u_c @ x + b_c)
    return g * h + (1 - g) * c


def li_gru(p: Any, h: Any, x: Any) -> Any:
    """Ravanelli et al. 2018, its normalisation taken in by U and b."""
    w_z, w_n = np.split(p.recurrent, 2)
    u_z, u_n = np.split(p.input, 2)
    b_z, b_n = np.split(p.bias, 2)
    z = sigmoid(w_z @ h + u_z @ x + b_z)
    return z * h + (1 - z) * np.maximum(w_n @ h + u_n @ x + b_n, 0)


def fastgrnn(p: Any, h: Any, x: Any) -> Any:
    """Kusupati et al. 2018."""
    b_z, b_n = np.split(p.bias, 2)
    z = sigmoid(p.recurrent @ h + p.input @ x + b_z)
    n = np.tanh(p.recurrent @ h + p.input @ x + b_n)
    return (sigmoid(p.zeta) * (1 - z) + sigmoid(p.nu)) * n + z * h


def theano_hard_sigmoid(a: Any) -> Any:
    return np.minimum(np.maximum(a / 5 + 1 / 2, 0), 1)


def sgu(p: Any, h: Any, x: Any) -> Any:
    """Gao and Glowacka 2016."""
    w_g, w_z = np.split(p.recurrent, 2)
    u_g, u_z = np.split(p.input, 2)
    b_g, b_z = np.split(p.bias, 2)
    g = np.tanh(w_g @ ((u_g @ x + b_g) * h))
    z = theano_hard_sigmoid(u_z @ x + b_z + w_z @ h)
    return (1 - z) * h + z * np.log1p(np.exp(g * h))


def dsgu(p: Any, h: Any, x: Any) -> Any:
    """Gao and Glowacka 2016."""
    w_g, w_o, w_z = np.split(p.recurrent, 3)
    u_g, u_z = np.split(p.input, 2)
    b_g, b_z = np.split(p.bias, 2)
    g = np.tanh(w_g @ ((u_g @ x + b_g) * h))
    z = theano_hard_sigmoid(u_z @ x + b_z + w_z @ h)
    return (1 - z) * h + z * sigmoid(w_o @ (g * h))


def intersection_rnn(p: Any, state: Any, x: Any) -> Any:
    """Collins et al. 2017, on projected inputs."""
    h, x = state.h, p.projection @ x + p.projection_bias
    w_v, w_n, w_y, w_h = np.split(p.recurrent, 4)
    u_v, u_n, u_y, u_h = np.split(p.input, 4)
    b_v, b_n, b_y, b_h = np.split(p.bias, 4)
    v = np.maximum(w_v @ h + u_v @ x + b_v, 0)
    n = np.tanh(w_n @ h + u_n @ x + b_n)
    g_y = sigmoid(w_y @ h + u_y @ x + b_y)
    g_h = sigmoid(w_h @ h + u_h @ x + b_h)
    return type(state)(g_y * x + (1 - g_y) * v, g_h * h + (1 - g_h) * n)


def torch_intersection_rnn(p: Any, state: Any, xs: Any) -> Any:
    import torch
    import torchrecurrent

    cell = torchrecurrent.IntersectionRNNCell(N, N, dtype=torch.float64)
    weights = in_order(p) | {"bias_hh": 0 * p.bias}
    ys, hs, h = [], [], state.h
    for x in xs:
        y, h = torch.func.functional_call(cell, weights, (p.projection @ x + p.projection_bias, h))
        ys.append(y)
        hs.append(h)
    return type(state)(torch.stack(ys), torch.stack(hs))


def torch_hard_sigmoid() -> dict[str, Any]:
    import torch

    class Theanos(torch.nn.Module):
        def forward(self, a: Any) -> Any:
            return (a / 5 + 1 / 2).clamp(0, 1)

    return {"gate_nonlinearity": Theanos()}


def memax_mgu(p: Any, h: Any, xs: Any) -> Any:
    import equinox as eqx
    from memax.equinox.set_actions.mgu import MGUSetAction

    # Its inputs are as wide as its state.
    cell = eqx.filter_eval_shape(MGUSetAction, N, jax.random.key(0))
    (w_f, w_n), (u_f, u_n), (b_f, b_n) = (jax.numpy.split(a, 2) for a in p)
    cell = eqx.tree_at(
        lambda c: (c.U_f.weight, c.U_h.weight, c.W_f.weight, c.W_h.weight, c.W_f.bias, c.W_h.bias),
        cell,
        (w_f, w_n, *(jax.numpy.pad(u, ((0, 0), (0, N - I))) for u in (u_f, u_n)), b_f, b_n),
    )
    return jax.lax.scan(lambda h, x: (new := cell(h, jax.numpy.pad(x, (0, N - I))), new), h, xs)[1]


def fastgrnn_weights(p: Any) -> dict[str, Any]:
    return in_order(p) | {"zeta": p.zeta, "nu": p.nu}


def dsgu_weights(p: Any) -> dict[str, Any]:
    import torch

    w_g, w_o, w_z = p.recurrent.split(N)
    return in_order(p) | {"weight_hh": torch.cat([w_g, w_z]), "weight_ho": w_o}


ORACLES = {
    "mgu": [restated(mgu), of_torchrecurrent("MGUCell", in_order), of_jax("memax", memax_mgu)],
    "ugrnn": [restated(ugrnn), of_torchrecurrent("UGRNNCell", exchanged)],
    "li_gru": [restated(li_gru), of_torchrecurrent("LiGRUCell", in_order)],
    "fastgrnn": [
        restated(fastgrnn),
        of_torchrecurrent(
            "FastGRNNCell",
            fastgrnn_weights,
            lambda: {"nonlinearity": "sigmoid"},
            note="its gate is a tanh by default; told to be a sigmoid, as in its docstring and the paper",
        ),
    ],
    "sgu": [
        restated(sgu),
        of_torchrecurrent(
            "SGUCell", in_order, torch_hard_sigmoid, note="its hard sigmoid has slope 1/6; given Theano's, 1/5"
        ),
    ],
    "dsgu": [
        restated(dsgu),
        of_torchrecurrent(
            "DSGUCell", dsgu_weights, torch_hard_sigmoid, note="its hard sigmoid has slope 1/6; given Theano's, 1/5"
        ),
    ],
    "intersection_rnn": [restated(intersection_rnn, seed=1), of_torch("torchrecurrent", torch_intersection_rnn)],
}
