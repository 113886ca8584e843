"""Spikes, and what stands for their derivative in the backward pass.

Each function here makes a ``spike(x)``: 1 where x is above 0, else 0, with a derivative that is not that of the step.
They are for `lif` and `alif`, and may be differentiated again, forwards too: the second derivative is that of the
surrogate. Of equal numbers they make the same spike.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax.cells.sharing import shared
from bptt_jax.checks import check_positive_finite
from bptt_jax.step import Array

__all__ = ["arctan", "fast_sigmoid", "triangular"]

Spike = Callable[[Array], Array]


def fast_sigmoid(slope: float = 25.0) -> Spike:
    """Spikes with the derivative ``1 / (1 + slope |x|)^2`` (Zenke and Ganguli 2018, Neural Comput. 30: 1514).

    It is that of ``x / (1 + slope |x|)``, and falls with the square of the distance: no unit is ever quite without.

    Args:
      slope: above 0, known before compilation; Zenke and Vogels (2021, Neural Comput. 33: 899) find that learning
        hardly depends on it. The default is that of snnTorch.

    Returns:
      A function of a floating array, elementwise.

    Raises:
      TypeError, ValueError: `slope` is no finite number above 0.

    Example:
      >>> spike = bptt.cells.surrogates.fast_sigmoid(slope=1.0)
      >>> spike(0.5), jax.grad(spike)(1.0)
      (Array(1., dtype=float32, weak_type=True), Array(0.25, dtype=float32, weak_type=True))
    """
    return shared(_fast_sigmoid, _known("slope", slope))


def triangular(height: float = 0.3) -> Spike:
    """Spikes with the derivative ``height max(0, 1 - |x|)`` (Bellec et al. 2018, arXiv:1803.09574).

    Further than 1 from the threshold, in units of x, nothing passes.

    Args:
      height: above 0, known before compilation; by how much the paper damps signals in long sequences.

    Returns:
      A function of a floating array, elementwise.

    Raises:
      TypeError, ValueError: `height` is no finite number above 0.

    Example:
      >>> spike = bptt.cells.surrogates.triangular()
      >>> float(spike(-0.5)), round(float(jax.grad(spike)(-0.5)), 6)
      (0.0, 0.15)
    """
    return shared(_triangular, _known("height", height))


def arctan(alpha: float = 2.0) -> Spike:
    """Spikes with the derivative ``alpha / 2 / (1 + (pi alpha x / 2)^2)`` (Fang et al. 2021, arXiv:2007.05785).

    Args:
      alpha: twice the derivative at the threshold, above 0, known before compilation. snnTorch leaves out the factor
        in front, and has a derivative of ``1 / pi`` there.

    Returns:
      A function of a floating array, elementwise.

    Raises:
      TypeError, ValueError: `alpha` is no finite number above 0.

    Example:
      >>> spike = bptt.cells.surrogates.arctan()
      >>> float(spike(0.1)), float(jax.grad(spike)(0.0))
      (1.0, 1.0)
    """
    return shared(_arctan, _known("alpha", alpha))


def _known(name: str, value: Any) -> float:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name}: expected a number known before compilation, got a traced one")
    return float(check_positive_finite(name, value))


def _spike(derivative: Callable[[Array], Array]) -> Spike:
    @jax.custom_jvp
    def spike(x: Array) -> Array:
        return jnp.heaviside(x, 0)

    @spike.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        return spike(*primals), derivative(*primals) * tangents[0]

    return spike


def _fast_sigmoid(slope: float) -> Spike:
    return _spike(lambda x: 1 / (1 + slope * jnp.abs(x)) ** 2)


def _triangular(height: float) -> Spike:
    return _spike(lambda x: height * jnp.maximum(1 - jnp.abs(x), 0))


def _arctan(alpha: float) -> Spike:
    return _spike(lambda x: alpha / 2 / (1 + (math.pi / 2 * alpha * x) ** 2))
