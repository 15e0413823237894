"""`python -m bench [NAME ...]`: measure attnc beside its peers; results in bench/results, from there docs/performance*.md."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
# page faults of freshly mapped memory would dominate eager code: freed memory is kept instead, for both sides; waiting threads
# sleep, because torch's pool and the kernels' share the cores
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="rows whose name contains one of these; all without")] = None,
    everything: Annotated[
        bool, typer.Option(help="every dtype, batch and number of threads, models twice as large, FlexAttention everywhere: hours")
    ] = False,
    quick: Annotated[bool, typer.Option(help="few rounds, nothing kept: does it run?")] = False,
    seconds: Annotated[float, typer.Option(help="measured time of a row")] = 1.2,
    out: Annotated[Path | None, typer.Option(help="folder for the results; bench/results/KIND for a whole run, else none")] = None,
    page: Annotated[bool, typer.Option("--page", help="only write docs/performance*.md from bench/results")] = False,
) -> None:
    """Measure attnc beside its peers in one run."""
    results = ROOT / "bench" / "results"
    if page:
        from bench.page import write_all

        write_all(results, ROOT / "docs")
        return
    if any(os.environ.get(k) != v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"):
        os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], {**os.environ, **ENVIRONMENT})
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as e:
        typer.echo(f"attnc bench: {e.name} is missing: pip install --editable '.[dev]' in the repository", err=True)
        raise typer.Exit(2) from None
    whole = out is None and not names and not quick
    if whole:
        from bench.timing import machine

        out = results / machine()["kind"]
    words = [*(f"--name={n}" for n in names or ()), f"--seconds={seconds}"]
    words += ["--everything"] * everything + ["--quick"] * quick + ([f"--out={out}"] if out else [])
    status = pytest.main(["-c", str(ROOT / "bench" / "pytest.ini"), str(ROOT / "bench"), *words])
    if status == pytest.ExitCode.OK and whole:
        from bench.page import write_all

        write_all(results, ROOT / "docs")
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        typer.echo(f"attnc bench: no row's name contains {' or '.join(names or ())}; without a name all rows run", err=True)
        raise typer.Exit(2)
    raise typer.Exit(int(status))


if __name__ == "__main__":
    typer.run(main)
