"""Penalties that keep the error signal's norm on its way back: added to a loss, they are differentiated with it."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from bptt_jax import devices
from bptt_jax.analysis.backward import backward
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.analysis.lyapunov import LyapunovSpectrum, living_rates, lyapunov_exponents
from bptt_jax.checks import check_choice, check_positive_int, raise_if
from bptt_jax.linalg.logscale import LogScaled, log_norm
from bptt_jax.recurrence.frozen import frozen_push
from bptt_jax.results import Result, counted, field
from bptt_jax.step import (
    Array,
    Input,
    Loss,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
)


class OmegaTerms(Result):
    """The summands of `omega_penalty`, one for each step; leaves ``[T]``, or ``[B, T]`` after ``jax.vmap``.

    Attributes:
      terms: ``(||J_t^T delta_t||^2 / ||delta_t||^2 - 1)^2`` with ``delta_t = dL/dh_t``; 0 where delta_t is zero,
        and in padding. At a reset J_t is with respect to the state that the step starts from.
      valid: whether ``||delta_t||^2 >= 1e-20``, the released code's criterion; False in padding.
    """

    terms: Float[Array, " T"] = field(dims=("time",))
    valid: Bool[Array, " T"] = field(dims=("time",))

    def _headline(self) -> str:
        terms, valid = np.asarray(self.terms), np.asarray(self.valid)
        return f"{np.sum(terms):.4g} in all, of {counted(np.sum(valid), 'error signal')} above 1e-10"


def omega_terms(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    args: PyTree = None,
    length: int | None = None,
) -> OmegaTerms:
    """Pascanu's regulariser, step by step (Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063, eq. 9).

    Only its immediate derivative with respect to the recurrent weights is kept, as in the paper (eq. 10) and its
    code. Of the Jacobian ``diag(phi'(W h + U x + b)) W`` it is that by the W on the right: the error signals, the
    states and phi', which comes from the states, are constants. For any step: while a tangent goes through it, each
    value that depends differentiably on the state is a constant, and what is made of parameters and inputs alone is
    not. So it is W of `rnn`, the stacked recurrent weights of `gru` and `lstm`, and what the gates of `min_gru`
    are made of, which do not depend on the state. It is the same however the step is written, within `jax.jit`,
    `jax.checkpoint`, `jax.lax.cond`, `switch` and `scan` too.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`.

    Returns:
      `OmegaTerms`, to be differentiated with respect to `params`; ``jax.vmap`` over sequences, then
      `omega_penalty`.

    Raises:
      TypeError, ValueError: an argument breaks the contract, the step has no backward pass, or what moves with the
        state cannot be told in it (within a `jax.shard_map`, a Pallas kernel).
    """
    return _omega_terms(bind(step, params, state0, xs, length), bind_loss(loss, args))


def omega_penalty(terms: OmegaTerms, *, version: Literal["paper", "code"] = "paper") -> Float[Array, ""]:
    """The penalty from its terms, of one sequence or a batch.

    Args:
      terms: from `omega_terms`; leading axes are sequences.
      version: "paper": the sum over steps (eq. 9), averaged over sequences. "code": as the released program
        (github.com/pascanur/trainingRNNs, RNN.py) computes it, the sum over valid steps and sequences divided by
        their number; thus smaller by about T, to be weighted accordingly (the paper's weight of 4 is the code's).

    Returns:
      A scalar.

    Raises:
      TypeError, ValueError: `terms` are none, or `version` is neither.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> terms = bptt.remedies.omega_terms(step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0])
      >>> terms.terms  # (0.5^2 - 1)^2 each
      Array([0.562, 0.562, 0.562, 0.562], dtype=float32)
      >>> [round(float(bptt.remedies.omega_penalty(terms, version=version)), 3) for version in ("paper", "code")]
      [2.25, 0.562]
    """
    if not isinstance(terms, OmegaTerms):
        raise TypeError(
            f"terms: expected the OmegaTerms of bptt_jax.remedies.omega_terms, got {type(terms).__name__}"
        )
    if check_choice("version", version, "paper", "code") == "paper":
        return jnp.mean(jnp.sum(terms.terms, axis=-1))
    count = jnp.maximum(jnp.sum(terms.valid), 1).astype(terms.terms.dtype)
    return jnp.sum(jnp.where(terms.valid, terms.terms, 0)) / count


def flossing_penalty(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree = None,
    *,
    num: int,
    length: int | None = None,
    warmup: int = 0,
) -> Float[Array, ""]:
    """Gradient flossing: the mean square of the largest exponents (Engelken 2023, arXiv:2312.17306).

    Driven to zero it keeps as many directions of the error signal from vanishing and from exploding. Added to a
    loss, or minimised alone before training, as in the paper.

    Args:
      step, params, state0, xs, length, num, warmup: as for `bptt_jax.lyapunov_exponents`.

    Returns:
      A scalar, in (nats per step)^2, differentiable through the QR decompositions. Steps that map a direction to
      zero are passed over, for this direction, as if they were resets; directions that no step leaves alive do not
      count. NaN where the trajectory is not finite; 0 where there is nothing but padding.

    Raises:
      TypeError, ValueError: as `bptt_jax.lyapunov_exponents`.
      RuntimeError: when it runs: every step maps all directions to zero.

    Example:
      >>> step = lambda w, h, x: w * h
      >>> round(float(bptt.remedies.flossing_penalty(step, 0.5, jnp.ones(1), length=50, num=1)), 3)  # log(2)^2
      0.48
    """
    num = check_positive_int("num", num)
    spectrum = lyapunov_exponents(step, params, state0, xs, num=num, length=length, warmup=warmup)
    penalty, count = _mean_square(spectrum)
    return raise_if(penalty, count == 0, "flossing_penalty: expected a step that leaves some direction alive")


@devices.compiled
def _mean_square(spectrum: LyapunovSpectrum) -> tuple[Array, Array]:
    """Of the rates of directions that live, and how many these are."""
    rates, _ = living_rates(spectrum)
    rates = jnp.where(jnp.any(spectrum.piece >= 0), rates, 0)  # a sequence that fills up a batch has none
    lives = rates != -jnp.inf
    count = jnp.sum(lives, dtype=rates.dtype)
    return jnp.sum(jnp.square(jnp.where(lives, rates, 0))) / jnp.where(count == 0, 1, count), count


@devices.compiled
def _omega_terms(recurrence: Recurrence, loss: BoundLoss) -> OmegaTerms:
    recurrence = check_step(recurrence)
    done = backward(*jax.lax.stop_gradient((recurrence, loss)))
    nothing, step, params = done.along.no_cotangents, recurrence.step, recurrence.params

    def term(start: State, x: Input, signal: LogScaled) -> tuple[Array, Array]:
        _, pull = jax.vjp(frozen_push(step, params, start, x), nothing)
        delta = LogScaled(signal.mantissa, jnp.zeros_like(signal.exponent))
        zero = delta.log_norm == -jnp.inf
        ratio = 2 * (log_norm(pull(delta.mantissa)[0]) - jnp.where(zero, 0, delta.log_norm))
        square = jnp.where(zero, 1.0, jnp.exp(jnp.where(zero, 0.0, ratio)))
        return jnp.square(square - 1), signal.log_norm >= 0.5 * jnp.log(1e-20)

    at = jax.lax.stop_gradient((done.along.starts, recurrence.instants.x, done.signal))
    terms, valid = jax.vmap(term)(*at)
    return OmegaTerms(jnp.where(recurrence.real, terms, 0), valid & recurrence.real)
