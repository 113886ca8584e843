"""The atlas measured: of a cell whose Jacobians are known every number, and a file that says what has been done."""

import json
import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.cells import ATLAS, AtlasEntry
from bptt_jax.experiments import atlas
from bptt_jax.experiments.tasks import adding, characters

SLOW, FAST = 0.9, 0.5
SETTINGS = atlas.Settings(hidden=4, batch=2, seeds=2, task="adding", length=60)


class Halves(NamedTuple):
    h: jax.Array
    c: jax.Array


def _swap(w, state, x):
    """Each half becomes the other, times rates of which the last is FAST."""
    rates = jnp.where(jnp.arange(w.shape[0]) == w.shape[0] - 1, FAST, SLOW)
    return Halves(rates * state.c + w @ x, rates * state.h)


def swapping(hidden_size, *, dtype=None):
    def init(key, input_size):
        return jax.random.normal(key, (hidden_size, input_size))

    return bptt.Cell(
        init=init, step=_swap, initial_state=lambda: Halves(jnp.zeros(hidden_size), jnp.zeros(hidden_size))
    )


def _outer(w, state, x):
    _, matrix = state
    key, value, query = w @ x
    matrix = 0.99 * matrix + value[:, None] * key
    return jnp.tanh(matrix @ query), matrix


def outer(hidden_size, *, dtype=None):
    """A matrix state, written to by outer products."""

    def init(key, input_size):
        return jax.random.normal(key, (3, hidden_size, input_size)) / math.sqrt(input_size)

    return bptt.Cell(
        init=init,
        step=_outer,
        initial_state=lambda: (jnp.zeros(hidden_size), jnp.zeros((hidden_size, hidden_size))),
    )


def entry(make, family="simple"):
    return AtlasEntry(make, family, 2000, "here", "h [N]")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("atlas") / "atlas.json"


@pytest.fixture(scope="module")
def found(file):
    measured = atlas.measure(SETTINGS, adding(60), ["rnn"], file, atlas={"rnn": entry(swapping)})
    assert measured.failed == {}
    return measured.cells["rnn"]


def test_every_number_of_a_cell_whose_jacobians_are_known(found) -> None:
    """All singular values of every product are powers of two rates, and the signal is in either leaf by turns."""
    of = found["width"]
    assert (of.name, of.family, of.basis, of.hidden, of.parameters) == ("rnn", "simple", "width", 4, 8)
    assert (of.size, of.followed, of.leaf_names, of.parallel) == (8, 8, ("h", "c"), "parallel")
    np.testing.assert_allclose(of.growth_rate, math.log(SLOW), rtol=0.02)  # the rest of FAST's share aside
    np.testing.assert_allclose(of.exponent, math.log(SLOW), rtol=1e-4)
    assert of.exponent_error < 1e-5
    assert of.living == 0
    np.testing.assert_allclose(of.log_condition, 60 * math.log(SLOW / FAST), rtol=1e-3)
    lags = np.arange(1, 61)
    np.testing.assert_allclose(of.leaf_shares, [np.mean(lags % 2 == 0), np.mean(lags % 2)], atol=0.02)
    # A share of the signal is FAST's at first and gone at once: a little less than all is what decays at SLOW.
    assert math.log(1e-3) / math.log(SLOW) - 15 < of.horizon_low <= of.horizon <= of.horizon_high < 67
    assert 0 < of.forward_seconds < of.gradient_seconds
    assert of.memory == 1  # it is its own reference
    assert of.memory_bytes > 0
    assert math.isnan(of.learned)


def test_of_one_size_both_bases_are_one_measurement(found) -> None:
    for name, value in found["width"].to_dict().items():
        assert found["parameters"].to_dict()[name] == ("parameters" if name == "basis" else value)


def test_what_is_in_the_file_is_not_measured_again(found, file, monkeypatch) -> None:
    monkeypatch.setattr(atlas, "_Bench", None)
    again = atlas.measure(SETTINGS, adding(60), ["rnn"], file, atlas={"rnn": entry(swapping)})
    for basis, of in again.cells["rnn"].items():
        assert of.to_dict() == found[basis].to_dict()


@pytest.fixture
def fake(found, monkeypatch):
    """Cells are measured at once; the list is of those that were."""
    measured = []

    class Bench:
        def __init__(self, *arguments):
            pass

        def measure(self, name, of):
            measured.append(name)
            if name == "gru":
                raise ValueError("no\nsuch size")
            return {basis: replace(m, name=name) for basis, m in found.items()}

    monkeypatch.setattr(atlas, "_Bench", Bench)
    return measured


def test_interrupted_it_keeps_what_is_done_and_goes_on(fake, tmp_path) -> None:
    file, told = tmp_path / "atlas.json", []

    def on_cell(name, done, total):
        told.append((name, done, total))
        if name == "lstm" and len(told) == 2:
            raise KeyboardInterrupt

    names = ["rnn", "lstm", "gru", "lru"]
    with pytest.raises(KeyboardInterrupt):
        atlas.measure(SETTINGS, adding(60), names, file, on_cell=on_cell)
    assert list(json.loads(file.read_text())["cells"]) == ["rnn"]
    done = atlas.measure(SETTINGS, adding(60), names, file, on_cell=on_cell)
    assert fake == ["rnn", "lstm", "gru", "lru"]
    assert told == [("rnn", 0, 4), ("lstm", 1, 4), ("lstm", 1, 4), ("gru", 2, 4), ("lru", 3, 4)]
    assert done.failed == {"gru": "ValueError: no such size"}
    assert list(done.cells) == ["rnn", "lstm", "lru"]
    assert list(json.loads(file.read_text())["cells"]) == ["rnn", "lstm", "lru"]


def test_files_of_others_are_refused_and_left_alone(fake, tmp_path) -> None:
    file = tmp_path / "atlas.json"
    atlas.measure(SETTINGS, adding(60), ["rnn"], file)
    before = file.read_text()
    other = replace(SETTINGS, hidden=8, task="text")
    with pytest.raises(atlas.AtlasFileError, match=r"hidden: 4 there, 8 here; task: adding there, text here"):
        atlas.measure(other, adding(60), ["lstm"], file)
    assert file.read_text() == before
    whole = json.loads(before)
    damaged = []
    for name, value in {
        "horizon": [1.0],
        "living": 10**400,
        "leaf_shares": [0.5] * 9,
        "hidden": None,
        "family": "large",
    }.items():
        of = json.loads(before)
        of["cells"]["rnn"]["width"][name] = value
        damaged.append(json.dumps(of))
    del whole["cells"]["rnn"]["width"]["horizon"]
    nothing = '{"settings": null, "cells": {}}'
    for text in ("", "{}", "[1]", '{"settings": 1, "cells": 2}', nothing, "[" * 10000, json.dumps(whole), *damaged):
        file.write_text(text)
        with pytest.raises(atlas.AtlasFileError, match="atlas"):
            atlas.measure(SETTINGS, adding(60), ["rnn"], file)
        assert file.read_text() == text


def test_parameters_are_counted_as_real_numbers() -> None:
    for name, expected in (
        ("rnn", 5 * 3 + 5 * 5 + 5),
        ("lstm", 4 * (5 * 3 + 5 * 5 + 5)),
        ("lru", 3 * 5 + 2 * 5 * 3),
    ):
        assert atlas.parameter_count(ATLAS[name].make(5), 3) == expected


def test_the_size_of_nearest_count() -> None:
    def in_heads(size):
        if size % 4:
            raise ValueError("hidden_size: expected a multiple of 4")
        return bptt.gru(size)

    for make, sizes in ((bptt.gru, range(1, 33)), (in_heads, range(4, 33, 4))):
        counts = {n: atlas.parameter_count(make(n), 3) for n in sizes}
        for target in (1, 500, 1234, 10**6):
            expected = min(counts, key=lambda n, target=target: abs(counts[n] - target))
            assert atlas.equal_size(make, 3, target, 32) == expected
    with pytest.raises(ValueError, match="no hidden size up to 3"):
        atlas.equal_size(in_heads, 3, 10, 3)


def test_what_is_linear_in_its_state_is_called_so() -> None:
    """Unit by unit, or by the delta rule; of the others the largest exponents decide."""
    growing = np.asarray([[0.1, 1e-3]])
    verdicts = {name: "linear" for name in ("lru", "retnet", "deltanet", "rwkv7")} | {"gru": "sequential"}
    for name, expected in verdicts.items():
        assert atlas.parallel_in_time(ATLAS[name].make(4), growing, np.zeros((2, 60, 3)), 60) == expected


def test_families_and_cells_are_chosen_in_the_order_of_the_atlas() -> None:
    assert atlas.chosen() == tuple(ATLAS)
    assert atlas.chosen(cells=["lstm", "rnn"]) == tuple(n for n in ATLAS if n in ("lstm", "rnn"))
    gated = tuple(n for n in ATLAS if ATLAS[n].family == "gated")
    assert atlas.chosen(["gated"]) == gated
    assert set(atlas.chosen(["gated"], ["rnn"])) == {*gated, "rnn"}


def test_embedded_inputs_have_unit_variance() -> None:
    task = atlas.embedded(characters("some text of a few characters " * 99, length=50), 64)
    inputs, targets = task.sample(jax.random.key(0), 4)
    assert inputs.shape == (4, 50, 64)
    assert targets.shape == (4, 50)
    assert 0.8 < float(jnp.var(inputs)) < 1.2


@pytest.mark.exhaustive
def test_a_matrix_for_a_state(tmp_path) -> None:
    """Of D = 1056 numbers 64 directions are followed, and the singular product is said to be at least that bad."""
    settings = atlas.Settings(hidden=32, batch=2, seeds=2, task="adding", length=100)
    cells = {"rnn": entry(bptt.rnn), "outer": entry(outer, "matrix")}
    measured = atlas.measure(settings, adding(100), ["outer"], tmp_path / "atlas.json", atlas=cells)
    assert measured.failed == {}
    of = measured.cells["outer"]["width"]
    assert (of.size, of.followed, of.living) == (32 + 32**2, 64, 0)
    np.testing.assert_allclose(of.exponent, math.log(0.99), rtol=0.01)
    np.testing.assert_allclose(of.growth_rate, math.log(0.99), rtol=0.05)
    np.testing.assert_allclose(of.leaf_shares, [0, 1], atol=0.02)


def test_two_at_once_in_one_file(fake, tmp_path) -> None:
    """What the other one has measured meanwhile is kept."""
    file = tmp_path / "atlas.json"

    def another(name: str, done: int, total: int) -> None:
        if name == "lstm":
            atlas.measure(SETTINGS, adding(60), ["lru"], file)

    atlas.measure(SETTINGS, adding(60), ["rnn", "lstm"], file, on_cell=another)
    assert sorted(json.loads(file.read_text())["cells"]) == ["lru", "lstm", "rnn"]
