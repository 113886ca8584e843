"""Gradients other than those of full backpropagation through time, all called alike.

``estimator(step, params, state0, xs, loss, *, key=None, args=None, length=None, ...) -> params_grad``: a pytree like
`params`, None at parameters that are not floating. A `key` is needed where an estimator is random, and not looked at
where it is not.
"""

from bptt_jax.estimators.audit import Audit, audit
from bptt_jax.estimators.influence import rflo, rtrl, snap
from bptt_jax.estimators.kronecker import kf_rtrl
from bptt_jax.estimators.online import OnlineCarry
from bptt_jax.estimators.perturbation import PESCarry, es, pes
from bptt_jax.estimators.rank_one import uoro
from bptt_jax.estimators.truncated import tbptt

__all__ = [
    "Audit",
    "OnlineCarry",
    "PESCarry",
    "audit",
    "es",
    "kf_rtrl",
    "pes",
    "rflo",
    "rtrl",
    "snap",
    "tbptt",
    "uoro",
]
