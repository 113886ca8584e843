"""The weights of a cell: how they are drawn, gate by gate, and how they are multiplied."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from bptt_jax.cells.initializers import Initializer, check_initializer, draw_weights
from bptt_jax.checks import check_floating, check_positive_int
from bptt_jax.linalg.precision import at_least_single

fan_in_normal = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
orthogonal = jax.nn.initializers.orthogonal()
glorot_normal, glorot_uniform = jax.nn.initializers.glorot_normal(), jax.nn.initializers.glorot_uniform()
lecun_uniform = jax.nn.initializers.lecun_uniform()
linear_default = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # of PyTorch's linear layer
# Numbers in a matrix of weights, of which `_product` makes a transposed copy, or lets the compiler make one.
_COPIED_UP_TO, _TRANSPOSED_UP_TO = 1 << 15, 1 << 18
# Bytes that a process can address, on processors of 64 bits. Of much more XLA ends the process, without an error.
_ADDRESSABLE = 1 << 47


def check_hidden_size(hidden_size: Any, gates: int, dtype: jnp.dtype) -> int:
    """Returns `hidden_size` if it is an integer of at least 1, of which recurrent weights can exist."""
    n = check_positive_int("hidden_size", hidden_size)
    size = gates * n * n * dtype.itemsize
    if size > _ADDRESSABLE:
        raise ValueError(
            f"hidden_size: expected recurrent weights that a memory can hold, got {n} units, whose weights take "
            f"{size / 1e12:.3g} TB"
        )
    return n


def check_heads(n: int, heads: Any) -> int:
    """Returns the numbers of each head, if `heads` is a positive integer of which the hidden size n is a multiple."""
    check_positive_int("heads", heads)
    if n % heads:
        raise ValueError(f"hidden_size: expected a multiple of heads, {heads}, got {n}")
    return int(n // heads)


def check_complex(name: str, dtype: Any) -> jnp.dtype:
    """The floating type that JAX makes of `dtype`, if there are complex numbers of it."""
    real = check_floating(name, dtype)
    if real not in (jnp.float32, jnp.float64):
        raise TypeError(f"{name}: expected float32 or float64, whose complex numbers there are, got {real}")
    return real


def within(bound: float) -> Initializer:
    """Uniform between ``-bound`` and ``bound``."""

    return lambda key, shape, dtype: draw_within(key, shape, bound, dtype)


def constants(*biases: float | Array) -> Initializer:
    """One to a gate."""

    def init(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
        del key
        return jnp.broadcast_to(jnp.stack([jnp.asarray(b, dtype) for b in biases])[:, None], shape)

    return init


def draw_within(key: Array, shape: tuple[int, ...], bound: float, dtype: Any) -> Array:
    """Numbers uniform between ``-bound`` and ``bound``."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def check_initializers(recurrent_init: Initializer, input_init: Initializer) -> None:
    check_initializer("recurrent_init", recurrent_init)
    check_initializer("input_init", input_init)


def draw_gates(
    name: str, init: Initializer, key: Array, gates: int, n: int, fan_in: int, dtype: jnp.dtype
) -> Array:
    """`gates` matrices [n, fan_in], each initialised on its own, stacked to [gates * n, fan_in]."""
    wide = at_least_single(dtype)  # for orthogonal
    keys = jax.random.split(key, gates)
    return jnp.concatenate([draw_weights(name, init, k, (fan_in, n), wide).astype(dtype).T for k in keys])


def times(weights: Array, vector: Array) -> Array:
    """``weights @ vector``."""
    if weights.size > _COPIED_UP_TO:
        return _times(weights, None, vector)
    # Behind the barrier the copy is no part of the product: it is made once, before the loop over time, and by the
    # copy the derivative is added up, so that it is turned round once too (`bptt_jax.recurrence.preparation`).
    columns = _apart(weights.T)
    return _times(weights, columns, vector)


@jax.custom_jvp
def _apart(a: Array) -> Array:
    """The same, as a value of its own; its derivative need not be one, and what turns that round joins its product."""
    return jax.lax.optimization_barrier(a)


@_apart.defjvp
def _apart_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _apart(*primals), tangents[0]


def _product(weights: Array, columns: Array | None, vector: Array) -> Array:
    # Which of the three is fastest was measured on CPU: training steps, 32 to 512 units, batches of 32 (5 to 25 %).
    if columns is not None:
        return jnp.dot(vector, columns)
    if weights.size <= _TRANSPOSED_UP_TO:
        return jnp.dot(vector, weights.T)
    return weights @ vector  # where they lie: a copy of 4096 x 4096 is 67 MB


@jax.custom_jvp
def _times(weights: Array, columns: Array | None, vector: Array) -> Array:
    """`columns`, if there are any, are the weights transposed. The product moves with them, not with the weights too;
    its derivative by the vector does with the weights."""
    return _product(weights, columns, vector)


@partial(_times.defjvp, symbolic_zeros=True)
def _times_jvp(primals: tuple[Array, Array | None, Array], tangents: tuple[Any, Any, Any]) -> tuple[Array, Array]:
    (weights, columns, vector), (d_weights, d_columns, d_vector) = primals, tangents
    if isinstance(d_weights if columns is None else d_columns, SymbolicZero):
        # With respect to the state alone: of a basis of tangents the product is the weights themselves, one tangent
        # to a column, as the Jacobian has them. By rows Jacobians took 1.2 to 3.6 times as long on CPU, and the
        # compiler, if it may, puts this product by rows for the sake of what follows it.
        return _times(weights, columns, vector), jax.lax.optimization_barrier(weights @ d_vector)
    moved = _product(d_weights, d_columns, vector)
    if isinstance(d_vector, SymbolicZero):
        return _times(weights, columns, vector), moved
    return _product(weights, columns, vector), moved + _product(weights, columns, d_vector)
