"""Random steps, states and shapes: three routes to dL/dh_t agree, and what follows from the definitions holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Example, perturbation_gradients, relative_error, users_jit, weighted_loss

import bptt_jax as bptt
from bptt_jax.linalg import logscale

# Every example compiles: few of them, always the same, however long they take.
compiled = partial(settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

ACTIVATIONS = {"tanh": jnp.tanh, "sin": jnp.sin, "softplus": jax.nn.softplus, "identity": jax.nn.identity}
STRUCTURES = {
    "array": lambda parts: parts[0],
    "tuple": tuple,
    "dict": lambda parts: {f"s{k}": part for k, part in enumerate(parts)},
    "nested": lambda parts: [{"a": part[None]} for part in parts],
}


@st.composite
def examples(draw):
    """A network of one to three state leaves, each fed by all of the last state through random weights."""
    dtype = draw(st.sampled_from(["float32", "float64"]))
    structure = draw(st.sampled_from(sorted(STRUCTURES)))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=1 if structure == "array" else 3))
    activations = [ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))] for _ in sizes]
    residual = draw(st.sampled_from([0.0, 0.5, 1.0]))
    gated, autonomous = draw(st.booleans()), draw(st.booleans())
    steps, seed = draw(st.integers(1, 6)), draw(st.integers(0, 2**16))
    return dtype, structure, sizes, activations, residual, gated, autonomous, steps, seed


def build(dtype, structure, sizes, activations, residual, gated, autonomous, steps, seed):
    rng, total = np.random.default_rng(seed), sum(sizes)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    params = [(normal(n, total) / np.sqrt(total), normal(n)) for n in sizes]

    def step(params, state, x):
        leaves, treedef = jax.tree.flatten(state)
        h = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
        new = []
        for (w, b), leaf, phi in zip(params, leaves, activations, strict=True):
            a = phi(w @ h + (b if x is None else b * x))
            a = a * jax.nn.sigmoid(w[:, 0] + h[0]) if gated else a
            new.append(residual * leaf + a.reshape(leaf.shape))
        return treedef.unflatten(new)

    state0 = STRUCTURES[structure]([normal(n) for n in sizes])
    return Example(step, params, state0, None if autonomous else normal(steps), steps)


@compiled(max_examples=2)
@given(examples(), st.integers(0, 63))
def test_three_routes_to_the_adjoints(drawn, mask):
    """The explicit scan; products of Jacobians applied to immediate derivatives; zero perturbations."""
    dtype, steps = drawn[0], drawn[-2]
    with jax.enable_x64(dtype == "float64"):
        example = build(*drawn)
        step, params, state0, xs, length = example
        read = [bool(mask >> k & 1) for k in range(steps)]
        weights = jnp.asarray(read if any(read) else [1.0] * steps, dtype)

        @jax.jit
        def all_routes():
            loss = weighted_loss(weights)
            scanned = bptt.adjoints(step, params, state0, xs, loss, length=length)
            jacobians = bptt.jacobians(step, params, state0, xs, length=length)
            return scanned, jacobians, jax.grad(loss)(scanned.states), perturbation_gradients(example, loss)

        scanned, jacobians, immediate, (params_grad, state0_grad, perturbed) = all_routes()
        adjoints, log_norms = scanned.adjoints, np.asarray(scanned.log_norms)  # made of log scale when read

    def vectors(tree):
        return np.concatenate([np.reshape(a, (steps, -1)) for a in jax.tree.leaves(tree)], axis=1).astype(
            np.float64
        )

    jacobians, local = np.asarray(jacobians, np.float64), vectors(immediate)
    expected = np.zeros_like(local)
    for t in range(steps):  # dL/dh_t is the sum over k >= t of (J_k .. J_{t+1})^T dl/dh_k
        product = np.eye(local.shape[1])
        for k in range(t, steps):
            product = jacobians[k] @ product if k > t else product
            expected[t] += product.T @ local[k]
    tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
    assert relative_error(vectors(adjoints), expected) <= tolerance
    assert relative_error(adjoints, perturbed) <= tolerance
    assert relative_error(scanned.params_grad, params_grad) <= tolerance
    assert relative_error(scanned.state0_grad, state0_grad) <= tolerance
    norms = np.linalg.norm(expected, axis=1)
    seen = norms > 0
    np.testing.assert_allclose(log_norms[seen], np.log(norms[seen]), atol=100 * tolerance)
    assert np.all(log_norms[~seen] == -np.inf)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3),
    st.integers(-100_000, 100_000),
    st.integers(-120, 120),
)
def test_log_norm_is_homogeneous(x, e, scale):
    """``||2^e (2^s x)|| = 2^(e + s) ||x||``, at any exponent."""
    x = np.where(np.abs(x) < 1e-30, 0, np.asarray(x, np.float32))
    whole = float(np.linalg.norm(x.astype(np.float64)))
    expected = np.log(whole) + (e + scale) * np.log(2) if whole else -np.inf
    small = np.ldexp(x, scale).astype(np.float32)
    # What has itself become subnormal or infinite is the caller's loss.
    if np.all(np.isfinite(small)) and np.all((np.abs(small) > 1.2e-38) | (x == 0)):
        np.testing.assert_allclose(
            users_jit(logscale.log_norm)(small, jnp.int32(e)), expected, rtol=1e-6, atol=1e-5
        )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.floats(-3, 3))
def test_product_norms_are_submultiplicative(seed, log_scale):
    """``||P_{t}|| <= ||P_{t+1}|| ||J_t||``, and no less than the product of smallest singular values."""
    factors = np.random.default_rng(seed).standard_normal((8, 3, 3)) * 10.0**log_scale
    norms = np.append(bptt.product_log_norms(factors.astype(np.float32)), 0.0)
    logs = np.log(np.linalg.svd(factors, compute_uv=False))
    steps = norms[:-1] - norms[1:]
    assert np.all(steps <= logs[:, 0] + 1e-4)
    assert np.all(norms[:-1] >= np.cumsum(logs[::-1, 2])[::-1] - 1e-3)
