"""A recurrence with an affine readout: what a task is learned by."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from bptt_jax.cells.initializers import Initializer, check_initializer, draw_weights
from bptt_jax.checks import check_positive_int
from bptt_jax.experiments.tasks import Batch, Task
from bptt_jax.recurrence.unroll import final_state, unroll
from bptt_jax.remedies.regularizers import OmegaTerms, omega_terms
from bptt_jax.step import Array, Cell, Input, Params, PyTree, Sequence, State, choose
from bptt_jax.timeline import reset_at_the_end

_lecun_normal = jax.nn.initializers.lecun_normal()


class Readout(NamedTuple):
    """``weights [O, N]``, ``bias [O]``."""

    weights: Array
    bias: Array


class NetworkParams(NamedTuple):
    """All that is trained."""

    cell: Params
    readout: Readout


class LossArgs(NamedTuple):
    """What the loss of a trajectory is given beside the states; made by `Network.loss_args`.

    Attributes:
      readout: of the network.
      target: of the sequence.
      mask: ``[T]``, False in padding; None if there is none.
    """

    readout: Readout
    target: PyTree
    mask: Bool[Array, " T"] | None


class Network(NamedTuple):
    """Pure functions of `NetworkParams`, for one sequence: an array ``[T, I]``, or a `bptt_jax.Sequence` of it.

    Attributes:
      cell: the recurrence.
      task: the task whose sizes it has.
      init: ``init(key) -> NetworkParams``.
      outputs: ``outputs(params, inputs) -> [T, O]``, or ``[1, O]`` where the task reads the last alone.
      unroll: ``unroll(params, state, inputs) -> states``, leaves ``[T, ...]``, from any state.
    """

    cell: Cell
    task: Task
    init: Callable[[Array], NetworkParams]
    outputs: Callable[[NetworkParams, PyTree], Array]
    unroll: Callable[[NetworkParams, State, PyTree], State]

    def loss(self, params: NetworkParams, inputs: PyTree, target: PyTree) -> Float[Array, ""]:
        """The task's loss on one sequence."""
        return self.loss_and_error(params, inputs, target)[0]

    def loss_and_error(
        self, params: NetworkParams, inputs: PyTree, target: PyTree
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The task's loss and error on one sequence."""
        outputs, mask = self.outputs(params, inputs), _mask(inputs)
        return self.task.loss(outputs, target, mask), self.task.error(outputs, target, mask)

    def loss_args(self, params: NetworkParams, inputs: PyTree, target: PyTree) -> LossArgs:
        """The `args` of `loss_of_states`; of a batch too, with the axes ``LossArgs(None, 0, 0)`` for `jax.vmap`."""
        return LossArgs(params.readout, target, _mask(inputs))

    def loss_of_states(self, states: State, args: LossArgs) -> Float[Array, ""]:
        """The same loss of the trajectory, ``loss(states, args)`` as all of `bptt_jax` wants it.

        Example:
          >>> from bptt_jax.experiments.network import network
          >>> from bptt_jax.experiments.tasks import adding
          >>> net = network(bptt.rnn(4), adding(10))
          >>> params, h0 = net.init(jax.random.key(0)), net.cell.initial_state()
          >>> xs, target = (a[0] for a in net.task.sample(jax.random.key(1), 1))
          >>> args = net.loss_args(params, xs, target)
          >>> found = bptt.adjoints(net.cell.step, params.cell, h0, xs, net.loss_of_states, args=args)
          >>> found.args_grad.readout.weights.shape
          (1, 4)
        """
        read = states if self.task.reads == "all" else jax.tree.map(lambda a: a[-1:], states)
        outputs = jax.vmap(partial(apply_readout, args.readout))(read)
        return self.task.loss(outputs, args.target, args.mask)

    def carry_on(
        self, params: NetworkParams, state: State, inputs: PyTree, target: PyTree
    ) -> tuple[Float[Array, ""], State]:
        """The loss of a window of a stream, and the state after it, from which the next window goes on.

        Its gradient by `params` is that of truncated backpropagation through time, as long as `state` counts as
        constant, which what another call returned does. A reset begins from the cell's initial state, or from the
        `reset_state` of `inputs`; one in the padding at the end of the window is handed on, as that state.

        Example:
          >>> from bptt_jax.experiments.network import network
          >>> from bptt_jax.experiments.tasks import delayed_copy
          >>> net = network(bptt.rnn(4), delayed_copy(3))
          >>> params, state = net.init(jax.random.key(0)), net.cell.initial_state()
          >>> gradient = jax.grad(net.carry_on, has_aux=True)
          >>> for start in (0, 10, 20):
          ...     window = net.task.stream(jax.random.key(1), start, 10)
          ...     of_window, state = gradient(params, state, *window)
        """
        if isinstance(inputs, Sequence) and inputs.resets is not None and inputs.reset_state is None:
            inputs = replace(inputs, reset_state=self.cell.initial_state())
        states = self.unroll(params, state, inputs)
        loss = self.loss_of_states(states, self.loss_args(params, inputs, target))
        last = jax.tree.map(lambda a: a[-1], states)
        if isinstance(inputs, Sequence) and inputs.resets is not None and inputs.mask is not None:
            last = choose(reset_at_the_end(inputs.resets, inputs.mask), inputs.reset_state, last)
        return loss, last

    def omega_terms(self, params: NetworkParams, batch: Batch) -> OmegaTerms:
        """`bptt_jax.remedies.omega_terms` of every sequence of a batch; `omega_penalty` makes a penalty of them.

        The step must be the bare one: a step wrapped by `bptt_jax.remedies.clip_adjoints` has no Jacobians of its
        own. The backward pass keeps O(T), whether or not the network is rematerialised.
        """

        def terms(inputs: PyTree, target: PyTree) -> OmegaTerms:
            h0, args = self.cell.initial_state(), self.loss_args(params, inputs, target)
            return omega_terms(self.cell.step, params.cell, h0, inputs, self.loss_of_states, args=args)

        return jax.vmap(terms)(*batch)


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
    ``cell._replace(step=bptt.remedies.clip_adjoints(cell.step, max_norm=...))``.

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
        weights = draw_weights("readout_init", readout_init, k_readout, (h.shape[0], task.output_size), h.dtype).T
        readout = Readout(weights, jnp.zeros(task.output_size, h.dtype))
        return NetworkParams(cell.init(k_cell, task.input_size), readout)

    def outputs(params: NetworkParams, inputs: PyTree) -> Array:
        h0 = cell.initial_state()
        if task.reads == "last":
            h = final_state(cell.step, params.cell, h0, inputs, remat=remat)
            return apply_readout(params.readout, h)[None]
        return jax.vmap(partial(apply_readout, params.readout))(states(params, h0, inputs))

    def states(params: NetworkParams, state: State, inputs: PyTree) -> State:
        return unroll(cell.step, params.cell, state, inputs, remat=remat)

    return Network(cell, task, init, outputs, states)


def truncated(cell: Cell, window: int) -> Cell:
    """The cell with its error signal cut before every `window`-th step: TBPTT with k1 = k2 = `window`.

    Counted from the beginning of each sequence, and from each reset on, as `bptt_jax.estimators.tbptt` counts. Its
    gradient is the same, but where the last window is cut short: here it goes back to its beginning, there `window`
    steps. The state is ``(state, steps)``.

    Args:
      cell: any `Cell`.
      window: steps between two cuts.

    Raises:
      TypeError, ValueError: `window` is no integer of at least 1.
    """
    window = check_positive_int("window", window)

    def step(params: Params, state: tuple[State, Array], x: Input) -> tuple[State, Array]:
        h, steps = state
        cut = steps % window == 0
        return cell.step(params, choose(cut, jax.lax.stop_gradient(h), h), x), steps + 1

    return Cell(cell.init, lambda: (cell.initial_state(), jnp.zeros((), jnp.int32)), step)


def apply_readout(readout: Readout, state: State) -> Array:
    """``weights @ h + bias`` with h the first leaf of the state."""
    return readout.weights @ _read(state) + readout.bias


def _mask(inputs: PyTree) -> Array | None:
    return inputs.mask if isinstance(inputs, Sequence) else None


def _read(state: State) -> Array:
    h = jax.tree.leaves(state)[0].ravel()
    return h.real if jnp.iscomplexobj(h) else h
