"""Who influences whom: the norm of dh_t/dh_k for all pairs of times on a grid."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax.checks import check_positive_int
from bptt_jax.linalg import logscale
from bptt_jax.linalg.products import identity, matmul
from bptt_jax.linalg.spectra import spectral_norm
from bptt_jax.recurrence.jacobians import jacobian_at
from bptt_jax.recurrence.linearization import differentiation_mode
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.results import Result, field
from bptt_jax.step import Array, Params, PyTree, Recurrence, State, Step, bind, check_step, ravel_state


class InfluenceMap(Result):
    """The influence of each state on each later one.

    Attributes:
      times: ``[G + 1]``, the grid: from 0 to T, as even as can be.
      log_norms: ``[G + 1, G + 1]``, entry (i, k) the natural log of ``||dh_t/dh_s||_2`` for t = times[i] and
        s = times[k]: 0 for t = s, -inf for t < s (nothing that comes later has an influence).
    """

    times: Int[Array, " G+1"] = field(dims=("times",))
    log_norms: Float[Array, "G+1 G+1"] = field(dims=("times", "earlier"))

    def _headline(self) -> str:
        last, norm = int(self.times[-1]), float(self.log_norms[-1, 0])
        return f"log ||dh_{last}/dh_0|| = {norm:.3g}, {norm / last:.3g} nats per step"

    def _figure(self) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.0, 2.4), layout="constrained")
        axes = figure.subplots()
        norms = np.where(np.isfinite(self.log_norms), self.log_norms, np.nan)
        reach = np.nanmax(np.abs(norms), initial=1e-3)
        times = np.asarray(self.times)
        image = axes.pcolormesh(times, times, norms, shading="nearest", cmap="RdBu_r", vmin=-reach, vmax=reach)
        axes.set(xlabel="s", ylabel="t")
        figure.colorbar(image, label="log ||dh_t/dh_s||")
        return figure

    def to_xarray(self) -> Any:
        """As of every result, with `times` along both axes."""
        data = super().to_xarray()
        return data.assign_coords(earlier=data["times"].values)


def influence_map(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree = None,
    *,
    length: int | None = None,
    intervals: int = 50,
) -> InfluenceMap:
    """Norms of all products of Jacobians that begin and end on a grid of times, in log scale.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      intervals: G, of the grid; at most T.

    Returns:
      `InfluenceMap`. Cost: T Jacobians and products, and G^2 products and spectral norms; memory O(T D + G D^2).

    Raises:
      TypeError, ValueError: an argument breaks the contract.

    Example:
      >>> found = bptt.influence_map(lambda w, h, x: w * h, 0.5, jnp.ones(1), length=4, intervals=2)
      >>> found.times
      Array([0, 2, 4], dtype=int32)
      >>> found.log_norms / jnp.log(2.0)
      Array([[  0., -inf, -inf],
             [ -2.,   0., -inf],
             [ -4.,  -2.,   0.]], dtype=float32)
    """
    recurrence = bind(step, params, state0, xs, length)
    return _influence_map(recurrence, min(check_positive_int("intervals", intervals), recurrence.length))


@partial(jax.jit, static_argnames="intervals")
def _influence_map(recurrence: Recurrence, intervals: int) -> InfluenceMap:
    recurrence = check_step(recurrence)
    starts = recurrence.starts(states_of(recurrence))
    steps, mode = recurrence.length, differentiation_mode(recurrence)
    times = np.arange(intervals + 1) * steps // intervals
    longest = int(np.max(np.diff(times)))
    size = ravel_state(recurrence.state0)[0]
    one = identity(jnp.zeros((1, size.size, size.size), size.dtype))

    def interval(begin: Array) -> tuple[Array, Array]:
        def further(carry: tuple[Array, Array], offset: Array) -> tuple[tuple[Array, Array], None]:
            inside = begin[0] + offset < begin[1]
            at = jnp.minimum(begin[0] + offset, steps - 1)
            state, x = jax.tree.map(lambda a: jnp.asarray(a)[at], (starts, recurrence.instants.x))
            jacobian = jacobian_at(recurrence.step, recurrence.params, state, x, mode)
            product = logscale.normalize(matmul(jacobian, carry[0]), carry[1])
            return jax.tree.map(partial(jnp.where, inside), product, carry), None

        return jax.lax.scan(further, one, jnp.arange(longest))[0]

    between = jax.lax.map(interval, jnp.stack([jnp.asarray(times[:-1]), jnp.asarray(times[1:])], axis=1))

    def from_(first: Array) -> Array:
        """Log norms of dh/dh_first, [G + 1]."""

        def further(carry: tuple[Array, Array], inputs: PyTree) -> tuple[tuple[Array, Array], Array]:
            number, (matrix, e) = inputs
            product = logscale.normalize(matmul(matrix, carry[0]), carry[1] + e)
            carry = jax.tree.map(partial(jnp.where, number >= first), product, carry)
            norm = spectral_norm(carry[0])
            return carry, logscale.to_log(jnp.where(norm == 0, 1, norm), carry[1], zero=norm == 0)

        _, norms = jax.lax.scan(further, one, (jnp.arange(intervals), between))
        grid = jnp.arange(intervals + 1)
        norms = jnp.concatenate([jnp.zeros(1, norms.dtype), norms])
        return jnp.where(grid > first, norms, jnp.where(grid == first, 0.0, -jnp.inf).astype(norms.dtype))

    return InfluenceMap(jnp.asarray(times, jnp.int32), jax.lax.map(from_, jnp.arange(intervals + 1)).T)
