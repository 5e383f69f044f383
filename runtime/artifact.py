"""Opening an artifact: every file is checked before any of it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from normgraph.errors import (
    ArgumentTypeError,
    ArtifactCorrupt,
    ArtifactError,
    ArtifactIncompatible,
    ArtifactNotFound,
    SpecError,
)
from normgraph.runtime import manifest as fields
from normgraph.runtime.files import REBUILD, Contents, Folder, StoredFile, short
from normgraph.runtime.host import LoaderRange, loader_obstacle
from normgraph.runtime.library import Library, choose
from normgraph.runtime.manifest import MANIFEST, Edition, SelfTestCase, read_manifest
from normgraph.runtime.packed import Packed
from normgraph.runtime.signature import Signature
from normgraph.spec import NormSpec


@dataclass(frozen=True)
class Artifact:
    """A sound artifact: all of its files are what was written.

    libraries: of every target, with their code as it was checked. vectors: what the self-test file
    holds. Both are empty in what `without_content` returns. loader: the tvm_ffi they need.
    edition: differs from that of what another build puts in its place.
    """

    path: Path
    manifest: Mapping[str, Any]
    spec: NormSpec
    shape: tuple[int | str, ...]
    dtype: str
    signatures: Mapping[str, Signature]
    functions: Mapping[str, str]
    libraries: tuple[Library, ...]
    loader: LoaderRange
    self_test: StoredFile
    self_test_cases: tuple[SelfTestCase, ...]
    edition: Edition
    vectors: bytes | None = field(default=None, repr=False)

    def library(self) -> Library:
        """The library this host runs best, or the one that NORMGRAPH_TARGET names.

        Raises ArtifactIncompatible where this host or the loader that is installed runs none of
        them, TargetError where NORMGRAPH_TARGET names a target it has no library for.
        """
        obstacle = loader_obstacle(self.loader)
        if obstacle is not None:
            raise ArtifactIncompatible(f"{self.path}: {obstacle}")
        return choose(self.path, self.libraries)

    def without_content(self) -> Artifact:
        """The same without the libraries' code and the vectors, which are large."""
        return replace(self, libraries=(), vectors=None)


def folder_at(path: Path) -> Folder:
    """The files of the artifact at `path`, none of which has been read."""
    try:
        packed = path.is_file()
    except (OSError, ValueError):  # no name of a file, or not to be looked at: reading says so
        packed = False
    return Packed(path) if packed else Folder(path)


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read and check the artifact at `path`: a directory, or a file that `pack` wrote.

    Raises ArtifactNotFound where there is none, ArtifactCorrupt where the manifest or a file is
    not what was written, ArtifactIncompatible where it is sound but this version cannot read it.
    Whether this host runs it is for `Artifact.library` to say. Nothing of it has been loaded into
    the process by then.

    Where a build replaces the artifact meanwhile, what comes is the old one or the new one, whole.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(
            f"path: expected a string or a path of an artifact's directory; got {short(path)}."
        )
    folder = folder_at(Path(os.path.abspath(os.fsdecode(path))))
    manifest, edition = read_manifest(folder)
    while True:
        try:
            return _check(folder, manifest, edition)
        except ArtifactError:
            # A build that replaced the manifest meanwhile also removed the old files.
            manifest, newer = read_manifest(folder)
            if newer == edition:
                raise
            edition = newer


def _check(folder: Folder, manifest: dict[str, Any], edition: Edition) -> Artifact:
    file = folder.place(MANIFEST)
    contents = Contents()
    try:
        spec = NormSpec.from_dict(fields.field(file, manifest, "spec", dict))
    except (SpecError, TypeError) as error:
        raise ArtifactIncompatible(
            f"{file}: this normgraph does not know the artifact's spec: {error!s:.400}. Install"
            f" the normgraph that built it ({short(manifest.get('normgraph_version'))}), or build"
            f" it again."
        ) from None
    kinds = fields.field(file, manifest, "kinds", dict)
    signatures: dict[str, Signature] = {}
    functions: dict[str, str] = {}
    for kind, entry in kinds.items():
        fields.identifier(file, "kind", kind)
        function = fields.identifier(file, "function", fields.field(file, entry, "function", str))
        if function != kind and function in kinds:
            raise ArtifactCorrupt(f"{file}: {kind} names the function of another kind. {REBUILD}")
        functions[kind] = function
        signatures[kind] = fields.signature(file, kind, entry)
        _content(contents, fields.stored_file(folder, fields.field(file, entry, "graph", dict)))
    if not kinds:
        raise ArtifactCorrupt(f"{file}: the artifact holds no kinds. {REBUILD}")
    tests = fields.field(file, manifest, "self_test", dict)
    status = fields.field(file, tests, "status", str)
    cases = tuple(
        fields.self_test_case(file, case) for case in fields.field(file, tests, "cases", list)
    )
    fields.check_work(file, cases)
    for case in cases:
        if case.kind not in kinds:
            raise ArtifactCorrupt(
                f"{file}: the self-test is of {short(case.kind)}, which is no kind of the artifact."
                f" {REBUILD}"
            )
    requires = fields.field(file, manifest, "requires", dict)
    loader = fields.field(file, requires, "tvm_ffi", dict)
    libraries = tuple(
        _library(folder, contents, entry, status)
        for entry in fields.field(file, manifest, "libraries", list)
    )
    vectors = fields.stored_file(folder, tests)
    return Artifact(
        path=folder.path,
        manifest=manifest,
        spec=spec,
        shape=fields.shape(file, manifest),
        dtype=fields.dtype(file, manifest),
        signatures=signatures,
        functions=functions,
        libraries=libraries,
        loader=(fields.version(file, loader, "from"), fields.version(file, loader, "below")),
        self_test=vectors,
        self_test_cases=cases,
        edition=edition,
        vectors=_content(contents, vectors),
    )


def _library(folder: Folder, contents: Contents, entry: Any, status: str) -> Library:
    """One library; `status`, that of all of them, holds where it has no self-test of its own."""
    file = folder.place(MANIFEST)
    target = fields.field(file, entry, "target", dict)
    stored = fields.stored_file(folder, entry)
    return Library(
        path=stored.path,
        target=fields.field(file, target, "name", str),
        kind=fields.field(file, target, "kind", str),
        triple=fields.field(file, target, "triple", str),
        features=fields.texts(file, target, "features"),
        self_test=fields.field(file, entry, "self_test", str) if "self_test" in entry else status,
        sha256=stored.sha256,
        content=_content(contents, stored),
        archs=fields.texts(file, target, "archs") if "archs" in target else (),
        toolkit=(*fields.version(file, target, "cuda"), 0) if "cuda" in target else (0, 0),
    )


def _content(contents: Contents, stored: StoredFile) -> bytes:
    try:
        return contents.of(stored)
    except ArtifactNotFound:
        raise ArtifactCorrupt(
            f"{stored.path}: the manifest names this file, but it is missing. {REBUILD}"
        ) from None
