"""What the Jacobians and the loss say."""

from bptt_jax.analysis.backward import (
    Adjoints,
    ScaledGradients,
    TemporalContributions,
    adjoints,
    temporal_contributions,
)
from bptt_jax.analysis.calibration import Calibration, CalibrationTrials, calibrate, calibrate_cell
from bptt_jax.analysis.covariant import CovariantVectors, covariant_vectors
from bptt_jax.analysis.fixed_point_results import FixedPoints
from bptt_jax.analysis.fixed_points import fixed_points, sample_starts
from bptt_jax.analysis.flow import gradient_flow
from bptt_jax.analysis.flow_results import GradientFlow
from bptt_jax.analysis.gain import GainTrials, RecommendedGain, recommend_gain
from bptt_jax.analysis.influence import InfluenceMap, influence_map
from bptt_jax.analysis.lags import GradientByLag, gradient_by_lag
from bptt_jax.analysis.lyapunov import LyapunovSpectrum, lyapunov_exponents
from bptt_jax.analysis.matrix_free import (
    LeadingLogValues,
    LeadingValues,
    leading_eigenvalues,
    leading_singular_values,
    product_singular_values,
)
from bptt_jax.analysis.modes import modal_coordinates
from bptt_jax.analysis.monitor import Monitor, MonitorRecord, MonitorWarning
from bptt_jax.analysis.noise import GradientNoise, gradient_noise
from bptt_jax.analysis.nonfinite import NonFinite
from bptt_jax.analysis.precision import GradientPrecision, gradient_precision
from bptt_jax.analysis.truncation import TruncationBias, truncation_bias
from bptt_jax.analysis.window import AdaptiveWindow, adaptive_window

__all__ = [
    "AdaptiveWindow",
    "Adjoints",
    "Calibration",
    "CalibrationTrials",
    "CovariantVectors",
    "FixedPoints",
    "GainTrials",
    "GradientByLag",
    "GradientFlow",
    "GradientNoise",
    "GradientPrecision",
    "InfluenceMap",
    "LeadingLogValues",
    "LeadingValues",
    "LyapunovSpectrum",
    "Monitor",
    "MonitorRecord",
    "MonitorWarning",
    "NonFinite",
    "RecommendedGain",
    "ScaledGradients",
    "TemporalContributions",
    "TruncationBias",
    "adaptive_window",
    "adjoints",
    "calibrate",
    "calibrate_cell",
    "covariant_vectors",
    "fixed_points",
    "gradient_by_lag",
    "gradient_flow",
    "gradient_noise",
    "gradient_precision",
    "influence_map",
    "leading_eigenvalues",
    "leading_singular_values",
    "lyapunov_exponents",
    "modal_coordinates",
    "product_singular_values",
    "recommend_gain",
    "sample_starts",
    "temporal_contributions",
    "truncation_bias",
]
