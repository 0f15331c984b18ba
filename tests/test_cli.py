"""The command line from outside: fresh processes, exit status, what is on which stream, and what is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bundle_factory import VISION_TOKENS, WEIGHTS, small_bundle
from toy_sizes import SizedToy

from lightkv_export import __version__
from lightkv_export.cli import COMMANDS, main
from lightkv_export.cli.program import EXTRAS, call_program
from lightkv_export.errors import UserError

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "numpy", "rich", "PIL", "tokenizers")


def _python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def _lightkv(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return _python("import sys; from lightkv_export.cli import main; sys.exit(main())", *args, **env)


def _modules_after(code: str) -> set[str]:
    result = _python(f"{code}\nimport sys; print('MODULES', *sys.modules)")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("MODULES ")[2].split())


# --- imports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["", ".bundle", ".recipe", ".schedule", ".errors", ".cli"])
def test_the_light_modules_load_the_standard_library_alone(module):
    before = _modules_after("pass")
    loaded = {name.partition(".")[0] for name in _modules_after(f"import lightkv_export{module}") - before}
    assert loaded - set(sys.stdlib_module_names) == {"lightkv_export"}


def test_help_lists_every_command_and_imports_nothing_heavy():
    modules = _modules_after("from lightkv_export.cli import main; assert main(['--help']) == 0")
    assert not modules & set(HEAVY)
    assert not {f"lightkv_export.cli.{command.name}" for command in COMMANDS} & modules
    text = _lightkv("--help").stdout
    assert all(f"{command.name} " in text for command in COMMANDS)


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_every_command_has_help_without_torch(name):
    modules = _modules_after(f"from lightkv_export.cli import main; assert main([{name!r}, '--help']) == 0")
    assert not modules & {"torch", "transformers", "onnxruntime", "onnx"}
    assert f"lightkv_export.cli.{name}" in modules


# --- how a run ends -----------------------------------------------------------------------------------------------


def test_version_and_bare_call():
    assert _lightkv("--version").stdout.strip().endswith(__version__)
    bare = _lightkv()
    assert bare.returncode == 2
    assert "inspect" in bare.stderr
    assert bare.stdout == ""


def test_lightkv_export_is_lightkv_export_under_its_own_name():
    code = "import sys; from lightkv_export.cli import export_main; sys.exit(export_main())"
    result = _python(code, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: lightkv-export ")
    assert "usage: lightkv export " not in result.stdout


def test_python_m_runs_the_program():
    result = subprocess.run(
        [sys.executable, "-m", "lightkv_export", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.strip().endswith(__version__)


@pytest.mark.parametrize(
    ("args", "messages"),
    [
        (["inspekt", "x"], ["no command 'inspekt'; did you mean 'inspect'?", "expected: one of: export, "]),
        (["inspect"], ["required: BUNDLE", "expected: lightkv inspect", "to do: see lightkv inspect --help"]),
        (["inspect", "x", "--verfy"], ["unknown option '--verfy'; did you mean '--verify'?"]),
        (["inspect", "x", "--ver"], ["unknown option '--ver'"]),
        (["inspect", "x", "y"], ["unknown argument 'y'"]),
        (["inspect", "/nowhere"], ["error: /nowhere does not exist", "  expected: ", "  to do: "]),
        (["--frobnicate"], ["required: COMMAND"]),
    ],
)
def test_a_mistake_gets_a_message_and_status_2(args, messages):
    result = _lightkv(*args)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    for message in messages:
        assert message in result.stderr


@pytest.mark.parametrize("args", [["inspect", "/nowhere", "--json"], ["inspect", "--json"]])
def test_json_errors_are_one_document(args):
    result = _lightkv(*args)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    error = json.loads(result.stdout)["error"]
    assert set(error) == {"found", "expected", "to_do"}
    assert error["found"] in result.stderr


@pytest.mark.parametrize(("args", "env"), [(["--debug"], {}), ([], {"LIGHTKV_DEBUG": "1"})])
def test_the_trace_is_shown_on_request(args, env):
    result = _lightkv("inspect", "/nowhere", *args, **env)
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            ZeroDivisionError("by zero"),
            70,
            "fault in lightkv_export: ZeroDivisionError: by zero\n  to do: please report",
        ),
        (UserError("bad", expected="good", fix="mend"), 2, "error: bad\n  expected: good\n  to do: mend\n"),
        (ModuleNotFoundError("no", name="torch.nn"), 2, 'pip install "lightkv-export[export]"'),
        (ModuleNotFoundError("no", name="tensorrt_rtx"), 2, 'pip install "lightkv-export[trt]"'),
        (ModuleNotFoundError("no", name="numpy"), 2, 'pip install "lightkv-export"'),
        (ModuleNotFoundError("no", name="lightkv_export.x"), 70, "ModuleNotFoundError"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (OSError(28, "No space left on device"), 2, "cannot write: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(5), 5, ""),
    ],
)
def test_every_ending_has_its_status_and_message(error, status, message, capsys):
    assert call_program(lambda: _raise(error)) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_failed_gate_is_status_1():
    assert call_program(lambda: 1) == 1
    assert call_program(lambda: None) == 0


def test_a_reader_that_stops_is_no_error():
    code = "import sys; from lightkv_export.cli import call_program; sys.exit(call_program(lambda: print('x' * 10**7)))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_a_terminal_without_the_character():
    code = "import sys; from lightkv_export.cli import call_program; sys.exit(call_program(lambda: print('猫')))"
    result = _python(code, PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert result.stdout.strip() == "\\u732b"


def test_what_libraries_print_does_not_reach_standard_output():
    result = _python(
        """
        import os
        from lightkv_export.cli.console import print_json, stdout_to_stderr
        with stdout_to_stderr():
            print("python noise")
            os.write(1, b"c noise\\n")
        print_json({"ok": True})
        """
    )
    assert json.loads(result.stdout) == {"ok": True}
    assert "python noise" in result.stderr
    assert "c noise" in result.stderr


def test_the_extras_table_matches_the_package_metadata():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra, names in EXTRAS.items():
        section = text.partition(f"\n{extra} = [")[2].partition("\n]")[0]
        for name in names:
            assert name.replace("_", "-") in section.replace("_", "-"), f"{name} is not in the extra {extra}"


@pytest.mark.parametrize("size", ["336", "336x", "0x336", "336x336x3", "-1x2", "wide"])
def test_an_image_size_that_cannot_be_read(size, capsys):
    for command in (["export", "tiny-llava"], ["plan", "tiny-llava", "--keep", "0.55"]):
        assert main([*command, f"--image-size={size}"]) == 2
        error = capsys.readouterr().err
        assert f"image size {size!r} cannot be read" in error and "write e.g. 640x427" in error


def test_a_video_is_refused(tmp_path, capsys):
    bundle = str(SizedToy().bundle(tmp_path / "b").path)
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    assert (
        main(["run", bundle, "--image", str(tmp_path / "clip.mp4"), "--prompt", "What happens?", "--threads", "1"]) == 2
    )
    error = capsys.readouterr().err
    assert "clip.mp4' is a video" in error and "take frames out of it" in error


# --- inspect ------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_bundle(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    bundle = small_bundle(tmp_path / "b", report={"verify": {"passed": True, "checks": [1, 2]}, "ttft_ms": 12.5})
    assert main(["inspect", str(bundle.path)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "hand-made (llava), 4 layers",
        "float32, modern (cache protocol scatter)",
        "0.75 (default)",
        "after layer 1: 16 -> 8 (1x1)",
        "key_cache_0 float32 [1, 1, C, 4]",
        "... 4 cache arrays in all",
        WEIGHTS,
        "verify.passed",
        "2 entries",
        "12.5",
    ):
        assert expected in text, expected


def test_inspect_json(tmp_path, capsys):
    bundle = small_bundle(tmp_path / "b")
    assert main(["inspect", str(bundle.path), "--json", "--verify"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    document = json.loads(captured.out)
    assert document["verified"] is True
    assert document["report"] is None
    assert document["manifest"]["name"] == "hand-made"
    full, compressed = document["keeps"]
    text = document["request"]["text_tokens"] + document["request"]["new_tokens"]
    assert full["kv_bytes"] == full["kv_bytes_vanilla"] == 4 * (VISION_TOKENS + text) * 2 * 4 * 4
    assert full["kv_bytes"] - compressed["kv_bytes"] == 2 * (VISION_TOKENS // 2) * 2 * 4 * 4


def test_inspect_lists_the_sizes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    bundle = str(SizedToy().bundle(tmp_path / "b").path)
    assert main(["inspect", bundle]) == 0
    text = capsys.readouterr().out
    for expected in ("8x8 (default)", "8x16", "16 (8x8)", "24 (16x8)", "0.9"):
        assert expected in text, expected
    assert main(["inspect", bundle, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    square, wide, tall = document["sizes"]
    assert (square["name"], wide["name"], tall["name"]) == ("8x8", "16x8", "8x16")
    assert (tall["units"], tall["tokens"], tall["vision_tokens"]) == (2, 16, 32)
    keep = document["keeps"][1]
    assert square["kv_bytes"]["0.83"] == keep["kv_bytes"] < keep["kv_bytes_vanilla"] == square["kv_bytes"]["1"]
    assert wide["keeps"]["0.9"] < square["keeps"]["0.9"] == 1.0, "keep 0.9 merges units of 24 alone"
    assert tall["kv_bytes"]["1"] - square["kv_bytes"]["1"] == 3 * 16 * 2 * 8 * 4


def test_inspect_names_damage(tmp_path, capsys):
    bundle = small_bundle(tmp_path / "b")
    bundle.file("tokenizer.json").write_bytes(b"[]")
    assert main(["inspect", str(bundle.path)]) == 0
    assert main(["inspect", str(bundle.path), "--verify"]) == 2
    assert "'tokenizer.json' is altered" in capsys.readouterr().err


def test_inspect_says_that_a_report_is_broken(tmp_path, capsys):
    bundle = small_bundle(tmp_path / "b")
    (bundle.path / "report.json").write_text("{")
    assert main(["inspect", str(bundle.path)]) == 0
    assert "cannot be read" in capsys.readouterr().out
