"""Bundles: written whole or not at all, opened with verification, and every way to break one is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bundle_factory import FILES, WEIGHTS, small_bundle, small_manifest, write_files

from lightkv_export import bundle as bundle_module
from lightkv_export.bundle import MANIFEST_NAME, BundleWriter, open_bundle
from lightkv_export.errors import BundleError, UserError

TESTS = Path(__file__).parent


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --- opening ------------------------------------------------------------------------------------------------------


def test_open_what_was_written(tmp_path):
    written = small_bundle(tmp_path / "b", report={})
    opened = open_bundle(tmp_path / "b")
    assert opened == written
    assert set(opened.manifest.files) == set(FILES)
    assert opened.file("onnx/vision.onnx").read_bytes() == FILES["onnx/vision.onnx"]
    assert opened.manifest.graph_named("vision").role == "vision"
    with pytest.raises(BundleError, match="no graph named 'x'"):
        opened.manifest.graph_named("x")


def test_damaged_files_are_named(tmp_path):
    root = small_bundle(tmp_path / "b").path
    file = root / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=rf"'{WEIGHTS}' is truncated: 1023 bytes\n.*1024"):
        open_bundle(root, verify=False)
    file.write_bytes(whole + b"x")
    with pytest.raises(BundleError, match="longer"):
        open_bundle(root, verify=False)
    file.write_bytes(b"x" + whole[1:])
    assert open_bundle(root, verify=False)
    with pytest.raises(BundleError, match=rf"'{WEIGHTS}' is altered: sha256"):
        open_bundle(root)
    file.unlink()
    with pytest.raises(BundleError, match="is missing"):
        open_bundle(root, verify=False)


def test_not_a_bundle(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path / "file")


def test_progress_covers_every_byte(tmp_path):
    seen = []
    with BundleWriter(tmp_path / "b") as writer:
        write_files(writer.path)
        writer.finish(small_manifest(), lambda *call: seen.append(call))
    total = sum(map(len, FILES.values()))
    assert {name for name, _, _ in seen} == set(FILES)
    assert seen[-1][1:] == (total, total)
    opened = []
    open_bundle(tmp_path / "b", on_progress=lambda *call: opened.append(call))
    assert opened == seen


# --- writing ------------------------------------------------------------------------------------------------------


def test_unicode_paths_and_hard_links(tmp_path):
    shared = tmp_path / "checkpoint.safetensors"
    shared.write_bytes(b"weights")
    with BundleWriter(tmp_path / "größe 画像") as writer:
        write_files(writer.path, {**FILES, "daten/größe 画像.bin": b"1"})
        os.link(shared, writer.path / "onnx/weights/linked.safetensors")
        writer.finish(small_manifest())
    linked = open_bundle(tmp_path / "größe 画像").file("onnx/weights/linked.safetensors")
    assert linked.stat().st_ino == shared.stat().st_ino


def test_soft_links_are_refused(tmp_path):
    for target in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="not a plain file"), BundleWriter(tmp_path / "b") as writer:
            write_files(writer.path)
            (writer.path / "link").symlink_to(target)
            writer.finish(small_manifest())
    assert _names(tmp_path) == []


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    small_bundle(tmp_path / "b")
    before = (tmp_path / "b" / MANIFEST_NAME).read_bytes()
    with pytest.raises(UserError, match="exists already"), BundleWriter(tmp_path / "b"):
        pytest.fail("the block must not be entered")
    assert (tmp_path / "b" / MANIFEST_NAME).read_bytes() == before
    assert _names(tmp_path) == ["b"]


@pytest.mark.parametrize("swap", [True, False], ids=["exchange", "two-renames"])
def test_overwrite(tmp_path, monkeypatch, swap):
    if not swap:  # as on a file system without renameat2
        monkeypatch.setattr(bundle_module, "exchange", lambda a, b: False)
    small_bundle(tmp_path / "b", name="old")
    with BundleWriter(tmp_path / "b", overwrite=True) as writer:
        write_files(writer.path)
        assert open_bundle(tmp_path / "b").manifest.name == "old"
        writer.finish(small_manifest(name="new"))
    assert open_bundle(tmp_path / "b").manifest.name == "new"
    assert _names(tmp_path) == ["b"]


def test_a_failed_overwrite_keeps_the_old_bundle(tmp_path):
    small_bundle(tmp_path / "b", name="old")
    with pytest.raises(BundleError), BundleWriter(tmp_path / "b", overwrite=True) as writer:
        write_files(writer.path)
        writer.finish(small_manifest(rope="3d"))
    assert open_bundle(tmp_path / "b").manifest.name == "old"
    assert _names(tmp_path) == ["b"]


def test_overwrite_spares_what_is_not_a_bundle(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="not a bundle"), BundleWriter(tmp_path / "home", overwrite=True):
        pytest.fail("the block must not be entered")
    with (
        pytest.raises(UserError, match="not a bundle"),
        BundleWriter(tmp_path / "home" / "thesis.txt", overwrite=True),
    ):
        pytest.fail("the block must not be entered")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "dear"


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(UserError, match="exists already"), BundleWriter(tmp_path / "b") as writer:
        write_files(writer.path)
        small_bundle_elsewhere = small_bundle(tmp_path / "other").path
        small_bundle_elsewhere.rename(tmp_path / "b")
        writer.finish(small_manifest(name="late"))
    assert open_bundle(tmp_path / "b").manifest.name == "hand-made"
    assert _names(tmp_path) == ["b"]


@pytest.mark.parametrize("error", [ValueError("broken step"), KeyboardInterrupt(), SystemExit(3)])
def test_an_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), BundleWriter(tmp_path / "new" / "deep" / "b") as writer:
        write_files(writer.path)
        raise error
    assert _names(tmp_path) == []


def test_a_block_without_finish_is_a_mistake(tmp_path):
    with pytest.raises(RuntimeError, match="without finish"), BundleWriter(tmp_path / "b"):
        pass
    assert _names(tmp_path) == []


def test_leftovers_of_dead_exports_are_removed(tmp_path):
    dead, own, other = _dead_pid(), os.getpid(), os.getppid()
    for name in (
        f".b.partial-{dead}",
        f".b.partial-{own}",
        f".b.partial-{other}",
        f".c.partial-{dead}",
        ".b.partial-x",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    small_bundle(tmp_path / "b")
    assert _names(tmp_path) == sorted([f".b.partial-{other}", ".b.partial-x", f".c.partial-{dead}", "b"])


def test_a_bundle_moved_aside_by_a_killed_overwrite_comes_back(tmp_path):
    small_bundle(tmp_path / "b", name="old").path.rename(tmp_path / f".b.replaced-{_dead_pid()}")
    with pytest.raises(UserError, match="exists already"):
        small_bundle(tmp_path / "b")
    assert open_bundle(tmp_path / "b").manifest.name == "old"


def test_two_writers_in_one_process_do_not_share(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        with pytest.raises(UserError, match="cannot create"), BundleWriter(tmp_path / "b"):
            pytest.fail("the block must not be entered")
        write_files(writer.path)
        writer.finish(small_manifest())
    assert open_bundle(tmp_path / "b")


# --- full disks ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk(tmp_path):
    with pytest.raises(UserError) as caught, BundleWriter(tmp_path / "x" / "b") as writer:
        writer.require_space(3 << 20)
        write_files(writer.path)
        try:
            Path("/dev/full").write_bytes(b"x")
        except OSError as error:  # as a library would
            raise RuntimeError("could not save") from error
    message = str(caught.value)
    assert "No space left on device" in message
    assert "MiB free" in message
    assert "about 3.0 MiB" in message
    assert _names(tmp_path) == []


def test_a_full_disk_reported_by_a_library_as_text(tmp_path):
    with pytest.raises(UserError, match="No space left"), BundleWriter(tmp_path / "b"):
        raise RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")
    assert _names(tmp_path) == []


def test_a_disk_that_is_too_small_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="not enough space"), BundleWriter(tmp_path / "x" / "b") as writer:
        writer.require_space(1 << 60)
    assert _names(tmp_path) == []


def _run(code: str, *args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    )


def test_a_file_system_with_a_size_limit(tmp_path):
    process = _run(
        """
        import resource, signal, sys
        from bundle_factory import write_files
        from lightkv_export.bundle import BundleWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        with BundleWriter(sys.argv[1]) as writer:
            write_files(writer.path)
        """,
        str(tmp_path / "b"),
    )
    _, errors = process.communicate(timeout=60)
    assert "UserError" in errors
    assert "File too large" in errors
    assert _names(tmp_path) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_signal_during_an_export(tmp_path, name):
    process = _run(
        """
        import sys, time
        from bundle_factory import write_files
        from lightkv_export.bundle import BundleWriter
        from lightkv_export.cli import call_program

        def work():
            with BundleWriter(sys.argv[1]) as writer:
                write_files(writer.path)
                print("working", flush=True)
                time.sleep(60)

        sys.exit(call_program(work))
        """,
        str(tmp_path / "b"),
    )
    assert process.stdout.readline() == "working\n", process.stderr.read()
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    if name == "SIGKILL":
        assert _names(tmp_path) == [f".b.partial-{process.pid}"]
        small_bundle(tmp_path / "b")
        assert _names(tmp_path) == ["b"]
    else:
        assert process.returncode == 130
        assert errors.strip() == "interrupted; nothing was left half-written"
        assert _names(tmp_path) == []
