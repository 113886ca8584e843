"""bptt_jax: see exactly what backpropagation through time does to a gradient, for any recurrent step."""

import importlib
from typing import TYPE_CHECKING, Any

from bptt_jax.analysis.adjoints import (
    Adjoints,
    TemporalContributions,
    adjoints,
    temporal_contributions,
)
from bptt_jax.analysis.estimators import TruncationBias, rtrl_gradient, tbptt_gradient, truncation_bias
from bptt_jax.analysis.flow import GradientFlow, gradient_flow
from bptt_jax.analysis.influence import InfluenceMap, influence_map
from bptt_jax.analysis.lyapunov import LyapunovSpectrum, lyapunov_exponents
from bptt_jax.analysis.matrix_free import (
    LeadingLogValues,
    LeadingValues,
    leading_eigenvalues,
    leading_singular_values,
    product_singular_values,
)
from bptt_jax.analysis.monitor import Monitor, MonitorRecord, MonitorWarning
from bptt_jax.analysis.nonfinite import NonFinite
from bptt_jax.cells import initializers
from bptt_jax.cells.adapters import from_equinox, from_haiku, from_linen, from_nnx
from bptt_jax.cells.gated import GRUParams, LSTMParams, LSTMState, gru, lstm
from bptt_jax.cells.linear import LRUParams, MinGRUParams, lru, min_gru
from bptt_jax.cells.simple import RNNParams, rnn
from bptt_jax.cells.stack import stack
from bptt_jax.checks import RecompilationWarning
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.products import (
    jacobian_product,
    prefix_products,
    product_log_norms,
    suffix_products,
)
from bptt_jax.linalg.spectra import (
    condition_number,
    eigenvalues,
    singular_values,
    spectral_norm,
    spectral_radius,
)
from bptt_jax.parallel.adjoints import ParallelAdjoints, parallel_adjoints
from bptt_jax.parallel.deer import DeerSolution, deer
from bptt_jax.parallel.diagonal import unroll_linear
from bptt_jax.parallel.prediction import ParallelPrediction, predict_parallel
from bptt_jax.recurrence.diagonal import DiagonalStep
from bptt_jax.recurrence.jacobians import jacobians
from bptt_jax.recurrence.unroll import final_state, unroll
from bptt_jax.remedies.regularizers import flossing_penalty, omega_penalty, omega_terms
from bptt_jax.results import Result
from bptt_jax.step import Cell, Sequence, Step, ravel_state

if TYPE_CHECKING:
    from bptt_jax.plots.adjoints import plot_adjoints
    from bptt_jax.plots.exponents import plot_exponents
    from bptt_jax.plots.flow import (
        plot_eigenvalues,
        plot_gradient_flow,
        plot_leaves,
        plot_norms,
        plot_singular_values,
    )
    from bptt_jax.plots.influence import plot_influence_map
    from bptt_jax.plots.training import plot_training
    from bptt_jax.remedies.clipping import (
        autoclip,
        clip_adjoints,
        clip_by_global_norm,
        clip_records,
        skip_records,
        skip_updates,
        with_clipping,
        zclip,
    )

# These bring matplotlib or optax along, each dearer to import than all of this package: on first use.
_ON_FIRST_USE = {
    **dict.fromkeys(
        (
            "autoclip",
            "clip_adjoints",
            "clip_by_global_norm",
            "clip_records",
            "with_clipping",
            "skip_records",
            "skip_updates",
            "zclip",
        ),
        "bptt_jax.remedies.clipping",
    ),
    **dict.fromkeys(
        ("plot_eigenvalues", "plot_gradient_flow", "plot_leaves", "plot_norms", "plot_singular_values"),
        "bptt_jax.plots.flow",
    ),
    "plot_adjoints": "bptt_jax.plots.adjoints",
    "plot_exponents": "bptt_jax.plots.exponents",
    "plot_influence_map": "bptt_jax.plots.influence",
    "plot_training": "bptt_jax.plots.training",
}

__all__ = [
    "Adjoints",
    "Cell",
    "DeerSolution",
    "DiagonalStep",
    "GRUParams",
    "GradientFlow",
    "InfluenceMap",
    "LRUParams",
    "LSTMParams",
    "LSTMState",
    "LeadingLogValues",
    "LeadingValues",
    "LogScaled",
    "LyapunovSpectrum",
    "MinGRUParams",
    "Monitor",
    "MonitorRecord",
    "MonitorWarning",
    "NonFinite",
    "ParallelAdjoints",
    "ParallelPrediction",
    "RNNParams",
    "RecompilationWarning",
    "Result",
    "Sequence",
    "Step",
    "TemporalContributions",
    "TruncationBias",
    "adjoints",
    "autoclip",
    "clip_adjoints",
    "clip_by_global_norm",
    "clip_records",
    "condition_number",
    "deer",
    "eigenvalues",
    "final_state",
    "flossing_penalty",
    "from_equinox",
    "from_haiku",
    "from_linen",
    "from_nnx",
    "gradient_flow",
    "gru",
    "influence_map",
    "initializers",
    "jacobian_product",
    "jacobians",
    "leading_eigenvalues",
    "leading_singular_values",
    "lru",
    "lstm",
    "lyapunov_exponents",
    "min_gru",
    "omega_penalty",
    "omega_terms",
    "parallel_adjoints",
    "plot_adjoints",
    "plot_eigenvalues",
    "plot_exponents",
    "plot_gradient_flow",
    "plot_influence_map",
    "plot_leaves",
    "plot_norms",
    "plot_singular_values",
    "plot_training",
    "predict_parallel",
    "prefix_products",
    "product_log_norms",
    "product_singular_values",
    "ravel_state",
    "rnn",
    "rtrl_gradient",
    "singular_values",
    "skip_records",
    "skip_updates",
    "spectral_norm",
    "spectral_radius",
    "stack",
    "suffix_products",
    "tbptt_gradient",
    "temporal_contributions",
    "truncation_bias",
    "unroll",
    "unroll_linear",
    "with_clipping",
    "zclip",
]


if not TYPE_CHECKING:  # to which every name would be there, and of any type

    def __getattr__(name: str) -> Any:
        if name in _ON_FIRST_USE:
            return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
