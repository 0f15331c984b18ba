"""Builds one engine in a process of its own: its memory is counted, and given back before the next engine starts. A
build that the system kills for memory ends as a message, not as a dead program.

The parent writes a `Job` as JSON to the child's standard input; the child prints JSON lines: progress, then a
`Report` or an error in its three parts.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightkv_export.engines.compiler import OnProgress, Settings, compile_graph
from lightkv_export.engines.cuda import open_cuda
from lightkv_export.engines.library import Library, import_library
from lightkv_export.engines.profiles import EnginePlan, Profile
from lightkv_export.errors import BackendError

WRITE_BYTES = 16 << 20


@dataclass(frozen=True)
class Job:
    """What a child is to build: the graph's name and ONNX file, the engine file to write, and how."""

    library: str
    graph: str
    onnx: Path
    engine: Path
    capacity: int | None
    profiles: tuple[Profile, ...]
    capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    timing_cache: Path | None = None

    def as_json(self) -> str:
        """For the child."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> Job:
        """What the parent wrote."""
        entries = json.loads(text)
        for name in ("onnx", "engine", "timing_cache"):
            entries[name] = Path(entries[name]) if entries[name] else None
        entries["profiles"] = tuple(
            {name: tuple(map(tuple, shapes)) for name, shapes in profile.items()} for profile in entries["profiles"]
        )
        return Job(**entries | {"capabilities": tuple(entries["capabilities"])})


@dataclass(frozen=True)
class Report:
    """What a build gave: the engine file's hash and size, flags that were set, time, and peak memory of the process.

    `peak_device_bytes` is the most GPU memory in use above what was used before, or None without a GPU. On a Jetson,
    GPU memory is main memory: the two peaks add up.
    """

    sha256: str
    size: int
    flags: tuple[str, ...]
    warnings: tuple[str, ...]
    build_s: float
    peak_host_bytes: int
    peak_device_bytes: int | None


class DeviceMeter:
    """The most GPU memory in use while the block runs, seen at intervals."""

    def __init__(self, library: Library, interval_s: float = 0.05) -> None:
        self._cuda, self._interval_s = library.cuda, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = self._most = 0

    def __enter__(self) -> DeviceMeter:
        if self._cuda is not None:
            self._before = self._most = self._used()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._cuda is not None:
            self._thread.join()

    @property
    def peak_bytes(self) -> int | None:
        """Above what was in use before; None without a GPU."""
        return None if self._cuda is None else self._most - self._before

    def _used(self) -> int:
        free, total = self._cuda.call("cudaMemGetInfo")
        return total - free

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._most = max(self._most, self._used())


def compile_here(library: Library, job: Job, on_progress: OnProgress) -> Report:
    """Builds in this process and writes the engine file, whole or not at all. Peak memory is the process's so far."""
    settings = Settings(job.capabilities, job.workspace_bytes, job.timing_cache)
    started = time.perf_counter()
    with DeviceMeter(library) as meter:
        built = compile_graph(
            library, job.onnx, EnginePlan(job.graph, job.capacity, job.profiles), settings, on_progress
        )
    digest, view = sha256(), memoryview(built.blob).cast("B")
    partial = _partial(job)
    try:
        with partial.open("wb") as file:
            for start in range(0, len(view), WRITE_BYTES):
                part = view[start : start + WRITE_BYTES]
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(job.engine)
    finally:
        partial.unlink(missing_ok=True)
    return Report(
        sha256=digest.hexdigest(),
        size=len(view),
        flags=built.flags,
        warnings=built.warnings,
        build_s=time.perf_counter() - started,
        peak_host_bytes=_peak_host_bytes(),
        peak_device_bytes=meter.peak_bytes,
    )


def _peak_host_bytes() -> int:
    """Most memory that this process ever had resident. Not ru_maxrss, which a child inherits from its parent on
    Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def compile_in_process(job: Job, on_progress: OnProgress) -> Report:
    """Builds in a child process.

    Raises:
        BackendError: what the child says, or that it was killed.
    """
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            child.stdin.write(job.as_json())
            child.stdin.close()
            answer = _listen(child, on_progress)
            status = child.wait()
        except BaseException:
            child.kill()
            raise
        finally:
            _partial(job).unlink(missing_ok=True)  # of a child that was killed
    if "report" in answer:
        entries = answer["report"]
        return Report(**{**entries, "flags": tuple(entries["flags"]), "warnings": tuple(entries["warnings"])})
    if "error" in answer:
        raise BackendError(**answer["error"])
    raise _death(job, status)


def _partial(job: Job) -> Path:
    """Where an engine is written before it is whole."""
    return job.engine.with_name(f".{job.engine.name}.partial")


def _listen(child: subprocess.Popen, on_progress: OnProgress) -> dict[str, Any]:
    """Passes progress on; returns the child's last word, or nothing if it died."""
    for line in child.stdout:
        try:
            message: Mapping[str, Any] = json.loads(line)
        except ValueError:  # a library printed something
            print(line, end="", file=sys.stderr)
            continue
        if "progress" not in message:
            return dict(message)
        on_progress(*message["progress"])
    return {}


def _death(job: Job, status: int) -> BackendError:
    if status == -signal.SIGKILL:
        return BackendError(
            f"the build of {job.graph} was killed, most likely because memory ran out",
            expected="about three times the segment's weights in free memory",
            fix="stop other programs, add swap, or export again with finer segments (--build-memory GiB)",
        )
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return BackendError(
        f"the build of {job.graph} died ({name})", fix="run it again with --debug; `lightkv lint` may say why"
    )


def main() -> int:
    """The child: a job on standard input, JSON lines on standard output."""
    # What libraries print on standard output, from C too, goes to standard error: our lines stay clean.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job.from_json(sys.stdin.read())
    last = 0.0

    def on_progress(phase: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1:
            last = time.monotonic()
            print(json.dumps({"progress": [phase, done, total]}), file=out)

    try:
        library = Library(import_library(job.library), job.library)
        if not library.builds_ahead:
            library = replace(library, cuda=open_cuda())
        print(json.dumps({"report": asdict(compile_here(library, job, on_progress))}), file=out)
    except BackendError as error:
        print(json.dumps({"error": {"found": error.found, "expected": error.expected, "fix": error.fix}}), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
