"""`lightkv chat BUNDLE`: a conversation in the terminal. Ctrl-C stops an answer, not the program.

Lines are read from standard input, so a conversation can also be piped in. Commands: /image FILE adds an image to the
next message, /keep K starts over with another keep, /reset starts over, /help lists them, /quit or the end of input
leaves.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

from lightkv_export.cli.runtime_options import add_runtime_options, load_model, sampling_from
from lightkv_export.errors import LightKVError, UserError

if TYPE_CHECKING:
    from lightkv_export.runtime.generation import Request
    from lightkv_export.runtime.model import Model

HELP = "/image FILE   /keep K   /reset   /help   /quit"


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    parser = subparsers.add_parser("chat", help="a conversation in the terminal", description=__doc__)
    add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Talk until /quit or the end of input; exit status 0.

    Raises:
        LightKVError: the bundle or a setting cannot be used. A mistake inside the conversation is only reported.
    """
    from lightkv_export.runtime.generation import Request
    from lightkv_export.runtime.image import decode

    for path in args.image:
        decode(path)  # complain now, not with the first message
    request = Request(max_new_tokens=args.max_new_tokens, sampling=sampling_from(args))
    conversation = _Conversation(load_model(args), args.keep, request, list(args.image))
    print(f"{conversation.model.manifest.name}: {HELP}", file=sys.stderr)
    while (line := _read_line()) is not None:
        try:
            if not conversation.handle(line.strip()):
                break
        except LightKVError as error:
            print(f"error: {error}", file=sys.stderr)
    return 0


class _Conversation:
    """The session and what waits for the next message."""

    def __init__(self, model: Model, keep: float | None, request: Request, images: list[str]) -> None:
        self.model, self._request, self._images = model, request, images
        self._keep = keep
        self._session = model.session(keep)

    def handle(self, line: str) -> bool:
        """Do what a line says; False ends the program."""
        if not line.startswith("/"):
            if line:
                self._answer(line)
            return True
        command, _, value = line.partition(" ")
        if command == "/image":
            self._add_image(value.strip())
        elif command == "/keep":
            self._restart(_share(value))
        elif command == "/reset":
            self._restart(self._keep)
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command != "/quit":
            raise UserError(f"unknown command {command!r}", expected=HELP)
        return command != "/quit"

    def _answer(self, prompt: str) -> None:
        images, self._images = self._images, []
        self._session.append(prompt, images)
        try:
            with closing(self._session.stream(self._request)) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=sys.stderr, flush=True)
        print(flush=True)

    def _add_image(self, path: str) -> None:
        from lightkv_export.runtime.image import decode

        decode(path)
        self._images.append(path)

    def _restart(self, keep: float | None) -> None:
        session = self.model.session(keep)  # refuses an unknown keep before anything is lost
        self._session, self._keep, self._images = session, keep, []
        print(f"new conversation, keep {session.keep.keep:.3f}", file=sys.stderr)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"/keep {text!r} is not a number", expected="for example: /keep 0.55") from None


def _read_line() -> str | None:
    """The next line of standard input; None at its end, or after Ctrl-C at the prompt."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return None
