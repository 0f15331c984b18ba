"""What happens around a command: signals, errors as messages, exit status. Standard library only.

| status | meaning |
|---|---|
| 0 | fine |
| 1 | a gate failed (the command returned 1) |
| 2 | the user's input is wrong: a message that says what was found, what was expected and what to do |
| 70 | a fault of this program: a short message; the trace with `--debug` or LIGHTKV_DEBUG=1 |
| 130 | interrupted (Ctrl-C, SIGTERM, SIGHUP) |
| 141 | whoever read our output stopped reading (`| head`) |
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lightkv_export.errors import LightKVError, UserError
from lightkv_export.filesystem import disk_error

STATUS_USER, STATUS_FAULT, STATUS_INTERRUPTED, STATUS_PIPE = 2, 70, 130, 141

EXTRAS = {
    "export": (
        "torch",
        "transformers",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "safetensors",
        "accelerate",
        "huggingface_hub",
    ),
    "trt": ("tensorrt_rtx",),
}
"""Extra of this package -> importable names that it brings. Anything else belongs to the base install."""


@dataclass(frozen=True)
class Failure:
    """How a run ended: the exit status, and the message in its three parts."""

    status: int
    found: str
    expected: str = ""
    to_do: str = ""


def call_program(work: Callable[[], int | None], *, json_errors: bool = False, debug: bool = False) -> int:
    """Run `work` and return an exit status; every exception becomes a message on standard error.

    Args:
        work: returns the exit status (None: 0).
        json_errors: also print {"error": {"found", "expected", "to_do"}} on standard output.
        debug: also show the trace. The environment variable LIGHTKV_DEBUG=1 does the same.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model's text must not fail on a terminal that lacks a character
            stream.reconfigure(errors="backslashreplace")
    try:
        with _signals_interrupt():
            status = work() or 0
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        # Python flushes stdout once more at exit; there is nobody left to hear it.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - lives until the process ends
        return STATUS_PIPE
    except SystemExit as stop:  # argparse after --help and --version
        return stop.code if isinstance(stop.code, int) else STATUS_USER if stop.code else 0
    except BaseException as error:  # noqa: BLE001 - this is the one place where every error ends
        failure = _failure(error)
        if debug or os.environ.get("LIGHTKV_DEBUG") == "1":
            traceback.print_exc()
        _report(failure, json_errors)
        return failure.status


def _failure(error: BaseException) -> Failure:
    if isinstance(error, KeyboardInterrupt):
        return Failure(STATUS_INTERRUPTED, str(error) or "interrupted; nothing was left half-written")
    if isinstance(error, ModuleNotFoundError):
        error = _missing_module(error)
    elif isinstance(error, OSError) and error.filename is not None:
        error = UserError(f"{error.filename}: {error.strerror}", fix="check the path and its permissions")
    elif not isinstance(error, LightKVError) and disk_error(error):
        error = UserError(f"cannot write: {disk_error(error)}", fix="free some space or write elsewhere")
    if isinstance(error, LightKVError):
        return Failure(STATUS_USER, error.found, error.expected, error.fix)
    return Failure(
        STATUS_FAULT,
        f"fault in lightkv_export: {type(error).__name__}: {error}",
        to_do="please report it with the trace, which --debug or LIGHTKV_DEBUG=1 shows",
    )


def _missing_module(error: ModuleNotFoundError) -> ModuleNotFoundError | UserError:
    """A module that an install would bring, as advice; a module of our own that is missing stays a fault."""
    name = (error.name or "").partition(".")[0]
    if name in ("", "lightkv_export"):
        return error
    extra = next((extra for extra, names in EXTRAS.items() if name in names), "")
    package = f"lightkv-export[{extra}]" if extra else "lightkv-export"
    return UserError(
        f"the Python package {name!r} is not installed",
        expected=f"the {extra or 'base'} install of lightkv-export in {sys.prefix}",
        fix=f'pip install "{package}"',
    )


def _report(failure: Failure, json_errors: bool) -> None:
    lines = [failure.found if failure.status == STATUS_INTERRUPTED else f"error: {failure.found}"]
    lines += [f"  expected: {failure.expected}"] if failure.expected else []
    lines += [f"  to do: {failure.to_do}"] if failure.to_do else []
    print("\n".join(lines), file=sys.stderr)
    if json_errors:
        document = {"error": {"found": failure.found, "expected": failure.expected, "to_do": failure.to_do}}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(document), flush=True)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Make a polite kill (SIGTERM, or SIGHUP from a closed terminal) a KeyboardInterrupt, so that cleanup runs."""

    def interrupt(number: int, _frame: Any) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one must not cut the cleanup short
        raise KeyboardInterrupt

    saved = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup's choice stays
                saved[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)
