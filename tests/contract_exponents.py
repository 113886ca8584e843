"""Exponents: a frame through the Jacobians of every piece, made orthonormal by NumPy after every step."""

import itertools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from contract_cases import Case, Comparison, Plan, log, size_of

import bptt_jax as bptt
from bptt_jax.linalg.scattered import scattered


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
