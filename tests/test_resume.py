"""An export that was stopped goes on from where it was, and gives the same bundle as one that was not."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from conftest import MODELS, Exports

from lightkv_export.bundle import open_bundle
from lightkv_export.digests import Digests, Stamp, digest_file
from lightkv_export.errors import StepError
from lightkv_export.pipeline import ExportRequest, export_bundle
from lightkv_export.recipe import StageSpec
from lightkv_export.resume import JOURNAL_NAME, Journal
from lightkv_export.steps import NOTE
from lightkv_export.weights import WeightFiles

PARTS = ["vision", "segment_0", "segment_1"]
KILL_AFTER = """
from lightkv_export import resume
def add(self, name, *arguments, real=resume.Journal.add):
    real(self, name, *arguments)
    if name == "segment_0.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
resume.Journal.add = add
"""


def program(out: Path, model: Path, code: str = "") -> subprocess.CompletedProcess:
    """`lightkv-export` in a process of its own, after `code`."""
    start = "from lightkv_export.cli import export_main\nsys.exit(export_main(sys.argv[1:]))"
    words = [sys.executable, "-c", f"import sys, os, signal\n{code}\n{start}", str(model), "--out", str(out)]
    options = ["--stage", *MODELS["one key"].stages, "--dtype", "fp16"]
    return subprocess.run([*words, *options], capture_output=True, text=True, timeout=200)


def export(out: Path, model: Path, **options: Any) -> list[str]:
    """The same in this process; returns the names of the steps."""
    stages = tuple(StageSpec.parse(text) for text in MODELS["one key"].stages)
    seen: list[str] = []
    request = ExportRequest(str(model), out, stages=stages, **{"dtype": "fp16", **options})
    export_bundle(request, lambda name, done, total: seen.append(name))
    return seen


def stopped(out: Path, model: Path, part: str, **options: Any) -> Path:
    """Interrupts an export right after `part`; returns the directory that stays."""

    def add(self: Journal, name: str, *arguments: Any, real=Journal.add) -> None:
        real(self, name, *arguments)
        if name == part:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match="goes on from there"):
        patch.setattr(Journal, "add", add)
        export(out, model, **options)
    (left,) = out.parent.glob(f".{out.name}.partial-*")
    return left


def hashes(bundle: Path) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in open_bundle(bundle).manifest.files.items()}


@pytest.fixture(scope="module")
def model(exports: Exports) -> Path:
    return exports.model("one key")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of an export that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "bundle"
    assert "trace vision" in export(out, model)
    return hashes(out)


@pytest.mark.slow
def test_a_killed_program_goes_on(model, whole, tmp_path):
    out = tmp_path / "bundle"
    done = program(out, model, KILL_AFTER)
    assert done.returncode == -9, done.stderr
    (left,) = tmp_path.iterdir()
    files = [path for path in left.rglob("*") if path.suffix in (".onnx", ".safetensors")]
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}
    assert {"segment_1.onnx", "segment_0.safetensors"} <= before.keys()
    done = program(out, model)
    assert done.returncode == 0 and "note: taken over from an interrupted export: vision" in done.stderr
    assert not any(line.startswith(("trace ", "lower")) for line in done.stderr.splitlines())
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")}
    assert before.items() <= after.items() and "segment_1.safetensors" in after.keys() - before.keys()
    assert hashes(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] and not (out / JOURNAL_NAME).exists()


def test_an_export_that_is_stopped_twice_makes_no_part_twice(model, whole, tmp_path):
    out = tmp_path / "bundle"
    left = stopped(out, model, "segment_0")
    assert {path.name for path in left.rglob("*") if path.is_file()} == {JOURNAL_NAME, "vision.onnx", "segment_0.onnx"}
    stopped(out, model, "segment_1")
    seen = export(out, model)
    assert not any(f"trace {name}" in seen for name in PARTS)
    assert hashes(out) == whole and [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_linked_weights_are_linked_again(model, tmp_path):
    out, source = tmp_path / "bundle", Path(shutil.copytree(model, tmp_path / "model"))
    linked = {"dtype": "fp32", "link_weights": True}
    stopped(out, source, "checkpoint_0.safetensors", **linked)
    assert "trace segment_0" not in export(out, source, **linked)
    (file,) = (out / "onnx" / "weights").iterdir()
    assert file.stat().st_ino == (source / "model.safetensors").stat().st_ino
    open_bundle(out)


@pytest.mark.parametrize("change", ["fresh", "another checkpoint"])
def test_another_export_starts_anew(model, tmp_path, change):
    out, source = tmp_path / "bundle", Path(shutil.copytree(model, tmp_path / "model"))
    stopped(out, source, "vision")
    if change == "another checkpoint":
        os.utime(source / "model.safetensors")
    seen = export(out, source, fresh=change == "fresh")
    assert "trace vision" in seen and not any(name.startswith(NOTE) for name in seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "model"]


def test_a_damaged_part_is_made_again(model, whole, tmp_path):
    out = tmp_path / "bundle"
    graph = stopped(out, model, "segment_1") / "onnx" / "segment_0.onnx"
    alter(graph)
    seen = export(out, model)
    assert [f"trace {name}" in seen for name in PARTS] == [False, True, False]
    assert hashes(out) == whole


def alter(path: Path) -> None:
    """Another last byte; size and time stay."""
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_broken_step_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(WeightFiles, "write", lambda *arguments: 1 / 0)
    with pytest.raises(StepError, match=r"weights \(after resolve .*trace .*lower .*ZeroDivisionError"):
        export(tmp_path / "bundle", model)
    assert not list(tmp_path.iterdir())


def test_digests(tmp_path):
    content = os.urandom(20 << 20)
    for name, data in (("large", content), ("empty", b""), ("small", b"x")):
        (tmp_path / name).write_bytes(data)
        assert digest_file(tmp_path / name) == hashlib.sha256(data).hexdigest()
    with Digests() as digests:
        os.link(tmp_path / "large", tmp_path / "link")
        found: list[str] = []
        digests.start(tmp_path / "large", found.append)
        assert digests.known(tmp_path / "link") == hashlib.sha256(content).hexdigest() == found[0]
        assert digests.known(tmp_path / "small") is None
        before = Stamp.of(tmp_path / "large")
        (tmp_path / "large").write_bytes(b"changed")
        assert Stamp.of(tmp_path / "large") != before and digests.known(tmp_path / "large") is None


def cut_journal(root: Path) -> None:
    lines = [line for line in (root / JOURNAL_NAME).read_text().splitlines() if '"b"' not in line]
    (root / JOURNAL_NAME).write_text("\n".join(lines) + '\n{"name": "b", "fil')


DEFECTS = {
    "altered": lambda root: alter(root / "b"),
    "longer": lambda root: (root / "b").write_text("longer"),
    "written again": lambda root: os.utime(root / "b", ns=(1, 1)),
    "missing": lambda root: (root / "b").unlink(),
    "not in the journal": cut_journal,
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_parts_are_taken_over_only_as_they_were(tmp_path, defect):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    with Digests() as digests:
        journal = Journal(old, "same", digests)
        for name in "abc":
            (old / name).write_text(name)
            journal.add(name, [old / name], {"is": name})
        digests.known(old / "c")
    DEFECTS[defect](old)
    with Digests() as digests:
        journal = Journal(new, "same", digests, [old])
        assert sorted(journal.parts) == ["a", "c"] and journal.facts("a") == {"is": "a"} and journal.num_bytes == 2
        assert journal.facts("b") is None
    assert sorted(path.name for path in new.iterdir()) == [JOURNAL_NAME, "a", "c"] and not old.exists()


def test_another_fingerprint_takes_nothing_over(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    with Digests() as digests:
        (old / "a").write_text("a")
        Journal(old, "one", digests).add("a", [old / "a"])
        assert not Journal(new, "another", digests, [old]).parts
    assert [path.name for path in new.iterdir()] == [JOURNAL_NAME] and not old.exists()
