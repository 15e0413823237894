"""Where candidates are measured: a device's name and target, its tensors, and how calls on it are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from attnc.errors import UnsupportedError

Runners = Mapping[str, Callable[[], Any]]
Times = dict[str, float]


@dataclass(frozen=True)
class Device:
    """One device. race: median seconds of each runner; None times them in turns by the processor's clock (`runtime.tuner`).

    A runner that the race leaves out of its answer did not fit the device.
    """

    name: str  # "NVIDIA H100 80GB HBM3", "cpu"
    target: str  # "cuda:90", "hip:gfx942", "cpu"
    where: torch.device  # of the tensors
    race: Callable[[Runners], Times] | None = None


_given: list[Device] = []


@contextmanager
def using(device: Device) -> Iterator[None]:
    """Inside, tensors on `device.where` are said to be on this device, and are timed its way."""
    _given.append(device)
    try:
        yield
    finally:
        _given.remove(device)


def of(where: torch.device) -> Device:
    """The device that tensors are on."""
    for device in reversed(_given):
        if device.where.type == where.type and device.where.index in (None, where.index):
            return device
    return _found(where)


def named(text: str, *, graphs: bool = False) -> Device:
    """The device of a name that torch knows. graphs: time launches captured in a CUDA graph, without the host's share.

    Raises:
        UnsupportedError: it is neither the CPU nor a GPU that is here.
    """
    try:
        where = torch.device(text)
    except RuntimeError as e:
        raise UnsupportedError(f"device={text!r}: not a device ({str(e).splitlines()[0]}); give 'cpu' or 'cuda'") from e
    if where.type == "cpu":
        if graphs:
            raise UnsupportedError("device='cpu': CUDA graphs are a GPU's; leave them out")
        return _found(where)
    if where.type != "cuda":
        raise UnsupportedError(f"device={text!r}: calls are tuned on 'cpu' or 'cuda' (ROCm too); other devices have one way to run")
    if not torch.cuda.is_available():
        why = "no driver answers" if torch.version.cuda or torch.version.hip else "this torch is a CPU build"
        raise UnsupportedError(
            f"device={text!r}: no GPU here ({why}); tune on the machine that has it and bring the winners over with "
            "`attnc tune --export FILE` and `attnc tune --import FILE`, or give device='cpu'"
        )
    if (where.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(f"device={text!r}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    found = _found(torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index))
    return Device(found.name, found.target, found.where, partial(_bench, graphs=True)) if graphs else found


@lru_cache(maxsize=64)
def _found(where: torch.device) -> Device:
    if where.type != "cuda":
        return Device(where.type, where.type, where)
    name = torch.cuda.get_device_name(where)
    if torch.version.hip is not None:
        target = "hip:" + torch.cuda.get_device_properties(where).gcnArchName.partition(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(where)
        target = f"cuda:{10 * major + minor}"
    return Device(name, target, where, _bench)


def _bench(runners: Runners, graphs: bool = False) -> Times:
    """Median seconds by the GPU's own events, its L2 emptied before each run; what does not fit the GPU is left out."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench, do_bench_cudagraph

    measure = do_bench_cudagraph if graphs else do_bench
    times = {}
    for name, run in runners.items():
        try:
            times[name] = 1e-3 * float(measure(run, return_mode="median"))
        except (CompilationError, OutOfResources, PTXASError):
            continue
    return times
