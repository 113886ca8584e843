"""Results that read: frozen pytrees of arrays that say in a few lines what was found.

A result is a class over `Result` with annotated fields, and, where these are arrays, the names of their axes:

    class Exponents(Result):
        '''How fast differences grow.

        Attributes:
          rates: ``[T, D]``, nats per step.
          largest: of their means.
          states: leaves ``[T, ...]``.
          method: how they were found.
        '''

        rates: Float[Array, "T D"] = field(dims=("time", "unit"))
        largest: Float[Array, ""] = field(dims=())
        states: State = field(dims=("time", ...))
        method: str = field(static=True)

        def _headline(self) -> str:
            return f"differences grow by {float(self.largest):.3g} nats per step"

Nothing else is to be written. The class is a frozen dataclass, and a pytree to JAX; a field may hold another
result, a group. It has a `repr` of at most ten lines, a table in notebooks (with a figure, if a method
``_figure(self)`` returns one of matplotlib's), `Result.to_dict` and `Result.to_xarray`. ``dataclasses.replace``
changes a field. Results are equal if they are the same object. JAX rebuilds them with whatever it has at hand
(tracers, None, axes), so no class checks its fields in ``__post_init__``.

Axes in front of the declared ones are those of a batch, as `jax.vmap` makes them; a trailing ``...`` stands for
the axes that a leaf of the state has. `_headline` and `_figure` are called only when the numbers of every leaf are
here; where they raise, of a batch say, there are the scalars instead. The class's name is put in front of the
headline. A class attribute ``_views = {"log_norms": ("time",)}`` names properties that `to_dict` and `to_xarray`
are to give too, with their axes.
"""

import base64
import dataclasses
import difflib
import html
import io
import textwrap
import warnings
from collections.abc import Iterator
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform

import jax
import numpy as np

from bptt_jax.leaves import describe, dotted, numbers, readable, to_jsonable

if TYPE_CHECKING:
    import xarray

Dims = tuple[str | EllipsisType, ...]

_LINES = 10
_WIDTH = 110


def field(*, dims: Dims | None = None, static: bool = False, default: Any = dataclasses.MISSING) -> Any:
    """Marks a field of a `Result`.

    Args:
      dims: names of the axes of the array, or of every leaf of the pytree, without those of a batch.
      static: the value is no array but a hashable part of the structure; JAX compiles for each.
      default: as for `dataclasses.field`.
    """
    return dataclasses.field(default=default, metadata={"dims": dims, "static": static})


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
class Result:
    """What a measurement found: a frozen dataclass, and a pytree of its fields.

    Printed it says what that was, in at most ten lines, and in a notebook it is a table. Under `jax.vmap` every
    field has the batch as its first axis. ``dataclasses.replace`` gives a copy with other values.
    """

    _views: ClassVar[dict[str, Dims | None]] = {}  # properties that leave JAX along with the fields, and their axes

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        static = [f.name for f in fields if f.metadata.get("static")]
        jax.tree_util.register_dataclass(cls, [f.name for f in fields if f.name not in static], static)

    def _headline(self) -> str:
        """What was found, in one line."""
        return ""

    def _figure(self) -> Any:
        """One of matplotlib's figures, a small one, or None."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields in Python's own types, valid JSON: numbers, lists, and dictionaries for groups and pytrees.

        NaN and infinities are the strings "nan", "inf" and "-inf", which ``float`` reads back: the logarithm of
        zero is no missing number. Complex numbers are ``{"re": ..., "im": ...}``, random keys their data; what is
        no number is its ``str``.
        """
        fields = {f.name: to_jsonable(value) for f, value in _items(self)}
        return fields | {name: to_jsonable(getattr(self, name)) for name in self._views}

    def to_xarray(self) -> "xarray.Dataset":
        """The fields as an `xarray.Dataset` with named axes: time, unit, batch (then batch_1, ...), and others.

        Fields of a group and leaves of a pytree are variables with dotted names, static fields attributes. A field
        that bears the name of its axis is its coordinate. Where two variables have axes of one name and different
        sizes, that of the later one has the variable's name in front.

        Raises:
          ImportError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError:
            raise ImportError("to_xarray needs xarray: python -m pip install xarray") from None
        sizes: dict[str, int] = {}
        variables = {}
        for name, dims, a in _variables(self, "", len(_batch(self))):
            names = [
                d if sizes.setdefault(d, n) == n else f"{name}_{d}" for d, n in zip(dims, a.shape, strict=True)
            ]
            variables[name] = names, a
        static = {f.name: value for f, value in _items(self) if f.metadata.get("static")}
        simple = {k: v for k, v in static.items() if isinstance(v, (str, int, float))}
        return xarray.Dataset(variables, attrs={"title": _title(self)} | simple)

    def __repr__(self) -> str:
        rows, said = _rows(self), _said(self)
        short = [(name, text) for name, text, scalar in rows if scalar]
        long = [(name, text) for name, text, scalar in rows if not scalar]
        count = len(short)
        while len(top := _top(_name(self), said, short[:count])) > _LINES // 2:
            count -= 1
        room = _LINES - 1 - len(top)
        wide = max((len(name) for name, _ in long[:room]), default=0)
        middle = [f"  {name:{wide}}  {_cut(text, max(20, _WIDTH - wide - 4))}" for name, text in long[:room]]
        hidden = ", ".join(f".{name}" for name, _ in short[count:] + long[room:])
        rest = f"help({type(self).__name__}), .to_dict(), .to_xarray()" + (f"; also {hidden}" if hidden else "")
        return "\n".join([*top, *middle, f"  more: {_cut(rest, _WIDTH - 8)}"])

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        cells = ((name, html.escape(_cut(text))) for name, text, _ in _rows(self))
        rows = "".join(f"<tr><th {left}>{name}</th><td {left}>{text}</td></tr>" for name, text in cells)
        title = html.escape(_title(self))
        return f"<div><p><b>{title}</b></p>{_image(self, title)}<table>{rows}</table></div>"

    if not TYPE_CHECKING:  # to which every name would be there, and of any type

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # a property that raised AttributeError: once more, for its own message
                return object.__getattribute__(self, name)
            hint = "" if name.startswith("_") else _hint(self, name)
            raise AttributeError(f"{type(self).__name__} has no field {name!r}{hint}", name=name, obj=self)


def counted(count: int | str, noun: str) -> str:
    """ "1 step", "2 steps": a number, or the text of one, and what is counted."""
    return f"{count} {noun}{'' if str(count) == '1' else 's'}"


def _top(name: str, said: str, scalars: list[tuple[str, str]]) -> list[str]:
    """The first line and the scalars; these are in the first line where nothing else is said."""
    text = ", ".join(f"{name} {text}" for name, text in scalars)
    if said:
        return [_cut(f"{name}: {said}"), *textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")]
    return textwrap.wrap(f"{name}: {text}" if text else name, _WIDTH, subsequent_indent="  ")


def _items(value: Result) -> list[tuple[dataclasses.Field[Any], Any]]:
    fields = dataclasses.fields(value)  # type: ignore[arg-type]  # which does not know that it is a dataclass
    return [(f, value.__dict__.get(f.name)) for f in fields]


def _hint(value: Result, name: str) -> str:
    groups = {f.name: part for f, part in _items(value) if isinstance(part, Result)}
    public = [n for n in dir(value) if not n.startswith("_")]
    close = [f"{group}.{name}" for group, part in groups.items() if name in dir(part)]
    there = [f.name for f, part in _items(value) if part is not None]
    close = close or [n for n in there if any(_alike(name, word) for word in n.split("_"))][:3]
    close = close or difflib.get_close_matches(name, public)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(public)}"


def _alike(name: str, word: str) -> bool:
    """Of `gradient` and `grads` the grad in params_grad."""
    stem = name.removesuffix("s")
    return len(word) > 3 and len(stem) > 3 and (name.startswith(word) or word.startswith(stem))


def _batch(value: Result) -> tuple[int, ...]:
    """The sizes of the axes that come before the declared ones."""
    found: tuple[int, ...] = ()
    for f, part in _items(value):
        dims = f.metadata.get("dims")
        if isinstance(part, Result):
            found = max(found, _batch(part), key=len)
        elif dims is not None and ... not in dims:
            shapes = [tuple(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(part)]
            found = max([found, *(shape[: max(0, len(shape) - len(dims))] for shape in shapes)], key=len)
    return found


def _variables(value: Result, prefix: str, rank: int) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Name, names of the axes, and numbers of every leaf; `rank` axes come from a batch where nothing tells."""
    fields = [(f.name, f.metadata.get("dims"), part) for f, part in _items(value) if not f.metadata.get("static")]
    views = [(view, dims, getattr(value, view)) for view, dims in value._views.items()]
    for local, dims, part in fields + views:
        if isinstance(part, Result):
            yield from _variables(part, f"{prefix}{local}.", rank)
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):
                continue
            name, a = ".".join(filter(None, [prefix + local, dotted(path)])), numbers(leaf)
            names = _axes(name, dims, a.ndim, rank)
            if a.ndim > 1 and dims == (name,):
                rows = a.reshape(-1, a.shape[-1])
                if len(rows) and np.all(rows == rows[0]):  # a coordinate is the same throughout the batch
                    names, a = [name], rows[0]
            yield name, names, a


def _axes(name: str, dims: Dims | None, ndim: int, rank: int) -> list[str]:
    known = [d for d in dims or () if isinstance(d, str)]
    if dims is not None and ... not in dims and ndim >= len(known):
        rank = ndim - len(known)
    elif ndim < rank + len(known):  # not what was declared
        rank, known, dims = 0, [], None
    count = ndim - rank - len(known)
    rest = ["unit"] if dims and count == 1 else [f"{name}_{i}" for i in range(count)]
    return [f"batch_{i}" if i else "batch" for i in range(rank)] + known + rest


def _cut(text: str, width: int = _WIDTH) -> str:
    """One line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def _name(value: Result) -> str:
    try:
        batch = " x ".join(map(str, _batch(value)))
    except Exception:  # of whatever stands in for the arrays
        batch = ""
    return type(value).__name__ + (f", a batch of {batch}" if batch else "")


def _said(value: Result) -> str:
    try:
        leaves = jax.tree.leaves(value)
        return _cut(value._headline()) if all(map(readable, leaves)) else ""
    except Exception:
        return ""


def _title(value: Result) -> str:
    text = _said(value) or ", ".join(f"{name} {text}" for name, text, _ in _rows(value))
    return _cut(f"{_name(value)}: {text}")


def _rows(value: Result) -> list[tuple[str, str, bool]]:
    """Name and text of every field, and whether it is one number or word."""
    return [(f.name, *_text(part)) for f, part in _items(value)]


def _text(part: Any) -> tuple[str, bool]:
    if isinstance(part, Result):
        return _title(part), False
    try:
        leaves = jax.tree_util.tree_leaves_with_path(part)
        if part is None or (len(leaves) == 1 and not leaves[0][0]):
            return _cut(describe(part)), not getattr(part, "shape", ())
        few = "; ".join(f"{dotted(path)} {describe(leaf)}" for path, leaf in leaves[:3])
        return f"{type(part).__name__} of {len(leaves)}{': ' * bool(few)}{few}{'; ...' * (len(leaves) > 3)}", False
    except Exception:
        return type(part).__name__, True


def _image(value: Result, title: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = value._figure() if all(map(readable, jax.tree.leaves(value))) else None
            if figure is None:
                return ""
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=144)  # for screens of twice the resolution
            width = round(72 * figure.get_figwidth())
    except Exception:
        return ""
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{title}" width="{width}" src="data:image/png;base64,{data}">'
