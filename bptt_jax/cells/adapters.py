"""Cells of other libraries as steps: the cell's own call, the state in the library's order, the weights taken out.

A library is imported where its function is called, never before.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from bptt_jax.step import Input, Params, State, Step

if TYPE_CHECKING:
    import haiku as hk
    from flax import linen, nnx

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def from_equinox(cell: Callable[[Input, State], State]) -> tuple[Step, Params]:
    """An Equinox cell as a step.

    Args:
      cell: any module called as ``cell(x, h) -> h``: `equinox.nn.GRUCell`, `equinox.nn.LSTMCell` (whose state is
        ``(h, c)``), or one's own.

    Returns:
      ``(step, params)``: `params` is the module with everything but its floating arrays taken out, so
      ``equinox.apply_updates`` and Optax work on it; `step` puts the two together again.

    Raises:
      TypeError: `cell` is no `equinox.Module` called with an input and a state.

    Example:
      >>> import equinox
      >>> step, params = bptt.from_equinox(equinox.nn.GRUCell(3, 4, key=jax.random.key(0)))
      >>> bptt.jacobians(step, params, jnp.zeros(4), jnp.ones((5, 3))).shape
      (5, 4, 4)
    """
    import equinox as eqx  # costs more than the rest of this package

    if not (isinstance(cell, eqx.Module) and _takes_two(cell)):
        raise TypeError(f"cell: expected an equinox.Module called as cell(x, h), got {_name(cell)}")
    params, static = eqx.partition(cell, eqx.is_inexact_array)

    def step(params: Params, h: State, x: Input) -> State:
        module: Any = eqx.combine(params, static)
        return module(x, h)

    return step, params


def from_nnx(cell: "nnx.Module") -> tuple[Step, Params]:
    """A Flax NNX cell as a step.

    Args:
      cell: any module called as ``cell(carry, x) -> (carry, output)``: `flax.nnx.GRUCell`, `SimpleCell`, `LSTMCell`
        and `OptimizedLSTMCell` (whose carry is ``(c, h)``), or one's own; or a `flax.nnx.RNN`, whose cell is taken.

    Returns:
      ``(step, params)``: `params` is a copy of the cell's ``nnx.state(cell, nnx.Param)``, on which Optax works and
      which ``nnx.update(cell, params)`` puts back; the state of the step is the carry, h_0 for instance
      ``cell.initialize_carry((input_size,), nnx.Rngs(0))``. All other variables stay as they are at this call. A
      cell that draws random numbers takes a key with every input, ``x = (x, key)``, and hands it to its
      ``nnx.Dropout`` as ``rngs=key``.

    Raises:
      ImportError: Flax is missing.
      TypeError: `cell` is no module called with a carry and an input, or, when the step is called, does not return
        a pair.
      ValueError: `cell` is an `nnx.RNN` that runs backwards; or, when the step is called, the cell writes to one of
        its variables (a count of random numbers drawn, statistics of a batch), which no pure function can.
    """
    try:
        from flax import nnx
    except ModuleNotFoundError as error:
        raise ImportError("from_nnx needs Flax: python -m pip install flax") from error
    if isinstance(cell, nnx.RNN):
        if cell.reverse:
            raise ValueError("cell: expected an nnx.RNN that runs forwards; give its cell, and reversed xs")
        cell = cell.cell
    if not (isinstance(cell, nnx.Module) and _takes_two(cell)):
        raise TypeError(f"cell: expected an nnx.Module called as cell(carry, x), got {_name(cell)}")
    # The variables that nnx.split gives are the cell's own: without a copy, later writes to it would be seen here.
    graphdef, params, others = jax.tree.map(lambda a: a, nnx.split(cell, nnx.Param, ...))

    def step(params: Params, carry: State, x: Input) -> State:
        module: Any = nnx.merge(graphdef, params, others, copy=True)
        before = jax.tree_util.tree_leaves_with_path(nnx.state(module))
        carry = _of_pair(module(carry, x), 0, "cell")
        after = dict(jax.tree_util.tree_leaves_with_path(nnx.state(module)))
        for path, value in before:
            if after.get(path) is not value:
                raise ValueError(
                    f"cell: expected no call to change the module, but it writes to {jax.tree_util.keystr(path)}; "
                    "switch it by cell.eval(), or give it the key of each instant in xs, x = (x, key)"
                )
        return carry

    return step, params


def from_linen(module: "linen.Module", variables: Mapping[str, Any]) -> tuple[Step, Params]:
    """A Flax Linen cell as a step.

    Args:
      module: any module called as ``module(carry, x) -> (carry, output)``: `flax.linen.GRUCell`, `MGUCell`,
        `SimpleCell`, `LSTMCell` and `OptimizedLSTMCell` (whose carry is ``(c, h)``), or one's own.
      variables: what ``module.init(key, carry, x)`` returned, or the part of a network's that belongs to the cell.

    Returns:
      ``(step, params)``: `params` is ``variables["params"]``; other collections stay as they are. The state of the
      step is the carry, h_0 for instance ``module.initialize_carry(key, (input_size,))``. A module that draws
      random numbers takes a key with every input, ``x = (x, key)``, and hands it to its ``linen.Dropout`` as
      ``rng=key``.

    Raises:
      ImportError: Flax is missing.
      TypeError: `module` is no module called with a carry and an input, or, when the step is called, does not
        return a pair; `variables` is no mapping.
      ValueError: `variables` has no collection "params".
    """
    try:
        from flax import linen
    except ModuleNotFoundError as error:
        raise ImportError("from_linen needs Flax: python -m pip install flax") from error
    if not (isinstance(module, linen.Module) and _takes_two(module)):
        raise TypeError(f"module: expected a linen.Module called as module(carry, x), got {_name(module)}")
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables: expected what module.init returns, got {_name(variables)}")
    if "params" not in variables:
        raise ValueError(f'variables: expected a collection "params", got {sorted(variables)}')
    others = {name: collection for name, collection in variables.items() if name != "params"}

    def step(params: Params, carry: State, x: Input) -> State:
        return _of_pair(module.apply({**others, "params": params}, carry, x), 0, "module")

    return step, variables["params"]


def from_haiku(make: "Callable[[], hk.RNNCore]", params: Mapping[str, Any]) -> tuple[Step, Params]:
    """A Haiku core as a step.

    Haiku builds modules inside ``hk.transform`` only, so the core comes as a function that makes it::

        make = lambda: hk.LSTM(16)
        params = hk.transform(lambda x, h: make()(x, h)).init(key, x, h0)
        h0 = hk.transform(lambda: make().initial_state(None)).apply({}, None)
        step, params = bptt.from_haiku(make, params)

    Args:
      make: returns a core called as ``core(x, state) -> (output, state)``: `hk.GRU`, `hk.VanillaRNN`, `hk.LSTM`
        (whose state has ``hidden`` and ``cell``), `hk.DeepRNN` (a tuple of its cores' states), or one's own.
      params: Haiku's parameters by module name; those of a whole network will do where the core is called there as
        here (``hk.LSTM(16, name="lstm_1")`` finds "lstm_1/linear"), the others are then ignored.

    Returns:
      ``(step, params)``, the parameters as they came. A core that draws random numbers takes a key with every
      input, ``x = (x, key)``, and hands it to ``hk.dropout``.

    Raises:
      ImportError: Haiku is missing.
      TypeError: `make` is no function that returns a core, or, when the step is called, the core does not return a
        pair; `params` is no mapping.
    """
    try:
        import haiku as hk
    except ModuleNotFoundError as error:
        raise ImportError("from_haiku needs Haiku: python -m pip install dm-haiku") from error
    expected = "make: expected a function that returns a core called as core(x, state)"
    if isinstance(make, type) or not callable(make):
        raise TypeError(f"{expected}, as lambda: hk.LSTM(16), got {_name(make)}")
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a mapping of Haiku's parameters by module name, got {_name(params)}")
    if any(p.default is p.empty and p.kind not in _VARIABLE for p in inspect.signature(make).parameters.values()):
        raise TypeError(f"{expected}, without arguments, got one that takes them")
    core = hk.transform(make).apply(params, None)
    if not _takes_two(core):
        raise TypeError(f"{expected}, got one that returns {_name(core)}")
    call = hk.transform(lambda x, state: make()(x, state))

    def step(params: Params, state: State, x: Input) -> State:
        return _of_pair(call.apply(params, None, x, state), 1, "make")

    return step, params


def _takes_two(module: Any) -> bool:
    """Whether a call needs two arguments, as that of a cell; of a layer it needs one."""
    if not callable(module):
        return False
    parameters = inspect.signature(module).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in _VARIABLE]
    return len(needed) == 2 or any(p.kind is _VARIABLE[0] for p in parameters)


def _of_pair(result: Any, index: int, name: str) -> State:
    if not (isinstance(result, tuple) and len(result) == 2):
        pair = ("(carry, output)", "(output, state)")[index]
        raise TypeError(f"{name}: expected a cell that returns {pair}, got {_name(result)}")
    return result[index]


def _name(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
