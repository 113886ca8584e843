"""What the dtype of the states makes of a backward pass without log scale, as `jax.grad` is one.

Numbers of a dtype end at its largest. Below its smallest normal number they lie evenly, at distances of its smallest,
so that the fewer digits are left the smaller they are, and below half of that distance nothing is: whatever stands
there, zero too, is wrong by 100 % or more. Where the hardware takes all below the normal numbers for zero, as CPUs do
under XLA but for float16, the smallest normal number is the smallest.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bptt_jax.linalg import reductions
from bptt_jax.linalg.logscale import LogScaled, to_log
from bptt_jax.linalg.precision import wide


class FloatRange(NamedTuple):
    """What becomes of the adjoints in the dtype of their leaves; see `bptt_jax.analysis.flow_results.Numerics`."""

    in_range: Bool[Array, ""]
    overflow_lag: Int[Array, ""]
    coarse_lag: Int[Array, ""]
    lost_lag: Int[Array, ""]
    loss_scale_log2: Int[Array, ""]


def float_range(
    adjoints: LogScaled,
    params_exponent: Int[Array, ""],
    params_dtypes: Sequence[Any],
    lags: Int[Array, " T"],
    threshold: Float[Array, ""],
) -> FloatRange:
    """Judged entry by entry: by the largest of each leaf, than which no other is better off.

    Args:
      adjoints: dL/dh_1 .. dL/dh_T, leaves ``[T, ...]``, the exponent ``[T]``.
      params_exponent: of dL/dparams, normalized.
      params_dtypes: of its leaves.
      lags: of h_0 .. h_{T-1}, 0 where there is no signal; that of dL/dh_t is one less.
      threshold: share of the largest adjoint down to which a loss scale is to keep them.
    """
    leaves = jax.tree.leaves(adjoints.mantissa)
    kinds = [jnp.finfo(name) for name in dict.fromkeys(a.dtype for a in map(jnp.real, leaves))]
    tops = [[_largest(a) for a in leaves if a.real.dtype == info.dtype] for info in kinds]
    sizes = [_log(reduce(jnp.maximum, each), adjoints.exponent) for each in tops]
    sizes = jax.lax.optimization_barrier(sizes)  # else calculated once more in every row below
    dtype = max((a.dtype for a in sizes), key=lambda d: d.itemsize)

    def above(levels: Sequence[Array | float]) -> Float[Array, " T"]:
        """By how much the kind that is best off lies above its level."""
        return reduce(jnp.maximum, [a.astype(dtype) - v for a, v in zip(sizes, levels, strict=True)])

    lowest = [math.log(float(info.smallest_normal)) for info in kinds]
    smallest, coarse = [], []
    for normal, info in zip(lowest, kinds, strict=True):
        flushed = is_flushed(info, lags[0])
        smallest.append(jnp.where(flushed, normal, normal - info.nmant * math.log(2)).astype(dtype))
        # At 2^k times the smallest number k + 1 of its 1 + nmant digits are left.
        digits = jnp.where(flushed, 0, (1 + info.nmant) // 2).astype(dtype)
        coarse.append(smallest[-1] + digits * math.log(2))
    lost = [low - math.log(2) for low in smallest]
    beyond = above([math.log(float(info.max)) for info in kinds])
    arrives, lags = lags > 0, (lags - 1).astype(dtype)
    none = jnp.asarray(-1, dtype)
    # One reduction over time: each is a loop to compile.
    found = jnp.max(
        jnp.stack(
            [
                beyond,
                jnp.where(arrives, above(lowest), -jnp.inf),
                jnp.where(arrives & (beyond > 0), -lags, -jnp.inf),
                *(jnp.where(arrives & (above(levels) >= 0), lags, none) for levels in (coarse, lost)),
                jnp.where(arrives & (beyond > -jnp.inf), lags, none),
            ]
        ),
        axis=1,
    )
    top, largest, over, last = found[0], found[1], -found[2], found[5]
    # What is normalized is in range by its exponent alone.
    ends = [jnp.finfo(each).maxexp for each in params_dtypes]
    most = top if not ends else jnp.maximum(top, (params_exponent - min(ends)).astype(dtype) * math.log(2))
    needed = jnp.ceil(-(largest + jnp.log(threshold).astype(dtype)) / math.log(2))
    possible = jnp.floor(-most / math.log(2))
    known = jnp.isfinite(needed) & jnp.isfinite(possible)
    scale = jnp.where(known, jnp.minimum(jnp.maximum(needed, 0), possible), 0)
    # From the lag after the last that is above on all lie below, if there is anything.
    first = jnp.where(found[3:5] < last, found[3:5] + 1, -1)
    packed = jnp.stack([jnp.where(jnp.isfinite(over), over, -1), *first, scale]).astype(jnp.int32)
    return FloatRange(most <= 0, *packed)


def is_flushed(info: jnp.finfo, unknown: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a part of the smallest normal number, between a half and a fifth, is zero where this runs."""
    parts = 2 + unknown % 4  # of what is not known before: compilers do not calculate as the hardware does
    return jnp.asarray(info.smallest_normal, info.dtype) / parts.astype(info.dtype) == 0


def _largest(a: Array) -> Float[Array, " T"]:
    """The largest entry at every step, real and imaginary parts being entries of their own."""
    size = jnp.maximum(jnp.abs(a.real), jnp.abs(a.imag)) if jnp.iscomplexobj(a) else jnp.abs(a)
    return wide(jax.vmap(reductions.largest)(size))


def _log(size: Float[Array, " T"], exponent: Int[Array, " T"]) -> Float[Array, " T"]:
    return to_log(jnp.where(size == 0, 1, size), exponent, zero=size == 0)
