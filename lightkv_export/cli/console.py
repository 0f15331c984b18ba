"""What people see: tables, progress and sizes, with `rich`; and what programs see: one JSON document.

Tables go to standard output. Progress goes to standard error: a bar on a terminal, else one line per item.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lightkv_export.steps import NOTE

PLAIN_WIDTH = 120  # rich assumes 80 where there is no terminal, and cuts

Update = Callable[[str, int, int], None]
"""Called as (what is being done, steps or bytes done, in all)."""


def print_json(document: Any) -> None:
    """The one document of `--json` on standard output."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output; a cell that is a number is right-aligned with thousands separated."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    _console().print(table)


def size_text(num_bytes: float) -> str:
    """A size for people: the largest binary unit that gives at least 1."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Update]:
    """Progress on standard error while the block runs; yields the function to call with (name, done, total)."""
    if quiet:
        yield lambda name, done, total: None
    elif not sys.stderr.isatty():
        yield _line_per_name()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)

            def update(name: str, done: int, total: int) -> None:
                if name.startswith(NOTE):
                    bar.console.print(name)
                else:
                    bar.update(task, description=name, completed=done, total=total)

            yield update


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send everything that libraries print on standard output, from Python or from C, to standard error.

    For the work part of commands with `--json`, whose standard output holds one document and nothing else.
    """
    sys.stdout.flush()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            real, target = os.dup(1), sys.stderr.fileno()
        except (OSError, ValueError):  # no such descriptor: an embedded interpreter or a test's stream
            yield
            return
        os.dup2(target, 1)
        try:
            yield
        finally:
            os.dup2(real, 1)
            os.close(real)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH)


def _cell(value: object) -> Text:
    if isinstance(value, float):
        return Text(f"{value:,.4g}")
    return Text(f"{value:,}" if _is_number(value) else str(value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _line_per_name() -> Update:
    last = ""

    def update(name: str, _done: int, _total: int) -> None:
        nonlocal last
        if name != last:
            last = name
            print(name, file=sys.stderr, flush=True)

    return update
