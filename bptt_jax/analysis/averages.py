"""Means over the steps that are measured, and their standard errors, by batches of consecutive steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from bptt_jax.step import Array

_BATCHES = 20
MOST_BATCHES = 2 * _BATCHES - 1  # of one episode


class Batches(NamedTuple):
    """Batches of consecutive measured steps, 20 to 39 of equal length, none of which reaches over a reset.

    They are counted from the end of each episode; what is left at its beginning belongs to none. An episode that is
    shorter than a batch is one by itself.

    Attributes:
      number: ``[T]``, the batch of each step; B where it belongs to none.
      follows: ``[B]``, whether the batch before it is of the same episode.
      ends: ``[T]``, whether a batch ends with the step, or one begins after it.
    """

    number: Int[Array, " T"]
    follows: Bool[Array, " B"]
    ends: Bool[Array, " T"]


def number_episodes(real: Bool[Array, " T"], resets: Bool[Array, " T"]) -> Int[Array, " T"]:
    """The number of resets up to each real step; -1 in padding. Resets are at real steps only."""
    return jnp.where(real, _counted(resets), -1)


def count_within(episode: Int[Array, " T"]) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
    """For each step how many of its episode there are up to it, itself included, and after it.

    Args:
      episode: ascending; -1 at steps that do not count, for which nothing is told.
    """
    measured = episode >= 0
    total = _counted(measured)
    latest = jax.lax.cummax(episode)
    new = latest > jnp.concatenate([jnp.full(1, -1, latest.dtype), latest[:-1]])
    last = jnp.append(new[1:], True)
    before = jax.lax.cummax(jnp.where(new, total - 1, 0))
    end = jax.lax.cummin(jnp.where(last, total, total[-1]), reverse=True)
    return total - before, end - total


def batches(episode: Int[Array, " T"], most: int) -> Batches:
    """Those of the measured steps.

    Args:
      episode: of each measured step, ascending; -1 where none is measured.
      most: B, how many there may be.
    """
    measured = episode >= 0
    upto, after = count_within(episode)
    length = jnp.maximum(_counted(measured)[-1] // _BATCHES, 1)
    whole = (upto + after) // length  # batches of the step's episode
    number = after // length
    within = measured & ((number < whole) | (whole == 0))
    begins = within & ((after % length == length - 1) | ((whole == 0) & (upto == 1)))
    index = jnp.where(within, _counted(begins) - 1, most)
    linked = begins & (number + 1 < whole)
    follows = jnp.zeros(most, bool).at[jnp.where(begins, index, most)].set(linked, mode="drop")
    return Batches(index, follows, measured & (after % length == 0))


def batch_sums(values: Float[Array, "T K"], of: Batches) -> Float[Array, "B K"]:
    """The sum of the values over the steps of each batch."""
    most = len(of.follows)
    return jax.ops.segment_sum(values, of.number, most + 1, indices_are_sorted=False)[:most]


def squared_error(sums: Float[Array, "B K"], steps: Float[Array, " B"], follows: Bool[Array, " B"]) -> Array:
    """``[K]``, the square of the standard error of ``sum(sums) / sum(steps)``, by the scatter of the batches.

    A ratio of two sums, whose batches may have different lengths; of equal ones it is the variance of their means
    over their number. Batches without steps do not count; NaN from fewer than two.
    """
    total = jnp.sum(steps)
    count = jnp.sum(steps > 0, dtype=steps.dtype)
    mean = jnp.sum(sums, axis=0) / jnp.where(total == 0, 1, total)
    around = sums - mean[None] * steps[:, None]
    # What a batch passes on to the next: at first order, and only where it makes the error larger.
    shared = jnp.where(follows[1:, None], around[1:] * around[:-1], 0)
    passed_on = jnp.maximum(jnp.sum(shared, axis=0), 0)
    square = (jnp.sum(jnp.square(around), axis=0) + 2 * passed_on) / jnp.square(jnp.where(total == 0, 1, total))
    few = count < 2
    return jnp.where(few, jnp.nan, square * count / jnp.where(few, 1, count - 1))


def root(square: Array) -> Array:
    """Square root, with the derivative 0 at 0."""
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _counted(flags: Bool[Array, " T"]) -> Int[Array, " T"]:
    return jnp.cumsum(flags, dtype=jnp.int32)
