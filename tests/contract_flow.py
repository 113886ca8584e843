"""What is measured of the gradient. The signal of each piece is followed alone; its logarithms make one line."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from contract_cases import Case, Comparison, Plan, at_step, at_steps, floats, log, log_norms, loss, real_vector
from contract_estimators import readings
from contract_products import factors, log_spectral_norms
from contract_spine import args_of, contributions_against_truth, only_loss

import bptt_jax as bptt

SHARE = THRESHOLD = 1e-3  # the defaults


class Line(NamedTuple):
    """What is read off the logarithms of a signal on its way back through every piece."""

    rate: float
    horizon: float
    extrapolated: bool
    cut_lag: int
    end_gain: float


def line_through(ways: list[np.ndarray]) -> Line:
    """`ways`: of each piece, in order of time, the gains at the lags 0, 1, ..., -inf where the signal is zero."""
    slope, weight, count = 0.0, 0.0, 0
    for way in ways:
        stretch = living(way)
        lags = np.arange(len(stretch)) - (len(stretch) - 1) / 2
        slope, weight, count = slope + lags @ stretch, weight + lags @ lags, count + max(0, len(stretch) - 1)
    rate = slope / weight if count > 1 else np.nan
    if sum(len(way) - 1 for way in ways) < 2:
        return Line(rate, np.nan, False, -1, np.nan)
    longest = max(reversed(ways), key=len)
    begin = np.argmax(longest > -np.inf)
    died = begin + len(living(longest))
    cut = died if 0 < died < len(longest) else -1
    known = longest[:-1] if cut == len(longest) - 1 else longest
    length, end, level = len(known) - 1, known[-1], np.log(THRESHOLD)
    if end < level:
        return Line(rate, 1 + max((k for k, gain in enumerate(known) if gain >= level), default=0), False, cut, end)
    return Line(rate, length + (level - end) / rate if rate < 0 else np.inf + 0 * rate, True, cut, end)


def living(way: np.ndarray) -> np.ndarray:
    """From where anything arrives to where nothing does any more."""
    alive = way > -np.inf
    begin = np.argmax(alive) if alive.any() else len(way)
    rest = alive[begin:]
    return way[begin:][: len(rest) if rest.all() else np.argmin(rest)]


class Flow(NamedTuple):
    """What `gradient_flow` ought to say, by step and as a whole."""

    lags: np.ndarray
    gains: np.ndarray
    leaf_gains: np.ndarray
    whole: Line
    leaves: list[Line]
    reach: int
    peak: float


def flow_of(case: Case, plan: Plan) -> Flow:
    truth, leaves = case.truth(plan), leaf_slices(case.problem.state0)
    adjoints = log_norms(truth.adjoints)
    lags, gains = np.zeros(plan.steps, int), np.full(plan.steps, np.nan)
    leaf_gains = np.full((plan.steps, len(leaves)), np.nan)
    ways: list[np.ndarray] = []
    peak = -np.inf
    for steps, read in readings(case, plan):
        size = np.max(np.abs(read), axis=1)
        come_in = log(np.cumsum(np.linalg.norm(read[::-1], axis=1))[::-1])
        peak = max([peak, *(adjoints[k] - c for k, c in zip(steps, come_in, strict=True) if c > -np.inf)])
        if not size.any():
            continue
        last = int(np.max(np.flatnonzero(size > SHARE * size.max())))
        signal = read[last] / np.linalg.norm(read[last])
        way = [[*map(np.linalg.norm, [signal, *(signal[leaf] for leaf in leaves)])]]
        for i in range(last, -1, -1):
            signal = truth.jacobians[steps[i]].T @ signal
            way.append([*map(np.linalg.norm, [signal, *(signal[leaf] for leaf in leaves)])])
            lags[steps[i]] = last + 1 - i
            gains[steps[i]], leaf_gains[steps[i]] = log(way[-1])[0], log(way[-1])[1:]
        ways.append(log(way))
    whole, *by_leaf = [line_through([way[:, i] for way in ways]) for i in range(1 + len(leaves))]
    return Flow(lags, gains, leaf_gains, whole, by_leaf, max((len(way) - 1 for way in ways), default=0), peak)


def leaf_slices(state: Any) -> list[slice]:
    """Of each floating leaf, where its numbers are in the vector."""
    sizes = [a.size * (1 + jnp.iscomplexobj(a)) for a in jax.tree.leaves(floats(state)[0])]
    return [slice(end - size, end) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]


def _pieces(plan: Plan) -> np.ndarray:
    numbers, number, begins = np.full(plan.steps, -1), 0, False
    for t, (real, reset) in enumerate(zip(plan.mask, plan.flags, strict=True)):
        begins |= reset
        if real:
            number, begins = number + begins, False
            numbers[t] = number
    return numbers


def check_gradient_flow(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        truth, expected, got = (
            case.truth(plan),
            flow_of(case, plan),
            _flow(case, case.arguments(plan), args_of(case, plan)),
        )
        adjoints = np.where(plan.mask, log_norms(truth.adjoints), np.nan)
        yield Comparison("loss", got.loss, truth.loss)
        yield Comparison("aux", got.aux, truth.aux)
        yield Comparison("adjoint_log_norms", got.signal.adjoint_log_norms, adjoints, True)
        yield Comparison("lags", got.signal.lags, expected.lags)
        yield Comparison("piece", got.signal.piece, _pieces(plan))
        yield Comparison("log_gains", got.signal.log_gains, expected.gains, True)
        yield Comparison("leaves", got.leaves.log_norms, expected.leaf_gains, True)
        yield Comparison("reach", got.reach, expected.reach)
        yield Comparison("peak_gain", got.peak_gain, expected.peak, True)
        yield from _against_line("", got, expected.whole)
        yield Comparison("cut_lag", got.cut_lag, expected.whole.cut_lag)
        yield Comparison("end_gain", got.end_gain, expected.whole.end_gain, True)
        for i, line in enumerate(expected.leaves):
            yield from _against_line(f"leaf {i}: ", jax.tree.map(lambda a, i=i: a[..., i], got.leaves), line)
        yield from contributions_against_truth(case, plan, got.contributions)
        size = np.linalg.norm(truth.contributions.sum(axis=0))
        yield Comparison("params_grad_log_norm", got.numerics.params_grad_log_norm, log(size), True)
        found = got.numerics.finite, got.numerics.first_nonfinite_state, got.numerics.first_nonfinite_adjoint
        yield Comparison("numerics", found, (True, -1, -1))
        if got.products is not None:
            yield from _dense_against_truth(case, plan, got)
    whole = _flow(case, case.arguments(case.plans[0]), args_of(case, case.plans[0]))
    pieces = [(steps, _flow(case, arguments, args)) for steps, arguments, args in case.alone(case.plans[0])]
    for steps, alone in pieces:
        got, expected = (
            (f.signal.adjoint_log_norms, f.signal.log_gains, f.leaves.log_norms) for f in (whole, alone)
        )
        yield Comparison("of the piece", at_steps(got, steps), expected, True)
        if whole.products is not None:
            norms = [(f.products.log_norms, f.products.block_log_norms) for f in (whole, alone)]
            yield Comparison("norms of the piece", at_steps(norms[0], steps), norms[1], True)
    if len(pieces) == 1:
        got, expected = (
            (
                f.growth_rate,
                f.growth_rate_error,
                f.end_gain,
                f.peak_gain,
                f.leaves.growth_rate,
                f.leaves.growth_rate_error,
            )
            for f in (whole, alone)
        )
        yield Comparison("the only piece", got, expected, True)
    weights = np.asarray([alone.signal.weight for _, alone in pieces])
    yield Comparison("weight", whole.signal.weight, weights.sum())
    rates = np.asarray([alone.growth_rate for _, alone in pieces])
    if not np.isnan(rates).any():
        yield Comparison("pooled rate", whole.growth_rate, weights @ rates / weights.sum(), True)


def _flow(case: Case, arguments: tuple[Any, ...], args: Any) -> bptt.analysis.GradientFlow:
    return bptt.gradient_flow(*arguments, loss, args=args, has_aux=True, spectra=not case.entry.large)


def _against_line(what: str, got: Any, expected: Line) -> Iterator[Comparison]:
    yield Comparison(f"{what}growth_rate", got.growth_rate, expected.rate, True)
    yield Comparison(
        f"{what}whether its error is known", ~np.isnan(got.growth_rate_error), ~np.isnan(expected.rate)
    )
    yield Comparison(f"{what}horizon_extrapolated", got.horizon_extrapolated, expected.extrapolated)
    # Of a rate near zero nobody knows whether its horizon is far behind or before.
    yield Comparison(f"{what}horizon", 1 / got.horizon, 1 / np.float64(expected.horizon), True)


def _dense_against_truth(case: Case, plan: Plan, got: bptt.analysis.GradientFlow) -> Iterator[Comparison]:
    parts, leaves = factors(case, plan), leaf_slices(case.problem.state0)
    ends = [*np.flatnonzero(parts.resets) - 1, len(parts.steps) - 1]
    norms, blocks = np.full(plan.steps, np.nan), np.full((plan.steps, len(leaves)), np.nan)
    for i, k in enumerate(parts.steps):
        product = parts.products[min(end for end in ends if end >= i), i]
        norms[k] = log_spectral_norms(product)
        blocks[k] = [log_spectral_norms(product[leaf, leaf]) for leaf in leaves]
    yield Comparison("product norms", got.products.log_norms, norms, True)
    if len(leaves) > 1:
        yield Comparison("block norms", got.products.block_log_norms, blocks, True)
    n = len(parts.steps)
    steps, values = np.full(plan.steps, -1), np.full((plan.steps, case.truth(plan).jacobians.shape[-1]), np.nan)
    steps[:n], values[:n] = parts.steps + 1, np.linalg.svd(parts.jacobians, compute_uv=False)
    yield Comparison("steps", got.spectra.steps, steps)
    yield Comparison("singular_values", got.spectra.singular_values, values)
    eigenvalues = np.asarray(got.spectra.eigenvalues, np.complex128)
    yield Comparison("order of eigenvalues", -np.sort(-np.abs(eigenvalues), axis=1), np.abs(eigenvalues))
    # Each by itself may be known to few digits; their polynomial is known to all.
    polynomials = [
        [np.poly(e / scale), np.poly(matrix / scale)]
        for e, matrix, scale in zip(eigenvalues[:n], parts.jacobians, values[:n, 0] + 1e-300, strict=True)
    ]
    yield Comparison("characteristic polynomials", *np.swapaxes(polynomials, 0, 1), slack=10)


def check_monitor(case: Case) -> Iterator[Comparison]:
    """Of one sequence, what its flow says."""
    spectra, num = (2, 1) if case.entry.large else (case.plans[0].steps, None)
    monitor = bptt.Monitor(case.problem.step, loss, has_aux=True, spectra=spectra, num=num)
    for plan in case.plans:
        _, params, state0, xs = case.arguments(plan)
        args = args_of(case, plan)
        flow = _flow(case, case.arguments(plan), args)
        batch = jax.tree.map(lambda a: jnp.asarray(a)[None], (xs, args))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bptt.analysis.MonitorWarning)  # that another plan has another verdict
            record = monitor(0, params, state0, *batch)
        adjoints = np.asarray(flow.signal.adjoint_log_norms)
        adjoints = adjoints[~np.isnan(adjoints)]
        expected = {
            "growth_rate": flow.growth_rate,
            "growth_rate_error": flow.growth_rate_error,
            "end_gain": flow.end_gain,
            "peak_gain": flow.peak_gain,
            "gradient_log_norm": flow.numerics.params_grad_log_norm,
            "adjoint_log_norm/first": adjoints[0],
            "adjoint_log_norm/last": adjoints[-1],
            "adjoint_log_norm/max": adjoints.max(),
        }
        if flow.spectra is not None:
            norms = np.asarray(flow.spectra.singular_values[:, 0], np.float64)
            median = np.quantile(norms[~np.isnan(norms)], 0.5, method="inverted_cdf")
            yield Comparison("spectral_norm", record.scalars["bptt/spectral_norm"], median)
        got = {name: record.scalars[f"bptt/{name}"] for name in expected}
        yield Comparison("scalars", got, expected, True)
        yield Comparison("loss", record.scalars["bptt/loss"], flow.loss)
        yield Comparison("horizon", 1 / np.float64(record.scalars["bptt/horizon"]), 1 / flow.horizon, True)
        yield Comparison("verdict", record.verdict == flow.verdict, True)
        yield Comparison("all finite", record.nonfinite is None, True)


def check_omega(case: Case) -> Iterator[Comparison]:
    """Where no error signal arrives there is no term. A term is ``(ratio - 1)^2``, and the ratio has its rounding."""

    def from_one(terms: Any) -> Any:
        return 1 + np.sqrt(np.asarray(terms, np.float64))

    for plan in case.plans:
        truth = case.truth(plan)
        terms, valid = np.zeros(plan.steps), np.zeros(plan.steps, bool)
        for k in np.flatnonzero(plan.mask):
            signal = real_vector(at_step(truth.adjoints, k))
            size = signal @ signal
            valid[k] = size >= 1e-20
            terms[k] = (np.sum((truth.jacobians[k].T @ signal) ** 2) / size - 1) ** 2 if size else 0
        got = bptt.remedies.omega_terms(*case.arguments(plan), only_loss, args=args_of(case, plan))
        yield Comparison("terms", from_one(got.terms), from_one(terms))
        yield Comparison("valid", got.valid, valid)
        paper, code = (bptt.remedies.omega_penalty(got, version=version) for version in ("paper", "code"))
        yield Comparison("paper", from_one(paper), from_one(terms.sum()))
        yield Comparison("code", from_one(code), from_one(terms[valid].sum() / max(1, valid.sum())))
    whole = bptt.remedies.omega_terms(*case.arguments(case.plans[0]), only_loss, args=args_of(case, case.plans[0]))
    for steps, arguments, args in case.alone(case.plans[0]):
        alone = bptt.remedies.omega_terms(*arguments, only_loss, args=args)
        yield Comparison("of the piece", from_one(at_steps(whole.terms, steps)), from_one(alone.terms))
