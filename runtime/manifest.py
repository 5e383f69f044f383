"""An artifact's manifest: its format and its digest, and what its fields must hold."""

from __future__ import annotations

import hashlib
import json
import keyword
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from normgraph.errors import ArtifactCorrupt, ArtifactIncompatible, ArtifactNotFound
from normgraph.runtime import strict_json
from normgraph.runtime.files import NAME, REBUILD, Folder, StoredFile, short
from normgraph.runtime.signature import Signature, TensorSpec
from normgraph.spec import DTYPES

FORMAT = "normgraph-artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# No manifest comes near this; what is larger is not read.
LARGEST = 2**20

# The most axes and elements of a tensor, and the most elements of one in a self-test: where there
# would be more, a build leaves the self-test out.
_MOST_AXES = 16
_MOST_ELEMENTS = 2**40
MOST_TESTED = 2**25
# Of the tensors of all cases: five kinds have some three large ones each.
_MOST_TESTED_IN_ALL = 32 * MOST_TESTED

# Kinds, functions and tensors become names in Python and in a library.
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")

T = TypeVar("T")

# Of a manifest: its digest, and which file it was when it was read.
Edition = tuple[str, int, int]


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


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest's canonical JSON without its digest field."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_manifest(folder: Folder) -> tuple[dict[str, Any], Edition]:
    """The manifest, of a format version that is known and with the digest it states.

    Raises ArtifactNotFound, ArtifactCorrupt, and ArtifactIncompatible for a newer format.
    """
    file = folder.place(MANIFEST)
    try:
        content, size, mark = folder.read(MANIFEST, LARGEST)
    except ArtifactNotFound:
        raise ArtifactNotFound(_nothing_at(folder.path)) from None
    if size > LARGEST:
        raise ArtifactCorrupt(
            f"{file}: expected a manifest of at most {LARGEST} bytes, but the file has {size}."
            f" {REBUILD}"
        )
    try:
        manifest = strict_json.parse(content)
        digest = manifest_digest(manifest) if isinstance(manifest, dict) else ""
    except ValueError as error:
        raise ArtifactCorrupt(f"{file}: expected JSON, but {error}. {REBUILD}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactCorrupt(
            f"{file}: expected a manifest of format {FORMAT!r}, but it is none. {REBUILD}"
        )
    version = field(file, manifest, "format_version", int)
    if version > FORMAT_VERSION:
        raise ArtifactIncompatible(
            f"{file}: the artifact has format version {version}, and this normgraph reads up to"
            f" {FORMAT_VERSION}. Install a newer normgraph, or build the artifact with this one."
        )
    if version < 1:
        raise ArtifactCorrupt(f"{file}: format version {version} does not exist. {REBUILD}")
    if field(file, manifest, "digest", str) != digest:
        raise ArtifactCorrupt(
            f"{file}: the manifest does not match its own digest: it was changed after it was"
            f" written. {REBUILD}"
        )
    return manifest, (digest, *mark)


def _nothing_at(root: Path) -> str:
    try:
        if not os.path.lexists(root):
            return (
                f"{root}: no such directory; expected an artifact. Build one there, or check the"
                f" path."
            )
        if not root.is_dir():
            return (
                f"{root}: expected the directory of an artifact or a packed one, and this is"
                f" neither a directory nor a plain file. Pass the directory that holds {MANIFEST}."
            )
    except ValueError as error:
        return f"{str(root)!r}: {error}. Check the path."
    return (
        f"{root}: expected an artifact, but there is no {MANIFEST} in it. Build one there, or"
        f" check the path."
    )


def field(file: Path, mapping: Any, key: str, kind: type[T]) -> T:
    """The value of `key`, of type `kind`; `file` is named where it is not so."""
    if not isinstance(mapping, dict):
        raise ArtifactCorrupt(f"{file}: expected an object that holds {key!r}. {REBUILD}")
    value = mapping.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        came = "nothing" if key not in mapping else short(value)
        raise ArtifactCorrupt(
            f"{file}: expected {key!r} to be of type {kind.__name__}, but there is {came}."
            f" {REBUILD}"
        )
    return value


def stored_file(folder: Folder, entry: Any) -> StoredFile:
    """The file that an entry of the manifest names, not yet read."""
    manifest = folder.place(MANIFEST)
    name = field(manifest, entry, "file", str)
    if not NAME.fullmatch(name):
        raise ArtifactCorrupt(f"{manifest}: {short(name)} is no plain file name. {REBUILD}")
    size = field(manifest, entry, "size", int)
    if size < 0:
        raise ArtifactCorrupt(f"{manifest}: {name} cannot have {size} bytes. {REBUILD}")
    return StoredFile(folder, name, size, field(manifest, entry, "sha256", str))


def texts(file: Path, mapping: Any, key: str) -> tuple[str, ...]:
    """A list of strings."""
    values = field(file, mapping, key, list)
    if not all(isinstance(value, str) for value in values):
        raise ArtifactCorrupt(f"{file}: {key!r} must hold names, not {short(values)}. {REBUILD}")
    return tuple(values)


def version(file: Path, mapping: Any, key: str) -> tuple[int, ...]:
    """A version: numbers with dots between."""
    text = field(file, mapping, key, str)
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){0,9}", text):
        raise ArtifactCorrupt(f"{file}: {key!r} is {short(text)}, which is no version. {REBUILD}")
    return tuple(int(part) for part in text.split("."))


def signature(file: Path, kind: str, entry: Any) -> Signature:
    """What a kind takes and gives."""
    found = Signature(
        kind,
        _tensors(file, field(file, entry, "inputs", list)),
        _tensors(file, field(file, entry, "outputs", list)),
    )
    if not found.inputs or not found.outputs:
        raise ArtifactCorrupt(f"{file}: {kind} takes or gives nothing. {REBUILD}")
    bound = {dim for spec in found.inputs for dim in spec.shape}
    for spec in found.outputs:
        for dim in spec.shape:
            if isinstance(dim, str) and dim not in bound:
                raise ArtifactCorrupt(
                    f"{file}: no input of {kind} tells the extent {dim} of {spec!s:.200}. {REBUILD}"
                )
        if not any(_holds(each.shape, spec.shape) for each in found.inputs):
            raise ArtifactCorrupt(
                f"{file}: {spec!s:.200} is larger than every input of {kind}. {REBUILD}"
            )
    return found


def _holds(larger: Sequence[int | str], smaller: Sequence[int | str]) -> bool:
    """Whether the second shape never has more elements, as the table of operators has it."""
    fixed = [math.prod(dim for dim in dims if isinstance(dim, int)) for dims in (larger, smaller)]
    named = [Counter(dim for dim in dims if isinstance(dim, str)) for dims in (larger, smaller)]
    return fixed[0] >= fixed[1] and named[0] >= named[1]


def _tensors(file: Path, entries: list[Any]) -> tuple[TensorSpec, ...]:
    specs = tuple(
        TensorSpec(field(file, entry, "name", str), dtype(file, entry), shape(file, entry))
        for entry in entries
    )
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names) or not all(map(_is_name, names)):
        raise ArtifactCorrupt(f"{file}: {short(names)} are not names of arguments. {REBUILD}")
    return specs


def identifier(file: Path, what: str, name: str) -> str:
    """The name of a kind or of a function."""
    if not _is_name(name):
        raise ArtifactCorrupt(
            f"{file}: expected the {what} to have a name of letters, digits and underscores that"
            f" is no word of Python's, but it is {short(name)}. {REBUILD}"
        )
    return name


def _is_name(name: str) -> bool:
    return _IDENTIFIER.fullmatch(name) is not None and not keyword.iskeyword(name)


def shape(file: Path, entry: Any) -> tuple[int | str, ...]:
    """The shape of a tensor, or of x: sizes, and names of those left open."""
    dims = field(file, entry, "shape", list)
    sizes = [dim for dim in dims if type(dim) is int]
    names = [dim for dim in dims if isinstance(dim, str)]
    if (
        len(dims) > _MOST_AXES
        or len(sizes) + len(names) < len(dims)
        or not all(name.isidentifier() for name in names)
        or any(size < 1 for size in sizes)
        or math.prod(sizes) > _MOST_ELEMENTS
    ):
        raise ArtifactCorrupt(
            f"{file}: {short(dims)} is no shape: expected at most {_MOST_AXES} sizes from 1 on, or"
            f" names of sizes, and at most {_MOST_ELEMENTS} elements. {REBUILD}"
        )
    return tuple(dims)


def dtype(file: Path, entry: Any) -> str:
    """The dtype of a tensor, or of x."""
    name = field(file, entry, "dtype", str)
    if name not in DTYPES:
        raise ArtifactCorrupt(f"{file}: unknown dtype {short(name)}. {REBUILD}")
    return name


def self_test_case(file: Path, entry: Any) -> SelfTestCase:
    """One case of the self-test."""
    tolerance = field(file, entry, "tolerance", dict)
    for name, value in tolerance.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArtifactCorrupt(
                f"{file}: tolerance of {short(name)} is {short(value)}. {REBUILD}"
            )
    stated = field(file, entry, "shapes", dict) if "shapes" in entry else {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, dims in stated.items():
        sizes = [d for d in dims if type(d) is int and d > 0] if isinstance(dims, list) else None
        if sizes is None or sizes != dims or len(dims) > _MOST_AXES:
            raise ArtifactCorrupt(
                f"{file}: the self-test's {short(name)} has shape {short(dims)}. {REBUILD}"
            )
        if math.prod(sizes) > MOST_TESTED:
            raise ArtifactCorrupt(
                f"{file}: the self-test's {short(name)} has shape {short(dims)}, and"
                f" {MOST_TESTED} elements are the most. {REBUILD}"
            )
        shapes[name] = tuple(sizes)
    kind, prefix = field(file, entry, "kind", str), field(file, entry, "prefix", str)
    return SelfTestCase(kind, prefix, tolerance, shapes)


def check_work(file: Path, cases: Sequence[SelfTestCase]) -> None:
    """A self-test takes seconds, and memory for one case after the other."""
    total = sum(math.prod(shape) for case in cases for shape in case.shapes.values())
    if total > _MOST_TESTED_IN_ALL:
        raise ArtifactCorrupt(
            f"{file}: the cases of the self-test have {total} elements together, and"
            f" {_MOST_TESTED_IN_ALL} are the most. {REBUILD}"
        )
