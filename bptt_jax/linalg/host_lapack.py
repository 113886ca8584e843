"""LAPACK over stacks of matrices on a CPU: every core its own matrices, one BLAS thread each.

Where compiled programs call LAPACK by themselves, BLAS may divide each matrix among several threads, which slows
matrices of some hundred rows down by factors, and can block for good where two such calls meet. Here the work is
NumPy's and SciPy's, on threads of this module, wherever the call comes from: a compiled loop, `jax.vmap`, several
devices at a time.

XLA enters Python through its foreign function interface, of which the structures below are the binary interface
(``xla/ffi/api/c_api.h`` of jaxlib, version 0.1). XLA is told that version, and refuses what it no longer knows: then
`jnp.linalg` takes over. `jax.pure_callback` would be shorter, but it puts its arguments on a
device before anything else, which waits for a thread that the calling program may hold: on one core it blocks.
"""

import ctypes
import itertools
import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from threadpoolctl import ThreadpoolController

# Below this many multiplications (some 50 microseconds) a second thread costs more than it does.
_WORTH_A_THREAD = 1 << 17


def host_singular_values(matrices: Array) -> Array:
    """``[..., M, N] -> [..., min(M, N)]``, descending; for the platform "cpu" alone.

    Matrices in single precision by the eigenvalues of ``A^T A`` in double: these err by some 1e-16 of the largest,
    so singular values by at most the square root of that, 1e-8 of the largest, where the rounding of single
    precision is 6e-8. In double precision by LAPACK's gesdd.
    """
    return _SINGULAR_VALUES(matrices)[0]


def host_eigenvalues(matrices: Array) -> Array:
    """``[..., N, N] -> [..., N]``, complex, in no order; for the platform "cpu" alone. By LAPACK's geev."""
    return _EIGENVALUES(matrices)[0]


def host_svd(matrices: Array) -> tuple[Array, Array, Array]:
    """Real ``[..., M, N]`` to U ``[..., M, K]``, values ``[..., K]`` and V^T ``[..., K, N]``, K = min(M, N).

    For the platform "cpu" alone. By LAPACK's gesdd in double precision.
    """
    left, values, right = _SVD(matrices)
    return left, values, right


def host_eig(matrices: Array) -> tuple[Array, Array]:
    """``[..., N, N]`` to complex eigenvalues ``[..., N]``, in no order, and vectors, columns of ``[..., N, N]``.

    For the platform "cpu" alone. By LAPACK's geev in double precision.
    """
    values, vectors = _EIG(matrices)
    return values, vectors


def host_lq(matrices: Array) -> tuple[Array, Array]:
    """Real ``[..., M, N]``, M <= N, to lower triangular L ``[..., M, M]`` and orthonormal rows Q ``[..., M, N]``.

    For the platform "cpu" alone. By LAPACK's geqrf and orgqr of the transpose, which is what lies in memory.
    """
    l, q = _LQ(matrices)
    return l, q


def _singular_values(matrices: np.ndarray) -> tuple[np.ndarray]:
    if matrices.dtype.char in "dD":
        return (np.linalg.svd(matrices, compute_uv=False),)
    wide = matrices.astype(np.result_type(matrices, np.float64))
    adjoint = wide.conj().swapaxes(-1, -2)
    gram = adjoint @ wide if matrices.shape[-2] >= matrices.shape[-1] else wide @ adjoint
    return (np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[..., ::-1], 0)),)


def _eigenvalues(matrices: np.ndarray) -> tuple[np.ndarray]:
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
    return (values[0] + 1j * values[1] if kind in "fd" else values[0],)


def _lq(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # NumPy's is in double precision whatever comes.
    count, rows, columns = matrices.shape
    kind = {"f": "s", "d": "d"}[matrices.dtype.char]
    factorise, assemble = _lapack(f"{kind}geqrf"), _lapack(f"{kind}orgqr")
    q, l = matrices.copy(), np.zeros((count, rows, rows), matrices.dtype)
    lower = np.tri(rows, dtype=bool)
    space = np.empty(65 * rows, matrices.dtype)  # the reflectors' scales, and blocks of up to 64 columns
    numbers = np.array([columns, rows, 64 * rows, 0], np.intc)
    # Addresses, each taken once: that costs as much as a small matrix.
    at_q, at_space, at_m = q.ctypes.data, space.ctypes.data, numbers.ctypes.data
    at_n, at_length, at_info = (at_m + k * numbers.itemsize for k in (1, 2, 3))
    rest = at_space, at_space + rows * space.itemsize, at_length, at_info
    for k in range(count):
        matrix = at_q + k * q.strides[0]
        factorise(at_m, at_n, matrix, at_m, *rest)
        np.copyto(l[k], q[k, :, :rows], where=lower)
        assemble(at_m, at_n, at_n, matrix, at_m, *rest)
    return l, q


@cache
def _lapack(name: str) -> Callable[..., None]:
    from scipy.linalg import cython_lapack  # half a second: only where it is used

    capsule = cython_lapack.__pyx_capi__[name]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    arguments = name_of(capsule).count(b",") + 1
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(pointer_of(capsule, name_of(capsule)))


def _svd(matrices: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.linalg.svd(matrices, full_matrices=False))


def _eig(matrices: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.linalg.eig(matrices))


_Routine = Callable[[np.ndarray], tuple[np.ndarray, ...]]


def _apply(of: _Routine, matrices: np.ndarray, results: Sequence[np.ndarray]) -> None:
    batch = matrices.ndim - 2
    matrices = matrices.reshape(-1, *matrices.shape[batch:])
    results = [a.reshape(-1, *a.shape[batch:]) for a in results]

    def fill(rows: slice) -> None:
        for result, found in zip(results, of(matrices[rows]), strict=True):
            result[rows] = found

    def part(rows: slice) -> None:
        try:
            fill(rows)
        except np.linalg.LinAlgError:  # one of them does not converge
            for k in range(*rows.indices(len(matrices))):
                try:
                    fill(slice(k, k + 1))
                except np.linalg.LinAlgError:
                    for result in results:
                        result[k] = np.nan

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
_VERSION = 0, 1  # of the interface, which the structures were written for: that of jaxlib 0.8.0
_DTYPES: dict[int, np.dtype] = {11: np.dtype("f"), 12: np.dtype("d"), 15: np.dtype("F"), 18: np.dtype("D")}


def _arrays(buffers: _Buffers) -> list[np.ndarray]:
    """All of them, in place."""

    def array(buffer: _Buffer) -> np.ndarray:
        dtype, shape = _DTYPES[buffer.dtype], buffer.dims[: buffer.rank]
        memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(buffer.data)
        return np.ndarray(shape, dtype, memory)

    return [array(buffers.items[k].contents) for k in range(buffers.size)]


def _handler(of: _Routine) -> Callable[..., int | None]:
    def call(frame: "ctypes._Pointer[_CallFrame]") -> int | None:
        asked, api = frame.contents.extension_start, frame.contents.api
        if asked and asked.contents.base.type == _METADATA:
            version = asked.contents.metadata.contents.version
            version.major, version.minor = _VERSION
            return None
        try:
            (matrices,) = _arrays(frame.contents.arguments)
            _apply(of, matrices, _arrays(frame.contents.results))
        except Exception as error:
            message = f"bptt_jax: {type(error).__name__}: {error}".encode()
            size = ctypes.sizeof(_ErrorArguments)
            return api.contents.error_create(_ErrorArguments(size, None, message, _INTERNAL_ERROR))
        return None

    return call


_HANDLERS: dict[str, Any] = {}  # of each target; kept alive, for XLA holds their addresses


@cache
def host_lapack_works() -> bool:
    """Whether compiled programs on a CPU can call what stands here; tried once, with a warning if not.

    What is registered before the backend begins is taken when it begins, and a refusal would leave JAX without it.
    """
    try:
        jax.devices("cpu")
    except RuntimeError:
        return False  # there is none
    try:
        for target, handler in _HANDLERS.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
        given = np.diag(np.arange(1, 4, dtype=np.float32))[None]
        compiled = jax.jit(host_singular_values).lower(jax.ShapeDtypeStruct(given.shape, given.dtype)).compile()
        if not np.allclose(compiled(given), [[3, 2, 1]]):
            raise RuntimeError("the singular values of a diagonal matrix came out wrong")
    except Exception as error:  # of whatever kind: JAX's or ours
        why = str(error).splitlines()[0]
        warnings.warn(f"spectra are left to jnp.linalg, for XLA does not take ours: {why}", stacklevel=2)
        return False
    return True


def on_cpu(host: Callable[[Array], Any], otherwise: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """`host`, one of the functions above, where a program runs on a CPU and can call it; else `otherwise`."""

    def compute(matrices: Array) -> Any:
        if not host_lapack_works():
            return otherwise(matrices)
        return jax.lax.platform_dependent(matrices, cpu=host, default=otherwise)

    return compute


def _on_host(of: _Routine, results: Callable[..., list[tuple[Any, ...]]]) -> Callable[[Array], list[Array]]:
    """`of` as a function of a stack ``[..., M, N]`` in compiled programs on a CPU.

    A stack that lies on several devices stays there, each with its own matrices; a custom call by itself would be
    given all of them everywhere.

    Args:
      of: NumPy ``[K, M, N]`` to arrays with the same first axis.
      results: ``(dtype, M, N)`` to the dtype and the shape of each for one matrix.
    """
    target = f"bptt_jax{of.__name__}"
    _HANDLERS[target] = _Handler(_handler(of))

    def call(matrices: Array) -> list[Array]:
        *batch, rows, columns = matrices.shape
        of_one = results(np.dtype(matrices.dtype), rows, columns)
        shapes = [jax.ShapeDtypeStruct((*batch, *shape), dtype) for dtype, *shape in of_one]
        return list(jax.ffi.ffi_call(target, shapes)(matrices))

    def partition(mesh: Mesh, given: tuple[Any], wanted: list[Any]) -> tuple[Any, ...]:
        along = NamedSharding(mesh, PartitionSpec(*given[0].sharding.spec[:-2]))
        return mesh, call, [along] * len(wanted), (along,)

    axes = iter("cdefgh")
    ranks = [len(shape) for _, *shape in results(np.dtype(np.float32), 1, 1)]
    rule = ", ".join(" ".join(["...", *itertools.islice(axes, rank)]) for rank in ranks)
    in_parts = custom_partitioning(call)
    in_parts.def_partition(partition, sharding_rule=f"... a b -> {rule}")
    batched = custom_vmap(in_parts)  # the other has no rule for `jax.vmap`
    batched.def_vmap(lambda size, is_batched, matrices: (batched(matrices), [True] * len(ranks)))
    return batched


_SINGULAR_VALUES = _on_host(_singular_values, lambda dtype, m, n: [(np.finfo(dtype).dtype, min(m, n))])
_EIGENVALUES = _on_host(_eigenvalues, lambda dtype, m, n: [(np.result_type(dtype, np.complex64), n)])
_SVD = _on_host(_svd, lambda dtype, m, n: [(dtype, m, min(m, n)), (dtype, min(m, n)), (dtype, min(m, n), n)])
_EIG = _on_host(_eig, lambda dtype, m, n: [(d := np.result_type(dtype, np.complex64), n), (d, n, n)])
_LQ = _on_host(_lq, lambda dtype, m, n: [(dtype, m, m), (dtype, m, n)])
