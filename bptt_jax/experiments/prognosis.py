"""How long a lag a network will learn, told from a short burst of its training."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bptt_jax.analysis.flow import gradient_flow
from bptt_jax.checks import check_key, check_positive_int, describe_shapes
from bptt_jax.experiments.network import Network, NetworkParams
from bptt_jax.experiments.tasks import Batch
from bptt_jax.results import Result, field
from bptt_jax.step import PyTree

# Fitted by benchmarks/long_range.py to the recurrences that it does not set aside, in natural logarithms; the half
# width of the range is such that it holds four of five of them, each left out of its own fit.
_INTERCEPT, _SLOPE, _HALF_WIDTH = 1.6013, 0.22697, 1.8812
LONGEST = 1e4  # steps: horizons beyond, which are all extrapolated, tell no more


class Prognosis(Result):
    """What a burst of training tells of the longest lag that will be learned.

    Attributes:
      lag: in steps, the longest at which the task is expected to be learned within the budget of which the burst was a
        twenty-fifth.
      low, high: the range in which four of five recurrences lay that were not used to find it.
      horizon_before: before the burst: steps until a thousandth of the error signal is left, as in
        `bptt_jax.gradient_flow`; the median over the sequences.
      horizon: after it.
      horizon_further: where the parameters would be if they moved as far once more in the direction of the burst: the
        velocity of the horizon along the training.
      growth_rate_before, growth_rate: before the burst and after it, in nats per step.
      length: T, of the task.
    """

    lag: Float[Array, ""] = field(dims=())
    low: Float[Array, ""] = field(dims=())
    high: Float[Array, ""] = field(dims=())
    horizon_before: Float[Array, ""] = field(dims=())
    horizon: Float[Array, ""] = field(dims=())
    horizon_further: Float[Array, ""] = field(dims=())
    growth_rate_before: Float[Array, ""] = field(dims=())
    growth_rate: Float[Array, ""] = field(dims=())
    length: int = field(static=True)

    @property
    def verdict(self) -> str:
        """ "likely", "open" or "unlikely": whether a lag of `length` steps is within the range, or on which side; of
        several seeds, the median one."""
        low, high = (float(np.median(np.asarray(a))) for a in (self.low, self.high))
        return "likely" if self.length <= low else "unlikely" if self.length > high else "open"

    @property
    def statement(self) -> str:
        """What is to be expected, in one line; of several seeds, of the median one."""
        lag, low, high, before, after = (
            steps_in_words(np.median(np.asarray(a)))
            for a in (self.lag, self.low, self.high, self.horizon_before, self.horizon)
        )
        return (
            f"lag {self.length}: {self.verdict}; some {lag} steps are to be expected ({low} to {high}), for the burst "
            f"took the horizon from {before} to {after}"
        )

    def _headline(self) -> str:
        return self.statement


def prognose(
    network: Network,
    before: NetworkParams,
    after: NetworkParams,
    *,
    sequences: int = 8,
    key: Array | None = None,
) -> Prognosis:
    """How long a lag a network will learn, from its parameters before and after a burst of its training.

    The horizon (see `bptt_jax.gradient_flow`) tells it before training within a kind of cell, but not across kinds, for
    training changes horizons: a burst shows whether it opens a memory or gives it up. Three are measured: before the
    burst, after it, and where as much again of the same change would lead. What counts is the longer of the
    first and the last: one that is given up at first can be found again. The logarithm of the lag is taken for a linear
    function of its logarithm, fitted to recurrences and tasks of ``benchmarks/long_range.py``, where the burst was of
    60 updates of 1500; docs/train.md has how well it does on recurrences that it had not seen, and what did no better.

    Args:
      network: with the task at the length that is to be learned.
      before, after: its parameters; the burst is best a twenty-fifth of the budget of updates. For several seeds
        ``jax.vmap`` over both.
      sequences: how many horizons are measured on; medians count.
      key: of the sequences; by default ``jax.random.key(0)``.

    Returns:
      A `Prognosis`. The cost is that of two updates of so many sequences, and a compilation.

    Raises:
      TypeError, ValueError: an argument is of another kind or out of range; parameters do not fit the network.

    Example:
      >>> from bptt_jax.experiments.network import network
      >>> from bptt_jax.experiments.prognosis import prognose
      >>> from bptt_jax.experiments.tasks import adding
      >>> net = network(bptt.rnn(8, gain=0.5), adding(80))
      >>> params = net.init(jax.random.key(0))
      >>> found = prognose(net, params, params)  # as if nothing had been learned
      >>> found.verdict
      'unlikely'
    """
    if not isinstance(network, Network):
        raise TypeError(f"network: expected a Network, got {type(network).__name__}")
    count = check_positive_int("sequences", sequences)
    data = network.task.sample(jax.random.key(0) if key is None else check_key("key", key), count)
    wanted = describe_shapes(jax.eval_shape(network.init, jax.random.key(0)))
    for name, params in (("before", before), ("after", after)):
        if (got := describe_shapes(params)) != wanted:
            raise ValueError(f"{name}: expected parameters of the network, {wanted}, got {got}")
    further = jax.tree.map(_extrapolated, before, after)
    stages = jax.tree.map(lambda *of: jnp.stack(of), before, after, further)
    horizons, rates, _ = jax.jit(lambda stages: jax.lax.map(partial(reach, network, data), stages))(stages)
    was, now, then = horizons
    lag, low, high = predicted(jnp.where(jnp.isnan(now), jnp.nan, was), jnp.where(jnp.isnan(now), jnp.nan, then))
    return Prognosis(lag, low, high, was, now, then, rates[0], rates[1], network.task.length)


def _extrapolated(before: Array, after: Array) -> Array:
    return 2 * after - before if jnp.issubdtype(after.dtype, jnp.inexact) else after


def predicted(before: Float[Array, ""], further: Float[Array, ""]) -> tuple[Array, Array, Array]:
    """From the horizons before the burst and further on: lag, low and high. The first alone counts where the other is
    NaN, for extrapolated parameters may explode."""
    longest = jnp.fmax(before, further)
    middle = _INTERCEPT + _SLOPE * jnp.log(jnp.clip(longest, 1.0, LONGEST))
    return jnp.exp(middle), jnp.exp(middle - _HALF_WIDTH), jnp.exp(middle + _HALF_WIDTH)


def steps_in_words(count: float) -> str:
    """A number of steps; beyond those that are measured, which."""
    return f"{count:.0f}" if count < LONGEST else "more than 10,000" if count > 0 else "nan"


class Reach(NamedTuple):
    """Horizon, growth rate and end gain of `bptt_jax.gradient_flow`."""

    horizon: Array
    growth_rate: Array
    end_gain: Array


def reach(network: Network, data: Batch, params: NetworkParams) -> Reach:
    """Medians over the sequences; to be traced."""

    def one(xs: PyTree, target: PyTree) -> Reach:
        args, h0 = network.loss_args(params, xs, target), network.cell.initial_state()
        flow = gradient_flow(
            network.cell.step, params.cell, h0, xs, network.loss_of_states, args=args, spectra=False
        )
        return Reach(flow.horizon, flow.growth_rate, flow.end_gain)

    return jax.tree.map(jnp.nanmedian, jax.vmap(one)(*data))
