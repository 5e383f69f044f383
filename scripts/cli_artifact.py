"""`normgraph inspect`, `normgraph pack`, `normgraph unpack` and `normgraph targets`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normgraph.errors import ArtifactCorrupt, ArtifactIncompatible, TargetError
from normgraph.scripts.console import log, table


def inspect(options: argparse.Namespace) -> int:
    """Check an artifact and print its manifest, also where this host cannot run it.

    With --self-test its kernels are run on the vectors in it.
    """
    manifest, loaded = read(options.artifact)
    if options.json:
        shown = {"manifest": manifest, "self_test": _results(options)}
        print(json.dumps(shown if options.self_test else manifest, indent=2))
        return 0
    try:
        text = describe(options.artifact, manifest, loaded)
    except (AttributeError, KeyError, TypeError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ArtifactCorrupt(
            f"{options.artifact}: the manifest cannot be shown: {what}. Build the artifact again, "
            f"or see it as it is with --json."
        ) from None
    print(text)
    results = _results(options)
    if results:
        print("\n" + table([tuple(each.values()) for each in results], tuple(results[0])))
    elif options.self_test:
        print("\nno self-test: the artifact holds no vectors; `normgraph verify` draws its own")
    return 0


def pack(options: argparse.Namespace) -> int:
    """Write an artifact into one file."""
    from normgraph.runtime.packing import pack as write

    print(write(options.artifact, options.out))
    return 0


def unpack(options: argparse.Namespace) -> int:
    """Write a packed artifact's files into a directory."""
    from normgraph.runtime.packing import unpack as write

    print(write(options.artifact, options.out))
    return 0


def _results(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The largest error of each output, as --self-test asks for it. AccuracyError for a wrong one.

    The vectors are the artifact's own: they find kernels that go wrong on this host, not files
    that somebody made to look right.
    """
    if not options.self_test:
        return []
    from normgraph.runtime import load

    return [asdict(result) for result in load(options.artifact).self_test()]


def targets(options: argparse.Namespace) -> int:
    """Print the known targets."""
    from normgraph import compile as compiler

    known = compiler.targets()
    groups = compiler.target_groups()
    if options.json:
        listed = [
            {"name": each.name, "description": each.description, "runs_here": each.runs_here}
            for each in known
        ]
        listed += [{"name": name, "targets": list(names)} for name, names in groups.items()]
        print(json.dumps(listed, indent=2))
        return 0
    rows = [(each.name, "yes" if each.runs_here else "no", each.description) for each in known]
    rows += [(name, "", f"all of {', '.join(names)}") for name, names in groups.items()]
    print(table(rows, ("target", "runs here", "what it is for")))
    print("\nor a CPU that LLVM names, such as znver4 or neoverse-n1")
    return 0


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a sound artifact, and the target of the library this host loads.

    Where it loads none, that is empty, and a note on stderr says why.
    """
    from normgraph.runtime.artifact import folder_at, open_artifact
    from normgraph.runtime.manifest import read_manifest

    try:
        artifact = open_artifact(path)
    except ArtifactIncompatible as error:
        # Either the format is too new, which this says once more, or a spec within it.
        manifest, _ = read_manifest(folder_at(path))
        log(f"note: {error}")
        return manifest, ""
    try:
        return dict(artifact.manifest), artifact.library().target
    except (ArtifactIncompatible, TargetError) as error:
        log(f"note: {error}")
        return dict(artifact.manifest), ""


def describe(path: Path, manifest: dict[str, Any], loaded: str) -> str:
    """The manifest for a reader. loaded: the target of the library this host loads, if any."""
    spec = ", ".join(
        f"{name}={value}" for name, value in manifest["spec"].items() if value is not None
    )
    facts = [
        ("artifact", path),
        ("spec", spec),
        ("x", f"{manifest['dtype']}{_dims(manifest['shape'])}"),
        ("made by", f"normgraph {manifest['normgraph_version']}, {_versions(manifest)}"),
        ("format", f"version {manifest['format_version']}, digest {manifest['digest'][:12]}"),
        ("needs", "apache-tvm-ffi >={from},<{below}".format(**manifest["requires"]["tvm_ffi"])),
        ("loads here", loaded or "nothing"),
    ]
    lines = [table([(f"{name}:", value) for name, value in facts])]
    for kind, entry in manifest["kinds"].items():
        lines += ["", f"{kind} (rule {entry['rule']}, graph {entry['graph']['file']})"]
        lines.append(
            table(
                [
                    (f"  {role}", tensor["name"], f"{tensor['dtype']}{_dims(tensor['shape'])}")
                    for role in ("inputs", "outputs")
                    for tensor in entry[role]
                ]
            )
        )
    lines += ["", table([_library(each, manifest) for each in manifest["libraries"]], _LIBRARY)]
    return "\n".join(lines)


_LIBRARY = ("library for", "triple", "cpu", "runs here", "self-test", "size", "file")


def _library(library: dict[str, Any], manifest: dict[str, Any]) -> tuple[str, ...]:
    from normgraph.runtime.host import obstacle

    target = library["target"]
    blocked = obstacle(
        target["kind"],
        target["triple"],
        target["features"],
        target.get("archs", ()),
        tuple(int(part) for part in f"{target.get('cuda', '0')}.0".split(".")),
    )
    runs = "no" if blocked else "yes" if library["file"].endswith(".so") else "not linked"
    return (
        target["name"],
        target["triple"],
        target["mcpu"],
        runs,
        library.get("self_test", manifest["self_test"]["status"]),
        f"{library['size'] / 1024:.0f} KiB",
        library["file"],
    )


def _dims(shape: list[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _versions(manifest: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
