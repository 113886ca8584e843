"""Cells, their initialisers, layers of them, and cells and weights of other libraries."""

from bptt_jax.cells import initializers
from bptt_jax.cells.adapters import from_equinox, from_haiku, from_linen, from_nnx
from bptt_jax.cells.atlas import ATLAS, AtlasEntry
from bptt_jax.cells.gated import GRUParams, LSTMParams, LSTMState, gru, lstm
from bptt_jax.cells.gru_variants import (
    mgu,
    ugrnn,
)
from bptt_jax.cells.layers import stack
from bptt_jax.cells.linear import LRUParams, MinGRUParams, hgrn, lru, min_gru, min_lstm, qrnn, rg_lru, sru
from bptt_jax.cells.simple import RNNParams, leaky_rnn, rnn
from bptt_jax.cells.torch_weights import from_torch

__all__ = [
    "ATLAS",
    "AtlasEntry",
    "GRUParams",
    "LRUParams",
    "LSTMParams",
    "LSTMState",
    "MinGRUParams",
    "RNNParams",
    "from_equinox",
    "from_haiku",
    "from_linen",
    "from_nnx",
    "from_torch",
    "gru",
    "hgrn",
    "initializers",
    "leaky_rnn",
    "lru",
    "lstm",
    "mgu",
    "min_gru",
    "min_lstm",
    "qrnn",
    "rg_lru",
    "rnn",
    "sru",
    "stack",
    "ugrnn",
]
