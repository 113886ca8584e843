"""Results that read: pytrees to JAX, a few lines to people, plain types and labelled arrays to everything else."""

import ast
import copy
import dataclasses
import inspect
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_type_hints

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import bptt_jax as bptt
from bptt_jax.leaves import readable
from bptt_jax.results import Result, counted, field


class State(NamedTuple):
    c: Any
    h: Any


class Spectra(Result):
    """A group."""

    steps: Any = field(dims=("steps",))
    values: Any = field(dims=("steps", "unit"))


class Found(Result):
    """What a toy measurement found."""

    rate: Any = field(dims=())
    log_norms: Any = field(dims=("time",))
    states: Any = field(dims=("time", ...))
    grads: Any
    spectra: Spectra
    aux: Any = None
    method: str = field(static=True, default="forward")

    def _headline(self) -> str:
        return f"falls by {-float(self.rate):.3g} <nats>"

    @property
    def broken(self) -> Any:
        return self.grads.no_such_field


class Numbers(Result):
    """No headline, no axes."""

    value: Any
    other: Any = None


class Drawn(Result):
    """One with a figure."""

    curve: Any = field(dims=("time",))

    def _figure(self) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2, 1))
        figure.subplots().plot(np.asarray(self.curve))
        return figure


def found(shift: Any = 0.0) -> Found:
    """T = 5, a state of 3 and 2 numbers."""
    states = State(jnp.arange(15.0).reshape(5, 3) + shift, jnp.ones((5, 2)) * shift)
    spectra = Spectra(jnp.array([1, 3]), jnp.array([[2.0, 1.0], [3.0, 0.5]]) + shift)
    return Found(
        shift - 0.5,
        jnp.arange(-5.0, 0.0) + shift,
        states,
        {"b": jnp.ones(2) * shift, "w": jnp.eye(2) * shift},
        spectra,
    )


def test_a_pytree_to_jax():
    one = found(1.0)
    assert len(jax.tree.leaves(one)) == 8
    chex.assert_trees_all_close(jax.jit(found)(1.0), one)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[1], jax.vmap(found)(jnp.arange(3.0))), one)
    grad = jax.grad(lambda r: jnp.sum(r.log_norms**2))(dataclasses.replace(one, spectra=None))
    np.testing.assert_allclose(grad.log_norms, 2 * one.log_norms)
    axes = dataclasses.replace(jax.tree.map(lambda _: None, one), log_norms=0)
    summed = jax.vmap(lambda r: r.log_norms + r.rate, in_axes=(axes,))(one)
    np.testing.assert_allclose(summed, one.log_norms + one.rate)
    assert isinstance(jax.tree.map(lambda _: object(), one), Found)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(one)]
    assert ".states.c" in names
    assert ".spectra.values" in names


def test_static_fields_are_structure():
    one, other = found(), dataclasses.replace(found(), method="reverse")
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert jax.jit(lambda r: r)(other).method == "reverse"


def test_a_frozen_dataclass():
    one = found()
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.rate = 1.0
    assert dataclasses.replace(one, rate=2.0).rate == 2.0
    assert one == one
    assert (one == found()) is False  # of arrays it would be an array
    assert len({one, found()}) == 2
    for same in (pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one)):
        chex.assert_trees_all_equal(same, one)


def test_lines():
    lines = repr(found()).splitlines()
    assert lines[0] == "Found: falls by 0.5 <nats>"
    assert lines[1] == "  rate -0.5, aux None, method 'forward'"
    assert lines[2] == "  log_norms  float32[5] from -5 to -1"
    assert lines[3] == "  states     State of 2: c float32[5, 3] from 0 to 14; h float32[5, 2] 0 throughout"
    assert lines[5] == "  spectra    Spectra: steps int32[2] from 1 to 3, values float32[2, 2] from 0.5 to 3"
    assert lines[6] == "  more: help(Found), .to_dict(), .to_xarray()"
    assert str(found()) == repr(found())


def test_a_batch_says_so():
    batch = jax.vmap(jax.vmap(found))(jnp.zeros((4, 2)))
    lines = repr(batch).splitlines()
    assert lines[0].startswith("Found, a batch of 4 x 2: ")
    assert "falls" not in lines[0]  # the headline is of one sequence
    assert any(line.endswith("float32[4, 2, 5] from -5 to -1") for line in lines)


RANGES = {
    "NaN and infinities": (np.array([np.nan, -np.inf, -np.inf, np.inf, 1, 3]), "from 1 to 3, 1 NaN, 1 inf, 2 -inf"),
    "nothing finite": (np.array([np.nan, np.nan]), "2 NaN"),
    "complex": (np.array([3 + 4j, 0]), "modulus from 0 to 5"),
    "integers": (np.array([1_234_567, -3]), "from -3 to 1234567"),
    "booleans": (np.array([True, False, True]), "2 of 3 true"),
    "half": (jnp.array([1, 2], jnp.bfloat16), "from 1 to 2"),
    "four bits": (jnp.array([-8, 7], jnp.int4), "from -8 to 7"),
    "large": (np.array([3e38, -3e38], np.float32), "from -3e+38 to 3e+38"),
    "large complex": (np.array([3e38 + 3e38j], np.complex64), "1 inf"),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name):
    a, text = RANGES[name]
    assert repr(Numbers(a)).splitlines()[1].split("] ")[1] == text


SCALARS = {
    "float": (jnp.float32(-0.69314), "-0.6931"),
    "bfloat16": (jnp.bfloat16(0.5), "0.5"),
    "int": (jnp.int32(123456), "123456"),
    "bool": (np.bool_(True), "True"),
    "Python's": (0.123456, "0.1235"),
    "complex": (jnp.complex64(1 + 2j), "1+2j"),
    "infinite": (-np.inf, "-inf"),
    "word": ("a\nb", "'a\\nb'"),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_are_numbers(name):
    a, text = SCALARS[name]
    assert repr(Numbers(a)).splitlines()[0] == f"Numbers: value {text}, other None"


MANY = [f"field_{i}" for i in range(60)]
Many = type("Many", (Result,), {"__annotations__": dict.fromkeys(MANY, Any), "__doc__": "Sixty fields."})


@pytest.mark.parametrize(
    "value", [1.5, np.ones((1000, 300)), {f"a{i}": np.ones(3) for i in range(50)}, "long " * 99]
)
def test_at_most_ten_lines(value):
    for one in (Many(**dict.fromkeys(MANY, value)), Many(*[value, np.ones(3), found()] * 20)):
        lines = repr(one).splitlines()
        assert len(lines) <= 10
        assert max(map(len, lines)) <= 110


def test_what_is_left_out_is_named():
    lines = repr(Many(**dict.fromkeys(MANY, np.ones(3)))).splitlines()
    assert lines[-2].startswith("  field_7 ")
    assert "; also .field_8, .field_9, " in lines[-1]
    lines = repr(Many(**dict.fromkeys(MANY, 1.5))).splitlines()
    last = int(re.findall(r"field_(\d+) 1.5$", lines[-2])[0])
    assert f"; also .field_{last + 1}, " in lines[-1]


class Hostile:
    dtype = "no dtype"

    @property
    def shape(self) -> Any:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError


def deleted() -> jax.Array:
    a = jnp.ones(3)
    a.delete()
    return a


PARTS = {
    "None": lambda: None,
    "object": object,
    "hostile": Hostile,
    "deleted": deleted,
    "struct": lambda: jax.ShapeDtypeStruct((2, 3), jnp.float32),
    "struct of no dimension": lambda: jax.ShapeDtypeStruct((), jnp.float32),
    "key": lambda: jax.random.key(0),
    "old key": lambda: jax.random.PRNGKey(0),
    "float0": lambda: np.zeros(3, jax.dtypes.float0),
    "empty": lambda: jnp.ones((0, 3)),
    "objects": lambda: np.array([object(), None]),
    "words": lambda: np.array(["a", "b"]),
    "keys without order": lambda: {1: jnp.ones(2), "a": 2},
    "empty tree": lambda: (),
    "a set": lambda: {1, 2},
    "function": lambda: print,
    "type": lambda: float,
    "result": lambda: Numbers(Hostile()),
    "module": lambda: eqx.nn.Linear(2, 2, key=jax.random.key(0)),
}


@pytest.mark.parametrize("name", PARTS)
def test_nothing_makes_it_raise(name):
    part = PARTS[name]()
    for value in (
        Numbers(part),
        Numbers({"deep": [part]}),
        dataclasses.replace(found(), rate=part),
        dataclasses.replace(found(), states=part, spectra=part, method=part),
    ):
        assert 1 < len(repr(value).splitlines()) <= 10
        assert value._repr_html_().startswith("<div>")
    everywhere = jax.tree.map(lambda _: part, found())
    assert len(repr(everywhere).splitlines()) <= 10
    assert "falls" not in repr(everywhere)


def test_what_is_not_here_is_named(monkeypatch):
    assert "float32[3] deleted" in repr(Numbers(deleted()))
    assert "float32[2, 3]" in repr(Numbers(PARTS["struct"]()))
    assert "float0[3]" in repr(Numbers(PARTS["float0"]()))
    assert repr(Numbers(PARTS["key"]())).startswith("Numbers: value key<fry>[], other None\n")
    assert "  value  float32[0, 3]\n" in repr(Numbers(PARTS["empty"]()))
    here = jnp.ones(3)
    for name in ("is_fully_addressable", "is_fully_replicated"):
        monkeypatch.setattr(type(here), name, property(lambda _: False))
    assert "float32[3] on other hosts" in repr(Numbers(here))


def test_tracers_are_left_alone():
    seen = []

    class Watched(Result):
        """Calls are seen."""

        value: Any = field(dims=())

        def _headline(self) -> str:
            seen.append(self.value)
            return "seen"

        def _figure(self) -> None:
            seen.append(self.value)

    def traced(x: jax.Array) -> Watched:
        one = Watched(x)
        texts.append(repr(one) + one._repr_html_())
        assert not readable(x)
        return one

    texts: list[str] = []
    jax.jit(traced)(1.0)
    jax.vmap(traced)(jnp.ones(2))
    jax.grad(lambda x: traced(x).value)(1.0)
    assert len(texts) == 3
    assert seen == []
    assert all("float32[] traced" in text for text in texts)
    assert repr(Watched(1.0)).startswith("Watched: seen\n")
    assert Watched(1.0)._repr_html_().startswith("<div><p><b>Watched: seen</b>")
    assert len(seen) == 3


def test_large_arrays_stay_where_they_are():
    large = np.broadcast_to(np.float32(1), (1 << 13, 1 << 13))
    assert "float32[8192, 8192]\n" in repr(Numbers(large))


def test_html():
    text = found()._repr_html_()
    assert "<b>Found: falls by 0.5 &lt;nats&gt;</b>" in text
    assert re.findall(r"<th[^>]*>(\w+)</th>", text) == [f.name for f in dataclasses.fields(Found)]
    assert "<script>" not in Numbers("<script>", {"<script>": 1})._repr_html_()
    assert "<img" not in text


def test_the_figure_of_a_notebook(monkeypatch):
    drawn = Drawn(jnp.arange(4.0))
    assert re.search(
        r'<img alt="Drawn[^"]*" width="\d+" src="data:image/png;base64,iVBOR[\w+/=]+">', drawn._repr_html_()
    )
    assert "<img" not in Drawn(object())._repr_html_()
    assert "<img" not in Drawn(jnp.ones((2, 2, 2)))._repr_html_()  # matplotlib raises
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "<img" not in drawn._repr_html_()
    assert "<table>" in drawn._repr_html_()


def test_plain_types():
    one = dataclasses.replace(
        found(),
        rate=jnp.float32(-np.inf),
        log_norms=jnp.array([np.nan, np.inf, -1.0]),
        aux=({"complex": jnp.array([1 + 2j, np.inf]), 3: True}, [jnp.bfloat16(0.5), 2, None, "word"], (), print),
    )
    content = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert list(content) == [f.name for f in dataclasses.fields(Found)]
    assert content["rate"] == "-inf"
    assert content["log_norms"] == ["nan", "inf", -1.0]
    np.testing.assert_array_equal([float(v) for v in content["log_norms"]], one.log_norms)
    assert content["states"] == {"c": np.arange(15.0).reshape(5, 3).tolist(), "h": np.zeros((5, 2)).tolist()}
    assert content["spectra"] == {"steps": [1, 3], "values": [[2.0, 1.0], [3.0, 0.5]]}
    assert content["aux"][0] == {"complex": {"re": [1.0, "inf"], "im": [2.0, 0.0]}, "3": True}
    assert content["aux"][1:3] == [[0.5, 2, None, "word"], []]
    assert content["method"] == "forward"
    assert Numbers({(0, 1): 2}, found()).to_dict()["value"] == {"(0, 1)": 2}
    assert Numbers([found()]).to_dict()["value"][0]["method"] == "forward"


def test_plain_types_of_other_nodes():
    layer = eqx.nn.Linear(2, 1, key=jax.random.key(0))
    content = Numbers(layer, jax.random.key(7)).to_dict()
    np.testing.assert_allclose(content["value"]["weight"], layer.weight)
    assert content["other"] == np.asarray(jax.random.key_data(jax.random.key(7))).tolist()
    assert Numbers(np.array([True, False]), jnp.int4(-8)).to_dict() == {"value": [True, False], "other": -8}
    assert Numbers(PARTS["float0"]()).to_dict()["value"] == ["nan"] * 3
    assert Numbers(np.float64(np.nan), np.complex128(1j)).to_dict()["other"] == {"re": 0.0, "im": 1.0}


def test_axes_have_names():
    data = found(1.0).to_xarray()
    assert {k: v.dims for k, v in data.data_vars.items()} == {
        "rate": (),
        "log_norms": ("time",),
        "states.c": ("time", "unit"),
        "states.h": ("time", "states.h_unit"),  # 2 numbers, where the other has 3
        "grads.b": ("grads.b_0",),
        "grads.w": ("grads.w_0", "grads.w_1"),
        "spectra.steps": ("steps",),
        "spectra.values": ("steps", "spectra.values_unit"),
    }
    np.testing.assert_array_equal(data["states.c"], found(1.0).states.c)
    assert data.attrs == {"title": "Found: falls by -0.5 <nats>", "method": "forward"}


@pytest.mark.parametrize("lead", [("batch",), ("batch", "batch_1")])
def test_axes_of_a_batch_come_first(lead):
    batch = found
    for _ in lead:
        batch = jax.vmap(batch)
    data = batch(jnp.ones((4, 2)[: len(lead)])).to_xarray()
    for name, one in found(1.0).to_xarray().data_vars.items():
        assert data[name].dims == (*lead, *one.dims)


def test_a_field_named_as_its_axis_is_its_coordinate():
    spectra = found().spectra
    assert spectra.to_xarray().sel(steps=3)["values"].values.tolist() == [3.0, 0.5]
    batch = jax.tree.map(lambda a: jnp.stack([a, a]), spectra)
    assert batch.to_xarray().sel(steps=3)["values"].values.tolist() == [[3.0, 0.5]] * 2
    ragged = dataclasses.replace(batch, steps=jnp.array([[1, 3], [1, 4]]))
    assert ragged.to_xarray()["steps"].dims == ("batch", "steps")


def test_other_types_in_xarray():
    data = Numbers(
        {"half": jnp.ones(2, jnp.bfloat16), "none": None, "thing": object()}, jax.random.key(0)
    ).to_xarray()
    assert isinstance(data, xarray.Dataset)
    assert data["value.half"].dtype == np.float32
    assert set(data) == {"value.half", "other"}
    assert dataclasses.replace(found(), method=print).to_xarray().attrs.keys() == {"title"}


def test_axes_that_are_not_as_declared():
    class Matrices(Result):
        """With three axes."""

        jacobians: Any = field(dims=("time", "output", "input"))

    assert repr(Matrices(jnp.ones((2, 3)))).startswith("Matrices\n")
    fewer = dataclasses.replace(found(), states=jnp.ones(()), spectra=Spectra(jnp.ones(()), jnp.ones(3)))
    data = fewer.to_xarray()
    assert data["states"].dims == ()
    assert data["spectra.values"].dims == ("spectra.values_0",)
    assert repr(fewer).startswith("Found: falls")
    assert "batch" not in repr(dataclasses.replace(found(), spectra=None, states=None, log_norms=None))


def test_a_group_tells_of_the_batch():
    class Group(Result):
        """With one group alone that tells."""

        grads: Any
        spectra: Spectra

    batch = jax.tree.map(lambda a: jnp.stack([a, a]), Group(jnp.ones(3), found().spectra))
    assert repr(batch).startswith("Group, a batch of 2")
    assert batch.to_xarray()["grads"].dims == ("batch", "grads_0")


def test_views_go_along():
    class Viewed(Result):
        """With a property that others shall see."""

        _views: ClassVar = {"norms": ("time",)}
        values: Any = field(dims=("time", "unit"))

        @property
        def norms(self) -> Any:
            return jnp.linalg.norm(self.values, axis=-1)

    one = Viewed(jnp.asarray([[3.0, 4.0], [0.0, 2.0]]))
    assert one.to_dict() == {"values": [[3.0, 4.0], [0.0, 2.0]], "norms": [5.0, 2.0]}
    assert one.to_xarray()["norms"].dims == ("time",)
    assert jax.tree.map(lambda a: a[None], one).to_xarray()["norms"].dims == ("batch", "time")
    assert len(jax.tree.leaves(one)) == 1


def test_without_xarray(monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match="python -m pip install xarray"):
        found().to_xarray()


OURS = [cls for cls in Result.__subclasses__() if cls.__module__.startswith("bptt_jax.")]


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_every_field_is_explained_and_its_axes_named(cls):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    lines = re.findall(r"^  (\w+(?:, \w+)*): ", inspect.getdoc(cls).split("Attributes:")[1], re.MULTILINE)
    told = [name for line in lines for name in line.split(", ")]
    assert told == list(fields)
    for name, annotation in get_type_hints(cls).items():
        if name in fields and hasattr(annotation, "dim_str") and "..." not in annotation.dim_str:
            dims = fields[name].metadata.get("dims")
            assert dims is not None, name
            assert len(dims) == len(annotation.dim_str.split()), name


def bias(*errors: float) -> bptt.analysis.TruncationBias:
    return bptt.analysis.TruncationBias(jnp.arange(1, 1 + len(errors)), jnp.ones(len(errors)), jnp.asarray(errors))


def window(steps: int, rate: float) -> bptt.analysis.AdaptiveWindow:
    numbers = (jnp.float32(v) for v in (rate, 0.1))
    return bptt.analysis.AdaptiveWindow(jnp.int32(steps), jnp.arange(1, 3), jnp.array([0.3, 0.05]), *numbers)


def solution(*, converged: bool, error: float = 2e-6, iterations: int = 7) -> bptt.parallel.DeerSolution:
    numbers = (jnp.float32(v) for v in (1e-7, error))
    count = jnp.int32(iterations)
    return bptt.parallel.DeerSolution(jnp.ones((4, 2)), jnp.asarray(converged), count, *numbers, jnp.ones(9))


HEADLINES = {
    "bias, not for good before 4": (bias(0.5, 0.05, 0.2, 0.01, 0.1), "from a window of 4 steps on within 10 %"),
    "bias, at once": (bias(0.01, 0.02), "from a window of 1 step on within 10 %"),
    "bias, never": (bias(0.05, 0.3), "no window of up to 2 steps comes within 10 %"),
    "bias, one window": (bias(0.3), "no window of up to 1 step comes within 10 %"),
    "window of one step": (
        window(1, rate=-1.0),
        "the gradient decays by 1 nats per step: with 1 step the bias is at",
    ),
    "window of two steps": (
        window(2, rate=-2.0),
        "the gradient decays by 2 nats per step: with 2 steps the bias is",
    ),
    "bias, of no gradient": (
        bias(np.nan, np.nan),
        "there is no gradient to truncate, it underflows, or it is not finite",
    ),
    "deer": (solution(converged=True), "converged in 7 iterations, relative error 2e-06"),
    "deer, at once": (solution(converged=True, iterations=1), "converged in 1 iteration, relative error 2e-06"),
    "deer, given up": (
        solution(converged=False, error=np.inf, iterations=1),
        "not converged in 1 iteration (residual",
    ),
    "deer, in vain": (
        solution(converged=False, error=np.inf),
        "not converged in 7 iterations (residual 1e-07, error inf), all NaN: try damping= or window=\n",
    ),
    "deer, chaos": (
        solution(converged=False, error=0.5),
        "not converged in 7 iterations (residual 1e-07, error 0.5), all NaN: roundings grow too large\n",
    ),
    "deer, of a NaN": (
        bptt.deer(lambda w, h, x: w * h, jnp.nan, jnp.ones(1), length=3, max_iterations=4),
        "not converged in 4 iterations, all NaN: a state is not finite, as those of unroll may be\n",
    ),
    "leading": (
        bptt.analysis.LeadingValues(jnp.array([[2.0, 1.0], [3.0, 0.5]]), jnp.array([[1e-6, 1.0], [2e-6, 1.0]])),
        "the largest is 2 to 3, with errors up to 2e-06",
    ),
    "leading eigenvalues": (
        bptt.analysis.LeadingValues(jnp.array([[3 + 4j]]), jnp.array([[0.0]])),
        "the largest modulus is 5 to 5, with errors up to 0",
    ),
    "leading of a product": (
        bptt.analysis.LeadingLogValues(jnp.array([-70.0, -80.0, -np.inf]), jnp.array([0.1, 2.0, np.inf])),
        "the largest is exp(-70); 1 of 3 above the rounding",
    ),
    "adjoints": (
        bptt.parallel.ParallelAdjoints(jnp.ones((3, 2)), jnp.array([-9.0, -5.0, 1.0]), jnp.ones(2)),
        "log ||dL/dh_t|| is -9 at the first step, 1 at the last of 3",
    ),
    "prediction": (
        bptt.parallel.ParallelPrediction(*(np.asarray(v) for v in (-0.5, 0.01, 100, 100, 4))),
        "parallel: exponent -0.5 +- 0.01 nats per step over 100 steps",
    ),
    "prediction from a step": (
        bptt.parallel.ParallelPrediction(*(np.asarray(v) for v in (-9.0, 0.01, 1, 1, 4))),
        "parallel: exponent -9 +- 0.01 nats per step over 1 step\n",
    ),
    "prediction of nothing": (
        bptt.parallel.ParallelPrediction(*(np.asarray(v) for v in (np.nan, 0.01, 1, 1, 4))),
        "sequential: the trajectory of 1 step is not finite\n",
    ),
    "influence": (
        bptt.analysis.InfluenceMap(
            jnp.array([0, 5, 10]), jnp.array([[0, -np.inf, -np.inf], [-1, 0, -np.inf], [-4.0, -3, 0]])
        ),
        "log ||dh_10/dh_0|| = -4, -0.4 nats per step",
    ),
    "influence up to a reset": (
        bptt.influence_map(
            lambda w, h, x: w * h, 0.5, jnp.ones(1), bptt.Sequence(resets=jnp.arange(8) == 6), intervals=4
        ),
        "nothing of h_0 is left in h_8; the longest influence on this grid is over 6 steps\n",
    ),
    "influence after a NaN": (
        bptt.influence_map(lambda w, h, x: w * h, jnp.nan, jnp.ones(1), length=3),
        "a step on the way from h_0 to h_3, or its Jacobian, is not finite\n",
    ),
    "influence of nothing": (
        bptt.influence_map(lambda w, h, x: w * h, 0.5, jnp.ones(1), bptt.Sequence(mask=jnp.zeros(3, bool))),
        "no step\n",
    ),
}


def test_counts_are_told_in_words():
    assert [counted(n, "step") for n in (0, 1, 2, 11)] == ["0 steps", "1 step", "2 steps", "11 steps"]
    assert [counted(text, "unit") for text in ("1", "1.5", "5 and 4")] == ["1 unit", "1.5 units", "5 and 4 units"]


@pytest.mark.parametrize("name", HEADLINES)
def test_headlines(name):
    found, text = HEADLINES[name]
    assert repr(found).startswith(f"{type(found).__name__}: {text}")
    batch = jax.tree.map(lambda a: jnp.stack([a, a]), found)
    assert repr(batch).startswith(f"{type(found).__name__}, a batch of 2")
    assert all(v.dims[0] == "batch" for v in batch.to_xarray().data_vars.values())
    json.dumps(batch.to_dict(), allow_nan=False)


def test_the_influence_map_is_drawn_and_labelled_along_both_axes():
    found, _ = HEADLINES["influence"]
    assert "<img" in found._repr_html_()
    for data in (found.to_xarray(), jax.tree.map(lambda a: jnp.stack([a, a]), found).to_xarray()):
        assert np.all(data["log_norms"].sel(times=10, earlier=5) == -3)


def test_the_package_has_results():
    assert len(OURS) >= 6


def test_a_misspelt_field():
    one = found()
    names = [
        ("log_norm", "log_norms"),
        ("values", "spectra.values"),
        ("to_dic", "to_dict"),
        ("norms_by_time", "log_norms"),
    ]
    for wrong, right in names:
        with pytest.raises(AttributeError, match=f"Found has no field '{wrong}'; did you mean {right}") as raised:
            getattr(one, wrong)
        assert (raised.value.name, raised.value.obj) == (wrong, one)
    with pytest.raises(AttributeError, match="; there are aux, broken, grads"):
        one.xyz  # noqa: B018
    with pytest.raises(AttributeError, match=r"no field '_replace'$"):
        one._replace  # noqa: B018
    with pytest.raises(AttributeError, match="'dict' object has no attribute 'no_such_field'"):
        one.broken  # noqa: B018
    assert not hasattr(one, "_repr_svg_")


# Where a count stands before a plural and is never one: what it comes from does not come to that, or is written there.
NEVER_ONE = {
    "analysis/flow_results.py": {"len(whole)"},
    "analysis/noise.py": {"size"},
    "analysis/verdict.py": {"len(f.verdicts)", "said"},
    "cells/weights.py": {"n"},
    "cli/report.py": {"found['sequences']"},
    "cli/weights.py": {"len(layers)"},
    "pages/embedded.py": {
        "length", "sequences", "int(np.sum(steps[0] > 0))", "len(steps)", "singular.shape[-1]"
    },
    "slips.py": {"len(xs)"},
}  # fmt: skip


def test_no_count_that_may_be_one_stands_before_a_plural() -> None:
    """But for what `counted` makes of it: "1 steps" is no English."""
    package = Path(bptt.__file__).parent
    trees = {p.relative_to(package).as_posix(): ast.parse(p.read_text("utf-8")) for p in package.rglob("*.py")}
    calls = [n for tree in trees.values() for n in ast.walk(tree) if _is_counted(n)]
    nouns = {n.args[1].value for n in calls if isinstance(n.args[1], ast.Constant)}
    assert {"step", "sequence", "unit"} < nouns
    plural = re.compile(rf" (?:[a-z]+ )?(?:{'|'.join(nouns)})s\b")
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        for text in (n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr)):
            for count, after in zip(text.values, text.values[1:], strict=False):
                if not isinstance(count, ast.FormattedValue) or _is_counted(count.value):
                    continue
                if isinstance(after, ast.Constant) and plural.match(after.value):
                    found.setdefault(name, set()).add(ast.unparse(count.value))
    assert found == NEVER_ONE


def _is_counted(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "counted"
