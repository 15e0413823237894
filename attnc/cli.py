"""The ``attnc`` command. Exit status 0, or 2 with one line on stderr for every error of attnc and of usage."""

from __future__ import annotations

import inspect as python_inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from attnc.errors import AttncError

UsageError: Any = typer.BadParameter.__base__  # click's, or that of a typer which brings its own click


class Group(TyperGroup):
    """Turns attnc's errors and those of usage into one line and exit status 2, for every command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _one_line(ctx):
            return super().invoke(ctx)


@contextmanager
def _one_line(ctx: Any) -> Iterator[None]:
    try:
        yield
    except AttncError as error:
        if ctx.params.get("traceback"):
            raise
        from attnc.doctor import first_line

        typer.echo(f"attnc: {type(error).__name__}: {first_line(error)}", err=True)
        raise typer.Exit(2) from None
    except UsageError as error:
        said = error.format_message()
        if "\n" in said:  # the help, where a command comes without arguments
            raise
        typer.echo(f"attnc: {said.rstrip('.')} (`{(error.ctx or ctx).command_path} --help` shows what it takes)", err=True)
        raise typer.Exit(2) from None


app = typer.Typer(
    cls=Group,
    name="attnc",
    help="A compiler for attention. SPEC is a library pattern (window:size=7,shift=3) or file.py:name.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="The build cache on disk.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


def _sizes(word: str) -> tuple[int, ...]:
    """``--grid 56x56``: one positive integer for each axis."""
    from attnc.spec import integers

    try:
        sizes = integers(word)
    except AttncError as error:
        raise typer.BadParameter(str(error), param_hint="--grid") from error
    if min(sizes) < 1:
        raise typer.BadParameter(f"{word!r}: sizes are positive", param_hint="--grid")
    return sizes


def _point(word: str) -> tuple[int, ...]:
    """``--query 3,4``: one coordinate for each axis."""
    from attnc.spec import integers

    try:
        return integers(word.replace(",", "x"))
    except AttncError as error:
        said = f"{word!r}: write the query's coordinates, such as 3,4"
        raise typer.BadParameter(said, param_hint="--query") from error


Spec = Annotated[str, typer.Argument(metavar="SPEC", help="NAME:key=value,... or FILE.py:NAME:key=value,...")]
Specs = Annotated[list[str], typer.Argument(metavar="SPEC...", help="NAME:key=value,... or FILE.py:NAME:key=value,...")]
Grid = Annotated[str, typer.Option(metavar="HxW", help="Grid size, one integer for each axis: 56x56.")]
Heads = Annotated[int, typer.Option(min=1, help="Heads.")]
HeadDim = Annotated[int, typer.Option(min=1, max=256, help="Channels of a head.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
Target = Annotated[str, typer.Option(help="cuda:80, cuda:90, cuda:100, hip:gfx942, hip:gfx1100 or cpu.")]


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Declare who attends to whom; get a fused PyTorch operator."""


@app.command()
def doctor() -> None:
    """Say what is installed and which backends work, with a fix for each that does not."""
    from attnc.doctor import examine

    with _working("looking"):
        findings = list(examine())
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        mark = "[green]ok[/]" if finding.good else "[red]--[/]"
        table.add_row(mark, finding.what, _plain(finding.found), f"[dim]{_plain(finding.fix)}[/]")
    _out().print(table)
    bad = [finding for finding in findings if not finding.good]
    for finding in bad:
        _out().print(f"To mend {_plain(finding.what)}: {_plain(finding.fix)}")
    if not bad:
        _out().print("Nothing to mend. Try: attnc explain window:size=7 --grid 14x14")


@app.command("list")
def list_() -> None:
    """List the library's patterns and the models."""
    from attnc import models
    from attnc.spec import library

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, factory in library().items():
        said = (python_inspect.getdoc(factory) or "").partition("\n")[0]
        table.add_row(f"[bold]{name}[/]", _takes(factory), f"[dim]{_plain(said)}[/]")
    _out().print("[bold]Patterns[/]")
    _out().print(table)
    _out().print("\n[bold]Models[/]")
    for name in models.list_models():
        _out().print(name)


@app.command()
def explain(
    spec: Spec,
    grid: Annotated[str | None, typer.Option(metavar="HxW", help="Grid size.")] = None,
) -> None:
    """Print the normal form, the proof of each structure found, and the strategy."""
    import attnc

    sizes = None if grid is None else _sizes(grid)
    pattern = _resolve(spec)
    with _working("proving"):
        text = attnc.explain(pattern, grid=sizes)
    typer.echo(text)


@app.command("compile")
def compile_(
    specs: Specs,
    grid: Grid,
    heads: Heads = 1,
    head_dim: HeadDim = 32,
    dtype: Dtype = "float16",
    target: Target = "cuda:90",
    output: Annotated[str | None, typer.Option("--output", "-o", help="File to write, or folder/; else stdout.")] = None,
) -> None:
    """Print the stand-alone Python module with the fused forward and backward kernels.

    With several SPECs, or an output that ends in a slash: a folder that pip installs, also in the layout of Hugging Face's kernels.
    """
    import attnc

    sizes = _sizes(grid)
    patterns = [(spec, _resolve(spec)) for spec in specs]
    options: dict[str, Any] = {"grid": sizes, "heads": heads, "head_dim": head_dim, "dtype": dtype, "target": target}
    if len(patterns) > 1 or (output is not None and output.endswith("/")):
        if output is None:
            raise typer.BadParameter("several patterns are written to a folder: -o package/", param_hint="--output")
        _write_package(patterns, Path(output), options)
        return
    with _working("compiling"):
        source = attnc.emit(patterns[0][1], **options)
    if output is None:
        typer.echo(source, nl=not source.endswith("\n"))
        return
    _write(Path(output), source)
    typer.echo(f"{output}: {len(source.splitlines())} lines")


@app.command()
def inspect(
    spec: Spec,
    grid: Grid,
    heads: Heads = 1,
    head_dim: HeadDim = 32,
    dtype: Dtype = "float16",
    target: Target = "cuda:90",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Report the cost: strategy, waste, registers, shared memory, instructions. No GPU needed."""
    import attnc

    sizes = _sizes(grid)
    pattern = _resolve(spec)
    with _working("compiling"):
        report = attnc.inspect(
            pattern, grid=sizes, heads=heads, head_dim=head_dim, dtype=dtype, target=target, batch=batch
        ).to_dict()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    summary = Table(box=None, show_header=False, pad_edge=False)
    for key, found in report.items():
        if key != "kernels":
            summary.add_row(key, _shown(found))
    _out().print(summary)
    kernels = report.get("kernels") or {}
    columns = [key for key in next(iter(kernels.values()), {}) if key != "loops"]
    table = Table("kernel", *columns, box=None, pad_edge=False)
    for name, facts in kernels.items():
        table.add_row(name, *(_shown(facts.get(key)) for key in columns))
    _out().print()
    _out().print(table)


@app.command()
def tune(
    spec: Annotated[str | None, typer.Argument(metavar="[SPEC]", help="What to tune; none with --export or --import.")] = None,
    grid: Annotated[str | None, typer.Option(metavar="HxW", help="Grid size, one integer for each axis: 56x56.")] = None,
    heads: Heads = 1,
    head_dim: HeadDim = 32,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or float64.")] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; torch's own number without.")] = None,
    device: Annotated[str, typer.Option(help="Where to measure: cpu, cuda, cuda:1.")] = "cpu",
    backward: Annotated[bool, typer.Option(help="Also measure the backward.")] = True,
    graphs: Annotated[bool, typer.Option("--graphs", help="On a GPU, time launches in CUDA graphs.")] = False,
    export: Annotated[Path | None, typer.Option("--export", help="Write all winners of the cache to this file.")] = None,
    merge: Annotated[Path | None, typer.Option("--import", help="Merge this file of winners into the cache.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Measure the ways a pattern can run at a shape, and keep the fastest for later calls; hand winners over as files."""
    import attnc

    if merge is not None:
        typer.echo(attnc.import_winners(str(merge)))
    if spec is not None and grid is not None:
        _measure(spec, grid, heads, head_dim, dtype, batch, threads, device, backward, graphs, as_json)
    elif spec is not None or grid is not None or (export is None and merge is None):
        raise typer.BadParameter("give SPEC and --grid, or --export FILE, or --import FILE")
    if export is not None:
        n = attnc.export_winners(str(export))
        typer.echo(f"{export}: {n} winner{'' if n == 1 else 's'}")


def _measure(
    spec: str, grid: str, heads: int, head_dim: int, dtype: str, batch: int, threads: int | None, device: str, backward: bool,
    graphs: bool, as_json: bool,
) -> None:  # fmt: skip
    import torch

    import attnc

    shape = {"grid": _sizes(grid), "heads": heads, "head_dim": head_dim, "dtype": dtype, "batch": batch, "backward": backward}
    pattern = _resolve(spec)
    if threads is not None:
        torch.set_num_threads(threads)
    with _working("building and measuring") as shown:

        def told(race: Any) -> None:
            won = race.winner
            shown.console.print(f"{race.direction}, {race.shape}: {_plain(won.choice)}, {1e3 * won.seconds:.3f} ms")
            shown.update(f"building and measuring after the {race.direction}")

        found = attnc.tune(pattern, shape, device, graphs=graphs, told=told if sys.stderr.isatty() else None)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    elif found.races:
        _out().print(_plain(found.title))
        _out().print(found)
    else:
        typer.echo(f"{found.pattern}: there is one way to run it")


@app.command()
def draw(
    spec: Spec,
    grid: Grid,
    query: Annotated[str | None, typer.Option(metavar="Y,X", help="Show the keys of this query.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write.")] = Path("pattern.png"),
) -> None:
    """Draw the mask, the keys of one query on the grid, and the tiles visited."""
    import attnc

    sizes, at = _sizes(grid), None if query is None else _point(query)
    pattern = _resolve(spec)
    with _working("drawing"):
        attnc.draw(pattern, grid=sizes, query=at, path=str(output))
    typer.echo(str(output))


@cache_app.command("info")
def cache_info() -> None:
    """Say where the cache is and what it holds."""
    from attnc.runtime import cache

    kinds = cache.info()
    typer.echo(cache.root())
    for kind, found in kinds.items():
        typer.echo(f"{kind:12} {found.entries:6} entries {found.bytes / 1e6:10.2f} MB")
    if not kinds:
        typer.echo("empty")


@cache_app.command("clear")
def cache_clear() -> None:
    """Remove everything from the cache."""
    from attnc.runtime import cache

    entries = sum(kind.entries for kind in cache.info().values())
    cache.clear()
    typer.echo(f"removed {entries} entries from {cache.root()}")


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="rows whose name contains one of these; all without")] = None,
    quick: Annotated[bool, typer.Option(help="few rounds, nothing kept: does it run?")] = False,
) -> None:
    """Measure attnc beside its peers (in a checkout of the repository)."""
    import subprocess

    import attnc
    from attnc.errors import UnsupportedError

    root = Path(attnc.__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").exists():
        raise UnsupportedError(
            f"attnc bench: {root} has no folder bench, which is part of the repository and of no wheel; "
            "clone the repository and run `make bench`, or `pip install --editable '.[dev]'` there and this command again"
        )
    words = [*(names or []), *(["--quick"] if quick else [])]
    raise typer.Exit(subprocess.run([sys.executable, "-m", "bench", *words], cwd=root, check=False).returncode)


def _resolve(spec: str) -> Any:
    from attnc.spec import resolve

    return resolve(spec)


def _out() -> Console:
    """Standard output. Piped into a file or grep, lines are not cut to a terminal's width."""
    return Console(width=None if sys.stdout.isatty() else 240, highlight=False)


def _working(what: str) -> Any:
    """A spinner on stderr while a step runs (nothing is shown where stderr is no terminal)."""
    return Console(stderr=True).status(what)


def _write_package(patterns: list[tuple[str, Any]], folder: Path, options: dict[str, Any]) -> None:
    """Write a folder of modules; progress on stderr."""
    from attnc.report.package import package

    with _working("compiling"):
        files = package(patterns, folder, **options)
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is a file", param_hint="--output")
    for name, text in files.items():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise typer.BadParameter(f"cannot make {(folder / name).parent}: {error.strerror}") from error
        _write(folder / name, text)
    typer.echo(f"{folder}: {len(files)} files; pip install {folder}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error


def _takes(factory: Any) -> str:
    found = []
    for each in python_inspect.signature(factory).parameters.values():
        given = "" if each.default is each.empty else f"={each.default}"
        found.append(f"{each.name}{given}")
    return _plain(", ".join(found))


def _shown(found: Any) -> str:
    if isinstance(found, float):
        return f"{found:.4g}"
    if isinstance(found, list | tuple):
        return "x".join(map(str, found))
    return _plain(f"{found:,}" if isinstance(found, int) and not isinstance(found, bool) else str(found))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
