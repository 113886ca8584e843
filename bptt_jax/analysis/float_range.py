"""What the dtype of the states makes of a backward pass without log scale, as `jax.grad` is one.

Numbers of a dtype end at its largest. Below its smallest normal number they lie evenly, at distances of its smallest,
so that the fewer digits are left the smaller they are, and below half of that distance nothing is: whatever stands
there, zero too, is wrong by 100 % or more. Where the hardware takes all below the normal numbers for zero, as CPUs do
under XLA but for float16, the smallest normal number is the smallest.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from bptt_jax.linalg.logscale import LogScaled, to_log


class FloatRange(NamedTuple):
    """What becomes of the adjoints in the dtype of their leaves; see `bptt_jax.analysis.flow.Numerics`."""

    in_range: Bool[Array, ""]
    overflow_lag: Int[Array, ""]
    coarse_lag: Int[Array, ""]
    lost_lag: Int[Array, ""]
    loss_scale_log2: Int[Array, ""]


def float_range(
    adjoints: LogScaled,
    immediate: PyTree,
    params_grad: LogScaled,
    lags: Int[Array, " T"],
    threshold: Float[Array, ""],
) -> FloatRange:
    """Judged entry by entry: by the largest of each leaf, than which no other is better off.

    Args:
      adjoints: dL/dh_1 .. dL/dh_T, leaves ``[T, ...]``, the exponent ``[T]``.
      immediate: dl/dh_1 .. dl/dh_T.
      params_grad: dL/dparams.
      lags: of h_0 .. h_{T-1}, 0 where there is no signal; that of dL/dh_t is one less.
      threshold: share of the largest adjoint down to which a loss scale is to keep them.
    """
    sizes = [_largest(a, adjoints.exponent) for a in jax.tree.leaves(adjoints.mantissa)]
    kinds = [jnp.finfo(a.dtype) for a in jax.tree.leaves(adjoints.mantissa)]
    dtype = max((a.dtype for a in sizes), key=lambda d: d.itemsize)

    def above(levels: Sequence[Array | float]) -> Float[Array, " T"]:
        """By how much the leaf that is best off lies above its level."""
        return jnp.max(jnp.stack([a.astype(dtype) - v for a, v in zip(sizes, levels, strict=True)]), axis=0)

    lowest = [math.log(float(info.smallest_normal)) for info in kinds]
    smallest, coarse = [], []
    for normal, info in zip(lowest, kinds, strict=True):
        flushed = _is_flushed(info, lags[0])
        smallest.append(jnp.where(flushed, normal, normal - info.nmant * math.log(2)).astype(dtype))
        # At 2^k times the smallest number k + 1 of its 1 + nmant digits are left.
        digits = jnp.where(flushed, 0, (1 + info.nmant) // 2).astype(dtype)
        coarse.append(smallest[-1] + digits * math.log(2))
    highest = [math.log(float(info.max)) for info in kinds]
    beyond = above(highest)
    others = [*_beyond(immediate), *_beyond(params_grad.mantissa, params_grad.exponent)]
    most = jnp.max(jnp.stack([jnp.max(beyond), *(a.astype(dtype) for a in others)]))
    arrives = lags > 0
    lags = lags - 1
    largest = jnp.max(jnp.where(arrives, above(lowest), -jnp.inf))
    needed = jnp.ceil(-(largest + jnp.log(threshold).astype(dtype)) / math.log(2))
    possible = jnp.floor(-most / math.log(2))
    scale = jnp.where(
        jnp.isfinite(needed) & jnp.isfinite(possible), jnp.minimum(jnp.maximum(needed, 0), possible), 0
    )
    over = arrives & (beyond > 0)
    return FloatRange(
        most <= 0,
        jnp.where(jnp.any(over), jnp.min(jnp.where(over, lags, len(lags))), -1).astype(jnp.int32),
        _from_lag(above(coarse), lags, arrives),
        _from_lag(above(smallest) + math.log(2), lags, arrives),
        scale.astype(jnp.int32),
    )


def _is_flushed(info: jnp.finfo, lag: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a part of the smallest normal number, between a half and a fifth, is zero where this runs."""
    parts = 2 + lag % 4  # of what is not known before: compilers do not calculate as the hardware does
    return jnp.asarray(info.smallest_normal, info.dtype) / parts.astype(info.dtype) == 0


def _from_lag(above: Float[Array, " T"], lags: Int[Array, " T"], arrives: Bool[Array, " T"]) -> Int[Array, ""]:
    """The lag from which on all that is not zero lies below; -1 if there is none."""
    first = 1 + jnp.max(jnp.where(arrives & (above >= 0), lags, -1))
    below = (lags >= first) & (above < 0) & (above > -jnp.inf)
    return jnp.where(jnp.any(below), first, -1).astype(jnp.int32)


def _largest(a: Array, exponent: Int[Array, " T"]) -> Float[Array, " T"]:
    """Logarithm of the largest entry at every step, real and imaginary parts being entries of their own."""
    size = jnp.maximum(jnp.abs(a.real), jnp.abs(a.imag)) if jnp.iscomplexobj(a) else jnp.abs(a)
    top = jnp.max(size.reshape(len(a), -1), axis=1, initial=0)
    top = top.astype(max(jnp.dtype(jnp.float32), top.dtype, key=lambda d: d.itemsize))
    return to_log(jnp.where(top == 0, 1, top), exponent, zero=top == 0)


def _beyond(tree: PyTree, exponent: Int[Array, ""] | int = 0) -> list[Array]:
    """Of every leaf, by how much the logarithm of its largest entry lies above the end of its dtype."""
    exponents = jnp.asarray(exponent, jnp.int32)[None]
    return [
        _largest(a[None], exponents)[0] - math.log(float(jnp.finfo(a.dtype).max)) for a in jax.tree.leaves(tree)
    ]
