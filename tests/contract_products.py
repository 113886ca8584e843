"""Jacobians and their products. The real steps alone, in their order; nothing passes a reset."""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from contract_cases import Case, Comparison, Plan, at_steps, log

import bptt_jax as bptt


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
