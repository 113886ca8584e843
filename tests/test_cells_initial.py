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


def glorot(outputs: int, inputs: int, gain: float = 1.0) -> Check:
    return within(gain * math.sqrt(6 / (outputs + inputs)))


FAN_IN, ZERO = normal(1 / math.sqrt(I)), constant(0)
OF_UNITS = normal(1 / math.sqrt(N))
STATED: dict[str, dict[str, Check]] = {
    "indrnn": {"recurrent": uniform(0, 1), "input": FAN_IN, "bias": ZERO},
    "scrn": {"recurrent": OF_UNITS, "from_context": OF_UNITS, "input": FAN_IN, "to_context": FAN_IN},
    "minimal_rnn": {
        "recurrent": orthogonal,
        "latent": orthogonal,
        "input": FAN_IN,
        "bias": ZERO,
        "input_bias": ZERO,
    },
    "antisymmetric": {"recurrent": OF_UNITS, "input": FAN_IN, "bias": ZERO},
    "gated_antisymmetric": {"recurrent": OF_UNITS, "input": FAN_IN, "bias": ZERO},
    "lipschitz": {"linear": normal(1 / N), "recurrent": normal(1 / N), "bias": ZERO},
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
    "cfc": {
        "recurrent": glorot(BACKBONE, N + I),
        "input": glorot(BACKBONE, N + I),
        "bias": within(1 / math.sqrt(N + I)),
        "heads": glorot(N, BACKBONE),
        "heads_bias": within(1 / math.sqrt(BACKBONE)),
    },
    "tau_gru": dict.fromkeys(("recurrent", "delayed", "input", "bias"), within(1 / math.sqrt(N))),
    "original_lstm": {"recurrent": within(0.1), "input": within(0.1), "bias": ZERO},
    "rhn": {"recurrent": within(0.04), "input": within(0.04)},
    "brc": {"recurrent": constant(1), "input": glorot(N, I), "bias": ZERO},
    "nbrc": {"recurrent": glorot(N, N), "input": glorot(N, I), "bias": ZERO},
    "li_gru": {"recurrent": orthogonal, "input": glorot(N, I), "bias": ZERO},
    "qrnn": {"past": normal(1 / math.sqrt(2 * I)), "input": normal(1 / math.sqrt(2 * I)), "bias": ZERO},
    "hgrn": {"input": FAN_IN, "bias": ZERO},
    "lmu": {
        "encode_input": within(math.sqrt(3 / I)),
        "encode_hidden": within(math.sqrt(3 / N)),
        "encode_memory": ZERO,
    },
    "retnet": {"key": glorot(16, I, 2**-2.5), "value": glorot(N, I, 2**-2.5)},
    "gla": {"key": glorot(16, I, 2**-2.5), "value": glorot(N, I, 2**-2.5), "gate_bias": ZERO},
    "linear_transformer": {"key": FAN_IN, "value": FAN_IN},
    "deltanet": {"key": FAN_IN, "value": FAN_IN, "rate": FAN_IN},
    "hgrn2": {"forget": FAN_IN, "value": FAN_IN},
    "lif": {"recurrent": without_diagonal(OF_UNITS), "input": FAN_IN, "bias": ZERO},
    "alif": {"recurrent": without_diagonal(OF_UNITS), "input": FAN_IN, "bias": ZERO},
}


@pytest.mark.parametrize(
    "name", covering(list(STATED), "fastrnn", "lipschitz", "lif", "retnet", "deltanet", "rhn", "brc")
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
