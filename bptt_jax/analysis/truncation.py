"""What truncated backpropagation through time loses."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax import devices
from bptt_jax.analysis.backward import backward
from bptt_jax.analysis.lags import check_longest, inner, over_lags, relative_error
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.linalg import logscale
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.results import Result, counted, field
from bptt_jax.step import Array, Loss, Params, PyTree, Recurrence, State, Step, bind


class TruncationBias(Result):
    """How far the truncated gradient is from the full one, for every window.

    Attributes:
      windows: ``[K]``: 1 .. K steps.
      cosine: ``[K]``, of the angle between the two; NaN where one is zero, or the full one is lost beside the largest
        adjoint (`ScaledGradients`).
      relative_error: ``[K]``, ``||truncated - full|| / ||full||``; NaN where the full one is zero, or lost likewise.
    """

    windows: Int[Array, " K"] = field(dims=("windows",))
    cosine: Float[Array, " K"] = field(dims=("windows",))
    relative_error: Float[Array, " K"] = field(dims=("windows",))

    def _headline(self) -> str:
        longest = int(self.windows[-1])
        if np.isnan(self.relative_error).all():
            return "there is no gradient to truncate, it underflows, or it is not finite"
        off = np.flatnonzero(~(np.asarray(self.relative_error) <= 0.1))
        enough = 1 + off[-1] if off.size else 0  # the first window from which on all are good
        if enough == longest:
            return f"no window of up to {counted(longest, 'step')} comes within 10 % of the full gradient for good"
        return f"from a window of {counted(int(self.windows[enough]), 'step')} on within 10 % of the full gradient"


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
    return _truncation_bias(recurrence, bound, longest=check_longest(longest, recurrence.length))


@devices.compiled
def _truncation_bias(recurrence: Recurrence, loss: BoundLoss, *, longest: int) -> TruncationBias:
    done = backward(recurrence, loss)
    whole = done.params_grad.normalized().widened()

    def visit(total: LogScaled, part: LogScaled) -> tuple[LogScaled, tuple[Array, Array]]:
        total = total + part.widened()
        # Only the angle matters, and the mantissas are of a size whose square every float holds.
        truncated = total.normalized()
        squares = inner(truncated, truncated).mantissa * inner(whole, whole).mantissa
        none = squares == 0
        cosine = jnp.where(none, jnp.nan, inner(truncated, whole).mantissa / jnp.sqrt(jnp.where(none, 1, squares)))
        return total, (cosine, relative_error(total, whole))

    _, (cosine, error) = over_lags(done.along, done.loss.states, visit, logscale.nothing(whole.mantissa), longest)
    return TruncationBias(1 + jnp.arange(longest), cosine, error)
