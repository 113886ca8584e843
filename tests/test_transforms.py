"""`jit`, `vmap` and `grad` of every public function; one trace for one shape."""

import inspect
from dataclasses import replace
from functools import partial

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from slices import covering
from surface import PUBLIC

import bptt_jax as bptt
from bptt_jax.cells.keras_weights import keras_layer

XS = np.asarray([[0.3, -0.2], [0.1, 0.5], [-0.4, 0.2]])
KEY = jax.random.key(0)
W = np.asarray([[0.6, 0.5], [-0.3, 0.8]])
MATRICES = np.stack([W, W.T + 0.3, np.asarray([[2.0, 0.1], [0.4, 1.0]])])


def step(w, h, x):
    return jnp.tanh(w @ h + x)


def loss(states):
    return jnp.sum(jnp.square(states[-1])) + jnp.sum(states[0])


def along(function, *arguments, **options):
    def of_weights(w):
        return function(step, w, jnp.full(2, 0.1, w.dtype), jnp.asarray(XS, w.dtype), *arguments, **options)

    return of_weights


def adapted(w):
    cell = eqx.nn.GRUCell(2, 2, key=jax.random.key(0), dtype=w.dtype)
    adapted_step, params = bptt.from_equinox(cell)
    return adapted_step(eqx.tree_at(lambda c: c.weight_hh, params, jnp.concatenate([w, w, w])), w[0], w[1])


def from_nnx(w):
    cell = nnx.eval_shape(lambda: nnx.SimpleCell(2, 2, dtype=w.dtype, param_dtype=w.dtype, rngs=nnx.Rngs(0)))
    nnx.update(cell, filled(nnx.state(cell), w))
    step, params = bptt.from_nnx(cell)
    return step(params, w[0], w[1])


def from_linen(w):
    module = nn.SimpleCell(2, dtype=w.dtype, param_dtype=w.dtype)
    step, params = bptt.from_linen(module, filled(jax.eval_shape(module.init, KEY, w[0], w[1]), w))
    return step(params, w[0], w[1])


def from_torch(w):
    weights = {
        f"{what}_l{k}": jnp.concatenate([w, w.T, w]) for what in ("weight_ih", "weight_hh") for k in range(2)
    }
    biases = {f"bias_{what}_l{k}": jnp.concatenate([w[0], w[1], w[0]]) for what in ("ih", "hh") for k in range(2)}
    step, params, state0 = bptt.from_torch(weights | biases)
    return step(params, state0, w[1])


def from_keras(w):
    """By its arrays: Keras itself would have to be there."""
    arrays = [jnp.concatenate([w, w.T, w], axis=1)] * 2 + [jnp.stack([w.ravel()[jnp.arange(6) % 4]] * 2)]
    step, params, state0 = keras_layer("layer", "GRU", arrays, {})
    return step(params, state0, w[1])


def from_haiku(w):
    shapes = jax.eval_shape(hk.transform(lambda x, h: hk.GRU(2)(x, h)).init, KEY, w[0], w[1])
    step, params = bptt.from_haiku(lambda: hk.GRU(2), filled(shapes, w))
    return step(params, w[0], w[1])


def fixed_points(w):
    x = jnp.asarray(XS[0], w.dtype)
    found = bptt.fixed_points(step, w, jnp.asarray(XS, w.dtype), x, rhs=lambda w, h, x: step(w, h, x) - h)
    return replace(found, iterations=None, representatives=None)  # which the last bit decides


def gradient_noise(w):
    xs = jnp.asarray([XS, XS[::-1], 0.5 - XS], w.dtype)
    found = bptt.analysis.gradient_noise(step, w, jnp.full(2, 0.1, w.dtype), xs, loss)
    return replace(found, horizon=found.whole)  # a whole number of steps


def filled(shapes, w):
    return jax.tree.map(lambda a: jnp.resize(w, a.shape), shapes)


def influence(w):
    log_norms = along(bptt.influence_map)(w).log_norms
    return jnp.where(log_norms == -jnp.inf, 0, log_norms)  # of the later on the earlier: minus infinity


def cell(make):
    def of_weights(w):
        params = jax.tree.map(
            lambda a: jnp.full(a.shape, 0.3, w.dtype) * w[0, 0],
            jax.eval_shape(lambda key: make(2, dtype=w.dtype).init(key, 2), jax.random.key(0)),
        )
        return make(2, dtype=w.dtype).step(params, make(2, dtype=w.dtype).initial_state(), w[0])

    return of_weights


def smooth(make):
    """A step has no differences to compare with: a tanh for the spike."""
    return partial(make, spike=jnp.tanh) if "spike" in inspect.signature(make).parameters else make


def turned(w, h, x):
    return w[0] * jnp.stack(
        [jnp.cos(w[1]) * h[0] - jnp.sin(w[1]) * h[1], jnp.sin(w[1]) * h[0] + jnp.cos(w[1]) * h[1]]
    )


def calibrated(w, **options):
    """The rate is log v, of whatever angle: a search has no derivative."""
    w = jax.lax.stop_gradient(w)
    options = {"low": 0.01, "high": 2.0, "target": -0.2, "length": 3} | options
    return bptt.calibrate(lambda v, angle: (turned, (v, angle)), w[0], None, keys=w[:1, 0], **options)


def calibrated_cell(w):
    """By a cell that checks nothing of a number that is traced, for which Python would be called."""

    def make(value):
        return bptt.Cell(lambda key, size: (value, jnp.ones((), w.dtype)), lambda: jnp.ones(2, w.dtype), turned)

    w, keys = jax.lax.stop_gradient(w), jax.random.split(jax.random.key(0), 2)
    xs = jnp.stack([w, w])
    return bptt.analysis.calibrate_cell(
        make, xs, lambda s: s[-1, 0], low=0.1, high=2.0, target=-0.5, keys=keys, batched=True
    )


DIAGONAL = bptt.parallel.DiagonalStep(lambda w, x: (jnp.tanh(w[0]), w[1] * x))

# Each is a function of one 2 x 2 matrix: the weights of a step, or one of three matrices.
OF_WEIGHTS = {
    "unroll": along(bptt.unroll),
    "unroll remat": along(bptt.unroll, remat=2),
    "final_state": along(bptt.final_state),
    "jacobians": along(bptt.jacobians),
    "adjoints": along(bptt.adjoints, loss),
    "temporal_contributions": along(bptt.temporal_contributions, loss),
    "gradient_flow": along(bptt.gradient_flow, loss),
    "gradient_noise": gradient_noise,
    "truncation_bias": along(bptt.truncation_bias, loss, longest=2),
    "gradient_by_lag": along(bptt.analysis.gradient_by_lag, loss, parts=(1,)),
    "recommend_gain": lambda w: along(bptt.analysis.recommend_gain, loss, threshold=0.5)(w).nearest,
    "calibrate": lambda w: calibrated(w, loss=lambda states: states[-1, 0]).value,
    "calibrate_cell": lambda w: calibrated_cell(w).value,
    "lyapunov_exponents": along(bptt.lyapunov_exponents, warmup=1),
    "covariant_vectors": along(bptt.covariant_vectors, warmup=0, cooldown=0, unstable=1),
    "modal_coordinates": lambda w: bptt.analysis.modal_coordinates(
        along(bptt.unroll)(w), bptt.eigensystem(w), origin=w[0]
    ),
    "influence_map": influence,
    "fixed_points": fixed_points,
    "sample_starts": lambda w: bptt.analysis.sample_starts(w, 3, key=KEY),
    "deer": lambda w: along(bptt.deer)(w).states,
    "predict_parallel": along(bptt.predict_parallel),
    "leading_singular_values": along(bptt.analysis.leading_singular_values, num=2),
    "leading_eigenvalues": along(bptt.analysis.leading_eigenvalues, num=2),
    "product_singular_values": along(bptt.analysis.product_singular_values, num=2),
    "from_equinox": adapted,
    "from_nnx": from_nnx,
    "from_linen": from_linen,
    "from_haiku": from_haiku,
    "from_keras": from_keras,
    "from_torch": from_torch,
    "stack": lambda w: bptt.stack(step, step)((w, w.T), (w[0], w[1]), w[1]),
    **{name: cell(smooth(entry.make)) for name, entry in bptt.cells.ATLAS.items()},
    "unroll_linear": lambda w: bptt.unroll_linear(DIAGONAL, w, w[0], jnp.asarray(XS, w.dtype)),
    "ravel_state": lambda w: bptt.ravel_state({"a": w[0], "b": w})[1](bptt.ravel_state({"a": w[0], "b": w})[0] * 2),
}
OF_MATRICES = {
    "singular_values": bptt.singular_values,
    "eigenvalues": bptt.eigenvalues,
    "eigensystem": bptt.eigensystem,
    "singular_vectors": bptt.linalg.singular_vectors,
    "spectral_norm": bptt.linalg.spectral_norm,
    "spectral_radius": bptt.linalg.spectral_radius,
    "condition_number": bptt.linalg.condition_number,
    "jacobian_product": lambda w: bptt.jacobian_product(jnp.stack([w, w + 1, w])),
    "adaptive_window": lambda w: bptt.analysis.adaptive_window(
        -jnp.arange(5.0, dtype=w.dtype) * (1 + jnp.square(w[0, 0])), jnp.square(w[1, 1]), k1=2
    ),
    "product_log_norms": lambda w: bptt.product_log_norms(jnp.stack([w, w + 1, w])),
    "product_singular_vectors": lambda w: bptt.linalg.product_singular_vectors(jnp.stack([w, w + 1, w])).log_values,
    "prefix_products": lambda w: bptt.linalg.prefix_products(jnp.stack([w, w + 0.9, w])),
    "parallel_adjoints": lambda w: bptt.parallel.parallel_adjoints(
        jnp.stack([w, w + 1, w]), jnp.stack([w[0], w[1], w[0]])
    ),
    "suffix_products": lambda w: bptt.linalg.suffix_products(jnp.stack([w, w + 1, w])),
}
FUNCTIONS = OF_WEIGHTS | OF_MATRICES
# All cells are compared in test_cell_oracles.py.
ALWAYS = set(FUNCTIONS) - set(bptt.cells.ATLAS) | {"rnn", "lstm", "lru"}


def test_every_public_function_is_here():
    """Of the floors below the remedies, which test their own."""
    functions = {
        member.__name__
        for member in PUBLIC.values()
        if inspect.isfunction(member)
        and member.__module__.split(".")[1] in ("step", "linalg", "recurrence", "cells", "analysis", "parallel")
        and not member.__module__.endswith(("initializers", "surrogates", "truncation"))
    }
    # One takes a module of PyTorch, the other wants double precision, and has tests of its own.
    assert functions <= {*FUNCTIONS, "from_torchrecurrent", "gradient_precision"}


@pytest.mark.parametrize("name", covering(list(FUNCTIONS), *(name for name in FUNCTIONS if name in ALWAYS)))
def test_jit_vmap_and_grad(name, x64):
    """A jitted batch gives what the function gives for each matrix by itself, differentiated beside; reverse mode
    against central differences, over all floating outputs in random proportions."""
    function, rng = FUNCTIONS[name], np.random.default_rng(0)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def mixed(w):
        given = outputs = function(w)
        if name == "gradient_flow":  # within T the horizon is a whole number of steps
            leaves = replace(outputs.leaves, horizon=outputs.loss)
            outputs = replace(outputs, horizon=outputs.loss, leaves=leaves)
        floating = [a for a in jax.tree.leaves(outputs) if jnp.issubdtype(a.dtype, jnp.inexact)]
        parts = [part for a in floating for part in ((a.real, a.imag) if jnp.iscomplexobj(a) else (a,))]
        return sum(jnp.sum(part * rng.standard_normal(part.shape)) for part in parts), given

    together = jax.jit(jax.vmap(function))(MATRICES)
    for k, matrix in enumerate(MATRICES):
        _, alone = mixed(matrix)[0]
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(np.asarray(a)[k], b, rtol=1e-9, atol=1e-12)
    gradient, eps = mixed(W)[1], 1e-6
    for index in np.ndindex(2, 2):
        shift = np.zeros((2, 2))
        shift[index] = eps
        slope = (mixed(W + shift)[0][0] - mixed(W - shift)[0][0]) / (2 * eps)
        # eps^2 of truncation, 1e-16 / eps of rounding, times derivatives of the order of 10.
        np.testing.assert_allclose(gradient[index], slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["unroll", "final_state", "jacobians", "adjoints", "temporal_contributions", "gradient_flow"]
)
def test_one_trace_for_one_shape(name):
    function, traces = getattr(bptt, name), []

    def counted(w, h, x):
        traces.append(None)
        return w * h + x

    arguments = (loss,) if name in ("adjoints", "temporal_contributions", "gradient_flow") else ()
    for k in range(3):
        inputs = np.float32(0.5 + k), np.ones(1, np.float32), np.full((4 if k < 2 else 5, 1), k, np.float32)
        if k < 2:
            function(counted, *inputs, *arguments)
        else:
            jax.eval_shape(lambda *inputs: function(counted, *inputs, *arguments), *inputs)
        if k == 0:
            first = len(traces)
        assert (len(traces) == first) == (k < 2)  # other values are found again, another length is not


# --- JAX's flags that look for NaN and infinity

MARKED = {
    "iterations that were not made": lambda: bptt.deer(_halved, 0.5, jnp.ones(2), length=3),
    "one sequence's noise": lambda: bptt.analysis.gradient_noise(
        _halved, 0.5, jnp.ones((2, 2)), None, _of_last, in_axes=(0, None, None), length=3
    ),
    "what does not yet act": lambda: bptt.influence_map(_halved, 0.5, jnp.ones(2), length=3, intervals=2),
    "the logarithm of zero": lambda: bptt.product_log_norms(jnp.zeros((3, 2, 2))),
    "no gradient": lambda: bptt.truncation_bias(_halved, None, jnp.ones(2), jnp.ones((3, 2)), _of_last),
}


def _halved(w, h, x):
    return 0.5 * h if w is None else w * h


def _of_last(states):
    return jnp.sum(states[-1])


@pytest.mark.parametrize("name", MARKED)
def test_flags_that_look_for_nan_take_no_mark_for_a_fault(name) -> None:
    with jax.debug_nans(True), jax.debug_infs(True):
        found = MARKED[name]()
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("function", [bptt.unroll, bptt.final_state, bptt.jacobians])
def test_flags_that_look_for_nan_see_states_and_jacobians(function) -> None:
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        function(lambda p, h, x: jnp.log(h - 2), None, jnp.ones(1), length=2)
