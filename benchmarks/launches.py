"""What would a GPU have to do for each function, at least? Launches, operations and bytes, counted from its program.

The counts are of the function's jaxpr, loops as often as they run, and are lower bounds of what XLA makes of it: a
product of matrices, a reduction, a sort, a gather or a routine of a library is a kernel of its own; all elementwise
operations of the body of one loop are taken for one kernel, and for no bytes, as if they were always fused with what
comes before. A product's operands and result are read and written once; what stays in a cache between two kernels
would be less. A `while` loop counts once, and is named, since its rounds depend on the numbers; of branches the
dearest counts.

What these need at the least on an H100 SXM stands beside: 67 TFLOP/s in float32, 3.35 TB/s (NVIDIA, H100 data sheet),
and 2 microseconds from one small kernel to the next. The largest of the three is the limit. No GPU is needed, and
nothing here is a measurement of one.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from measure import parser, print_table, save

import bptt_jax as bptt
from bptt_jax.linalg import spectra

FLOPS, BYTES, LAUNCH = 67e12, 3.35e12, 2e-6  # per second, per second, seconds
# A kernel each, of which the operations are not counted: their memory is what they cost.
MOVES = {
    "gather",
    "scatter",
    "scatter-add",
    "sort",
    "cumsum",
    "dynamic_update_slice",
    "argmax",
    "argmin",
    "threefry2x32",
}
MOVES |= {"random_bits"}
LIBRARY = {
    "svd",
    "eig",
    "eigh",
    "lu",
    "geqrf",
    "householder_product",
    "qr",
    "triangular_solve",
    "schur",
    "cholesky",
}


class Cost(NamedTuple):
    """At least.

    Attributes:
      rounds: of loops that wait for each other.
      kernels: launched, calls of libraries among them.
      calls: of a library's routine.
      flops: of products of matrices and reductions.
      bytes: read and written by kernels that no fusion saves.
      open: loops of unknown length, of which one round counts.
    """

    rounds: int = 0
    kernels: int = 0
    calls: int = 0
    flops: int = 0
    bytes: int = 0
    open: int = 0

    def __add__(self, other: Any) -> "Cost":
        return Cost(*map(operator.add, self, other))

    def times(self, count: int) -> "Cost":
        return Cost(*(count * a for a in self))

    @property
    def seconds(self) -> dict[str, float]:
        return {"launches": LAUNCH * self.kernels, "flops": self.flops / FLOPS, "bytes": self.bytes / BYTES}


def size(variable: Any) -> int:
    return math.prod(variable.aval.shape) * getattr(variable.aval.dtype, "itemsize", 4)


def moved(equation: Any) -> int:
    return sum(map(size, [*equation.invars, *equation.outvars]))


def cost_of(jaxpr: Any) -> Cost:
    """Of one run of it."""
    total, elementwise = _cost(jaxpr)
    return total + Cost(kernels=elementwise)


def _cost(jaxpr: Any) -> tuple[Cost, bool]:
    """Without the kernel of its elementwise operations, and whether it has any."""
    total, elementwise = Cost(), False
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name == "scan":
            body = cost_of(given["jaxpr"].jaxpr)
            total += (body + Cost(rounds=1)).times(given["length"])
        elif name == "while":
            body = cost_of(given["body_jaxpr"].jaxpr) + cost_of(given["cond_jaxpr"].jaxpr)
            total += body + Cost(rounds=1, open=1)
        elif name == "cond":
            branches = [cost_of(branch.jaxpr) for branch in given["branches"]]
            if platforms := given.get("branches_platforms"):
                branches = [b for b, p in zip(branches, platforms, strict=True) if p is None or "cuda" in p][:1]
            total += max(branches, key=lambda cost: max(cost.seconds.values()))
        elif name == "dot_general":
            (contracted, _), _ = given["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            flops = 2 * inner * math.prod(equation.outvars[0].aval.shape)
            total += Cost(kernels=1, flops=flops, bytes=moved(equation))
        elif name.startswith("reduce_"):
            total += Cost(kernels=1, flops=math.prod(equation.invars[0].aval.shape), bytes=moved(equation))
        elif name in MOVES:
            total += Cost(kernels=1, bytes=moved(equation))
        elif name in LIBRARY:
            total += Cost(kernels=1, calls=1, bytes=moved(equation))
        elif inner := [j for j in jax.tree.leaves(list(given.values()), is_leaf=is_jaxpr) if is_jaxpr(j)]:
            cost, any_within = _cost(getattr(inner[0], "jaxpr", inner[0]))
            total, elementwise = total + cost, elementwise or any_within
        else:
            elementwise = True
    return total, elementwise


def is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def functions(width: int, length: int, batch: int) -> dict[str, Callable[..., Any]]:
    """Of a GRU, a batch of sequences each."""
    cell = bptt.gru(width)
    h0 = cell.initial_state()

    def loss(states: Any) -> Any:
        return jnp.mean(states[-1] ** 2)

    def batched(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, xs: jax.vmap(lambda x: function(params, x))(xs)

    one = {
        "value_and_grad": lambda p, x: jax.value_and_grad(lambda p: loss(bptt.unroll(cell.step, p, h0, x)))(p),
        "adjoints": lambda p, x: bptt.adjoints(cell.step, p, h0, x, loss),
        "jacobians": lambda p, x: bptt.jacobians(cell.step, p, h0, x),
        "gradient_flow": lambda p, x: bptt.gradient_flow(cell.step, p, h0, x, loss),
        "gradient_flow, no spectra": lambda p, x: bptt.gradient_flow(cell.step, p, h0, x, loss, spectra=False),
        "gradient_flow, num=2": lambda p, x: bptt.gradient_flow(cell.step, p, h0, x, loss, num=2),
        "lyapunov_exponents, 4": lambda p, x: bptt.lyapunov_exponents(cell.step, p, h0, x, num=4),
        "deer": lambda p, x: bptt.deer(cell.step, p, h0, x).states,
        "tbptt": lambda p, x: bptt.estimators.tbptt(cell.step, p, h0, x, loss, k1=length // 4, k2=length // 2),
    }
    params = jax.eval_shape(lambda key: cell.init(key, width), jax.random.key(0))
    xs = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    return {name: (lambda f=f: cost_of(jax.make_jaxpr(batched(f))(params, xs).jaxpr)) for name, f in one.items()}


def main() -> None:
    a = parser(__doc__).parse_args()
    width, length, batch = (16, 20, 2) if a.quick else (128, 1000, 64)
    setattr(spectra, "_gpu_is_here", lambda: True)  # noqa: B010 - what is traced are the routes that it takes there
    rows = []
    for name, count in functions(width, length, batch).items():
        cost = count()
        limit = max(cost.seconds, key=lambda kind: cost.seconds[kind])
        rows.append({"function": name, **cost._asdict(), "seconds": cost.seconds, "limit": limit})
    head = (
        "function",
        "rounds",
        "kernels",
        "library",
        "GFLOP",
        "GB",
        "launches, ms",
        "flops, ms",
        "bytes, ms",
        "limit",
    )
    table = [
        (
            r["function"] + (" (a round)" if r["open"] else ""),
            *(r[k] for k in ("rounds", "kernels", "calls")),
            r["flops"] / 1e9,
            r["bytes"] / 1e9,
            *(1e3 * r["seconds"][k] for k in ("launches", "flops", "bytes")),
            r["limit"],
        )
        for r in rows
    ]
    print_table(f"At least, GRU of {width} units, T = {length}, {batch} sequences", head, table)
    save(a.out, "launches", {"quick": a.quick, "width": width, "length": length, "batch": batch}, rows)


if __name__ == "__main__":
    main()
