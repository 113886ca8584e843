"""Arrays beyond the range of floating numbers: a mantissa times a power of two.

A pytree x is carried as ``(mantissa, exponent)``, x = mantissa * 2^exponent with an int32 exponent. Scaling by a
power of two is exact, so the recursions below give bit for bit what they would give in numbers of unlimited
range; a scale carried as a rounded logarithm would add an error at every step (1e-3 after 5000 steps in float32).
Exponents are constants to differentiation, and logarithms are natural. Zero has no exponent of its own, but it may
have a derivative: its mantissa's is that of the plain number. That of its logarithm, and of its norm, is zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, PyTree

from bptt_jax.checks import check_positive
from bptt_jax.devices import new_axes, summed_like
from bptt_jax.linalg import reductions
from bptt_jax.linalg.precision import matmul, wide

# The exponent of zero: below any that a product can reach, and differences of two stay inside int32.
ZERO_EXPONENT = -(1 << 29)


@partial(jax.tree_util.register_dataclass, data_fields=("mantissa", "exponent"), meta_fields=())
@dataclass(frozen=True, eq=False)
class LogScaled:
    """Numbers of any size, ``mantissa * 2^exponent``: one array, or one pytree of arrays, with a common exponent.

    What the dtype does not hold beside the largest entry (2^-126 of it in float32) is zero. With as many exponents as
    there are entries, ``LogScaled.of(a, axes=a.ndim)``, every entry has a range of its own.

    Attributes:
      mantissa: the largest entry in [1/2, 1) after `normalized`, all zero where the number is zero.
      exponent: int32, ``[...]``; its axes are the leading ones of every leaf of `mantissa`, each with its own.

    Example:
      >>> found = bptt.jacobian_product(jnp.full((5000, 1, 1), 0.9))
      >>> round(float(found.log_norm), 1)  # of 1e-229
      -526.8
    """

    mantissa: PyTree
    exponent: Int[Array, "..."]

    @property
    def value(self) -> PyTree:
        """The plain number: 0 or inf where it leaves the range of its dtype."""
        return _value(self)

    @property
    def log_norm(self) -> Float[Array, "..."]:
        """Natural logarithm of the Euclidean norm, of all leaves together; -inf for zero."""
        return _log_norm(self)

    @property
    def leaf_log_norms(self) -> PyTree:
        """`log_norm` of every leaf by itself: a tree like the mantissa; -inf where the mantissa's is zero."""
        return jax.tree.map(lambda leaf: LogScaled(leaf, self.exponent).log_norm, self.mantissa)

    @property
    def log_magnitudes(self) -> PyTree:
        """Natural logarithm of the modulus of every entry, like the mantissa; -inf where that is zero."""

        return _log_magnitudes(self)

    @property
    def log_scale(self) -> Float[Array, "..."]:
        """Natural logarithm of ``2^exponent``; -inf where that is the exponent of zero, as `normalized` makes it."""
        dtype = _real_dtype(jax.tree.leaves(self.mantissa))
        return to_log(jnp.ones((), dtype), self.exponent, zero=self.exponent <= ZERO_EXPONENT)

    @classmethod
    def of(cls, tree: PyTree, axes: int = 0) -> "LogScaled":
        """Plain numbers, normalised; every index of the first `axes` axes has a power of two of its own."""
        lead = jnp.shape(jax.tree.leaves(tree)[0])[:axes] if axes else ()
        return cls(tree, jnp.zeros(lead, jnp.int32)).normalized()

    def over(self, exponent: Int[Array, "..."]) -> PyTree:
        """The plain number divided by ``2^exponent``, which has the shape of its own exponent."""
        return self._each(lambda tree, e, unit: shift(tree, plain(e) - plain(unit)), exponent)

    def normalized(self) -> "LogScaled":
        """The same number, with a mantissa whose largest entry lies in [1/2, 1)."""
        return LogScaled(*self._each(normalize))

    def clipped(self, max_norm: float | Float[Array, ""]) -> PyTree:
        """The plain number, scaled to a norm of `max_norm` where it has a larger one: finite at any size.

        `log_norm` is what it had. What has no larger norm stays as it is, and so does what is not finite.

        Args:
          max_norm: above 0. It may be traced, and is then checked when it runs.

        Raises:
          TypeError, ValueError: `max_norm` is no number above 0.

        Example:
          >>> step = lambda b, h, x: jnp.array([4.0, 3.0]) * h + b
          >>> zero = jnp.zeros(2)
          >>> found = bptt.adjoints(step, zero, zero, None, lambda states: jnp.sum(states[-1]), length=100)
          >>> found.params_grad, found.scaled.params_grad.clipped(max_norm=1.0)
          (Array([inf, inf], dtype=float32), Array([1., 0.], dtype=float32))
          >>> round(float(found.params_log_norm / jnp.log(10.0)), 1)  # (4^100 - 1) / 3
          59.7
        """
        log_threshold = jnp.log(check_positive("max_norm", max_norm))
        return self._each(lambda tree, e: clip(tree, e, log_norm(tree, e), log_threshold)[0])

    def __add__(self, other: "LogScaled") -> "LogScaled":
        return LogScaled(*self._each(add, other.mantissa, other.exponent))

    def __matmul__(self, other: "LogScaled | Array") -> "LogScaled":
        """The product of two matrices, or of a matrix and a vector, in full precision and normalised."""
        if not isinstance(other, LogScaled):
            other = LogScaled(other, jnp.zeros_like(self.exponent))
        return LogScaled(*self._each(_multiply, other.mantissa, other.exponent))

    def __rmatmul__(self, other: Array) -> "LogScaled":
        return LogScaled(other, jnp.zeros_like(self.exponent)) @ self

    def summed_like(self, given: PyTree) -> "LogScaled":
        """Within a `jax.shard_map`: derivatives by `given`, which is the same on devices on which they differ, summed
        over these; each device has a power of two of its own. `given` is a tree like the mantissa."""
        axes = {axis for each in new_axes(self.mantissa, given) for axis in each}
        if not axes:
            return self
        top = jax.lax.pmax(self.exponent, tuple(sorted(axes)))
        return LogScaled(summed_like(self.over(top), given), top).normalized()

    def widened(self) -> "LogScaled":
        """In single precision at least, for sums: in half, 256 and 1 are 256."""
        return LogScaled(jax.tree.map(wide, self.mantissa), self.exponent)

    def within(self, like: PyTree) -> "LogScaled":
        """In the dtypes of `like`, a tree like the mantissa: scaled down where it is beyond their range."""
        dtypes = [a.dtype for a in jax.tree.leaves(like)]
        if dtypes == [a.dtype for a in jax.tree.leaves(self.mantissa)]:
            return self
        # With room for what is made of it.
        highest = min(int(jnp.finfo(dtype).maxexp) for dtype in dtypes) // 2
        excess = jnp.maximum(exponent(self.mantissa) - highest, 0)
        held = jax.tree.map(lambda a, b: a.astype(b.dtype), shift(self.mantissa, -excess), like)
        return LogScaled(held, self.exponent + excess)

    def zero_where(self, which: Array) -> "LogScaled":
        """Zero where `which`, ``[...]`` like the exponent, is True, NaN or not; else the same."""
        return LogScaled(*self._each(_zero_where, which))

    def _each(self, function: Callable[..., Any], *more: Any) -> Any:
        for _ in range(jnp.ndim(self.exponent)):
            function = jax.vmap(function)
        return function(self.mantissa, self.exponent, *more)


# Of a result that is at hand each of these is one program, not one for every operation.
_inlined = partial(jax.jit, inline=True)


@_inlined
def _value(number: LogScaled) -> PyTree:
    return number.over(jnp.zeros_like(number.exponent))


@_inlined
def _log_norm(number: LogScaled) -> Array:
    return number._each(log_norm)


@_inlined
def _log_magnitudes(number: LogScaled) -> PyTree:
    def one(tree: PyTree, e: Array) -> PyTree:
        def entries(a: Array) -> Array:
            size = jnp.abs(a).astype(_real_dtype([a]))
            return to_log(jnp.where(size == 0, 1, size), e, zero=size == 0)

        return jax.tree.map(entries, tree)

    return number._each(one)


def nothing(like: PyTree) -> LogScaled:
    """Zero, a tree like this one."""
    return LogScaled(jax.tree.map(jnp.zeros_like, like), jnp.int32(ZERO_EXPONENT))


def exponent(tree: PyTree) -> Array:
    """int32 e with max|tree| in [2^(e-1), 2^e); ZERO_EXPONENT for zero or nothing, 0 if anything is not finite."""
    leaves = jax.tree.leaves(jax.lax.stop_gradient(tree))
    dtype = _real_dtype(leaves)
    each = [reductions.largest(jnp.abs(a)).astype(dtype) for a in leaves]
    return exponent_of(reduce(jnp.maximum, each, jnp.zeros((), dtype)))


def shift(tree: PyTree, k: Array) -> PyTree:
    """``tree * 2^k``, exact unless the result leaves the range of its dtype (then 0 or inf)."""
    half = k >> 1

    def apply(a: Array) -> Array:
        if jnp.iscomplexobj(a):
            return jax.lax.complex(apply(a.real), apply(a.imag))
        return a * _power_of_two(half, a.dtype) * _power_of_two(k - half, a.dtype)

    return jax.tree.map(apply, tree)


def plain(e: Array | int) -> Array:
    """The exponent that a mantissa's tangents have: zero's are plain numbers."""
    return jnp.where(jnp.asarray(e) > ZERO_EXPONENT, e, 0)


def shift_down(tree: PyTree, k: Array) -> PyTree:
    """`shift` by k <= 0 in half the work; what is shifted by more than the normal range is zero."""

    def apply(a: Array) -> Array:
        if jnp.iscomplexobj(a):
            return jax.lax.complex(apply(a.real), apply(a.imag))
        if a.dtype == jnp.float16:  # its subnormal numbers are much of its range
            return shift(a, k)
        return a * _power_of_two(k, a.dtype, int(jnp.finfo(a.dtype).minexp) - 1)

    return jax.tree.map(apply, tree)


def normalize(tree: PyTree, e: Array) -> tuple[PyTree, Array]:
    """The same number with a mantissa whose largest entry lies in [1/2, 1), zero and non-finite ones aside."""
    de, e = exponent(tree), plain(e)
    zero = de == ZERO_EXPONENT
    return shift(tree, jnp.where(zero, e, -de)), jnp.where(zero, ZERO_EXPONENT, e + de)


def add(a: PyTree, e_a: Array, b: PyTree, e_b: Array | int = 0) -> tuple[PyTree, Array]:
    """``a * 2^e_a + b * 2^e_b``, scaled to the larger of the two."""
    e = jnp.maximum(top(a, e_a), top(b, e_b))
    return add_over(a, e_a, b, e_b, e), e


def add_over(a: PyTree, e_a: Array, b: PyTree, e_b: Array | int, e: Array) -> PyTree:
    """``(a * 2^e_a + b * 2^e_b) / 2^e``."""
    e_a, e_b, e = plain(e_a), plain(e_b), plain(e)
    return jax.tree.map(jnp.add, shift(a, e_a - e), shift(b, e_b - e))


def top(tree: PyTree, e: Array | int) -> Array:
    """The exponent of ``tree * 2^e``; see `exponent`."""
    above = exponent(tree)
    return jnp.where(above == ZERO_EXPONENT, ZERO_EXPONENT, plain(e) + above)


def clip(tree: PyTree, e: Array, log_norm_before: Array, log_threshold: Array) -> tuple[PyTree, Array]:
    """``tree * 2^e``, scaled to the threshold if its norm is finite and above; whether it was."""
    log_threshold = jnp.asarray(log_threshold).astype(log_norm_before.dtype)
    acts = (log_norm_before > log_threshold) & (log_norm_before < jnp.inf)
    mantissa, _ = normalize(tree, e)
    # The mantissa's norm lies between 1/2 and sqrt(size), so this factor is near the threshold itself; that of zero
    # would be infinite, and the derivative NaN, were it not chosen away before `exp`.
    size = log_norm(mantissa)
    factor = jnp.exp(jnp.where(acts, log_threshold.astype(size.dtype) - size, 0.0))
    passing = shift(tree, jnp.where(acts, 0, plain(e)))
    return jax.tree.map(lambda m, a: jnp.where(acts, m * factor.astype(m.dtype), a), mantissa, passing), acts


def _multiply(a: Array, e_a: Array, b: Array, e_b: Array) -> tuple[Array, Array]:
    return normalize(matmul(a, b), plain(e_a) + plain(e_b))


def _zero_where(tree: PyTree, e: Array, which: Array) -> tuple[PyTree, Array]:
    zero = jax.tree.map(lambda a: jnp.where(which, jnp.zeros_like(a), a), tree)
    return zero, jnp.where(which, ZERO_EXPONENT, e)


def log_norm(tree: PyTree, e: Array | int = 0) -> Array:
    """Natural logarithm of the Euclidean norm of ``tree * 2^e``: -inf for zero; it cannot overflow."""
    mantissa, e = normalize(tree, jnp.asarray(e, jnp.int32))
    leaves = jax.tree.leaves(mantissa)
    dtype = _real_dtype(leaves)
    total = sum((jnp.sum(squares(a, dtype)) for a in leaves), jnp.zeros((), dtype))
    return to_log(jnp.where(total == 0, 1, total), e, half=True, zero=total == 0)


def squares(a: Array, dtype: jnp.dtype) -> Array:
    """Of the moduli; by parts, for a complex modulus of zero has no second derivative."""
    if jnp.iscomplexobj(a):
        return squares(a.real, dtype) + squares(a.imag, dtype)
    return jnp.square(a.astype(dtype))


def to_log(x: Array, e: Array, *, half: bool = False, zero: Array | bool = False) -> Array:
    """``log(x * 2^e)``, with x a square if `half`; -inf where `zero`."""
    log = (0.5 if half else 1.0) * jnp.log(x)
    return jnp.where(zero, -jnp.inf, log + e.astype(log.dtype) * math.log(2))


def _real_dtype(leaves: list[Array]) -> jnp.dtype:
    """At least single precision: the logarithm of a norm in bfloat16 would have three digits."""
    dtypes = [jnp.finfo(a.dtype).dtype for a in leaves]
    return max([jnp.dtype(jnp.float32), *dtypes], key=lambda dtype: dtype.itemsize)


def exponent_of(largest: Array) -> Array:
    """Of numbers >= 0, read from their bits: `jnp.frexp` is a fifth of the compilation of all that uses it."""
    info, bits = jnp.finfo(largest.dtype), reductions.bits_of(largest)
    biased = bits >> int(info.nmant)
    below_normal = int(info.bits) - int(info.nmant) - jax.lax.clz(bits)
    e = (jnp.where(biased == 0, below_normal, biased) + (int(info.minexp))).astype(jnp.int32)
    special = 2 * int(info.maxexp) - 1
    return jnp.where(bits == 0, ZERO_EXPONENT, jnp.where(biased == special, 0, e))


def _power_of_two(k: Array, dtype: jnp.dtype, least: int | None = None) -> Array:
    """2^k for integers k, assembled from its bits, for the compiler's exp2 is not exact; clipped to the range.

    With one below the range as the `least`, what is below it gives zero.
    """
    info = jnp.finfo(dtype)
    bits = reductions.BITS[dtype.itemsize]
    k = jnp.clip(k, int(info.minexp) if least is None else least, int(info.maxexp) - 1)
    return jax.lax.bitcast_convert_type((k - int(info.minexp) + 1).astype(bits) << int(info.nmant), dtype)
