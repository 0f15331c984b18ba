"""What a bundle takes: bytes on disk, bytes of cache, copies per step, and modules in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("torch")

from conftest import MODELS, Exports

from lightkv_export.bundle import open_bundle
from lightkv_export.cli import main
from lightkv_export.filesystem import tree_bytes
from lightkv_export.runtime import load
from lightkv_export.runtime.ort import OrtExecutable
from lightkv_export.verify_cases import pictures
from lightkv_export.weights import WeightFiles, read_header

PROMPT = "What is in this picture?"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main([str(argument) for argument in arguments] + ["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_four_keeps_are_at_most_5_percent_larger_than_one(exports: Exports) -> None:
    four, one = exports.bundle("wide"), exports.bundle("wide", keeps=(1.0,))
    assert [len(open_bundle(path).manifest.keeps) for path in (four, one)] == [4, 1]
    assert tree_bytes(one) > 10e6, "too small to say anything about a real model"
    assert tree_bytes(four) <= 1.05 * tree_bytes(one)
    weights = [
        sum(entry.size for name, entry in open_bundle(path).manifest.files.items() if name.endswith(".safetensors"))
        for path in (four, one)
    ]
    assert weights[0] == pytest.approx(weights[1], abs=8192)  # headers differ, tensors do not


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in MODELS] + [("tied", {"dtype": "fp16"}), ("grouped", {"lowering": "portable"})],
)
def test_cache_bytes_are_the_planned_ones(exports: Exports, tmp_path: Path, capsys, name: str, options: dict) -> None:
    """`lightkv run` counts what `lightkv plan` says, to the byte, for every keep, with one and two images."""
    bundle, new_tokens = exports.bundle(name, **options), 5
    manifest, files = open_bundle(bundle).manifest, []
    for index, image in enumerate(pictures(2)):
        files.append(tmp_path / f"{index}.png")
        image.save(files[-1])
    for keep in manifest.keeps:
        stages = [f"{s.layer}:{s.windows_per_side}:{s.discard_ratio}" for s in keep.stages]
        what = ["--stage", *stages] if stages else ["--keep", 1.0]
        for num_images in (0, 1, 2):
            images = [part for file in files[:num_images] for part in ("--image", file)]
            setting = ["--keep", keep.requested, "--max-new-tokens", new_tokens, "--threads", 1]
            counted = run_json(capsys, "run", bundle, "--prompt", PROMPT, *images, *setting)
            text_tokens = counted["prompt_tokens"] - num_images * manifest.sizes[0].image_tokens
            request = ["--text-tokens", text_tokens, "--new-tokens", new_tokens, "--images", num_images]
            planned = run_json(
                capsys, "plan", exports.model(name), *what, *request, "--dtype", options.get("dtype", "fp32")
            )
            assert counted["kv_bytes"] == planned["kv_bytes"]
            assert counted["kv_bytes_per_layer"] == planned["kv_bytes_per_layer"]
            per_image = planned["vision_tokens_per_layer"]
            assert counted["vision_tokens_per_layer"] == [num_images * tokens for tokens in per_image]
            assert counted["keep"] == planned["keep"]


def test_a_keep_asked_for_is_planned_as_it_is_exported(exports: Exports, capsys) -> None:
    for keep in open_bundle(exports.bundle("wide")).manifest.keeps:
        planned = run_json(capsys, "plan", exports.model("wide"), "--keep", keep.requested)
        assert planned["keep"] == keep.keep and abs(keep.keep - keep.requested) <= 0.01
        assert planned["vision_tokens_per_layer"] == list(keep.vision_tokens_per_layer)


def test_answering_loads_neither_torch_nor_transformers(exports: Exports, tmp_path: Path) -> None:
    """An exported bundle in a fresh process, in which both cannot even be imported."""
    image = tmp_path / "image.png"
    pictures(1)[0].save(image)
    code = f"""
import sys
blocked = ("torch", "transformers", "safetensors", "onnx", "onnxscript", "accelerate", "huggingface_hub")
sys.modules.update(dict.fromkeys(blocked))
from lightkv_export.cli import main
status = main(["run", {str(exports.bundle("one key"))!r}, "--prompt", "Hi", "--image", {str(image)!r},
               "--max-new-tokens", "4", "--threads", "1", "--json"])
assert not [name for name, module in sys.modules.items() if module and name.partition(".")[0] in blocked]
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4


@pytest.mark.parametrize("keep", [1.0, 0.65])
def test_a_decode_step_writes_only_the_new_rows(exports: Exports, monkeypatch, keep: float) -> None:
    """Scatter: inputs and outputs are the same memory, the same from step to step, and old rows keep their bytes."""
    session = load(exports.bundle("wide"), threads=1).session(keep)
    session.ask(PROMPT, pictures(1), _answer(4))
    before = _caches(session)
    bound: list[dict[str, int]] = []
    real = OrtExecutable.run

    def spy(self, inputs, outputs):
        if self.name.startswith("segment"):
            caches = {name: buffer for name, buffer in inputs.items() if "_cache_" in name}
            assert caches and {name: buffer.ptr for name, buffer in caches.items()} == {
                name.removesuffix("_out"): buffer.ptr for name, buffer in outputs.items() if "_cache_" in name
            }
            bound.append({name: buffer.ptr for name, buffer in caches.items()})
        return real(self, inputs, outputs)

    monkeypatch.setattr(OrtExecutable, "run", spy)
    session.ask("And this?", [], _answer(8))
    segments = len(session.sequence.caches)
    assert len(bound) >= 8 * segments and bound[segments:] == bound[:-segments]
    after = _caches(session)
    for name, rows in before.items():
        kept = len(rows) - 4  # the answer's last tokens may be read again, as the template writes them
        np.testing.assert_array_equal(after[name][:kept], rows[:kept])
        assert np.abs(after[name][len(rows) :]).max(-1).min() > 0


def _answer(new_tokens: int):
    from lightkv_export.runtime.generation import Request

    return Request(max_new_tokens=new_tokens)


def _caches(session) -> dict[str, np.ndarray]:
    """The filled rows of every cache, copied."""
    read, filled = session._graphs.backend.read, session.sequence.filled
    return {
        name: read(buffer.rows(0, rows))[0, 0]
        for cache, rows in zip(session.sequence.caches, filled, strict=True)
        for name, buffer in cache._buffers.items()
    }


def test_no_operator_of_a_decode_step_copies_a_cache(exports: Exports, tmp_path: Path) -> None:
    """ONNX Runtime's own profile of a step against caches of 16 MiB each.

    Only three operators may hand out something of a cache's size: TensorScatter, whose output is bound to its input,
    and the views Squeeze and Reshape; none of them may take the time of a copy.
    """
    import onnxruntime as ort

    root = exports.bundle("wide")
    graph = next(graph for graph in open_bundle(root).manifest.graphs if graph.role == "segment")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = ort.InferenceSession(str(root / graph.file), options, providers=["CPUExecutionProvider"])
    capacity, binding = 1 << 16, session.io_binding()
    sizes = {"S": 1, "C": capacity}
    arrays = {t.name: np.zeros([sizes.get(n, n) for n in t.shape], t.dtype) for t in graph.inputs}
    for name, array in arrays.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for tensor in graph.outputs:
        source = arrays.get(tensor.name.removesuffix("_out"))
        if tensor.name.endswith("_out") and source is not None and "cache" in tensor.name:
            binding.bind_output(tensor.name, "cpu", 0, source.dtype, source.shape, source.ctypes.data)
        else:
            binding.bind_output(tensor.name, "cpu")
    for step in range(5):
        arrays["past_len"][0] = step
        session.run_with_iobinding(binding)
    cache = arrays[f"key_cache_{graph.layers[0]}"]
    assert cache.nbytes == 1 << 24 and not cache[0, 0, 5:].any()

    fastest: dict[tuple[str, str], int] = {}  # node -> microseconds
    for event in json.loads(Path(session.end_profiling()).read_text()):
        arguments = event.get("args", {})
        if event["name"].endswith("_kernel_time") and int(arguments.get("output_size", 0)) >= cache.nbytes:
            node = (arguments["op_name"], event["name"])
            fastest[node] = min(event["dur"], fastest.get(node, event["dur"]))
    assert {operator for operator, _ in fastest} <= {"TensorScatter", "Squeeze", "Reshape"}
    assert sum(operator == "TensorScatter" for operator, _ in fastest) == 2 * (graph.layers[1] - graph.layers[0])
    assert max(fastest.values()) < 0.2 * _copy_us(cache), fastest


def _copy_us(array: np.ndarray) -> float:
    """The fastest of five copies, in microseconds."""
    target, times = np.empty_like(array), []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, array)
        times.append(1e6 * (time.perf_counter() - start))
    return min(times)


def test_linked_weights_are_the_checkpoints_own_file(exports: Exports) -> None:
    """No byte of the weights is written; that such a bundle passes `verify` is a case of test_export."""
    bundle, source = exports.bundle("tied"), exports.model("tied") / "model.safetensors"
    (linked,) = (bundle / "onnx" / "weights").iterdir()
    assert linked.stat().st_ino == source.stat().st_ino
    assert open_bundle(bundle).manifest.embedding.file == f"onnx/weights/{linked.name}"


def test_linked_shards_of_one_name(tmp_path: Path) -> None:
    """Shards may lie in folders, and may be called as our own files are."""
    import torch

    groups: dict[str, dict] = {}
    for number, folder in enumerate(("a", "b")):
        file = tmp_path / folder / "segment_0.safetensors"
        file.parent.mkdir()
        save_file({f"w{folder}": np.full(4, number, np.float32)}, file)
        groups[f"segment_{number}"] = dict(read_header(file))
    save_file({"half": np.full(4, 2, np.float16)}, tmp_path / "half.safetensors")
    groups["segment_0"] |= read_header(tmp_path / "half.safetensors")
    weights = WeightFiles(tmp_path, torch.float32, link=True)
    for stem, tensors in groups.items():
        weights.add(stem, tensors)
    for file in weights.files():
        weights.write(file)
    found = {
        name: np.fromfile(ref.file, np.float32, 4, offset=ref.offset).tolist() for name, ref in weights.placed.items()
    }
    assert found == {"wa": [0] * 4, "wb": [1] * 4, "half": [2] * 4}


def test_tied_embeddings_are_stored_once(exports: Exports) -> None:
    path = exports.bundle("tied", dtype="fp16")
    manifest = open_bundle(path).manifest
    sizes = {Path(name).stem: entry.size for name, entry in manifest.files.items() if name.endswith(".safetensors")}
    rows, columns = manifest.embedding.shape
    assert rows * columns * 2 <= sizes["embedding"] < rows * columns * 2 + 4096
    layers = {graph.name: graph.layers[1] - graph.layers[0] for graph in manifest.graphs if graph.layers}
    assert sizes["segment_1"] <= layers["segment_1"] / layers["segment_0"] * sizes["segment_0"] + 4096  # no head there
