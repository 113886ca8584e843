"""What truncated backpropagation through time loses."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax import devices
from bptt_jax.analysis.backward import backward
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import check_positive_int
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.recurrence.linearization import cut
from bptt_jax.results import Result, field
from bptt_jax.step import Array, Loss, Params, PyTree, Recurrence, State, Step, bind
from bptt_jax.timeline import moved_to_real_steps, real_steps_first


class TruncationBias(Result):
    """How far the truncated gradient is from the full one, for every window.

    Attributes:
      windows: ``[K]``: 1 .. K steps.
      cosine: ``[K]``, of the angle between the two; NaN where one is zero.
      relative_error: ``[K]``, ``||truncated - full|| / ||full||``; NaN where the full one is zero.
    """

    windows: Int[Array, " K"] = field(dims=("windows",))
    cosine: Float[Array, " K"] = field(dims=("windows",))
    relative_error: Float[Array, " K"] = field(dims=("windows",))

    def _headline(self) -> str:
        longest = int(self.windows[-1])
        off = np.flatnonzero(~(np.asarray(self.relative_error) <= 0.1))
        enough = 1 + off[-1] if off.size else 0  # the first window from which on all are good
        if enough == longest:
            return f"no window of up to {longest} steps comes within 10 % of the full gradient for good"
        return f"from a window of {int(self.windows[enough])} steps on within 10 % of the full gradient"


def truncation_bias(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    longest: int | None = None,
    args: PyTree = None,
    length: int | None = None,
) -> TruncationBias:
    """The bias of truncating every loss's error signal after K steps, for all K at once.

    Entry K - 1 compares ``estimators.tbptt(k1=1, k2=K)`` with the full gradient. All windows come from one pass over
    K: the error signals of all losses are carried back together, one step each, and what they add to the gradient
    is summed.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`.
      longest: the largest window in real steps, T by default.

    Returns:
      `TruncationBias`. Cost O(T * longest) Jacobian products, memory O(T * D).

    Raises:
      TypeError, ValueError: an argument breaks the contract, or the step has no backward pass.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> problem = step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]
      >>> bptt.truncation_bias(*problem).relative_error
      Array([0.364, 0.091, 0.   , 0.   ], dtype=float32)
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args)
    steps = recurrence.length
    longest = steps if longest is None else min(check_positive_int("longest", longest), steps)
    return _truncation_bias(recurrence, bound, longest=longest)


@devices.compiled
def _truncation_bias(recurrence: Recurrence, loss: BoundLoss, *, longest: int) -> TruncationBias:
    done = backward(recurrence, loss)
    along, immediate, full = done.along, done.loss.states, done.params_grad.value
    residuals, real = along.residuals, along.recurrence.instants.real
    if real is not None:
        immediate = moved_to_real_steps(immediate, real)
        order = real_steps_first(real)
        residuals, immediate = jax.tree.map(lambda a: a[order], (residuals, immediate))

    def inner(a: LogScaled, b: LogScaled) -> Array:
        # Only the angle matters, and the mantissas are of a size whose square every float holds; in half precision
        # the sum may be none.
        dtype = a.log_norm.dtype
        pairs = zip(jax.tree.leaves(a.mantissa), jax.tree.leaves(b.mantissa), strict=True)
        return sum((jnp.sum(jnp.real(u.conj() * v), dtype=dtype) for u, v in pairs), jnp.zeros((), dtype))

    def earlier(a: Array) -> Array:
        return jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])

    def body(carry: tuple[State, Params], _: None) -> tuple[tuple[State, Params], tuple[Array, Array]]:
        # signals[t] is what arrives at h_{t+1} of the loss that lies `lag` steps later.
        signals, total = carry
        total = jax.tree.map(jnp.add, total, along.pull_params(residuals, signals))
        truncated, whole = LogScaled.of(total), LogScaled.of(full)
        missing = LogScaled.of(jax.tree.map(jnp.subtract, total, full)).log_norm
        squares = inner(truncated, truncated) * inner(whole, whole)
        nothing, none = whole.log_norm == -jnp.inf, squares == 0
        error = jnp.where(nothing, jnp.nan, missing - jnp.where(nothing, 0, whole.log_norm))
        cosine = jnp.where(none, jnp.nan, inner(truncated, whole) / jnp.sqrt(jnp.where(none, 1, squares)))
        pulled = jax.vmap(lambda r, signal: cut(r, along.pull(r, signal)))(residuals, signals)
        return (jax.tree.map(earlier, pulled), total), (cosine, jnp.exp(error))

    start = immediate, jax.tree.map(jnp.zeros_like, full)
    _, (cosine, error) = devices.scan(body, start, None, length=longest)
    return TruncationBias(1 + jnp.arange(longest), cosine, error)
