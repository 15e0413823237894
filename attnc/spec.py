"""Patterns named on a command line: ``window:size=7,shift=3`` or ``file.py:name:size=7``.

Values are read by a small grammar of their own (nothing is evaluated): integers, floats, ``true``/``false``,
``none``, ``7x7`` for a tuple of integers, and plain words.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from attnc.errors import AttncError, DeclarationError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern

_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)(?::(?P<hyper>.*))?")
_LIBRARY = re.compile(r"(?P<name>[A-Za-z_]\w*)(?::(?P<hyper>.*))?")
_INT = re.compile(r"[+-]?\d+")
_TUPLE = re.compile(r"[+-]?\d+(x[+-]?\d+)+")
_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "none": None}

Value = int | float | bool | str | tuple[int, ...] | None


def resolve(spec: str) -> Any:
    """The pattern or mechanism that `spec` names, with its hyper-parameters filled in.

    Raises:
        DeclarationError: `spec` does not parse, names nothing, or its hyper-parameters do not fit.
    """
    match = _FILE.fullmatch(spec)
    if match:
        found = _from_file(Path(match["file"]), match["name"])
    else:
        match = _LIBRARY.fullmatch(spec)
        if not match:
            raise DeclarationError(f"{spec!r} is neither NAME:key=value,... nor FILE.py:NAME:key=value,...")
        found = _from_library(match["name"])
    return _filled(match["name"], found, hyper_parameters(match["hyper"] or ""))


def hyper_parameters(text: str) -> dict[str, Value]:
    """``"size=7x5,bias=relative"`` as ``{"size": (7, 5), "bias": "relative"}``."""
    found: dict[str, Value] = {}
    for item in filter(None, text.split(",")):
        key, equals, word = (part.strip() for part in item.partition("="))
        if not equals or not key.isidentifier() or not word:
            raise DeclarationError(f"{item!r} is not a hyper-parameter: write key=value, such as size=7")
        if key in found:
            raise DeclarationError(f"the hyper-parameter {key!r} is given twice")
        found[key] = value(word)
    return found


def value(word: str) -> Value:
    """One value: an int, a float, ``7x7``, true, false, none (any case), or the word itself."""
    if _INT.fullmatch(word):
        return int(word)
    if _TUPLE.fullmatch(word):
        return integers(word)
    if _FLOAT.fullmatch(word):
        return float(word)
    return _WORDS.get(word.lower(), word)


def integers(word: str) -> tuple[int, ...]:
    """``"56x56"`` as ``(56, 56)``, ``"196"`` as ``(196,)``."""
    if not (_TUPLE.fullmatch(word) or _INT.fullmatch(word)):
        raise DeclarationError(f"{word!r} is not a size: write one integer for each axis, such as 56x56")
    return tuple(int(part) for part in word.split("x"))


def library() -> dict[str, Any]:
    """The public factories of `attnc.patterns` by name."""
    from attnc import patterns

    names = getattr(patterns, "__all__", None) or [name for name in dir(patterns) if not name.startswith("_")]
    found = {name: getattr(patterns, name) for name in sorted(names)}
    return {name: each for name, each in found.items() if callable(each) and not inspect.isclass(each)}


def _from_library(name: str) -> Any:
    known = library()
    if name not in known:
        close = get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`attnc list` shows them all"
        raise DeclarationError(f"no library pattern is called {name!r}; {hint}")
    return known[name]


def _from_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise DeclarationError(f"there is no file {path} to take the pattern {name!r} from")
    module = _load(path)
    found = getattr(module, name, None)
    if found is None:
        public = [each for each in vars(module) if not each.startswith("_")]
        close = get_close_matches(name, public, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "is it defined at the top level?"
        raise DeclarationError(f"{path} defines no {name!r}; {hint}")
    return found


def _load(path: Path) -> ModuleType:
    """Run the user's own file as a module (it may import its neighbours), under a name of its own."""
    name = f"_attnc_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DeclarationError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except AttncError:
        raise
    except Exception as error:
        raise DeclarationError(f"{path} stops{_line(error, path)} with {_said(error)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _filled(name: str, found: Any, hyper: dict[str, Value]) -> Any:
    if _is_statement(found):
        if hyper:
            raise DeclarationError(f"{name!r} is a finished pattern and takes no {', '.join(hyper)}")
        return found
    if not callable(found) or inspect.isclass(found):
        raise DeclarationError(f"{name!r} is a {type(found).__name__}, not a pattern or a mechanism")
    try:
        inspect.signature(found).bind(**hyper)
    except TypeError as error:
        takes = ", ".join(inspect.signature(found).parameters) or "nothing"
        raise DeclarationError(f"{name!r}: {error}; it takes {takes}") from error
    made = found(**hyper)
    if not _is_statement(made):
        raise DeclarationError(f"{name!r} gave a {type(made).__name__}, not a pattern; decorate it with @attnc.pattern")
    return made


def _is_statement(found: Any) -> bool:
    return isinstance(found, Pattern | Mechanism)


def _line(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f" at line {error.lineno}"
    resolved = path.resolve()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == resolved]
    return f" at line {lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
