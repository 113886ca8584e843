"""Influence balancing: not a data set but a dynamical system, on which truncated gradients point the wrong way."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bptt_jax.checks import check_finite, check_positive_int
from bptt_jax.step import Array, Loss, Step


class InfluenceBalancing(NamedTuple):
    """A linear system with one parameter, theta.

    Attributes:
      step, params, state0: as for `bptt_jax.unroll`, without inputs; `params` is theta, a scalar, `state0` ``[n]``
        the fixed point at that theta.
      loss: ``loss(states [T, n]) -> (s_0 - 1)^2 / 2`` at the last step.
      gradient: ds_0/dtheta at the fixed point, exactly.
      optimum: the theta at which the loss is 0.
      baseline: the loss where theta is 0, namely 1/2.
    """

    step: Step
    params: Array
    state0: Array
    loss: Loss
    gradient: float
    optimum: float
    baseline: float = 0.5

    def solved(self, theta: Array | float) -> Array:
        """Whether theta is within 1 % of the optimum. (The paper shows convergence and gives no threshold.)"""
        return jnp.abs(jnp.asarray(theta) - self.optimum) < 0.01 * abs(self.optimum)


def influence_balancing(theta: Array | float = 0.0, *, size: int = 23, positive: int = 10) -> InfluenceBalancing:
    """Short-term influences of one sign, outweighed by longer ones of the other.

    Tallec and Ollivier 2017 (arXiv:1705.08209): ``s' = A s + theta (1, .., 1, -1, .., -1)`` with `positive` ones,
    A 1/2 on the diagonal and on the superdiagonal. At the fixed point s_0 = 2 (2 positive - n) theta: in the
    published setting, n = 23 with 10 ones, ds_0/dtheta = -6 and theta* = -1/6. Backpropagation truncated to 40
    steps or fewer sees the opposite sign.

    Args:
      theta: where to begin, a scalar.
      size: n.
      positive: how many ones; at most n, and not half of it, for there theta has no influence.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    size, positive = check_positive_int("size", size), check_positive_int("positive", positive)
    if positive > size or 2 * positive == size:
        raise ValueError(f"positive: expected at most size = {size} and not half of it, got {positive}")
    params = jnp.asarray(check_finite("theta", theta), float)
    first = np.arange(size) < positive

    # (I - A) s = theta sign, solved from the last row upwards: s_i = s_{i+1} + 2 theta sign_i.
    state0 = params * np.cumsum(np.where(first, 2.0, -2.0)[::-1])[::-1].astype(params.dtype)
    gradient = 2.0 * (2 * positive - size)
    return InfluenceBalancing(_step(size, positive), params, state0, _loss, gradient, 1 / gradient)


@functools.cache
def _step(size: int, positive: int) -> Step:
    """One function for each system, so that what is compiled for it is found again at any theta."""
    first = np.arange(size) < positive

    def step(theta: Array, s: Array, x: None) -> Array:
        shifted = jnp.append(s[1:], jnp.zeros((), s.dtype))
        return (s + shifted) / 2 + jnp.where(first, theta, -theta)

    return step


def _loss(states: Array) -> Array:
    return jnp.square(states[-1, 0] - 1) / 2
