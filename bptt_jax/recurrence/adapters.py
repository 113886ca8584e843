"""Cells of other libraries as steps."""

from collections.abc import Callable
from typing import Any

import equinox as eqx

from bptt_jax.step import Input, Params, State, Step


def from_equinox(cell: Callable[[Input, State], State]) -> tuple[Step, Params]:
    """An Equinox cell as a step.

    Args:
      cell: any module called as ``cell(x, h) -> h``: `equinox.nn.GRUCell`, `equinox.nn.LSTMCell` (whose state is
        ``(h, c)``), or one's own.

    Returns:
      ``(step, params)``: `params` is the module with everything but its floating arrays taken out, so
      ``equinox.apply_updates`` and Optax work on it; `step` puts the two together again.

    Raises:
      TypeError: `cell` is no callable `equinox.Module`.
    """
    if not (isinstance(cell, eqx.Module) and callable(cell)):
        raise TypeError(f"cell: expected an equinox.Module called as cell(x, h), got {type(cell).__name__}")
    params, static = eqx.partition(cell, eqx.is_inexact_array)

    def step(params: Params, h: State, x: Input) -> State:
        module: Any = eqx.combine(params, static)
        return module(x, h)

    return step, params
