"""What `jax.nn.initializers` lacks for recurrent weights and biases.

Matrices come as ``(key, shape, dtype)`` initialisers of shape ``(fan_in, fan_out)``, to be given to the cells as
`recurrent_init`; `chrono` is for their `bias_init`; `ring` draws the eigenvalues of `lru`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax.cells.sharing import recalled_function
from bptt_jax.checks import (
    call_user_function,
    check_finite,
    check_floating,
    check_key,
    check_number,
    check_positive,
    check_positive_int,
    check_shape,
)
from bptt_jax.linalg import spectra
from bptt_jax.step import Array

__all__ = ["chrono", "identity", "ring", "sparse"]

Initializer = Callable[..., Array]


def check_initializer(name: str, init: Any) -> Any:
    """Returns `init` if it can be called.

    Raises:
      TypeError: it cannot.
    """
    if not callable(init):
        raise TypeError(f"{name}: expected an initialiser (key, shape, dtype) -> array, got {type(init).__name__}")
    return init


def draw_weights(name: str, init: Initializer, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """``init(key, shape, dtype)``; `name` is the argument that it came as.

    Raises:
      TypeError, ValueError: it draws no real array of that shape. What it raises itself passes, with a note.
    """
    weights = call_user_function(name, f"(key, {list(shape)}, {jnp.dtype(dtype)})", init, key, shape, dtype)
    if jnp.iscomplexobj(weights) or not jax.tree_util.all_leaves([weights]):
        raise TypeError(f"the result of {name}: expected an array of real numbers, got {type(weights).__name__}")
    if jnp.shape(weights) != shape:
        raise ValueError(f"the result of {name}: expected shape {list(shape)}, got {list(jnp.shape(weights))}")
    return jnp.asarray(weights, dtype)


@recalled_function
def identity(scale: float = 1.0) -> Initializer:
    """``scale * I`` (Le, Jaitly, Hinton 2015, arXiv:1504.00941: the IRNN, with `jax.nn.relu` and zero biases).

    The returned initialiser raises ValueError for a shape that is not square.

    Raises:
      TypeError, ValueError: `scale` is no finite number.

    Example:
      >>> irnn = bptt.rnn(2, activation=jax.nn.relu, recurrent_init=bptt.cells.initializers.identity())
      >>> irnn.init(jax.random.key(0), 3).recurrent
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    scale = check_finite("scale", scale)

    def init(key: Array, shape: Sequence[int], dtype: Any = float) -> Array:
        del key
        dtype = check_floating("dtype", dtype)
        if len(check_shape(shape)) != 2 or shape[0] != shape[1]:
            raise ValueError(f"shape: expected a square matrix for the identity, got {list(shape)}")
        return jnp.asarray(scale, dtype) * jnp.eye(shape[0], dtype=dtype)

    return init


@recalled_function
def sparse(nonzeros: int = 15, *, spectral_radius: float = 0.95) -> Initializer:
    """Sparse Gaussian weights of a given spectral radius: the "smart tanh" of Pascanu et al. 2013.

    Every unit has `nonzeros` outgoing Gaussian weights (all, in a smaller network); the matrix is then scaled to
    `spectral_radius`, as in the released code of arXiv:1211.5063, where the standard deviation of 0.01 therefore
    has no effect.

    The returned initialiser raises ValueError for a shape that is not square.

    Raises:
      TypeError, ValueError: `nonzeros` is no positive integer, or `spectral_radius` no positive number.

    Example:
      >>> smart = bptt.cells.initializers.sparse(2, spectral_radius=0.9)
      >>> weights = bptt.rnn(8, recurrent_init=smart).init(jax.random.key(0), 3).recurrent
      >>> int(jnp.sum(weights != 0)), round(float(bptt.linalg.spectral_radius(weights)), 3)
      (16, 0.9)
    """
    nonzeros = check_positive_int("nonzeros", nonzeros)
    spectral_radius = check_positive("spectral_radius", spectral_radius)

    def init(key: Array, shape: Sequence[int], dtype: Any = float) -> Array:
        key, dtype = check_key("key", key), check_floating("dtype", dtype)
        if len(check_shape(shape)) != 2 or shape[0] != shape[1]:
            raise ValueError(f"shape: expected a square matrix for a spectral radius, got {list(shape)}")
        k_value, k_place = jax.random.split(key)
        order = jnp.argsort(jax.random.uniform(k_place, shape, jnp.float32), axis=1)
        rank = jnp.argsort(order, axis=1)
        weights = jnp.where(rank < nonzeros, jax.random.normal(k_value, shape, dtype), 0)
        radius = spectra.spectral_radius(weights)
        return weights * (jnp.asarray(spectral_radius, radius.dtype) / radius).astype(weights.dtype)

    return init


@recalled_function
def chrono(longest: int) -> Initializer:
    """Gate biases for memories of up to `longest` steps (Tallec, Ollivier 2018, arXiv:1804.11188).

    A gate that keeps a share p of its cell remembers for 1 / (1 - p) steps: ``u = log U[1, longest - 1]`` makes
    these times uniform. For `lstm` (shape ``(4, N)``) ``b_f = u, b_i = -u``; for `gru` (shape ``(3, N)``)
    ``b_z = u``; for `min_gru`, `mgu` and `star` (shape ``(2, N)``), whose gate lets in, it is ``-u``; the other biases
    are 0.

    Args:
      longest: T_max, at least 3.

    Returns:
      An initialiser for `bias_init`, which raises ValueError for a shape of none of them.

    Raises:
      TypeError, ValueError: `longest` is no integer of at least 3.

    Example:
      >>> cell = bptt.lstm(4, bias_init=bptt.cells.initializers.chrono(100))
      >>> i, f, g, o = cell.init(jax.random.key(0), 3).bias.reshape(4, 4)
      >>> bool(jnp.all((0 <= f) & (f <= jnp.log(99.0)) & (i == -f)))
      True
    """
    if check_positive_int("longest", longest) < 3:
        raise ValueError(f"longest: expected at least 3, got {longest}")

    def init(key: Array, shape: Sequence[int], dtype: Any = float) -> Array:
        key, dtype = check_key("key", key), check_floating("dtype", dtype)
        if len(check_shape(shape)) != 2 or shape[0] not in (2, 3, 4):
            raise ValueError(
                f"shape: expected (4, N) of an lstm, (3, N) of a gru or (2, N) of a min_gru, got {list(shape)}"
            )
        keep = jnp.log(jax.random.uniform(key, (shape[-1],), dtype, 1, longest - 1))
        biases = jnp.zeros(shape, dtype)
        if shape[0] == 4:
            return biases.at[0].set(-keep).at[1].set(keep)
        if shape[0] == 3:
            return biases.at[1].set(keep)
        return biases.at[0].set(-keep)

    return init


@recalled_function
def ring(r_min: float = 0.0, r_max: float = 1.0, *, max_phase: float = 2 * math.pi) -> Initializer:
    """Eigenvalues ``exp(-exp(nu_log) + i exp(theta_log))`` uniform on a ring (Orvieto et al. 2023,
    arXiv:2303.06349, Lemma 3.2).

    ``|lambda|^2`` is uniform on ``[r_min^2, r_max^2]``, the phase on ``(0, max_phase]``. All parameters are finite
    and all eigenvalues within the unit circle: what is drawn is ``1 - |lambda|^2``, from one unit of precision
    (1.2e-7 in single) times ``r_max^2 - r_min^2`` on, never 0.

    Args:
      r_min, r_max: radii of the ring, ``0 <= r_min <= r_max <= 1`` and ``r_min < 1``.
      max_phase: in radians, above 0 and at most 2 pi; a small one favours slow oscillations. All three may be
        traced, and are then checked when they run.

    Returns:
      An initialiser of shape ``(2, N)``, nu_log and theta_log, which raises ValueError for any other.

    Raises:
      ValueError: the radii or the phase are out of these ranges.

    Example:
      >>> nu_log, theta_log = bptt.cells.initializers.ring(0.9, 0.99)(jax.random.key(0), (2, 100))
      >>> modulus = jnp.exp(-jnp.exp(nu_log))
      >>> bool(jnp.all((0.9 <= modulus) & (modulus <= 0.99)))
      True
    """
    r_min = check_number("r_min", r_min, "a radius of at least 0 and below 1", lambda r: (r >= 0) & (r < 1))
    r_max = check_number("r_max", r_max, "a radius from r_min to 1", lambda r: (r >= r_min) & (r <= 1))
    max_phase = check_number(
        "max_phase",
        max_phase,
        "an angle above 0 and at most 2 pi",
        lambda phase: (phase > 0) & (phase <= 2 * math.pi),
    )

    def init(key: Array, shape: Sequence[int], dtype: Any = float) -> Array:
        key, dtype = check_key("key", key), check_floating("dtype", dtype)
        if len(check_shape(shape)) != 2 or shape[0] != 2:
            raise ValueError(f"shape: expected (2, N), of nu_log and theta_log, got {list(shape)}")
        # 1 - [0, 1) is exact and never 0.
        radial, angular = 1 - jax.random.uniform(key, shape, dtype)
        rim, width = (1 - r_max) * (1 + r_max), (r_max - r_min) * (r_max + r_min)
        missing = jnp.asarray(rim, radial.dtype) + jnp.asarray(width, radial.dtype) * radial  # 1 - |lambda|^2
        missing = jnp.minimum(missing, 1 - float(jnp.finfo(missing.dtype).epsneg))
        phase = jnp.asarray(max_phase, angular.dtype) * angular
        return jnp.stack([jnp.log(-0.5 * jnp.log1p(-missing)), jnp.log(phase)])

    return init
