"""What the contract asks of each public function, in every case to which it applies."""

from collections.abc import Callable

from contract_cases import Case, Check
from contract_estimators import (
    check_audit,
    check_es,
    check_gradient_by_lag,
    check_gradient_noise,
    check_gradient_precision,
    check_kf_rtrl,
    check_pes,
    check_rflo,
    check_rtrl,
    check_snap,
    check_tbptt,
    check_truncation_bias,
    check_uoro,
)
from contract_exponents import check_covariant, check_exponents, check_flossing, check_prediction
from contract_flow import check_gradient_flow, check_monitor, check_omega
from contract_parallel import check_deer, check_parallel_adjoints
from contract_products import (
    check_influence_map,
    check_leading_eigenvalues,
    check_leading_singular_values,
    check_product_singular_values,
    check_products,
)
from contract_spine import (
    check_adjoints,
    check_adjoints_remat,
    check_contributions,
    check_final_state,
    check_jacobians,
    check_states,
)
from registry import Entry

import bptt_jax as bptt


def no_backward_pass(entry: Entry) -> str | None:
    return None if entry.pulls else r"step: .* needs its backward pass, .*use lax.scan, or lax.fori_loop"


def not_by(mode: str, has_it: Callable[[Entry], bool]) -> Callable[[Entry], str | None]:
    message = f'mode: this step cannot be differentiated by "{mode}"'
    return lambda entry: None if has_it(entry) else message


def not_diagonal(entry: Entry) -> str | None:
    return None if entry.linear else "step: expected a bptt_jax.parallel.DiagonalStep"


def small(case: Case) -> bool:
    """For what needs many D x D matrices, or one with as many columns as there are parameters."""
    return not case.entry.large


def solved(case: Case) -> bool:
    """Half precision has too few digits for it to trust itself."""
    return case.dtype in ("float32", "float64")


def solved_fully(case: Case) -> bool:
    return small(case) and solved(case)


def has_adjoints(case: Case) -> bool:
    return small(case) and case.entry.pulls


CHECKS: dict[str, Check] = {
    "unroll": check_states(bptt.unroll),
    "unroll remat": check_states(bptt.unroll, remat=2),
    "final_state": Check(check_final_state),
    "unroll_linear": check_states(bptt.unroll_linear, not_diagonal),
    "jacobians": Check(check_jacobians(None)),
    "jacobians forward": Check(check_jacobians("forward"), not_by("forward", lambda entry: entry.pushes)),
    "jacobians reverse": Check(check_jacobians("reverse"), not_by("reverse", lambda entry: entry.pulls)),
    "adjoints": Check(check_adjoints, no_backward_pass),
    "adjoints remat": Check(check_adjoints_remat, no_backward_pass),
    "gradient_flow": Check(check_gradient_flow, no_backward_pass),
    "temporal_contributions": Check(check_contributions, no_backward_pass),
    "Monitor": Check(check_monitor, no_backward_pass),
    "omega_terms": Check(check_omega, no_backward_pass),
    "tbptt": Check(check_tbptt, no_backward_pass, small),
    "truncation_bias": Check(check_truncation_bias, no_backward_pass, small),
    "gradient_by_lag": Check(check_gradient_by_lag, no_backward_pass, small),
    "gradient_noise": Check(check_gradient_noise, no_backward_pass, small),
    "gradient_precision": Check(
        check_gradient_precision,
        lambda entry: "step: must keep the dtype" if entry.tolerance else no_backward_pass(entry),
        lambda case: small(case) and case.dtype == "float64",
    ),
    "rtrl": Check(check_rtrl, applies=small),
    "snap": Check(check_snap, applies=small),
    "rflo": Check(check_rflo, applies=small),
    "uoro": Check(check_uoro, applies=small),
    "kf_rtrl": Check(check_kf_rtrl, applies=small),
    "audit": Check(check_audit, no_backward_pass, solved_fully),
    "es": Check(check_es, applies=solved_fully),
    "pes": Check(check_pes, applies=solved_fully),
    "lyapunov_exponents": Check(check_exponents),
    "flossing_penalty": Check(check_flossing),
    "predict_parallel": Check(check_prediction),
    "products": Check(check_products, applies=small),
    "influence_map": Check(check_influence_map, applies=small),
    "leading_singular_values": Check(check_leading_singular_values, no_backward_pass),
    "leading_eigenvalues": Check(check_leading_eigenvalues),
    "product_singular_values": Check(check_product_singular_values, no_backward_pass),
    "deer": Check(check_deer(), applies=solved_fully),
    "deer diagonal": Check(check_deer(jacobian="diagonal", damping="kalman"), applies=solved),
    "parallel_adjoints": Check(check_parallel_adjoints, applies=has_adjoints),
    "covariant_vectors": Check(check_covariant),
}
