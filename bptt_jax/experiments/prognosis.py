"""How long a lag a network will learn, told from its horizon and from a pilot: a short training at a short length."""

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

# Fitted by benchmarks/long_range.py, in natural logarithms, of the horizon and of the pilot's loss; the half width of
# the range is such that it holds four of five recurrences, each left out of its own fit.
_INTERCEPT, _OF_HORIZON, _OF_LOSS, _HALF_WIDTH = 0.90515, 0.16412, -1.1383, 0.93436
LONGEST = 1e3  # steps: a horizon beyond counts as this
SOLVED, UNSOLVED = 0.1, 20.0  # of the trivial loss: a smaller one counts as learned, a larger one as this
PILOT_LENGTH, PILOT_SHARE = 10, 0.36  # steps; of the budget of updates
_EVALUATED = 500  # sequences


class Prognosis(Result):
    """What a pilot, and the horizon before training, tell of the longest lag that will be learned.

    Attributes:
      lag: in steps, the longest at which the task is expected to be learned within the budget.
      low, high: the range in which four of five recurrences lay that were not used to find it.
      horizon: before training, at the length that is wanted: steps until a thousandth of the error signal is left, as
        in `bptt_jax.gradient_flow`; the median over the sequences.
      growth_rate: before training, in nats per step; likewise.
      loss: after the pilot, at its length, over the trivial loss.
      length: T, that is wanted.
    """

    lag: Float[Array, ""] = field(dims=())
    low: Float[Array, ""] = field(dims=())
    high: Float[Array, ""] = field(dims=())
    horizon: Float[Array, ""] = field(dims=())
    growth_rate: Float[Array, ""] = field(dims=())
    loss: Float[Array, ""] = field(dims=())
    length: int = field(static=True)

    @property
    def verdict(self) -> str:
        """ "likely", "open" or "unlikely": whether a lag of `length` steps is within the range, or on which side; of
        several seeds, by the geometric means of their ranges."""
        low, high = _of_seeds(self.low), _of_seeds(self.high)
        return "likely" if self.length <= low else "unlikely" if self.length > high else "open"

    @property
    def statement(self) -> str:
        """What is to be expected, in one line; of several seeds, geometric means of lag and range, and the median
        loss and horizon."""
        lag, low, high = (f"{_of_seeds(a):.0f}" for a in (self.lag, self.low, self.high))
        loss, horizon = (float(np.median(np.asarray(a))) for a in (self.loss, self.horizon))
        return (
            f"lag {self.length}: {self.verdict}; a lag of {lag} is to be expected ({low} to {high}), for the pilot "
            f"took the loss to {loss:.2g} of the trivial, and the horizon begins at {steps_in_words(horizon)}"
        )

    def _headline(self) -> str:
        return self.statement


def prognose(
    network: Network,
    pilot: Network,
    before: NetworkParams,
    after: NetworkParams,
    *,
    sequences: int = 8,
    key: Array | None = None,
) -> Prognosis:
    """How long a lag a network will learn, from its horizon and from a pilot: its training at a length of ten steps.

    The horizon (see `bptt_jax.gradient_flow`) says how far a signal reaches, not whether the task is learned at all;
    the loss that is left after a pilot says that. The logarithm of the longest lag is taken for a linear function of
    the logarithms of both, fitted to recurrences and tasks of ``benchmarks/long_range.py``: 1500 updates, of networks
    of 16 units, and a pilot of 540 (`PILOT_SHARE` of them) at T = 10 (`PILOT_LENGTH`), which are 2 % of the steps that
    all updates at T = 160 would be of. docs/train.md has how well it does on recurrences that it had not seen, and
    what did no better.

    Args:
      network: with the task at the length that is to be learned.
      pilot: the same with the task at a length of ten.
      before, after: the parameters before and after the pilot's training, of either. For several seeds ``jax.vmap``
        over both.
      sequences: how many the horizon is measured on; the median counts. The loss is of 500 others.
      key: of the sequences; by default ``jax.random.key(0)``.

    Returns:
      A `Prognosis`. The cost beside the pilot is that of an update of so many sequences, and a compilation.

    Raises:
      TypeError, ValueError: an argument is of another kind or out of range; parameters do not fit a network.

    Example:
      >>> from bptt_jax.experiments.network import network
      >>> from bptt_jax.experiments.prognosis import prognose
      >>> from bptt_jax.experiments.tasks import adding
      >>> cell = bptt.rnn(8, gain=0.5)
      >>> net, pilot = network(cell, adding(200)), network(cell, adding(10))
      >>> params = net.init(jax.random.key(0))
      >>> found = prognose(net, pilot, params, params)  # as if nothing had been learned
      >>> found.verdict
      'unlikely'
    """
    for name, net in (("network", network), ("pilot", pilot)):
        if not isinstance(net, Network):
            raise TypeError(f"{name}: expected a Network, got {type(net).__name__}")
        wanted = describe_shapes(jax.eval_shape(net.init, jax.random.key(0)))
        for given, params in (("before", before), ("after", after)):
            if (got := describe_shapes(params)) != wanted:
                raise ValueError(f"{given}: expected parameters of the {name}, {wanted}, got {got}")
    count = check_positive_int("sequences", sequences)
    of_horizon, of_loss = jax.random.split(jax.random.key(0) if key is None else check_key("key", key))
    flow = jax.jit(partial(reach, network))(network.task.sample(of_horizon, count), before)
    losses = jax.jit(jax.vmap(pilot.loss, in_axes=(None, 0, 0)))(after, *pilot.task.sample(of_loss, _EVALUATED))
    loss = jnp.mean(losses) / pilot.task.baseline
    lag, low, high = predicted(flow.horizon, loss)
    return Prognosis(lag, low, high, flow.horizon, flow.growth_rate, loss, network.task.length)


def predicted(horizon: Float[Array, ""], loss: Float[Array, ""]) -> tuple[Array, Array, Array]:
    """Lag, low and high. A loss that is NaN is that of a training that exploded."""
    reached, left = jnp.clip(horizon, 1.0, LONGEST), jnp.clip(jnp.nan_to_num(loss, nan=UNSOLVED), SOLVED, UNSOLVED)
    middle = _INTERCEPT + _OF_HORIZON * jnp.log(reached) + _OF_LOSS * jnp.log(left)
    return jnp.exp(middle), jnp.exp(middle - _HALF_WIDTH), jnp.exp(middle + _HALF_WIDTH)


def _of_seeds(steps: Array) -> float:
    return float(np.exp(np.mean(np.log(np.asarray(steps, np.float64)))))


def steps_in_words(count: float) -> str:
    """A number of steps; beyond those that are told apart, which."""
    return f"{count:.0f}" if count < LONGEST else f"more than {LONGEST:.0f}" if count > 0 else "nan"


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
