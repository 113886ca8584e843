"""What the jobs of the command have in common: how they refuse, the words for numbers, where numbers are from."""

import math
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from bptt_jax.analysis import verdict
from bptt_jax.leaves import visible
from bptt_jax.results import counted

# Of the table of a diagnosis.
COLUMNS = (*verdict.COLUMNS, "what to try")


def one_line(error: BaseException) -> str:
    """Kind and message, of a long one the beginning."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message if len(message) <= 500 else message[:500] + ' ...'}"


# Of arguments of the library that options of the command become.
_OPTIONS = {
    "hidden_size": "--hidden",
    "length": "--length",
    "longest": "--length, with --chrono",
    "text": "--text",
}


def in_options(message: str) -> str:
    """A message of the library, maybe after its kind, with the option that an argument comes from in its place."""
    return re.sub(r"^(\w+Error: )?(\w+)(?=: )", lambda m: (m[1] or "") + _OPTIONS.get(m[2], m[2]), message)


class BadArgument(ValueError):
    """What the user asked for cannot be done; the message is one line that says why."""


def provenance() -> dict[str, Any]:
    """Device and versions."""
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **{p: _version(p) for p in ("bptt_jax", "jax", "jaxlib", "numpy", "optax")},
        },
        "device": f"{device.platform}: {device.device_kind}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return "not installed"


def spectra_in_words(recurrences: Mapping[str, Any]) -> str:
    """At how many steps the Jacobians' spectra were computed."""
    first = next(iter(recurrences.values()))
    steps, total = len(first["spectra_steps"]), len(first["per_step"]["adjoint_log_norms"]["median"])
    return f"spectra: of {steps} of the {counted(total, 'step')} of every sequence"


def noise_in_words(noise: Mapping[str, Any]) -> dict[str, str]:
    """By recurrence, from which lag on the noise of a batch prevails, of what `bptt_jax.cli.diagnose.noises` found."""

    def words(found: Mapping[str, Any]) -> str:
        horizon = float(found["horizon"])
        if math.isnan(horizon):
            return "not all gradients are finite"
        if math.isinf(horizon):
            return f"a batch of {found['batch']} tells every part up to a lag of {found['longest']} from noise"
        if horizon == 0:
            return f"a batch of {found['batch']} tells no part of the gradient from noise"
        return f"at a batch of {found['batch']} noise prevails from a lag of {horizon:.0f} on"

    return {visible(name): f"{words(found)} (of {found['sequences']} sequences)" for name, found in noise.items()}


def rows(recurrences: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Under `COLUMNS`, a row for each of the recurrences that `bptt_jax.cli.diagnose.record` holds."""
    for name, s in recurrences.items():
        yield (visible(name), *verdict.table_row(s), "\n".join(f"- {text}" for text in s["advice"]))
