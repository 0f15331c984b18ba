"""What cannot be exported or run: exit status 2, a message that helps, and a directory that looks as before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

import numpy as np
from conftest import MODELS, Exports, repack
from PIL import Image

from lightkv_export.bundle import open_bundle
from lightkv_export.cli import main
from lightkv_export.weights import read_header

STAGE = ["--stage", *MODELS["one key"].stages]
PLAIN = ["--keep", "1"]  # the fewest graphs
CapSys = pytest.CaptureFixture[str]


def listing(root: Path) -> dict[str, str]:
    """Every path under `root`, with the hash of files."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
    }


def fails(capsys: CapSys, folder: Path, *arguments: object, status: int = 2) -> str:
    """Runs a command that must fail and leave `folder` as it is; returns the message."""
    before = listing(folder)
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    assert listing(folder) == before
    assert captured.out == "" and "Traceback" not in captured.err
    message = captured.err[captured.err.index("error: ") :]
    assert "\n  expected: " in message or "\n  to do: " in message, message
    return message


def export_fails(capsys: CapSys, folder: Path, model: object, *options: object) -> str:
    out = folder / "new" / "deep" / "bundle"  # parents that were made go, too
    return fails(capsys, folder, "export", model, *(options or STAGE), "--out", out, "--quiet")


@pytest.fixture
def model(exports: Exports, tmp_path: Path) -> Path:
    """A checkpoint that the test may break."""
    return Path(shutil.copytree(exports.model("one key"), tmp_path / "model"))


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "a/b/c", "llava-1.5-7B"])
def test_unknown_model(capsys, tmp_path, name):
    message = export_fails(capsys, tmp_path, name)
    assert f"unknown model {name!r}" in message and "llava-1.5-7b" in message


def edit_json(name: str, **entries: object) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        (root / name).write_text(json.dumps(json.loads((root / name).read_text()) | entries))

    return edit


def edit_text_config(**entries: object) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        config = json.loads((root / "config.json").read_text())
        config["text_config"] |= entries
        (root / "config.json").write_text(json.dumps(config))

    return edit


def only_pickles(root: Path) -> None:
    (root / "model.safetensors").rename(root / "pytorch_model.bin")


def cut(size: int) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / "model.safetensors", size)


def missing_shard(root: Path) -> None:
    names = dict.fromkeys(read_header(root / "model.safetensors"), "model-00001-of-00002.safetensors")
    names[next(iter(names))] = "model-00002-of-00002.safetensors"
    (root / "model.safetensors").rename(root / "model-00001-of-00002.safetensors")
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def damaged_index(root: Path) -> None:
    (root / "model.safetensors.index.json").write_text('{"weight_map": {"a": ')


def edit_index(root: Path) -> None:
    (root / "model.safetensors.index.json").write_text("[]")


def without(*names: str) -> Callable[[Path], None]:
    return lambda root: [(root / name).unlink() for name in names]


def one_tensor_less(root: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(root / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("0.mlp.up_proj.weight"))]
    save_file(tensors, root / "model.safetensors")


BROKEN = {
    "no config": (without("config.json"), "has no config.json"),
    "config is no JSON": (lambda root: (root / "config.json").write_text("{"), "config.json is not valid JSON"),
    "other family": (edit_json("config.json", model_type="bert"), "'bert' is not supported"),
    "no family": (lambda root: (root / "config.json").write_text("{}"), "is not supported"),
    "no text config": (
        lambda root: (root / "config.json").write_text('{"model_type": "llava"}'),
        "lacks 'text_config'",
    ),
    "shapes of another model": (edit_text_config(intermediate_size=96), "[96, 64] by config.json"),
    "more layers than weights": (edit_text_config(num_hidden_layers=4), "the checkpoint lacks"),
    "a tensor is missing": (one_tensor_less, "lacks model.language_model.layers.0.mlp.up_proj.weight"),
    "pickles": (only_pickles, "only pickles (pytorch_model.bin)"),
    "no weights": (without("model.safetensors"), "holds no safetensors weights"),
    "weights cut off": (cut(300_000), "is cut off"),
    "header cut off": (cut(100), "is cut off"),
    "weights empty": (cut(0), "is cut off"),
    "shard is missing": (missing_shard, "lacks model-00002-of-00002.safetensors"),
    "index is no JSON": (damaged_index, "index.json is not valid JSON"),
    "index of something else": (edit_index, "has no weight_map"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "no usable"),
    "no chat template": (without("chat_template.jinja"), "has no chat template"),
    "no image settings": (without("preprocessor_config.json", "processor_config.json"), "no usable"),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_broken_checkpoint(capsys, tmp_path, model, defect):
    edit, expected = BROKEN[defect]
    edit(model)
    assert expected in export_fails(capsys, tmp_path, model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--keep", "0"], "keep is 0.0"),
        (["--keep", "1.5"], "keep is 1.5"),
        (["--keep", "-0.5"], "keep is -0.5"),
        (["--keep", "nan"], "keep is nan"),
        (["--keep", "half"], "invalid float value: 'half'"),
        (["--keep", "0.2"], "keep 0.2 is out of reach"),
        (["--keep", "1", "--keep", "0.1"], "keep 0.1 is out of reach"),
        (["--stage", "1:1"], "stage '1:1'"),
        (["--stage", "2:1:0.5"], "at least one layer follows"),
        (["--stage", "1:4:0.5"], "would do nothing"),
        (["--stage", "1:1:0.9"], "0.9"),
        (["--stage", "1:1:0.5", "0:1:0.5"], "ascending"),
        (["--keep", "0.9", "--stage", "1:1:0.5"], "not allowed with"),
        ([*STAGE, "--max-tokens", "0"], "--max-tokens is 0"),
        ([*STAGE, "--max-tokens", "99999"], "beyond the model's 8192 positions"),
        ([*STAGE, "--max-images", "0"], "--max-images is 0"),
        ([*STAGE, "--dtype", "int3"], "invalid choice: 'int3'"),
        ([*STAGE, "--kep", "0.5"], "did you mean '--keep'"),
    ],
)
def test_options_that_cannot_be(capsys, tmp_path, exports, options, expected):
    assert expected in export_fails(capsys, tmp_path, exports.model("one key"), *options)


def test_existing_output(capsys, tmp_path, exports):
    out = repack(exports.bundle("one key"), tmp_path / "bundle")
    arguments = ["export", exports.model("one key"), *STAGE, "--quiet", "--out"]
    assert "exists already" in fails(capsys, tmp_path, *arguments, out)
    assert "--overwrite" in fails(capsys, tmp_path, *arguments, out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for other in ("notes", "file"):
        message = fails(capsys, tmp_path, *arguments, tmp_path / other, "--overwrite")
        assert "is not a bundle, so it is not overwritten" in message
    assert "cannot create" in fails(capsys, tmp_path, *arguments, tmp_path / "file" / "bundle")


def test_a_weight_too_large_for_float16(capsys, tmp_path, model):
    ref = next(ref for name, ref in read_header(model / "model.safetensors").items() if name.endswith("up_proj.weight"))
    np.memmap(model / "model.safetensors", np.float32, "r+", ref.offset, ref.shape)[0, 0] = 1e5
    assert "--dtype bf16" in export_fails(capsys, tmp_path, model, *PLAIN, "--dtype", "fp16")


def export_program(code: str, *arguments: object) -> subprocess.Popen:
    """`lightkv-export` in a process of its own, after `code`."""
    start = "from lightkv_export.cli import export_main\nsys.exit(export_main(sys.argv[1:]))"
    words = [sys.executable, "-c", f"import sys, os, signal\n{code}\n{start}", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished_parts(folder: Path) -> set[str]:
    """Names of the graphs and weights that an export left for the next one; removes them."""
    (left,) = folder.glob(".bundle.partial-*")
    names = {path.name for path in left.rglob("*") if path.suffix in (".onnx", ".safetensors")}
    shutil.rmtree(left)
    return names


def test_a_full_disk_keeps_the_old_bundle(exports, tmp_path):
    """No file may grow beyond 64 KiB: the first weight file fails, as it does on a full disk."""
    out = repack(exports.bundle("one key"), tmp_path / "bundle")
    before = listing(tmp_path)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))"
    program = export_program(limit, exports.model("one key"), *PLAIN, "--out", out, "--overwrite", "--quiet")
    _, message = program.communicate(timeout=200)
    assert program.returncode == 2, message
    assert "cannot write the bundle" in message and "File too large" in message and "free some space" in message
    assert "finished parts" in message and "vision.onnx" in finished_parts(tmp_path)
    assert listing(tmp_path) == before
    open_bundle(out)


SIGNAL_IN_THE_MIDDLE = """
from lightkv_export import pipeline
def save_graph(*arguments, real=pipeline.save_graph):
    real(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
pipeline.save_graph = save_graph
"""


def test_a_signal_while_graphs_are_written(exports, tmp_path):
    out = repack(exports.bundle("one key"), tmp_path / "bundle")
    before = listing(tmp_path)
    program = export_program(
        SIGNAL_IN_THE_MIDDLE, exports.model("one key"), *PLAIN, "--out", out, "--overwrite", "--quiet"
    )
    _, message = program.communicate(timeout=200)
    assert program.returncode == 130, message
    assert "interrupted" in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == [out] and listing(tmp_path) == before  # the graph was not noted down yet


def test_ctrl_c_while_graphs_are_traced(exports, tmp_path):
    program = export_program("", exports.model("one key"), *STAGE, "--out", tmp_path / "new" / "bundle")
    for line in program.stderr:
        if line.startswith("trace segment_0"):
            break
    assert list(tmp_path.glob("new/.bundle.partial-*")), "nothing was written yet: the test says nothing"
    time.sleep(0.2)
    program.send_signal(signal.SIGINT)
    _, message = program.communicate(timeout=60)
    assert program.returncode == 130, message
    assert "interrupted" in message and "goes on from there" in message and "Traceback" not in message
    assert finished_parts(tmp_path / "new") == {"vision.onnx"}
    assert not list((tmp_path / "new").iterdir())


# What `lightkv run` refuses.


@pytest.fixture(scope="module")
def bundle(exports: Exports) -> Path:
    return exports.bundle("one key")


def run_fails(capsys: CapSys, tmp_path: Path, bundle: Path, *options: object) -> str:
    setting = ["--threads", "1", "--max-new-tokens", "2"]
    return fails(capsys, tmp_path, "run", bundle, *setting, *options)


def test_requests_that_cannot_be(capsys, tmp_path, bundle):
    good = tmp_path / "good.png"
    Image.new("RGB", (60, 40), "red").save(good)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    Image.new("RGB", (3000, 2)).save(tmp_path / "ribbon.png")
    for name, expected in (
        ("none.png", "does not exist"),
        ("", "is a directory"),
        ("text.png", "is not an image that can be read"),
        ("empty.png", "is not an image that can be read"),
        ("cut.png", "is damaged"),
        ("ribbon.png", "has size 3000 x 2"),
    ):
        assert expected in run_fails(capsys, tmp_path, bundle, "--prompt", "Hi", "--image", tmp_path / name)
    four = [part for _ in range(5) for part in ("--image", good)]
    for options, expected in (
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt", "word " * 3000], "at most 2048"),
        (["--prompt", "Hi", "--max-new-tokens", "2048"], "ask for at most"),
        (["--prompt", "Hi", "--keep", "0.33"], "has no keep 0.33"),
        (["--prompt", "Hi", *four], "5 images"),
    ):
        assert expected in run_fails(capsys, tmp_path, bundle, *options)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_odd_modes_and_sizes_are_answered(capsys, tmp_path, bundle, mode):
    suffix = "tiff" if mode in ("CMYK", "F") else "png"
    files = []
    for number, size in enumerate([(1, 1), (7, 300), (641, 33)]):
        files += ["--image", str(tmp_path / f"{number}.{suffix}")]
        Image.new(mode, size).save(files[-1])
    arguments = ["run", str(bundle), "--prompt", "Hi", *files, "--max-new-tokens", "2", "--threads", "1", "--json"]
    assert main(arguments) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 2


@pytest.mark.parametrize("name", ["onnx/segment_0.onnx", "onnx/weights/segment_1.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("defect", ["truncated", "altered", "missing"])
def test_a_damaged_bundle(capsys, tmp_path, bundle, name, defect):
    broken = repack(bundle, tmp_path / "bundle")
    content = bytearray((broken / name).read_bytes())
    content[len(content) // 2] ^= 1
    if defect == "missing":
        (broken / name).unlink()
    else:
        (broken / name).write_bytes(content[:-1] if defect == "truncated" else content)
    for command in (["run", broken, "--prompt", "Hi"], ["verify", broken], ["chat", broken], ["bench", broken]):
        message = fails(capsys, tmp_path, *command)
        assert repr(name) in message and defect in message


def test_what_is_no_bundle(capsys, tmp_path, exports):
    for other in (tmp_path / "nowhere", exports.model("one key")):
        message = fails(capsys, tmp_path, "run", other, "--prompt", "Hi")
        assert "lightkv-export MODEL" in message
