"""`Monitor`: a probe of the gradient flow in the user's own training loop, at every n-th update."""

import math
import operator
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.analysis import nonfinite, verdict
from bptt_jax.analysis.error_signal import horizon, propagate_error_signal, slope
from bptt_jax.analysis.flow import check_fraction, spectra_at
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.analysis.matrix_free import check_num
from bptt_jax.analysis.nonfinite import NonFinite
from bptt_jax.checks import check_choice, check_function, check_leaves, check_positive_int
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.step import Array, Params, PyTree, Recurrence, State, Step, bind, check_step

BatchLoss: TypeAlias = Callable[[Params, State, PyTree], Array]

_REMEMBERED = 10  # probes whose gradient norms are told with a NaN


class MonitorWarning(UserWarning):
    """The verdict has changed, or something has become NaN or infinite."""


class MonitorRecord(NamedTuple):
    """What one probe saw, in plain numbers.

    Attributes:
      update: the number that was given.
      verdict: of the sampled sequences, as `GradientFlow.verdict`; "non-finite" if any sequence of the batch is.
      scalars: name to float; the names are in the table of `Monitor`, always all of them, always in its order.
      histograms: name to a 1-D array of the finite values, possibly empty.
      nonfinite: where the first NaN or infinity is, if there is one.
    """

    update: int
    verdict: verdict.Verdict
    scalars: dict[str, float]
    histograms: dict[str, np.ndarray]
    nonfinite: NonFinite | None


class _Measured(NamedTuple):
    """Leaves ``[k, ...]``, of k sampled sequences; spectra of the sampled Jacobians.

    Attributes:
      finite: as `GradientFlow.finite`, but for the products.
      in_range: whether all adjoints and the gradient lie in the range of their dtype.
      others_finite: one truth value, of the losses of all other sequences and of the parameters.
    """

    loss: Array
    growth_rate: Array
    horizon: Array
    end_gain: Array
    peak_gain: Array
    params_grad_log_norm: Array
    adjoint_log_norms: Array
    finite: Array
    in_range: Array
    singular_values: Array
    eigenvalues: Array
    others_finite: Array


class Monitor:
    """Watches the gradient flow of a training loop, whoever wrote the loop.

    ``monitor(update, params, state0, batch)``, called once per update, returns a `MonitorRecord` at every n-th and
    None in between, at next to no cost; any logger may write its flat dictionaries. Measured is what
    `bptt_jax.gradient_flow` measures, but for the products of Jacobians, of the first few sequences of the batch;
    spectra are those of a few Jacobians. Call it before an update that donates the parameters' buffers.

    It warns (`MonitorWarning`) when the verdict differs from that of the probe before, and when something is NaN or
    infinite in the forward or backward pass of the sampled sequences, the losses of the others, or the
    parameters: then the whole batch is searched for the first step in time, the array, and the norms before it
    (`NonFinite`). These are Python's `warnings`: shown without any set-up, and one filter silences them or turns
    them into an error that stops the training. Between two probes a NaN spreads into the parameters: where the loss
    of an update is not finite, `locate` with the parameters before that update says where it began.

    Scalars; logarithms are natural, rates in nats per step. Of several sequences or Jacobians the median is taken,
    NaN ones left out, if not said otherwise. A sequence whose loss has no derivative in any state (a readout of
    zeros) has no error signal: its rate, horizon and end gain are NaN, its verdict is "steady".

    ================================= ==========================================================================
    name                              value
    ================================= ==========================================================================
    bptt/loss                         mean loss of the sampled sequences
    bptt/growth_rate                  nats per step backwards, `GradientFlow.growth_rate`
    bptt/horizon                      steps, `GradientFlow.horizon`; may be inf
    bptt/end_gain                     log of what arrives at h_0 of the error signal, `GradientFlow.end_gain`
    bptt/peak_gain                    `GradientFlow.peak_gain`
    bptt/gradient_log_norm            log of the norm of one sequence's dL/dparams
    bptt/adjoint_log_norm/first       log of the norm of dL/dh_1
    bptt/adjoint_log_norm/last        log of the norm of dL/dh_T; -inf if the loss does not read h_T
    bptt/adjoint_log_norm/max         the largest over time
    bptt/spectral_norm                largest singular value of a Jacobian dh_t/dh_{t-1}
    bptt/spectral_radius              largest modulus of its eigenvalues
    bptt/verdict                      0 steady, 1 vanishing, 2 exploding, 3 non-finite
    bptt/verdict_share/steady         share of the sampled sequences with this verdict
    bptt/verdict_share/vanishing
    bptt/verdict_share/exploding
    bptt/verdict_share/non-finite
    bptt/non_finite/step              `NonFinite.step`; -1 if there is none
    bptt/non_finite/sequence          `NonFinite.sequence`; -1 if there is none
    bptt/monitor/seconds              wall time of this probe; the first of a shape compiles
    bptt/monitor/share                of the wall time since the probe before ended (or since construction)
    ================================= ==========================================================================

    Histograms:

    ================================= ==========================================================================
    bptt/adjoint_log_norms            of every sampled sequence and step; zero adjoints (-inf) left out
    bptt/singular_values              of the sampled Jacobians, all or `num` of each
    bptt/eigenvalue_moduli            likewise
    ================================= ==========================================================================

    Args:
      step: ``step(params, h, x) -> h``, with the parameters that the monitor is called with: a step that needs a
        part of them takes it out (``lambda params, h, x: cell.step(params["cell"], h, x)``).
      loss: ``loss(params, states, target) -> scalar`` of one sequence: its states h_1 .. h_T, leaves ``[T, ...]``,
        and its item of the targets.
      every: updates from probe to probe. 100 cost 0.3 to 3 % of a loop's time in `benchmarks/monitor.py`, with
        ``OPENBLAS_NUM_THREADS=1`` set before Python starts, as for all spectra on CPU: several threads in LAPACK
        make them several times dearer on a busy machine. ``bptt/monitor/share`` tells yours.
      sequences: how many of the batch are sampled, from its beginning: a shuffled batch is a random sample.
      spectra: of how many Jacobians in all, evenly spaced in time back from the last step, from the sampled
        sequences by turns.
      num: of these spectra the first `num` values only, without any D x D matrix; see `bptt_jax.gradient_flow`.
      fraction: the threshold of horizon and verdict; see `bptt_jax.gradient_flow`.
      state_axis: None if `state0` is one state that all sequences start from, 0 if it has the batch as first axis,
        as states carried over from the batch before.

    Raises:
      TypeError, ValueError: an argument is out of range.
    """

    def __init__(
        self,
        step: Step,
        loss: BatchLoss,
        *,
        every: int = 100,
        sequences: int = 4,
        spectra: int = 2,
        num: int | None = None,
        fraction: float = 1e-3,
        state_axis: Literal[0] | None = None,
    ) -> None:
        check_function("step", step, "step(params, state, x) -> state")
        check_function("loss", loss, "loss(params, states, target) -> scalar")
        self._step, self._loss = step, loss
        self._every = check_positive_int("every", every)
        self._sequences = check_positive_int("sequences", sequences)
        self._spectra = check_positive_int("spectra", spectra)
        self._num = None if num is None else check_positive_int("num", num)
        self._fraction = float(check_fraction(fraction))
        check_choice("state_axis", state_axis, None, 0)
        self._state_axis = state_axis
        self._measure = jax.jit(self._measured)
        self._trace = jax.jit(self._traced)
        self._last: MonitorRecord | None = None
        self._gradients: deque[float] = deque(maxlen=_REMEMBERED)
        self._ended = time.perf_counter()

    def __call__(
        self, update: int, params: Params, state0: State, batch: tuple[PyTree, PyTree]
    ) -> MonitorRecord | None:
        """Probes if `update` is a multiple of `every`, otherwise returns None.

        Args:
          update: its number; 0 is probed, and the first probe compiles.
          params: before the update.
          state0: h_0, one for all sequences, or one for each (`state_axis`).
          batch: ``(xs, targets)``: leaves of `xs` ``[B, T, ...]``, of `targets` ``[B, ...]``; None for no targets.

        Raises:
          TypeError, ValueError: an argument breaks the contract (see `bptt_jax.step`), before any compilation.
        """
        if not hasattr(update, "__index__"):
            raise TypeError(f"update: expected an integer, got {type(update).__name__}")
        return self._probe(update, params, state0, batch) if operator.index(update) % self._every == 0 else None

    def probe(self, update: int, params: Params, state0: State, batch: tuple[PyTree, PyTree]) -> MonitorRecord:
        """Probes at once, whatever the number of the update; otherwise as a call."""
        return self._probe(update, params, state0, batch)

    def locate(self, params: Params, state0: State, batch: tuple[PyTree, PyTree]) -> NonFinite | None:
        """The first NaN or infinity in the forward and backward pass of the whole batch; None if there is none.

        Looks at every array of every sequence, one after the other; compiled when it is first needed. Arguments as
        of a call, with the parameters before the update whose loss or gradient was not finite.
        """
        self._check(params, state0, batch)
        bad_params, traces = jax.device_get(self._trace(params, state0, *batch))
        return nonfinite.first(bad_params, traces, nonfinite.names(params, state0, *batch))

    def _probe(self, update: int, params: Params, state0: State, batch: tuple[PyTree, PyTree]) -> MonitorRecord:
        self._check(params, state0, batch)
        jax.block_until_ready((params, state0, batch))  # what is still running is the loop's own time
        start = time.perf_counter()
        found: _Measured = jax.device_get(self._measure(params, state0, *batch))
        fine = found.finite.all() and found.in_range.all() and found.others_finite
        where = None if fine else self.locate(params, state0, batch)
        columns = (found.end_gain, found.peak_gain, found.finite)
        verdicts = [
            verdict.judge(float(e), float(p), self._fraction, bool(ok)) for e, p, ok in zip(*columns, strict=True)
        ]
        overall = verdict.overall(verdicts) if found.others_finite else "non-finite"
        scalars = _scalars(found) | {
            "bptt/verdict": float(verdict.SEVERITY.index(overall)),
            **{f"bptt/verdict_share/{v}": verdicts.count(v) / len(verdicts) for v in verdict.SEVERITY},
            "bptt/non_finite/step": -1.0 if where is None else float(where.step),
            "bptt/non_finite/sequence": -1.0 if where is None else float(where.sequence),
        }
        histograms = {
            "bptt/adjoint_log_norms": _finite(found.adjoint_log_norms),
            "bptt/singular_values": _finite(found.singular_values),
            "bptt/eigenvalue_moduli": _finite(np.abs(found.eigenvalues)),
        }
        end = time.perf_counter()
        scalars |= {
            "bptt/monitor/seconds": end - start,
            "bptt/monitor/share": (end - start) / (end - self._ended),
        }
        record = MonitorRecord(operator.index(update), overall, scalars, histograms, where)
        message = self._message(record)
        self._last, self._ended = record, end
        self._gradients.append(scalars["bptt/gradient_log_norm"])
        if message:
            warnings.warn(message, MonitorWarning, stacklevel=3)
        return record

    def _message(self, record: MonitorRecord) -> str:
        """What is new since the probe before."""
        parts = []
        if self._last is not None and self._last.verdict != record.verdict:
            rate, steps = record.scalars["bptt/growth_rate"], record.scalars["bptt/horizon"]
            change = f"the verdict changes from {self._last.verdict} to {record.verdict}"
            parts.append(f"{change} (growth rate {rate:.3g} nats per step, horizon {steps:.4g} steps)")
        if record.nonfinite is not None and (self._last is None or self._last.nonfinite is None):
            gradients = " ".join(f"{n:.4g}" for n in self._gradients)
            parts.append(
                f"{record.nonfinite.statement}; log gradient norms of the probes before: {gradients or 'none'}"
            )
        return f"update {record.update}: {'; '.join(parts)}" if parts else ""

    def _check(self, params: Params, state0: State, batch: tuple[PyTree, PyTree]) -> None:
        if not (isinstance(batch, tuple) and len(batch) == 2):
            what = f"{len(batch)} items" if isinstance(batch, tuple) else type(batch).__name__
            raise TypeError(f"batch: expected a tuple (xs, targets), got {what}")
        xs, targets = batch
        for name, tree in (("params", params), ("state0", state0), ("xs", xs), ("targets", targets)):
            check_leaves(name, tree)
        if not jax.tree.leaves(xs):
            raise ValueError("xs: expected inputs [B, T, ...], got none")
        batched = {"xs": (xs, 2), "targets": (targets, 1)} | (
            {"state0": (state0, 1)} if self._state_axis == 0 else {}
        )
        sizes = {}
        for name, (tree, least) in batched.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                place = name + jax.tree_util.keystr(path)
                if np.ndim(leaf) < least:
                    expected = "batch and time" if least == 2 else "the batch"
                    raise ValueError(
                        f"{place}: expected {expected} as first axes, got shape {list(np.shape(leaf))}"
                    )
                sizes[place] = np.shape(leaf)[0]
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(f"batch: expected one number of sequences, at least 1, in all leaves, got {sizes}")

    def _one(self, params: Params, state0: State, xs: PyTree, target: PyTree) -> tuple[Recurrence, BoundLoss]:
        """Recurrence and loss of one sequence."""

        def loss(states: State) -> Array:
            return self._loss(params, states, target)

        return bind(self._step, params, state0, xs), bind_loss(loss)

    def _measured(self, params: Params, state0: State, xs: PyTree, targets: PyTree) -> _Measured:
        count, length = jax.tree.leaves(xs)[0].shape[:2]
        sampled = min(self._sequences, count)
        axes = (self._state_axis, 0, 0)

        def part(cut: slice) -> tuple[State, PyTree, PyTree]:
            xs_part, targets_part = jax.tree.map(lambda a: a[cut], (xs, targets))
            return state0 if axes[0] is None else jax.tree.map(lambda a: a[cut], state0), xs_part, targets_part

        def sequence(state0: State, xs: PyTree, target: PyTree) -> tuple[dict[str, Array], State]:
            recurrence, loss = self._one(params, state0, xs, target)
            signal = propagate_error_signal(check_step(recurrence), loss)
            params_grad = signal.done.params_grad
            rate = slope(signal.gains, signal.back)
            out_of_range = nonfinite.nonfinite((signal.done.signal.value, params_grad.value))
            return {
                "loss": signal.done.loss.value,
                "growth_rate": rate,
                "horizon": horizon(signal.gains, signal.back, rate, jnp.asarray(self._fraction)),
                "end_gain": signal.gains[0],
                "peak_gain": signal.peak,
                "params_grad_log_norm": params_grad.log_norm,
                "adjoint_log_norms": signal.adjoint_log_norms,
                # Of a loss that reads no state there is no signal, hence NaN, which is no fault.
                "finite": signal.finite & ~(signal.reads & jnp.isnan(signal.gains[0])),
                "in_range": ~jnp.any(out_of_range),
            }, signal.starts

        def value(state0: State, xs: PyTree, target: PyTree) -> Array:
            recurrence, loss = self._one(params, state0, xs, target)
            return loss(states_of(check_step(recurrence)))[0]

        found, starts = jax.vmap(sequence, axes)(*part(slice(sampled)))
        chosen = min(self._spectra, length)
        times = np.arange(1, chosen + 1) * length // chosen - 1
        owners = np.arange(chosen) % sampled
        at = jax.tree.map(lambda a: jnp.asarray(a)[owners, times], (starts, xs))
        num = None if self._num is None else check_num(self._num, jax.tree.map(lambda a: a[0, 0], starts))
        sv, ev = spectra_at(self._step, params, at[0], at[1], num)
        others = jax.vmap(value, axes)(*part(slice(sampled, None))) if count > sampled else jnp.zeros(0)
        fine = jnp.all(jnp.isfinite(others)) & ~jnp.any(nonfinite.nonfinite(params))
        return _Measured(**found, singular_values=sv, eigenvalues=ev, others_finite=fine)

    def _traced(self, params: Params, state0: State, xs: PyTree, targets: PyTree) -> tuple[Array, nonfinite.Trace]:
        def sequence(item: Any) -> nonfinite.Trace:
            h0, x, target = item if self._state_axis == 0 else (state0, *item)
            recurrence, loss = self._one(params, h0, x, target)
            return nonfinite.trace(check_step(recurrence), target, loss)

        # One after the other: it must fit where the loop's own update did.
        items = (state0, xs, targets) if self._state_axis == 0 else (xs, targets)
        return nonfinite.nonfinite(params), jax.lax.map(sequence, items)


def _scalars(found: _Measured) -> dict[str, float]:
    adjoints = found.adjoint_log_norms
    values = {
        "growth_rate": found.growth_rate,
        "horizon": found.horizon,
        "end_gain": found.end_gain,
        "peak_gain": found.peak_gain,
        "gradient_log_norm": found.params_grad_log_norm,
        "adjoint_log_norm/first": adjoints[:, 0],
        "adjoint_log_norm/last": adjoints[:, -1],
        "adjoint_log_norm/max": adjoints.max(axis=1),
        "spectral_norm": found.singular_values[:, 0],
        "spectral_radius": np.abs(found.eigenvalues[:, 0]),
    }
    medians = {f"bptt/{name}": _median(a) for name, a in values.items()}
    return {"bptt/loss": float(np.mean(found.loss, dtype=np.float64)), **medians}


def _median(values: Any) -> float:
    values = np.asarray(values, np.float64)
    known = values[~np.isnan(values)]
    return verdict.describe(known)["median"] if known.size else math.nan


def _finite(values: Any) -> np.ndarray:
    flat = np.ravel(values)
    return flat[np.isfinite(flat)]
