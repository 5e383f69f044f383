"""`normgraph inspect` and `normgraph targets`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from normgraph.errors import ArtifactCorrupt, ArtifactIncompatible, TargetError
from normgraph.scripts.console import log, table


def inspect(options: argparse.Namespace) -> int:
    """Check an artifact and print its manifest, also where this host cannot run it."""
    manifest, loaded = read_manifest(options.artifact)
    if options.json:
        print(json.dumps(manifest, indent=2))
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
    return 0


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


def read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a sound artifact, and the target of the library this host loads.

    Where it loads none, that is empty, and a note on stderr says why.
    """
    from normgraph.runtime.artifact import FORMAT_VERSION, MANIFEST, open_artifact

    try:
        artifact = open_artifact(path)
        return dict(artifact.manifest), artifact.target
    except (ArtifactIncompatible, TargetError) as error:
        # What is wrong is the host, so the files have been checked, or the format is too new.
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] > FORMAT_VERSION:
            raise
        log(f"note: {error}")
        return manifest, ""


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
    blocked = obstacle(target["kind"], target["triple"], target["features"])
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
