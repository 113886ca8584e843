"""Whether a recurrence will be evaluated faster in parallel over time: decided by its largest Lyapunov exponent."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax import devices
from bptt_jax.analysis.averages import count_within, own_library, pieces
from bptt_jax.analysis.lyapunov import living_rates, measure_exponents
from bptt_jax.results import Result, counted, field
from bptt_jax.step import Array, Params, PyTree, Recurrence, State, Step, bind, check_step

_MARGIN = 1.0  # nats over the whole sequence


class ParallelPrediction(Result):
    """Whether `bptt_jax.deer` will pay; a pytree of arrays.

    Under ``jax.vmap`` every field has the sequences as its first axis, and the words speak of the one with the
    largest exponent: a batch iterates until its last sequence has converged.

    Attributes:
      exponent: the largest Lyapunov exponent of the trajectory, nats per step; of a step that erases all
        differences now and then, their rate in between; NaN where the trajectory is not finite.
      standard_error: of it.
      length: T, of steps.
      longest: how many real steps there are without a reset; those differences have to grow or to shrink.
      size: D, of the state.
    """

    exponent: Float[Array, ""] = field(dims=())
    standard_error: Float[Array, ""] = field(dims=())
    length: Int[Array, ""] = field(dims=())
    longest: Int[Array, ""] = field(dims=())
    size: Int[Array, ""] = field(dims=())

    def _headline(self) -> str:
        return f"{self.verdict}: {self._measured}"

    @property
    def verdict(self) -> Literal["parallel", "sequential", "undecided"]:
        """ "parallel" if differences surely shrink over the longest piece (by more than one nat, two standard
        errors aside), "sequential" if they surely grow by as much or the exponent is not finite, "undecided"
        between.
        """
        exponent, error, longest, *_ = self._decisive
        if longest == 0:
            return "undecided"
        margin = _MARGIN / max(longest, 1) + 2 * (0.0 if np.isnan(error) else error)
        if exponent < -margin:
            return "parallel"
        return "undecided" if exponent <= margin else "sequential"

    @property
    def statement(self) -> str:
        """One line: the exponent, what follows from it, and what an iteration with full Jacobians costs: some
        2 T D^3 flops in products of matrices, D times those of the scan, and 3 T D^2 numbers of memory. Two iterations
        at least are made, so that on fewer than 2 D cores no order in which they work can pay.
        """
        _, _, longest, steps, size = self._decisive
        if longest == 0:
            return self._measured
        follows = {
            "parallel": "differences shrink, a few iterations",
            "sequential": "differences grow, about as many iterations as steps: evaluate it step by step",
            "undecided": "about neutral, dozens of iterations, more the longer the sequence",
        }[self.verdict]
        flops, numbers = 2.0 * steps * size**3, 3.0 * steps * size**2
        return (
            f"{self._measured}: {follows}; each takes {flops:.2g} flops and {numbers:.2g} numbers, so it cannot pay on "
            f"fewer than {2 * size} cores"
        )

    @property
    def _measured(self) -> str:
        exponent, error, longest, *_ = self._decisive
        if longest == 0:
            return "no step to measure"
        if np.isnan(exponent):
            return f"the trajectory of {counted(longest, 'step')} is not finite"
        return f"exponent {exponent:.3g} +- {error:.2g} nats per step over {counted(longest, 'step')}"

    @property
    def _decisive(self) -> tuple[float, float, int, int, int]:
        fields = (self.exponent, self.standard_error, self.longest, self.length, self.size)
        columns = [np.ravel(np.asarray(a)) for a in fields]
        measured = columns[2] > 0  # of nothing but padding there is no exponent
        columns = [a[measured] for a in columns] if measured.any() else columns
        worst = int(np.argmax(columns[0]))  # NaN counts as the largest
        exponent, error, longest, steps, size = (a[worst] for a in columns)
        return float(exponent), float(error), int(longest), int(steps), int(size)


def predict_parallel(
    step: Step, params: Params, state0: State, xs: PyTree = None, *, length: int | None = None
) -> ParallelPrediction:
    """Measures what decides how many iterations `bptt_jax.deer` takes: the sign of the largest Lyapunov exponent
    (Gonzalez et al. 2025, arXiv:2508.16817: a recurrence that forgets differences gives a well-conditioned problem,
    one that amplifies them a problem whose condition grows exponentially in T).

    It is measured along the sequential trajectory, without its first tenth (of every piece that begins with a
    reset); so measure once, on a typical sequence, for many evaluations. Steps that erase all differences are taken
    for resets.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.

    Returns:
      `ParallelPrediction`. The exponent speaks of the solution: where wrong states have expanding Jacobians, the
      first iterates may overshoot although the recurrence contracts; then ``deer(..., damping="scale")``.
      Where states may come to rest in several places, or turn on a cycle, wrong stretches give way a few steps at an
      iteration, and it takes more of these the longer the sequence is; then ``deer(..., window=1000)``, or less.

    Raises:
      TypeError, ValueError: an argument breaks the contract.

    Example:
      >>> step = lambda w, h, x: w * h
      >>> [bptt.predict_parallel(step, w, jnp.ones(1), length=100).verdict for w in (0.5, 1.0, 2.0)]
      ['parallel', 'undecided', 'sequential']
    """
    return _predict(bind(step, params, state0, xs, length))


@devices.compiled
def _predict(recurrence: Recurrence) -> ParallelPrediction:
    recurrence = check_step(recurrence)
    piece = pieces(recurrence)
    upto, after = count_within(piece)
    lengths = own_library(piece).where(piece >= 0, upto + after, 0)
    spectrum = measure_exponents(recurrence, lengths // 10, num=1)
    rates, errors = living_rates(spectrum)
    return ParallelPrediction(
        rates[0],
        errors[0],
        jnp.asarray(recurrence.length, jnp.int32),
        jnp.max(lengths),
        jnp.asarray(recurrence.size, jnp.int32),
    )
