"""Linear attention: memories of outer products, which fade at fixed rates, or as a gate says, or not at all."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh
from bptt_jax.cells.heads import check_sizes, draw_heads, draw_orthogonal, outer, project
from bptt_jax.cells.initializers import Initializer, check_initializer
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.weights import draw_gates, times
from bptt_jax.checks import check_floating, check_key, check_positive_int, check_share
from bptt_jax.recurrence.diagonal import DiagonalStep
from bptt_jax.step import Array, Cell

# That of Glorot and Bengio with a gain of 2^-2.5, from DeepNet (Wang et al. 2022, arXiv:2203.00555).
_small_glorot = jax.nn.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
_GATE_ROOT = 16  # tau of gla


class KeyValueParams(NamedTuple):
    """Parameters of `linear_transformer` and `retnet`: ``key [H, K, I]``, ``value [H, V, I]``."""

    key: Array
    value: Array


class LinearTransformerState(NamedTuple):
    """State of `linear_transformer`: the memory ``S [H, V, K]`` and its normaliser ``z [H, K]``."""

    S: Array
    z: Array


class GLAParams(NamedTuple):
    """Parameters of `gla`: ``key [H, K, I]``, ``value [H, V, I]``, and of the gates, of rank R, ``gate_down [R, I]``,
    ``gate_up [H, K, R]``, ``gate_bias [H, K]``.
    """

    key: Array
    value: Array
    gate_down: Array
    gate_up: Array
    gate_bias: Array


class HGRN2Params(NamedTuple):
    """Parameters of `hgrn2`: ``forget [H, K, I]``, ``value [H, V, I]``, and ``bound``, a number."""

    forget: Array
    value: Array
    bound: Array


class RWKV6Params(NamedTuple):
    """Parameters of `rwkv6`: ``key [H, K, I]``, ``value [H, V, I]``, and of the decay ``decay [H, K]``,
    ``decay_in [R, I]``, ``decay_out [H, K, R]``."""

    key: Array
    value: Array
    decay: Array
    decay_in: Array
    decay_out: Array


@recalled
def linear_transformer(hidden_size: int, *, heads: int = 2, key_size: int = 8, dtype: Any = None) -> Cell:
    """Causal attention with a kernel in place of the softmax, as a recurrence (Katharopoulos et al. 2020,
    arXiv:2006.16236, eq. 16 to 20).

    ::

        k = elu(W_k x_t) + 1                          v = W_v x_t
        S_t = S_{t-1} + v k^T                         z_t = z_{t-1} + k

    for each of H heads, with V = N/H values and K keys. What is read, ``S_t q / (z_t^T q)`` with a query q of x_t,
    is no part of the recurrence. The weights start at N(0, 1 / I), where the authors' code has PyTorch's linear layers,
    with their biases.

    The Jacobian is the identity: the error signal neither fades nor grows, and nothing is ever forgotten.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `KeyValueParams`, a `LinearTransformerState`, D = N K + H K, and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)

    def init(key: Array, input_size: int) -> KeyValueParams:
        fan_in = check_positive_int("input_size", input_size)
        k_key, k_value = jax.random.split(check_key("key", key))
        return KeyValueParams(
            draw_heads(k_key, h, keys, fan_in, floating), draw_heads(k_value, h, values, fan_in, floating)
        )

    def initial_state() -> LinearTransformerState:
        return LinearTransformerState(jnp.zeros((h, values, keys), floating), jnp.zeros((h, keys), floating))

    return Cell(init, initial_state, _linear_transformer_step)


@recalled
def retnet(
    hidden_size: int,
    *,
    heads: int = 2,
    key_size: int = 8,
    input_init: Initializer = _small_glorot,
    dtype: Any = None,
) -> Cell:
    """The retention of RetNet (Sun et al. 2023, arXiv:2307.08621), of several heads.

    ::

        k = W_k x_t                                   v = W_v x_t
        S_t = gamma S_{t-1} + v k^T

    for each of H heads, with V = N/H values and K keys (the paper writes the transpose), and its decays, which are not
    trained: ``gamma = 1 - 2^(-5 - h)`` of head h = 0 ... H - 1. What is read, ``S_t q`` with a query q of x_t, the norm
    and the gate behind it are no part of the recurrence. The rotation of queries and keys by their position is left
    out: it is an encoding of position, for which a step has no name.

    The weights start by Glorot's rule with a gain of 2^-2.5, as released. The Jacobian is a constant, gamma times the
    identity in each head: memories last 32, 64, ... steps whatever is trained.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      input_init: initialiser ``(key, shape, dtype)`` of W_k and W_v, of shapes ``(I, H K)`` and ``(I, N)``.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `KeyValueParams`, a state ``[H, V, K]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> KeyValueParams:
        fan_in = check_positive_int("input_size", input_size)
        k_key, k_value = jax.random.split(check_key("key", key))
        return KeyValueParams(
            draw_heads(k_key, h, keys, fan_in, floating, input_init),
            draw_heads(k_value, h, values, fan_in, floating, input_init),
        )

    return Cell(init, lambda: jnp.zeros((h, values, keys), floating), _retnet_step)


@recalled
def gla(
    hidden_size: int,
    *,
    heads: int = 2,
    key_size: int = 8,
    rank: int = 16,
    input_init: Initializer = _small_glorot,
    dtype: Any = None,
) -> Cell:
    """Gated linear attention (Yang et al. 2023, arXiv:2312.06635), of several heads.

    ::

        k = W_k x_t                                   v = W_v x_t
        alpha = sigmoid(W_up W_down x_t + b)^(1/16)
        S_t = S_{t-1} diag(alpha) + v k^T

    for each of H heads, with V = N/H values and K keys, each of which has a gate of its own (the paper writes the
    transpose). What is read, ``S_t q`` with a query q of x_t, the norm and the output gate are no part of the
    recurrence. The gates are of rank R = `rank`, 16 in the paper, which has 4 heads, with half as many keys as values.

    The weights start by Glorot's rule with a gain of 2^-2.5 and b at 0, as first released: the gates near
    ``2^(-1/16) = 0.96``, memories of 23 steps. The Jacobian is diagonal, alpha for the entries of each key: the error
    signal never grows.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      rank: R.
      input_init: initialiser ``(key, shape, dtype)`` of W_k, W_v and W_down, of shapes ``(I, H K)``, ``(I, N)`` and
        ``(I, R)``, and of W_up, ``(R, H K)``.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GLAParams`, a state ``[H, V, K]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)
    rank = check_positive_int("rank", rank)
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> GLAParams:
        fan_in = check_positive_int("input_size", input_size)
        k_key, k_value, k_down, k_up = jax.random.split(check_key("key", key), 4)
        return GLAParams(
            draw_heads(k_key, h, keys, fan_in, floating, input_init),
            draw_heads(k_value, h, values, fan_in, floating, input_init),
            draw_gates("input_init", input_init, k_down, 1, rank, fan_in, floating),
            draw_heads(k_up, h, keys, rank, floating, input_init),
            jnp.zeros((h, keys), floating),
        )

    return Cell(init, lambda: jnp.zeros((h, values, keys), floating), _gla_step)


@recalled
def hgrn2(
    hidden_size: int, *, heads: int = 2, key_size: int = 8, lower_bound: float = 0.5, dtype: Any = None
) -> Cell:
    """The second hierarchically gated linear recurrence: what is forgotten makes room for what is written (Qin et al.
    2024, arXiv:2404.07904, eq. 6).

    ::

        gamma = sigmoid(bound)
        f = gamma + (1 - gamma) * sigmoid(W_f x_t)
        S_t = S_{t-1} diag(f) + (W_v x_t) (1 - f)^T

    for each of H heads, with V = N/H values and K keys, for which ``1 - f`` stands. What is read, ``S_t q`` with a
    query q of x_t, is no part of the recurrence. The lower bound gamma is learned, in the paper a cumulative softmax
    over layers, 0 at the lowest; here, as for `hgrn`, by a parameter of its own, initially `lower_bound`, 1/2 as the
    second of two layers has it. The weights start at N(0, 1 / I); in published code the model around draws them.

    The Jacobian is diagonal, f for the entries of each key: the error signal never grows, and fades by
    ``-log(gamma)`` a step at most.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      lower_bound: initial gamma, above 0 and below 1. It may be traced, and is then checked when it runs.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `HGRN2Params`, a state ``[H, V, K]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)
    lower_bound = check_share("lower_bound", lower_bound)

    def init(key: Array, input_size: int) -> HGRN2Params:
        fan_in = check_positive_int("input_size", input_size)
        k_forget, k_value = jax.random.split(check_key("key", key))
        return HGRN2Params(
            draw_heads(k_forget, h, keys, fan_in, floating),
            draw_heads(k_value, h, values, fan_in, floating),
            jax.scipy.special.logit(jnp.asarray(lower_bound, floating)),
        )

    return Cell(init, lambda: jnp.zeros((h, values, keys), floating), _hgrn2_step)


@recalled
def rwkv6(hidden_size: int, *, heads: int = 2, key_size: int = 8, rank: int = 4, dtype: Any = None) -> Cell:
    """The memory of RWKV-6, "Finch", whose decay depends on the input (Peng et al. 2024, arXiv:2404.05892, eq. 16 to
    20).

    ::

        k = W_k x_t                                   v = W_v x_t
        w = exp(-exp(d + B tanh(A x_t)))
        S_t = S_{t-1} diag(w) + v k^T

    for each of H heads, with V = N/H values and K keys (the paper writes the transpose). What is read, ``(S_{t-1} +
    v (u * k)^T) r`` with a receptance r of x_t, its normalisation and gate are no part of the recurrence. Neither is
    the token shift: it mixes x_t with x_{t-1}, not with a state, so it is a map of the inputs; to have it, give this
    cell the mixed inputs.

    The weights start as in the released code's lowest layer: W_v orthogonal and W_k a tenth of that; d over the keys
    of all heads from -6 to -1 as ``-6 + 5 (j / (H K - 1))^0.7``, which keeps memories of 400 to 3 steps; A at 0; B
    uniform within 0.01 of 0.

    The Jacobian is diagonal, w for the entries of each key, between 0 and 1: the error signal never grows.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      rank: R, of the decay's dependence on the input.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `RWKV6Params`, a state ``[H, V, K]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)
    rank = check_positive_int("rank", rank)

    def init(key: Array, input_size: int) -> RWKV6Params:
        fan_in = check_positive_int("input_size", input_size)
        k_key, k_value, k_decay = jax.random.split(check_key("key", key), 3)
        place = jnp.arange(h * keys) / max(h * keys - 1, 1)
        return RWKV6Params(
            0.1 * draw_orthogonal(k_key, h, keys, fan_in, floating),
            draw_orthogonal(k_value, h, values, fan_in, floating),
            (-6 + 5 * place**0.7).astype(floating).reshape(h, keys),
            jnp.zeros((rank, fan_in), floating),
            jax.random.uniform(k_decay, (h, keys, rank), floating, -0.01, 0.01),
        )

    return Cell(init, lambda: jnp.zeros((h, values, keys), floating), _rwkv6_step)


# One object each, whatever the sizes, so that cells share what JAX has compiled.
@DiagonalStep
def _linear_transformer_step(
    params: KeyValueParams, x: Array
) -> tuple[LinearTransformerState, LinearTransformerState]:
    k = jax.nn.elu(project(params.key, x)) + 1
    one = jnp.ones((), k.dtype)
    return LinearTransformerState(one, one), LinearTransformerState(outer(project(params.value, x), k), k)


@DiagonalStep
def _retnet_step(params: KeyValueParams, x: Array) -> tuple[Array, Array]:
    k, v = project(params.key, x), project(params.value, x)
    head = jnp.arange(len(k), dtype=k.dtype)
    return (1 - jnp.exp2(-5 - head))[:, None, None], outer(v, k)


@DiagonalStep
def _gla_step(params: GLAParams, x: Array) -> tuple[Array, Array]:
    gate = project(params.gate_up, times(params.gate_down, x)) + params.gate_bias
    alpha = jnp.exp(jax.nn.log_sigmoid(gate) / _GATE_ROOT)
    return alpha[:, None], outer(project(params.value, x), project(params.key, x))


@DiagonalStep
def _hgrn2_step(params: HGRN2Params, x: Array) -> tuple[Array, Array]:
    # 1 - f as a product of small numbers, which the difference would lose.
    room = sigmoid(-params.bound) * sigmoid(-project(params.forget, x))
    return (1 - room)[:, None], outer(project(params.value, x), room)


@DiagonalStep
def _rwkv6_step(params: RWKV6Params, x: Array) -> tuple[Array, Array]:
    decay = params.decay + project(params.decay_out, tanh(times(params.decay_in, x)))
    keep = jnp.exp(-jnp.exp(decay))
    return keep[:, None], outer(project(params.value, x), project(params.key, x))
