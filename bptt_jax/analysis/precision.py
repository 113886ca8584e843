"""What a dtype makes of the gradient, by lag: digits left, underflow, and the loss scale that mends it."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bptt_jax import devices
from bptt_jax.analysis.backward import backward, linearize_for
from bptt_jax.analysis.lags import check_longest, hoisted, relative_error, way_back
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import check_floating
from bptt_jax.linalg import logscale, reductions
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.recurrence.tensorfloat32 import EPSILON, with_tensorfloat32
from bptt_jax.results import Result, field
from bptt_jax.step import Array, Loss, Params, PyTree, Recurrence, State, Step, bind, is_differentiable

_TF32 = "tensorfloat32"


class GradientPrecision(Result):
    """The gradient's part from each lag, as a dtype computes it beside what it is; in single precision itself, so that
    it can be used where double precision is off.

    Attributes:
      lags: ``[K]``: 0 .. K - 1 real steps.
      log_norms: ``[K]``, natural logarithm of the norm of what it is; -inf where nothing comes from there.
      relative_errors: ``[K]``, the norm of the difference over that of what it is; NaN where that is zero, inf where
        the dtype's part is not finite.
      underflows: ``[K]``, whether the largest entry of the dtype's part is below its normal numbers, or zero, where
        it should not be zero.
      half_lag: the first lag at which half of the digits are gone: an error above the root of the dtype's epsilon. inf
        if there is none, here and below.
      underflow_lag: the first lag that underflows.
      lost_lag: the first lag whose part is exactly zero, and should not be.
      loss_scales_log2: ``[K]``: 2 to this power, times the loss, keeps the largest entries of part and error signal
        at this lag and all before it among the normal numbers; at least 0.
      highest_log2: of the largest loss scale that leaves room below overflow, for roundings, a factor of up to 2; where
        there is no gradient, of the largest that the dtype holds with as much room.
      dtype: its name.
    """

    lags: Int[Array, " K"] = field(dims=("lags",))
    log_norms: Float[Array, " K"] = field(dims=("lags",))
    relative_errors: Float[Array, " K"] = field(dims=("lags",))
    underflows: Bool[Array, " K"] = field(dims=("lags",))
    half_lag: Float[Array, ""] = field(dims=())
    underflow_lag: Float[Array, ""] = field(dims=())
    lost_lag: Float[Array, ""] = field(dims=())
    loss_scales_log2: Int[Array, " K"] = field(dims=("lags",))
    highest_log2: Int[Array, ""] = field(dims=())
    dtype: str = field(static=True)

    @property
    def digits(self) -> Float[Array, " K"]:
        """Decimal digits left of each lag's part: 0 is none, inf exact; NaN where nothing comes from."""
        errors = self.relative_errors
        return jnp.where(errors == 0, jnp.inf, jnp.maximum(-jnp.log10(jnp.where(errors == 0, 1, errors)), 0))

    @property
    def loss_scale_log2(self) -> Int[Array, ""]:
        """The smallest power of two that mends every lag that any loss scale mends."""
        mended = self.loss_scales_log2 <= self.highest_log2
        return jnp.max(jnp.where(mended, self.loss_scales_log2, 0))

    @property
    def mended_lag(self) -> Float[Array, ""]:
        """The first lag that is below the normal numbers under the largest loss scale too."""
        return _first(self.loss_scales_log2 > self.highest_log2)

    def _headline(self) -> str:
        if np.all(np.asarray(self.log_norms) == -np.inf):
            return f"{self.dtype}: there is no gradient"
        half, under, mended = float(self.half_lag), float(self.underflow_lag), float(self.mended_lag)
        said = f"{self.dtype}: " + (
            "half of the digits are left" if half == np.inf else f"half gone at lag {half:.0f}"
        )
        if under == np.inf:
            return f"{said}, no underflow up to lag {len(self.lags) - 1}"
        if mended <= under:
            return f"{said}, underflow at {under:.0f}, which no loss scale mends"
        until = "" if mended == np.inf else f" up to {mended - 1:.0f}"
        return f"{said}, underflow at {under:.0f}, which a loss scale of 2^{int(self.loss_scale_log2)} mends{until}"


def gradient_precision(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    dtype: Any,
    longest: int | None = None,
    args: PyTree = None,
    length: int | None = None,
) -> GradientPrecision:
    """The gradient's part from each lag, in a dtype and without log scale, against log-scaled double precision.

    Parameters, state, inputs and `args` are rounded to the dtype, once; from these numbers forward and backward pass
    are carried out twice, in the dtype as `jax.grad` does, and in double precision. What is judged is thus the
    arithmetic, that of the forward pass included, and not what rounding the weights changes. Every loss step's signal
    is carried back by itself, so that its parts can be told apart; where `jax.grad` adds up signals of many loss
    steps, the small ones lose digits beside large ones besides.

    Loss scales are those of Micikevicius et al. 2018 (arXiv:1710.03740, section 3.2), by lag.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`. `step` is called with floating
        numbers of the dtype and with double ones, and must keep both: arrays that it makes take the dtype of what it is
        given.
      dtype: "bfloat16", "float16", "float32", as JAX's own or by name; or "tensorfloat32": float32, products of
        matrices and convolutions of factors with 10 bits behind the point, as GPUs multiply by default. This is
        emulated everywhere.
      longest: K, how many lags, at most; T by default.

    Returns:
      `GradientPrecision`. Cost O(T K) products with transposed Jacobians, twice; memory as for `gradient_by_lag`. A
      compiler may keep more digits within one step than the dtype has; subnormal numbers are what this device makes
      of them.

    Raises:
      TypeError, ValueError: an argument breaks the contract, the step has no backward pass, a complex number is to be
        of half precision, or JAX has no double precision: this needs ``jax.config.update("jax_enable_x64", True)``,
        which nothing here switches on.

    Example:
      >>> with jax.enable_x64(True):
      ...     step = lambda b, h, x: 0.5 * h + b
      ...     problem = step, jnp.zeros(()), jnp.zeros(()), None, lambda states: states[-1]
      ...     found = bptt.analysis.gradient_precision(*problem, dtype="float16", length=40)
      >>> int(found.underflow_lag), int(found.lost_lag), found.loss_scales_log2.tolist()[20::5]  # 2^-15, 2^-25
      (15, 25, [6, 11, 16, 21])
    """
    if not jax.config.read("jax_enable_x64"):
        raise ValueError(
            'jax_enable_x64: expected double precision, against which digits are counted; jax.config.update("jax_'
            'enable_x64", True) switches it on, `with jax.enable_x64(True):` for a while'
        )
    tensorfloat = isinstance(dtype, str) and dtype == _TF32
    low = jnp.dtype(jnp.float32) if tensorfloat else check_floating("dtype", dtype)
    if low.itemsize > 4:
        raise ValueError(f'dtype: expected bfloat16, float16, float32 or "{_TF32}", got {low}')
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args)
    return _gradient_precision(
        (params, state0, xs, args),
        step=step,
        loss=bound.function,
        length=recurrence.length,
        longest=check_longest(longest, recurrence.length),
        tensorfloat=tensorfloat,
        low=str(low),
    )


def _cast(tree: PyTree, dtype: jnp.dtype) -> PyTree:
    """With floating leaves of the dtype, complex ones of the complex dtype that has its digits."""

    def leaf(a: Any) -> Any:
        if not is_differentiable(a):
            return a
        a = jnp.asarray(a)
        if not jnp.iscomplexobj(a):
            return a.astype(dtype)
        if dtype.itemsize < 4:
            raise TypeError(f"dtype: expected float32 or double for complex numbers, got {dtype}")
        return a.astype(jnp.complex64 if dtype.itemsize == 4 else jnp.complex128)

    return jax.tree.map(leaf, tree)


def _first(which: Bool[Array, " K"]) -> Float[Array, ""]:
    return jnp.where(jnp.any(which), jnp.argmax(which).astype(jnp.float32), jnp.inf)


def _largest(tree: PyTree) -> Float[Array, ""]:
    """Of all entries, real and imaginary parts being entries of their own."""
    parts = reductions.real_parts(tree)
    each = [jnp.max(jnp.abs(part), initial=0).astype(jnp.float64) for part in parts]
    return reduce(jnp.maximum, each, jnp.zeros((), jnp.float64))


@devices.compiled
def _gradient_precision(
    given: tuple[Params, State, PyTree, PyTree],
    *,
    step: Step,
    loss: Loss,
    length: int,
    longest: int,
    tensorfloat: bool,
    low: str,
) -> GradientPrecision:
    lowly = _cast(given, jnp.dtype(low))

    def bound_to(given: tuple[Params, State, PyTree, PyTree]) -> tuple[Recurrence, BoundLoss]:
        return bind(step, *given[:3], length), bind_loss(loss, given[3])

    done = backward(*bound_to(_cast(lowly, jnp.dtype(jnp.float64))))
    exact_signals, exact_go = way_back(done.along, done.loss.states)
    kept: dict[str, Any] = {}

    def begin(*given: Any) -> tuple[LogScaled, list[Any]]:
        recurrence, bound = bound_to(given)
        along = linearize_for(recurrence, bound)
        signals, go = way_back(along, bound.differentiate(along.states).states, log_scale=False)
        constants, kept["go"] = hoisted(go, signals)
        return signals, constants

    emulate = with_tensorfloat32 if tensorfloat else lambda function: function
    signals, constants = emulate(begin)(*lowly)

    info = jnp.finfo(low)
    epsilon = EPSILON if tensorfloat else float(info.eps)

    def body(carry: tuple[LogScaled, LogScaled], _: None) -> tuple[tuple[LogScaled, LogScaled], tuple[Array, ...]]:
        exact_signals, signals = carry
        top = jnp.max(exact_signals.exponent)
        exact, exact_signals = exact_go(exact_signals)
        part, signals = emulate(kept["go"])(constants, signals)
        found = jax.tree.map(lambda a, like: a.astype(like.dtype), part.mantissa, exact.mantissa)
        error = relative_error(LogScaled(found, jnp.zeros((), jnp.int32)), exact)
        finite = jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(found)] or [jnp.asarray(True)])
        error = jnp.where((exact.log_norm == -jnp.inf) | jnp.all(finite), error, jnp.inf)
        exponent = jnp.minimum(top, exact.exponent)
        return (exact_signals, signals), (exact.log_norm, error, _largest(found), exponent, top)

    carry = exact_signals, signals
    _, (log_norms, errors, largest, exponents, tops) = devices.scan(body, carry, None, length=longest)
    something, held = log_norms != -jnp.inf, jnp.isfinite(log_norms)
    underflows = something & (largest < float(info.smallest_normal))
    needed = jnp.where(held, int(info.minexp) + 1 - exponents, 0)
    whole = jnp.max(done.signal.normalized().exponent), done.params_grad.normalized().exponent
    top = jnp.maximum(jnp.max(tops), jnp.maximum(*whole))
    return GradientPrecision(
        lags=jnp.arange(longest, dtype=jnp.int32),
        log_norms=log_norms.astype(jnp.float32),
        relative_errors=errors.astype(jnp.float32),
        underflows=underflows,
        half_lag=_first(something & ~(errors <= epsilon**0.5)),
        underflow_lag=_first(underflows),
        lost_lag=_first(something & (largest == 0)),
        loss_scales_log2=jax.lax.cummax(jnp.maximum(needed, 0)),
        highest_log2=(int(info.maxexp) - 1 - logscale.plain(top)).astype(jnp.int32),
        dtype=_TF32 if tensorfloat else low,
    )
