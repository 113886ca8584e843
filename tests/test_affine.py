"""The associative scan of affine recurrences against a loop over time, and the shape of what it compiles to."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error
from slices import covering

from bptt_jax.linalg import affine
from bptt_jax.linalg.affine import affine_scan, held_scan

D = 3
RTOL = 1e-12  # float64, some tens of roundings


def draw(shape, complex_, seed):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if complex_ else real


def example(steps, full, complex_, batch=()):
    factors = draw((*batch, steps, D, D) if full else (*batch, steps, D), complex_, 0)
    return 0.6 * factors, draw((*batch, steps, D), complex_, 1)


def loop(factors, offsets, reverse):
    """NumPy, instant by instant."""
    h, states = np.zeros_like(offsets[0]), np.zeros_like(offsets)
    for t in reversed(range(len(offsets))) if reverse else range(len(offsets)):
        h = (factors[t] @ h if factors.ndim == 3 else factors[t] * h) + offsets[t]
        states[t] = h
    return states


def sequential(factors, offsets, reverse):
    """The same as one `lax.scan`, for derivatives."""

    def body(h, inputs):
        a, b = inputs
        h = (a @ h if factors.ndim == 3 else a * h) + b
        return h, h

    return jax.lax.scan(body, jnp.zeros_like(offsets[0]), (factors, offsets), reverse=reverse)[1]


def scalar(function, weights, reverse):
    """A real number of which no part of the states drops out, real or imaginary, and not quadratic in them."""

    def value(factors, offsets):
        h = function(factors, offsets, reverse=reverse)
        w = jnp.asarray(weights)
        return jnp.sum(w * jnp.sin(h.real) + (w[::-1] * h.imag**3 if jnp.iscomplexobj(h) else 0))

    return value


@pytest.mark.parametrize(
    ("full", "complex_", "reverse"),
    covering(
        product([False, True], repeat=3),
        (False, False, False), (False, True, True), (True, False, True), (True, True, False),
    ),
)  # fmt: skip
def test_values_and_gradients(full, complex_, reverse, x64):
    @jax.jit
    def both(factors, offsets):
        weights = np.random.default_rng(2).standard_normal(offsets.shape)
        return [
            (f(factors, offsets, reverse=reverse), jax.grad(scalar(f, weights, reverse), (0, 1))(factors, offsets))
            for f in (affine_scan, sequential)
        ]

    for steps in (1, 2, 9):
        factors, offsets = example(steps, full, complex_)
        (got, gradients), (_, expected_gradients) = both(factors, offsets)
        np.testing.assert_allclose(got, loop(factors, offsets, reverse), rtol=RTOL, atol=RTOL)
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_where_it_begins_anew(full, reverse, x64):
    """Values and gradients of the pieces, also where the first of them has left the range."""
    factors, offsets = example(9, full, False)
    begins = np.isin(np.arange(9), [4, 6, 7])
    weights = np.random.default_rng(2).standard_normal(offsets.shape)
    cut = factors.copy()
    cut[begins] = 0

    @jax.jit
    def both(factors, cut, offsets):
        def of(f):
            return lambda a, b: jnp.sum(weights * jnp.sin(f(a, b, reverse=reverse)))

        anew = partial(affine_scan, begins=jnp.asarray(begins))
        return (
            anew(factors, offsets, reverse=reverse),
            jax.grad(of(anew), (0, 1))(factors, offsets),
            jax.grad(of(sequential), (0, 1))(cut, offsets),
        )

    got, gradients, expected = both(factors, cut, offsets)
    np.testing.assert_allclose(got, loop(cut, offsets, reverse), rtol=RTOL, atol=RTOL)
    for gradient, exact, used in zip(gradients, expected, (~begins, np.ones(9, bool)), strict=True):
        np.testing.assert_allclose(gradient[used], exact[used], rtol=RTOL, atol=RTOL)
    np.testing.assert_array_equal(gradients[0][begins], 0)
    spoilt = factors.copy()
    spoilt[[7, 8] if reverse else [1, 2]] = np.inf
    got = affine_scan(spoilt, offsets, begins=jnp.asarray(begins), reverse=reverse)
    piece = slice(0, 5) if reverse else slice(4, 9)
    np.testing.assert_allclose(got[piece], loop(cut, offsets, reverse)[piece], rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize(("full", "complex_", "reverse"), [(False, False, True), (True, False, False)])
def test_hessian(full, complex_, reverse, x64):
    """With respect to factors and offsets and across the two, where none of the blocks is zero."""
    factors, offsets = example(4, full, complex_)
    weights = np.random.default_rng(2).standard_normal(offsets.shape)

    @jax.jit
    def both(*arguments):
        return [jax.hessian(scalar(f, weights, reverse), (0, 1))(*arguments) for f in (affine_scan, sequential)]

    got, expected = both(factors, offsets)
    for block, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.any(other != 0)
        np.testing.assert_allclose(block, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("full", [False, True])
def test_forward_mode(full, x64):
    factors, offsets = example(6, full, True)
    tangents = draw(factors.shape, True, 3), draw(offsets.shape, True, 4)

    @jax.jit
    def both(*tangents):
        return [
            jax.jvp(lambda *a, f=f: f(*a, reverse=True), (factors, offsets), tangents)[1]
            for f in (affine_scan, sequential)
        ]

    np.testing.assert_allclose(*both(*tangents), rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
@pytest.mark.parametrize("full", [False, True])
def test_vmap_of_values_and_gradients(full, axes, x64):
    batch = example(5, full, False, batch=(2,))
    weights = np.random.default_rng(2).standard_normal((5, D))
    arguments = [a if axis == 0 else a[0] for a, axis in zip(batch, axes, strict=True)]
    evaluate = jax.value_and_grad(scalar(affine_scan, weights, False), (0, 1))
    expected_of = jax.jit(jax.value_and_grad(scalar(sequential, weights, False), (0, 1)))
    together = jax.jit(jax.vmap(evaluate, in_axes=axes))(*arguments)
    for k in range(2):
        alone = expected_of(*(a[k] if axis == 0 else a for a, axis in zip(arguments, axes, strict=True)))
        assert relative_error(jax.tree.map(lambda a, k=k: a[k], together), alone) <= RTOL


def test_the_factor_that_is_never_used(x64):
    """Into the first instant nothing comes: not even an infinite factor, nor its gradient."""
    for reverse in (False, True):
        factors, offsets = example(5, False, False)
        clean = loop(factors, offsets, reverse)
        factors[-1 if reverse else 0] = 0
        gradient = jax.grad(lambda a, b=offsets, r=reverse: jnp.sum(affine_scan(a, b, reverse=r)))(factors)
        np.testing.assert_array_equal(gradient[-1 if reverse else 0], 0)
        factors[-1 if reverse else 0] = np.inf
        np.testing.assert_allclose(affine_scan(factors, offsets, reverse=reverse), clean, rtol=RTOL)


@pytest.mark.parametrize("full", [False, True])
def test_no_loop_over_time(full):
    """In the program of value and gradient for a GPU; the rounds grow by as many for each doubling of T. On a CPU full
    factors are taken in order, in one loop, whatever T."""

    def program(function, steps, platform):
        shapes = (steps, D, D) if full else (steps, D), (steps, D)
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        evaluate = jax.value_and_grad(lambda a, b: jnp.sum(jnp.sin(function(a, b, reverse=False))), (0, 1))
        return jax.jit(evaluate).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.while" in program(sequential, 16, "cuda")  # where they are found
    on_gpu = [program(affine_scan, steps, "cuda") for steps in (128, 256, 512)]
    assert not any("stablehlo.while" in text for text in on_gpu)
    counts = [text.count("stablehlo.") for text in on_gpu]
    assert 0 < counts[1] - counts[0] == counts[2] - counts[1]
    assert ("stablehlo.while" in program(affine_scan, 128, "cpu")) == full


@pytest.mark.parametrize("reverse", [False, True])
def test_both_ways_are_one(reverse, x64):
    """That of a CPU, in order, and that of a GPU, in rounds."""
    factors, offsets = map(jnp.asarray, example(9, True, False))
    for begins in (None, jnp.asarray(np.isin(np.arange(9), [4, 6, 7]))):
        got, expected = (
            jax.jit(partial(way, reverse=reverse))(factors, offsets, begins, None)
            for way in (affine._associative, affine._sequential)
        )
        np.testing.assert_allclose(got, expected, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("full", [False, True])
def test_what_grows_is_held_and_keeps_its_sign(full):
    """Steps that double what there is, far beyond all floats; beside them a unit that forgets. Of full factors one of
    rank one grows: its sign depends on how large the entries of a row are beside each other."""
    growth = np.asarray([[1.8, -0.36, 0], [-1, 0.2, 0], [0, 0, 0.5]]) if full else np.asarray([2, 2, 0.5])
    factors = np.tile(growth.astype(np.float32), (2000, *[1] * growth.ndim))
    offsets = np.zeros((2000, D), np.float32)
    offsets[1023], offsets[:, 2] = [1, 3 if full else -3, 0], 1  # before whole blocks of the rounds
    most = jnp.float32(3 / np.finfo(np.float32).eps)
    in_rounds, in_order = (partial(way, reverse=False) for way in (affine._associative, affine._sequential))
    given = jnp.asarray(factors), jnp.asarray(offsets)
    for got in (held_scan(*given, most), *(jax.jit(way)(*given, None, most) for way in (in_rounds, in_order))):
        np.testing.assert_allclose(got[:1040], loop(factors[:1040], offsets[:1040], False), rtol=1e-5)
        assert (np.sign(got[1024:, :2]) == [1, -1]).all()
        assert (np.abs(got[1080:, :2]) > 1e6).all()
        assert (np.abs(got) <= most).all()
        np.testing.assert_allclose(got[30:, 2], 2, rtol=1e-5)


def test_what_is_held_keeps_its_direction(x64):
    """It turns by half a radian while it grows 1.5 times, which one number held before the other would stop; a unit
    beside it that does not grow is not made smaller."""
    turn = np.asarray([[np.cos(0.5), -np.sin(0.5), 0], [np.sin(0.5), np.cos(0.5), 0], [0, 0, 0.5 / 1.5]])
    factors, offsets = jnp.asarray(np.tile(1.5 * turn, (900, 1, 1))), jnp.zeros((900, D)).at[0, 0].set(1)
    given, most = (factors, offsets.at[:, 2].set(1)), jnp.asarray(3 / np.finfo(np.float64).eps)
    for way in (affine._associative, affine._sequential):
        got = np.asarray(jax.jit(partial(way, reverse=False))(*given, None, most))
        phase = np.exp(0.5j * np.arange(900))
        along = got[:, 0] + 1j * got[:, 1]
        np.testing.assert_allclose(along / np.abs(along), phase, atol=1e-6)
        assert (np.abs(along)[200:] > 1e12).all()
        assert (np.abs(got) <= most).all()
        np.testing.assert_allclose(got[60:, 2], 2, rtol=1e-6)
