"""The compile cache: what was built once of the same graphs in the same way is not built again.

An entry is one file, named by its key, with the files of an artifact and its manifest in it, and a
sha256 over all of them. It is written under another name and renamed, so it is whole or not there;
one that is damaged all the same is removed, and built anew. When an entry is used its time is set,
and where all together are above the limit those go that were not used for longest.

While a process builds, others that want the same wait for it. Whatever the system refuses (a folder
that cannot be made or written to, a full disk, no home) is no error: the build then does without.

What is in an entry is not compared with the graphs again, and a hash is no proof of where it comes
from: who can write to the folder can put code there. It is made for this user alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from normgraph.compile.artifact import OWN_NAME, Draft
from normgraph.compile.locks import locked
from normgraph.errors import ArgumentError

SWITCH = "NORMGRAPH_CACHE"
FOLDER = "NORMGRAPH_CACHE_DIR"
LIMIT = "NORMGRAPH_CACHE_BYTES"
_LIMIT_BY_DEFAULT = 256 * 2**20

_MAGIC = b"normgraph-cache-2 "
# No entry comes near this; what is larger is not read.
_LARGEST = 2**30
_ENTRY, _LOCK, _UNFINISHED = ".built", ".lock", ".writing-"
# Seconds: a build takes less; what a process that was killed left behind is older.
_MOST_WAITED = 600.0
_ABANDONED = 3600.0


@dataclass(frozen=True)
class Usage:
    """What the cache holds: the number of entries, and their bytes together."""

    entries: int
    size: int


class Cache:
    """The entries in one folder. What the system refuses is passed over."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def fetch(
        self, key: str, make: Callable[[], Draft], say: Callable[[str], None] = lambda line: None
    ) -> Draft:
        """The artifact that is stored under the key, or else what `make` makes, which is stored.

        say: called with a line where there is something to tell.
        """
        draft = self._get(key, say)
        if draft is None:
            with self._building(key, say):
                draft = self._get(key, say)  # of whom was waited for
                if draft is None:
                    draft = make()
                    self._put(key, draft)
                    return draft
        say(f"taken from the compile cache in {self.folder}")
        return draft

    @contextlib.contextmanager
    def _building(self, key: str, say: Callable[[str], None]) -> Iterator[None]:
        """Keep other processes from building the same meanwhile, as far as the system lets us."""
        with contextlib.ExitStack() as stack:
            file = self.folder / f"{key}{_LOCK}"
            with contextlib.suppress(OSError):
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                held = stack.enter_context(locked(file, wait=0.0))
                if not held:
                    say("another process builds the same: waiting for it")
                    held = stack.enter_context(locked(file, wait=_MOST_WAITED))
                if held:
                    stack.callback(_remove, file)
            yield

    def _get(self, key: str, say: Callable[[str], None]) -> Draft | None:
        """The artifact that was stored, or None. One that is damaged is removed."""
        file = self.folder / f"{key}{_ENTRY}"
        try:
            content = _read(file)
        except OSError:
            return None
        if content is None:
            say(f"compile cache: {file} is too large or not of this user alone: not used")
            return None
        try:
            draft = _unpack(content, key)
        except (ValueError, RecursionError) as error:
            say(f"compile cache: {file.name} is damaged ({error}), so it is built anew")
            _remove(file)
            return None
        with contextlib.suppress(OSError):
            os.utime(file)
        return draft

    def _put(self, key: str, draft: Draft) -> None:
        """Store an artifact, and remove others where there are too many bytes."""
        content = _pack(draft, key)
        if len(content) > min(self.limit, _LARGEST):
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=_UNFINISHED, dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.replace(temporary, self.folder / f"{key}{_ENTRY}")
            except BaseException:
                _remove(Path(temporary))
                raise
            self._trim(self.limit)

    def usage(self) -> Usage:
        """What is in the folder now."""
        found = self._entries()
        return Usage(len(found), sum(size for _, size, _ in found))

    def clear(self) -> Usage:
        """Remove every entry; returns what was there. Files that are not the cache's stay."""
        before = self.usage()
        with contextlib.suppress(OSError):
            self._trim(0)
        after = self.usage()
        return Usage(before.entries - after.entries, before.size - after.size)

    def _trim(self, limit: int) -> None:
        """Remove entries, those not used for longest first, until they fit into the limit."""
        with locked(self.folder / _LOCK):
            found = sorted(self._entries())
            total = sum(size for _, size, _ in found)
            for _, size, file in found:
                if total <= limit:
                    break
                _remove(file)
                total -= size
            now = time.time()
            for file in self.folder.glob(f"{_UNFINISHED}*"):
                with contextlib.suppress(OSError):
                    if now - file.stat().st_mtime > _ABANDONED:
                        file.unlink()

    def _entries(self) -> list[tuple[int, int, Path]]:
        """When each entry was last used, its size, and where it is."""
        found = []
        with contextlib.suppress(OSError):
            for file in self.folder.glob(f"*{_ENTRY}"):
                with contextlib.suppress(OSError):
                    status = file.stat()
                    found.append((status.st_mtime_ns, status.st_size, file))
        return found


def from_environment() -> Cache | None:
    """The cache as the environment has it, or None where it is off or there is no home for it.

    NORMGRAPH_CACHE: on (the default) or off. NORMGRAPH_CACHE_DIR: the folder; by default normgraph
    in XDG_CACHE_HOME or ~/.cache. NORMGRAPH_CACHE_BYTES: the most bytes it may hold, 256 MiB by
    default; 0 turns it off. Raises ArgumentError where one of them is none of that.
    """
    switch = os.environ.get(SWITCH, "").strip().lower()
    if switch not in ("", "on", "off", "1", "0"):
        raise ArgumentError(
            f"the environment variable {SWITCH} must be on or off, but it is {switch!r}. Set it to"
            f" one of these, or unset it."
        )
    limit = os.environ.get(LIMIT, "").strip() or str(_LIMIT_BY_DEFAULT)
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 20):
        raise ArgumentError(
            f"the environment variable {LIMIT} must be a number of bytes, such as 1073741824, but"
            f" it is {limit!r:.60}. Set it to one, or unset it."
        )
    folder = _folder()
    if switch in ("off", "0") or int(limit) == 0 or folder is None:
        return None
    return Cache(folder, int(limit))


def _folder() -> Path | None:
    named = os.environ.get(FOLDER, "")
    if named:
        return Path(os.path.abspath(os.path.expanduser(named)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification has us pass over it then
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "normgraph") if os.path.isabs(base) else None


def _read(file: Path) -> bytes | None:
    """The content, or None of what another user could have written: what comes of it is run."""
    if not _is_own(file.lstat()):  # a pipe would be waited for
        return None
    with open(file, "rb") as stream:
        return stream.read(_LARGEST) if _is_own(os.fstat(stream.fileno())) else None


def _is_own(status: os.stat_result) -> bool:
    plain = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o022
    return plain and status.st_uid == os.geteuid() and status.st_size <= _LARGEST


def _pack(draft: Draft, key: str) -> bytes:
    names = [[name, len(content)] for name, content in draft.files.items()]
    stated = {"key": key, "manifest": draft.manifest, "files": names}
    body = b"\n".join((json.dumps(stated).encode("ascii"), b"".join(draft.files.values())))
    return _MAGIC + hashlib.sha256(body).hexdigest().encode("ascii") + b"\n" + body


def _unpack(content: bytes, key: str) -> Draft:
    """Raises ValueError, or RecursionError, where it is not what `_pack` made for the key."""
    first, _, body = content.partition(b"\n")
    if first != _MAGIC + hashlib.sha256(body).hexdigest().encode("ascii"):
        raise ValueError("its sha256 differs")
    head, _, rest = body.partition(b"\n")
    stated = json.loads(head)
    if not isinstance(stated, dict) or stated.get("key") != key:
        raise ValueError("it is of another build")
    manifest, names = stated.get("manifest"), stated.get("files")
    if not isinstance(manifest, dict) or not isinstance(names, list):
        raise ValueError("it does not say what it holds")
    draft = Draft(manifest=manifest)
    start = 0
    for each in names:
        name, size = each if isinstance(each, list) and len(each) == 2 else (None, None)
        if not isinstance(name, str) or not OWN_NAME.fullmatch(name) or name in draft.files:
            raise ValueError(f"{name!r:.80} is no name of a file of an artifact")
        if type(size) is not int or not 0 <= size <= len(rest) - start:
            raise ValueError(f"{name} cannot have {size!r:.40} bytes")
        draft.files[name] = rest[start : start + size]
        start += size
    if start != len(rest):
        raise ValueError(f"{len(rest) - start} bytes are of no file")
    return draft


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()
