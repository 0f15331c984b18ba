"""TensorRT engines of a bundle: what they are built from, how they are built, and the receipts without which none is
loaded.

| module | what it does |
|---|---|
| `cuda` | CUDA runtime calls with checked errors |
| `library` | finds `tensorrt` or `tensorrt_rtx` and says what it can do |
| `profiles` | input ranges and cache capacities of every engine, from the manifest alone |
| `compiler` | one ONNX graph -> one serialized engine |
| `worker` | runs the compiler in a process of its own, so that its memory is counted and given back |
| `receipt` | what was built from what; the check before an engine is loaded |

No torch; `onnx` only where a cache capacity is written into a graph.
"""
