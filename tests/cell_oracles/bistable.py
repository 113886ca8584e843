"""Of the bistable cells."""

from typing import Any

import numpy as np

from cell_oracles import of_torchrecurrent, restated, sigmoid


def of_the_paper(p: Any, seen_by_a: Any, seen_by_c: Any, h: Any, x: Any) -> Any:
    """Vecoven et al. 2021, equations 3 to 7, with the biases of their code."""
    u_a, u_c, u = np.split(p.input, 3)
    b_a, b_c = np.split(p.bias, 2)
    a = 1 + np.tanh(u_a @ x + seen_by_a + b_a)
    c = sigmoid(u_c @ x + seen_by_c + b_c)
    return c * h + (1 - c) * np.tanh(u @ x + a * h)


def brc(p: Any, h: Any, x: Any) -> Any:
    w_a, w_c = np.split(p.recurrent, 2)
    return of_the_paper(p, w_a * h, w_c * h, h, x)


def nbrc(p: Any, h: Any, x: Any) -> Any:
    w_a, w_c = np.split(p.recurrent, 2)
    return of_the_paper(p, w_a @ h, w_c @ h, h, x)


def weights(p: Any) -> dict[str, Any]:
    return {
        "weight_hh": p.recurrent,
        "weight_ih": p.input,
        "bias_hh": p.bias,
    }


ORACLES = {
    "brc": [restated(brc), of_torchrecurrent("BRCell", weights)],
    "nbrc": [restated(nbrc), of_torchrecurrent("NBRCell", weights)],
}
