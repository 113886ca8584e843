"""LAPACK over stacks of matrices on a CPU: every core its own matrices, one BLAS thread each.

Where compiled programs call LAPACK by themselves, BLAS may divide each matrix among several threads, which slows
matrices of some hundred rows down by factors, and can block for good where two such calls meet. Here the work is
NumPy's and SciPy's, on threads of this module, wherever the call comes from: a compiled loop, `jax.vmap`, several
devices at a time.

XLA enters Python through its foreign function interface, of which the structures below are the stable binary
interface (``xla/ffi/api/c_api.h`` of jaxlib). `jax.pure_callback` would be shorter, but it puts its arguments on a
device before anything else, which waits for a thread that the calling program may hold: on one core it blocks.
"""

import ctypes
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import TracebackType

import jax
import numpy as np
from threadpoolctl import ThreadpoolController

from bptt_jax.step import Array

# Below this many multiplications (some 50 microseconds) a second thread costs more than it does.
_WORTH_A_THREAD = 1 << 17


def host_singular_values(matrices: Array) -> Array:
    """``[..., M, N] -> [..., min(M, N)]``, descending; for the platform "cpu" alone.

    Matrices in single precision by the eigenvalues of ``A^T A`` in double: these err by some 1e-16 of the largest,
    so singular values by at most the square root of that, 1e-8 of the largest, where the rounding of single
    precision is 6e-8. In double precision by LAPACK's gesdd.
    """
    *batch, rows, columns = matrices.shape
    shape = jax.ShapeDtypeStruct((*batch, min(rows, columns)), np.finfo(matrices.dtype).dtype)
    return jax.ffi.ffi_call("bptt_jax_singular_values", shape, vmap_method="broadcast_all")(matrices)


def host_eigenvalues(matrices: Array) -> Array:
    """``[..., N, N] -> [..., N]``, complex, in no order; for the platform "cpu" alone. By LAPACK's geev."""
    shape = jax.ShapeDtypeStruct(matrices.shape[:-1], np.result_type(matrices.dtype, np.complex64))
    return jax.ffi.ffi_call("bptt_jax_eigenvalues", shape, vmap_method="broadcast_all")(matrices)


def _singular_values(matrices: np.ndarray) -> np.ndarray:
    if matrices.dtype.char in "dD":
        return np.linalg.svd(matrices, compute_uv=False)
    wide = matrices.astype(np.result_type(matrices, np.float64))
    adjoint = wide.conj().swapaxes(-1, -2)
    gram = adjoint @ wide if matrices.shape[-2] >= matrices.shape[-1] else wide @ adjoint
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[..., ::-1], 0))


def _eigenvalues(matrices: np.ndarray) -> np.ndarray:
    # SciPy's geev, as its Cython interface exports it: NumPy's takes twice the time, and SciPy's own wrapper keeps
    # the interpreter's lock. Rows are columns there, which eigenvalues do not mind.
    count, size, _ = matrices.shape
    kind, real = matrices.dtype.char, np.finfo(matrices.dtype).dtype
    routine = _lapack({"f": "sgeev", "d": "dgeev", "F": "cgeev", "D": "zgeev"}[kind])
    matrices = matrices.copy()
    # Of real matrices LAPACK gives real and imaginary parts apart.
    values = np.empty((2, count, size), real) if kind in "fd" else np.empty((1, count, size), matrices.dtype)
    none, n, one, info = (np.array([k], np.intc) for k in (ord("N"), size, 1, 0))
    more = np.empty(2 * size, real)
    last = [info.ctypes.data] if kind in "fd" else [more.ctypes.data, info.ctypes.data]
    no, order, unused = none.ctypes.data, n.ctypes.data, one.ctypes.data  # once: they cost more than small matrices

    def geev(rows: range, work: np.ndarray, length: int) -> None:
        wanted = np.array([length], np.intc)
        space = work.ctypes.data, wanted.ctypes.data
        start, found = matrices.ctypes.data, [part.ctypes.data for part in values]
        for k in rows:
            here = [part + k * values.strides[1] for part in found]
            matrix = start + k * matrices.strides[0]
            routine(no, no, order, matrix, order, *here, unused, unused, unused, unused, *space, *last)
            if info[0] != 0:  # did not converge
                values[:, k] = np.nan

    best = np.empty(1, matrices.dtype)
    geev(range(1), best, -1)  # asks for the length of the workspace
    work = np.empty(int(best[0].real), matrices.dtype)
    geev(range(count), work, work.size)
    return values[0] + 1j * values[1] if kind in "fd" else values[0]


@cache
def _lapack(name: str) -> Callable[..., None]:
    from scipy.linalg import cython_lapack  # half a second: only where it is used

    capsule = cython_lapack.__pyx_capi__[name]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    arguments = name_of(capsule).count(b",") + 1
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(pointer_of(capsule, name_of(capsule)))


def _apply(of: Callable[[np.ndarray], np.ndarray], matrices: np.ndarray, out: np.ndarray) -> None:
    matrices, out = matrices.reshape(-1, *matrices.shape[-2:]), out.reshape(-1, out.shape[-1])

    def part(rows: slice) -> None:
        try:
            out[rows] = of(matrices[rows])
        except np.linalg.LinAlgError:  # one of them does not converge
            for k in range(*rows.indices(len(matrices))):
                try:
                    out[k : k + 1] = of(matrices[k : k + 1])
                except np.linalg.LinAlgError:
                    out[k] = np.nan

    work = len(matrices) * matrices.shape[-1] ** 2 * matrices.shape[-2]
    # Several parts for each thread: they do not all take the same time.
    parts = min(len(matrices), 4 * _threads(), work // _WORTH_A_THREAD)
    with _ONE_BLAS_THREAD:
        if parts < 2 or _threads() == 1:
            part(slice(0, len(matrices)))
        else:
            edges = np.linspace(0, len(matrices), parts + 1).astype(int)
            list(_pool().map(part, map(slice, edges[:-1], edges[1:])))


@cache
def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="bptt_jax_lapack")


class _OneBlasThread:
    """While anyone is inside, NumPy's and SciPy's BLAS have one thread; with the last one, what they had before."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limiter = self._theirs().limit(limits=1)
                self._limiter.__enter__()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limiter.__exit__(None, None, None)

    @staticmethod
    @cache
    def _theirs() -> ThreadpoolController:
        _lapack("sgeev")  # loads SciPy's, that it may be found
        found = ThreadpoolController().select(user_api="blas")
        paths = [lib.filepath for lib in found.lib_controllers]
        own = [path for path in paths if f"{os.sep}numpy" in path or f"{os.sep}scipy" in path]
        return found.select(filepath=own) if own else found


_ONE_BLAS_THREAD = _OneBlasThread()


class _Extension(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("items", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _ErrorArguments(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


class _Api(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("error_create", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorArguments))),
    )


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.POINTER(_MetadataExtension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
    )


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
_METADATA, _INTERNAL_ERROR = 1, 13
_FIRST_VERSION = 0, 1  # of the interface; jaxlib 0.8.0, whose own it is, asks without saying which it has
_DTYPES: dict[int, np.dtype] = {11: np.dtype("f"), 12: np.dtype("d"), 15: np.dtype("F"), 18: np.dtype("D")}


def _array(buffers: _Buffers) -> np.ndarray:
    """The first of them, in place."""
    buffer = buffers.items[0].contents
    dtype, shape = _DTYPES[buffer.dtype], buffer.dims[: buffer.rank]
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(buffer.data)
    return np.ndarray(shape, dtype, memory)


def _handler(of: Callable[[np.ndarray], np.ndarray]) -> Callable[..., int | None]:
    def call(frame: "ctypes._Pointer[_CallFrame]") -> int | None:
        asked, api = frame.contents.extension_start, frame.contents.api
        if asked and asked.contents.base.type == _METADATA:
            version = asked.contents.metadata.contents.version
            given = (api.contents.version.major, api.contents.version.minor) if api else _FIRST_VERSION
            version.major, version.minor = given
            return None
        try:
            _apply(of, _array(frame.contents.arguments), _array(frame.contents.results))
        except Exception as error:
            message = f"bptt_jax: {type(error).__name__}: {error}".encode()
            size = ctypes.sizeof(_ErrorArguments)
            return api.contents.error_create(_ErrorArguments(size, None, message, _INTERNAL_ERROR))
        return None

    return call


# Kept alive: XLA holds their addresses.
_HANDLERS = {
    "bptt_jax_singular_values": _Handler(_handler(_singular_values)),
    "bptt_jax_eigenvalues": _Handler(_handler(_eigenvalues)),
}
for _name, _function in _HANDLERS.items():
    jax.ffi.register_ffi_target(_name, jax.ffi.pycapsule(_function), platform="cpu")
