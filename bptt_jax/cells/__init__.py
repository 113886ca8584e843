"""Cells, their initialisers, layers of them, and cells and weights of other libraries."""

from bptt_jax.cells import initializers, surrogates
from bptt_jax.cells.adapters import from_equinox, from_haiku, from_linen, from_nnx
from bptt_jax.cells.additive import atr, cfn, light_ru, ran, star
from bptt_jax.cells.atlas import ATLAS, AtlasEntry
from bptt_jax.cells.bistable import brc, nbrc
from bptt_jax.cells.delta import deltanet, gated_deltanet, rwkv7
from bptt_jax.cells.gated import GRUParams, LSTMParams, LSTMState, gru, lstm
from bptt_jax.cells.gru_variants import dsgu, fastgrnn, intersection_rnn, li_gru, mgu, sgu, ugrnn
from bptt_jax.cells.highway import rhn
from bptt_jax.cells.isometries import householder, orthogonal, unitary
from bptt_jax.cells.keras_weights import from_keras
from bptt_jax.cells.layers import stack
from bptt_jax.cells.linear import LRUParams, MinGRUParams, hgrn, lru, min_gru, min_lstm, qrnn, rg_lru, sru
from bptt_jax.cells.linear_attention import gla, hgrn2, linear_transformer, retnet, rwkv6
from bptt_jax.cells.lstm_variants import (
    coupled_lstm,
    janet,
    layer_norm_lstm,
    multiplicative_lstm,
    original_lstm,
    peephole_lstm,
    residual_lstm,
    wmc_lstm,
)
from bptt_jax.cells.measurement import CellMeasurement
from bptt_jax.cells.oscillators import cfc, clockwork, cornn, lem, tau_gru, unicornn
from bptt_jax.cells.reservoir import echo_state
from bptt_jax.cells.searched import mut1, mut2, mut3, nas
from bptt_jax.cells.simple import RNNParams, indrnn, irnn, leaky_rnn, minimal_rnn, rnn, scrn
from bptt_jax.cells.spiking import alif, lif
from bptt_jax.cells.stable import antisymmetric, fastrnn, gated_antisymmetric, lipschitz
from bptt_jax.cells.state_space import lmu, mamba, mamba2, s4d, s5
from bptt_jax.cells.torch_weights import from_torch
from bptt_jax.cells.torchrecurrent_weights import from_torchrecurrent
from bptt_jax.cells.xlstm import mlstm, slstm

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
    "alif",
    "antisymmetric",
    "atr",
    "brc",
    "cfc",
    "cfn",
    "clockwork",
    "cornn",
    "coupled_lstm",
    "deltanet",
    "dsgu",
    "echo_state",
    "fastgrnn",
    "fastrnn",
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_torch",
    "from_torchrecurrent",
    "gated_antisymmetric",
    "gated_deltanet",
    "gla",
    "gru",
    "hgrn",
    "hgrn2",
    "householder",
    "indrnn",
    "initializers",
    "intersection_rnn",
    "irnn",
    "janet",
    "layer_norm_lstm",
    "leaky_rnn",
    "lem",
    "li_gru",
    "lif",
    "light_ru",
    "linear_transformer",
    "lipschitz",
    "lmu",
    "lru",
    "lstm",
    "mamba",
    "mamba2",
    "mgu",
    "min_gru",
    "min_lstm",
    "minimal_rnn",
    "mlstm",
    "multiplicative_lstm",
    "mut1",
    "mut2",
    "mut3",
    "nas",
    "nbrc",
    "original_lstm",
    "orthogonal",
    "peephole_lstm",
    "qrnn",
    "ran",
    "residual_lstm",
    "retnet",
    "rg_lru",
    "rhn",
    "rnn",
    "rwkv6",
    "rwkv7",
    "s4d",
    "s5",
    "scrn",
    "sgu",
    "slstm",
    "sru",
    "stack",
    "star",
    "surrogates",
    "tau_gru",
    "ugrnn",
    "unicornn",
    "unitary",
    "wmc_lstm",
]
