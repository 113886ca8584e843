"""Spectra of Jacobians and of their products for states too large for a D x D matrix.

Of the leading few values, by Krylov methods, from Jacobian-vector and vector-Jacobian products alone. Products of
Jacobians are never formed and have no range to leave: every factor's image is a mantissa and a power of two.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Inexact

from bptt_jax.checks import check_positive_int
from bptt_jax.linalg import logscale
from bptt_jax.linalg.krylov import (
    Product,
    eigen_steps,
    eigenpairs,
    singular_steps,
    singular_triplets,
)
from bptt_jax.recurrence.linearization import Linearization, linearize
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
    full_precision,
    ravel_state,
)

# Numbers in the bases of all Krylov spaces that are built at one time: 128 MB in float32.
_BASIS_NUMBERS = 1 << 25


class LeadingValues(Result):
    """Of every step's Jacobian, in descending order.

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
        found = "the largest modulus" if np.iscomplexobj(self.values) else "the largest"
        return f"{found} is {np.min(largest):.3g} to {np.max(largest):.3g}, with errors up to {np.max(errors):.1g}"


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

    Derivatives are those of simple singular values, ``u^T dJ v``. `errors` has none (zero).

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      num: how many, at most D.

    Returns:
      `LeadingValues`; NaN where the Jacobian is not finite.

    Raises:
      TypeError, ValueError: an argument breaks the contract.

    Example:
      >>> step = lambda w, h, x: w @ h
      >>> w = jnp.array([[0.0, 2.0], [0.0, 0.0]])
      >>> bptt.leading_singular_values(step, w, jnp.ones(2), length=3, num=1).values.ravel()
      Array([2., 2., 2.], dtype=float32)
    """
    return _leading(_singular_values_of, bind(step, params, state0, xs, length), check_num(num, state0))


def leading_eigenvalues(
    step: Step, params: Params, state0: State, xs: PyTree = None, *, num: int, length: int | None = None
) -> LeadingValues:
    """The eigenvalues of largest modulus of every step's Jacobian dh_{k+1}/dh_k, without the Jacobian.

    Arnoldi's method with full reorthogonalisation, in spaces of ``min(D, 2 num + 100)`` dimensions, exact where
    that is D. Eigenvalues apart from the others are found to many digits. Those on the rim of a filled disc, as a
    random matrix has, are not: the largest modulus comes out a few percent low, and `errors` say so.

    Derivatives are those of simple eigenvalues, ``y^T dJ x / y^T x``; the left vectors y are sought by a second
    Arnoldi process, where a derivative is taken. `errors` has none (zero).

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      num: how many, at most D. It may cut a conjugate pair in two.

    Returns:
      `LeadingValues`; NaN where the Jacobian is not finite.

    Raises:
      TypeError, ValueError: an argument breaks the contract.

    Example:
      >>> step = lambda w, h, x: w @ h
      >>> w = jnp.array([[3.0, 1.0], [0.0, 2.0]])
      >>> bptt.leading_eigenvalues(step, w, jnp.ones(2), length=3, num=1).values.real.ravel()
      Array([3., 3., 3.], dtype=float32)
    """
    return _leading(_eigenvalues_of, bind(step, params, state0, xs, length), check_num(num, state0))


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
      `LeadingLogValues`; NaN if a Jacobian is not finite.

    Example:
      >>> step = lambda w, h, x: w * h
      >>> w = jnp.array([0.5, 2.0])
      >>> found = bptt.product_singular_values(step, w, jnp.ones(2), length=10, num=1)
      >>> round(float(found.log_values[0] / jnp.log(2.0)), 3)
      10.0
    """
    return _product_singular_values(bind(step, params, state0, xs, length), check_num(num, state0))


def check_num(num: int, state0: State) -> int:
    """Returns `num` if it is an integer from 1 to D."""
    num, size = check_positive_int("num", num), _size(state0)
    if num > size:
        raise ValueError(f"num: expected at most {size}, the numbers of the state, got {num}")
    return num


def singular_values_at(step: Step, params: Params, states: State, xs: PyTree, num: int) -> LeadingValues:
    """Of the Jacobian at each of K given states (leaves ``[K, ...]``) and inputs."""
    return _at(_singular_values_of, step, params, states, xs, num)


def eigenvalues_at(step: Step, params: Params, states: State, xs: PyTree, num: int) -> LeadingValues:
    """Of the Jacobian at each of K given states (leaves ``[K, ...]``) and inputs."""
    return _at(_eigenvalues_of, step, params, states, xs, num)


def pull_back(along: Linearization, state: State) -> Callable[[PyTree, Array], Array]:
    """``(residuals of one step, vector [D]) -> J^T vector``; `state` serves as an example only."""
    _, unravel = ravel_state(state)

    def pull(residuals: PyTree, vector: Array) -> Array:
        # The cotangent of x + iy is dL/dx - i dL/dy, while Jacobians act on (x, y).
        cotangent = jax.tree.map(jnp.conj, unravel(vector))
        return ravel_state(jax.tree.map(jnp.conj, along.pull(residuals, cotangent)))[0]

    return pull


def suffix_log_norms(along: Linearization, state: State) -> Array:
    """``[T]``: entry t is ``log ||dh_T/dh_t||_2``, for all t at a time.

    Every t has its own Krylov space, and all take each step together, so that a Jacobian acts on a block of
    vectors; those whose product begins later wait.
    """
    steps = jax.tree.leaves(along.states)[0].shape[0]
    size = _size(state)
    # An eighth of all at most: those that wait are paid for.
    lanes = max(1, min(-(-steps // 8), _BASIS_NUMBERS // (2 * singular_steps(1, size) * size)))
    count = -(-steps // lanes)

    def block(first: Array) -> Array:
        def lane(t: Array) -> Array:
            return _log_values(along, state, first, t, 1).log_values[0]

        return jax.vmap(lane)(first + jnp.arange(lanes))

    # The last block may reach beyond T: empty products, whose norms are cut off.
    return jax.lax.map(block, lanes * jnp.arange(count)).reshape(-1)[:steps]


@partial(jax.jit, static_argnames=("of", "num"))
def _leading(of: Callable[..., LeadingValues], recurrence: Recurrence, num: int) -> LeadingValues:
    recurrence = check_step(recurrence)
    starts = recurrence.starts(states_of(recurrence))
    return _at(of, recurrence.step, recurrence.params, starts, recurrence.instants.x, num)


@partial(jax.jit, static_argnames="num")
def _product_singular_values(recurrence: Recurrence, num: int) -> LeadingLogValues:
    recurrence = check_step(recurrence)
    with full_precision():
        along = linearize(recurrence)
    first = jnp.zeros((), int)
    return _log_values(along, recurrence.state0, first, first, num)


def _at(
    of: Callable[..., LeadingValues], step: Step, params: Params, states: State, xs: PyTree, num: int
) -> LeadingValues:
    def one(inputs: tuple[State, PyTree]) -> LeadingValues:
        state, x = inputs
        vector, unravel = ravel_state(state)
        with full_precision():
            _, differential = jax.linearize(lambda v: ravel_state(step(params, unravel(v), x))[0], vector)
        return of(differential, vector, num)

    size = _size(jax.tree.map(lambda a: a[0], states))
    together = max(1, _BASIS_NUMBERS // (eigen_steps(num, size) * size))
    return jax.lax.map(one, (states, jax.tree.map(jnp.asarray, xs)), batch_size=together)


def _singular_values_of(differential: Callable[[Array], Array], example: Array, num: int) -> LeadingValues:
    constant = jax.lax.stop_gradient(differential)
    dtype = _dtype(example)
    push = _product(constant, example)
    pull = _product(lambda u: jax.linear_transpose(constant, example)(u)[0], example)
    found = jax.lax.stop_gradient(singular_triplets(push, pull, example.size, dtype, num))
    images = jax.vmap(lambda v: differential(v.astype(example.dtype)).astype(dtype))(found.right)
    values = logscale.shift(found.values, found.exponent)
    values = _with_derivative(values, jnp.sum(found.left * images, axis=1))
    return LeadingValues(values, logscale.shift(found.errors, found.exponent))


def _eigenvalues_of(differential: Callable[[Array], Array], example: Array, num: int) -> LeadingValues:
    return _eigenvalues(differential, jax.lax.stop_gradient(example), num)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _eigenvalues(differential: Callable[[Array], Array], example: Array, num: int) -> LeadingValues:
    found = eigenpairs(_product(differential, example), example.size, _dtype(example), num)
    values, errors = logscale.shift((found.values, found.errors), found.exponent)
    return LeadingValues(values[:num], errors[:num])


@_eigenvalues.defjvp
def _eigenvalues_jvp(
    num: int, primals: tuple[Callable[[Array], Array], Array], tangents: tuple[PyTree, Array]
) -> tuple[LeadingValues, LeadingValues]:
    differential, example = primals
    dtype = _dtype(example)
    right = eigenpairs(_product(differential, example), example.size, dtype, num)
    transpose = _product(lambda u: jax.linear_transpose(differential, example)(u)[0], example)
    left = eigenpairs(transpose, example.size, dtype, num)
    values, errors = logscale.shift((right.values, right.errors), right.exponent)
    # Of all that were found: a pair that is cut in two would else miss its partner.
    apart = jnp.abs(logscale.shift(left.values, left.exponent)[None, :] - values[:num, None])
    y, x = left.vectors[jnp.argmin(apart, axis=1)], right.vectors[:num]

    def images(differential: Callable[[Array], Array]) -> Array:
        def image(v: Array) -> Array:
            return differential(v.astype(example.dtype)).astype(dtype)

        return jax.lax.complex(jax.vmap(image)(x.real), jax.vmap(image)(x.imag))

    changes = jax.jvp(images, (differential,), (tangents[0],))[1]
    slopes = jnp.sum(y * changes, axis=1) / jnp.sum(y * x, axis=1)
    value = LeadingValues(values[:num], errors[:num])
    return value, LeadingValues(slopes, jnp.zeros_like(value.errors))


def _log_values(along: Linearization, state: State, first: Array, t: Array, num: int) -> LeadingLogValues:
    """Of ``dh_T/dh_t``; `first` is a lower bound of t which nothing is mapped over, where the loops begin."""
    example = ravel_state(state)[0]
    dtype, steps = _dtype(example), jax.tree.leaves(along.states)[0].shape[0]
    pull_one = pull_back(along, state)

    def push_one(residuals: PyTree, vector: Array) -> Array:
        return jax.linear_transpose(partial(pull_one, residuals), example)(vector)[0]

    def advance(
        one: Callable[[PyTree, Array], Array], carry: tuple[Array, Array], residuals: PyTree, s: Array
    ) -> tuple[Array, Array]:
        mantissa, e = carry
        image = one(residuals, mantissa.astype(example.dtype)).astype(dtype)
        return jax.tree.map(partial(jnp.where, s >= t), logscale.normalize(image, e), carry)

    residuals = jax.lax.stop_gradient(along.residuals)

    def through(one: Callable[[PyTree, Array], Array], *, backwards: bool) -> Product:
        one = _constant(one, jax.tree.map(lambda a: a[0], residuals), example)

        def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            s = steps - 1 - k if backwards else first + k
            return advance(one, carry, jax.tree.map(lambda a: a[s], residuals), s)

        return lambda v: jax.lax.fori_loop(0, steps - first, body, (v, jnp.zeros((), jnp.int32)))

    push, pull = through(push_one, backwards=False), through(pull_one, backwards=True)
    found = jax.lax.stop_gradient(singular_triplets(push, pull, example.size, dtype, num))

    def image(v: Array) -> Array:
        def body(carry: tuple[Array, Array], inputs: tuple[PyTree, Array]) -> tuple[tuple[Array, Array], None]:
            return advance(push_one, carry, *inputs), None

        start = (v, jnp.zeros((), jnp.int32))
        (mantissa, e), _ = jax.lax.scan(body, start, (along.residuals, jnp.arange(steps)))
        return logscale.shift(mantissa, e - found.exponent)

    values = _with_derivative(found.values, jnp.sum(found.left * jax.vmap(image)(found.right), axis=1))
    zero = found.values == 0
    logs = logscale.to_log(jnp.where(zero, 1, values), found.exponent, zero=zero)
    errors = jnp.where(zero, jnp.inf, found.errors / jnp.where(zero, 1, found.values))
    return LeadingLogValues(logs, errors)


def _constant(function: Callable[..., Array], *examples: PyTree) -> Callable[..., Array]:
    """`function` with what it closes over constant to differentiation."""
    pure, closed_over = jax.closure_convert(function, *examples)
    closed_over = jax.lax.stop_gradient(closed_over)
    return lambda *arguments: pure(*arguments, *closed_over)


def _with_derivative(values: Array, like: Array) -> Array:
    return values + (like - jax.lax.stop_gradient(like))


def _product(differential: Callable[[Array], Array], example: Array) -> Product:
    dtype = _dtype(example)

    def product(v: Array) -> tuple[Array, Array]:
        return logscale.normalize(differential(v.astype(example.dtype)).astype(dtype), jnp.zeros((), jnp.int32))

    return product


def _dtype(example: Array) -> jnp.dtype:
    """At least single precision, for LAPACK knows no other."""
    return max(example.dtype, jnp.dtype(jnp.float32), key=lambda dtype: dtype.itemsize)


def _size(state: State) -> int:
    return jax.eval_shape(lambda h: ravel_state(h)[0], state).size
