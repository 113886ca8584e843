"""Streams without an end, read in windows, and how long a window must be."""

import jax
import jax.numpy as jnp

from bptt_jax.analysis.backward import backward, contributions
from bptt_jax.analysis.loss import bind_loss
from bptt_jax.analysis.window import AdaptiveWindow, adaptive_window
from bptt_jax.experiments.network import LossArgs, Network
from bptt_jax.experiments.records import Carried, TrainState
from bptt_jax.experiments.tasks import Batch, Task
from bptt_jax.step import Array, Cell, Instant, Params, Sequence, State, bind, choose
from bptt_jax.timeline import resets_at_real_steps


def check_stream(task: Task) -> None:
    """Raises ValueError unless the task can be read as a stream."""
    if task.stream is None or task.reads != "all":
        raise ValueError(f"window: expected None, or a task with a stream that reads all steps, got {task.name}")


def beginning(cell: Cell, streams: int) -> Carried:
    """Where stateful training begins."""
    none = jnp.zeros((), jnp.int32)
    states = jax.tree.map(lambda a: jnp.broadcast_to(a, (streams, *a.shape)), cell.initial_state())
    return Carried(states, none, none)


def read(task: Task, key: Array, position: Array, streams: int, length: int) -> Batch:
    """The next `length` steps of the first `streams` streams that there are by this key."""
    assert task.stream is not None
    stream = task.stream
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(streams, dtype=jnp.int32))
    return jax.vmap(lambda key: stream(key, position, length))(keys)


def measured_window(network: Network, state: TrainState, ahead: Batch, bias: float) -> AdaptiveWindow:
    """Of the gradient of the loss of the last step `ahead`, of all streams as one loss."""
    assert state.carried is not None
    cell, (inputs, targets) = network.cell, ahead
    sequence = inputs if isinstance(inputs, Sequence) else Sequence(inputs)
    resets = sequence.resets
    if resets is not None and sequence.mask is not None:
        resets = jax.vmap(resets_at_real_steps)(resets, sequence.mask)
    by_stream = Instant(sequence.xs, sequence.mask, resets)

    def step(params: Params, states: State, at: Instant) -> State:
        def of_one(h: State, at: Instant) -> State:
            start = h if at.reset is None else choose(at.reset, cell.initial_state(), h)
            new = cell.step(params, start, at.x)
            return new if at.real is None else choose(at.real, new, h)

        return jax.vmap(of_one)(states, at)

    def last(states: State, args: LossArgs) -> Array:
        of_last, axes = jax.tree.map(lambda a: a[-1:], states), LossArgs(None, 0, 0)  # type: ignore[arg-type]
        return jnp.mean(jax.vmap(network.loss_of_states, (1, axes))(of_last, args))

    args = LossArgs(state.params.readout, *jax.tree.map(lambda a: a[:, -1:], (targets, sequence.mask)))
    by_step = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), by_stream)
    done = backward(bind(step, state.params.cell, state.carried.states, by_step), bind_loss(last, args))
    added, whole = contributions(done)
    return adaptive_window(added.log_norms[::-1], whole.log_norm, tolerance=bias)


def with_window(states: TrainState, found: AdaptiveWindow, longest: int) -> TrainState:
    """States of several seeds with the window that all seeds that run can do with: a power of two, or `longest`."""
    assert states.carried is not None
    rungs = jnp.asarray([*(2**i for i in range((longest - 1).bit_length())), longest], jnp.int32)
    wanted = jnp.where(states.running, jnp.where(found.window < 0, longest, found.window), 1)
    window = jnp.broadcast_to(rungs[jnp.searchsorted(rungs, jnp.max(wanted))], states.updates.shape)
    return states._replace(carried=states.carried._replace(window=window))
