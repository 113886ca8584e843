"""Weights of PyTorch: its own states where it is installed, and everywhere saved weights that need no torch."""

import importlib
import itertools
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.analysis import adjoints

try:
    import torch
except ModuleNotFoundError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="needs torch")

N, I, T, B = 4, 3, 6, 3
RNG = np.random.default_rng(0)
XS = RNG.standard_normal((T, I)).astype(np.float32)


def saved(
    gates: int, layers: int = 1, *, prefix: str = "", both: bool = False, bias: bool = True
) -> dict[str, Any]:
    """A state dict of arrays, as PyTorch lays it out."""
    state, rng = {}, np.random.default_rng(1)
    for k, suffix in itertools.product(range(layers), ("", "_reverse") if both else ("",)):
        width = I if k == 0 else N * (1 + both)
        shapes = {"weight_ih": (gates * N, width), "weight_hh": (gates * N, N)}
        shapes |= {"bias_ih": (gates * N,), "bias_hh": (gates * N,)} if bias else {}
        for what, shape in shapes.items():
            state[f"{prefix}{what}_l{k}{suffix}"] = 0.5 * rng.standard_normal(shape).astype(np.float32)
    return state


def sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def in_numpy(gates: int, w: dict[str, Any], xs: Any) -> Any:
    """The outputs by the equations of PyTorch's documentation, with both biases."""
    h = c = np.zeros(N)
    outputs = []
    for x in xs:
        of_x = np.split(w["weight_ih_l0"] @ x + w.get("bias_ih_l0", 0), gates)
        of_h = np.split(w["weight_hh_l0"] @ h + w.get("bias_hh_l0", 0), gates)
        if gates == 1:
            h = np.tanh(of_x[0] + of_h[0])
        elif gates == 3:
            r, z = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
            h = (1 - z) * np.tanh(of_x[2] + r * of_h[2]) + z * h
        else:
            i, f, g, o = (a + b for a, b in zip(of_x, of_h, strict=True))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


def top(states: Any) -> Any:
    """The output of the uppermost layer."""
    last = states[-1] if type(states) is tuple else states
    return last.h if hasattr(last, "h") else last


def outputs(made: Any, xs: Any) -> Any:
    step, params, state0 = made
    return np.asarray(top(bptt.unroll(step, params, state0, xs)))


# --- Saved weights, without PyTorch.


@pytest.mark.parametrize(("gates", "bias"), [(1, True), (3, True), (3, False), (4, True)])
def test_the_kind_is_told_by_the_shapes(gates: int, bias: bool) -> None:
    state = saved(gates, bias=bias)
    made = bptt.from_torch(state)
    np.testing.assert_allclose(outputs(made, XS), in_numpy(gates, state, XS), atol=2e-6)
    kinds = {1: bptt.cells.RNNParams, 3: bptt.cells.GRUParams, 4: bptt.cells.LSTMParams}
    assert type(made[1]) is kinds[gates]
    cells = {name.replace("_l0", ""): a for name, a in state.items()}
    for a, b in zip(jax.tree.leaves(made[1:]), jax.tree.leaves(bptt.from_torch(cells)[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_are_a_stack_and_one_of_them_is_a_layer() -> None:
    state = saved(4, layers=2)
    step, params, state0 = bptt.from_torch(state)
    assert (len(params), len(state0)) == (2, 2)
    assert step == bptt.from_torch(state)[0]  # what is compiled for one is found for the other
    lower = {name: a for name, a in state.items() if name.endswith("l0")}
    upper = {name.replace("l1", "l0"): a for name, a in state.items() if name.endswith("l1")}
    expected = in_numpy(4, upper, in_numpy(4, lower, XS))
    np.testing.assert_allclose(outputs((step, params, state0), XS), expected, atol=2e-6)
    alone = bptt.from_torch(state, layer=1)
    np.testing.assert_allclose(outputs(alone, in_numpy(4, lower, XS).astype(np.float32)), expected, atol=2e-6)


def test_a_model_by_prefix() -> None:
    state = saved(3, prefix="encoder.rnn.") | saved(4, prefix="decoder.") | {"out.weight": np.ones((2, N))}
    assert type(bptt.from_torch(state, prefix="encoder.rnn.")[1]) is bptt.cells.GRUParams
    assert type(bptt.from_torch(state, prefix="decoder")[1]) is bptt.cells.LSTMParams
    assert type(bptt.from_torch(state, prefix="enc")[1]) is bptt.cells.GRUParams  # there is one
    beside = state | saved(4, prefix="encoder2.rnn.")
    assert type(bptt.from_torch(beside, prefix="encoder")[1]) is bptt.cells.GRUParams
    del state["decoder.weight_hh_l0"]
    assert type(bptt.from_torch(state)[1]) is bptt.cells.GRUParams


def test_directions() -> None:
    state = saved(3, both=True)
    forward = {name: a for name, a in state.items() if "reverse" not in name}
    backward = {name.removesuffix("_reverse"): a for name, a in state.items() if "reverse" in name}
    for direction, alone in (("forward", forward), ("backward", backward)):
        made = bptt.from_torch(state, direction=direction)
        np.testing.assert_array_equal(outputs(made, XS), outputs(bptt.from_torch(alone), XS))
    upper = bptt.from_torch(saved(3, layers=2, both=True), direction="backward", layer=1)
    assert upper[1].input.shape == (3 * N, 2 * N)


def test_relu_only_where_it_is_said() -> None:
    state = saved(1)
    made = bptt.from_torch(state, nonlinearity="relu")
    pre = XS[0] @ state["weight_ih_l0"].T + state["bias_ih_l0"] + state["bias_hh_l0"]
    np.testing.assert_allclose(outputs(made, XS[:1])[0], np.maximum(pre, 0), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16, "float64"])
def test_dtypes(dtype: Any) -> None:
    """As they are, and double as JAX takes it."""
    state = {name: a.astype(dtype) for name, a in saved(4).items()}
    _, params, state0 = bptt.from_torch(state)
    expected = jnp.float32 if dtype == "float64" else dtype
    assert {a.dtype for a in jax.tree.leaves((params, state0))} == {jnp.dtype(expected)}


def test_what_is_given_is_copied() -> None:
    state = saved(4, bias=False)
    _, params, _ = bptt.from_torch(state)
    before = np.array(params.recurrent)
    state["weight_hh_l0"][:] = 7
    np.testing.assert_array_equal(params.recurrent, before)


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("source", "options", "kind", "message"),
    [
        (3, {}, TypeError, "module_or_state_dict: expected a torch.nn.Module or a state dict, got int"),
        ({}, {}, ValueError, "got nothing"),
        ({"conv.weight": np.ones(3), "conv.bias": np.ones(3)}, {}, ValueError, "got conv.weight, conv.bias"),
        ({f"w{k}": 0 for k in range(20)}, {}, ValueError, "w7 and 12 more"),
        (saved(3, prefix="a.") | saved(4, prefix="b."), {}, ValueError, "'a.' or 'b.', got ''"),
        (saved(3, prefix="a."), {"prefix": "c"}, ValueError, "prefix: expected that of one recurrent layer, 'a.'"),
        (saved(3, both=True), {}, ValueError, 'direction="forward"'),
        (saved(3, layers=2, both=True), {"direction": "forward"}, ValueError, "layer: expected one of 0 to 1"),
        (saved(3), {"direction": "backward"}, ValueError, "the layer is not bidirectional"),
        (saved(3), {"direction": "up"}, ValueError, "direction: expected 'forward' or 'backward', got 'up'"),
        (saved(3), {"layer": 1}, ValueError, "layer: expected one of 0 to 0, got 1"),
        (saved(3), {"layer": 0.0}, TypeError, "layer: expected an integer, got float"),
        (saved(3), {"nonlinearity": "relu"}, ValueError, "only the simple network has it"),
        (saved(3), {"prefix": None}, TypeError, "prefix: expected a string, got None"),
        (
            {"epoch": 3, "state_dict": saved(3)},
            {},
            ValueError,
            r"a checkpoint that holds one, epoch, state_dict; give",
        ),
        (saved(2), {}, ValueError, "with weight_ih [8, 3], weight_hh [8, 4]"),
        (without(saved(3), "weight_ih_l0"), {}, ValueError, "expected weight_ih of layer 0, got none"),
        (without(saved(3, layers=3), "weight_hh_l1"), {}, ValueError, "expected recurrent layers"),
        (
            {k: v for k, v in saved(3, layers=3).items() if "l1" not in k},
            {},
            ValueError,
            "of all layers, from l0 upwards, got *_l0, *_l2",
        ),
        (saved(3) | {"bias_ih_l0": np.ones(N, np.float32)}, {}, ValueError, "bias_ih [4]"),
        (saved(3) | {"weight_hh_l0": np.float32(3)}, {}, TypeError, "weight_hh of layer 0: expected an array"),
        (saved(3) | {"bias_ih_l0": np.ones(3 * N, np.float16)}, {}, TypeError, "bias_ih float16"),
        (without(saved(3), "bias_ih_l0"), {}, ValueError, "expected bias_ih of layer 0, got none"),
        (
            {k: v for k, v in saved(3, layers=2).items() if k not in ("bias_ih_l1", "bias_hh_l1")},
            {},
            ValueError,
            "expected bias_hh of layer 1, got none",
        ),
        (
            {k: v for k, v in saved(3, both=True).items() if not (k[0] == "b" and k.endswith("reverse"))},
            {"direction": "forward"},
            ValueError,
            "expected bias_hh of layer 0, got none",
        ),
        (
            {k: a.astype(jnp.float8_e4m3fn) for k, a in saved(3).items()},
            {},
            TypeError,
            "floating numbers, got float8_e4m3fn",
        ),
        (saved(3) | {"bias_ih_l0": np.ones(3 * N, np.int8)}, {}, TypeError, "floating numbers, got int8"),
        (saved(3) | {"bias_ih_l0": "zeros"}, {}, TypeError, "bias_ih of layer 0: expected an array of numbers"),
    ],
)
def test_refusals(source: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        bptt.from_torch(source, **options)


OTHER_CELLS: dict[str, dict[str, Any]] = {
    "of PyTorch's names with peepholes": saved(4) | {"weight_ph_l0": np.ones((3, N))},
    "of Equinox": {
        "weight_ih": np.ones((3 * N, I)),
        "weight_hh": np.ones((3 * N, N)),
        "bias": np.ones(3 * N),
        "bias_n": np.ones(N),
    },
    "layer-normalised": saved(4, bias=False) | {"layernorm_i.weight": np.ones(4 * N)},
    "with a projection inside": saved(4, prefix="cell.") | {"cell.project.weight": np.ones((N, N))},
    "with a learned state": saved(3, prefix="cell.") | {"cell.h0": np.ones(N)},
    "pruned": without(saved(3), "bias_hh_l0")
    | {"bias_hh_l0_orig": np.ones(3 * N), "bias_hh_l0_mask": np.ones(3 * N)},
    "parametrised": without(saved(3), "weight_ih_l0")
    | {"parametrizations.weight_ih_l0.original0": np.ones((3 * N, 1))},
}


@pytest.mark.parametrize("name", OTHER_CELLS)
def test_cells_that_have_more_are_other_cells(name: str) -> None:
    """What would be left out is named, and a model in which they stand beside one of PyTorch's is read."""
    state = OTHER_CELLS[name]
    others = [key for key in state if not re.search(r"(weight|bias)_[ih]h(_l0)?$", key)]
    with pytest.raises(ValueError, match=r"alone in .*, got .* beside them") as raised:
        bptt.from_torch(state)
    assert all(other in str(raised.value) for other in others)
    assert ("remove_parametrizations" in str(raised.value)) == (name in ("pruned", "parametrised"))
    model = {f"first.{key}": a for key, a in state.items()} | saved(3, prefix="second.")
    assert type(bptt.from_torch(model, prefix="second.")[1]) is bptt.cells.GRUParams


def test_torch_is_not_imported() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; import numpy as np; import bptt_jax as bptt;"
        "print(bptt.from_torch({'weight_ih': np.ones((3, 2)), 'weight_hh': np.ones((3, 1))})[1].bias.shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.stdout == "(3,)\n", done.stderr


# --- PyTorch's own modules.


def trained(module: Any, updates: int = 3) -> Any:
    """After a few updates, so that no weight is as it was drawn and biases differ."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.3)
    xs = torch.randn(T, B, I)
    for _ in range(updates):
        optimizer.zero_grad()
        (module(xs)[0] ** 2 - module(xs)[0]).sum().backward()
        optimizer.step()
    return module


def modules() -> dict[str, Any]:
    if torch is None:
        return dict.fromkeys(["none"])
    nn = torch.nn
    return {
        "rnn": lambda: nn.RNN(I, N),
        "rnn relu, 2 layers": lambda: nn.RNN(I, N, 2, nonlinearity="relu"),
        "gru": lambda: nn.GRU(I, N),
        "gru, 3 layers, no bias": lambda: nn.GRU(I, N, 3, bias=False),
        "lstm": lambda: nn.LSTM(I, N),
        "lstm, 2 layers, dropout": lambda: nn.LSTM(I, N, 2, dropout=0.5).train(),
        "lstm, projected": lambda: nn.LSTM(I, N, proj_size=2),
        "lstm, projected, 2 layers": lambda: nn.LSTM(I, N, 2, proj_size=2),
    }


@needs_torch
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", modules())
def test_states_of_trained_modules(name: str) -> None:
    torch.manual_seed(0)
    module = trained(modules()[name]())
    with torch.no_grad():
        theirs = module.eval()(torch.from_numpy(XS))[0].numpy()
    ours = bptt.from_torch(module)
    np.testing.assert_allclose(outputs(ours, XS), theirs, atol=2e-6)
    options = {"nonlinearity": "relu"} if "relu" in name else {}
    model = torch.nn.ModuleDict({"encoder": module, "out": torch.nn.Linear(N, 2)})
    for again in (
        bptt.from_torch(module.state_dict(), **options),
        bptt.from_torch(model.state_dict(), prefix="encoder.", **options),
        bptt.from_torch(model),
    ):
        assert again[0] == ours[0]
        for a, b in zip(jax.tree.leaves(again[1:]), jax.tree.leaves(ours[1:]), strict=True):
            np.testing.assert_array_equal(a, b)


@needs_torch
@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(kind: str) -> None:
    torch.manual_seed(0)
    cell = getattr(torch.nn, kind)(I, N)
    h, theirs = None, []
    with torch.no_grad():
        for x in torch.from_numpy(XS):
            h = cell(x, h)
            theirs.append((h[0] if kind == "LSTMCell" else h).numpy())
    np.testing.assert_allclose(outputs(bptt.from_torch(cell), XS), np.stack(theirs), atol=2e-6)
    np.testing.assert_allclose(outputs(bptt.from_torch(cell.state_dict()), XS), np.stack(theirs), atol=2e-6)


@needs_torch
def test_both_directions_of_two_layers() -> None:
    torch.manual_seed(0)
    module = torch.nn.LSTM(I, N, 2, bidirectional=True)
    with torch.no_grad():
        theirs = module(torch.from_numpy(XS))[0].numpy()
    xs = XS
    for layer in range(2):
        forward = outputs(bptt.from_torch(module, layer=layer, direction="forward"), xs)
        backward = outputs(bptt.from_torch(module, layer=layer, direction="backward"), xs[::-1])[::-1]
        xs = np.concatenate([forward, backward], axis=1)
    np.testing.assert_allclose(xs, theirs, atol=2e-6)


@needs_torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_of_modules(dtype: str, request: pytest.FixtureRequest) -> None:
    if dtype == "float64":
        request.getfixturevalue("x64")
    torch.manual_seed(0)
    module = torch.nn.GRU(I, N).to(getattr(torch, dtype))
    _, params, state0 = bptt.from_torch(module)
    assert {str(a.dtype) for a in jax.tree.leaves((params, state0))} == {dtype}
    theirs = module.weight_hh_l0.detach().double().numpy()
    np.testing.assert_array_equal(np.asarray(params.recurrent, np.float64), theirs)


@needs_torch
def test_parametrised_weights_as_they_are_used() -> None:
    torch.manual_seed(0)
    module = torch.nn.RNN(I, N)
    torch.nn.utils.parametrizations.orthogonal(module, "weight_hh_l0")
    _, params, _ = bptt.from_torch(module)
    np.testing.assert_allclose(params.recurrent @ params.recurrent.T, np.eye(N), atol=1e-5)
    with pytest.raises(ValueError, match=r"parametrizations\.weight_hh_l0\.original"):
        bptt.from_torch(module.state_dict())


@needs_torch
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.(weight_norm|parametrizations.weight_norm):FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "pruning"])
def test_weights_that_are_made_before_each_call(how: str) -> None:
    """Those of the next call, not of the last one: an update is seen, and in training nothing moves."""
    utils = torch.nn.utils
    torch.manual_seed(0)
    module = torch.nn.GRU(I, N)
    if how == "pruning":
        importlib.import_module("torch.nn.utils.prune").l1_unstructured(module, "weight_hh_l0", 0.5)
    else:
        getattr(utils, how)(module, "weight_hh_l0")
    with torch.no_grad():
        getattr(module, "weight_hh_l0_g" if how == "weight_norm" else "weight_hh_l0_orig").mul_(3)
    buffers = [a.clone() for a in module.buffers()]
    ours = outputs(bptt.from_torch(module.train()), XS)
    assert module.training
    assert all(map(torch.equal, buffers, module.buffers()))
    with torch.no_grad():
        theirs = module.eval()(torch.from_numpy(XS))[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@needs_torch
def test_packed_batches_have_the_gradients_of_padded_sequences() -> None:
    """Of a loss on every sequence's own last state, with respect to the weights, the inputs and every state."""
    torch.manual_seed(0)
    module = trained(torch.nn.LSTM(I, N))
    lengths = [T, 2, 4]
    xs = torch.randn(T, B, I)
    packed = torch.nn.utils.rnn.pack_padded_sequence(xs, lengths, enforce_sorted=False)
    xs_grad = packed.data.requires_grad_()
    output, (h, _) = module(packed)
    output.data.retain_grad()
    readout = torch.arange(1.0, N + 1)
    module.zero_grad()
    (h[0] @ readout).square().sum().backward()

    step, params, state0 = bptt.from_torch(module)

    def loss(states: Any) -> Any:
        return jnp.square(jnp.dot(states.h[-1], readout.numpy()))

    found = [
        adjoints(
            step,
            params,
            state0,
            bptt.Sequence(jnp.asarray(xs[:, b].detach().numpy()), mask=np.arange(T) < length),
            loss,
            inputs=True,
        )
        for b, length in enumerate(lengths)
    ]
    total = jax.tree.map(lambda *a: np.sum(a, axis=0), *(each.params_grad for each in found))
    for ours, theirs in (
        (total.recurrent, module.weight_hh_l0),
        (total.input, module.weight_ih_l0),
        (total.bias, module.bias_ih_l0),
        (total.bias, module.bias_hh_l0),
    ):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=2e-5, atol=2e-5)
    their_inputs = torch.nn.utils.rnn.pad_packed_sequence(packed._replace(data=xs_grad.grad), total_length=T)[0]
    for b, each in enumerate(found):
        np.testing.assert_allclose(each.xs_grad, their_inputs[:, b].numpy(), rtol=2e-5, atol=2e-5)


@needs_torch
def test_modules_that_are_refused() -> None:
    class Own(torch.nn.GRU):
        def forward(self, *arguments: Any) -> Any:
            return super().forward(*arguments)

    with pytest.raises(ValueError, match=r"expected the forward of nn\.GRU, got Own"):
        bptt.from_torch(Own(I, N))
    model = torch.nn.ModuleDict({"own": Own(I, N), "other": torch.nn.LSTM(I, N)})
    assert type(bptt.from_torch(model, prefix="other")[1]) is bptt.cells.LSTMParams
    with pytest.raises(ValueError, match=r"expected the forward of nn\.GRU, got Own"):
        bptt.from_torch(model, prefix="own")
    with pytest.raises(ValueError, match="nonlinearity: expected 'relu', as the module has, got 'tanh'"):
        bptt.from_torch(torch.nn.RNN(I, N, nonlinearity="relu"), nonlinearity="tanh")
    with pytest.raises(ValueError, match="got Linear"):
        bptt.from_torch(torch.nn.Linear(I, N))
    with pytest.raises(ValueError, match="on the device meta"):
        bptt.from_torch(torch.nn.GRU(I, N, device="meta"))


def test_layers_that_do_not_fit_together() -> None:
    state = saved(3, layers=2)
    state["weight_ih_l1"] = np.ones((3 * N, N + 1), np.float32)
    with pytest.raises(
        ValueError, match=f"expected {N} inputs in weight_ih of layer 1, .* has outputs, got {N + 1}"
    ):
        bptt.from_torch(state)


@pytest.mark.parametrize("name", ["parametrizations.weight_hh_l0.original0", "weight_hh_l0_orig", "weight_hh_l0_g"])
def test_parametrised_weights_are_told(name: str) -> None:
    """By weight_norm and its like, and by pruning."""
    state = {name if key == "weight_hh_l0" else key: a for key, a in saved(3).items()}
    with pytest.raises(ValueError, match=r"give the module itself, or .* after torch\.nn\.utils\.parametrize"):
        bptt.from_torch(state)


@needs_torch
def test_tensors_of_which_numpy_makes_no_array() -> None:
    state = torch.nn.GRU(I, N).state_dict()
    for odd in (torch.Tensor.to_sparse, lambda a: a.to(torch.float8_e4m3fn), torch._neg_view):
        with pytest.raises(
            TypeError, match="weight_hh of layer 0: expected a tensor of which NumPy makes an array"
        ):
            bptt.from_torch(state | {"weight_hh_l0": odd(state["weight_hh_l0"])})
