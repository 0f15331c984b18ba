"""Doctor: fake machines made of a few files and command outputs; what is found, what blocks, and what is advised."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from bundle_factory import small_bundle

from lightkv_export.cli import main
from lightkv_export.doctor import BLOCK, OK, WARN, Machine, board_target, examine
from lightkv_export.engines.receipt import Receipt, write_receipt
from lightkv_export.errors import BundleError
from lightkv_export.targets import target_names

GIB = 2**30
ORT = {"onnxruntime": "1.31.1"}
SMI = "NVIDIA GeForce RTX 4090, 575.57, 8.9, 24564 MiB\n"


def machine(
    root: Path,
    files: Mapping[str, str] = {},
    commands: Mapping[str, str] = {},
    packages: Mapping[str, str] = ORT,
    **settings: object,
) -> Machine:
    """A machine whose files lie below `root`; a command is known by its first word, or by more of them."""
    defaults = {"/proc/meminfo": "MemTotal: 32000000 kB\nMemAvailable: 16000000 kB\nSwapTotal: 0 kB"}
    for name, text in {**defaults, **files}.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(words: Sequence[str]) -> str | None:
        return commands.get(" ".join(words), commands.get(words[0]))

    base = {
        "root": root,
        "run": run,
        "version": packages.get,
        "providers": lambda: ["CPUExecutionProvider"],
        "free": lambda path: 100 * GIB,
        "python": (3, 12),
        "prefix": root / "venv",
        "is_venv": False,
    }
    return Machine(**(base | settings))


def jetson(root: Path, model: str = "NVIDIA Jetson Orin Nano Developer Kit", **changes: object) -> Machine:
    """An Orin Nano 8 GB with JetPack 6.2 in MAXN_SUPER, unless changed."""
    files = {
        "/proc/device-tree/model": f"{model}\0",
        "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
        "/proc/meminfo": "MemTotal:        7802880 kB\nMemAvailable:    6000000 kB\nSwapTotal:      16777216 kB",
        "/proc/swaps": "Filename Type Size Used Priority\n/swapfile file 16777216 0 -2",
    }
    commands = {
        "nvpmodel": "NV Power Mode: MAXN_SUPER\n2\n",
        "dpkg-query -W -f=${Version} libnvinfer10": "10.3.0.30-1+cuda12.5",
        "jetson_clocks": "GPU MinFreq=1020000000 MaxFreq=1020000000 CurrentFreq=1020000000",
    }
    given = {
        "files": files | dict(changes.pop("files", {})),
        "commands": commands | dict(changes.pop("commands", {})),
        "packages": changes.pop("packages", {"onnxruntime": "1.23.2", "tensorrt": "10.3.0"}),
    }
    return machine(root, **given, **({"python": (3, 10)} | changes))


def statuses(checked: Machine, bundle: Path | None = None) -> dict[str, str]:
    return {item.name: item.status for item in examine(checked, bundle)}


def found(checked: Machine, name: str, bundle: Path | None = None):
    return next(item for item in examine(checked, bundle) if item.name == name)


def test_a_plain_cpu_machine_is_fine(tmp_path):
    checks = list(examine(machine(tmp_path)))
    assert {item.status for item in checks} == {OK}
    assert {item.group for item in checks} == {"board", "gpu", "python", "memory"}
    assert board_target(machine(tmp_path)) is None


def test_a_good_jetson_is_fine_and_named_as_a_target(tmp_path):
    board = jetson(tmp_path)
    assert set(statuses(board).values()) == {OK}
    assert board_target(board) == "orin-nano-8gb-super@jp6.2"
    assert "TensorRT 10.3.0" in found(board, "JetPack").found


@pytest.mark.parametrize(
    ("model", "gib", "l4t", "target"),
    [
        ("NVIDIA Jetson Orin Nano Developer Kit", 3.6, "36 (release), REVISION: 4.0", "orin-nano-4gb@jp6.1"),
        ("NVIDIA Jetson Orin NX Engineering Reference", 15.3, "36 (release), REVISION: 3.0", "orin-nx-16gb@jp6.0"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 61.4, "39 (release), REVISION: 2.0", "agx-orin-64gb@jp7.2"),
        ("NVIDIA Jetson AGX Orin", 29.8, "35 (release), REVISION: 4.1", "agx-orin-32gb@jp5.1"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 122.8, "38 (release), REVISION: 2.1", "thor-t5000@jp7.0"),
    ],
)
def test_boards_and_releases_are_recognised(tmp_path, model, gib, l4t, target):
    files = {
        "/etc/nv_tegra_release": f"# R{l4t}, GCID: 1",
        "/proc/meminfo": f"MemTotal: {int(gib * 2**20)} kB\nMemAvailable: 3000000 kB",
    }
    board = jetson(tmp_path, model, files=files, commands={"nvpmodel": "NV Power Mode: MAXN\n0"})
    assert board_target(board) == target and target in target_names()


def test_an_unknown_board_and_an_unknown_release_are_said(tmp_path):
    board = jetson(tmp_path, "NVIDIA Jetson Nano", files={"/etc/nv_tegra_release": "# R99 (release), REVISION: 1.0,"})
    assert statuses(board)["model"] == statuses(board)["JetPack"] == WARN and board_target(board) is None


def test_an_old_jetpack_is_advised_against(tmp_path):
    board = jetson(tmp_path, files={"/etc/nv_tegra_release": "# R36 (release), REVISION: 3.0,"})
    check = found(board, "JetPack")
    assert check.status == WARN and "8.6.2" in check.found and "flash" in check.to_do


@pytest.mark.parametrize(
    ("changes", "name", "status", "advice"),
    [
        ({"commands": {"nvpmodel": "NV Power Mode: 15W\n0"}}, "power mode", WARN, "nvpmodel -m"),
        ({"commands": {"jetson_clocks": "GPU MinFreq=3060000 MaxFreq=10200000"}}, "GPU clock", WARN, "jetson_clocks"),
        ({"files": {"/proc/meminfo": "MemTotal: 7802880 kB\nMemAvailable: 500000 kB"}}, "memory", BLOCK, "multi-user"),
        ({"files": {"/proc/meminfo": "MemTotal: 7802880 kB\nMemAvailable: 2500000 kB"}}, "memory", WARN, "stop other"),
        ({"files": {"/proc/swaps": "/dev/zram0 partition 100 0 5"}}, "swap", WARN, "swapon"),
        ({"free": lambda path: GIB // 2}, "disk", BLOCK, "elsewhere"),
        ({"free": lambda path: 5 * GIB}, "disk", WARN, "larger disk"),
        ({"python": (3, 8)}, "Python", BLOCK, "newer Python"),
        ({"is_venv": True, "packages": ORT}, "environment", BLOCK, "--system-site-packages"),
        ({"packages": {"tensorrt": "10.7.0", "onnxruntime": "1.23.2"}}, "TensorRT", WARN, "build engines again"),
        ({"packages": {"tensorrt": "10.3.0"}}, "ONNX Runtime", WARN, "pip install"),
    ],
)
def test_each_check_of_a_jetson_can_fail(tmp_path, changes, name, status, advice):
    check = found(jetson(tmp_path, **changes), name)
    assert check.status == status and advice in check.to_do


def test_an_environment_with_system_packages_is_fine(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = true\n")
    assert found(jetson(tmp_path, is_venv=True, packages=ORT), "environment").status == OK


@pytest.mark.parametrize(
    ("changes", "name", "status"),
    [
        ({"packages": {}}, "ONNX Runtime", BLOCK),
        ({"packages": {"onnxruntime": "1.22.0"}}, "ONNX Runtime", BLOCK),
        ({"packages": {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.29.0"}}, "ONNX Runtime", WARN),
        ({"providers": list}, "providers", BLOCK),
        ({"commands": {"nvidia-smi": SMI}}, "providers", WARN),
        ({"commands": {"nvidia-smi": SMI}}, "TensorRT", WARN),
        ({"commands": {"nvidia-smi": SMI}}, "driver", OK),
        ({"files": {"/proc/driver/nvidia/version": "NVRM version: 575.57"}}, "driver", BLOCK),
        ({"files": {"/usr/local/cuda/version.json": '{"cuda": {"version": "13.0.1"}}'}}, "CUDA", OK),
        ({"commands": {"nvidia-smi": "CUDA Version: 13.0"}}, "CUDA", OK),
        ({"files": {"/usr/local/cuda/version.json": "{"}, "commands": {"nvidia-smi": "CUDA Version: 1"}}, "CUDA", OK),
        ({"packages": {**ORT, "tensorrt": "8.6.1"}}, "TensorRT", WARN),
        ({"packages": {**ORT, "tensorrt_rtx_cu13": "1.7.1.116"}}, "TensorRT-RTX", OK),
    ],
)
def test_each_check_of_a_computer_can_fail(tmp_path, changes, name, status):
    assert found(machine(tmp_path, **changes), name).status == status


@pytest.mark.parametrize(
    ("packages", "status"),
    [
        ({**ORT, "tensorrt": "10.3.0.30"}, OK),
        ({**ORT, "tensorrt": "10.7.0"}, BLOCK),
        (ORT, WARN),
    ],
)
def test_engines_are_for_the_version_that_built_them(tmp_path, packages, status):
    bundle = small_bundle(tmp_path / "bundle").path
    directory = bundle / "engines" / "orin"
    directory.mkdir(parents=True)
    write_receipt(directory, Receipt("tensorrt", "10.3.0", ("SM87",), (1.0,), 64, 64))
    check = found(machine(tmp_path / "root", packages=packages), "engines orin", bundle)
    assert check.status == status and "SM87" in check.found + check.expected


def test_a_damaged_receipt_blocks(tmp_path):
    bundle = small_bundle(tmp_path / "bundle").path
    (bundle / "engines" / "x").mkdir(parents=True)
    (bundle / "engines" / "x" / "receipt.json").write_text("{}")
    assert found(machine(tmp_path / "root"), "engines x", bundle).status == BLOCK


def test_a_bundle_without_engines_runs_if_a_runtime_takes_its_lowering(tmp_path):
    bundle = small_bundle(tmp_path / "bundle")
    here = machine(tmp_path / "root")
    assert statuses(here, bundle.path)["engines"] == OK
    old = dataclasses.replace(here, python=(3, 10), version={"onnxruntime": "1.23.2"}.get)
    expected = OK if bundle.manifest.lowering == "portable" else BLOCK
    assert statuses(old, bundle.path)["lowering"] == expected
    with pytest.raises(BundleError):
        list(examine(here, tmp_path))


def test_the_command_runs_on_this_machine(capsys):
    status = main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["blocked"] == (status == 1)
    assert {"group", "name", "status", "found", "expected", "to_do"} == set(document["checks"][0])
    assert main(["doctor"]) == status
    assert "blocks" in capsys.readouterr().out
