"""Reservoirs: recurrent networks that are drawn, not trained."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax.cells.initializers import sparse
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.simple import RNNParams, leaky_rnn
from bptt_jax.cells.weights import draw_gates
from bptt_jax.checks import check_finite, check_floating, check_key, check_number, check_positive_int
from bptt_jax.linalg import spectra
from bptt_jax.linalg.precision import at_least_single
from bptt_jax.step import Array, Cell


@recalled
def echo_state(
    hidden_size: int,
    *,
    alpha: float = 1.0,
    spectral_radius: float = 0.95,
    connections: int = 10,
    input_scale: float = 1.0,
    dtype: Any = None,
) -> Cell:
    """The echo state network (Jaeger 2001, GMD report 148), with leaky units (Jaeger et al. 2007, Neural Netw. 20:
    335).

    ::

        h_t = (1 - alpha) h_{t-1} + alpha tanh(W h_{t-1} + U x_t + b)

    The step is that of `leaky_rnn`. Only a readout of h is trained, so leave these parameters out of the optimiser.

    What decides how long a leaky reservoir remembers is its effective spectral radius, that of
    ``(1 - alpha) I + alpha W``, which is the Jacobian at rest. It is `spectral_radius` exactly, but for rounding: with
    W_0 as drawn and c = 1 - alpha, the eigenvalue l of W_0 is put on that circle by one positive factor::

        alpha scale = (r^2 - c^2) / (c Re l + sqrt((c Re l)^2 + |l|^2 (r^2 - c^2)))

    W is scale W_0 with the smallest of these. Each unit of W_0 sends to `connections` others drawn at random, by
    normal weights; so there is always a cycle, and almost surely an eigenvalue that is not 0. U and b are uniform on
    ``[-input_scale, input_scale]`` (Lukosevicius 2012).

    Args:
      hidden_size: N, of units.
      alpha: the leaking rate, above 0 and at most 1; a smaller one is a slower network.
      spectral_radius: r, the effective one, above 1 - alpha, to which a W of zeros would come. From 1 on, the state
        without inputs does not return to 0.
      connections: nonzero weights that leave a unit; all N, in a smaller network.
      input_scale: of inputs and biases. Numbers but `connections` may be traced, and are then checked when they run.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `RNNParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; that the radius is at most 1 - alpha is said here, since
        no scale gives it.
    """
    dtype = check_floating("dtype", dtype)
    n = check_positive_int("hidden_size", hidden_size)
    like = leaky_rnn(n, alpha=alpha, dtype=dtype)
    kept = 1 - alpha
    radius = check_number(
        "spectral_radius",
        spectral_radius,
        "a finite number above 1 - alpha, which it is without recurrent weights",
        lambda r: (r > kept) & (r < math.inf),
    )
    drawn = sparse(check_positive_int("connections", connections), spectral_radius=1.0)
    input_scale = check_finite("input_scale", input_scale)
    wide = at_least_single(dtype)

    def init(key: Array, input_size: int) -> RNNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_bias = jax.random.split(check_key("key", key), 3)
        recurrent = draw_gates("recurrent", drawn, k_rec, 1, n, n, wide)
        c, r, share = (jnp.asarray(a, wide) for a in (kept, radius, alpha))
        values = spectra.eigenvalues(recurrent)
        # The inverse of the factor that puts an eigenvalue on the circle: finite for an eigenvalue of 0 too.
        along, missing = c * values.real, (r - c) * (r + c)
        inverse = (along + jnp.sqrt(along**2 + jnp.abs(values) ** 2 * missing)) / missing
        scale = jnp.asarray(input_scale, dtype)
        return RNNParams(
            (recurrent / (share * jnp.max(inverse))).astype(dtype),
            scale * jax.random.uniform(k_in, (n, fan_in), dtype, -1, 1),
            scale * jax.random.uniform(k_bias, (n,), dtype, -1, 1),
        )

    return Cell(init, like.initial_state, like.step)
