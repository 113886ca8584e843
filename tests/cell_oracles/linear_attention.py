"""Of the linear attention with a decay."""

from typing import Any

import numpy as np

from cell_oracles import imported, in_double, of_torch, restated


def retnet(p: Any, s: Any, x: Any) -> Any:
    """Sun et al. 2023, eq. 6 and 8, head by head."""
    return np.stack(
        [
            (1 - 2.0 ** (-5 - head)) * s[head] + np.outer(p.key[head] @ x, p.value[head] @ x)
            for head in range(len(p.key))
        ]
    )


def fla_retention(p: Any, s: Any, xs: Any) -> Any:
    """By its parallel form: what was in the memory comes as pairs of keys and values before the sequence, and what is
    in it is read by queries that are unit vectors."""
    import torch

    retention = imported("fla.ops.retention.naive").naive_retention
    heads, rows, _ = s.shape
    steps = len(xs)
    decay = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=s.dtype))
    until = torch.arange(rows - 1, -1, -1, dtype=s.dtype)  # steps from each such pair to the beginning
    before = s / decay[:, None, None] ** until[:, None]
    unit = torch.eye(rows, dtype=s.dtype)
    keys = torch.cat([unit.expand(heads, rows, rows), torch.einsum("hki,ti->htk", p.key, xs)], dim=1)
    values = torch.cat([before, torch.einsum("hvi,ti->htv", p.value, xs)], dim=1)
    read = []
    for one in unit:
        queries = (rows**0.5 * one).expand(1, heads, rows + steps, rows)
        read.append(retention(queries, keys[None], values[None])[0][:, rows:])
    return torch.stack(read, dim=2).transpose(0, 1)


def gla(p: Any, s: Any, x: Any) -> Any:
    """Yang et al. 2023, section 4, head by head."""
    low = p.gate_down @ x
    new = []
    for head in range(len(p.key)):
        alpha = (1 / (1 + np.exp(-(p.gate_up[head] @ low + p.gate_bias[head])))) ** (1 / 16)
        new.append(np.diag(alpha) @ s[head] + np.outer(p.key[head] @ x, p.value[head] @ x))
    return np.stack(new)


def fla_gla(p: Any, s: Any, xs: Any) -> Any:
    """What was in the memory comes as pairs of keys and values before the sequence, of which nothing fades."""
    import torch

    run = imported("fla.ops.gla.naive").naive_recurrent_gla
    heads, rows, _ = s.shape
    unit = torch.eye(rows, dtype=s.dtype)[:, None].expand(rows, heads, rows)
    keys = torch.cat([unit, torch.einsum("hki,ti->thk", p.key, xs)])
    values = torch.cat([s.transpose(0, 1), torch.einsum("hvi,ti->thv", p.value, xs)])
    gates = torch.einsum("hkr,ri,ti->thk", p.gate_up, p.gate_down, xs) + p.gate_bias
    gates = torch.cat([torch.zeros_like(unit), torch.nn.functional.logsigmoid(gates) / 16])
    states = []
    with in_double():
        for until in range(rows + 1, rows + len(xs) + 1):
            given = (a[None, :until] for a in (keys, keys, values, gates))
            states.append(run(*given, output_final_state=True)[1][0])
    return torch.stack(states)


ORACLES = {
    "retnet": [
        restated(retnet),
        of_torch("fla-core", fla_retention, note="decays in single precision alone", tolerance=1e-5),
    ],
    "gla": [restated(gla), of_torch("fla-core", fla_gla)],
}
