"""Cells of torchrecurrent, with their weights, against its own states, where it is installed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.cells.torchrecurrent_weights import _REFUSED, _TABLE

try:
    import torch
    import torchrecurrent
except ModuleNotFoundError:
    torch = None
needs_torchrecurrent = pytest.mark.skipif(torch is None, reason="needs torchrecurrent")

N, I, T = 4, 3, 5
# Whose second bias stands apart from the first, so that ours, which has one, cannot be the same cell.
APART = {
    "ATRCell",
    "BRCell",
    "CFNCell",
    "DSGUCell",
    "LightRUCell",
    "MUT1Cell",
    "MultiplicativeLSTMCell",
    "NBRCell",
    "SGUCell",
    "WMCLSTMCell",
}
# Cells that are called otherwise than with their state alone, as their layers call them.
LAYERS = {name: name.removesuffix("Cell") for name in ("IntersectionRNNCell", "JANETCell", "tauGRUCell")}


def module_of(name: str, *, biases: str) -> Any:
    """With weights at random, and with biases at random whose name holds `biases`."""
    torch.manual_seed(0)
    options = {
        "FastGRNNCell": {"nonlinearity": "sigmoid"},
        "MiRU2Cell": {"update_coefficient": 0.7, "reset_coefficient": 0.6},
        "tauGRUCell": {"delay": 3},
    }.get(name, {})
    inputs = N if name == "IntersectionRNNCell" else I
    module = getattr(torchrecurrent, LAYERS.get(name, name))(inputs, N, **options)
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if biases in parameter_name and parameter.ndim == 1 and "bias" in parameter_name:
                parameter.normal_()
    return module


def leaves_of(states: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(states)]


@needs_torchrecurrent
@pytest.mark.parametrize("name", _TABLE)
def test_states(name: str) -> None:
    module = module_of(name, biases="none" if name in APART else "bias")
    step, params, state0 = bptt.from_torchrecurrent(module)
    inputs = N if name == "IntersectionRNNCell" else I
    xs = np.random.default_rng(0).standard_normal((T, inputs)).astype(np.float32)
    ours = leaves_of(bptt.unroll(step, params, state0, xs))
    if name in LAYERS:
        with torch.no_grad():
            theirs = module(torch.from_numpy(xs)[:, None])[0][:, 0].numpy()
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-5, atol=3e-6)
        return
    h: Any = None
    theirs = []
    with torch.no_grad():
        for x in torch.from_numpy(xs):
            h = module(x) if h is None else module(x, h)
            theirs.append([a.numpy() for a in (h if isinstance(h, tuple) else (h,))])
    for a, b in zip(ours, map(np.stack, zip(*theirs, strict=True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)


@needs_torchrecurrent
def test_what_differs_is_refused() -> None:
    for name in APART:
        with pytest.raises(ValueError, match=f"got a {name} that differs from it"):
            bptt.from_torchrecurrent(module_of(name, biases="bias"))
    with pytest.raises(ValueError, match="got a MGUCell that differs"):
        bptt.from_torchrecurrent(torchrecurrent.MGUCell(I, N, nonlinearity="relu"))
    for bounded in (torch.nn.ReLU6(), torch.nn.Hardtanh(0, 8)):  # as ReLU where the state is small
        with pytest.raises(ValueError, match="got a LiGRUCell that differs"):
            bptt.from_torchrecurrent(torchrecurrent.LiGRUCell(I, N, nonlinearity=bounded))
    with pytest.raises(ValueError, match="got a JANETCell that differs"):
        bptt.from_torchrecurrent(torchrecurrent.JANETCell(I, N, beta=0.5))
    with pytest.raises(ValueError, match="the layers, tauGRU, which know the delay"):
        bptt.from_torchrecurrent(torchrecurrent.tauGRUCell(I, N))


@needs_torchrecurrent
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    """What differs is refused as in single precision, and what does not is taken, weights as they are."""
    for name in ("ATRCell", "BRCell", "MGUCell", "tauGRUCell"):
        module = module_of(name, biases="none" if name in APART else "bias").to(getattr(torch, dtype))
        _, params, state0 = bptt.from_torchrecurrent(module)
        assert {str(a.dtype) for a in jax.tree.leaves((params, state0))} == {dtype}
    for name in ("ATRCell", "BRCell"):
        with pytest.raises(ValueError, match=f"got a {name} that differs from it"):
            bptt.from_torchrecurrent(module_of(name, biases="bias").to(getattr(torch, dtype)))
    with pytest.raises(ValueError, match="the layers, tauGRU, which know the delay"):
        bptt.from_torchrecurrent(torchrecurrent.tauGRUCell(I, N).to(getattr(torch, dtype)))


@needs_torchrecurrent
def test_several_recurrences_are_no_layers_of_one() -> None:
    encoder, decoder = torchrecurrent.MGU(I, N, num_layers=2), torchrecurrent.MGUCell(N, N)
    alone = torch.nn.ModuleDict({"encoder": encoder, "out": torch.nn.Linear(N, 2)})
    assert len(bptt.from_torchrecurrent(alone)[1]) == 2
    with pytest.raises(ValueError, match=r"expected one .* got MGU at '0', MGUCell at '2'; give one of them"):
        bptt.from_torchrecurrent(torch.nn.Sequential(encoder, torch.nn.Linear(N, N), decoder))


@needs_torchrecurrent
def test_every_cell_of_theirs_is_taken_or_refused_by_name() -> None:
    cells = {name for name in torchrecurrent.__all__ if name.endswith("Cell")}
    assert set(_TABLE) | set(_REFUSED) == cells
    assert not set(_TABLE) & set(_REFUSED)
    for name, why in _REFUSED.items():
        with pytest.raises(ValueError, match=rf"expected one of ATRCell, .*, got {name}, wh.*") as raised:
            bptt.from_torchrecurrent(getattr(torchrecurrent, name)(I, N))
        assert why in str(raised.value)


@needs_torchrecurrent
def test_what_else_is_no_cell_of_theirs() -> None:
    with pytest.raises(TypeError, match="got Linear"):
        bptt.from_torchrecurrent(torch.nn.Linear(I, N))


@needs_torchrecurrent
def test_layers() -> None:
    torch.manual_seed(0)
    module = torchrecurrent.OriginalLSTM(I, N, num_layers=2)
    xs = np.random.default_rng(0).standard_normal((T, 1, I)).astype(np.float32)
    with torch.no_grad():
        theirs = module(torch.from_numpy(xs))[0][:, 0].numpy()
    step, params, state0 = bptt.from_torchrecurrent(module)
    states = bptt.unroll(step, params, state0, jnp.asarray(xs[:, 0]))
    np.testing.assert_allclose(states[-1].h, theirs, atol=3e-6)


@pytest.mark.parametrize("given", [None, 3, {"weight_hh": np.ones((4, 4))}])
def test_what_is_no_module(given: Any) -> None:
    with pytest.raises(TypeError, match="module: expected a cell of torchrecurrent, got"):
        bptt.from_torchrecurrent(given)
