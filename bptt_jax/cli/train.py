"""The job of ``bptt-jax train``: network, task and optimiser from plain settings, and a folder for the run."""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bptt_jax.cells.atlas import ATLAS
from bptt_jax.cells.initializers import chrono, identity, sparse
from bptt_jax.cli.report import BadArgument, in_options, one_line, provenance
from bptt_jax.experiments import loop, tasks
from bptt_jax.experiments.network import Network, NetworkParams, network, truncated
from bptt_jax.experiments.prognosis import PILOT_LENGTH, PILOT_SHARE, SOLVED, Prognosis, prognose, steps_in_words
from bptt_jax.experiments.records import Record, Training, TrainState
from bptt_jax.experiments.runfolder import (
    RunFolderError,
    holds_run,
    read_prognosis,
    read_settings,
    read_state,
    reserved,
)
from bptt_jax.experiments.text import english_text, read_text
from bptt_jax.leaves import to_jsonable
from bptt_jax.remedies.clipping import clip_adjoints, with_clipping
from bptt_jax.remedies.regularizers import omega_penalty
from bptt_jax.step import Array, Cell

# By name, the length that a task has if none is given.
LENGTHS = {
    "adding": 100,
    "multiplication": 100,
    "temporal-order": 50,
    "temporal-order-3": 50,
    "random-permutation": 100,
    "copy-memory": 100,
    "delayed-copy": 20,
    "memorization": 100,
    "characters": 100,
    "digits": 64,
    "flipflop": 100,
    "context-decision": 50,
}
# What the prognosis is fitted to, and what is like it: one lag, as long as the sequence or its delay.
_OF_ONE_LAG = (
    "adding",
    "multiplication",
    "temporal-order",
    "temporal-order-3",
    "random-permutation",
    "copy-memory",
    "memorization",
)
# With fewer updates a run is over before a pilot is compiled; at shorter lengths a pilot costs too much of its time.
_UPDATES_WORTH_IT, _LENGTH_WORTH_IT = 1000, 100
# What may lengthen the horizon at which a network begins; told where it does so by this factor.
_REMEDIES: dict[str, dict[str, Any]] = {"--chrono": {"chrono": True}, "--init orthogonal": {"init": "orthogonal"}}
_WORTH_TELLING = 2.0
STREAMS = ("characters", "delayed-copy")
CELLS = tuple(ATLAS)
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam, "rmsprop": optax.rmsprop}
ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}
RECURRENT = {
    "normal": jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
    "orthogonal": jax.nn.initializers.orthogonal(),
    "identity": identity(),
    "sparse": sparse(),
}


@dataclass(frozen=True)
class Settings:
    """All that the outcome depends on, but for the number of updates; None where the cell's own default holds."""

    task: str
    length: int
    text: str | None
    cell: str
    hidden: int
    activation: str | None
    gain: float | None
    alpha: float | None
    noise: float | None
    init: str | None
    chrono: bool
    optimizer: str
    rate: float
    clip: float
    clip_adjoints: float | None
    omega: float
    batch: int
    seeds: int
    chunk: int
    truncate: int | str | None
    stateful: bool
    bias: float | None
    remat: bool
    float64: bool


# Of each setting, as JSON has it.
_KINDS = {name: get_args(kind) or (kind,) for name, kind in get_type_hints(Settings).items()}


class Job(NamedTuple):
    """What `bptt_jax.experiments.loop.train` wants."""

    network: Network
    optimizer: optax.GradientTransformation
    penalty: loop.Penalty | None
    validation: tasks.Task | None
    text_sha256: str | None  # so that a run does not go on with a file that has been edited


def prepare(settings: Settings) -> Job:
    """Everything that can fail for an argument, before anything is computed.

    Raises:
      BadArgument: no such task, or at no such length; a text that cannot be read.
    """
    text = read_given_text(settings.text) if settings.task == "characters" else None
    if text is None and settings.text is not None:
        raise BadArgument(f"--text: the task {settings.task} reads none")
    task, validation = task_of(settings.task, settings.length, text)
    if settings.noise:
        task, validation = tasks.with_keys(task), None if validation is None else tasks.with_keys(validation)
    _check_truncation(settings, task)
    try:
        net = network(_truncated(settings, _cell(settings, task)), task, remat=settings.remat)
    except ValueError as error:
        raise BadArgument(in_options(str(error))) from None
    # Omega is of the step itself, not of one that clips on its way back.
    bare = network(_cell(replace(settings, clip_adjoints=None), task), task)
    optimizer = OPTIMIZERS[settings.optimizer](settings.rate)
    return Job(
        net,
        optimizer if settings.clip == 0 else with_clipping(optimizer, settings.clip),
        None if settings.omega == 0 else _omega(bare, settings.omega),
        validation,
        None if text is None else hashlib.sha256(text.encode()).hexdigest(),
    )


def run(
    job: Job,
    settings: Settings,
    updates: int,
    folder: Path,
    on_record: Callable[[Record], None],
) -> Training:
    """Trains, or goes on with what the folder holds.

    Raises:
      BadArgument: the folder holds a run of other settings, or orbax-checkpoint is missing.
    """
    try:
        return loop.train(
            job.network,
            job.optimizer,
            updates=updates,
            batch=settings.batch,
            seeds=range(settings.seeds),
            chunk=settings.chunk,
            penalty=job.penalty,
            validation=job.validation,
            folder=folder,
            **_stateful(settings),
            settings=_identity(job, settings),
            on_record=on_record,
        )
    except (RunFolderError, ImportError) as error:
        raise BadArgument(f"--out: {error}" if isinstance(error, RunFolderError) else str(error)) from None


def begun(job: Job, settings: Settings, folder: Path) -> bool:
    """Whether the folder holds this run, before anything is computed.

    Raises:
      BadArgument: it holds a run of other settings, or cannot be looked into.
    """
    try:
        return holds_run(folder, _identity(job, settings))
    except RunFolderError as error:
        raise BadArgument(f"--out: {error}") from None
    except OSError as error:
        raise BadArgument(f"--out: {error.filename}: {error.strerror}") from None


def _identity(job: Job, settings: Settings) -> dict[str, Any]:
    return {"arguments": asdict(settings), "text_sha256": job.text_sha256}


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """With the folder of a run `reserved`.

    Raises:
      BadArgument: another process is training there.
    """
    with ExitStack() as held:
        try:
            held.enter_context(reserved(folder))
        except RunFolderError as error:
            raise BadArgument(f"--out: {error}") from None
        yield


def kept_prognosis(folder: Path) -> dict[str, Any] | None:
    """What was foretold when the run of a folder began; None if nothing was.

    Raises:
      BadArgument: it is damaged.
    """
    try:
        return read_prognosis(folder)
    except RunFolderError as error:
        raise BadArgument(f"--out: {error}") from None


@dataclass(frozen=True)
class Foretold:
    """What is to be expected of a run.

    Attributes:
      found: the prognosis of its seeds, leaves ``[S]``.
      updates: of the pilot, at most: seeds that succeed stop.
      remedies: by option of the command, the horizon at which the same cell begins with it, where that is at least
        twice as far; none if it is likely to do without.
    """

    found: Prognosis
    updates: int
    remedies: dict[str, float]

    @property
    def statement(self) -> str:
        """In one line."""
        begin = [f"at {steps_in_words(horizon)} with {option}" for option, horizon in self.remedies.items()]
        return f"{self.found.statement}; it would begin {' and '.join(begin)}" if begin else self.found.statement

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        numbers = {"remedies": self.remedies, **self.found.to_dict()}
        said = {"updates": self.updates, "statement": self.statement, "verdict": self.found.verdict}
        return said | to_jsonable(numbers)


def foretell(
    job: Job, settings: Settings, updates: int, on_record: Callable[[Record], None] | None = None
) -> Foretold | None:
    """From a pilot of the same network at a short length, trained as the run will be.

    None where it would cost too much of the time (less than 1000 updates, or a length below 100), and of a stream or a
    task without one long lag.
    """
    worth_it = updates >= _UPDATES_WORTH_IT and settings.length >= _LENGTH_WORTH_IT
    if settings.stateful or settings.task not in _OF_ONE_LAG or not worth_it:
        return None
    net, task = job.network, task_of(settings.task, PILOT_LENGTH, None)[0]
    task = task._replace(criterion="loss", threshold=SOLVED * task.baseline)
    if settings.noise:
        task = tasks.with_keys(task)
    pilot = network(_cell(settings, net.task), task)
    bare = network(_cell(replace(settings, clip_adjoints=None), net.task), task)
    count = -int(-PILOT_SHARE * updates // 1)
    done = loop.train(
        pilot,
        job.optimizer,
        updates=count,
        batch=settings.batch,
        seeds=range(settings.seeds),
        chunk=min(count, settings.chunk),
        penalty=None if settings.omega == 0 else _omega(bare, settings.omega),
        on_record=on_record,
    )
    others = _otherwise(settings, net.task)

    @jax.jit
    def foreseen(seeds: Array, after: NetworkParams) -> Prognosis:
        before = jax.vmap(lambda seed: loop.init_state(pilot, job.optimizer, seed).params)(seeds)
        for other in others.values():  # measured beside the others, in the same program
            params = other.init(jax.random.key(0))
            before, after = (
                jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), p, params) for p in (before, after)
            )
        return jax.vmap(partial(prognose, net, pilot))(before, after)

    beside = foreseen(done.states.seed, done.states.params)
    found = jax.tree.map(lambda a: a[: settings.seeds], beside)
    now, remedies = np.median(found.horizon), {}
    for option, horizon in zip(others, beside.horizon[settings.seeds :], strict=True):
        if found.verdict != "likely" and horizon >= _WORTH_TELLING * now:
            remedies[option] = float(horizon)
    return Foretold(found, count, remedies)


def _otherwise(settings: Settings, task: tasks.Task) -> dict[str, Network]:
    """By option, the network that would begin with other parameters, for those that its cell takes and has not."""
    found = {}
    for option, change in _REMEDIES.items():
        changed = replace(settings, **change)
        with suppress(BadArgument):
            if changed != settings:
                found[option] = network(_cell(changed, task), task)
    return found


def read(folder: Path) -> Settings:
    """The settings of the run that a folder holds.

    Raises:
      BadArgument: it holds none that this command made.
    """
    try:
        arguments = read_settings(folder)["arguments"]
        settings = {name: arguments[name] for name in _KINDS}
    except (KeyError, TypeError):
        raise BadArgument(f"{folder}: not a run of bptt-jax train") from None
    except RunFolderError as error:
        raise BadArgument(str(error)) from None
    for name, value in settings.items():
        if type(value) not in _KINDS[name] and not (type(value) is int and float in _KINDS[name]):
            raise BadArgument(f"{folder}: its settings are damaged: {name} is a {type(value).__name__}")
    return Settings(**settings)


def states(job: Job, settings: Settings, folder: Path) -> tuple[TrainState, TrainState]:
    """As the run began, and as it is now; leaves ``[seeds, ...]``.

    Raises:
      BadArgument: there is no checkpoint, or it is not of this network.
    """
    streams = settings.batch if settings.stateful else None
    init = jax.vmap(partial(loop.init_state, job.network, job.optimizer, batch=streams))
    try:
        if read_settings(folder).get("text_sha256") != job.text_sha256:
            another = "the help texts of another Python" if settings.text is None else "another one"
            raise BadArgument(f"{folder}: its text was {another}")
        # Whether there are as many units and seeds as the settings say is known before memory is taken for them.
        now = read_state(folder, jax.eval_shape(init, jax.ShapeDtypeStruct((settings.seeds,), jnp.int32)))
        return jax.jit(init)(jnp.arange(settings.seeds, dtype=jnp.int32)), now
    except (RunFolderError, ImportError) as error:
        raise BadArgument(str(error)) from None


def record(job: Job, settings: Settings, done: Training, prognosis: dict[str, Any] | None) -> dict[str, Any]:
    """What came of it, and what was foretold, for JSON."""
    chunks = [r for r in done.records if "event" not in r]
    return {
        "settings": asdict(settings),
        **provenance(),
        "trivial_loss": job.network.task.baseline,
        "criterion": f"{job.network.task.criterion} below {job.network.task.threshold:g}",
        "seeds": [
            {
                "seed": i,
                "updates": int(done.states.updates[i]),
                "solved_at": chunks[-1]["solved_at"][i],
                **{k: last(chunks, k, i) for k in ("validation_loss", "validation_error", "gradient_log_norm")},
                **{k: _share(chunks, k, i) for k in ("clipped", "skipped")},
            }
            for i in range(settings.seeds)
        ],
        "prognosis": prognosis,
        "events": done.events,
    }


def last(chunks: list[Record], name: str, seed: int) -> float:
    """The last value of a seed before it stopped."""
    return next(float(r[name][seed]) for r in reversed(chunks) if r[name][seed] is not None)


def _share(chunks: list[Record], name: str, seed: int) -> float | None:
    """Of all updates of the seed: chunks are of one length, but for the last."""
    if chunks[0][name] is None:
        return None
    starts = [0, *(r["updates"] for r in chunks)]
    shares = [(r[name][seed], r["updates"] - start) for r, start in zip(chunks, starts, strict=False)]
    known = [(share, n) for share, n in shares if share is not None]
    return float(np.average([s for s, _ in known], weights=[n for _, n in known]))


def read_given_text(file: str | None) -> str:
    """Of a file, or the default one.

    Raises:
      BadArgument: it cannot be read.
    """
    try:
        return english_text() if file is None else read_text(file)
    except OSError as error:
        raise BadArgument(f"--text: {error.filename}: {error.strerror}" if error.strerror else str(error)) from None
    except ValueError as error:
        raise BadArgument(f"--text: {error}") from None


def task_of(name: str, length: int, text: str | None) -> tuple[tasks.Task, tasks.Task | None]:
    """One of `LENGTHS`, and what it is validated on, where that is something else; `text` is that of characters.

    Raises:
      BadArgument: there is none of this length.
    """
    try:
        if name == "characters":
            make = partial(tasks.characters, text, length=length)
            return make(split="train"), make(split="validation")
        if name == "digits":
            if length != 64:
                raise BadArgument("--length: the digits have 64 pixels")
            return tasks.digits(split="train"), tasks.digits(split="validation")
        makers: dict[str, Callable[[int], tasks.Task]] = {
            "adding": tasks.adding,
            "multiplication": tasks.multiplication,
            "temporal-order": tasks.temporal_order,
            "temporal-order-3": partial(tasks.temporal_order, symbols=3),
            "random-permutation": tasks.random_permutation,
            "copy-memory": tasks.copy_memory,
            # With episodes much longer than the lag, so that resets are met.
            "delayed-copy": lambda delay: tasks.delayed_copy(delay, episode=20 * delay),
            "memorization": tasks.memorization,
            # Trials of different lengths, as they are in experiments.
            "flipflop": lambda length: tasks.flipflop(length, shortest=min(length, max(15, -(-length // 2)))),
            "context-decision": lambda length: tasks.context_decision(length, shortest=-(-length // 2)),
        }
        return makers[name](length), None
    except BadArgument:
        raise
    except (ValueError, ImportError) as error:
        raise BadArgument(in_options(str(error))) from None


def _check_truncation(settings: Settings, task: tasks.Task) -> None:
    if settings.truncate is None and settings.stateful:
        raise BadArgument("--stateful: expected --truncate K or --truncate auto with it, got neither")
    if settings.truncate == "auto" and not settings.stateful:
        raise BadArgument("--truncate auto: expected --stateful with it, where the window is what an update costs")
    if settings.bias is not None and settings.truncate != "auto":
        raise BadArgument(f"--bias: expected --truncate auto with it, got {settings.truncate}")
    if not settings.stateful:
        return
    if task.stream is None:
        raise BadArgument(
            f"--stateful: expected a task that is a stream, {' or '.join(STREAMS)}, got {settings.task}"
        )
    if settings.omega:
        raise BadArgument("--omega: its terms are of sequences from the initial state; drop --stateful")


def _truncated(settings: Settings, cell: Cell) -> Cell:
    if settings.truncate is None or settings.stateful:
        return cell
    return truncated(cell, int(settings.truncate))


def _stateful(settings: Settings) -> dict[str, Any]:
    """As `loop.train` takes it."""
    if not settings.stateful:
        return {}
    return {"window": settings.truncate} | ({} if settings.bias is None else {"bias": settings.bias})


def _omega(net: Network, weight: float) -> loop.Penalty:
    return lambda params, data: weight * omega_penalty(net.omega_terms(params, data), version="code")


def has_gates(cell: str) -> bool | None:
    """Whether the step of a cell of the atlas has a forget or update gate; None if that is not known."""
    if cell in ("minimal_rnn", "gated_antisymmetric"):  # among the simple ones
        return True
    return {"gated": True, "simple": False}.get(ATLAS[cell].family)


def _long_memories(cell: str, longest: int) -> dict[str, Any]:
    """Options of a cell's maker with which its gates keep for up to so many steps; none if it has no such option."""
    taken = inspect.signature(ATLAS[cell].make).parameters
    if "longest" in taken:
        return {"longest": longest}
    return {"bias_init": chrono(longest)} if "bias_init" in taken else {}


def _cell(settings: Settings, task: tasks.Task) -> Cell:
    if settings.cell not in ATLAS:
        raise BadArgument(f"--cell: expected {', '.join(CELLS)}, got {settings.cell}")
    make = ATLAS[settings.cell].make
    if settings.cell not in ("rnn", "leaky_rnn") and (settings.gain, settings.activation) != (None, None):
        raise BadArgument(f"--gain, --activation: they are of rnn and leaky_rnn, not of {settings.cell}")
    if settings.cell != "leaky_rnn" and (settings.alpha, settings.noise) != (None, None):
        raise BadArgument(f"--alpha, --noise: they are of leaky_rnn, not of {settings.cell}")
    taken = inspect.signature(make).parameters
    if settings.init is not None and "recurrent_init" not in taken:
        raise BadArgument(
            f"--init: {settings.cell} draws its recurrent weights, if it has any, in a way of its own"
        )
    memories = _long_memories(settings.cell, task.length) if settings.chrono else {}
    if settings.chrono and not memories:
        raise BadArgument(f"--chrono: {settings.cell} has no gates, or draws their biases in a way of its own")
    given: dict[str, Any] = {
        "activation": None if settings.activation is None else ACTIVATIONS[settings.activation],
        "gain": settings.gain,
        "alpha": settings.alpha,
        "noise": settings.noise,
        "recurrent_init": None if settings.init is None else RECURRENT[settings.init],
        **memories,
    }
    cell = make(settings.hidden, **{k: v for k, v in given.items() if v is not None})
    if settings.init is not None:
        try:
            jax.eval_shape(lambda key: cell.init(key, task.input_size), jax.random.key(0))
        except (TypeError, ValueError) as error:  # as of indrnn, whose recurrent weights are no matrix
            raise BadArgument(f"--init: {settings.cell}: {one_line(error)}") from None
    if settings.clip_adjoints is None:
        return cell
    return cell._replace(step=clip_adjoints(cell.step, max_norm=settings.clip_adjoints))
