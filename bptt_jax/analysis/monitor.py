"""`Monitor`: a probe of the gradient flow in the user's own training loop, at every n-th update."""

import dataclasses
import math
import operator
import time
import warnings
from collections import deque
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Complex, Float

from bptt_jax import devices
from bptt_jax.analysis.backward import zero_or_lost
from bptt_jax.analysis.batches import Axes, batch_size, check_axes, item, leaf_axes
from bptt_jax.analysis.flow import check_levels, measure_flow, spectra_at
from bptt_jax.analysis.flow_results import GradientFlow, hardly_read
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.analysis.matrix_free import check_num
from bptt_jax.analysis.noise import GradientNoise, noise_of
from bptt_jax.analysis.nonfinite import (
    LeafNames,
    NonFinite,
    Trace,
    any_nan,
    any_nonfinite,
    leaf_names,
    locate_first,
    trace_nonfinite,
)
from bptt_jax.analysis.verdict import (
    SEVERITY,
    Verdict,
    describe,
    hardly_read_words,
    horizon_words,
    overall,
    with_error,
)
from bptt_jax.checks import (
    EIGEN,
    SINGULAR,
    check_cost,
    check_function,
    check_positive_int,
    notice_new_shape,
)
from bptt_jax.recurrence.linearization import Mode
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.results import Result, field
from bptt_jax.step import (
    Array,
    Loss,
    Params,
    PyTree,
    Recurrence,
    Sequence,
    State,
    Step,
    bind,
    check_step,
    full_precision,
    is_differentiable,
    ravel_state,
)
from bptt_jax.timeline import real_steps_first

_PROGRAMS = 8  # shapes for which a probe is kept compiled, some 20 MB each
_REMEMBERED = 10  # probes whose gradient norms are told with a NaN


class MonitorWarning(UserWarning):
    """The verdict has changed, or something has become NaN or infinite."""


class MonitorRecord(Result):
    """What one probe saw, in plain numbers.

    ``json.dumps(record.to_dict())`` is valid JSON, whatever was not finite.

    Attributes:
      update: the number that was given.
      verdict: of the sampled sequences, as `GradientFlow.verdict`; "non-finite" if any sequence of the batch is.
      scalars: name to float; the names are in the table of `Monitor`, always all of them, always in its order.
      histograms: name to a 1-D array of the finite values, possibly empty.
      nonfinite: where the first NaN or infinity is, if there is one.
    """

    update: int
    verdict: Verdict = field(static=True)
    scalars: dict[str, float]
    histograms: dict[str, np.ndarray]
    nonfinite: NonFinite | None

    @property
    def statement(self) -> str:
        """In one line."""
        if self.nonfinite is not None:
            return f"{self.verdict}: {self.nonfinite.statement}"
        return f"{self.verdict}: {_in_words(self.scalars)}"

    def _headline(self) -> str:
        return f"update {self.update}, {self.statement}"


class _Measured(NamedTuple):
    """Of the sampled sequences, and of K Jacobians.

    Attributes:
      flow: leaves ``[S, ...]``, what is never asked for left out.
      real: False in padding.
      singular_values, eigenvalues: NaN where there is no such Jacobian.
      fine: whether nothing anywhere is to be searched for a NaN.
      others_finite: whether the losses of all other sequences and the parameters are.
      noise: where asked for.
    """

    flow: GradientFlow
    real: Bool[Array, "S T"]
    singular_values: Float[Array, "K D"]
    eigenvalues: Complex[Array, "K D"]
    fine: Bool[Array, ""]
    others_finite: Bool[Array, ""]
    noise: GradientNoise | None


class Monitor:
    """Watches the gradient flow of a training loop, whoever wrote the loop.

    ``monitor(update, params, state0, xs, args)``, called once per update, returns a `MonitorRecord` at every n-th
    and None in between, at next to no cost; any logger may write its flat dictionaries. Measured is what
    ``jax.vmap`` of `bptt_jax.gradient_flow` with ``spectra=False`` measures of the first few sequences of the
    batch; spectra are those of a few Jacobians. Call it before an update that donates the parameters' buffers.

    Step, loss and arguments are those of `bptt_jax.gradient_flow`, of a whole batch: `in_axes` says where the
    batch is, as for `jax.vmap`. Sequences may be padded and begin anew (`bptt_jax.Sequence`): every number is that
    of the sequences without their padding. A loss that needs parameters of its own (a readout) finds them in
    `args`, beside what each sequence has for itself; what all sequences share there has the axis None, and counts
    as trained. A probe is compiled for each shape of a batch, and kept for a few: batches of any length are best
    padded to a few lengths (`bptt_jax.Sequence.pad_to`).

    It warns (`MonitorWarning`) when the verdict differs from that of the probe before, and when something is NaN or
    infinite in the forward or backward pass of the sampled sequences, the losses of the others, or the
    parameters: then the whole batch is searched for the first step in time, the array, and the norms before it
    (`NonFinite`). These are Python's `warnings`: shown without any set-up, and one filter silences them or turns
    them into an error that stops the training. Between two probes a NaN spreads into the parameters: where the loss
    of an update is not finite, `locate` with the parameters before that update says where it began.

    Scalars; logarithms are natural, rates in nats per step. Of several sequences or Jacobians the median is taken,
    NaN ones left out, if not said otherwise. A sequence whose loss has no derivative in any state (a readout of
    zeros) has no error signal: its rate, horizon and gains are NaN, its verdict is "unmeasured".

    ================================= ==========================================================================
    name                              value
    ================================= ==========================================================================
    bptt/loss                         mean loss of the sampled sequences
    bptt/growth_rate                  nats per step backwards, `PooledFlow.growth_rate`
    bptt/growth_rate_error            its standard error
    bptt/horizon                      steps, `PooledFlow.horizon`; may be inf
    bptt/horizon_extrapolated         1 if that lies beyond what was measured, else 0
    bptt/noise_horizon                the lag from which on noise prevails at the batch's size, `GradientNoise.horizon`;
                                      NaN without ``noise=``, or with one sequence
    bptt/noise_scale                  the batch size at which signal and noise of the whole gradient are alike,
                                      `GradientNoise.noise_scale`; NaN likewise
    bptt/hardly_read                  states on which the loss hardly depends (`share`), after those that it does
                                      depend on, if they are most of a sequence in most sequences; else 0
    bptt/end_gain                     log of what arrives at h_0 of the error signal, `GradientFlow.end_gain`
    bptt/peak_gain                    `GradientFlow.peak_gain`
    bptt/gradient_log_norm            log of the norm of one sequence's dL/dparams; -inf where it is zero, or lost
                                      beside the largest adjoint (`bptt_jax.adjoints`), as the line then says
    bptt/adjoint_log_norm/first       log of the norm of dL/dh_1
    bptt/adjoint_log_norm/last        log of the norm of dL/dh_T; -inf if the loss does not read h_T
    bptt/adjoint_log_norm/max         the largest over time
    bptt/spectral_norm                largest singular value of a Jacobian dh_t/dh_{t-1}
    bptt/spectral_radius              largest modulus of its eigenvalues
    bptt/verdict                      -1 unmeasured, 0 steady, 1 vanishing, 2 exploding, 3 non-finite
    bptt/verdict_share/unmeasured     share of the sampled sequences with this verdict
    bptt/verdict_share/steady
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
      loss: of one sequence, ``loss(states) -> scalar`` of h_1 .. h_T, leaves ``[T, ...]``; where the monitor is
        given `args`, ``loss(states, args)``.
      has_aux: whether the loss returns ``(scalar, aux)``; aux is not looked at.
      every: updates from probe to probe. 100 cost 0.3 to 3 % of a loop's time in `benchmarks/monitor.py`, more on
        a busy machine. ``bptt/monitor/share`` tells yours.
      sequences: how many of the batch are sampled, from its beginning: a shuffled batch is a random sample.
      spectra: of how many Jacobians in all, evenly spaced in time back from the last real step, from the sampled
        sequences by turns.
      num: of these spectra the first `num` values only, without any D x D matrix; see `bptt_jax.gradient_flow`.
      threshold, share: as for `bptt_jax.gradient_flow`.
      noise: of how many lags signal and noise are told apart (`bptt_jax.analysis.gradient_noise`), from the sampled
        sequences for the size of the whole batch: 4 sequences give no more than a rough idea. A lag costs some
        share of a backward pass of theirs, so that tens of them cost more than all else in a probe. None: of none.
      in_axes: where the batch is in ``(state0, xs, args)``, as for `jax.vmap`: by default in front of every leaf of
        `xs` and `args`, and nowhere in a `state0` that all sequences start from. States carried over from the batch
        before: ``(0, 0, 0)``. A readout beside the targets: ``(None, 0, {"readout": None, "target": 0})``.

    Raises:
      TypeError, ValueError: an argument is out of range.

    Example:
      >>> step = lambda params, h, x: jnp.tanh(params["w"] @ h + x)
      >>> loss = lambda states, args: jnp.square(args["readout"] @ states[-1] - args["target"])
      >>> monitor = bptt.Monitor(step, loss, in_axes=(None, 0, {"readout": None, "target": 0}))
      >>> params = {"w": 0.5 * jnp.eye(2), "readout": jnp.ones(2)}
      >>> xs, targets = jax.random.normal(jax.random.key(0), (8, 30, 2)), jnp.zeros(8)
      >>> record = monitor(0, params, jnp.zeros(2), xs, {"readout": params["readout"], "target": targets})
      >>> record.verdict, record.scalars["bptt/horizon"]
      ('vanishing', 6.0)
    """

    def __init__(
        self,
        step: Step,
        loss: Loss,
        *,
        has_aux: bool = False,
        every: int = 100,
        sequences: int = 4,
        spectra: int = 2,
        num: int | None = None,
        threshold: float = 1e-3,
        share: float = 1e-3,
        noise: int | None = None,
        in_axes: tuple[Axes, Axes, Axes] = (None, 0, 0),
    ) -> None:
        check_function("step", step, "step(params, state, x) -> state")
        check_function("loss", loss, "loss(states) -> scalar, or loss(states, args)")
        self._step, self._loss, self._has_aux = step, loss, has_aux
        self._every = check_positive_int("every", every)
        self._sequences = check_positive_int("sequences", sequences)
        self._spectra = check_positive_int("spectra", spectra)
        self._num = None if num is None else check_positive_int("num", num)
        self._noise = None if noise is None else check_positive_int("noise", noise)
        self._levels = check_levels(threshold, share)
        self._in_axes = check_axes(in_axes)
        self._measure = devices.compiled(self._measured, most=_PROGRAMS)
        self._trace = devices.compiled(self._traced, most=_PROGRAMS)
        self._last: MonitorRecord | None = None
        self._gradients: deque[float] = deque(maxlen=_REMEMBERED)
        self._ended = time.perf_counter()

    def __call__(
        self,
        update: int,
        params: Params,
        state0: State,
        xs: PyTree = None,
        args: PyTree = None,
        *,
        length: int | None = None,
    ) -> MonitorRecord | None:
        """Probes if `update` is a multiple of `every`, otherwise returns None.

        Args:
          update: its number; 0 is probed, and the first probe compiles.
          params: before the update.
          state0: h_0, one for all sequences, or one for each (`in_axes`).
          xs: inputs ``[B, T, ...]``, or a `bptt_jax.Sequence` of such; None for an autonomous step.
          args: of the loss, beside the states; leaves ``[B, ...]`` where `in_axes` does not say otherwise.
          length: T, needed where nothing in `xs` tells it.

        Raises:
          TypeError, ValueError: an argument breaks the contract (see `bptt_jax.step`), before any compilation.
        """
        if not hasattr(update, "__index__"):
            raise TypeError(f"update: expected an integer, got {type(update).__name__}")
        if operator.index(update) % self._every:
            return None
        return self._probe(update, params, state0, xs, args, length)

    def probe(
        self,
        update: int,
        params: Params,
        state0: State,
        xs: PyTree = None,
        args: PyTree = None,
        *,
        length: int | None = None,
    ) -> MonitorRecord:
        """Probes at once, whatever the number of the update; otherwise as a call."""
        return self._probe(update, params, state0, xs, args, length)

    def locate(
        self, params: Params, state0: State, xs: PyTree = None, args: PyTree = None, *, length: int | None = None
    ) -> NonFinite | None:
        """The first NaN or infinity in the forward and backward pass of the whole batch; None if there is none.

        Looks at every array of every sequence, one after the other; compiled when it is first needed. Arguments as
        of a call, with the parameters before the update whose loss or gradient was not finite.
        """
        given = params, state0, xs, args
        return self._locate(given, batch_size(params, given[1:], self._in_axes), length)

    def _locate(self, given: tuple[Any, ...], count: int, length: int | None) -> NonFinite | None:
        bad_params, nan_params, traces = jax.device_get(self._trace(*given, count=count, length=length))
        params, state0, xs, args = given
        xs = xs.xs if isinstance(xs, Sequence) else xs
        shared = np.asarray(self._shared(args), bool)
        names = LeafNames(leaf_names(params), leaf_names(state0), leaf_names(xs), leaf_names(args), shared)
        return locate_first(bad_params, nan_params, traces, names)

    def _probe(
        self, update: int, params: Params, state0: State, xs: PyTree, args: PyTree, length: int | None
    ) -> MonitorRecord:
        given = params, state0, xs, args
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
            raise TypeError(
                "Monitor: expected arrays of known numbers, got traced ones; call it in the loop, outside of jax.jit "
                "and jax.lax.scan, or gradient_flow within"
            )
        count = batch_size(params, given[1:], self._in_axes)
        notice_new_shape(self._step, tuple(np.shape(leaf) for leaf in jax.tree.leaves((state0, xs, args))))
        jax.block_until_ready(given)  # what is still running is the loop's own time
        start = time.perf_counter()
        found: _Measured = jax.device_get(self._measure(*given, count=count, length=length))
        where = None if found.fine.all() and found.others_finite else self._locate(given, count, length)
        verdicts = found.flow.verdicts.tolist()
        together = overall(verdicts) if found.others_finite else "non-finite"
        scalars = _scalars(found) | {
            "bptt/verdict": float(SEVERITY.index(together) - 1),
            **{f"bptt/verdict_share/{v}": verdicts.count(v) / len(verdicts) for v in SEVERITY},
            "bptt/non_finite/step": -1.0 if where is None else float(where.step),
            "bptt/non_finite/sequence": -1.0 if where is None else float(where.sequence),
        }
        histograms = {
            "bptt/adjoint_log_norms": _finite(found.flow.signal.adjoint_log_norms),
            "bptt/singular_values": _finite(found.singular_values),
            "bptt/eigenvalue_moduli": _finite(np.abs(found.eigenvalues)),
        }
        end = time.perf_counter()
        scalars |= {
            "bptt/monitor/seconds": end - start,
            "bptt/monitor/share": (end - start) / (end - self._ended),
        }
        record = MonitorRecord(operator.index(update), together, scalars, histograms, where)
        message = self._message(record)
        self._last, self._ended = record, end
        self._gradients.append(scalars["bptt/gradient_log_norm"])
        if message:
            warnings.warn(message, MonitorWarning, stacklevel=3)
        return record

    def _message(self, record: MonitorRecord) -> str:
        """What is new since the probe before."""
        parts = []
        before = record.verdict if self._last is None else self._last.verdict
        changed = record.verdict != before
        if changed:
            change = f"the verdict changes from {before} to {record.verdict}"
            parts.append(f"{change} ({_in_words(record.scalars)})")
        # Adjoints that overflow, in an explosion, are another matter than a NaN that follows.
        begins = self._last is None or self._last.nonfinite is None or (changed and record.verdict == "non-finite")
        if record.nonfinite is not None and begins:
            gradients = " ".join(f"{n:.4g}" for n in self._gradients)
            parts.append(
                f"{record.nonfinite.statement}; log gradient norms of the probes before: {gradients or 'none'}"
            )
        return f"update {record.update}: {'; '.join(parts)}" if parts else ""

    def _shared(self, args: PyTree) -> list[bool]:
        """Of every leaf of `args` that holds floating numbers: whether all sequences share it."""
        axes = leaf_axes("args", self._in_axes[2], args)
        return [
            axis is None for axis, leaf in zip(axes, jax.tree.leaves(args), strict=True) if is_differentiable(leaf)
        ]

    def _one(
        self, params: Params, batch: tuple[State, PyTree, PyTree], i: Array, length: int | None
    ) -> tuple[Recurrence, BoundLoss]:
        """Recurrence and loss of one sequence."""
        state0, xs, args = item(batch, self._in_axes, i)
        return check_step(bind(self._step, params, state0, xs, length)), bind_loss(self._loss, args, self._has_aux)

    def _measured(
        self, params: Params, state0: State, xs: PyTree, args: PyTree, *, count: int, length: int | None
    ) -> _Measured:
        batch = state0, xs, args
        sampled = min(self._sequences, count)

        def sequence(i: Array) -> tuple[GradientFlow, Array, tuple[State, PyTree, Array]]:
            recurrence, loss = self._one(params, batch, i, length)
            flow, signal = measure_flow(recurrence, self._levels, loss, spectra=False)
            grads = jax.tree.leaves(signal.done.loss.args)
            trained = [g for g, shared in zip(grads, self._shared(args), strict=True) if shared]
            fine = flow.numerics.finite & flow.numerics.in_range & ~jnp.any(any_nonfinite(trained))
            # What is left out here is not computed either: a gradient of the parameters for every step.
            without: dict[str, Any] = dict.fromkeys(("contributions", "leaves", "aux"))
            flow = dataclasses.replace(flow, **without)
            return flow, fine, (signal.done.along.starts, recurrence.instants.x, recurrence.real)

        def value(i: Array) -> Array:
            recurrence, loss = self._one(params, batch, i, length)
            return loss(states_of(recurrence))[0]

        with full_precision():
            flow, fine, along = jax.vmap(sequence)(jnp.arange(sampled))
            sv, ev = self._spectra_of(params, *along, flow.mode)
            noise = None
            if self._noise is not None and sampled > 1:
                noise = noise_of(lambda i: self._one(params, batch, i, length), sampled, count, self._noise)
        others = jax.vmap(value)(jnp.arange(sampled, count)) if count > sampled else jnp.zeros(0)
        others_finite = jnp.all(jnp.isfinite(others)) & ~jnp.any(any_nan(params))
        return _Measured(flow, along[2], sv, ev, fine, others_finite, noise)

    def _spectra_of(
        self, params: Params, starts: State, xs: PyTree, real: Bool[Array, "S T"], mode: Mode
    ) -> tuple[Float[Array, "K D"], Complex[Array, "K D"]]:
        """Of a few Jacobians at real steps, leaves ``[S, T, ...]``; NaN where there are not that many."""
        sampled, steps = real.shape
        index = jnp.arange(min(self._spectra, steps))
        owners = index % sampled
        lengths = jnp.sum(real, axis=1)[owners]
        chosen = jnp.minimum(self._spectra, lengths)
        order = (index + 1) * lengths // jnp.maximum(chosen, 1) - 1
        missing = index >= chosen
        times = jax.vmap(real_steps_first)(real)[owners, jnp.where(missing, 0, order)]
        states, inputs = jax.tree.map(lambda a: a[owners, times], (starts, xs))
        one = jax.tree.map(lambda a: a[0], states)
        num = None if self._num is None else check_num(self._num, one)
        if num is None:
            check_cost(
                "spectra",
                f"those of {len(index)} Jacobians",
                ravel_state(one)[0].size,
                len(index) * (SINGULAR + EIGEN),
                "num= finds the first few values without any such matrix",
            )
        sv, ev = spectra_at(self._step, params, states, inputs, num, mode)
        return jnp.where(missing[:, None], jnp.nan, sv), jnp.where(missing[:, None], jnp.nan, ev)

    def _traced(
        self, params: Params, state0: State, xs: PyTree, args: PyTree, *, count: int, length: int | None
    ) -> tuple[Array, Array, Trace]:
        def sequence(i: Array) -> Trace:
            return trace_nonfinite(*self._one(params, (state0, xs, args), i, length))

        # One after the other: it must fit where the loop's own update did.
        return any_nonfinite(params), any_nan(params), jax.lax.map(sequence, jnp.arange(count))


def _scalars(found: _Measured) -> dict[str, float]:
    flow, pooled = found.flow, found.flow.pooled()
    rows = zip(flow.signal.adjoint_log_norms, found.real, strict=True)
    adjoints = [row[real] if real.any() else np.full(1, np.nan) for row, real in rows]
    values = {
        "end_gain": flow.end_gain,
        "peak_gain": flow.peak_gain,
        "gradient_log_norm": flow.numerics.params_grad_log_norm,
        "adjoint_log_norm/first": [row[0] for row in adjoints],
        "adjoint_log_norm/last": [row[-1] for row in adjoints],
        "adjoint_log_norm/max": [row.max() for row in adjoints],
        "spectral_norm": found.singular_values[:, 0],
        "spectral_radius": np.abs(found.eigenvalues[:, 0]),
    }
    return {
        "bptt/loss": float(np.mean(flow.loss, dtype=np.float64)),
        "bptt/growth_rate": float(pooled.growth_rate),
        "bptt/growth_rate_error": float(pooled.growth_rate_error),
        "bptt/horizon": float(pooled.horizon),
        "bptt/horizon_extrapolated": float(pooled.horizon_extrapolated),
        "bptt/noise_horizon": math.nan if found.noise is None else float(found.noise.horizon),
        "bptt/noise_scale": math.nan if found.noise is None else float(found.noise.noise_scale),
        "bptt/hardly_read": float(hardly_read(flow)),
        **{f"bptt/{name}": _median(a) for name, a in values.items()},
    }


def _in_words(scalars: dict[str, float]) -> str:
    rate = with_error(scalars["bptt/growth_rate"], scalars["bptt/growth_rate_error"])
    beyond = scalars["bptt/horizon_extrapolated"] > 0
    horizon = horizon_words(scalars["bptt/horizon"], math.nan, beyond)
    unread = hardly_read_words(int(scalars["bptt/hardly_read"]))
    gradient = scalars["bptt/gradient_log_norm"]
    lost = zero_or_lost(scalars["bptt/adjoint_log_norm/max"]) if gradient == -math.inf else ""
    return "; ".join([f"{rate}, {horizon}", *filter(None, [unread, lost])])


def _median(values: Any) -> float:
    values = np.asarray(values, np.float64)
    known = values[~np.isnan(values)]
    return describe(known)["median"] if known.size else math.nan


def _finite(values: Any) -> np.ndarray:
    flat = np.ravel(values)
    return flat[np.isfinite(flat)]
