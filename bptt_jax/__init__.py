"""bptt_jax: see exactly what backpropagation through time does to a gradient, for any recurrent step.

What is used most is here; all the rest, and these too, in the namespaces: `linalg` (spectra and products of arrays),
`cells`, `analysis` (what is measured, and the classes of results), `estimators`, `parallel`, `remedies` and `plots`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bptt_jax import interrupts  # isort: split

from bptt_jax import analysis, cells, estimators, linalg, parallel
from bptt_jax.analysis import (
    Monitor,
    adjoints,
    calibrate,
    covariant_vectors,
    fixed_points,
    gradient_flow,
    influence_map,
    lyapunov_exponents,
    temporal_contributions,
    truncation_bias,
)
from bptt_jax.cells import (
    from_equinox,
    from_haiku,
    from_keras,
    from_linen,
    from_nnx,
    from_torch,
    from_torchrecurrent,
    gru,
    lstm,
    rnn,
    stack,
)
from bptt_jax.checks import RecompilationWarning
from bptt_jax.estimators import audit
from bptt_jax.linalg import eigensystem, eigenvalues, jacobian_product, product_log_norms, singular_values
from bptt_jax.parallel import deer, predict_parallel, unroll_linear
from bptt_jax.recurrence.jacobians import jacobians
from bptt_jax.recurrence.unroll import final_state, unroll
from bptt_jax.results import Result
from bptt_jax.step import Cell, Sequence, Step, ravel_state

if TYPE_CHECKING:
    from bptt_jax import plots, remedies
    from bptt_jax.pages.report import report
    from bptt_jax.plots import plot_gradient_flow
    from bptt_jax.remedies import clip_by_global_norm, with_clipping

__version__ = "0.1.0"

# These bring Optax or Matplotlib along, each dearer to import than all of this package: on first use.
_ON_FIRST_USE = ("plots", "remedies")
_OF_THEM = {
    "plot_gradient_flow": "plots",
    "report": "pages.report",
    "clip_by_global_norm": "remedies",
    "with_clipping": "remedies",
}

__all__ = [
    "Cell",
    "Monitor",
    "RecompilationWarning",
    "Result",
    "Sequence",
    "Step",
    "adjoints",
    "analysis",
    "audit",
    "calibrate",
    "cells",
    "clip_by_global_norm",
    "covariant_vectors",
    "deer",
    "eigensystem",
    "eigenvalues",
    "estimators",
    "final_state",
    "fixed_points",
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_torch",
    "from_torchrecurrent",
    "gradient_flow",
    "gru",
    "influence_map",
    "jacobian_product",
    "jacobians",
    "linalg",
    "lstm",
    "lyapunov_exponents",
    "parallel",
    "plot_gradient_flow",
    "plots",
    "predict_parallel",
    "product_log_norms",
    "ravel_state",
    "remedies",
    "report",
    "rnn",
    "singular_values",
    "stack",
    "temporal_contributions",
    "truncation_bias",
    "unroll",
    "unroll_linear",
    "with_clipping",
]


if not TYPE_CHECKING:  # to which every name would be there, and of any type

    def __getattr__(name: str) -> Any:
        if name in _ON_FIRST_USE:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _OF_THEM:
            return getattr(importlib.import_module(f"{__name__}.{_OF_THEM[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
