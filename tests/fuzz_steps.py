"""Random steps from a small grammar, each written twice: in JAX, as a user's step, and in NumPy, with its exact
derivatives, in extended precision.

In NumPy everything is carried several times side by side: once as exactly as `numpy.longdouble` can, and a few times
with roundings of the step's own dtype drawn at random, in every operation. How far these lie apart says what the dtype
can know of a number, whatever the step does to it (cancellation, saturation, chaos, a branch that hangs on a sign).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RUNS = 5  # the exact one, and four with roundings
LONG = np.longdouble
EXTENDED = np.finfo(LONG).nmant > np.finfo(float).nmant  # not on every machine
HALF = ("bfloat16", "float16")


class Arithmetic:
    """Roundings, and what leaves the range of the dtype."""

    def __init__(self, dtype: str, leaves: list[str], rng: np.random.Generator) -> None:
        infos = [jnp.finfo(d) for d in (dtype, *leaves)]
        self.work_eps = float(infos[0].eps)
        self.eps = float(max(info.eps for info in infos))  # of a half, what is rounded between the steps
        # Float32 and float64 below their normal numbers are zero on CPUs.
        self.tiny = max(LONG(i.smallest_subnormal if i.dtype == np.float16 else i.tiny) for i in infos)
        self.largest = min(LONG(i.max) for i in infos) / 16
        self.rng = rng
        self.overflown = self.wild = False

    def rounded(self, a: np.ndarray, size: Any = None, floor: Any = 1.0, eps: float | None = None) -> np.ndarray:
        """`a`, ``[RUNS, ...]``, with an error relative to `size` (of itself), and of the smallest number times `floor`,
        in all but the first run. Zero stays zero."""
        size = np.abs(a) if size is None else size
        amount = (2 * (self.eps if eps is None else eps) * size + self.tiny * floor) * ((a != 0) | (size != 0))
        noise = self.rng.uniform(-1, 1, a.shape).astype(LONG)
        noise[0] = 0
        return a + amount * noise

    def dual(self, value: np.ndarray, jac: np.ndarray, size: Any = None, jac_size: Any = None) -> "Dual":
        self.overflown |= not bool(np.all(np.abs(value) <= self.largest))
        self.wild |= not bool(np.all(np.abs(jac) <= self.largest))
        eps = self.work_eps
        return Dual(self.rounded(value, size, eps=eps), self.rounded(jac, jac_size, eps=eps))


class Dual(NamedTuple):
    """Numbers ``[RUNS, n]`` and their derivatives ``[RUNS, n, M]`` by all real numbers of the state, the parameters
    and the inputs."""

    value: np.ndarray
    jac: np.ndarray


class Given(NamedTuple):
    """What one step is given, in one of the two languages: leaves by number, parameters by name."""

    leaves: list[Any]
    count: Any
    inputs: list[Any]
    token: Any
    params: dict[str, Any]
    arithmetic: Arithmetic | None = None


class Node:
    """One part of a step, of `n` numbers."""

    n: int

    def jax(self, at: Given) -> Any:
        raise NotImplementedError

    def numpy(self, at: Given) -> Dual:
        raise NotImplementedError


@dataclass(frozen=True)
class Leaf(Node):
    """A leaf of the state, of a complex one the real parts and then the imaginary ones."""

    number: int
    n: int

    def jax(self, at: Given) -> Any:
        return at.leaves[self.number]

    def numpy(self, at: Given) -> Dual:
        return at.leaves[self.number]


@dataclass(frozen=True)
class Input(Node):
    number: int
    n: int

    def jax(self, at: Given) -> Any:
        return at.inputs[self.number]

    def numpy(self, at: Given) -> Dual:
        return at.inputs[self.number]


@dataclass(frozen=True)
class Param(Node):
    name: str
    n: int

    def jax(self, at: Given) -> Any:
        return at.params[self.name]

    def numpy(self, at: Given) -> Dual:
        return at.params[self.name]


@dataclass(frozen=True)
class Row(Node):
    """Of a table, the one that the token names."""

    name: str
    rows: int
    n: int

    def jax(self, at: Given) -> Any:
        return at.params[self.name][at.token]

    def numpy(self, at: Given) -> Dual:
        table = at.params[self.name]
        which = slice(int(at.token) * self.n, (int(at.token) + 1) * self.n)
        return Dual(table.value[:, which], table.jac[:, which])


@dataclass(frozen=True)
class Product(Node):
    """A matrix of parameters times a vector."""

    name: str
    n: int
    of: Node

    def jax(self, at: Given) -> Any:
        return at.params[self.name] @ self.of.jax(at)

    def numpy(self, at: Given) -> Dual:
        weights, v = at.params[self.name], self.of.numpy(at)
        shape = len(v.value), self.n, self.of.n
        matrix, by_weight = weights.value.reshape(shape), weights.jac.reshape(*shape, -1)
        size = np.abs(matrix) @ np.abs(v.value)[..., None]
        return at.arithmetic.dual(
            (matrix @ v.value[..., None])[..., 0],
            matrix @ v.jac + np.sum(by_weight * v.value[:, None, :, None], axis=2),
            size[..., 0],
            np.abs(matrix) @ np.abs(v.jac) + np.sum(np.abs(by_weight * v.value[:, None, :, None]), axis=2),
        )


UNARY: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "tanh": (jnp.tanh, np.tanh, lambda v, y: 1 - y * y),
    "relu": (jax.nn.relu, lambda v: np.maximum(v, 0), lambda v, y: (v > 0) * LONG(1)),
    "sigmoid": (jax.nn.sigmoid, lambda v: _sigmoid(v), lambda v, y: y * (1 - y)),
    "sin": (jnp.sin, np.sin, lambda v, y: np.cos(v)),
    "softplus": (jax.nn.softplus, lambda v: np.logaddexp(v, 0), lambda v, y: _sigmoid(v)),
}


def _sigmoid(v: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(v))
    return np.where(v >= 0, 1, small) / (1 + small)


@dataclass(frozen=True)
class Unary(Node):
    name: str
    n: int
    of: Node

    def jax(self, at: Given) -> Any:
        return UNARY[self.name][0](self.of.jax(at))

    def numpy(self, at: Given) -> Dual:
        _, function, slope = UNARY[self.name]
        arithmetic, (v, jac) = at.arithmetic, self.of.numpy(at)
        y = arithmetic.rounded(function(v), eps=arithmetic.work_eps)
        return arithmetic.dual(y, arithmetic.rounded(slope(v, y), eps=arithmetic.work_eps)[..., None] * jac)


@dataclass(frozen=True)
class Gate(Node):
    """The product of two parts, number by number."""

    a: Node
    b: Node
    n: int

    def jax(self, at: Given) -> Any:
        return self.a.jax(at) * self.b.jax(at)

    def numpy(self, at: Given) -> Dual:
        a, b = self.a.numpy(at), self.b.numpy(at)
        first, second = a.jac * b.value[..., None], b.jac * a.value[..., None]
        return at.arithmetic.dual(a.value * b.value, first + second, None, np.abs(first) + np.abs(second))


@dataclass(frozen=True)
class Sum(Node):
    a: Node
    b: Node
    n: int

    def jax(self, at: Given) -> Any:
        return self.a.jax(at) + self.b.jax(at)

    def numpy(self, at: Given) -> Dual:
        a, b = self.a.numpy(at), self.b.numpy(at)
        return at.arithmetic.dual(
            a.value + b.value, a.jac + b.jac, np.abs(a.value) + np.abs(b.value), np.abs(a.jac) + np.abs(b.jac)
        )


@dataclass(frozen=True)
class Times(Node):
    """A number, exact in every dtype, times a part."""

    factor: float
    of: Node
    n: int

    def jax(self, at: Given) -> Any:
        return self.factor * self.of.jax(at)

    def numpy(self, at: Given) -> Dual:
        v = self.of.numpy(at)
        return at.arithmetic.dual(self.factor * v.value, self.factor * v.jac)


@dataclass(frozen=True)
class Branch(Node):
    """`lax.cond` on the sign of a sum, or on whether the counter is even."""

    of: Node | None
    a: Node
    b: Node
    n: int

    def jax(self, at: Given) -> Any:
        which = at.count % 2 == 0 if self.of is None else jnp.sum(self.of.jax(at)) > 0
        return jax.lax.cond(which, lambda: self.a.jax(at), lambda: self.b.jax(at))

    def numpy(self, at: Given) -> Dual:
        a, b = self.a.numpy(at), self.b.numpy(at)
        if self.of is None:
            return a if at.count % 2 == 0 else b
        v = self.of.numpy(at).value
        total = at.arithmetic.rounded(v.sum(axis=1), np.abs(v).sum(axis=1), eps=at.arithmetic.work_eps)
        which = (total > 0)[:, None]
        return Dual(np.where(which, a.value, b.value), np.where(which[..., None], a.jac, b.jac))


@dataclass(frozen=True)
class Loop(Node):
    """An inner `lax.scan`, twice ``v = tanh(W v + b)``."""

    weights: str
    bias: str
    of: Node
    n: int

    def jax(self, at: Given) -> Any:
        def body(v: Any, _: None) -> tuple[Any, None]:
            return jnp.tanh(at.params[self.weights] @ v + at.params[self.bias]), None

        return jax.lax.scan(body, self.of.jax(at), length=2)[0]

    def numpy(self, at: Given) -> Dual:
        found = self.of
        for _ in range(2):
            found = Unary(
                "tanh", self.n, Sum(Product(self.weights, self.n, found), Param(self.bias, self.n), self.n)
            )
        return found.numpy(at)


@dataclass(frozen=True)
class Turn(Node):
    """``a z + conj(b z)`` of a complex leaf, number by number: holomorphic in nothing. Real parts, then imaginary."""

    name: str
    of: Node
    n: int

    def jax(self, at: Given) -> Any:
        v, (a, b) = self.of.jax(at), at.params[self.name]
        z = jax.lax.complex(v[: self.n // 2], v[self.n // 2 :])
        new = a * z + jnp.conj(b * z)
        return jnp.concatenate([new.real, new.imag])

    def numpy(self, at: Given) -> Dual:
        m = self.n // 2
        (re_a, re_b, im_a, im_b), (re, im) = _pieces(at.params[self.name], m), _pieces(self.of.numpy(at), m)
        terms = (
            [(1, re_a, re), (-1, im_a, im), (1, re_b, re), (-1, im_b, im)],
            [(1, re_a, im), (1, im_a, re), (-1, re_b, im), (-1, im_b, re)],
        )
        halves = [
            at.arithmetic.dual(
                sum(sign * a.value * b.value for sign, a, b in half),
                sum(sign * (a.jac * b.value[..., None] + b.jac * a.value[..., None]) for sign, a, b in half),
                sum(np.abs(a.value * b.value) for _, a, b in half),
                sum(np.abs(a.jac * b.value[..., None]) + np.abs(b.jac * a.value[..., None]) for _, a, b in half),
            )
            for half in terms
        ]
        return Dual(*(np.concatenate(both, axis=1) for both in zip(*halves, strict=True)))


def _pieces(whole: Dual, n: int) -> list[Dual]:
    return [Dual(whole.value[:, k : k + n], whole.jac[:, k : k + n]) for k in range(0, whole.value.shape[1], n)]


@dataclass
class Structure:
    """A step without its numbers, and all else that a compiled program depends on.

    Attributes:
      dtype: of the work, the parameters and most leaves: "float32" or "float64".
      kinds: of the floating leaves: "real", "complex", "bfloat16" or "float16".
      shapes: of these.
      nest: how the leaves, and the counter, if there is one, make a state.
      inputs: "none", "array", or "dict" (with a token).
      steps: T.
      mask, resets, own_reset_state: whether there are any.
      parts: what each leaf becomes, as real numbers.
      params: shape of each; one whose name begins with "z" is complex.
    """

    dtype: str
    kinds: list[str]
    shapes: list[tuple[int, ...]]
    nest: str
    counter: bool
    inputs: str
    steps: int
    mask: bool
    resets: bool
    own_reset_state: bool
    parts: list[Node] = field(default_factory=list)
    params: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def halves(self) -> list[str]:
        """Dtypes of leaves that have half precision."""
        return [kind for kind in self.kinds if kind in HALF]

    def eps(self, kind: str) -> float:
        """Of a leaf."""
        return float(jnp.finfo(kind if kind in HALF else self.dtype).eps)

    @property
    def sizes(self) -> list[int]:
        """Real numbers in each leaf."""
        pairs = zip(self.kinds, self.shapes, strict=True)
        return [int(np.prod(shape)) * (2 if kind == "complex" else 1) for kind, shape in pairs]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def state(self, leaves: list[Any], count: Any) -> Any:
        """The leaves in the order in which JAX has them; the counter is the last."""
        if self.nest == "array":
            return leaves[0]
        if self.nest == "tuple":
            return (*leaves, count) if self.counter else tuple(leaves)
        first, rest = leaves[0], {f"h{k}": leaf for k, leaf in enumerate(leaves[1:])}
        return {"a": first, "b": (rest, {"n": count} if self.counter else None)}

    def step(self, params: Any, state: Any, x: Any) -> Any:
        leaves = jax.tree.leaves(state)
        count = leaves.pop() if self.counter else None
        inputs, token = ([x["u"]], x["k"]) if self.inputs == "dict" else ([x], None)
        at = Given([self._real(leaf) for leaf in leaves], count, inputs, token, params)
        new = []
        for kind, shape, part in zip(self.kinds, self.shapes, self.parts, strict=True):
            v = part.jax(at)
            if kind == "complex":
                new.append(jax.lax.complex(*v.reshape(2, *shape)))
            else:
                new.append(v.reshape(shape).astype(kind if kind in HALF else self.dtype))
        return self.state(new, count + 1 if self.counter else None)

    def _real(self, leaf: Any) -> Any:
        if jnp.iscomplexobj(leaf):
            return jnp.concatenate([leaf.real.ravel(), leaf.imag.ravel()])
        return leaf.ravel().astype(self.dtype)


def draw_structure(rng: np.random.Generator) -> Structure:
    """One of the many."""

    def one(*among: Any) -> Any:
        return among[rng.integers(len(among))]

    dtype, nest = one("float32", "float64"), one("array", "tuple", "dict", "dict")
    kinds, shapes = [], []
    for _ in range(1 if nest == "array" else one(1, 2, 2, 3)):
        halves = HALF if dtype == "float32" and rng.random() < 0.3 else ()
        kinds.append(one("real", "real", "real", "complex", *halves))
        shapes.append(one((), (1,), (2,), (3,), (2, 1)) if kinds[-1] != "complex" else one((1,), (2,), ()))
    found = Structure(
        dtype=dtype,
        kinds=kinds,
        shapes=shapes,
        nest=nest,
        counter=nest != "array" and one(True, False),
        inputs=one("none", "array", "dict"),
        steps=one(1, 2, 3, 4, 5, 6, 7, 8, 9),
        mask=one(True, False),
        resets=one(True, False),
        own_reset_state=one(True, False),
    )
    found.own_reset_state &= found.resets
    grow = _Grow(found, rng)
    found.parts.extend(grow.leaf(k) for k in range(len(kinds)))
    return found


@dataclass
class _Grow:
    """What makes the parts of a structure."""

    structure: Structure
    rng: np.random.Generator

    def param(self, name: str, *shape: int) -> str:
        name = f"{name}{len(self.structure.params):02d}"
        self.structure.params[name] = shape
        return name

    def leaf(self, number: int) -> Node:
        n, kind = self.structure.sizes[number], self.structure.kinds[number]
        if kind == "complex" and self.rng.random() < 0.7:
            turned = Turn(self.param("z", 2, n // 2), Leaf(number, n), n)
            return turned if self.rng.random() < 0.5 else Sum(turned, self.part(n, 1), n)
        if self.rng.random() < 0.3:
            return Sum(Times(0.5, Leaf(number, n), n), self.part(n, 2), n)
        return self.part(n, 2)

    def part(self, n: int, depth: int) -> Node:
        how = self.rng.choice(["line", "unary", "gate", "branch", "even", "loop", "sum"]) if depth else "line"
        if how == "line":
            return self.line(n)
        if how == "gate":
            return Gate(Unary("sigmoid", n, self.line(n)), self.part(n, depth - 1), n)
        if how == "branch":
            return Branch(self.source(), self.part(n, depth - 1), self.part(n, 0), n)
        if how == "even" and self.structure.counter:
            return Branch(None, self.part(n, depth - 1), self.line(n), n)
        if how == "loop":
            return Loop(self.param("w", n, n), self.param("b", n), self.line(n), n)
        if how == "sum":
            return Sum(self.part(n, depth - 1), self.part(n, 0), n)
        return Unary(str(self.rng.choice(list(UNARY))), n, self.part(n, depth - 1))

    def line(self, n: int) -> Node:
        """A linear map of a leaf, and perhaps of another or of the input, and a bias."""
        source = self.source()
        found: Node = Product(self.param("w", n, source.n), n, source)
        more = self.rng.random()
        if more < 0.3:
            other = self.source()
            found = Sum(found, Product(self.param("w", n, other.n), n, other), n)
        elif self.structure.inputs != "none" and more < 0.8:
            found = Sum(found, Product(self.param("u", n, 2), n, Input(0, 2)), n)
        elif self.structure.inputs == "dict":
            found = Sum(found, Row(self.param("t", 4, n), 4, n), n)
        return Sum(found, Param(self.param("b", n), n), n) if self.rng.random() < 0.6 else found

    def source(self) -> Node:
        number = int(self.rng.integers(len(self.structure.sizes)))
        return Leaf(number, self.structure.sizes[number])
