"""Run the smallest segment of a bundle in ONNX Runtime and compare it with the Hugging Face layers on the checkpoint's
weights, in float32 and eager. Made for bundles whose whole model does not fit into memory.

    python scripts/run_full_segment.py BUNDLE CHECKPOINT

Both see the same random hidden states; the reference holds one layer at a time. Memory: about three times the segment's
weights for a float16 bundle, which ONNX Runtime computes in float32 on a CPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from lightkv_export.bundle import Bundle, open_bundle
from lightkv_export.cli.console import print_table
from lightkv_export.cli.program import call_program
from lightkv_export.families import family_named
from lightkv_export.manifest import Graph
from lightkv_export.skeleton import Skeleton, checkpoint_names, load_skeleton
from lightkv_export.weights import TensorRef, read_checkpoint, slices


def main() -> int:
    """Run both sides and report; exit status 1 if they differ by more than `--limit`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--limit", type=float, default=0.01, help="largest difference, as a share of the largest value")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle, verify=False)
    segments = [graph for graph in bundle.manifest.graphs if graph.role == "segment" and not needs_more(graph)]
    graph = min(segments, key=lambda graph: graph.layers[1] - graph.layers[0])
    hidden = np.random.default_rng(0).standard_normal((1, args.tokens, graph.inputs[0].shape[2]), np.float32)
    started = time.perf_counter()
    expected = reference(args.checkpoint, bundle.manifest.family, graph.layers, torch.from_numpy(hidden))
    middle = time.perf_counter()
    found = run_graph(bundle, graph, hidden)
    figures = {
        "graph": graph.name,
        "layers": list(graph.layers),
        "tokens": args.tokens,
        "dtype": bundle.manifest.dtype,
        "largest_difference": float(np.abs(found - expected).max()),
        "largest_value": float(np.abs(expected).max()),
        "norm_of_difference": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
        "reference_s": round(middle - started, 1),
        "onnxruntime_s": round(time.perf_counter() - middle, 1),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print_table(f"{graph.name} of {args.bundle}", ("what", "value"), [(k, str(v)) for k, v in figures.items()])
    print(json.dumps(figures))
    return int(figures["largest_difference"] > args.limit * figures["largest_value"])


def needs_more(graph: Graph) -> bool:
    """Whether the segment takes DeepStack features or ends in the head: then hidden states alone say too little."""
    return any(tensor.name.startswith(("deepstack", "logits")) for tensor in graph.inputs)


@torch.no_grad()
def reference(checkpoint: Path, family_name: str, layers: tuple[int, int], hidden: torch.Tensor) -> np.ndarray:
    """Hidden states [1, S, D] behind the layers, by Hugging Face's own layers in float32."""
    stored = read_checkpoint(checkpoint)
    family = family_named(family_name)
    skeleton = load_skeleton(checkpoint, family, torch.float32, stored)
    names = checkpoint_names(skeleton.model, stored)
    length = hidden.shape[1]
    positions = torch.arange(length)[None]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    shape = (3, 1, length) if family.rope == "mrope" else (1, length)
    rotary = skeleton.text.rotary_emb(hidden, positions.expand(shape))
    for index in range(*layers):
        layer = real_layer(skeleton, index, stored, names)
        output = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden.numpy()


def real_layer(skeleton: Skeleton, index: int, stored: dict[str, TensorRef], names: dict[str, str]) -> torch.nn.Module:
    """Decoder layer `index` with its weights, float32, with eager attention."""
    fake = skeleton.text.layers[index]
    config = skeleton.text.config
    config._attn_implementation = "eager"
    with torch.device("meta"):
        layer = type(fake)(config, index)
    state = {}
    for name, whole in skeleton.weights_of(fake).items():
        ref = stored[names[whole]]
        state[name] = torch.cat(list(slices(ref, torch.float32))).reshape(ref.shape)
    layer.load_state_dict(state, assign=True)
    return layer.eval()


def run_graph(bundle: Bundle, graph: Graph, hidden: np.ndarray) -> np.ndarray:
    """The same by the graph, as float32."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns that caches are copied, which does not matter here
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    path = str(bundle.path / graph.file)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    length = hidden.shape[1]
    sizes = {"S": length, "C": length if bundle.manifest.cache_protocol == "scatter" else 0}
    inputs = {}
    for tensor in graph.inputs:
        inputs[tensor.name] = np.zeros([sizes.get(size, size) for size in tensor.shape], tensor.dtype)
    inputs["hidden"][:] = hidden
    inputs["position_ids"][:] = np.arange(length)
    return session.run(["hidden_out"], inputs)[0].astype(np.float32)


if __name__ == "__main__":
    raise SystemExit(call_program(main))
