"""The options of a call: which outputs are wanted, and whether each is written or added to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime.results import result_type
from normgraph.runtime.signature import Signature

GradReq = str | Mapping[str, str]
Want = str | Iterable[str]

_BITS = {"null": 0, "write": 1, "add": 2}


@dataclass(frozen=True)
class Selection:
    """The wanted outputs by index, and the kernel's request word (two bits an output)."""

    wanted: tuple[int, ...]
    added: frozenset[int]
    request: int
    result: type[tuple[Any, ...]] | None  # None: the one wanted output is returned bare


def freeze(
    signature: Signature, want: Want | None, grad_req: GradReq
) -> tuple[tuple[str, ...] | None, str | tuple[tuple[str, str], ...]]:
    """want and grad_req as hashable values, refused where they are of another type."""
    if isinstance(want, str):
        names: tuple[str, ...] | None = (want,)
    elif want is None:
        names = None
    else:
        try:
            names = tuple(want)
        except TypeError:
            names = (want,)  # type: ignore[assignment]  # refused just below
        for name in names or ():
            if not isinstance(name, str):
                raise ArgumentTypeError(
                    f"{signature.kind}: want must be a name or a sequence of names out of"
                    f" {_listed(signature)}, but it holds {name!r}."
                )
    if isinstance(grad_req, str):
        return names, grad_req
    if not isinstance(grad_req, Mapping):
        raise ArgumentTypeError(
            f'{signature.kind}: grad_req must be "write", "add" or "null", or a dict of them by'
            f" output name, but it is {grad_req!r}."
        )
    for name, value in grad_req.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ArgumentTypeError(
                f"{signature.kind}: grad_req must map output names to strings, but it holds"
                f" {name!r}: {value!r}."
            )
    return names, tuple(grad_req.items())


def select(
    signature: Signature,
    want: tuple[str, ...] | None,
    grad_req: str | tuple[tuple[str, str], ...],
) -> Selection:
    """Resolve want and grad_req against the outputs of a kind; contradictions are refused."""
    kind, names = signature.kind, signature.output_names
    given: dict[str, str]
    if isinstance(grad_req, str):
        given = dict.fromkeys(names if want is None else want, grad_req)
    else:
        given = dict(grad_req)
    for name in (*(want or ()), *given):
        if name not in names:
            raise ArgumentTypeError(
                f"{kind}: there is no output {name!r}; the outputs are {_listed(signature)}."
            )
    for name, value in given.items():
        if value not in _BITS:
            raise ArgumentError(
                f'{kind}: grad_req of {name} must be "write", "add" or "null", but it is {value!r}.'
            )
    if want is not None:
        if len(set(want)) != len(want):
            raise ArgumentError(f"{kind}: want names an output twice: {want}.")
        for name, value in given.items():
            if (name in want) == (value == "null"):
                state = "wanted" if name in want else "not wanted"
                raise ArgumentError(
                    f"{kind}: {name} is {state}, but its grad_req is {value!r}. Leave it out of"
                    f" one of the two."
                )
        given = {name: given.get(name, "write") for name in want}
    bits = [_BITS[given.get(name, "write" if want is None else "null")] for name in names]
    wanted = tuple(index for index, bit in enumerate(bits) if bit)
    if not wanted:
        raise ArgumentError(
            f"{kind}: no output is wanted, so there is nothing to compute. Name at least one of"
            f" {_listed(signature)} in want, or do not make the call."
        )
    chosen = tuple(names[index] for index in wanted)
    return Selection(
        wanted=wanted,
        added=frozenset(index for index, bit in enumerate(bits) if bit == 2),
        request=sum(bit << (2 * index) for index, bit in enumerate(bits)),
        result=result_type(kind, chosen) if len(chosen) > 1 else None,
    )


def check_out(signature: Signature, selection: Selection, out: object) -> Mapping[str, Any]:
    """Check that out names wanted outputs only, and every output that is added to."""
    kind, names = signature.kind, signature.output_names
    if out is None:
        out = {}
    if not isinstance(out, Mapping):
        raise ArgumentTypeError(
            f"{kind}: out must be a dict of arrays by output name, such as"
            f" {{{names[0]!r}: array}}, but it is {type(out).__name__}."
        )
    for name, array in out.items():
        if name not in names:
            raise ArgumentTypeError(
                f"{kind}: out has {name!r}, which is no output; the outputs are"
                f" {_listed(signature)}."
            )
        if array is None:
            raise ArgumentTypeError(
                f"{kind}: out[{name!r}] must be an array, but it is None. Leave the name out to"
                f" have the output allocated."
            )
        if names.index(name) not in selection.wanted:
            raise ArgumentError(
                f"{kind}: out has {name}, which is not wanted. Leave it out of out, or want it."
            )
    for index in sorted(selection.added):
        if names[index] not in out:
            raise ArgumentError(
                f'{kind}: grad_req of {names[index]} is "add", so the array to add to must be'
                f" given as out={{{names[index]!r}: array}}."
            )
    return out


def _listed(signature: Signature) -> str:
    return ", ".join(signature.output_names)
