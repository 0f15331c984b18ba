"""sha256 of large files, read ahead by a thread, and worked out in the background while something else runs.

Hashing and reading release the interpreter's lock, so a second processor core does this for nothing. Standard library
only.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

BLOCK_BYTES = 8 << 20


class StoppedError(Exception):
    """The digest is not wanted any more."""


@dataclass(frozen=True)
class Stamp:
    """What tells a file's content from another one's without reading it; hard links of a file have one stamp."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        status = path.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def digest_file(path: Path, *, on_bytes: Callable[[int], None] = lambda count: None, to_disk: bool = False) -> str:
    """sha256 of a file, as hexadecimal digits. The next block is read while one is hashed.

    Args:
        path: the file.
        on_bytes: called with the number of bytes after every block; what it raises ends the work.
        to_disk: whether the file is to be on the disk before its digest is given.
    """
    digest = hashlib.sha256()
    blocks = [bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)]
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as reader:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        ahead = reader.submit(file.readinto, blocks[0])
        while count := ahead.result():
            block = blocks[0]
            blocks.reverse()
            ahead = reader.submit(file.readinto, blocks[0])
            digest.update(memoryview(block)[:count])
            on_bytes(count)
        if to_disk:
            os.fsync(file.fileno())
    return digest.hexdigest()


class Digests:
    """Digests by file, each worked out once, one after the other in the background. A context manager: leaving it stops
    what is unfinished."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="digests")
        self._made: dict[Stamp, Future[str]] = {}
        self._stop = threading.Event()

    def __enter__(self) -> Digests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def start(self, path: Path, then: Callable[[str], None] | None = None) -> None:
        """Works out the digest of `path` in the background; `then` is called with it, maybe in another thread."""
        stamp = Stamp.of(path)
        if stamp not in self._made:
            self._made[stamp] = self._pool.submit(digest_file, path, on_bytes=self._check, to_disk=True)
        if then is not None:
            self._made[stamp].add_done_callback(lambda made: self._done(made) and then(made.result()))

    def learn(self, path: Path, digest: str) -> None:
        """`path` has this digest, as somebody worked out before."""
        made: Future[str] = Future()
        made.set_result(digest)
        self._made[Stamp.of(path)] = made

    def known(self, path: Path) -> str | None:
        """The digest if it was begun or learnt (waits for its end); None for other files, or if the file changed."""
        made = self._made.get(Stamp.of(path))
        return None if made is None else made.result()

    def _check(self, _count: int) -> None:
        if self._stop.is_set():
            raise StoppedError

    @staticmethod
    def _done(made: Future[str]) -> bool:
        return not made.cancelled() and made.exception() is None
