"""What the page's script knows: numbers of the results in JSON, as many as a page can carry."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from bptt_jax.analysis.flow_results import GradientFlow, Spectra
from bptt_jax.analysis.influence import InfluenceMap
from bptt_jax.leaves import to_jsonable, visible
from bptt_jax.plots.style import batched, quantiles

# Numbers of all curves together, and of all spectra: a megabyte or so.
_CURVES = 80_000
_SPECTRA = 50_000
_SEQUENCES = 8  # that are shown by themselves
_FEWEST = 40  # steps that a curve keeps
_STEPS = 1500  # the most: a screen has no more
_VALUES = 128  # of each Jacobian

QUANTITIES = {
    "adjoint": "gradient norm ‖dL/dh_t‖",
    "signal": "error signal: what of it arrives at h_t",
    "product": "most that a signal can grow from t to its segment's end, ‖dh_e/dh_t‖",
    "contribution": "what step t adds to the parameters' gradient",
}


def data_block(content: Mapping[str, Any]) -> Markup:
    """JSON that may stand in a ``<script>``: nothing in it ends that, and NaN and infinities are strings."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def of_flows(flows: Mapping[str, GradientFlow]) -> tuple[list[dict[str, Any]], list[str]]:
    """Curves and spectra of every flow, batches of any axes as one, and what of them had to be left out, in words."""
    told: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    rows = sum(_rows_of(flow) for flow in flows.values())
    for name, flow in flows.items():
        one, left_out = _of_flow(flow, _CURVES // rows, _SPECTRA // len(flows))
        told.append({"name": visible(name), **one})
        for sentence in left_out:
            notes.setdefault(sentence, []).append(visible(name))
    return told, [f"{', '.join(names)}: {sentence}" for sentence, names in notes.items()]


def of_map(influence: InfluenceMap) -> dict[str, Any]:
    """Rows of the map."""
    norms = np.asarray(influence.log_norms, np.float64)
    return {"times": np.asarray(influence.times).tolist(), "rows": [_digits(row) for row in norms]}


def of_modes(values: np.ndarray, labels: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Eigenvalues ``[K, N]``, of each of K matrices, and what of them had to be left out."""
    count = max(1, min(len(values), _SPECTRA // (2 * values.shape[1])))
    notes = [f"The slider goes through the first {count} of {len(values)}."] if count < len(values) else []
    return {"labels": list(map(visible, labels[:count])), "rows": [_pairs(row) for row in values[:count]]}, notes


def of_series(values: np.ndarray, labels: Sequence[str], unit: str) -> dict[str, Any]:
    """Curves ``[T, n]`` over time, thinned."""
    at = _kept(len(values), max(_FEWEST, min(_STEPS, _CURVES // (2 * values.shape[1]))), values.T)
    return {
        "at": (at + 1).tolist(),
        "of": len(values),
        "labels": list(labels),
        "unit": unit,
        "rows": [_digits(row[at]) for row in values.T],
    }


def _rows_of(flow: GradientFlow) -> int:
    """How many curves a flow has."""
    sequences = flow.loss.size
    shown = min(sequences, _SEQUENCES) + (3 if sequences > 1 else 0)
    return int(shown * (len(QUANTITIES) + len(_leaves(flow))))


def _leaves(flow: GradientFlow) -> tuple[str, ...]:
    return flow.leaves.names if len(flow.leaves.names) > 1 else ()


def _of_flow(flow: GradientFlow, steps: int, spectral: int) -> tuple[dict[str, Any], list[str]]:
    """With so many steps a curve, and so many numbers of spectra."""
    columns: dict[str, np.ndarray] = {
        "adjoint": batched(flow.signal.adjoint_log_norms, 1),
        "signal": batched(flow.signal.log_gains, 1),
        "contribution": batched(flow.contributions.log_norms, 1),
    }
    if flow.products is not None:
        columns["product"] = batched(flow.products.log_norms, 1)
    per_leaf = batched(flow.leaves.log_norms, 2)
    columns |= {f"leaf:{name}": per_leaf[:, :, i] for i, name in enumerate(_leaves(flow))}
    adjoints = columns["adjoint"]
    sequences, length = adjoints.shape
    shown = min(sequences, _SEQUENCES)
    at = _kept(length, min(_STEPS, max(_FEWEST, steps)), adjoints[:shown])
    piece = batched(flow.signal.piece, 1)[:shown]
    found: dict[str, Any] = {
        "verdict": flow.verdict if isinstance(flow.verdict, str) else "",
        "steps": length,
        "at": at.tolist(),
        "sequences": sequences,
        "leaves": list(map(visible, _leaves(flow))),
        "curves": {visible(name): _curves(rows.astype(np.float64), at, shown) for name, rows in columns.items()},
        "padded": [_runs(row < 0) for row in piece],
        "resets": [_begins(row) for row in piece],
    }
    notes = []
    if len(at) < length:
        every = int(at[1] - at[0]) if len(at) > 1 else length
        notes.append(
            f"of {length} steps, the curves to explore have about one in {max(every, 2)}, and where each sequence's "
            "gradient is largest and smallest; the figures without a slider are of all."
        )
    if shown < sequences:
        notes.append(
            f"of {sequences} sequences, the first {shown} can be shown by themselves; median and band are of all."
        )
    if flow.spectra is not None:
        found["spectra"], left_out = _spectra(flow.spectra, shown, spectral)
        notes += left_out
    return found, notes


def _curves(rows: np.ndarray, at: np.ndarray, shown: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": [_digits(row[at]) for row in rows[:shown]]}
    if len(rows) > 1:
        low, middle, high = (_digits(row) for row in quantiles(rows[:, at], [0.1, 0.5, 0.9]))
        found |= {"low": low, "median": middle, "high": high}
    return found


def _spectra(spectra: Spectra, shown: int, room: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Of the first sequences, each matrix's first values."""
    singular, steps = batched(spectra.singular_values, 2), batched(spectra.steps, 1)
    eigen = batched(spectra.eigenvalues, 2)
    size = min(singular.shape[-1], _VALUES)
    matrices = max(_FEWEST, room // (3 * size))
    count = max(1, min(shown, matrices // max(1, singular.shape[1])))  # all steps before more sequences
    told, thinned = [], False
    for i in range(count):
        known = np.flatnonzero(steps[i] > 0)
        chosen = known[_kept(len(known), matrices // count, np.zeros((0, len(known))))] if len(known) else known
        thinned |= len(chosen) < len(known)
        told.append(
            {
                "steps": steps[i][chosen].tolist(),
                "singular": [_digits(row[:size]) for row in singular[i][chosen].astype(np.float64)],
                "eigenvalues": [_pairs(row[:size]) for row in eigen[i][chosen]],
            }
        )
    notes = []
    if thinned:
        notes.append(
            f"spectra of {len(told[0]['steps'])} of {int(np.sum(steps[0] > 0))} measured steps move with the slider."
        )
    if count < len(steps):
        notes.append(f"spectra of the first {count} of {len(steps)} sequences move with the slider.")
    if size < singular.shape[-1]:
        notes.append(f"of {singular.shape[-1]} values of each Jacobian, the largest {size} move with the slider.")
    return told, notes


def _kept(length: int, most: int, rows: np.ndarray) -> np.ndarray:
    """Indices of steps: as many as may be, evenly, the last one, and where each of `rows` is largest and smallest."""
    every = -(-length // most)
    kept = {*range(0, length, every), length - 1}
    if every > 1:
        for row in rows:
            known = np.flatnonzero(np.isfinite(row))
            if len(known):
                kept |= {int(known[np.argmin(row[known])]), int(known[np.argmax(row[known])])}
    return np.asarray(sorted(kept), int)


def _runs(flags: np.ndarray) -> list[list[int]]:
    """First and last step, counted from 1, of every stretch that is flagged."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return [[int(a) + 1, int(b)] for a, b in edges.reshape(-1, 2)]


def _begins(piece: np.ndarray) -> list[int]:
    """The steps, counted from 1, at which a piece after the first begins."""
    real = np.flatnonzero(piece >= 0)
    return [int(real[i]) + 1 for i in np.flatnonzero(np.diff(piece[real]) > 0) + 1]


def _digits(values: Iterable[float]) -> list[Any]:
    """Six of each; NaN and infinities as in `bptt_jax.Result.to_dict`."""
    return [to_jsonable(v) if v != v or v in (np.inf, -np.inf) else float(f"{v:.6g}") for v in map(float, values)]


def _pairs(values: np.ndarray) -> list[Any]:
    """Complex numbers, real and imaginary parts by turns."""
    pairs = np.stack([values.real, values.imag], axis=-1).astype(np.float64)
    return _digits(pairs.ravel())
