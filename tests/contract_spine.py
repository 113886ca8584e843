"""What the pieces give alone makes the whole as it stands, step by step, where nothing else is said."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from contract_cases import (
    Case,
    Check,
    Comparison,
    Plan,
    at_step,
    at_steps,
    floats,
    log,
    log_norms,
    loss,
    loss_args,
    same_dtypes,
    summed,
)
from registry import Entry

import bptt_jax as bptt


def check_states(
    function: Callable[..., Any], refusal: Callable[[Entry], str | None] = lambda entry: None, **options: Any
) -> Check:
    def run(case: Case) -> Iterator[Comparison]:
        for plan in case.plans:
            states, truth = function(*case.arguments(plan), **options), case.truth(plan)
            yield Comparison("states", states, truth.states)
            yield same_dtypes("states", at_step(states, 0), case.problem.state0)
        whole = function(*case.arguments(case.plans[0]), **options)
        for steps, arguments, _ in case.alone(case.plans[0]):
            yield Comparison("states of the piece", at_steps(whole, steps), function(*arguments, **options))

    return Check(run, refusal)


def check_final_state(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        yield Comparison("state", bptt.final_state(*case.arguments(plan)), at_step(case.truth(plan).states, -1))
    *_, (_, arguments, _) = case.alone(case.plans[0])
    whole = bptt.final_state(*case.arguments(case.plans[0]))
    yield Comparison("state after the last piece", whole, bptt.final_state(*arguments))


def check_jacobians(mode: Any) -> Callable[[Case], Iterator[Comparison]]:
    def run(case: Case) -> Iterator[Comparison]:
        for plan in case.plans:
            got = bptt.jacobians(*case.arguments(plan), mode=mode)
            yield Comparison("jacobians", got, case.truth(plan).jacobians)
        whole = bptt.jacobians(*case.arguments(case.plans[0]), mode=mode)
        for steps, arguments, _ in case.alone(case.plans[0]):
            yield Comparison("of the piece", at_steps(whole, steps), bptt.jacobians(*arguments, mode=mode))

    return run


def check_adjoints(case: Case) -> Iterator[Comparison]:
    """The pieces' losses, gradients and gradients of what the loss is given add up; of the states they start from,
    by where these come from."""
    for plan in case.plans:
        yield from _adjoints_against_truth(case, plan, _adjoints(case.arguments(plan), args_of(case, plan)))
    plan = case.plans[0]
    whole = _adjoints(case.arguments(plan), args_of(case, plan))
    pieces = [(steps, _adjoints(arguments, args)) for steps, arguments, args in case.alone(plan)]
    for steps, alone in pieces:
        yield Comparison("adjoints of the piece", at_steps(whole.adjoints, steps), alone.adjoints)
        yield Comparison("log norms of the piece", at_steps(whole.log_norms, steps), alone.log_norms, True)
        yield Comparison("xs_grad of the piece", at_steps(whole.xs_grad, steps), alone.xs_grad)
    first, *others = [alone for _, alone in pieces]
    later = summed([alone.state0_grad for alone in others]) if others else None
    yield Comparison("sum of losses", whole.loss, summed([alone.loss for _, alone in pieces]))
    yield Comparison("sum of params_grad", whole.params_grad, summed([alone.params_grad for _, alone in pieces]))
    readouts = [alone.args_grad["readout"] for _, alone in pieces]
    yield Comparison("sum of args_grad", whole.args_grad["readout"], summed(readouts))
    if later is None or plan.own_reset_state:
        yield Comparison("state0_grad of the first piece", whole.state0_grad, first.state0_grad)
        yield Comparison("sum of the others'", whole.reset_state_grad, later)
    else:
        total = summed([first.state0_grad, later])
        yield Comparison("sum of state0_grad", whole.state0_grad, total)


def check_adjoints_remat(case: Case) -> Iterator[Comparison]:
    for plan in case.plans:
        found = _adjoints(case.arguments(plan), args_of(case, plan), remat=2)
        yield from _adjoints_against_truth(case, plan, found)


def args_of(case: Case, plan: Plan) -> Any:
    return loss_args(plan.weights, case.dtype)


def _adjoints(arguments: tuple[Any, ...], args: Any, **options: Any) -> bptt.analysis.Adjoints:
    return bptt.adjoints(*arguments, loss, args=args, has_aux=True, inputs=True, **options)


def _adjoints_against_truth(case: Case, plan: Plan, got: bptt.analysis.Adjoints) -> Iterator[Comparison]:
    truth = case.truth(plan)
    for name in ("loss", "aux", "states", "adjoints", "params_grad", "state0_grad", "reset_state_grad"):
        yield Comparison(name, getattr(got, name), getattr(truth, name))
    yield Comparison("args_grad", got.args_grad, truth.args_grad)
    yield Comparison("xs_grad", got.xs_grad, truth.xs_grad)
    yield Comparison("log_norms", got.log_norms, log_norms(truth.adjoints), True)
    by_leaf = jax.tree.map(log_norms, truth.adjoints)
    yield Comparison("leaf_log_norms", got.leaf_log_norms, by_leaf, True)
    if jax.tree.leaves(truth.xs_grad):
        yield Comparison("xs_log_norms", got.xs_log_norms, log_norms(truth.xs_grad), True)
    yield same_dtypes("params_grad", got.params_grad, floats(case.problem.params)[0])
    yield same_dtypes("adjoints", at_step(got.adjoints, 0), floats(case.problem.state0)[0])


def check_contributions(case: Case) -> Iterator[Comparison]:
    """Shares are of the whole gradient, so the pieces alone tell them only by way of the norms."""
    for plan in case.plans:
        got = bptt.temporal_contributions(*case.arguments(plan), only_loss, args=args_of(case, plan))
        yield from contributions_against_truth(case, plan, got)
    whole = bptt.temporal_contributions(
        *case.arguments(case.plans[0]), only_loss, args=args_of(case, case.plans[0])
    )
    for steps, arguments, args in case.alone(case.plans[0]):
        alone = bptt.temporal_contributions(*arguments, only_loss, args=args)
        yield Comparison("of the piece", at_steps(whole.log_norms, steps), alone.log_norms, True)


def contributions_against_truth(
    case: Case, plan: Plan, got: bptt.analysis.TemporalContributions
) -> Iterator[Comparison]:
    by_step = case.truth(plan).contributions
    whole = by_step.sum(axis=0)
    yield Comparison("contributions", got.log_norms, log(np.linalg.norm(by_step, axis=1)), True)
    with np.errstate(invalid="ignore"):
        yield Comparison("shares", got.shares, by_step @ whole / (whole @ whole))


def only_loss(states: Any, args: Any) -> Any:
    return loss(states, args)[0]
