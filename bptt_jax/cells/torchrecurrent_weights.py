"""Cells of torchrecurrent as those of the atlas, with their weights."""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.cells import additive, gru_variants, linear, lstm_variants, oscillators, searched, simple, stable
from bptt_jax.cells.bistable import brc, nbrc
from bptt_jax.cells.layers import stacked
from bptt_jax.cells.torch_weights import as_array
from bptt_jax.checks import type_name
from bptt_jax.step import Array, Cell, Params, State, Step

if TYPE_CHECKING:
    import torch

Weights = Mapping[str, Array]
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Tanh": jnp.tanh,
    "ReLU": jax.nn.relu,
    "Sigmoid": jax.nn.sigmoid,
    "Identity": jax.nn.identity,
}


def _called(module: Any, x: Any, h: Sequence[Any]) -> Sequence[Any]:
    """The leaves of its new state, from those of an old one."""
    new = module(x, h[0] if len(h) == 1 else tuple(h))
    return new if isinstance(new, tuple) else (new,)


class _Entry(NamedTuple):
    """Which of our cells it is, its parameters by our names, the options by the module's and by those of the layers
    that it is in, and how its step is called: the first leaves of our new state, from all of an old one."""

    make: Callable[..., Cell]
    fields: Callable[[Weights], dict[str, Array]]
    options: Callable[[Any, Any], dict[str, Any]] = lambda module, layers: {}
    called: Callable[[Any, Any, Sequence[Any]], Sequence[Any]] = _called


def from_torchrecurrent(module: "torch.nn.Module") -> tuple[Step, Params, State]:
    """A cell of torchrecurrent, or layers of one, as the cell of the atlas that it is, with its weights.

    Whether the two are the same is tried on the spot: one step of each, from states and inputs at random, small and
    large, in the module's own precision, or in single where it is half. So an option that the cell here has not is
    refused, and so is a second bias where the equations keep it apart, as in ATR (``recurrent_bias=False``
    leaves it out), but where it is zero. Of its 41 cells 33 are taken. Three depart from their papers, LEM, NAS and
    SCRN; five have no cell here. What is the same in other words is taken: MiRU2 as `bptt_jax.cells.leaky_rnn`, TRNN as
    `bptt_jax.cells.min_gru`, and the gate of SGU and DSGU, whose hard sigmoid is less steep, with weights that make up
    for it.

    Args:
      module: such a cell, as ``torchrecurrent.MGUCell(3, 4)``, or layers, as ``torchrecurrent.MGU(3, 4)``; of
        tauGRU the layers, since its cell does not know the delay. Or a model that contains one such module.

    Returns:
      ``(step, params, state0)``, of the cell in `bptt_jax.cells`; of L > 1 layers `params` and `state0` are tuples of
      L, and `step` is their `stack`. The state is zero. Copies, in the weights' own dtype (double becomes single
      unless JAX has it switched on).

    Raises:
      TypeError: it is no module of torchrecurrent.
      ValueError: its class has no cell here, and why; it differs from the cell here; or it contains several.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a cell of torchrecurrent, got {type_name(module)}")
    found: dict[str, Any] = {}
    for where, inner in module.named_modules():
        inside = any(not at or where.startswith(f"{at}.") for at in found)
        if type(inner).__module__.startswith("torchrecurrent.cells.") and not inside:
            found[where] = inner
    if not found:
        raise TypeError(f"module: expected a cell of torchrecurrent, or layers of one, got {type_name(module)}")
    if len(found) > 1:
        given = ", ".join(f"{type_name(inner)} at {where!r}" for where, inner in found.items())
        raise ValueError(
            f"module: expected one cell of torchrecurrent, or layers of one, got {given}; give one of them"
        )
    (module,) = found.values()
    cells = list(getattr(module, "cells", [module]))
    for unknown in sorted({type_name(inner) for inner in cells} - set(_TABLE)):
        why = _REFUSED.get(unknown, "which is not known here")
        raise ValueError(f"module: expected one of {', '.join(_TABLE)}, got {unknown}, {why}")
    return stacked([_converted(torch, cell, module) for cell in cells])


def _converted(torch: Any, module: Any, layers: Any) -> tuple[Step, Params, State]:
    entry = _TABLE[type_name(module)]
    w = {name: as_array(name, value) for name, value in module.named_parameters()}
    w |= {name: as_array(name, value) for name, value in module.named_buffers() if value.is_floating_point()}
    dtype, (rows, inputs) = w["weight_ih"].dtype, w["weight_ih"].shape
    if dtype.itemsize < 4:  # no difference would exceed the rounding errors of half precision
        single = copy.deepcopy(module).float()
        step, *rest = _converted(torch, single, single if layers is module else layers)
        return step, *jax.tree.map(lambda a: a.astype(dtype), rest)
    for name in ("bias_ih", "bias_hh", "bias_mh"):
        w.setdefault(name, jnp.zeros(1 if name == "bias_mh" else rows, dtype))
    n = int(module.hidden_size)
    cell = entry.make(n, dtype=dtype, **entry.options(module, layers))
    template: Any = jax.eval_shape(lambda: cell.init(jax.random.key(0), inputs))
    reset = jnp.asarray(getattr(module, "reset_coefficient", 1), dtype)
    fields = entry.fields({**w, "n": jnp.zeros(n), "i": jnp.zeros(inputs), "reset": reset})
    given = {field: jnp.reshape(fields[field], getattr(template, field).shape) for field in template._fields}
    params = template._replace(**given)
    state0 = cell.initial_state()
    _compare(torch, module, entry.called, cell.step, params, state0, inputs)
    return cell.step, params, state0


def _compare(
    torch: Any, module: Any, called: Callable[..., Any], step: Step, params: Params, state0: State, inputs: int
) -> None:
    leaves, treedef = jax.tree.flatten(state0)
    rng, dtype = np.random.default_rng(0), leaves[0].dtype
    bound = 1e3 * float(jnp.finfo(dtype).eps)
    like = next(module.parameters())
    for scale in (0.5, *[20.0] * 15):  # where activations saturate, for some differ there alone, in a unit or two
        x, *h = (scale * rng.standard_normal(shape) for shape in ((inputs,), *(leaf.shape for leaf in leaves)))
        state = jax.tree.unflatten(treedef, [jnp.asarray(a, dtype) for a in h])
        ours = jax.tree.leaves(step(params, state, jnp.asarray(x, dtype)))
        with torch.no_grad():
            given = [torch.as_tensor(a).to(like) for a in (x, *h)]
            theirs = [np.asarray(a.double().cpu()) for a in called(module, given[0], given[1:])]
        for a, b in zip(ours, theirs, strict=False):
            if not np.max(np.abs(np.asarray(a, np.float64) - b)) <= bound * max(1.0, np.max(np.abs(b))):
                raise ValueError(
                    f"module: expected what the cell here has, got a {type_name(module)} that differs from it, by an "
                    "option or by a bias of which it has one less"
                )


# --- The table. `bias_ih` and `bias_hh` are added where the two stand side by side.


def _rolled(a: Array, n: int) -> Array:
    """Two gates, which torchrecurrent has the other way round."""
    return jnp.roll(a, n, axis=0)


def _plus(bias: Array, more: Array, at: int = 0) -> Array:
    """A bias with a shorter one added, from a place on."""
    count = min(more.shape[0], bias.shape[0] - at)
    return bias.at[at : at + count].add(more[:count])


def _in_order(w: Weights) -> dict[str, Array]:
    rows = w["weight_hh"].shape[0]
    return {"recurrent": w["weight_hh"], "input": w["weight_ih"], "bias": _plus(w["bias_ih"][:rows], w["bias_hh"])}


def _exchanged(w: Weights) -> dict[str, Array]:
    n = w["n"].shape[0]
    of_input = _rolled(w["bias_ih"], n)
    return {
        "recurrent": _rolled(w["weight_hh"], n),
        "input": _rolled(w["weight_ih"], n),
        "bias": _plus(of_input, _rolled(w["bias_hh"], n)),
    }


def _and(fields: Callable[[Weights], dict[str, Array]], **names: str) -> Callable[[Weights], dict[str, Array]]:
    """Further fields, that are theirs as they are."""
    return lambda w: fields(w) | {ours: w[theirs] for ours, theirs in names.items()}


def _ran(w: Weights) -> dict[str, Array]:
    return _in_order(w) | {"input": _rolled(w["weight_ih"], -w["n"].shape[0])}


def _light_ru(w: Weights) -> dict[str, Array]:
    n = w["n"].shape[0]
    return {
        "recurrent": w["weight_hh"],
        "input": _rolled(w["weight_ih"], n),
        "bias": w["bias_ih"][n:] + w["bias_hh"][:n],
    }


def _gated_antisymmetric(w: Weights) -> dict[str, Array]:
    """Its recurrent bias stands in the candidate alone."""
    n = w["n"].shape[0]
    return {"recurrent": w["weight_hh"], "input": w["weight_ih"], "bias": _plus(w["bias_ih"], w["bias_hh"], n)}


def _fastgrnn(w: Weights) -> dict[str, Array]:
    of_both = {"bias": w["bias_ih"] + w["bias_hh"], "zeta": w["zeta"], "nu": w["nu"]}
    return {"recurrent": w["weight_hh"], "input": w["weight_ih"], **of_both}


def _mut1(w: Weights) -> dict[str, Array]:
    n = w["n"].shape[0]
    beside, inner = w["bias_ih"], w["bias_hh"]
    bias = jnp.concatenate([beside[:n], beside[n : 2 * n] + inner[:n], inner[n : 2 * n]])
    return {"recurrent": w["weight_hh"], "input": w["weight_ih"], "bias": bias}


def _minimal(w: Weights) -> dict[str, Array]:
    n = w["n"].shape[0]
    return {
        "recurrent": w["weight_hh"],
        "latent": w["weight_mm"],
        "bias": w["bias_hh"][:n],
        "input": w["weight_ih"],
        "input_bias": w["bias_ih"],
    }


def _independent(w: Weights) -> dict[str, Array]:
    return {"recurrent": w["vector_u"], "input": w["weight_ih"], "bias": w["bias_ih"] + w["bias_hh"]}


def _cornn(w: Weights) -> dict[str, Array]:
    both = jnp.concatenate([w["weight_hh"], w["weight_ch"]], axis=1)
    return {"recurrent": both, "input": w["weight_ih"], "bias": w["bias_ih"] + w["bias_hh"] + w.get("bias_ch", 0)}


def _scaled(w: Weights) -> dict[str, Array]:
    """It scales the state that its weights see."""
    return _in_order(w) | {"recurrent": w["reset"] * w["weight_hh"]}


def _unicornn(w: Weights) -> dict[str, Array]:
    return {
        "recurrent": w["weight_hh"],
        "input": w["weight_ih"],
        "bias": w["bias_ih"] + w["bias_hh"],
        "control": w["weight_ch"],
    }


def _multiplicative(w: Weights) -> dict[str, Array]:
    n = w["n"].shape[0]
    return {
        "recurrent": w["weight_mh"],
        "input": w["weight_ih"][n:],
        "bias": _plus(w["bias_ih"][n:], w["bias_mh"]),
        "state_factor": w["weight_hh"],
        "input_factor": w["weight_ih"][:n],
    }


def _simple_gated(w: Weights) -> dict[str, Array]:
    """Its second bias stands in the gate alone, whose clip(a / 6 + 1 / 2) is our clip(b / 5 + 1 / 2) of b = 5 a / 6."""
    n = w["n"].shape[0]
    gate = jnp.concatenate([jnp.ones(n), jnp.full(n, 5 / 6)]).astype(w["weight_ih"].dtype)
    return {
        "recurrent": gate[:, None] * w["weight_hh"],
        "input": gate[:, None] * w["weight_ih"],
        "bias": gate * _plus(w["bias_ih"], w["bias_hh"][n:], n),
    }


def _deep_simple_gated(w: Weights) -> dict[str, Array]:
    found = _simple_gated(w)
    g, z = jnp.split(found["recurrent"], 2)
    return found | {"recurrent": jnp.concatenate([g, w["weight_ho"], z])}


def _intersection(w: Weights) -> dict[str, Array]:
    """It has inputs as wide as its state, which no projection has made so."""
    n, i = w["n"].shape[0], w["i"].shape[0]
    dtype = w["weight_ih"].dtype
    return _in_order(w) | {"projection": jnp.eye(n, i, dtype=dtype), "projection_bias": jnp.zeros(n, dtype)}


def _strongly_typed(w: Weights) -> dict[str, Array]:
    """Its gate keeps what ours lets in."""
    (h_in, f_in), (h_bias, f_bias) = jnp.split(w["weight_ih"], 2), jnp.split(w["bias_ih"], 2)
    return {"input": jnp.concatenate([-f_in, h_in]), "bias": jnp.concatenate([-f_bias, h_bias])}


def _tau_gru(w: Weights) -> dict[str, Array]:
    """Its order is u, z, g, a."""
    (u, z, g, a), bias = jnp.split(w["weight_ih"], 4), w["bias_ih"] + w["bias_hh"]
    u_h, z_h, g_h, a_h = jnp.split(w["weight_hh"], 4)
    u_b, z_b, g_b, a_b = jnp.split(bias, 4)
    return {
        "recurrent": jnp.concatenate([u_h, g_h, a_h]),
        "delayed": z_h,
        "input": jnp.concatenate([u, g, a, z]),
        "bias": jnp.concatenate([u_b, g_b, a_b, z_b]),
    }


def _delay(module: Any, layers: Any) -> int:
    if layers is module:
        raise ValueError("module: expected the layers, tauGRU, which know the delay, got a tauGRUCell alone")
    return int(layers.delay)


def _antisymmetric(module: Any, layers: Any) -> dict[str, Any]:
    return {"epsilon": float(module.epsilon), "gamma": float(module.gamma)}


_TABLE: dict[str, _Entry] = {
    "ATRCell": _Entry(additive.atr, _in_order),
    "AntisymmetricRNNCell": _Entry(stable.antisymmetric, _in_order, _antisymmetric),
    "BRCell": _Entry(brc, _in_order),
    "CFNCell": _Entry(additive.cfn, _in_order),
    "DSGUCell": _Entry(gru_variants.dsgu, _deep_simple_gated),
    "FastGRNNCell": _Entry(gru_variants.fastgrnn, _fastgrnn),
    "FastRNNCell": _Entry(stable.fastrnn, _and(_in_order, alpha="alpha", beta="beta")),
    "GatedAntisymmetricRNNCell": _Entry(stable.gated_antisymmetric, _gated_antisymmetric, _antisymmetric),
    "IndRNNCell": _Entry(
        simple.indrnn,
        _independent,
        lambda module, layers: {"activation": _ACTIVATIONS.get(type_name(module.act), jnp.tanh)},
    ),
    "IntersectionRNNCell": _Entry(
        gru_variants.intersection_rnn, _intersection, called=lambda module, x, h: module(x, h[1])
    ),
    "JANETCell": _Entry(lstm_variants.janet, _in_order, called=lambda module, x, h: module(x, (h[0], h[0]))[:1]),
    "LiGRUCell": _Entry(gru_variants.li_gru, _in_order),
    "LightRUCell": _Entry(additive.light_ru, _light_ru),
    "MGUCell": _Entry(gru_variants.mgu, _in_order),
    "MUT1Cell": _Entry(searched.mut1, _mut1),
    "MUT2Cell": _Entry(searched.mut2, _in_order),
    "MUT3Cell": _Entry(searched.mut3, _in_order),
    "MiRU2Cell": _Entry(
        simple.leaky_rnn,
        _scaled,
        lambda module, layers: {"alpha": 1 - float(module.update_coefficient)},
    ),
    "MinimalRNNCell": _Entry(simple.minimal_rnn, _minimal),
    "MultiplicativeLSTMCell": _Entry(lstm_variants.multiplicative_lstm, _multiplicative),
    "NBRCell": _Entry(nbrc, _in_order),
    "OriginalLSTMCell": _Entry(lstm_variants.original_lstm, _in_order),
    "PeepholeLSTMCell": _Entry(lstm_variants.peephole_lstm, _and(_in_order, peephole="weight_ph")),
    "RANCell": _Entry(additive.ran, _ran),
    "ResLSTMCell": _Entry(
        lstm_variants.residual_lstm,
        _and(_in_order, peephole="weight_ph", projection="weight_proj", shortcut="weight_res"),
    ),
    "SGUCell": _Entry(gru_variants.sgu, _simple_gated),
    "STARCell": _Entry(additive.star, _exchanged),
    "TRNNCell": _Entry(linear.min_gru, _strongly_typed),
    "UGRNNCell": _Entry(gru_variants.ugrnn, _exchanged),
    "UnICORNNCell": _Entry(
        oscillators.unicornn,
        _unicornn,
        lambda module, layers: {"dt": float(module.dt), "stiffness": float(module.alpha)},
    ),
    "WMCLSTMCell": _Entry(lstm_variants.wmc_lstm, _and(_in_order, memory="weight_mh")),
    "tauGRUCell": _Entry(
        oscillators.tau_gru,
        _tau_gru,
        lambda module, layers: {"delay": _delay(module, layers)},
        lambda module, x, h: (module(x, h[0], h[1][-1]),),
    ),
    "coRNNCell": _Entry(
        oscillators.cornn,
        _cornn,
        lambda module, layers: {
            "dt": float(module.dt),
            "gamma": float(module.gamma),
            "epsilon": float(module.epsilon),
        },
    ),
}

_REFUSED: dict[str, str] = {
    "LEMCell": "whose h(t) reads the c(t-1) of the step before, where that of the paper, and of lem, reads c(t)",
    "MCLSTMCell": "which no cell of bptt_jax.cells is",
    "MiRU1Cell": "which no cell of bptt_jax.cells is",
    "NASCell": "which has a sum where TensorFlow's cell, and nas, has a product",
    "SCRNCell": "which feeds its readout back, where the paper, and scrn, has the hidden units",
    "SGRNCell": "which no cell of bptt_jax.cells is",
    "TGRUCell": "which no cell of bptt_jax.cells is",
    "TLSTMCell": "whose candidate is linear, where that of qrnn is a tanh",
}
