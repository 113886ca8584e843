"""Whole stacks at a time: against LAPACK in float64, on what is hard for QR iterations; and who computes what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from slices import covering

import bptt_jax as bptt
from bptt_jax.linalg import batched_spectra, spectra
from bptt_jax.linalg.batched_spectra import batched_eigenvalues, batched_singular_values

RNG = np.random.default_rng(0)
N = 24
quick_singular_values, quick_eigenvalues = jax.jit(batched_singular_values), jax.jit(batched_eigenvalues)


def orthogonal(size):
    return np.linalg.qr(RNG.standard_normal((size, size)))[0]


def hard_matrices():
    n, random, falling = N, lambda *shape: RNG.standard_normal(shape or (N, N)), np.geomspace(1, 1e-6, N)
    q, a, block = orthogonal(n), random(), 0.9 * np.eye(n) + np.eye(n, k=1)
    companion = np.eye(n, k=-1)
    companion[0] = -np.poly(RNG.uniform(-1, 1, n))[1:]
    return {
        "random": random(),
        "zero": np.zeros((n, n)),
        "identity": np.eye(n),
        "ones": np.ones((n, n)),
        "rank 3": random(n, 3) @ random(3, n),
        "Jordan block": block,
        "hidden Jordan block": q @ block @ q.T,
        "lower Jordan block": block.T,
        "nilpotent": np.eye(n, k=-1),
        "orthogonal": q,
        "cycle": np.roll(np.eye(n), 1, axis=0),  # a fixed point of QR iterations with the usual shifts
        "pairs": np.kron(np.eye(n // 2), [[0, 1], [-1, 0]]),
        "permutation": np.eye(n)[RNG.permutation(n)],
        "companion": companion,
        "upper triangular": np.triu(random()),
        "lower triangular": np.tril(random()),
        "repeated": q @ np.diag(np.repeat([1.0, 2.0], n // 2)) @ q.T,
        "symmetric": a + a.T,
        "skew": a - a.T,
        "graded": q @ np.diag(falling) @ orthogonal(n),
        "falling rows": falling[:, None] * random(),
        "rising rows": falling[::-1, None] * random(),
        "falling columns": random() * falling,
        "huge": 1e30 * random(),
        "tiny": 1e-30 * random(),
    }


def backward_errors(values, matrices):
    """``sigma_min(A - lambda) / ||A||`` of the worst eigenvalue of each matrix."""
    wide = matrices.astype(np.complex128)
    shifted = wide[:, None] - np.asarray(values, np.complex128)[..., None, None] * np.eye(matrices.shape[-1])
    smallest = np.linalg.svd(shifted, compute_uv=False)[..., -1].max(axis=1)
    return smallest / np.maximum(np.linalg.norm(wide, 2, (1, 2)), np.finfo(float).tiny)


def check_eigenvalues(values, matrices, *, eps, times=100):
    values, size = np.asarray(values), matrices.shape[-1]
    assert np.max(backward_errors(values, matrices)) < times * eps
    norms = np.linalg.norm(matrices.astype(np.complex128), axis=(1, 2))
    traces = np.trace(matrices, axis1=1, axis2=2)
    assert np.all(np.abs(values.sum(-1) - traces) <= times * np.sqrt(size) * eps * norms)
    if not np.iscomplexobj(matrices):
        np.testing.assert_array_equal(np.sort_complex(values), np.sort_complex(values.conj()))
        assert np.all(values.imag[:, 0] >= 0)
        up = np.argwhere(values.imag > 0)
        np.testing.assert_array_equal(values[up[:, 0], up[:, 1] + 1], values[up[:, 0], up[:, 1]].conj())


def check_singular_values(values, matrices, *, eps, times=20):
    """Each within a few roundings of the largest, the small ones too."""
    exact = np.linalg.svd(matrices.astype(np.result_type(matrices, np.float64)), compute_uv=False)
    assert np.all(np.diff(values) <= 0)
    values = np.asarray(values, np.float64)
    assert np.all(values >= 0)
    assert np.all(np.abs(values - exact) <= times * eps * exact[:, :1])


@pytest.mark.parametrize("kind", covering([np.float32, np.complex64, np.float64], np.complex64, np.float64))
def test_hard_matrices(kind, request):
    if kind == np.float64:
        request.getfixturevalue("x64")
    turn = np.exp(0.7j) if np.issubdtype(kind, np.complexfloating) else 1
    matrices = (turn * np.stack(list(hard_matrices().values()))).astype(kind)
    eps = np.finfo(kind).eps
    singular = np.asarray(jax.jit(batched_singular_values)(matrices))
    assert singular.dtype == np.finfo(kind).dtype
    check_singular_values(singular, matrices, eps=eps)
    of_stack = jax.jit(batched_eigenvalues)
    values = np.asarray(of_stack(matrices))
    assert values.dtype == np.result_type(kind, np.complex64)
    check_eigenvalues(values, matrices, eps=eps)
    # Each is computed as if it were alone, however long the others take.
    np.testing.assert_array_equal(of_stack(matrices[::-1])[::-1], values)


def test_larger_ones():
    """128 rows, random as recurrent weights are: eigenvalues each to its own one of LAPACK's."""
    matrices = (RNG.standard_normal((3, 128, 128)) / np.sqrt(128)).astype(np.float32)
    eps = np.finfo(np.float32).eps
    check_singular_values(np.asarray(jax.jit(batched_singular_values)(matrices)), matrices, eps=eps)
    values = np.asarray(jax.jit(batched_eigenvalues)(matrices))
    check_eigenvalues(values, matrices, eps=eps)
    for got, matrix in zip(values, matrices.astype(np.float64), strict=True):
        exact, vectors = np.linalg.eig(matrix)
        apart = np.abs(got[:, None] - exact)
        assert len(set(apart.argmin(axis=0))) == 128
        condition = np.linalg.norm(np.linalg.inv(vectors), axis=1)  # of each eigenvalue; its vector has norm 1
        assert np.all(apart.min(axis=0) < 100 * eps * np.linalg.norm(matrix, 2) * condition)


SHAPES = [(1, 1), (2, 2), (3, 3), (7, 4), (4, 7), (1, 3)]


@pytest.mark.parametrize(("rows", "columns"), covering(SHAPES, (1, 1), (3, 3), (7, 4), (1, 3)))
def test_small_and_rectangular(rows, columns):
    shape = rows, columns
    matrices = RNG.standard_normal((2, 3, *shape)).astype(np.float32)
    values = np.asarray(quick_singular_values(matrices))
    assert values.shape == (2, 3, min(shape))
    check_singular_values(values.reshape(6, -1), matrices.reshape(6, *shape), eps=np.finfo(np.float32).eps)
    if shape[0] == shape[1]:
        values = np.asarray(quick_eigenvalues(matrices))
        assert values.shape == (2, 3, shape[0])
        check_eigenvalues(values.reshape(6, -1), matrices.reshape(6, *shape), eps=np.finfo(np.float32).eps)


@settings(deadline=None, max_examples=50)  # the first one compiles
@given(arrays(np.float32, (8, 4, 4), elements=st.integers(-2, 2)))
def test_small_integers(matrices):
    """Half of them singular, many defective."""
    eps = np.finfo(np.float32).eps
    check_singular_values(np.asarray(quick_singular_values(matrices)), matrices, eps=eps)
    values = np.asarray(quick_eigenvalues(matrices))
    check_eigenvalues(values, matrices, eps=eps)
    norms = np.linalg.norm(matrices, axis=(1, 2))
    # The determinant of A + E, ||E|| <= 100 eps ||A||.
    assert np.all(np.abs(values.prod(-1) - np.linalg.det(matrices.astype(np.float64))) <= 400 * eps * norms**4)


def test_of_single_precision_singular_values_to_its_last_digits_where_there_is_double(x64):
    """By squares, which single precision would not do for: all but the largest would be off."""
    matrices = np.stack(list(hard_matrices().values())).astype(np.float32)
    turned = (matrices * np.exp(0.7j)).astype(np.complex64)
    for stack in (matrices, matrices[:, :17], matrices[:, :, :17], turned):
        values = np.asarray(jax.jit(lambda a: batched_singular_values(a))(stack))
        assert values.dtype == np.float32
        check_singular_values(values, stack, eps=np.finfo(np.float32).eps, times=1)


def test_a_tall_matrix_takes_no_memory_of_its_longer_side_squared():
    plan = jax.jit(batched_singular_values).lower(jax.ShapeDtypeStruct((20_000, 4), jnp.float32)).compile()
    assert plan.memory_analysis().temp_size_in_bytes < 20 * 20_000 * 4 * 4


def test_what_does_not_converge_is_nan_and_the_others_are_not(monkeypatch):
    monkeypatch.setattr(batched_spectra, "_SWEEPS_PER_ROW", 0)
    matrices = np.stack([np.triu(RNG.standard_normal((6, 6))), RNG.standard_normal((6, 6))]).astype(np.float32)
    values = jax.jit(lambda a: batched_eigenvalues(a))(matrices)
    np.testing.assert_allclose(values[0], np.diagonal(matrices[0]), rtol=1e-6)
    assert np.all(np.isnan(values[1]))


def test_who_computes_what():
    s, e = "singular values", "eigenvalues"
    for job, platform, shape, batched in [
        (s, "cpu", (4096, 64, 64), False),
        (e, "cpu", (4096, 64, 64), False),
        (s, "gpu", (4096, 64, 64), True),
        (s, "gpu", (8, 512, 256, 300), True),
        (s, "gpu", (4096, 32, 64), False),
        (s, "gpu", (512, 512), True),
        (s, "gpu", (2048, 2048), True),
        (s, "tpu", (4096, 64, 64), False),
        (e, "gpu", (4096, 64, 64), True),
        (e, "gpu", (4, 3, 5, 5), True),
        (e, "gpu", (11, 64, 64), False),
        (e, "gpu", (64, 2048, 2048), False),
    ]:
        routine = spectra._routine(job, platform, shape)
        assert (routine in (batched_singular_values, batched_eigenvalues)) is batched


@pytest.mark.parametrize("job", ["singular values", "eigenvalues"])
def test_the_way_of_a_gpu(job, monkeypatch):
    """Taken on this device, the public functions give what they give otherwise, mapped and differentiated."""
    function = {"singular values": bptt.singular_values, "eigenvalues": bptt.eigenvalues}[job]
    a = RNG.standard_normal((9, 8, 4, 4)).astype(np.float32)
    a[3, 2, 1, 1] = np.nan
    expected = np.asarray(function(a))
    batched = {"singular values": batched_singular_values, "eigenvalues": batched_eigenvalues}[job]
    seen = []

    def watched(matrices):
        seen.append(matrices.shape)
        return batched(matrices)

    routes = spectra._Route("any", range(1, 9), 64, watched), *spectra._ROUTES[job]
    monkeypatch.setitem(spectra._ROUTES, job, routes)
    jax.clear_caches()
    got = np.asarray(jax.jit(jax.vmap(jax.vmap(function), in_axes=1, out_axes=1))(a))
    assert seen[-1][-2:] == (4, 4)
    assert np.prod(seen[-1][:-2]) == 72
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_allclose(got, expected, atol=2e-5)
    # d(sum of squares) = 2 <A, dA>; d(sum of the real parts) = trace(dA)
    total = {"singular values": lambda v: jnp.sum(v * v) / 2, "eigenvalues": lambda v: jnp.sum(v.real)}[job]
    slope = jax.jit(jax.grad(lambda a: total(function(a))))(np.delete(a, 3, 0))
    exact = {"singular values": np.delete(a, 3, 0), "eigenvalues": np.broadcast_to(np.eye(4), (8, 8, 4, 4))}[job]
    np.testing.assert_allclose(slope, exact, atol=1e-3)
    jax.clear_caches()
