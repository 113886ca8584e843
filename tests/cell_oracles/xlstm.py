"""Of the cells with exponential gates."""

from functools import partial
from typing import Any

import numpy as np

import bptt_jax as bptt
from cell_oracles import of_torch, restated


def slstm(p: Any, state: Any, x: Any) -> Any:
    """Beck et al. 2024, eq. 8 to 18, head by head; stabilised as there."""
    heads, size = p.recurrent.shape[0], p.recurrent.shape[-1]
    u, b = p.input.reshape(4, heads, size, -1), p.bias.reshape(4, heads, size)
    new = []
    for k in range(heads):
        h, c, n, m = (a.reshape(heads, size)[k] for a in state)
        i, f, z, o = (p.recurrent[k, gate] @ h + u[gate, k] @ x + b[gate, k] for gate in range(4))
        log_f = -np.log1p(np.exp(-f))
        later = np.maximum(log_f + m, i)
        admit, keep = np.exp(i - later), np.exp(log_f + m - later)
        c, n = keep * c + admit * np.tanh(z), keep * n + admit
        new.append((c / n / (1 + np.exp(-o)), c, n, later))
    return type(state)(*(np.concatenate(each) for each in zip(*new, strict=True)))


def mlstm(p: Any, state: Any, x: Any) -> Any:
    """Beck et al. 2024, eq. 19 to 27, head by head; stabilised as there."""
    new = []
    for k in range(len(p.key)):
        key, value = p.key[k] @ x / np.sqrt(p.key.shape[1]), p.value[k] @ x
        i, f = p.gates[:, k] @ x + p.bias[:, k]
        log_f = -np.log1p(np.exp(-f))
        m = max(log_f + state.m[k], i)
        admit, keep = np.exp(i - m), np.exp(log_f + state.m[k] - m)
        new.append((keep * state.C[k] + admit * np.outer(value, key), keep * state.n[k] + admit * key, m))
    return type(state)(*(np.stack(each) for each in zip(*new, strict=True)))


def released_slstm(p: Any, state: Any, xs: Any) -> Any:
    import torch
    from xlstm.blocks.slstm.src.vanilla import slstm_forward, slstm_pointwise_function_registry

    heads, _, size, _ = p.recurrent.shape
    recurrent = p.recurrent.reshape(heads, 4 * size, size)
    driven = (xs @ p.input.T)[:, None]
    step = slstm_pointwise_function_registry["slstm"]
    states = slstm_forward(driven, torch.stack(list(state))[:, None], recurrent, p.bias, step)[0]
    return bptt.cells.xlstm.SLSTMState(*states[:, 1:, 0])


def released_mlstm(p: Any, state: Any, xs: Any) -> Any:
    import torch
    from xlstm.blocks.mlstm.backends import recurrent_step_stabilized_simple

    c, n, m = state.C.mT[None], state.n[None, :, :, None], state.m[None, :, None, None]
    states = []
    for x in xs:
        k, v = (torch.einsum("hni,i->hn", w, x)[None, :, None] for w in (p.key, p.value))
        i, f = ((gate @ x + b)[None, :, None, None] for gate, b in zip(p.gates, p.bias, strict=True))
        _, (c, n, m) = recurrent_step_stabilized_simple(c, n, m, k.clone(), k.clone(), v, i, f)
        states.append((c[0].mT, n[0, :, :, 0], m[0, :, 0, 0]))
    return bptt.cells.xlstm.MLSTMState(*map(torch.stack, zip(*states, strict=True)))


def kernel_mlstm(p: Any, state: Any, xs: Any) -> Any:
    import torch
    from mlstm_kernels.torch.recurrent.native_step import mlstm_recurrent_step__native

    c, n, m = state.C.mT[None], state.n[None], state.m[None, :, None]
    states = []
    for x in xs:
        k, v = (torch.einsum("hni,i->hn", w, x)[None] for w in (p.key, p.value))
        i, f = ((gate @ x + b)[None, :, None] for gate, b in zip(p.gates, p.bias, strict=True))
        k = k / p.key.shape[1] ** 0.5
        c, n, m = mlstm_recurrent_step__native(k, k, v, i, f, c, n, m, dtype_state=torch.float64)[1]
        states.append((c[0].mT, n[0], m[0, :, 0]))
    return bptt.cells.xlstm.MLSTMState(*map(torch.stack, zip(*states, strict=True)))


two_heads = {"make": partial(bptt.cells.mlstm, heads=2, key_size=3)}
ORACLES = {
    "slstm": [
        restated(slstm, make=partial(bptt.cells.slstm, heads=2), note="two heads"),
        of_torch("xlstm", released_slstm),
        of_torch("xlstm", released_slstm, make=partial(bptt.cells.slstm, heads=2), note="two heads"),
    ],
    "mlstm": [
        restated(mlstm, **two_heads),
        of_torch("xlstm", released_mlstm, **two_heads),
        of_torch("mlstm_kernels", kernel_mlstm, note="scales q by 1 / sqrt(K), in place of k"),
    ],
}
