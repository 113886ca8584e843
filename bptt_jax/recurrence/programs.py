"""What the program of a step, its jaxpr, tells: which result comes from where."""

import math
from collections.abc import Iterable, Iterator
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal as JaxprLiteral

from bptt_jax.step import is_differentiable

_COMPILED = ("jit", "pjit")
_CALLS = (*_COMPILED, "remat2", "checkpoint", "closed_call", "core_call")
_CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call")
_SAME_AXES = ("convert_element_type", "slice", "split", "mul", "div", "neg", "copy", "real", "imag")


def called(eqn: Any, *, custom: bool = False) -> Any:
    """The program that an equation calls with all its inputs, for all its outputs; None if it calls none.

    `custom`: also one that has a derivative of its own.
    """
    if eqn.primitive.name not in _CALLS + custom * _CUSTOM_CALLS:
        return None
    return eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All of a program, and of the programs within."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield from _unfolded(eqn)


def _unfolded(eqn: Any) -> Iterator[Any]:
    def is_program(value: Any) -> bool:
        return hasattr(value, "jaxpr") or hasattr(value, "eqns")

    yield eqn
    for value in jax.tree.leaves(eqn.params, is_leaf=is_program):
        if is_program(value):
            yield from equations(value)


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
        elif eqn.primitive.name == "scan":
            out = _through_scan(eqn, marks)
        elif eqn.primitive.name == "while":
            out = _through_while(eqn, marks)
        else:
            out = [any(marks)] * len(eqn.outvars)
        marked.update(v for v, mark in zip(eqn.outvars, out, strict=True) if mark)
    return [is_marked(v) for v in jaxpr.outvars]


def nesting(program: Any) -> int:
    """How deep calls of compiled functions lie within each other."""
    jaxpr = getattr(program, "jaxpr", program)
    return max((1 + nesting(e.params["jaxpr"]) for e in jaxpr.eqns if e.primitive.name in _COMPILED), default=0)


def opened(program: Any) -> Any:
    """A closed program that, traced again, has what such functions do in the place of the outermost calls."""

    def inlined(eqn: Any) -> Any:
        if eqn.primitive.name not in _COMPILED:
            return eqn
        kind = type(eqn.params["inline"])  # JAX 0.12 has more than two
        return eqn.replace(params=eqn.params | {"inline": True if kind is bool else kind.JAX_EARLY})

    return program.replace(jaxpr=program.jaxpr.replace(eqns=list(map(inlined, program.jaxpr.eqns))))


def divided(program: Any, varies: list[bool]) -> tuple[Any, Any]:
    """A closed program in two, for a loop: what is the same in every round, and the rest.

    What the first makes is not much larger than what it is made of: a bias is not broadcast before the loop. Nor is it
    coarser: cotangents of weights in float32 that the step rounds to half precision are added up in float32.

    Args:
      program: a jaxpr.
      varies: of every input, whether it changes from round to round.

    Returns:
      ``(before, rest)``, programs: the first takes the inputs that do not change; the other what that returns, and
      then the inputs that do.
    """
    jaxpr = getattr(program, "jaxpr", program)
    moving = [v for v, mark in zip(jaxpr.invars, varies, strict=True) if mark]
    fixed = [v for v, mark in zip(jaxpr.invars, varies, strict=True) if not mark]
    changing = set(moving)
    before: list[int] = []
    rest: list[int] = []
    finest = {v: max(_bits([v]), default=0) for v in (*fixed, *jaxpr.constvars)}  # bits of what each is made of
    coarser: set[Any] = set()
    for place, eqn in enumerate(jaxpr.eqns):
        given = _named(eqn.invars)
        if eqn.effects or any(v in changing for v in given):
            changing.update(eqn.outvars)
            rest.append(place)
            continue
        before.append(place)
        bits = max((finest[v] for v in given), default=0)
        finest.update((v, bits) for v in eqn.outvars)
        rounded = min((b for each in _unfolded(eqn) for b in _bits(each.outvars)), default=bits) < bits
        if rounded or any(v in coarser for v in given):
            coarser.update(eqn.outvars)
    made_by = {v: place for place in before for v in jaxpr.eqns[place].outvars}
    asked = [v for place in rest for v in _named(jaxpr.eqns[place].invars)] + _named(jaxpr.outvars)
    wanted: set[Any] = set()
    again: set[int] = set()
    while asked:
        v = asked.pop()
        if v not in made_by or not (v in coarser or _enlarges(jaxpr.eqns[made_by[v]])):
            wanted.add(v)
        elif made_by[v] not in again:
            again.add(made_by[v])
            asked += _named(jaxpr.eqns[made_by[v]].invars)
    made = [v for v in (*fixed, *made_by) if v in wanted]

    def part(inputs: list[Any], places: Iterable[int], outputs: list[Any]) -> Any:
        unnamed = jaxpr.debug_info.with_unknown_names()
        equations = [jaxpr.eqns[place] for place in places]
        inner = program.jaxpr.replace(invars=inputs, eqns=equations, outvars=outputs, debug_info=unnamed)
        return program.replace(jaxpr=inner)

    return part(fixed, before, made), part([*made, *moving], sorted({*rest, *again}), jaxpr.outvars)


def _named(variables: Any) -> list[Any]:
    return [v for v in variables if not isinstance(v, JaxprLiteral)]


def _bits(variables: Iterable[Any]) -> list[int]:
    """Of each number of those that are floating."""
    return [jnp.finfo(v.aval.dtype).bits for v in variables if is_differentiable(v.aval)]


def _enlarges(eqn: Any) -> bool:
    out, given = (sum(math.prod(v.aval.shape) for v in of) for of in (eqn.outvars, _named(eqn.invars)))
    return out > 2 * given


def _through_scan(eqn: Any, marks: list[bool]) -> list[bool]:
    body = eqn.params["jaxpr"]

    def whole(outside: list[Any], inside: list[Any]) -> int:
        """How many are the same within the body; of the others, which come last, it has a slice for each round. (What
        versions of JAX call their numbers differs.)"""
        return sum(len(v.aval.shape) == len(aval.shape) for v, aval in zip(outside, inside, strict=True))

    count = whole(eqn.outvars, body.out_avals)
    first = whole(eqn.invars, body.in_avals) - count
    return _through_rounds(body, marks[:first], marks[first : first + count], marks[first + count :])


def _through_while(eqn: Any, marks: list[bool]) -> list[bool]:
    condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    count = len(eqn.outvars)
    asked, constants = marks[: len(condition.in_avals) - count], marks[len(condition.in_avals) - count : -count]
    out = _through_rounds(body, constants, marks[-count:], [])
    rounds = any(depends(condition, asked + out))
    return [rounds or mark for mark in out]


def _through_rounds(body: Any, before: list[bool], carried: list[bool], after: list[bool]) -> list[bool]:
    """`depends` of a loop with this body, until that marks no more of what is carried."""
    while True:
        out = depends(body, before + carried + after)
        carries = [a or b for a, b in zip(carried, out, strict=False)]
        if carries == carried:
            return carries + out[len(carries) :]
        carried = carries


def come_from(jaxpr: Any, outputs: list[bool]) -> list[bool]:
    """From which of its outputs the marked ones of a step may come, through any number of steps; from themselves too.

    `jaxpr`: of the step, whose last inputs are its outputs at the step before.
    """
    places = range(len(outputs))
    others = [False] * (len(jaxpr.in_avals) - len(outputs))
    goes_to = {k: depends(jaxpr, others + [i == k for i in places]) for k in places if not outputs[k]}
    found = list(outputs)
    while more := [k for k, ends in goes_to.items() if not found[k] and any(map(and_, ends, found))]:
        found = [marked or k in more for k, marked in enumerate(found)]
    return found


def multiplied_axes(jaxpr: Any, count: int) -> dict[int, int]:
    """Of the first `count` inputs those that are a factor in a product of matrices, and the axis summed over there;
    where there are several products, of the first. Within loops none is found."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    marks = [(k, tuple(range(len(v.aval.shape)))) for k, v in enumerate(jaxpr.invars[:count])]
    return _multiplied(jaxpr, [*marks, *[None] * (len(jaxpr.invars) - count)])


def _multiplied(jaxpr: Any, inputs: list[tuple[int, tuple[int, ...]] | None]) -> dict[int, int]:
    """`inputs`: which of the first ones it is, and where its axes have come from."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    places = {v: mark for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark is not None}
    found: dict[int, int] = {}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        marks = [None if isinstance(v, JaxprLiteral) else places.get(v) for v in eqn.invars]
        if (program := called(eqn, custom=True)) is not None:
            found = _multiplied(program, marks) | found
        elif name == "cond":
            for branch in eqn.params["branches"]:
                found = _multiplied(branch, marks[1:]) | found
        elif name == "dot_general":
            for mark, axes in zip(marks, eqn.params["dimension_numbers"][0], strict=True):
                if mark is not None and len(axes) == 1:
                    found.setdefault(mark[0], mark[1][axes[0]])
        elif name == "transpose" and marks[0] is not None:
            places[eqn.outvars[0]] = marks[0][0], tuple(marks[0][1][k] for k in eqn.params["permutation"])
        elif name in _SAME_AXES:
            mark = next((m for m in marks if m is not None), None)
            places.update((v, mark) for v in eqn.outvars if mark is not None and len(v.aval.shape) == len(mark[1]))
    return found
