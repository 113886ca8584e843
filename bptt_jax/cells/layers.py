"""Layers of steps as one step."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax.cells.sharing import recalled_function
from bptt_jax.checks import check_function, describe_shapes, shapes
from bptt_jax.results import counted
from bptt_jax.step import Input, Params, PyTree, State, Step

Output = Callable[[State], Input]


@recalled_function
def stack(*steps: Step, output: Output | Sequence[Output] | None = None) -> Step:
    """Layers as one step: at every instant the input of a layer is the new output of the layer below.

    The deep recurrence of Graves et al. 2013 (arXiv:1303.5778, eq. 10)::

        h_k^1 = step^1(params^1, h_{k-1}^1, x_k),     h_k^n = step^n(params^n, h_{k-1}^n, output(h_k^{n-1}))

    The Jacobian is block lower triangular: a layer does not act on those below. As for any step, make it once, not
    inside the loop that calls.

    Args:
      steps: the layers, from the input upwards.
      output: reads a layer's output from its state, one function for all layers or one for each (that of the
        uppermost is never called). By default a state that is one array is the output, and of a NamedTuple that
        begins with a field h (or y, of `bptt_jax.cells.intersection_rnn`), as in the atlas wherever the output is a
        vector, this field. Needed elsewhere, as ``lambda state: state[0]`` for the ``(h, c)`` of Equinox,
        ``lambda carry: carry[1]`` for the ``(c, h)`` of Flax, or what reads a vector from a state of matrices; and
        where dtypes differ, as ``lambda h: h.astype(jnp.bfloat16)``.

    Returns:
      A step whose parameters and state have one entry for each layer: a tuple, a list, or a NamedTuple, whose fields
      name the layers wherever leaves of the state have names (``gradient_flow(...).leaves``).

    Raises:
      TypeError, ValueError: there are no layers; one is no function, or `output` neither one function nor one for
        each; when the step is called, the parameters or the state are not one for each layer, or `output` is
        missing where it is needed: a layer cannot read the matrices of the one below, say.

    Example:
      >>> lower, upper = bptt.lstm(4), bptt.rnn(2)
      >>> step = bptt.stack(lower.step, upper.step)
      >>> params = lower.init(jax.random.key(0), 3), upper.init(jax.random.key(1), 4)
      >>> h0 = lower.initial_state(), upper.initial_state()
      >>> jax.tree.map(jnp.shape, bptt.unroll(step, params, h0, jnp.ones((5, 3))))
      (LSTMState(h=(5, 4), c=(5, 4)), (5, 2))
      >>> from collections import namedtuple
      >>> h0 = namedtuple("Layers", "lower upper")(*h0)
      >>> loss = lambda states: jnp.sum(states.upper[-1])
      >>> bptt.gradient_flow(step, params, h0, jnp.ones((5, 3)), loss).leaves.names
      ('lower.h', 'lower.c', 'upper')
    """
    if not steps:
        raise ValueError("steps: expected at least one layer, got none")
    for k, layer in enumerate(steps):
        check_function(f"steps[{k}]", layer, "step(params, state, x) -> state")
    outputs = _outputs(output, len(steps))

    def stacked_step(params: Params, state: State, x: Input) -> State:
        _check_layers("params", params, len(steps))
        _check_layers("state", state, len(steps))
        new: list[State] = []
        for k, layer in enumerate(steps):
            if k > 0:
                x = outputs[k - 1](new[-1])
            try:
                new.append(layer(params[k], state[k], x))
            except (TypeError, ValueError) as error:
                _check_output(k, outputs, x, fault=error)
                raise
            if shapes(new[-1]) != shapes(state[k]):
                _check_output(k, outputs, x)
            if k > 0:
                _check_dtypes(k, x, state[k], new[-1])
        return state._make(new) if hasattr(state, "_make") else type(state)(new)

    return stacked_step


def stacked(layers: Sequence[tuple[Step, Params, State]]) -> tuple[Step, Params, State]:
    """Layers with parameters and states as one, where there are several: the same step for equal ones.

    Where their dtypes differ, each takes its input in its own.
    """
    if len(layers) == 1:
        return layers[0]
    steps, params, states = zip(*layers, strict=True)
    dtypes = tuple(leaf.dtype for state in states for leaf in jax.tree.leaves(state)[:1])
    return _stack(*steps, dtypes=dtypes if len(set(dtypes)) > 1 else ()), params, states


@lru_cache  # so that what JAX has compiled is found again
def _stack(*steps: Step, dtypes: tuple[Any, ...]) -> Step:
    casts = [partial(_hidden_as, dtype) for dtype in dtypes[1:]]
    return stack(*steps, output=[*casts, _hidden] if dtypes else None)


def _outputs(output: Output | Sequence[Output] | None, layers: int) -> Sequence[Output]:
    if output is None:
        return [_hidden] * layers
    if callable(output):
        return [output] * layers
    if not isinstance(output, Sequence) or not all(map(callable, output)):
        raise TypeError(f"output: expected a function of a layer's state, or one for each layer, got {output!r}")
    if len(output) != layers:
        raise ValueError(f"output: expected one function for each of {counted(layers, 'layer')}, got {len(output)}")
    return output


def _hidden(state: State) -> Input:
    if getattr(state, "_fields", ())[:1] in (("h",), ("y",)):
        return state[0]
    if not jax.tree_util.all_leaves([state]):
        raise TypeError(
            "output: expected a function that reads a layer's output from its state, since a state is "
            f"{describe_shapes(state)}, got None"
        )
    return state


def _hidden_as(dtype: Any, state: State) -> Input:
    return jnp.asarray(_hidden(state), dtype)


def _check_dtypes(k: int, x: Input, old: State, new: State) -> None:
    """Whether layer k would give another dtype for what it is given."""
    given, kept, made = ({str(jax.typeof(leaf).dtype) for leaf in jax.tree.leaves(tree)} for tree in (x, old, new))
    if made != kept and not given & kept:
        dtypes = " and ".join(sorted(kept))
        raise TypeError(
            f"output: expected a function that gives layer {k} its input in the dtype of its state, {dtypes}, got "
            f"{' and '.join(sorted(given))} from layer {k - 1}; cast it, as in lambda h: h.astype(...)"
        )


def _check_output(k: int, outputs: Sequence[Output], x: Input, fault: Exception | None = None) -> None:
    """Whether layer k, which has failed, could read what is, by default, the whole state of the layer below."""
    if k > 0 and outputs[k - 1] is _hidden and jnp.ndim(x) > 1:
        said = "" if fault is None else f"; layer {k} says: {fault}"
        raise ValueError(
            f"output: expected a function that reads what layer {k} takes, a vector say, from the state of layer "
            f"{k - 1}, which is {list(jnp.shape(x))}, got None{said}"
        ) from fault


def _check_layers(name: str, layers: PyTree, count: int) -> None:
    if not isinstance(layers, (tuple, list)):
        raise TypeError(f"{name}: expected a tuple of {count}, one for each layer, got {type(layers).__name__}")
    if len(layers) != count:
        raise ValueError(f"{name}: expected {count}, one for each layer, got {len(layers)}")
