"""One step for equal settings, so that cells that differ only in size or initialisation share what JAX has compiled."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax

from bptt_jax.step import Step


def shared(make: Callable[..., Step], *settings: Any) -> Step:
    """``make(*settings)``, the same for equal numbers, functions and words; of traced numbers, a new one."""
    if any(isinstance(a, jax.core.Tracer) for a in settings):
        return make(*settings)
    return _made(make, *(a if callable(a) or isinstance(a, str) else float(a) for a in settings))


@lru_cache
def _made(make: Callable[..., Step], *settings: Any) -> Step:
    return make(*settings)
