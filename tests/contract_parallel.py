"""In parallel over time."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from contract_cases import Case, Comparison, at_step, log, real_vector

import bptt_jax as bptt


def check_deer(**options: Any) -> Callable[[Case], Iterator[Comparison]]:
    def run(case: Case) -> Iterator[Comparison]:
        for plan in case.plans:
            got = bptt.deer(*case.arguments(plan), **options)
            yield Comparison("converged", got.converged, True)
            yield Comparison("states", got.states, case.truth(plan).states, slack=100)

    return run


def check_parallel_adjoints(case: Case) -> Iterator[Comparison]:
    """Of Jacobians that come from elsewhere."""
    for plan in case.plans:
        truth, sequence = case.truth(plan), case.arguments(plan)[-1]
        flags = {"resets": getattr(sequence, "resets", None), "mask": getattr(sequence, "mask", None)}
        kind = jnp.result_type(float)
        got = bptt.parallel.parallel_adjoints(
            jnp.asarray(truth.jacobians, kind), jnp.asarray(truth.immediate, kind), **flags
        )
        adjoints = np.stack([real_vector(at_step(truth.adjoints, k)) for k in range(plan.steps)])
        yield Comparison("adjoints", got.adjoints, adjoints)
        yield Comparison("log_norms", got.log_norms, log(np.linalg.norm(adjoints, axis=1)), True)
        if plan.own_reset_state:
            yield Comparison("reset_state_grad", got.reset_state_grad, real_vector(truth.reset_state_grad))
        # Otherwise both are one state.
        shared = got.reset_state_grad is not None and not plan.own_reset_state
        start = got.state0_grad + got.reset_state_grad if shared else got.state0_grad
        yield Comparison("state0_grad", start, real_vector(truth.state0_grad))
