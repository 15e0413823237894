"""The on-disk build cache: each entry is built at most once, published atomically, and verified before use.

Layout, below ``ATTNC_CACHE_DIR`` or the user's cache directory::

    .attnc-cache                   marks the directory as ours: nothing else is ever written to or cleared
    <kind>/<digest>/               one built entry: its files and manifest.json
    <kind>/<digest>.json           one small table (``read_json``, ``write_json``, ``update_json``)
    locks/  quarantine/            lock files; whatever did not verify

The digest is that of the *content key*: a string that says everything the entry depends on. A manifest
repeats the key and holds the sha256 of each file; both are checked before an entry is used, once per process.
What fails the check (a torn disk, another program's file, a collision) is moved to ``quarantine/`` and built
again: never trusted and never fatal. Entries are data or code that the caller loads; nothing is unpickled or
evaluated here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from attnc.errors import CacheError

__all__ = ["KindInfo", "clear", "entry", "info", "read_json", "root", "set_aside", "tables", "update_json", "write_json"]

FORMAT = 1
MARKER = ".attnc-cache"
MANIFEST = "manifest.json"
RESERVED = ("locks", "quarantine")

_log = logging.getLogger("attnc.cache")
_name = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
# entry -> the manifest (inode, mtime) and the files verified against it: a rebuilt entry is verified again
_verified: dict[Path, tuple[tuple[int, int], frozenset[str]]] = {}


@dataclass(frozen=True)
class KindInfo:
    """What one kind of entry holds: how many, and their size in bytes on disk."""

    entries: int
    bytes: int


# --- the directory --------------------------------------------------------------------------------


def root() -> Path:
    """The cache directory, made (mode 0700) if absent.

    Raises:
        CacheError: another user owns it or can write to it, or it holds files but is not an attnc cache.
    """
    chosen = os.environ.get("ATTNC_CACHE_DIR")
    if not chosen:
        import platformdirs

        chosen = platformdirs.user_cache_dir("attnc")
    path = Path(chosen).expanduser()
    hint = "set ATTNC_CACHE_DIR to a directory that only you can write to"
    try:
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        path = path.resolve(strict=True)
        found = path.stat()
    except OSError as error:
        raise CacheError(f"cannot use {path} as the build cache ({error.strerror}); {hint}") from error
    if os.name == "posix":
        if found.st_uid != os.geteuid():
            raise CacheError(f"the build cache {path} belongs to user {found.st_uid}, not to you; {hint}")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(found.st_mode)
            raise CacheError(f"the build cache {path} can be written by others (mode {mode:o}); chmod go-w it, or {hint}")
    try:
        # Empty or already marked, else somebody else's: a typing error must not turn a home into a cache.
        if not (path / MARKER).exists() and any(child.name != MARKER for child in path.iterdir()):
            raise CacheError(f"{path} holds files but is not an attnc build cache; {hint}, empty or new")
        (path / MARKER).touch(mode=0o600)
    except OSError as error:
        raise CacheError(f"cannot write to the build cache {path} ({error.strerror}); {hint}") from error
    return path


def _folder(kind: str) -> Path:
    if not _name.fullmatch(kind) or kind in RESERVED:
        raise CacheError(f"{kind!r} is not a legal kind of cache entry")
    return _inside(kind)


def _inside(name: str) -> Path:
    folder = root() / name
    with _writing(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(f"cannot write {path} in the build cache ({error.strerror})") from error


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]


@contextmanager
def _lock(kind: str, digest: str, timeout: float = -1) -> Iterator[bool]:
    """Hold the lock of one entry across processes and threads; yields whether it was had (`timeout` s)."""
    import filelock

    path = _inside("locks") / f"{kind}-{digest}.lock"
    lock = filelock.FileLock(path, timeout=timeout)
    with _writing(path):
        with suppress(filelock.Timeout):  # an OSError, but no failure
            lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _quarantine(path: Path, why: str) -> None:
    """Move what cannot be trusted out of the way (the caller holds its lock)."""
    target = _inside("quarantine") / f"{path.parent.name}-{path.name}-{os.getpid()}-{time.time_ns()}"
    _verified.pop(path, None)
    with _writing(target), suppress(FileNotFoundError):  # cleared meanwhile
        path.rename(target)
        _log.warning("cache entry %s set aside as %s: %s", path, target.name, why)


# --- entries of files -----------------------------------------------------------------------------


def entry(kind: str, key: str, build: Callable[[Path], None], files: tuple[str, ...]) -> Path:
    """The directory ``<root>/<kind>/<digest of key>`` with `files` in it, built if it is not there yet.

    Of many processes that ask for one key, one builds and the others wait for it.

    Args:
        kind: the folder of entries of this sort, such as ``"cpp"``.
        key: everything that the files depend on (source text, flags, versions), as text.
        build: writes `files` into the empty directory that it is given; its exceptions pass through unchanged
            and leave nothing behind. What else it writes is not kept.
        files: plain file names; each is verified against the manifest before the entry is returned.

    Raises:
        CacheError: the cache directory is unsafe or cannot be written, or `build` did not write `files`.
    """
    for name in files:
        if not _name.fullmatch(name) or name == MANIFEST:
            raise CacheError(f"{name!r} is not a legal file name in a cache entry")
    digest = _digest(key)
    path = _folder(kind) / digest
    if _flaw(path, key, files) is None:
        return path
    with _lock(kind, digest):
        flaw = _flaw(path, key, files)  # another process may have built it while we waited
        if flaw is None:
            return path
        if os.path.lexists(path):
            _quarantine(path, flaw)
        for left in path.parent.glob(f".{digest}.*"):  # of a builder that was killed: we hold its lock
            shutil.rmtree(left, ignore_errors=True)
        _build(path, kind, key, build, files)
    return path


def _build(path: Path, kind: str, key: str, build: Callable[[Path], None], files: tuple[str, ...]) -> None:
    with _writing(path):
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        build(partial)
        with _writing(path):
            _publish(partial, path, kind, key, files)
    except BaseException:  # an interrupt, too, must leave nothing behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _publish(partial: Path, path: Path, kind: str, key: str, files: tuple[str, ...]) -> None:
    """Make what was built durable, then visible, in that order."""
    missing = [name for name in files if not _plain(partial / name)]
    if missing:
        raise CacheError(f"the build of a {kind!r} cache entry did not write {', '.join(missing)}")
    for child in partial.iterdir():
        if child.name not in files:
            _remove(child)
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "key": key,
        "files": {name: _sha256(partial / name) for name in files},
        "versions": _versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (*files, MANIFEST, "."):
        _fsync(partial / name)
    partial.rename(path)
    _fsync(path.parent)


def _flaw(path: Path, key: str, files: tuple[str, ...]) -> str | None:
    """None if the entry is there, whole and for this key; else what is wrong with it."""
    try:
        found = (path / MANIFEST).stat()
    except OSError:
        return "no manifest"
    identity = (found.st_ino, found.st_mtime_ns)
    known, names = _verified.get(path, (None, frozenset()))
    if known == identity and names.issuperset(files) and all((path / name).exists() for name in files):
        return None
    manifest = _load(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return "the manifest cannot be read"
    if manifest.get("key") != key:
        return "it was built for another key"
    hashes = manifest.get("files")
    for name in files:
        wanted = hashes.get(name) if isinstance(hashes, dict) else None
        if wanted is None or not _plain(path / name) or _sha256(path / name) != wanted:
            return f"{name} is missing or changed"
    _verified[path] = identity, frozenset(files)
    return None


# --- small tables ---------------------------------------------------------------------------------


def read_json(kind: str, key: str) -> Any:
    """The object stored by `write_json` under this key, or None if there is none that can be trusted."""
    path = _folder(kind) / f"{_digest(key)}.json"
    table = _table(path, key)
    if table is None and os.path.lexists(path):
        with _lock(kind, path.stem):  # a writer may have replaced it since: look again before setting it aside
            table = _table(path, key)
            if table is None and os.path.lexists(path):
                _quarantine(path, "the table cannot be read, or is for another key")
    return None if table is None else table["value"]


def write_json(kind: str, key: str, obj: Any) -> None:
    """Store a small object of dicts with string keys, lists, strings, finite numbers, booleans and None.

    Raises:
        CacheError: `obj` is something else, or the cache directory is unsafe or cannot be written.
    """
    text = _text(kind, obj)
    path = _folder(kind) / f"{_digest(key)}.json"
    with _lock(kind, path.stem):
        _store(path, key, text)


def update_json(kind: str, key: str, change: Callable[[Any], Any]) -> Any:
    """Replace what is stored under a key by `change(it)`, with no other process's writing in between; gives what is stored then.

    `change` gets None where nothing that can be trusted is stored, and gives None to leave everything as it is.

    Raises:
        CacheError: as `write_json`.
    """
    path = _folder(kind) / f"{_digest(key)}.json"
    with _lock(kind, path.stem):
        table = _table(path, key)
        if table is None and os.path.lexists(path):
            _quarantine(path, "the table cannot be read, or is for another key")
        kept = None if table is None else table["value"]
        new = change(kept)
        if new is None:
            return kept
        text = _text(kind, new)
        _store(path, key, text)
        return json.loads(text)


def set_aside(kind: str, key: str, why: str) -> None:
    """Move a table out of the way whose value is no value of its kind: its reader found so, and says why."""
    path = _folder(kind) / f"{_digest(key)}.json"
    with _lock(kind, path.stem):
        if os.path.lexists(path):
            _quarantine(path, why)


def tables(kind: str) -> Iterator[tuple[str, Any]]:
    """Key and value of every table of a kind, in the order of their digests; what cannot be trusted is set aside."""
    for path in sorted(_folder(kind).glob("[!.]*.json")):
        found = _load(path)
        key = found.get("key") if isinstance(found, dict) else None
        if isinstance(key, str) and path.stem == _digest(key):
            value = read_json(kind, key)
            if value is not None:
                yield key, value
            continue
        with _lock(kind, path.stem):
            if os.path.lexists(path):
                _quarantine(path, "the table cannot be read, or does not lie where its key says")


def _text(kind: str, obj: Any) -> str:
    try:
        return json.dumps(obj, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CacheError(f"a {kind!r} table cannot be stored as JSON: {error}") from error


def _store(path: Path, key: str, text: str) -> None:
    """Write a table beside its place, make it durable, then visible (the caller holds its lock)."""
    table = {"format": FORMAT, "key": key, "sha256": _text_hash(text), "value": json.loads(text)}
    with _writing(path):
        for left in path.parent.glob(f".{path.stem}.*"):  # of a writer that was killed
            left.unlink(missing_ok=True)
        number, name = tempfile.mkstemp(prefix=f".{path.stem}.", dir=path.parent)
        try:
            with open(number, "w", encoding="utf-8") as file:
                file.write(json.dumps(table, indent=1, sort_keys=True))
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def _table(path: Path, key: str) -> dict[str, Any] | None:
    table = _load(path)
    if not isinstance(table, dict) or table.get("format") != FORMAT or table.get("key") != key:
        return None
    if "value" not in table:
        return None
    text = json.dumps(table["value"], sort_keys=True)
    return table if table.get("sha256") == _text_hash(text) else None


# --- the whole cache ------------------------------------------------------------------------------


def info() -> dict[str, KindInfo]:
    """Entries and bytes per kind, sorted by name; what was set aside counts as the kind ``quarantine``."""
    found = {}
    for folder in sorted(root().iterdir()):
        if folder.is_dir() and folder.name != "locks":
            children = [child for child in folder.iterdir() if not child.name.startswith(".")]
            found[folder.name] = KindInfo(len(children), sum(map(_size, children)))
    return found


def clear() -> None:
    """Remove every entry, table and quarantined file, except what another process is building now."""
    _verified.clear()
    for folder in root().iterdir():
        if not folder.is_dir() or folder.name == "locks":  # lock files stay: removing one splits its holders
            continue
        for child in folder.iterdir():
            # named <digest>, <digest>.json or .<digest>.<partial>
            digest = child.name.lstrip(".").partition(".")[0]
            with _lock(folder.name, digest, timeout=0) as held:
                if held:
                    _remove(child)
        with suppress(OSError):  # not empty: a build is under way
            folder.rmdir()


# --- files ----------------------------------------------------------------------------------------


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fsync(path: Path) -> None:
    if os.name != "posix":  # directories cannot be opened elsewhere
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        if path.is_dir():
            return sum(map(_size, path.iterdir()))
        return path.stat().st_size
    return 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    """For whoever reads a manifest; what an entry depends on must be part of its key."""
    versions = {}
    for name in ("attnc", "torch", "triton"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
