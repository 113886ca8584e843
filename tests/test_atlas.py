"""The atlas says of every cell what is so, and every cell keeps to what cells are."""

import inspect
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

import bptt_jax as bptt
from bptt_jax.recurrence.delta import LinearStep
from bptt_jax.step import is_differentiable

ATLAS = bptt.cells.ATLAS
N, I = 4, 3


def described(state):
    """Names and shapes as in `AtlasEntry.state`, of a state of N units."""
    return [(name, shape) for name, shape in re.findall(r"(\w+) (\[[^]]*\])", state)]


def shape_of(text, n):
    entries = [entry for entry in text.strip("[]").split(",") if entry.strip()]
    return tuple(int(eval(re.sub(r"(\d)N", r"\1*N", entry), {"N": n})) for entry in entries)


@pytest.mark.parametrize("name", ATLAS)
def test_entry(name):
    entry = ATLAS[name]
    assert entry.make.__name__ == name
    assert getattr(bptt.cells, name) is entry.make
    assert entry.equations
    assert 1980 < entry.year < 2030
    assert str(entry.year) in inspect.getdoc(entry.make)
    for n in (4, 8):
        leaves = jax.tree_util.tree_leaves_with_path(entry.make(n).initial_state())
        said = described(entry.state)
        assert [shape_of(shape, n) for _, shape in said] == [np.shape(leaf) for _, leaf in leaves]
        if len(leaves) > 1:
            assert [part for part, _ in said] == [jax.tree_util.keystr(path).strip(".") for path, _ in leaves]


@pytest.mark.parametrize("name", ATLAS)
def test_a_cell_reaches_another_process(name):
    cell = ATLAS[name].make(N, dtype=jnp.float32)
    again = pickle.loads(pickle.dumps(cell))
    assert again.step == cell.step == pickle.loads(pickle.dumps(cell.step))
    of_both = [jax.eval_shape(lambda key, c=c: (c.init(key, I), c.initial_state()), jax.random.key(0))
               for c in (cell, again)]  # fmt: skip
    assert of_both[0] == of_both[1]


@pytest.mark.parametrize("name", ATLAS)
def test_what_a_cell_is(name):
    """Its size comes first, then options with defaults; parameters and state in the dtype asked for."""
    make = ATLAS[name].make
    arguments = list(inspect.signature(make).parameters.values())
    assert arguments[0].name == "hidden_size"
    assert all(a.kind is a.KEYWORD_ONLY and a.default is not a.empty for a in arguments[1:])
    assert make(N).step == make(N).step  # what was compiled for one is found again for another
    for dtype in (jnp.float32, jnp.bfloat16):
        try:
            cell = make(N, dtype=dtype)
        except TypeError:
            assert dtype == jnp.bfloat16, "single precision is for all"
            continue
        params = jax.eval_shape(lambda key, cell=cell: cell.init(key, I), jax.random.key(0))
        state = cell.initial_state()
        new = jax.eval_shape(cell.step, params, state, jax.ShapeDtypeStruct((I,), dtype))
        for leaf in filter(is_differentiable, jax.tree.leaves((params, state, new))):
            assert leaf.dtype in (dtype, jnp.complex64)
        assert jax.tree.map(lambda a: a.shape, new) == jax.tree.map(lambda a: a.shape, state)


LINEAR = [name for name in ATLAS if isinstance(ATLAS[name].make(N).step, LinearStep)]


@pytest.mark.parametrize("name", covering(LINEAR, "linear_transformer", "s4d", "gated_deltanet"))
def test_parallel_in_time(name, x64):
    """Where a step is linear in its state, the scan over time gives what the steps give one by one."""
    cell = ATLAS[name].make(N, dtype=jnp.float64)
    params = jax.jit(lambda key: cell.init(key, I))(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (9, I), jnp.float64)
    arguments = cell.step, params, cell.initial_state(), xs
    expected = bptt.unroll(*arguments)
    for found in (bptt.unroll_linear(*arguments), bptt.deer(*arguments).states):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
