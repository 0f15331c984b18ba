"""The shell scripts and the shipped picture: what can be checked without installing anything."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0


def _checkout_with(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    return tmp_path


def test_a_python_that_is_too_old_is_named(tmp_path):
    root = _checkout_with(tmp_path)
    result = subprocess.run(
        ["bash", root / "scripts" / "test.sh"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "false"},
    )
    assert result.returncode == 2
    assert "error: no Python 3.10 or newer at PYTHON=false" in result.stderr
    assert "to do: " in result.stderr
    assert not (root / ".venv").exists()


def test_a_broken_environment_is_named(tmp_path):
    root = _checkout_with(tmp_path)
    (root / ".venv").mkdir()
    result = subprocess.run(["bash", root / "scripts" / "quickstart.sh"], capture_output=True, text=True, cwd="/")
    assert result.returncode == 2
    assert ".venv does not work" in result.stderr


def test_the_shipped_picture_is_what_the_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    path = ROOT / "scripts" / "draw_example.py"
    spec = importlib.util.spec_from_file_location("draw_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with Image.open(module.EXAMPLE) as shipped:
        assert shipped.mode == "RGB"
        assert shipped.tobytes() == module.draw_scene().tobytes()
