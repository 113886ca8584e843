"""Jacobians of the cells with PyTorch: `torch.func.vmap` of `jacfwd` or `jacrev` of a step, over given states."""

from collections.abc import Callable
from typing import Any

import jax
import torch
from torch.func import jacfwd, jacrev, vmap
from torch.nn.functional import linear

from peers.torch_device import done, moved

THREADS = torch.get_num_threads()
MODES = {"jacfwd": jacfwd, "jacrev": jacrev}


def rnn(p: Any, h: Any, x: Any) -> Any:
    return torch.tanh(linear(h, p["recurrent"]) + linear(x, p["input"], p["bias"]))


def gru(p: Any, h: Any, x: Any) -> Any:
    r_h, z_h, n_h = linear(h, p["recurrent"]).chunk(3)
    r_x, z_x, n_x = linear(x, p["input"], p["bias"]).chunk(3)
    r, z = torch.sigmoid(r_h + r_x), torch.sigmoid(z_h + z_x)
    n = torch.tanh(n_x + r * (n_h + p["recurrent_bias"]))
    return (1 - z) * n + z * h


def lstm(p: Any, state: Any, x: Any) -> Any:
    h, c = state.chunk(2)
    i, f, g, o = (linear(h, p["recurrent"]) + linear(x, p["input"], p["bias"])).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.cat([torch.sigmoid(o) * torch.tanh(c), c])


STEPS = {"rnn": rnn, "gru": gru, "lstm": lstm}


def jacobians(
    cell: str, mode: str, params: Any, states: jax.Array, xs: jax.Array, threads: int = THREADS
) -> Callable[[], Any]:
    """``() -> [T, D, D]`` at the states (as vectors) from which each step starts."""
    weights = {name: moved(w) for name, w in params._asdict().items()}
    h, x = moved(states), moved(xs)
    of_all = vmap(MODES[mode](STEPS[cell], argnums=1), in_dims=(None, 0, 0))

    def run() -> Any:
        torch.set_num_threads(threads)
        with torch.no_grad():
            return done(of_all(weights, h, x))

    return run
