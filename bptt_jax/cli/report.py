"""What the jobs of the command have in common: how they refuse, the words for numbers, where numbers are from."""

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

# Of the table of a diagnosis.
COLUMNS = (
    "cell",
    "loss",
    "spectral\nnorm",
    "spectral\nradius",
    "growth rate\nnats/step back",
    "horizon\nsteps",
    "verdict",
    "what to try",
)


def visible(text: str) -> str:
    """`text` in one line, where what cannot be seen is escaped as in Python: control characters, halves of surrogate
    pairs, and what turns the direction of writing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Kind and message, of a long one the beginning."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message if len(message) <= 500 else message[:500] + ' ...'}"


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


def rows(recurrences: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Under `COLUMNS`, a row for each of the recurrences that `bptt_jax.cli.diagnose.record` holds."""
    for name, s in recurrences.items():
        yield (
            visible(name),
            _three_digits(s["loss"]["mean"]),
            _three_digits(s["spectral_norm"]["mean"]),
            _three_digits(s["spectral_radius"]["mean"]),
            f"{float(s['growth_rate']['mean']):+.4f} ± {float(s['growth_rate']['std']):.4f}",
            f"{float(s['horizon']['median']):.0f}",
            f"{s['verdict']}\n({s['verdicts'][s['verdict']]} of {sum(s['verdicts'].values())})",
            "\n".join(s["advice"]),
        )


def _three_digits(value: Any) -> str:
    """After the point; of a large number all in all, so that a column stays as wide as it is."""
    number = float(value)
    return f"{number:.3g}" if 1e5 <= abs(number) < float("inf") else f"{number:.3f}"
