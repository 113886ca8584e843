"""Each cell against the paper's equations in NumPy, and against other libraries where they are installed."""

import jax
import numpy as np
import pytest
from cell_oracles import N, Oracle, all_oracles, compare, of_jax, restated

import bptt_jax as bptt

ORACLES = all_oracles()
PAIRS = [
    pytest.param(name, oracle, id=f"{name}-{oracle.peer}") for name, found in ORACLES.items() for oracle in found
]


@pytest.mark.parametrize(("name", "oracle"), PAIRS)
def test_states_and_gradients(name: str, oracle: Oracle, x64: None) -> None:
    if oracle.peer != "NumPy" and not oracle.version:
        pytest.skip(f"{oracle.peer} is not installed")
    found = compare(name, oracle)
    assert max(part for part in found if part is not None) < oracle.tolerance


def test_every_cell_has_a_restatement() -> None:
    assert set(ORACLES) == set(bptt.cells.ATLAS)
    assert {found[0].kind for found in ORACLES.values()} == {"numpy"}


def test_a_difference_is_seen(x64: None) -> None:
    """Of states, and of gradients alone."""

    def wrong(p, h, x):
        return np.tanh(p.recurrent @ h + p.input @ x + 1.001 * p.bias)

    def deaf(p, h, xs):
        return bptt.unroll(bptt.rnn(N).step, p._replace(bias=jax.lax.stop_gradient(p.bias)), h, xs)

    assert compare("rnn", restated(wrong)).states > 1e-5
    found = compare("rnn", of_jax("equinox", deaf))
    assert found.states < 1e-14 < 1e-2 < found.gradients
