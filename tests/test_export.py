"""Programs as files: of `jax.export`, and of JAX's persistent compilation cache."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.compilation_cache import compilation_cache
from slices import covering

import bptt_jax as bptt

EVENTS: Counter[str] = Counter()
jax.monitoring.register_event_listener(lambda event, **_: EVENTS.update([event]))


def loss(states):
    return jnp.sum(jnp.square(states[-1]))


@pytest.mark.parametrize("measured", [bptt.adjoints, bptt.gradient_flow])
def test_a_program_comes_back_from_its_file(measured) -> None:
    """Containers are Python's own, for a file does not know classes: neither a cell's weights nor a `Result`."""
    pytest.importorskip("flatbuffers", reason="jax.export writes files with it")
    cell = bptt.rnn(3)
    params = cell.init(jax.random.key(0), 2)
    xs = jax.random.normal(jax.random.key(1), (5, 2))

    @jax.jit
    def program(weights, xs):
        found = measured(cell.step, type(params)(**weights), cell.initial_state(), xs, loss)
        return jax.tree.leaves(found)

    weights = params._asdict()
    data = export.export(program)(weights, xs).serialize()
    again = export.deserialize(data).call(weights, 2 * xs)
    for got, expected in zip(again, program(weights, 2 * xs), strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="unregistered type"):
        export.export(jax.jit(lambda p: p))(params).serialize()


@pytest.fixture
def cache(tmp_path):
    """JAX's own, of whatever takes any time to compile."""
    changed = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


# All that call LAPACK among them.
MEASUREMENTS = {
    "gradient_flow": lambda *about: bptt.gradient_flow(*about, loss),
    "lyapunov_exponents": bptt.lyapunov_exponents,
    "influence_map": bptt.influence_map,
    "leading_singular_values": lambda *about: bptt.analysis.leading_singular_values(*about, num=1),
    "deer": bptt.deer,
}


@pytest.mark.parametrize("name", covering(MEASUREMENTS, "lyapunov_exponents", "leading_singular_values"))
def test_every_program_is_found_in_the_cache(name, cache) -> None:
    cell = bptt.rnn(2)
    about = cell.init(jax.random.key(0), 2), cell.initial_state(), jnp.ones((4, 2))
    first = MEASUREMENTS[name](lambda *given: cell.step(*given), *about)
    EVENTS.clear()
    again = MEASUREMENTS[name](lambda *given: cell.step(*given), *about)  # another function, so traced anew
    assert EVENTS["/jax/compilation_cache/cache_hits"] >= 1
    assert EVENTS["/jax/compilation_cache/cache_misses"] == 0
    for got, expected in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(got, expected)
