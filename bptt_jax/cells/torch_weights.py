"""Recurrent layers of PyTorch, from a module or from the weights that it has saved.

PyTorch is never imported here: a module is there only where it has been already, and saved weights may be NumPy's.
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.cells.activations import sigmoid, tanh
from bptt_jax.cells.gated import GRUParams, LSTMParams, LSTMState, gru, lstm
from bptt_jax.cells.layers import stacked
from bptt_jax.cells.simple import RNNParams, rnn
from bptt_jax.cells.weights import times
from bptt_jax.checks import check_choice, check_leaves, type_name
from bptt_jax.results import counted
from bptt_jax.step import Array, Params, State, Step

if TYPE_CHECKING:
    import torch

Direction = Literal["forward", "backward"]
Nonlinearity = Literal["tanh", "relu"]

_NAME = re.compile(r"((?:.*\.)?)((?:weight|bias)_(?:ih|hh)|weight_hr)(?:_l(\d+)(_reverse)?)?")
_PARAMETRISED = re.compile(r"parametrizations\.(weight|bias)_|(weight|bias)_[ih]h\w*_(orig|g)$")
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, "relu": jax.nn.relu}
_SHOWN = 8  # names in a message


class ProjectedLSTMParams(NamedTuple):
    """Parameters of an LSTM whose output is projected, h = W (o * tanh(c)); gates in the order i, f, g, o.

    ``recurrent [4N, P]``, ``input [4N, I]``, ``bias [4N]``, ``projection [P, N]``.
    """

    recurrent: Array
    input: Array
    bias: Array
    projection: Array


class _Place(NamedTuple):
    """Which layer, and whether it runs backwards."""

    layer: int
    reverse: bool


class _Recurrent(NamedTuple):
    """The weights of one recurrent module, by place and name; of a module what else it says.

    Attributes:
      weights: by place and name.
      beside: in a state dict, names that stand in the same module and are none of these.
      nonlinearity: that of the module.
      own_forward: the class and its base, where the module does not compute what PyTorch's does.
    """

    weights: dict[_Place, dict[str, Any]]
    beside: Sequence[str] = ()
    nonlinearity: Nonlinearity | None = None
    own_forward: tuple[str, str] | None = None


def from_torch(
    module_or_state_dict: "torch.nn.Module | Mapping[str, Any]",
    *,
    prefix: str = "",
    layer: int | None = None,
    direction: Direction | None = None,
    nonlinearity: Nonlinearity | None = None,
) -> tuple[Step, Params, State]:
    """A recurrent layer of PyTorch, or several, with its weights.

    Taken are `nn.RNN`, `nn.GRU`, `nn.LSTM` (with `proj_size` too), and `nn.RNNCell`, `nn.GRUCell`, `nn.LSTMCell`.
    PyTorch's two bias vectors become one; inside the reset of a GRU the second stays, as `recurrent_bias`. Without
    biases (``bias=False``) ours are zeros. Dropout between layers acts while training only, and is left out.

    Args:
      module_or_state_dict: such a module; a model that contains it; or the state dict of either, whose values may be
        tensors or arrays. In a state dict the kind is told by the shapes: of N units, recurrent weights have 4N rows
        for an LSTM, 3N for a GRU, and N for the simple network.
      prefix: where in the model, as "encoder.rnn.". Needed where there are several.
      layer: one of several layers alone, counted from 0.
      direction: "forward" or "backward" of a bidirectional layer; the latter is for reversed sequences. Of several
        bidirectional layers only one at a time is a recurrence, since each reads both directions of the one below.
      nonlinearity: "tanh" or "relu", of the simple network in a state dict, which does not say; by default "tanh".

    Returns:
      ``(step, params, state0)``: `RNNParams` and a state ``[N]``, `GRUParams` and ``[N]``, `LSTMParams` and an
      `LSTMState`, whose h is ``[P]`` if it is projected (`params` is then a ``ProjectedLSTMParams``); of L > 1
      layers `params` and `state0` are tuples of L, and `step` is their `stack`. The state is zero. Copies, in the
      weights' own dtype (double becomes single unless JAX has it switched on).

    Raises:
      TypeError: it is neither a module nor a mapping; a weight is no floating array, or they differ in dtype.
      ValueError: there is no recurrent layer, or several without `prefix`; it is another cell, which has weights beside
        these or a forward of its own; weights are missing or of other shapes; a bidirectional one without
        `direction`; `layer` or `nonlinearity` do not fit.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> shapes = {"weight_ih_l0": (12, 3), "weight_hh_l0": (12, 4), "bias_ih_l0": 12, "bias_hh_l0": 12}
      >>> saved = {f"encoder.{name}": rng.standard_normal(shape) for name, shape in shapes.items()}
      >>> step, params, h0 = bptt.from_torch(saved, prefix="encoder.")
      >>> jax.tree.map(jnp.shape, params)
      GRUParams(recurrent=(12, 4), input=(12, 3), bias=(12,), recurrent_bias=(4,))
      >>> bptt.unroll(step, params, h0, jnp.ones((5, 3))).shape
      (5, 4)
    """
    if direction is not None:
        check_choice("direction", direction, "forward", "backward")
    if nonlinearity is not None:
        check_choice("nonlinearity", nonlinearity, "tanh", "relu")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a string, got {type_name(prefix)}")
    where, found = _find(module_or_state_dict, prefix)
    _check_whole(where, found)
    if None not in (nonlinearity, found.nonlinearity) and nonlinearity != found.nonlinearity:
        raise ValueError(f"nonlinearity: expected {found.nonlinearity!r}, as the module has, got {nonlinearity!r}")
    nonlinearity = nonlinearity or found.nonlinearity
    places = _places(where, found.weights, layer, direction)
    checked = [_check(where, place, found.weights[place], nonlinearity) for place in places]
    for place, below, above in zip(places[1:], checked, checked[1:], strict=False):
        outputs, inputs = below["weight_hh"].shape[1], above["weight_ih"].shape[1]
        if inputs != outputs:
            raise ValueError(
                f"module_or_state_dict: expected {counted(outputs, 'input')} in {where}weight_ih of layer "
                f"{place.layer}, as the layer below has outputs, got {inputs}"
            )
    return stacked([_layer(w, nonlinearity) for w in checked])


def recurrent_prefixes(names: Iterable[str]) -> list[str]:
    """Those under which a state dict has recurrent layers."""
    return list(_groups(dict.fromkeys(names)))


def shortened(names: Sequence[str]) -> str:
    """A list in a message."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def parametrised(names: Iterable[str]) -> str:
    """What to do about recurrent weights that are saved as what they are computed from; empty if there are none."""
    if any(map(_PARAMETRISED.search, names)):
        return (
            "; of weights that are parametrised give the module itself, or the state dict after "
            "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or prune.remove"
        )
    return ""


def _find(source: Any, prefix: str) -> tuple[str, _Recurrent]:
    """The one recurrent module at `prefix`, or below, and where it is."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.nn.Module):
        groups, names = _of_module(torch, source), [name or type_name(m) for name, m in source.named_modules()]
    elif isinstance(source, Mapping):
        groups, names = _groups(source), list(map(str, source))
        inner = [name for name, value in source.items() if isinstance(value, Mapping) and _groups(value)]
        if inner and not groups:
            raise ValueError(
                f"module_or_state_dict: expected a state dict, got a checkpoint that holds one, {', '.join(names)}; "
                f"give its entry, checkpoint[{inner[0]!r}]"
            )
    else:
        raise TypeError(
            f"module_or_state_dict: expected a torch.nn.Module or a state dict, got {type_name(source)}"
        )
    for exact in (prefix, f"{prefix}."):
        if exact in groups:
            return exact, groups[exact]
    for start in (f"{prefix}.", prefix):
        below = [name for name in groups if name.startswith(start)]
        if len(below) == 1:
            return below[0], groups[below[0]]
    if groups:
        raise ValueError(
            f"prefix: expected that of one recurrent layer, {' or '.join(map(repr, groups))}, got {prefix!r}"
        )
    raise ValueError(
        "module_or_state_dict: expected recurrent layers, with weights weight_ih_l0, weight_hh_l0, ... or, of cells, "
        f"weight_ih, weight_hh, got {shortened(names) or 'nothing'}{parametrised(names)}"
    )


def _groups(state: Mapping[str, Any]) -> dict[str, _Recurrent]:
    groups: dict[str, _Recurrent] = {}
    for name, value in state.items():
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match:
            where, what, layer, reverse = match.groups()
            place = _Place(int(layer or 0), bool(reverse))
            groups.setdefault(where, _Recurrent({})).weights.setdefault(place, {})[what] = value
    return {
        where: found._replace(beside=_beside(state, where))
        for where, found in groups.items()
        if all("weight_hh" in of_layer for of_layer in found.weights.values())
    }


def _beside(state: Mapping[str, Any], where: str) -> list[str]:
    """What else the module at `where` has, which no module of PyTorch's has.

    At the root other layers of a network may stand, of which those that a cell would have are told by their names, or
    as normalisations by their weights, which are vectors.
    """
    found = []
    for name, value in state.items():
        if not isinstance(name, str) or not name.startswith(where) or _NAME.fullmatch(name):
            continue
        child, dot, last = name.removeprefix(where).rpartition(".")
        normalises = last == "weight" and "." not in child and np.ndim(value) == 1
        of_cell = _PARAMETRISED.search(name) or (normalises if dot else last.startswith(("weight", "bias")))
        if where or of_cell:
            found.append(name)
    return found


def _of_module(torch: Any, module: Any) -> dict[str, _Recurrent]:
    """Weights as attributes, not by `state_dict`, so that those which are parametrised come as they are used."""
    nn, groups = torch.nn, {}
    for name, inner in module.named_modules():
        kind = next((k for k in (nn.RNN, nn.GRU, nn.LSTM) if isinstance(inner, k)), None)
        cell = next((k for k in (nn.RNNCell, nn.GRUCell, nn.LSTMCell) if isinstance(inner, k)), None)
        of = kind or cell
        if of is None:
            continue
        own = None if type(inner).forward is of.forward else (type(inner).__name__, of.__name__)
        _recompute(torch, inner)
        whats = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if inner.bias else [])]
        if cell is not None:
            weights = {_Place(0, False): {what: getattr(inner, what) for what in whats}}
        else:
            whats += ["weight_hr"] if inner.proj_size else []
            weights = {
                _Place(k, reverse): {
                    what: getattr(inner, f"{what}_l{k}{'_reverse' if reverse else ''}") for what in whats
                }
                for k, reverse in itertools.product(
                    range(inner.num_layers), (False, True)[: 1 + inner.bidirectional]
                )
            }
        nonlinearity = getattr(inner, "nonlinearity", None)
        groups[f"{name}." if name else ""] = _Recurrent(weights, nonlinearity=nonlinearity, own_forward=own)
    return groups


def _recompute(torch: Any, module: Any) -> None:
    """What weight_norm, spectral_norm and pruning make before each call: until then it is that of the last one."""
    training, module.training = module.training, False  # else spectral_norm would move its vectors
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                hook(module, ())
    module.training = training


def _check_whole(where: str, found: _Recurrent) -> None:
    """Whether it is one of PyTorch's modules, all of it: both biases in every layer, or none."""
    if found.own_forward is not None:
        name, base = found.own_forward
        raise ValueError(
            f"module_or_state_dict: expected the forward of nn.{base}, got {name}, which has one of its own"
        )
    if found.beside:
        raise ValueError(
            f"module_or_state_dict: expected weights and biases of nn.RNN, nn.GRU or nn.LSTM alone in "
            f"{where or 'the layer'}, got {shortened(found.beside)} beside them{parametrised(found.beside)}"
        )
    needed = {"weight_ih", "weight_hh"}.union(*found.weights.values())
    if needed & {"bias_ih", "bias_hh"}:
        needed |= {"bias_ih", "bias_hh"}
    for place, weights in sorted(found.weights.items()):
        for what in sorted(needed - weights.keys()):
            raise ValueError(f"module_or_state_dict: expected {where}{what} of layer {place.layer}, got none")


def _places(
    where: str, weights: Mapping[_Place, Any], layer: int | None, direction: Direction | None
) -> list[_Place]:
    layers, both = sorted({place.layer for place in weights}), any(place.reverse for place in weights)
    if layers != list(range(len(layers))) or len(weights) != len(layers) * (1 + both):
        found = ", ".join(f"{where}*_l{p.layer}{'_reverse' if p.reverse else ''}" for p in sorted(weights))
        raise ValueError(f"module_or_state_dict: expected the weights of all layers, from l0 upwards, got {found}")
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, (int, np.integer))):
        raise TypeError(f"layer: expected an integer, got {type_name(layer)}")
    if layer is not None and layer not in layers:
        raise ValueError(f"layer: expected one of 0 to {len(layers) - 1}, got {layer!r}")
    if both and direction is None:
        raise ValueError(
            "direction: expected one of a bidirectional layer, which is two recurrences: "
            'direction="forward", or direction="backward" for reversed sequences, got None'
        )
    if both and len(layers) > 1 and layer is None:
        raise ValueError(
            f"layer: expected one of 0 to {len(layers) - 1}, since of bidirectional layers each reads both directions "
            "of the one below, got None"
        )
    if not both and direction == "backward":
        raise ValueError('direction: expected "forward", since the layer is not bidirectional, got "backward"')
    reverse = direction == "backward"
    return [_Place(k, reverse) for k in layers if layer is None or k == layer]


def _check(
    where: str, place: _Place, weights: Mapping[str, Any], nonlinearity: Nonlinearity | None
) -> dict[str, Array]:
    """The weights of one layer, if they fit together and to the nonlinearity."""
    w = {what: as_array(f"{where}{what} of layer {place.layer}", value) for what, value in weights.items()}
    if len({a.dtype for a in w.values()}) > 1:
        given = ", ".join(f"{what} {a.dtype}" for what, a in w.items())
        raise TypeError(
            f"module_or_state_dict: expected weights of one dtype in {where or 'the layer'}, got {given}"
        )
    rows, width = (*w["weight_hh"].shape, 0)[:2]
    projection = w.get("weight_hr")
    n = width if projection is None else (*projection.shape, 0)[1]
    gates = rows // n if n else 0
    shapes = {
        "weight_hh": (gates * n, width),
        "weight_ih": (gates * n, *w["weight_ih"].shape[1:2]),
        "bias_ih": (gates * n,),
        "bias_hh": (gates * n,),
        "weight_hr": (width, n),
    }
    wrong = any(a.shape != shapes[what] or not a.size for what, a in w.items()) or w["weight_ih"].ndim != 2
    if wrong or gates not in ((1, 3, 4) if projection is None else (4,)):
        given = ", ".join(f"{what} {list(a.shape)}" for what, a in w.items())
        raise ValueError(
            "module_or_state_dict: expected recurrent weights [N, N] of the simple network, [3N, N] of a GRU or "
            f"[4N, N] of an LSTM, with the others to match, got {where or 'the layer'} with {given}"
        )
    if nonlinearity is not None and gates > 1:
        raise ValueError(f"nonlinearity: expected None, since only the simple network has it, got {nonlinearity!r}")
    return w


def _layer(w: dict[str, Array], nonlinearity: Nonlinearity | None) -> tuple[Step, Params, State]:
    (rows, width), dtype, projection = w["weight_hh"].shape, w["weight_hh"].dtype, w.get("weight_hr")
    n = width if projection is None else projection.shape[1]
    nothing = jnp.zeros(rows, dtype)
    inner, outer = w.get("bias_hh", nothing), w.get("bias_ih", nothing)
    if rows == 3 * n:
        r, z, new = jnp.split(inner, 3)
        bias = outer + jnp.concatenate([r, z, jnp.zeros_like(new)])
        return gru(n).step, GRUParams(w["weight_hh"], w["weight_ih"], bias, new), jnp.zeros(n, dtype)
    matrices = w["weight_hh"], w["weight_ih"], outer + inner
    if rows == n:
        step = rnn(n, activation=_ACTIVATIONS[nonlinearity or "tanh"]).step
        return step, RNNParams(*matrices), jnp.zeros(n, dtype)
    state0 = LSTMState(jnp.zeros(width, dtype), jnp.zeros(n, dtype))
    if projection is None:
        return lstm(n).step, LSTMParams(*matrices), state0
    return _projected_lstm_step, ProjectedLSTMParams(*matrices, projection), state0


def _projected_lstm_step(params: ProjectedLSTMParams, state: LSTMState, x: Array) -> LSTMState:
    i, f, g, o = jnp.split(times(params.recurrent, state.h) + times(params.input, x) + params.bias, 4)
    c = sigmoid(f) * state.c + sigmoid(i) * tanh(g)
    return LSTMState(times(params.projection, sigmoid(o) * tanh(c)), c)


def as_array(name: str, value: Any) -> Array:
    """A copy: memory that is shared with a tensor would change with it."""
    if hasattr(value, "detach"):
        if value.is_meta:
            raise ValueError(f"{name}: expected numbers, got a tensor on the device meta, which has none")
        value = value.detach().cpu()
        # NumPy has no bfloat16; every one of them is a float32.
        half = str(value.dtype) == "torch.bfloat16"
        try:
            value = value.float().numpy().astype(jnp.bfloat16) if half else value.numpy()
        except (RuntimeError, TypeError) as error:  # sparse, quantised, of a type that NumPy lacks, without storage
            why = " ".join(str(error).split()).removeprefix("Got ")
            raise TypeError(f"{name}: expected a tensor of which NumPy makes an array, got {why:.200}") from None
    check_leaves(name, value, keys=False)
    floating = isinstance(value, (np.ndarray, jax.Array)) and jnp.issubdtype(value.dtype, jnp.floating)
    if not floating or value.dtype.itemsize < 2:  # of 8 bits they are stored, with scales beside them
        got = getattr(value, "dtype", type_name(value))
        raise TypeError(f"{name}: expected an array of floating numbers, got {got}")
    return jnp.array(value, copy=True)
