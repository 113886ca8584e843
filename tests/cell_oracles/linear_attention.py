"""Of linear attention."""

from typing import Any

import numpy as np

import bptt_jax as bptt
from cell_oracles import in_double, of_torch, restated, sigmoid
from cell_oracles.heads import fla, of_heads, one_by_one, projected


def linear_transformer(p: Any, state: Any, x: Any) -> Any:
    """Katharopoulos et al. 2020, eq. 16 to 20, head by head."""
    s, z = (a.copy() for a in state)
    for h in range(len(p.key)):
        k = p.key[h] @ x
        k = np.where(k > 0, k, np.exp(k) - 1) + 1
        s[h] = s[h] + np.outer(p.value[h] @ x, k)
        z[h] = z[h] + k
    return type(state)(s, z)


def retnet(p: Any, s: Any, x: Any) -> Any:
    """Sun et al. 2023, eq. 6 and 8, head by head and, as there, with the keys first."""
    new = []
    for h in range(len(s)):
        kept = (1 - 2.0 ** (-5 - h)) * s[h].T + np.outer(p.key[h] @ x, p.value[h] @ x)
        new.append(kept.T)
    return np.stack(new)


def gla(p: Any, s: Any, x: Any) -> Any:
    """Yang et al. 2023, section 4, head by head and, as there, with the keys first."""
    low = p.gate_down @ x
    new = []
    for h in range(len(s)):
        alpha = sigmoid(p.gate_up[h] @ low + p.gate_bias[h]) ** (1 / 16)
        kept = np.diag(alpha) @ s[h].T + np.outer(p.key[h] @ x, p.value[h] @ x)
        new.append(kept.T)
    return np.stack(new)


def hgrn2(p: Any, s: Any, x: Any) -> Any:
    """Qin et al. 2024, eq. 6, head by head."""
    new = []
    for h in range(len(s)):
        f = sigmoid(p.bound) + (1 - sigmoid(p.bound)) * sigmoid(p.forget[h] @ x)
        new.append(s[h] @ np.diag(f) + np.outer(p.value[h] @ x, 1 - f))
    return np.stack(new)


def rwkv6(p: Any, s: Any, x: Any) -> Any:
    """Peng et al. 2024, eq. 16 to 20, head by head and, as there, with the keys first."""
    new = []
    for h in range(len(s)):
        w = np.exp(-np.exp(p.decay[h] + p.decay_out[h] @ np.tanh(p.decay_in @ x)))
        kept = np.diag(w) @ s[h].T + (p.key[h] @ x)[:, None] * (p.value[h] @ x)[None]
        new.append(kept.T)
    return np.stack(new)


def fla_linear_transformer(p: Any, state: Any, xs: Any) -> Any:
    import torch

    reference = fla("linear_attn.naive", "naive_recurrent_linear_attn")
    k, v = torch.nn.functional.elu(projected(p.key, xs)) + 1, projected(p.value, xs)
    with in_double():
        s = one_by_one(
            lambda t, s: reference(k[None, t], k[None, t], v[None, t], initial_state=s, output_final_state=True)[1],
            state.S,
            len(xs),
        )
    return type(state)(s, state.z + k.cumsum(0))


def fla_retention(p: Any, s: Any, xs: Any) -> Any:
    """By its parallel form: what was in the memory comes as pairs of keys and values before the sequence, and what is
    in it is read by queries that are unit vectors."""
    import torch

    retention = fla("retention.naive", "naive_retention")
    s = s.mT
    heads, rows, _ = s.shape
    steps = len(xs)
    decay = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=s.dtype))
    until = torch.arange(rows - 1, -1, -1, dtype=s.dtype)  # steps from each such pair to the beginning
    before = s / decay[:, None, None] ** until[:, None]
    unit = torch.eye(rows, dtype=s.dtype)
    keys = torch.cat([unit.expand(heads, rows, rows), projected(p.key, xs).transpose(0, 1)], dim=1)
    values = torch.cat([before, projected(p.value, xs).transpose(0, 1)], dim=1)
    read = []
    for one in unit:
        queries = (rows**0.5 * one).expand(1, heads, rows + steps, rows)
        read.append(retention(queries, keys[None], values[None])[0][:, rows:])
    return torch.stack(read, dim=3).transpose(0, 1)


def fla_gla(p: Any, s: Any, xs: Any) -> Any:
    import torch

    reference = fla("gla.naive", "naive_recurrent_gla")
    k, v = projected(p.key, xs), projected(p.value, xs)
    log_alpha = torch.nn.functional.logsigmoid(projected(p.gate_up, xs @ p.gate_down.T) + p.gate_bias) / 16

    def step(t: slice, s: Any) -> Any:
        given = (a[None, t] for a in (k, k, v, log_alpha))
        return reference(*given, initial_state=s, output_final_state=True)[1]

    with in_double():
        return one_by_one(step, s, len(xs))


def fla_fading(k: Any, v: Any, log_w: Any, s: Any) -> Any:
    """The reference of RWKV-6, of which every memory that fades key by key is a case."""
    import torch

    reference = fla("rwkv6.recurrent_naive", "naive_recurrent_rwkv6")

    def step(t: slice, s: Any) -> Any:
        key, value, w = (a[t].transpose(0, 1)[None] for a in (k, v, log_w))
        u = torch.zeros_like(k[0])
        return reference(key, key, value, w, u, initial_state=s, output_final_state=True)[1]

    with in_double():
        return one_by_one(step, s, len(v))


def fla_rwkv6(p: Any, s: Any, xs: Any) -> Any:
    import torch

    inner = torch.tanh(xs @ p.decay_in.T)
    log_w = -torch.exp(p.decay + projected(p.decay_out, inner))
    return fla_fading(projected(p.key, xs), projected(p.value, xs), log_w, s)


def fla_hgrn2(p: Any, s: Any, xs: Any) -> Any:
    import torch

    gamma = torch.sigmoid(p.bound)
    log_f = torch.log(gamma + (1 - gamma) * torch.sigmoid(projected(p.forget, xs)))
    return fla_fading(1 - log_f.exp(), projected(p.value, xs), log_f, s)


CELLS = bptt.cells
ORACLES = {
    "linear_transformer": [
        restated(linear_transformer, **of_heads(CELLS.linear_transformer)),
        of_torch("fla-core", fla_linear_transformer, **of_heads(CELLS.linear_transformer)),
    ],
    "retnet": [
        restated(retnet, **of_heads(CELLS.retnet)),
        of_torch(
            "fla-core",
            fla_retention,
            note="decays in single precision alone",
            tolerance=1e-5,
            **of_heads(CELLS.retnet),
        ),
    ],
    "gla": [
        restated(gla, **of_heads(CELLS.gla)),
        of_torch("fla-core", fla_gla, **of_heads(CELLS.gla)),
    ],
    "hgrn2": [
        restated(hgrn2, **of_heads(CELLS.hgrn2)),
        of_torch("fla-core", fla_hgrn2, **of_heads(CELLS.hgrn2)),
    ],
    "rwkv6": [
        restated(rwkv6, **of_heads(CELLS.rwkv6)),
        of_torch("fla-core", fla_rwkv6, **of_heads(CELLS.rwkv6)),
    ],
}
