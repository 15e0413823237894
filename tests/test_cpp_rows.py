"""Rows of C++ kernels that are no whole vectors: right to the last channel, and nothing beyond it is read."""

from __future__ import annotations

import ctypes
import mmap
import platform
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from builds import QUICK, built_with
from cpp_checks import check
from cpp_statements import biased, window

import attnc
from attnc import patterns

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")


@pytest.fixture
def quick() -> Iterator[None]:
    with built_with(QUICK):
        yield


@pytest.mark.parametrize(
    ("dim", "value_dim", "dtype"),
    [
        (2, 20, torch.float32),
        (13, 30, torch.float32),
        (24, 72, torch.float32),
        (35, 3, torch.float32),
        (72, 24, torch.bfloat16),
        (13, 40, torch.bfloat16),
        (20, 13, torch.float16),
        (5, 12, torch.float64),
    ],
)
def test_windows_with_a_key_more_than_whole_vectors(quick: None, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    """49 and 50 keys: the last one or two are summed over lanes of channels; dq, dk and dv are written where they are computed."""
    check(window(s=7), (7, 14), batch=1, dim=dim, value_dim=value_dim, dtype=dtype)
    check(window(s=5), (5, 10), batch=1, dim=dim, value_dim=value_dim, dtype=dtype, scale=-0.4)


def test_tables_and_longer_sums(quick: None) -> None:
    check(biased(s=7), (9, 15), batch=1, dim=24, value_dim=40, tables={"bias": torch.randn(2, 13, 13)})
    check(patterns.full(), (10, 31), batch=1, dim=24, value_dim=20)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 instruction sets")
@pytest.mark.parametrize("instructions", ["haswell", "x86-64"])
def test_shorter_vectors(instructions: str) -> None:
    with built_with([f"-march={instructions}" if f == "-march=native" else f for f in QUICK]):
        check(window(s=7), (7, 14), batch=1, dim=13, value_dim=20)
        check(window(s=7), (7, 7), batch=1, dim=5, value_dim=7, dtype=torch.float64)


@pytest.mark.parametrize(("dim", "value_dim"), [(24, 24), (1, 20)])
def test_errors_that_a_whole_row_shares_are_undone(quick: None, dim: int, value_dim: int) -> None:
    """A saved log-sum-exp is rounded, which would make the error of gradients 1.4 times eager code's. So are dP and the output (for
    delta), which would make the error of one channel's dq twice as large."""
    pattern, grid, n = patterns.window(7), (7, 14), 98
    mask = attnc.mask(pattern, grid=grid)[0]
    op = attnc.compile(pattern, grid=grid, backend="cpp")

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2)) * dim**-0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    errors = torch.zeros(2, 3)
    for seed in range(6):
        torch.manual_seed(seed)
        rows = [torch.randn(1, 2, n, d) for d in (dim, dim, value_dim)]
        grad = torch.randn(1, 2, n, value_dim)

        def gradients(f: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in rows]  # noqa: B023
            f(*leaves).backward(grad.to(dtype))  # noqa: B023
            return [x.grad.double() for x in leaves if x.grad is not None]

        exact = gradients(plain, torch.float64)
        for which, f in enumerate((op, plain)):
            errors[which] += torch.stack([(a - b).square().mean() for a, b in zip(gradients(f, torch.float32), exact, strict=True)])
    assert (errors[0] <= 1.28**2 * errors[1]).all(), (errors[0] / errors[1]).sqrt()


class Fenced:
    """Memory whose neighbours on both sides may not be touched."""

    def __init__(self, count: int) -> None:
        page = mmap.PAGESIZE
        self.map = mmap.mmap(-1, -(-4 * count // page) * page + 2 * page)
        self.size, self.count, self.page = len(self.map), count, page
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for at in (address, address + self.size - page):
            if protect(at, page, 0) != 0:
                pytest.skip("pages cannot be fenced here")

    def tensor(self, last: bool) -> torch.Tensor:
        """float32 numbers at the memory's end, or at its beginning."""
        at = self.size - self.page - 4 * self.count if last else self.page
        return torch.frombuffer(self.map, dtype=torch.float32, count=self.count, offset=at)


@pytest.mark.skipif(platform.system() != "Linux", reason="memory is fenced as on Linux")
@pytest.mark.parametrize("last", [True, False])
def test_nothing_beyond_a_tensor_is_touched(quick: None, last: bool) -> None:
    """q, k, v, whose rows of 13 channels begin or end with the page that may be read."""
    shape = (1, 2, 49, 13)
    fences = [Fenced(2 * 49 * 13) for _ in range(3)]
    fenced = [f.tensor(last).copy_(torch.randn(2 * 49 * 13)).view(shape).requires_grad_() for f in fences]
    plain = [x.detach().clone().requires_grad_() for x in fenced]
    op = attnc.compile(patterns.window(7), grid=(7, 7), backend="cpp")
    for inputs in (fenced, plain):
        op(*inputs).square().sum().backward()
    for a, b in zip(fenced, plain, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
