"""The C in a CUDA library beside its host code: tables of kernels and images, and the launcher."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from normgraph.compile.cuda_codegen import Kernel
from normgraph.compile.cuda_compilers import Image
from normgraph.compile.link import Sources
from normgraph.cuda import capability_of

HERE = Path(__file__).parent
LAUNCHER = (HERE / "cuda_launcher.c", HERE / "cuda_device.c", HERE / "cuda_team.c")


def write(folder: Path, kernels: Sequence[Kernel], images: Sequence[Image]) -> Sources:
    """Write the tables of kernels and images, and the images themselves, into `folder`."""
    parts = ['#include "cuda_launcher.h"', ""]
    entries = []
    for number, image in enumerate(images):
        file = folder / f"image{number}.bin"
        # PTX must end in a zero; machine code says itself where it ends.
        file.write_bytes(image.content.rstrip(b"\0") + b"\0" if _is_ptx(image) else image.content)
        parts += [_embedded(f"normgraph_image_{number}", file), ""]
        major, minor = capability_of(image.arch) or (0, 0)
        entries.append(f"{{{10 * major + minor}, {int(_is_ptx(image))}, normgraph_image_{number}}}")
    parts.append(_table("normgraph_image", entries))
    names = ", ".join(image.arch for image in images)
    parts.append(f'const char normgraph_image_names[] = "{names}";\n')
    rows = [f'{{"{each.name}", "{each.params}", "{each.launch}"}}' for each in kernels]
    parts.append(_table("normgraph_kernel", rows))
    table = folder / "kernels.c"
    table.write_text("\n".join(parts), encoding="utf-8")
    return Sources((table, *LAUNCHER), (HERE,))


def _is_ptx(image: Image) -> bool:
    return image.arch.startswith("compute_")


def _embedded(name: str, file: Path) -> str:
    path = re.sub(r'(["\\])', r"\\\1", str(file))
    lines = [".section .rodata", ".balign 64", f".hidden {name}", f".globl {name}", f"{name}:"]
    text = "".join(f'    "{line}\\n"\n' for line in lines)
    quoted = re.sub(r'(["\\])', r"\\\1", f'.incbin "{path}"')
    return (
        f'__asm__(\n{text}    "{quoted}\\n"\n    ".previous\\n");\n'
        f'extern const unsigned char {name}[] __attribute__((visibility("hidden")));'
    )


def _table(name: str, rows: Sequence[str]) -> str:
    plural = f"{name}s"
    body = "".join(f"    {row},\n" for row in rows)
    return f"const {name} {plural}[] = {{\n{body}}};\nconst int {name}_count = {len(rows)};\n"
