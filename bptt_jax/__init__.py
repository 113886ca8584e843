"""bptt_jax: see exactly what backpropagation through time does to a gradient, for any recurrent step."""

import importlib
from typing import TYPE_CHECKING, Any

from bptt_jax.analysis.adjoints import Adjoints, TemporalContributions, adjoints, temporal_contributions
from bptt_jax.analysis.flow import GradientFlow, gradient_flow
from bptt_jax.analysis.products import LogScaled, product, product_log_norms
from bptt_jax.analysis.spectra import (
    condition_number,
    eigenvalues,
    singular_values,
    spectral_norm,
    spectral_radius,
)
from bptt_jax.recurrence.cells import (
    GRUParams,
    LSTMParams,
    LSTMState,
    RNNParams,
    gru,
    lstm,
    rnn,
)
from bptt_jax.recurrence.jacobians import jacobians
from bptt_jax.recurrence.unroll import final_state, unroll
from bptt_jax.step import Cell, Step, ravel_state

if TYPE_CHECKING:
    from bptt_jax.plots import plot_gradient_flow
    from bptt_jax.recurrence.adapters import from_equinox

# These bring equinox or matplotlib along, each dearer to import than all of this package: fetched on first use.
_ON_FIRST_USE = {
    "from_equinox": "bptt_jax.recurrence.adapters",
    "plot_gradient_flow": "bptt_jax.plots",
}

__all__ = [
    "Adjoints",
    "Cell",
    "GRUParams",
    "GradientFlow",
    "LSTMParams",
    "LSTMState",
    "LogScaled",
    "RNNParams",
    "Step",
    "TemporalContributions",
    "adjoints",
    "condition_number",
    "eigenvalues",
    "final_state",
    "from_equinox",
    "gradient_flow",
    "gru",
    "jacobians",
    "lstm",
    "plot_gradient_flow",
    "product",
    "product_log_norms",
    "ravel_state",
    "rnn",
    "singular_values",
    "spectral_norm",
    "spectral_radius",
    "temporal_contributions",
    "unroll",
]


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
