"""Of the cells that write by a delta rule."""

from typing import Any

import numpy as np

import bptt_jax as bptt
from cell_oracles import in_double, of_jax, of_torch, restated, sigmoid
from cell_oracles.heads import fla, of_heads, one_by_one, projected


def unit(k: Any) -> Any:
    return k / np.sqrt(k @ k + 1e-6)


def deltanet(p: Any, s: Any, x: Any) -> Any:
    """Yang et al. 2024, eq. 5 to 7: what the key had is read, and the new value written in its place."""
    new = []
    for h in range(len(s)):
        k = p.key[h] @ x
        k = unit(k * sigmoid(k))
        beta = sigmoid(p.rate[h] @ x)
        old = s[h] @ k
        target = beta * (p.value[h] @ x) + (1 - beta) * old
        new.append(s[h] - np.outer(old, k) + np.outer(target, k))
    return np.stack(new)


def gated_deltanet(p: Any, s: Any, x: Any) -> Any:
    """Yang et al. 2024b, eq. 10, head by head."""
    new = []
    for h in range(len(s)):
        k = p.key[h] @ x
        k = unit(k * sigmoid(k))
        beta = sigmoid(p.rate[h] @ x)
        alpha = np.exp(-np.exp(p.decay_log[h]) * np.log1p(np.exp(p.decay[h] @ x + p.decay_bias[h])))
        erase = np.eye(len(k)) - beta * np.outer(k, k)
        new.append(s[h] @ (alpha * erase) + beta * np.outer(p.value[h] @ x, k))
    return np.stack(new)


def rwkv7(p: Any, s: Any, x: Any) -> Any:
    """Peng et al. 2025, eq. 4 to 17, head by head."""
    new = []
    for h in range(len(s)):
        k, v = p.key[h] @ x, p.value[h] @ x
        w = np.exp(-np.exp(-0.5) * sigmoid(p.decay[h] + p.decay_out[h] @ np.tanh(p.decay_in @ x)))
        a = sigmoid(p.rate[h] + p.rate_out[h] @ (p.rate_in @ x))
        removed = unit(k * p.removal[h])
        written = k * ((1 - p.replacement[h]) + p.replacement[h] * a)
        new.append(s[h] @ (np.diag(w) - np.outer(removed, a * removed)) + np.outer(v, written))
    return np.stack(new)


def torch_keys(p: Any, xs: Any) -> Any:
    import torch

    k = torch.nn.functional.silu(projected(p.key, xs))
    return k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)


def fla_deltanet(p: Any, s: Any, xs: Any) -> Any:
    import torch

    reference = fla("delta_rule.naive", "delta_rule_recurrence")
    k, v, beta = torch_keys(p, xs), projected(p.value, xs), torch.sigmoid(projected(p.rate, xs))

    def step(t: slice, s: Any) -> Any:
        key, value, rate = (a[t].transpose(0, 1)[None] for a in (k, v, beta))
        return reference(key, key, value, rate, initial_state=s)[1]

    with in_double():
        return one_by_one(step, s, len(xs))


def fla_gated_deltanet(p: Any, s: Any, xs: Any) -> Any:
    import torch

    reference = fla("gated_delta_rule.naive", "naive_recurrent_gated_delta_rule")
    k, v, beta = torch_keys(p, xs), projected(p.value, xs), torch.sigmoid(projected(p.rate, xs))
    g = -torch.exp(p.decay_log) * torch.nn.functional.softplus(projected(p.decay, xs) + p.decay_bias)

    def step(t: slice, s: Any) -> Any:
        given = (a[None, t] for a in (k, k, v, beta, g))
        return reference(*given, initial_state=s, output_final_state=True)[1]

    with in_double():
        return one_by_one(step, s, len(xs))


def fla_rwkv7(p: Any, s: Any, xs: Any) -> Any:
    import torch

    reference = fla("generalized_delta_rule.dplr.naive", "dplr_recurrence")
    k, v = projected(p.key, xs), projected(p.value, xs)
    log_w = -0.6065306597126334 * torch.sigmoid(p.decay + projected(p.decay_out, torch.tanh(xs @ p.decay_in.T)))
    a = torch.sigmoid(p.rate + projected(p.rate_out, xs @ p.rate_in.T))
    removed = k * p.removal
    removed = removed * torch.rsqrt((removed * removed).sum(-1, keepdim=True) + 1e-6)
    k = k.addcmul(k * (a - 1), p.replacement)

    def step(t: slice, s: Any) -> Any:
        parts = (k, k, v, -removed, removed * a, log_w)
        return reference(*(c[t].transpose(0, 1)[None] for c in parts), initial_state=s)[1]

    with in_double():
        return one_by_one(step, s, len(xs))


def memax_deltanet(p: Any, s: Any, xs: Any) -> Any:
    """The algebra of maps alone, whose states are [V, K] as the values are written, from the left."""
    import jax
    import jax.numpy as jnp
    from memax.equinox.semigroups.delta import DeltaNetSemigroup

    join = DeltaNetSemigroup(s.shape[-1]).__call__.__wrapped__
    k = jax.nn.silu(jnp.einsum("hki,ti->thk", p.key, xs))
    k = k * jax.lax.rsqrt(jnp.sum(k * k, -1, keepdims=True) + 1e-6)
    beta = jax.nn.sigmoid(xs @ p.rate.T)[..., None, None]
    erase = jnp.eye(k.shape[-1])[None, None] - beta * k[..., :, None] * k[..., None, :]
    write = beta * k[..., :, None] * jnp.einsum("hvi,ti->thv", p.value, xs)[..., None, :]
    states, carry = [], (jnp.broadcast_to(jnp.eye(k.shape[-1]), erase[0].shape), s.mT)
    for t in range(len(xs)):
        carry = join(None, carry, (erase[t], write[t]))
        states.append(carry[1].mT)
    return jnp.stack(states)


CELLS = bptt.cells
ORACLES = {
    "deltanet": [
        restated(deltanet, **of_heads(CELLS.deltanet)),
        of_torch("fla-core", fla_deltanet, **of_heads(CELLS.deltanet)),
        of_jax("memax", memax_deltanet, **of_heads(CELLS.deltanet)),
    ],
    "gated_deltanet": [
        restated(gated_deltanet, **of_heads(CELLS.gated_deltanet)),
        of_torch("fla-core", fla_gated_deltanet, **of_heads(CELLS.gated_deltanet)),
    ],
    "rwkv7": [
        restated(rwkv7, **of_heads(CELLS.rwkv7)),
        of_torch("fla-core", fla_rwkv7, **of_heads(CELLS.rwkv7)),
    ],
}
