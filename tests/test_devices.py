"""Several devices, several processes: the same results, the work divided, and no end without a word.

Each in processes of their own, for the number of devices is fixed when JAX begins; all with time limits.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from slices import covering

BEGIN = """
import sys, tempfile
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import bptt_jax as bptt
from bptt_jax.experiments.loop import train
from bptt_jax.experiments.network import network
from bptt_jax.experiments.tasks import Batch, adding

jax.config.update("jax_disable_most_optimizations", True)
"""

WORK = """
cell = bptt.rnn(4, gain=1.3)
params, h0 = cell.init(jax.random.key(0), 2), cell.initial_state()
given = np.random.default_rng(0).standard_normal((4, 12, 2)).astype(np.float32)
about = cell.step, params, h0
loss = lambda states: jnp.mean(states[-1] ** 2)
values = lambda a: (a.loss, a.states, a.adjoints, a.log_norms, a.params_grad, a.state0_grad)
ANALYSIS = {
    "adjoints": lambda x: values(bptt.adjoints(*about, x, loss)),
    "flow": lambda x: bptt.gradient_flow(*about, x, loss),
    "leading": lambda x: bptt.analysis.leading_singular_values(*about, x, num=2),
    "exponents": lambda x: bptt.lyapunov_exponents(*about, x),
    "deer": lambda x: bptt.deer(*about, x).states,
}

def sums(key, batch):
    inputs = jax.random.uniform(key, (batch, 6, 2))
    return Batch(inputs, jnp.sum(inputs[:, ::3, 0], axis=1))

task = adding(6)._replace(name="sums", sample=sums, whole=sums(jax.random.key(9), 8), threshold=0.0)
net = network(bptt.rnn(3), task)

def trained(mesh, updates=20, **more):
    optimizer = bptt.with_clipping(optax.sgd(0.05, momentum=0.9), 1.0)
    return train(net, optimizer, updates=updates, batch=4, seeds=range(4), chunk=10, mesh=mesh, **more)

def compare(got, expected, name):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b)
        largest = np.max(np.abs(b), where=np.isfinite(b), initial=0.1)  # less is what is left of logarithms near zero
        for shard in a.addressable_shards:
            want = b[shard.index]
            divided = len(want) == len(b) // mesh.size
            assert divided or np.array_equal(b, np.broadcast_to(b[:1], b.shape)), (name, shard.index)
            np.testing.assert_allclose(shard.data, want, rtol=1e-5, atol=1e-5 * largest, err_msg=name)

def compare_records(got, expected):
    for a, b in zip(got, expected, strict=True):
        for name in ("updates", "seeds", "loss", "gradient_log_norm", "clipped", "validation_loss"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)

def spread(mesh):
    along = NamedSharding(mesh, PartitionSpec("batch"))
    return jax.make_array_from_callback(given.shape, along, lambda index: given[index])
"""

ONE_PROCESS = """
alone = {name: jax.jit(jax.vmap(f))(given) for name, f in ANALYSIS.items()}
plain = trained(None)
states, records = plain.states, plain.records
for n, names in (2, ("adjoints",)), (4, ("flow", "leading", "exponents", "deer")):
    mesh = Mesh(jax.devices()[:n], "batch")
    for name in names:
        f = ANALYSIS[name]
        program = jax.jit(jax.vmap(f)).lower(spread(mesh)).compile()
        # Of what passes between devices: nothing, but whether all of them have converged.
        moved = [line for line in program.as_text().splitlines() if " all-" in line or " collective-" in line]
        assert all("pred[]" in line for line in moved), (name, moved)
        compare(program(spread(mesh)), alone[name], name)
mesh = jax.make_mesh((2, 2), ("a", "b"))
got = trained(mesh)
compare(got.states, states, "train")
compare_records(got.records, records)
with tempfile.TemporaryDirectory() as folder:  # stopped after the first chunk, and resumed
    trained(mesh, updates=10, folder=folder)
    resumed = trained(mesh, folder=folder)
for a, b in zip(jax.tree.leaves(resumed.states), jax.tree.leaves(got.states), strict=True):
    assert a.sharding == b.sharding
    np.testing.assert_array_equal(a, b)
assert resumed.records == got.records
for seeds, wrong in (range(3), mesh), (range(4), jax.devices()):
    try:
        train(net, optax.sgd(0.05), updates=1, seeds=seeds, mesh=wrong)
    except (TypeError, ValueError) as error:
        print(error)
"""

JOINED = """
port, number = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"127.0.0.1:{port}", 2, int(number), initialization_timeout=60, heartbeat_timeout_seconds=10
)
"""

TWO_PROCESSES = """
mesh = Mesh(jax.devices(), "batch")
assert jax.process_count() == 2 and mesh.is_multi_process
flow = jax.jit(jax.vmap(ANALYSIS["flow"]))
compare(flow(spread(mesh)), flow(given), "flow")
got, alone = trained(mesh), trained(None)
compare(got.states, alone.states, "train")
compare_records(got.records, alone.records)
print("equal", flush=True)
"""

FOR_EVER = """
trained(Mesh(jax.devices(), "batch"), updates=10**9, on_record=lambda record: print("going on", flush=True))
"""


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"} | {"JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} {environment.get('XLA_FLAGS', '')}"  # compiled quickly
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=inherited | environment, text=True, **pipes)


@contextmanager
def running(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def pair(code: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(code, port, number) for number in (0, 1)]


def test_equal_on_one_two_and_four_devices() -> None:
    process = start(BEGIN + WORK + ONE_PROCESS, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    with running(process):
        out, err = process.communicate(timeout=200)
    assert out.splitlines() == [
        "seeds: expected a multiple of the mesh's 4 devices, got 3",
        "mesh: expected a jax.sharding.Mesh, got list",
    ], err


@pytest.mark.exhaustive
def test_equal_in_two_processes() -> None:
    processes = pair(BEGIN + JOINED + WORK + TWO_PROCESSES)
    with running(*processes):
        for process in processes:
            out, err = process.communicate(timeout=200)
            assert out.endswith("equal\n"), err
            assert process.returncode == 0


@pytest.mark.parametrize("victim", covering([0, 1]))
def test_one_process_killed_the_other_ends_with_an_error(victim: int) -> None:
    """JAX's own, after the 10 seconds without a sign of life that both were told to wait, at the latest."""
    processes = pair(BEGIN + JOINED + WORK + FOR_EVER)
    left = processes[1 - victim]
    with running(*processes):
        for process in processes:
            while "going on" not in (line := process.stdout.readline()):
                assert line or process.poll() is None, process.stderr.read()
        processes[victim].kill()
        _, err = left.communicate(timeout=60)
        assert left.returncode != 0
        assert any(
            word in err for word in ("heartbeat", "Connection reset", "Connection closed", "Socket closed")
        ), err


MATRICES = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import bptt_jax as bptt
from bptt_jax.linalg.lq import orthonormal

FUNCTIONS = bptt.singular_values, lambda a: orthonormal(a.mT)[0].mT, bptt.eigenvalues
given = np.random.default_rng(0).standard_normal((8, 128, 128)).astype(np.float32)
stack = jax.device_put(given, NamedSharding(Mesh(jax.devices(), "batch"), PartitionSpec("batch")))
both = [jax.jit(f).lower(stack).compile() for f in FUNCTIONS]
for _ in range(3):
    values, r, roots = jax.block_until_ready([f(stack) for f in both])
wide = given.astype(np.float64)
np.testing.assert_allclose(values, np.linalg.svd(wide, compute_uv=False), atol=1e-4)
np.testing.assert_allclose(np.swapaxes(r, 1, 2) @ r, np.swapaxes(wide, 1, 2) @ wide, atol=1e-2)
np.testing.assert_allclose(np.sum(roots, axis=1), np.trace(wide, axis1=1, axis2=2), atol=1e-2)
print("done")
"""


def test_lapack_on_two_devices_at_a_time_does_not_block() -> None:
    """BLAS has its threads: `jnp.linalg` may block for good here."""
    process = start(MATRICES, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    with running(process):
        out, err = process.communicate(timeout=120)
    assert out == "done\n", err
