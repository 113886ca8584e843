"""What the contract asks of each public function, in every case to which it applies."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from contract_cases import (
    Case,
    Comparison,
    Plan,
    at_step,
    at_steps,
    by_lag,
    floats,
    log,
    log_norms,
    loss,
    loss_args,
    perturbed_loss,
    real_vector,
    same_dtypes,
    size_of,
    summed,
)
from registry import Entry

import bptt_jax as bptt
from bptt_jax.linalg.scattered import scattered


class Check(NamedTuple):
    """What is asked of one public function.

    Attributes:
      run: all that is to be compared.
      refusal: what a refusal says, as a regular expression, where this entry must be refused; else None.
      applies: whether there is anything to ask.
    """

    run: Callable[[Case], Iterator[Comparison]]
    refusal: Callable[[Entry], str | None] = lambda entry: None
    applies: Callable[[Case], bool] = lambda case: True


# --- The spine. What the pieces give alone makes the whole as it stands, step by step, where nothing else is said.


def check_states(
    function: Callable[..., Any], refusal: Callable[[Entry], str | None] = lambda entry: None, **options: Any
) -> Check:
    def run(case: Case) -> Iterator[Comparison]:
        for plan in case.plans:
            states, truth = function(*case.arguments(plan), **options), case.truth(plan)
            yield Comparison("states", states, truth.states)
            yield same_dtypes("states", at_step(states, 0), case.problem.state0)
        whole = function(*case.arguments(case.plans[0]), **options)
        for steps, arguments, _ in case.alone(case.plans[0]):
            yield Comparison("states of the piece", at_steps(whole, steps), function(*arguments, **options))

    return Check(run, refusal)


def check_final_state(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        yield Comparison("state", bptt.final_state(*case.arguments(plan)), at_step(case.truth(plan).states, -1))
    *_, (_, arguments, _) = case.alone(case.plans[0])
    whole = bptt.final_state(*case.arguments(case.plans[0]))
    yield Comparison("state after the last piece", whole, bptt.final_state(*arguments))


def check_jacobians(mode: Any) -> Callable[[Case], Iterator[Comparison]]:
    def run(case: Case) -> Iterator[Comparison]:
        for plan in case.plans:
            got = bptt.jacobians(*case.arguments(plan), mode=mode)
            yield Comparison("jacobians", got, case.truth(plan).jacobians)
        whole = bptt.jacobians(*case.arguments(case.plans[0]), mode=mode)
        for steps, arguments, _ in case.alone(case.plans[0]):
            yield Comparison("of the piece", at_steps(whole, steps), bptt.jacobians(*arguments, mode=mode))

    return run


def check_adjoints(case: Case) -> Iterator[Comparison]:
    """The pieces' losses, gradients and gradients of what the loss is given add up; of the states they start from,
    by where these come from."""
    for plan in case.plans:
        yield from _adjoints_against_truth(case, plan, _adjoints(case.arguments(plan), _args(case, plan)))
    plan = case.plans[0]
    whole = _adjoints(case.arguments(plan), _args(case, plan))
    pieces = [(steps, _adjoints(arguments, args)) for steps, arguments, args in case.alone(plan)]
    for steps, alone in pieces:
        yield Comparison("adjoints of the piece", at_steps(whole.adjoints, steps), alone.adjoints)
        yield Comparison("log norms of the piece", at_steps(whole.log_norms, steps), alone.log_norms, True)
        yield Comparison("xs_grad of the piece", at_steps(whole.xs_grad, steps), alone.xs_grad)
    first, *others = [alone for _, alone in pieces]
    later = summed([alone.state0_grad for alone in others]) if others else None
    yield Comparison("sum of losses", whole.loss, summed([alone.loss for _, alone in pieces]))
    yield Comparison("sum of params_grad", whole.params_grad, summed([alone.params_grad for _, alone in pieces]))
    readouts = [alone.args_grad["readout"] for _, alone in pieces]
    yield Comparison("sum of args_grad", whole.args_grad["readout"], summed(readouts))
    if later is None or plan.own_reset_state:
        yield Comparison("state0_grad of the first piece", whole.state0_grad, first.state0_grad)
        yield Comparison("sum of the others'", whole.reset_state_grad, later)
    else:
        total = summed([first.state0_grad, later])
        yield Comparison("sum of state0_grad", whole.state0_grad, total)


def check_adjoints_remat(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        found = _adjoints(case.arguments(plan), _args(case, plan), remat=2)
        yield from _adjoints_against_truth(case, plan, found)


def _args(case: Case, plan: Plan) -> Any:
    return loss_args(plan.weights, case.dtype)


def _adjoints(arguments: tuple[Any, ...], args: Any, **options: Any) -> bptt.analysis.Adjoints:
    return bptt.adjoints(*arguments, loss, args=args, has_aux=True, inputs=True, **options)


def _adjoints_against_truth(case: Case, plan: Plan, got: bptt.analysis.Adjoints) -> Iterator[Comparison]:
    truth = case.truth(plan)
    for name in ("loss", "aux", "states", "adjoints", "params_grad", "state0_grad", "reset_state_grad"):
        yield Comparison(name, getattr(got, name), getattr(truth, name))
    yield Comparison("args_grad", got.args_grad, truth.args_grad)
    yield Comparison("xs_grad", got.xs_grad, truth.xs_grad)
    yield Comparison("log_norms", got.log_norms, log_norms(truth.adjoints), True)
    by_leaf = jax.tree.map(log_norms, truth.adjoints)
    yield Comparison("leaf_log_norms", got.leaf_log_norms, by_leaf, True)
    if jax.tree.leaves(truth.xs_grad):
        yield Comparison("xs_log_norms", got.xs_log_norms, log_norms(truth.xs_grad), True)
    yield same_dtypes("params_grad", got.params_grad, floats(case.problem.params)[0])
    yield same_dtypes("adjoints", at_step(got.adjoints, 0), floats(case.problem.state0)[0])


def check_contributions(case: Case) -> Iterator[Comparison]:
    """Shares are of the whole gradient, so the pieces alone tell them only by way of the norms."""
    for plan in case.plans:
        got = bptt.temporal_contributions(*case.arguments(plan), only_loss, args=_args(case, plan))
        yield from _contributions_against_truth(case, plan, got)
    whole = bptt.temporal_contributions(*case.arguments(case.plans[0]), only_loss, args=_args(case, case.plans[0]))
    for steps, arguments, args in case.alone(case.plans[0]):
        alone = bptt.temporal_contributions(*arguments, only_loss, args=args)
        yield Comparison("of the piece", at_steps(whole.log_norms, steps), alone.log_norms, True)


def _contributions_against_truth(
    case: Case, plan: Plan, got: bptt.analysis.TemporalContributions
) -> Iterator[Comparison]:
    by_step = case.truth(plan).contributions
    whole = by_step.sum(axis=0)
    yield Comparison("contributions", got.log_norms, log(np.linalg.norm(by_step, axis=1)), True)
    with np.errstate(invalid="ignore"):
        yield Comparison("shares", got.shares, by_step @ whole / (whole @ whole))


def only_loss(states: Any, args: Any) -> Any:
    return loss(states, args)[0]


def no_backward_pass(entry: Entry) -> str | None:
    return None if entry.pulls else r"step: .* needs its backward pass, .*use lax.scan, or lax.fori_loop"


def not_by(mode: str, has_it: Callable[[Entry], bool]) -> Callable[[Entry], str | None]:
    message = f'mode: this step cannot be differentiated by "{mode}"'
    return lambda entry: None if has_it(entry) else message


# --- Jacobians and their products. The real steps alone, in their order; nothing passes a reset.


class Factors(NamedTuple):
    """The Jacobians of the real steps, and whether a reset comes before each."""

    steps: np.ndarray
    jacobians: np.ndarray
    resets: np.ndarray

    @property
    def products(self) -> np.ndarray:
        """``[n, n, D, D]``: entry (t, s) is the product of factors s .. t, zero across a reset and where t < s."""
        n, size, _ = self.jacobians.shape
        found = np.zeros((n, n, size, size))
        for s in range(n):
            product = np.eye(size)
            for t in range(s, n):
                product = self.jacobians[t] @ product * (t == s or not self.resets[t])
                found[t, s] = product
        return found


def factors(case: Case, plan: Plan) -> Factors:
    steps = np.flatnonzero(plan.mask)
    begins = [piece[0] for reset, piece in plan.pieces if reset]
    return Factors(steps, case.truth(plan).jacobians[steps], np.isin(steps, begins))


def log_spectral_norms(matrices: np.ndarray) -> np.ndarray:
    return log(np.linalg.norm(matrices, 2, axis=(-2, -1)))


def check_products(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        sequence = case.arguments(plan)[-1]
        jacobians = bptt.jacobians(*case.arguments(plan))
        beside = {"resets": getattr(sequence, "resets", None), "mask": getattr(sequence, "mask", None)}
        # Of what they are given: a Jacobian where a unit is saturated has few digits in single precision.
        parts = factors(case, plan)
        parts = parts._replace(jacobians=np.asarray(jacobians, np.float64)[parts.steps])
        products, at = parts.products, np.asarray(parts.steps)
        whole = bptt.jacobian_product(jacobians, **beside)
        yield Comparison("jacobian_product", whole.value, products[-1, 0])
        yield Comparison("its log norm", whole.log_norm, log(np.linalg.norm(products[-1, 0])), True)
        prefixes, suffixes = (
            bptt.linalg.prefix_products(jacobians, **beside),
            bptt.linalg.suffix_products(jacobians, **beside),
        )
        yield Comparison("prefix_products", at_steps(prefixes.value, at), products[:, 0])
        yield Comparison("suffix_products", at_steps(suffixes.value, at), products[-1])
        norms = bptt.product_log_norms(jacobians, **beside)
        yield Comparison("product_log_norms", at_steps(norms, at), log_spectral_norms(products[-1]), True)


def check_influence_map(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        parts = factors(case, plan)
        n = len(parts.steps)
        norms = np.full((n + 1, n + 1), -np.inf)
        np.fill_diagonal(norms, 0)
        norms[1:, :-1] = np.where(np.tri(n, dtype=bool), log_spectral_norms(parts.products), -np.inf)
        norms = np.where(np.eye(n + 1), 0, norms)
        got = bptt.influence_map(*case.arguments(plan), intervals=plan.steps)
        times = np.unique(got.times, return_index=True)[1]  # fewer real steps than intervals
        yield Comparison("times", at_steps(got.times, times), np.arange(n + 1))
        yield Comparison("log_norms", np.asarray(got.log_norms)[np.ix_(times, times)], norms, True)


def check_leading_singular_values(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        parts = factors(case, plan)
        num = min(2, parts.jacobians.shape[-1])
        values = np.full((plan.steps, num), np.nan)
        values[parts.steps] = np.linalg.svd(parts.jacobians, compute_uv=False)[:, :num]
        got = bptt.analysis.leading_singular_values(*case.arguments(plan), num=num)
        yield Comparison("values", got.values, values, slack=krylov(case))
        yield Comparison("errors", np.isnan(got.errors), np.isnan(values))


def check_leading_eigenvalues(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        parts = factors(case, plan)
        moduli = np.full(plan.steps, np.nan)
        moduli[parts.steps] = np.max(np.abs(np.linalg.eigvals(parts.jacobians)), axis=1)
        got = bptt.analysis.leading_eigenvalues(*case.arguments(plan), num=1)
        eps = float(jnp.finfo(case.dtype).eps)
        unsure = np.linalg.norm(sensitivity(parts.jacobians, eps)) / (np.linalg.norm(moduli[parts.steps]) or 1)
        slack = max(krylov(case), 10 * min(unsure, eps ** (1 / 3)) / case.tolerance)
        yield Comparison("the largest modulus", jnp.abs(got.values[:, 0]), moduli, slack=slack)


def sensitivity(matrices: np.ndarray, eps: float) -> np.ndarray:
    """By how much the largest modulus of an eigenvalue of each differs where the matrix does by a rounding of its
    norm: by some `eps` if it is normal, by a root of that if it is defective."""
    rng = np.random.default_rng(0)
    sizes = eps * np.linalg.norm(matrices, 2, axis=(1, 2))[:, None, None]
    apart = [matrices, *(matrices + sizes * _of_norm_one(rng, matrices.shape) for _ in range(8))]
    moduli = np.asarray([np.max(np.abs(np.linalg.eigvals(m)), axis=1) for m in apart])
    return np.max(np.abs(moduli[1:] - moduli[0]), axis=0)


def _of_norm_one(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    matrices = rng.standard_normal(shape)
    return matrices / np.linalg.norm(matrices, 2, axis=(1, 2))[:, None, None]


def check_product_singular_values(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        got = bptt.analysis.product_singular_values(*case.arguments(plan), num=1)
        norm = log_spectral_norms(factors(case, plan).products[-1, 0])
        yield Comparison("log_values", got.log_values[0], norm, True, slack=krylov(case))


def krylov(case: Case) -> float:
    """Of a thousand values a space of some 30 dimensions tells the largest to a few percent."""
    return 0.05 / case.tolerance if case.entry.large else 1.0


# --- Other gradients than the whole. Windows begin anew with every piece, so that the pieces' gradients add up.


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
            got = bptt.estimators.tbptt(*case.arguments(plan), only_loss, args=_args(case, plan), k1=k1, k2=k2)
            yield Comparison(f"k1={k1}, k2={k2}", real_vector(got), truncated(case, plan, k1, k2))
        yield same_dtypes("gradient", got, floats(case.problem.params)[0])


def check_truncation_bias(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        got = bptt.truncation_bias(*case.arguments(plan), only_loss, args=_args(case, plan))
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
        got = bptt.analysis.gradient_by_lag(*case.arguments(plan), only_loss, args=_args(case, plan), parts=lags)
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
        args = _args(case, plan)
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
            *case.arguments(plan), only_loss, args=_args(case, plan), dtype="float32"
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
        got = bptt.estimators.rtrl(*case.arguments(plan), only_loss, args=_args(case, plan))
        yield Comparison("gradient", real_vector(got), truncated(case, plan, plan.steps, plan.steps))
        yield same_dtypes("gradient", got, floats(case.problem.params)[0])


def check_audit(case: Case) -> Iterator[Comparison]:
    """Truncation to two steps sees the lags 0 and 1, and nothing of the others. Of one plan, for it compiles much."""
    for plan in case.plans[:1]:
        problem, options = (
            case.arguments(plan),
            {"args": _args(case, plan), "key": KEY, "keys": 1, "lags": (0, 1, 2)},
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
            got = bptt.estimators.snap(*case.arguments(plan), only_loss, args=_args(case, plan), n=n)
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
        got = bptt.estimators.rflo(*case.arguments(plan), only_loss, args=_args(case, plan))
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
        got = bptt.estimators.uoro(*given, args=_args(case, plan), key=KEY)
        yield Comparison("gradient", real_vector(got), with_signs(case, plan), slack=10)
        yield same_dtypes("gradient", got, floats(case.problem.params)[0])


def check_kf_rtrl(case: Case) -> Iterator[Comparison]:
    """Parameters of one axis have no noise, so their part is exact; of matrices two factors are asked for."""
    params = jax.tree.leaves(floats(case.problem.params)[0])
    sizes = [a.size * (1 + jnp.iscomplexobj(a)) for a in params]
    exactly = np.repeat(np.asarray([a.ndim < 2 for a in params], bool), np.asarray(sizes, int))
    for plan in case.plans:
        given = *case.arguments(plan), only_loss
        options = {"args": _args(case, plan), "key": KEY}
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
            *case.arguments(plan), only_loss, args=_args(case, plan), key=KEY, sigma=SIGMA, pairs=PAIRS
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
        got = bptt.estimators.pes(*case.arguments(plan), only_loss, args=_args(case, plan), **options)
        yield Comparison("estimate", real_vector(got), estimate, slack=100)
        yield same_dtypes("estimate", got, floats(case.problem.params)[0])


# --- What is measured of the gradient. The signal of each piece is followed alone; its logarithms make one line.

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
            _flow(case, case.arguments(plan), _args(case, plan)),
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
        yield from _contributions_against_truth(case, plan, got.contributions)
        size = np.linalg.norm(truth.contributions.sum(axis=0))
        yield Comparison("params_grad_log_norm", got.numerics.params_grad_log_norm, log(size), True)
        found = got.numerics.finite, got.numerics.first_nonfinite_state, got.numerics.first_nonfinite_adjoint
        yield Comparison("numerics", found, (True, -1, -1))
        if got.products is not None:
            yield from _dense_against_truth(case, plan, got)
    whole = _flow(case, case.arguments(case.plans[0]), _args(case, case.plans[0]))
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
        args = _args(case, plan)
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
        got = bptt.remedies.omega_terms(*case.arguments(plan), only_loss, args=_args(case, plan))
        yield Comparison("terms", from_one(got.terms), from_one(terms))
        yield Comparison("valid", got.valid, valid)
        paper, code = (bptt.remedies.omega_penalty(got, version=version) for version in ("paper", "code"))
        yield Comparison("paper", from_one(paper), from_one(terms.sum()))
        yield Comparison("code", from_one(code), from_one(terms[valid].sum() / max(1, valid.sum())))
    whole = bptt.remedies.omega_terms(*case.arguments(case.plans[0]), only_loss, args=_args(case, case.plans[0]))
    for steps, arguments, args in case.alone(case.plans[0]):
        alone = bptt.remedies.omega_terms(*arguments, only_loss, args=args)
        yield Comparison("of the piece", from_one(at_steps(whole.terms, steps)), from_one(alone.terms))


# --- Exponents: a frame through the Jacobians of every piece, made orthonormal by NumPy after every step.


def frame_growth(case: Case, plan: Plan, num: int, followed: int | None = None) -> np.ndarray:
    """``[T, followed]``, what each step adds to the logarithms of the first directions of `num`; NaN in padding and
    from where one of them is lost."""
    jacobians = case.truth(plan).jacobians
    growth = np.full((plan.steps, followed or num), np.nan)
    lost_at = max(1e-3, 100 * float(jnp.finfo(case.dtype).eps))
    for _, steps in plan.pieces:
        frame = first_frame(case, num)[:, : growth.shape[1]]
        for k in steps:
            frame, upper = np.linalg.qr(jacobians[k] @ frame)
            lengths = np.abs(np.diag(upper))
            lost = lengths <= lost_at * lengths.max()
            growth[k] = np.where(lost, np.nan, log(np.where(lost, 1, lengths)))
            if lost.any():
                break
    return growth


def first_frame(case: Case, num: int) -> np.ndarray:
    """Random, and always the same."""
    dtype = "float64" if case.dtype == "float64" else "float32"
    size = size_of(case.problem.state0)
    return np.linalg.qr(np.asarray(scattered((size, num), jnp.dtype(dtype)), np.float64))[0]


def num_exponents(case: Case) -> int:
    return min(3, size_of(case.problem.state0))


def check_exponents(case: Case) -> Iterator[Comparison]:
    """After a warm-up of one step in every piece. Where directions are lost, the first alone, while it lives."""
    num, options = num_exponents(case), {"num": num_exponents(case), "warmup": 1}
    for plan in case.plans:
        got = bptt.lyapunov_exponents(*case.arguments(plan), **options)
        measured = [k for _, steps in plan.pieces for k in steps[1:]]
        growth = frame_growth(case, plan, num)[measured]
        if np.isnan(growth).any():
            growth = frame_growth(case, plan, num, 1)[measured]
        yield Comparison("measured", np.asarray(got.piece) >= 0, np.isin(np.arange(plan.steps), measured))
        yield Comparison("first_nonfinite", got.first_nonfinite, -1)
        if not np.isnan(growth).any():
            followed = growth.shape[1]
            exponents = -np.sort(-growth.mean(axis=0))
            if followed == num:
                yield Comparison("exponents", got.exponents, exponents, True)
            else:
                yield Comparison("an exponent", np.min(np.abs(got.exponents - exponents)), 0, True)
    plan = case.plans[0]
    whole = bptt.lyapunov_exponents(*case.arguments(plan), **options)
    if not np.isnan(frame_growth(case, plan, num)[plan.mask]).any():
        for steps, arguments, _ in case.alone(plan):
            alone = bptt.lyapunov_exponents(*arguments, **options)
            got, expected = (np.sort(growth) for growth in (whole.growth[np.asarray(steps)], alone.growth))
            yield Comparison("growth of the piece", got, expected, True)


def check_covariant(case: Case) -> Iterator[Comparison]:
    """Within a piece a Jacobian makes of each vector the next one, longer by the factor that is told."""
    num = num_exponents(case)
    for plan in case.plans:
        got = bptt.covariant_vectors(*case.arguments(plan), num=num, warmup=0, cooldown=0, unstable=1)
        yield Comparison("kept", got.kept, plan.mask)
        vectors, growth = (np.asarray(a, np.float64) for a in (got.vectors, got.growth))
        yield Comparison("norms", np.linalg.norm(vectors[plan.mask], axis=1), np.ones((plan.mask.sum(), num)))
        jacobians = case.truth(plan).jacobians
        for _, steps in plan.pieces:
            for k, following in itertools.pairwise(steps):
                unit = max(np.linalg.norm(jacobians[k], 2), 1e-300)
                living = growth[k] > -np.inf
                images = (jacobians[k] @ vectors[k] / unit)[:, living]
                expected = (vectors[following] * np.exp(growth[k]) / unit)[:, living]
                yield Comparison(f"images {k}", 2 + images, 2 + expected)
        expected = bptt.lyapunov_exponents(*case.arguments(plan), num=num)
        yield Comparison("exponents", got.exponents, expected.exponents, True)


def check_flossing(case: Case) -> Iterator[Comparison]:
    num = num_exponents(case)
    for plan in case.plans:
        growth = frame_growth(case, plan, num)[[k for _, steps in plan.pieces for k in steps[1:]]]
        got = bptt.remedies.flossing_penalty(*case.arguments(plan), num=num, warmup=1)
        if np.isnan(growth).any():
            yield Comparison("finite", jnp.isfinite(got), True)
        else:
            size = np.sqrt(np.mean(growth.mean(axis=0) ** 2))
            yield Comparison("root mean square", np.sqrt(got), size, True)


def check_prediction(case: Case) -> Iterator[Comparison]:
    """Differences that a step erases count as those that a reset does."""
    for plan in case.plans:
        jacobians, rates = case.truth(plan).jacobians, []
        for _, steps in plan.pieces:
            vector = first_frame(case, 1)
            for number, k in enumerate(steps):
                vector = jacobians[k] @ vector
                length = np.linalg.norm(vector)
                vector = vector / length if length else first_frame(case, 1)
                if length and number >= len(steps) // 10:
                    rates.append(np.log(length))
        got = bptt.predict_parallel(*case.arguments(plan))
        yield Comparison("exponent", got.exponent, np.mean(rates) if rates else -np.inf, True)
        sizes = got.length, got.longest, got.size
        longest = max(len(steps) for _, steps in plan.pieces)
        yield Comparison("sizes", sizes, (plan.steps, longest, jacobians.shape[-1]))


# --- In parallel over time


def check_deer(**options: Any) -> Callable[[Case], Iterator[Comparison]]:
    def run(case: Case) -> Iterator[Comparison]:
        for plan in case.plans:
            got = bptt.deer(*case.arguments(plan), **options)
            yield Comparison("converged", got.converged, True)
            yield Comparison("states", got.states, case.truth(plan).states, slack=100)

    return run


def check_parallel_adjoints(case: Case) -> Iterator[Comparison]:
    """Of Jacobians that come from elsewhere."""
    for plan in case.plans:
        truth, sequence = case.truth(plan), case.arguments(plan)[-1]
        flags = {"resets": getattr(sequence, "resets", None), "mask": getattr(sequence, "mask", None)}
        kind = jnp.result_type(float)
        got = bptt.parallel.parallel_adjoints(
            jnp.asarray(truth.jacobians, kind), jnp.asarray(truth.immediate, kind), **flags
        )
        adjoints = np.stack([real_vector(at_step(truth.adjoints, k)) for k in range(plan.steps)])
        yield Comparison("adjoints", got.adjoints, adjoints)
        yield Comparison("log_norms", got.log_norms, log(np.linalg.norm(adjoints, axis=1)), True)
        if plan.own_reset_state:
            yield Comparison("reset_state_grad", got.reset_state_grad, real_vector(truth.reset_state_grad))
        # Otherwise both are one state.
        shared = got.reset_state_grad is not None and not plan.own_reset_state
        start = got.state0_grad + got.reset_state_grad if shared else got.state0_grad
        yield Comparison("state0_grad", start, real_vector(truth.state0_grad))


def not_diagonal(entry: Entry) -> str | None:
    return None if entry.linear else "step: expected a bptt_jax.parallel.DiagonalStep"


def small(case: Case) -> bool:
    """For what needs many D x D matrices, or one with as many columns as there are parameters."""
    return not case.entry.large


def solved(case: Case) -> bool:
    """Half precision has too few digits for it to trust itself."""
    return case.dtype in ("float32", "float64")


def solved_fully(case: Case) -> bool:
    return small(case) and solved(case)


def has_adjoints(case: Case) -> bool:
    return small(case) and case.entry.pulls


CHECKS: dict[str, Check] = {
    "unroll": check_states(bptt.unroll),
    "unroll remat": check_states(bptt.unroll, remat=2),
    "final_state": Check(check_final_state),
    "unroll_linear": check_states(bptt.unroll_linear, not_diagonal),
    "jacobians": Check(check_jacobians(None)),
    "jacobians forward": Check(check_jacobians("forward"), not_by("forward", lambda entry: entry.pushes)),
    "jacobians reverse": Check(check_jacobians("reverse"), not_by("reverse", lambda entry: entry.pulls)),
    "adjoints": Check(check_adjoints, no_backward_pass),
    "adjoints remat": Check(check_adjoints_remat, no_backward_pass),
    "gradient_flow": Check(check_gradient_flow, no_backward_pass),
    "temporal_contributions": Check(check_contributions, no_backward_pass),
    "Monitor": Check(check_monitor, no_backward_pass),
    "omega_terms": Check(check_omega, no_backward_pass),
    "tbptt": Check(check_tbptt, no_backward_pass, small),
    "truncation_bias": Check(check_truncation_bias, no_backward_pass, small),
    "gradient_by_lag": Check(check_gradient_by_lag, no_backward_pass, small),
    "gradient_noise": Check(check_gradient_noise, no_backward_pass, small),
    "gradient_precision": Check(
        check_gradient_precision,
        lambda entry: "step: must keep the dtype" if entry.tolerance else no_backward_pass(entry),
        lambda case: small(case) and case.dtype == "float64",
    ),
    "rtrl": Check(check_rtrl, applies=small),
    "snap": Check(check_snap, applies=small),
    "rflo": Check(check_rflo, applies=small),
    "uoro": Check(check_uoro, applies=small),
    "kf_rtrl": Check(check_kf_rtrl, applies=small),
    "audit": Check(check_audit, no_backward_pass, solved_fully),
    "es": Check(check_es, applies=solved_fully),
    "pes": Check(check_pes, applies=solved_fully),
    "lyapunov_exponents": Check(check_exponents),
    "flossing_penalty": Check(check_flossing),
    "predict_parallel": Check(check_prediction),
    "products": Check(check_products, applies=small),
    "influence_map": Check(check_influence_map, applies=small),
    "leading_singular_values": Check(check_leading_singular_values, no_backward_pass),
    "leading_eigenvalues": Check(check_leading_eigenvalues),
    "product_singular_values": Check(check_product_singular_values, no_backward_pass),
    "deer": Check(check_deer(), applies=solved_fully),
    "deer diagonal": Check(check_deer(jacobian="diagonal", damping="kalman"), applies=solved),
    "parallel_adjoints": Check(check_parallel_adjoints, applies=has_adjoints),
    "covariant_vectors": Check(check_covariant),
}
