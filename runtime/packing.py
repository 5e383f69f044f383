"""Writing an artifact into one file, and back into a directory."""

from __future__ import annotations

import os
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from normgraph.errors import ArgumentError, ArtifactError, ArtifactNotFound, NormGraphError
from normgraph.runtime.artifact import Artifact, open_artifact
from normgraph.runtime.files import Contents
from normgraph.runtime.manifest import LARGEST, MANIFEST, stored_file

# The time that packed files get, whatever theirs is.
_TIME = (1980, 1, 1, 0, 0, 0)


def pack(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the artifact directory at `path` into the file `out`, which `load` takes as well.

    The same artifact gives the same bytes, whatever the order, the times and the rights of its
    files; files that are no part of it are left out. The archive is not compressed. A file that is
    there is replaced in one step, once the new one has been written and read back; of a symbolic
    link, the file it leads to, and the link stays.

    Raises what `load` raises for a damaged artifact; ArgumentError
    where `out` is a directory, a device or a pipe, or lies in the artifact's own directory;
    ArtifactError where it cannot be written.
    """
    named = os.fsdecode(out)
    with _written(named):
        target = Path(os.path.realpath(named))
        _check_target(named, target)
        artifact = open_artifact(path)
        if Path(os.path.realpath(artifact.path)) in target.parents:
            raise ArgumentError(
                f"{named}: expected a file outside of the artifact it is made of, and this is in"
                f" {artifact.path}. Give another folder."
            )
        files = artifact_files(artifact)
        handle, temporary = tempfile.mkstemp(prefix=".packing-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                _write(file, files)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            open_artifact(temporary)
            _check_target(named, target)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return Path(os.path.abspath(named))


def _check_target(named: str, target: Path) -> None:
    """Only a plain file may be replaced: a rename would put one in the place of a device too."""
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise ArgumentError(
            f"{named}: expected a file to write, and this is a directory. Give a name such as"
            f" {target.name}.ngz."
        )
    if not stat.S_ISREG(mode):
        raise ArgumentError(
            f"{named}: expected a plain file to write, and this is a device, a pipe, a socket or a"
            f" link that leads nowhere. Give another name."
        )


def unpack(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the files of the packed artifact at `path` into the new or empty directory `out`.

    Raises what `load` raises for a damaged artifact; ArgumentError where there is something at
    `out`, ArtifactError where it cannot be written.
    """
    files = artifact_files(open_artifact(path))
    target = Path(os.path.abspath(os.fsdecode(out)))
    with _written(str(target)):
        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise ArgumentError(
                f"{target}: expected a directory that is new or empty, and there is something."
                f" Give another one."
            )
        target.mkdir(parents=True, exist_ok=True)
        # The manifest comes last: without it there is no artifact.
        for name in sorted(files, key=lambda name: (name == MANIFEST, name)):
            with open(target / name, "xb") as file:
                file.write(files[name])
            os.chmod(target / name, _rights(name))
    return target


@contextmanager
def _written(place: str) -> Iterator[None]:
    """What the system says of writing to a place, as an error of ours."""
    try:
        yield
    except NormGraphError:  # of which one is a FileNotFoundError, and some are ValueErrors
        raise
    except OSError as error:
        raise ArtifactError(
            f"{place}: cannot be written: {error.strerror or error}. Give a place that can be"
            f" written to, with room for it."
        ) from None
    except ValueError as error:  # a character that no file name has
        raise ArgumentError(f"{place!a}: {error}. Check the path.") from None


def artifact_files(artifact: Artifact) -> dict[str, bytes]:
    """The content of every file of an artifact that was opened, by name, each checked."""
    folder = artifact.self_test.folder
    manifest = artifact.manifest
    entries = [entry["graph"] for entry in manifest["kinds"].values()]
    entries += [*manifest["libraries"], manifest["self_test"]]
    stored = [stored_file(folder, entry) for entry in entries]
    contents = Contents()
    files = {file.name: contents.of(file) for file in stored}
    content, _, mark = folder.read(MANIFEST, LARGEST)
    if mark != artifact.edition[1:]:
        raise ArtifactNotFound(
            f"{artifact.path}: another build has replaced the artifact meanwhile. Try it again."
        )
    return {**files, MANIFEST: content}


def _write(file: IO[bytes], files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system = 3  # Unix, whose rights follow
            entry.external_attr = (stat.S_IFREG | _rights(name)) << 16
            archive.writestr(entry, files[name])


def _rights(name: str) -> int:
    return 0o755 if name.endswith(".so") else 0o644
