"""What is seen of a training: the state of a run, its metrics, and what the log says of a chunk of updates."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import optax

from bptt_jax.experiments.network import NetworkParams
from bptt_jax.remedies.clipping import clip_records, skip_records
from bptt_jax.results import Result, counted
from bptt_jax.step import Array, State

Record: TypeAlias = dict[str, Any]

RECENT = 100  # updates against which a jump of the loss is seen
_JUMP = 3.0
_OF_CHUNKS = ["updates", "seeds", "loss", "gradient_log_norm", "gradient_log_norm_max", "non_finite", "clipped"]
_OF_CHUNKS += ["skipped", "validation_loss", "validation_error", "solved_at", "probes"]
_OF_CHUNKS += ["window", "bias_bound", "lag_rate"]
_OF_EVENTS = ["event", "seed", "updates", "loss", "losses_before", "gradient_log_norms_before"]
_LED_TO = 10  # updates reported before an event


class Metrics(NamedTuple):
    """Of one update: the mean loss of its batch, and the natural log of its gradient's global norm, unclipped."""

    loss: Array
    gradient_log_norm: Array


class Carried(NamedTuple):
    """What stateful training takes along from window to window of its B streams.

    Attributes:
      states: of the recurrence, leaves ``[B, ...]``.
      position: steps that have been read of every stream, int32.
      window: steps of the next windows, int32, where they are chosen while training; else 0.
    """

    states: State
    position: Array
    window: Array


class TrainState(NamedTuple):
    """All that a run goes on from; of several seeds every leaf has a leading axis.

    Attributes:
      seed: int32, of weights, batches and validation.
      updates: how many were made, int32.
      params, opt_state: of network and optimiser.
      running: False once solved or lost.
      solved_at: the update after which the criterion was first seen to be met; -1 before.
      recent: `Metrics` of the latest 100 updates; NaN where there were none.
      carried: of stateful training; None where every update begins from the initial state.
    """

    seed: Array
    updates: Array
    params: NetworkParams
    opt_state: optax.OptState
    running: Array
    solved_at: Array
    recent: Metrics
    carried: Carried | None = None


class Truncation(NamedTuple):
    """Of each seed: the bound on the bias of a window, and the gradient's decay with the lag, nats per step."""

    bias: Array
    rate: Array


class Training(Result):
    """A finished run.

    Attributes:
      states: the last `TrainState`, leaves ``[S, ...]``.
      records: what the log holds, in order, in plain JSON types (non-finite numbers are the strings that ``float``
        reads). Of each chunk, lists by seed, None for a seed that had stopped: "updates" (the number of the last
        one), "seeds", "loss" (mean), "gradient_log_norm" (median, natural log) and its "_max", all three of what
        is finite, "non_finite" (how many losses are not), "clipped" and "skipped" (shares of the chunk's updates;
        None where nothing keeps a record), "validation_loss" and "_error", "solved_at", "probes"; of stateful training
        "window", the steps of its windows, else None; where they are chosen, "bias_bound" of this window after the
        chunk, and "lag_rate" (`bptt_jax.analysis.AdaptiveWindow`), else None. Of each event,
        the first of its kind in a chunk: "event" ("non-finite", "jump" or "lost"), "seed", "updates" (the number of
        the update; of a seed that is lost, the first of the chunk's last stretch without a finite loss), "loss",
        and of the ten updates before, "losses_before" and "gradient_log_norms_before".
    """

    states: TrainState
    records: list[Record]

    @property
    def events(self) -> list[Record]:
        """The records of what went wrong."""
        return [r for r in self.records if "event" in r]

    def _headline(self) -> str:
        at, made = np.asarray(self.states.solved_at), int(np.max(self.states.updates))
        solved, lost = at[at >= 0], int(np.sum(~np.asarray(self.states.running) & (at < 0)))
        when = sorted({int(np.min(solved, initial=made)), int(np.max(solved, initial=0))})
        text = f"{len(solved)} of {counted(len(at), 'seed')} solved it in {counted(made, 'update')}"
        text += f", after {' to '.join(map(str, when))}" if solved.size else ""
        text += f", {lost} lost" if lost else ""
        return text + (f"; {counted(len(self.events), 'event')}" if self.events else "")


def describe(event: Record) -> str:
    """An event in one line."""
    norms = " ".join(f"{np.exp(np.float64(n)):.3g}" for n in event["gradient_log_norms_before"])
    what = {
        "non-finite": f"the loss is {event['loss']}",
        "jump": f"the loss jumps to {float(event['loss']):.3g}, above the trivial one and more than three times "
        f"the largest of the last {min(RECENT, event['updates'] - 1)}",
        "lost": f"lost: its parameters, or all of its last {RECENT} losses, are not finite",
    }[event["event"]]
    return f"seed {event['seed']}, update {event['updates']}: {what}; gradient norms before: {norms or 'none'}"


def flaw(record: Record, seeds: int) -> str:
    """What a line of a log lacks of what `Training` describes, or has of another kind; nothing of one that is whole."""
    names = _OF_EVENTS if "event" in record else _OF_CHUNKS
    if lacking := [name for name in names if name not in record]:
        return f"it has no {', '.join(lacking)}"
    wrong = [name for name in names if not _as_described(name, record[name], "event" in record, seeds)]
    return f"its {wrong[0]} is of another kind" if wrong else ""


def _as_described(name: str, value: Any, of_event: bool, seeds: int) -> bool:
    if name in ("updates", "seed"):
        return type(value) is int
    if name == "event":
        return value in ("non-finite", "jump", "lost")
    if name == "probes":
        return isinstance(value, dict)
    if name == "loss" and of_event:
        return _is_number(value)
    if name in ("clipped", "skipped", "window", "bias_bound", "lag_rate") and value is None:
        return True
    if name == "window":
        return type(value) is int
    whole = name in ("seeds", "non_finite", "solved_at")
    return (
        isinstance(value, list)
        and (of_event or len(value) == seeds)
        and all(v is None or (type(v) is int if whole else _is_number(v)) for v in value)
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or value in ("nan", "inf", "-inf")


def seen(state: TrainState) -> TrainState:
    """Without what no record is made of: the parameters, and all of the optimiser's state but its own records."""
    records = {"clipped": clip_records(state.opt_state), "skipped": skip_records(state.opt_state)}
    return state._replace(params=None, opt_state=records, carried=None)  # type: ignore[arg-type]


def record_of(
    before: TrainState,
    after: TrainState,
    metrics: Metrics,
    loss: Array,
    error: Array,
    probed: dict[str, Array],
    window: int | None,
    truncation: Truncation | None,
) -> Record:
    """Of a chunk, as `Training` describes it."""
    was = np.asarray(before.running)

    def of_running(values: Any) -> list[Any]:
        return [v if r else None for v, r in zip(np.asarray(values).tolist(), was, strict=True)]

    def shares(kind: str) -> list[Any] | None:
        # Where several of a kind act in sequence, the share cannot tell whose it is; it is cut at the whole.
        pairs = list(zip(before.opt_state[kind], after.opt_state[kind], strict=True))
        made = np.maximum(np.asarray(after.updates - before.updates), 1)
        acted = sum(np.asarray(b.acted) - np.asarray(a.acted) for a, b in pairs)
        return of_running(np.minimum(acted / made, 1)) if pairs else None

    losses, norms = (np.asarray(m, np.float64) for m in metrics)

    def of_finite(summary: Callable[[np.ndarray], Any], values: np.ndarray) -> list[Any]:
        finite = (column[column < np.inf] for column in values.T)  # -inf is the log of the norm 0
        return of_running([float(summary(f)) if f.size else math.nan for f in finite])

    return {
        "updates": int(np.max(after.updates)),
        "seeds": np.asarray(after.seed).tolist(),
        "loss": of_finite(np.mean, losses),
        "gradient_log_norm": of_finite(partial(np.quantile, q=0.5, method="inverted_cdf"), norms),
        "gradient_log_norm_max": of_finite(np.max, norms),
        "non_finite": of_running(np.sum(~np.isfinite(losses), axis=0)),
        "clipped": shares("clipped"),
        "skipped": shares("skipped"),
        "validation_loss": of_running(loss),
        "validation_error": of_running(error),
        "solved_at": [n if n >= 0 else None for n in np.asarray(after.solved_at).tolist()],
        "probes": {name: of_running(values) for name, values in probed.items()},
        "window": window,
        "bias_bound": None if truncation is None else of_running(truncation.bias),
        "lag_rate": None if truncation is None else of_running(truncation.rate),
    }


def events_of(before: TrainState, after: TrainState, metrics: Metrics, baseline: float) -> list[Record]:
    """The first loss of the chunk that is not finite, the first that jumps, and seeds that are lost, by update."""
    found = []
    n = len(metrics.loss)
    for i in np.flatnonzero(before.running):
        losses, norms = (
            np.concatenate([np.asarray(r)[i], np.asarray(m)[:, i]])
            for r, m in zip(before.recent, metrics, strict=True)
        )
        windows = np.lib.stride_tricks.sliding_window_view(losses[:-1], RECENT)
        largest = np.max(np.where(np.isfinite(windows), windows, -np.inf), axis=1)
        latest = losses[RECENT:]
        # A small loss that triples is noise; one that does so and is worse than the trivial predictor's is not.
        jumps = np.isfinite(latest) & np.isfinite(largest) & (latest > np.maximum(_JUMP * largest, baseline))
        kinds = [("non-finite", np.flatnonzero(~np.isfinite(latest))), ("jump", np.flatnonzero(jumps))]
        if not after.running[i] and after.solved_at[i] < 0:
            good = np.flatnonzero(np.isfinite(latest))
            kinds.append(("lost", np.array([min(good[-1] + 1 if good.size else 0, n - 1)])))
        for kind, at in kinds:
            if at.size:
                k = int(at[0])
                led_to = slice(RECENT + k - _LED_TO, RECENT + k)
                known = min(_LED_TO, int(before.updates[i]) + k)
                found.append(
                    {
                        "event": kind,
                        "seed": int(before.seed[i]),
                        "updates": int(before.updates[i]) + k + 1,
                        "loss": float(latest[k]),
                        "losses_before": losses[led_to][_LED_TO - known :].tolist(),
                        "gradient_log_norms_before": norms[led_to][_LED_TO - known :].tolist(),
                    }
                )
    return sorted(found, key=lambda event: event["updates"])
