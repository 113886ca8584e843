"""Cells of other libraries as steps: the cell's own call, the state in the library's order, the weights taken out.

A library is imported where its function is called, never before.

Which argument of a call comes first differs: Flax calls ``cell(carry, x)``, Equinox, Haiku and Spyx call
``cell(x, state)``, and a module of one's own may do either, in any of them. Called the wrong way round many would
run. So the names of the arguments decide, then the shapes; where neither can, it is refused until `order` says it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from bptt_jax.checks import check_choice
from bptt_jax.step import Input, Params, State, Step

if TYPE_CHECKING:
    import haiku as hk
    from flax import linen, nnx

Order = Literal["state first", "input first"]

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_WITHOUT_KEY = re.compile(r"PRNG|requires a key")  # in the words of Flax, Haiku and Equinox
# How much a name speaks for the state, or, below zero, for the input; x is the input beside h or V, but in control
# it is the state, beside u.
_SPEAKS = {
    **dict.fromkeys(("carry", "state", "states", "hidden", "h", "hx", "hc", "memory"), 2),
    **dict.fromkeys(("v", "vt", "vi", "vin", "mem", "membrane"), 1),
    **dict.fromkeys(("x", "xs", "xt"), -1),
    **dict.fromkeys(("input", "inputs", "obs", "observation", "observations", "token", "tokens"), -2),
}


def from_equinox(cell: Callable[[Any, Any], Any], *, order: Order | None = None) -> tuple[Step, Params]:
    """An Equinox cell as a step.

    Args:
      cell: any module called as ``cell(x, h)`` or ``cell(h, x)``, or a method of one: `equinox.nn.GRUCell`,
        `equinox.nn.LSTMCell` (whose state is ``(h, c)``), or one's own. What it returns is the new state, or a pair
        with it, which is told by the shapes.
      order: whether the call has the "state first" or the "input first", where neither the names of its arguments
        nor the shapes tell. A pair that is returned has then the state at the same place.

    Returns:
      ``(step, params)``: `params` is the module with everything but its floating arrays taken out, so
      ``equinox.apply_updates`` and Optax work on it; `step` puts the two together again.

    Raises:
      TypeError: `cell` is no `equinox.Module` called with an input and a state.
      ValueError: when the step is called, both orders are possible, or of a pair that is returned both may be the
        state, and `order` is missing.

    Example:
      >>> import equinox
      >>> step, params = bptt.from_equinox(equinox.nn.GRUCell(3, 4, key=jax.random.key(0)))
      >>> bptt.jacobians(step, params, jnp.zeros(4), jnp.ones((5, 3))).shape
      (5, 4, 4)
    """
    import equinox as eqx  # costs more than the rest of this package

    if not (isinstance(cell, eqx.Module) and _takes_two(cell)):
        raise TypeError(f"cell: expected an equinox.Module called as cell(x, h), got {_name(cell)}")
    told, order = order is not None, _order(cell, order)
    params, static = eqx.partition(cell, eqx.is_inexact_array)

    def step(params: Params, h: State, x: Input) -> State:
        module: Any = eqx.combine(params, static)
        # Equinox has no layers that would say where a state stands in a pair; Flax and Haiku have.
        return _advance("cell", module, h, x, order, "input first", paired=told)

    return step, params


def from_nnx(cell: "nnx.Module", *, order: Order | None = None) -> tuple[Step, Params]:
    """A Flax NNX cell as a step.

    Args:
      cell: any module called as ``cell(carry, x) -> (carry, output)``: `flax.nnx.GRUCell`, `SimpleCell`, `LSTMCell`
        and `OptimizedLSTMCell` (whose carry is ``(c, h)``), or one's own; or one called as
        ``cell(x, state) -> (output, state)``, like those of Spyx; or a `flax.nnx.RNN`, whose cell is taken. It may
        return the new state alone.
      order: whether the call has the "state first" or the "input first", where neither the names of its arguments
        nor the shapes tell. A pair that is returned has the state at the same place.

    Returns:
      ``(step, params)``: `params` is a copy of the cell's ``nnx.state(cell, nnx.Param)``, on which Optax works and
      which ``nnx.update(cell, params)`` puts back; the state of the step is the carry, h_0 for instance
      ``cell.initialize_carry((input_size,), nnx.Rngs(0))``. All other variables stay as they are at this call. A
      cell that draws random numbers takes a key with every input, ``x = (x, key)``, and hands it to its
      ``nnx.Dropout`` as ``rngs=key``.

    Raises:
      ImportError: Flax is missing.
      TypeError: `cell` is no module called with a carry and an input, or, when the step is called, does not return
        a state.
      ValueError: `cell` is an `nnx.RNN` that runs backwards; or, when the step is called, both orders are possible,
        or the cell writes to one of its variables or attributes (a count of random numbers drawn, statistics of a
        batch), which no pure function can. What it sows is dropped.
    """
    try:
        from flax import nnx
    except ModuleNotFoundError as error:
        raise ImportError("from_nnx needs Flax: python -m pip install flax") from error
    if isinstance(cell, nnx.RNN):
        if cell.reverse:
            raise ValueError("cell: expected an nnx.RNN that runs forwards; give its cell, and reversed xs")
        if type(cell).__call__ is not nnx.RNN.__call__:
            raise TypeError(f"cell: expected the call of nnx.RNN, got {_name(cell)}, which has one of its own")
        cell = cell.cell
    if not (isinstance(cell, nnx.Module) and _takes_two(cell)):
        raise TypeError(f"cell: expected an nnx.Module called as cell(carry, x), got {_name(cell)}")
    order = _order(cell, order)
    cell = nnx.clone(cell)  # or later writes to it would be seen here
    nnx.pop(cell, nnx.Intermediate)
    graphdef, params, others = nnx.split(cell, nnx.Param, ...)

    def step(params: Params, carry: State, x: Input) -> State:
        def call(first: Any, second: Any) -> Any:
            module: Any = nnx.merge(graphdef, params, others, copy=True)
            before, attributes = jax.tree_util.tree_leaves_with_path(nnx.state(module)), _attributes(module)
            result = module(first, second)
            nnx.pop(module, nnx.Intermediate)
            after = dict(jax.tree_util.tree_leaves_with_path(nnx.state(module)))
            for path, value in before:
                if after.get(path) is not value:
                    at = jax.tree_util.keystr(path)
                    raise ValueError(
                        f"cell: expected no call to change the module, but it writes to {at}; switch it by "
                        "cell.eval(), or give it the key of each instant in xs, x = (x, key)"
                    )
            now = _attributes(module)
            for at in now.keys() | attributes.keys():
                if now.get(at) is not attributes.get(at):
                    raise ValueError(
                        f"cell: expected no call to change the module, but it changes its attribute {at}; make what it "
                        "remembers a part of the carry"
                    )
            return result

        return _advance("cell", call, carry, x, order, "state first")

    return step, params


def from_linen(
    module: "linen.Module", variables: Mapping[str, Any], *, order: Order | None = None
) -> tuple[Step, Params]:
    """A Flax Linen cell as a step.

    Args:
      module: any module called as ``module(carry, x) -> (carry, output)``: `flax.linen.GRUCell`, `MGUCell`,
        `SimpleCell`, `LSTMCell` and `OptimizedLSTMCell` (whose carry is ``(c, h)``), or one's own; or as
        ``module(x, state) -> (output, state)``. It may return the new state alone.
      variables: what ``module.init(key, carry, x)`` returned, or the part of a network's that belongs to the cell.
      order: whether the call has the "state first" or the "input first", where neither the names of its arguments
        nor the shapes tell. A pair that is returned has the state at the same place.

    Returns:
      ``(step, params)``: `params` is ``variables["params"]``; other collections stay as they are. The state of the
      step is the carry, h_0 for instance ``module.initialize_carry(key, (input_size,))``. A module that draws
      random numbers takes a key with every input, ``x = (x, key)``, and hands it to its ``linen.Dropout`` as
      ``rng=key``.

    Raises:
      ImportError: Flax is missing.
      TypeError: `module` is no module called with a carry and an input, or, when the step is called, does not
        return a state; `variables` is no mapping.
      ValueError: `variables` has no collection "params"; or, when the step is called, both orders are possible.
    """
    try:
        from flax import linen
    except ModuleNotFoundError as error:
        raise ImportError("from_linen needs Flax: python -m pip install flax") from error
    if not (isinstance(module, linen.Module) and _takes_two(module)):
        way = "; give its cell, with the cell's part of the variables" if isinstance(module, linen.RNN) else ""
        raise TypeError(f"module: expected a linen.Module called as module(carry, x), got {_name(module)}{way}")
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables: expected what module.init returns, got {_name(variables)}")
    if "params" not in variables:
        raise ValueError(f'variables: expected a collection "params", got {sorted(variables)}')
    order = _order(module, order)
    others = {name: collection for name, collection in variables.items() if name != "params"}

    def step(params: Params, carry: State, x: Input) -> State:
        def call(first: Any, second: Any) -> Any:
            return module.apply({**others, "params": params}, first, second)

        return _advance("module", call, carry, x, order, "state first")

    return step, variables["params"]


def from_haiku(
    make: "Callable[[], hk.RNNCore]",
    params: Mapping[str, Any] | tuple[Mapping[str, Any], Mapping[str, Any]],
    *,
    order: Order | None = None,
) -> tuple[Step, Params]:
    """A Haiku core as a step.

    Haiku builds modules inside ``hk.transform`` only, so the core comes as a function that makes it::

        make = lambda: hk.LSTM(16)
        params = hk.transform(lambda x, h: make()(x, h)).init(key, x, h0)
        h0 = hk.transform(lambda: make().initial_state(None)).apply({}, None)
        step, params = bptt.from_haiku(make, params)

    Args:
      make: returns a core called as ``core(x, state) -> (output, state)``: `hk.GRU`, `hk.VanillaRNN`, `hk.LSTM`
        (whose state has ``hidden`` and ``cell``), `hk.DeepRNN` (a tuple of its cores' states), or one's own; or as
        ``core(state, x) -> (state, output)``. It may return the new state alone.
      params: Haiku's parameters by module name; those of a whole network will do where the core is called there as
        here (``hk.LSTM(16, name="lstm_1")`` finds "lstm_1/linear"), the others are then ignored. Or the pair
        ``(params, state)`` of ``hk.transform_with_state``: the state stays as it is.
      order: whether the call has the "state first" or the "input first", where neither the names of its arguments
        nor the shapes tell. A pair that is returned has the state at the same place.

    Returns:
      ``(step, params)``, the parameters as they came, without the state. A core that draws random numbers takes a key
      with every input, ``x = (x, key)``, and hands it to ``hk.dropout``.

    Raises:
      ImportError: Haiku is missing.
      TypeError: `make` is no function that returns a core, or, when the step is called, the core does not return a
        state; `params` is no mapping, nor a pair of them.
      ValueError: when the step is called, both orders are possible, or the core sets a state of Haiku's (a count, the
        statistics of a batch), which no pure function can.
    """
    try:
        import haiku as hk
    except ModuleNotFoundError as error:
        raise ImportError("from_haiku needs Haiku: python -m pip install dm-haiku") from error
    expected = "make: expected a function that returns a core called as core(x, state)"
    if isinstance(make, type) or not callable(make):
        raise TypeError(f"{expected}, as lambda: hk.LSTM(16), got {_name(make)}")
    params, kept = params if isinstance(params, tuple) and len(params) == 2 else (params, {})
    if not (isinstance(params, Mapping) and isinstance(kept, Mapping)):
        raise TypeError(f"params: expected a mapping of Haiku's parameters by module name, got {_name(params)}")
    if any(p.default is p.empty and p.kind not in _VARIABLE for p in inspect.signature(make).parameters.values()):
        raise TypeError(f"{expected}, without arguments, got one that takes them")
    core, _ = hk.transform_with_state(make).apply(params, kept, None)
    if not _takes_two(core):
        raise TypeError(f"{expected}, got one that returns {_name(core)}")
    order = _order(core, order)

    def refuse(_: Any, __: Any, context: Any) -> Any:
        raise ValueError(
            f"make: expected a core that sets no state of Haiku's, got one that sets {context.full_name}; make what it "
            "remembers a part of its own state, or switch it to evaluation"
        )

    def apply(first: Any, second: Any) -> Any:
        with hk.custom_setter(refuse):
            return make()(first, second)

    call = hk.transform_with_state(apply)

    def step(params: Params, state: State, x: Input) -> State:
        return _advance(
            "make", lambda *both: call.apply(params, kept, None, *both)[0], state, x, order, "input first"
        )

    return step, params


def _attributes(module: "nnx.Module") -> dict[str, Any]:
    """Of an NNX module and those inside, but for what Flax notes of them."""
    from flax import nnx

    return {
        ".".join(map(str, (*path, name))): value
        for path, inner in nnx.iter_graph(module)
        if isinstance(inner, nnx.Module)
        for name, value in vars(inner).items()
        if not name.startswith("_pytree__")
    }


def _takes_two(module: Any) -> bool:
    """Whether a call takes two arguments, as that of a cell; of a layer it takes one, and options."""
    return callable(module) and (_first_two(module) != () or _takes_any(module))


def _takes_any(module: Any) -> bool:
    return any(p.kind is _VARIABLE[0] for p in inspect.signature(module).parameters.values())


def _first_two(module: Any) -> tuple[str, ...]:
    """The names of the two arguments that a call needs, or of one that it needs and a state that it can make."""
    parameters = inspect.signature(module).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in _VARIABLE]
    places = [p.name for p in parameters if p.kind in _POSITIONAL][:2]
    made = len(places) == 2 and needed == places[:1] and _speaks(places[1]) == 2
    return tuple(places) if made or (needed == places and len(places) == 2) else ()


def _speaks(name: str) -> int:
    words = [word.rstrip("0123456789") for word in re.split("_+", name.lower())]
    found = {_SPEAKS[word] for word in words if word in _SPEAKS}
    return found.pop() if len(found) == 1 else 0


def _order(module: Any, order: Order | None) -> Order | None:
    """As it was given, or as the names of the arguments tell; None if they do not."""
    if order is not None:
        return check_choice("order", order, "state first", "input first")
    names = _first_two(module)
    if not names:
        return None
    first, second = map(_speaks, names)
    if abs(first - second) < 2:
        return None
    return "state first" if first > second else "input first"


def _shapes(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jnp.shape(leaf) for leaf in leaves]


def _advance(
    name: str,
    call: Callable[[Any, Any], Any],
    state: State,
    x: Input,
    order: Order | None,
    usual: Order,
    *,
    paired: bool = True,
) -> State:
    """The new state of ``call(state, x)``, or of ``call(x, state)``, whichever `order` says.

    Where it does not, the order that gives a state like the old one; the library's `usual` one where neither does,
    for its message. `paired`: a pair has the state where the call has it, whatever the shapes.
    """
    if order is None:
        orders: tuple[Order, Order] = ("state first", "input first")
        possible = [each for each in orders if _fits(name, call, state, x, each)]
        if len(possible) == 2:
            raise ValueError(
                f"{name}: expected a call that tells its state from its input by the names of its arguments or by "
                f'their shapes, got one that does not; give order="{orders[0]}" or order="{orders[1]}"'
            )
        order = possible[0] if possible else usual
    first = order == "state first"
    try:
        result = call(state, x) if first else call(x, state)
    except Exception as error:
        if _WITHOUT_KEY.search(str(error)):
            error.add_note(
                f"{name}: a step draws no random numbers itself: let the cell take the key of each instant with its "
                "input, x = (x, key), or switch dropout off"
            )
        raise
    if _shapes(result)[0] == _shapes(state)[0]:
        return result
    if not (isinstance(result, tuple) and len(result) == 2):
        pair = "(carry, output)" if first else "(output, state)"
        raise TypeError(f"{name}: expected a cell that returns {pair}, or the state alone, got {_name(result)}")
    mine, other = result if first else result[::-1]
    if not paired and mine is not other and _shapes(mine) == _shapes(other) == _shapes(state):
        raise ValueError(
            f"{name}: expected the state alone, or a pair whose shapes tell which is the state, got two alike; with "
            f'order="{order}" it is the {"first" if first else "second"}'
        )
    return other if _shapes(other) == _shapes(state) != _shapes(mine) else mine


def _fits(name: str, call: Callable[[Any, Any], Any], state: State, x: Input, order: Order) -> bool:
    try:
        new = jax.eval_shape(lambda state, x: _advance(name, call, state, x, order, order), state, x)
    except Exception:
        return False
    return _shapes(new) == _shapes(state)


def _name(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
