"""What the program of a step, its jaxpr, tells: which result comes from where."""

from typing import Any

from jax.extend.core import Literal as JaxprLiteral

_CALLS = ("jit", "pjit", "remat2", "checkpoint", "closed_call", "core_call")
_CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call")


def called(eqn: Any, *, custom: bool = False) -> Any:
    """The program that an equation calls with all its inputs, for all its outputs; None if it calls none.

    `custom`: also one that has a derivative of its own.
    """
    if eqn.primitive.name not in _CALLS + custom * _CUSTOM_CALLS:
        return None
    return eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]


def depends(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """For every output of `jaxpr`, whether it may depend on an input that is marked True."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # a closed one; from JAX 0.11 on there is no difference
    marked = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(v: Any) -> bool:
        return not isinstance(v, JaxprLiteral) and v in marked

    for eqn in jaxpr.eqns:
        marks = [is_marked(v) for v in eqn.invars]
        program = called(eqn, custom=True)
        if program is not None:
            out = depends(program, marks)
        elif eqn.primitive.name == "cond":
            branches = [depends(branch, marks[1:]) for branch in eqn.params["branches"]]
            out = [marks[0] or any(each) for each in zip(*branches, strict=True)]
        else:
            out = [any(marks)] * len(eqn.outvars)
        marked.update(v for v, mark in zip(eqn.outvars, out, strict=True) if mark)
    return [is_marked(v) for v in jaxpr.outvars]
