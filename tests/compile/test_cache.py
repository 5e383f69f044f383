"""The compile cache: what it gives back, what it must not, and a system that refuses it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normgraph.compile import cache
from normgraph.compile.artifact import Draft
from normgraph.compile.cache import Cache, Usage, from_environment
from normgraph.compile.locks import locked
from normgraph.errors import ArgumentError


def draft(label: str, size: int = 1000) -> Draft:
    """An artifact of a known size, with an odd manifest."""
    made = Draft()
    entry = made.add("kernels-cpu", ".so", (label.encode() * size)[:size])
    made.add("selftest", ".npz", b"\n" + label.encode())
    made.manifest.update(label=label, entry=entry, values=[1e-05, None, "\u00e9\n"])
    return made


class Maker:
    """Makes artifacts, and counts them."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.said: list[str] = []

    def __call__(self, kept: Cache, key: str, size: int = 1000) -> Draft:
        def make() -> Draft:
            self.made.append(key)
            return draft(key, size)

        found = kept.fetch(key, make, self.said.append)
        assert found == draft(key, size)
        return found


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def kept(tmp_path: Path) -> Cache:
    """An empty cache, in a folder that is not there yet."""
    return Cache(tmp_path / "deep" / "cache", 100_000)


def entries(kept: Cache) -> list[Path]:
    return sorted(kept.folder.glob("*.built"))


def test_what_was_made_is_not_made_again(kept: Cache, maker: Maker) -> None:
    maker(kept, "a")
    maker(kept, "b")
    assert maker.made == ["a", "b"]
    assert maker.said == []
    maker(kept, "a")
    maker(Cache(kept.folder, 10), "b")
    assert maker.made == ["a", "b"]
    assert maker.said == 2 * [f"taken from the compile cache in {kept.folder}"]
    assert {file.name for file in kept.folder.iterdir()} == {"a.built", "b.built", ".lock"}


def test_it_is_for_this_user_alone(kept: Cache, maker: Maker) -> None:
    maker(kept, "a")
    assert kept.folder.stat().st_mode & 0o777 == 0o700
    assert entries(kept)[0].stat().st_mode & 0o777 == 0o600


def test_what_others_could_have_written_is_not_used(kept: Cache, maker: Maker) -> None:
    """What comes from the cache is run."""
    maker(kept, "a")
    (file,) = entries(kept)

    def let_others_write() -> None:
        file.chmod(0o666)

    def make_a_pipe() -> None:
        file.unlink()
        os.mkfifo(file)

    def make_a_link() -> None:
        elsewhere = file.with_name("elsewhere")
        os.replace(file, elsewhere)
        file.symlink_to(elsewhere)

    changes = (let_others_write, make_a_pipe, make_a_link)
    for turn, change in enumerate(changes):
        change()
        maker(kept, "a")
        assert maker.made == ["a"] * (turn + 2)
    maker(kept, "a")
    assert len(maker.made) == len(changes) + 1


def test_what_fails_is_not_kept(kept: Cache, maker: Maker) -> None:
    def fail() -> Draft:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        kept.fetch("a", fail)
    assert os.listdir(kept.folder) == []
    maker(kept, "a")
    assert maker.made == ["a"]


def test_a_damaged_entry_is_found_and_made_again(kept: Cache, maker: Maker) -> None:
    maker(kept, "a")
    (file,) = entries(kept)
    whole = file.read_bytes()
    damages = [
        b"",
        whole[:-1],
        whole[: len(whole) // 2],
        whole + b"\0",
        b"another format\n" + whole,
        *(
            whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            for at in range(0, len(whole), len(whole) // 40)
        ),
    ]
    for turn, content in enumerate(damages):
        file.write_bytes(content)
        maker(kept, "a")
        assert len(maker.made) == turn + 2
        assert "a.built is damaged" in maker.said[-1]
        assert file.read_bytes() == whole
    maker(kept, "a")
    assert len(maker.made) == len(damages) + 1


def test_what_was_not_used_for_longest_goes(kept: Cache, maker: Maker) -> None:
    for turn, key in enumerate("abcde"):
        maker(kept, key, 20_000)
        if key in "abcd":
            os.utime(kept.folder / f"{key}.built", (turn, turn))
        if key == "d":
            maker(kept, "a", 20_000)  # used again
    assert [file.name[0] for file in entries(kept)] == ["a", "c", "d", "e"]
    assert kept.usage() == Usage(4, sum(file.stat().st_size for file in entries(kept)))
    assert kept.usage().size <= kept.limit


def test_what_is_larger_than_the_limit_is_not_kept(kept: Cache, maker: Maker) -> None:
    maker(kept, "a", 500)
    maker(kept, "b", 200_000)
    assert [file.name for file in entries(kept)] == ["a.built"]


def test_what_a_killed_process_left_goes(kept: Cache, maker: Maker) -> None:
    kept.folder.mkdir(parents=True)
    for name, age in (("old", 1.0), ("new", None)):
        file = kept.folder / f".writing-{name}"
        file.write_bytes(b"half")
        if age is not None:
            os.utime(file, (age, age))
    (kept.folder / "a.lock").touch()
    maker(kept, "a")
    assert {f.name for f in kept.folder.iterdir()} == {"a.built", ".lock", ".writing-new"}


def test_clear(kept: Cache, maker: Maker) -> None:
    assert kept.clear() == Usage(0, 0)
    maker(kept, "a")
    maker(kept, "b")
    (kept.folder / "notes.txt").write_text("mine")
    size = kept.usage().size
    assert size > 2000
    assert kept.clear() == Usage(2, size)
    assert {file.name for file in kept.folder.iterdir()} == {"notes.txt", ".lock"}
    assert kept.usage() == Usage(0, 0)


# A system that refuses.


@pytest.mark.parametrize("folder", ["/proc/normgraph", "/dev/null/x", "/dev/null"])
def test_a_folder_that_cannot_be(folder: str, maker: Maker) -> None:
    kept = Cache(Path(folder), 10**6)
    maker(kept, "a")
    maker(kept, "a")
    assert maker.made == ["a", "a"]
    assert kept.usage() == kept.clear() == Usage(0, 0)


@pytest.mark.parametrize("refused", ["mkstemp", "replace", "open"])
def test_a_folder_that_is_only_read(
    refused: str, kept: Cache, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not stop root, so the system's answers are made up."""
    maker(kept, "a")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    module: Any = tempfile if refused == "mkstemp" else os
    monkeypatch.setattr(module, refused, refuse)
    monkeypatch.setattr(os, "utime", refuse)
    maker(kept, "b")
    maker(kept, "a")
    maker(kept, "b")
    assert maker.made == ["a", "b", "b"]
    monkeypatch.undo()
    assert [file.name for file in entries(kept)] == ["a.built"]
    assert not list(kept.folder.glob(".writing-*"))


def test_a_full_disk(kept: Cache, maker: Maker) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        maker(kept, "a")
        maker(kept, "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert maker.made == ["a", "a"]
    assert entries(kept) == []
    maker(kept, "a")
    maker(kept, "a")
    assert maker.made == ["a", "a", "a"]


# Several at once.


def test_threads_that_want_the_same_wait(kept: Cache) -> None:
    """Locks of one process keep each other out as those of several do."""
    made: list[str] = []
    said: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def make() -> Draft:
        made.append("a")
        begun.set()
        assert go_on.wait(60)
        return draft("a")

    threads = [threading.Thread(target=kept.fetch, args=("a", make, said.append)) for _ in range(4)]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    while said.count("another process builds the same: waiting for it") < 3:
        assert threads[0].is_alive()
    go_on.set()
    for thread in threads:
        thread.join()
    assert made == ["a"]
    assert len(said) == 6
    assert not list(kept.folder.glob("a.lock"))


def test_it_does_not_wait_for_ever(
    kept: Cache, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_MOST_WAITED", 0.05)
    kept.folder.mkdir(parents=True)
    with locked(kept.folder / "a.lock"):
        maker(kept, "a")
    assert maker.made == ["a"]
    assert maker.said == ["another process builds the same: waiting for it"]


_PROCESSES = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_cache import Cache, Maker, Usage, draft, entries

kept = Cache(Path(sys.argv[2]), 60_000)
children = []
for seed in range(6):
    child = os.fork()
    if child == 0:
        draw, maker = random.Random(seed), Maker()
        try:
            for turn in range(60):
                key = draw.choice("abcdefgh")
                maker(kept, key, 9_000)
                if draw.random() < 0.06:
                    kept.clear()
                if seed == 0 and turn > 20:
                    for file in entries(kept)[:1]:
                        with open(file, "r+b") as damaged:
                            damaged.write(b"!")
            assert 4 <= len(maker.made) < 60
        except FileNotFoundError:
            assert seed == 0  # of the damaging itself
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    children.append(child)
time.sleep(0.1)
os.kill(children.pop(), signal.SIGKILL)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
maker = Maker()
for key in "abcdefgh":
    maker(kept, key, 9_000)
    maker(kept, key, 9_000)
assert len(maker.made) <= 8
assert 0 < kept.usage().size <= 60_000
print("fine")
"""


def test_several_processes(tmp_path: Path) -> None:
    """One of them damages entries, and one is killed."""
    done = subprocess.run(
        [sys.executable, "-c", _PROCESSES, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


# The environment.


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cache | None]:
    """environment(NAME=value, ...): the cache where these are all that is set."""

    def get(**variables: str) -> Cache | None:
        for name in (cache.SWITCH, cache.FOLDER, cache.LIMIT, "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return from_environment()

    return get


def test_where_it_is(environment: Callable[..., Cache | None], tmp_path: Path) -> None:
    def folder(**variables: str) -> str:
        found = environment(**variables)
        assert found is not None
        return str(found.folder)

    assert folder(HOME="/h") == "/h/.cache/normgraph"
    assert folder(HOME="/h", XDG_CACHE_HOME="/x") == "/x/normgraph"
    assert folder(HOME="/h", XDG_CACHE_HOME="relative") == "/h/.cache/normgraph"
    assert folder(HOME="/h", XDG_CACHE_HOME="/x", NORMGRAPH_CACHE_DIR="/d") == "/d"
    assert folder(HOME="/h", NORMGRAPH_CACHE_DIR="~/d") == "/h/d"
    assert folder(HOME="/h", NORMGRAPH_CACHE_DIR="d") == str(Path.cwd() / "d")


def test_no_home(environment: Callable[..., Cache | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert environment() is None


def test_on_and_off(environment: Callable[..., Cache | None]) -> None:
    for value in ("on", "1", "ON", ""):
        assert environment(HOME="/h", NORMGRAPH_CACHE=value) is not None
    for value in ("off", "0", "Off"):
        assert environment(HOME="/h", NORMGRAPH_CACHE=value) is None
    with pytest.raises(ArgumentError, match="NORMGRAPH_CACHE must be on or off, but it is 'of'"):
        environment(HOME="/h", NORMGRAPH_CACHE="of")


def test_the_limit(environment: Callable[..., Cache | None]) -> None:
    for value, limit in (("", 2**28), ("12345", 12345)):
        found = environment(HOME="/h", NORMGRAPH_CACHE_BYTES=value)
        assert found is not None
        assert found.limit == limit
    assert environment(HOME="/h", NORMGRAPH_CACHE_BYTES="0") is None
    for value in ("1G", "-1", "1e9", "\u0663", "9" * 5000):
        with pytest.raises(ArgumentError, match="NORMGRAPH_CACHE_BYTES must be a number of bytes"):
            environment(HOME="/h", NORMGRAPH_CACHE_BYTES=value)
