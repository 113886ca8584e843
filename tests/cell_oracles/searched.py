"""Of the cells that a search found."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from cell_oracles import N, gates, in_order, of_torchrecurrent, restated, sigmoid


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


def mut1_weights(p: Any) -> dict[str, Any]:
    """Of its biases of the candidate, the one beside the input stands inside the inner tanh."""
    import torch

    b_z, b_r, b_n = p.bias.split(N)
    zeros = torch.zeros_like(b_n)
    return in_order(p) | {"bias_ih": torch.cat([b_z, b_r, zeros]), "bias_hh": torch.cat([zeros, b_n])}


def nas(p: Any, state: Any, x: Any) -> Any:
    """TensorFlow's NASCell, node by node."""
    a = [w @ state.h + b for w, _, b in gates(p)]
    u = [u @ x for _, u, _ in gates(p)]

    def relu(v: Any) -> Any:
        return np.maximum(v, 0)

    first = [
        sigmoid(u[0] + a[0]),
        relu(u[1] + a[1]),
        sigmoid(u[2] + a[2]),
        relu(u[3] * a[3]),
        np.tanh(u[4] + a[4]),
        sigmoid(u[5] + a[5]),
        np.tanh(u[6] + a[6]),
        sigmoid(u[7] + a[7]),
    ]
    second = [
        np.tanh(first[0] * first[1]),
        np.tanh(first[2] + first[3]),
        np.tanh(first[4] * first[5]),
        sigmoid(first[6] + first[7]),
    ]
    c = np.tanh(second[0] + state.c) * second[1]
    return type(state)(np.tanh(c * np.tanh(second[2] + second[3])), c)


def without_the_product(p: Any) -> Any:
    """Node 3 of the first layer is dead, as a sum and as a product."""
    rows = slice(3 * N, 4 * N)
    return p._replace(input=p.input.at[rows].set(0), bias=p.bias.at[rows].set(jnp.full(N, -9, p.bias.dtype)))


ORACLES = {
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
    "nas": [
        restated(nas),
        of_torchrecurrent(
            "NASCell",
            in_order,
            prepare=without_the_product,
            note="has a sum where TensorFlow's cell has the product: without that node",
        ),
    ],
}
