"""Other gradients than the whole. Windows begin anew with every piece, so that the pieces' gradients add up."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contract_cases import (
    Case,
    Comparison,
    Plan,
    at_step,
    by_lag,
    floats,
    log,
    perturbed_loss,
    real_vector,
    same_dtypes,
    size_of,
)
from contract_spine import args_of, only_loss

import bptt_jax as bptt


def truncated(case: Case, plan: Plan, k1: int, k2: int) -> np.ndarray:
    """By real numbers."""
    truth = case.truth(plan)
    total = np.zeros(truth.params_jacobians.shape[-1])
    for steps, read in readings(case, plan):
        size = len(steps)
        ends = [*range(k1, size, k1), size]
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            signal = np.zeros(truth.jacobians.shape[-1])
            for i in range(end - 1, max(0, end - k2) - 1, -1):
                signal = signal + (read[i] if i >= begin else 0)
                total += truth.params_jacobians[steps[i]].T @ signal
                signal = truth.jacobians[steps[i]].T @ signal
    return total


def readings(case: Case, plan: Plan) -> Iterator[tuple[list[int], np.ndarray]]:
    """The steps of each piece, and the immediate derivatives by their states, those by the held ones included."""
    owner = np.maximum.accumulate(np.where(plan.mask, np.arange(plan.steps), -1))
    immediate = case.truth(plan).immediate
    for _, steps in plan.pieces:
        yield steps, np.stack([immediate[owner == k].sum(axis=0) for k in steps])


def check_tbptt(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        for k1, k2 in ((1, 2), (2, 3), (13, 13)):
            got = bptt.estimators.tbptt(*case.arguments(plan), only_loss, args=args_of(case, plan), k1=k1, k2=k2)
            yield Comparison(f"k1={k1}, k2={k2}", real_vector(got), truncated(case, plan, k1, k2))
        yield same_dtypes("gradient", got, floats(case.problem.params)[0])


def check_truncation_bias(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        got = bptt.truncation_bias(*case.arguments(plan), only_loss, args=args_of(case, plan))
        windows = [int(k) for k in got.windows]
        found = [truncated(case, plan, 1, k) for k in windows]
        full = truncated(case, plan, plan.steps, plan.steps)
        size = np.linalg.norm(full)
        with np.errstate(invalid="ignore", divide="ignore"):
            errors = [np.linalg.norm(g - full) / size for g in found]
            cosines = [g @ full / (np.linalg.norm(g) * size) for g in found]
        yield Comparison(
            "relative_error", 1 + got.relative_error, 1 + np.asarray(errors)
        )  # to roundings of the whole
        yield Comparison("cosine", got.cosine, np.asarray(cosines))


def check_gradient_by_lag(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        lags = range(plan.steps)
        got = bptt.analysis.gradient_by_lag(*case.arguments(plan), only_loss, args=args_of(case, plan), parts=lags)
        parts = by_lag(case.name, plan)
        whole = truncated(case, plan, plan.steps, plan.steps)
        found = np.stack([real_vector(at_step(got.parts.value, k)) for k in lags])
        yield Comparison("parts", found, parts)
        yield Comparison("their sum", found.sum(axis=0), whole)
        yield same_dtypes("a part", at_step(got.parts.mantissa, 0), floats(case.problem.params)[0])
        log_norms = log(np.linalg.norm(parts, axis=1))
        # What is left of large summands in opposite directions is known to the roundings of these.
        unsure = log_norms < log(np.linalg.norm(parts)) - 12
        yield Comparison("log_norms", np.where(unsure, 0, got.log_norms), np.where(unsure, 0, log_norms), True)
        yield Comparison("whole_log_norm", got.whole_log_norm, log(np.linalg.norm(whole)), True)
        with np.errstate(invalid="ignore"):
            yield Comparison("shares", got.shares, parts @ whole / (whole @ whole))


def check_gradient_noise(case: Case) -> Iterator[Comparison]:
    """Three sequences that differ in the size of their loss alone."""
    sizes = np.asarray([1.0, 2.0, -0.5])
    signal, noise = sizes.mean(), sizes.var(ddof=1)
    for plan in case.plans:
        step, params, state0, xs = case.arguments(plan)
        args = args_of(case, plan)
        args = args | {"weights": jnp.asarray(sizes[:, None], args["weights"].dtype) * args["weights"][None]}
        axes = None, None, {"weights": 0, "readout": None, "label": None}
        got = bptt.analysis.gradient_noise(
            step, params, state0, xs, only_loss, args=args, in_axes=axes, batch=60, length=plan.steps
        )
        norms = np.linalg.norm(by_lag(case.name, plan), axis=1)
        sure = norms > np.linalg.norm(norms) * 1e-5
        ratio = np.where(norms > 0, 60 * (signal**2 / noise - 1 / 3), np.nan)
        for what, found, expected in (
            ("signal_to_noise", got.signal_to_noise, ratio),
            ("log_norms", got.log_norms, log(signal * norms)),
            ("log_spreads", got.log_spreads, log(np.sqrt(noise) * norms)),
        ):
            yield Comparison(what, np.where(sure, found, 0), np.where(sure, expected, 0), True)
        ends = np.flatnonzero(sure & np.append(norms[1:] == 0, True))
        horizon = (ends[0] + 1 if len(ends) and ends[0] + 1 < plan.steps else np.inf) if sure.any() else 0
        if np.array_equal(sure, norms > 0):
            yield Comparison("horizon", got.horizon, horizon)


def check_gradient_precision(case: Case) -> Iterator[Comparison]:
    """Of single precision, whose errors are those of few steps where it does not underflow."""
    for plan in case.plans:
        got = bptt.analysis.gradient_precision(
            *case.arguments(plan), only_loss, args=args_of(case, plan), dtype="float32"
        )
        norms = np.linalg.norm(by_lag(case.name, plan), axis=1)
        sure = norms > np.linalg.norm(norms) * 1e-5
        # Of the parameters as single precision holds them.
        off = np.where(sure, got.log_norms, 0) - np.where(sure, log(norms), 0)
        yield Comparison("log_norms", np.abs(off) < 1e-4, np.ones(plan.steps, bool))
        seen = sure & (norms > 1e-35)
        yield Comparison("errors", np.where(seen, got.relative_errors, 0) < 1e-3, np.ones(plan.steps, bool))
        yield Comparison("underflows", np.asarray(got.underflows) & seen, np.zeros(plan.steps, bool))


def check_rtrl(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        got = bptt.estimators.rtrl(*case.arguments(plan), only_loss, args=args_of(case, plan))
        yield Comparison("gradient", real_vector(got), truncated(case, plan, plan.steps, plan.steps))
        yield same_dtypes("gradient", got, floats(case.problem.params)[0])


def check_audit(case: Case) -> Iterator[Comparison]:
    """Truncation to two steps sees the lags 0 and 1, and nothing of the others. Of one plan, for it compiles much."""
    for plan in case.plans[:1]:
        problem, options = (
            case.arguments(plan),
            {"args": args_of(case, plan), "key": KEY, "keys": 1, "lags": (0, 1, 2)},
        )
        got = bptt.audit({"two": partial(bptt.estimators.tbptt, k1=1, k2=2)}, *problem, only_loss, **options)
        cut, full = truncated(case, plan, 1, 2), truncated(case, plan, plan.steps, plan.steps)
        size = np.linalg.norm(full)
        with np.errstate(invalid="ignore", divide="ignore"):
            yield Comparison("bias", 1 + got.bias[0], 1 + np.linalg.norm(cut - full) / size)
            yield Comparison("share", 1 + got.share[0], 1 + cut @ full / size**2)
            yield Comparison("cosine", got.cosine[0], cut @ full / size / np.linalg.norm(cut))
        yield Comparison("exact_log_norm", got.exact_log_norm, log(size), True)
        shares = np.asarray(got.lag_shares[0], np.float64)
        nothing = np.isnan(shares) & (np.linalg.norm(by_lag(case.name, plan)[:3], axis=1) == 0)
        yield Comparison("lag_shares", shares, np.where(nothing, np.nan, [1.0, 1.0, 0.0]))


PAIRS, SIGMA, KEY = 2, 0.1, jax.random.key(5)


def forward(case: Case, plan: Plan, kept: Callable[[Any], np.ndarray], diagonal: Any = 1) -> np.ndarray:
    """``M = kept * (diagonal * J M + F)`` from zero in every piece; `kept` is asked with where J and F have not been
    zero so far."""
    truth = case.truth(plan)
    total = np.zeros(truth.params_jacobians.shape[-1])
    for steps, read in readings(case, plan):
        influence = np.zeros(truth.params_jacobians.shape[1:])
        seen = [np.zeros(a.shape[1:], bool) for a in (truth.jacobians, truth.params_jacobians)]
        for k, signal in zip(steps, read, strict=True):
            j, f = truth.jacobians[k], truth.params_jacobians[k]
            seen = [seen[0] | (j != 0), seen[1] | (f != 0)]
            influence = np.where(kept(seen), (diagonal * j) @ influence + f, 0)
            total += signal @ influence
    return total


def within(case: Any, n: int) -> Callable[[Any], np.ndarray]:
    """Which entries of the influence SnAp-n keeps. A complex number is one, whichever of its parts is reached."""

    def one(tree: Any) -> np.ndarray:
        leaves = enumerate(jax.tree.leaves(floats(tree)[0]))
        numbers = [(k, place) for k, a in leaves for _ in range(1 + np.iscomplexobj(a)) for place in range(a.size)]
        return np.asarray([[a == b for b in numbers] for a in numbers], int).reshape(len(numbers), len(numbers))

    same_unit, same_parameter = one(case.problem.state0), one(case.problem.params)

    def kept(seen: Any) -> np.ndarray:
        by_state = np.asarray(same_unit @ seen[0] @ same_unit > 0, int)
        by_params = np.asarray(same_unit @ seen[1] @ same_parameter > 0, int)
        return np.any([np.linalg.matrix_power(by_state, k) @ by_params for k in range(n)], axis=0)

    return kept


def check_snap(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        for n in (1, 2):
            got = bptt.estimators.snap(*case.arguments(plan), only_loss, args=args_of(case, plan), n=n)
            yield Comparison(f"n={n}", real_vector(got), forward(case, plan, within(case, n)))
        yield same_dtypes("gradient", got, floats(case.problem.params)[0])


def one_place(case: Any) -> np.ndarray:
    """Which numbers of the state's vector stand at one place of arrays of one shape."""
    units = []
    for leaf in jax.tree.leaves(floats(case.problem.state0)[0]):
        units += [(leaf.shape, place) for place in range(leaf.size)] * (1 + np.iscomplexobj(leaf))
    return np.asarray([[a == b for b in units] for a in units])


def check_rflo(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        got = bptt.estimators.rflo(*case.arguments(plan), only_loss, args=args_of(case, plan))
        yield Comparison("gradient", real_vector(got), forward(case, plan, lambda seen: np.True_, one_place(case)))
        yield same_dtypes("gradient", got, floats(case.problem.params)[0])


def mixed(signs: Any, products: list[Any]) -> list[Any]:
    """Two factors with the mean of the sum of the `products`, each in two factors, its signs on the second."""
    sides: list[Any] = [0, 0]
    for sign, (a, b) in zip(signs, products, strict=True):
        if np.any(a) and np.any(b):
            p = np.sqrt(np.linalg.norm(a) / np.linalg.norm(b))
            sides = [sides[0] + sign * a / p, sides[1] + sign * p * b]
    return sides


def with_signs(case: Any, plan: Plan) -> np.ndarray:
    """What UORO gives with the signs that are documented."""
    truth, dtype = case.truth(plan), jnp.result_type(float)
    size, params_size = truth.params_jacobians.shape[1:]
    total, count = np.zeros(params_size), 0
    for steps, read in readings(case, plan):
        s, theta = np.zeros(size), np.zeros(params_size)
        for k, signal in zip(steps, read, strict=True):
            signs = np.asarray(jax.random.rademacher(jax.random.fold_in(KEY, count), (size,), dtype), np.float64)
            products = [(theta, truth.jacobians[k] @ s), (signs @ truth.params_jacobians[k], signs)]
            theta, s = mixed([1, 1], products)
            theta, s = theta + np.zeros(params_size), s + np.zeros(size)
            total += (signal @ s) * theta
            count += 1
    return total


def check_uoro(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        given = *case.arguments(plan), only_loss
        got = bptt.estimators.uoro(*given, args=args_of(case, plan), key=KEY)
        yield Comparison("gradient", real_vector(got), with_signs(case, plan), slack=10)
        yield same_dtypes("gradient", got, floats(case.problem.params)[0])


def check_kf_rtrl(case: Case) -> Iterator[Comparison]:
    """Parameters of one axis have no noise, so their part is exact; of matrices two factors are asked for."""
    params = jax.tree.leaves(floats(case.problem.params)[0])
    sizes = [a.size * (1 + jnp.iscomplexobj(a)) for a in params]
    exactly = np.repeat(np.asarray([a.ndim < 2 for a in params], bool), np.asarray(sizes, int))
    for plan in case.plans:
        given = *case.arguments(plan), only_loss
        options = {"args": args_of(case, plan), "key": KEY}
        got, carry = bptt.estimators.kf_rtrl(*given, **options, has_carry=True)
        expected = truncated(case, plan, plan.steps, plan.steps)
        yield Comparison("of one axis", real_vector(got)[exactly], expected[exactly])
        yield Comparison("finite", np.isfinite(real_vector(got)).all(), True)
        wide = sum(a.size for own in carry.influence for a in own)
        bound = sum(max((a.shape or (1,))[0], a.size) * (1 + jnp.iscomplexobj(a)) for a in params)
        yield Comparison("memory", wide <= (size_of(case.problem.state0) + 1) * bound + len(params), True)
        yield same_dtypes("gradient", got, floats(case.problem.params)[0])


def noise_of(case: Case, key: Any, number: int) -> np.ndarray:
    vector, _ = bptt.ravel_state(floats(case.problem.params)[0])
    drawn = jax.random.normal(jax.random.fold_in(key, number), vector.shape, vector.dtype)
    return np.asarray(drawn, np.float64)


def slope(case: Case, plan: Plan, perturbations: list[np.ndarray], until: int) -> float:
    above, below = (
        perturbed_loss(case.name, plan, [sign * SIGMA * e for e in perturbations], until) for sign in (1, -1)
    )
    return (above - below) / (2 * SIGMA)


def check_es(case: Case) -> Iterator[Comparison]:
    """One perturbation for all steps, whatever piece they are of."""
    for plan in case.plans:
        estimate = 0.0
        for key in jax.random.split(KEY, PAIRS):
            noise = noise_of(case, key, 1)
            estimate += slope(case, plan, [noise] * plan.steps, plan.steps) * noise / PAIRS
        got = bptt.estimators.es(
            *case.arguments(plan), only_loss, args=args_of(case, plan), key=KEY, sigma=SIGMA, pairs=PAIRS
        )
        yield Comparison("estimate", real_vector(got), estimate, slack=100)
        yield same_dtypes("estimate", got, floats(case.problem.params)[0])


def check_pes(case: Case) -> Iterator[Comparison]:
    """Every piece by itself, the others unperturbed: the losses of trajectories that are perturbed up to a window."""
    for plan in case.plans:
        estimate, nothing = 0.0, np.zeros_like(noise_of(case, KEY, 0))
        for key in jax.random.split(KEY, PAIRS):
            number = 0
            for _, steps in plan.pieces:
                perturbations, accumulated, before = [nothing] * plan.steps, nothing, 0.0
                for begin in range(0, len(steps), 2):
                    number += 1
                    noise = noise_of(case, key, number)
                    accumulated = accumulated + noise
                    for t in steps[begin : begin + 2]:
                        perturbations[t] = noise
                    until = next((t for t in range(t + 1, plan.steps) if plan.mask[t]), plan.steps)
                    found = slope(case, plan, perturbations, until)
                    estimate += (found - before) * accumulated / PAIRS
                    before = found
        options = {"key": KEY, "sigma": SIGMA, "pairs": PAIRS, "window": 2}
        got = bptt.estimators.pes(*case.arguments(plan), only_loss, args=args_of(case, plan), **options)
        yield Comparison("estimate", real_vector(got), estimate, slack=100)
        yield same_dtypes("estimate", got, floats(case.problem.params)[0])
