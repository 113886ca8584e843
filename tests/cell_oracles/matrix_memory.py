"""Of the cells whose states are matrices."""

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

import bptt_jax as bptt
from cell_oracles import of_jax, of_torch, restated, sigmoid


def unit(k: Any) -> Any:
    return k / np.sqrt(k @ k + 1e-6)


def linear_transformer(p: Any, state: Any, x: Any) -> Any:
    """Katharopoulos et al. 2020, eq. 16 to 20, head by head."""
    s, z = (a.copy() for a in state)
    for h in range(len(p.key)):
        k = p.key[h] @ x
        k = np.where(k > 0, k, np.exp(k) - 1) + 1
        s[h] = s[h] + np.outer(p.value[h] @ x, k)
        z[h] = z[h] + k
    return type(state)(s, z)


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


# Peers begin with keys and values. They have keys first in the state, and hand out the last.


def projected(w: Any, xs: Any) -> Any:
    """``[T, H, ...]``, in PyTorch."""
    import torch

    return torch.einsum("h...i,ti->th...", w, xs)


def one_by_one(step: Any, s: Any, steps: int) -> Any:
    """Of all steps the state that a peer hands out as the last: ``step(t, S [1, H, K, V]) -> S``."""
    import torch

    s, states = s.mT[None], []
    for t in range(steps):
        s = step(slice(t, t + 1), s)
        states.append(s[0].mT)
    return torch.stack(states)


def fla(module: str, name: str) -> Any:
    with warnings.catch_warnings():  # that there is no Triton
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"fla.ops.{module}"), name)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """The references cast to single precision: within, that means double."""
    import torch

    method, dtype = torch.Tensor.float, torch.float32
    torch.Tensor.float, torch.float32 = torch.Tensor.double, torch.float64
    try:
        yield
    finally:
        torch.Tensor.float, torch.float32 = method, dtype


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


def of_heads(make: Any) -> Any:
    """Two heads of two values and three keys."""
    return {"make": partial(make, heads=2, key_size=3)}


CELLS = bptt.cells
ORACLES = {
    "linear_transformer": [
        restated(linear_transformer, **of_heads(CELLS.linear_transformer)),
        of_torch("fla-core", fla_linear_transformer, **of_heads(CELLS.linear_transformer)),
    ],
    "hgrn2": [
        restated(hgrn2, **of_heads(CELLS.hgrn2)),
        of_torch("fla-core", fla_hgrn2, **of_heads(CELLS.hgrn2)),
    ],
    "rwkv6": [
        restated(rwkv6, **of_heads(CELLS.rwkv6)),
        of_torch("fla-core", fla_rwkv6, **of_heads(CELLS.rwkv6)),
    ],
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
