"""Every public function can be had for a GPU, without one: what its program would call there, and no Python."""

import re

import jax
import jax.numpy as jnp
import pytest
from slices import covering
from test_transforms import ALWAYS, FUNCTIONS, W

from bptt_jax.linalg import spectra

# The library's routines that a program for an Nvidia GPU may call. All else is what XLA compiles itself.
KINDS = {
    "svd": r"cusolver_gesvd\w*",
    "eigh": r"cusolver_syevd\w*",
    "eig": r"(cu)?(hybrid|solver)_\w*eig?\w*",
    "qr": r"cusolver_(geqrf|orgqr)\w*",
    "lu": r"cu(solver|blas)_getrf\w*|cu_lu_pivots\w*",
    "cholesky": r"cusolver_potrf\w*",
}
CALLS = {
    "gradient_flow": {"svd", "eig"},
    "lyapunov_exponents": {"qr"},
    "covariant_vectors": {"qr", "svd"},
    "influence_map": {"svd"},
    "fixed_points": {"lu", "cholesky", "eig"},
    "predict_parallel": {"qr"},
    "leading_singular_values": {"svd"},
    "leading_eigenvalues": {"eig"},
    "product_singular_values": {"svd"},
    "singular_values": {"svd"},
    "spectral_norm": {"svd"},
    "condition_number": {"svd"},
    "eigenvalues": {"eig"},
    "spectral_radius": {"eig"},
    "eigensystem": {"eig", "lu"},
    "singular_vectors": {"svd"},
    "product_singular_vectors": {"qr"},
    "modal_coordinates": {"eig", "lu"},
    "orthogonal": {"lu"},
    "product_log_norms": {"svd"},
}


def program(function, matrices) -> str:
    lowered = jax.jit(function).trace(matrices).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


def kinds_of_calls(text: str) -> set[str]:
    names = set(re.findall(r"custom_call @([\w.$]+)", text)) - {"Sharding", "xla.sdy.FuncResultSharding"}
    return {next((k for k, of in KINDS.items() if re.fullmatch(of, name)), name) for name in names}


@pytest.mark.parametrize("name", covering(FUNCTIONS, *(name for name in FUNCTIONS if name in ALWAYS | set(CALLS))))
def test_for_a_gpu(name, monkeypatch) -> None:
    monkeypatch.setattr(spectra, "_gpu_is_here", lambda: True)
    text = program(FUNCTIONS[name], jnp.asarray(W, jnp.float32))
    assert kinds_of_calls(text) == CALLS.get(name, set())


@pytest.mark.parametrize(
    ("routine", "calls"),
    [(spectra.singular_values, {"eigh"}), (spectra.eigenvalues, set())],
    ids=["singular_values", "eigenvalues"],
)
def test_a_stack_goes_through_no_library_that_takes_it_matrix_by_matrix(routine, calls, monkeypatch) -> None:
    monkeypatch.setattr(spectra, "_gpu_is_here", lambda: True)
    assert kinds_of_calls(program(routine, jnp.ones((64, 40, 40)))) == calls


def test_a_call_back_to_python_has_no_way_there() -> None:
    def through_python(a):
        return jax.pure_callback(lambda a: a, a, a)

    with pytest.raises(ValueError, match="platform"):
        program(through_python, jnp.ones(3))
