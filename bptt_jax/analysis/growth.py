"""How fast a signal grows on its way back, how sure that is, and how far it reaches: statistics of its logarithms.

On its way the logarithm of a signal's norm is a random walk with a drift. The drift, the growth rate, is the slope
of a least-squares line; what is uncertain of it lies in the scatter of the walk's steps, and in how much each step
resembles those before.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bptt_jax import devices
from bptt_jax.analysis.averages import least_error


class Growth(NamedTuple):
    """Of R signals that go the same way.

    Attributes:
      rate: nats per step backwards: the least-squares slope, common to all segments, of gains against lags, each
        segment's start (0, 0) included. The line ends where the signal becomes exactly zero. NaN if there are fewer
        than two increments, which tell nothing of their scatter.
      rate_error: its standard error, some roundings at least.
      horizon: steps until the signal of the longest segment has fallen to the threshold for good. Where its start
        cuts it off before, extrapolated by the rate; inf if that does not fall, NaN if it is. NaN where there are
        fewer than two lags in all.
      horizon_error: of an extrapolated horizon, from that of the rate; 0 if it was measured, NaN if it is inf.
      extrapolated: whether the horizon lies beyond the longest segment.
      cut_lag: lag at which the signal of the longest segment becomes exactly zero; -1 if it does not.
      end_gain: log of what arrives at the start of the longest segment; if it is zero there and nowhere before, at
        the lag before. NaN where nothing was measured.
      weight: of the rate, where several are pooled: the sum of the squared lags about their mean.
    """

    rate: Float[Array, " R"]
    rate_error: Float[Array, " R"]
    horizon: Float[Array, " R"]
    horizon_error: Float[Array, " R"]
    extrapolated: Bool[Array, " R"]
    cut_lag: Int[Array, " R"]
    end_gain: Float[Array, " R"]
    weight: Float[Array, " R"]


class Tally(NamedTuple):
    """What is kept of the R signals while they go back; all ``[R]``, floating numbers, so that one array holds it.

    Attributes:
      place: number of the latest increment in the stretch in which the signal is not exactly zero.
      dead: whether that has ended.
      first, second: sums of the increments, times their place and its square, less those of `typical`.
      gain, gain_before: at the latest lag, and the one before.
      within: last lag at which the gain was above the threshold.
      cut: lag at which the signal became zero; 0 if it has not.
      typical: the first increment of all; sums are about it, so that they keep their digits.
      count, lags, slope, weight: of the segments so far, the number of increments and of lags; of their lines, the
        slope times the weight, and the weight.
      length, end_gain, end_within, end_cut: of the longest segment so far; length counts lags.
    """

    place: Array
    dead: Array
    first: Array
    second: Array
    gain: Array
    gain_before: Array
    within: Array
    cut: Array
    typical: Array
    counted: Array
    lags: Array
    slope: Array
    weight: Array
    length: Array
    end_gain: Array
    end_within: Array
    end_cut: Array

    @staticmethod
    def empty(rows: int, dtype: jnp.dtype) -> "Tally":
        return Tally(*jnp.zeros((len(Tally._fields), rows), dtype))

    def begin(self) -> "Tally":
        """Where a signal begins."""
        zero = jnp.zeros_like(self.place)
        return self._replace(
            place=zero, dead=zero, first=zero, second=zero, gain=zero, gain_before=zero, within=zero, cut=zero
        )

    def step(
        self,
        lag: Float[Array, ""],
        gain: Float[Array, " R"],
        increment: Float[Array, " R"],
        left: Bool[Array, " R"],
        arrived: Bool[Array, " R"],
        level: Float[Array, ""],
    ) -> "Tally":
        """After one more step back.

        Args:
          lag: that has been reached.
          gain: there.
          increment: of the gain.
          left, arrived: whether there was a signal before, and is one now.
          level: log of the threshold.
        """
        alive = left & arrived & (self.dead == 0)
        died = left & ~arrived & (self.dead == 0)
        place = jnp.where(alive, self.place + 1, self.place)
        typical = jnp.where(alive & (self.counted == 0), increment, self.typical)
        moment = jnp.where(alive, (increment - typical) * place, 0)
        return self._replace(
            place=place,
            dead=jnp.where(died, 1, self.dead),
            first=self.first + moment,
            second=self.second + moment * place,
            gain=gain,
            gain_before=self.gain,
            within=jnp.where(gain >= level, lag, self.within),
            cut=jnp.where(died, lag, self.cut),
            typical=typical,
            counted=self.counted + alive.astype(gain.dtype),
            lags=self.lags + 1,
        )

    def end(self, lag: Float[Array, ""]) -> "Tally":
        """At the start of a segment, `lag` steps back: the slope of a line through a walk of M steps weights the i-th
        of them by i (M + 1 - i) / 2."""
        m = self.place
        longest = lag > self.length
        # Zero at the segment's start alone is how log-domain cells begin (from -inf): nothing was forgotten on the way.
        spared = self.cut == lag
        return self._replace(
            slope=self.slope + ((m + 1) * self.first - self.second) / 2,
            weight=self.weight + m * (m + 1) * (m + 2) / 12,
            length=jnp.where(longest, lag, self.length),
            end_gain=jnp.where(longest, jnp.where(spared, self.gain_before, self.gain), self.end_gain),
            end_within=jnp.where(longest, self.within, self.end_within),
            end_cut=jnp.where(longest, self.cut, self.end_cut),
        )

    def growth(
        self, increments: Float[Array, "T R"], places: Float[Array, "T R"], level: Float[Array, ""]
    ) -> Growth:
        """After all steps.

        Args:
          increments: of all steps, in order of time.
          places: of the increments in their stretch; 0 of those that are in none.
          level: as for `step`.
        """
        weight = jnp.where(self.weight > 0, self.weight, 1)
        rate = jnp.where(self.counted > 1, self.typical + self.slope / weight, jnp.nan)
        error = _standard_error(increments, places, rate, weight, self.counted)
        error = jnp.where(self.counted > 1, jnp.maximum(error, least_error(error.dtype)), jnp.nan)
        length = jnp.where(self.end_cut == self.length, self.length - 1, self.length)
        known = (length > 0) & (self.lags > 1) & ~jnp.isnan(self.end_gain)
        extrapolated = known & (self.end_gain >= level)
        falling = rate < 0
        further = (level - self.end_gain) / jnp.where(falling, rate, -1)
        beyond = jnp.where(falling, length + further, jnp.where(jnp.isnan(rate), jnp.nan, jnp.inf))
        uncertain = jnp.where(falling, further / jnp.where(falling, -rate, 1) * error, jnp.nan)
        return Growth(
            rate,
            error,
            jnp.where(known, jnp.where(extrapolated, beyond, 1 + self.end_within), jnp.nan),
            jnp.where(known, jnp.where(extrapolated, uncertain, 0), jnp.nan),
            extrapolated,
            jnp.where(self.end_cut > 0, self.end_cut, -1).astype(jnp.int32),
            jnp.where(known, self.end_gain, jnp.nan),
            self.weight,
        )


_Kind = TypeVar("_Kind")


def pack(rows: Sequence[Array]) -> Array:
    """In one array of two leading axes: XLA makes a loop of its own of every part of what joins more than eight."""
    groups = -(-len(rows) // 8)
    length = -(-len(rows) // groups)
    rows = [*rows, *[jnp.zeros_like(rows[0])] * (groups * length - len(rows))]
    return jnp.stack([jnp.stack(rows[i : i + length]) for i in range(0, len(rows), length)])


def unpack(packed: Array, kind: Callable[..., _Kind]) -> _Kind:
    """The named tuple that was packed."""
    rows = packed.reshape(-1, *packed.shape[2:])
    fields: Any = kind
    return kind(*rows[: len(fields._fields)])


_TAIL = 8  # of the lags the first eighth is left out: a polynomial is not yet what its leading power makes of it
_FEWEST = 8
_SCATTER = 0.05  # nats; an exponential, taken for a power of at least 1/2, leaves 0.067 of its own


def polynomial_order(lags: Array | np.ndarray, gains: Array | np.ndarray) -> Float[np.ndarray, "..."]:
    """The power of the lag by which each signal grows, where that and no exponential is what it does; else NaN.

    Its logarithm is then a line over the logarithm of the lag, within 0.05 nats, which that of an exponential and a
    random walk is not.

    Args:
      lags, gains: ``[..., T]``, as in `bptt_jax.gradient_flow`'s ``signal``; of the longest segment.
    """
    of_each = np.vectorize(_polynomial_order, otypes=[float], signature="(t),(t)->()")
    return np.asarray(of_each(np.asarray(lags, np.float64), np.asarray(gains, np.float64)))


def _polynomial_order(lags: np.ndarray, gains: np.ndarray) -> float:
    first = int(np.argmax(lags))  # there the longest segment begins
    end = first + int(np.flatnonzero(np.append(lags[first:], 1) == 1)[0]) + 1
    lags, gains = lags[first:end], gains[first:end]
    used = (lags >= np.max(lags, initial=0) / _TAIL) & (lags > 0) & np.isfinite(gains)
    if np.sum(used) < _FEWEST:
        return math.nan

    x, y = (v - v.mean() for v in (np.log(lags[used]), gains[used]))
    order = float(x @ y / (x @ x))
    scatter = np.sqrt(np.mean((y - order * x) ** 2))
    return order if order >= 0.5 and scatter <= _SCATTER else math.nan


class _Batches(NamedTuple):
    """While the increments are read in order of time, ``[R]``: of this batch how many there are, their sum and that of
    their weights, and the sum of the batch before; of all before, the sums of the squares of these, and of the
    products of neighbours; and of this segment the latest place, and the first."""

    seen: Array
    sum: Array
    share: Array
    before: Array
    squares: Array
    passed_on: Array
    shares: Array
    place: Array
    stretch: Array


def _standard_error(increments: Array, places: Array, rate: Array, weight: Array, count: Array) -> Array:
    """Of the rate, a weighted sum of increments that resemble their neighbours: from the sums over batches.

    Batches of sqrt(n) consecutive increments, and what each passes on to the next where that makes the error larger
    (as for the exponents). Squares about a mean that was itself estimated are too small by the share of the weights
    that the batches hold.
    """
    size = jnp.maximum(jnp.round(jnp.sqrt(count)), 1)

    def body(carry: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        c, (increment, place) = unpack(carry, _Batches), at
        used = place > 0
        stretch = jnp.where(used & (place >= c.place), place, c.stretch)  # within a segment places fall
        share = jnp.where(used, place * (stretch + 1 - place) / 2 / weight, 0)
        term = jnp.where(used, share * (increment - rate), 0)
        full = used & (c.seen == size)
        done = c._replace(
            seen=0 * c.seen,
            sum=0 * c.sum,
            share=0 * c.share,
            before=c.sum,
            squares=c.squares + c.sum**2,
            passed_on=c.passed_on + c.sum * c.before,
            shares=c.shares + c.share**2,
        )
        c = _Batches(*(jnp.where(full, new, old) for new, old in zip(done, c, strict=True)))
        place = jnp.where(used, place, c.place)
        c = c._replace(
            seen=c.seen + used.astype(term.dtype),
            sum=c.sum + term,
            share=c.share + share,
            place=place,
            stretch=stretch,
        )
        return pack(c), None

    start = pack(_Batches(*jnp.zeros((len(_Batches._fields), *rate.shape), rate.dtype)))
    c = unpack(devices.scan(body, start, (increments, places))[0], _Batches)
    squares, passed_on, shares = c.squares + c.sum**2, c.passed_on + c.sum * c.before, c.shares + c.share**2
    variance = squares + 2 * jnp.maximum(passed_on, 0)
    return jnp.sqrt(variance / (1 - jnp.minimum(shares, 0.75)))
