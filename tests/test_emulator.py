"""The emulator itself: it has the surface of the version it stands for, and it catches misuse."""

from __future__ import annotations

import ctypes
import io
from types import ModuleType, SimpleNamespace

import emulator
import numpy as np
import onnx
import pytest
from emulator import Misuse
from emulator.cuda_api import cuda_runtime
from onnx import TensorProto, helper, numpy_helper

VERSION = "10.16.1.11"


def graph(scatter: bool = False) -> bytes:
    """y = x + w over [S, 64] fp16; or rows [1, 1, S, 64] scattered into a cache of 8 rows."""
    half = TensorProto.FLOAT16
    if scatter:
        shapes = {"cache": [1, 1, 8, 64], "x": [1, 1, "S", 64], "y": [1, 1, 8, 64]}
        nodes = [helper.make_node("TensorScatter", ["cache", "x", "place"], ["y"], axis=-2, name="update")]
        inputs = [helper.make_tensor_value_info(name, half, shapes[name]) for name in ("cache", "x")]
        inputs.append(helper.make_tensor_value_info("place", TensorProto.INT64, [1]))
        weights = []
    else:
        shapes = {"x": ["S", 64], "y": ["S", 64]}
        nodes = [helper.make_node("Add", ["x", "w"], ["y"], name="sum")]
        inputs = [helper.make_tensor_value_info("x", half, shapes["x"])]
        weights = [numpy_helper.from_array(np.ones(64, np.float16), "w")]
    outputs = [helper.make_tensor_value_info("y", half, shapes["y"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=10,
    )
    return model.SerializeToString()


def logger(trt: ModuleType) -> object:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: object, message: str) -> None:
            self.lines.append(message)

    return Log()


class Bench:
    """One engine on one machine, ready to be used wrongly."""

    def __init__(self, scatter: bool = False, version: str = VERSION) -> None:
        self.machine = emulator.Machine()
        self.trt, self.cuda = emulator.tensorrt(version, self.machine), cuda_runtime(self.machine)
        self.log = logger(self.trt)
        builder = self.trt.Builder(self.log)
        network = builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        assert self.trt.OnnxParser(network, self.log).parse(graph(scatter))
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        least, most = ((1, 1, 1, 64), (1, 1, 4, 64)) if scatter else ((1, 64), (4, 64))
        profile.set_shape("x", least, most, most)
        assert config.add_optimization_profile(profile) == 0
        self.blob = bytes(builder.build_serialized_network(network, config))
        self.engine = self.trt.Runtime(self.log).deserialize_cuda_engine(self.blob)
        self.context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        _, self.stream = self.cuda.cudaStreamCreateWithFlags(1)

    def memory(self, size: int = 4096) -> int:
        return self.cuda.cudaMalloc(size)[1]

    def ready(self, rows: int = 2) -> SimpleNamespace:
        """Everything set as it should be; returns the addresses."""
        self.context.set_optimization_profile_async(0, int(self.stream))
        self.context.set_input_shape("x", (rows, 64))
        assert self.context.update_device_memory_size_for_shapes() <= 4096
        self.context.set_device_memory(self.memory(), 4096)
        space = SimpleNamespace(x=self.memory(), y=self.memory())
        self.context.set_tensor_address("x", space.x)
        self.context.set_tensor_address("y", space.y)
        return space

    def run(self) -> bool:
        return self.context.execute_async_v3(int(self.stream))

    def copy(self, target: int, source: int, size: int, kind: str) -> None:
        self.cuda.cudaMemcpyAsync(target, source, size, self.kind(kind), self.stream)

    def kind(self, name: str) -> object:
        return self.cuda.cudaMemcpyKind[f"cudaMemcpy{name}"]

    def wait(self) -> None:
        self.cuda.cudaStreamSynchronize(self.stream)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_arithmetic_is_done_when_somebody_waits(bench: Bench) -> None:
    space, host = bench.ready(), np.arange(128, dtype=np.float16).reshape(2, 64)
    _, pinned = bench.cuda.cudaHostAlloc(256, 0)
    bench.copy(space.x, host.ctypes.data, 256, "HostToDevice")
    assert bench.run()
    bench.copy(pinned, space.y, 256, "DeviceToHost")
    result = np.frombuffer((ctypes.c_char * 256).from_address(pinned), np.float16).reshape(2, 64)
    assert np.isnan(result).all()  # nothing has happened yet
    bench.wait()
    assert (result == host + 1).all()


@pytest.mark.parametrize("version", emulator.VERSIONS)
def test_only_what_the_version_has(version: str) -> None:
    trt = emulator.tensorrt(version, emulator.Machine())
    assert trt.__version__ == version
    assert hasattr(trt.ICudaEngine, "get_aliased_input_tensor") == (version in ("10.16.1.11", "11.4.0.106"))
    assert hasattr(trt.ICudaEngine, "device_memory_size") == (not version.startswith("11"))
    assert hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH") == (not version.startswith("11"))
    assert not hasattr(trt, "ComputeCapability")


def test_signatures_are_checked(bench: Bench) -> None:
    assert not hasattr(bench.context, "execute_async_v2")
    with pytest.raises(AttributeError):
        bench.context.no_such_thing = 1
    with pytest.raises(AttributeError):
        bench.engine.num_io_tensors = 1
    with pytest.raises(TypeError, match="set_input_shape"):
        bench.context.set_input_shape("x", "a shape")
    with pytest.raises(TypeError, match="execute_async_v3"):
        bench.context.execute_async_v3(bench.stream)  # a handle, not a number
    with pytest.raises(TypeError, match="No constructor defined"):
        bench.trt.ICudaEngine()
    with pytest.raises(NotImplementedError, match="does not do ICudaEngine.create_engine_inspector"):
        bench.engine.create_engine_inspector()
    with pytest.raises(TypeError, match="cudaMalloc.. takes 1 arguments"):
        bench.cuda.cudaMalloc(1, 2)
    assert not hasattr(bench.cuda, "cudaNoSuchCall")


def test_a_logger_must_call_its_base(bench: Bench) -> None:
    class Careless(bench.trt.ILogger):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        bench.trt.Builder(Careless())


def test_networks_must_be_strongly_typed(bench: Bench) -> None:
    with pytest.raises(Misuse, match="not strongly typed"):
        bench.trt.Builder(bench.log).create_network(0)
    with pytest.raises(Misuse, match="flags"):
        bench.trt.Builder(bench.log).create_network(1 << 9)


def parse(bench: Bench, model: onnx.ModelProto, path: str = "") -> list[str]:
    network = bench.trt.Builder(bench.log).create_network(
        sum(1 << int(f) for f in bench.trt.NetworkDefinitionCreationFlag)
    )
    parser = bench.trt.OnnxParser(network, bench.log)
    content = io.BytesIO()
    onnx.save(model, content)
    parser.parse(content.getvalue(), path) if path else parser.parse(content.getvalue())
    return [parser.get_error(index).desc() for index in range(parser.num_errors)]


def test_the_parser_refuses_what_the_version_lacks() -> None:
    model = onnx.load_model_from_string(graph(scatter=True))
    assert "No importer registered for op: TensorScatter" in parse(Bench(version="10.13.3.9"), model)[0]
    assert parse(Bench(), model) == []
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "C"
    assert "static sequence length" in parse(Bench(), model)[0]


def test_the_parser_refuses_mixed_types(bench: Bench) -> None:
    model = onnx.load_model_from_string(graph())
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(64, np.float32), "w"))
    assert parse(bench, model) != []


@pytest.mark.parametrize("location", ["../w.bin", "/tmp/w.bin", "link.bin", "missing.bin"])
def test_weights_must_lie_beside_the_graph(bench: Bench, tmp_path, location: str) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    for path in (tmp_path / "w.bin", folder / "w.bin"):
        path.write_bytes(np.ones(64, np.float16).tobytes())
    (folder / "link.bin").symlink_to(folder / "w.bin")
    model = onnx.load_model_from_string(graph())
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for name in ("w.bin", location):
        del weight.external_data[:]
        weight.external_data.add(key="location", value=name)
        weight.external_data.add(key="length", value="128")
        errors = parse(bench, model, str(folder / "g.onnx"))
        assert (errors == []) == (name == "w.bin")


def test_dynamic_inputs_need_a_range(bench: Bench) -> None:
    builder = bench.trt.Builder(bench.log)
    network = builder.create_network(sum(1 << int(f) for f in bench.trt.NetworkDefinitionCreationFlag))
    bench.trt.OnnxParser(network, bench.log).parse(graph())
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    assert builder.build_serialized_network(network, config) is None
    profile.set_shape("x", (4, 64), (2, 64), (1, 64))
    assert config.add_optimization_profile(profile) == -1
    profile.set_shape("x", (1, 32), (2, 32), (4, 32))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is None
    assert "contradicts its shape" in bench.log.lines[-1]


def test_damaged_and_foreign_engines(bench: Bench) -> None:
    load = bench.trt.Runtime(bench.log).deserialize_cuda_engine
    assert load(b"rubbish" * 5) is None
    assert load(Bench(version="11.4.0.106").blob) is None and "of version 11.4" in bench.log.lines[-1]
    bench.machine.capability = (8, 9)
    assert load(bench.blob) is None and "compute capability" in bench.log.lines[-1]


def test_shapes_outside_the_profile(bench: Bench) -> None:
    with pytest.raises(Misuse, match="before a profile is chosen"):
        bench.context.set_input_shape("x", (2, 64))
    bench.ready()
    assert not bench.context.set_input_shape("x", (5, 64)) and not bench.context.set_input_shape("x", (2, 32))
    assert not bench.context.set_optimization_profile_async(1, int(bench.stream))


def test_everything_must_be_set_before_a_run(bench: Bench) -> None:
    assert not bench.run() and "no address" in bench.log.lines[-1]
    with pytest.raises(Misuse, match="before the shapes"):
        bench.context.update_device_memory_size_for_shapes()
    bench.context.set_optimization_profile_async(0, int(bench.stream))
    for name in "xy":
        bench.context.set_tensor_address(name, bench.memory())
    assert not bench.run() and "no shape" in bench.log.lines[-1]
    bench.context.set_input_shape("x", (2, 64))
    with pytest.raises(Misuse, match="0 bytes of device memory"):
        bench.run()


def test_addresses(bench: Bench) -> None:
    space = bench.ready(rows=4)
    with pytest.raises(Misuse, match="not aligned"):
        bench.context.set_tensor_address("x", space.x + 16)
    bench.context.set_tensor_address("x", space.y)
    with pytest.raises(Misuse, match="y and x overlap"):
        bench.run()
    small = bench.memory(256)
    bench.context.set_tensor_address("x", small)
    with pytest.raises(Misuse, match="512 bytes .* not inside live device memory"):
        bench.run()
    bench.context.set_tensor_address("x", bench.cuda.cudaHostAlloc(4096, 0)[1])
    with pytest.raises(Misuse, match="not inside live device memory"):
        bench.run()


def test_in_place_updates_share_an_address() -> None:
    bench = Bench(scatter=True)
    assert bench.engine.get_aliased_input_tensor("y") == "cache"
    bench.context.set_optimization_profile_async(0, int(bench.stream))
    bench.context.set_input_shape("x", (1, 1, 2, 64))
    bench.context.set_device_memory(bench.memory(8192), 8192)
    cache = bench.memory()
    for name, ptr in (("cache", cache), ("x", bench.memory()), ("place", bench.memory()), ("y", bench.memory())):
        bench.context.set_tensor_address(name, ptr)
    with pytest.raises(Misuse, match="y must be at the address of cache"):
        bench.run()
    bench.context.set_tensor_address("y", cache)
    assert bench.run()


def test_memory_that_is_freed(bench: Bench) -> None:
    space = bench.ready()
    bench.cuda.cudaFree(space.x)
    with pytest.raises(Misuse, match="freed twice"):
        bench.cuda.cudaFree(space.x)
    with pytest.raises(Misuse, match="not inside live"):
        bench.run()
    assert any("device memory" in leak for leak in bench.machine.leaks())
    ctypes.memset(space.y + 4096, 0, 1)
    with pytest.raises(Misuse, match="outside a block"):
        bench.cuda.cudaFree(space.y)


def test_a_full_device(bench: Bench) -> None:
    assert bench.cuda.cudaMalloc(1 << 40)[0].name == "cudaErrorMemoryAllocation"
    assert [bench.cuda.cudaGetLastError()[0].name[4:] for _ in "12"] == ["ErrorMemoryAllocation", "Success"]


def test_copies_are_checked(bench: Bench) -> None:
    ptr, host = bench.memory(512), np.zeros(512, np.uint8)
    with pytest.raises(Misuse, match="HostToDevice copy, target: 600 bytes"):
        bench.copy(ptr, host.ctypes.data, 600, "HostToDevice")
    with pytest.raises(Misuse, match="into pageable memory"):
        bench.copy(host.ctypes.data, ptr, 512, "DeviceToHost")
    wrong = bench.cuda.cudaMemcpy2DAsync(ptr, 16, ptr, 16, 32, 2, bench.kind("DeviceToDevice"), bench.stream)
    assert wrong[0].name == "cudaErrorInvalidPitchValue"


def test_pinned_memory_must_not_be_reused_too_early(bench: Bench) -> None:
    ptr, (_, pinned) = bench.memory(256), bench.cuda.cudaHostAlloc(256, 0)
    ctypes.memset(pinned, 1, 256)
    bench.copy(ptr, pinned, 256, "HostToDevice")
    ctypes.memset(pinned, 2, 256)  # the copy has not been made yet
    bench.wait()
    assert ctypes.string_at(ptr, 256) == b"\2" * 256


def capture(bench: Bench, mode: str = "Relaxed") -> None:
    bench.cuda.cudaStreamBeginCapture(bench.stream, bench.cuda.cudaStreamCaptureMode[f"cudaStreamCaptureMode{mode}"])


def test_capture_rules(bench: Bench) -> None:
    bench.ready()
    capture(bench)
    with pytest.raises(Misuse, match="captured before one was queued"):
        bench.run()
    bench.cuda.cudaStreamEndCapture(bench.stream)
    bench.run()
    capture(bench)
    bench.run()
    _, recorded = bench.cuda.cudaStreamEndCapture(bench.stream)
    _, launchable = bench.cuda.cudaGraphInstantiate(recorded, 0)
    bench.cuda.cudaGraphLaunch(launchable, bench.stream)
    bench.context.set_input_shape("x", (3, 64))
    with pytest.raises(Misuse, match="replayed after its context got other shapes"):
        bench.cuda.cudaGraphLaunch(launchable, bench.stream)
    bench.cuda.cudaGraphExecDestroy(launchable)
    with pytest.raises(Misuse, match="a destroyed graph is used"):
        bench.cuda.cudaGraphExecDestroy(launchable)


def test_what_breaks_a_capture(bench: Bench) -> None:
    capture(bench)
    assert bench.cuda.cudaStreamSynchronize(bench.stream)[0].name == "cudaErrorStreamCaptureUnsupported"
    assert bench.cuda.cudaStreamEndCapture(bench.stream)[0].name == "cudaErrorStreamCaptureInvalidated"
    capture(bench, "Global")
    assert bench.cuda.cudaMalloc(16)[0].name == "cudaErrorStreamCaptureUnsupported"
    assert bench.cuda.cudaStreamEndCapture(bench.stream)[0].name == "cudaErrorStreamCaptureInvalidated"
    assert bench.cuda.cudaStreamEndCapture(bench.stream)[0].name == "cudaErrorIllegalState"
    bench.cuda.cudaStreamDestroy(bench.stream)
    with pytest.raises(Misuse, match="no stream"):
        bench.cuda.cudaStreamSynchronize(bench.stream)
