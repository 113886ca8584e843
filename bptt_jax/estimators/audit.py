"""Estimators of the gradient judged against the exact one: bias, noise, and how far back they see."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from bptt_jax import devices
from bptt_jax.analysis.backward import backward
from bptt_jax.analysis.batches import Axes, Batch, FlatAxes, batch_size, check_axes, flat_axes, item, of_leaves
from bptt_jax.analysis.float_range import is_flushed
from bptt_jax.analysis.lags import check_lags
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import (
    call_user_function,
    check_function,
    check_key,
    check_positive_int,
    describe_shapes,
    shapes,
    type_name,
)
from bptt_jax.linalg import logscale
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.precision import wide
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.results import Result, counted, field
from bptt_jax.step import (
    Array,
    Input,
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
    ravel_state,
)
from bptt_jax.step import Sequence as Inputs
from bptt_jax.timeline import moved_to_real_steps, numbers_in_piece, real_steps_first

_LOSS_STEPS = 3  # of each sequence, for every lag


class Audit(Result):
    """What estimators of the gradient are worth, N of them, against the exact gradient g of the batch's mean loss.

    Of the errors of what is random, standard errors over the keys; NaN with one key.

    Estimates are plain numbers. Where their dtypes do not hold g (`in_range`), nothing but the shares by lag tells what
    an estimator is worth: what is too small is zero, with a bias of 1, a share of 0 and a cosine of NaN, or what
    rounding has left, what is too large infinite or NaN. Where g is zero all are NaN. The shares by lag are those of
    parts scaled to about 1.

    Attributes:
      names: of the estimators.
      bias: ``[N]``: ``||mean over keys of the batch's estimate - g|| / ||g||``.
      bias_error: ``[N]``: what it would be by chance without any bias, ``(variance of the mean over keys)^(1/2) /
        ||g||``: an unbiased estimator has a `bias` of about that size, not of zero.
      share: ``[N]``: ``<estimate, g> / <g, g>``, its mean over keys: 1 of what is unbiased.
      share_error: ``[N]``.
      cosine: ``[N]``, of the angle between the batch's estimate for one key and g, its mean over keys; NaN where one
        is zero or not finite.
      cosine_error: ``[N]``.
      variance: ``[N]``, over keys, of one sequence's estimate: the sum over all parameters, relative to ``<g, g>``.
        The mean of as many estimates, over keys or sequences, is as much noise as signal.
      sequence_variance: ``[N]``, over the sequences of the batch, of the estimate's mean over keys, likewise; NaN of
        one sequence.
      exact_variance: of the exact gradient, over the sequences, likewise.
      exact_log_norm: natural logarithm of ``||g||``; -inf where it is zero, or lost beside the largest adjoint
        (see `ScaledGradients` of `bptt_jax.adjoints`).
      in_range: whether the dtypes of the parameters hold g: no entry is too large for its own, not all are too small.
      lags: ``[K]``, loss step minus parameter step, in real steps.
      lag_shares: ``[N, K]``: ``<estimate, part> / <part, part>``, of the exact parts of the gradient with this lag,
        their mean and that over keys: 1 where an estimator carries what comes from there, 0 where it is blind. NaN
        where there is no such part, or none that the dtype holds.
      lag_share_errors: ``[N, K]``.
    """

    names: tuple[str, ...] = field(static=True)
    bias: Float[Array, " N"] = field(dims=("estimator",))
    bias_error: Float[Array, " N"] = field(dims=("estimator",))
    share: Float[Array, " N"] = field(dims=("estimator",))
    share_error: Float[Array, " N"] = field(dims=("estimator",))
    cosine: Float[Array, " N"] = field(dims=("estimator",))
    cosine_error: Float[Array, " N"] = field(dims=("estimator",))
    variance: Float[Array, " N"] = field(dims=("estimator",))
    sequence_variance: Float[Array, " N"] = field(dims=("estimator",))
    exact_variance: Float[Array, ""] = field(dims=())
    exact_log_norm: Float[Array, ""] = field(dims=())
    in_range: Bool[Array, ""] = field(dims=())
    lags: Int[Array, " K"] = field(dims=("lags",))
    lag_shares: Float[Array, "N K"] = field(dims=("estimator", "lags"))
    lag_share_errors: Float[Array, "N K"] = field(dims=("estimator", "lags"))

    @property
    def table(self) -> str:
        """One line for each estimator, in Markdown; "sees" is the longest lag of which, and of all shorter ones, it
        carries at least half. What the dtype of g does not let one tell (`in_range`) is "unknown"."""
        head = "estimator", "bias", "share", "cosine", "variance", "sees"
        rows = [head, ("---", *["---:"] * 5)]
        for k, name in enumerate(self.names):
            seen = self._sees(k)
            rows.append((name, *self._numbers(k), "-" if seen is None else counted(seen, "step")))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _numbers(self, k: int) -> tuple[str, str, str, str]:
        """Bias, share, cosine and variance of one estimator."""
        cosine = cosine_in_words(self, k, 3)
        if not self.in_range:
            return "unknown", "unknown", cosine, "unknown"
        bias, share = (
            _with_error(getattr(self, of)[k], getattr(self, f"{of}_error")[k]) for of in ("bias", "share")
        )
        one_key = math.isfinite(self.bias[k]) and math.isnan(self.variance[k])
        return bias, share, cosine, "-" if one_key else _with_error(self.variance[k], math.nan)

    def _sees(self, k: int) -> int | None:
        shares = np.asarray(self.lag_shares, np.float64)[k]
        known = ~np.isnan(shares)
        enough = np.append(shares[known] >= 0.5, False)
        until = int(np.argmin(enough))
        return int(np.asarray(self.lags)[known][until - 1]) if until else None

    def _headline(self) -> str:
        if said := beyond_range(self):
            return f"{said}: nothing is known of bias and cosine"
        order = np.argsort(-np.asarray(self.cosine, np.float64), kind="stable")
        words = [f"{self.names[k]} {cosine_in_words(self, k, 3)}" for k in order]
        return f"cosine with the exact gradient: {', '.join(words)}"


def cosine_in_words(audit: Audit, k: int, digits: int) -> str:
    """That of estimator k, with so many digits after the point, or why there is none."""
    cosine, share = float(audit.cosine[k]), float(audit.share[k])
    if not audit.in_range:
        return "unknown"
    if not math.isnan(cosine):
        return f"{cosine:.{digits}f}"
    if not math.isfinite(share):
        return "undefined (it is not finite)"
    return "undefined (it is zero)" if share == 0 else "undefined (it is zero for some keys)"


def beyond_range(audit: Audit) -> str:
    """What there is to say of the exact gradient where the dtype does not hold it; else nothing."""
    if audit.in_range:
        return ""
    log_norm = float(audit.exact_log_norm)
    if log_norm == -math.inf:
        parts = not np.isnan(np.asarray(audit.lag_shares)).all()
        return f"the gradient {'underflows or cancels' if parts else 'is zero or underflows'}"
    if not math.isfinite(log_norm):
        return "the gradient is not finite"
    side = "below" if log_norm < 0 else "above"
    return f"the gradient, log norm {log_norm:.4g}, is {side} the range of its dtype"


def audit(
    estimators: Mapping[str, Callable[..., Params]],
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    key: PRNGKeyArray,
    keys: int = 16,
    lags: Sequence[int] | None = None,
    args: PyTree = None,
    length: int | None = None,
    in_axes: tuple[Axes, Axes, Axes] | None = None,
) -> Audit:
    """Judges estimators of the gradient: bias, variance, cosine, and by lag how much they carry of what comes from it.

    The exact gradient is that of the backward pass, in log scale. What an estimator carries of a lag is seen from
    outside, of any estimator and any step: it is given a step that uses the parameters at one step s alone (elsewhere
    constant copies of them, which it can neither differentiate nor perturb), and a loss that is the linearisation of
    the user's at one later loss step t. Then the exact gradient is the part of (s, t), that with lag t - s, scaled to
    about 1 so that it does not underflow where it has vanished. For each lag, three loss steps t of every sequence are
    taken, evenly spaced up to the latest, of those that the loss reads and that have so many steps before them in
    their piece. What the parts of other steps do to this one, as they mix in what is random, is not seen by lag but
    in the variance.

    Args:
      estimators: by name; each called as ``estimator(step, params, state0, xs, loss, key=, args=, length=)``, for one
        sequence, within `jax.jit` and `jax.vmap` over keys: those of `bptt_jax.estimators`, with options by
        `functools.partial`, or your own. What does not use its key is computed once.
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`; with `in_axes`, of a batch.
      key: of all that is random.
      keys: how many independent estimates are made of everything.
      lags: to be looked at, each below T; by default 0, 1, 2, 5, 10, 20, 50, ..., as far as T goes. None of them with
        ``lags=()``.
      in_axes: where the batch is in ``(state0, xs, args)``, as for `jax.vmap` and `bptt_jax.Monitor`, say
        ``(None, 0, 0)``; None: there is one sequence.

    Returns:
      `Audit`. Cost: each estimator's own, times keys and sequences, times 1 + three times the lags (once where only
      the last state is read); memory: its own times keys.

    Raises:
      TypeError, ValueError: an argument breaks the contract, an estimator gives no gradient, or the step has no
        backward pass.

    Example:
      >>> step = lambda w, h, x: jnp.tanh(w @ h + x)
      >>> problem = step, 0.8 * jnp.eye(3), jnp.zeros(3), jnp.ones((20, 3)), lambda states: jnp.sum(states**2)
      >>> from functools import partial
      >>> truncated = partial(bptt.estimators.tbptt, k1=1, k2=3)
      >>> found = bptt.audit({"3 steps": truncated}, *problem, key=jax.random.key(0), lags=(0, 2, 3))
      >>> found.lag_shares
      Array([[1., 1., 0.]], dtype=float32)
    """
    functions = _check_estimators(estimators)
    step = check_function("step", step, "step(params, state, x) -> state")
    loss = check_function("loss", loss, "loss(states) -> scalar")
    key, keys = check_key("key", key), check_positive_int("keys", keys)
    in_axes = (None, None, None) if in_axes is None else check_axes(in_axes)
    batch = state0, xs, args
    count = batch_size(params, batch, in_axes)
    setting = _Setting(step, loss, length, flat_axes(batch, in_axes), count)
    first: Any = jax.eval_shape(lambda: setting.problem(params, setting.items(batch, jnp.int32(0)))[0])
    chosen = _spaced(first.length) if lags is None else check_lags("lags", lags, first.length)
    exact = partial(_exact, lags=chosen, setting=setting)
    judges = [
        partial(_judge, name=name, function=function, keys=keys, lags=chosen, setting=setting)
        for name, function in functions.items()
    ]
    for judge in judges:  # what is no estimator is refused before anything is compiled
        jax.eval_shape(lambda judge=judge: judge(params, *batch, key, exact(params, *batch)[0]))
    whole, log_norm, in_range, exact_variance, measured = exact(params, *batch)
    found = [judge(params, *batch, key, whole) for judge in judges]
    together = jax.tree.map(lambda *a: jnp.stack(a), *found)
    return Audit(
        names=tuple(functions),
        exact_variance=exact_variance,
        exact_log_norm=log_norm,
        in_range=in_range,
        lags=measured,
        **together._asdict(),
    )


class _Setting(NamedTuple):
    """What is compiled for: functions, where the sequences are, and how many."""

    step: Step
    loss: Loss
    length: int | None
    axes: FlatAxes
    sequences: int

    def items(self, batch: Batch, i: Array) -> Batch:
        """State, inputs and arguments of the loss, of one sequence."""
        return item(batch, of_leaves(batch, self.axes), i)

    def problem(self, params: Params, items: Batch) -> tuple[Recurrence, BoundLoss]:
        state0, xs, args = items
        return bind(self.step, params, state0, xs, self.length), bind_loss(self.loss, args)


class _Columns(NamedTuple):
    """As in `Audit`, of one estimator."""

    bias: Array
    bias_error: Array
    share: Array
    share_error: Array
    cosine: Array
    cosine_error: Array
    variance: Array
    sequence_variance: Array
    lag_shares: Array
    lag_share_errors: Array


@devices.compiled
def _exact(
    params: Params, state0: State, xs: PyTree, args: PyTree, *, lags: tuple[int, ...], setting: _Setting
) -> tuple[LogScaled, Array, Array, Array, Array]:
    """The gradient of the mean loss, its norm, whether its dtypes hold it, and its variance over the sequences; and the
    lags, beside these."""
    count, measured = setting.sequences, jnp.asarray(lags, int)

    def add(total: LogScaled, i: Array) -> tuple[LogScaled, Array]:
        found = backward(*setting.problem(params, setting.items((state0, xs, args), i))).params_grad.normalized()
        return total + found.widened(), found.log_norm

    like = differentiable_part(params)[0]
    total, log_norms = devices.scan(add, logscale.nothing(like).widened(), jnp.arange(count))
    mean = LogScaled(jax.tree.map(lambda a: a / count, total.mantissa), total.exponent).normalized().within(like)
    log_norm, in_range = mean.log_norm, _in_range(mean)
    if count == 1:
        return mean, log_norm, in_range, jnp.full_like(log_norm, jnp.nan), measured
    squares = jnp.sum(jnp.exp(2 * (log_norms - log_norm)))
    return mean, log_norm, in_range, (squares - count) / (count - 1), measured


def _in_range(whole: LogScaled) -> Array:
    """Whether the dtypes of its leaves hold it: nowhere is it too large, and not everywhere too small."""
    too_large, held = jnp.asarray(False), jnp.asarray(False)
    for leaf in jax.tree.leaves(whole.mantissa):
        info, top = jnp.finfo(leaf.dtype), logscale.top(leaf, whole.exponent)
        least = jnp.where(is_flushed(info, whole.exponent), info.minexp, info.minexp - info.nmant)
        too_large |= top > info.maxexp
        held |= top > least
    return held & ~too_large & jnp.isfinite(whole.log_norm)


@devices.compiled
def _judge(
    params: Params,
    state0: State,
    xs: PyTree,
    args: PyTree,
    key: PRNGKeyArray,
    whole: LogScaled,
    *,
    name: str,
    function: Callable[..., Params],
    keys: int,
    lags: tuple[int, ...],
    setting: _Setting,
) -> _Columns:
    given = params, state0, xs, args, key, whole
    params, state0, xs, args, key, whole = devices.vary(given, devices.axes_of(given))
    count, like, exact = setting.sequences, differentiable_part(params)[0], _vector(whole.mantissa)

    def estimates(step: Step, items: Batch, loss: Loss, key: Array, exponent: Array) -> Float[Array, "keys P"]:
        """One for each key, over ``2^exponent``."""
        state0, xs, args = items

        def one(key: Array) -> Array:
            given = partial(function, key=key, args=args, length=setting.length)
            words = f"(step, params, state0, xs, loss, key=, args=, length=) with params {describe_shapes(params)}"
            found = call_user_function(f"estimators[{name!r}]", words, given, step, params, state0, xs, loss)
            if shapes(found) != shapes(like):
                expected, got = describe_shapes(like), describe_shapes(found)
                raise ValueError(
                    f"estimators[{name!r}]: must return a gradient like the floating parameters, {expected}, got {got}"
                )
            return _vector(LogScaled(found, jnp.zeros((), jnp.int32)).over(exponent))

        return jax.vmap(one)(jax.random.split(key, keys))

    def by_lag(items: Batch, key: Array) -> tuple[Array, Array]:
        """For every lag the sum of shares ``[K, keys]`` over loss steps, and how many these are, ``[K]``."""
        recurrence, bound = setting.problem(params, items)
        recurrence = check_step(recurrence)
        states = states_of(recurrence)
        immediate = bound.differentiate(states).states
        if recurrence.instants.real is not None:
            immediate = moved_to_real_steps(immediate, recurrence.instants.real)
        gated = _AtOneStep(setting.step, params)

        def ended(params: Params, state: State, x: Input) -> State:
            # Beside what goes on to earlier steps, which may have exploded, the part would be none.
            return gated(params, choose(x[1], jax.lax.stop_gradient(state), state), x)

        def of_one(at: _Part) -> tuple[Array, Array]:
            there = jax.tree.map(lambda a: a[at.loss_step], (differentiable_part(states)[0], immediate))
            cotangent = LogScaled.of(there[1]).mantissa
            sequence = _marked(items[1], jnp.arange(recurrence.length) == at.step)
            part = backward(
                bind(ended, params, items[0], sequence, setting.length),
                bind_loss(_one_state, (at.loss_step, cotangent, there[0])),
            ).params_grad.normalized()
            cotangent = logscale.shift(cotangent, -logscale.plain(part.exponent))
            given = items[0], sequence, (at.loss_step, cotangent, there[0])
            found = estimates(gated, given, _one_state, at.key, jnp.zeros((), jnp.int32))
            exact = _vector(part.mantissa)
            square = exact @ exact
            known = _held(cotangent) & (square > 0)
            return jnp.where(known, found @ exact / jnp.where(known, square, 1), 0), known

        def of_lag(lag: Array) -> tuple[Array, Array]:
            parts, missing = _parts_with_lag(recurrence, immediate, lag, jax.random.fold_in(key, lag))

            def of_part(given: tuple[_Part, Array]) -> tuple[Array, Array]:
                return devices.cond(
                    given[1], lambda at: (jnp.zeros(keys, exact.dtype), jnp.asarray(False)), of_one, given[0]
                )

            shares, known = jax.lax.map(of_part, (parts, missing))
            return jnp.sum(shares, axis=0), jnp.sum(known)

        return jax.lax.map(of_lag, jnp.asarray(lags, int))

    def add(total: Array, i: Array) -> tuple[Array, tuple[Array, ...]]:
        items, whole_key, lag_key = (
            setting.items((state0, xs, args), i),
            *jax.random.split(jax.random.fold_in(key, i)),
        )
        found = estimates(setting.step, items, setting.loss, whole_key, whole.exponent)
        mean, within = _mean_and_variance(found)
        return total + found, (within, jnp.sum(jnp.square(mean)), *by_lag(items, lag_key))

    total, (within, squares, lag_shares, known) = devices.scan(
        add, jnp.zeros((keys, exact.size), exact.dtype), jnp.arange(count)
    )
    found, square, nothing = total / count, exact @ exact, jnp.full((), jnp.nan, exact.dtype)
    mean, spread = _mean_and_variance(found)
    size = jnp.linalg.norm(exact)
    # Of far other sizes than the gradient, squares would leave the range.
    away, each = LogScaled.of(mean - exact), LogScaled.of(found, axes=1)
    over_keys = jnp.mean(within)
    of_means = (jnp.sum(squares) - count * jnp.sum(jnp.square(mean))) / max(count - 1, 1) if count > 1 else nothing
    # What the keys alone do to the means is no difference between sequences.
    noise = 0.0 if keys == 1 else over_keys / keys
    counts = jnp.sum(known, axis=0).astype(exact.dtype)
    by_key = jnp.sum(lag_shares, axis=0) / jnp.where(counts > 0, counts, jnp.nan)[:, None]
    return _Columns(
        logscale.shift(jnp.linalg.norm(away.mantissa), logscale.plain(away.exponent)) / size,
        jnp.sqrt(spread / keys) / size,
        *_mean_and_error(found @ exact / square),
        *_mean_and_error(each.mantissa @ exact / (jnp.linalg.norm(each.mantissa, axis=1) * size)),
        over_keys / square,
        jnp.maximum(of_means - noise, 0) / square,
        *_mean_and_error(by_key),
    )


class _Part(NamedTuple):
    """A part of the gradient: the parameters' step, the loss's, and a key for what is random."""

    step: Array
    loss_step: Array
    key: Array


class _AtOneStep:
    """A step whose parameters are those given only where its input says so, and constant elsewhere."""

    def __init__(self, step: Step, elsewhere: Params) -> None:
        self._step, self._elsewhere = step, differentiable_part(elsewhere)[0]

    def __call__(self, params: Params, state: State, x: Input) -> State:
        x, here = x
        part, merge = differentiable_part(params)
        return self._step(merge(choose(here, part, self._elsewhere)), state, x)


def _held(cotangent: State) -> Array:
    """Whether the dtype holds the slope of a loss: beyond its range the loss is infinite, or constant."""
    leaves = [abs(a) for a in jax.tree.leaves(cotangent)]
    finite = jnp.stack([jnp.all(jnp.isfinite(a)) for a in leaves]).all()
    return finite & jnp.stack([jnp.max(a, initial=0) >= jnp.finfo(a.dtype).smallest_normal for a in leaves]).any()


def _one_state(states: State, args: tuple[Array, State, State]) -> Array:
    """The linearisation of a loss at one step; what it does not read may be infinite."""
    at, cotangent, there = args
    here = jax.tree.map(lambda a: a[at], differentiable_part(states)[0])

    def change(d: Array, a: Array, b: Array) -> Array:
        return jnp.sum(jnp.real(jnp.where(d == 0, jnp.zeros_like(a), d * (a - b))))

    changes = jax.tree.leaves(jax.tree.map(change, cotangent, here, there))
    dtype = max((a.dtype for a in changes), key=lambda dtype: dtype.itemsize)
    return sum((a.astype(dtype) for a in changes), jnp.zeros((), dtype))


def _marked(xs: PyTree, here: Array) -> Inputs:
    """With the mark of the step at which parameters are used beside the inputs."""
    sequence = xs if isinstance(xs, Inputs) else Inputs(xs)
    return replace(sequence, xs=(sequence.xs, here))


def _parts_with_lag(recurrence: Recurrence, immediate: State, lag: Array, key: Array) -> tuple[_Part, Array]:
    """Up to `_LOSS_STEPS` of them, evenly spaced, and which are missing."""
    real = recurrence.real
    number = numbers_in_piece(real, recurrence.resets)
    read = [jnp.any(a.reshape(len(a), -1) != 0, axis=1) for a in jax.tree.leaves(immediate)]
    fit = real & jnp.stack(read).any(axis=0) & (number > lag)
    many, index = jnp.sum(fit), jnp.arange(_LOSS_STEPS)
    chosen = jnp.minimum(many, _LOSS_STEPS)
    missing = index >= chosen
    nth = jnp.where(missing, 0, (index + 1) * many // jnp.maximum(chosen, 1) - 1)
    loss_steps = jnp.argsort(~fit, stable=True)[nth]
    steps = real_steps_first(real)[jnp.maximum(jnp.cumsum(real)[loss_steps] - 1 - lag, 0)]
    return _Part(steps, loss_steps, jax.random.split(key, _LOSS_STEPS)), missing


def _vector(tree: Params) -> Float[Array, " P"]:
    """In at least single precision."""
    vector, _ = ravel_state(tree)
    return wide(vector)


def _mean_and_variance(by_key: Float[Array, "keys ..."]) -> tuple[Array, Array]:
    """Over keys, the variance summed over all else; of what is the same for all keys exactly zero."""
    keys, away = len(by_key), by_key - by_key[:1]
    mean = jnp.mean(away, axis=0)
    variance = (
        jnp.sum(jnp.square(away - mean[None])) / (keys - 1) if keys > 1 else jnp.full((), jnp.nan, mean.dtype)
    )
    return by_key[0] + mean, variance


def _mean_and_error(by_key: Float[Array, "... keys"]) -> tuple[Array, Array]:
    """Over keys, and its standard error."""
    mean, variance = jax.vmap(_mean_and_variance)(by_key.reshape(-1, by_key.shape[-1]))
    error = jnp.sqrt(variance / by_key.shape[-1])
    return mean.reshape(by_key.shape[:-1]), error.reshape(by_key.shape[:-1])


def _with_error(value: Array, error: Array | float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if math.isnan(error) else f"{value:.3g} +- {error:.1g}"


def _check_estimators(estimators: Any) -> dict[str, Callable[..., Params]]:
    if not isinstance(estimators, Mapping):
        raise TypeError(f"estimators: expected a dictionary of functions by name, got {type_name(estimators)}")
    if not estimators or not all(isinstance(name, str) for name in estimators):
        raise ValueError(f"estimators: expected at least one function, each by a name, got {list(estimators)}")
    signature = "estimator(step, params, state0, xs, loss, *, key, args, length) -> params_grad"
    return {name: check_function(f"estimators[{name!r}]", each, signature) for name, each in estimators.items()}


def _spaced(steps: int) -> tuple[int, ...]:
    spaced = [0, *(m * 10**e for e in range(len(str(steps))) for m in (1, 2, 5))]
    return tuple(lag for lag in spaced if lag < steps)
