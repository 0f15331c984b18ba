"""The command line: `lightkv COMMAND` and `lightkv-export MODEL` (the same as `lightkv export MODEL`).

Thin on purpose. Every command is a module of this package with `add_parser(subparsers)` and `run(args) -> int`; only
the chosen command's module is imported, so help comes at once and no command needs what another one needs.
Exit status: see `program`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lightkv_export import __version__
from lightkv_export.cli.program import STATUS_USER, call_program
from lightkv_export.errors import UserError

__all__ = ["COMMANDS", "Command", "call_program", "export_main", "main"]

PROGRAM, EXPORT_PROGRAM = "lightkv", "lightkv-export"


@dataclass(frozen=True)
class Command:
    """A command: its name is also the name of its module here."""

    name: str
    help: str


COMMANDS = (
    Command("export", "make a bundle from a model"),
    Command("build", "build the TensorRT engines of a bundle"),
    Command("plan", "what a keep costs in cache bytes and FLOPs, without weights"),
    Command("run", "answer one question about images"),
    Command("chat", "a conversation in the terminal"),
    Command("verify", "compare a bundle with the reference; made for CI"),
    Command("eval", "accuracy of every keep on a frozen set"),
    Command("bench", "time to first token, tokens per second, memory"),
    Command("targets", "list the devices that --target knows"),
    Command("lint", "check graphs against what a target takes, before anything is built"),
    Command("doctor", "check driver, versions, memory and power mode of this machine"),
    Command("inspect", "show what is in a bundle"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s; options are never abbreviated."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise self.complaint(message)

    def complaint(self, message: str) -> UserError:
        """`message` as an error that shows the usage."""
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        return UserError(message, expected=usage, fix=f"see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """`lightkv`: run a command and return its exit status; what goes wrong becomes a message and a status."""
    return _main(PROGRAM, list(sys.argv[1:] if argv is None else argv))


def export_main(argv: Sequence[str] | None = None) -> int:
    """`lightkv-export MODEL ...`: `lightkv export MODEL ...` under the name that users know."""
    return _main(EXPORT_PROGRAM, ["export", *(sys.argv[1:] if argv is None else argv)])


def _main(prog: str, argv: list[str]) -> int:
    if not argv:
        _parser(prog, None).print_help(sys.stderr)
        return STATUS_USER

    def work() -> int:
        chosen = next((word for word in argv if not word.startswith("-")), None)
        names = [command.name for command in COMMANDS]
        if chosen is not None and chosen not in names:
            raise UserError(
                f"there is no command {chosen!r}{_did_you_mean(chosen, names)}",
                expected=f"one of: {', '.join(names)}",
                fix=f"see {prog} --help",
            )
        parser = _parser(prog, chosen)
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise _unknown_argument(unknown[0], args.parser)
        return args.run(args)

    return call_program(work, json_errors="--json" in argv, debug="--debug" in argv)


def _parser(prog: str, chosen: str | None) -> Parser:
    """The whole parser, in which only the chosen command has its own options."""
    parser = Parser(prog=prog, description="Large vision-language models with a compressed KV cache: export and run.")
    _add_common_options(parser)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in COMMANDS:
        if command.name != chosen:
            subparsers.add_parser(command.name, help=command.help)
            continue
        module = importlib.import_module(f"{__name__}.{command.name}")
        module.add_parser(subparsers)
        own = subparsers.choices[command.name]
        if prog == EXPORT_PROGRAM:
            own.prog = prog
        _add_common_options(own)
        own.set_defaults(run=module.run, parser=own)
    return parser


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"lightkv-export {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the trace of an error (also: LIGHTKV_DEBUG=1)")


def _unknown_argument(word: str, parser: Parser) -> UserError:
    options = re.findall(r"--[a-z][\w-]*", parser.format_help())
    hint = _did_you_mean(word.split("=")[0], options)
    kind = "option" if word.startswith("-") else "argument"
    return parser.complaint(f"unknown {kind} {word!r}{hint}")


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
