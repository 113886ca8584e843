"""How the weights of cells begin: by the numbers that their docstrings say, and as those of their authors."""

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from slices import covering

import bptt_jax as bptt

N, I, BACKBONE = 64, 48, 128
Check = Callable[[np.ndarray], None]


def uniform(low: float, high: float) -> Check:
    """Within its bounds, spread evenly, and up to them."""

    def check(a: np.ndarray) -> None:
        room = high - low
        assert low <= a.min() < low + 0.1 * room
        assert high - 0.1 * room < a.max() <= high
        np.testing.assert_allclose(a.std(), room / math.sqrt(12), rtol=2 / math.sqrt(a.size))

    return check


def within(bound: float) -> Check:
    return uniform(-bound, bound)


def normal(std: float) -> Check:
    def check(a: np.ndarray) -> None:
        np.testing.assert_allclose(a.std(), std, rtol=4 / math.sqrt(2 * a.size))
        np.testing.assert_allclose(np.mean(np.abs(a)), std * math.sqrt(2 / math.pi), rtol=4 / math.sqrt(2 * a.size))
        assert abs(a.mean()) < 4 * std / math.sqrt(a.size)

    return check


def truncated(std: float) -> Check:
    """Normal within two of its standard deviations, of which cutting leaves 0.8796."""

    def check(a: np.ndarray) -> None:
        np.testing.assert_allclose(a.std(), std, rtol=4 / math.sqrt(2 * a.size))
        bound = 2 * std / 0.8796
        assert 0.9 * bound < np.max(np.abs(a)) < 1.0001 * bound

    return check


def constant(value: float) -> Check:
    return lambda a: np.testing.assert_array_equal(a, np.float32(value))


def orthogonal(a: np.ndarray) -> None:
    """Each gate by itself."""
    for gate in np.split(a, a.shape[0] // a.shape[1]):
        np.testing.assert_allclose(gate @ gate.T, np.eye(len(gate)), atol=1e-5)


def without_diagonal(check: Check) -> Check:
    def off(a: np.ndarray) -> None:
        assert not np.diag(a).any()
        check(a[~np.eye(len(a), dtype=bool)])

    return off


def tenth_orthonormal(a: np.ndarray) -> None:
    columns = a.reshape(-1, a.shape[-1])
    np.testing.assert_allclose(columns.T @ columns, 0.01 * np.eye(a.shape[-1]), atol=1e-7)


def glorot(outputs: int, inputs: int, gain: float = 1.0) -> Check:
    return within(gain * math.sqrt(6 / (outputs + inputs)))


def unit_rows(a: np.ndarray) -> None:
    """From the diagonal on, uniform on the sphere: of length 1, n entries of mean 4th power 3 / (n (n + 2))."""
    assert not np.tril(a, -1).any()
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, rtol=1e-6)
    sizes = a.shape[1] - np.arange(len(a))
    np.testing.assert_allclose(np.mean(np.sum(a**4, axis=1) * (sizes + 2) / 3), 1, atol=0.2)


def numbers(*expected: float) -> Check:
    return lambda a: np.testing.assert_allclose(a.ravel(), expected, rtol=1e-5, atol=1e-5)


def each(*checks: Check) -> Check:
    """Of as many blocks, one after the other."""

    def check(a: np.ndarray) -> None:
        for block, of_block in zip(np.split(a, len(checks)), checks, strict=True):
            of_block(block)

    return check


FAN_IN, ZERO = normal(1 / math.sqrt(I)), constant(0)
_ZIGZAG = [(j - 3.5) / 3.5 * abs(j - 3.5) / 3.5 for j in range(8)]
OF_LINEAR = within(1 / math.sqrt(I))  # of PyTorch
OF_UNITS = normal(1 / math.sqrt(N))
STATED: dict[str, dict[str, Check]] = {
    "indrnn": {"recurrent": uniform(0, 1), "input": FAN_IN, "bias": ZERO},
    # facebookarchive/SCRNNs: initSCRNN, normal of 0.05 whatever the size
    "scrn": dict.fromkeys(("recurrent", "from_context", "input", "to_context"), normal(0.05)),
    "minimal_rnn": {
        "recurrent": orthogonal,
        "latent": orthogonal,
        "input": FAN_IN,
        "bias": ZERO,
        "input_bias": ZERO,
    },
    "antisymmetric": {"recurrent": OF_UNITS, "input": FAN_IN, "bias": ZERO},
    "gated_antisymmetric": {"recurrent": OF_UNITS, "input": FAN_IN, "bias": ZERO},
    # erichson/LipschitzRNN: normal of --init_std 0.1 over n_units; its encoder is a linear layer of PyTorch
    "lipschitz": {"linear": normal(0.1 / N), "recurrent": normal(0.1 / N), "input": OF_LINEAR, "bias": OF_LINEAR},
    "fastrnn": {"recurrent": normal(0.1), "input": normal(0.1), "bias": constant(1)},
    "fastgrnn": {
        "recurrent": normal(0.1),
        "input": normal(0.1),
        "bias": constant(1),
        "zeta": constant(1),
        "nu": constant(-4),
    },
    "unitary": {
        "phases": within(math.pi),
        "reflections_re": within(1),
        "reflections_im": within(1),
        "input_re": within(math.sqrt(6 / (N + I))),
        "input_im": within(math.sqrt(6 / (N + I))),
        "bias": ZERO,
    },
    # tk-rusch/coRNN (IMDB), /unicornn and /LEM
    "cornn": {"recurrent": within(1 / math.sqrt(2 * N)), "input": OF_LINEAR, "bias": OF_LINEAR},
    "unicornn": {
        "recurrent": uniform(0, 1),
        "input": within(math.sqrt(6 / (65 * I))),
        "bias": ZERO,
        "control": within(0.1),
    },
    "lem": dict.fromkeys(("recurrent", "input", "bias", "memory"), within(1 / math.sqrt(N))),
    "cfc": {
        "recurrent": glorot(BACKBONE, N + I),
        "input": glorot(BACKBONE, N + I),
        "bias": within(1 / math.sqrt(N + I)),
        "heads": glorot(N, BACKBONE),
        "heads_bias": within(1 / math.sqrt(BACKBONE)),
    },
    "tau_gru": dict.fromkeys(("recurrent", "delayed", "input", "bias"), within(1 / math.sqrt(N))),
    "original_lstm": {"recurrent": within(0.1), "input": within(0.1), "bias": ZERO},
    # benkrause/mLSTM, in Chainer and in MATLAB: 3 for the biases of the forget gate
    "multiplicative_lstm": {
        "recurrent": orthogonal,
        "state_factor": orthogonal,
        "input": FAN_IN,
        "input_factor": FAN_IN,
        "bias": each(ZERO, constant(3), ZERO, ZERO),
    },
    # gaoyuankidult/einstein: glorot_normal of square matrices, and uniform, which in the Keras of then is within 0.05
    "sgu": {"recurrent": OF_UNITS, "input": within(0.05), "bias": ZERO},
    "dsgu": {"recurrent": OF_UNITS, "input": within(0.05), "bias": ZERO},
    # jzilly/RecurrentHighwayNetworks: init_scale 0.04, also of the biases of h; init_bias -2
    "rhn": {
        "recurrent": within(0.04),
        "input": within(0.04),
        "bias": lambda a: each(within(0.04), constant(-2))(np.concatenate(np.split(a, 2, axis=1))),
    },
    # nvecoven/BRC: glorot_uniform, zeros, and constant(1.0) for the memories of brc
    "brc": {"recurrent": constant(1), "input": glorot(N, I), "bias": ZERO},
    "nbrc": {"recurrent": glorot(N, N), "input": glorot(N, I), "bias": ZERO},
    "li_gru": {"recurrent": orthogonal, "input": glorot(N, I), "bias": ZERO},
    # asappresearch/sru, but uniform: half the variance for the gate
    "sru": {
        "input": each(normal(1 / math.sqrt(2 * I)), FAN_IN),
        "recurrent": within(math.sqrt(1.5)),
        "bias": ZERO,
    },
    "qrnn": {"past": normal(1 / math.sqrt(2 * I)), "input": normal(1 / math.sqrt(2 * I)), "bias": ZERO},
    # Doraemonzzz/hgru-pytorch: theta of 10000 ** (-2 / embed_dim * arange(embed_dim))
    "hgrn": {
        "input": FAN_IN,
        "bias": ZERO,
        "bound": ZERO,
        "theta": lambda a: np.testing.assert_allclose(a, [10000 ** (-2 * k / N) for k in range(N)], rtol=1e-4),
    },
    "min_gru": {"input": FAN_IN, "bias": ZERO},
    "min_lstm": {"input": FAN_IN, "bias": ZERO},
    # google-deepmind/recurrentgemma: variance_scaling(1, "fan_in", "normal"), zeros
    "rg_lru": {"input": FAN_IN, "gates": OF_UNITS, "bias": ZERO},
    # zmhammedi/Orthogonal_RNN: normal columns scaled to length 1, W by Glorot and Bengio, bh of zeros
    "householder": {"reflections": unit_rows, "input": glorot(N, I), "bias": ZERO},
    # Lukosevicius 2012: uniform on [-a, a]
    "echo_state": {"input": within(1), "bias": within(1)},
    # The LMU of 2019, as nvecoven/BRC has it: lecun_uniform, constant(0), glorot_normal
    "lmu": {
        "encode_input": within(math.sqrt(3 / I)),
        "encode_hidden": within(math.sqrt(3 / N)),
        "encode_memory": ZERO,
        "input": truncated(math.sqrt(2 / (N + I))),
        "recurrent": truncated(math.sqrt(1 / N)),
        "memory": truncated(math.sqrt(2 / (N + 8))),
    },
    # microsoft/torchscale: xavier_uniform_ with gain=2 ** -2.5
    "retnet": {"key": glorot(16, I, 2**-2.5), "value": glorot(N, I, 2**-2.5)},
    # berlino/gated_linear_attention: likewise, of the gate's two layers too
    "gla": {
        "key": glorot(16, I, 2**-2.5),
        "value": glorot(N, I, 2**-2.5),
        "gate_down": glorot(16, I, 2**-2.5),
        "gate_up": glorot(16, 16, 2**-2.5),
        "gate_bias": ZERO,
    },
    # BlinkDL/RWKV-LM: time_decay of -6 + 5 * (n / (dim_att - 1)) ** 0.7 in layer 0, time_decay_w2 within 0.01
    "rwkv6": {
        "decay": numbers(*(-6 + 5 * (n / 15) ** 0.7 for n in range(16))),
        "decay_in": ZERO,
        "decay_out": within(0.01),
    },
    # And w0, a0, k_k and k_a of RWKV-v7, layer 0, with heads of 8
    "rwkv7": {
        "decay": numbers(*(-5.5 + 6 * n / 15 + 2.5 * _ZIGZAG[n % 8] for n in range(16))),
        "decay_in": ZERO,
        "decay_out": tenth_orthonormal,
        "rate": numbers(*(-0.19 + 0.3 * _ZIGZAG[n % 8] + 0.4 * (n / 15 - 0.5) for n in range(16))),
        "rate_in": ZERO,
        "rate_out": tenth_orthonormal,
        "removal": numbers(*(0.71 - 0.1 * (n / 15 - 0.5) for n in range(16))),
        "replacement": constant(1.02),
    },
    # NX-AI/xlstm: small_init_init_, zeros, and the power law of block 0
    "mlstm": {
        "key": normal(math.sqrt(2 / (5 * I))),
        "value": normal(math.sqrt(2 / (5 * I))),
        "gates": ZERO,
    },
    "slstm": {
        "recurrent": ZERO,
        "input": normal(math.sqrt(2 / (5 * I))),
        "bias": each(
            ZERO,
            numbers(*(5 - 12 * (j / (N - 1)) ** 0.3 for j in range(N))),
            ZERO,
            ZERO,
        ),
    },
    "linear_transformer": {"key": FAN_IN, "value": FAN_IN},
    "deltanet": {"key": FAN_IN, "value": FAN_IN, "rate": FAN_IN},
    "hgrn2": {"forget": FAN_IN, "value": FAN_IN},
    "lif": {"recurrent": without_diagonal(OF_UNITS), "input": FAN_IN, "bias": ZERO},
    "alif": {"recurrent": without_diagonal(OF_UNITS), "input": FAN_IN, "bias": ZERO},
}


@pytest.mark.parametrize(
    "name",
    covering(
        list(STATED),
        *("fastrnn", "lipschitz", "lif", "retnet", "deltanet", "rhn", "brc", "householder"),
        *("scrn", "multiplicative_lstm", "sgu", "rwkv7"),
    ),
)
def test_as_stated(name: str) -> None:
    options = {"backbone_units": BACKBONE} if name == "cfc" else {}
    params = bptt.cells.ATLAS[name].make(N, **options).init(jax.random.key(0), I)
    for field, check in STATED[name].items():
        check(np.asarray(getattr(params, field), np.float64))


def of_ncps() -> dict[str, np.ndarray]:
    from ncps.torch import CfCCell

    cell = CfCCell(I, N, backbone_units=BACKBONE)
    heads = [getattr(cell, name) for name in ("ff1", "ff2", "time_a", "time_b")]
    return {
        "input": cell.backbone[0].weight[:, :I],
        "recurrent": cell.backbone[0].weight[:, I:],
        "bias": cell.backbone[0].bias,
        "heads": np.stack([head.weight.detach() for head in heads]),
        "heads_bias": np.stack([head.bias.detach() for head in heads]),
    }


def of_edgeml(name: str) -> dict[str, np.ndarray]:
    sys.modules.setdefault("fastgrnn_cuda", ModuleType("fastgrnn_cuda"))  # its kernel for GPUs is not needed
    from edgeml_pytorch.graph import rnn

    cell = getattr(rnn, name)(I, N)
    if name == "FastRNNCell":
        biases = {"bias": cell.bias_update, "alpha": cell.alpha, "beta": cell.beta}
    else:
        biases = {
            "bias": np.stack([cell.bias_gate.detach(), cell.bias_update.detach()]),
            "zeta": cell.zeta,
            "nu": cell.nu,
        }
    return {"input": cell.W, "recurrent": cell.U, **biases}


PEERS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "cfc": ("ncps", of_ncps),
    "fastrnn": ("edgeml_pytorch", lambda: of_edgeml("FastRNNCell")),
    "fastgrnn": ("edgeml_pytorch", lambda: of_edgeml("FastGRNNCell")),
}


def test_gates_of_mlstm_begin_as_released():
    """NX-AI/xlstm: forget biases by bias_linspace_init_ from 3 to 6, input biases normal of std 0.1."""
    admit, keep = np.asarray(bptt.cells.mlstm(1000, heads=1000).init(jax.random.key(0), 1).bias, np.float64)
    normal(0.1)(admit)
    np.testing.assert_allclose(keep, np.linspace(3, 6, 1000), rtol=1e-5)


@pytest.mark.parametrize("name", PEERS)
def test_as_those_who_published_it(name: str) -> None:
    """The same checks, of their weights: what they say is what the others do."""
    library, weights = PEERS[name]
    torch = pytest.importorskip("torch")
    pytest.importorskip(library)
    torch.manual_seed(0)
    theirs = {
        field: np.asarray(getattr(a, "detach", lambda a=a: a)(), np.float64) for field, a in weights().items()
    }
    ours = bptt.cells.ATLAS[name].make(N).init(jax.random.key(0), I)
    for field, a in theirs.items():
        if field in STATED[name]:
            STATED[name][field](a)
        else:
            np.testing.assert_allclose(a.ravel(), np.ravel(getattr(ours, field)))


@pytest.mark.parametrize("name", covering(bptt.cells.ATLAS, "gated_deltanet", "echo_state"))
def test_in_single_precision_cells_begin_alike_in_whatever_mode_jax_is(name: str) -> None:
    cell = bptt.cells.ATLAS[name].make(16, dtype=np.float32)
    begun = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            begun.append(cell.init(jax.random.key(0), 3))
    for a, b in zip(*map(jax.tree.leaves, begun), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
