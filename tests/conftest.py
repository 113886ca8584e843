"""Strict JAX, compiled quickly; float64 where a test asks for it, and a handle on what gets compiled."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a test process for each core, and no threads on top

import jax
import jax.numpy as jnp
import pytest
from compilations import watched
from jax._src.interpreters import mlir

# Tracing makes objects by the million, hardly any of them in cycles that only a collection would free.
gc.set_threshold(50_000, 50, 50)

# A shell that runs the tests in the background has SIGINT ignored, and processes started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No program says of each operation which lines of Python it comes from; nothing here reads that.
jax.config.update("jax_traceback_in_locations_limit", 0)

# Compilation dominates the tests; this way it takes a third of the time, in the processes that they start too. What
# floating numbers do at the ends of their range is tested under `oracles.users_jit`. Read when a backend starts.
_QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",  # parts are for idle cores
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion",  # of loops of a few tiny rounds
)
if _QUICK[0] not in (_flags := os.environ.get("XLA_FLAGS", "")):  # else set by the process that started this one
    _probe = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    for _flag in _QUICK:  # not every version knows all, and one that it does not know ends the process
        _alone = os.environ | {"XLA_FLAGS": _flag}
        if subprocess.run(_probe, env=_alone, capture_output=True, timeout=60).returncode == 0:
            _flags = f"{_flag} {_flags}"  # the caller's own come last, and have the last word
    os.environ["XLA_FLAGS"] = _flags


# JAX before 0.11 makes every program an MLIR context of its own: a fifth of the time that a small one takes, and a
# megabyte for as long as it is kept. Later versions use each some times, as is done here.
if not hasattr(mlir, "_thread_local_context"):
    _new_context, _contexts = mlir.make_ir_context, threading.local()

    def _shared_context() -> Any:
        _contexts.uses = getattr(_contexts, "uses", -1) + 1
        if _contexts.uses % 30 == 0:
            _contexts.latest = _new_context()
        return _contexts.latest

    mlir.make_ir_context = _shared_context


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the command compiles in its own processes is kept for all tests, and not in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp().parent / "cache"))
        yield


_RESIDENT = Path("/proc/self/statm")
_MUCH, _MORE = 1200 << 20, 300 << 20  # bytes
_left = 0


def _resident() -> int:
    """The bytes of memory that this process takes, where Linux tells it."""
    return int(_RESIDENT.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if _RESIDENT.exists() else 0


def _let_programs_go() -> None:
    global _left
    jax.clear_caches()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # glibc keeps what is freed, a gigabyte in the end
    _left = _resident()


@pytest.fixture(scope="module", autouse=True)
def programs_go_with_their_module() -> Iterator[None]:
    """Each keeps some memory maps, and those of all tests are more than Linux allows one process (65,530)."""
    yield
    _let_programs_go()


@pytest.fixture(autouse=True)
def programs_go_where_they_take_much_memory() -> Iterator[None]:
    """Within a module too: those of the largest take a gigabyte."""
    yield
    if _resident() > max(_MUCH, _left + _MORE):
        _let_programs_go()


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[jnp.dtype]:
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one entry for everything that XLA compiles while the test runs."""
    with watched() as seen:
        yield seen
