"""Means over the steps that are measured, and their standard errors, by batches of consecutive steps."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from bptt_jax.results import Result, field
from bptt_jax.step import Array, Recurrence
from bptt_jax.timeline import number_pieces

AnyArray: TypeAlias = Array | np.ndarray

_BATCHES = 20
_KNOWN_TO = 8.0  # roundings, at best: those of steps that do the same are the same, and have no scatter
MOST_BATCHES = 2 * _BATCHES - 1  # of one piece


class Batches(NamedTuple):
    """Batches of consecutive measured steps, 20 to 39 of equal length, none of which reaches over a reset.

    They are counted from the end of each piece; what is left at its beginning belongs to none. A piece that is
    shorter than a batch is one by itself.

    Attributes:
      number: ``[T]``, the batch of each step; `most` where it belongs to none.
      linked: ``[T]``, whether a batch begins with the step and the one before is of the same piece.
      ends: ``[T]``, whether a batch ends with the step, or one begins after it.
      most: how many there may be.
    """

    number: Int[AnyArray, " T"]
    linked: Bool[AnyArray, " T"]
    ends: Bool[AnyArray, " T"]
    most: int


class BatchSums(Result):
    """What batches of consecutive steps add up to.

    Attributes:
      values: ``[B, K]``, their sums of each value.
      steps: ``[B]``, how many each has; 0 where there is no batch.
      follows: ``[B]``, whether the one before is of the same piece.
    """

    values: Float[AnyArray, "B K"] = field(dims=("batches", "exponent"))
    steps: Float[AnyArray, " B"] = field(dims=("batches",))
    follows: Bool[AnyArray, " B"] = field(dims=("batches",))


def pieces(recurrence: Recurrence) -> Int[AnyArray, " T"]:
    """The piece of each real step of a checked recurrence, by the number of resets up to it; -1 in padding.

    An array of NumPy where it is known beforehand, and so is everything that follows from it.
    """
    if recurrence.is_plain:
        return np.zeros(recurrence.length, np.int32)
    return number_pieces(recurrence.real, recurrence.resets)


def measured_pieces(piece: Int[AnyArray, " T"], warmup: int | AnyArray) -> Int[AnyArray, " T"]:
    """Without the first `warmup` steps of each; -1 there."""
    return own_library(piece).where(count_within(piece)[0] > warmup, piece, -1)


def count_within(piece: Int[AnyArray, " T"]) -> tuple[Int[AnyArray, " T"], Int[AnyArray, " T"]]:
    """For each step how many of its piece there are up to it, itself included, and after it.

    Args:
      piece: ascending; -1 at steps that do not count, for which nothing is told. Of NumPy's arrays NumPy's.
    """
    xp = own_library(piece)
    running_max: Any = np.maximum.accumulate if xp is np else jax.lax.cummax
    total = xp.cumsum(piece >= 0, dtype=np.int32)
    latest = running_max(piece)
    new = latest > xp.concatenate([xp.full(1, -1, latest.dtype), latest[:-1]])
    last = xp.append(new[1:], True)
    before = running_max(xp.where(new, total - 1, 0))
    end = -running_max(xp.where(last, -total, -total[-1])[::-1])[::-1]
    return total - before, end - total


def batches(piece: Int[AnyArray, " T"], most: int) -> Batches:
    """Those of the measured steps.

    Args:
      piece: of each measured step, ascending; -1 where none is measured. Of NumPy's arrays NumPy's.
      most: how many there may be.
    """
    xp = own_library(piece)
    measured = piece >= 0
    upto, after = count_within(piece)
    length = xp.maximum(xp.sum(measured, dtype=np.int32) // _BATCHES, 1)
    whole = (upto + after) // length  # batches of the step's piece
    number = after // length
    within = measured & ((number < whole) | (whole == 0))
    begins = within & ((after % length == length - 1) | ((whole == 0) & (upto == 1)))
    index = xp.where(within, xp.cumsum(begins, dtype=np.int32) - 1, most)
    return Batches(index, begins & (number + 1 < whole), measured & (after % length == 0), most)


def sum_batches(values: Float[AnyArray, "T K"], steps: Shaped[AnyArray, " T"], of: Batches) -> BatchSums:
    """The sums of values, and of what each step counts for, over the batches. Of NumPy's arrays NumPy's."""
    given = [values, *(own_library(a).asarray(a, values.dtype)[:, None] for a in (steps, of.linked))]
    if len(set(map(own_library, given))) == 1:
        sums = _summed(own_library(values).concatenate(given, axis=1), of)
        return BatchSums(sums[:, :-2], sums[:, -2], sums[:, -1] > 0)
    # What is known of the steps beforehand is not compiled.
    sums, counts, linked = (_summed(a, of) for a in given)
    return BatchSums(sums, counts[:, 0], linked[:, 0] > 0)


def _summed(table: Float[AnyArray, "T K"], of: Batches) -> Float[AnyArray, "B K"]:
    if own_library(table) is np:
        sums = np.zeros((of.most + 1, table.shape[1]), table.dtype)
        np.add.at(sums, of.number, table)
        return sums[:-1]
    return jax.ops.segment_sum(table, jnp.asarray(of.number), of.most + 1)[:-1]


def squared_error(of: BatchSums) -> Float[Array, " K"]:
    """The square of the standard error of ``sum(values) / sum(steps)``, by the scatter of the batches.

    A ratio of two sums, whose batches may have different lengths; of equal ones it is the variance of their means
    over their number. Batches without steps do not count; NaN from fewer than two. Of NumPy's arrays NumPy's.
    """
    xp = own_library(of.values)
    total = xp.sum(of.steps)
    total = xp.where(total == 0, 1, total)
    count = xp.sum(of.steps > 0, dtype=total.dtype)
    around = of.values - (xp.sum(of.values, axis=0) / total)[None] * of.steps[:, None]
    # What a batch passes on to the next: at first order, and only where it makes the error larger.
    passed_on = xp.sum(xp.where(of.follows[1:, None], around[1:] * around[:-1], 0), axis=0)
    square = (xp.sum(xp.square(around), axis=0) + 2 * xp.maximum(passed_on, 0)) / xp.square(total)
    return xp.where(count < 2, xp.nan, square * count / xp.where(count < 2, 1, count - 1))


def least_error(dtype: Any) -> float:
    """Of a mean rate: that of a step is not known better."""
    return _KNOWN_TO * float(jnp.finfo(dtype).eps)


def root(square: Array) -> Array:
    """Square root, with the derivative 0 at 0."""
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def own_library(array: AnyArray) -> Any:
    """NumPy for its own arrays, which are known beforehand, so that nothing of them is compiled; else JAX's."""
    return np if isinstance(array, np.ndarray) else jnp
