"""Strict JAX for every test, float64 where a test asks for it, and a handle on what gets compiled."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the command compiles in its own processes is kept for all tests, and not in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp().parent / "cache"))
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[jnp.dtype]:
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


_WATCHING: list[list[str]] = []


def _listen(event: str, duration: float, **details: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        for seen in _WATCHING:
            seen.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)  # once: the oldest JAX knows no way to take it off


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one entry for everything that XLA compiles while the test runs."""
    _WATCHING.append([])
    yield _WATCHING[-1]
    _WATCHING.pop()
