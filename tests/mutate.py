"""`python tests/mutate.py --number 200 --seed 1`: is a wrong operator in the geometry or in a printer noticed?

Single operators are made wrong, one at a time, in a copy of the project; each time the tests of what was touched run until one
fails. Sites: comparisons, arithmetic, `and`/`or`/`not`, minimum and maximum, True and False, 0 and 1; in code by its syntax tree,
in printed text (strings of attnc/codegen, its headers) by a pattern. By rule no site is: what only chooses among tilings of one
meaning or predicts time (CHOICES), annotations, decorators, docstrings, comments, `strict=`, texts of errors and of descriptions.

The sample is those of all sites whose names hash lowest with the seed: other code may change and it stays. The tests of a path come
in stages, the quickest first: every mutant is asked the first stage, then what is left the second. A result is a line of `--out`;
what it has is not run again (with `--again`, what nothing noticed is).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"printers": 0.4, "geometry": 0.4, "headers": 0.2}  # the quickest first
CHOICES = {  # file: its functions, or all of it
    "choose.py": "all", "cost.py": "all", "chips.py": "all", "counts.py": "all", "settled.py": "all",
    "tiles.py": "_grouped instructions _cost _warps _whole _facts choose _around _launched _fitting candidates reread tiles "
                "_powers _lengths alike _like unrolled",
}  # fmt: skip
DESCRIPTIONS = "describe described show __repr__ kernels_version"
BOTH = "< <=,> >=,== !=,+ -,and or,& |,&& ||,min max,minimum maximum,True False,true false,+= -=,&= |=,is is_not,in not_in"
SWAP = {a: b.replace("_", " ") for p in BOTH.split(",") for a, b in (p.split(), p.split()[::-1])}
SWAP = {a.replace("_", " "): b for a, b in SWAP.items()} | {"*": "+", "//": "*", "/": "*", "%": "//", "0": "1", "1": "2"}
SIGNS = "Lt <,LtE <=,Gt >,GtE >=,Eq ==,NotEq !=,Is is,IsNot is not,In in,NotIn not in,Add +,Sub -,Mult *,FloorDiv //,Div /,Mod %"
SIGN = dict(s.split(" ", 1) for s in f"{SIGNS},BitAnd &,BitOr |,And and,Or or".split(","))
PRINTED = re.compile(
    r"(?<= )(?:<=|>=|==|!=|<|>|\+=|-=|\+|-|\*|//|/|%|&&|\|\||&|\|)(?= )|\b(?:min|max|minimum|maximum)(?=\()"
    r"|(?<![\w.\"'])(?:[01]|True|False|true|false)(?![\w.\"'])"
)
Place = tuple[int, str, str]  # characters from the file's beginning, what is there, what it becomes


@dataclass(frozen=True)
class Site:
    """A mutation, known by its line's text: it is the same where lines above it change."""

    path: str
    line: int = field(compare=False)
    at: int = field(compare=False)
    old: str
    new: str
    text: str
    column: int  # in the text
    nth: int  # of the lines of this text in the file

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.old.strip()} -> {self.new or 'nothing'}   {self.text}"

    def lot(self, seed: int) -> bytes:
        """What decides whether it is drawn."""
        name = (seed, self.path, self.text, self.column, self.nth, self.old)
        return hashlib.sha256(repr(name).encode()).digest()


class OfCode(ast.NodeVisitor):
    """Places of operators in Python, and the spans that hold none."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self.rows = path, text, text.split("\n")
        self.lines = [0]
        for row in self.rows:
            self.lines.append(self.lines[-1] + len(row) + 1)
        self.found: list[Place] = []
        self.spans: list[tuple[int, int]] = []
        self.visit(ast.parse(text))

    def place(self, row: int, column: int) -> int:  # columns of the tree are bytes
        return self.lines[row - 1] + len(self.rows[row - 1].encode()[:column].decode())

    def span(self, n: ast.AST) -> tuple[int, int]:
        begin = self.place(n.lineno, n.col_offset)  # type: ignore[attr-defined]
        return begin, self.place(n.end_lineno, n.end_col_offset)  # type: ignore[attr-defined]

    def between(self, left: ast.AST, right: ast.AST, sign: ast.AST) -> None:
        old = SIGN.get(type(sign).__name__, "")
        at = self.text.find(old, self.span(left)[1], self.span(right)[0])
        if at >= 0 and old in SWAP:
            more = "=" * isinstance(left.ctx if hasattr(left, "ctx") else None, ast.Store)
            self.found += [(at, old + more, SWAP[old + more])] if old + more in SWAP else []

    def visit(self, n: ast.AST) -> None:
        parts: list[ast.AST | None] = []
        if isinstance(n, ast.FunctionDef):
            chosen = f"{CHOICES.get(self.path.name, '')} {DESCRIPTIONS}".split()
            parts = [n, *n.decorator_list] if n.name in chosen else [*n.decorator_list, n.returns]
        elif isinstance(n, ast.ClassDef):
            parts = [*n.decorator_list]
        elif isinstance(n, ast.arg | ast.AnnAssign):
            parts = [n.annotation]
        elif (
            isinstance(n, ast.Raise)
            or (isinstance(n, ast.keyword) and n.arg == "strict")
            or (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
        ):
            parts = [n]
        elif isinstance(n, ast.Compare):
            for a, sign, b in zip([n.left, *n.comparators], n.ops, n.comparators, strict=False):
                self.between(a, b, sign)
        elif isinstance(n, ast.BinOp):
            self.between(n.left, n.right, n.op)
        elif isinstance(n, ast.AugAssign):
            self.between(n.target, n.value, n.op)
        elif isinstance(n, ast.BoolOp):
            for a, b in zip(n.values, n.values[1:], strict=False):
                self.between(a, b, n.op)
        elif isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Not):
            self.found.append((self.span(n)[0], "not ", ""))
        elif isinstance(n, ast.Call) and isinstance(n.func, ast.Name | ast.Attribute):
            name = n.func.id if isinstance(n.func, ast.Name) else n.func.attr
            self.found += [(self.span(n.func)[1] - len(name), name, SWAP[name])] if name in SWAP else []
        elif isinstance(n, ast.Constant) and repr(n.value) in SWAP:
            self.found.append((self.span(n)[0], repr(n.value), SWAP[repr(n.value)]))
        self.spans += [self.span(p) for p in parts if p is not None]
        if not isinstance(n, ast.JoinedStr):  # its parts have no places of their own
            self.generic_visit(n)


def of_text(text: str, at: int, comment: str) -> Iterator[Place]:
    """Places in printed text, line by line, up to the line's comment."""
    for line in text.splitlines(keepends=True):
        code = re.split(r"//(?=[ -])" if comment == "//" else r"(?:^|\s)#", line)[0]
        if not re.match(r"\s*(#|raise |template)", code) and "ValueError" not in code and '"""' not in code:
            yield from ((at + m.start(), m[0], SWAP[m[0]]) for m in PRINTED.finditer(code))
        at += len(line)


def sites(path: Path) -> list[Site]:
    """Every site of a file."""
    text = path.read_text()
    if path.suffix == ".h":
        found = set(of_text(text, 0, "//"))
    else:
        code = OfCode(path, text)
        found = set(code.found)
        for token in tokenize.generate_tokens(io.StringIO(text).readline) if path.parent.name == "codegen" else ():
            if token.type == tokenize.STRING:
                at = code.lines[token.start[0] - 1] + token.start[1]
                found |= set(of_text(token.string, at, "//" if path.name.startswith("cpp") else "#"))
        found = {f for f in found if text.startswith(f[1], f[0]) and not any(a <= f[0] < b for a, b in code.spans)}
    rows, name, begin, out = text.split("\n"), str(path.relative_to(ROOT)), 0, []
    places, before = sorted(found), Counter[str]()
    for n, row in enumerate(rows):
        line = row.strip()
        column = begin + row.find(line)
        mine = [f for f in places if begin <= f[0] <= begin + len(row)]
        out += [Site(name, n + 1, at, old, new, line, at - column, before[line]) for at, old, new in mine]
        before[line] += 1
        begin += len(row) + 1
    return out


def drawn(number: int, seed: int) -> list[Site]:
    """So many sites, each kind of file by its share, each site of a kind equally likely."""
    folder, chosen = ROOT / "attnc", []
    planned = [p for f in ("analysis", "schedule") for p in sorted((folder / f).glob("*.py"))] + [folder / "report" / "issued.py"]
    kinds = {
        "geometry": [p for p in planned if CHOICES.get(p.name) != "all"],
        "printers": sorted((folder / "codegen").glob("*.py")),
        "headers": sorted((folder / "codegen").glob("*.h")),
    }
    for kind, share in SHARES.items():
        every = sorted((s for p in kinds[kind] for s in sites(p)), key=lambda s: s.lot(seed))
        print(f"{kind}: {len(every)} sites in {len(kinds[kind])} files", flush=True)
        chosen += every[: round(number * share)]
    return chosen


PLAIN = "-k 'not cpp and not interpret'"  # nothing is compiled or interpreted
MEANT = f"{PLAIN} backends pattern_grids pattern_scores patterns"
FORMS = f"{PLAIN} forms printed implied lift"
NO_TRITON = "-k 'not interpret'"
BUILT = "-k cpp backends pattern_grids"
UNSHIPPED = "-k 'not compile and not shipped'"
CPP = f"{UNSHIPPED} cpp cpp_bfloat16 cpp_builds gaps"
TESTS = {  # what a path begins with: the stages of its tests
    "attnc/analysis/dropout": [f"{PLAIN} dropout printed", f"{NO_TRITON} dropout"],
    "attnc/analysis/derivative": ["reals", "explain", f"{PLAIN} printed pattern_scores", f"{CPP} scores_on_every_grid"],
    "attnc/analysis/evaluate": [f"{PLAIN} reals forms normalizers", f"{PLAIN} lists ir dropout", MEANT, "errors"],
    "attnc/analysis/implied": ["implied", FORMS, "geometry explain", MEANT],
    "attnc/analysis/lift": ["lift printed", FORMS, f"{NO_TRITON} lists compat_flex"],
    "attnc/analysis/intervals": [f"{PLAIN} lists", f"{NO_TRITON} lists explain"],
    "attnc/analysis": [FORMS, "geometry explain cost", f"{NO_TRITON} own_blocks", f"{MEANT} lists"],
    "attnc/schedule/boxes": ["-k 'text or modules or segments' printed tuning", f"{CPP} report tuning", "bands"],
    "attnc/schedule/bounds": [
        "-k 'ranges or refused or outside or virtual' geometry errors",
        f"{FORMS} geometry errors",
        MEANT,
        BUILT,
    ],
    "attnc/schedule/geometry": [
        "-k 'not compile_refuses' printed geometry errors",
        f"{FORMS} cost report",
        f"{UNSHIPPED} gaps",
        f"{MEANT} explain errors",
        BUILT,
    ],
    "attnc/schedule/list": [f"{PLAIN} lists", "lists explain"],
    "attnc/schedule/split": [f"{PLAIN} parts", f"{NO_TRITON} parts explain", MEANT],
    "attnc/schedule/plan": ["explain", "cost cli"],
    "attnc/schedule/tiles": [
        "printed cost report",
        f"{NO_TRITON} own_blocks",
        "explain tuning_gpu",
        "-k interpret own_blocks lists triton parts",
    ],
    "attnc/schedule/walks": [
        "printed cost report",
        "-k 'columns or own or tile' triton own_blocks",
        "-k interpret own_blocks lists triton parts normalizers",
    ],
    "attnc/report/issued": ["report cost", "explain", "emit gpu_static"],
    "attnc/codegen/triton_channel": ["printed", "-k channel emit davit"],
    "attnc/codegen/triton": [
        "printed",
        "-k interpret lists parts own_blocks",
        "-k interpret triton normalizers dropout rotary emit_dropout",
    ],
    "attnc/codegen/channel": ["cpp_channel", "cpp_memory", "-k channel cpp cpp_bfloat16 cpp_builds"],
    "attnc/codegen/band": ["cpp_memory cpp_ahead", "bands"],
    "attnc/codegen/random": ["-k cpp dropout"],
    "attnc/codegen/lists": ["-k cpp lists", CPP],
    "attnc/codegen/over_queries": [f"{PLAIN} normalizers", f"{NO_TRITON} normalizers"],
    "attnc/codegen/around": [f"{PLAIN} normalizers rotary", "normalizers rotary"],
    "attnc/codegen/eager": [f"{PLAIN} normalizers backends", f"{MEANT} sizes"],
    "attnc/codegen/torch": [f"{PLAIN} lists backends", f"{MEANT} normalizers sizes regressions"],
    "attnc/codegen/blocks": [f"{PLAIN} backends", f"{MEANT} normalizers dropout sizes"],
    "attnc/codegen/cpp": [
        "printed",
        f"{CPP} layout",
        "bands",
        f"{BUILT} lists dropout normalizers scores_on_every_grid sizes cache",
    ],
    "attnc/codegen": [
        f"{UNSHIPPED} cpp_memory cpp_ahead cpp_rows",
        f"{CPP} layout",
        f"{BUILT} lists dropout normalizers scores_on_every_grid sizes",
    ],
}


def stages(path: str) -> list[list[str]]:
    """What pytest is given for a file, in turn."""

    def words(stage: str) -> list[str]:
        names = shlex.split(stage)
        chosen = 2 if names[0] == "-k" else 0
        return [*names[:chosen], *(f"tests/test_{name}.py" for name in names[chosen:])]

    return [words(s) for s in next(names for start, names in TESTS.items() if path.startswith(start))]


def run(tree: Path, words: list[str], limit: int) -> str:
    """Tests of a tree until one fails, in a fork: "passed", "time-out", or what failed."""
    log, cache = tree.parent / "log", Path(tempfile.mkdtemp(prefix="cache-", dir=tree.parent))
    (cache / ".attnc-cache").touch(0o600)
    for kind in ("cpp", "proofs"):  # whose keys are all that their entries depend on: all runs share them
        (tree.parent / kind).mkdir(mode=0o700, exist_ok=True)
        (cache / kind).symlink_to(tree.parent / kind)
    begun, status, pid = time.monotonic(), None, os.fork()
    if pid == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        status = 99
        try:
            os.chdir(tree)
            os.environ |= {"ATTNC_CACHE_DIR": str(cache), "PYTHONPATH": f"{tree}:{tree / 'tests'}"}
            os.environ |= {"HYPOTHESIS_PROFILE": "once", "ATTNC_TEST_STOP": "1"}
            outside = [p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests")]
            sys.path[:] = [str(tree), str(tree / "tests"), *outside]
            import pytest

            status = int(
                pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain", "--tb=short", *words])
            )
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    try:
        while status is None and time.monotonic() - begun < 4 * limit:
            time.sleep(0.05)
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
    finally:
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    shutil.rmtree(cache, ignore_errors=True)
    if status in (None, -signal.SIGXCPU):
        return "time-out"
    text = log.read_text(errors="replace")
    said = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.M)
    if status > 0 and not said:  # not a test's word
        raise RuntimeError(f"pytest ended with {status} and no failed test:\n{text[-2000:]}")
    return said[0] if status > 0 else "passed" if status == 0 else f"signal {-status}"


def forget(path: Path) -> None:
    """Drop what Python compiled of a file: its size and the second of its change may be the same."""
    for old in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        old.unlink()


def main() -> None:
    """Sample, copy, run, count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--again", action="store_true", help="also those that nothing noticed before")
    parser.add_argument(
        "--limit", type=int, default=60, help="seconds of a processor of a first stage; later ones have ten times that"
    )
    parser.add_argument("--list", action="store_true", help="show the sample and run nothing")
    options = parser.parse_args()
    chosen = drawn(options.number, options.seed)
    if options.list:
        print(*chosen, sep="\n")
        return
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    known = {Site(**{k: r[k] for k in Site.__match_args__}): r for r in map(json.loads, lines)}  # its last line
    if options.again:
        known = {s: r for s, r in known.items() if r["by"] != "passed"}
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": ""}
    sys.dont_write_bytecode = False
    for name in ["hypothesis", "networkx", "pytest", "sympy", "torch", "triton"]:  # no mutant changes them: forked with runs
        with contextlib.suppress(ImportError):  # triton is not everywhere
            importlib.import_module(name)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, tracked.split("\0")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
        for name in ("patterns", "models"):  # as the package has them, without the mapping of an installed one
            (tree / "attnc" / name).symlink_to(tree / name)
        for n in range(max(map(len, TESTS.values()))):
            for s in chosen:
                words, before = stages(s.path), known.get(s, {"by": "passed", "stages": 0, "seconds": 0.0})
                if n >= len(words) or before["by"] != "passed" or n < before["stages"]:
                    continue
                path, begun = tree / s.path, time.monotonic()
                text = path.read_text()
                forget(path)
                path.write_text(text[: s.at] + s.new + text[s.at + len(s.old) :])
                by = run(tree, words[n], options.limit * (10 if n else 1))
                path.write_text(text)
                forget(path)
                spent = round(before["seconds"] + time.monotonic() - begun, 1)
                known[s] = {**asdict(s), "by": by, "stages": n + 1, "seconds": spent}
                with options.out.open("a") as f:
                    f.write(json.dumps(known[s]) + "\n")
                print(f"{s}\n    {by}, stage {n + 1}, {spent} s", flush=True)
        tests = sorted({known[s]["by"] for s in chosen if "::" in known[s]["by"]})
        if tests:
            print("the tests that failed, without a mutation:", run(tree, tests, 10 * options.limit), flush=True)
    left = [s for s in chosen if known[s]["by"] == "passed"]
    late = [s for s in chosen if known[s]["by"] == "time-out"]
    print(f"{len(chosen) - len(left)} of {len(chosen)} noticed, {len(late)} of them by time-out:", *late, sep="\n  ")
    print("unnoticed:", *left, sep="\n  ")


if __name__ == "__main__":
    main()
