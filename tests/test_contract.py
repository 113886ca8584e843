"""A covering slice of the table of `contract.py`; all of it is in `benchmarks/contract.py`."""

import contract
import jax
import numpy as np
import pytest
from contract_cases import PLANS, Case, Check, Comparison, difference, numbers
from contract_checks import CHECKS
from registry import STEPS

SLICE = contract.covering()


@pytest.mark.parametrize(("check", "case"), SLICE, ids=[f"{check} of {'-'.join(case)}" for check, case in SLICE])
def test_the_contract(check: str, case: Case) -> None:
    outcome, why = contract.judge(check, case)
    assert outcome in ("ok", "refused"), why


def test_the_slice_covers_the_table() -> None:
    """Every entry, every check with padding and resets (and so its pieces without), every kind of sequence, every
    dtype."""
    assert {case.name for _, case in SLICE} >= set(STEPS)
    assert {check for check, case in SLICE if case.kind == "both"} == set(CHECKS)
    assert {case.kind for _, case in SLICE} == set(PLANS)
    assert {case.dtype for _, case in SLICE} == {dtype for e in STEPS.values() for dtype in e.dtypes}
    assert set(SLICE) <= set(contract.cells())


def test_entries_are_the_same_in_every_dtype() -> None:
    for name in ("lstm", "complex", "relu orthogonal", "counter, flag, key"):
        single, double = (Case(name, dtype, "plain").problem for dtype in ("float32", "float64"))
        for a, b in zip(*(jax.tree.leaves(p._replace(step=None)) for p in (single, double)), strict=True):
            np.testing.assert_array_equal(numbers(a), numbers(b))


# --- The judge himself


@pytest.mark.parametrize(
    ("got", "expected", "says"),
    [
        ([1.0, 2.0], [1.0, 2.1], "off by"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], "shape"),
        ([1.0, np.nan], [1.0, np.nan], ""),
        ([1.0, np.nan], [1.0, np.inf], "nan"),
        ([1.0, np.nan], [1.0, 2.0], "off by nan"),
        ([1.0, -np.inf], [1.0, 2.0], "off by inf"),
        ([0.0, 0.0], [0.0, 0.0], ""),
        ([1e-3, 0.0], [0.0, 0.0], "off by"),
    ],
)
def test_differences(got: list[float], expected: list[float], says: str) -> None:
    found = difference(Comparison("it", {"a": np.asarray(got)}, {"a": np.asarray(expected)}), 1e-4)
    assert (says in found) if says else not found
    assert difference(Comparison("it", {"a": np.asarray(got)}, {"a": None}), 1e-4).startswith("structure")
    tiny = Comparison("it", np.zeros(2), np.asarray([1e-60, 0]))
    assert difference(tiny, 1e-4)
    assert not difference(tiny, 1e-4, 1e-38)


def test_a_wrong_answer_a_wrong_refusal_and_an_answer_that_should_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("tanh", "float32", "plain")

    def judged(run: object, refusal: str | None = None) -> tuple[str, str]:
        monkeypatch.setitem(CHECKS, "new", Check(run, lambda entry: refusal))
        return contract.judge("new", case)

    def failing(case: Case) -> object:
        raise TypeError("step: no")
        yield

    right, wrong = ([Comparison("it", 1.0, expected)] for expected in (1.0, 2.0))
    assert judged(lambda case: right) == ("ok", "")
    assert judged(lambda case: wrong)[0] == "wrong"
    assert judged(failing) == ("raised", "TypeError: step: no")
    assert judged(failing, "step: no") == ("refused", "")
    assert judged(failing, "step: yes")[0] == "raised"
    assert judged(lambda case: right, "step: no")[0] == "wrong"
