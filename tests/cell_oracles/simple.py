"""Of the simple cells."""

from typing import Any

import numpy as np

from cell_oracles import of_torch, restated


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


ORACLES = {
    "rnn": [restated(rnn), of_torch("torch", torch_rnn)],
    "leaky_rnn": [restated(leaky_rnn)],
}
