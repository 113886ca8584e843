"""The atlas: every cell of the package, of which family it is, whose, and what its state holds."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from bptt_jax.cells.additive import atr, cfn, light_ru, ran, star
from bptt_jax.cells.bistable import brc, nbrc
from bptt_jax.cells.delta import deltanet, gated_deltanet, rwkv7
from bptt_jax.cells.gated import gru, lstm
from bptt_jax.cells.gru_variants import dsgu, fastgrnn, intersection_rnn, li_gru, mgu, sgu, ugrnn
from bptt_jax.cells.highway import rhn
from bptt_jax.cells.isometries import householder, orthogonal, unitary
from bptt_jax.cells.linear import hgrn, lru, min_gru, min_lstm, qrnn, rg_lru, sru
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
from bptt_jax.cells.oscillators import cfc, clockwork, cornn, lem, tau_gru, unicornn
from bptt_jax.cells.reservoir import echo_state
from bptt_jax.cells.searched import mut1, mut2, mut3, nas
from bptt_jax.cells.simple import indrnn, irnn, leaky_rnn, minimal_rnn, rnn, scrn
from bptt_jax.cells.spiking import alif, lif
from bptt_jax.cells.stable import antisymmetric, fastrnn, gated_antisymmetric, lipschitz
from bptt_jax.cells.state_space import lmu, mamba, mamba2, s4d, s5
from bptt_jax.cells.xlstm import mlstm, slstm
from bptt_jax.step import Cell

Family = Literal["simple", "orthogonal", "oscillatory", "gated", "linear", "matrix", "spiking", "reservoir"]


@dataclass(frozen=True)
class AtlasEntry:
    """A cell of the atlas.

    Attributes:
      make: ``make(hidden_size, *, dtype=None, ...) -> Cell``; all further arguments have defaults.
      family: "simple" (the simple network, and one idea beside it), "orthogonal" (recurrent weights that are, or
        unitary), "oscillatory" (or of several time scales), "gated", "linear" (in the state, unit by unit, or but for a
        part of the step), "matrix" (for each head a matrix, written to by outer products), "spiking" or
        "reservoir" (drawn, not trained).
      year: of its publication; of a preprint that is cited as such, its own.
      source: who published it, and where.
      state: names and shapes of the leaves of the state, N being the hidden size, as "h [N], c [N]".
    """

    make: Callable[..., Cell]
    family: Family
    year: int
    source: str
    state: str

    @property
    def equations(self) -> str:
        """As in the docstring of `make`."""
        found = re.search(r"::\n\n((?: +.*\n|\n)+)", inspect.getdoc(self.make) or "")
        return inspect.cleandoc(found[1]) if found else ""


ATLAS: Mapping[str, AtlasEntry] = MappingProxyType(
    {
        "rnn": AtlasEntry(rnn, "simple", 1990, "Elman, Cogn. Sci. 14: 179", "h [N]"),
        "leaky_rnn": AtlasEntry(leaky_rnn, "simple", 2019, "Yang et al., Nat. Neurosci. 22: 297", "h [N]"),
        "irnn": AtlasEntry(irnn, "simple", 2015, "Le et al., arXiv:1504.00941", "h [N]"),
        "indrnn": AtlasEntry(indrnn, "simple", 2018, "Li et al., arXiv:1803.04831", "h [N]"),
        "scrn": AtlasEntry(scrn, "simple", 2014, "Mikolov et al., arXiv:1412.7753", "h [N], s [N]"),
        "minimal_rnn": AtlasEntry(minimal_rnn, "simple", 2017, "Chen, arXiv:1711.06788", "h [N]"),
        "fastrnn": AtlasEntry(fastrnn, "simple", 2018, "Kusupati et al., arXiv:1901.02358", "h [N]"),
        "antisymmetric": AtlasEntry(antisymmetric, "simple", 2019, "Chang et al., arXiv:1902.09689", "h [N]"),
        "gated_antisymmetric": AtlasEntry(
            gated_antisymmetric, "simple", 2019, "Chang et al., arXiv:1902.09689", "h [N]"
        ),
        "lipschitz": AtlasEntry(lipschitz, "simple", 2021, "Erichson et al., arXiv:2006.12070", "h [N]"),
        "orthogonal": AtlasEntry(orthogonal, "orthogonal", 2018, "Helfrich et al., arXiv:1707.09520", "h [N]"),
        "unitary": AtlasEntry(unitary, "orthogonal", 2016, "Arjovsky et al., arXiv:1511.06464", "h [N]"),
        "householder": AtlasEntry(householder, "orthogonal", 2017, "Mhammedi et al., arXiv:1612.00188", "h [N]"),
        "cornn": AtlasEntry(cornn, "oscillatory", 2021, "Rusch and Mishra, arXiv:2010.00951", "h [N], z [N]"),
        "unicornn": AtlasEntry(unicornn, "oscillatory", 2021, "Rusch and Mishra, arXiv:2103.05487", "h [N], z [N]"),
        "lem": AtlasEntry(lem, "oscillatory", 2022, "Rusch et al., arXiv:2110.04744", "h [N], z [N]"),
        "clockwork": AtlasEntry(clockwork, "oscillatory", 2014, "Koutnik et al., arXiv:1402.3511", "h [N], t []"),
        "cfc": AtlasEntry(cfc, "oscillatory", 2022, "Hasani et al., Nat. Mach. Intell. 4: 992", "h [N]"),
        "tau_gru": AtlasEntry(
            tau_gru, "oscillatory", 2022, "Erichson et al., arXiv:2212.00228", "h [N], past [5, N]"
        ),
        "gru": AtlasEntry(gru, "gated", 2014, "Cho et al., arXiv:1406.1078", "h [N]"),
        "lstm": AtlasEntry(
            lstm, "gated", 1997, "Hochreiter and Schmidhuber, Neural Comput. 9: 1735", "h [N], c [N]"
        ),
        "peephole_lstm": AtlasEntry(
            peephole_lstm, "gated", 2002, "Gers et al., J. Mach. Learn. Res. 3: 115", "h [N], c [N]"
        ),
        "layer_norm_lstm": AtlasEntry(
            layer_norm_lstm, "gated", 2016, "Ba et al., arXiv:1607.06450", "h [N], c [N]"
        ),
        "multiplicative_lstm": AtlasEntry(
            multiplicative_lstm, "gated", 2016, "Krause et al., arXiv:1609.07959", "h [N], c [N]"
        ),
        "residual_lstm": AtlasEntry(residual_lstm, "gated", 2017, "Kim et al., arXiv:1701.03360", "h [N], c [N]"),
        "original_lstm": AtlasEntry(
            original_lstm, "gated", 1997, "Hochreiter and Schmidhuber, Neural Comput. 9: 1735", "h [N], c [N]"
        ),
        "coupled_lstm": AtlasEntry(coupled_lstm, "gated", 2017, "Greff et al., arXiv:1503.04069", "h [N], c [N]"),
        "nas": AtlasEntry(nas, "gated", 2017, "Zoph and Le, arXiv:1611.01578", "h [N], c [N]"),
        "janet": AtlasEntry(janet, "gated", 2018, "van der Westhuizen and Lasenby, arXiv:1804.04849", "h [N]"),
        "wmc_lstm": AtlasEntry(wmc_lstm, "gated", 2021, "Landi et al., arXiv:2109.00020", "h [N], c [N]"),
        "slstm": AtlasEntry(slstm, "gated", 2024, "Beck et al., arXiv:2405.04517", "h [N], c [N], n [N], m [N]"),
        "rhn": AtlasEntry(rhn, "gated", 2017, "Zilly et al., arXiv:1607.03474", "h [N]"),
        "brc": AtlasEntry(brc, "gated", 2021, "Vecoven et al., PLOS ONE 16: e0252676", "h [N]"),
        "nbrc": AtlasEntry(nbrc, "gated", 2021, "Vecoven et al., PLOS ONE 16: e0252676", "h [N]"),
        "mgu": AtlasEntry(mgu, "gated", 2016, "Zhou et al., Int. J. Autom. Comput. 13: 226", "h [N]"),
        "ugrnn": AtlasEntry(ugrnn, "gated", 2017, "Collins et al., arXiv:1611.09913", "h [N]"),
        "atr": AtlasEntry(atr, "gated", 2018, "Zhang et al., arXiv:1810.12546", "h [N]"),
        "ran": AtlasEntry(ran, "gated", 2017, "Lee et al., arXiv:1705.07393", "h [N], c [N]"),
        "cfn": AtlasEntry(cfn, "gated", 2017, "Laurent and von Brecht, arXiv:1612.06212", "h [N]"),
        "star": AtlasEntry(star, "gated", 2019, "Turkoglu et al., arXiv:1911.11033", "h [N]"),
        "light_ru": AtlasEntry(light_ru, "gated", 2024, "Ye et al., Electronics 13: 3204", "h [N]"),
        "li_gru": AtlasEntry(li_gru, "gated", 2018, "Ravanelli et al., arXiv:1803.10225", "h [N]"),
        "fastgrnn": AtlasEntry(fastgrnn, "gated", 2018, "Kusupati et al., arXiv:1901.02358", "h [N]"),
        "mut1": AtlasEntry(mut1, "gated", 2015, "Jozefowicz et al., ICML", "h [N]"),
        "mut2": AtlasEntry(mut2, "gated", 2015, "Jozefowicz et al., ICML", "h [N]"),
        "mut3": AtlasEntry(mut3, "gated", 2015, "Jozefowicz et al., ICML", "h [N]"),
        "sgu": AtlasEntry(sgu, "gated", 2016, "Gao and Glowacka, arXiv:1604.02910", "h [N]"),
        "dsgu": AtlasEntry(dsgu, "gated", 2016, "Gao and Glowacka, arXiv:1604.02910", "h [N]"),
        "intersection_rnn": AtlasEntry(
            intersection_rnn, "gated", 2017, "Collins et al., arXiv:1611.09913", "y [N], h [N]"
        ),
        "lru": AtlasEntry(lru, "linear", 2023, "Orvieto et al., arXiv:2303.06349", "h [N]"),
        "min_gru": AtlasEntry(min_gru, "linear", 2024, "Feng et al., arXiv:2410.01201", "h [N]"),
        "min_lstm": AtlasEntry(min_lstm, "linear", 2024, "Feng et al., arXiv:2410.01201", "h [N]"),
        "sru": AtlasEntry(sru, "linear", 2018, "Lei et al., arXiv:1709.02755", "c [N]"),
        "qrnn": AtlasEntry(qrnn, "linear", 2017, "Bradbury et al., arXiv:1611.01576", "h [N], past [2N]"),
        "hgrn": AtlasEntry(hgrn, "linear", 2023, "Qin et al., arXiv:2311.04823", "h [N]"),
        "rg_lru": AtlasEntry(rg_lru, "linear", 2024, "De et al., arXiv:2402.19427", "h [N]"),
        "s4d": AtlasEntry(s4d, "linear", 2022, "Gu et al., arXiv:2206.11893", "h [N, 4]"),
        "s5": AtlasEntry(s5, "linear", 2023, "Smith et al., arXiv:2208.04933", "h [N]"),
        "mamba": AtlasEntry(mamba, "linear", 2023, "Gu and Dao, arXiv:2312.00752", "h [N, 8]"),
        "lmu": AtlasEntry(lmu, "linear", 2019, "Voelker et al., NeurIPS 32", "h [N], m [8]"),
        "mamba2": AtlasEntry(mamba2, "matrix", 2024, "Dao and Gu, arXiv:2405.21060", "h [2, N/2, 8]"),
        "retnet": AtlasEntry(retnet, "matrix", 2023, "Sun et al., arXiv:2307.08621", "S [2, N/2, 8]"),
        "gla": AtlasEntry(gla, "matrix", 2023, "Yang et al., arXiv:2312.06635", "S [2, N/2, 8]"),
        "mlstm": AtlasEntry(
            mlstm, "matrix", 2024, "Beck et al., arXiv:2405.04517", "C [2, N/2, 8], n [2, 8], m [2]"
        ),
        "linear_transformer": AtlasEntry(
            linear_transformer, "matrix", 2020, "Katharopoulos et al., arXiv:2006.16236", "S [2, N/2, 8], z [2, 8]"
        ),
        "deltanet": AtlasEntry(deltanet, "matrix", 2021, "Schlag et al., arXiv:2102.11174", "S [2, N/2, 8]"),
        "rwkv6": AtlasEntry(rwkv6, "matrix", 2024, "Peng et al., arXiv:2404.05892", "S [2, N/2, 8]"),
        "hgrn2": AtlasEntry(hgrn2, "matrix", 2024, "Qin et al., arXiv:2404.07904", "S [2, N/2, 8]"),
        "gated_deltanet": AtlasEntry(
            gated_deltanet, "matrix", 2024, "Yang et al., arXiv:2412.06464", "S [2, N/2, 8]"
        ),
        "rwkv7": AtlasEntry(rwkv7, "matrix", 2025, "Peng et al., arXiv:2503.14456", "S [2, N/2, 8]"),
        "lif": AtlasEntry(lif, "spiking", 2019, "Neftci et al., IEEE Signal Process. Mag. 36: 51", "h [N], v [N]"),
        "alif": AtlasEntry(
            alif, "spiking", 2018, "Bellec et al., arXiv:1803.09574, Nat. Commun. 11: 3625", "h [N], v [N], a [N]"
        ),
        "echo_state": AtlasEntry(echo_state, "reservoir", 2001, "Jaeger, GMD report 148", "h [N]"),
    }
)
