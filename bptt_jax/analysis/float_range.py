"""What the dtype of the states makes of a backward pass without log scale, as `jax.grad` is one.

Numbers of a dtype end at its largest. Below its smallest normal number they lie evenly, at distances of its smallest,
so that the fewer digits are left the smaller they are, and below half of that distance nothing is: whatever stands
there, zero too, is wrong by 100 % or more. Where the hardware takes all below the normal numbers for zero, as CPUs do
under XLA but for float16, the smallest normal number is the smallest.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bptt_jax.linalg import logscale, reductions
from bptt_jax.linalg.logscale import LogScaled
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
    sizes = [_log2(reduce(jnp.maximum, each), adjoints.exponent) for each in tops]
    dtype = max((a.dtype for a in sizes), key=lambda d: d.itemsize)
    # Rows that are alike, for each of a kind of its own is dear to compile, as is each reduction over time. By how much
    # the kind that is best off lies above its level: the most of all, and of what arrives. Then lags of what arrives:
    # the first, turned round, that is not below the end, the last ones that are not below two levels, and not zero.
    levels = [_levels(info, lags[0]).astype(dtype)[:, None] for info in kinds]
    above = reduce(jnp.maximum, [a.astype(dtype)[None] - v for a, v in zip(sizes, levels, strict=True)])
    arrives, lags = lags[None] > 0, (lags[None] - 1).astype(dtype)
    row = np.arange(6)[:, None]
    just_below = np.where(row < 5, -float(jnp.finfo(dtype).tiny), -np.inf).astype(dtype)
    there = jnp.where(row < 2, arrives | (row == 0), arrives & (above > just_below))
    values = jnp.where(row < 2, above, np.where(row == 2, -1, 1).astype(dtype) * lags)
    rows = jnp.where(there, values, np.where(row < 3, -np.inf, -1).astype(dtype))
    found = jax.vmap(reductions.most)(rows)
    top, largest, over, last = found[0], found[1], -found[2], found[5]
    # What is normalized is in range by its exponent alone.
    ends = [jnp.finfo(each).maxexp for each in params_dtypes]
    most = top if not ends else jnp.maximum(top, (params_exponent - 1 - min(ends)).astype(dtype))
    whole = jnp.floor(largest)
    needed = jnp.ceil(-(whole + jnp.log2((1 + largest - whole) * threshold.astype(dtype))))
    possible = jnp.ceil(-most) - 1
    known = jnp.isfinite(needed) & jnp.isfinite(possible)
    scale = jnp.where(known, jnp.minimum(jnp.maximum(needed, 0), possible), 0)
    # From the lag after the last that is above on all lie below, if there is anything.
    first = jnp.where(found[3:5] < last, found[3:5] + 1, -1)
    packed = jnp.stack([jnp.where(jnp.isfinite(over), over, -1), *first, scale]).astype(jnp.int32)
    return FloatRange(most < 0, *packed)


def _levels(info: jnp.finfo, unknown: Int[Array, ""]) -> Float[Array, " 6"]:
    """Logarithms to the base 2: of the end above, of the smallest normal number, of the end, of where half the digits
    are lost, of where all are, of the end."""
    end, normal = int(info.maxexp), int(info.minexp)
    # At 2^k times the smallest number k + 1 of its 1 + nmant digits are left.
    flushed, kept = (
        np.asarray([end, normal, end, smallest + digits, smallest - 1, end])
        for smallest, digits in ((normal, 0), (normal - info.nmant, (1 + info.nmant) // 2))
    )
    return jnp.where(is_flushed(info, unknown), flushed, kept)


def is_flushed(info: jnp.finfo, unknown: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a part of the smallest normal number, between a half and a fifth, is zero where this runs."""
    parts = 2 + unknown % 4  # of what is not known before: compilers do not calculate as the hardware does
    return jnp.asarray(info.smallest_normal, info.dtype) / parts.astype(info.dtype) == 0


def _largest(a: Array) -> Float[Array, " T"]:
    """The largest entry at every step, real and imaginary parts being entries of their own."""
    size = jnp.maximum(jnp.abs(a.real), jnp.abs(a.imag)) if jnp.iscomplexobj(a) else jnp.abs(a)
    return wide(jax.vmap(reductions.largest)(size))


def _log2(size: Float[Array, " T"], exponent: Int[Array, " T"]) -> Float[Array, " T"]:
    """``log2(size * 2^exponent)``, linear from each power of two to the next: all that is compared with it are such."""
    own = logscale.exponent_of(size)
    linear = (logscale.plain(exponent) + own).astype(size.dtype) + 2 * logscale.shift(size, -own) - 2
    # NaN is out of range as well, and a maximum may pass over it.
    return jnp.where(size == 0, -jnp.inf, jnp.where(jnp.isfinite(size), linear, jnp.inf))
