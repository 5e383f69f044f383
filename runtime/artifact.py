"""Reading an artifact: every file is checked before any of it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from normgraph.errors import (
    ArgumentTypeError,
    ArtifactCorrupt,
    ArtifactError,
    ArtifactIncompatible,
    ArtifactNotFound,
    SpecError,
)
from normgraph.runtime.library import Library, choose
from normgraph.runtime.signature import Signature, TensorSpec
from normgraph.spec import DTYPES, NormSpec

FORMAT = "normgraph-artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

T = TypeVar("T")

# Of a manifest: its digest, and which file it was when it was read.
Edition = tuple[str, int, int]

_REBUILD = "Build the artifact again."


@dataclass(frozen=True)
class SelfTestCase:
    """Stored inputs and float64 answers of one call; prefix says where they are in the file.

    shapes: of the inputs. A large input is stored as fewer elements, repeated over its shape; an
    input without an entry is stored whole.
    """

    kind: str
    prefix: str
    tolerance: Mapping[str, float]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Artifact:
    """A sound artifact, with the library that this host runs.

    self_test_status: of that library. vectors: what the self-test file holds, where the build could
    not run the self-test of that library.
    edition: differs from that of what another build puts in its place.
    """

    path: Path
    manifest: Mapping[str, Any]
    spec: NormSpec
    shape: tuple[int | str, ...]
    dtype: str
    signatures: Mapping[str, Signature]
    functions: Mapping[str, str]
    library: Path
    target: str
    self_test: Path
    self_test_status: str
    vectors: bytes | None
    edition: Edition
    self_test_cases: tuple[SelfTestCase, ...]


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read and check the artifact directory at `path`.

    Raises ArtifactNotFound where there is none, ArtifactCorrupt where the manifest or a file is
    not what was written, ArtifactIncompatible where it is sound but this host or this version
    cannot run it, TargetError where the variable NORMGRAPH_TARGET names a target it has no library
    for. Nothing of it has been loaded into the process by then.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(
            f"path: expected a string or a path of an artifact's directory; got {path!r}."
        )
    root = Path(os.path.abspath(os.fspath(path)))
    manifest, edition = _read_manifest(root)
    while True:
        try:
            return _check(root, manifest, edition)
        except ArtifactCorrupt:
            # A build that replaced the manifest meanwhile also removed the old files.
            manifest, newer = _read_manifest(root)
            if newer == edition:
                raise
            edition = newer


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest's canonical JSON without its digest field."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _read_manifest(root: Path) -> tuple[dict[str, Any], Edition]:
    if not root.exists():
        raise ArtifactNotFound(
            f"{root}: no such directory; expected an artifact. Build one there, or check the path."
        )
    if not root.is_dir():
        raise ArtifactNotFound(
            f"{root}: expected the directory of an artifact, but this is a file. Pass the"
            f" directory that holds {MANIFEST}."
        )
    file = root / MANIFEST
    if not file.exists():
        raise ArtifactNotFound(
            f"{root}: expected an artifact, but there is no {MANIFEST} in it. Build one there, or"
            f" check the path."
        )
    try:
        content, inode, time = _read(file)
        manifest = json.loads(content.decode("utf-8"))
        digest = manifest_digest(manifest) if isinstance(manifest, dict) else ""
    except (ValueError, RecursionError) as error:
        raise ArtifactCorrupt(f"{file}: expected JSON, but {error}. {_REBUILD}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactCorrupt(
            f"{file}: expected a manifest of format {FORMAT!r}, but it is none. {_REBUILD}"
        )
    version = _field(file, manifest, "format_version", int)
    if version > FORMAT_VERSION:
        raise ArtifactIncompatible(
            f"{file}: the artifact has format version {version}, and this normgraph reads up to"
            f" {FORMAT_VERSION}. Install a newer normgraph, or build the artifact with this one."
        )
    if version < 1:
        raise ArtifactCorrupt(f"{file}: format version {version} does not exist. {_REBUILD}")
    if _field(file, manifest, "digest", str) != digest:
        raise ArtifactCorrupt(
            f"{file}: the manifest does not match its own digest: it was changed after it was"
            f" written. {_REBUILD}"
        )
    return manifest, (digest, inode, time)


def _check(root: Path, manifest: dict[str, Any], edition: Edition) -> Artifact:
    file = root / MANIFEST
    try:
        spec = NormSpec.from_dict(_field(file, manifest, "spec", dict))
    except (SpecError, TypeError) as error:
        raise ArtifactIncompatible(
            f"{file}: this normgraph does not know the artifact's spec: {error}. Install the"
            f" normgraph that built it ({manifest.get('normgraph_version')}), or build it again."
        ) from None
    kinds = _field(file, manifest, "kinds", dict)
    signatures: dict[str, Signature] = {}
    functions: dict[str, str] = {}
    for kind, entry in kinds.items():
        functions[kind] = _field(file, entry, "function", str)
        if functions[kind] != kind and functions[kind] in kinds:
            raise ArtifactCorrupt(f"{file}: {kind} names the function of another kind. {_REBUILD}")
        signatures[kind] = _signature(file, kind, entry)
        _check_file(root, _field(file, entry, "graph", dict))
    if not kinds:
        raise ArtifactCorrupt(f"{file}: the artifact holds no kinds. {_REBUILD}")
    tests = _field(file, manifest, "self_test", dict)
    status = _field(file, tests, "status", str)
    libraries = [
        _library(file, _check_file(root, entry)[0], entry, status)
        for entry in _field(file, manifest, "libraries", list)
    ]
    test, vectors = _check_file(root, tests)
    cases = tuple(_case(file, case) for case in _field(file, tests, "cases", list))
    chosen = choose(root, libraries)
    return Artifact(
        path=root,
        manifest=manifest,
        spec=spec,
        shape=_shape(file, _field(file, manifest, "shape", list)),
        dtype=_dtype(file, _field(file, manifest, "dtype", str)),
        signatures=signatures,
        functions=functions,
        library=chosen.path,
        target=chosen.target,
        self_test=test,
        self_test_status=chosen.self_test,
        vectors=None if chosen.self_test == "passed" else vectors,
        edition=edition,
        self_test_cases=cases,
    )


def _library(file: Path, path: Path, entry: Any, status: str) -> Library:
    """One library; `status`, that of all of them, holds where it has no self-test of its own."""
    target = _field(file, entry, "target", dict)
    return Library(
        path,
        _field(file, target, "name", str),
        _field(file, target, "kind", str),
        _field(file, target, "triple", str),
        tuple(str(name) for name in _field(file, target, "features", list)),
        _field(file, entry, "self_test", str) if "self_test" in entry else status,
    )


def _case(file: Path, entry: Any) -> SelfTestCase:
    tolerance = _field(file, entry, "tolerance", dict)
    for name, value in tolerance.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArtifactCorrupt(f"{file}: tolerance of {name} is {value!r}. {_REBUILD}")
    stated = _field(file, entry, "shapes", dict) if "shapes" in entry else {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, dims in stated.items():
        sizes = [d for d in dims if type(d) is int and d > 0] if isinstance(dims, list) else None
        if sizes != dims:
            raise ArtifactCorrupt(f"{file}: the self-test's {name} has shape {dims!r}. {_REBUILD}")
        shapes[name] = tuple(sizes or ())
    kind, prefix = _field(file, entry, "kind", str), _field(file, entry, "prefix", str)
    return SelfTestCase(kind, prefix, tolerance, shapes)


def _signature(file: Path, kind: str, entry: Any) -> Signature:
    signature = Signature(
        kind,
        _tensors(file, _field(file, entry, "inputs", list)),
        _tensors(file, _field(file, entry, "outputs", list)),
    )
    if not signature.inputs or not signature.outputs:
        raise ArtifactCorrupt(f"{file}: {kind} takes or gives nothing. {_REBUILD}")
    bound = {dim for spec in signature.inputs for dim in spec.shape}
    for spec in signature.outputs:
        for dim in spec.shape:
            if isinstance(dim, str) and dim not in bound:
                raise ArtifactCorrupt(
                    f"{file}: no input of {kind} tells the extent {dim} of {spec}. {_REBUILD}"
                )
    return signature


def _tensors(file: Path, entries: list[Any]) -> tuple[TensorSpec, ...]:
    specs = tuple(
        TensorSpec(
            _field(file, entry, "name", str),
            _dtype(file, _field(file, entry, "dtype", str)),
            _shape(file, _field(file, entry, "shape", list)),
        )
        for entry in entries
    )
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names) or not all(name.isidentifier() for name in names):
        raise ArtifactCorrupt(f"{file}: {names} are not names of arguments. {_REBUILD}")
    return specs


def _shape(file: Path, dims: list[Any]) -> tuple[int | str, ...]:
    for dim in dims:
        if isinstance(dim, bool) or not isinstance(dim, (int, str)):
            raise ArtifactCorrupt(f"{file}: {dims!r} is no shape. {_REBUILD}")
    return tuple(dims)


def _dtype(file: Path, name: str) -> str:
    if name not in DTYPES:
        raise ArtifactCorrupt(f"{file}: unknown dtype {name!r}. {_REBUILD}")
    return name


def _field(file: Path, mapping: Any, key: str, kind: type[T]) -> T:
    if not isinstance(mapping, dict):
        raise ArtifactCorrupt(f"{file}: expected an object that holds {key!r}. {_REBUILD}")
    value = mapping.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        came = "nothing" if key not in mapping else repr(value)[:60]
        raise ArtifactCorrupt(
            f"{file}: expected {key!r} to be of type {kind.__name__}, but there is {came}."
            f" {_REBUILD}"
        )
    return value


def _check_file(root: Path, entry: Any) -> tuple[Path, bytes]:
    """One file of the artifact and its content, with name, size and sha256 checked."""
    manifest = root / MANIFEST
    name = _field(manifest, entry, "file", str)
    if name in ("", ".", "..") or Path(name).name != name:
        raise ArtifactCorrupt(f"{manifest}: {name!r} is no plain file name. {_REBUILD}")
    file = root / name
    try:
        content, _, _ = _read(file)
    except ArtifactNotFound:
        raise ArtifactCorrupt(
            f"{file}: the manifest names this file, but it is missing. {_REBUILD}"
        ) from None
    size = _field(manifest, entry, "size", int)
    if len(content) != size:
        raise ArtifactCorrupt(
            f"{file}: expected {size} bytes, but the file has {len(content)}. {_REBUILD}"
        )
    if hashlib.sha256(content).hexdigest() != _field(manifest, entry, "sha256", str):
        raise ArtifactCorrupt(
            f"{file}: the content is not what was written (its sha256 differs). {_REBUILD}"
        )
    return file, content


def _read(file: Path) -> tuple[bytes, int, int]:
    """The content, the inode and the time of change of one and the same file."""
    try:
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            return opened.read(), status.st_ino, status.st_mtime_ns
    except FileNotFoundError:
        raise ArtifactNotFound(f"{file}: there is no such file. {_REBUILD}") from None
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error.strerror or error}.") from None
