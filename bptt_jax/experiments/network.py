"""A recurrence with an affine readout: what a task is learned by."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.initializers import Initializer, check_initializer, drawn
from bptt_jax.experiments.tasks import Task
from bptt_jax.recurrence.unroll import final_state, unroll
from bptt_jax.step import Array, Cell, Loss, Params, PyTree, State

_lecun_normal = jax.nn.initializers.lecun_normal()


class Readout(NamedTuple):
    """``weights [O, N]``, ``bias [O]``."""

    weights: Array
    bias: Array


class NetworkParams(NamedTuple):
    """All that is trained."""

    cell: Params
    readout: Readout


class Network(NamedTuple):
    """Pure functions of `NetworkParams`, for one sequence.

    Attributes:
      cell: the recurrence.
      task: the task whose sizes it has.
      init: ``init(key) -> NetworkParams``.
      outputs: ``outputs(params, inputs) -> [T, O]``, or ``[1, O]`` where the task reads the last alone.
    """

    cell: Cell
    task: Task
    init: Callable[[Array], NetworkParams]
    outputs: Callable[[NetworkParams, PyTree], Array]

    def loss(self, params: NetworkParams, inputs: PyTree, target: Array) -> Array:
        """The task's loss on one sequence."""
        return self.task.loss(self.outputs(params, inputs), target)

    def loss_of_states(self, params: NetworkParams, target: Array) -> Loss:
        """The same loss as a function of the trajectory, as `bptt_jax.adjoints` and `gradient_flow` want it."""

        def loss(states: State) -> Array:
            read = states if self.task.reads == "all" else jax.tree.map(lambda a: a[-1:], states)
            return self.task.loss(jax.vmap(lambda h: apply_readout(params.readout, h))(read), target)

        return loss


def network(
    cell: Cell,
    task: Task,
    *,
    readout_init: Initializer = _lecun_normal,
    remat: bool | int = False,
) -> Network:
    """A cell with a readout of the right size for a task.

    The readout sees the first leaf of the state in the order of `jax.tree.leaves` (of a dict, the alphabetical),
    raveled, of complex numbers the real part: h of an LSTM, not c.
    Its bias starts at 0. The clip inside the backward pass goes in by
    ``cell._replace(step=bptt.clip_adjoints(cell.step, max_norm=...))``.

    Args:
      cell: any `Cell`.
      task: from `bptt_jax.experiments.tasks`, or one's own.
      readout_init: initialiser of the readout's weights, ``(key, (N, O), dtype)``.
      remat: as for `bptt_jax.unroll`: memory O(sqrt(T)) in the backward pass.

    Returns:
      A `Network`.

    Raises:
      TypeError: `cell` is no `Cell`, `task` no `Task`, or `readout_init` no function.
    """
    for name, value, kind in (("cell", cell, Cell), ("task", task, Task)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
    check_initializer("readout_init", readout_init)

    def init(key: Array) -> NetworkParams:
        k_cell, k_readout = jax.random.split(key)
        h = _read(cell.initial_state())
        weights = drawn("readout_init", readout_init, k_readout, (h.shape[0], task.output_size), h.dtype).T
        readout = Readout(weights, jnp.zeros(task.output_size, h.dtype))
        return NetworkParams(cell.init(k_cell, task.input_size), readout)

    def outputs(params: NetworkParams, inputs: PyTree) -> Array:
        h0 = cell.initial_state()
        if task.reads == "last":
            h = final_state(cell.step, params.cell, h0, inputs, remat=remat)
            return apply_readout(params.readout, h)[None]
        states = unroll(cell.step, params.cell, h0, inputs, remat=remat)
        return jax.vmap(lambda h: apply_readout(params.readout, h))(states)

    return Network(cell, task, init, outputs)


def apply_readout(readout: Readout, state: State) -> Array:
    """``weights @ h + bias`` with h the first leaf of the state."""
    return readout.weights @ _read(state) + readout.bias


def _read(state: State) -> Array:
    h = jax.tree.leaves(state)[0].ravel()
    return h.real if jnp.iscomplexobj(h) else h
