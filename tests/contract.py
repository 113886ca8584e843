"""Every public function on every step of the registry, in every dtype, with and without padding and resets."""

import re
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from contract_cases import PLANS, Case, difference
from contract_checks import CHECKS
from registry import CELLS, REGISTRY, STEPS

Outcome = Literal["ok", "refused", "wrong", "raised"]


def judge(name: str, case: Case) -> tuple[Outcome, str]:
    """What became of a cell, and why if that is wrong."""
    check = CHECKS[name]
    expected = check.refusal(case.entry)
    with jax.enable_x64(case.dtype == "float64"):
        try:
            for comparison in check.run(case):
                fault = difference(comparison, case.tolerance, float(jnp.finfo(case.dtype).tiny))
                if fault:
                    return "wrong", f"{comparison.what}: {fault}"
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if expected and isinstance(error, (TypeError, ValueError)) and re.search(expected, message, re.DOTALL):
                return "refused", ""
            return "raised", message
    return ("wrong", f"answered, though it cannot be known; expected: {expected}") if expected else ("ok", "")


def cells(names: Any = None) -> Iterator[tuple[str, Case]]:
    """The whole table, entry by entry."""
    for name in REGISTRY if names is None else names:
        for dtype in REGISTRY[name].dtypes:
            for kind in PLANS:
                case = Case(name, dtype, kind)
                yield from ((check, case) for check in CHECKS if CHECKS[check].applies(case))


QUICK = ("unroll", "jacobians", "tbptt", "rtrl", "predict_parallel", "omega_terms", "deer")


def covering() -> list[tuple[str, Case]]:
    """Some of the table: every check with padding and resets, and every entry; those that are left over with quick
    checks by turns, plainly, with padding and with resets. Of the atlas one entry in 24."""
    chosen: list[tuple[str, Case]] = []
    entries = iter([*(name for name in STEPS if not STEPS[name].large), *list(CELLS)[::24]])

    def case(name: str, kind: str) -> Case:
        dtypes = REGISTRY[name].dtypes
        return Case(name, dtypes[len(chosen) % len(dtypes)], kind)

    left = [name for name in STEPS if STEPS[name].large]
    for check in CHECKS:
        for name in entries:
            if CHECKS[check].applies(case(name, "both")) and not CHECKS[check].refusal(REGISTRY[name]):
                chosen.append((check, case(name, "both")))
                break
            left.append(name)
    for number, name in enumerate([*left, *entries]):
        given, first = case(name, ("plain", "mask", "resets")[number % 3]), number % len(QUICK)
        check = next(check for check in (QUICK * 2)[first:] if CHECKS[check].applies(given))
        chosen.append((check, given))
    return chosen
