"""Files of trained weights: which arrays are in them, which recurrences these are, and how they are read out.

No code of a file is executed: pickles only by PyTorch's reader of weights alone, which refuses all else; of Keras's
archives the arrays, and their settings as plain JSON.
"""

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.cells.gated import GRUParams, LSTMParams
from bptt_jax.cells.keras_weights import GATES, Kind, keras_layer
from bptt_jax.cells.layers import stacked
from bptt_jax.cells.simple import RNNParams
from bptt_jax.cells.torch_weights import ProjectedLSTMParams, as_array, from_torch, parametrised, recurrent_prefixes
from bptt_jax.cli.report import BadArgument, one_line
from bptt_jax.files import open_archive, read_file, read_npz
from bptt_jax.results import counted
from bptt_jax.step import Array, Params, PyTree, State, Step

KINDS = (".safetensors", ".npz", ".keras", ".h5", ".hdf5", ".pt", ".pth", ".ckpt", ".bin")
_MOST = 1 << 34  # bytes of a file
_NAMES = {RNNParams: "rnn", GRUParams: "gru", LSTMParams: "lstm", ProjectedLSTMParams: "lstm with a projection"}
_KERAS_CLASSES: dict[str, Kind] = {name: kind for kind in GATES for name in (kind, f"{kind}Cell")}


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
      arrays: the floating ones by name, folders and layers set off by "." or "/".
      labels: of a file of Keras, what its folders of variables are called in the settings.
      settings: of a file of Keras, its model's; empty where it has none.
    """

    arrays: dict[str, np.ndarray]
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
    """The arrays of a file.

    Raises:
      BadArgument: it is none of `KINDS`, cannot be read, is damaged, or holds more than weights.
    """
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise BadArgument(f"--weights: expected a file {', '.join(KINDS)}, got {name}")
    try:
        content = read_file(path, most=_MOST)
    except OSError as error:
        raise BadArgument(f"--weights: {name}: {error.strerror}") from None
    reader: Callable[[bytes], Saved]
    if suffix == ".safetensors":
        reader = _safetensors
    elif suffix == ".npz":
        reader = _npz
    else:
        reader = _keras if suffix in (".keras", ".h5", ".hdf5") else _torch
    try:
        return reader(content)
    except ImportError as error:
        raise BadArgument(f"--weights: {name}: {error}") from None
    except Exception as error:  # whatever a library raises of a damaged file
        raise BadArgument(f"--weights: {name}: cannot be read as {suffix}: {one_line(error)}") from None


def recurrence(saved: Saved, prefix: str, layer: int | None = None, *, float64: bool) -> Found:
    """The one recurrence of a file whose name begins with `prefix`, or whose layer is called so, or a layer of it.

    Raises:
      BadArgument: there is none, or more than one, or it is of a kind that is not known; it has no such layer.
    """
    arrays = {k: a.astype(np.float64) for k, a in saved.arrays.items()} if float64 else saved.arrays
    try:
        places = {name: _of_torch for name in recurrent_prefixes(arrays)} | _keras_places(saved)
    except (AttributeError, LookupError, TypeError) as error:
        raise BadArgument(f"--weights: its settings are damaged: {one_line(error)}") from None
    chosen = [name for name in places if name in (prefix, f"{prefix}.", f"{prefix}/")]
    chosen = chosen or [name for name in places if name.startswith(prefix)]
    chosen = chosen or [name for name in places if prefix in _called(saved, name)]
    if len(chosen) == 1:
        try:
            return places[chosen[0]](arrays, chosen[0], layer)
        except (TypeError, ValueError) as error:
            message = str(error).removeprefix("module_or_state_dict: ")
            raise BadArgument(f"{'--' if message.startswith('layer: ') else '--weights: '}{message}") from None
    if not places:
        names = ", ".join(list(arrays)[:8]) + (f" and {len(arrays) - 8} more" if len(arrays) > 8 else "")
        raise BadArgument(
            f"--weights: expected a recurrent layer, as of PyTorch or Keras, got {names or 'nothing'}"
            f"{parametrised(arrays)}"
        )
    called = {name: [label for label in _called(saved, name) if saved.labels] for name in places}
    listed = ", ".join(f"{name!r}" + (f" ({of[0]})" if of else "") for name, of in called.items())
    raise BadArgument(f"--prefix: expected that of one of {listed}, got {prefix!r}")


def describe(found: Found) -> str:
    """In one line."""
    layers = found.params if type(found.params) is tuple else (found.params,)
    inputs = layers[0].input.shape[1]
    units = " and ".join(dict.fromkeys(str(top(s).shape[0]) for s in _layers(found.state0)))
    of_layers = "" if len(layers) == 1 else f", {len(layers)} layers"
    sizes = f"{counted(inputs, 'input')}, {counted(units, 'unit')}"
    return f"{found.kind}{of_layers}, {sizes}, {top(found.state0).dtype}{found.assumed}"


def readouts(saved: Saved, units: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weights ``[O, N]`` and bias ``[O]`` of every linear layer that reads N units, by name."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, a in saved.arrays.items():
        head, slash, last = name.rpartition("/") if "/" in name else name.rpartition(".")
        if a.ndim != 2:
            continue
        if last == "weight" and a.shape[1] == units:  # [O, N], of PyTorch
            weights, bias = a, saved.arrays.get(f"{head}{slash}bias")
        elif last in ("0", "kernel", "kernel:0") and a.shape[0] == units:  # [N, O], of Keras
            other = {"0": "1", "kernel": "bias", "kernel:0": "bias:0"}[last]
            weights, bias = a.T, saved.arrays.get(f"{head}{slash}{other}")
            if f"{head}{slash}recurrent_{last}" in saved.arrays:
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


def _floating(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: a for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating) and a.ndim}


def _npz(content: bytes) -> Saved:
    return Saved(_floating(read_npz(content)))


def _safetensors(content: bytes) -> Saved:
    try:
        from safetensors import deserialize
    except ModuleNotFoundError:
        raise ImportError("needs safetensors: python -m pip install 'bptt_jax[weights]'") from None
    dtypes = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    found = {name: a for name, a in deserialize(content) if a["dtype"] in dtypes}
    return Saved(
        _floating(
            {name: np.frombuffer(a["data"], dtypes[a["dtype"]]).reshape(a["shape"]) for name, a in found.items()}
        )
    )


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
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from tensors(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim:
            yield name, np.asarray(as_array(name, value))

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
            elif jnp.issubdtype(inner.dtype, jnp.floating) and inner.ndim:
                left -= inner.nbytes
                if left < 0:
                    raise ValueError(f"{len(content)} bytes inflate to more than {most}")
                arrays[at] = inner[()]

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
    configs = {folder: _config(saved, folder) for folder in cells}

    def found(folders: list[str], arrays: Mapping[str, Any], _: str, layer: int | None) -> Found:
        made, kinds, assumed = [], [], _alone(layer)
        if layer is not None and layer >= len(folders):
            raise ValueError(f"layer: expected one of 0 to {len(folders) - 1}, got {layer}")
        for folder in folders if layer is None else folders[layer : layer + 1]:
            shapes, config = [arrays[part].shape for part in cells[folder]], configs[folder]
            kind = _KERAS_CLASSES.get(config.get("class_name", ""), _gates(*shapes))
            if kind is None:
                continue
            if config.get("go_backwards"):
                raise ValueError(f"{folder}: expected a layer that runs forwards, got go_backwards=True")
            if not config:
                assumed = f"{_alone(layer)}; activations are assumed to be Keras's own, since the file does not say"
                config = {"reset_after": len(shapes) < 3 or len(shapes[2]) == 2}
            made.append(keras_layer(folder, kind, [arrays[part] for part in cells[folder]], config))
            kinds.append(_NAMES[type(made[-1][1])])
        return Found(folders[0], " over ".join(dict.fromkeys(reversed(kinds))), assumed, *stacked(made))

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


def _config(saved: Saved, folder: str) -> Mapping[str, Any]:
    """The settings of the layer with its class; empty where the file has none."""
    for name in _called(saved, folder):
        for layer in _nested(saved.settings):
            if layer.get("class_name") in _KERAS_CLASSES and layer["config"].get("name") == name:
                return {**layer["config"], "class_name": layer["class_name"]}
    return {}


def _chains(settings: Any) -> Iterator[tuple[str | None, list[str]]]:
    """Names of layers each of which reads the one before: stacked cells, with the name of the stack that they lie in,
    and neighbours in a Sequential."""
    for layer in _nested(settings):
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


def _nested(value: Any) -> Iterator[dict[str, Any]]:
    """All objects of the settings that have settings."""
    if isinstance(value, dict):
        if isinstance(value.get("config"), dict):
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _nested(inner)
