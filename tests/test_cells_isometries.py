"""Cells with orthogonal and unitary weights: they stay so, and nothing of them is NaN where something is zero."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from slices import covering

import bptt_jax as bptt

N, I = 12, 3
LINEAR = {
    "exp": partial(bptt.cells.orthogonal, activation=jax.nn.identity),
    "cayley": partial(bptt.cells.orthogonal, map="cayley", negative=5, activation=jax.nn.identity),
    "unitary": bptt.cells.unitary,  # whose modReLU, without bias, is the identity
    "householder": partial(bptt.cells.householder, reflections=7, activation=jax.nn.identity),
}


def moved(tree, scale):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + jnp.asarray(scale * rng.standard_normal(a.shape), a.dtype), tree)


@pytest.mark.parametrize(
    ("name", "dtype"),
    covering(
        [(name, dtype) for name in LINEAR for dtype in ("float32", "float64")],
        ("exp", "float32"),
        ("cayley", "float64"),
        ("unitary", "float32"),
        ("householder", "float64"),
    ),
)
def test_the_jacobian_of_the_linear_part_is_orthogonal(name, dtype, x64):
    """From where they start, after random moves, small and large: to rounding."""
    cell = LINEAR[name](N, dtype=dtype)
    begun = jax.jit(lambda key: cell.init(key, I))(jax.random.key(0))
    jacobian = jax.jit(lambda params, xs: bptt.jacobians(cell.step, params, cell.initial_state(), xs)[-1])
    found = []
    for scale in (0.0, 0.1, 3.0):
        params = moved(begun, scale)
        params = params._replace(bias=jnp.zeros_like(params.bias))
        matrix = np.asarray(jacobian(params, jnp.ones((2, I), dtype)), np.float64)
        error = np.max(np.abs(matrix @ matrix.T - np.eye(len(matrix))))
        assert error < 40 * jnp.finfo(dtype).eps
        found.append(matrix)
    assert np.max(np.abs(found[0] - found[1])) > 0.01


@pytest.mark.parametrize(
    ("map", "largest"), covering([("cayley", np.pi / 2), ("exp", np.pi)], ("cayley", np.pi / 2))
)
def test_initial_spectrum(map, largest):
    """In pairs on the unit circle, their angles uniform up to `largest`; an odd unit has the eigenvalue 1."""
    cell = bptt.cells.orthogonal(101, map=map)
    plain = cell.step.plain(cell.init(jax.random.key(0), I))
    angles = np.angle(scipy.linalg.eigvals(np.asarray(plain.recurrent, np.float64)))
    assert np.sum(np.abs(angles) < 1e-6) == 1
    quarters = np.histogram(np.abs(angles), 4, (0, largest + 1e-6))[0]
    assert sum(quarters) == 101
    assert np.all(quarters > 10)


@pytest.mark.parametrize("map", covering(["cayley", "exp"], "cayley"))
def test_plain_weights(map, x64):
    """The step takes them as it takes the parameters, and gradients come back through them; `unroll` and `adjoints`
    make them once, and take their derivative once: no step of the backward pass multiplies matrices, nor solves."""
    cell = bptt.cells.orthogonal(4, map=map, negative=1, dtype=jnp.float64)
    params = moved(cell.init(jax.random.key(0), I), 0.3)
    xs = jax.random.normal(jax.random.key(1), (5, I), jnp.float64)

    def step_by_step(params):
        states = jax.lax.scan(lambda h, x: (new := cell.step(params, h, x), new), jnp.ones(4), xs)[1]
        return jnp.sum(jnp.sin(states))

    def unrolled(make, params):
        return jnp.sum(jnp.sin(bptt.unroll(cell.step, make(params), jnp.ones(4), xs)))

    expected, gradient = jax.jit(jax.value_and_grad(step_by_step))(params)
    assert dear_in_loops(jax.grad(step_by_step), params)
    for make in (cell.step.plain, lambda params: params):
        found, through = jax.jit(jax.value_and_grad(partial(unrolled, make)))(params)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), through, gradient)
        assert not dear_in_loops(jax.grad(partial(unrolled, make)), params)

    def backwards(params):
        return bptt.adjoints(
            cell.step, params, jnp.ones(4), xs, lambda states: jnp.sum(jnp.sin(states))
        ).params_grad

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), backwards(params), gradient)
    assert not dear_in_loops(backwards, params)


def dear_in_loops(function, *args):
    """Whether a loop over five instants multiplies matrices, or solves: the exponential map has loops of its own."""

    def within(jaxpr, looped):
        for eqn in jaxpr.eqns:
            matrices = eqn.primitive.name == "dot_general" and all(v.aval.ndim == 2 for v in eqn.invars)
            if looped and (matrices or eqn.primitive.name in ("triangular_solve", "custom_linear_solve")):
                yield eqn
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from within(inner, looped or eqn.params.get("length") == 5)

    return any(True for _ in within(jax.make_jaxpr(function)(*args).jaxpr, False))


@pytest.mark.parametrize("name", covering(["orthogonal", "unitary", "householder"], "unitary", "householder"))
def test_at_zero(name):
    """Derivatives of a state and an input of zero, first and second, by every parameter, also where a reflection's
    vector is zero; at b >= 0 modReLU's slope is 1 there."""
    cell = getattr(bptt.cells, name)(4, dtype=jnp.float32)
    params = jax.jit(lambda key: cell.init(key, I))(jax.random.key(0))
    if name == "householder":
        params = params._replace(reflections=params.reflections.at[1].set(0))
    if name == "unitary":
        params = params._replace(reflections_re=jnp.zeros((2, 4)), reflections_im=jnp.zeros((2, 4)))

    def end(params, h):
        states = bptt.unroll(cell.step, params, h, jnp.zeros((3, I)))
        return jnp.sum(states.real**2) + jnp.sum(states.real)

    def derivatives(params, h):
        return jax.jvp(lambda p: jax.grad(end)(p, h), (params,), (params,))

    derivatives = jax.jit(derivatives)
    for bias in (-0.1, 0.0, 0.1):
        params = params._replace(bias=jnp.full(4, bias))
        found = derivatives(params, cell.initial_state())
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
        if name != "householder":
            jacobian = bptt.jacobians(cell.step, params, cell.initial_state(), jnp.zeros((1, I)))[0]
            expected = np.eye(len(jacobian)) if bias >= 0 else 0 * jacobian
            np.testing.assert_allclose(jacobian @ jacobian.T, expected, atol=1e-5)


@pytest.mark.parametrize("scale", covering([1e-30, 1e30], 1e30))
def test_reflections_of_any_length(scale):
    """A reflection depends on the direction of its vector alone."""
    cell = bptt.cells.householder(4, dtype=jnp.float32)
    params = cell.init(jax.random.key(0), I)
    given = params._replace(reflections=scale * params.reflections)
    h, x = jnp.ones(4), jnp.ones(I)
    step, slopes = jax.jit(cell.step), jax.jit(jax.grad(lambda p: jnp.sum(cell.step(p, h, x) ** 2)))
    np.testing.assert_allclose(step(given, h, x), step(params, h, x), rtol=1e-5)
    gradient, expected = slopes(given).reflections, slopes(params).reflections
    np.testing.assert_allclose(scale * gradient, expected, rtol=1e-4, atol=1e-5)


def test_arguments():
    with pytest.raises(ValueError, match="negative: expected an integer from 0 to 4"):
        bptt.cells.orthogonal(4, negative=5)
    assert bptt.cells.householder(4, reflections=9).init(jax.random.key(0), I).reflections.shape == (4, 4)
    assert bptt.cells.orthogonal(1).step(
        bptt.cells.orthogonal(1).init(jax.random.key(0), I), jnp.ones(1), jnp.ones(I)
    ).shape == (1,)


@pytest.mark.parametrize("name", covering(["orthogonal", "unitary"], "unitary"))
def test_mod_relu_at_any_scale(name):
    """NaN stays NaN; the direction of the smallest numbers has a derivative, though their square is 0."""
    cell = getattr(bptt.cells, name)(2)
    params, h = cell.init(jax.random.key(0), I), cell.initial_state()
    assert np.all(np.isnan(cell.step(params, h, jnp.full(I, jnp.nan))))

    def size(params, h, x):
        return jnp.sum(jnp.abs(cell.step(params, h, x)))

    biased = params._replace(bias=jnp.full(2, 0.5))
    slopes = jax.jit(jax.grad(size, argnums=(0, 1, 2)))
    for of in (params, biased):
        found, expected = (slopes(of, h, jnp.full(I, scale)) for scale in (1e-25, 1.0))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-4)
