"""The same jobs as other libraries' users would write them, each library in a module of its own.

A module whose library is not installed is skipped by what asks for it, which says so; the extra `bench` installs
them all. Weights come from `bptt_jax`'s cells and gradients are given back in their form, so that answers can be
compared before times are.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import bptt_jax as bptt
from bptt_jax.recurrence.unroll import steps_of_a_round

AT_ONCE = steps_of_a_round()  # of a peer's loop: as many as ours takes


class TrainingStep(NamedTuple):
    """Loss and gradient of ``mean(h^2)`` over the hidden states of a batch, prepared.

    Attributes:
      run: ``() -> (loss, gradients)``, these in the peer's own form; what is timed.
      as_ours: its gradients as `bptt_jax`'s parameters, None at a parameter that the peer lacks.
      step: the peer's equations as a step, where they are not those of the `bptt_jax` cell.
      compile_seconds: None where nothing is compiled.
      tolerance: largest deviation that rounding explains, relative to the largest entry.
    """

    run: Callable[[], Any]
    as_ours: Callable[[Any], Any]
    compile_seconds: float | None
    step: bptt.Step | None = None
    tolerance: float = 1e-4


def installed(modules: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The modules of these peers (name to module), and for those that cannot be had the package that is missing."""
    found, missing = {}, {}
    for name, module in modules.items():
        try:
            found[name] = import_module(f"peers.{module}")
        except ModuleNotFoundError as error:
            missing[name] = str(error.name)
    return found, missing
