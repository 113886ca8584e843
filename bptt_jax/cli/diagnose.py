"""The job of ``bptt-jax diagnose``: gradient flows side by side, of several recurrences on real text, of a trained
network and the untrained one that it was, or of weights that another library has trained."""

import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bptt_jax.analysis.flow import gradient_flow
from bptt_jax.analysis.flow_results import GradientFlow
from bptt_jax.analysis.noise import gradient_noise
from bptt_jax.cells.atlas import ATLAS
from bptt_jax.cells.simple import leaky_rnn
from bptt_jax.checks import CostError
from bptt_jax.cli import train, weights
from bptt_jax.cli.data import own_data
from bptt_jax.cli.own_step import OwnStep, load, with_keys
from bptt_jax.cli.report import BadArgument, in_options, one_line, provenance
from bptt_jax.experiments.network import LossArgs, Readout, apply_readout
from bptt_jax.experiments.text import Corpus, corpus, english_text, read_text, windows
from bptt_jax.leaves import to_jsonable
from bptt_jax.results import counted
from bptt_jax.step import Array, Cell, Params, PyTree, Sequence, State, Step

LossOfStates = Callable[[PyTree, State, PyTree], Array]
Measure = Callable[..., GradientFlow]

# Steps whose spectra are computed, spread over the sequence, fewer where many sequences are measured: enough for the
# quantiles of a figure.
_SPECTRA, _FEWEST, _MATRICES = 20, 5, 160
_LENGTH = 200  # of pieces of text
# Steps times lags times sequences of which noise is measured: a few seconds.
_NOISE = 640_000
# Sequences measured at once; progress is reported between groups.
_GROUP = 4


@dataclass(frozen=True)
class Settings:
    """All that the outcome depends on; with a checkpoint, `loss` names the task of the run; what weights, a step of the
    user's own or their data say is None."""

    checkpoint: str | None
    text: str | None
    embed: int | None
    cells: tuple[str, ...]
    gain: tuple[float, ...]
    alpha: float | None
    hidden: int | None
    length: int | None
    batch: int
    loss: str | None
    step: str | None
    float64: bool
    seed: int
    weights: str | None = None
    prefix: str = ""
    layer: int | None = None
    readout: str | None = None
    data: str | None = None


class Recurrence(NamedTuple):
    """One recurrence to look at.

    Attributes:
      name: in table and figure.
      gated: whether its step has a forget or update gate; None if unknown.
      step, params, state0: as for `bptt_jax.unroll`.
      loss, readout_weights: ``loss(weights, states, targets) -> scalar``, of one sequence.
    """

    name: str
    gated: bool | None
    step: Step
    params: Params
    state0: State
    loss: LossOfStates
    readout_weights: PyTree


class Data(NamedTuple):
    """``inputs [B, T, I]`` and ``targets [B, T]``, codes of the next characters of a text; of a task its own inputs,
    and its targets with their masks. `vocabulary`: the text's characters, in the order of their codes. `found`: what
    was found in files, and what was assumed of it, a sentence each. `trained_at`: the batch size of the run, where
    there was one.
    """

    vocabulary: str | None
    inputs: PyTree
    targets: PyTree
    found: tuple[str, ...] = ()
    trained_at: int | None = None

    def part(self, first: int, count: int) -> "tuple[PyTree, PyTree]":
        """Inputs and targets of so many sequences."""
        return jax.tree.map(lambda a: a[first : first + count], (self.inputs, self.targets))

    @property
    def tells_noise(self) -> bool:
        """Whether there are a batch size to ask about and gradients to compare."""
        return self.trained_at is not None and self.batch > 1

    @property
    def batch(self) -> int:
        return len(jax.tree.leaves(self.targets)[0])


def prepare(settings: Settings) -> tuple[Data, list[Recurrence]]:
    """Everything that can fail for an argument, before anything is computed.

    Raises:
      BadArgument: a text that cannot be read or is too short, a step that cannot be made, no checkpoint.
    """
    if settings.checkpoint is not None:
        return _trained(settings, Path(settings.checkpoint))
    if settings.weights is not None:
        return _of_weights(settings, settings.weights)
    given, settings = settings, replace(settings, length=settings.length or _LENGTH, loss=settings.loss or "last")
    data, codes = _text(settings)
    cells = _cells(settings)
    keys = jax.random.split(jax.random.key(settings.seed + 1), len(cells) + 1)
    size, symbols = data.inputs.shape[-1], len(codes.vocabulary)
    assert settings.loss is not None
    loss = _text_loss(apply_readout, settings.loss)
    recurrences = [
        _recurrence(name, gated, cell.step, cell.init(key, size), cell.initial_state(), loss, symbols, key)
        for (name, gated, cell), key in zip(cells, keys[:-1], strict=True)
    ]
    if settings.step is not None:
        own, name = load(settings.step, size), settings.step.rpartition(":")[2]
        if own.xs is not None:
            return _own_data(given, own, name)
        if name in {r.name for r in recurrences}:
            name = settings.step
        made = _recurrence(name, None, own.step, own.params, own.state0, loss, symbols, keys[-1])
        if own.readout is not None:
            readout = own.readout
            made = made._replace(
                loss=_text_loss(lambda _, state: readout(state), settings.loss), readout_weights=()
            )
        if own.key is not None:
            _refuse(given, name, "a key", ("cells",))
            data = data._replace(inputs=with_keys(data.inputs, own.key))
        recurrences.append(made)
    return data, recurrences


def resolved(settings: Settings, data: Data) -> Settings:
    """The settings of a step that is driven by text, with what was not said."""
    if data.vocabulary is None or settings.weights is not None:
        return settings
    return replace(settings, length=_steps(data.inputs), loss=settings.loss or "last")


def compile_all(recurrences: list[Recurrence], data: Data) -> Iterator[tuple[Recurrence, Measure]]:
    """Each recurrence with its compiled measurement, in order; compilation runs ahead on other threads.

    Recurrences that differ in their numbers alone share one.

    Raises:
      BadArgument: a step breaks the contract, or raises.
    """
    group = _group(data)
    spectra = max(_FEWEST, min(_SPECTRA, _MATRICES // data.batch))
    with _two_at_a_time() as pool:
        jobs: dict[Any, Future[Measure]] = {}
        for r in recurrences:
            if (r.step, r.loss) not in jobs:
                example = (r.params, r.state0, r.readout_weights, *data.part(0, group))
                jobs[r.step, r.loss] = pool.submit(_compile, r.step, r.loss, spectra, *example)
        for r in recurrences:
            try:
                compiled = jobs[r.step, r.loss].result()
            except CostError as error:
                raise BadArgument(f"{r.name}: {error.why}; of fewer units or steps it would take less") from error
            except (Exception, SystemExit) as error:  # whatever a step of the user's raises
                raise BadArgument(f"{r.name}: {one_line(error)}") from error
            yield r, compiled


def measure(recurrence: Recurrence, compiled: Measure, data: Data, advance: Callable[[int], None]) -> GradientFlow:
    """The gradient flow of every sequence; `advance` is told how many more are done.

    Two groups at a time, since LAPACK, where most of the time goes, works on one core.
    """
    group, parts = _group(data), []

    def of_group(first: int) -> GradientFlow:
        sequences = data.part(first, group)
        part = compiled(recurrence.params, recurrence.state0, recurrence.readout_weights, *sequences)
        return jax.block_until_ready(part)

    with _two_at_a_time() as pool:
        for part in pool.map(of_group, range(0, data.batch, group)):
            parts.append(part)
            advance(group)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@contextmanager
def _two_at_a_time() -> Iterator[ThreadPoolExecutor]:
    """Threads, for which nobody waits when the rest fails or is interrupted."""
    pool = ThreadPoolExecutor(2)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def noises(recurrences: list[Recurrence], data: Data, advance: Callable[[int], None]) -> dict[str, Any]:
    """By recurrence, the lag from which on noise prevails in a batch of the run's size, for JSON; none where there was
    no run, for each program takes as long to compile as that of a flow. `advance` is told how many are done.
    """
    if not data.tells_noise:
        return {}
    longest = min(_steps(data.inputs), max(1, _NOISE // (_steps(data.inputs) * data.batch)))
    losses = {r.loss: partial(_with_weights, r.loss) for r in recurrences}  # one each, that programs are shared
    found = {}
    for i, r in enumerate(recurrences):
        advance(i)
        noise = gradient_noise(
            r.step,
            r.params,
            r.state0,
            data.inputs,
            losses[r.loss],
            args=(r.readout_weights, data.targets),
            in_axes=(None, 0, (None, 0)),
            longest=longest,
            batch=data.trained_at,
        )
        numbers = {name: float(getattr(noise, name)) for name in ("horizon", "noise_scale")}
        found[r.name] = {"batch": data.trained_at, "sequences": data.batch, "longest": longest - 1, **numbers}
    return found


def _with_weights(loss: LossOfStates, states: State, args: tuple[PyTree, PyTree]) -> Array:
    return loss(args[0], states, args[1])


def title(settings: Settings, data: Data) -> str:
    """Of the figure."""
    if settings.checkpoint is not None:
        return f"{counted(settings.batch, 'sequence')} of the task {settings.loss}, T = {_steps(data.inputs)}"
    if data.vocabulary is None and settings.weights is None:
        assert settings.step is not None
        return f"{counted(data.batch, 'sequence')} of {settings.step.rpartition(':')[2]}, T = {_steps(data.inputs)}"
    if settings.data is not None:
        return f"{counted(data.batch, 'sequence')} of {Path(settings.data).name}, T = {_steps(data.inputs)}"
    where = "at the last step" if settings.loss == "last" else "of all steps"
    of = f"{counted(settings.batch, 'sequence')} of {counted(_steps(data.inputs), 'character')}"
    return f"{of}, cross-entropy {where}"


def record(
    settings: Settings,
    data: Data,
    flows: dict[str, GradientFlow],
    gated: dict[str, bool | None],
    noise: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything in plain JSON types; NaN and infinities are the strings that ``float`` reads back."""
    return to_jsonable(
        {
            "settings": asdict(settings),
            "vocabulary": data.vocabulary,
            "found": list(data.found),
            **provenance(),
            "units": "log norms in nats, rates in nats per step backwards, horizons in steps",
            "recurrences": {name: _numbers(flow, gated[name]) for name, flow in flows.items()},
            "noise": noise or {},
        }
    )


def _own_data(settings: Settings, own: OwnStep, name: str) -> tuple[Data, list[Recurrence]]:
    """A step with data of its own, as many sequences of them as are asked for."""
    _refuse(settings, name, "xs", ("cells", "text", "embed", "length", "loss"))
    total = len(jax.tree.leaves(own.xs)[0])
    count = min(total, settings.batch)
    xs, args = jax.tree.map(lambda a: a[:count], (own.xs, own.args))
    if own.key is not None:
        xs = with_keys(xs, own.key)
    loss, has_args = own.loss, own.args is not None

    def loss_of_states(_: PyTree, states: State, args: PyTree) -> Array:
        if loss is None:
            raise BadArgument("its factory returns xs, and no loss on them")
        return loss(states, args) if has_args else loss(states)

    said = f"{name}: {count} of its {counted(total, 'sequence')} of {counted(_steps(xs), 'step')}"
    said += "" if loss is None else ", its own loss"
    data = Data(None, xs, args if has_args else np.zeros(count), (said,))
    return data, [Recurrence(name, None, own.step, own.params, own.state0, loss_of_states, ())]


def _refuse(settings: Settings, name: str, what: str, options: tuple[str, ...]) -> None:
    if wrong := [f"--{option}" for option in options if getattr(settings, option)]:
        raise BadArgument(f"--step: {name} returns {what} of its own; drop {', '.join(wrong)}")


def _text(settings: Settings) -> tuple[Data, Corpus]:
    try:
        codes = corpus(english_text() if settings.text is None else read_text(settings.text))
        return _data(settings, codes), codes
    except (OSError, ValueError) as error:
        message = str(error).removeprefix("text: ")
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        raise BadArgument(f"--text: {message}" if settings.text is not None else f"{message}; see --text") from None


def _data(settings: Settings, text: Corpus) -> Data:
    symbols, length = len(text.vocabulary), settings.length
    assert length is not None

    @jax.jit
    def draw(key: Array, codes: Array) -> tuple[Array, Array]:
        k_windows, k_embed = jax.random.split(key)
        inputs, targets = windows(k_windows, codes, settings.batch, length)
        if settings.embed is None:
            return jax.nn.one_hot(inputs, symbols), targets
        # Entries of variance 1: a vector of them drives each unit as strongly as its lecun-normal weights expect.
        return jax.random.normal(k_embed, (symbols, settings.embed))[inputs], targets

    return Data(text.vocabulary, *draw(jax.random.key(settings.seed), text.codes))


def _cells(settings: Settings) -> list[tuple[str, bool | None, Cell]]:
    made: list[tuple[str, bool | None, Cell]] = []
    assert settings.hidden is not None
    alpha = 0.2 if settings.alpha is None else settings.alpha
    for name in settings.cells:
        make = partial(leaky_rnn, alpha=alpha) if name == "leaky_rnn" else ATLAS[name].make
        variants: list[tuple[str, dict[str, float]]] = [(name, {})]
        if name in ("rnn", "leaky_rnn"):
            variants = [(f"{name} (gain {g:.12g})", {"gain": g}) for g in settings.gain]
        try:
            made += [(of, train.has_gates(name), make(settings.hidden, **options)) for of, options in variants]
        except ValueError as error:
            raise BadArgument(f"{name}: {in_options(str(error))}") from None
    return made


def _recurrence(
    name: str,
    gated: bool | None,
    step: Step,
    params: Params,
    state0: State,
    loss: LossOfStates,
    symbols: int,
    key: Array,
) -> Recurrence:
    leaves = jax.tree.leaves(state0)
    if not leaves:
        raise BadArgument(f"--step: {name} returned an empty state0")
    size = int(np.size(leaves[0]))
    # Larger than the readout of a network that is to be trained, so that the first loss says something.
    weights = jax.random.normal(jax.random.fold_in(key, 1), (symbols, size)) / math.sqrt(size)
    return Recurrence(name, gated, step, params, state0, loss, Readout(weights, jnp.zeros(symbols, weights.dtype)))


def _text_loss(readout: Callable[[PyTree, State], Array], which: str) -> LossOfStates:
    """Of the next character, in nats: at the last step, or the mean of all."""

    def last(weights: PyTree, states: State, targets: Array) -> Array:
        logits = readout(weights, jax.tree.map(lambda a: a[-1], states))
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets[-1])

    def mean(weights: PyTree, states: State, targets: Array) -> Array:
        logits = jax.vmap(partial(readout, weights))(states)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    return last if which == "last" else mean


def _trained(settings: Settings, folder: Path) -> tuple[Data, list[Recurrence]]:
    """The networks of a training run, as they began and as they are, on fresh sequences of their task.

    Nothing is read that its settings name: a text must be given by whoever looks at the run.
    """
    # Jacobians are those of the step as it is, not of one that clips on its way back.
    run = replace(train.read(folder), clip_adjoints=None, remat=False)
    if not run.stateful:
        run = replace(run, truncate=None)
    if run.text is not None and settings.text is None:
        raise BadArgument(f"--checkpoint: the run read a text of its own, which must be given: --text {run.text}")
    if run.text is None and settings.text is not None:
        raise BadArgument("--text: the run read none of its own")
    run = replace(run, text=settings.text)
    try:
        job = train.prepare(run)
        first, now = train.states(job, run, folder)
    except BadArgument:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # as no run could have
        raise BadArgument(f"{folder}: its settings are damaged: {one_line(error)}") from None
    net, seeds = job.network, [int(s) for s in first.seed]
    task = job.validation or net.task
    inputs, targets = jax.jit(task.sample, static_argnums=1)(jax.random.key(settings.seed), settings.batch)
    mask = inputs.mask if isinstance(inputs, Sequence) else None

    def loss(weights: Readout, states: State, of_sequence: tuple[PyTree, Array | None]) -> Array:
        return net.loss_of_states(states, LossArgs(weights, *of_sequence))

    recurrences = []
    for i, seed in enumerate(seeds):
        of_seed = "" if len(seeds) == 1 else f", seed {seed}"
        for name, state in (("untrained", first), (counted(int(now.updates[i]), "update"), now)):
            params = jax.tree.map(lambda a, i=i: a[i], state.params)
            recurrences.append(
                Recurrence(
                    f"{run.cell}, {name}{of_seed}",
                    train.has_gates(run.cell),
                    net.cell.step,
                    params.cell,
                    net.cell.initial_state(),
                    loss,
                    params.readout,
                )
            )
    return Data(None, inputs, (targets, mask), trained_at=None if run.stateful else run.batch), recurrences


def _of_weights(settings: Settings, file: str) -> tuple[Data, list[Recurrence]]:
    """A recurrence in a file of weights, on the user's data or on text."""
    saved = weights.read(file)
    found = weights.recurrence(saved, settings.prefix, settings.layer, float64=settings.float64)
    first = found.params[0] if type(found.params) is tuple else found.params
    inputs, units = first.input.shape[1], weights.top(found.state0).shape[0]
    notes = [f"{file}: {found.where or 'the recurrence'} is {weights.describe(found)}"]
    key, dtype = jax.random.key(settings.seed + 1), weights.top(found.state0).dtype
    if settings.data is None:
        text = settings.text
        data, codes = _text(settings)
        symbols = len(codes.vocabulary)
        if symbols != inputs:
            data, _ = _text(replace(settings, embed=inputs))
        how = "one-hot" if symbols == inputs else "embedded at random, for the file does not say how"
        notes.append(
            f"{'English text' if text is None else text}: {counted(symbols, 'character')}, {how}, read out at random"
        )
        loss = _text_loss(lambda of, state: apply_readout(of, weights.top(state)), settings.loss or "last")
        drawn = jax.random.normal(jax.random.fold_in(key, 1), (symbols, units), dtype) / math.sqrt(units)
        readout = Readout(drawn, jnp.zeros(symbols, dtype))
        data = data._replace(inputs=jnp.asarray(data.inputs, dtype))
    else:
        own = own_data(
            settings.data,
            batch=settings.batch,
            which=settings.loss,
            input_size=inputs,
            output=weights.top,
            state0=found.state0,
            readouts=weights.readouts(saved, units),
            readout=settings.readout,
            key=key,
        )
        data, loss, readout = Data(None, own.inputs, own.targets), own.loss, own.readout
        notes.append(own.said)
    name = f"{found.where.rstrip('./') or Path(file).stem} ({found.kind})"
    gated = found.kind != "rnn"
    made = Recurrence(name, gated, found.step, found.params, found.state0, loss, readout)
    return data._replace(found=tuple(notes)), [made]


def _group(data: Data) -> int:
    batch = data.batch
    return next(g for g in range(min(_GROUP, batch), 0, -1) if batch % g == 0)


def _steps(inputs: PyTree) -> int:
    """T, of a batch."""
    return int(jax.tree.leaves(inputs)[0].shape[1])


def _compile(step: Step, loss: LossOfStates, spectra: int, *example: PyTree) -> Measure:
    """With the spectra of so many steps, or a few more."""
    stride = max(1, _steps(example[-2]) // spectra)

    def measure(params: Params, state0: State, weights: PyTree, inputs: PyTree, targets: PyTree) -> GradientFlow:
        def flow(xs: PyTree, target: PyTree) -> GradientFlow:
            return gradient_flow(
                step, params, state0, xs, lambda states: loss(weights, states, target), stride=stride
            )

        return jax.vmap(flow)(inputs, targets)

    return jax.jit(measure).lower(*example).compile()


def _numbers(flow: GradientFlow, gated: bool | None) -> dict[str, Any]:
    def over_batch(values: Any) -> dict[str, list[float]]:
        q = _quantiles(np.asarray(values, np.float64), [0.1, 0.5, 0.9], axis=0)
        return {"q10": q[0].tolist(), "median": q[1].tolist(), "q90": q[2].tolist()}

    assert flow.products is not None
    assert flow.spectra is not None
    singular = np.moveaxis(np.asarray(flow.spectra.singular_values, np.float64), 1, 0)
    singular = singular.reshape(singular.shape[0], -1)
    levels = {"min": 0.0, "q10": 0.1, "median": 0.5, "q90": 0.9, "max": 1.0}
    return {
        **flow.summary(),
        "advice": flow.advice(gated=gated),
        "per_step": {
            name: over_batch(values)
            for name, values in {
                "adjoint_log_norms": flow.signal.adjoint_log_norms,
                "product_log_norms": flow.products.log_norms,
                "error_log_gains": flow.signal.log_gains,
                "contribution_log_norms": flow.contributions.log_norms,
                "contribution_shares": flow.contributions.shares,
            }.items()
        },
        "spectra_steps": np.asarray(flow.spectra.steps)[0].tolist(),
        "singular_values": {
            k: _quantiles(singular, q, axis=1, method="linear").tolist() for k, q in levels.items()
        },
        "eigenvalues_of_first_sequence": [
            [[z.real, z.imag] for z in row] for row in np.asarray(flow.spectra.eigenvalues)[0].tolist()
        ],
    }


def _quantiles(values: np.ndarray, q: Any, axis: int, method: Any = "inverted_cdf") -> np.ndarray:
    """Of the sequences that are not padded there; NaN where all are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        return np.asarray(np.nanquantile(values, q, axis=axis, method=method))
