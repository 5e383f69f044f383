"""`normgraph inspect` and `normgraph targets`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from normgraph.errors import ArtifactCorrupt, ArtifactIncompatible
from normgraph.scripts.console import log, table


def inspect(options: argparse.Namespace) -> int:
    """Check an artifact and print its manifest, also where this host cannot run it."""
    manifest = read_manifest(options.artifact)
    if options.json:
        print(json.dumps(manifest, indent=2))
        return 0
    try:
        text = describe(options.artifact, manifest)
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

    known = [(target.name, target.description) for target in compiler.targets()]
    if options.json:
        print(json.dumps([{"name": name, "description": text} for name, text in known], indent=2))
    else:
        print(table(known, ("target", "what it is for")))
    return 0


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a sound artifact; a note on stderr where this host cannot run it."""
    from normgraph.runtime.artifact import FORMAT_VERSION, MANIFEST, open_artifact

    try:
        return dict(open_artifact(path).manifest)
    except ArtifactIncompatible as error:
        # What is wrong is the host, so the files have been checked, or the format is too new.
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] > FORMAT_VERSION:
            raise
        log(f"note: {error}")
        return manifest


def describe(path: Path, manifest: dict[str, Any]) -> str:
    """The manifest for a reader."""
    spec = ", ".join(
        f"{name}={value}" for name, value in manifest["spec"].items() if value is not None
    )
    facts = [
        ("artifact", path),
        ("spec", spec),
        ("x", f"{manifest['dtype']}{_dims(manifest['shape'])}"),
        ("made by", f"normgraph {manifest['normgraph_version']}, {_versions(manifest)}"),
        ("self-test", manifest["self_test"]["status"]),
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
    lines += ["", "libraries"]
    lines.append(
        table(
            [
                (
                    f"  {library['target']['name']}",
                    library["target"]["triple"],
                    library["target"]["mcpu"],
                    f"{library['size'] / 1024:.0f} KiB",
                    library["file"],
                )
                for library in manifest["libraries"]
            ]
        )
    )
    return "\n".join(lines)


def _dims(shape: list[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _versions(manifest: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
