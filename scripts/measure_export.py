"""Measure what an export costs: time per step, peak memory, and bytes on disk. Linux only.

    python scripts/measure_export.py CHECKPOINT -- --dtype fp16 --link-weights
    python scripts/measure_export.py --command optimum-cli export onnx --model CHECKPOINT OUT

The first form runs `lightkv export CHECKPOINT` with the options behind `--`; the second any other program.

Memory is the sum of RssAnon and RssShmem (/proc/PID/status) over the program and all its children, read every 50 ms:
what only this program holds. Pages of mapped files are the page cache's, which the kernel may drop, and do not count.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightkv_export.cli.console import print_table
from lightkv_export.cli.program import call_program
from lightkv_export.errors import UserError

GIB = 1 << 30
INTERVAL_S = 0.05


@dataclass
class Figures:
    """One run. Bytes of memory and disk; `steps` are seconds by the name that the program printed.

    Attributes:
        load: runnable processes of the whole machine just before, averaged over a minute (os.getloadavg).
        cpu_s: processor time of the program and its children: what the wall time would be on an idle processor core.
        out_bytes: of all files of the result; own_bytes: of those that are no hard links to something else.
    """

    command: list[str]
    load: float
    status: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    out_bytes: int = 0
    own_bytes: int = 0
    steps: dict[str, float] = field(default_factory=dict)
    last_lines: list[str] = field(default_factory=list)


def main() -> int:
    """Run, report, and remove the result unless `--out` names a place for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("checkpoint", nargs="?", type=Path, help="directory of a checkpoint")
    what.add_argument("--command", nargs=argparse.REMAINDER, metavar="WORD", help="measure another program")
    parser.add_argument("--out", type=Path, help="where the bundle goes, which then stays (default: beside CHECKPOINT)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="address space that the program may have")
    parser.add_argument("--timeout", type=float, metavar="S", help="stop the program after so many seconds")
    arguments, options = split_at_dashes(sys.argv[1:])
    args = parser.parse_args(arguments)
    if args.command:
        figures = measure(args.command, args.memory, args.timeout)
        report(figures)
        return 0
    if not args.checkpoint.is_dir():
        raise UserError(f"{args.checkpoint} is not a directory", fix="make one with scripts/synthetic_checkpoint.py")
    # beside the checkpoint, since a hard link does not reach another file system
    with tempfile.TemporaryDirectory(dir=args.checkpoint.resolve().parent, prefix=".measure-") as scratch:
        out = args.out or Path(scratch) / "bundle"
        command = [sys.executable, "-m", "lightkv_export", "export", str(args.checkpoint), "--out", str(out), *options]
        figures = measure(command, args.memory, args.timeout)
        files = [path.stat() for path in out.rglob("*") if path.is_file()] if out.is_dir() else []
        figures.out_bytes = sum(status.st_size for status in files)
        figures.own_bytes = sum(status.st_size for status in files if status.st_nlink == 1)
        report(figures)
    return figures.status


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind the first `--`."""
    place = words.index("--") if "--" in words and "--command" not in words else len(words)
    return words[:place], words[place + 1 :]


def measure(command: list[str], memory_gib: float | None = None, timeout_s: float | None = None) -> Figures:
    """Runs `command` to its end and returns its figures, disk aside."""
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no program {command[0]!r}", fix="install it, or name it by its path")
    figures = Figures(command, os.getloadavg()[0])
    limit = None if memory_gib is None else int(memory_gib * GIB)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    program = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    reader = threading.Thread(target=read_steps, args=(program, figures, started))
    reader.start()
    while program.poll() is None:
        figures.peak_bytes = max(figures.peak_bytes, sum(map(held_bytes, tree(program.pid))))
        if timeout_s is not None and time.perf_counter() - started > timeout_s:
            program.kill()
            figures.last_lines.append(f"stopped after {timeout_s:g} s")
        time.sleep(INTERVAL_S)
    reader.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures.status, figures.wall_s = program.returncode, time.perf_counter() - started
    figures.cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return figures


def read_steps(program: subprocess.Popen, figures: Figures, started: float) -> None:
    """Each line on standard error begins a step, which lasts until the next line."""
    name, since = "start", started
    for line in program.stderr:
        now = time.perf_counter()
        figures.steps[name] = figures.steps.get(name, 0.0) + now - since
        name, since = line.strip()[:60], now
        figures.last_lines = [*figures.last_lines[-7:], line.rstrip()]
    figures.steps[name] = figures.steps.get(name, 0.0) + time.perf_counter() - since


def tree(root: int) -> Iterator[int]:
    """Ids of the process and of everything below it."""
    todo = [root]
    while todo:
        pid = todo.pop()
        yield pid
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                todo += map(int, task.read_text().split())
            except OSError:  # it ended meanwhile
                continue


def held_bytes(pid: int) -> int:
    """RssAnon and RssShmem of one process; 0 if it ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def report(figures: Figures) -> None:
    """A table for people and a line of JSON for programs."""
    rows = [
        ("exit status", figures.status),
        ("wall time, s", round(figures.wall_s, 1)),
        ("processor time, s", round(figures.cpu_s, 1)),
        ("load of the machine before", round(figures.load, 1)),
        ("peak memory, page cache aside, GiB", round(figures.peak_bytes / GIB, 3)),
        ("result, GiB", round(figures.out_bytes / GIB, 3)),
        ("of it not linked, GiB", round(figures.own_bytes / GIB, 3)),
    ]
    rows += [(f"  {name}, s", round(seconds, 1)) for name, seconds in figures.steps.items() if seconds >= 0.5]
    print_table(" ".join(figures.command), ("what", "value"), rows)
    if figures.status:
        print("\n".join(figures.last_lines))
    print(json.dumps(asdict(figures)))


if __name__ == "__main__":
    raise SystemExit(call_program(main))
