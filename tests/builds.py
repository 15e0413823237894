"""With which flags the C++ compiler builds kernels in tests: quickly (`conftest.py`), where no test asks for the shipped ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from attnc.codegen import cpp_host
from attnc.runtime import cpp, parts

SHIPPED = tuple(cpp_host.FLAGS)
QUICK = ("-O0", *SHIPPED[1:])


def _use(flags: Sequence[str]) -> None:
    cpp_host.FLAGS[:] = flags
    for made in (cpp._machine, cpp._function, cpp._kernel, cpp._channel_kernel, parts.parts_of):
        made.cache_clear()


@contextmanager
def built_with(flags: Sequence[str]) -> Iterator[None]:
    """Kernels asked for inside are built with these flags, and none that was built before is taken."""
    before = tuple(cpp_host.FLAGS)
    _use(flags)
    try:
        yield
    finally:
        _use(before)
