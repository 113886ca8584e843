"""The error signal dL/dh_t at every step, and what each step adds to the gradient of the parameters."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.linalg import logscale
from bptt_jax.recurrence.linearization import Linearization, linearize
from bptt_jax.step import Array, Loss, Params, PyTree, State, Step, check_arguments, check_loss, check_step


class Adjoints(NamedTuple):
    """The backward pass, laid open.

    Attributes:
      loss: L, a scalar.
      states: h_1 .. h_T, leaves ``[T, ...]``.
      adjoints: the total derivatives dL/dh_1 .. dL/dh_T, like `states`. Where one leaves the range of its dtype
        it is 0 or inf, as in `jax.grad`; `log_norms` is not.
      log_norms: ``[T]``, natural log of the Euclidean norm of each adjoint; -inf where it is exactly zero.
      params_grad: dL/dparams, equal to `jax.grad`'s; None at parameters that are not floating.
      state0_grad: dL/dh_0.
    """

    loss: Array
    states: State
    adjoints: State
    log_norms: Array
    params_grad: Params
    state0_grad: State


class TemporalContributions(NamedTuple):
    """Where in time the gradient of the parameters comes from: ``dL/dparams = sum_t g_t``.

    Attributes:
      log_norms: ``[T]``, natural log of ``||g_t||``, for t = 1 .. T; it holds where float32 underflows.
      shares: ``[T]``, signed: ``<g_t, g> / <g, g>`` with g the whole gradient. They sum to 1; NaN if g is zero.
    """

    log_norms: Array
    shares: Array


def adjoints(
    step: Step, params: Params, state0: State, xs: PyTree, loss: Loss, *, length: int | None = None
) -> Adjoints:
    """dL/dh_t for all t and dL/dparams, in one reverse scan.

    ``lambda_t = J_{t+1}^T lambda_{t+1} + dl/dh_t``, with ``dl/dh_t`` the immediate derivative of the loss: the
    total derivatives, in the convention of `jax.grad` for complex states too. The recursion carries a mantissa
    and a power of two, so it neither underflows nor overflows at any length. The differentials of all steps are
    kept from the forward pass, the parameters' gradient is one contraction after the scan. Products of matrices are
    in the precision that JAX is set to, as in `jax.grad`.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      loss: ``loss(states) -> scalar`` of the whole trajectory. What it closes over counts as constant.

    Returns:
      `Adjoints`. To see a batch as one loss, write the batch into the step (``jax.vmap(step, (None, 0, 0))``);
      for every sequence its own, ``jax.vmap`` this function.

    Raises:
      TypeError, ValueError: an argument breaks the contract, or the loss returns no real scalar.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> found = bptt.adjoints(step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0])
      >>> found.adjoints.ravel()  # dL/dh_1 .. dL/dh_4
      Array([0.125, 0.25 , 0.5  , 1.   ], dtype=float32)
      >>> float(found.params_grad)  # of w^3 + w^2 + w + 1
      2.75
    """
    steps = check_arguments(step, params, state0, xs, length, loss)
    return _adjoints(step, params, state0, xs, loss, steps)


def temporal_contributions(
    step: Step, params: Params, state0: State, xs: PyTree, loss: Loss, *, length: int | None = None
) -> TemporalContributions:
    """Each step's contribution ``g_t = (dh_t/dparams)^T dL/dh_t`` to the gradient of the parameters.

    These are the summands of backpropagation through time ordered by where the parameters act (Pascanu et al.
    2013, arXiv:1211.5063, eq. 4, sums over losses). Costs one gradient of the parameters' size per step.

    Args, Raises: as for `adjoints`.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> last = lambda states: states[-1, 0]
      >>> bptt.temporal_contributions(step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), last).shares
      Array([0.   , 0.091, 0.273, 0.636], dtype=float32)
    """
    steps = check_arguments(step, params, state0, xs, length, loss)
    return _temporal_contributions(step, params, state0, xs, loss, steps)


class Backward(NamedTuple):
    """All that the backward pass knows, in log scale: ``dL/dh_t = mantissas[t] * 2^exponents[t]``."""

    linearization: Linearization
    loss: Array
    immediate: State
    mantissas: State
    exponents: Array
    state0_grad: State

    @property
    def adjoints(self) -> State:
        return jax.vmap(logscale.shift)(self.mantissas, self.exponents)

    @property
    def log_norms(self) -> Array:
        return jax.vmap(logscale.log_norm)(self.mantissas, self.exponents)

    @property
    def scaled_params_grad(self) -> tuple[Params, Array]:
        """dL/dparams as ``(mantissa, exponent)``: the adjoints are scaled by the largest of them, not to 1."""
        largest = jnp.max(self.exponents)
        cotangents = jax.vmap(logscale.shift)(self.mantissas, self.exponents - largest)
        gradient = self.linearization.transpose_params(self.linearization.residuals, cotangents)
        return logscale.normalize(gradient, largest)


def backward(step: Step, params: Params, state0: State, xs: PyTree, loss: Loss, steps: int) -> Backward:
    """The reverse scan."""
    state0 = check_step(step, params, state0, xs)
    along = linearize(step, params, state0, xs, steps)
    check_loss(loss, along.states)
    value, immediate = jax.value_and_grad(loss)(along.states)
    # Of a loss that is linear in the states this is a constant, T * D zeros mostly, which the compiler would spend
    # half a minute on to evaluate ahead of time.
    immediate = jax.lax.optimization_barrier(immediate)

    def body(carry: tuple[State, Array], at_t: PyTree) -> tuple[tuple[State, Array], tuple[State, Array]]:
        immediate_t, residuals = at_t
        mantissa, e = logscale.add(*carry, immediate_t)
        return (along.transpose_state(residuals, mantissa), e), (mantissa, e)

    nothing = jax.tree.map(jnp.zeros_like, state0), jnp.int32(logscale.ZERO_EXPONENT)
    (mantissa0, e0), (mantissas, exponents) = jax.lax.scan(
        body, nothing, (immediate, along.residuals), reverse=True
    )
    return Backward(along, value, immediate, mantissas, exponents, logscale.shift(mantissa0, e0))


def contributions(done: Backward, scaled_params_grad: tuple[Params, Array]) -> TemporalContributions:
    """What the steps contribute, after the backward pass."""
    along = done.linearization
    whole, e_whole = scaled_params_grad

    def at_t(inputs: tuple[PyTree, State, Array]) -> tuple[Array, Array]:
        residuals, mantissa, e = inputs
        one = jax.tree.map(lambda a: a[None], (residuals, mantissa))
        log_norm = logscale.log_norm(along.transpose_params(*one), e)
        # <J_params^T lambda, g> = <lambda, J_params g>: no second gradient of the parameters' size.
        # (A cotangent is the conjugate of the direction that it stands for.)
        pushed = along.push_params(residuals, jax.tree.map(jnp.conj, whole))
        products = [
            jnp.sum(jnp.real(a * b), dtype=log_norm.dtype)
            for a, b in zip(jax.tree.leaves(mantissa), jax.tree.leaves(pushed), strict=True)
        ]
        return log_norm, logscale.shift(sum(products), e - e_whole)

    log_norms, inner = jax.lax.map(at_t, (along.residuals, done.mantissas, done.exponents))
    total = sum(jnp.sum(jnp.square(jnp.abs(g)), dtype=log_norms.dtype) for g in jax.tree.leaves(whole))
    return TemporalContributions(log_norms, inner / total)


@partial(jax.jit, static_argnames=("step", "loss", "steps"))
def _adjoints(step: Step, params: Params, state0: State, xs: PyTree, loss: Loss, steps: int) -> Adjoints:
    done = backward(step, params, state0, xs, loss, steps)
    return Adjoints(
        done.loss,
        done.linearization.states,
        done.adjoints,
        done.log_norms,
        logscale.shift(*done.scaled_params_grad),
        done.state0_grad,
    )


@partial(jax.jit, static_argnames=("step", "loss", "steps"))
def _temporal_contributions(
    step: Step, params: Params, state0: State, xs: PyTree, loss: Loss, steps: int
) -> TemporalContributions:
    done = backward(step, params, state0, xs, loss, steps)
    return contributions(done, done.scaled_params_grad)
