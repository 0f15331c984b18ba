"""Build one full-size segment of llava-1.5-7b with synthetic weights by the TensorRT that is installed; measure time
and memory.

    python scripts/build_full_segment.py --layers 6 --lowering modern

Needs the `export` extra and `tensorrt` with a GPU or `tensorrt_rtx` (no GPU). Disk: about 2.4 times the weights (0.4
GB per layer in fp16). The engine is built in a process of its own, whose peak memory is reported. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np

from lightkv_export.cli.console import print_table, progress
from lightkv_export.engines.library import library_for_building
from lightkv_export.engines.profiles import Range, axes_profile
from lightkv_export.engines.worker import Job, compile_in_process
from lightkv_export.recipe import TextShape, load_recipe
from lightkv_export.weights import SAFETENSORS_FROM_TORCH, TensorRef

GIB, SLICE_BYTES = 1 << 30, 64 << 20


def main() -> None:
    """Trace, write weights, build, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="decoder layers of the segment (default: %(default)s)")
    parser.add_argument("--lowering", choices=("modern", "portable"), default="modern")
    parser.add_argument("--rows", type=int, default=2048, help="cache rows (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=1088, help="most tokens at once (default: %(default)s)")
    parser.add_argument("--profiles", type=int, choices=(1, 2), default=1, help="2: decode and prefill apart")
    parser.add_argument("--compute-capability", action="append", metavar="SM", help="default: SM86 and SM120")
    parser.add_argument("--work", type=Path, help="directory for the files (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as directory, progress() as on_step:
        print(json.dumps(measure(args, Path(directory), on_step)))


def measure(args: argparse.Namespace, directory: Path, on_step) -> dict:
    """Everything in `directory`; returns the figures."""
    text = load_recipe("llava-1.5-7b").shape.text
    started = time.perf_counter()
    graph, weight_bytes = write_segment(directory, text, args.layers, args.lowering)
    traced_s = time.perf_counter() - started
    library = library_for_building()
    capabilities = library.capabilities(tuple(args.compute_capability or ()))
    static = args.lowering == "modern"
    rows = Range(args.rows, args.rows, args.rows) if static else Range.of(1, 640, args.rows)
    lengths = (Range(1, 1, 1), Range.of(1, 640, args.chunk))[-args.profiles :]
    profiles = tuple(axes_profile(graph, {"S": length, "C": rows}, static=static) for length in lengths)
    job = Job(
        library=library.name,
        graph=graph.name,
        onnx=directory / graph.file,
        engine=directory / "segment.engine",
        capacity=args.rows if static else None,
        profiles=profiles,
        capabilities=capabilities,
    )
    report = compile_in_process(job, on_step)
    figures = {
        "layers": args.layers,
        "lowering": args.lowering,
        "profiles": args.profiles,
        "library": f"{library.name} {library.version}",
        "capabilities": list(capabilities),
        "weight_bytes": weight_bytes,
        "engine_bytes": report.size,
        "trace_s": round(traced_s, 1),
        "build_s": round(report.build_s, 1),
        "peak_host_bytes": report.peak_host_bytes,
        "peak_device_bytes": report.peak_device_bytes,
    }
    show(figures)
    return figures


def show(figures: dict) -> None:
    """The figures as a table."""
    weights, peak = figures["weight_bytes"], figures["peak_host_bytes"]
    rows_shown = [
        ("weights, GiB", weights / GIB),
        ("engine, GiB", figures["engine_bytes"] / GIB),
        ("trace, lower and write weights, s", figures["trace_s"]),
        ("build, s", figures["build_s"]),
        ("peak memory of the build, GiB", peak / GIB),
        ("the same per byte of weights", peak / weights),
    ]
    title = f"{figures['layers']} layers of llava-1.5-7b, {figures['lowering']}, {figures['library']}"
    print_table(title, ("what", "value"), rows_shown)


def write_segment(directory: Path, text: TextShape, layers: int, lowering_name: str):
    """A middle segment (query and key handed out, no head) as onnx/segment_0.onnx; returns its Graph and bytes of
    weights."""
    import torch
    from transformers import LlavaConfig

    from lightkv_export.families import family_named
    from lightkv_export.lower import LOWERINGS, attach_weights, lower, save_graph, used_weights
    from lightkv_export.manifest import Graph
    from lightkv_export.skeleton import load_skeleton
    from lightkv_export.trace import trace_segment

    sizes = {
        "num_hidden_layers": layers + 1,  # one more, so that this segment is not the last
        "hidden_size": text.hidden,
        "intermediate_size": text.intermediate,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "vocab_size": text.vocab,
    }
    LlavaConfig(text_config={"model_type": "llama", **sizes}).save_pretrained(directory)
    skeleton = load_skeleton(directory, family_named("llava"), torch.float16)
    lowering = LOWERINGS[lowering_name]
    traced = trace_segment(skeleton, 0, (0, layers), lowering.cache_protocol, emit_query=True)
    model = lower(traced, lowering)
    onnx = directory / "onnx"
    (onnx / "weights").mkdir(parents=True)
    names = dict.fromkeys(used_weights(model, traced))
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.model.named_parameters() if name in names}
    placed = write_weights(onnx / "weights" / "segment_0.safetensors", shapes, torch.float16)
    attach_weights(model, traced, placed, onnx)
    save_graph(model, onnx / "segment_0.onnx")
    graph = Graph("segment_0", "onnx/segment_0.onnx", "segment", traced.inputs, traced.outputs, (0, layers))
    return graph, sum(ref.length for ref in placed.values())


def write_weights(path: Path, shapes: dict, dtype) -> dict:
    """Random weights N(0, 0.02) as one safetensors file, a slice at a time."""
    random, header, placed, offset = np.random.default_rng(0), {}, {}, 0
    for name, shape in shapes.items():
        length = math.prod(shape) * dtype.itemsize
        entry = {
            "dtype": SAFETENSORS_FROM_TORCH[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + length],
        }
        header[name], placed[name] = entry, TensorRef(path, offset, length, dtype, shape)
        offset += length
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    block = (random.standard_normal(SLICE_BYTES // 2, np.float32) * 0.02).astype(np.float16).tobytes()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for start in range(0, offset, SLICE_BYTES):
            file.write(block[: min(SLICE_BYTES, offset - start)])
    return {n: TensorRef(path, 8 + len(head) + r.offset, r.length, r.dtype, r.shape) for n, r in placed.items()}


if __name__ == "__main__":
    main()
