"""The cell that CONTRIBUTING.md adds, as it stands there."""

import re
from pathlib import Path

import cell_oracles
import jax
import jax.numpy as jnp
from cell_oracles import simple as oracles

import bptt_jax as bptt
from bptt_jax.cells import atlas, simple

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FUNCTION, LINE, ORACLE = re.findall(r"```python\n(.*?)```", PAGE.split("## Adding a cell\n")[1], re.DOTALL)


def added() -> bptt.cells.AtlasEntry:
    family = dict(vars(simple))
    exec(compile(FUNCTION, "function", "exec"), family)
    return eval("{" + LINE + "}", {**vars(atlas), "keeping_rnn": family["keeping_rnn"]})["keeping_rnn"]


def test_it_is_what_its_oracle_says(x64: None) -> None:
    entry, module = added(), {**vars(oracles), "ORACLES": {}}
    exec(compile(ORACLE, "oracle", "exec"), module)
    (oracle,) = module["ORACLES"]["keeping_rnn"]
    found = cell_oracles.compare("keeping_rnn", oracle._replace(make=entry.make))
    assert max(found.states, found.gradients) < oracle.tolerance


def test_it_is_a_cell_of_the_atlas() -> None:
    entry = added()
    assert entry.equations.splitlines()[0] == "s = sigmoid(keep)"
    assert str(entry.year) in entry.make.__doc__
    assert entry.make(4).step is entry.make(5).step
    cell = entry.make(4, dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda key: cell.init(key, 3), jax.random.key(0))
    new = jax.eval_shape(cell.step, params, cell.initial_state(), jax.ShapeDtypeStruct((3,), jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, new))} == {jnp.dtype(jnp.bfloat16)}
    assert new.shape == (4,)
