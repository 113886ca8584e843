"""Where NaN and infinity come from: the first step in time, the array, and the norms that led there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.analysis.adjoints import backward
from bptt_jax.analysis.loss import BoundLoss
from bptt_jax.linalg import logscale
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.step import Array, Params, PyTree, Recurrence, State

_LED_TO = 10  # steps reported before it


class NonFinite(NamedTuple):
    """The first array, in the order of computation, that holds a NaN or an infinity.

    Attributes:
      array: its name with the leaf's path. ``params``, ``state0``, ``xs`` and ``targets`` were given so; ``state``
        is what the step made of finite numbers, ``loss`` what the loss did. Of the backward pass, ``dloss/dstate``
        is the loss's own derivative, ``Jacobian`` is dh_t/dh_{t-1}, ``adjoint`` the total derivative dL/dh_t where
        neither of these is to blame, ``dL/dparams`` what step t adds to the gradient; these two also where they
        leave the range of their dtype, as they do for `jax.grad` (their logarithms hold).
      step: t = 1 .. T, with ``h_t = step(params, h_{t-1}, x_t)`` and x_t at index t - 1 of `xs`; 0 for `state0`, -1
        for what is not in time. Of the forward pass the first; of the backward pass, if all before it is finite,
        the last in time, which is computed first. Of parameters, the step at which they show.
      sequence: its index in the batch, the first of several; -1 for parameters that show nowhere.
      log_norms_before: of at most ten steps before, in the order of computation, the natural log of the norm of the
        state's leaf (of the whole state, where another array is to blame); going backwards, of the adjoint.
    """

    array: str
    step: int
    sequence: int
    log_norms_before: tuple[float, ...]

    @property
    def statement(self) -> str:
        """In one line."""
        what = f"{self.array} is the first to be NaN or infinite"
        where = f" at step {self.step}" if self.step >= 0 else ""
        where += f" of sequence {self.sequence}" if self.sequence >= 0 else ""
        norms = " ".join(f"{n:.4g}" for n in self.log_norms_before)
        return f"{what},{where}; log norms before: {norms or 'none'}" if where else what


class Trace(NamedTuple):
    """For one sequence which leaves are not finite, True or False; in time ``[T, leaves]``, else ``[leaves]``."""

    state0: Array
    xs: Array
    targets: Array
    states: Array
    loss: Array
    immediate: Array
    jacobians: Array
    adjoints: Array
    contributions: Array
    state_log_norms: Array
    whole_state_log_norms: Array
    adjoint_log_norms: Array


def trace(recurrence: Recurrence, targets: PyTree, loss: BoundLoss) -> Trace:
    """Forward and backward pass of one sequence, every array looked at; to be jitted and mapped over sequences."""
    done = backward(recurrence, loss)
    along = done.along

    def at_t(inputs: tuple[PyTree, LogScaled]) -> tuple[Array, Array]:
        residuals, signal = inputs
        mantissa, e = signal.mantissa, signal.exponent
        # Times a zero that the compiler does not know: what is finite stays zero, the rest becomes NaN.
        nothing = jax.lax.optimization_barrier(jax.tree.map(jnp.zeros_like, mantissa))
        added = along.pull_params(*jax.tree.map(lambda a: a[None], (residuals, mantissa)))
        return jnp.any(nonfinite(along.pull(residuals, nothing))), nonfinite(logscale.shift(added, e))

    jacobians, contributions = jax.lax.map(at_t, (along.residuals, done.signal))
    by_step = jax.vmap(nonfinite)
    return Trace(
        state0=nonfinite(recurrence.state0),
        xs=by_step(recurrence.instants.x),
        targets=nonfinite(targets),
        states=by_step(along.states),
        loss=~jnp.isfinite(done.loss.value),
        immediate=by_step(done.loss.states),
        jacobians=jacobians,
        adjoints=by_step(done.signal.value),
        contributions=contributions,
        state_log_norms=jnp.stack([jax.vmap(logscale.log_norm)(a) for a in jax.tree.leaves(along.states)], axis=1),
        whole_state_log_norms=jax.vmap(logscale.log_norm)(along.states),
        adjoint_log_norms=done.signal.log_norm,
    )


def nonfinite(tree: PyTree) -> Array:
    """``[leaves]``: whether each holds a NaN or an infinity."""
    return jnp.array([jnp.any(~jnp.isfinite(a)) for a in jax.tree.leaves(tree)], bool)


class Names(NamedTuple):
    """Of all leaves, in their order."""

    params: list[str]
    trained: list[str]
    state: list[str]
    xs: list[str]
    targets: list[str]


def names(params: Params, state0: State, xs: PyTree, targets: PyTree) -> Names:
    def paths(tree: PyTree, only_floating: bool = False) -> list[str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for _, leaf in leaves]
        return [
            jax.tree_util.keystr(path)
            for (path, _), f in zip(leaves, floating, strict=True)
            if f or not only_floating
        ]

    return Names(paths(params), paths(params, only_floating=True), paths(state0), paths(xs), paths(targets))


def first(bad_params: np.ndarray, traces: Trace, names: Names) -> NonFinite | None:
    """The first of a batch (leaves of `traces` ``[B, ...]``, of NumPy); None if all is finite that matters.

    An input or a target counts if it shows: what the step masks, forwards and backwards, does no harm.
    """
    rows = [Trace(*(np.asarray(a)[b] for a in traces)) for b in range(len(traces.loss))]
    forward = [(_forward(row, names), b) for b, row in enumerate(rows)]
    found = [(f, b) for f, b in forward if f is not None]
    if found:
        (array, t, before), b = min(found, key=lambda each: each[0][1])
    else:
        losses = [b for b, row in enumerate(rows) if row.loss]
        backwards = [(f, b) for b, row in enumerate(rows) if (f := _backward(row, names)) is not None]
        if losses:
            b, t, before = losses[0], -1, ()
            array = _of("targets", names.targets, rows[b].targets) or "loss"
        elif backwards:
            (array, t, before), b = max(backwards, key=lambda each: each[0][1])
        elif bad_params.any():
            return NonFinite(_of("params", names.params, bad_params), -1, -1, ())
        else:
            return None
    if bad_params.any():
        array = _of("params", names.params, bad_params)
    return NonFinite(array, t, b, tuple(float(n) for n in before))


_Found = tuple[str, int, Any]


def _forward(row: Trace, names: Names) -> _Found | None:
    """(array, step, norms before) of the first state that is not finite."""
    bad = np.flatnonzero(row.states.any(axis=1))
    if bad.size == 0:
        return None
    if row.state0.any():
        return _of("state0", names.state, row.state0), 0, ()
    k = int(bad[0])
    before = slice(max(0, k - _LED_TO), k)
    if row.xs[k].any():
        return _of("xs", names.xs, row.xs[k]), k + 1, row.whole_state_log_norms[before]
    leaf = int(np.argmax(row.states[k]))
    return f"state{names.state[leaf]}", k + 1, row.state_log_norms[before, leaf]


def _backward(row: Trace, names: Names) -> _Found | None:
    """The same of the backward pass, which comes to the last step first."""
    each = (row.immediate.any(axis=1), row.adjoints.any(axis=1), row.contributions.any(axis=1))
    bad = np.flatnonzero(np.logical_or.reduce(each))
    if bad.size == 0:  # dL/dh_0 comes last
        before = row.adjoint_log_norms[:_LED_TO][::-1]
        return ("Jacobian", 1, before) if row.jacobians[0] else None
    k = int(bad[-1])
    before = row.adjoint_log_norms[k + 1 : k + 1 + _LED_TO][::-1]
    if row.immediate[k].any():
        array = _of("targets", names.targets, row.targets) or _of("dloss/dstate", names.state, row.immediate[k])
        return array, k + 1, before
    if row.adjoints[k].any():
        if row.jacobians[k + 1]:
            return _of("xs", names.xs, row.xs[k + 1]) or "Jacobian", k + 2, before
        return _of("adjoint", names.state, row.adjoints[k]), k + 1, before
    # The adjoint of this very step is finite and comes before what it adds to the gradient.
    before = row.adjoint_log_norms[k : k + _LED_TO][::-1]
    array = _of("xs", names.xs, row.xs[k]) or _of("dL/dparams", names.trained, row.contributions[k])
    return array, k + 1, before


def _of(name: str, paths: list[str], bad: Any) -> str:
    """The first leaf that is marked; empty if none is."""
    return f"{name}{paths[int(np.argmax(bad))]}" if bad.any() else ""
