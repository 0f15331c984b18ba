"""The trt backend against the emulator: what it generates is what ONNX Runtime generates, on every version; what may go
wrong ends as a message."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import warnings
from pathlib import Path

import emulator
import numpy as np
import pytest
from conftest import Exports
from toy_model import IMAGE_SIZE, ToyModel
from toy_sizes import SizedToy

from lightkv_export.build import BuildRequest, build_engines
from lightkv_export.bundle import open_bundle
from lightkv_export.engines.receipt import RECEIPT_NAME
from lightkv_export.errors import BackendError, BundleError, UserError
from lightkv_export.runtime import load
from lightkv_export.runtime.generation import Request

CASES = [
    ("10.3.0", "portable"),
    ("10.13.3.9", "portable"),
    ("10.16.1.11", "modern"),
    ("11.4.0.106", "modern"),
    ("11.4.0.106", "portable"),
]
QUESTION = "What is in the picture?"


def picture(seed: int, size: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def copied(source: Path, out: Path) -> Path:
    return shutil.copytree(source, out)


def built(root: Path, **settings: object) -> Path:
    """Engines for every keep, by whatever is installed in sys.modules; returns their directory."""
    keeps = settings.pop("keeps", tuple(keep.requested for keep in open_bundle(root).manifest.keeps))
    return build_engines(open_bundle(root), BuildRequest(keeps=keeps, in_process=True, **settings)).directory


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy model in both cache protocols."""
    root = tmp_path_factory.mktemp("toys")
    return {
        name: ToyModel().bundle(root / name, name, "float16", max_tokens=800).path for name in ("scatter", "append")
    }


@pytest.fixture
def toy(toys: dict[str, Path], tmp_path: Path) -> Path:
    """A toy bundle of the append protocol without engines."""
    return copied(toys["append"], tmp_path / "toy")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> emulator.Machine:
    return emulator.install(monkeypatch, "10.3.0")


@pytest.mark.parametrize(("version", "lowering"), CASES)
def test_every_keep_generates_what_ort_generates(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, lowering: str
) -> None:
    root = copied(exports.bundle("wide", dtype="fp16", lowering=lowering), tmp_path / "bundle")
    machine = emulator.install(monkeypatch, version)
    built(root, max_tokens=512)
    model, reference = load(root, backend="trt"), load(root, threads=1)
    keeps = [keep.requested for keep in reference.manifest.keeps]
    assert len(keeps) >= 4
    for keep in keeps:
        expected = reference.run(QUESTION, [picture(1)], keep=keep, max_new_tokens=12)
        found = model.run(QUESTION, [picture(1)], keep=keep, max_new_tokens=12)
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
        assert found.vision_tokens_per_layer == expected.vision_tokens_per_layer
        if lowering == "portable":  # the modern engines' caches are as large as the engine says
            assert found.kv_bytes == expected.kv_bytes
    # Of 11 decoding steps, the first is run and the others are replayed; the first replay is preceded by a capture.
    segments = len([graph for graph in reference.manifest.graphs if graph.role == "segment"])
    assert (machine.captures, machine.launches) == (segments * len(keeps), 10 * segments * len(keeps))
    del model
    gc.collect()
    assert machine.leaks() == []


@pytest.mark.parametrize(
    ("version", "cuda", "protocol"), [("10.3.0", "12.9.4", "append"), ("11.4.0.106", "13.0.3", "scatter")]
)
def test_a_conversation_with_two_images(
    toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, cuda: str, protocol: str
) -> None:
    machine = emulator.install(monkeypatch, version, cuda)
    root = copied(toys[protocol], tmp_path / "toy")
    built(root, chunk_tokens=150)
    answers = []
    for backend in ("ort", "trt"):
        session = load(root, backend=backend).session(0.83)
        turns = [
            session.ask(QUESTION, [picture(1, IMAGE_SIZE), picture(2, IMAGE_SIZE)], Request(5)),
            session.ask("And " + "now " * 45, request=Request(70)),  # fed in chunks, then over two cache views
            session.ask("This?", [picture(3, IMAGE_SIZE)], Request(5)),
        ]
        answers.append([turn.token_ids for turn in turns])
    assert answers[0] == answers[1]
    del session
    gc.collect()
    assert machine.leaks() == []


@pytest.mark.parametrize("mrope", [False, True], ids=["1d", "mrope"])
def test_images_of_several_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mrope: bool) -> None:
    """Units of two lengths, merged together or one of them alone; tables of the vision graph; DeepStack inputs."""
    machine = emulator.install(monkeypatch, "10.3.0")
    root = SizedToy(mrope=mrope).bundle(tmp_path / "toy", "append", "float16", max_tokens=800).path
    built(root)
    pictures = [picture(1, 16), np.repeat(picture(2, 16), 2, axis=1), np.repeat(picture(3, 16), 2, axis=0)]
    answers = []
    for backend in ("ort", "trt"):
        model = load(root, backend=backend)
        for keep in (1.0, 0.83, 0.9):
            session = model.session(keep)
            turns = [session.ask(QUESTION, pictures, Request(5)), session.ask("This?", [picture(3, 16)], Request(5))]
            answers.append([(turn.token_ids, turn.vision_tokens_per_layer) for turn in turns])
    assert answers[:3] == answers[3:]
    del model, session
    gc.collect()
    assert machine.leaks() == []


def test_two_profiles(toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = emulator.install(monkeypatch, "10.16.1.11")
    root = copied(toys["scatter"], tmp_path / "toy")
    directory = built(root, num_profiles=2)
    receipt = json.loads((directory / RECEIPT_NAME).read_text())
    assert len(receipt["engines"]["segment_0"]["profiles"]) == 2
    request = {"keep": 0.83, "max_new_tokens": 6}
    answers = [
        load(root, backend=name).run(QUESTION, [picture(1, IMAGE_SIZE)], **request).token_ids for name in ("ort", "trt")
    ]
    assert answers[0] == answers[1] and machine.launches == 2 * 4


def test_release_is_in_reverse_order(toy: Path, machine: emulator.Machine) -> None:
    built(toy)
    model = load(toy, backend="trt")
    model.run(QUESTION, max_new_tokens=4)
    machine.released.clear()
    model.backend.close()
    order = [kind for kind in machine.released if kind != "device memory"]
    assert order[-3:] == ["pinned memory", "pinned memory", "stream"]
    assert order[: order.index("context")].count("graph") == 1  # the last segment's, before its context
    contexts_first = [order[:place].count("context") > order[:place].count("engine") for place in range(len(order))]
    assert all(ready for kind, ready in zip(order, contexts_first, strict=True) if kind == "engine")
    del model
    gc.collect()
    assert machine.leaks() == []


@pytest.mark.filterwarnings("ignore:engines run without CUDA graphs")
def test_a_capture_that_fails_is_reported_and_done_without(toy: Path, machine: emulator.Machine) -> None:
    built(toy)
    machine.capturable = False
    expected = load(toy).run(QUESTION, max_new_tokens=5).token_ids
    with pytest.warns(
        UserWarning, match="without CUDA graphs, so decoding is slower: CUDA: cudaStreamEndCapture failed"
    ):
        assert load(toy, backend="trt").run(QUESTION, max_new_tokens=5).token_ids == expected


def test_library_and_device_are_named(toy: Path, machine: emulator.Machine) -> None:
    built(toy)
    assert load(toy, backend="trt").backend.device == "Emulated GPU"
    with pytest.raises(UserError, match="device 'cpu' with the backend trt"):
        load(toy, backend="trt", device="cpu")


def test_without_engines(toy: Path, machine: emulator.Machine) -> None:
    with pytest.raises(BackendError, match="has no TensorRT engines.*\n.*run `lightkv build"):
        load(toy, backend="trt")


def test_an_altered_engine_is_not_loaded(toy: Path, machine: emulator.Machine) -> None:
    path = built(toy) / "segment_1.engine"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="segment_1.engine is altered.*\n.*an engine is code, so it is not loaded"):
        load(toy, backend="trt").run(QUESTION, max_new_tokens=2)
    path.write_bytes(content[:-5])
    with pytest.raises(BundleError, match="segment_1.engine is altered: .* bytes"):
        load(toy, backend="trt").run(QUESTION, max_new_tokens=2)


def test_an_engine_of_another_graph_is_not_loaded(
    toys: dict[str, Path], tmp_path: Path, machine: emulator.Machine
) -> None:
    directory = built(copied(toys["append"], tmp_path / "old"))
    new = ToyModel(seed=1).bundle(tmp_path / "new", "append", "float16").path
    copied(directory, new / "engines" / directory.name)
    with pytest.raises(BundleError, match="was built from another segment_0 than the bundle has now"):
        load(new, backend="trt").run(QUESTION, max_new_tokens=2)


def test_an_engine_of_another_version_is_not_loaded(
    toy: Path, machine: emulator.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(toy)
    emulator.install(monkeypatch, "10.13.3.9")
    with pytest.raises(BackendError, match="built by tensorrt 10.3.0, here is 10.13.3.9.*\n.*\n.*lightkv build"):
        load(toy, backend="trt")


def test_an_engine_for_another_gpu_is_not_loaded(
    toy: Path, machine: emulator.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(toy)
    emulator.install(monkeypatch, "10.3.0", capability=(11, 0))
    with pytest.raises(BackendError, match="built for SM87, the GPU here is SM110"):
        load(toy, backend="trt")


def test_of_several_directories_the_fitting_one_is_taken(
    toy: Path, machine: emulator.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(toy)
    emulator.install(monkeypatch, "10.13.3.9")
    built(toy)
    assert load(toy, backend="trt").backend._engines.directory.name == "tensorrt-10.13.3.9-sm87"


def test_a_damaged_receipt(toy: Path, machine: emulator.Machine) -> None:
    (built(toy) / RECEIPT_NAME).write_text('{"format_version": 1}')
    with pytest.raises(BundleError, match="receipt.json is damaged"):
        load(toy, backend="trt")


def test_out_of_memory(toy: Path, machine: emulator.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    built(toy)
    model = load(toy, backend="trt")
    model.graphs.prepare(model.manifest.keep_named(1.0), [model.manifest.sizes[0].tokens])
    machine.memory_bytes = machine.used_bytes + 20_000
    with pytest.raises(BackendError, match="out of GPU memory: 0.00 GiB for caches.*are free\n.*lightkv plan"):
        model.run(QUESTION, max_new_tokens=300)
    machine.memory_bytes = 1000
    with pytest.raises(BackendError, match="cannot load .*OutOfMemory"):
        load(toy, backend="trt").run(QUESTION, max_new_tokens=2)


def test_missing_driver_and_missing_packages(
    toy: Path, machine: emulator.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(toy)
    machine.driver = False
    with pytest.raises(BackendError, match="no usable NVIDIA GPU: cudaErrorInsufficientDriver"):
        load(toy, backend="trt")
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match="cuda-python is not installed.*\n.*\n.*pip install cuda-python"):
        load(toy, backend="trt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match="'tensorrt' cannot be imported"):
        load(toy, backend="trt")


def test_older_cuda_python(toy: Path, machine: emulator.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    built(toy)
    monkeypatch.setitem(sys.modules, "cuda.cudart", sys.modules["cuda.bindings.runtime"])
    for name in ("cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    load(toy, backend="trt").run(QUESTION, max_new_tokens=2)


def test_a_keep_whose_stages_were_not_built(toy: Path, machine: emulator.Machine) -> None:
    built(toy, keeps=(1.0,))
    model = load(toy, backend="trt")
    model.run(QUESTION, [picture(1, IMAGE_SIZE)], keep=1.0, max_new_tokens=2)
    with pytest.raises(
        BackendError, match="no engine for stage_v16_w1_r0.5.*\n.*the keeps 1 need.*\n.*--keep for each keep"
    ):
        model.run(QUESTION, [picture(1, IMAGE_SIZE)], keep=0.83, max_new_tokens=2)


def test_limits_of_the_engines_are_said_before_anything_runs(
    toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.install(monkeypatch, "11.4.0.106")
    root = copied(toys["scatter"], tmp_path / "toy")
    built(root, keeps=(0.83,), max_tokens=120, chunk_tokens=60)
    model = load(root, backend="trt")
    with pytest.raises(UserError, match="at most 120, the limit"):
        model.run(QUESTION, max_new_tokens=110)
    # Keep 1.0 runs on engines for 0.83, whose last segment has 8 rows fewer, as long as these suffice.
    prompt = model.run(QUESTION, [picture(1, IMAGE_SIZE)], keep=1.0, max_new_tokens=1).prompt_tokens
    with pytest.raises(UserError, match="need 120 cache rows in segment_1.*\n.*at most 112, .*\n.*--keep 1"):
        model.run(QUESTION, [picture(1, IMAGE_SIZE)], keep=1.0, max_new_tokens=120 - prompt)
    with pytest.raises(UserError, match="must go through the stages together.*\n.*at most 60, .*\n.*--profile-tokens"):
        model.run(QUESTION + "?" * 60, [picture(1, IMAGE_SIZE)], keep=0.83, max_new_tokens=1)
    # Text alone is fed in chunks.
    found = model.run(QUESTION + "?" * 60, max_new_tokens=3).token_ids
    assert found == load(root).run(QUESTION + "?" * 60, max_new_tokens=3).token_ids


def test_without_warnings_when_all_is_well(toy: Path, machine: emulator.Machine) -> None:
    built(toy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(toy, backend="trt").run(QUESTION, max_new_tokens=4)
