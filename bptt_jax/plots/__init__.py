"""One figure a function, each drawn into axes that are given, or into new ones."""

from bptt_jax.plots.adjoints import plot_adjoints
from bptt_jax.plots.atlas import plot_atlas
from bptt_jax.plots.audit import plot_audit
from bptt_jax.plots.dynamics import (
    plot_angles,
    plot_calibration,
    plot_fixed_points,
    plot_flow_field,
    plot_modes,
)
from bptt_jax.plots.exponents import plot_exponents
from bptt_jax.plots.flow import plot_eigenvalues, plot_gradient_flow, plot_leaves, plot_norms, plot_singular_values
from bptt_jax.plots.influence import plot_influence_map
from bptt_jax.plots.lags import plot_gradient_lags, plot_gradient_noise, plot_gradient_precision
from bptt_jax.plots.training import plot_training

__all__ = [
    "plot_adjoints",
    "plot_angles",
    "plot_atlas",
    "plot_audit",
    "plot_calibration",
    "plot_eigenvalues",
    "plot_exponents",
    "plot_fixed_points",
    "plot_flow_field",
    "plot_gradient_flow",
    "plot_gradient_lags",
    "plot_gradient_noise",
    "plot_gradient_precision",
    "plot_influence_map",
    "plot_leaves",
    "plot_modes",
    "plot_norms",
    "plot_singular_values",
    "plot_training",
]
