"""Real-time recurrent learning: the influence of the parameters on the state, carried forward in time."""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from bptt_jax import devices
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.linalg.precision import matmul
from bptt_jax.recurrence.linearization import differentiation_mode
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.step import (
    Array,
    Instant,
    Loss,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    choose,
    differentiable_part,
    ravel_state,
)


def rtrl(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    key: PRNGKeyArray | None = None,
    args: PyTree = None,
    length: int | None = None,
) -> Params:
    """The full gradient, forward in time: real-time recurrent learning (Williams, Zipser 1989).

    Carries the sensitivities ``S_t = dh_t/dparams = J_t S_{t-1} + (immediate)`` and adds ``(dl/dh_t)^T S_t``:
    exact, no backward pass through time, memory O(D * P) however long the sequence, time O(D^2 * P) a step. The
    sensitivities hold in padding and are zero after a reset. States that the loss does not read do no harm, be they
    not finite.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`.
      key: not looked at; there is nothing random.

    Returns:
      dL/dparams, equal to `adjoints`' ``params_grad``; None at parameters that are not floating.

    Raises:
      TypeError, ValueError: an argument breaks the contract.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> float(bptt.estimators.rtrl(step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]))
      2.75
    """
    return _rtrl(bind(step, params, state0, xs, length), bind_loss(loss, args))


@devices.compiled
def _rtrl(recurrence: Recurrence, loss: BoundLoss) -> Params:
    given, recurrence = recurrence.params, check_step(recurrence)
    mode = differentiation_mode(recurrence)
    moving, merge = differentiable_part(recurrence.params)
    theta, unravel_params = ravel_state(moving)
    size, dtype = recurrence.size, ravel_state(recurrence.state0)[0].dtype
    axes = devices.axes_of(recurrence.state0)
    cotangents = loss.differentiate(states_of(recurrence)).states
    # The cotangent of x + iy is dL/dx - i dL/dy, while Jacobians act on (x, y).
    immediate = jax.vmap(lambda d: ravel_state(jax.tree.map(jnp.conj, d))[0])(cotangents)

    def body(
        carry: tuple[State, Array, Array], at_t: tuple[Instant, Array]
    ) -> tuple[tuple[State, Array, Array], None]:
        h, sensitivities, total = carry
        at, immediate_t = at_t
        vector, unravel = ravel_state(recurrence.begin(h, at))

        def moved(theta: Array, vector: Array) -> tuple[Array, State]:
            new = recurrence.step(merge(unravel_params(theta)), unravel(vector), at.x)
            return ravel_state(new)[0], new

        start = sensitivities if at.reset is None else jnp.where(at.reset, 0, sensitivities)
        if mode == "forward":
            _, push, new = jax.linearize(moved, theta, vector, has_aux=True)
            directions = devices.vary(jnp.eye(theta.size, dtype=theta.dtype), axes)
            pushed = jax.vmap(push, in_axes=(0, 1), out_axes=1)(directions, start)
        else:
            _, pull, new = jax.vjp(moved, theta, vector, has_aux=True)
            by_params, by_state = jax.vmap(pull)(devices.vary(jnp.eye(size, dtype=dtype), axes))
            pushed = by_params.astype(dtype) + matmul(by_state, start)
        after = new, pushed
        if at.real is not None:
            after = choose(at.real, after, (h, sensitivities))
        # What is not read may be infinite, and zero times that is NaN.
        read = jnp.where(immediate_t[:, None] == 0, 0, after[1])
        return (*after, total + matmul(immediate_t, read).astype(theta.dtype)), None

    nothing = devices.vary(jnp.zeros((size, theta.size), dtype), axes)
    start = recurrence.state0, nothing, jnp.zeros_like(theta)
    (_, _, total), _ = devices.scan(body, start, (recurrence.instants, immediate), length=recurrence.length)
    return devices.summed_like(jax.tree.map(jnp.conj, unravel_params(total)), differentiable_part(given)[0])
