"""Winners of the tuner, kept as data: what lies in the cache, what people hand to each other, and what a module carries.

A winner is a *key*, which says all that its worth depends on, and a *record* of what was measured::

    key     {"backend", "device": {...}, "versions": {...}, "pattern": {"name", "hash"}, "direction", "dtype", "head_dim",
             "value_dim", "bucket": {"grid", "kv_grid", "items"}}
    record  {"choice", "trials": [{"choice", "seconds", "predicted"}, ...], "statement", "shape", "untuned", "measured"}

Everything read from disk is checked field by field before any of it is used, and a choice counts only if it still is one of the
candidates of the call that asks (`runtime.tuner`). Of two records under one key, the faster is kept where both were measured at
the same shape, else the newer (a bucket holds several shapes, and a smaller one is faster for no merit of its choice).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from attnc import ir
from attnc.errors import CacheError
from attnc.runtime import cache

KIND = "tuned"
SCHEMA = 1
LARGEST = 1 << 26  # bytes of a file that is imported
_HINT = "write one with `attnc tune --export FILE`"
_when = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")

Record = dict[str, Any]


@dataclass(frozen=True)
class Merged:
    """What an import came to: winners that were new, that took the place of a kept one, and that did not."""

    added: int
    replaced: int
    left: int
    elsewhere: int  # of all of them, those of other versions of attnc, torch or triton: kept, and of use only there

    def __str__(self) -> str:
        total = self.added + self.replaced + self.left
        beside = f"; {self.elsewhere} of them measured with other versions, which alone they serve" if self.elsewhere else ""
        many = "" if total == 1 else "s"
        return f"{total} winner{many}: {self.added} new, {self.replaced} better than the kept one, {self.left} no better{beside}"


# ------------------------------------------------------------------------------------------------------------------------- keys
def key(
    *,
    backend: str,
    device: Mapping[str, str | int],
    source: str,
    program: ir.Program,
    direction: str,
    dtype: str,
    head_dim: int,
    value_dim: int,
    bucket: Mapping[str, Any],
) -> str:
    """The text that a winner is kept under. source: changes with the text of the kernels."""
    found = {
        "backend": backend,
        "device": dict(device),
        "versions": versions() | {"source": source},
        "pattern": {"name": _name(program), "hash": pattern_hash(program)},
        "direction": direction,
        "dtype": dtype,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "bucket": dict(bucket),
    }
    return json.dumps(found, sort_keys=True)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions that a measured time depends on."""
    out = {}
    for name in ("attnc", "torch", "triton"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "none"
    return out


@lru_cache(maxsize=1024)
def pattern_hash(program: ir.Program) -> str:
    """Names a program: its statement and its token sets, sizes left open."""
    return hashlib.sha256(ir.to_json(program).encode()).hexdigest()[:32]


def _name(program: ir.Program) -> str:
    return program.attend.name if isinstance(program.attend, ir.Attend) else "channel"


# --------------------------------------------------------------------------------------------------------------------- the store
def kept(like: str) -> Record | None:
    """The record under a key, or None; one that is none is set aside."""
    found = cache.read_json(KIND, like)
    if found is None:
        return None
    flaw = record_flaw(found)
    if flaw is not None:
        cache.set_aside(KIND, like, flaw)
        return None
    record: Record = found
    return record


def keep(like: str, record: Record) -> None:
    """Store what this machine has just measured, in place of whatever was kept."""
    cache.write_json(KIND, like, record)


def every() -> Iterator[tuple[dict[str, Any], Record]]:
    """Keys and records of the whole cache; what is no winner is set aside."""
    for text, value in cache.tables(KIND):
        found = _key_of(text)
        flaw = "its key is not of this version" if found is None else record_flaw(value)
        if found is None or flaw is not None:
            cache.set_aside(KIND, text, flaw or "")
            continue
        yield found, value


def table(program: ir.Program, target: str) -> dict[str, Any]:
    """What was measured of a program on devices of a target ("cuda:90", "cpu"), as data for a module to carry.

    {"schema": 1, "pattern": {"name", "hash"}, "target", "winners": [{"device", "versions", "direction", "dtype", "head_dim",
    "value_dim", "bucket", "shape", "choice", "seconds", "measured"}, ...]}, sorted, so that the same cache gives the same bytes.
    """
    mine = pattern_hash(program)
    rows = []
    for k, r in every():
        if k["pattern"]["hash"] == mine and k["device"]["target"] == target:
            about = {n: k[n] for n in ("device", "versions", "direction", "dtype", "head_dim", "value_dim", "bucket")}
            rows.append(about | {n: r[n] for n in ("shape", "choice", "measured")} | {"seconds": r["trials"][0]["seconds"]})
    rows.sort(key=lambda r: json.dumps(r, sort_keys=True))
    return {"schema": SCHEMA, "pattern": {"name": _name(program), "hash": mine}, "target": target, "winners": rows}


# ------------------------------------------------------------------------------------------------------------ files of winners
def export_winners(path: str | os.PathLike[str]) -> int:
    """Write every winner of the cache to a JSON file, sorted, whole or not at all; gives their number.

    Raises:
        CacheError: the file cannot be written, or the cache cannot be used.
    """
    rows = [{"key": k, "record": r} for k, r in every()]
    rows.sort(key=lambda r: json.dumps(r["key"], sort_keys=True))
    text = json.dumps({"attnc": KIND, "schema": SCHEMA, "winners": rows}, indent=1, sort_keys=True) + "\n"
    target = Path(path)
    try:
        number, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with open(number, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CacheError(f"cannot write the winners to {target} ({error.strerror}); give a path in a folder of yours") from error
    return len(rows)


def import_winners(path: str | os.PathLike[str]) -> Merged:
    """Merge a file of winners into the cache. All of it is checked before any of it is kept, and nothing in it is run.

    Raises:
        CacheError: the file cannot be read, is of another schema, or has an unknown field or a value of the wrong type; the
            message says where. Then nothing was changed, and the file stays where it is.
    """
    rows = _read(Path(path))
    added = replaced = elsewhere = 0
    for text, record in rows:
        before: list[Any] = []

        def change(old: Any, record: Record = record, before: list[Any] = before) -> Record | None:
            before.append(old)
            return record if old is None or record_flaw(old) is not None or better(record, old) else None

        after = cache.update_json(KIND, text, change)
        added += before[0] is None
        replaced += before[0] is not None and after != before[0]
        elsewhere += {n: v for n, v in json.loads(text)["versions"].items() if n != "source"} != versions()
    return Merged(added, replaced, len(rows) - added - replaced, elsewhere)


def better(new: Record, old: Record) -> bool:
    """Which of two records under one key is kept: the faster at the same shape, else the newer; text decides between equals."""
    if new["shape"] == old["shape"]:
        a, b = new["trials"][0]["seconds"], old["trials"][0]["seconds"]
        if a != b:
            return bool(a < b)
    if new["measured"] != old["measured"]:
        return bool(new["measured"] > old["measured"])
    return json.dumps(new, sort_keys=True) > json.dumps(old, sort_keys=True)


def _read(path: Path) -> list[tuple[str, Record]]:
    try:
        if path.stat().st_size > LARGEST:
            raise CacheError(f"{path}: {path.stat().st_size} bytes are no file of winners; {_HINT}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CacheError(f"cannot read the winners in {path} ({error.strerror}); {_HINT}") from error
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path}: not JSON ({type(error).__name__}), so not a file of winners; {_HINT}") from error
    if not isinstance(found, dict) or found.get("attnc") != KIND:
        raise CacheError(f"{path}: not a file of winners; {_HINT}")
    if found.get("schema") != SCHEMA or isinstance(found.get("schema"), bool):
        raise CacheError(
            f"{path}: its schema is {found.get('schema')!r}, and this attnc reads {SCHEMA}; export it again with this version"
        )
    try:
        check(found, {"attnc": str, "schema": int, "winners": [{"key": KEY, "record": RECORD}]}, "")
        rows = found["winners"]
        for n, row in enumerate(rows):
            check_when(row["record"]["measured"], f".winners[{n}].record.measured")
    except ValueError as error:
        raise CacheError(f"{path}: {error}; nothing was imported: {_HINT}") from error
    return [(json.dumps(r["key"], sort_keys=True), r["record"]) for r in rows]


# --------------------------------------------------------------------------------------------------------------------- checking
class Data:
    """Any small JSON without numbers that are no integers: a choice, which its backend compares with its own candidates."""


class Number:
    """A finite number, zero or more."""


class Names:
    """An object whose values are strings or integers, of any names."""


KEY: dict[str, Any] = {
    "backend": str, "device": Names, "versions": Names, "pattern": {"name": str, "hash": str}, "direction": str, "dtype": str,
    "head_dim": int, "value_dim": int, "bucket": {"grid": [int], "kv_grid": [int], "items": int},
}  # fmt: skip
RECORD: dict[str, Any] = {
    "choice": Data, "trials": [{"choice": str, "seconds": Number, "predicted": Number}], "statement": str, "shape": str,
    "untuned": str, "measured": str,
}  # fmt: skip


def record_flaw(found: Any) -> str | None:
    """What is wrong with a record, or None."""
    try:
        check(found, RECORD, "")
        check_when(found["measured"], ".measured")
    except ValueError as error:
        return str(error)
    return None


def _key_of(text: str) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        check(found, KEY, "")
        key: dict[str, Any] = found
        return key
    return None


def check(found: Any, want: Any, at: str) -> None:
    """Hold data to a form: a dict of exactly these fields, a list of one form (not empty), or a kind of leaf. ValueError where."""
    place = at or "the file"
    if isinstance(want, dict):
        if not isinstance(found, dict):
            raise ValueError(f"{place} is {_kind(found)}, not an object")
        for name in found:
            if name not in want:
                raise ValueError(f"{place} has the unknown field {str(name)[:80]!r}")
        for name, inner in want.items():
            if name not in found:
                raise ValueError(f"{place} lacks the field {name!r}")
            check(found[name], inner, f"{at}.{name}")
    elif isinstance(want, list):
        if not isinstance(found, list):
            raise ValueError(f"{place} is {_kind(found)}, not a list")
        if not found and at != ".winners":
            raise ValueError(f"{place} is empty")
        for n, each in enumerate(found):
            check(each, want[0], f"{at}[{n}]")
    elif want is str:
        if not isinstance(found, str) or not 0 < len(found) <= 4096:
            raise ValueError(f"{place} is {_kind(found)}, not a short text")
    elif want is int:
        if type(found) is not int or not 0 <= found < 1 << 62:
            raise ValueError(f"{place} is {_kind(found)}, not a whole number")
    elif want is Number:
        if type(found) not in (int, float) or not (math.isfinite(found) and found >= 0):
            raise ValueError(f"{place} is {_kind(found)}, not a time")
    elif want is Names:
        if not isinstance(found, dict) or ("target" not in found and at.endswith(".device")):
            raise ValueError(f"{place} is {_kind(found)}, not an object{' with a target' if at.endswith('.device') else ''}")
        for name, each in found.items():
            check(each, int if type(each) is int else str, f"{at}.{name[:80]}")
    else:
        _check_data(found, at, 6)


def _check_data(found: Any, at: str, depth: int) -> None:
    if type(found) in (int, bool) or (isinstance(found, str) and len(found) <= 256):
        return
    inner = found if isinstance(found, list) else list(found.values()) if isinstance(found, dict) else None
    if inner is None or depth == 0 or len(inner) > 256:
        raise ValueError(f"{at} is {_kind(found)}, not a choice")
    for each in inner:
        _check_data(each, at, depth - 1)


def check_when(found: str, at: str) -> None:
    """A time of measuring."""
    if not _when.fullmatch(found):
        raise ValueError(f"{at} is {found[:80]!r}, not a time such as 2026-01-31T12:00:00Z")


def now() -> str:
    """This moment, as records have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _kind(found: Any) -> str:
    if isinstance(found, float | int | str):
        return f"{str(found)[:80]!r}"
    return "null" if found is None else {"dict": "an object", "list": "a list"}.get(type(found).__name__, type(found).__name__)
