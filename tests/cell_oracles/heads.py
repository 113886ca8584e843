"""What is shared by oracles of cells with matrices ``[heads, values, keys]`` for states.

Peers begin with keys and values. They have keys first in the state, and hand out the last.
"""

from functools import partial
from typing import Any

from cell_oracles import imported


def of_heads(make: Any) -> Any:
    """Two heads of two values and three keys."""
    return {"make": partial(make, heads=2, key_size=3)}


def projected(w: Any, xs: Any) -> Any:
    """``[T, H, ...]``, in PyTorch."""
    import torch

    return torch.einsum("h...i,ti->th...", w, xs)


def one_by_one(step: Any, s: Any, steps: int) -> Any:
    """Of all steps the state that a peer hands out as the last: ``step(t, S [1, H, K, V]) -> S``."""
    import torch

    s, states = s.mT[None], []
    for t in range(steps):
        s = step(slice(t, t + 1), s)
        states.append(s[0].mT)
    return torch.stack(states)


def fla(module: str, name: str) -> Any:
    return getattr(imported(f"fla.ops.{module}"), name)
