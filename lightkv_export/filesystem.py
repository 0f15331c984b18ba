"""Small file system helpers behind the bundle writer. Standard library only."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100  # linux/fcntl.h


def exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one atomic step; False where the system or the file system cannot (renameat2(2))."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def is_running(pid: int) -> bool:
    """Whether a process with this id exists (POSIX)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, under another user
        return True
    return True


def sync(path: Path) -> None:
    """Make a file, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: BaseException | None) -> str:
    """The reason, if a full disk (or quota, or file size limit) is behind `error`; else "".

    Libraries written in Rust or C++ report it as text alone, so the words are looked for as well.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return os.strerror(error.errno)
        if os.strerror(errno.ENOSPC) in str(error):
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return ""


def tree_bytes(root: Path) -> int:
    """Bytes of all files under `root`."""
    return sum(Path(folder, name).lstat().st_size for folder, _, names in os.walk(root) for name in names)


def free_bytes(folder: Path) -> int:
    """Bytes that are still free where `folder` lies."""
    return shutil.disk_usage(folder).free


def size_text(num_bytes: int) -> str:
    """A size for people, in MiB."""
    return f"{num_bytes / 2**20:,.1f} MiB"
