"""Of the variants of the gated recurrent unit."""

from typing import Any

import jax
import numpy as np

from cell_oracles import I, N, of_jax, of_torchrecurrent, restated


def sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def mgu(p: Any, h: Any, x: Any) -> Any:
    """Zhou et al. 2016, table 1."""
    w_f, w_n = np.split(p.recurrent, 2)
    u_f, u_n = np.split(p.input, 2)
    b_f, b_n = np.split(p.bias, 2)
    f = sigmoid(w_f @ h + u_f @ x + b_f)
    n = np.tanh(w_n @ (f * h) + u_n @ x + b_n)
    return (1 - f) * h + f * n


def ugrnn(p: Any, h: Any, x: Any) -> Any:
    """Collins et al. 2017, section 1.2."""
    w_g, w_c = np.split(p.recurrent, 2)
    u_g, u_c = np.split(p.input, 2)
    b_g, b_c = np.split(p.bias, 2)
    g = sigmoid(w_g @ h + u_g @ x + b_g)
    c = np.tanh(w_c @ h + u_c @ x + b_c)
    return g * h + (1 - g) * c


def memax_mgu(p: Any, h: Any, xs: Any) -> Any:
    import equinox as eqx
    from memax.equinox.set_actions.mgu import MGUSetAction

    # Its inputs are as wide as its state.
    cell = eqx.filter_eval_shape(MGUSetAction, N, jax.random.key(0))
    (w_f, w_n), (u_f, u_n), (b_f, b_n) = (jax.numpy.split(a, 2) for a in p)
    cell = eqx.tree_at(
        lambda c: (c.U_f.weight, c.U_h.weight, c.W_f.weight, c.W_h.weight, c.W_f.bias, c.W_h.bias),
        cell,
        (w_f, w_n, *(jax.numpy.pad(u, ((0, 0), (0, N - I))) for u in (u_f, u_n)), b_f, b_n),
    )
    return jax.lax.scan(lambda h, x: (new := cell(h, jax.numpy.pad(x, (0, N - I))), new), h, xs)[1]


def in_order(p: Any) -> dict[str, Any]:
    return {"weight_hh": p.recurrent, "weight_ih": p.input, "bias_ih": p.bias}


def exchanged(p: Any) -> dict[str, Any]:
    """Of two gates, which it has the other way round."""
    return {"weight_hh": p.recurrent.roll(N, 0), "weight_ih": p.input.roll(N, 0), "bias_ih": p.bias.roll(N)}


ORACLES = {
    "mgu": [restated(mgu), of_torchrecurrent("MGUCell", in_order), of_jax("memax", memax_mgu)],
    "ugrnn": [restated(ugrnn), of_torchrecurrent("UGRNNCell", exchanged)],
}
