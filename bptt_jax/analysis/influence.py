"""Who influences whom: the norm of dh_t/dh_k for all pairs of times on a grid."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax import devices
from bptt_jax.checks import PRODUCT, SINGULAR, check_cost, check_positive_int
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.products import identity, log_spectral_norm
from bptt_jax.recurrence.jacobians import jacobian_at
from bptt_jax.recurrence.linearization import differentiation_mode
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.results import Result, counted, field
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
    ravel_state,
)
from bptt_jax.timeline import finite_steps, real_steps_first


class InfluenceMap(Result):
    """The influence of each state on each later one.

    Attributes:
      times: ``[G + 1]``, the grid: from 0 to T, as even as can be. Real steps are counted: with padding T is their
        number, and a time comes several times where there are fewer than G.
      log_norms: ``[G + 1, G + 1]``, entry (i, k) the natural log of ``||dh_t/dh_s||_2`` for t = times[i] and
        s = times[k]: 0 for t = s, -inf for t < s (nothing that comes later has an influence) and where a reset lies
        between: h_s is what the step after it starts from, h_t what the step before it ends with. NaN where a step
        on the way from s to t leads to NaN or infinity, or has a Jacobian that is not finite.
    """

    times: Int[Array, " G+1"] = field(dims=("times",))
    log_norms: Float[Array, "G+1 G+1"] = field(dims=("times", "earlier"))

    def _headline(self) -> str:
        times, last, norm = np.asarray(self.times), int(self.times[-1]), float(self.log_norms[-1, 0])
        if last == 0:
            return "no step"
        if np.isnan(norm):
            return f"a step on the way from h_0 to h_{last}, or its Jacobian, is not finite"
        if norm > -np.inf:
            return f"log ||dh_{last}/dh_0|| = {norm:.3g}, {norm / last:.3g} nats per step"
        reach = np.where(np.asarray(self.log_norms) > -np.inf, times[:, None] - times[None, :], 0)
        farthest = counted(int(np.max(reach)), "step")
        return f"nothing of h_0 is left in h_{last}; the longest influence on this grid is over {farthest}"

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
      `InfluenceMap`, with padding the same as without. Cost: T Jacobians and products, and G^2 products and
      spectral norms; memory O(T D + G D^2).

    Raises:
      TypeError, ValueError: an argument breaks the contract; it would take more than 5e13 operations.

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
    intervals = min(check_positive_int("intervals", intervals), recurrence.length)
    check_cost(
        "intervals",
        f"the norms between {intervals + 1} times",
        recurrence.size,
        PRODUCT * recurrence.length + intervals**2 * (PRODUCT + SINGULAR),
        "fewer intervals have fewer norms; leading_singular_values and gradient_flow(num=) need no such matrix",
    )
    return _influence_map(recurrence, intervals=intervals)


@devices.compiled
def _influence_map(recurrence: Recurrence, *, intervals: int) -> InfluenceMap:
    recurrence = check_step(recurrence)
    states, steps, mode = states_of(recurrence), recurrence.length, differentiation_mode(recurrence)
    starts, finite = recurrence.starts(states), finite_steps(states)
    order, real_steps = real_steps_first(recurrence.real), jnp.sum(recurrence.real)
    grid = jnp.arange(intervals + 1)
    times = grid * (real_steps // intervals) + grid * (real_steps % intervals) // intervals
    empty = identity(recurrence.size, ravel_state(recurrence.state0)[0].dtype)

    def interval(ends: Array) -> LogScaled:
        def further(product: LogScaled, offset: Array) -> tuple[LogScaled, None]:
            number = ends[0] + offset
            at = order[jnp.minimum(number, steps - 1)]
            state, x = jax.tree.map(lambda a: a[at], (starts, recurrence.instants.x))
            jacobian = jacobian_at(recurrence.step, recurrence.params, state, x, mode)
            jacobian = jnp.where(finite[at], jacobian, jnp.nan)
            return choose(number < ends[1], jacobian @ product, product), None

        return devices.scan(further, empty, jnp.arange(-(-steps // intervals)))[0]

    between = jax.lax.map(interval, jnp.stack([times[:-1], times[1:]], axis=1))

    def from_(first: Array) -> Array:
        """Log norms of dh/dh_first, [G + 1]."""

        def further(product: LogScaled, inputs: tuple[Array, LogScaled]) -> tuple[LogScaled, LogScaled]:
            number, factor = inputs
            product = choose(number >= first, factor @ product, product)
            return product, product

        _, products = devices.scan(further, empty, (grid[:-1], between))
        norms = log_spectral_norm(products)
        return jnp.concatenate([jnp.zeros_like(norms[:1]), norms])

    t, s = times[:, None], times[None, :]
    # Resets at or before a step: one lies between the steps that lead from h_s to h_t if the last has more of them.
    count = jnp.cumsum(recurrence.resets[order])
    first, last = (count[jnp.clip(step, 0, steps - 1)] for step in (s, t - 1))
    norms = jax.lax.map(from_, grid).T
    norms = jnp.where((t < s) | (last > first), -jnp.inf, jnp.where(t == s, 0, norms))
    return InfluenceMap(times.astype(jnp.int32), norms)
