"""Random steps, states, dtypes, lengths, masks, resets and scales, against NumPy in extended precision.

    python tests/fuzz.py --cases 2000 --seed 0
    python tests/fuzz.py --only 1234

A seed draws one case; twenty in a row share a structure, and so what is compiled. A number may differ from what is
right by ten times as much as random roundings of the dtype move it (see `fuzz_steps.py`); where these move it by a
tenth of itself the comparison says nothing, and is counted as undecided. The exit status is 1 if anything is wrong.
"""

import argparse
import collections
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from contract_cases import loss
from contract_estimators import KEY, forward, one_place, truncated, with_signs, within
from contract_exponents import frame_growth
from contract_spine import only_loss
from fuzz_reference import Case, Reference, draw_case, norm, singular_values
from fuzz_steps import EXTENDED, LONG, RUNS, Structure, draw_structure

import bptt_jax as bptt

QUICKLY = "--xla_backend_optimization_level=0"
SHARED = 20  # cases of one structure
CHECKS_OF_EACH = 4
TIMES = 10  # as much as roundings move a number it may be off
SIZES_OF_LOSS = 1.0, 2.0, -0.5
ROUNDINGS = 10  # of the largest number beside it, that it may be off in any case


class Compared(NamedTuple):
    """A number of the package against all runs of the reference.

    Attributes:
      got: ``[...]``; of logarithms (`log`) the exponential is compared.
      expected: ``[RUNS, ...]``.
      rows: axes that lead from row to row; the numbers of a row are judged together.
      slack: that it may be off beside, in proportion to the largest number of the row.
    """

    what: str
    got: Any
    expected: np.ndarray
    rows: int = 0
    log: bool = False
    slack: Any = 0.0


class Fuzz(NamedTuple):
    """What is computed, under `jax.jit`, and what is compared; None where the result itself says that it is unknown."""

    compute: Callable[[Structure, Any], Any]
    compare: Callable[[Any, Reference], Iterator[Compared | None]]
    applies: Callable[[Structure], bool] = lambda structure: True
    needs_derivatives: bool = True


# --- Pytrees of the package as real numbers


def state_numbers(states: Any, structure: Structure, steps: bool = True) -> np.ndarray:
    """``[T, D]`` of a state with or without its counter."""
    return np.concatenate(
        [_reals(leaf, steps) for leaf in jax.tree.leaves(states)][: len(structure.kinds)], axis=-1
    )


def _reals(leaf: Any, steps: bool, sign: int = 1) -> np.ndarray:
    a = np.asarray(leaf)
    a = a.reshape(len(a) if steps else 1, -1)
    parts = (a.real, sign * a.imag) if a.dtype.kind == "c" else (a,)
    found = np.concatenate([part.astype(LONG) for part in parts], axis=-1)
    return found if steps else found[0]


def cotangent_numbers(tree: Any, steps: bool = False) -> np.ndarray:
    """Derivatives by real numbers: JAX's cotangent of x + iy is dL/dx - i dL/dy."""
    return np.concatenate([_reals(leaf, steps, -1) for leaf in jax.tree.leaves(tree)], axis=-1)


def unscaled(found: Any, steps: bool = False) -> np.ndarray:
    """Of a `LogScaled` gradient, in extended precision."""
    exponent = np.asarray(found.exponent)
    return np.ldexp(cotangent_numbers(found.mantissa, steps), exponent[..., None])


def unscaled_matrices(found: Any) -> np.ndarray:
    return np.ldexp(np.asarray(found.mantissa).astype(LONG), np.asarray(found.exponent)[..., None, None])


# --- The checks


def _compare_states(found: Any, of: Reference) -> Iterator[Compared]:
    known = slice(0, of.known)
    for name in ("plain", "remat"):
        got = state_numbers(found[name], of.structure)
        yield Compared(f"{name} states", got[known], of.states[:, known], 1)
        if of.structure.counter:
            counts = np.broadcast_to(of.counts, (RUNS, len(of.counts))).astype(LONG)
            yield Compared("counter", np.asarray(jax.tree.leaves(found[name])[-1])[known], counts[:, known])
    if of.known == of.structure.steps:
        yield Compared("final state", state_numbers(found["final"], of.structure, False), of.states[:, -1])


def _states(structure: Structure, given: Any) -> Any:
    return {
        "plain": bptt.unroll(structure.step, *given[:3]),
        "remat": bptt.unroll(structure.step, *given[:3], remat=2),
        "final": bptt.final_state(structure.step, *given[:3]),
    }


def _jacobians(structure: Structure, given: Any) -> Any:
    return [bptt.jacobians(structure.step, *given[:3], mode=mode) for mode in (None, "reverse")]


def _compare_jacobians(found: Any, of: Reference) -> Iterator[Compared]:
    for mode, got in zip(("forward", "reverse"), found, strict=True):
        yield Compared(mode, got, of.jacobians, 1)


def _adjoints(remat: bool | int, structure: Structure, given: Any) -> Any:
    *arguments, args = given
    found = bptt.adjoints(structure.step, *arguments, loss, args=args, has_aux=True, inputs=True, remat=remat)
    return found, found.log_norms, found.leaf_log_norms, found.params_log_norm


def _compare_adjoints(given: Any, of: Reference) -> Iterator[Compared]:
    found, log_norms, leaf_log_norms, params_log_norm = given
    s, scaled = of.structure, found.scaled
    yield Compared("loss", found.loss, of.loss)
    yield Compared("aux", found.aux["read"], of.reads, 1)
    yield Compared("adjoints", unscaled(scaled.adjoints, True), of.adjoints, 1)
    yield Compared("log_norms", log_norms, norm(of.adjoints), 1, True)
    leaves = np.split(of.adjoints, np.cumsum(s.sizes)[:-1], axis=2)
    size = norm(of.adjoints)[0]
    for number, (got, expected) in enumerate(zip(jax.tree.leaves(leaf_log_norms), leaves, strict=True)):
        # Of a leaf that is small beside the others: the exponent is theirs, and its logarithm has their roundings.
        slack = ROUNDINGS * float(jnp.finfo(got.dtype).eps) * np.abs(np.log(np.where(size == 0, 1, size)))
        yield Compared(f"log norms of leaf {number}", got, norm(expected), 1, True, slack)
    for name in ("params_grad", "state0_grad", *(("reset_state_grad",) if s.own_reset_state else ())):
        yield Compared(name, unscaled(getattr(scaled, name)), getattr(of, name))
        yield from _plain(name, cotangent_numbers(getattr(found, name)), getattr(of, name), of)
    yield Compared("log norm of params_grad", params_log_norm, norm(of.params_grad), 0, True)
    if s.inputs != "none":
        yield Compared("xs_grad", unscaled(scaled.xs_grad, True), of.xs_grad, 1)
    by_args = unscaled(scaled.args_grad)  # the readout comes first
    yield Compared("gradient of the readout", by_args[0], of.by_readout)
    yield Compared("gradient of the weights", by_args[1:], of.reads, 1)


def _plain(what: str, got: np.ndarray, expected: np.ndarray, of: Reference) -> Iterator[Compared]:
    """Where floats hold it."""
    if np.all(np.abs(expected) < of.arithmetic.largest):
        yield Compared(f"plain {what}", got, of.arithmetic.rounded(expected))


def _grad(structure: Structure, given: Any) -> Any:
    """By JAX, of a plain loop."""
    s, (params, state0, sequence, args) = structure, given
    reset = sequence.reset_state if s.own_reset_state else state0
    real = jnp.ones(s.steps, bool) if sequence.mask is None else sequence.mask
    flags = jnp.zeros(s.steps, bool) if sequence.resets is None else sequence.resets

    def where(which: Any, a: Any, b: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(which, a, b), a, b)

    def total(params: Any) -> Any:
        def body(carry: Any, at: Any) -> Any:
            (h, pending), (x, real, flag) = carry, at
            pending = pending | flag
            start = where(pending, reset, h)
            new = where(real, s.step(params, start, x), h)
            return (new, pending & ~real), new

        xs = jax.tree.map(
            lambda a: jnp.where(real.reshape(-1, *[1] * (a.ndim - 1)), a, jnp.zeros_like(a)), sequence.xs
        )
        return only_loss(jax.lax.scan(body, (state0, jnp.asarray(False)), (xs, real, flags))[1], args)

    return jax.value_and_grad(total)(params)


def _compare_grad(found: Any, of: Reference) -> Iterator[Compared]:
    if of.case.kind in ("plain", "zero"):
        yield Compared("loss of JAX", found[0], of.loss)
        yield Compared("gradient of JAX", cotangent_numbers(found[1]), of.params_grad)


def _contributions(structure: Structure, given: Any) -> Any:
    *arguments, args = given
    return bptt.temporal_contributions(structure.step, *arguments, only_loss, args=args)


def _compare_contributions(found: Any, of: Reference) -> Iterator[Compared | None]:
    yield Compared("log_norms", found.log_norms, norm(of.contributions), 1, True)
    whole = of.params_grad
    size = np.max(np.abs(whole), axis=1, keepdims=True)
    if np.any(np.max(np.abs(whole - whole[0]), axis=1) > 0.1 * size[0]):
        yield None  # lost beside the largest adjoint
        return
    whole = whole / np.where(size == 0, 1, size)
    parts = np.sum(of.contributions / np.where(size == 0, 1, size)[:, None] * whole[:, None], axis=2)
    with np.errstate(invalid="ignore"):
        shares = parts / np.sum(whole**2, axis=1)[:, None]
    terms = np.sum(np.abs(of.contributions / np.where(size == 0, 1, size)[:, None] * whole[:, None]), axis=2)
    slack = float(np.max(terms[0]) / max(np.sum(whole[0] ** 2), LONG(1e-30))) * ROUNDINGS * of.eps
    yield Compared("shares", found.shares, shares, 0, slack=slack)


def _flow(structure: Structure, given: Any) -> Any:
    *arguments, args = given
    return bptt.gradient_flow(structure.step, *arguments, only_loss, args=args)


def _compare_flow(found: Any, of: Reference) -> Iterator[Compared | None]:
    steps, n = of.real_steps, len(of.real_steps)
    yield Compared("loss", found.loss, of.loss)
    yield from _compare_contributions(found.contributions, of)
    yield Compared("adjoints", found.signal.adjoint_log_norms[steps], norm(of.adjoints)[:, steps], 1, True)
    ends = of.products[:, of.piece_ends, np.arange(n)]
    yield Compared("norms of products", found.products.log_norms[steps], singular_values(ends)[..., 0], 1, True)
    if len(of.structure.kinds) > 1:
        edges = np.cumsum([0, *of.structure.sizes])
        for number, (a, b) in enumerate(pairwise(edges)):
            got = found.products.block_log_norms[steps, number]
            beside = singular_values(ends)[..., 0]  # from which its roundings come
            block = singular_values(ends[..., a:b, a:b])[..., 0]
            rounding = of.arithmetic.rounded(block, beside, beside)
            yield Compared(f"norms of block {number}", got, np.maximum(rounding, 0), 1, True)
    spectra = found.spectra
    yield Compared("singular values", spectra.singular_values[:n], singular_values(of.jacobians[:, steps]), 1)
    yield from _eigenvalues("eigenvalues", spectra.eigenvalues[:n], of.jacobians[:, steps], of)
    finite = np.asarray(found.numerics.finite)
    yield Compared("finite", finite, np.ones(RUNS, LONG))
    yield Compared("log norm of the gradient", found.numerics.params_grad_log_norm, norm(of.params_grad), 0, True)


def _eigenvalues(what: str, got: Any, matrices: np.ndarray, of: Reference) -> Iterator[Compared]:
    """Each may be known to few digits, but all of them belong to a matrix close by: their polynomial is known."""
    got = np.asarray(got)
    for k in range(matrices.shape[1]):
        size = np.max(np.abs(matrices[0, k]))
        if size == 0:
            yield Compared(f"{what} of step {k}", np.abs(got[k]), np.zeros((RUNS, len(got[k])), LONG))
            continue
        polynomials = np.stack([np.poly((matrix / size).astype(float)) for matrix in matrices[:, k]])
        found = np.poly(got[k].astype(np.clongdouble) / size)
        slack = ROUNDINGS * of.eps * float(np.prod(1 + np.abs(got[k].astype(np.clongdouble) / size)))
        yield Compared(f"{what} of step {k}", found.real, polynomials, slack=slack)
        yield Compared(f"{what} of step {k} in pairs", found.imag, 0 * polynomials, slack=slack)


def _products(structure: Structure, given: Any) -> Any:
    _, _, sequence, args = given
    jacobians = bptt.jacobians(structure.step, *given[:3])
    beside = {"resets": sequence.resets, "mask": sequence.mask}
    wide = jacobians if jacobians.dtype.itemsize > 2 else jacobians.astype(jnp.float32)
    whole = bptt.jacobian_product(jacobians, **beside)
    return {
        "whole": whole,
        "its norm": whole.log_norm,
        "prefixes": bptt.linalg.prefix_products(jacobians, **beside),
        "suffixes": bptt.linalg.suffix_products(jacobians, **beside),
        "norms": bptt.product_log_norms(jacobians, **beside),
        "singular": bptt.singular_values(wide),
        "eigen": bptt.eigenvalues(wide),
        "back": bptt.parallel.parallel_adjoints(jacobians, args["immediate"].astype(jacobians.dtype), **beside),
    }


def _compare_products(found: Any, of: Reference) -> Iterator[Compared]:
    steps = of.real_steps
    whole = of.products[:, -1, 0]
    yield Compared("the whole", unscaled_matrices(found["whole"]), whole)
    yield Compared("its norm", found["its norm"], norm(whole.reshape(RUNS, -1)), 0, True)
    yield Compared("prefixes", unscaled_matrices(found["prefixes"])[steps], of.products[:, :, 0], 1)
    yield Compared("suffixes", unscaled_matrices(found["suffixes"])[steps], of.products[:, -1], 1)
    norms = singular_values(of.products[:, -1])[..., 0]
    yield Compared("norms", found["norms"][steps], norms, 1, True)
    yield Compared("singular values", found["singular"], singular_values(of.jacobians), 1)
    yield from _eigenvalues("eigenvalues", found["eigen"], of.jacobians, of)
    yield Compared("log norms of parallel adjoints", found["back"].log_norms, norm(of.adjoints), 1, True)
    if np.max(np.abs(of.adjoints)) < of.arithmetic.largest:
        yield Compared("parallel adjoints", found["back"].adjoints, of.arithmetic.rounded(of.adjoints), 1)


def _influence(structure: Structure, given: Any) -> Any:
    return bptt.influence_map(structure.step, *given[:3], intervals=structure.steps)


def _compare_influence(found: Any, of: Reference) -> Iterator[Compared]:
    n = len(of.real_steps)
    times = np.unique(found.times, return_index=True)[1]  # fewer real steps than intervals
    yield Compared("times", found.times[times], np.broadcast_to(np.arange(n + 1), (RUNS, n + 1)).astype(LONG))
    norms = np.zeros((RUNS, n + 1, n + 1), LONG)
    norms[:, 1:, :-1] = singular_values(of.products)[..., 0]
    norms[:, np.arange(n + 1), np.arange(n + 1)] = 1
    got = np.asarray(found.log_norms)[np.ix_(times, times)]
    for t in range(n + 1):
        yield Compared(f"log_norms at {t}", got[t], norms[:, t], 1, True)


def _exponents(structure: Structure, given: Any) -> Any:
    return bptt.lyapunov_exponents(
        structure.step, *given[:3], num=min(3, structure.size), warmup=int(structure.steps > 1)
    )


def _compare_exponents(found: Any, of: Reference) -> Iterator[Compared | None]:
    """Where no direction is lost, or drowns in the smallest numbers."""
    s, num = of.structure, min(3, of.structure.size)
    skipped = int(s.steps > 1)
    measured = np.asarray([k for _, steps in of.plan.pieces for k in steps[skipped:]], int)
    where = np.isin(np.arange(s.steps), measured)
    yield Compared("measured", np.asarray(found.piece) >= 0, np.broadcast_to(where, (RUNS, s.steps)).astype(LONG))
    yield Compared("first_nonfinite", found.first_nonfinite, -np.ones(RUNS, LONG))
    growth = np.stack([frame_growth(of.run(k, s.dtype), of.plan, num) for k in range(RUNS)])[:, measured]
    if len(measured) == 0:
        yield Compared("nothing measured", np.isnan(found.exponents), np.ones((RUNS, num), LONG))
    elif not np.isnan(growth).any() and np.max(np.ptp(growth, axis=0)) < 1:
        total = -np.sort(-growth.mean(axis=1), axis=1)
        # A frame is known as well as its shortest direction stands out.
        slack = ROUNDINGS * of.eps * (1 + float(np.max(np.exp(np.ptp(growth[0], axis=-1)))))
        yield Compared("exponents", found.exponents, total.astype(LONG), slack=slack)
    else:
        yield None


def _deer(structure: Structure, given: Any) -> Any:
    return bptt.deer(structure.step, *given[:3], max_iterations=structure.steps + 3)


def _compare_deer(found: Any, of: Reference) -> Iterator[Compared | None]:
    """Whether it converged is its own to say; then half of the digits are right."""
    if not found.converged:
        yield None
        return
    got = state_numbers(found.states, of.structure)
    before = np.concatenate([of.states[0, :1] * 0, of.states[0, :-1]])
    sizes = np.abs(of.states[0]) + np.einsum("tij,tj->ti", np.abs(of.jacobians[0]), np.abs(before))
    half = 4 * float(np.sqrt(of.eps)) * float(np.max(sizes)) / max(float(np.max(np.abs(of.states[0]))), 1e-300)
    yield Compared("states", got, of.states, slack=half)


def _known(of: Reference) -> bool:
    """Whether all numbers on the way are within the range of the dtype."""
    return of.case.kind in ("plain", "zero")


def _slack(of: Reference, expected: np.ndarray) -> float:
    """Of a sum over steps, by the size of what is summed."""
    size = np.abs(of.contributions).sum(axis=(1, 2))[0]
    return ROUNDINGS * of.eps * float(size / max(np.max(np.abs(expected[0]), initial=0), LONG(1e-300)))


def _truncated(structure: Structure, given: Any) -> Any:
    *arguments, args = given
    windows = {f"{k1} {k2}": (k1, k2) for k1, k2 in ((1, 2), (2, 3), (2, 9))}
    return {
        name: bptt.estimators.tbptt(structure.step, *arguments, only_loss, args=args, k1=k1, k2=k2)
        for name, (k1, k2) in windows.items()
    }


def _compare_truncated(found: Any, of: Reference) -> Iterator[Compared]:
    if not _known(of):
        return
    slack = _slack(of, of.params_grad)
    for name, got in found.items():
        k1, k2 = map(int, name.split())
        runs = [truncated(of.run(k, of.structure.dtype), of.plan, k1, k2) for k in range(RUNS)]
        yield Compared(f"tbptt {name}", cotangent_numbers(got), np.stack(runs).astype(LONG), slack=slack)


def _in_parts(estimator: Callable[..., Any], structure: Structure, given: Any) -> Any:
    """Two parts of the sequence, one after the other, and their sum."""
    params, state0, sequence, args = given
    cut = structure.steps // 2

    def of(part: slice, **options: Any) -> Any:
        xs, mask, resets, weights = jax.tree.map(
            lambda a: a[part], (sequence.xs, sequence.mask, sequence.resets, args["weights"])
        )
        own = sequence.reset_state
        inputs = bptt.Sequence(xs, length=len(weights), mask=mask, resets=resets, reset_state=own)
        own_args = args | {"weights": weights}
        return estimator(
            structure.step, params, state0, inputs, only_loss, args=own_args, has_carry=True, **options
        )

    if cut == 0:
        return of(slice(None))[0]
    first, carry = of(slice(0, cut))
    return jax.tree.map(jnp.add, first, of(slice(cut, None), carry=carry)[0])


def _online(structure: Structure, given: Any) -> Any:
    *arguments, args = given
    whole = structure.step, *arguments, only_loss
    names = {
        "rtrl": bptt.estimators.rtrl,
        "snap 1": bptt.estimators.snap,
        "snap 2": partial(bptt.estimators.snap, n=2),
        "rflo": bptt.estimators.rflo,
        "uoro": partial(bptt.estimators.uoro, key=KEY),
        "kf_rtrl": partial(bptt.estimators.kf_rtrl, key=KEY),
    }
    found = {name: each(*whole, args=args) for name, each in names.items()}
    return found, {name: _in_parts(names[name], structure, given) for name in ("snap 2", "uoro")}


def _compare_online(given: Any, of: Reference) -> Iterator[Compared]:
    if not _known(of):
        return
    runs = [of.run(number, of.structure.dtype) for number in range(RUNS)]
    expected = {
        "rtrl": of.params_grad,
        "rflo": np.stack([forward(run, of.plan, lambda seen: np.True_, one_place(run)) for run in runs]),
        "uoro": np.stack([with_signs(run, of.plan) for run in runs]),
    }
    for n in (1, 2):
        expected[f"snap {n}"] = np.stack([forward(run, of.plan, within(run, n)) for run in runs])
    exactly = np.concatenate(
        [np.full(np.size(a) * (1 + np.iscomplexobj(a)), np.ndim(a) < 2) for _, a in sorted(of.case.params.items())]
    )
    expected["kf_rtrl"] = of.params_grad[:, exactly]
    for what, found in zip(("", " in parts"), given, strict=True):
        for name, grad in found.items():
            got, right = cotangent_numbers(grad), expected[name].astype(LONG)
            got = got[exactly] if name == "kf_rtrl" else got
            yield Compared(f"{name}{what}", got, right, slack=_slack(of, right))


def _lags(structure: Structure, given: Any) -> Any:
    *arguments, args = given
    whole = structure.step, *arguments, only_loss
    found = bptt.analysis.gradient_by_lag(*whole, args=args, parts=range(structure.steps))
    # Three sequences that differ in the size of their loss alone.
    sizes = jnp.asarray(SIZES_OF_LOSS, structure.dtype)
    batch = args | {"weights": sizes[:, None] * args["weights"][None]}
    axes = None, None, {"weights": 0, "readout": None, "label": None}
    noise = bptt.analysis.gradient_noise(*whole, args=batch, in_axes=axes, batch=60, length=structure.steps)
    return found.parts, found.log_norms, found.whole_log_norm, noise.signal_to_noise, noise.log_spreads


def _compare_lags(given: Any, of: Reference) -> Iterator[Compared]:
    parts, log_norms, whole_log_norm, ratio, log_spreads = given
    right = of.by_lag
    found = unscaled(parts, True)
    yield Compared("parts", found, right, 1)
    yield Compared("their sum", found.sum(axis=0), of.params_grad, slack=_slack(of, of.params_grad))
    yield Compared("log norms", log_norms, norm(right), 1, True)
    yield Compared("log norm of the whole", whole_log_norm, norm(of.params_grad), 0, True)
    signal, noise = np.mean(SIZES_OF_LOSS), np.var(SIZES_OF_LOSS, ddof=1)
    yield Compared("log spreads", log_spreads, np.sqrt(noise) * norm(right), 1, True)
    # Of what is not lost beside the largest number of the dtype.
    there = norm(right)[0] > np.max(np.abs(right[0]), initial=0) * of.eps
    if _known(of) and there.any():
        expected = np.broadcast_to(60 * (signal**2 / noise - 1 / 3), (RUNS, int(there.sum()))).astype(LONG)
        yield Compared("signal to noise", np.asarray(ratio)[there], expected, slack=100 * ROUNDINGS * of.eps)


def whole_precision(structure: Structure) -> bool:
    return not structure.halves


CHECKS: dict[str, Fuzz] = {
    "unroll": Fuzz(_states, _compare_states, needs_derivatives=False),
    "jacobians": Fuzz(_jacobians, _compare_jacobians),
    "adjoints": Fuzz(partial(_adjoints, False), _compare_adjoints),
    "adjoints remat": Fuzz(partial(_adjoints, 2), _compare_adjoints),
    "jax.grad": Fuzz(_grad, _compare_grad),
    "contributions": Fuzz(_contributions, _compare_contributions),
    "gradient_flow": Fuzz(_flow, _compare_flow),
    "products": Fuzz(_products, _compare_products),
    "influence_map": Fuzz(_influence, _compare_influence),
    "lyapunov_exponents": Fuzz(_exponents, _compare_exponents),
    "deer": Fuzz(_deer, _compare_deer, whole_precision),
    "tbptt": Fuzz(_truncated, _compare_truncated),
    "online": Fuzz(_online, _compare_online),
    "lags": Fuzz(_lags, _compare_lags),
}


# --- Judging


def judge(compared: Compared, eps: float, tiny: Any) -> tuple[str, bool]:
    """What is wrong, if anything, and whether roundings left it open."""
    what, got, expected, rows, is_log, slack = compared
    got = np.asarray(got)
    log_eps = float(jnp.finfo(got.dtype).eps) if is_log else 0.0
    got, right = got.astype(LONG), expected[0]
    if got.shape != right.shape:
        return f"{what}: shape {got.shape} for {right.shape}", False
    if is_log:
        if np.isnan(got).any() or (got == np.inf).any():
            return f"{what}: {got}", False
        slack = slack + 4 * log_eps * np.abs(np.where(got == -np.inf, 0, got))
        got = np.exp(got)
    elif not np.array_equal(np.isnan(got), np.isnan(right)):
        return f"{what}: {got} for {right}", False
    got, right = np.nan_to_num(got, nan=0.0, posinf=np.inf), np.nan_to_num(right)
    expected = np.nan_to_num(expected)
    axes = tuple(range(rows, right.ndim))
    spread = np.max(np.abs(expected - right), axis=(0, *(axis + 1 for axis in axes)), initial=0)
    size = np.max(np.abs(right), axis=axes, initial=0)
    extra = np.max(np.broadcast_to(slack, right.shape), axis=axes, initial=0) * size
    allowed = TIMES * spread + ROUNDINGS * eps * size + extra + tiny
    error = np.max(np.abs(got - right), axis=axes, initial=0)
    bad = ~(error <= allowed)
    if np.any(bad):
        at = tuple(np.argwhere(bad)[0]) if rows else ()
        return (
            f"{what}{list(map(int, at)) if rows else ''}: off by {float(error[at]):.3g}, {float(allowed[at]):.3g} "
            f"allowed: {got[at]} for {right[at]}"
        ), False
    return "", bool(np.any((allowed > 0.1 * size) & (size > tiny)))


class Outcome(NamedTuple):
    """Of one case: what is wrong, and of how many comparisons of each check how many were left open."""

    wrong: list[str]
    compared: collections.Counter
    undecided: collections.Counter


class Program:
    """The structure of a case and of those that share it, the checks that they get, and what is compiled for them."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed // SHARED, 1])
        self.structure = draw_structure(rng)
        names = [name for name, check in CHECKS.items() if check.applies(self.structure)]
        self.checks = [str(name) for name in rng.choice(names, CHECKS_OF_EACH, replace=False)]
        self.run = {name: jax.jit(partial(CHECKS[name].compute, self.structure)) for name in self.checks}

    def try_case(self, seed: int) -> Outcome:
        with jax.enable_x64(self.structure.dtype == "float64"), np.errstate(all="ignore"):
            rng = np.random.default_rng([seed, 2])
            case = draw_case(self.structure, rng)
            return self._judged(case, Reference(case, rng))

    def _judged(self, case: Case, of: Reference) -> Outcome:
        found = Outcome([], collections.Counter(), collections.Counter())
        for name in self.checks:
            check = CHECKS[name]
            if check.needs_derivatives and not of.differentiable:
                continue
            args = case.args
            if name == "products":
                args |= {"immediate": of.immediate[0].astype(self.structure.dtype)}
            try:
                computed = jax.device_get(self.run[name]((case.params, case.state0, case.sequence, args)))
                for compared in check.compare(computed, of):
                    fault, is_open = ("", True) if compared is None else judge(compared, of.eps, of.tiny)
                    found.compared[name] += 1
                    found.undecided[name] += is_open
                    if fault:
                        found.wrong.append(f"{name}, {case.kind}: {fault}")
                        break
            except Exception:  # whatever it is, it is to be told with the seed
                found.wrong.append(f"{name}, {case.kind}: {traceback.format_exc()}")
        return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=2000)
    p.add_argument("--seed", type=int, default=0, help="of the first case")
    p.add_argument("--only", type=int, metavar="SEED", help="this case alone, and what it is made of")
    options = p.parse_args()
    if not EXTENDED:
        sys.exit("numpy.longdouble is no wider than float64 here, so there is nothing to compare with")
    first, count = (options.seed, options.cases) if options.only is None else (options.only, 1)
    os.environ.setdefault("XLA_FLAGS", QUICKLY)  # read when a backend starts
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")

    begin, wrong, structures = time.perf_counter(), [], collections.Counter()
    compared, undecided, kinds = (collections.Counter() for _ in range(3))
    program = None
    for seed in range(first, first + count):
        if program is None or seed % SHARED == 0:
            jax.clear_caches()
            program = Program(seed)
            structures.update(["all", *program.checks])
        case = draw_case(program.structure, np.random.default_rng([seed, 2]))
        kinds[case.kind] += 1
        if options.only is not None:
            print(case, *program.checks, sep="\n")
        found = program.try_case(seed)
        compared.update(found.compared)
        undecided.update(found.undecided)
        wrong += [seed] if found.wrong else []
        for fault in found.wrong:
            print(f"seed {seed}: {fault}", flush=True)
    for name in CHECKS:
        print(f"{name}: {structures[name]} structures, {compared[name]} comparisons, {undecided[name]} left open")
    print(", ".join(f"{number} {kind}" for kind, number in kinds.items()))
    print(
        f"{count} cases of {structures['all']} structures, {compared.total()} comparisons, {undecided.total()} left "
        f"open by roundings, {len(wrong)} cases wrong, {time.perf_counter() - begin:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
