"""Spectra of Jacobians and of their products for states too large for a D x D matrix.

Of the leading few values, by Krylov methods, from Jacobian-vector and vector-Jacobian products alone. Products of
Jacobians are never formed and have no range to leave: every factor's image is a mantissa and a power of two.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Inexact

from bptt_jax import devices
from bptt_jax.checks import check_positive_int, differentiated_by_rule
from bptt_jax.linalg.krylov import (
    Product,
    eigen_steps,
    eigenpairs,
    singular_steps,
    singular_triplets,
)
from bptt_jax.linalg.logscale import LogScaled, to_log
from bptt_jax.linalg.precision import at_least_single
from bptt_jax.recurrence.linearization import (
    Linearization,
    Mode,
    differentiation_mode,
    linearize,
    require_pulls,
    require_pushes,
)
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.results import Result, field
from bptt_jax.step import (
    Array,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    choose,
    full_precision,
    ravel_state,
    state_size,
)
from bptt_jax.timeline import after_reset, finite_steps

# Numbers in the bases of all Krylov spaces that are built at one time: 128 MB in float32.
_BASIS_NUMBERS = 1 << 25


class LeadingValues(Result):
    """Of every step's Jacobian, in descending order; NaN in padding.

    Attributes:
      values: ``[T, num]``, real singular values or complex eigenvalues.
      errors: ``[T, num]``, an estimate from the residual, rounding included. Of singular values: one of the
        Jacobian's lies within it. Of eigenvalues: ``||J x - value x||`` for a unit vector x, the distance of the
        nearest matrix that has this eigenvalue; how far the Jacobian's own are is a matter of its condition.
    """

    values: Inexact[Array, "T num"] = field(dims=("time", "rank"))
    errors: Float[Array, "T num"] = field(dims=("time", "rank"))

    def _headline(self) -> str:
        largest, errors = np.abs(self.values)[..., 0], np.asarray(self.errors)[..., 0]
        known = np.isfinite(largest)
        if not known.any():
            return "no step has any that are finite"
        found = "the largest modulus" if np.iscomplexobj(self.values) else "the largest"
        low, high = np.min(largest[known]), np.max(largest[known])
        return f"{found} is {low:.3g} to {high:.3g}, with errors up to {np.max(errors[known]):.1g}"


class LeadingLogValues(Result):
    """Of one product of Jacobians, in descending order.

    Attributes:
      log_values: ``[num]``, natural logarithms of singular values; -inf for what is zero, or lost in the rounding
        of the first.
      errors: ``[num]``, relative to each singular value, so to first order of its logarithm; inf where it is zero.
        Of a long product all but the first few lie below the rounding of the first, with errors above 1: no digit
        of them holds.
    """

    log_values: Float[Array, " num"] = field(dims=("rank",))
    errors: Float[Array, " num"] = field(dims=("rank",))

    def _headline(self) -> str:
        held = f"{np.sum(np.asarray(self.errors) < 1)} of {self.errors.size} above the rounding"
        return f"the largest is exp({float(self.log_values[0]):.4g}); {held}"


def leading_singular_values(
    step: Step, params: Params, state0: State, xs: PyTree = None, *, num: int, length: int | None = None
) -> LeadingValues:
    """The largest singular values of every step's Jacobian dh_{k+1}/dh_k, without the Jacobian.

    Golub-Kahan bidiagonalisation with full reorthogonalisation, in spaces of ``min(D, 2 num + 30)`` dimensions;
    exact where that is D. The worst case are random matrices, whose values crowd towards the largest: at D = 8192
    the first is found to 1e-3 of itself and the fourth of four to 1e-2, always from below. Costs as many products
    with the Jacobian, and with its transpose; memory O(T * D) and a constant.

    Derivatives are those of simple singular values, ``u^T dJ v``, those of `errors` zero. There are no second ones,
    for which all other vectors would be wanted: `bptt_jax.singular_values` of `bptt_jax.jacobians` has them.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      num: how many, at most D.

    Returns:
      `LeadingValues`; NaN in padding, where a step leads to NaN or infinity, and where its Jacobian is not finite.
      After a reset they are those of the derivative with respect to the state that the step starts from.

    Raises:
      TypeError, ValueError: an argument breaks the contract, or the step cannot be differentiated both forwards and
        backwards (a `lax.while_loop` of unknown length), or a second derivative is taken.

    Example:
      >>> step = lambda w, h, x: w @ h
      >>> w = jnp.array([[0.0, 2.0], [0.0, 0.0]])
      >>> bptt.analysis.leading_singular_values(step, w, jnp.ones(2), length=3, num=1).values.ravel()
      Array([2., 2., 2.], dtype=float32)
    """
    return _leading(bind(step, params, state0, xs, length), of=_singular_values_of, num=check_num(num, state0))


def leading_eigenvalues(
    step: Step, params: Params, state0: State, xs: PyTree = None, *, num: int, length: int | None = None
) -> LeadingValues:
    """The eigenvalues of largest modulus of every step's Jacobian dh_{k+1}/dh_k, without the Jacobian.

    Arnoldi's method with full reorthogonalisation, in spaces of ``min(D, 2 num + 100)`` dimensions, exact where
    that is D. Eigenvalues apart from the others are found to many digits. Those on the rim of a filled disc, as a
    random matrix has, are not: the largest modulus comes out a few percent low, and `errors` say so.

    Derivatives are those of simple eigenvalues, ``y^T dJ x / y^T x``; the left vectors y are sought by a second
    Arnoldi process, where a derivative is taken. Those of `errors` are zero. There are no second ones.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      num: how many, at most D. It may cut a conjugate pair in two.

    Returns:
      `LeadingValues`; NaN in padding, where a step leads to NaN or infinity, and where its Jacobian is not finite.
      After a reset they are those of the derivative with respect to the state that the step starts from.

    Raises:
      TypeError, ValueError: an argument breaks the contract, or a second derivative is taken.

    Example:
      >>> step = lambda w, h, x: w @ h
      >>> w = jnp.array([[3.0, 1.0], [0.0, 2.0]])
      >>> bptt.analysis.leading_eigenvalues(step, w, jnp.ones(2), length=3, num=1).values.real.ravel()
      Array([3., 3., 3.], dtype=float32)
    """
    return _leading(bind(step, params, state0, xs, length), of=_eigenvalues_of, num=check_num(num, state0))


def product_singular_values(
    step: Step, params: Params, state0: State, xs: PyTree = None, *, num: int, length: int | None = None
) -> LeadingLogValues:
    """The largest singular values of ``dh_T/dh_0``, the product of all Jacobians, as logarithms.

    As `leading_singular_values`, of a map that is all T steps: each of its products goes along the whole
    trajectory. No D x D matrix is formed, and the product may leave the range of its dtype at any length. What one
    vector holds may not: a direction that falls behind another by the whole range (2^126 in single precision) and
    overtakes it later is lost, or gives NaN.

    Args, Raises: as for `leading_singular_values`.

    Returns:
      `LeadingLogValues`; NaN if a step leads to NaN or infinity, or a Jacobian is not finite. Nothing passes a
      reset: with one after the first real step all are -inf.

    Example:
      >>> step = lambda w, h, x: w * h
      >>> w = jnp.array([0.5, 2.0])
      >>> found = bptt.analysis.product_singular_values(step, w, jnp.ones(2), length=10, num=1)
      >>> round(float(found.log_values[0] / jnp.log(2.0)), 3)
      10.0
    """
    return _product_singular_values(bind(step, params, state0, xs, length), num=check_num(num, state0))


def check_num(num: int, state0: State) -> int:
    """Returns `num` if it is an integer from 1 to D."""
    num, size = check_positive_int("num", num), state_size(state0)
    if num > size:
        raise ValueError(f"num: expected at most {size}, the numbers of the state, got {num}")
    return num


def singular_values_at(
    step: Step, params: Params, states: State, xs: PyTree, num: int, mode: Mode
) -> LeadingValues:
    """Of the Jacobian at each of K given states (leaves ``[K, ...]``) and inputs."""
    return _at(_singular_values_of, step, params, states, xs, num, mode)


def eigenvalues_at(step: Step, params: Params, states: State, xs: PyTree, num: int, mode: Mode) -> LeadingValues:
    """Of the Jacobian at each of K given states (leaves ``[K, ...]``) and inputs."""
    return _at(_eigenvalues_of, step, params, states, xs, num, mode)


def pull_back(along: Linearization) -> Callable[[PyTree, Array], Array]:
    """``(residuals of one step, vector [D]) -> J^T vector``."""
    _, unravel = ravel_state(along.no_cotangents)

    def pull(residuals: PyTree, vector: Array) -> Array:
        # The cotangent of x + iy is dL/dx - i dL/dy, while Jacobians act on (x, y).
        cotangent = jax.tree.map(jnp.conj, unravel(vector))
        return ravel_state(jax.tree.map(jnp.conj, along.pull(residuals, cotangent)))[0]

    return pull


def suffix_log_norms(along: Linearization) -> Float[Array, " T"]:
    """Entry t is ``log ||dh_e/dh_t||_2``, for all t at a time, e the end of the segment that step t -> t + 1 belongs
    to; NaN in padding.

    Every t has its own Krylov space, and all take each step together, so that a Jacobian acts on a block of
    vectors; those whose product begins later wait.
    """
    steps, size = along.recurrence.length, along.recurrence.size
    ends = jnp.full(steps, steps)
    if along.recurrence.instants.reset is not None:
        resets = jnp.where(along.recurrence.resets, jnp.arange(steps), steps)
        ends = jnp.append(jax.lax.cummin(resets, reverse=True)[1:], steps)
    # An eighth of all at most: those that wait are paid for.
    lanes = max(1, min(-(-steps // 8), _BASIS_NUMBERS // (2 * singular_steps(1, size) * size)))
    count = -(-steps // lanes)

    def block(first: Array) -> Array:
        def lane(t: Array) -> Array:
            return _log_values(along, first, t, ends[jnp.minimum(t, steps - 1)], 1).log_values[0]

        return jax.vmap(lane)(first + jnp.arange(lanes))

    # The last block may reach beyond T: empty products, whose norms are cut off.
    norms = jax.lax.map(block, lanes * jnp.arange(count)).reshape(-1)[:steps]
    bad = jnp.append(jnp.cumsum(_spoilt(along)[::-1])[::-1], 0)  # from each step on
    return jnp.where(along.recurrence.real & (bad[:-1] == bad[ends]), norms, jnp.nan)


@devices.compiled
def _leading(recurrence: Recurrence, *, of: Callable[..., LeadingValues], num: int) -> LeadingValues:
    recurrence = check_step(recurrence)
    if of is _singular_values_of:
        first = jax.tree.map(lambda a: a[:1], recurrence.instants)
        _require_both_ways(linearize(recurrence.stretch(recurrence.state0, first, 1)), "leading_singular_values")
    states, mode = states_of(recurrence), differentiation_mode(recurrence)
    step, params, xs = recurrence.step, recurrence.params, recurrence.instants.x
    found = _at(of, step, params, recurrence.starts(states), xs, num, mode)
    known = (finite_steps(states) & recurrence.real)[:, None]
    return jax.tree.map(lambda a: jnp.where(known, a, jnp.nan), found)


@devices.compiled
def _product_singular_values(recurrence: Recurrence, *, num: int) -> LeadingLogValues:
    recurrence = check_step(recurrence)
    with full_precision():
        along = linearize(recurrence)
    _require_both_ways(along, "product_singular_values")
    first = jnp.zeros((), int)
    found = _log_values(along, first, first, first + recurrence.length, num)
    found = jax.tree.map(lambda a: jnp.where(jnp.any(_spoilt(along)), jnp.nan, a), found)
    zero = after_reset(recurrence.resets, recurrence.real)[-1]
    return LeadingLogValues(jnp.where(zero, -jnp.inf, found.log_values), jnp.where(zero, jnp.inf, found.errors))


def _require_both_ways(along: Linearization, what: str) -> None:
    require_pulls(along, what)
    require_pushes(along, what)


def _spoilt(along: Linearization) -> Bool[Array, " T"]:
    """Steps that lead to NaN or infinity, also where their Jacobian does not show it."""
    return ~finite_steps(along.states) & along.recurrence.real


def _at(
    of: Callable[..., LeadingValues],
    step: Step,
    params: Params,
    states: State,
    xs: PyTree,
    num: int,
    mode: Mode,
) -> LeadingValues:
    def one(inputs: tuple[State, PyTree]) -> LeadingValues:
        state, x = inputs
        vector, unravel = ravel_state(state)

        def moved(v: Array) -> Array:
            return ravel_state(step(params, unravel(v), x))[0]

        # J, or where there is no forward mode its transpose, which has the same values.
        with full_precision():
            if mode == "forward":
                differential = jax.linearize(moved, vector)[1]
            else:
                differential = jax.tree_util.Partial(_first_of, jax.vjp(moved, vector)[1])
        return of(differential, vector, num)

    size = state_size(jax.tree.map(lambda a: a[0], states))
    together = max(1, _BASIS_NUMBERS // (eigen_steps(num, size) * size))
    return jax.lax.map(one, (states, jax.tree.map(jnp.asarray, xs)), batch_size=together)


def _first_of(pull: Callable[[Array], tuple[Array]], cotangent: Array) -> Array:
    return pull(cotangent)[0]


def _singular_values_of(differential: Callable[[Array], Array], example: Array, num: int) -> LeadingValues:
    constant = jax.lax.stop_gradient(differential)
    dtype = at_least_single(example.dtype)
    push = _product(constant, example)
    pull = _product(lambda u: jax.linear_transpose(constant, example)(u)[0], example)
    found = jax.lax.stop_gradient(singular_triplets(push, pull, example.size, dtype, num))
    images = jax.vmap(lambda v: differential(v.astype(example.dtype)).astype(dtype))(found.right)
    values, errors = LogScaled((found.values, found.errors), found.exponent).value
    return LeadingValues(_with_derivative(values, jnp.sum(found.left * images, axis=1)), errors)


def _eigenvalues_of(differential: Callable[[Array], Array], example: Array, num: int) -> LeadingValues:
    constant, dtype = jax.lax.stop_gradient(differential), at_least_single(example.dtype)
    found = jax.lax.stop_gradient(eigenpairs(_product(constant, example), example.size, dtype, num))
    right = found.vectors[:num]

    def image(v: Array) -> Array:
        return differential(v.astype(example.dtype)).astype(dtype)

    images = jax.lax.complex(jax.vmap(image)(right.real), jax.vmap(image)(right.imag))
    values, errors = LogScaled((found.values[:num], found.errors[:num]), found.exponent).value
    return LeadingValues(_attached(num, values, images, right, differential, example), errors)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attached(
    num: int, values: Array, images: Array, right: Array, differential: Callable[[Array], Array], example: Array
) -> Array:
    """`values`, with the derivatives that eigenvalues have by those of ``J x``, the images of their vectors x."""
    return differentiated_by_rule(values, images)


@_attached.defjvp
def _attached_jvp(num: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, _, right, differential, example = primals
    once, differential = _once(differential), jax.lax.stop_gradient(differential)
    transpose = _product(lambda u: jax.linear_transpose(differential, example)(u)[0], example)
    left = eigenpairs(transpose, example.size, at_least_single(example.dtype), num)
    # Of all that were found: a pair that is cut in two would else miss its partner.
    apart = jnp.abs(LogScaled(left.values, left.exponent).value[None, :] - values[:, None])
    y = left.vectors[jnp.argmin(apart, axis=1)]
    return values, once * jnp.sum(y * tangents[1], axis=1) / jnp.sum(y * right, axis=1)


def _log_values(along: Linearization, first: Array, t: Array, end: Array, num: int) -> LeadingLogValues:
    """Of ``dh_end/dh_t``, as if there were no resets; `first`, where the loops begin, is a lower bound of t which
    nothing is mapped over."""
    example = ravel_state(along.no_cotangents)[0]
    dtype, steps = at_least_single(example.dtype), along.recurrence.length
    pull_one = pull_back(along)

    def push_one(residuals: PyTree, vector: Array) -> Array:
        return jax.linear_transpose(partial(pull_one, residuals), example)(vector)[0]

    def advance(one: Callable[[PyTree, Array], Array], vector: LogScaled, residuals: PyTree, s: Array) -> LogScaled:
        image = one(residuals, vector.mantissa.astype(example.dtype)).astype(dtype)
        return choose((s >= t) & (s < end), LogScaled(image, vector.exponent).normalized(), vector)

    residuals = jax.lax.stop_gradient(along.residuals)

    def through(one: Callable[[PyTree, Array], Array], *, backwards: bool) -> Product:
        one = _constant(one, jax.tree.map(lambda a: a[0], residuals), example)

        def body(k: Array, vector: LogScaled) -> LogScaled:
            s = steps - 1 - k if backwards else first + k
            return advance(one, vector, jax.tree.map(lambda a: a[s], residuals), s)

        def run(v: Array) -> LogScaled:
            start = LogScaled(devices.vary(v, devices.axes_of(example)), jnp.zeros((), jnp.int32))
            return devices.fori_loop(0, steps - first, body, start)

        return run

    push, pull = through(push_one, backwards=False), through(pull_one, backwards=True)
    found = jax.lax.stop_gradient(singular_triplets(push, pull, example.size, dtype, num))

    def image(v: Array) -> Array:
        def body(vector: LogScaled, inputs: tuple[PyTree, Array]) -> tuple[LogScaled, None]:
            return advance(push_one, vector, *inputs), None

        start = LogScaled(v, jnp.zeros((), jnp.int32))
        last, _ = devices.scan(body, start, (along.residuals, jnp.arange(steps)))
        return last.over(found.exponent)

    values = _with_derivative(found.values, jnp.sum(found.left * jax.vmap(image)(found.right), axis=1))
    zero = found.values == 0
    logs = to_log(jnp.where(zero, 1, values), found.exponent, zero=zero)
    errors = jnp.where(zero, jnp.inf, found.errors / jnp.where(zero, 1, found.values))
    return LeadingLogValues(logs, errors)


def _constant(function: Callable[..., Array], *examples: PyTree) -> Callable[..., Array]:
    """`function` with what it closes over constant to differentiation."""
    pure, closed_over = jax.closure_convert(function, *examples)
    closed_over = jax.lax.stop_gradient(closed_over)
    return lambda *arguments: pure(*arguments, *closed_over)


@jax.custom_jvp
def _with_derivative(values: Array, like: Array) -> Array:
    """`values`, with the derivatives of what they are like, which is not calculated where none is wanted."""
    return differentiated_by_rule(values, like)


@_with_derivative.defjvp
def _with_derivative_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _with_derivative(*primals), tangents[1] * _once(primals[1])


@jax.custom_jvp
def _once(of: PyTree) -> Any:
    """1. Whoever differentiates by `of` what it is a factor of, a derivative in which vectors were held constant, is
    refused."""
    return differentiated_by_rule(1.0, of)


@_once.defjvp
def _once_jvp(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[Any, Any]:
    raise TypeError(
        "second derivatives: leading singular values and eigenvalues have none, for their vectors turn as well, and "
        "the others are not known. bptt_jax.singular_values and eigenvalues of bptt_jax.jacobians have them; "
        "jax.lax.stop_gradient keeps values that are only to be seen out of the derivative"
    )


def _product(differential: Callable[[Array], Array], example: Array) -> Product:
    dtype = at_least_single(example.dtype)

    def product(v: Array) -> LogScaled:
        v = devices.vary(v.astype(example.dtype), devices.axes_of(example))
        return LogScaled.of(differential(v).astype(dtype))

    return product
