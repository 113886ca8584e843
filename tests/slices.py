"""Of a parametrised test the cases that run every time; the others wait for `python -m pytest -m exhaustive`."""

from collections.abc import Iterable
from typing import Any

import pytest


def covering(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """All of `cases`, of which only `kept` belong to the suite."""
    cases = list(cases)
    assert all(case in cases for case in kept), f"{kept} of {cases}"
    return [case if case in kept else pytest.param(*_values(case), marks=pytest.mark.exhaustive) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if type(case) is tuple else (case,)
