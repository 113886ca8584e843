"""Cells, their initialisers, layers of them, and cells and weights of other libraries."""

from bptt_jax.cells import initializers
from bptt_jax.cells.adapters import from_equinox, from_haiku, from_linen, from_nnx
from bptt_jax.cells.atlas import ATLAS, AtlasEntry
from bptt_jax.cells.gated import GRUParams, LSTMParams, LSTMState, gru, lstm
from bptt_jax.cells.gru_variants import (
    mgu,
    ugrnn,
)
from bptt_jax.cells.isometries import householder, orthogonal, unitary
from bptt_jax.cells.layers import stack
from bptt_jax.cells.linear import LRUParams, MinGRUParams, hgrn, lru, min_gru, min_lstm, qrnn, rg_lru, sru
from bptt_jax.cells.measurement import CellMeasurement
from bptt_jax.cells.oscillators import clockwork, cornn, lem, unicornn
from bptt_jax.cells.simple import RNNParams, indrnn, irnn, leaky_rnn, minimal_rnn, rnn, scrn
from bptt_jax.cells.stable import antisymmetric, fastrnn, gated_antisymmetric, lipschitz
from bptt_jax.cells.torch_weights import from_torch

__all__ = [
    "ATLAS",
    "AtlasEntry",
    "CellMeasurement",
    "GRUParams",
    "LRUParams",
    "LSTMParams",
    "LSTMState",
    "MinGRUParams",
    "RNNParams",
    "antisymmetric",
    "clockwork",
    "cornn",
    "fastrnn",
    "from_equinox",
    "from_haiku",
    "from_linen",
    "from_nnx",
    "from_torch",
    "gated_antisymmetric",
    "gru",
    "hgrn",
    "householder",
    "indrnn",
    "initializers",
    "irnn",
    "leaky_rnn",
    "lem",
    "lipschitz",
    "lru",
    "lstm",
    "mgu",
    "min_gru",
    "min_lstm",
    "minimal_rnn",
    "orthogonal",
    "qrnn",
    "rg_lru",
    "rnn",
    "scrn",
    "sru",
    "stack",
    "ugrnn",
    "unicornn",
    "unitary",
]
