"""One training loop: scanned in chunks on the device, seeds side by side.

Weights and sequences are functions of the seed and the number of the update, so a run that is stopped and resumed
from a checkpoint draws what it would have drawn. (An optimiser that draws noise has a key of its own, the same for
all seeds.)
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from enum import IntEnum, unique
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bptt_jax.analysis.window import AdaptiveWindow
from bptt_jax.checks import call_user_function, check_positive_finite, check_positive_int, check_scalar
from bptt_jax.experiments import streams
from bptt_jax.experiments.network import Network, NetworkParams
from bptt_jax.experiments.records import (
    RECENT,
    Metrics,
    Record,
    Training,
    TrainState,
    Truncation,
    events_of,
    flaw,
    record_of,
    seen,
)
from bptt_jax.experiments.runfolder import RunFolder, RunFolderError
from bptt_jax.experiments.tasks import Batch, Task
from bptt_jax.leaves import to_jsonable
from bptt_jax.linalg import logscale
from bptt_jax.remedies.clipping import check_optimizer
from bptt_jax.step import Array, PyTree, State

Penalty: TypeAlias = Callable[[NetworkParams, Batch], Array]
Probe: TypeAlias = Callable[[NetworkParams, Batch], Array]


@unique
class _Drawn(IntEnum):
    """What is drawn, each from a key of its own."""

    WEIGHTS = 0
    BATCHES = 1
    SCREENING = 2
    CONFIRMATION = 3
    STREAMS = 4


# Success is judged on as many fresh sequences as Pascanu et al. 2013 take; a tenth of them says when to look.
_FRESH, _SCREENED = 10_000, 1_000
_PIECE, _PIECE_STEPS = 250, 1_000_000  # sequences evaluated at once, and their steps


def init_state(
    network: Network, optimizer: optax.GradientTransformation, seed: Array | int, *, batch: int | None = None
) -> TrainState:
    """The state before the first update; ``jax.vmap`` over `seed` for several.

    With `batch` it is that of stateful training, of so many streams, each at its beginning.
    """
    seed = jnp.asarray(seed, jnp.int32)
    params = network.init(_key(seed, _Drawn.WEIGHTS, 0))
    none = jnp.full(RECENT, jnp.nan, _loss_dtype(network, params))
    return TrainState(
        seed,
        jnp.zeros((), jnp.int32),
        params,
        optimizer.init(params),
        jnp.ones((), bool),
        jnp.full((), -1, jnp.int32),
        Metrics(none, jnp.full(RECENT, jnp.nan, jnp.float32)),
        None if batch is None else streams.beginning(network.cell, batch),
    )


def make_update(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    batch: int,
    penalty: Penalty | None = None,
    window: int | None = None,
) -> Callable[[TrainState], tuple[TrainState, Metrics]]:
    """One update as a pure function, to be scanned, jitted or vmapped; arguments as for `train`.

    With a `window` it takes and returns a state with `carried`, from ``init_state(..., batch=batch)``.

    Example:
      >>> from bptt_jax.experiments.loop import init_state, make_update
      >>> from bptt_jax.experiments.network import network
      >>> from bptt_jax.experiments.tasks import delayed_copy
      >>> net, optimizer = network(bptt.rnn(4), delayed_copy(3)), optax.sgd(0.1)
      >>> update = jax.jit(make_update(net, optimizer, batch=2, window=10))
      >>> state, metrics = update(init_state(net, optimizer, 0, batch=2))
      >>> int(state.carried.position), state.carried.states.shape
      (10, (2, 4))
    """
    update_params = optax.with_extra_args_support(optimizer).update
    if window is not None:
        check_positive_int("window", window)
        streams.check_stream(network.task)

    def update(state: TrainState) -> tuple[TrainState, Metrics]:
        if (window is None) != (state.carried is None):
            expected = "one without carried states" if window is None else "one of init_state(..., batch=batch)"
            raise ValueError(f"state: expected {expected}, since window is {window}")
        data, carried = _next_batch(network, batch, window, state), state.carried

        def losses(params: NetworkParams) -> tuple[Array, State]:
            if carried is None:
                return jax.vmap(partial(network.loss, params))(*data), None
            return jax.vmap(partial(network.carry_on, params))(carried.states, *data)

        def objective(params: NetworkParams) -> tuple[Array, tuple[Array, State]]:
            each, states = losses(params)
            loss = jnp.mean(each)
            if penalty is None:
                return loss, (loss, states)
            return loss + _called("penalty", penalty, params, data), (loss, states)

        (value, (loss, states)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
        gradient = jax.tree.map(jnp.conj, gradient)  # of complex parameters, the direction of ascent
        updates, opt_state = update_params(
            gradient,
            state.opt_state,
            state.params,
            value=value,
            grad=gradient,
            value_fn=lambda params: objective(params)[0],
        )
        if carried is not None and window is not None:
            carried = carried._replace(states=states, position=carried.position + window)
        moved = state._replace(
            updates=state.updates + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            carried=carried,
        )
        return moved, Metrics(loss, logscale.log_norm(gradient).astype(jnp.float32))

    return update


def evaluate(network: Network, params: NetworkParams, key: Array, count: int) -> tuple[Array, Array]:
    """Mean loss and mean error over all sequences of the task, if they are finitely many, else over fresh ones.

    Args:
      network, params: what is evaluated, on ``network.task``.
      key: of the fresh sequences.
      count: how many of them; rounded up to whole pieces, of at most 250 and a million steps at once (for
        each seed, where vmapped over seeds).

    Returns:
      Two scalars.
    """
    task, count = network.task, check_positive_int("count", count)
    one = partial(network.loss_and_error, params)
    piece = max(1, min(_PIECE, count, _PIECE_STEPS // task.length))
    if task.whole is not None:
        each = jax.lax.map(lambda data: one(*data), task.whole, batch_size=piece)
    else:
        keys = jax.random.split(key, -(-count // piece))
        each = jax.lax.map(lambda k: jax.vmap(one)(*task.sample(k, piece)), keys)
    return jnp.mean(each[0]), jnp.mean(each[1])


def train(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    updates: int,
    batch: int = 20,
    seeds: Sequence[int] = (0,),
    chunk: int = 100,
    penalty: Penalty | None = None,
    probes: Mapping[str, Probe] | None = None,
    validation: Task | None = None,
    window: int | Literal["auto"] | None = None,
    bias: float = 0.5,
    mesh: Mesh | None = None,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_chunk: Callable[[Metrics], None] | None = None,
) -> Training:
    """Trains a network on its task until every seed has solved it, is lost, or `updates` are made.

    The updates of a chunk are one program on the device. After each, 1000 fresh sequences (or all, where the task
    has finitely many) are evaluated, a cost to weigh against the chunk's own; if they meet the task's criterion of
    success, 10,000 others decide, and are what is recorded. A seed stops when it succeeds, and when it is lost:
    its parameters are not finite, or none of the last 100 losses is. Its numbers are None from then on; the others
    go on.

    Args:
      network: from `bptt_jax.experiments.network.network`; its task is what is learned.
      optimizer: from Optax, or `bptt_jax.with_clipping`, ... What its parts may ask for beside the gradient (a
        line search, `optax.contrib.reduce_on_plateau`, ...) are Optax's ``value``, the loss with the penalty,
        ``grad`` and ``value_fn``, of the same batch.
      updates: how many at most, in all: a run resumed from `folder` makes the rest.
      batch: fresh sequences for each update.
      seeds: of independent runs, vmapped.
      chunk: updates between evaluations, log lines and checkpoints.
      penalty: ``penalty(params, batch) -> scalar``, added to the loss, such as
        ``lambda params, batch: 4 * bptt.remedies.omega_penalty(network.omega_terms(params, batch), version="code")``.
      probes: by name, ``probe(params, batch) -> scalar``, computed after each chunk on the next update's batch,
        and recorded.
      validation: the task that is evaluated, if not the network's own: its "validation" split.
      window: of a task that is a stream: it is read in windows of so many steps, of `batch` streams side by side, whose
        states are carried from window to window. Each update is of one window, and its gradient ends at the window's
        beginning: truncated backpropagation through time. The memory does not grow with the stream, and the state of
        the run holds states and position. Evaluated are sequences of the task's length, from the initial state. "auto":
        chosen after each chunk, and before the first, by `bptt_jax.analysis.adaptive_window` from the gradient of the
        loss of one step, all streams together, as many steps on as the task is long: the next power of two, at most
        the task's length, which it is where no window is long enough; the longest that a seed that runs wants. None:
        every update is of fresh sequences, from the initial state.
      bias: of a window that is chosen, the bound on the gradient's relative bias, above 0.
      mesh: the seeds are spread over its devices, as many on each; they may belong to several processes
        (`jax.distributed`), all of which make this call. Then records are the same in all, and the arrays of
        `Training.states` global ones. Equal to one device up to rounding; to itself, resumed, bit for bit.
      folder: where ``log.jsonl`` and ``checkpoints/`` are kept, one after each chunk. If a run is there, it is
        resumed from its last whole checkpoint, and ends bit for bit as if it had never been stopped. (Where
        `updates` was no multiple of `chunk` and is raised later, it has been evaluated there as well, and a window been
        chosen.)
      settings: what the run depends on, in JSON types: written to ``settings.json``; a folder with others is
        refused. Batch, seeds, chunk and the task's name and length are always among them; functions (the cell, the
        optimiser and its rate, the penalty) cannot be compared, so name here what tells them apart.
      on_record: called with every record (see `Training`).
      on_chunk: called after each chunk with the `Metrics` of all its updates, leaves ``[n, S]``; NaN for a seed
        that had stopped.

    Returns:
      A `Training`.

    Raises:
      TypeError, ValueError: an argument is out of range; the seeds do not divide among the devices; `folder` is
        given and the mesh has devices of several processes.
      RunFolderError: a ValueError; `folder` holds a run of other settings.
      ImportError: `folder` is given and orbax-checkpoint is missing.
    """
    updates, chunk = check_positive_int("updates", updates), check_positive_int("chunk", chunk)
    batch = check_positive_int("batch", batch)
    _check_kinds(network, optimizer, penalty, probes, validation, folder, settings, on_record, on_chunk)
    if not isinstance(seeds, Sequence) or not all(hasattr(s, "__index__") for s in seeds):
        raise TypeError(f"seeds: expected a sequence of integers, got {seeds!r}")
    task, seeds = network.task, [operator.index(s) for s in seeds]
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= s < 2**31 for s in seeds):
        raise ValueError(f"seeds: expected different integers from 0 to 2147483647, got {seeds}")
    seeds_axis, whole = _spread_over(mesh, len(seeds), folder)
    judge = task if validation is None else validation
    for name in ("input_size", "output_size", "reads"):
        if getattr(judge, name) != getattr(task, name):
            wanted, got = getattr(task, name), getattr(judge, name)
            raise ValueError(f"validation: expected a task whose {name} is {wanted!r}, got {got!r}")
    identity = {"task": task.name, "length": task.length, "batch": batch, "seeds": seeds, "chunk": chunk}
    chosen, steps = window == "auto", None if window is None else task.length
    if window is not None:
        streams.check_stream(task)
        identity["window"] = window
        if chosen:
            identity["bias"] = check_positive_finite("bias", bias)
        else:
            steps = check_positive_int("window", window)
    if taken := identity.keys() & (settings or {}).keys():
        raise ValueError(f"settings: expected other names than {', '.join(sorted(identity))}, got {min(taken)}")
    init = jax.vmap(partial(init_state, network, optimizer, batch=None if window is None else batch))
    judged = network._replace(task=judge)
    screen = partial(_judge, judged, _Drawn.SCREENING, _SCREENED)
    confirm = jax.jit(jax.vmap(partial(_judge, judged, _Drawn.CONFIRMATION, _FRESH)))

    def update(states: TrainState, steps: int | None) -> tuple[TrainState, Metrics]:
        return jax.vmap(make_update(network, optimizer, batch=batch, penalty=penalty, window=steps))(states)

    def probe(state: TrainState, steps: int | None) -> dict[str, Array]:
        data = _next_batch(network, batch, steps, state)
        return {name: _called(f"probes[{name!r}]", f, state.params, data) for name, f in (probes or {}).items()}

    @partial(jax.jit, static_argnums=(1, 2))
    def advance(states: TrainState, n: int, steps: int | None) -> tuple[TrainState, Metrics, Any, Any]:
        moved, metrics = jax.lax.scan(lambda s, _: update(s, steps), states, length=n)
        moved = jax.vmap(_watched, in_axes=(0, 1))(moved, metrics)
        states = jax.vmap(lambda s, old, new: jax.tree.map(partial(jnp.where, s.running), new, old))(
            states, states, moved
        )
        if seeds_axis is not None:
            states = jax.lax.with_sharding_constraint(states, seeds_axis)
        return states, metrics, jax.vmap(screen)(states), jax.vmap(partial(probe, steps=steps))(states)

    @jax.jit
    def choose_window(states: TrainState) -> tuple[TrainState, AdaptiveWindow]:
        def measure(state: TrainState) -> AdaptiveWindow:
            return streams.measured_window(network, state, _next_batch(network, batch, task.length, state), bias)

        found = jax.vmap(measure)(states)
        states = streams.with_window(states, found, task.length)
        return states if seeds_axis is None else jax.lax.with_sharding_constraint(states, seeds_axis), found

    # Whatever is wrong with penalty and probes comes out before anything is compiled.
    jax.eval_shape(
        lambda seeds: jax.vmap(partial(probe, steps=steps))(update(init(seeds), steps)[0]),
        np.asarray(seeds, np.int32),
    )
    states = jax.jit(init, out_shardings=seeds_axis)(np.asarray(seeds, np.int32))
    records: list[Record] = []
    with nullcontext() if folder is None else RunFolder(folder, {**(settings or {}), **identity}) as store:
        if store is not None:
            states, records = store.restore(states)
            for i, record in enumerate(records, 1):
                if found := flaw(record, len(seeds)):
                    raise RunFolderError(f"{folder}: line {i} of log.jsonl is damaged: {found}")
        while (done := int(jnp.max(states.updates))) < updates and bool(jnp.any(states.running)):
            if chosen and states.carried is not None:
                if not jnp.max(states.carried.window):
                    states, _ = choose_window(states)
                steps = int(jnp.max(states.carried.window))
            before = seen(states)
            states, metrics, (loss, error), probed = advance(
                states, min(chunk - done % chunk, updates - done), steps
            )
            passed = states.running & judge.solved(loss, error)
            if judge.whole is None and bool(jnp.any(passed)):
                loss, error = (jnp.where(passed, a, b) for a, b in zip(confirm(states), (loss, error), strict=True))
                passed &= judge.solved(loss, error)
            states = states._replace(
                solved_at=jnp.where(passed, states.updates, states.solved_at), running=states.running & ~passed
            )
            truncation = None
            if chosen and steps is not None:
                states, found = choose_window(states)
                truncation = Truncation(found.bias[:, steps - 1], found.rate)
            everything = before, seen(states), metrics, loss, error, probed, truncation
            before, after, metrics, loss, error, probed, truncation = whole(everything)
            new = to_jsonable(events_of(before, after, metrics, task.baseline))
            new.append(to_jsonable(record_of(before, after, metrics, loss, error, probed, steps, truncation)))
            if store is not None:
                store.keep(int(jnp.max(states.updates)), states, new)
            records += new
            if on_chunk is not None:
                on_chunk(Metrics(*(jnp.where(before.running[None], m, jnp.nan) for m in metrics)))
            for record in new if on_record is not None else ():
                on_record(record)  # type: ignore[misc]
    return Training(states, records)


def _called(name: str, function: Penalty | Probe, params: NetworkParams, data: Batch) -> Array:
    """Its value, one number; what it raises passes through, with a note."""
    value = call_user_function(name, "(params, batch)", function, params, data)
    check_scalar(name, value)
    return value


def _check_kinds(
    network: Any,
    optimizer: Any,
    penalty: Any,
    probes: Any,
    validation: Any,
    folder: Any,
    settings: Any,
    on_record: Any,
    on_chunk: Any,
) -> None:
    """Raises TypeError unless each argument of `train` is of its kind."""
    check_optimizer("optimizer", optimizer)
    kinds: dict[str, tuple[Any, Any]] = {
        "network": (network, Network),
        "validation": (validation, (Task, NoneType)),
        "probes": (probes, (Mapping, NoneType)),
        "folder": (folder, (str, Path, NoneType)),
        "settings": (settings, (Mapping, NoneType)),
    }
    for name, (value, kind) in kinds.items():
        if not isinstance(value, kind):
            first = kind[0] if isinstance(kind, tuple) else kind
            raise TypeError(f"{name}: expected a {first.__name__}, got {type(value).__name__}")
    functions = {"penalty": penalty, "on_record": on_record, "on_chunk": on_chunk}
    functions = {name: f for name, f in functions.items() if f is not None}
    functions |= {f"probes[{name!r}]": f for name, f in (probes or {}).items()}
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name}: expected a function, got {type(function).__name__}")


def _key(seed: Array, what: _Drawn, count: Array | int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), what), count)


def _next_batch(network: Network, batch: int, window: int | None, state: TrainState) -> Batch:
    """Of the next update: fresh sequences, or the next `window` steps of all streams."""
    if window is None or state.carried is None:
        return network.task.sample(_key(state.seed, _Drawn.BATCHES, state.updates), batch)
    return streams.read(network.task, _key(state.seed, _Drawn.STREAMS, 0), state.carried.position, batch, window)


def _loss_dtype(network: Network, params: NetworkParams) -> Any:
    example = jax.eval_shape(lambda: network.task.sample(jax.random.key(0), 1))
    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), example)
    return jax.eval_shape(network.loss, params, *first).dtype


def _judge(network: Network, what: _Drawn, count: int, state: TrainState) -> tuple[Array, Array]:
    return evaluate(network, state.params, _key(state.seed, what, state.updates), count)


def _watched(state: TrainState, metrics: Metrics) -> TrainState:
    """With the recent metrics brought up to date, and stopped if it is lost."""
    finite = [jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(state.params)]
    recent = jax.tree.map(lambda old, new: jnp.concatenate([old, new])[-RECENT:], state.recent, metrics)
    hopeless = (state.updates >= RECENT) & ~jnp.any(jnp.isfinite(recent.loss))
    lost = ~jnp.all(jnp.stack(finite)) | hopeless
    return state._replace(recent=recent, running=state.running & ~lost)


def _spread_over(
    mesh: Mesh | None, seeds: int, folder: Path | None
) -> tuple[NamedSharding | None, Callable[[PyTree], PyTree]]:
    """The sharding of a leading axis of so many seeds, and what makes arrays so spread whole in every process."""
    if mesh is None:
        return None, lambda tree: tree
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}")
    if seeds % mesh.size:
        raise ValueError(f"seeds: expected a multiple of the mesh's {mesh.size} devices, got {seeds}")
    if folder is not None and mesh.is_multi_process:
        raise ValueError("folder: expected None where the mesh has devices of several processes")
    mesh = Mesh(mesh.devices, mesh.axis_names)  # its axes "auto", whatever they were: the compiler's to divide
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names)), whole
