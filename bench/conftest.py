"""Options of the suites, which rows are measured, and where results go. Start them by `python -m bench`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from attnc.runtime import tuner
from bench.cases import Case, cases
from bench.timing import Results

# dtype, batch, threads, backward: what a run measures of every case
STANDARD = [
    ("float32", 8, 2, False),
    ("float32", 8, 2, True),
    ("float32", 1, 1, False),
    ("float32", 1, 1, True),
    ("bfloat16", 8, 2, False),
]
REST = [(d, b, t, w) for d in ("float32", "bfloat16") for b in (8, 1) for t in (2, 1) for w in (False, True)]
OVERHEAD = 1.0  # seconds of a row beside its measured rounds: inputs, masks, the kernel's build or load, slow peers
OTHERS = {"test_model": 150, "test_models": 480, "test_costs": 200}  # seconds of the other suites, about


@dataclass(frozen=True)
class Row:
    """A case at one dtype, batch and number of threads, forward or forward and backward."""

    case: Case
    dtype: str
    batch: int
    threads: int
    backward: bool

    @property
    def what(self) -> str:
        """The pass."""
        return "forward + backward" if self.backward else "forward"

    def __str__(self) -> str:
        short = {"float32": "f32", "bfloat16": "bf16"}[self.dtype]
        return f"{self.case.name} {self.case.size} {short} b{self.batch} t{self.threads} {self.what}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `python -m bench` passes on."""
    group = parser.getgroup("attnc bench")
    group.addoption("--name", action="append", default=[], help="rows and costs whose name, or whose file's, contains this")
    group.addoption("--everything", action="store_true", help="every dtype, batch and number of threads; FlexAttention everywhere")
    group.addoption("--quick", action="store_true", help="few rounds: does it run?")
    group.addoption("--seconds", type=float, default=1.2, help="of a row")
    group.addoption("--out", default="", help="folder of the results; none: they are only printed")


def rows(config: pytest.Config) -> list[Row]:
    """What is asked for, in the order it is measured: the standard set first."""
    asked = STANDARD + [r for r in REST if r not in STANDARD] if config.getoption("everything") else STANDARD
    found = [Row(case, *rest) for rest in asked for case in cases()]
    names = config.getoption("name")
    return [r for r in found if not names or any(n in str(r) for n in names)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a row."""
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", rows(metafunc.config), ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Names choose among the other suites, too."""
    names = config.getoption("name")

    def unwanted(item: pytest.Item) -> bool:
        if "row" in getattr(item, "fixturenames", ()):
            return item.name == "test_row[NOTSET]"  # no row was asked for
        return bool(names) and not any(n in item.nodeid for n in names)

    gone = [i for i in items if unwanted(i)]
    items[:] = [i for i in items if i not in gone]
    config.hook.pytest_deselected(items=gone)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Say how long it will take."""
    modules = [i.module.__name__.rpartition(".")[2] for i in session.items if isinstance(i, pytest.Function)]
    seconds = modules.count("test_attention") * (session.config.getoption("seconds") + OVERHEAD)
    seconds += sum(s * modules.count(m) / max(len(modules), 1) for m, s in OTHERS.items())
    minutes = max(round(seconds / 60), 1)
    print(f"{len(session.items)} rows, about {minutes} minutes with kernels built, started {time.strftime('%H:%M')}", flush=True)


def pytest_report_teststatus(report: pytest.TestReport) -> Any:
    """Rows print themselves; a dot for each would only be in the way."""
    return ("passed" if report.when == "call" else "", "", "") if report.passed else None


@pytest.fixture(scope="session")
def stores(request: pytest.FixtureRequest) -> dict[str, Results]:
    """Results by suite, made when asked for."""
    return {}


@pytest.fixture
def results(request: pytest.FixtureRequest, stores: dict[str, Results]) -> Results:
    """Where this suite's rows go: a JSON file named after it."""
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    out = request.config.getoption("out")
    return stores.setdefault(name, Results(name, Path(out) if out else None))


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """Measured time of a row."""
    return 0.0 if request.config.getoption("quick") else float(request.config.getoption("seconds"))


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Only whether it runs is asked."""
    return bool(request.config.getoption("quick"))


@pytest.fixture(autouse=True)
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same inputs each time, and choices by the cost model, whatever was tuned on this machine."""
    torch.manual_seed(0)
    monkeypatch.setattr(tuner, "winner", lambda like: None)
