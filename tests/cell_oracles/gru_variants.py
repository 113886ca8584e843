"""Of the variants of the gated recurrent unit."""

from typing import Any

import jax
import numpy as np

from cell_oracles import I, N, in_order, of_jax, of_torch, of_torchrecurrent, restated, sigmoid


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


def atr(p: Any, h: Any, x: Any) -> Any:
    """Zhang et al. 2018, with a bias."""
    given, held = p.input @ x + p.bias, p.recurrent @ h
    return sigmoid(given + held) * given + sigmoid(given - held) * h


def ran(p: Any, state: Any, x: Any) -> Any:
    """Lee et al. 2017, with tanh."""
    h, c = state
    w_i, w_f = np.split(p.recurrent, 2)
    u_i, u_f, u_c = np.split(p.input, 3)
    b_i, b_f = np.split(p.bias, 2)
    i = sigmoid(w_i @ h + u_i @ x + b_i)
    f = sigmoid(w_f @ h + u_f @ x + b_f)
    c = i * (u_c @ x) + f * c
    return type(state)(np.tanh(c), c)


def cfn(p: Any, h: Any, x: Any) -> Any:
    """Laurent and von Brecht 2017."""
    w_theta, w_eta = np.split(p.recurrent, 2)
    u_theta, u_eta, u_h = np.split(p.input, 3)
    b_theta, b_eta = np.split(p.bias, 2)
    theta = sigmoid(w_theta @ h + u_theta @ x + b_theta)
    eta = sigmoid(w_eta @ h + u_eta @ x + b_eta)
    return theta * np.tanh(h) + eta * np.tanh(u_h @ x)


def star(p: Any, h: Any, x: Any) -> Any:
    """Turkoglu et al. 2019."""
    u_k, u_z = np.split(p.input, 2)
    b_k, b_z = np.split(p.bias, 2)
    k = sigmoid(p.recurrent @ h + u_k @ x + b_k)
    return np.tanh((1 - k) * h + k * np.tanh(u_z @ x + b_z))


def light_ru(p: Any, h: Any, x: Any) -> Any:
    """Ye et al. 2024."""
    u_f, u_n = np.split(p.input, 2)
    f = sigmoid(p.recurrent @ h + u_f @ x + p.bias)
    return (1 - f) * h + f * np.tanh(u_n @ x)


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


def mut1(p: Any, h: Any, x: Any) -> Any:
    """Jozefowicz et al. 2015, with weights of the input everywhere."""
    w_r, w_n = np.split(p.recurrent, 2)
    u_z, u_r, u_n = np.split(p.input, 3)
    b_z, b_r, b_n = np.split(p.bias, 3)
    z = sigmoid(u_z @ x + b_z)
    r = sigmoid(u_r @ x + w_r @ h + b_r)
    return np.tanh(w_n @ (r * h) + np.tanh(u_n @ x) + b_n) * z + h * (1 - z)


def mut2(p: Any, h: Any, x: Any) -> Any:
    """Jozefowicz et al. 2015, with weights of the input everywhere."""
    w_z, w_r, w_n = np.split(p.recurrent, 3)
    u_z, u_r, u_n = np.split(p.input, 3)
    b_z, b_r, b_n = np.split(p.bias, 3)
    z = sigmoid(u_z @ x + w_z @ h + b_z)
    r = sigmoid(u_r @ x + w_r @ h + b_r)
    return np.tanh(w_n @ (r * h) + u_n @ x + b_n) * z + h * (1 - z)


def mut3(p: Any, h: Any, x: Any) -> Any:
    """Jozefowicz et al. 2015."""
    w_z, w_r, w_n = np.split(p.recurrent, 3)
    u_z, u_r, u_n = np.split(p.input, 3)
    b_z, b_r, b_n = np.split(p.bias, 3)
    z = sigmoid(u_z @ x + w_z @ np.tanh(h) + b_z)
    r = sigmoid(u_r @ x + w_r @ h + b_r)
    return np.tanh(w_n @ (r * h) + u_n @ x + b_n) * z + h * (1 - z)


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


def exchanged(p: Any) -> dict[str, Any]:
    """Of two gates, which it has the other way round."""
    return {"weight_hh": p.recurrent.roll(N, 0), "weight_ih": p.input.roll(N, 0), "bias_ih": p.bias.roll(N)}


def recurrent_biases(p: Any) -> dict[str, Any]:
    return {"weight_hh": p.recurrent, "weight_ih": p.input, "bias_hh": p.bias}


def ran_weights(p: Any) -> dict[str, Any]:
    return in_order(p) | {"weight_ih": p.input.roll(N, 0)}


def light_ru_weights(p: Any) -> dict[str, Any]:
    return recurrent_biases(p) | {"weight_ih": p.input.roll(N, 0)}


def fastgrnn_weights(p: Any) -> dict[str, Any]:
    return in_order(p) | {"zeta": p.zeta, "nu": p.nu}


def mut1_weights(p: Any) -> dict[str, Any]:
    """Of its biases of the candidate, the one beside the input stands inside the inner tanh."""
    import torch

    b_z, b_r, b_n = p.bias.split(N)
    zeros = torch.zeros_like(b_n)
    return in_order(p) | {"bias_ih": torch.cat([b_z, b_r, zeros]), "bias_hh": torch.cat([zeros, b_n])}


def dsgu_weights(p: Any) -> dict[str, Any]:
    import torch

    w_g, w_o, w_z = p.recurrent.split(N)
    return in_order(p) | {"weight_hh": torch.cat([w_g, w_z]), "weight_ho": w_o}


ORACLES = {
    "mgu": [restated(mgu), of_torchrecurrent("MGUCell", in_order), of_jax("memax", memax_mgu)],
    "ugrnn": [restated(ugrnn), of_torchrecurrent("UGRNNCell", exchanged)],
    "atr": [restated(atr), of_torchrecurrent("ATRCell", in_order)],
    "ran": [
        restated(ran),
        of_torchrecurrent("RANCell", ran_weights, note="its docstring gives the content a bias, its code none"),
    ],
    "cfn": [
        restated(cfn),
        of_torchrecurrent(
            "CFNCell", recurrent_biases, note="it has a bias inside the tanh of the input too; 0 here"
        ),
    ],
    "star": [restated(star), of_torchrecurrent("STARCell", exchanged)],
    "light_ru": [
        restated(light_ru),
        of_torchrecurrent("LightRUCell", light_ru_weights, note="it has a bias of the candidate too; 0 here"),
    ],
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
    "mut1": [
        restated(mut1),
        of_torchrecurrent("MUT1Cell", mut1_weights, note="it has a bias inside the inner tanh too; 0 here"),
    ],
    "mut2": [restated(mut2), of_torchrecurrent("MUT2Cell", in_order)],
    "mut3": [
        restated(mut3),
        of_torchrecurrent(
            "MUT3Cell", in_order, note="its docstring has MUT2's gates, its code the paper's, with tanh(h)"
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
