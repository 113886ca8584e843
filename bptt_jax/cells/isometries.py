"""Cells whose recurrent weights stay orthogonal, or unitary, whatever their parameters are."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import expm

from bptt_jax.cells.initializers import Initializer, check_initializer
from bptt_jax.cells.sharing import pickled_as_call, recalled, shared
from bptt_jax.cells.simple import RNNParams
from bptt_jax.cells.weights import (
    check_complex,
    check_hidden_size,
    draw_gates,
    draw_within,
    glorot_uniform,
    times,
)
from bptt_jax.checks import (
    check_choice,
    check_floating,
    check_function,
    check_key,
    check_positive_int,
    type_name,
)
from bptt_jax.devices import divided_by_compiler, scan
from bptt_jax.linalg.precision import at_least_single
from bptt_jax.step import Array, Cell, Step

_expm = divided_by_compiler(expm)  # within it JAX would ask, and find no answer
_he_normal = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class OrthogonalParams(NamedTuple):
    """Parameters of `orthogonal`: ``skew [N (N - 1) / 2]``, A above its diagonal, row by row; ``input [N, I]``,
    ``bias [N]``."""

    skew: Array
    input: Array
    bias: Array


class UnitaryParams(NamedTuple):
    """Parameters of `unitary`, all real: ``phases [3, N]``, ``reflections_re, reflections_im [2, N]``,
    ``input_re, input_im [N, I]``, ``bias [N]``."""

    phases: Array
    reflections_re: Array
    reflections_im: Array
    input_re: Array
    input_im: Array
    bias: Array


class HouseholderParams(NamedTuple):
    """Parameters of `householder`: ``reflections [K, N]``, ``input [N, I]``, ``bias [N]``."""

    reflections: Array
    input: Array
    bias: Array


@dataclass(frozen=True)
class OrthogonalStep:
    """The step of `orthogonal`. It takes `OrthogonalParams`, or the plain weights that `plain` makes of them.

    Attributes:
      map: "cayley" or "exp".
      negative: how many entries of D are -1.
      activation: elementwise; None: modReLU.
    """

    map: Literal["cayley", "exp"]
    negative: int
    activation: Callable[[Array], Array] | None

    def __reduce__(self) -> Any:
        return pickled_as_call(type(self), self.map, self.negative, self.activation)

    def __call__(self, params: OrthogonalParams | RNNParams, h: Array, x: Array) -> Array:
        plain = self.plain(params)
        drive = times(plain.recurrent, h) + times(plain.input, x)
        return _mod_relu(drive, plain.bias) if self.activation is None else self.activation(drive + plain.bias)

    def plain(self, params: OrthogonalParams | RNNParams) -> RNNParams:
        """The weights themselves: W ``[N, N]`` instead of A."""
        if isinstance(params, RNNParams):
            return params
        n = params.bias.size
        a = _skew_symmetric(params.skew.astype(at_least_single(params.skew.dtype)), n)
        if self.map == "exp":
            weights = _expm(a)
        else:
            one = jnp.eye(n, dtype=a.dtype)
            weights = jnp.linalg.solve(one + a, one - a)
        signs = jnp.where(jnp.arange(n)[None] < n - self.negative, 1, -1).astype(a.dtype)
        return RNNParams((weights * signs).astype(params.skew.dtype), params.input, params.bias)


@recalled
def orthogonal(
    hidden_size: int,
    *,
    map: Literal["cayley", "exp"] = "exp",
    negative: int = 0,
    activation: Callable[[Array], Array] | None = None,
    input_init: Initializer = _he_normal,
    dtype: Any = None,
) -> Cell:
    """The orthogonal network: scoRNN (Helfrich et al. 2018, arXiv:1707.09520), expRNN (Lezcano-Casado and
    Martinez-Rubio 2019, arXiv:1901.08428).

    ::

        A = -A^T
        W = (I + A)^{-1} (I - A) D     map "cayley"
        W = exp(A) D                   map "exp"
        h_t = sigma(W h_{t-1} + U x_t)
        sigma(a) = sign(a) relu(|a| + b)

    D is fixed, with -1 in its last `negative` entries, else 1: scoRNN has it, for the Cayley transform alone has no
    eigenvalue -1; expRNN does not. sigma is modReLU; of another activation, ``sigma(a) = activation(a + b)``.

    The Jacobian is ``diag(sigma') W``, and modReLU's slope is 1 or 0: the error signal never grows, and what is lost
    of it is lost where units are silent. W is orthogonal to rounding, whatever the parameters.

    A starts block diagonal, so that the eigenvalues of W before D come in pairs ``exp(+-i theta)``, theta uniform in
    [0, pi / 2] for "cayley" (Helfrich et al.), in [-pi, pi] for "exp" (Henaff et al. 2016); U by default N(0, 2 / I);
    b of modReLU uniform in [-0.01, 0.01], of another activation 0. So it is in the code of expRNN; in that of
    scoRNN U is in [-0.01, 0.01] and b is 0.

    What W costs: a step given `OrthogonalParams` makes W, in O(N^3). `bptt_jax.unroll` and the backward passes of this
    package make it once for a sequence (``remat=`` of `bptt_jax.adjoints`: for a segment), and differentiate that once.
    In a loop of your own XLA makes W once, but takes its derivative by the parameters at every step: on CPU a gradient
    through 100 steps of 128 units, of 32 sequences, takes 3 times as long by "cayley" and 9 times by "exp".
    `OrthogonalStep.plain` makes it once, and the same step takes what it gives::

        weights = cell.step.plain(params)                             # RNNParams
        h = cell.step(weights, h, x)

    Differentiated through `plain`, the gradients are those of `OrthogonalParams`.

    Args:
      hidden_size: N, of units.
      map: "cayley" or "exp".
      negative: how many entries of D are -1, from 0 to N; scoRNN's experiments had N / 2 or N / 10.
      activation: elementwise, as for `bptt_jax.rnn`; by default modReLU. At an argument of 0 the slope of modReLU
        is taken as 1 where b is at least 0, else 0.
      input_init: initialiser of U, as for `bptt_jax.rnn`.
      dtype: of parameters and state; by default JAX's floating type. In half precision W is made in single, and
        rounded.

    Returns:
      A `Cell` with `OrthogonalParams`, a state ``[N]`` and an `OrthogonalStep`, D = N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 1, dtype)
    check_choice("map", map, "cayley", "exp")
    negative = _check_count("negative", negative, n)
    if activation is not None:
        check_function("activation", activation, "activation(array) -> array")
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> OrthogonalParams:
        fan_in = check_positive_int("input_size", input_size)
        k_skew, k_in, k_bias = jax.random.split(check_key("key", key), 3)
        wide = at_least_single(dtype)
        if map == "cayley":
            # (1 - i s) / (1 + i s) = exp(-i theta) for s = tan(theta / 2)
            entries = jnp.tan(jax.random.uniform(k_skew, (n // 2,), wide, 0, math.pi / 2) / 2)
        else:
            entries = jax.random.uniform(k_skew, (n // 2,), wide, -math.pi, math.pi)
        rows, columns = np.triu_indices(n, 1)
        of_blocks = np.flatnonzero((rows % 2 == 0) & (columns == rows + 1))
        skew = jnp.zeros(len(rows), wide).at[of_blocks].set(entries)
        bias = jnp.zeros(n, dtype) if activation is not None else draw_within(k_bias, (n,), 0.01, dtype)
        return OrthogonalParams(
            skew.astype(dtype), draw_gates("input_init", input_init, k_in, 1, n, fan_in, dtype), bias
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), OrthogonalStep(map, negative, activation))


@recalled
def unitary(hidden_size: int, *, dtype: Any = None) -> Cell:
    """The unitary evolution network, uRNN (Arjovsky et al. 2016, arXiv:1511.06464).

    ::

        W = D_3 R_2 F^{-1} D_2 P R_1 F D_1
        h_t = sigma(W h_{t-1} + V x_t)
        sigma(z) = (|z| + b) z / |z| where |z| + b > 0, else 0
        D_k = diag(exp(i theta_k)),   R_k = I - 2 v_k v_k^* / |v_k|^2

    with complex h, F the unitary Fourier transform and P a permutation, drawn once and for all for every N. W has
    7 N parameters and is never formed: a step is O(N log N). The network's output is a readout of real and imaginary
    part, no part of the recurrence.

    W is unitary to rounding, whatever the parameters. The Jacobian of sigma has, for each unit that it lets pass, the
    singular values 1 (along z) and ``1 + b / |z|`` (across), for others 0: with b = 0 the error signal keeps its norm,
    and only a positive b can make it grow.

    theta starts uniform in [-pi, pi], real and imaginary parts of v in [-1, 1], those of V within
    ``sqrt(6 / (N + I))``; b at 0, as published, where the code has 2 N in the place of N and b in [-0.01, 0.01]. The
    paper learns the initial state; here it is 0, and an argument of every function.

    Args:
      hidden_size: N, of complex units.
      dtype: of the parameters, single or double precision; the state is complex of the same. By default JAX's
        floating type.

    Returns:
      A `Cell` with `UnitaryParams` and a complex state ``[N]``, D = 2N.

    Raises:
      TypeError, ValueError: `hidden_size` is no positive integer; `dtype` has no complex partner.
    """
    n = check_positive_int("hidden_size", hidden_size)
    real = check_complex("dtype", dtype)

    def init(key: Array, input_size: int) -> UnitaryParams:
        fan_in = check_positive_int("input_size", input_size)
        k_phases, k_reflections, k_in = jax.random.split(check_key("key", key), 3)
        v_re, v_im = draw_within(k_reflections, (2, 2, n), 1.0, real)
        input_re, input_im = draw_within(k_in, (2, n, fan_in), math.sqrt(6 / (n + fan_in)), real)
        phases = draw_within(k_phases, (3, n), math.pi, real)
        return UnitaryParams(phases, v_re, v_im, input_re, input_im, jnp.zeros(n, real))

    return Cell(init, lambda: jax.lax.complex(jnp.zeros(n, real), jnp.zeros(n, real)), _unitary_step)


@recalled
def householder(
    hidden_size: int,
    *,
    reflections: int = 16,
    activation: Callable[[Array], Array] | None = None,
    input_init: Initializer = glorot_uniform,
    dtype: Any = None,
) -> Cell:
    """The orthogonal network of Householder reflections, oRNN (Mhammedi et al. 2017, arXiv:1612.00188).

    ::

        W = H_1 H_2 ... H_K
        H_k = I - 2 u_k u_k^T / |u_k|^2,   the first k - 1 entries of u_k being 0
        h_t = phi(W h_{t-1} + U x_t + b)

    With K = N these are all orthogonal matrices of determinant ``(-1)^N``; with fewer, those that leave alone a
    subspace of dimension N - K. W is never formed: a step is K reflections one after the other, O(K N), and one whose
    vector vanishes is the identity. Entries of u_k before the k-th have no effect.

    The Jacobian is ``diag(phi'(a_t)) W``: the error signal never grows where phi' is at most 1. W is orthogonal to
    rounding, whatever the parameters.

    The vectors start normal and scaled to length 1, so that each reflection is uniform in what it acts on; U Glorot's
    uniform; b at 0: as in the authors' code, which learns the initial state too. Here that is 0, and an argument of
    every function.

    Args:
      hidden_size: N, of units.
      reflections: K; of fewer units N, for more are not needed.
      activation: phi, elementwise, as for `bptt_jax.rnn`; by default the paper's leaky ReLU, of slope 0.1.
      input_init: initialiser of U, as for `bptt_jax.rnn`.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `HouseholderParams` and a state ``[N]``, D = N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 1, dtype)
    count = min(n, check_positive_int("reflections", reflections))
    if activation is not None:
        check_function("activation", activation, "activation(array) -> array")
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> HouseholderParams:
        fan_in = check_positive_int("input_size", input_size)
        k_reflections, k_in = jax.random.split(check_key("key", key))
        vectors = jnp.triu(jax.random.normal(k_reflections, (count, n), at_least_single(dtype)))
        return HouseholderParams(
            (vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype),
            draw_gates("input_init", input_init, k_in, 1, n, fan_in, dtype),
            jnp.zeros(n, dtype),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), shared(_householder_step, activation or _leaky_relu))


def _check_count(name: str, value: Any, n: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer known before compilation, got {type_name(value)}")
    if not 0 <= value <= n:
        raise ValueError(f"{name}: expected an integer from 0 to {n}, got {value}")
    return int(value)


def _leaky_relu(a: Array) -> Array:
    return jnp.where(a < 0, jnp.asarray(0.1, a.dtype) * a, a)


def _skew_symmetric(above: Array, n: int) -> Array:
    """[n, n], from what stands above the diagonal, row by row."""
    # By a gather: what is scattered into zeros is, within a shard_map, of another type than they are.
    index = np.full((n, n), above.size, np.int32)
    index[np.triu_indices(n, 1)] = np.arange(above.size)
    sign = jnp.asarray(np.sign(index.T - index), above.dtype)
    return jnp.append(above, jnp.zeros(1, above.dtype))[np.minimum(index, index.T)] * sign


def _mod_relu(a: Array, bias: Array) -> Array:
    """``a + bias a / |a|`` where |a| + bias is above 0, else 0; real or complex."""
    size = jnp.abs(a)
    still = size == 0
    # Of 0 it is 0; its slope, next to 0, is 1 (or, in the complex plane, unbounded) where the bias is not negative.
    passes = jnp.where(still, bias >= 0, ~(size + bias <= 0))  # and so does NaN
    # The direction of a alone, at any scale: the square of a small one would vanish in the derivative.
    a_scaled = a / jax.lax.stop_gradient(jnp.where(still, 1, size)).astype(a.dtype)
    direction = a_scaled / jnp.where(still, 1, jnp.abs(a_scaled)).astype(a.dtype)
    turned = a + bias.astype(a.dtype) * direction
    return jnp.where(passes, jnp.where(still, a, turned), 0)


def _reflect(u: Array, h: Array) -> Array:
    """``h - 2 u (u^* h) / |u|^2``; h where u is 0."""
    # It depends on the direction of u alone: scaled, the square of no u overflows or vanishes.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(u)))
    u = u / jnp.where(scale == 0, 1, scale).astype(u.dtype)
    square = jnp.sum(u.conj() * u)
    return h - u * (2 * jnp.sum(u.conj() * h) / jnp.where(scale == 0, 1, square))


@lru_cache
def _permutation(n: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(n).astype(np.int32)


def _unitary_step(params: UnitaryParams, h: Array, x: Array) -> Array:
    first, second, third = jax.lax.complex(jnp.cos(params.phases), jnp.sin(params.phases))
    v_1, v_2 = jax.lax.complex(params.reflections_re, params.reflections_im)
    h = _reflect(v_1, jnp.fft.fft(first * h, norm="ortho"))
    h = jnp.fft.ifft(second * h[_permutation(h.size)], norm="ortho")
    drive = third * _reflect(v_2, h) + jax.lax.complex(times(params.input_re, x), times(params.input_im, x))
    return _mod_relu(drive, params.bias)


def _householder_step(activation: Callable[[Array], Array]) -> Step:
    def householder_step(params: HouseholderParams, h: Array, x: Array) -> Array:
        vectors = jnp.triu(params.reflections)
        turned = scan(lambda h, u: (_reflect(u, h), None), h, vectors, reverse=True)[0]
        return activation(turned + times(params.input, x) + params.bias)

    return householder_step
