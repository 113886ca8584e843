"""What a type checker knows of the public names: read by ``mypy --strict`` beside an installed wheel, never run."""

from typing import Any, Literal, assert_type

import jax
import numpy as np
from matplotlib.figure import Figure

import bptt_jax as bptt
from bptt_jax.step import Step  # an alias: a function of the right form is a step


def leaky(params: jax.Array, state: jax.Array, x: jax.Array) -> jax.Array:
    return params * state + x


def last(states: jax.Array) -> jax.Array:
    return states[-1].sum()


def contract(key: jax.Array) -> None:
    step: Step = leaky
    cell = bptt.rnn(8, gain=0.9)
    for other in (bptt.gru(8), bptt.lstm(8), bptt.cells.lru(8), bptt.cells.leaky_rnn(8)):
        assert_type(other, bptt.Cell)
    assert_type(cell.init(key, 3), Any)  # a pytree: what it holds is the cell's business
    assert_type(bptt.lstm(8).step, Step)
    assert_type(bptt.stack(step, cell.step), Step)
    assert_type(bptt.remedies.clip_adjoints(step, max_norm=1.0), Step)
    assert_type(bptt.ravel_state(key)[0], jax.Array)
    assert_type(bptt.cells.LSTMState(key, key).c, jax.Array)
    assert_type(bptt.cells.LSTMParams(key, key, key).recurrent, jax.Array)


def measure(w: jax.Array, h0: jax.Array, xs: jax.Array) -> None:
    assert_type(bptt.jacobians(leaky, w, h0, xs), jax.Array)
    for spectrum in (
        bptt.singular_values,
        bptt.eigenvalues,
        bptt.linalg.spectral_norm,
        bptt.linalg.spectral_radius,
    ):
        assert_type(spectrum(xs), jax.Array)
    assert_type(bptt.linalg.condition_number(xs), jax.Array)
    assert_type(bptt.product_log_norms(xs), jax.Array)
    for products in (bptt.jacobian_product, bptt.linalg.prefix_products, bptt.linalg.suffix_products):
        assert_type(products(xs), bptt.linalg.LogScaled)
    assert_type(bptt.adjoints(leaky, w, h0, xs, last).log_norms, jax.Array)
    assert_type(bptt.temporal_contributions(leaky, w, h0, xs, last), bptt.analysis.TemporalContributions)
    assert_type(bptt.parallel.parallel_adjoints(xs, h0), bptt.parallel.ParallelAdjoints)
    flow = bptt.gradient_flow(leaky, w, h0, xs, last, stride=2)
    assert_type(flow, bptt.analysis.GradientFlow)
    assert_type(flow.statement, str)
    assert_type(flow.signal.log_gains, jax.Array)
    influence = bptt.influence_map(leaky, w, h0, xs)
    assert_type(influence, bptt.analysis.InfluenceMap)
    assert_type(influence.log_norms, jax.Array)
    assert_type(influence.to_dict(), dict[str, Any])
    exponents = bptt.lyapunov_exponents(leaky, w, h0, xs, num=2)
    assert_type(exponents.exponents, jax.Array)
    assert_type(exponents.statement, str)
    assert_type(bptt.analysis.leading_singular_values(leaky, w, h0, xs, num=1), bptt.analysis.LeadingValues)
    assert_type(bptt.analysis.leading_eigenvalues(leaky, w, h0, xs, num=1), bptt.analysis.LeadingValues)
    assert_type(bptt.analysis.product_singular_values(leaky, w, h0, xs, num=1), bptt.analysis.LeadingLogValues)
    assert_type(bptt.plot_gradient_flow({"leaky": flow}), Figure)


def mend(w: jax.Array, h0: jax.Array, xs: jax.Array) -> None:
    assert_type(bptt.truncation_bias(leaky, w, h0, xs, last), bptt.analysis.TruncationBias)
    by_lag = bptt.temporal_contributions(leaky, w, h0, xs, last).log_norms[::-1]
    assert_type(bptt.analysis.adaptive_window(by_lag, 0.5), bptt.analysis.AdaptiveWindow)
    assert_type(bptt.analysis.gradient_by_lag(leaky, w, h0, xs, last), bptt.analysis.GradientByLag)
    noise = bptt.analysis.gradient_noise(leaky, w, h0, xs[None], last)
    assert_type(noise, bptt.analysis.GradientNoise)
    assert_type(noise.batch_needed, jax.Array)
    precision = bptt.analysis.gradient_precision(leaky, w, h0, xs, last, dtype="bfloat16")
    assert_type(precision, bptt.analysis.GradientPrecision)
    assert_type(precision.digits, jax.Array)
    assert_type(
        bptt.remedies.omega_penalty(bptt.remedies.omega_terms(leaky, w, h0, xs, last), version="code"), jax.Array
    )
    assert_type(bptt.remedies.flossing_penalty(leaky, w, h0, xs, num=1), jax.Array)
    for record in bptt.remedies.clip_records(()):
        assert_type(record.share, jax.Array)
    assert_type(bptt.cells.initializers.chrono(100)(w, (4, 8)), jax.Array)


def in_parallel(w: jax.Array, h0: jax.Array, xs: jax.Array) -> None:
    assert_type(bptt.predict_parallel(leaky, w, h0, xs).verdict, Literal["parallel", "sequential", "undecided"])
    assert_type(bptt.deer(leaky, w, h0, xs).converged, jax.Array)


def watch(w: jax.Array, h0: jax.Array, xs: jax.Array) -> None:
    monitor = bptt.Monitor(leaky, last, every=10)
    record = monitor(0, w, h0, xs)
    assert_type(record, bptt.analysis.MonitorRecord | None)
    if record is not None:
        assert_type(record.scalars, dict[str, float])
        assert_type(record.nonfinite, bptt.analysis.NonFinite | None)
        assert_type(record.to_dict(), dict[str, Any])


def wrong(w: jax.Array, h0: jax.Array, xs: np.ndarray[Any, Any]) -> None:
    """Each line is an error; were it none, its comment would be one."""
    bptt.rnn("8")  # type: ignore[arg-type]
    bptt.gradient_flow(leaky, w, h0, xs)  # type: ignore[call-arg]
    bptt.deer(leaky, w, h0, xs, jacobian="none")  # type: ignore[arg-type]
    bptt.remedies.autoclip(window="long")  # type: ignore[arg-type]
    bptt.no_such_name  # type: ignore[attr-defined]  # noqa: B018
    bptt.predict_parallel(leaky, w, h0, xs).exponnt  # type: ignore[attr-defined]  # noqa: B018
    bptt.analysis.InfluenceMap(h0)  # type: ignore[call-arg]
