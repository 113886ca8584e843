"""`gradient_flow`: all that one sequence tells about its gradient, in one streaming pass, with a verdict."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.analysis import matrix_free, verdict
from bptt_jax.analysis.adjoints import contributions
from bptt_jax.analysis.error_signal import horizon, propagate_error_signal, slope
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import check_positive_int, check_share
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.products import identity, log_spectral_norm, products_back
from bptt_jax.linalg.spectra import eigenvalues, singular_values
from bptt_jax.recurrence.jacobians import jacobian_at, jacobians_at
from bptt_jax.step import (
    Array,
    Loss,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    full_precision,
    ravel_state,
)

# Numbers in one chunk of Jacobians: 2 MB in float32, of which some ten copies live at a time.
_CHUNK_NUMBERS = 1 << 19


class GradientFlow(NamedTuple):
    """What backpropagation through time does to the gradient of one sequence; a pytree of arrays.

    Under ``jax.vmap`` every field has the batch as its first axis, and `verdict`, `summary` and `advice` speak of
    the whole batch. Logarithms are natural; a rate is in nats per step, positive where the signal grows on its
    way back.

    Attributes:
      loss: L, a scalar.
      adjoint_log_norms: ``[T]``, log of ``||dL/dh_t||`` (total derivatives), t = 1 .. T.
      product_log_norms: ``[T]``, entry t is log of ``||dh_T/dh_t||_2``, t = 0 .. T-1: the most that any signal can
        grow.
      error_log_gains: ``[T]``, entry t is log of ``||(dh_s/dh_t)^T e|| / ||e||``, t = 0 .. T-1: what arrives at h_t
        of the error signal ``e = dl/dh_s`` of the last step s that the loss reads (Hochreiter's error flow),
        followed alone, since later losses do not refresh it; 0 for t >= s. If the loss reads no state, the
        product's norm stands in.
      contribution_log_norms: ``[T]``, log norm of what each step adds to the parameters' gradient.
      contribution_shares: ``[T]``, its signed share; see `bptt_jax.temporal_contributions`.
      singular_values: ``[T, D]``, descending, of each dh_{k+1}/dh_k; every `stride`-th step if one was given, the
        first `num` if that was.
      eigenvalues: ``[T, D]``, complex, by descending modulus, of the same steps, as many.
      spectra_steps: ``[T]``, the t of each of these dh_t/dh_{t-1}: 1 .. T, or every `stride`-th of them.
      growth_rate: nats per step backwards: the slope of `error_log_gains` against the number of steps back, by
        least squares; -inf if the signal dies exactly.
      horizon: steps until the signal has fallen to `fraction` for good; beyond T it is extrapolated by
        `growth_rate`, inf if that does not fall.
      end_gain: log of what arrives at h_0, ``error_log_gains[0]``.
      peak_gain: the largest, over t, of ``log ||dL/dh_t|| - log sum_{k >= t} ||dl/dh_k||``: above 0 only if the
        recurrence has amplified something.
      params_grad_log_norm: log of ``||dL/dparams||``, also where its entries leave the range of their dtype.
      unamplified_log_norm: log norm of the contribution of step s alone, which no Jacobian has touched.
      first_nonfinite_state: index k of the first state (h_{k+1}) that is NaN or infinite, -1 if none.
      first_nonfinite_adjoint: index k of the first adjoint, going backwards, that is; -1 if none.
      finite: whether loss, states, adjoints, products and the parameters' gradient all are.
      reach: s, the number of steps that the error signal has on its way back to h_0; T if no state is read.
      fraction: the threshold that was given.
    """

    loss: Array
    adjoint_log_norms: Array
    product_log_norms: Array
    error_log_gains: Array
    contribution_log_norms: Array
    contribution_shares: Array
    singular_values: Array
    eigenvalues: Array
    spectra_steps: Array
    growth_rate: Array
    horizon: Array
    end_gain: Array
    peak_gain: Array
    params_grad_log_norm: Array
    unamplified_log_norm: Array
    first_nonfinite_state: Array
    first_nonfinite_adjoint: Array
    finite: Array
    reach: Array
    fraction: Array

    @property
    def verdicts(self) -> list[verdict.Verdict]:
        """One for each sequence."""
        columns = (self.end_gain, self.peak_gain, self.fraction, self.finite)
        rows = zip(*(np.ravel(np.asarray(c)) for c in columns), strict=True)
        return [verdict.judge(float(e), float(p), float(f), bool(ok)) for e, p, f, ok in rows]

    @property
    def verdict(self) -> verdict.Verdict:
        """ "vanishing", "exploding", "steady" or "non-finite"; of a batch, the most frequent.

        Judged by what was measured, never by eigenvalues: "exploding" if an adjoint has grown to more than
        ``1 / fraction`` of what came in (`peak_gain`), "vanishing" if less than `fraction` of the error signal
        arrives at h_0 (`end_gain`). To judge by another threshold: ``flow._replace(fraction=...)``.
        """
        return verdict.overall(self.verdicts)

    def summary(self) -> dict[str, Any]:
        """Plain numbers: mean, standard deviation and quartiles over the sequences, and the verdicts' counts."""
        verdicts = self.verdicts
        names = ("loss", "growth_rate", "horizon", "end_gain", "peak_gain", "params_grad_log_norm")
        radius = np.abs(np.asarray(self.eigenvalues))[..., 0]
        return {
            "verdict": self.verdict,
            "verdicts": {v: verdicts.count(v) for v in verdict.SEVERITY if v in verdicts},
            **{name: verdict.describe(getattr(self, name)) for name in names},
            "spectral_norm": verdict.describe(np.asarray(self.singular_values)[..., 0]),
            "spectral_radius": verdict.describe(radius),
            "clip_threshold": self.clip_threshold,
        }

    @property
    def clip_threshold(self) -> float:
        """A threshold for clipping the global norm, from the distribution of norms over the sequences.

        The 10th percentile of the gradient norms (AutoClip, Seetharaman et al. 2020, arXiv:2007.14469), but at
        most ten times the median norm that the gradient has before any Jacobian amplified it: ten is the upper
        end of the range that Pascanu et al. 2013 found to work, and where all sequences explode the percentile is
        itself the explosion. NaN where there is no finite gradient above zero to go by.
        """
        with np.errstate(over="ignore"):
            norms = np.exp(np.ravel(np.asarray(self.params_grad_log_norm, np.float64)))
            plain = np.exp(np.ravel(np.asarray(self.unamplified_log_norm, np.float64)))
        limits = [np.quantile(norms[norms > 0], 0.1, method="inverted_cdf")] if np.any(norms > 0) else []
        plain = plain[(plain > 0) & np.isfinite(plain)]
        if len(plain):
            limits.append(10 * np.median(plain))
        return float(min(limits)) if limits and np.isfinite(min(limits)) else math.nan

    def advice(self, *, gated: bool | None = None) -> list[str]:
        """What to try, in order, with numbers from the measurement; empty if the flow is steady.

        Args:
          gated: whether the step has a forget or update gate, as lstm and gru; None, if unknown, gives the advice
            for both.
        """

        def median(x: Array) -> float:
            return verdict.describe(x)["median"]

        def first(x: Array) -> int:
            steps = np.ravel(np.asarray(x))
            return int(min(steps[steps >= 0], default=-1))

        contributions = np.asarray(self.contribution_log_norms, np.float64)
        spoilt = np.argwhere(~(contributions < np.inf))  # True for NaN too; -inf is the norm 0
        return verdict.advise(
            self.verdict,
            gated,
            {
                "length": median(self.reach),
                "fraction": float(np.ravel(np.asarray(self.fraction))[0]),
                "growth_rate": median(self.growth_rate),
                "horizon": median(self.horizon),
                "peak_gain": median(self.peak_gain),
                "clip_threshold": self.clip_threshold,
                "largest_gradient_log10": float(np.nanmax(contributions, initial=-np.inf)) / math.log(10),
                "nonfinite_step": first(self.first_nonfinite_state),
                "nonfinite_adjoint_step": first(self.first_nonfinite_adjoint),
                "nonfinite_contribution_step": min(spoilt[:, -1].tolist(), default=-1),
                "nonfinite_losses": int(np.sum(~np.isfinite(np.asarray(self.loss)))),
            },
        )


def gradient_flow(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    length: int | None = None,
    stride: int = 1,
    num: int | None = None,
    fraction: float | Array = 1e-3,
) -> GradientFlow:
    """Measures what backpropagation through time does to the gradient of one sequence.

    Streams: memory is O(T * D + chunk * D^2), never T Jacobians at once; with `num` O(T * D) and a constant, beside
    the parameters and their gradient. Products of matrices, the step's and the loss's too, are in full precision on
    every device.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      loss: ``loss(states) -> scalar`` of the whole trajectory.
      stride: spectra of every stride-th Jacobian only, counted back from the last; eigenvalues are by far the
        dearest part, and nothing else depends on them. `singular_values` and `eigenvalues` then have
        ``ceil(T / stride)`` rows.
      num: of the spectra the first `num` values only, found without any D x D matrix as
        `bptt_jax.leading_singular_values` and `bptt_jax.leading_eigenvalues` do, within the errors that these
        give; the norms of the products by 32 steps of Golub-Kahan bidiagonalisation each, good to 1e-3 nats even
        of random matrices. These norms cost some 20 T^2 Jacobian-vector products and as many vector-Jacobian
        ones, where the dense way multiplies T matrices: it pays where D is in the thousands and T small against
        it. Below that, and wherever all values are wanted, leave it None.
      fraction: where a signal counts as gone, and its inverse where it counts as blown up. The gradient of B
        sequences carries sampling noise of the order of 1 / sqrt(B) of itself: what is left of 1e-3 lies below the
        noise of any batch smaller than a million sequences, so no optimiser can act on it; and a growth of 1e3
        turns the customary learning rates of 1e-3 and above into steps of the size of the parameters.

    Returns:
      A `GradientFlow`. For a batch, ``jax.vmap`` over the sequences.

    Raises:
      TypeError, ValueError: an argument breaks the contract; `fraction` is not between 0 and 1. NaN or infinity in
        the trajectory raises nothing: the verdict is "non-finite", and the fields or `advice` say where it began.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> flow = bptt.gradient_flow(step, 0.5, jnp.zeros(1), jnp.ones((20, 1)), lambda states: states[-1, 0])
      >>> flow.verdict, round(float(flow.growth_rate), 3)
      ('vanishing', -0.693)
      >>> flow.advice()[0]
      'the signal falls to 0.001 in 10 steps of 20: nothing older is learned'
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss)
    stride = check_positive_int("stride", stride)
    if num is not None:
        num = matrix_free.check_num(num, state0)
    with full_precision():
        return _gradient_flow(recurrence, check_fraction(fraction), bound, stride, num)


def check_fraction(fraction: float | Array) -> Array | np.ndarray:
    """Returns `fraction` as an array if it is a number between 0 and 1."""
    fraction = check_share("fraction", fraction)
    if isinstance(fraction, jax.core.Tracer):
        return jnp.asarray(fraction, float)
    return np.asarray(fraction, jnp.result_type(float))  # of NumPy: nothing is compiled for it


@partial(jax.jit, static_argnames=("stride", "num"))
def _gradient_flow(
    recurrence: Recurrence, fraction: Array | np.ndarray, loss: BoundLoss, stride: int, num: int | None
) -> GradientFlow:
    fraction = jnp.asarray(fraction)
    recurrence = check_step(recurrence)
    step, params, xs, steps = recurrence.step, recurrence.params, recurrence.instants.x, recurrence.length
    signal = propagate_error_signal(recurrence, loss)
    done, starts = signal.done, signal.starts
    params_grad = done.params_grad
    added = contributions(done, params_grad)
    if num is None:
        products = _product_log_norms(step, params, starts, xs, steps)
    else:
        products = matrix_free.suffix_log_norms(done.along)
    gains = jnp.where(signal.reads, signal.gains, products)
    peak = jnp.where(signal.reads, signal.peak, jnp.max(products))
    rate = slope(gains, signal.back)
    grad_log_norm = params_grad.log_norm
    # Spectra begin when the products are there.
    at = jax.tree.map(lambda a: a[(steps - 1) % stride :: stride], (_after(products, starts), xs))
    sv, ev = spectra_at(step, params, at[0], at[1], num)
    bad_state, bad_adjoint = signal.bad_state, signal.bad_adjoint
    return GradientFlow(
        loss=done.loss.value,
        adjoint_log_norms=signal.adjoint_log_norms,
        product_log_norms=products,
        error_log_gains=gains,
        contribution_log_norms=added.log_norms,
        contribution_shares=added.shares,
        singular_values=sv,
        eigenvalues=ev,
        spectra_steps=1 + jnp.arange((steps - 1) % stride, steps, stride),
        growth_rate=rate,
        horizon=horizon(gains, signal.back, rate, fraction),
        end_gain=gains[0],
        peak_gain=peak,
        params_grad_log_norm=grad_log_norm,
        unamplified_log_norm=added.log_norms[signal.last_read],
        first_nonfinite_state=jnp.where(jnp.any(bad_state), jnp.argmax(bad_state), -1),
        first_nonfinite_adjoint=jnp.where(jnp.any(bad_adjoint), steps - 1 - jnp.argmax(bad_adjoint[::-1]), -1),
        # False for NaN too; -inf is the norm 0.
        finite=signal.finite & jnp.all(jnp.append(products, grad_log_norm) < jnp.inf),
        reach=signal.back,
        fraction=fraction,
    )


def _product_log_norms(step: Step, params: Params, starts: State, xs: PyTree, steps: int) -> Array:
    """Log norms [T] of dh_T/dh_t."""
    example = ravel_state(jax.tree.map(lambda a: a[0], starts))[0]
    chunk = _chunk(example.size, steps)
    count = -(-steps // chunk)
    # Padding goes in front, where the backward recursion arrives last: what it adds is cut off again.
    padding = count * chunk - steps

    def in_chunks(tree: PyTree) -> PyTree:
        def cut(a: Array) -> Array:
            a = jnp.concatenate([jnp.repeat(a[:1], padding, axis=0), a])
            return a.reshape(count, chunk, *a.shape[1:])

        return jax.tree.map(cut, tree)

    def body(product: LogScaled, inputs: PyTree) -> tuple[LogScaled, Array]:
        before, products = products_back(product, jacobians_at(step, params, inputs[0], inputs[1], "forward"))
        return before, log_spectral_norm(products)

    empty = identity(example.size, example.dtype)
    inputs = in_chunks((starts, jax.tree.map(jnp.asarray, xs)))
    _, norms = jax.lax.scan(body, empty, inputs, reverse=True)
    return norms.reshape(-1)[padding:]


def spectra_at(step: Step, params: Params, states: State, xs: PyTree, num: int | None) -> tuple[Array, Array]:
    """Singular values and eigenvalues, all or `num`, at each of K given states (leaves ``[K, ...]``) and inputs."""
    if num is not None:
        return (
            matrix_free.singular_values_at(step, params, states, xs, num, "forward").values,
            matrix_free.eigenvalues_at(step, params, states, xs, num, "forward").values,
        )

    def at(inputs: tuple[State, PyTree]) -> tuple[Array, Array]:
        jac = jacobian_at(step, params, *inputs, mode="forward")
        sv = singular_values(jac)
        return sv, eigenvalues(_after(sv, jac))

    size = ravel_state(jax.tree.map(lambda a: a[0], states))[0].size
    return jax.lax.map(at, (states, xs), batch_size=_chunk(size, jax.tree.leaves(states)[0].shape[0]))


def _after(value: Array, tree: PyTree) -> PyTree:
    """`tree`, but only once `value` is there: on CPU, two LAPACK loops at one time may block each other."""
    never = jnp.ravel(value)[0] > jnp.inf  # which the compiler does not know
    return jax.tree.map(lambda a: jnp.where(never, jnp.zeros_like(a), a), tree)


def _chunk(size: int, steps: int) -> int:
    return max(1, min(steps, _CHUNK_NUMBERS // size**2))
