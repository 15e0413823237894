"""One build cache for a run of the suite, shared by its workers: tests never touch the user's own. Kernels are built quickly."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

_folder = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    import strategies  # noqa: F401 - before any union is split: how is changed there

    if "ATTNC_CACHE_DIR" not in os.environ:  # workers inherit it from the process that started them
        config.stash[_folder] = os.environ["ATTNC_CACHE_DIR"] = tempfile.mkdtemp(prefix="attnc-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _folder in config.stash:
        shutil.rmtree(config.stash[_folder], ignore_errors=True)
        del os.environ["ATTNC_CACHE_DIR"]


@pytest.fixture(scope="session", autouse=True)
def _quick_builds() -> Iterator[None]:
    """A kernel's meaning is what tests hold, and hundreds are built for a few tokens. `test_as_shipped` uses the real flags."""
    from builds import QUICK, built_with

    with built_with(QUICK):
        yield
