"""Building engines: the real TensorRT-RTX builder on every graph of small bundles."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import emulator
import onnx
import pytest
from conftest import Exports
from onnx import TensorProto, helper
from toy_model import ToyModel
from toy_sizes import SizedToy

from lightkv_export.build import BuildRequest, build_engines
from lightkv_export.bundle import open_bundle
from lightkv_export.cli import export_main, main
from lightkv_export.engines.compiler import Settings, compile_graph, weight_bytes
from lightkv_export.engines.library import Library, library_for_building
from lightkv_export.engines.profiles import EnginePlan
from lightkv_export.engines.receipt import RECEIPT_NAME, file_digest, read_receipt
from lightkv_export.engines.worker import Job, compile_in_process
from lightkv_export.errors import BackendError, UserError
from lightkv_export.manifest import Manifest
from lightkv_export.recipe import load_recipe

GIB = 1 << 30


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy model in both cache protocols: 3 layers, a stage after the second that keeps 8 of 16 tokens."""
    root = tmp_path_factory.mktemp("toys")
    return {name: ToyModel().bundle(root / name, name, "float16").path for name in ("scatter", "append")}


@pytest.fixture
def rtx() -> ModuleType:
    """The real TensorRT-RTX, which needs no GPU to build."""
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")


def manifest_of(root: Path) -> Manifest:
    return open_bundle(root, verify=False).manifest


def test_build_memory_cuts_the_export_finer() -> None:
    from lightkv_export.pipeline import ExportRequest, plan_export

    recipe = load_recipe("llava-1.5-7b")
    plain, finer = (
        plan_export(recipe, ExportRequest(recipe.name, Path("out"), (0.55,), dtype="fp16", build_memory=limit))
        for limit in (None, 3.5)
    )
    assert [last - first for first, last in plain.segments] == [12, 6, 7, 7]
    assert max(last - first for first, last in finer.segments) == 2 and finer.segments[-1][1] == 32
    assert {last for _, last in plain.segments} <= {last for _, last in finer.segments}
    assert finer.schedules == plain.schedules


@pytest.mark.parametrize("lowering", ["modern", "portable"])
@pytest.mark.parametrize("name", ["tiny-llava", "grouped"])
def test_rtx_builds_every_graph(rtx: ModuleType, exports: Exports, tmp_path: Path, name: str, lowering: str) -> None:
    root = shutil.copytree(exports.bundle(name, dtype="fp16", lowering=lowering), tmp_path / "bundle")
    bundle = open_bundle(root)
    result = build_engines(bundle, BuildRequest(in_process=True))
    receipt = result.receipt
    assert set(receipt.engines) == {graph.name for graph in bundle.manifest.graphs}
    assert receipt.capabilities == ("SM86", "SM120") and receipt.version == rtx.__version__
    assert receipt == read_receipt(result.directory)
    for graph, engine in receipt.engines.items():
        path = result.directory / engine.file
        assert (engine.sha256, engine.size) == (file_digest(path), path.stat().st_size)
        assert engine.dtype == "float16" and engine.build_s > 0 and engine.peak_host_bytes > engine.size
        static = lowering == "modern" and graph.startswith("segment")
        assert (engine.capacity is not None) == static and len(engine.profiles) == 1
    counted = sum(weight_bytes(root / graph.file) for graph in bundle.manifest.graphs)
    stored = sum(path.stat().st_size for path in (root / "onnx" / "weights").glob("*.safetensors"))
    assert 0.8 * stored < counted < stored  # all but the embedding table
    assert open_bundle(root).manifest == bundle.manifest  # engines are extra files
    assert build_engines(bundle, BuildRequest(in_process=True)).reused == tuple(receipt.engines)


def test_rtx_builds_the_toys_with_two_profiles(rtx: ModuleType, toys: dict[str, Path], tmp_path: Path) -> None:
    for name, root in toys.items():
        copy = shutil.copytree(root, tmp_path / name)
        request = BuildRequest((1.0, 0.83), capabilities=("SM86",), num_profiles=2, in_process=True)
        assert len(build_engines(open_bundle(copy), request).receipt.engines) == 4


@pytest.mark.parametrize("mrope", [False, True], ids=["tiles", "mrope and DeepStack"])
def test_rtx_builds_a_bundle_with_sizes(rtx: ModuleType, tmp_path: Path, mrope: bool) -> None:
    bundle = SizedToy(mrope=mrope).bundle(tmp_path / "sized", "append", "float16")
    result = build_engines(bundle, BuildRequest(in_process=True))
    engines = result.receipt.engines
    assert engines.keys() == {graph.name for graph in bundle.manifest.graphs}
    units = [stage["vision_index"] for stage in (e.profiles[0] for n, e in engines.items() if n.startswith("stage"))]
    assert sorted(shapes[2][1] for shapes in units) == [16, 24]


def test_only_what_changed_is_built_again(rtx: ModuleType, toys: dict[str, Path], tmp_path: Path) -> None:
    bundle = open_bundle(shutil.copytree(toys["scatter"], tmp_path / "toy"))
    request = BuildRequest((1.0, 0.83), in_process=True)
    first = build_engines(bundle, request)
    (first.directory / "segment_0.engine").unlink()
    assert set(build_engines(bundle, request).reused) == {"vision", "segment_1", "stage_v16_w1_r0.5"}
    narrower = build_engines(bundle, replace(request, keeps=(0.83,)))  # segment_1 now holds fewer rows
    assert set(narrower.reused) == {"vision", "segment_0", "stage_v16_w1_r0.5"}
    without = build_engines(bundle, replace(request, keeps=(1.0,)))
    assert set(without.receipt.engines) == {"vision", "segment_0", "segment_1"}
    assert not (first.directory / "stage_v16_w1_r0.5.engine").exists()
    assert build_engines(bundle, replace(request, rebuild=True)).reused == ()


def test_each_engine_is_built_in_a_process_of_its_own(rtx: ModuleType, toys: dict[str, Path], tmp_path: Path) -> None:
    bundle, seen = open_bundle(shutil.copytree(toys["scatter"], tmp_path / "toy")), []
    result = build_engines(bundle, BuildRequest(), lambda name, done, total: seen.append(name))
    assert list(dict.fromkeys(seen)) == [
        f"{name} ({place} of 4)" for place, name in enumerate(result.receipt.engines, 1)
    ]
    assert all(0 < engine.peak_host_bytes < GIB for engine in result.receipt.engines.values())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import os; open('.x.engine.partial', 'w').close(); os.kill(os.getpid(), 9)",
            "the build of segment was killed, most likely because memory ran out",
        ),
        ("import os; os.abort()", "the build of segment died .SIGABRT."),
        ("import sys; sys.exit(3)", "the build of segment died .exit status 3."),
        ("raise ImportError('libfoo.so')", "'tensorrt_rtx' cannot be imported: libfoo.so"),
        ("print('noise'); raise OSError('libbar.so')", "libbar.so"),
    ],
)
def test_a_build_that_dies_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    job = Job("tensorrt_rtx", "segment", tmp_path / "x.onnx", tmp_path / "x.engine", None, ({},))
    with pytest.raises(BackendError, match=message):
        compile_in_process(job, lambda name, done, total: None)
    assert not list(tmp_path.glob("*.engine")) and not list(tmp_path.glob(".*"))


def test_a_job_survives_its_journey() -> None:
    job = Job("a", "b", Path("c"), Path("d"), 7, ({"x": ((1,), (2,), (3,))},), ("SM86",), 5, Path("t"))
    assert Job.from_json(job.as_json()) == job
    assert Job.from_json(replace(job, timing_cache=None).as_json()).timing_cache is None


def test_a_graph_that_the_parser_refuses(rtx: ModuleType, tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    node = helper.make_node("Unique", ["x"], ["y"], name="the culprit")
    opset = [helper.make_opsetid("", 20)]
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", [values[0]], [values[1]]), opset_imports=opset),
        tmp_path / "g.onnx",
    )
    library = Library(rtx, "tensorrt_rtx")
    with pytest.raises(BackendError, match="cannot read g: .*the culprit.*Unique") as error:
        compile_graph(library, tmp_path / "g.onnx", EnginePlan("g", None, ({},)), Settings(("SM86",)), print)
    assert "lightkv lint" in error.value.fix


def test_an_interrupted_build_ends_as_interrupted(rtx: ModuleType, toys: dict[str, Path], tmp_path: Path) -> None:
    bundle = open_bundle(shutil.copytree(toys["append"], tmp_path / "toy"))

    def stop(name: str, done: int, total: int) -> None:
        if name.startswith("segment_1") and total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, BuildRequest(in_process=True), stop)
    (directory,) = (bundle.path / "engines").iterdir()
    assert {path.name for path in directory.iterdir()} == {RECEIPT_NAME, "vision.engine", "segment_0.engine"}
    assert set(build_engines(bundle, BuildRequest(in_process=True)).reused) == {"vision", "segment_0"}


def test_without_any_tensorrt(
    toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["build", str(toys["append"])]) == 2
    said = capsys.readouterr().err
    assert "no TensorRT to build engines with" in said and "pip install tensorrt-rtx-cu13==1.7.1.116" in said


def test_tensorrt_without_a_gpu_gives_way_to_rtx(rtx: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = emulator.install(monkeypatch, "10.3.0")
    assert library_for_building().name == "tensorrt"
    machine.driver = False
    assert library_for_building().name == "tensorrt_rtx"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match="tensorrt: no usable NVIDIA GPU.*tensorrt_rtx: "):
        library_for_building()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "cpu"}, "runs ONNX Runtime; it takes no engines"),
        ({"target": "agx-orin-64gb", "capabilities": ("SM86",)}, "--target and --compute-capability together"),
        ({"capabilities": ("SM87",)}, "has no compute capability SM87\n.*SM120.*\n.*on the machine itself"),
        ({"keeps": (0.5,)}, "has no keep 0.5"),
        (
            {"memory_bytes": GIB // 2},
            "building vision .0.00 GiB of weights. takes about 0.50 GiB\n.*\n.*--build-memory",
        ),
        ({"num_profiles": 3}, "--profiles is 3"),
    ],
)
def test_requests_that_cannot_be_met(rtx: ModuleType, toys: dict[str, Path], settings: dict, message: str) -> None:
    with pytest.raises((UserError, BackendError), match=message):
        build_engines(open_bundle(toys["append"]), BuildRequest(in_process=True, **settings))
    assert not (toys["append"] / "engines").exists()


def test_rtx_builds_for_the_gpu_at_hand_if_it_knows_it(rtx: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((8, 9), ("SM89",)), ((9, 0), ("SM86", "SM120"))):
        emulator.install(monkeypatch, "10.3.0", capability=capability)
        assert Library(rtx, "tensorrt_rtx").capabilities(()) == expected
    assert Library(rtx, "tensorrt_rtx").capabilities(("SM80",)) == ("SM80",)


def test_stand_ins_for_jetson(rtx: ModuleType, toys: dict[str, Path], tmp_path: Path) -> None:
    bundle = open_bundle(shutil.copytree(toys["append"], tmp_path / "toy"))
    for target, capability in (("orin-nano-8gb@jp6.2", "SM86"), ("thor-t5000@jp7.0", "SM120"), ("rtx-4090", "SM89")):
        result = build_engines(bundle, BuildRequest(target=target, in_process=True))
        assert result.receipt.capabilities == (capability,) and result.directory.name == target


def test_two_profiles_need_10_8(toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    emulator.install(monkeypatch, "10.3.0")
    with pytest.raises(UserError, match="10.3.0 can lose accuracy with two profiles"):
        build_engines(open_bundle(toys["append"]), BuildRequest(num_profiles=2, in_process=True))


def test_native_engines_are_for_the_gpu_at_hand(
    toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.install(monkeypatch, "10.3.0")
    bundle = open_bundle(shutil.copytree(toys["append"], tmp_path / "toy"))
    with pytest.raises(BackendError, match="builds for the GPU here, Emulated GPU .SM87., not for SM86"):
        build_engines(bundle, BuildRequest(capabilities=("SM86",), in_process=True))
    result = build_engines(bundle, BuildRequest(target="orin-nano-8gb@jp6.2", in_process=True))
    assert (result.directory / "timing.cache").read_bytes() == b"10.3.0"
    assert result.receipt.engines["vision"].flags == ("EXPLICIT_BATCH", "STRONGLY_TYPED", "NO_TF32")
    assert result.receipt.engines["vision"].peak_device_bytes is not None


def test_modern_graphs_are_refused_where_operators_are_missing(
    toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.install(monkeypatch, "10.13.3.9")
    bundle = open_bundle(shutil.copytree(toys["scatter"], tmp_path / "toy"))
    with pytest.raises(BackendError, match="10.13.3.9 cannot read segment_0: .*TensorScatter"):
        build_engines(bundle, BuildRequest(in_process=True))


def test_the_command_line_ends_with_engines(
    rtx: ModuleType, exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(exports.model("one key")), "--stage", "1:1:0.4", "--trt", "--out", str(tmp_path / "out"), "--json"]
    assert export_main([*words, "--quiet", "--max-tokens", "512"]) == 0
    document = json.loads(capsys.readouterr().out)
    engines = Path(document["engines"]["directory"])
    assert sorted(p.stem for p in engines.glob("*.engine")) == sorted(document["graphs"])
    manifest = manifest_of(tmp_path / "out")
    assert (manifest.dtype, manifest.lowering) == ("float16", "modern")
    assert main(["build", str(tmp_path / "out"), "--quiet"]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["build", str(tmp_path / "out"), "--memory-limit", "0", "--quiet"]) == 2
