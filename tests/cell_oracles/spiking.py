"""Of the spiking cells and of reservoirs.

The paper's equations in NumPy are differentiated by differences, so there the spike is a smooth function; the peers
have spikes of 0 and 1 and the surrogate's derivative.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax as bptt
from cell_oracles import N, Oracle, of_jax, of_torch, restated, scanned
from cell_oracles.simple import reservoirpy_leaky


def softly(x: Any) -> Any:
    return jax.nn.sigmoid(3 * x)


def soft(a: Any) -> Any:
    return 1 / (1 + np.exp(-3 * a))


def lif(p: Any, state: Any, x: Any) -> Any:
    """Neftci et al. 2019 with reset by subtraction, at decay = 0.95 and a threshold of 1."""
    v = 0.95 * state.v + p.recurrent @ state.h + p.input @ x + p.bias - state.h
    return type(state)(soft(v - 1), v)


def lif_to_zero(p: Any, state: Any, x: Any) -> Any:
    """Wu et al. 2018, eq. 14."""
    v = 0.95 * state.v * (1 - state.h) + p.recurrent @ state.h + p.input @ x + p.bias
    return type(state)(soft(v - 1), v)


def alif(p: Any, state: Any, x: Any) -> Any:
    """Bellec et al. 2020, eqs. 6 to 9, at rho = 0.995 and beta = 0.184."""
    v = 0.95 * state.v + p.recurrent @ state.h + p.input @ x + p.bias - state.h
    a = 0.995 * state.a + state.h
    return type(state)(soft(v - (1 + 0.184 * a)), v, a)


def echo_state(p: Any, h: Any, x: Any) -> Any:
    """Jaeger 2001, without feedback."""
    return np.tanh(p.recurrent @ h + p.input @ x + p.bias)


def leaky_echo_state(p: Any, h: Any, x: Any) -> Any:
    """Jaeger et al. 2007 at a leaking rate of 0.3."""
    return 0.7 * h + 0.3 * np.tanh(p.recurrent @ h + p.input @ x + p.bias)


def snntorch_lif(p: Any, state: Any, xs: Any) -> Any:
    """Its reset is by the membrane, and not differentiated: taken back, and ours given as an input."""
    import snntorch
    import torch

    surrogate = snntorch.surrogate.fast_sigmoid(slope=25)
    decay = torch.tensor(0.95, dtype=torch.float64)
    peer = snntorch.RLeaky(beta=decay, linear_features=N, spike_grad=surrogate).double()
    weights = {"recurrent.weight": p.recurrent, "recurrent.bias": p.bias}
    h, v = state
    states = []
    for x in xs:
        reset = (v > 1).to(v.dtype) - h
        h, v = torch.func.functional_call(peer, weights, (p.input @ x + reset, h, v))
        h = h.to(v.dtype)
        states.append((h, v))
    return type(state)(*map(torch.stack, zip(*states, strict=True)))


def spyx_lif(p: Any, state: Any, xs: Any) -> Any:
    """It spikes where the next step begins, from the membrane, which stands for h from the second step on."""
    from flax import nnx
    from spyx import axn, nn

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        peer = nn.LIF((N,), beta=0.95, activation=axn.superspike(25), rngs=nnx.Rngs(0))

        def step(state: Any, x: Any) -> Any:
            h, v = state
            current = p.recurrent @ h + p.input @ x + p.bias
            v = peer(current + peer(0 * v, v)[0] - h, v)[1]
            return type(state)(peer(0 * v, v)[0], v)

        return scanned(step)(state, xs)


def spyx_alif(p: Any, state: Any, xs: Any) -> Any:
    """Of 2018, where a is scaled and the whole threshold subtracted: the difference comes as an input."""
    from flax import nnx
    from spyx import axn, nn

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        peer = nn.ALIF((N,), beta=0.95, gamma=0.75, activation=axn.superspike(25), rngs=nnx.Rngs(0))

        def step(state: Any, x: Any) -> Any:
            h, v, a = state
            raised = 0.25 * a
            spikes = peer(0 * v, jnp.concatenate([v, raised]))[0]
            current = p.recurrent @ h + p.input @ x + p.bias + spikes * (1 + raised) - h
            v, raised = jnp.split(peer(current, jnp.concatenate([v, raised]))[1], 2)
            raised = raised + 0.25 * (h - spikes)
            return type(state)(peer(0 * v, jnp.concatenate([v, raised]))[0], v, raised / 0.25)

        return scanned(step)(state, xs)


SOFT = {"spike": softly}
ORACLES = {
    "lif": [
        restated(lif, make=partial(bptt.cells.lif, **SOFT)),
        restated(lif_to_zero, make=partial(bptt.cells.lif, reset="zero", **SOFT), note="reset to zero"),
        of_torch(
            "snntorch",
            snntorch_lif,
            tolerance=1e-5,
            note="its spikes are in single precision; its reset, which it does not differentiate, is ours",
        ),
        of_jax("spyx", spyx_lif),
    ],
    "alif": [
        restated(alif, make=partial(bptt.cells.alif, **SOFT)),
        of_jax(
            "spyx",
            spyx_alif,
            make=partial(bptt.cells.alif, rho=0.75, beta=0.25),
            note="of 2018: subtracts the threshold as it stands; here its base",
        ),
    ],
    "echo_state": [
        restated(echo_state),
        restated(leaky_echo_state, make=partial(bptt.cells.echo_state, alpha=0.3), note="with a leak of 0.3"),
        Oracle(
            "reservoirpy", "numpy", partial(reservoirpy_leaky, 0.3), make=partial(bptt.cells.echo_state, alpha=0.3)
        ),
    ],
}
