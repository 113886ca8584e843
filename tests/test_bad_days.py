"""Bad inputs to every public function, and faults of the world."""

import re

import jax
import numpy as np
import pytest
from bad_inputs import TARGETS, Case, cases, commands, judge, judge_command, judging, refused_late
from faults import faults
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from slices import covering
from spoilers import Spoiler
from surface import PUBLIC
from test_transforms import ALWAYS

import bptt_jax as bptt

# All of them, those that cost a compilation each too, in `benchmarks/bad_days.py`.
CASES = [case for case in cases() if not case.spoiler.compiles][::3]

# Those that take a process or a whole diagnosis: one of each kind.
FAULTS = faults()
LONG = (
    "half a figure",
    "while training",
    "a file system of 64 kB",
    "SIGTERM in diagnosing",
    "SIGKILL in diagnosing",
)
LONG_KINDS = ("name", "two at once")
PROMPT = [fault for fault in FAULTS if fault.name not in LONG and fault.kind not in LONG_KINDS and not fault.rare]


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def programs_go_where_they_take_much_memory() -> None:
    """Not here, where good inputs are drawn once and what is compiled before a refusal is counted."""


def test_they_are_many_and_of_every_function() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 500
    named = {re.match(r"bptt\.([\w.]+)", target.name) for target in TARGETS}
    called = {"parallel.DeltaStep", "parallel.DiagonalStep", "Monitor"}
    types = {name for name in PUBLIC if name.split(".")[-1][0].isupper()} - called
    readers = {"remedies.clip_records", "remedies.skip_records"}
    assert {found[1] for found in named if found} == set(PUBLIC) - types - readers


NAMES = list(dict.fromkeys(target.name for target in TARGETS))
OFTEN = [name for name in NAMES if name.split(".")[-1] not in bptt.cells.ATLAS or name.split(".")[-1] in ALWAYS]


@pytest.mark.parametrize("name", covering(NAMES, *OFTEN))
def test_bad_inputs(name) -> None:
    own = [case for case in CASES if case.target.name == name]
    with judging():
        outcomes = {case.id: judge(case) for case in own}
        late = refused_late([case for case in own if outcomes[case.id][0] == "refused"])
    assert {i: why for i, (outcome, why) in outcomes.items() if outcome == "wrong"} == {}
    assert late == []


def test_bad_commands(tmp_path) -> None:
    outcomes = {" ".join(c): judge_command(c, tmp_path) for c in commands()}
    assert {i: why for i, (outcome, why) in outcomes.items() if outcome == "wrong"} == {}
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


ANY_ARRAY = arrays.arrays(
    st.one_of(
        arrays.scalar_dtypes(),
        arrays.array_dtypes(max_size=2),
    ),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
RECURRENT = [t for t in TARGETS if t.name in ("bptt.unroll", "bptt.final_state", "bptt.jacobians")]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(RECURRENT), st.sampled_from(["state0", "xs"]), ANY_ARRAY)
def test_any_array(target, argument, array) -> None:
    """Refused clearly, or answered as the same numbers in this machine's single precision are."""

    def plain(_):
        return np.asarray(array, np.complex64 if array.dtype.kind == "c" else np.float32)

    case = Case(target, argument, "drawn", Spoiler(lambda _: array, plain, marked=True))
    with judging():
        outcome, why = judge(case)
    assert outcome != "wrong", why


@pytest.mark.parametrize("fault", covering(FAULTS, *PROMPT), ids=lambda fault: fault.id)
def test_faults(fault, tmp_path) -> None:
    fault.survive(tmp_path)
