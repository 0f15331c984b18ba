"""A bundle on disk: written whole or not at all, opened with verification. Standard library only.

`open_bundle(path)` checks the manifest, every size and (unless told otherwise) every hash. `BundleWriter(out)` builds
the bundle in a temporary sibling directory `.NAME.partial-PID` and renames it at the end, so that no other program ever
sees half a bundle; what an interrupted export had finished can be taken over, see `resume`. The manifest's dataclasses
live in `manifest` and are re-exported here.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lightkv_export.digests import Digests, digest_file
from lightkv_export.errors import BundleError, UserError
from lightkv_export.filesystem import disk_error, exchange, free_bytes, size_text, sync, tree_bytes
from lightkv_export.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Embedding,
    FileEntry,
    Graph,
    Keep,
    KeepPlan,
    KeepStage,
    Manifest,
    Preprocess,
    Size,
    Tensor,
    check_path,
)
from lightkv_export.manifest_json import manifest_from_text, manifest_text
from lightkv_export.resume import JOURNAL_NAME, Journal, clear_leftovers

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Bundle",
    "BundleWriter",
    "Embedding",
    "FileEntry",
    "Graph",
    "Keep",
    "KeepPlan",
    "KeepStage",
    "Manifest",
    "OnProgress",
    "Preprocess",
    "Size",
    "Tensor",
    "open_bundle",
]

OnProgress = Callable[[str, int, int], None]
"""Called as (file name, bytes done, bytes in all) over the whole bundle while files are hashed."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and its manifest."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of a file of the bundle."""
        return self.path / name


def open_bundle(path: str | os.PathLike[str], *, verify: bool = True, on_progress: OnProgress | None = None) -> Bundle:
    """Open the bundle at `path`; sizes are always checked, hashes when `verify`.

    Files that the manifest does not name are left alone (a report, an engine built later).

    Raises:
        BundleError: not a bundle, another format version, or a file is missing, truncated or altered.
    """
    root = Path(path)
    manifest = manifest_from_text(_manifest_file_text(root))
    again = "export the bundle again, or copy it again from where it was whole"
    for name, entry in manifest.files.items():
        file = root / name
        if not file.is_file():
            raise BundleError(f"{root}: file {name!r} is missing", expected=f"{entry.size} bytes", fix=again)
        size = file.stat().st_size
        if size != entry.size:
            what = "truncated" if size < entry.size else "altered (longer than it was)"
            raise BundleError(f"{root}: {name!r} is {what}: {size} bytes", expected=f"{entry.size} bytes", fix=again)
    if verify:
        for name, digest in _digests(root, {n: e.size for n, e in manifest.files.items()}, on_progress):
            if digest != manifest.files[name].sha256:
                raise BundleError(
                    f"{root}: file {name!r} is altered: sha256 {digest}",
                    expected=f"sha256 {manifest.files[name].sha256}",
                    fix=again,
                )
    return Bundle(root, manifest)


class BundleWriter:
    """Context manager that writes a bundle whole or not at all.

    Put files under `path`, then call `finish`. Leaving the block by any exception removes the temporary directory; a
    killed export's directory is removed by the next export to the same place. With a journal (`resume`), finished parts
    stay if an interruption or a full disk ends the block.

    Args:
        out: directory to create; parents are made as needed.
        overwrite: replace a bundle (or an empty directory) that stands there. Anything else is never replaced.
        fresh: take nothing over from an interrupted export.

    Raises:
        UserError: `out` exists, cannot be created, or the disk runs full.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        overwrite: bool = False,
        *,
        fresh: bool = False,
    ) -> None:
        self.out = Path(out).resolve()
        self.overwrite, self.fresh = overwrite, fresh
        self._expected_bytes: int | None = None
        self.path = self.out.with_name(f".{self.out.name}.partial-{os.getpid()}")
        self._made_parents: list[Path] = []
        self._leftovers: list[Path] = []
        self._journal: Journal | None = None
        self._finished = False

    def __enter__(self) -> BundleWriter:
        self._leftovers = clear_leftovers(self.out, _ACTIVE, journals=self.fresh)
        self._check_out()
        try:
            for parent in reversed([p for p in self.out.parents if not p.exists()]):
                parent.mkdir()
                self._made_parents.append(parent)
            self.path.mkdir()
            _ACTIVE.add(self.path)
        except BaseException as error:
            self._remove_parents()
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"cannot create {self.path}: {error.strerror}", fix="choose another --out, or mend its permissions"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            return
        reason = disk_error(error)
        written, free = (tree_bytes(self.path), free_bytes(self.out.parent)) if reason else (0, 0)
        kept = ""
        if self._journal and self._journal.parts and (reason or isinstance(error, KeyboardInterrupt)):
            kept = self._keep_finished(self._journal)
        else:
            self._discard()
        if reason:
            needed = self._expected_bytes or written
            raise UserError(
                f"cannot write the bundle {self.out}: {reason} ({size_text(free)} free, {size_text(written)} written)",
                expected=f"room for {'about' if self._expected_bytes else 'more than'} {size_text(needed)}",
                fix=f"free some space or choose another --out; {kept or 'nothing was left behind'}",
            ) from error
        if kept:
            raise KeyboardInterrupt(f"interrupted; {kept}") from error
        if error is None:
            raise RuntimeError("BundleWriter: the block ended without finish(); the bundle was discarded")

    def require_space(self, expected_bytes: int) -> None:
        """Raises UserError unless about `expected_bytes` can still be written; a full disk is then told with them."""
        self._expected_bytes, free = expected_bytes, free_bytes(self.out.parent)
        if expected_bytes > free:
            raise UserError(
                f"not enough space in {self.out.parent}: {size_text(free)} free",
                expected=f"about {size_text(expected_bytes)} for the bundle",
                fix="free some space or choose another --out",
            )

    def resume(self, fingerprint: str, digests: Digests) -> Journal:
        """The journal of finished parts; what an interrupted export with this `fingerprint` left is in it already."""
        self._journal = Journal(self.path, fingerprint, digests, self._leftovers)
        return self._journal

    def finish(
        self, manifest: Manifest, on_progress: OnProgress | None = None, digests: Digests | None = None
    ) -> Bundle:
        """Hash and sync every file, write the manifest, and move the bundle into place.

        Args:
            manifest: `files` is filled in here.
            on_progress: see `OnProgress`.
            digests: what is being hashed already.

        Raises:
            BundleError: the manifest contradicts itself or the files.
            UserError: `out` appeared meanwhile.
        """
        sizes = _tree_sizes(self.path)
        sizes.pop(JOURNAL_NAME, None)
        with digests or Digests() as known:
            found = _digests(self.path, sizes, on_progress, known)
            files = {name: FileEntry(digest, sizes[name]) for name, digest in found}
        complete = dataclasses.replace(manifest, files=files)
        target = self.path / MANIFEST_NAME
        target.write_text(manifest_text(complete), encoding="utf-8")
        (self.path / JOURNAL_NAME).unlink(missing_ok=True)
        for path in (target, *(Path(folder) for folder, _, _ in os.walk(self.path))):
            sync(path)
        self._move_into_place()
        self._finished = True
        _ACTIVE.discard(self.path)
        return Bundle(self.out, complete)

    def _check_out(self) -> None:
        if not self.out.exists():
            return
        if not self.overwrite:
            raise UserError(f"{self.out} exists already", fix="choose another --out, or replace it with --overwrite")
        is_bundle = (self.out / MANIFEST_NAME).is_file()
        if not self.out.is_dir() or (not is_bundle and any(self.out.iterdir())):
            raise UserError(
                f"{self.out} is not a bundle, so it is not overwritten",
                expected=f"a directory with {MANIFEST_NAME}, or an empty or new one",
                fix="choose another --out",
            )

    def _move_into_place(self) -> None:
        self._check_out()
        if self.out.exists() and exchange(self.path, self.out):
            shutil.rmtree(self.path)
        else:
            aside = self.out.with_name(f".{self.out.name}.replaced-{os.getpid()}")
            if self.out.exists():
                self.out.rename(aside)
            try:
                self.path.rename(self.out)
            except BaseException:
                if aside.exists():
                    aside.rename(self.out)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        sync(self.out.parent)

    def _keep_finished(self, journal: Journal) -> str:
        """Removes what is half done; returns where the rest stays, for the user."""
        finished = {file.path for part in journal.parts.values() for file in part.files} | {JOURNAL_NAME}
        for name in _tree_sizes(self.path).keys() - finished:
            (self.path / name).unlink()
        _ACTIVE.discard(self.path)
        parts, size = len(journal.parts), size_text(journal.num_bytes)
        return f"{parts} finished parts ({size}) stay in {self.path}: the same command goes on from there"

    def _discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        _ACTIVE.discard(self.path)
        self._remove_parents()

    def _remove_parents(self) -> None:
        for parent in reversed(self._made_parents):
            if not any(parent.iterdir()):
                parent.rmdir()


_ACTIVE: set[Path] = set()
"""Temporary directories in use by this process. Containers reuse process ids: a leftover may carry our own."""


def _manifest_file_text(root: Path) -> str:
    make = "make one with: lightkv-export MODEL --keep 0.55 --out DIR"
    if not root.exists():
        raise BundleError(f"{root} does not exist", expected="the directory of a bundle", fix=make)
    if not (root / MANIFEST_NAME).is_file():
        raise BundleError(f"{root} is not a bundle", expected=f"a directory with {MANIFEST_NAME}", fix=make)
    try:
        return (root / MANIFEST_NAME).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{root / MANIFEST_NAME} is not UTF-8 text: {error}", fix=make) from error


def _tree_sizes(root: Path) -> dict[str, int]:
    """Relative path -> bytes of every file under `root`, sorted.

    Raises:
        BundleError: something there is not a plain file (a link would break when the bundle is moved).
    """
    sizes = {}
    for folder, folders, files in os.walk(root):
        links = [name for name in folders if Path(folder, name).is_symlink()]  # os.walk does not enter them
        for name in (*files, *links):
            path = Path(folder, name)
            status = path.lstat()
            relative = check_path(path.relative_to(root).as_posix())
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{relative!r} in the new bundle is not a plain file", expected="a file or hard link")
            sizes[relative] = status.st_size
    return dict(sorted(sizes.items()))


def _digests(
    root: Path, sizes: dict[str, int], on_progress: OnProgress | None, known: Digests | None = None
) -> Iterator[tuple[str, str]]:
    """(name, sha256) of each file. With `known`, digests that may be there, every file is on the disk by then."""
    total, done = sum(sizes.values()), 0
    for name, size in sizes.items():

        def on_bytes(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            if on_progress:
                on_progress(name, done, total)

        digest = known.known(root / name) if known else None
        if digest is None:
            digest = digest_file(root / name, on_bytes=on_bytes, to_disk=known is not None)
        else:
            on_bytes(size)
        yield name, digest
