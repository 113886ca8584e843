"""Parallel over time: Newton on whole trajectories, linear recurrences, and whether it will pay."""

from bptt_jax.parallel.adjoints import ParallelAdjoints, parallel_adjoints
from bptt_jax.parallel.diagonal import unroll_linear
from bptt_jax.parallel.newton import DeerSolution, deer
from bptt_jax.parallel.prediction import ParallelPrediction, predict_parallel
from bptt_jax.recurrence.delta import DeltaStep
from bptt_jax.recurrence.diagonal import DiagonalStep

__all__ = [
    "DeerSolution",
    "DeltaStep",
    "DiagonalStep",
    "ParallelAdjoints",
    "ParallelPrediction",
    "deer",
    "parallel_adjoints",
    "predict_parallel",
    "unroll_linear",
]
