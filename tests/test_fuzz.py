"""Some cases of `fuzz.py`, of which the command tries as many as one likes, and its judge."""

from typing import Any

import numpy as np
import pytest
from fuzz import CHECKS, ROUNDINGS, SHARED, TIMES, Compared, Program, judge
from fuzz_reference import Reference, draw_case
from fuzz_steps import EXTENDED, LONG, RUNS

pytestmark = pytest.mark.skipif(not EXTENDED, reason="numpy.longdouble is no wider than float64 here")

# Between them they have every check; padding, resets, a counter, a token, complex numbers.
STRUCTURES = (16, 33, 38, 63, 11)
SOME = {63: ["deer", "adjoints remat"], 11: ["tbptt"]}  # what the others do not have


def program_of(structure: int) -> Program:
    program = Program(structure * SHARED)
    program.checks = SOME.get(structure, program.checks)
    return program


@pytest.mark.parametrize("structure", STRUCTURES)
def test_random_cases(structure: int) -> None:
    program = program_of(structure)
    for seed in range(structure * SHARED, structure * SHARED + 4):
        found = program.try_case(seed)
        assert not found.wrong, f"seed {seed}: {found.wrong}"


def test_every_check_is_in_the_slice() -> None:
    assert {name for structure in STRUCTURES for name in program_of(structure).checks} == set(CHECKS)
    assert all(set(names) <= set(Program(number * SHARED).checks) for number, names in SOME.items())


def test_a_seed_draws_the_same_case_always() -> None:
    one, other = (draw_case(Program(320).structure, np.random.default_rng([323, 2])) for _ in range(2))
    assert str(one) == str(other)


def test_roundings_move_what_cancels_and_leave_zeros() -> None:
    program = Program(38 * SHARED)
    of = Reference(draw_case(program.structure, np.random.default_rng([760, 2])), np.random.default_rng(0))
    a = np.broadcast_to(np.asarray([0.0, 1.0, 1.0]), (RUNS, 3)).astype(LONG)
    moved = of.arithmetic.rounded(a, np.asarray([0.0, 1.0, 1e6]))
    np.testing.assert_array_equal(moved[0], a[0])
    assert np.all(moved[:, 0] == 0)
    spread = np.max(np.abs(moved - moved[0]), axis=0)
    assert 0 < spread[1] <= 2 * of.eps
    assert 1e4 * spread[1] < spread[2] <= 2e6 * of.eps


def expected(*numbers: float, spread: float = 0.0) -> np.ndarray:
    runs = np.zeros((RUNS, 1))
    runs[1] = spread
    return (np.asarray(numbers) + runs).astype(LONG)


@pytest.mark.parametrize(
    ("compared", "says", "is_open"),
    [
        (Compared("it", [1.0, 2.0], expected(1, 2)), "", False),
        (Compared("it", [1.0, 2.0 + 1.9e-3 * ROUNDINGS], expected(1, 2)), "", False),
        (Compared("it", [1.0, 2.0 + 2.1e-3 * ROUNDINGS], expected(1, 2)), "off by", False),
        (Compared("it", [1.0 + 1.9e-3 * ROUNDINGS, 2.0], expected(1, 2), 1), "it[0]: off by", False),
        (Compared("it", [1.0 + 9e-3 * TIMES, 2.0], expected(1, 2, spread=1e-2)), "", False),
        (Compared("it", [1.0 + 1.9e-2 * TIMES, 2.0], expected(1, 2, spread=1e-2)), "off by", False),
        (Compared("it", [1.0, 2.0], expected(1, 2, spread=1)), "", True),
        (Compared("it", [1.0, np.nan], expected(1, 2)), "nan", False),
        (Compared("it", [1.0, np.nan], expected(1, np.nan)), "", False),
        (Compared("it", [1.0, np.inf], expected(1, 2, spread=1)), "off by inf", False),
        (Compared("it", [1.0], expected(1, 2)), "shape", False),
        (Compared("it", [-np.inf, 0.0], expected(0, 1), 1, True), "", False),
        (Compared("it", [-np.inf, 0.0], expected(1, 1), 1, True), "off by", False),
        (Compared("it", [0.0, np.inf], expected(1, 1), 1, True), "inf", False),
        (Compared("it", [0.0, 0.1], expected(1, 1), 1, True), "off by", False),
        (Compared("it", [1.2, 2.0], expected(1, 2), slack=0.2), "", True),
    ],
)
def test_judge(compared: Compared, says: str, is_open: bool) -> None:
    fault, found_open = judge(compared._replace(got=np.asarray(compared.got)), 1e-3, 1e-30)
    assert (says in fault) if says else not fault
    assert found_open == is_open


def test_what_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Any:
        raise ValueError("what it was")

    program = Program(38 * SHARED)
    program.checks = ["unroll"]
    program.run["unroll"] = raises
    assert "what it was" in program.try_case(38 * SHARED).wrong[0]
