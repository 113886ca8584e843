"""The kernel that `benchmarks/spectra_routes.py` tries on a GPU: by array operations against LAPACK, and lowered."""

import inspect
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from slices import covering
from test_batched_spectra import N, check_singular_values, hard_matrices

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from pallas_spectra import jacobi_singular_values

SHAPES = [(N, N), (8, 8), (16, 16), (33, 33), (20, 33), (33, 5), (1, 7)]


@pytest.mark.parametrize(("rows", "columns"), covering(SHAPES, (N, N)))
def test_against_lapack(rows, columns) -> None:
    rng = np.random.default_rng(0)
    random = rng.standard_normal((2, rows, columns))
    low_rank = random[:, :, :1] * random[:, :1]
    clustered = np.broadcast_to(np.eye(rows, columns), random.shape) + 1e-5 * random
    given = [random, low_rank, clustered, 0 * random, 1e30 * random, 1e-30 * low_rank]
    if rows == columns == N:
        given.append(np.stack(list(hard_matrices().values())))
    matrices = np.concatenate(given).astype(np.float32)
    values = jax.jit(partial(jacobi_singular_values, interpret=True))(matrices)
    check_singular_values(np.asarray(values), matrices, eps=np.finfo(np.float32).eps)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from JAX 0.12 on
@pytest.mark.parametrize("size", covering([4, 33, 64, 128, 256, 512], 33))
def test_for_an_h100(size) -> None:
    """One call of Triton, and nothing that Triton refuses."""
    about = {"device_kind": "NVIDIA H100", "num_cores": None, "platform": "gpu"}
    device = AbstractDevice(**{name: about[name] for name in inspect.signature(AbstractDevice).parameters})
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(jacobi_singular_values).trace(jax.ShapeDtypeStruct((5, size, size), jnp.float32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") + text.count("__gpu$xla.gpu.triton") == 1
