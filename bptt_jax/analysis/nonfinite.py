"""Where NaN and infinity come from: the first step in time, the array, and the norms that led there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from bptt_jax.analysis.backward import backward
from bptt_jax.analysis.loss import BoundLoss
from bptt_jax.linalg import logscale
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.results import Result, field
from bptt_jax.step import Array, PyTree, Recurrence, differentiable_part

_LED_TO = 10  # steps reported before it


class NonFinite(Result):
    """The first array, in the order of computation, that holds a NaN or an infinity.

    Attributes:
      array: its name with the leaf's path. ``params``, ``state0``, ``reset_state``, ``xs`` and ``args`` were given
        so; ``state`` is what the step made of finite numbers, ``loss`` what the loss did. Of the backward pass,
        ``dloss/dstate`` is the loss's own derivative, ``Jacobian`` is dh_t/dh_{t-1}, ``adjoint`` the total
        derivative dL/dh_t where neither of these is to blame, ``dL/dparams`` what step t adds to the gradient;
        these two also where they leave the range of their dtype, as they do for `jax.grad` (their logarithms hold).
        ``dL/dargs`` is the gradient of what the sequences share of `args`.
      step: t = 1 .. T, with ``h_t = step(params, h_{t-1}, x_t)`` and x_t at index t - 1 of `xs`; 0 for `state0`, -1
        for what is not in time. Of the forward pass the first; of the backward pass, if all before it is finite,
        the last in time, which is computed first. Of parameters, the step at which they show.
      sequence: its index in the batch, the first of several; -1 for parameters that show nowhere.
      log_norms_before: of at most ten real steps before, in the order of computation and since the last reset, the
        natural log of the norm of the state's leaf (of the whole state, where another array is to blame); going
        backwards, of the adjoint.
      overflows: whether it is an adjoint, or what a step adds to the gradient, that is a number, but one beyond the
        range of its dtype. A clip of what `jax.grad` gives cannot mend it; `bptt_jax.adjoints` has it in log scale,
        and its ``scaled.params_grad.clipped(max_norm=)`` is finite.
    """

    array: str = field(static=True)
    step: int
    sequence: int
    log_norms_before: tuple[float, ...]
    overflows: bool

    @property
    def statement(self) -> str:
        """In one line."""
        beyond = "leave the range of its dtype (bptt_jax.adjoints has it in log scale)"
        what = f"{self.array} is the first to {beyond if self.overflows else 'be NaN or infinite'}"
        where = f" at step {self.step}" if self.step >= 0 else ""
        where += f" of sequence {self.sequence}" if self.sequence >= 0 else ""
        norms = " ".join(f"{n:.4g}" for n in self.log_norms_before)
        return f"{what},{where}; log norms before: {norms or 'none'}" if where else what

    def _headline(self) -> str:
        return self.statement


class Trace(NamedTuple):
    """For one sequence which leaves are not finite, True or False; in time ``[T, leaves]``, else ``[leaves]``.

    Leaves are those that hold floating numbers; none of `reset_state` if that is `state0`. `nan_xs` and
    `nan_states` ``[T]``, and `nan_args`, one truth value, are of NaN alone; `scaled_contributions` in log scale;
    `real` and `resets` ``[T]`` as in `bptt_jax.step.Recurrence`.
    """

    real: Array
    resets: Array
    state0: Array
    reset_state: Array
    xs: Array
    args: Array
    states: Array
    nan_xs: Array
    nan_states: Array
    nan_args: Array
    loss: Array
    immediate: Array
    args_grad: Array
    jacobians: Array
    adjoints: Array
    contributions: Array
    scaled_contributions: Array
    state_log_norms: Array
    whole_state_log_norms: Array
    adjoint_log_norms: Array


def trace_nonfinite(recurrence: Recurrence, loss: BoundLoss) -> Trace:
    """Forward and backward pass of one sequence, every array looked at; to be jitted and mapped over sequences."""
    done = backward(recurrence, loss)
    along = done.along
    recurrence = along.recurrence

    def at_t(inputs: tuple[PyTree, LogScaled]) -> tuple[Array, Array, Array]:
        residuals, signal = inputs
        mantissa, e = signal.mantissa, signal.exponent
        # Times a zero that the compiler does not know: what is finite stays zero, the rest becomes NaN.
        nothing = jax.lax.optimization_barrier(jax.tree.map(jnp.zeros_like, mantissa))
        added = along.pull_params(residuals, mantissa)
        pulled = along.pull(residuals, nothing)
        return jnp.any(any_nonfinite(pulled)), any_nonfinite(LogScaled(added, e).value), any_nonfinite(added)

    jacobians, contributions, scaled_contributions = jax.lax.map(at_t, (along.residuals, done.signal))
    by_step = jax.vmap(any_nonfinite, axis_size=recurrence.length)
    states = differentiable_part(along.states)[0]
    return Trace(
        real=recurrence.real,
        resets=recurrence.resets,
        state0=any_nonfinite(recurrence.state0),
        reset_state=any_nonfinite(None if recurrence.resets_to_start else recurrence.reset_state),
        xs=by_step(recurrence.instants.x),
        args=any_nonfinite(loss.args),
        states=by_step(states),
        nan_xs=jax.vmap(_any_nan, axis_size=recurrence.length)(recurrence.instants.x),
        nan_states=jax.vmap(_any_nan)(states),
        nan_args=_any_nan(loss.args),
        loss=~jnp.isfinite(done.loss.value),
        immediate=by_step(done.loss.states),
        args_grad=any_nonfinite(done.loss.args),
        jacobians=jacobians,
        adjoints=by_step(done.signal.value),
        contributions=contributions,
        scaled_contributions=scaled_contributions,
        state_log_norms=jnp.stack([jax.vmap(logscale.log_norm)(a) for a in jax.tree.leaves(states)], axis=1),
        whole_state_log_norms=jax.vmap(logscale.log_norm)(states),
        adjoint_log_norms=done.signal.log_norm,
    )


def any_nonfinite(tree: PyTree) -> Bool[Array, " leaves"]:
    """Of each leaf that holds floating numbers: whether one of them is NaN or infinite."""
    leaves = jax.tree.leaves(differentiable_part(tree)[0])
    return jnp.array([jnp.any(~jnp.isfinite(a)) for a in leaves], bool)


def any_nan(tree: PyTree) -> Bool[Array, " leaves"]:
    """The same of NaN alone."""
    leaves = jax.tree.leaves(differentiable_part(tree)[0])
    return jnp.array([jnp.any(jnp.isnan(a)) for a in leaves], bool)


def _any_nan(tree: PyTree) -> Bool[Array, ""]:
    return jnp.any(any_nan(tree))


class LeafNames(NamedTuple):
    """Of all leaves that hold floating numbers, in their order; `shared`: which of `args` all sequences share."""

    params: list[str]
    state: list[str]
    xs: list[str]
    args: list[str]
    shared: np.ndarray


def leaf_names(tree: PyTree) -> list[str]:
    """Paths of the leaves that hold floating numbers."""
    part = differentiable_part(tree)[0]
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(part)]


def locate_first(
    bad_params: np.ndarray, nan_params: np.ndarray, traces: Trace, names: LeafNames
) -> NonFinite | None:
    """The first of a batch (leaves of `traces` ``[B, ...]``, of NumPy); None if all is finite that matters.

    An input or an argument of the loss counts if it shows: what is masked, forwards and backwards, does no harm. So
    do infinite states and parameters of which nothing becomes NaN: in log domain they are the logarithm of zero.
    """
    rows = [_Row(Trace(*(np.asarray(a)[b] for a in traces)), names) for b in range(len(traces.loss))]
    faulty = [(row, b) for b, row in enumerate(rows) if row.is_faulty]
    forward = [(found, b) for row, b in faulty if (found := row.forward()) is not None]
    losses = [((row.of_loss(), -1, ()), b) for row, b in faulty if row.trace.loss]
    backward = [(found, b) for row, b in faulty if (found := row.backward()) is not None]
    if forward:
        (array, t, before), b = min(forward, key=lambda each: each[0][1])
    elif losses:
        (array, t, before), b = losses[0]
    elif backward:
        (array, t, before), b = max(backward, key=lambda each: np.inf if each[0][1] < 0 else each[0][1])
    elif nan_params.any():
        return NonFinite(_first_marked("params", names.params, nan_params), -1, -1, (), False)
    else:
        return None
    if nan_params.any():
        array = _first_marked("params", names.params, nan_params)
    elif bad_params.any() and not array.startswith(_GIVEN):  # infinities may always have been there
        array = _first_marked("params", names.params, bad_params)
    return NonFinite(array, t, b, tuple(float(n) for n in before), rows[b].overflows(array, t))


_Found = tuple[str, int, Any]
_GIVEN = ("state0", "reset_state", "xs", "args")
_OVER_TIME = (
    "resets",
    "xs",
    "states",
    "nan_xs",
    "nan_states",
    "immediate",
    "jacobians",
    "adjoints",
    "contributions",
    "scaled_contributions",
    "state_log_norms",
    "whole_state_log_norms",
    "adjoint_log_norms",
)


class _Row:
    """One sequence, in which time counts real steps alone; `at` are their indices."""

    def __init__(self, trace: Trace, names: LeafNames) -> None:
        self.names = names
        self.at = np.flatnonzero(trace.real)
        real: dict[str, Any] = {name: getattr(trace, name)[self.at] for name in _OVER_TIME}
        # What the loss reads of a state that is held in padding, it reads of the step before.
        if self.at.size:
            real["immediate"] = np.logical_or.reduceat(trace.immediate, self.at)
        self.trace = trace._replace(args_grad=trace.args_grad & names.shared, **real)
        self.begins = np.unique([0, *np.flatnonzero(self.trace.resets)]) if self.at.size else self.at

    @property
    def is_faulty(self) -> bool:
        """Whether anything is NaN, or infinite to the loss or to a gradient."""
        row = self.trace
        marks = (row.nan_states, row.loss, row.immediate, row.args_grad, row.adjoints, row.contributions)
        return any(bool(np.any(mark)) for mark in (*marks, row.jacobians[self.begins]))

    def forward(self) -> _Found | None:
        """(array, step, norms before) of the first state that is not finite."""
        row, names = self.trace, self.names
        bad = np.flatnonzero(row.states.any(axis=1))
        if bad.size == 0 or (row.nan_args and not row.nan_states.any()):
            return None
        nan = np.flatnonzero(row.nan_states & row.nan_xs)
        # A NaN that came in is to blame, not the infinities that may always have been there.
        k = int(nan[0]) if nan.size and not row.nan_states[: nan[0]].any() else int(bad[0])
        begin = int(self.begins[self.begins <= k][-1])
        before = slice(max(begin, k - _LED_TO), k)
        if row.nan_xs[k]:
            return _first_marked("xs", names.xs, row.xs[k]), self._step(k), row.whole_state_log_norms[before]
        if k == begin and row.resets[k] and row.reset_state.size:
            if row.reset_state.any():
                return _first_marked("reset_state", names.state, row.reset_state), self._step(k), ()
        elif k == begin and row.state0.any():
            return _first_marked("state0", names.state, row.state0), 0, ()
        if row.xs[k].any():
            return _first_marked("xs", names.xs, row.xs[k]), self._step(k), row.whole_state_log_norms[before]
        leaf = int(np.argmax(row.states[k]))
        return f"state{names.state[leaf]}", self._step(k), row.state_log_norms[before, leaf]

    def overflows(self, array: str, t: int) -> bool:
        """Whether it is finite in log scale."""
        k = int(np.searchsorted(self.at, t - 1))
        if array.startswith("adjoint"):
            return bool(np.isfinite(self.trace.adjoint_log_norms[k]))
        return array.startswith("dL/dparams") and not self.trace.scaled_contributions[k].any()

    def of_loss(self) -> str:
        return _first_marked("args", self.names.args, self.trace.args) or "loss"

    def backward(self) -> _Found | None:
        """The same of the backward pass, which comes to the last step first."""
        row, names = self.trace, self.names
        immediate = row.immediate.any(axis=1)
        if row.args_grad.any() and not immediate.any():
            return _first_marked("dL/dargs", names.args, row.args_grad), -1, ()
        bad = np.flatnonzero(immediate | row.adjoints.any(axis=1) | row.contributions.any(axis=1))
        if bad.size == 0:  # the derivative with respect to the state that a segment starts from comes last
            starts = self.begins[row.jacobians[self.begins]].tolist()
            return ("Jacobian", self._step(starts[-1]), self._adjoints_from(starts[-1])) if starts else None
        k = int(bad[-1])
        before = self._adjoints_from(k + 1) if self._goes_on(k) else ()
        if immediate[k]:
            array = _first_marked("args", names.args, row.args)
            return array or _first_marked("dloss/dstate", names.state, row.immediate[k]), self._step(k), before
        if row.adjoints[k].any():
            if self._goes_on(k) and row.jacobians[k + 1]:
                return _first_marked("xs", names.xs, row.xs[k + 1]) or "Jacobian", self._step(k + 1), before
            return _first_marked("adjoint", names.state, row.adjoints[k]), self._step(k), before
        # The adjoint of this very step is finite and comes before what it adds to the gradient.
        array = _first_marked("xs", names.xs, row.xs[k])
        array = array or _first_marked("dL/dparams", names.params, row.contributions[k])
        return array, self._step(k), self._adjoints_from(k)

    def _step(self, k: int) -> int:
        return int(self.at[k]) + 1

    def _goes_on(self, k: int) -> bool:
        """Whether a step follows in the same segment."""
        return k + 1 < len(self.at) and k + 1 not in self.begins

    def _adjoints_from(self, k: int) -> np.ndarray:
        """Log norms of at most ten adjoints, from k on to the end of its segment, the last first."""
        end = self.begins[self.begins > k]
        stop = int(end[0]) if end.size else len(self.at)
        return np.asarray(self.trace.adjoint_log_norms)[k : min(k + _LED_TO, stop)][::-1]


def _first_marked(name: str, paths: list[str], bad: Any) -> str:
    """The first leaf that is marked; empty if none is."""
    return f"{name}{paths[int(np.argmax(bad))]}" if bad.any() else ""
