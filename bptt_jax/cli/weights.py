"""Files of trained weights: which arrays are in them, which recurrences these are, and how they are read out.

No code of a file is executed: pickles only by PyTorch's reader of weights alone, which refuses all else; of Keras's
archives the arrays, and their settings as plain JSON.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.cells.gated import GRUParams, LSTMParams
from bptt_jax.cells.keras_weights import GATES, Kind, keras_layer
from bptt_jax.cells.layers import stacked
from bptt_jax.cells.simple import RNNParams
from bptt_jax.cells.torch_weights import (
    ProjectedLSTMParams,
    as_array,
    from_torch,
    parametrised,
    recurrent_prefixes,
    shortened,
)
from bptt_jax.cli.report import BadArgument, one_line
from bptt_jax.files import open_archive, read_file, read_npz
from bptt_jax.results import counted
from bptt_jax.step import Array, Params, PyTree, State, Step

KINDS = (".safetensors", ".npz", ".keras", ".h5", ".hdf5", ".pt", ".pth", ".ckpt", ".bin")
T = TypeVar("T")
_MOST = 1 << 34  # bytes of a file
_NAMES = {RNNParams: "rnn", GRUParams: "gru", LSTMParams: "lstm", ProjectedLSTMParams: "lstm with a projection"}
_KERAS_CLASSES: dict[str, Kind] = {name: kind for kind in GATES for name in (kind, f"{kind}Cell")}
_AROUND = ("RNN", "StackedRNNCells", "Bidirectional", "TimeDistributed", "Sequential", "Functional", "Model")
_SHARD = re.compile(r"(.*-)\d{5}-of-(\d{5})(\.\w+)")
_SHARD_OF_KERAS = re.compile(r"(.*)_\d{5}\.weights\.h5")


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
      arrays: by name, folders and layers set off by "." or "/"; of every dtype, and a tensor where NumPy has none, for
        a bias that was left out here would be taken for one that is not there.
      labels: of a file of Keras, what its folders of variables are called in the settings.
      settings: of a file of Keras, its model's; empty where it has none.
    """

    arrays: dict[str, Any]
    labels: dict[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


class Found(NamedTuple):
    """A recurrence in a file: where, of which kind, what was assumed of it, and the recurrence itself."""

    where: str
    kind: str
    assumed: str
    step: Step
    params: Params
    state0: State


def top(state: State) -> Array:
    """The output of a recurrence: h of its uppermost layer."""
    return jax.tree.leaves(state[-1] if type(state) is tuple else state)[0]


def read(name: str) -> Saved:
    """The arrays of a file; of one of several shards, as ``model-00001-of-00002.safetensors``, those of all.

    Raises:
      BadArgument: it is none of `KINDS`, cannot be read, is damaged, or holds more than weights.
    """
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise BadArgument(f"--weights: expected a file {', '.join(KINDS)}, got {name}")
    reader: Callable[[bytes], Saved]
    if suffix == ".safetensors":
        reader = _safetensors
    elif suffix == ".npz":
        reader = _npz
    else:
        reader = _keras if suffix in (".keras", ".h5", ".hdf5") else _torch
    saved = Saved({})
    for shard in _shards(path):
        part = _read_as(shard, reader)
        if again := sorted(saved.arrays.keys() & part.arrays.keys()):
            raise BadArgument(f"--weights: {shard}: expected another shard, got {again[0]} once more")
        saved = replace(part, arrays=saved.arrays | part.arrays, labels=saved.labels | part.labels)
    return saved


def _shards(path: Path) -> Iterator[Path]:
    """The file, or all of the checkpoint that it is a shard of: by their numbers, of Keras by its index beside them."""
    of_keras = _SHARD_OF_KERAS.fullmatch(path.name)
    if found := _SHARD.fullmatch(path.name):
        head, count, end = found.groups()
        for k in range(1, int(count) + 1):
            yield path.with_name(f"{head}{k:05}-of-{count}{end}")
    elif of_keras and (index := path.with_name(f"{of_keras[1]}.weights.json")).exists():
        for name in _read_as(index, _files_of_index):
            yield path.with_name(name)
    else:
        yield path


def _files_of_index(content: bytes) -> list[str]:
    files = json.loads(content)["weight_map"].values()
    names = [name for each in files for name in ([each] if isinstance(each, str) else list(each))]
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or not name:
            raise ValueError(f"weight_map: expected names of files beside it, got {name!r}")
    return list(dict.fromkeys(names))


def _read_as(path: Path, reader: Callable[[bytes], T]) -> T:
    try:
        content = read_file(path, most=_MOST)
    except OSError as error:
        raise BadArgument(f"--weights: {path}: {error.strerror}") from None
    try:
        return reader(content)
    except ImportError as error:
        raise BadArgument(f"--weights: {path}: {error}") from None
    except Exception as error:  # whatever a library raises of a damaged file
        kind = path.suffix.lower()
        raise BadArgument(f"--weights: {path}: cannot be read as {kind}: {one_line(error)}") from None


def recurrence(saved: Saved, prefix: str, layer: int | None = None, *, float64: bool) -> Found:
    """The one recurrence of a file whose name begins with `prefix`, or whose layer is called so, or a layer of it.

    Raises:
      BadArgument: there is none, or more than one, or it is of a kind that is not known; it has no such layer; a
        weight is NaN or infinite.
    """
    arrays = {k: a.astype(np.float64) if float64 and _floating(a) else a for k, a in saved.arrays.items()}
    try:
        places = {name: _of_torch for name in recurrent_prefixes(arrays)} | _keras_places(saved)
    except (AttributeError, LookupError, TypeError) as error:
        raise BadArgument(f"--weights: its settings are damaged: {one_line(error)}") from None
    chosen = [name for name in places if name in (prefix, f"{prefix}.", f"{prefix}/")]
    for start in ((f"{prefix}.", f"{prefix}/"), prefix):
        chosen = chosen or [name for name in places if name.startswith(start)]
    chosen = chosen or [name for name in places if prefix in _called(saved, name)]
    chosen = chosen or [name for name in places if _within(saved, name, prefix)]
    if len(chosen) == 1:
        try:
            return _finite(places[chosen[0]](arrays, chosen[0], layer))
        except (TypeError, ValueError) as error:
            message = str(error).removeprefix("module_or_state_dict: ")
            raise BadArgument(f"{'--' if message.startswith('layer: ') else '--weights: '}{message}") from None
    if not places:
        raise BadArgument(
            f"--weights: expected a recurrent layer, as of PyTorch or Keras, got "
            f"{shortened(list(arrays)) or 'nothing'}"
            f"{parametrised(arrays)}"
        )
    called = {name: [label for label in _called(saved, name) if saved.labels] for name in places}
    listed = ", ".join(f"{name!r}" + (f" ({of[0]})" if of else "") for name, of in called.items())
    raise BadArgument(f"--prefix: expected that of one of {listed}, got {prefix!r}")


def _finite(found: Found) -> Found:
    for path, a in jax.tree_util.tree_leaves_with_path(found.params):
        if not np.all(np.isfinite(a)):
            where = f"params{jax.tree_util.keystr(path)} of {found.where or 'the layer'}"
            raise ValueError(f"expected finite weights, got NaN or infinities in {where}")
    return found


def describe(found: Found) -> str:
    """In one line."""
    layers = found.params if type(found.params) is tuple else (found.params,)
    inputs = layers[0].input.shape[1]
    states = [jax.tree.leaves(state) for state in _layers(found.state0)]
    units = " and ".join(dict.fromkeys(str(leaves[-1].shape[0]) for leaves in states))  # c of an LSTM, h of others
    of_layers = "" if len(layers) == 1 else f", {len(layers)} layers"
    sizes = f"{counted(inputs, 'input')}, {counted(units, 'unit')}"
    if states[-1][0].shape != states[-1][-1].shape:
        sizes += f", {counted(states[-1][0].shape[0], 'output')}"
    dtypes = " and ".join(dict.fromkeys(str(leaves[0].dtype) for leaves in states))
    return f"{found.kind}{of_layers}, {sizes}, {dtypes}{found.assumed}"


def readouts(saved: Saved, units: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weights ``[O, N]`` and bias ``[O]`` of every linear layer that reads N units, by name.

    A layer of Keras with an activation is none, but for a softmax, which is that of the cross-entropy.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    arrays = {name: a for name, a in saved.arrays.items() if _floating(a)}
    for name, a in arrays.items():
        head, slash, last = name.rpartition("/") if "/" in name else name.rpartition(".")
        settings = _settings(saved, head.removesuffix("/vars"))
        activations = {layer["config"].get("activation", "linear") for layer in settings}
        if a.ndim != 2 or activations - {"linear", "softmax"}:
            continue
        if last == "weight" and a.shape[1] == units:  # [O, N], of PyTorch
            weights, bias = a, arrays.get(f"{head}{slash}bias")
        elif last in ("0", "kernel", "kernel:0") and a.shape[0] == units:  # [N, O], of Keras
            other = {"0": "1", "kernel": "bias", "kernel:0": "bias:0"}[last]
            weights, bias = a.T, arrays.get(f"{head}{slash}{other}")
            if f"{head}{slash}recurrent_{last}" in arrays:
                continue
        else:
            continue
        if bias is None:
            bias = np.zeros(weights.shape[0], weights.dtype)
        if bias.shape == (weights.shape[0],):
            found[head.removesuffix("/vars") or name] = weights, bias
    return found


def _layers(state: State) -> tuple[PyTree, ...]:
    return state if type(state) is tuple else (state,)


# --- Files.


def _floating(a: Any) -> bool:
    return isinstance(a, np.ndarray) and jnp.issubdtype(a.dtype, jnp.floating)


def _npz(content: bytes) -> Saved:
    # NumPy writes bfloat16, which it does not know, as two bytes.
    arrays = {name: a.view(jnp.bfloat16) if a.dtype == "V2" else a for name, a in read_npz(content).items()}
    return Saved({name: a for name, a in arrays.items() if a.ndim})


def _safetensors(content: bytes) -> Saved:
    try:
        from safetensors import deserialize
    except ModuleNotFoundError:
        raise ImportError("needs safetensors: python -m pip install 'bptt_jax[weights]'") from None
    dtypes = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    arrays = {}
    for name, a in deserialize(content):
        if a["dtype"] in dtypes:
            arrays[name] = np.frombuffer(a["data"], dtypes[a["dtype"]]).reshape(a["shape"])
        else:  # no numbers, but the name of what they are
            arrays[name] = np.empty(a["shape"], [(a["dtype"], "V1")])
    return Saved({name: a for name, a in arrays.items() if a.ndim})


def _torch(content: bytes) -> Saved:
    try:
        import torch
    except ModuleNotFoundError:
        raise ImportError("needs PyTorch: python -m pip install torch") from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        # Before, a file could execute code nevertheless: CVE-2025-32434.
        raise ImportError(f"needs PyTorch 2.6 or later, whose reader executes nothing, got {torch.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            unsafe = "weights_only" in str(error)
            why = "it holds more than weights, and reading that could execute code; save model.state_dict()"
            raise ValueError(why if unsafe else one_line(error)) from None

    def tensors(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from tensors(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, torch.Tensor) and value.ndim:
            try:
                yield name, np.asarray(as_array(name, value))
            except (TypeError, ValueError):  # of this one alone, and only if it is needed
                yield name, value

    return Saved(dict(tensors(loaded, "")))


def _keras(content: bytes) -> Saved:
    try:
        import h5py
    except ModuleNotFoundError:
        raise ImportError("needs h5py: python -m pip install 'bptt_jax[weights]'") from None
    settings: Any = "{}"
    if zipfile.is_zipfile(io.BytesIO(content)):
        with open_archive(content) as archive:
            settings, content = archive.read("config.json"), archive.read("model.weights.h5")
    arrays: dict[str, np.ndarray] = {}
    labels: dict[str, str] = {}
    left = most = max(1 << 32, 2 * len(content))

    def walk(group: Any, where: str) -> None:
        nonlocal left
        if where.endswith("/vars") and isinstance(group.attrs.get("name"), str):
            labels[where.removesuffix("/vars")] = group.attrs["name"]
        for name in group:
            # Nothing is opened outside of the file: neither links into others nor arrays that lie in others.
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{where}/{name} is a link")
            inner, at = group[name], f"{where}/{name}".lstrip("/")
            if isinstance(inner, h5py.Group):
                walk(inner, at)
            elif inner.is_virtual or inner.external:
                raise ValueError(f"{at} lies in another file")
            elif inner.ndim and inner.dtype.kind in "fiubcV":
                left -= inner.nbytes
                if left < 0:
                    raise ValueError(f"{len(content)} bytes inflate to more than {most}")
                # HDF5 has no bfloat16: Keras says it beside two bytes.
                half = inner.attrs.get("dtype") == "bfloat16"
                arrays[at] = inner[()].view(jnp.bfloat16) if half else inner[()]

    with h5py.File(io.BytesIO(content), "r") as file:
        settings = file.attrs.get("model_config", settings)
        walk(file, "")
    return Saved(arrays, labels, json.loads(settings))


# --- Recurrences.

# Kernel, recurrent kernel and bias: in the format of Keras 3, and in the older one.
_PARTS: dict[str, tuple[str, ...]] = {
    "1": ("0", "1", "2"),
    "recurrent_kernel": ("kernel", "recurrent_kernel", "bias"),
    "recurrent_kernel:0": ("kernel:0", "recurrent_kernel:0", "bias:0"),
}


def _of_torch(arrays: Mapping[str, Any], prefix: str, layer: int | None) -> Found:
    one_way = not any(name.startswith(prefix) and name.endswith("_reverse") for name in arrays)
    made = from_torch(arrays, prefix=prefix, layer=layer, direction=None if one_way else "forward")
    first = made[1][0] if type(made[1]) is tuple else made[1]
    assumed = _alone(layer) if one_way else f"{_alone(layer)}; of its two directions the one that runs forwards"
    if isinstance(first, RNNParams):
        assumed += "; tanh is assumed, which the file does not say"
    return Found(prefix, _NAMES[type(first)], assumed, *made)


def _alone(layer: int | None) -> str:
    return "" if layer is None else f"; layer {layer} alone"


def _keras_places(saved: Saved) -> dict[str, Callable[[Mapping[str, Any], str, int | None], Found]]:
    """The recurrent layers of Keras by their folders; those that the settings chain are one."""
    cells = {}
    for name in saved.arrays:
        folder, _, last = name.rpartition("/")
        of_layer = _PARTS.get(last, ())
        parts = [f"{folder}/{part}" for part in of_layer if f"{folder}/{part}" in saved.arrays]
        if len(parts) >= 2 and _gates(*(saved.arrays[part].shape for part in parts)):
            cells[folder.removesuffix("/vars")] = parts
    settings = {folder: _settings(saved, folder) for folder in cells}

    def of_folder(folder: str, arrays: Mapping[str, Any]) -> tuple[Step, Params, State]:
        parts, given = cells[folder], settings[folder]
        inside = [name for name, a in arrays.items() if name.startswith(f"{folder}/") and _floating(a)]
        if others := [name for name in inside if name not in parts]:
            raise ValueError(
                f"{folder}: expected a kernel, a recurrent kernel and a bias alone, got {shortened(others)} beside them"
            )
        if len(given) > 1:
            raise ValueError(
                f"{folder}: expected settings of one layer, got {len(given)} that differ, of layers of its name"
            )
        shapes = [arrays[part].shape for part in parts]
        kind = _gates(*shapes)
        assert kind is not None  # or it would not be among the cells
        config: Mapping[str, Any] = {"reset_after": len(shapes) < 3 or len(shapes[2]) == 2}
        if given:
            config, called = given[0]["config"], given[0]["class_name"]
            if called not in _KERAS_CLASSES:
                raise ValueError(f"{folder}: expected {', '.join(GATES)} or the cell of one, got {called}")
            if config["go_backwards"]:
                raise ValueError(f"{folder}: expected a layer that runs forwards, got go_backwards=True")
            if config.get("use_bias", True) and len(parts) < 3:
                raise ValueError(f"{folder}: expected a bias, since the settings have use_bias=True, got none")
            kind = _KERAS_CLASSES[called]
        return keras_layer(folder, kind, [arrays[part] for part in parts], config)

    def found(folders: list[str], arrays: Mapping[str, Any], _: str, layer: int | None) -> Found:
        if layer is not None and layer >= len(folders):
            raise ValueError(f"layer: expected one of 0 to {len(folders) - 1}, got {layer}")
        chosen = folders if layer is None else folders[layer : layer + 1]
        made = [of_folder(folder, arrays) for folder in chosen]
        kinds = [_NAMES[type(params)] for _, params, _ in made]
        said = _alone(layer)
        if untold := [folder for folder in chosen if not settings[folder]]:
            said += "; Keras's defaults are assumed, since the file does not say: its activations, running forwards"
            if any(
                kind == "gru" and len(cells[f]) < 3 for f, kind in zip(chosen, kinds, strict=True) if f in untold
            ):
                said += ", the reset after the product"
        return Found(folders[0], " over ".join(dict.fromkeys(reversed(kinds))), said, *stacked(made))

    chains = [[folder] for folder in cells]
    for outer, names in _chains(saved.settings):
        known = [f for name in names for f in cells if name in _called(saved, f) and _within(saved, f, outer)]
        if len(known) == len(names) > 1:
            chains = [known, *(chain for chain in chains if chain[0] not in known)]
    return {chain[0]: partial(found, chain) for chain in chains}


def _gates(kernel: tuple[int, ...], recurrent: tuple[int, ...], bias: tuple[int, ...] | None = None) -> Kind | None:
    if len(kernel) != 2 or len(recurrent) != 2 or kernel[1] != recurrent[1] or not recurrent[0]:
        return None
    if bias is not None and bias[-1:] != recurrent[1:]:
        return None
    return next((kind for kind, gates in GATES.items() if recurrent[1] == gates * recurrent[0]), None)


def _called(saved: Saved, folder: str) -> list[str]:
    """What the settings may call the layer whose arrays are in a folder; the layer itself before its cell."""
    if not saved.labels:
        return folder.split("/")
    folders = (folder.removesuffix("/cell"), folder)
    return [saved.labels[each] for each in folders if each in saved.labels]


def _within(saved: Saved, folder: str, name: str | None) -> bool:
    """Whether a folder lies in that of the layer of this name."""
    parts = folder.split("/")
    above = ["/".join(parts[:k]) for k in range(1, len(parts))]
    return name is None or name in parts or name in [saved.labels.get(each) for each in above]


def _settings(saved: Saved, folder: str) -> list[Mapping[str, Any]]:
    """The settings of the layer in a folder, which runs backwards where what is around it does.

    None where the file does not have them, several where layers of one name cannot be told from each other.
    """
    for name in _called(saved, folder)[-2:]:
        found: list[tuple[int, dict[str, Any]]] = []
        for layer, around in _nested(saved.settings):
            if layer["config"].get("name") == name and layer.get("class_name") not in _AROUND:
                backwards = any(each["config"].get("go_backwards") for each in (*around, layer))
                outer = [each["config"].get("name") for each in around]
                common = sum(each is not None and _within(saved, folder, each) for each in outer)
                config = {**layer["config"], "go_backwards": backwards}
                found.append((common, {"class_name": layer["class_name"], "config": config}))
        if found:
            most = max(common for common, _ in found)
            best = [layer for common, layer in found if common == most]
            return [layer for k, layer in enumerate(best) if layer not in best[:k]]
    return []


def _chains(settings: Any) -> Iterator[tuple[str | None, list[str]]]:
    """Names of layers each of which reads the one before: stacked cells, with the name of the stack that they lie in,
    and neighbours in a Sequential."""
    for layer, _ in _nested(settings):
        inner = layer["config"]
        if layer.get("class_name") == "StackedRNNCells":
            yield inner["name"], [cell["config"]["name"] for cell in inner["cells"]]
        if layer.get("class_name") == "Sequential":
            run: list[str] = []
            for each in [*inner["layers"], {}]:
                if each.get("class_name") in GATES:
                    run.append(each["config"]["name"])
                elif each.get("class_name") not in ("Dropout", "SpatialDropout1D"):
                    yield None, run
                    run = []


def _nested(
    value: Any, around: tuple[dict[str, Any], ...] = ()
) -> Iterator[tuple[dict[str, Any], tuple[dict[str, Any], ...]]]:
    """All objects of the settings that have settings, each with those that it lies in."""
    if isinstance(value, dict):
        if isinstance(value.get("config"), dict):
            yield value, around
            around = (*around, value)
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _nested(inner, around)
