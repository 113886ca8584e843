"""What XLA compiles while somebody watches."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

_WATCHING: list[list[str]] = []


def _listen(event: str, duration: float, **details: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        for seen in _WATCHING:
            seen.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)  # once: the oldest JAX knows no way to take it off


@contextmanager
def watched() -> Iterator[list[str]]:
    """Grows by one entry for everything that is compiled within."""
    _WATCHING.append([])
    try:
        yield _WATCHING[-1]
    finally:
        _WATCHING.pop()
