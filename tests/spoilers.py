"""What makes good arguments bad, by the kind of argument."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax as bptt


class Spoiler(NamedTuple):
    """What it makes of a good argument, and of what an answer must be the answer.

    Attributes:
      spoil: from the good argument the bad one.
      clean: from the good argument one that must give the same answer; None if no answer is right.
      tolerance: of that, relative to the largest number of a leaf.
      marked: an answer that says by its documented fields that something is NaN or infinite is right.
      compiles: an answer needs a program of its own.
    """

    spoil: Callable[[Any], Any]
    clean: Callable[[Any], Any] | None = None
    tolerance: float = 1e-5
    marked: bool = False
    compiles: bool = False


# --- The user's functions, good and bad.

W = np.asarray([[0.5, 0.2], [-0.3, 0.4]], np.float32)
H = np.asarray([0.1, -0.2], np.float32)
XS = np.asarray([[0.3, -0.1], [0.2, 0.5], [-0.4, 0.1]], np.float32)
SEEN: list[Any] = []


def step(p: Any, h: Any, x: Any) -> Any:
    return jnp.tanh(p["w"] @ h + x)


def loss(states: Any) -> Any:
    return jnp.sum(states[-1] ** 2)


def batch_loss(states: Any, target: Any) -> Any:
    return jnp.sum((states[-1] - target) ** 2)


def coefficients(p: Any, x: Any) -> Any:
    return p["w"][1], x


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, *arguments: Any) -> Any:
        return arguments[1]


class Fault(Exception):
    """The user's own."""


def _raises(*arguments: Any) -> Any:
    raise Fault("no luck")


def _branches(p: Any, h: Any, x: Any) -> Any:
    return h if h[0] > 0 else -h


def _leaks(p: Any, h: Any, x: Any) -> Any:
    SEEN.append(h)
    print("a side effect")
    return step(p, h, x)


def _mutates(p: Any, h: Any, x: Any) -> Any:
    p["w"] = p["w"] * 1
    return step(p, h, x)


def _writes(p: Any, h: Any, x: Any) -> Any:
    h[0] = 0
    return h


def returns(new: Callable[[Any], Any]) -> Spoiler:
    """A step that returns something else."""
    return Spoiler(lambda _: lambda p, h, x: new(step(p, h, x)))


def gives(new: Callable[[Any], Any]) -> Spoiler:
    """A loss that returns something else."""

    def of_states(*arguments: Any) -> Any:
        return new(next((a for a in arguments if getattr(a, "ndim", 0) > 1), arguments[0]))

    return Spoiler(lambda _: of_states)


FUNCTIONS = {
    "none": Spoiler(lambda _: None),
    "number": Spoiler(lambda _: 3),
    "text": Spoiler(lambda _: "step"),
    "array": Spoiler(lambda a: W),
    "unhashable": Spoiler(lambda _: Unhashable()),
    "raises": Spoiler(lambda _: _raises),
    "takes nothing": Spoiler(lambda _: lambda: 0),
}
STEPS = FUNCTIONS | {
    "takes one": Spoiler(lambda _: lambda h: h),
    "branches on values": Spoiler(lambda _: _branches),
    "writes into its state": Spoiler(lambda _: _writes),
    "host numpy": Spoiler(lambda _: lambda p, h, x: np.tanh(np.asarray(h))),
    "wrong key": Spoiler(lambda _: lambda p, h, x: p["v"] @ h),
    "wrong product": Spoiler(lambda _: lambda p, h, x: jnp.ones((2, 3)) @ h),
    "-> None": returns(lambda h: None),
    "-> text": returns(lambda h: "h"),
    "-> object": returns(lambda h: object()),
    "-> function": returns(lambda h: lambda: h),
    "-> pair": returns(lambda h: (h, h)),
    "-> list": returns(lambda h: [h]),
    "-> dict": returns(lambda h: {"h": h}),
    "-> shorter": returns(lambda h: h[:1]),
    "-> scalar": returns(lambda h: h[0]),
    "-> longer": returns(lambda h: jnp.concatenate([h, h])),
    "-> matrix": returns(lambda h: h[None]),
    "-> integers": returns(lambda h: h.astype(jnp.int32)),
    "-> booleans": returns(lambda h: h > 0),
    "-> complex": returns(lambda h: h.astype(jnp.complex64)),
    "-> half": returns(lambda h: h.astype(jnp.float16)),
    "-> text array": returns(lambda h: np.asarray(["a", "b"])),
    "side effects": Spoiler(lambda _: _leaks, lambda _: step, compiles=True),
    "mutates params": Spoiler(lambda _: _mutates, lambda _: step, compiles=True),
    "partial": Spoiler(lambda _: partial(step), lambda _: step, compiles=True),
    "jitted": Spoiler(lambda _: jax.jit(step), lambda _: step, compiles=True),
}
LINEAR_STEPS = FUNCTIONS | {
    "no DiagonalStep": Spoiler(lambda _: step),
    "raising coefficients": Spoiler(lambda _: bptt.parallel.DiagonalStep(_raises)),
    "one coefficient": Spoiler(lambda _: bptt.parallel.DiagonalStep(lambda p, x: p["w"][0])),
    "three coefficients": Spoiler(lambda _: bptt.parallel.DiagonalStep(lambda p, x: (p["w"][0], x, x))),
    "no coefficients": Spoiler(lambda _: bptt.parallel.DiagonalStep(lambda p, x: None)),
    "text coefficients": Spoiler(lambda _: bptt.parallel.DiagonalStep(lambda p, x: ("a", "b"))),
    "a full matrix": Spoiler(lambda _: bptt.parallel.DiagonalStep(lambda p, x: (p["w"], x))),
    "complex coefficients": Spoiler(lambda _: bptt.parallel.DiagonalStep(lambda p, x: (1j * p["w"][0], x))),
    "another structure": Spoiler(lambda _: bptt.parallel.DiagonalStep(lambda p, x: ((p["w"][0],), (x,)))),
}
LOSSES = FUNCTIONS | {
    "-> None": gives(lambda s: None),
    "-> text": gives(lambda s: "loss"),
    "-> object": gives(lambda s: object()),
    "-> pair": gives(lambda s: (1.0, 2.0)),
    "-> vector": gives(lambda s: s[-1]),
    "-> [1]": gives(lambda s: s[-1, :1]),
    "-> integer": gives(lambda s: 3),
    "-> boolean": gives(lambda s: s[0, 0] > 0),
    "-> complex": gives(lambda s: s[0, 0] + 1j),
    "-> host number": gives(lambda s: float(s[0, 0])),
    "branches on values": gives(lambda s: 1.0 if s[0, 0] > 0 else 2.0),
}

# --- Arrays.


def _at(a: np.ndarray, value: float) -> np.ndarray:
    """With `value` in the middle."""
    a = np.array(a)
    a.flat[a.size // 2] = value
    return a


def _strided(a: np.ndarray) -> np.ndarray:
    return np.stack([a, a + 1], axis=-1)[..., 0]


def _reversed(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a[::-1])[::-1]


def _read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.setflags(write=False)
    return a


def _deleted(a: np.ndarray) -> jax.Array:
    a = jax.device_put(a)
    a.delete()
    return a


def _single(a: np.ndarray) -> np.ndarray:
    return np.asarray(a, np.float32)


def cast(dtype: Any, *, compiles: bool = True, tolerance: float = 1e-5, scale: float = 1) -> Spoiler:
    """Of another dtype: as good as the same numbers in single precision."""
    return Spoiler(
        lambda a: (scale * a).astype(dtype),
        lambda a: (scale * a).astype(dtype).astype(np.float32),
        tolerance,
        compiles=compiles,
    )


NO_ARRAYS = {
    "none": Spoiler(lambda a: None),
    "text": Spoiler(lambda a: "abc"),
    "bytes": Spoiler(lambda a: b"abc"),
    "object": Spoiler(lambda a: object()),
    "function": Spoiler(lambda a: step),
    "set": Spoiler(lambda a: {1.0, 2.0}),
    "text array": Spoiler(lambda a: a.astype(str)),
    "object array": Spoiler(lambda a: a.astype(object)),
    "dates": Spoiler(lambda a: np.full(a.shape, np.datetime64("2020-01-01"))),
    "durations": Spoiler(lambda a: np.full(a.shape, np.timedelta64(1, "s"))),
    "records": Spoiler(lambda a: np.zeros(a.shape, [("a", "f4"), ("b", "f4")])),
    "masked": Spoiler(lambda a: np.ma.masked_array(a, np.arange(a.size).reshape(a.shape) == 0)),
    "random keys": Spoiler(lambda a: jax.random.key(0)),
    "deleted": Spoiler(_deleted),
    "shape alone": Spoiler(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)),
    "a class": Spoiler(lambda a: np.float32),
}
LAYOUTS = {
    "strided": Spoiler(_strided, _single),
    "reversed": Spoiler(_reversed, _single),
    "fortran": Spoiler(np.asfortranarray, _single),
    "read only": Spoiler(_read_only, _single),
    "double": cast(np.float64, compiles=False),
    "big endian": Spoiler(lambda a: a.astype(">f4")),
    "long double": Spoiler(lambda a: a.astype(np.longdouble)),
    "half": cast(np.float16, tolerance=1e-2),
    "bfloat16": cast(jnp.bfloat16, tolerance=5e-2),
}
SHAPES = {
    "scalar": Spoiler(lambda a: np.float32(1)),
    "python number": Spoiler(lambda a: 1.0),
    "one axis more": Spoiler(lambda a: a[None]),
    "empty": Spoiler(lambda a: a[:0]),
    "empty inside": Spoiler(lambda a: a[..., :0]),
    "shorter": Spoiler(lambda a: a[..., :1]),
    "longer": Spoiler(lambda a: np.concatenate([a, a, a], axis=-1)),
}
NUMBERS = {
    "NaN": Spoiler(lambda a: _at(a, np.nan), marked=True),
    "Inf": Spoiler(lambda a: _at(a, np.inf), lambda a: _at(a, 1e4), marked=True),
    "-Inf": Spoiler(lambda a: _at(a, -np.inf), lambda a: _at(a, -1e4), marked=True),
    "all NaN": Spoiler(lambda a: np.full_like(a, np.nan), marked=True),
    "subnormal": Spoiler(lambda a: _at(a, 1e-41), lambda a: _at(a, 0)),
    "all subnormal": Spoiler(lambda a: np.full_like(a, -1e-44), np.zeros_like),
    "-0": Spoiler(lambda a: _at(a, -0.0), lambda a: _at(a, 0)),
    "huge": Spoiler(lambda a: _at(a, 3e38), lambda a: _at(a, 1e4), marked=True),
    "1e300": Spoiler(lambda a: _at(a.astype(np.float64), 1e300), lambda a: _at(a, 1e4), marked=True),
}
OTHER_NUMBERS = {
    "integers": cast(np.int32, scale=4),
    "long integers": cast(np.int64, scale=4),
    "bytes unsigned": Spoiler(
        lambda a: np.abs(4 * a).astype(np.uint8),
        lambda a: np.abs(4 * a).astype(np.uint8).astype(np.float32),
        compiles=True,
    ),
    "booleans": Spoiler(lambda a: a > 0, lambda a: (a > 0).astype(np.float32), compiles=True),
    "beyond int32": Spoiler(lambda a: np.full(a.shape, 2**40)),
}
NO_FLOATS = {name: Spoiler(spoiler.spoil) for name, spoiler in OTHER_NUMBERS.items()}
REFUSED_COMPLEX = {"complex": Spoiler(lambda a: a.astype(np.complex64) * 1j)}

STATES = (
    NO_ARRAYS
    | LAYOUTS
    | {"half": Spoiler(lambda a: a.astype(np.float16)), "bfloat16": Spoiler(lambda a: a.astype(jnp.bfloat16))}
    | SHAPES
    | NO_FLOATS
    | {"complex": Spoiler(lambda a: 1j * a.astype(np.float64), lambda a: 1j * a, compiles=True)}
    | NUMBERS
    | {
        "list": Spoiler(lambda a: a.tolist()),
        "nested": Spoiler(lambda a: {"h": a, "name": "gru"}),
        "no leaves": Spoiler(lambda a: {}),
        "a counter beside": Spoiler(lambda a: (a, np.int32(0))),
    }
)
PARAMS = {
    name: s._replace(
        spoil=lambda p, s=s: p | {"w": s.spoil(p["w"])},
        clean=None if s.clean is None else lambda p, s=s: p | {"w": s.clean(p["w"])},
    )
    for name, s in (
        NO_ARRAYS | {k: LAYOUTS[k] for k in LAYOUTS if k not in ("half", "bfloat16")} | NUMBERS | REFUSED_COMPLEX
    ).items()
} | {"empty": Spoiler(lambda p: {}), "none at all": Spoiler(lambda p: None), "a list": Spoiler(lambda p: [p["w"]])}
INPUTS = (
    NO_ARRAYS
    | LAYOUTS
    | SHAPES
    | OTHER_NUMBERS
    | REFUSED_COMPLEX
    | NUMBERS
    | {
        "one axis more": Spoiler(lambda a: a[:, None, :]),
        "shorter": Spoiler(
            lambda a: a[..., :1], lambda a: np.repeat(a[..., :1], a.shape[-1], axis=-1), compiles=True
        ),
        "list": Spoiler(lambda a: a.tolist()),
        "unequal": Spoiler(lambda a: (a, a[:2])),
        "a scalar among": Spoiler(lambda a: {"x": a, "dt": 0.1}),
        "no leaves": Spoiler(lambda a: []),
    }
)
MATRICES = (
    NO_ARRAYS
    | LAYOUTS
    | {k: v._replace(compiles=False) for k, v in OTHER_NUMBERS.items() if k != "beyond int32"}
    | NUMBERS
    | {
        "scalar": SHAPES["scalar"],
        "python number": SHAPES["python number"],
        "vector": Spoiler(lambda a: a[0, 0]),
        "empty": SHAPES["empty"],
        "empty inside": SHAPES["empty inside"],
        "list": Spoiler(lambda a: a.tolist()),
        "ragged": Spoiler(lambda a: [[1.0], [1.0, 2.0]]),
        "beyond int32": Spoiler(lambda a: np.full(a.shape, 2**40)),
        # Linear in the matrices, or of their logarithm: compared with NumPy, below.
        "huge": Spoiler(lambda a: a * np.float32(1e38), lambda a: a.astype(np.float64) * np.float32(1e38)),
        "Inf": Spoiler(lambda a: _at(a, np.inf), marked=True),
        "-Inf": Spoiler(lambda a: _at(a, -np.inf), marked=True),
        "1e300": Spoiler(lambda a: _at(a.astype(np.float64), 1e300), marked=True),
    }
)
SQUARE = MATRICES | {
    "not square": Spoiler(lambda a: a[..., :1]),
    "not square either": Spoiler(lambda a: a[..., :1, :]),
}
JACOBIANS = SQUARE | {"one matrix": Spoiler(lambda a: a[0]), "a batch": Spoiler(lambda a: a[None])}

# --- Numbers and choices.

INTEGERS = {
    "float": Spoiler(lambda n: float(n)),
    "half": Spoiler(lambda n: n + 0.5),
    "NaN": Spoiler(lambda n: float("nan")),
    "boolean": Spoiler(lambda n: True),
    "text": Spoiler(lambda n: str(n)),
    "complex": Spoiler(lambda n: complex(n)),
    "array": Spoiler(lambda n: np.asarray([n])),
    "list": Spoiler(lambda n: [n]),
    "negative": Spoiler(lambda n: -n - 1),
    "beyond int32": Spoiler(lambda n: 10**30),
    "NumPy integer": Spoiler(lambda n: np.int64(n), lambda n: n),
}
POSITIVE_INTEGERS = INTEGERS | {"zero": Spoiler(lambda n: 0), "none": Spoiler(lambda n: None)}
OPTIONAL_INTEGERS = INTEGERS | {"zero": Spoiler(lambda n: 0)}
LENGTHS = OPTIONAL_INTEGERS | {"another": Spoiler(lambda n: n + 1), "fewer": Spoiler(lambda n: n - 1)}
AT_MOST = POSITIVE_INTEGERS | {"too many": Spoiler(lambda n: n + 1000)}
AT_MOST_OR_NONE = OPTIONAL_INTEGERS | {"too many": Spoiler(lambda n: n + 1000)}
WARMUPS = INTEGERS | {"none": Spoiler(lambda n: None), "all": Spoiler(lambda n: 3)}
REMATS = {k: v for k, v in POSITIVE_INTEGERS.items() if k not in ("boolean", "beyond int32")}
FLOATS = {
    "none": Spoiler(lambda v: None),
    "text": Spoiler(lambda v: "1.0"),
    "complex": Spoiler(lambda v: v + 1j),
    "list": Spoiler(lambda v: [v]),
    "vector": Spoiler(lambda v: np.asarray([v, v])),
    "NaN": Spoiler(lambda v: float("nan")),
    "object": Spoiler(lambda v: object()),
    "function": Spoiler(lambda v: step),
    "NumPy number": Spoiler(lambda v: np.float32(v), lambda v: float(np.float32(v))),
}
ABOVE_ZERO = FLOATS | {
    "zero": Spoiler(lambda v: 0.0),
    "negative": Spoiler(lambda v: -v),
    "-Inf": Spoiler(lambda v: -np.inf),
}
FRACTIONS = ABOVE_ZERO | {"one": Spoiler(lambda v: 1.0), "Inf": Spoiler(lambda v: np.inf)}
FINITE = FLOATS | {"Inf": Spoiler(lambda v: np.inf)}
CHOICES = {
    "another": Spoiler(lambda v: "neither"),
    "none": Spoiler(lambda v: None),
    "number": Spoiler(lambda v: 1),
    "list": Spoiler(lambda v: [v]),
    "array": Spoiler(lambda v: np.asarray([1, 2])),
}
FLAGS = {
    "none": Spoiler(lambda v: None),
    "number": Spoiler(lambda v: 1),
    "text": Spoiler(lambda v: "yes"),
    "array": Spoiler(lambda v: np.asarray([True])),
}
DTYPES = {
    "integers": Spoiler(lambda d: np.int32),
    "booleans": Spoiler(lambda d: bool),
    "complex": Spoiler(lambda d: np.complex64),
    "text": Spoiler(lambda d: str),
    "no name": Spoiler(lambda d: "float33"),
    "number": Spoiler(lambda d: 3),
    "array": Spoiler(lambda d: H),
}
KEYS = {
    "none": Spoiler(lambda k: None),
    "number": Spoiler(lambda k: 0),
    "text": Spoiler(lambda k: "key"),
    "floats": Spoiler(lambda k: H),
    "integers": Spoiler(lambda k: np.zeros(3, np.int32)),
    "many keys": Spoiler(lambda k: jax.random.split(k, 3)),
    "object": Spoiler(lambda k: object()),
}
INITIALIZERS = {
    "number": Spoiler(lambda f: 3),
    "text": Spoiler(lambda f: "orthogonal"),
    "array": Spoiler(lambda f: W),
    "raises": Spoiler(lambda f: _raises),
    "takes nothing": Spoiler(lambda f: lambda: W),
    "-> None": Spoiler(lambda f: lambda key, shape, dtype: None),
    "-> text": Spoiler(lambda f: lambda key, shape, dtype: "weights"),
    "-> scalar": Spoiler(lambda f: lambda key, shape, dtype: np.zeros((), dtype)),
    "-> another shape": Spoiler(lambda f: lambda key, shape, dtype: np.zeros((5, 7), dtype)),
    "-> complex": Spoiler(lambda f: lambda key, shape, dtype: np.zeros(shape, np.complex64)),
}
REQUIRED_INITIALIZERS = INITIALIZERS | {"none": Spoiler(lambda f: None)}
ANYTHING = {
    "none": Spoiler(lambda v: None),
    "number": Spoiler(lambda v: 3),
    "text": Spoiler(lambda v: "abc"),
    "array": Spoiler(lambda v: W),
    "list": Spoiler(lambda v: [1, 2]),
    "dict": Spoiler(lambda v: {"a": 1}),
    "function": Spoiler(lambda v: step),
    "class": Spoiler(lambda v: int),
}
OPTIONAL = {k: v for k, v in ANYTHING.items() if k != "none"}

SHAPE_ARGUMENTS = {
    "none": Spoiler(lambda s: None),
    "number": Spoiler(lambda s: 3),
    "text": Spoiler(lambda s: "ab"),
    "vector": Spoiler(lambda s: (3,)),
    "scalar": Spoiler(lambda s: ()),
    "floats": Spoiler(lambda s: (2.0, 2.0)),
    "negative": Spoiler(lambda s: (-2, -2)),
    "empty": Spoiler(lambda s: (0, 0)),
}

BEYOND = ("Inf", "-Inf", "huge", "1e300")
UPDATES = {
    k: v._replace(
        spoil=lambda u, v=v: {"w": v.spoil(u["w"])},
        clean=None if v.clean is None else lambda u, v=v: {"w": v.clean(u["w"])},
    )
    for k, v in (NO_ARRAYS | LAYOUTS | NUMBERS | NO_FLOATS).items()
    if k not in ("none", "Inf", "-Inf", "huge", "1e300")
}

AXES = {
    "number": Spoiler(lambda a: 0),
    "list": Spoiler(lambda a: list(a)),
    "pair": Spoiler(lambda a: a[:2]),
    "text": Spoiler(lambda a: (None, "0", 0)),
    "boolean": Spoiler(lambda a: (None, 0, False)),
    "float": Spoiler(lambda a: (0.0, 0, 0)),
    "array": Spoiler(lambda a: (None, 0, np.zeros(1, int))),
}

KINDS: dict[str, dict[str, Spoiler]] = {
    "step": STEPS,
    "linear step": LINEAR_STEPS,
    "loss": LOSSES,
    "optional loss": {k: v for k, v in LOSSES.items() if k != "none"},
    "state": STATES,
    "params": PARAMS,
    "inputs": INPUTS,
    "input": {
        k: v
        for k, v in INPUTS.items()
        if k not in ("one axis more", "scalar", "python number")  # which may be inputs
    },
    "visited": NO_ARRAYS | LAYOUTS | {k: SHAPES[k] for k in ("scalar", "python number", "empty", "empty inside")},
    "optional choice": {k: v for k, v in CHOICES.items() if k != "none"},
    "at least zero": {k: v for k, v in ABOVE_ZERO.items() if k not in ("none", "zero")},
    "log norms": {
        k: v
        for k, v in (NO_ARRAYS | LAYOUTS | SHAPES | NO_FLOATS | REFUSED_COMPLEX | NUMBERS).items()
        if k not in ("longer", *BEYOND)
    }
    | {"list": Spoiler(lambda a: a.tolist())},
    "log": {k: v for k, v in FLOATS.items() if k != "NaN"},
    "matrices": MATRICES,
    "square": SQUARE,
    "jacobians": JACOBIANS,
    "integer": POSITIVE_INTEGERS,
    "at most": AT_MOST,
    "at most or none": AT_MOST_OR_NONE,
    "optional integer": OPTIONAL_INTEGERS,
    "length": LENGTHS,
    "layer": INTEGERS,
    "prefix": {k: v for k, v in ANYTHING.items() if k != "text"} | {"another": Spoiler(lambda p: "abc")},
    "warmup": WARMUPS,
    "warmup or none": {k: v for k, v in WARMUPS.items() if k != "none"},
    "remat": REMATS,
    "above zero": ABOVE_ZERO,
    "finite above zero": ABOVE_ZERO | {"Inf": Spoiler(lambda v: np.inf)},
    "fraction": FRACTIONS,
    "finite": FINITE,
    "choice": CHOICES,
    "flag": FLAGS,
    "dtype": DTYPES,
    "key": KEYS,
    "initializer": REQUIRED_INITIALIZERS,
    "optional initializer": INITIALIZERS,
    "anything": ANYTHING,
    "optional": OPTIONAL,
    "function": {k: v for k, v in FUNCTIONS.items() if k not in ("raises", "takes nothing")},
    "no function": {k: v for k, v in ANYTHING.items() if k not in ("none", "function", "class")},
    "activation": {k: v for k, v in FUNCTIONS.items() if k not in ("raises", "takes nothing")},
    "optional activation": {k: v for k, v in FUNCTIONS.items() if k not in ("none", "raises", "takes nothing")},
    # Where it starts does not matter to what it finds.
    "guess": {k: v for k, v in STATES.items() if k not in (*LAYOUTS, *NUMBERS, "none")}
    | {k: v._replace(clean=lambda a: a, marked=False) for k, v in (LAYOUTS | NUMBERS).items() if not v.compiles},
    "any state": {k: v for k, v in (NO_ARRAYS | LAYOUTS | NUMBERS).items() if k not in ("none", *BEYOND)}
    | {"random keys": Spoiler(lambda a: jax.random.key(0), lambda a: jax.random.key(1))},  # which pass through
    "linear state": {k: v for k, v in STATES.items() if k not in ("one axis more", *BEYOND)},
    "linear inputs": {k: v for k, v in INPUTS.items() if k not in BEYOND},
    "count": INTEGERS | {"none": Spoiler(lambda n: None), "too many": Spoiler(lambda n: n + 1000)},
    "counted": {k: v for k, v in POSITIVE_INTEGERS.items() if k != "NumPy integer"},
    "immediate": {
        k: v for k, v in INPUTS.items() if k not in ("huge", "Inf", "-Inf", "1e300", "unequal", "a scalar among")
    },
    "real dtype": DTYPES | {"half": Spoiler(lambda d: np.float16)},
    "radius": FLOATS | {"negative": Spoiler(lambda r: -0.5), "large": Spoiler(lambda r: 1.5)},
    "threshold": {k: v for k, v in ABOVE_ZERO.items() if k != "none"},
    "square shape": SHAPE_ARGUMENTS
    | {"not square": Spoiler(lambda s: (2, 3)), "cube": Spoiler(lambda s: (2, 2, 2))},
    "gate shape": SHAPE_ARGUMENTS | {"seven gates": Spoiler(lambda s: (7, 2))},
    "layers": {
        "none": Spoiler(lambda s: ()),
        "one too few": Spoiler(lambda s: s[:1]),
        "one too many": Spoiler(lambda s: (*s, step)),
        "a number among": Spoiler(lambda s: (step, 3)),
        "none among": Spoiler(lambda s: (None, step)),
        "text among": Spoiler(lambda s: (step, "step")),
        "raising": Spoiler(lambda s: (step, _raises)),
        "-> None": Spoiler(lambda s: (step, lambda p, h, x: None)),
        "-> shorter": Spoiler(lambda s: (step, lambda p, h, x: h[:1])),
    },
    "output": {
        "number": Spoiler(lambda f: 3),
        "text": Spoiler(lambda f: "h"),
        "too many": Spoiler(lambda f: (f, f, f)),
        "a number among": Spoiler(lambda f: (f, 3)),
        "raises": Spoiler(lambda f: _raises),
        "-> None": Spoiler(lambda f: lambda h: None),
        "-> text": Spoiler(lambda f: lambda h: "h"),
        "-> longer": Spoiler(lambda f: lambda h: jnp.zeros(5)),
    },
    "estimators": {
        "number": Spoiler(lambda e: 3),
        "none": Spoiler(lambda e: None),
        "function": Spoiler(lambda e: next(iter(e.values()))),
        "list": Spoiler(lambda e: list(e.values())),
        "nothing": Spoiler(lambda e: {}),
        "numbered": Spoiler(lambda e: dict(enumerate(e.values()))),
        "a number among": Spoiler(lambda e: e | {"another": 3}),
        "a gradient among": Spoiler(lambda e: e | {"another": W}),
        "-> None": Spoiler(lambda e: {"another": lambda *given, **options: None}),
        "-> number": Spoiler(lambda e: {"another": lambda *given, **options: 3.0}),
        "takes nothing": Spoiler(lambda e: {"another": lambda: None}),
    },
    "lags": {
        "number": Spoiler(lambda a: 3),
        "text": Spoiler(lambda a: "12"),
        "floats": Spoiler(lambda a: (0.0, 1.0)),
        "flags": Spoiler(lambda a: (True,)),
        "too long": Spoiler(lambda a: (0, 1000)),
        "negative": Spoiler(lambda a: (-1,)),
        "array": Spoiler(lambda a: np.asarray([0, 1])),
    },
    "axes": AXES | {"none": Spoiler(lambda a: None)},
    "optional axes": AXES,
    "update": {
        k: v for k, v in POSITIVE_INTEGERS.items() if k in ("float", "half", "text", "complex", "list", "none")
    },
    "symbols": {**POSITIVE_INTEGERS, "four": Spoiler(lambda n: 4), "one": Spoiler(lambda n: 1)},
    "own text": {
        "empty": Spoiler(lambda t: ""),
        "bytes": Spoiler(lambda t: t.encode()),
        "number": Spoiler(lambda t: 3),
        "list": Spoiler(lambda t: list(t)),
        "array": Spoiler(lambda t: np.asarray(list(t))),
        "lone surrogate": Spoiler(lambda t: t + "\udc80"),
    },
    "codes": {
        "none": Spoiler(lambda c: None),
        "text": Spoiler(lambda c: "abcdefgh"),
        "short": Spoiler(lambda c: c[:2]),
        "empty": Spoiler(lambda c: c[:0]),
        "matrix": Spoiler(lambda c: c.reshape(10, 2)),
        "floats": Spoiler(lambda c: c.astype(np.float32)),
        "text array": Spoiler(lambda c: c.astype(str)),
        "scalar": Spoiler(lambda c: np.int32(3)),
    },
    "seeds": {
        "none": Spoiler(lambda s: None),
        "number": Spoiler(lambda s: 3),
        "empty": Spoiler(lambda s: ()),
        "twice": Spoiler(lambda s: (1, 1)),
        "negative": Spoiler(lambda s: (-1,)),
        "beyond int32": Spoiler(lambda s: (2**40,)),
        "floats": Spoiler(lambda s: (0.0, 1.0)),
        "text": Spoiler(lambda s: "ab"),
        "nested": Spoiler(lambda s: [[0], [1]]),
    },
    "penalty": {k: v for k, v in LOSSES.items() if k != "none"},
    "probes": {
        "number": Spoiler(lambda v: 3),
        "text": Spoiler(lambda v: "abc"),
        "list": Spoiler(lambda v: [batch_loss]),
        "no function": Spoiler(lambda v: {"bias": 3}),
        "raises": Spoiler(lambda v: {"bias": _raises}),
        "-> text": Spoiler(lambda v: {"bias": lambda *_: "bias"}),
        "-> vector": Spoiler(lambda v: {"bias": lambda *_: jnp.zeros(3)}),
        "-> pair": Spoiler(lambda v: {"bias": lambda *_: (1.0, 2.0)}),
    },
    "settings": {
        "number": Spoiler(lambda v: 3),
        "list": Spoiler(lambda v: [1, 2]),
        "taken": Spoiler(lambda v: {"batch": 3}),
    },
    "folder": {
        "number": Spoiler(lambda v: 3),
        "bytes": Spoiler(lambda v: b"run"),
        "list": Spoiler(lambda v: ["run"]),
    },
    "variables": {
        "none": Spoiler(lambda v: None),
        "number": Spoiler(lambda v: 3),
        "list": Spoiler(lambda v: [1, 2]),
        "array": Spoiler(lambda v: W),
        "function": Spoiler(lambda v: step),
    },
    "records": {
        "empty": Spoiler(lambda r: []),
        "none": Spoiler(lambda r: None),
        "number": Spoiler(lambda r: 3),
        "text": Spoiler(lambda r: "abc"),
        "events alone": Spoiler(lambda r: [{"event": "jump", "updates": 3}]),
        "numbers": Spoiler(lambda r: [1, 2]),
        "without a loss": Spoiler(lambda r: [{"updates": 1}]),
    },
    "updates": UPDATES,
    "batch": {k: v for k, v in INPUTS.items() if k != "one axis more"} | {"one sequence": Spoiler(lambda a: a[0])},
    "skipped updates": {k: v for k, v in UPDATES.items() if k not in ("NaN", "all NaN")}
    | {k: Spoiler(UPDATES[k].spoil, lambda u: {"w": np.zeros_like(u["w"])}) for k in ("NaN", "all NaN")},
    "targets": {
        k: v for k, v in INPUTS.items() if k in {**NO_ARRAYS, **SHAPES, **LAYOUTS} and k != "one axis more"
    },
}
