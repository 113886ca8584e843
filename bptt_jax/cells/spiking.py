"""Spiking cells, with a surrogate for the derivative of the spike."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells import surrogates
from bptt_jax.cells.initializers import Initializer
from bptt_jax.cells.sharing import recalled, shared
from bptt_jax.cells.simple import RNNParams
from bptt_jax.cells.weights import check_hidden_size, check_initializers, draw_gates, fan_in_normal, times
from bptt_jax.checks import (
    check_choice,
    check_finite,
    check_floating,
    check_function,
    check_key,
    check_positive_finite,
    check_positive_int,
    check_share,
)
from bptt_jax.step import Array, Cell, Step

_fast_sigmoid = surrogates.fast_sigmoid()


class LIFState(NamedTuple):
    """State of `lif`: the spikes ``h [N]`` and the membranes' potentials ``v [N]``."""

    h: Array
    v: Array


class ALIFState(NamedTuple):
    """State of `alif`: the spikes ``h [N]``, the membranes' potentials ``v [N]``, the adaptation ``a [N]``."""

    h: Array
    v: Array
    a: Array


@recalled
def lif(
    hidden_size: int,
    *,
    decay: float = 0.95,
    threshold: float = 1.0,
    reset: str = "subtract",
    spike: Callable[[Array], Array] = _fast_sigmoid,
    recurrent_init: Initializer = fan_in_normal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """Leaky integrate-and-fire units, connected (Neftci et al. 2019, IEEE Signal Process. Mag. 36: 51).

    ::

        v_t = decay v_{t-1} + W h_{t-1} + U x_t + b - threshold h_{t-1}
        h_t = spike(v_t - threshold)

    h are the spikes, 0 or 1, of which the last ones reset the membrane: by subtraction, or with ``reset="zero"`` to
    what comes in now, ``v_t = decay v_{t-1} (1 - h_{t-1}) + ...`` (Wu et al. 2018, Front. Neurosci. 12: 331).
    ``decay = exp(-dt / tau)``; the default is near that of 20 ms in steps of 1 ms (Bellec et al. 2020). W and U start
    at N(0, 1 / N) and N(0, 1 / I), as there; no unit begins connected to itself; b = 0.

    The step of the spike has no derivative to learn from: backwards, that of `spike` stands for it, s_t. With it the
    Jacobian of v alone is ``decay I + (W - threshold I) diag(s_{t-1})``: the membrane carries the signal by its
    decay, whatever is learned, and each spike's reset takes from it. That gradient is not the slope of the loss.

    Args:
      hidden_size: N, of units.
      decay: of the membrane in a step, between 0 and 1.
      threshold: above 0. Both may be traced, and are then checked when they run.
      reset: "subtract" or "zero".
      spike: of ``v - threshold``, elementwise, with its derivative: one of `bptt_jax.cells.surrogates`, or any function
        (a smooth one makes a network of rates). A ``jax.custom_vjp`` will do, but gives no forward derivatives.
      recurrent_init, input_init: as for `bptt_jax.rnn`; the diagonal of what the former draws is set to 0.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `RNNParams` and an `LIFState`, D = 2N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 1, dtype)
    settings = _check_settings(decay, threshold, reset, spike)
    init = _connected(n, recurrent_init, input_init, dtype)
    return Cell(init, lambda: LIFState(jnp.zeros(n, dtype), jnp.zeros(n, dtype)), shared(_lif_step, *settings))


@recalled
def alif(
    hidden_size: int,
    *,
    decay: float = 0.95,
    threshold: float = 1.0,
    rho: float = 0.995,
    beta: float = 0.184,
    reset: str = "subtract",
    spike: Callable[[Array], Array] = _fast_sigmoid,
    recurrent_init: Initializer = fan_in_normal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """Leaky integrate-and-fire units whose threshold adapts (Bellec et al. 2020, Nat. Commun. 11: 3625).

    ::

        v_t = decay v_{t-1} + W h_{t-1} + U x_t + b - threshold h_{t-1}
        a_t = rho a_{t-1} + h_{t-1}
        h_t = spike(v_t - threshold - beta a_t)

    Each spike raises the threshold by beta, which wears off at rho: a memory of ``1 / (1 - rho)`` steps, 200 by
    default. In their first version (2018, arXiv:1803.09574) a is scaled by 1 - rho, and the threshold as it stands is
    subtracted, not its base. All else is as for `lif`.

    The Jacobian has rho on a's diagonal: the error signal that reaches a fades by rho alone, but for what returns by
    the spikes.

    Args:
      hidden_size: N, of units.
      decay, threshold, reset: as for `lif`.
      rho: what is left of the adaptation after a step, between 0 and 1.
      beta: by how much a spike raises the threshold. Numbers may be traced, and are then checked when they run.
      spike: as for `lif`, of ``v - threshold - beta a``.
      recurrent_init, input_init, dtype: as for `lif`.

    Returns:
      A `Cell` with `RNNParams` and an `ALIFState`, D = 3N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 1, dtype)
    settings = _check_settings(decay, threshold, reset, spike)
    adaptation = check_share("rho", rho), check_finite("beta", beta)
    init = _connected(n, recurrent_init, input_init, dtype)
    return Cell(
        init,
        lambda: ALIFState(jnp.zeros(n, dtype), jnp.zeros(n, dtype), jnp.zeros(n, dtype)),
        shared(_alif_step, *adaptation, *settings),
    )


def _check_settings(decay: Any, threshold: Any, reset: Any, spike: Any) -> tuple[Any, ...]:
    return (
        check_share("decay", decay),
        check_positive_finite("threshold", threshold),
        check_choice("reset", reset, "subtract", "zero"),
        check_function("spike", spike, "spike(array) -> array"),
    )


def _connected(
    n: int, recurrent_init: Initializer, input_init: Initializer, dtype: Any
) -> Callable[[Array, int], RNNParams]:
    check_initializers(recurrent_init, input_init)

    def init(key: Array, input_size: int) -> RNNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in = jax.random.split(check_key("key", key))
        recurrent = draw_gates("recurrent_init", recurrent_init, k_rec, 1, n, n, dtype)
        return RNNParams(
            jnp.fill_diagonal(recurrent, 0, inplace=False),
            draw_gates("input_init", input_init, k_in, 1, n, fan_in, dtype),
            jnp.zeros(n, dtype),
        )

    return init


def _potential(
    params: RNNParams, state: LIFState | ALIFState, x: Array, decay: Any, threshold: Array, reset: str
) -> Array:
    h, v = state.h, jnp.asarray(decay, state.v.dtype) * state.v
    current = times(params.recurrent, h) + times(params.input, x) + params.bias
    return v + current - threshold * h if reset == "subtract" else v * (1 - h) + current


def _lif_step(decay: Any, threshold: Any, reset: str, spike: Callable[[Array], Array]) -> Step:
    def lif_step(params: RNNParams, state: LIFState, x: Array) -> LIFState:
        base = jnp.asarray(threshold, state.v.dtype)
        v = _potential(params, state, x, decay, base, reset)
        return LIFState(spike(v - base), v)

    return lif_step


def _alif_step(
    rho: Any, beta: Any, decay: Any, threshold: Any, reset: str, spike: Callable[[Array], Array]
) -> Step:
    def alif_step(params: RNNParams, state: ALIFState, x: Array) -> ALIFState:
        base, kept, raised = (jnp.asarray(a, state.v.dtype) for a in (threshold, rho, beta))
        v = _potential(params, state, x, decay, base, reset)
        a = kept * state.a + state.h
        return ALIFState(spike(v - base - raised * a), v, a)

    return alif_step
