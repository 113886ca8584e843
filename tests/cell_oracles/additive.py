"""Of the cells whose candidate is of the input alone."""

from typing import Any

import numpy as np

from cell_oracles import N, exchanged, in_order, of_torchrecurrent, restated, sigmoid


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


def recurrent_biases(p: Any) -> dict[str, Any]:
    return {"weight_hh": p.recurrent, "weight_ih": p.input, "bias_hh": p.bias}


def ran_weights(p: Any) -> dict[str, Any]:
    return in_order(p) | {"weight_ih": p.input.roll(N, 0)}


def light_ru_weights(p: Any) -> dict[str, Any]:
    return recurrent_biases(p) | {"weight_ih": p.input.roll(N, 0)}


ORACLES = {
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
}
