"""Products as GPUs multiply single precision by default, on any device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.extend.core import Literal as JaxprLiteral

from bptt_jax.recurrence.programs import called

# Its epsilon: numbers have 10 bits behind the point.
EPSILON = 2.0**-10
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def with_tensorfloat32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose products of single precision take factors of 10 bits behind the point, as GPUs take them.

    Of the program as it stands: what differentiates within the function has its products rounded alike, what
    differentiates the function meets roundings.
    """

    def emulated(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        out = _evaluate_rounding(program, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return emulated


def _evaluate_rounding(program: Any, inputs: list[Any]) -> list[Any]:
    jaxpr, constants = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def value(v: Any) -> Any:
        return v.val if isinstance(v, JaxprLiteral) else values[v]

    for eqn in jaxpr.eqns:
        given, inner = [value(v) for v in eqn.invars], called(eqn, custom=True)
        if inner is not None:
            out = _evaluate_rounding(inner, given)
        else:
            if eqn.primitive.name in _PRODUCTS:
                given = [*map(_rounded, given[:2]), *given[2:]]
            out = eqn.primitive.bind(*given, **{k: _rounding(p) for k, p in eqn.params.items()})
            out = out if eqn.primitive.multiple_results else [out]
        values.update(zip(eqn.outvars, out, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _rounding(param: Any) -> Any:
    """Of the programs of loops and branches those that round."""
    if isinstance(param, tuple):
        return tuple(map(_rounding, param)) if any(isinstance(p, ClosedJaxpr) for p in param) else param
    if not isinstance(param, ClosedJaxpr):
        return param
    return jax.make_jaxpr(lambda *inputs: _evaluate_rounding(param, list(inputs)))(*param.in_avals)


def _rounded(a: Any) -> Any:
    if a.dtype == jnp.complex64:
        return jax.lax.complex(_rounded(a.real), _rounded(a.imag))
    return jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=10) if a.dtype == jnp.float32 else a
