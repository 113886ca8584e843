"""LAPACK in compiled programs: right at any place, one thread of BLAS, no call blocks another, and programs end."""

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

import bptt_jax as bptt

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("kind", [np.float32, np.complex128])
@pytest.mark.parametrize("shape", [(70, 3, 5), (2, 5, 40, 40), (100, 100)])
def test_every_matrix_has_its_own_values_in_its_own_place(kind, shape, x64):
    a = RNG.standard_normal(shape) + (1j * RNG.standard_normal(shape) if kind is np.complex128 else 0)
    a, eps = a.astype(kind), 1e3 * np.finfo(kind).eps
    np.testing.assert_allclose(bptt.singular_values(a), np.linalg.svd(a, compute_uv=False), atol=eps)
    if shape[-1] == shape[-2]:
        values = np.asarray(bptt.eigenvalues(a)).reshape(-1, shape[-1])
        for got, matrix in zip(values, a.astype(np.complex128).reshape(-1, *shape[-2:]), strict=True):
            shifted = matrix - got[0] * np.eye(shape[-1])  # nearly singular
            assert np.linalg.svd(shifted, compute_uv=False)[-1] < eps


@pytest.mark.parametrize("size", [4, 40])
def test_a_stack_goes_to_lapack_at_once_where_it_is_small_and_not_shared_out(size) -> None:
    text = jax.jit(bptt.singular_values).lower(jnp.ones((3, size, size))).as_text()
    shares = (0, 10) <= tuple(map(int, jax.lib.__version__.split(".")[:3])) < (0, 11, 2)
    assert ("stablehlo.while" in text) == (shares or size > 32)


def test_inside_loops_maps_and_derivatives(x64):
    a = RNG.standard_normal((2, 3, 4, 4))
    expected = np.linalg.svd(a, compute_uv=False)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(bptt.singular_values)))(a), expected, rtol=1e-12)
    _, scanned = jax.jit(lambda a: jax.lax.scan(lambda c, m: (c, bptt.singular_values(m)), None, a))(a)
    np.testing.assert_allclose(scanned, expected, rtol=1e-12)

    def squares(a):  # d(sum of squares) = 2 <A, dA>
        return jnp.sum(jnp.square(bptt.singular_values(a)))

    np.testing.assert_allclose(jax.jit(jax.grad(squares))(a), 2 * a, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(jax.grad(squares))(a), 2 * a, rtol=1e-11, atol=1e-12)
    second = jax.jit(jax.hessian(squares))(a[0, 0]).reshape(16, 16)
    np.testing.assert_allclose(second, 2 * np.eye(16), atol=1e-10)

    def cubes(a):  # sum of lambda^3 = trace of A^3, with the derivative 3 (A^2)^T
        return jnp.sum(bptt.eigenvalues(a) ** 3).real

    np.testing.assert_allclose(jax.jit(jax.grad(cubes))(a), 3 * np.swapaxes(a @ a, -1, -2), rtol=1e-9, atol=1e-10)


def test_a_stack_on_several_devices_stays_there():
    """Nothing is gathered: every device has the matrices that lie on it."""
    program = """
from jax.sharding import Mesh, NamedSharding, PartitionSpec
stack = jax.device_put(many[:8, :9, :9], NamedSharding(Mesh(jax.devices(), "batch"), PartitionSpec("batch")))
for f in (bptt.singular_values, bptt.eigenvalues):
    compiled = jax.jit(f).lower(stack).compile()
    text, found = compiled.as_text(), compiled(stack)
    print("all-gather" in text, "all-reduce" in text, found.sharding.spec == PartitionSpec("batch"))
    np.testing.assert_allclose(found, f(many[:8, :9, :9]), rtol=1e-4)
"""
    done = run(program, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.stdout.splitlines() == 2 * ["False False True"], done.stderr


BEGIN = """
import json, os, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
import bptt_jax as bptt
from threadpoolctl import threadpool_info, threadpool_limits

many = np.random.default_rng(0).standard_normal((60, 200, 200)).astype(np.float32)
"""


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """To its end, or to an error after a time limit; BLAS may have its threads."""
    inherited = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    command = [sys.executable, "-c", BEGIN + program, *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120)


THREADS = """
def threads(whose):
    copies = [lib for lib in threadpool_info() if lib["user_api"] == "blas" and os.sep + whose in lib["filepath"]]
    return {lib["num_threads"] for lib in copies}

import scipy.linalg
threadpool_limits(3, user_api="blas")
before = threads("numpy"), threads("scipy")
bptt.singular_values(np.eye(2, dtype=np.float32))
print(before == ({3}, {3}), threads("numpy"), threads("scipy"))
"""


@pytest.mark.parametrize(("wish", "left"), [({}, 1), ({"BPTT_JAX_BLAS_THREADS": "keep"}, 3)])
def test_threads_of_blas(wish: dict[str, str], left: int) -> None:
    done = run(THREADS, **wish)
    assert done.stdout == f"True {{3}} {{{left}}}\n", done.stderr


def test_the_switch_knows_one_word() -> None:
    done = run("bptt.singular_values(np.eye(2))", BPTT_JAX_BLAS_THREADS="2")
    assert "BPTT_JAX_BLAS_THREADS: expected \"keep\" or no such variable, got '2'" in done.stderr


# What is still being computed when a program ends, and with which status it may. That of a daemon thread is JAX's
# affair: with Python 3.13 any call of its own ends by a signal there.
ENDS = {
    "the last line, result dropped": ("f(many)", {0}),
    "the last line, result held": ("held = f(many)", {0}),
    "SystemExit": ("held = f(many); raise SystemExit(3)", {3}),
    "SystemExit after gradient_flow": (
        """
w = np.random.default_rng(0).standard_normal((96, 96)).astype(np.float32) / 10
held = bptt.gradient_flow(lambda w, h, x: jnp.tanh(w @ h + x), w, np.zeros(96, np.float32),
                          np.ones((200, 96), np.float32), lambda states: jnp.sum(states[-1]))
raise SystemExit(3)
""",
        {3},
    ),
    "a daemon thread": (
        "threading.Thread(target=lambda: f(many).block_until_ready(), daemon=True).start()",
        {0, -signal.SIGABRT, -signal.SIGSEGV},
    ),
    "KeyboardInterrupt": (
        "held = f(many); import signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(30)",
        {-signal.SIGINT, 130},
    ),
}


@pytest.mark.parametrize("how", covering(ENDS, "the last line, result dropped", "SystemExit after gradient_flow"))
def test_a_program_ends(how: str) -> None:
    ending, statuses = ENDS[how]
    eigenvalues = "f = jax.jit(bptt.eigenvalues); f(many[:2]).block_until_ready()\n"
    done = run(eigenvalues + ending)
    assert done.returncode in statuses, done.stderr


FORK = """
f = jax.jit(bptt.singular_values)
f(many[:2]).block_until_ready()
child = os.fork()
if child == 0:
    try:
        bptt.singular_values(many[:2])
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_is_refused() -> None:
    done = run(FORK)
    said, status = done.stdout.splitlines()
    assert said.startswith("this process was forked from one that has computed with JAX"), done.stderr
    assert status == "7"


CALLS = """
if sys.argv[1] == "one core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
a = many[:8, :150, :150]
both = jax.jit(lambda a: (bptt.singular_values(a @ a), bptt.eigenvalues(a + a @ a)))
expected = jax.block_until_ready(both(a))

def calls():
    for _ in range(4):
        for got, right in zip(both(a), expected):
            np.testing.assert_array_equal(got, right)

threads = [threading.Thread(target=calls) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen on this system")
@pytest.mark.parametrize("cores", covering(["one core", "all cores"], "one core"))
def test_many_calls_at_a_time_do_not_block(cores: str) -> None:
    """From several threads, two spectra in one program; as many cores as threads, and fewer."""
    done = run(CALLS, cores)
    assert done.stdout == "done\n", done.stderr


def test_what_is_set_in_the_environment():
    """By the import nothing that JAX's own has not set; by the first spectrum one variable, of threadpoolctl."""
    program = """
import os
import jax, jax.numpy as jnp
def told():
    return dict(os.environ), dict(jax.config.values)
before = told()
import bptt_jax as bptt
assert told() == before, set(told()[0].items()) ^ set(before[0].items())
bptt.singular_values(jnp.eye(3)), bptt.eigenvalues(jnp.eye(3))
environment, config = told()
assert config == before[1]
print({k: v for k, v in environment.items() if before[0].get(k) != v})
"""
    environment = {k: v for k, v in os.environ.items() if k != "KMP_DUPLICATE_LIB_OK"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "{'KMP_DUPLICATE_LIB_OK': 'True'}\n", done.stderr
