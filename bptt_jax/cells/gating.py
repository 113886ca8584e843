"""What gated cells share: gates in one matrix, and how they begin."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.gated import LSTMState
from bptt_jax.cells.initializers import Initializer, draw_weights
from bptt_jax.cells.weights import check_hidden_size, check_initializers, draw_gates
from bptt_jax.checks import check_floating, check_key, check_positive_int
from bptt_jax.step import Array, Cell, Step


class GatedParams(NamedTuple):
    """Parameters of most gated cells: ``recurrent [R N, N]``, ``input [G N, I]``, ``bias [B N]``.

    Blocks are stacked in the order that the cell says; where it says nothing else, R = G = B.
    """

    recurrent: Array
    input: Array
    bias: Array


def gated_cell(
    step: Step,
    hidden_size: int,
    dtype: Any,
    recurrent_init: Initializer,
    input_init: Initializer,
    blocks: tuple[int, int, int],
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Cell:
    """With `GatedParams` of so many blocks, and a state ``[N]``."""
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, blocks[0], dtype)
    check_initializers(recurrent_init, input_init)

    def init(key: Array, input_size: int) -> GatedParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_bias = jax.random.split(check_key("key", key), 3)
        return GatedParams(
            draw_gates("recurrent_init", recurrent_init, k_rec, blocks[0], n, n, dtype),
            draw_gates("input_init", input_init, k_in, blocks[1], n, fan_in, dtype),
            draw_weights("bias_init", bias_init, k_bias, (blocks[2], n), dtype).ravel(),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), step)


def with_cell(like: Cell) -> Callable[[], LSTMState]:
    """An initial state that has a cell beside what that of `like` is."""
    return lambda: LSTMState(like.initial_state(), like.initial_state())
