"""Of the cells with orthogonal and unitary weights."""

from functools import partial
from typing import Any

import numpy as np
import scipy.linalg

import bptt_jax as bptt
from cell_oracles import N, of_torch, restated

scornn = partial(bptt.cells.orthogonal, map="cayley", negative=1)


def skew(p: Any) -> Any:
    a = np.zeros((N, N))
    entries = iter(p.skew)
    for i in range(N):
        for j in range(i + 1, N):
            a[i, j] = next(entries)
            a[j, i] = -a[i, j]
    return a


def mod_relu(a: Any, b: Any) -> Any:
    return np.array([z / abs(z) * max(abs(z) + c, 0) for z, c in zip(a, b, strict=True)])


def exponential(p: Any, h: Any, x: Any) -> Any:
    """Lezcano-Casado and Martinez-Rubio 2019."""
    return mod_relu(scipy.linalg.expm(skew(p)) @ h + p.input @ x, p.bias)


def cayley(p: Any, h: Any, x: Any) -> Any:
    """Helfrich et al. 2018, one entry of D being -1."""
    a, one = skew(p), np.eye(N)
    w = np.linalg.inv(one + a) @ (one - a) @ np.diag([1] * (N - 1) + [-1])
    return mod_relu(w @ h + p.input @ x, p.bias)


def unitary(p: Any, h: Any, x: Any) -> Any:
    """Arjovsky et al. 2016, as a matrix."""
    fourier = scipy.linalg.dft(N, scale="sqrtn")
    d_1, d_2, d_3 = (np.diag(np.exp(1j * phases)) for phases in p.phases)
    r_1, r_2 = (
        np.eye(N) - 2 * np.outer(v, v.conj()) / np.vdot(v, v).real for v in p.reflections_re + 1j * p.reflections_im
    )
    permutation = np.eye(N)[np.random.default_rng(0).permutation(N)]
    w = d_3 @ r_2 @ fourier.conj().T @ d_2 @ permutation @ r_1 @ fourier @ d_1
    return mod_relu(w @ h + (p.input_re + 1j * p.input_im) @ x, p.bias)


def householder(p: Any, h: Any, x: Any) -> Any:
    """Mhammedi et al. 2017, as a matrix; of the first vector all entries, of the k-th the last N - k + 1."""
    w = np.eye(N)
    for k, u in enumerate(p.reflections):
        u = u[k:]
        h_k = np.eye(N)
        h_k[k:, k:] -= 2 * np.outer(u, u) / (u @ u)
        w = w @ h_k
    a = w @ h + p.input @ x + p.bias
    return np.where(a < 0, 0.1 * a, a)


def torch_steps(w: Any, p: Any, h: Any, xs: Any, activation: Any) -> Any:
    import torch

    states = []
    for x in xs:
        h = activation(w @ h + p.input @ x, p.bias)
        states.append(h)
    return torch.stack(states)


def torch_mod_relu(a: Any, b: Any) -> Any:
    return a.sign() * (a.abs() + b).relu()


def geotorch_weights(p: Any, name: str, scale: float) -> Any:
    """Of ``A = scale X``, with the base I; it takes what stands below the diagonal."""
    import geotorch
    import torch

    manifold = geotorch.SO((N, N), triv=name).double()
    manifold.base.copy_(torch.eye(N))
    above = torch.zeros(N, N, dtype=torch.float64).index_put(tuple(torch.triu_indices(N, N, 1)), p.skew / scale)
    return manifold(-above.T)


def geotorch_exponential(p: Any, h: Any, xs: Any) -> Any:
    return torch_steps(geotorch_weights(p, "expm", 1), p, h, xs, torch_mod_relu)


def geotorch_cayley(p: Any, h: Any, xs: Any) -> Any:
    import torch

    # Its transform is (I - X / 2)^{-1} (I + X / 2), and it has no D.
    w = geotorch_weights(p, "cayley", -0.5) * torch.tensor([1] * (N - 1) + [-1])
    return torch_steps(w, p, h, xs, torch_mod_relu)


def torch_householder(p: Any, h: Any, xs: Any) -> Any:
    """By LAPACK's orgqr: vectors below the diagonal, with 1 on it."""
    import torch

    below = p.reflections.triu().T
    below = below / below.diagonal()
    w = torch.linalg.householder_product(below, 2 / (below * below).sum(0))
    return torch_steps(w, p, h, xs, lambda a, b: torch.nn.functional.leaky_relu(a + b, 0.1))


ORACLES = {
    "orthogonal": [
        restated(exponential),
        restated(cayley, make=scornn, note="by the Cayley transform"),
        of_torch("geotorch", geotorch_exponential),
        of_torch("geotorch", geotorch_cayley, make=scornn, note="by the Cayley transform"),
    ],
    "unitary": [restated(unitary)],
    "householder": [
        restated(householder),
        of_torch("torch", torch_householder, note="torch.linalg.householder_product"),
    ],
}
