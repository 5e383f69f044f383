"""The arguments of every command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from normgraph import __version__
from normgraph.scripts import cli_artifact, cli_build, cli_cache, cli_check, cli_doctor, cli_run
from normgraph.scripts.argument_types import (
    names,
    number_or,
    numeric_shape,
    path,
    picture,
    shape,
    whole,
)
from normgraph.spec import CONVENTIONS, DTYPES, OPERATORS

Command = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """A parser whose help fails like any other output: argparse passes over a closed pipe."""

    def print_help(self, file: Any = None) -> None:
        out = file or sys.stdout
        if out is not None:
            out.write(self.format_help())


def make_parser() -> argparse.ArgumentParser:
    """The parser; `options.command` of what it parses is the function to call with `options`."""
    parser = _Parser(
        prog="normgraph",
        description="Normalization layers, forward and backward, as ONNX graphs compiled through "
        "Apache TVM to one kernel each.",
        epilog="Exit codes: 0 ok, 1 accuracy failed, 2 usage, 3 artifact missing or damaged, "
        "4 this host cannot run it, 5 compile failed, 6 a tool is missing.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"normgraph {__version__}")
    parser.add_argument("--debug", action="store_true", help="show a traceback for every error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )
        return sub

    _export(command("export", cli_build.export, "write the ONNX graphs of one operator"))
    _compile(command("compile", cli_build.compile_, "compile exported graphs to an artifact"))
    _verify(command("verify", cli_check.verify, "hold every output against float64 NumPy"))
    _run(command("run", cli_run.run, "run one kind of an artifact on arrays from files"))
    _bench(command("bench", cli_check.bench, "time an artifact against its peers"))
    _inspect(command("inspect", cli_artifact.inspect, "show what an artifact holds"))
    _cache(command("cache", cli_cache.cache, "show or empty the cache of compiled artifacts"))
    _pack(command("pack", cli_artifact.pack, "write an artifact into one file"), "FILE.ngz")
    _pack(command("unpack", cli_artifact.unpack, "write a packed artifact into a directory"), "DIR")
    _json(command("targets", cli_artifact.targets, "list the known targets"))
    _json(command("doctor", cli_doctor.doctor, "report what this machine has and lacks"))
    return parser


def _export(sub: argparse.ArgumentParser) -> None:
    # An option that is not given is not passed on: the defaults are NormSpec's.
    unset = argparse.SUPPRESS
    sub.add_argument("op", metavar="OPERATOR", choices=OPERATORS, help=", ".join(OPERATORS))
    sub.add_argument("--shape", type=shape, required=True, metavar="N,64,H,W", help="of x")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of x (float32)")
    sub.add_argument("-o", "--out", type=path, required=True, metavar="DIR")
    sub.add_argument("--kinds", type=names, metavar="forward,backward", help="default: all")
    spec = sub.add_argument_group("options of the operator")
    spec.add_argument(
        "--eps", type=number_or("none"), default=unset, help="1e-5; 'none': machine epsilon"
    )
    spec.add_argument("--groups", type=int, default=unset, help="of group_norm")
    spec.add_argument("--normalized-ndim", type=int, default=unset, help="layer_norm, rms_norm: 1")
    spec.add_argument("--no-weight", dest="weight", action="store_false", default=unset)
    spec.add_argument("--no-bias", dest="bias", action="store_false", default=unset)
    spec.add_argument("--correction", type=int, choices=(0, 1), default=unset, help="0")
    spec.add_argument("--track-running-stats", action=argparse.BooleanOptionalAction, default=unset)
    spec.add_argument(
        "--momentum",
        type=number_or("input"),
        default=unset,
        help="a number, or 'input' to make it an input of the graph",
    )
    spec.add_argument("--convention", choices=CONVENTIONS, default=unset)
    spec.add_argument("--param-dtype", choices=DTYPES, default=unset)


def _compile(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("src", type=path, metavar="GRAPHS", help="what export wrote")
    target_option(sub)
    sub.add_argument("-o", "--out", type=path, required=True, metavar="DIR")
    sub.add_argument(
        "--debug-dump", type=path, metavar="DIR", help="write the IR after each step there"
    )


def target_option(sub: argparse.ArgumentParser) -> None:
    """--target, once or more often, each with one name or several; None where it is not given."""
    sub.add_argument(
        "--target",
        type=names,
        action="extend",
        metavar="NAME,NAME",
        help="cpu (the default), or one or several that 'normgraph targets' lists: one artifact "
        "then holds a library for each",
    )


def _verify(sub: argparse.ArgumentParser) -> None:
    _artifact(sub)
    sub.add_argument("--shape", type=numeric_shape, metavar="8,64,56,56", help="of x")
    sub.add_argument("--seed", type=whole(0), default=0)
    _json(sub)


def _bench(sub: argparse.ArgumentParser) -> None:
    _artifact(sub)
    sub.add_argument("--shape", type=numeric_shape, metavar="8,64,56,56", help="of x")
    sub.add_argument("--kinds", type=names, metavar="forward,backward", help="only these")
    sub.add_argument(
        "--brief", action="store_true", help="without torch.compile, oneDNN and stock TVM"
    )
    sub.add_argument("--plot", type=picture, metavar="FILE", help="a roofline: .svg, .png or .pdf")
    sub.add_argument("--markdown", action="store_true", help="print Markdown")
    _json(sub)


def _run(sub: argparse.ArgumentParser) -> None:
    _artifact(sub)
    sub.add_argument("kind", metavar="KIND", help="forward, inference, backward, ...")
    sub.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="x=x.npy; a bare file.npz gives every array in it by name; a scalar may be a number "
        "(momentum=0.1). bfloat16 is stored as its bits, uint16",
    )
    sub.add_argument("--want", type=names, metavar="dx,dgamma", help="only these outputs")
    sub.add_argument(
        "-o", "--out", type=path, metavar="FILE", help=".npz, or .npy where one output is wanted"
    )


def _inspect(sub: argparse.ArgumentParser) -> None:
    _artifact(sub)
    sub.add_argument(
        "--self-test", action="store_true", help="run the kernels on the vectors in the artifact"
    )
    _json(sub)


def _cache(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--clear", action="store_true", help="remove every entry")
    _json(sub)


def _pack(sub: argparse.ArgumentParser, out: str) -> None:
    _artifact(sub)
    sub.add_argument("-o", "--out", type=path, required=True, metavar=out)


def _artifact(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("artifact", type=path, metavar="ARTIFACT", help="what compile or pack wrote")


def _json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON")
