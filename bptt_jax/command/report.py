"""What the jobs of the command have in common: how they refuse, and what they say of where a number is from."""

import platform
from importlib.metadata import version
from typing import Any

import jax


class BadArgument(ValueError):
    """What the user asked for cannot be done; the message is one line that says why."""


def provenance() -> dict[str, Any]:
    """Device and versions."""
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("bptt_jax", "jax", "jaxlib", "numpy", "optax")},
        },
        "device": f"{device.platform}: {device.device_kind}",
    }
