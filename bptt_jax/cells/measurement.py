"""What the atlas has measured of a cell."""

from typing import Literal

import numpy as np
from jaxtyping import Float

from bptt_jax.cells.atlas import Family
from bptt_jax.results import Result, counted, field

Parallel = Literal["linear", "parallel", "sequential", "undecided"]


class CellMeasurement(Result):
    """How a cell of the atlas carries a gradient at its initialisation, and what a step of it costs.

    Means are over seeds of the initial weights and over sequences; errors come from the scatter of the seeds. What is
    relative to `rnn` is so to one of the width that the atlas was asked for, timed in turns with this cell, the fastest
    call of each.

    Attributes:
      name: of the cell in `bptt_jax.cells.ATLAS`.
      family: likewise.
      basis: "width" for the hidden size that was asked for, "parameters" for the one whose number of parameters is
        nearest to that of `rnn` at the size that was asked for.
      hidden: N, of units.
      parameters: real numbers among them, without the readout.
      size: D, real numbers of the state.
      followed: how many Lyapunov exponents were measured, the largest ones; below D, `living` and `log_condition`
        are lower bounds where all of them count.
      parallel: over time: "linear" in the state, for `bptt_jax.unroll_linear`; else the verdict of
        `bptt_jax.predict_parallel` on `bptt_jax.deer`.
      leaf_names: paths of the L floating leaves of the state.
      growth_rate: of the error signal, nats per step backwards, as in `bptt_jax.gradient_flow`.
      growth_rate_error: its standard error.
      horizon: steps until a thousandth is left: the median; inf where the signal does not fall, or by no more than
        rounding, which is beyond 1e6 steps.
      horizon_low: of all seeds and sequences the tenth percentile.
      horizon_high: and the ninetieth.
      exponent: the largest Lyapunov exponent, nats per step.
      exponent_error: its standard error.
      living: directions that live as long as the sequence: exponents above -1 / T, mean over the seeds.
      log_condition: of the product of T Jacobians, nats: T times the difference between the largest and the smallest
        exponent. inf where a direction is erased: the product is singular.
      leaf_shares: ``[L]``, of the error signal's square in each leaf, mean over all lags from 1 on at which anything
        arrives.
      forward_time: of the loss of a batch, per step and sequence, relative to `rnn`.
      gradient_time: of loss and gradient, forwards and backwards, likewise.
      memory: temporary memory of the compiled gradient, likewise.
      forward_seconds: `forward_time`, not relative.
      gradient_seconds: `gradient_time`, not relative.
      memory_bytes: `memory`, not relative.
      learned: the longest lag that was learned within the budget; NaN where that was not tried.
    """

    name: str = field(static=True)
    family: Family = field(static=True)
    basis: Literal["width", "parameters"] = field(static=True)
    hidden: int = field(static=True)
    parameters: int = field(static=True)
    size: int = field(static=True)
    followed: int = field(static=True)
    parallel: Parallel = field(static=True)
    leaf_names: tuple[str, ...] = field(static=True)
    growth_rate: Float[np.ndarray, ""] = field(dims=())
    growth_rate_error: Float[np.ndarray, ""] = field(dims=())
    horizon: Float[np.ndarray, ""] = field(dims=())
    horizon_low: Float[np.ndarray, ""] = field(dims=())
    horizon_high: Float[np.ndarray, ""] = field(dims=())
    exponent: Float[np.ndarray, ""] = field(dims=())
    exponent_error: Float[np.ndarray, ""] = field(dims=())
    living: Float[np.ndarray, ""] = field(dims=())
    log_condition: Float[np.ndarray, ""] = field(dims=())
    leaf_shares: Float[np.ndarray, " L"] = field(dims=("leaf",))
    forward_time: Float[np.ndarray, ""] = field(dims=())
    gradient_time: Float[np.ndarray, ""] = field(dims=())
    memory: Float[np.ndarray, ""] = field(dims=())
    forward_seconds: Float[np.ndarray, ""] = field(dims=())
    gradient_seconds: Float[np.ndarray, ""] = field(dims=())
    memory_bytes: Float[np.ndarray, ""] = field(dims=())
    learned: Float[np.ndarray, ""] = field(dims=())

    def _headline(self) -> str:
        back = counted(f"{float(self.horizon):.3g}", "step")
        reach = "does not fall" if self.horizon == np.inf else f"reaches {back} back"
        return (
            f"{self.name} of {counted(self.hidden, 'unit')}: the gradient {reach}, at "
            f"{float(self.gradient_time):.2g} times the cost of rnn"
        )
