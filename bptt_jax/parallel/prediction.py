"""Whether a recurrence will be evaluated faster in parallel over time: decided by its largest Lyapunov exponent."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax.analysis.lyapunov import lyapunov_exponents
from bptt_jax.results import Result, field
from bptt_jax.step import Array, Params, PyTree, State, Step, bind, state_size

_MARGIN = 1.0  # nats over the whole sequence


class ParallelPrediction(Result):
    """What to expect of `bptt_jax.deer`; a pytree of arrays.

    Under ``jax.vmap`` every field has the sequences as its first axis, and the words speak of the one with the
    largest exponent: a batch iterates until its last sequence has converged.

    Attributes:
      exponent: the largest Lyapunov exponent of the trajectory, nats per step.
      standard_error: of it.
      length: T, of steps.
      size: D, of the state.
    """

    exponent: Float[Array, ""] = field(dims=())
    standard_error: Float[Array, ""] = field(dims=())
    length: Int[Array, ""] = field(dims=())
    size: Int[Array, ""] = field(dims=())

    def _headline(self) -> str:
        exponent, error, steps, _ = self._decisive
        return f"{self.verdict}: exponent {exponent:.3g} +- {error:.2g} nats per step over {steps} steps"

    @property
    def verdict(self) -> Literal["parallel", "sequential", "undecided"]:
        """ "parallel" if differences surely shrink over the sequence (by more than one nat, two standard errors
        aside), "sequential" if they surely grow by as much or the exponent is not finite, "undecided" between.
        """
        exponent, error, steps, _ = self._decisive
        margin = _MARGIN / steps + 2 * (0.0 if np.isnan(error) else error)
        if exponent < -margin:
            return "parallel"
        return "undecided" if exponent <= margin else "sequential"

    @property
    def statement(self) -> str:
        """One line: the exponent, what follows from it, and what an iteration with full Jacobians costs: some
        2 T D^3 flops in products of matrices and 3 T D^2 numbers of memory.
        """
        exponent, error, steps, size = self._decisive
        follows = {
            "parallel": "differences shrink, a few iterations",
            "sequential": "differences grow, about as many iterations as steps: evaluate it step by step",
            "undecided": "about neutral, dozens of iterations, more the longer the sequence",
        }[self.verdict]
        return (
            f"exponent {exponent:.3g} +- {error:.2g} nats per step over {steps} steps: {follows}; each takes "
            f"{2.0 * steps * size**3:.2g} flops and {3.0 * steps * size**2:.2g} numbers"
        )

    @property
    def _decisive(self) -> tuple[float, float, int, int]:
        columns = [np.ravel(np.asarray(a)) for a in (self.exponent, self.standard_error, self.length, self.size)]
        worst = int(np.argmax(columns[0]))  # NaN counts as the largest
        exponent, error, steps, size = (a[worst] for a in columns)
        return float(exponent), float(error), int(steps), int(size)


def predict_parallel(
    step: Step, params: Params, state0: State, xs: PyTree = None, *, length: int | None = None
) -> ParallelPrediction:
    """Measures what decides how many iterations `bptt_jax.deer` takes: the sign of the largest Lyapunov exponent
    (Gonzalez et al. 2025, arXiv:2508.16817: a recurrence that forgets differences gives a well-conditioned problem,
    one that amplifies them a problem whose condition grows exponentially in T).

    It is measured along the sequential trajectory, without its first tenth; so measure once, on a typical sequence,
    for many evaluations.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.

    Returns:
      `ParallelPrediction`. The exponent speaks of the solution: where wrong states have expanding Jacobians, the
      first iterates may overshoot although the recurrence contracts; then ``deer(..., damped=True)``.

    Raises:
      TypeError, ValueError: an argument breaks the contract.

    Example:
      >>> step = lambda w, h, x: w * h
      >>> [bptt.predict_parallel(step, w, jnp.ones(1), length=100).verdict for w in (0.5, 1.0, 2.0)]
      ['parallel', 'undecided', 'sequential']
    """
    steps = bind(step, params, state0, xs, length).length
    spectrum = lyapunov_exponents(step, params, state0, xs, length=length, num=1, warmup=steps // 10)
    size = state_size(state0)
    return ParallelPrediction(
        spectrum.exponents[0],
        spectrum.standard_errors[0],
        jnp.asarray(steps, jnp.int32),
        jnp.asarray(size, jnp.int32),
    )
