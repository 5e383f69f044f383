"""Writing an artifact: killed or out of room at any step, and beside readers and other writers."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from normgraph.compile.artifact import LOADER_RANGE, Draft, digest, write, writing
from normgraph.errors import CompileError

CALLS = ("open", "fsync", "chmod", "replace", "unlink")


def draft(label: str, size: int = 5000) -> Draft:
    """Something that is written like an artifact. One of its files is the same for all."""
    made = Draft()
    entries = [
        made.add("graph-forward", ".onnx", b"the same for all"),
        made.add("kernels-cpu", ".so", label.encode() * size),
        made.add("selftest", ".npz", b"vectors of " + label.encode()),
    ]
    made.manifest.update(label=label, entries=entries)
    return made


def read(root: Path) -> str | None:
    """The label of what is there, None for nothing. Fails where a reader would be misled."""
    try:
        manifest = json.loads((root / "manifest.json").read_bytes())
    except FileNotFoundError:
        return None
    assert digest({k: v for k, v in manifest.items() if k != "digest"}) == manifest["digest"]
    for entry in manifest["entries"]:
        content = (root / entry["file"]).read_bytes()
        assert len(content) == entry["size"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    return str(manifest["label"])


def names(root: Path) -> set[str]:
    """What is in the folder beside the lock."""
    return {name for name in os.listdir(root) if name != ".lock"} if root.exists() else set()


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is slow, and what it is for, a loss of power, is not tried here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Trouble:
    """Counts the system calls of a build, and makes one of them go wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.done: list[tuple[str, str]] = []
        self.at = at
        self.error = error
        self.places: dict[int, str] = {}
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name: str, call: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            place = str(args[-1] if name == "replace" else args[0])
            self.done.append((name, self.places.get(args[0], place)))
            if len(self.done) == self.at:
                raise self.error
            result = call(*args, **options)
            if name == "open":
                self.places[result] = place
            return result

        return wrapped


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_trouble_at_every_step(tmp_path: Path, before: bool, error: BaseException) -> None:
    """The old artifact stays as it was, or the new one is there whole; what is left over goes."""
    old, new = draft("old"), draft("new")
    for at in range(1, 100):
        root = tmp_path / f"{before}-{at}"
        if before:
            write(old, root)
        kept = names(root)
        with pytest.MonkeyPatch.context() as patch:
            trouble = Trouble(patch, at, error)
            try:
                write(new, root)
            except (CompileError, KeyboardInterrupt) as caught:
                assert isinstance(caught, CompileError) == isinstance(error, OSError)  # noqa: PT017
        if len(trouble.done) < at:
            break
        failed = trouble.done[at - 1]
        found = read(root)
        assert found in (("old" if before else None), "new")
        if found != "new" and failed != ("replace", str(root / "manifest.json")):
            assert names(root) == kept, failed
        write(new, root)
        assert read(root) == "new"
        assert names(root) == {*new.files, "manifest.json"}
    else:
        raise AssertionError("there is no end to the steps")
    assert at >= 20


def test_what_reaches_the_disk_before_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then their names, then the manifest, then its name; stale files only then."""
    root = tmp_path / "a"
    write(draft("old"), root)
    trouble = Trouble(monkeypatch, 0, OSError())
    write(draft("new"), root)
    steps = [(name, Path(place).name) for name, place in trouble.done]
    synced = [step for step in steps if step[0] in ("fsync", "replace", "unlink")]
    written = [name for name in draft("new").files if not name.startswith("graph")]
    assert len(written) == 2
    flat = []
    for name, place in synced:
        flat.append((name, "temporary" if place.startswith(".writing-") else place))
    assert flat[:4] == [
        ("fsync", "temporary"),
        ("replace", written[0]),
        ("fsync", "temporary"),
        ("replace", written[1]),
    ]
    assert flat[4:8] == [
        ("fsync", "a"),
        ("fsync", "temporary"),
        ("replace", "manifest.json"),
        ("fsync", "a"),
    ]
    assert {name for name, _ in flat[8:]} == {"unlink"}
    assert len(flat) == 10


def test_the_loader_s_versions_are_those_that_are_installed_with_normgraph() -> None:
    (wanted,) = (
        line
        for line in importlib.metadata.requires("normgraph") or ()
        if line.startswith("apache-tvm-ffi")
    )
    limits = wanted.removeprefix("apache-tvm-ffi").split(",")
    assert set(limits) == {f">={LOADER_RANGE['from']}", f"<{LOADER_RANGE['below']}"}


def test_a_file_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    write(draft("old"), tmp_path)
    before = {file.name: file.stat().st_ino for file in tmp_path.glob("graph-*")}
    write(draft("new"), tmp_path)
    assert {file.name: file.stat().st_ino for file in tmp_path.glob("graph-*")} == before


def test_a_damaged_file_that_is_there_is_written_again(tmp_path: Path) -> None:
    write(draft("old"), tmp_path)
    for file in tmp_path.glob("*-*"):
        file.write_bytes(b"damaged")
    write(draft("old"), tmp_path)
    assert read(tmp_path) == "old"


def test_a_file_system_that_cannot_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    write(draft("a"), tmp_path / "a")
    assert read(tmp_path / "a") == "a"


def test_a_folder_that_is_removed_while_a_build_waits_for_it(tmp_path: Path) -> None:
    """The lock of a folder that is not there any more keeps nobody out of the new one."""
    root = tmp_path / "a"
    with writing(root) as first:
        entry = first.add("selftest", ".npz", b"first")
        os.rename(root, tmp_path / "elsewhere")
        write(draft("second"), root)
        first.root = tmp_path / "elsewhere"
        first.commit({"label": "first", "entries": [entry]})
    assert read(root) == "second"
    assert read(tmp_path / "elsewhere") == "first"


_SCRIPT = """
import os, random, resource, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_writing import draft, names, read, write

root = Path(sys.argv[2])
# Against a loss of power; a process that is killed does not need it, and it takes most of the time.
os.fsync = lambda handle: None
"""

_KILLED = """
old, new, seen = draft("old", 100_000), draft("new", 100_000), []
for before in (True, False):
    for at in range(1, 200):
        place = root / f"{before}-{at}"
        if before:
            write(old, place)
        child = os.fork()
        if child == 0:
            count = 0
            def counted(call):
                def step(*args, **options):
                    global count
                    count += 1
                    if count == at:
                        # Half of it was written, say, where this is the step to the disk.
                        if call is fsync and os.path.isfile(f"/proc/self/fd/{args[0]}"):
                            os.truncate(args[0], os.fstat(args[0]).st_size // 2)
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **options)
                return step
            fsync = os.fsync
            for name in ("open", "close", "fsync", "chmod", "replace", "unlink", "mkdir"):
                setattr(os, name, counted(getattr(os, name)))
            write(new, place)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        found = read(place)
        assert found in (("old" if before else None), "new"), (at, found)
        seen.append(found)
        left = names(place)
        write(new, place)
        assert read(place) == "new" and names(place) == {*new.files, "manifest.json"}
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert at > 20, at
assert set(seen) == {"old", None, "new"}
"""

_KILLED_ANY_TIME = """
versions = [draft(str(turn), 20_000) for turn in range(2)]
write(versions[0], root)
seen, turn = set(), 0
while turn < 40 or len(seen) < 2:
    turn += 1
    child = os.fork()
    if child == 0:
        while True:
            write(versions[0], root)
            write(versions[1], root)
    time.sleep(random.Random(turn).uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.add(read(root))
    assert len(names(root)) < 12
write(versions[0], root)
assert names(root) == {*versions[0].files, "manifest.json"}
"""

_FULL = """
from normgraph.errors import CompileError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write(draft("old", 10), root)
kept = names(root)
for limit in (0, 1, 4096, 30_000, 299_999):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        write(draft("new", 100_000), root)
    except CompileError as error:
        assert "File too large" in str(error)
    else:
        raise AssertionError(limit)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(root) == "old" and names(root) == kept
"""

_TOGETHER = """
versions = [draft(str(turn), 20_000) for turn in range(3)]
write(versions[0], root)
children = []
for turn in range(3):
    child = os.fork()
    if child == 0:
        try:
            for _ in range(40):
                write(versions[turn], root)
        finally:
            os._exit(sys.exc_info()[0] is not None)
    children.append(child)
seen, stale = set(), 0
while children:
    try:
        seen.add(read(root))
    except FileNotFoundError:
        stale += 1  # a reader reads the manifest again then
    done, status = os.waitpid(-1, os.WNOHANG)
    if done:
        assert status == 0
        children.remove(done)
last = read(root)
assert names(root) == {*versions[int(last)].files, "manifest.json"}
assert len(seen) > 1, (seen, stale)
"""


_SCRIPTS = {
    "killed at every step": _KILLED,
    "killed at any time": _KILLED_ANY_TIME,
    "a full disk": _FULL,
    "several at once": _TOGETHER,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each script ended with. One process runs them, because the imports take longest."""
    program = _SCRIPT + "import json, traceback\nfolder, outcomes = root, {}\n"
    for name, script in _SCRIPTS.items():
        lines = f"root = folder / {name!r}\n{script}".strip().splitlines()
        program += "try:\n" + "".join(f"    {line}\n" for line in lines)
        program += "except BaseException:\n"
        program += f"    outcomes[{name!r}] = traceback.format_exc()\n"
        program += f"else:\n    outcomes[{name!r}] = 'fine'\n"
    program += "print(json.dumps(outcomes))\n"
    root = tmp_path_factory.mktemp("writing")
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent), str(root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", _SCRIPTS)
def test_in_other_processes(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "fine"
