"""The error signal dL/dh_t at every step, and what each step adds to the gradient of the parameters."""

import math
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bptt_jax import devices
from bptt_jax.analysis.loss import BoundLoss, LossGradient, bind_loss
from bptt_jax.linalg import logscale, reductions
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.recurrence.linearization import Linearization, at_many_steps, cut, linearize, require_pulls
from bptt_jax.recurrence.unroll import segment_length, states_of
from bptt_jax.results import Result, counted, field
from bptt_jax.step import (
    Array,
    Loss,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    choose,
    differentiable_part,
)

# Of a leaf's numbers: so many are joined with others in a vector, which takes a copy.
_SMALL = 1 << 12


class ScaledGradients(Result):
    """The gradients of `Adjoints` in log scale, which neither underflows nor overflows: `bptt_jax.linalg.LogScaled`.

    Attributes:
      adjoints: dL/dh_1 .. dL/dh_T, each with a power of two of its own.
      params_grad: dL/dparams. The largest adjoint is the unit of what all steps contribute: where a part of the state
        explodes by itself, what lies below its adjoints by the whole range of the dtype (2^126 in float32) is lost;
        so is all where states have decayed to zero under the largest adjoints, as without input, and the rest is that
        small.
        Its derivatives, where some adjoints are exactly zero, hold if the largest of the others is in that range.
      state0_grad: dL/dh_0, with what resets to `state0` add.
      reset_state_grad: dL/dreset_state, or None.
      args_grad: dL/dargs, or None; the loss's own derivative is taken in plain numbers.
      xs_grad: dL/dx_1 .. dL/dx_T, each with a power of two of its own, or None.
    """

    adjoints: LogScaled = field(dims=("time", ...))
    params_grad: LogScaled
    state0_grad: LogScaled
    reset_state_grad: LogScaled | None
    args_grad: LogScaled | None
    xs_grad: LogScaled | None = field(dims=("time", ...))


class Adjoints(Result):
    """What `adjoints` returns, the backward pass step by step; a pytree of arrays.

    Gradients have the structure of what they belong to, with None at leaves that are no floating numbers; they are
    in the convention of `jax.grad` for complex numbers too. Where one leaves the range of its dtype it is 0 or inf,
    as in `jax.grad`; `scaled` and all logarithms hold there too, and
    ``found.scaled.params_grad.clipped(max_norm=1.0)`` is a gradient of that norm, finite at any size.

    Attributes:
      loss: L, a scalar.
      aux: what the loss returned beside it; None without ``has_aux=True``.
      states: h_1 .. h_T, leaves ``[T, ...]``.
      log_magnitudes: natural logarithm of the modulus of every entry of the adjoints, leaves ``[T, ...]``: by unit.
        -inf where it is exactly zero, or where one step made it smaller, against the largest entry, by more than the
        root of the dtype's range (2^63 in float32): no other difference between entries is too large. With
        ``remat=`` it is -inf wherever the dtype does not hold an entry beside the largest of its step (2^-126 of it):
        more would take more memory. To differentiation such entries are constants.
      params_grad: dL/dparams, equal to `jax.grad`'s; see `ScaledGradients` for what is lost beside adjoints of 2^126.
        What the steps add is summed in single precision at least; `jax.grad` sums in the dtype of the parameters, where
        in bfloat16 256 and 1 are 256, so that of long sequences it gives too little.
      state0_grad: dL/dh_0, with what resets to `state0` add.
      reset_state_grad: dL/dreset_state; None where no `reset_state` was given.
      args_grad: dL/dargs; None without `args`.
      xs_grad: dL/dxs, leaves ``[T, ...]``, zero in padding; None without ``inputs=True``.
      scaled: all gradients in log scale.
    """

    _views: ClassVar = {
        "adjoints": ("time", ...),
        "log_norms": ("time",),
        "leaf_log_norms": ("time",),
        "params_log_norm": (),
        "state0_log_norm": (),
        "args_log_norm": (),
        "xs_log_norms": ("time",),
    }

    loss: Float[Array, ""] = field(dims=())
    aux: PyTree
    states: State = field(dims=("time", ...))
    log_magnitudes: State = field(dims=("time", ...))
    params_grad: Params
    state0_grad: State
    reset_state_grad: State
    args_grad: PyTree
    xs_grad: PyTree = field(dims=("time", ...))
    scaled: ScaledGradients

    @property
    def adjoints(self) -> State:
        """The total derivatives dL/dh_1 .. dL/dh_T, leaves ``[T, ...]``."""
        return self.scaled.adjoints.value

    @property
    def log_norms(self) -> Float[Array, " T"]:
        """Natural logarithm of the Euclidean norm of each adjoint; -inf where it is exactly zero."""
        return self.scaled.adjoints.log_norm

    @property
    def leaf_log_norms(self) -> State:
        """`log_norms` of every leaf of the state by itself: like the state, leaves ``[T]``."""
        axes = jnp.ndim(self.loss) + 1
        return jax.tree.map(lambda logs: _log_norm_of_logs(logs, axes), self.log_magnitudes)

    @property
    def params_log_norm(self) -> Float[Array, ""]:
        """Natural logarithm of the Euclidean norm of dL/dparams; -inf where it is zero, or lost beside the largest
        adjoint (`ScaledGradients`): `temporal_contributions` tells which."""
        return self.scaled.params_grad.log_norm

    @property
    def state0_log_norm(self) -> Float[Array, ""]:
        """Natural logarithm of the Euclidean norm of dL/dh_0, with what resets to `state0` add."""
        return self.scaled.state0_grad.log_norm

    @property
    def args_log_norm(self) -> Float[Array, ""] | None:
        """Natural logarithm of the Euclidean norm of dL/dargs, -inf where its dtype does not hold it; None without
        `args`."""
        return None if self.scaled.args_grad is None else self.scaled.args_grad.log_norm

    @property
    def xs_log_norms(self) -> Float[Array, " T"] | None:
        """Natural logarithm of the norm of dL/dx_t at every step, -inf where it is zero, or lost beside the largest
        entry of that step's adjoint; None without ``inputs=True``."""
        return None if self.scaled.xs_grad is None else self.scaled.xs_grad.log_norm

    def _headline(self) -> str:
        log_norms = np.asarray(self.log_norms)
        first, last = (np.median(log_norms[..., k]) for k in (0, -1))
        said = f"{counted(log_norms.shape[-1], 'step')}, log norm {first:.4g} at h_1, {last:.4g} at h_T"
        if not jax.tree.leaves(self.scaled.params_grad.mantissa):
            return said
        params, largest = (float(np.median(a)) for a in (self.params_log_norm, np.max(log_norms, axis=-1)))
        return f"{said}, {zero_or_lost(largest) if params == -np.inf else f'{params:.4g} of dL/dparams'}"


class TemporalContributions(Result):
    """Where in time the gradient of the parameters comes from: ``dL/dparams = sum_t g_t``.

    Attributes:
      log_norms: ``[T]``, natural log of ``||g_t||``, for t = 1 .. T; it holds where float32 underflows, and where the
        whole gradient is lost. -inf in padding, and where g_t is zero, or lost beside the largest entry of dL/dh_t.
      shares: ``[T]``, signed: ``<g_t, g> / <g, g>`` with g the whole gradient. They sum to 1; NaN if g is zero, or
        lost beside the largest adjoint (`ScaledGradients`).
    """

    log_norms: Float[Array, " T"] = field(dims=("time",))
    shares: Float[Array, " T"] = field(dims=("time",))

    def _headline(self) -> str:
        (steps,) = np.shape(self.shares)
        log_norms, shares = np.asarray(self.log_norms), np.asarray(self.shares, np.float64)
        some = np.flatnonzero(log_norms > -np.inf)
        if np.isnan(log_norms).any() or np.any(log_norms == np.inf):
            return "the gradient is not finite"
        if np.isnan(shares).any():
            return not_seen("of step", log_norms, 1) if some.size else "the gradient is zero"
        half = np.flatnonzero(np.cumsum(shares[::-1])[::-1] >= 0.5)[-1]
        return (
            f"half of the gradient is from step {half + 1} of {steps} on, the earliest part from step {some[0] + 1}"
        )


def zero_or_lost(largest: float) -> str:
    """Of dL/dparams that came out as zero beside a largest adjoint of this log norm, where its parts are not known."""
    return f"dL/dparams zero{'' if largest == -math.inf else ', or lost beside the largest adjoint'}"


def not_seen(place: str, log_norms: np.ndarray, first: int) -> str:
    """Of a gradient that came out as zero, what its parts say, which are not zero; counted from `first` on."""
    at = int(np.argmax(log_norms))
    part = f"its largest part, {place} {at + first}, has log norm {log_norms[at]:.4g}"
    return f"the gradient underflows or cancels: {part}"


def adjoints(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    args: PyTree = None,
    has_aux: bool = False,
    inputs: bool = False,
    remat: bool | int = False,
    length: int | None = None,
) -> Adjoints:
    """dL/dh_t for all t and all gradients, in one forward and one backward pass.

    ``lambda_t = J_{t+1}^T lambda_{t+1} + dl/dh_t``, with ``dl/dh_t`` the immediate derivative of the loss: the
    total derivatives. The recursion carries a mantissa and a power of two, so it neither underflows nor overflows
    at any length. The differentials of all steps are kept from the forward pass, the parameters' gradient is one
    contraction after the scan. Products of matrices are in the precision that JAX is set to, as in `jax.grad`. Of a
    step whose derivative is a `jax.custom_vjp` they are those of its backward pass.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      loss: ``loss(states) -> scalar`` of the whole trajectory; with `args`, ``loss(states, args)``.
      args: readout, targets, masks, ...: whatever changes from call to call, traced, so that nothing is compiled
        anew; its floating leaves get their gradient. What the loss closes over counts as constant.
      has_aux: whether the loss returns ``(scalar, aux)``.
      inputs: whether dL/dxs is wanted: of weights in `xs` (layers as time), embeddings, for saliency.
      remat: keep the states alone and compute the rest again, segment by segment, for one more forward pass: the
        memory beyond states, adjoints and what the loss makes of them falls from O(T) to O(sqrt(T)). True takes
        segments of ceil(sqrt(T)) steps, an integer that many.

    Returns:
      `Adjoints`. To see a batch as one loss, write the batch into the step (``jax.vmap(step, (None, 0, 0))``);
      for every sequence its own, ``jax.vmap`` this function.

    Raises:
      TypeError, ValueError: an argument breaks the contract, the loss returns no real scalar, or the step has no
        backward pass (a `lax.while_loop` of unknown length).

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> found = bptt.adjoints(step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0])
      >>> found.adjoints.ravel()  # dL/dh_1 .. dL/dh_4
      Array([0.125, 0.25 , 0.5  , 1.   ], dtype=float32)
      >>> float(found.params_grad)  # of w^3 + w^2 + w + 1
      2.75
      >>> def loss(states, args):
      ...     return args["readout"] @ states[-1] - args["target"]
      >>> args = {"readout": jnp.ones(1), "target": jnp.array(2.0)}
      >>> bptt.adjoints(step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), loss, args=args).args_grad["readout"]
      Array([1.875], dtype=float32)
    """
    recurrence = bind(step, params, state0, xs, length)
    bound = bind_loss(loss, args, has_aux)
    return _adjoints(recurrence, bound, inputs=inputs, segment=segment_length(remat, recurrence.length))


def temporal_contributions(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    args: PyTree = None,
    length: int | None = None,
) -> TemporalContributions:
    """Each step's contribution ``g_t = (dh_t/dparams)^T dL/dh_t`` to the gradient of the parameters.

    These are the summands of backpropagation through time ordered by where the parameters act (Pascanu et al.
    2013, arXiv:1211.5063, eq. 4, sums over losses). Costs one gradient of the parameters' size per step.

    Args, Raises: as for `adjoints`.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> last = lambda states: states[-1, 0]
      >>> bptt.temporal_contributions(step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), last).shares
      Array([0.   , 0.091, 0.273, 0.636], dtype=float32)
    """
    return _temporal_contributions(bind(step, params, state0, xs, length), bind_loss(loss, args))


class Backward(NamedTuple):
    """All that the backward pass knows.

    Attributes:
      along: the linearisation.
      loss: value and immediate derivatives.
      signal: dL/dh_1 .. dL/dh_T in log scale, leaves ``[T, ...]``.
      params_grad, state0_grad, reset_state_grad: in log scale, not normalized.
    """

    along: Linearization
    loss: LossGradient
    signal: LogScaled
    params_grad: LogScaled
    state0_grad: LogScaled
    reset_state_grad: LogScaled


def linearize_for(recurrence: Recurrence, loss: BoundLoss, *, inputs: bool = False) -> Linearization:
    """Linearised as far as the gradient of the loss goes, to be traced."""
    recurrence = check_step(recurrence)
    return linearize(recurrence, inputs=inputs, read=loss.reads(recurrence.state0, recurrence.length))


def backward(recurrence: Recurrence, loss: BoundLoss, *, inputs: bool = False) -> Backward:
    """The forward pass and the reverse scan, to be traced."""
    along = linearize_for(recurrence, loss, inputs=inputs)
    require_pulls(along, "the error signal")
    found = loss.differentiate(along.states)
    end, signal = _send_back(along, found.states, None)
    return Backward(along, found, signal, *_in_own_dtypes(end, along.recurrence))


def contributions(done: Backward) -> tuple[TemporalContributions, LogScaled]:
    """What the steps contribute, after the backward pass; and the parameters' gradient as one vector, normalized.

    Gradients of the parameters are joined to vectors here, so that what is said of one is compiled once, not for each
    of its leaves.
    """
    along = done.along
    given = done.params_grad
    whole = LogScaled(_joined(given.mantissa), given.exponent).normalized()
    direction = jax.lax.optimization_barrier(whole.mantissa)

    def at_t(inputs: tuple[PyTree, State]) -> Array:
        parts = _joined(along.pull_params(*inputs))
        exponent = jax.lax.optimization_barrier(logscale.plain(logscale.exponent(parts)))
        parts = logscale.shift(parts, -exponent)
        square = _sum(reductions.total(jnp.square(a)) for a in parts)
        inner = _sum(reductions.total(a * b) for a, b in zip(parts, direction, strict=True))
        return jnp.stack([square, inner, exponent.astype(square.dtype)])

    squares, inner, exponents = jax.lax.map(at_t, (along.residuals, done.signal.mantissa)).T
    exponents = exponents.astype(jnp.int32) + logscale.plain(done.signal.exponent)
    log_norms = logscale.to_log(jnp.where(squares == 0, 1, squares), exponents, half=True, zero=squares == 0)
    inner = LogScaled(inner, exponents).over(jnp.broadcast_to(whole.exponent, exponents.shape))
    total = squared_norm(whole)
    # Unknown where there is no gradient, but no NaN to those of the norms.
    shares = jnp.where(total == 0, jnp.nan, inner / jnp.where(total == 0, 1, total))
    return TemporalContributions(log_norms, shares), whole


def squared_norm(whole: LogScaled) -> Float[Array, ""]:
    """Of the mantissa of what `contributions` gives."""
    return _sum(reductions.total(jnp.square(a)) for a in whole.mantissa)


def _sum(numbers: Iterable[Array]) -> Array:
    return reduce(jnp.add, numbers)


def _joined(tree: PyTree) -> list[Float[Array, "..."]]:
    """All numbers, at least in single precision: small leaves as one vector, large ones, whose copies cost, apart."""
    parts = reductions.real_parts(tree)
    dtype = max([jnp.dtype(jnp.float32), *(a.dtype for a in parts)], key=lambda d: d.itemsize)
    # Behind the barrier what comes transposed is turned round once, and not in all that reads it.
    parts = jax.lax.optimization_barrier([a.astype(dtype) for a in parts])
    small = [jnp.ravel(a) for a in parts if a.size <= _SMALL]
    return [jnp.concatenate([jnp.zeros(0, dtype), *small]), *(a for a in parts if a.size > _SMALL)]


def contracted(along: Linearization, signal: LogScaled) -> LogScaled:
    """What the signals at all steps add to the parameters' gradient; scaled by the largest of them, not to 1."""
    largest = reductions.most(signal.exponent)
    distance = logscale.plain(signal.exponent) - logscale.plain(largest)
    cotangents = jax.vmap(logscale.shift_down)(signal.mantissa, distance)
    return _to_params(along, LogScaled(along.contract_made(along.residuals, cotangents), largest))


def _to_params(along: Linearization, to_made: LogScaled) -> LogScaled:
    """From what the steps have made of the parameters."""
    arrived = to_made.within(along.no_made)
    return LogScaled(along.pull_made(arrived.mantissa), arrived.exponent)


class _Carried(NamedTuple):
    """What has arrived, on the way back, at the parameters, at the state before, and at `reset_state`; the first and
    the last, which are sums over steps, in single precision at least."""

    to_params: LogScaled
    to_state: LogScaled
    to_reset_state: LogScaled


def _nothing(recurrence: Recurrence) -> _Carried:
    params, state = (
        logscale.nothing(differentiable_part(tree)[0]) for tree in (recurrence.params, recurrence.state0)
    )
    return _Carried(params.widened(), state, state.widened())


def _in_own_dtypes(end: _Carried, recurrence: Recurrence) -> _Carried:
    params, state = (differentiable_part(tree)[0] for tree in (recurrence.params, recurrence.state0))
    return _Carried(end.to_params.within(params), end.to_state, end.to_reset_state.within(state))


def _send_back(along: Linearization, immediate: State, later: _Carried | None) -> tuple[_Carried, LogScaled]:
    """The reverse scan over the steps of `along`, after which `later` comes."""
    start, first = later, jnp.int32(logscale.ZERO_EXPONENT)
    if start is None:
        start = _nothing(along.recurrence)
    else:
        first = logscale.top(start.to_state.mantissa, start.to_state.exponent)
    start = start._replace(to_params=logscale.nothing(along.no_made).widened())  # what the step has made of them

    def scan(
        pull: Callable[[PyTree, State], tuple[list[Array] | None, State]], immediate: State, residuals: PyTree
    ) -> tuple[_Carried, LogScaled]:
        def body(
            carry: tuple[_Carried, Array], at_t: tuple[State, Array, PyTree]
        ) -> tuple[tuple[_Carried, Array], tuple[State, Array]]:
            immediate_t, exponent_t, residuals = at_t
            (to_params, to_state, to_reset_state), top = carry
            e = jnp.maximum(top, exponent_t)
            mantissa = logscale.add_over(to_state.mantissa, to_state.exponent, immediate_t, 0, e)
            added, pulled = pull(residuals, mantissa)
            if added is not None:
                unit = jnp.maximum(to_params.exponent, e)
                both = to_params.over(unit), LogScaled(added, e).widened().over(unit)
                to_params = LogScaled(jax.tree.map(jnp.add, *both), unit)
            if residuals.reset is not None:
                stays = jax.tree.map(lambda a: jnp.where(residuals.reset, a, jnp.zeros_like(a)), pulled)
                to_reset_state = to_reset_state + LogScaled(stays, e).widened()
            to_state = LogScaled(cut(residuals, pulled), e)
            top = logscale.top(to_state.mantissa, e)
            return (_Carried(to_params, to_state, to_reset_state), top), (mantissa, top)

        exponents = jax.vmap(logscale.exponent)(immediate)
        given = immediate, exponents, residuals
        (end, _), (mantissas, tops) = devices.scan(body, (start, first), given, reverse=True)
        # The exponents of the signal follow from those that a step ends with. Those that it begins with would be ready
        # to be written at once: on a CPU, XLA then wakes another thread, which takes 10 us a step.
        return end, LogScaled(mantissas, jnp.maximum(jnp.append(tops[1:], first), exponents))

    def contract(immediate: State, residuals: PyTree) -> tuple[_Carried, LogScaled]:
        end, signal = scan(lambda r, c: (None, along.pull(r, c)), immediate, residuals)
        return end._replace(to_params=contracted(along, signal)), signal

    pull_both = along.pull_both

    def accumulate(immediate: State, residuals: PyTree) -> tuple[_Carried, LogScaled]:
        assert pull_both is not None
        end, signal = scan(pull_both, immediate, residuals)
        # Added up in the order of what was made: on a CPU, XLA would else turn round what is added at every step.
        to_made = jax.lax.optimization_barrier(end.to_params)
        return end._replace(to_params=_to_params(along, to_made)), signal

    if pull_both is None:
        end, signal = contract(immediate, along.residuals)
    else:
        end, signal = jax.lax.platform_dependent(immediate, along.residuals, cpu=accumulate, default=contract)
    to_params = end.to_params.widened()
    return end._replace(to_params=to_params if later is None else later.to_params + to_params), signal


def _inputs_grad(along: Linearization, signal: LogScaled) -> LogScaled:
    assert along.pull_inputs is not None
    found = at_many_steps(along.pull_inputs, along.residuals, signal.mantissa)
    return LogScaled(found, signal.exponent)


@devices.compiled
def _adjoints(recurrence: Recurrence, loss: BoundLoss, *, inputs: bool, segment: int | None) -> Adjoints:
    given = recurrence
    recurrence = check_step(recurrence)
    if segment is None:
        done = backward(recurrence, loss, inputs=inputs)
        found, states, signal = done.loss, done.along.states, done.signal
        end = _Carried(done.params_grad, done.state0_grad, done.reset_state_grad)
        xs_grad = _inputs_grad(done.along, signal) if inputs else None
        held = signal.log_magnitudes
        exact = _log_magnitudes_by_entry(done.along, found.states, held, _of_any(_loses(signal, found.states)))
        log_magnitudes = jax.tree.map(
            lambda m, a, b: jnp.where(jnp.abs(m) < 2.0 ** -_band([m]), jax.lax.stop_gradient(b), a),
            signal.mantissa,
            held,
            exact,
        )
    else:
        states = states_of(recurrence)
        found = loss.differentiate(states)
        read = loss.reads(recurrence.state0, recurrence.length)
        end, signal, xs_grad = _in_segments(recurrence, states, found.states, read, inputs, segment)
        end = _in_own_dtypes(end, recurrence)
        log_magnitudes = signal.log_magnitudes

    def total(grad: LogScaled, given: PyTree) -> LogScaled:
        return grad.summed_like(differentiable_part(given)[0])

    reset_grad = None
    if recurrence.reset_state is not None:
        if recurrence.resets_to_start:
            end = end._replace(to_state=end.to_state + end.to_reset_state)
        else:
            reset_grad = total(end.to_reset_state, given.reset_state)
    scaled = ScaledGradients(
        adjoints=signal,
        params_grad=total(end.to_params, given.params),
        state0_grad=total(end.to_state, given.state0),
        reset_state_grad=reset_grad,
        args_grad=None if found.args is None else LogScaled(found.args, jnp.zeros((), jnp.int32)),
        xs_grad=None if xs_grad is None else total(xs_grad, given.instants.x),
    )
    return Adjoints(
        loss=found.value,
        aux=found.aux,
        states=states,
        log_magnitudes=log_magnitudes,
        params_grad=scaled.params_grad.value,
        state0_grad=scaled.state0_grad.value,
        reset_state_grad=None if reset_grad is None else reset_grad.value,
        args_grad=found.args,
        xs_grad=None if scaled.xs_grad is None else scaled.xs_grad.value,
        scaled=scaled,
    )


def _in_segments(
    recurrence: Recurrence, states: State, immediate: State, read: list[bool], inputs: bool, segment: int
) -> tuple[_Carried, LogScaled, LogScaled | None]:
    """The reverse scan, which linearises one segment after the other, given all states and which leaves are read.

    The adjoints are written over the immediate derivatives that they are made of: one array of that size, not two.

    Returns:
      What arrives at the beginning, dL/dh_1 .. dL/dh_T, and dL/dxs where asked for.
    """
    steps = recurrence.length
    count, rest = divmod(steps, segment)

    def back(carry: _Written, first: Array, length: int) -> tuple[_Written, None]:
        def part(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, length), tree)

        def write(tree: PyTree, new: PyTree) -> PyTree:
            return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, first, 0), tree, new)

        before = jax.tree.map(lambda h: h[jnp.maximum(first - 1, 0)], states)
        start = choose(first == 0, recurrence.state0, before)
        along = linearize(recurrence.stretch(start, part(recurrence.instants), length), inputs=inputs, read=read)
        require_pulls(along, "the error signal")
        end, signal = _send_back(along, part(carry.signal.mantissa), carry.end)
        xs_grad = write(carry.xs_grad, _inputs_grad(along, signal)) if inputs else None
        mantissa, exponent = write(
            (carry.signal.mantissa, carry.signal.exponent), (signal.mantissa, signal.exponent)
        )
        return _Written(end, LogScaled(mantissa, exponent), xs_grad), None

    xs = differentiable_part(recurrence.instants.x)[0]
    written = _Written(
        _nothing(recurrence),
        LogScaled(immediate, jnp.zeros(steps, jnp.int32)),
        LogScaled(jax.tree.map(jnp.zeros_like, xs), jnp.zeros(steps, jnp.int32)) if inputs else None,
    )
    if rest:
        written, _ = back(written, jnp.int32(count * segment), rest)
    firsts = segment * jnp.arange(count, dtype=jnp.int32)
    written, _ = devices.scan(lambda carry, first: back(carry, first, segment), written, firsts, reverse=True)
    return written.end, written.signal, written.xs_grad


class _Written(NamedTuple):
    """What the scan over segments carries."""

    end: _Carried
    signal: LogScaled
    xs_grad: LogScaled | None


def _loses(signal: LogScaled, immediate: State) -> Array:
    """Whether any entry is, or may have become, too small beside the largest of its step."""

    def lost(a: Array, derivative: Array) -> Array:
        small = jnp.abs(a) < 2.0 ** -_band([a])
        return jnp.any(small & ((a != 0) | (derivative != 0)))

    found = map(lost, jax.tree.leaves(signal.mantissa), jax.tree.leaves(immediate))
    return reduce(jnp.logical_or, found, jnp.asarray(False))


def _band(leaves: list[Array]) -> int:
    """So many powers of two below the largest entry leave as many to what a step does to the smallest."""
    return min((-int(jnp.finfo(a.dtype).minexp) // 2 for a in leaves), default=1)


@jax.custom_batching.custom_vmap
def _of_any(flag: Array) -> Array:
    """The flag; in a batch whether any is set, one flag for all, so that `cond` stays one under `vmap`."""
    return flag


@_of_any.def_vmap
def _(axis_size: int, in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return _of_any(jnp.any(flag, axis=0)), False


def _log_magnitudes_by_entry(along: Linearization, immediate: State, held: State, wanted: Array) -> State:
    """Those of dL/dh_1 .. dL/dh_T where entries of one step differ by more than floating numbers do; constants to
    differentiation. `held` where they are not `wanted`.

    Every entry has a power of two of its own. A step's pull is of floating numbers, so the entries are pulled in
    bands of like size, the largest first, as many as there are. One loop over all bands of all steps: when none is
    left, what has arrived is the adjoint of the step before, and its entries are the next to be pulled.
    """
    steps = along.recurrence.length
    structure = jax.tree.structure(immediate)
    immediate, held, residuals = jax.lax.stop_gradient((immediate, held, along.residuals))
    leaves = jax.tree.leaves(immediate)
    band = _band(leaves)
    nothing = [
        LogScaled(jnp.zeros_like(a[0]), jnp.full(a.shape[1:], logscale.ZERO_EXPONENT, jnp.int32)) for a in leaves
    ]

    def more(carry: _Bands) -> Array:
        return carry.step > 0

    def pull_band(carry: _Bands) -> _Bands:
        top = reduce(jnp.maximum, [jnp.max(a.exponent, initial=logscale.ZERO_EXPONENT) for a in carry.waiting])
        last = ~_of_any(top > logscale.ZERO_EXPONENT)
        now = [(a.exponent > top - band) & (a.exponent > logscale.ZERO_EXPONENT) for a in carry.waiting]
        mantissas = [
            jnp.where(here, a.over(jnp.broadcast_to(top, a.exponent.shape)), jnp.zeros_like(a.mantissa))
            for here, a in zip(now, carry.waiting, strict=True)
        ]
        at_t = jax.tree.map(lambda a: a[jnp.minimum(carry.step, steps - 1)], residuals)
        pulled = cut(at_t, along.pull(at_t, jax.tree.unflatten(structure, mantissas)))
        step = carry.step - last.astype(jnp.int32)
        waiting, arrived, logs = [], [], []
        for index, part in enumerate(jax.tree.leaves(pulled)):
            before = carry.waiting[index]
            comes = LogScaled(
                jnp.where(last, leaves[index][step], part),
                jnp.broadcast_to(jnp.where(last, 0, logscale.plain(top)), part.shape),
            )
            total = jax.lax.optimization_barrier((carry.arrived[index] + comes).normalized())
            waits = LogScaled(before.mantissa, jnp.where(now[index], logscale.ZERO_EXPONENT, before.exponent))
            waiting.append(choose(last, total, waits))
            arrived.append(choose(last, nothing[index], total))
            found = carry.logs[index]
            row = jnp.where(last, total.log_magnitudes, found[step])
            logs.append(jax.lax.dynamic_update_index_in_dim(found, row, step, 0))
        return _Bands(step, waiting, arrived, logs)

    start = _Bands(jnp.where(wanted, jnp.int32(steps), 0), nothing, nothing, jax.tree.leaves(held))
    return jax.tree.unflatten(structure, devices.while_loop(more, pull_band, start).logs)


class _Bands(NamedTuple):
    """Of the loop over bands.

    Attributes:
      step: whose entries are pulled, counted from 0.
      waiting: its entries, those that are still to be pulled.
      arrived: what has come of the others at the step before.
      logs: of the magnitudes of all steps that are done.
    """

    step: Array
    waiting: list[LogScaled]
    arrived: list[LogScaled]
    logs: list[Array]


@partial(jax.jit, static_argnums=1, inline=True)
def _log_norm_of_logs(logs: Float[Array, "..."], axes: int) -> Float[Array, "..."]:
    """The log norm over all but so many leading axes of entries whose log magnitudes are given."""
    logs = logs.reshape(*logs.shape[:axes], -1)
    top = jnp.max(logs, axis=-1, initial=-jnp.inf, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0)
    total = jnp.sum(jnp.exp(2 * (logs - top)), axis=-1)
    return jnp.where(total == 0, -jnp.inf, top[..., 0] + jnp.log(jnp.where(total == 0, 1, total)) / 2)


@devices.compiled
def _temporal_contributions(recurrence: Recurrence, loss: BoundLoss) -> TemporalContributions:
    done = backward(recurrence, loss)
    return contributions(done)[0]
