"""From how far back the gradient comes: its parts by lag, told apart exactly."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Float, Int

from bptt_jax import devices
from bptt_jax.analysis.backward import backward, contracted, not_seen
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import check_positive_int, type_name
from bptt_jax.leaves import along_leading
from bptt_jax.linalg import logscale
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.recurrence.linearization import Linearization, at_many_steps, cut
from bptt_jax.results import Result, counted, field
from bptt_jax.step import Array, Loss, Params, PyTree, Recurrence, State, Step, bind, differentiable_part
from bptt_jax.timeline import moved_to_real_steps, real_steps_first


class GradientByLag(Result):
    """The gradient of the parameters, ``g = sum_k g_k``: what loss steps send to parameters k steps before.

    Attributes:
      lags: ``[K]``: 0 .. K - 1 real steps.
      log_norms: ``[K]``, natural logarithm of ``||g_k||``; it holds where the dtype underflows, and where the whole
        gradient is lost. -inf where nothing comes from there.
      shares: ``[K]``, signed: ``<g_k, g> / <g, g>``. They sum to 1 where K is T; NaN if g is zero, or lost
        beside the largest adjoint (`ScaledGradients`).
      whole_log_norm: of g; -inf likewise.
      parts: the g_k that were asked for, like the parameters with a leading axis, each with a power of two of its
        own: ``parts.value`` are plain numbers. None where none was.
    """

    lags: Int[Array, " K"] = field(dims=("lags",))
    log_norms: Float[Array, " K"] = field(dims=("lags",))
    shares: Float[Array, " K"] = field(dims=("lags",))
    whole_log_norm: Float[Array, ""] = field(dims=())
    parts: LogScaled | None

    def _headline(self) -> str:
        shares, log_norms = np.asarray(self.shares, np.float64), np.asarray(self.log_norms)
        longest = shares.shape[-1] - 1
        if shares.ndim > 1:
            enough = np.cumsum(shares.reshape(-1, longest + 1), axis=1) >= 0.5
            halves = np.argmax(enough, axis=1)[enough.any(axis=1)]
            none, largest = np.asarray(self.whole_log_norm) == -np.inf, np.max(log_norms, axis=-1)
            kinds = {
                "not finite": ~(largest < np.inf),
                f"zero up to a lag of {longest}": none & (largest == -np.inf),
                "underflow or cancel": none & (largest > -np.inf) & (largest < np.inf),
            }
            said = [f"{np.sum(which)} of {none.size} {what}" for what, which in kinds.items() if which.any()]
            if len(halves):
                median = round(np.median(halves))
                said.append(f"half of the gradient comes from {_within(median)} (median of {len(halves)})")
            elif not np.any([*kinds.values()], axis=0).all():
                said.append(f"of no {'other ' if said else ''}gradient half comes from {_within(longest)}")
            return "; ".join(said)
        some = np.flatnonzero(log_norms > -np.inf)
        if self.whole_log_norm == -np.inf:
            return (
                not_seen("at lag", log_norms, 0) if some.size else f"the gradient is zero up to a lag of {longest}"
            )
        if np.isnan(shares).any():
            return "the gradient is not finite"
        if not len(some):
            return f"nothing of the gradient comes from {_within(longest)}"
        enough = np.cumsum(shares) >= 0.5
        how_much, lag = ("half", int(np.argmax(enough))) if enough.any() else ("less than half", longest)
        farthest = f", the farthest part from {_steps_back(some[-1])}" if some[-1] > 0 else ""
        return f"{how_much} of the gradient comes from {_within(lag)}{farthest}"


def _within(lag: int) -> str:
    return f"at most {_steps_back(lag)}" if lag else "the loss steps themselves"


def _steps_back(lag: int) -> str:
    return f"{counted(lag, 'step')} back"


def gradient_by_lag(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    longest: int | None = None,
    parts: Sequence[int] = (),
    args: PyTree = None,
    length: int | None = None,
) -> GradientByLag:
    """The exact parts of dL/dparams by lag: loss step minus parameter step.

    ``g_k = sum_t (dh_{t-k}/dparams)^T (dh_t/dh_{t-k})^T dl/dh_t``, with the immediate derivatives of the step and of
    the loss (Werbos 1990, "Backpropagation through time"; the inner sum of Pascanu et al. 2013, arXiv:1211.5063,
    eq. 4). The first K of them make the gradient that is truncated to a window of K steps. The error signals of all
    loss steps are carried back together, one step for each lag, with a power of two for each. Lags count real steps,
    and no signal passes a reset: padding and resets give the parts of the pieces alone, added up.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`. The immediate derivative with respect
        to each state is that step's loss.
      longest: K, how many lags, at most; T by default.
      parts: the lags whose parts are wanted themselves, each below K.

    Returns:
      `GradientByLag`. Cost O(T K) products with transposed Jacobians, memory O(T D) and a few times the parameters.

    Raises:
      TypeError, ValueError: an argument breaks the contract, or the step has no backward pass.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> problem = step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]
      >>> found = bptt.analysis.gradient_by_lag(*problem, parts=(0, 2))
      >>> found.shares
      Array([0.636, 0.273, 0.091, 0.   ], dtype=float32)
      >>> found.parts.value  # of h_3 = 1.75, w h_2, w^2 h_1 and w^3 h_0
      Array([1.75, 0.25], dtype=float32)
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args)
    longest = check_longest(longest, recurrence.length)
    return _gradient_by_lag(recurrence, bound, longest=longest, chosen=check_lags("parts", parts, longest))


def check_longest(longest: int | None, steps: int) -> int:
    """How many lags there are to be: as many as wanted, no more than there are steps."""
    return steps if longest is None else min(check_positive_int("longest", longest), steps)


def check_lags(name: str, lags: Any, longest: int) -> tuple[int, ...]:
    """As plain integers.

    Raises:
      TypeError, ValueError: they are no sequence of integers from 0 on and below `longest`.
    """
    if isinstance(lags, str) or not isinstance(lags, Sequence):
        raise TypeError(f"{name}: expected a sequence of integers, got {type_name(lags)}")
    for lag in lags:
        if isinstance(lag, bool) or not isinstance(lag, (int, np.integer)):
            raise TypeError(f"{name}: expected integers, got {type_name(lag)}")
        if not 0 <= lag < longest:
            raise ValueError(f"{name}: expected lags of at least 0 and below {longest}, got {lag}")
    return tuple(map(int, lags))


def over_lags(
    along: Linearization,
    immediate: State,
    visit: Callable[[Any, LogScaled], tuple[Any, Any]],
    init: Any,
    longest: int,
    log_scale: bool = True,
) -> tuple[Any, Any]:
    """Goes from lag to lag, with the gradient's part from each; to be traced.

    ``carry, out = visit(carry, part)`` is called for the lags 0 .. longest - 1 in this order, as the body of a scan:
    `part` is like the floating parameters, so that no two of them need be held at once.

    Args:
      along, immediate, log_scale: as for `way_back`.
      visit: to be traced.
      init: its first carry.
      longest: how many lags.

    Returns:
      The last carry, and the stacked outputs.
    """
    start, go = way_back(along, immediate, log_scale)

    def body(carry: tuple[Any, LogScaled], _: None) -> tuple[tuple[Any, LogScaled], Any]:
        visited, signals = carry
        part, signals = go(signals)
        visited, out = visit(visited, part)
        return (visited, signals), out

    (visited, _), outs = devices.scan(body, (init, start), None, length=longest)
    return visited, outs


def way_back(
    along: Linearization, immediate: State, log_scale: bool = True
) -> tuple[LogScaled, Callable[[LogScaled], tuple[LogScaled, LogScaled]]]:
    """The error signals of all loss steps, and what takes them one lag further; to be traced.

    Args:
      along: the recurrence, linearised.
      immediate: dl/dh_1 .. dl/dh_T, as `BoundLoss.differentiate` has them.
      log_scale: whether every signal has a power of two of its own. Without, all is in plain numbers of the dtype,
        as `jax.grad` computes it: signals underflow and overflow where theirs do.

    Returns:
      ``(signals, go)`` with ``part, signals = go(signals)``: the gradient's part from the lag at which the signals
      are, and the signals at the next.
    """
    real, residuals = along.recurrence.instants.real, along.residuals
    if real is not None:
        immediate = moved_to_real_steps(immediate, real)
        order = real_steps_first(real)
        residuals, immediate = jax.tree.map(lambda a: a[order], (residuals, immediate))
    along = along._replace(residuals=residuals)

    def scaled(mantissas: State, exponents: Array) -> LogScaled:
        signals = LogScaled(mantissas, exponents)
        return signals.normalized() if log_scale else signals

    def earlier(a: Array, nothing: int = 0) -> Array:
        return jnp.concatenate([a[1:], jnp.full_like(a[:1], nothing)])

    def go(signals: LogScaled) -> tuple[LogScaled, LogScaled]:
        # signals[t] is what arrives at h_{t+1} of the loss that lies so many steps later.
        if log_scale:
            part = contracted(along, signals).normalized()
        else:
            part = LogScaled(_added_up(along, signals.mantissa), jnp.zeros((), jnp.int32))
        pulled = at_many_steps(lambda r, signal: cut(r, along.pull(r, signal)), residuals, signals.mantissa)
        exponents = earlier(signals.exponent, logscale.ZERO_EXPONENT) if log_scale else signals.exponent
        return part, scaled(jax.tree.map(earlier, pulled), exponents)

    return scaled(immediate, jnp.zeros(along.recurrence.length, jnp.int32)), go


def _added_up(along: Linearization, cotangents: State) -> Params:
    """What cotangents at all steps add to the parameters' gradient, one after the other in its own dtype."""

    def body(total: Params, at_t: tuple[PyTree, State]) -> tuple[Params, None]:
        return jax.tree.map(jnp.add, total, along.pull_params(*at_t)), None

    nothing = jax.tree.map(jnp.zeros_like, differentiable_part(along.recurrence.params)[0])
    return devices.scan(body, nothing, (along.residuals, cotangents), reverse=True)[0]


def hoisted(
    go: Callable[[LogScaled], tuple[LogScaled, LogScaled]], signals: LogScaled
) -> tuple[list[Any], Callable[[list[Any], LogScaled], tuple[LogScaled, LogScaled]]]:
    """``(constants, function)`` with ``function(constants, signals) = go(signals)``.

    A closure does not leave the trace in which it was made, say that of `jax.vmap`; the two of these can.
    """
    program, shapes = jax.make_jaxpr(go, return_shape=True)(signals)
    structure = jax.tree.structure(shapes)

    def function(constants: list[Any], signals: LogScaled) -> tuple[LogScaled, LogScaled]:
        out = jaxpr_as_fun(ClosedJaxpr(program.jaxpr, constants))(*jax.tree.leaves(signals))
        part, further = jax.tree.unflatten(structure, out)
        return part, further

    return program.consts, function


def inner(a: LogScaled, b: LogScaled) -> LogScaled:
    """The real inner product of two trees: sum of Re(conj(a) b). In half precision that of so many entries may be
    none, so it is at least in single."""
    dtype = a.log_norm.dtype
    pairs = zip(jax.tree.leaves(a.mantissa), jax.tree.leaves(b.mantissa), strict=True)
    total = sum((jnp.sum(jnp.real(u.conj() * v), dtype=dtype) for u, v in pairs), jnp.zeros((), dtype))
    return LogScaled(total, logscale.plain(a.exponent) + logscale.plain(b.exponent))


def relative_error(found: LogScaled, exact: LogScaled) -> Float[Array, ""]:
    """``||found - exact|| / ||exact||``; NaN where that is zero."""
    negative = LogScaled(jax.tree.map(jnp.negative, exact.mantissa), exact.exponent)
    none = exact.log_norm == -jnp.inf
    return jnp.where(none, jnp.nan, jnp.exp((found + negative).log_norm - jnp.where(none, 0, exact.log_norm)))


@devices.compiled
def _gradient_by_lag(
    recurrence: Recurrence, loss: BoundLoss, *, longest: int, chosen: tuple[int, ...]
) -> GradientByLag:
    done = backward(recurrence, loss)
    whole = done.params_grad.normalized()
    square = inner(whole, whole)
    none = square.mantissa == 0
    kept = None
    if chosen:
        exponents = jnp.full(len(chosen), logscale.ZERO_EXPONENT, jnp.int32)
        kept = LogScaled(
            jax.tree.map(lambda a: jnp.zeros((len(chosen), *a.shape), a.dtype), whole.mantissa), exponents
        )

    def visit(carry: tuple[Array, LogScaled | None], part: LogScaled) -> tuple[Any, tuple[Array, Array]]:
        lag, kept = carry
        if kept is not None:
            wanted = jnp.asarray(chosen, jnp.int32) == lag
            kept = jax.tree.map(lambda a, new: jnp.where(along_leading(wanted, a), new[None], a), kept, part)
        share = inner(part, whole).over(square.exponent) / jnp.where(none, 1, square.mantissa)
        return (lag + 1, kept), (part.log_norm, jnp.where(none, jnp.nan, share))

    start = jnp.zeros((), jnp.int32), kept
    (_, kept), (log_norms, shares) = over_lags(done.along, done.loss.states, visit, start, longest)
    return GradientByLag(jnp.arange(longest), log_norms, shares, whole.log_norm, kept)
