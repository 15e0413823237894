"""The CPU backend: prints a statement as C++, builds it once with the system compiler, calls it through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnc import ir
from attnc.codegen import cpp_host
from attnc.codegen.around import core_program, unit_rows, unit_rows_gradient
from attnc.codegen.cpp import ELEMENTS, Spec, channel_source, kernels_version, refuse, source
from attnc.codegen.cpp_module import axis_tables
from attnc.errors import BuildError, ShapeError, UnsupportedError
from attnc.runtime import tuner, winners
from attnc.runtime.cache import entry
from attnc.runtime.call import Call, empty_like_order, known_tables
from attnc.schedule.boxes import Kernel
from attnc.schedule.choose import Choice, bucket, candidates
from attnc.schedule.geometry import Geometry
from attnc.schedule.list_choice import Known, Listed, listed

CONTINUES = (torch.float32, torch.float64)  # in which gradients are added to another's (outputs go on in every dtype)
__all__ = ["CONTINUES", "backward", "channel_backward", "channel_forward", "forward", "tunable"]


def _with_vectors(kernel: Kernel, dtype: str) -> Kernel:
    """The kernel as this machine's registers have it."""
    sets = _machine().split()
    register = 64 if "avx512f" in sets else 32 if "avx2" in sets else 16
    return replace(kernel, lanes=register // (8 if dtype == "float64" else 4), wide=register == 64)


@lru_cache(maxsize=1)
def _processor_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


@lru_cache(maxsize=1)
def _machine() -> str:
    """What a built library depends on besides its source: compiler, flags, instruction sets."""
    found = cpp_host.compilers()
    if not found:
        raise UnsupportedError('backend "cpp" needs a C++ compiler (g++ or clang++, or CXX); backend="torch" needs none')
    version = subprocess.run([found[0], "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[:1]
    cpu = next((line for line in _processor_lines() if line.startswith(("flags", "Features"))), platform.processor())
    return "\n".join([found[0], *version, " ".join(cpp_host.FLAGS), platform.machine(), cpu])


def _processor() -> str:
    """The processor's name where the system tells it, and a digest of all that code built here depends on."""
    named = next((x.partition(":")[2].strip() for x in _processor_lines() if x.startswith("model name")), platform.machine())
    return f"{named or platform.machine()} {hashlib.sha256(_machine().encode()).hexdigest()[:16]}"


def _build(text: str, folder: Path) -> None:
    path = folder / "kernel.cpp"
    path.write_text(text)
    said = cpp_host.compile_source(path, folder / "kernel.so")
    if said:
        kept = Path(tempfile.mkdtemp(prefix="attnc-failed-")) / "kernel.cpp"
        kept.write_text(text)
        raise BuildError(f"the C++ compiler failed; the source is kept at {kept}\n{said}")


# A call like an earlier one: its structure `like` but for some words. moves: how many; then for each the word, the tensor that it
# points into, and the bytes from where that one begins.
AGAIN = """
extern "C" bool @NAME@_again(const attnc::Problem* like, const int64_t* moves, const int64_t* addresses) {
    attnc::Problem problem = *like;
    const int64_t count = *moves++;
    for (int64_t i = 0; i < count; i++, moves += 3) {
        const int64_t place = addresses[moves[1]] + moves[2];
        memcpy((char*)&problem + 8 * moves[0], &place, 8);
    }
    return attnc::@NAME@(&problem);
}
"""


@dataclass(frozen=True)
class Function:
    """A built kernel. False: it does not take the problem, and nothing was written."""

    run: Callable[[Any], bool]  # (problem)
    again: Callable[[int, int, bytes], bool]  # (like, moves, addresses), see `AGAIN`


def _library(text: str, name: str) -> Any:
    """A source with its function `name` again, built or found in the cache."""
    text += AGAIN.replace("@NAME@", name)
    folder = entry("cpp", f"{_machine()}\n{text}", lambda path: _build(text, path), ("kernel.cpp", "kernel.so"))
    return ctypes.CDLL(os.fspath(folder / "kernel.so"))


@lru_cache(maxsize=256)
def _function(text: str, name: str) -> Function:
    """The kernel `name` of a source."""
    library = _library(text, name)
    run, again = getattr(library, name), getattr(library, f"{name}_again")
    run.restype = again.restype = ctypes.c_bool
    again.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
    return Function(run, again)


@lru_cache(maxsize=256)
def _kernel(spec: Spec, backward: bool, band: bool) -> Function:
    return _function(source(spec, backward, band), "attend_backward" if backward else "attend_forward")


def _either(spec: Spec, backward: bool, choice: Choice) -> Function:
    """Whether a call is a band, the band's kernel says last; the other is built when it is its turn."""
    if not choice.band:
        return _kernel(spec, backward, False)
    band = _kernel(spec, backward, True)
    return Function(
        lambda problem: band.run(problem) or _kernel(spec, backward, False).run(problem),
        lambda *call: band.again(*call) or _kernel(spec, backward, False).again(*call),
    )


@lru_cache(maxsize=256)
def _ready(spec: Spec, geometry: Geometry, choice: Choice, backward: bool, items: int, threads: int) -> cpp_host.Ready:
    return cpp_host.Ready(*axis_tables(geometry, spec, choice, backward, items, threads))


@lru_cache(maxsize=32)
def _ready_listed(spec: Spec, geometry: Geometry, found: Listed, backward: bool, items: int, threads: int) -> cpp_host.Ready:
    return cpp_host.Ready(*axis_tables(geometry, spec, Choice(found.query_sides), backward, items, threads, found))


@lru_cache(maxsize=256)
def _tunable(spec: Spec, geometry: Geometry, backward: bool, items: int, threads: int) -> tuner.Tunable:
    """The candidates of a call, and what a measured winner depends on. Lengths and items are taken in buckets."""
    like = winners.key(
        backend="cpp",
        device={"name": _processor(), "target": "cpu", "threads": threads},
        source=kernels_version(),
        program=spec.program,
        direction="backward" if backward else "forward",
        dtype=spec.dtype,
        head_dim=spec.dim,
        value_dim=spec.value_dim,
        bucket={
            "grid": [bucket(n) for n in geometry.q_grid],
            "kv_grid": [bucket(n) for n in geometry.k_grid],
            "items": bucket(items, steps=1),
        },
    )
    found = tuple(
        tuner.Candidate(c, {"sides": list(c.sides), "band": c.band}, c.show(), cost)
        for cost, c in candidates(geometry, _with_vectors(spec.kernel(backward), spec.dtype), items, threads)
    )
    return tuner.Tunable(like, found)


@lru_cache(maxsize=256)
def _choice(spec: Spec, geometry: Geometry, backward: bool, items: int, threads: int, version: int) -> Choice:
    choice: Choice = tuner.chosen(_tunable(spec, geometry, backward, items, threads)).choice
    return choice


def tunable(call: Call, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> tuner.Tunable:
    """What `attnc.tune` may measure of a call."""
    spec = _check(_direction(call, backward), q, k, v)
    found = _tunable(spec, call.geometry, *_size(q, k, backward))
    lists = _listed(call, spec, tuner.chosen(found).choice, q, backward, known_tables(call))
    return found if lists is None else tuner.by_lists(found.like, lists.show())


def _size(q: Tensor, k: Tensor, backward: bool) -> tuple[bool, int, int]:
    """The direction, its (batch, head) pairs, and threads: what choices depend on besides the statement and the grid."""
    return backward, q.shape[0] * (k if backward else q).shape[1], torch.get_num_threads()


def _direction(call: Call, backward: bool) -> Call:
    """The call as its kernel takes it: a backward's gets rows of unit length, where the statement asks for them."""
    return replace(call, program=core_program(call.program)) if backward else call


def _check(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Spec:
    name = call.attend.name
    for label, t in (("q", q), ("k", k), ("v", v)):
        if not t.is_cpu:
            raise UnsupportedError(f'pattern {name}: {label} is on {t.device}; backend "cpp" takes CPU tensors')
        if t.dtype != q.dtype:
            raise ShapeError(f"pattern {name}: {label} is {t.dtype}, q is {q.dtype}; give all three one dtype")
    for n in call.attend.int_tables:
        if call.tables[n].numel() >= 2**31 and q.dtype != torch.float64:
            raise UnsupportedError(
                f"pattern {name}: the table {n!r} has {call.tables[n].numel()} elements, more than the integers of a kernel of "
                f"{str(q.dtype).removeprefix('torch.')} count; use backend='torch'"
            )
    return _spec(call.program, q.shape[-1], v.shape[-1], q.dtype)


@lru_cache(maxsize=512)
def _spec(program: ir.Program, dim: int, value_dim: int, dtype: torch.dtype) -> Spec:
    spec = Spec(program, dim, value_dim, str(dtype).removeprefix("torch."))
    refuse(spec)
    return spec


def planned(call: Call, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> tuple[Function, cpp_host.Ready]:
    """The kernel of a call and its structure, kept beside the statement: to look all up again takes longer than a small kernel."""
    key = backward, q.dtype, q.shape[-1], v.shape[-1], torch.get_num_threads(), tuner.version(), call.choice, call.continues
    found = call.kept.get(key)
    if found is None or not (q.is_cpu and k.is_cpu and v.is_cpu and q.dtype == k.dtype == v.dtype):
        spec = _check(_direction(call, backward), q, k, v)
        size = _size(q, k, backward)
        choice = call.choice or _choice(spec, call.geometry, *size, tuner.version())
        if call.continues:
            choice = replace(choice, band=False)  # bands keep no running maximum, and add to nothing
        tables = known_tables(call)
        lists = _listed(call, spec, choice, q, backward, tables)
        ready = _ready(spec, call.geometry, choice, *size) if lists is None else _ready_listed(spec, call.geometry, lists, *size)
        found = _either(spec, backward, choice), ready
        if not tables:  # or the next call's tables may hold other numbers
            call.kept[key] = found
    return found


def _listed(call: Call, spec: Spec, choice: Choice, q: Tensor, backward: bool, tables: Known) -> Listed | None:
    """The blocks that the call's tiles visit, which have sides of their own; None: tiles of the choice walk their boxes."""
    return listed(call.geometry, spec.list_limits(backward), choice.sides, q.shape[1], q.shape[0], tables)


@contextmanager
def integers_in(name: str) -> Iterator[None]:
    """Integers that kernels cannot read, as an error that names the pattern and the way out."""
    try:
        yield
    except OverflowError as e:
        raise UnsupportedError(f"pattern {name}: {e}; number them anew, or use backend='torch'") from None


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of one call."""
    kernel, ready = planned(call, q, k, v, False)
    with integers_in(call.attend.name):
        return cpp_host.run_forward(kernel.run, ready, q, k, v, call.scale, call.tables, call.into, bool(call.continues))


def backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """dq, dk, dv and the gradients of tables."""
    kernel, ready = planned(call, q, k, v, True)
    run = kernel.run
    maps, tables = (call.attend.q_map, call.attend.k_map), call.tables
    if maps == (None, None):
        return cpp_host.run_backward(
            run, ready, q, k, v, out, lse, grad_out, grad_lse, call.scale, tables, call.into, call.continues
        )
    unit_q, unit_k = (t if m is None else unit_rows(t, m.eps) for t, m in zip((q, k), maps, strict=True))
    if maps[1] is not None and "pad_k" in tables:
        tables = {**tables, "pad_k": unit_rows(tables["pad_k"], maps[1].eps)}
    dq, dk, dv, sums = cpp_host.run_backward(run, ready, unit_q, unit_k, v, out, lse, grad_out, grad_lse, call.scale, tables)
    dq, dk = (g if m is None else unit_rows_gradient(t, m.eps, g) for t, m, g in zip((q, k), maps, (dq, dk), strict=True))
    if maps[1] is not None and "pad_k" in tables:
        sums["pad_k"] = unit_rows_gradient(call.tables["pad_k"], maps[1].eps, sums["pad_k"])
    return dq, dk, dv, sums


def channel_kernel(q: Tensor, k: Tensor, v: Tensor, backward: bool) -> Function:
    """The built kernel, after a look at the shapes."""
    dtype = str(q.dtype).removeprefix("torch.")
    if q.dim() != 4 or k.shape != v.shape or q.shape[:3] != k.shape[:3]:
        raise ShapeError(
            f"channel attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "all are [B, H, N, channels] with one B, H and N, and k and v have equally many channels"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ShapeError(f"channel attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; give all three one dtype")
    if dtype not in ELEMENTS or max(q.shape[-1], k.shape[-1]) > 256 or min(q.shape[-1], k.shape[-1]) < 1:
        raise UnsupportedError(
            f'channel attention with {q.shape[-1]} and {k.shape[-1]} channels of {dtype}: backend "cpp" takes 1 to 256 '
            f'channels of {", ".join(ELEMENTS)}; backend="eager" takes any'
        )
    return _channel_kernel(dtype, q.shape[-1], k.shape[-1], backward)


@lru_cache(maxsize=256)
def _channel_kernel(dtype: str, dim: int, key_dim: int, backward: bool) -> Function:
    return _function(channel_source(dtype, dim, key_dim, backward), "channel")


def channel_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """S[i, j] = scale * sum_n q[n, i] k[n, j]; out[n, i] = sum_j softmax_j(S)[i, j] v[n, j]. Tensors [B, H, N, channels]."""
    out = empty_like_order(q, q.shape[-1])
    cpp_host.run_channel(channel_kernel(q, k, v, False).run, scale, {"q": q, "k": k, "v": v, "out": out})
    return out


def channel_backward(q: Tensor, k: Tensor, v: Tensor, scale: float, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    dq, dk, dv = (empty_like_order(t, t.shape[-1]) for t in (q, k, v))
    tensors = {"q": q, "k": k, "v": v, "grad_out": grad_out.to(q.dtype), "dq": dq, "dk": dk, "dv": dv}
    cpp_host.run_channel(channel_kernel(q, k, v, True).run, scale, tensors)
    return dq, dk, dv
