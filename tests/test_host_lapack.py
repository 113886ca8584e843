"""LAPACK on every core, called from compiled programs: right, at any place, and gone without a trace."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import bptt_jax as bptt
from bptt_jax.analysis.frames import orthonormal
from bptt_jax.linalg import host_lapack

RNG = np.random.default_rng(0)


def graded(size: int, smallest: float) -> np.ndarray:
    """Singular values from 1 to `smallest`, in geometric progression, between random rotations."""
    (u, _), (v, _) = (np.linalg.qr(RNG.standard_normal((size, size))) for _ in range(2))
    return u @ np.diag(np.geomspace(1, smallest, size)) @ v.T


@pytest.mark.parametrize("size", [2, 33, 130])
def test_single_precision_errs_by_less_than_its_rounding(size):
    """However small the singular value: LAPACK in float64 on the same numbers."""
    for smallest in (1e-2, 1e-6, 1e-12):
        a = np.stack([graded(size, smallest) for _ in range(3)]).astype(np.float32)
        exact = np.linalg.svd(a.astype(np.float64), compute_uv=False)
        assert np.max(np.abs(bptt.singular_values(a) - exact)) < 1e-7


@pytest.mark.parametrize("scale", [1e-37, 1e30])
def test_squares_do_not_leave_the_range(scale):
    a = (scale * np.eye(3)[::-1]).astype(np.float32)
    np.testing.assert_allclose(bptt.singular_values(a), scale, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("shape", [(70, 3, 5), (70, 5, 3), (2, 40, 40), (1, 100, 100)])
def test_stacks_shared_among_threads(kind, shape, x64):
    """Small ones in one part, large ones in several: every matrix its own values, in its own place."""
    a = RNG.standard_normal(shape) + (
        1j * RNG.standard_normal(shape) if kind in (np.complex64, np.complex128) else 0
    )
    a, eps = a.astype(kind), 1e3 * np.finfo(kind).eps
    np.testing.assert_allclose(bptt.singular_values(a), np.linalg.svd(a, compute_uv=False), atol=eps)
    if shape[1] == shape[2]:
        for got, matrix in zip(np.asarray(bptt.eigenvalues(a)), a.astype(np.complex128), strict=True):
            for value in got[::7]:  # nearly singular with it
                shifted = np.linalg.svd(matrix - value * np.eye(shape[1]), compute_uv=False)
                assert shifted[-1] < eps


def test_inside_loops_maps_and_derivatives(x64):
    a = RNG.standard_normal((2, 3, 4, 4))
    expected = np.linalg.svd(a, compute_uv=False)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(bptt.singular_values)))(a), expected, rtol=1e-12)
    _, scanned = jax.jit(lambda a: jax.lax.scan(lambda c, m: (c, bptt.singular_values(m)), None, a))(a)
    np.testing.assert_allclose(scanned, expected, rtol=1e-12)
    # d(sum of squares) = 2 <A, dA>
    squares = jax.jit(jax.grad(lambda a: jnp.sum(jnp.square(bptt.singular_values(a)))))
    np.testing.assert_allclose(squares(a), 2 * a, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 100, 90), (2, 2, 5, 5), (40, 8)])
def test_factors_are_what_they_should_be(kind, shape, x64):
    a = jnp.asarray(RNG.standard_normal(shape), kind)
    l, rows = jax.jit(host_lapack.host_lq)(a.mT)
    q, r = rows.mT, l.mT
    u, s, v = jax.jit(host_lapack.host_svd)(a)
    tolerance = {"atol": 200 * np.finfo(kind).eps}
    np.testing.assert_allclose(q @ r, a, **tolerance)
    np.testing.assert_array_equal(np.tril(r, -1), 0)
    np.testing.assert_allclose(u * s[..., None, :] @ v, a, **tolerance)
    for orthogonal in (q, u, np.swapaxes(v, -1, -2)):
        gram = np.swapaxes(orthogonal, -1, -2) @ orthogonal
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(shape[-1]), gram.shape), **tolerance)
    square = a[..., : shape[-1], :]
    values, x = jax.jit(jax.vmap(host_lapack.host_eig) if len(shape) > 2 else host_lapack.host_eig)(square)
    np.testing.assert_allclose(square.astype(x.dtype) @ x, values[..., None, :] * x, **tolerance)


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (6, 6), (90, 100)])  # these by LAPACK on the host
def test_derivative_of_the_orthonormalisation(rows, columns, x64):
    a, w, v = jnp.asarray(RNG.standard_normal((3, rows, columns)))

    def some(lq, a):
        l, q = lq(a)
        return jnp.sum(w * q) + jnp.sum(v[:, :rows] * l)

    def of_jax(a):
        q, r = jnp.linalg.qr(a.T)
        return r.T, q.T

    got, expected = (jax.jit(jax.grad(partial(some, lq)))(a) for lq in (orthonormal, of_jax))
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_threads_of_blas_are_given_back():
    def threads():
        return {lib["filepath"]: lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}

    with threadpool_limits(3, user_api="blas"):
        before, inside = threads(), []
        limit = host_lapack._ONE_BLAS_THREAD
        with limit, limit:
            inside.append(threads())
        assert threads() == before
    ours = {path: n for path, n in inside[0].items() if "numpy" in path or "scipy" in path}
    assert set(ours.values()) <= {1}
    assert len(ours) > 0
    # Also where the work fails.
    before = threads()
    with pytest.raises(ZeroDivisionError), limit:
        raise ZeroDivisionError
    assert threads() == before


def test_what_does_not_converge_is_nan_and_the_others_are_not():
    def stubborn(matrices):
        if np.any(matrices[:, 0, 0] == 7):
            raise np.linalg.LinAlgError("did not converge")
        return (np.diagonal(matrices, axis1=1, axis2=2),)

    a, out = np.broadcast_to(np.eye(2), (5, 2, 2)).copy(), np.zeros((5, 2))
    a[3, 0, 0] = 7
    host_lapack._apply(stubborn, a, [out])
    np.testing.assert_array_equal(np.isnan(out[:, 0]), np.arange(5) == 3)
    np.testing.assert_array_equal(np.delete(out, 3, 0), 1)


def test_failures_reach_the_caller(monkeypatch):
    def fails(of, matrices, results):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(host_lapack, "_apply", fails)
    # Which of the two depends on whether the program has run before.
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="bptt_jax: RuntimeError: out of luck"):
        jax.block_until_ready(bptt.singular_values(np.eye(2, dtype=np.float32)))


CALLS = """
import os, sys
if sys.argv[1] == "one core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import threading
import jax, jax.numpy as jnp, numpy as np
import bptt_jax as bptt

a = np.random.default_rng(0).standard_normal((4, 150, 150)).astype(np.float32)
both = jax.jit(lambda a: (bptt.singular_values(a @ a), bptt.eigenvalues(a + a @ a)))
expected = jax.block_until_ready(both(a))

def calls():
    for _ in range(4):
        for got, right in zip(both(a), expected):
            np.testing.assert_array_equal(got, right)

threads = [threading.Thread(target=calls) for _ in range(3)]
for t in threads: t.start()
for t in threads: t.join()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen on this system")
@pytest.mark.parametrize("cores", ["one core", "all cores"])
def test_many_calls_at_a_time_do_not_block(cores):
    """From several threads, two spectra in one program; as many cores as threads, and fewer."""
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, cores], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "done\n", done.stderr


REFUSED = """
import warnings
import jax, numpy as np
import bptt_jax as bptt
from bptt_jax.linalg import host_lapack

if {wrong!r} == "version":
    host_lapack._VERSION = 9, 9
else:
    host_lapack._DTYPES.clear()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    a = np.diag(np.arange(1, 31, dtype=np.float32))
    for function in (bptt.singular_values, lambda a: bptt.eigenvalues(a).real):
        np.testing.assert_allclose(jax.jit(function)(a), np.arange(30, 0, -1), rtol=1e-5)
print(*(warning.message for warning in caught), sep="\\n")
"""


@pytest.mark.parametrize(("wrong", "why"), [("version", "(9.9)"), ("structures", "KeyError")])
def test_where_xla_does_not_take_it(wrong, why):
    """An interface of another version, or with other structures: one warning, and `jnp.linalg` computes."""
    program = REFUSED.format(wrong=wrong)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    (said,) = done.stdout.splitlines() or [done.stderr]
    assert said.startswith("spectra are left to jnp.linalg")
    assert why in said
