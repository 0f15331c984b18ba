"""Resuming: what an interrupted export had finished is taken over by the next one that would make the same.

A bundle in the making has a journal: one line of JSON for what the export is made from (its fingerprint), then one for
every finished part: its files with size, time and sha256, and what later steps must know about it. A part is taken over
if its files are as they were noted down; small files are hashed again. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightkv_export.digests import Digests, digest_file
from lightkv_export.filesystem import is_running

JOURNAL_NAME = ".journal.jsonl"
HASHED_AGAIN_BYTES = 64 << 20  # graphs; of a weight file, size and time must do


@dataclass(frozen=True)
class Finished:
    """A file of a part: `path` relative to the bundle; `sha256` is "" until it is known."""

    path: str
    size: int
    mtime_ns: int
    sha256: str = ""

    @classmethod
    def of(cls, root: Path, path: str, sha256: str = "") -> Finished:
        status = (root / path).stat()
        return cls(path, status.st_size, status.st_mtime_ns, sha256)

    def is_unchanged(self, root: Path) -> bool:
        """Whether the file under `root` is still as it was."""
        file = root / self.path
        if not file.is_file() or replace(Finished.of(root, self.path), sha256=self.sha256) != self:
            return False
        small = self.size <= HASHED_AGAIN_BYTES and self.sha256
        return not small or digest_file(file) == self.sha256


@dataclass(frozen=True)
class Part:
    """A finished part of an export. `facts` is JSON."""

    name: str
    files: tuple[Finished, ...]
    facts: Any


def fingerprint_of(sources: Mapping[str, Any]) -> str:
    """One word for everything that decides what an export writes; `sources` is JSON, other values count as text."""
    text = json.dumps(sources, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoint_stamps(directory: Path) -> dict[str, tuple[int, int]]:
    """File name -> (bytes, time of change) of everything in a checkpoint's directory."""
    files = {path.name: path.stat() for path in sorted(directory.iterdir()) if path.is_file()}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in files.items()}


class Journal:
    """Notes down what is finished under `root`, and takes over what `leftovers` hold of the same export.

    Args:
        root: the bundle in the making.
        fingerprint: of this export.
        digests: works out the sha256 of finished files, and learns those that were known.
        leftovers: directories that interrupted exports left, with their journals; they are removed.
    """

    def __init__(self, root: Path, fingerprint: str, digests: Digests, leftovers: Sequence[Path] = ()) -> None:
        self.root, self.digests = root, digests
        self.parts: dict[str, Part] = {}
        self._lock = threading.Lock()
        self._write({"fingerprint": fingerprint})
        for leftover in leftovers:
            for part in _parts(leftover, fingerprint):
                if part.name not in self.parts:
                    self._take_over(leftover, part)
            shutil.rmtree(leftover, ignore_errors=True)

    @property
    def num_bytes(self) -> int:
        """Of all finished files."""
        return sum(file.size for part in self.parts.values() for file in part.files)

    def facts(self, name: str) -> Any:
        """What was noted down about a finished part; None if it is not finished."""
        return self.parts[name].facts if name in self.parts else None

    def add(self, name: str, files: Sequence[Path], facts: Any = True) -> None:
        """Notes down that the part `name` is finished; hashes its files in the background."""
        paths = [file.relative_to(self.root).as_posix() for file in files]
        self._set(Part(name, tuple(Finished.of(self.root, path) for path in paths), facts))
        self._hash(self.parts[name])

    def _hash(self, part: Part) -> None:
        for file in part.files:
            if not file.sha256:
                note = partial(self._note_digest, part.name, file.path)
                self.digests.start(self.root / file.path, note)

    def _note_digest(self, name: str, path: str, sha256: str) -> None:
        with self._lock:
            part = self.parts[name]
            files = tuple(replace(file, sha256=sha256) if file.path == path else file for file in part.files)
            self._set_locked(replace(part, files=files))

    def _take_over(self, leftover: Path, part: Part) -> None:
        for file in part.files:
            target = self.root / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            (leftover / file.path).rename(target)
            if file.sha256:
                self.digests.learn(target, file.sha256)
        self._set(part)
        self._hash(part)

    def _set(self, part: Part) -> None:
        with self._lock:
            self._set_locked(part)

    def _set_locked(self, part: Part) -> None:
        self.parts[part.name] = part
        files = [[file.path, file.size, file.mtime_ns, file.sha256] for file in part.files]
        self._write({"name": part.name, "files": files, "facts": part.facts})

    def _write(self, entry: dict[str, Any]) -> None:
        if self.root.is_dir():  # a digest may come in after the bundle was moved into place
            with (self.root / JOURNAL_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def clear_leftovers(out: Path, active: Collection[Path], *, journals: bool) -> list[Path]:
    """Clears what a killed export to `out` left; a bundle that it had moved aside comes back.

    Args:
        out: the bundle to be made.
        active: work directories of this process. Containers reuse process ids: a leftover may carry our own.
        journals: whether directories with a journal are removed, too; else they are returned.
    """
    pattern = re.compile(re.escape(f".{out.name}.") + r"(partial|replaced)-(\d+)(-old)?")
    kept = []
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match is None or path in active or (int(match[2]) != os.getpid() and is_running(int(match[2]))):
            continue
        if match[1] == "replaced" and not out.exists():
            path.rename(out)
        elif (path / JOURNAL_NAME).is_file() and not journals:
            kept.append(_apart(path) if int(match[2]) == os.getpid() else path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return kept


def _apart(path: Path) -> Path:
    """A leftover that carries our own process id, under a name that the new work directory does not need."""
    if path.name.endswith("-old"):
        return path
    other = path.with_name(f"{path.name}-old")
    shutil.rmtree(other, ignore_errors=True)
    return path.rename(other)


def _parts(root: Path, fingerprint: str) -> list[Part]:
    """The parts of `root`'s journal whose files are unchanged; none if it is the journal of another export."""
    entries = []
    for line in (root / JOURNAL_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # the last line may be cut off
            break
    if not entries or entries[0] != {"fingerprint": fingerprint}:
        return []
    parts = {  # a later line about a part replaces the earlier one
        entry["name"]: Part(entry["name"], tuple(Finished(*file) for file in entry["files"]), entry["facts"])
        for entry in entries[1:]
    }
    return [part for part in parts.values() if all(file.is_unchanged(root) for file in part.files)]
