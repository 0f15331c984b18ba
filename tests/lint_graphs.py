"""Graphs for the lint's tests, in ONNX's text form: for every rule one that breaks it and one that does not."""

from __future__ import annotations

from dataclasses import dataclass

import onnx


@dataclass(frozen=True)
class Pair:
    """A rule with a graph on which it must fire and one on which it must not, in ONNX's text form, for a target."""

    rule: str
    target: str
    fires: str
    silent: str
    opset: int = 20


def model(text: str, opset: int = 20) -> onnx.ModelProto:
    """A model from the text of its graph (and functions), without the header."""
    imports = f'"" : {opset}, "com.microsoft" : 1, "own" : 1, "other" : 1'
    return onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{imports}]>\n{text}")


def unary(op: str, dtype: str = "float16", result: str = "") -> str:
    return f"g ({dtype}[1,S] x) => ({result or dtype}[1,S] y) {{ y = {op}(x) }}"


def attention(inputs: str = "q, k, v, m", attributes: str = "", dtype: str = "float16", **changes: str) -> str:
    mask, width, outputs = (
        changes.get(name, value) for name, value in (("mask", "bool"), ("width", "32"), ("outputs", "y"))
    )
    heads = changes.get("heads", "q_num_heads = 4, kv_num_heads = 4")
    return f"""g ({dtype}[1,S,{width}] q, {dtype}[1,C,{width}] k, {dtype}[1,C,{width}] v, {mask}[1,1,S,C] m,
        {dtype}[1,4,P,8] pk, {dtype}[1,4,P,8] pv, int64[1] n) => ({dtype}[1,S,{width}] y)
        {{ {outputs} = Attention <{heads}{attributes}> ({inputs}) }}"""


def scatter(cache: str = "float16[1,1,96,8]", attributes: str = "axis = -2", rows: str = "S", **changes: str) -> str:
    dtype = cache.partition("[")[0]
    inputs = changes.get("inputs", f"{cache} c, {dtype}[1,1,{rows},8] u, int64[1] w")
    update = f"y = TensorScatter <{attributes}> (c, u, w)"
    return f"g ({inputs}) => ({cache} y) {{ {changes.get('nodes', update)} }}"


def topk(count: str = "5", attributes: str = "axis = -1", shape: str = "1,S") -> str:
    rank = shape.count(",") + 1
    out = ",".join("?" * rank)
    return f"""g (float16[{shape}] x) => (float16[{out}] y, int64[{out}] i) <int64[1] k = {{{count}}}>
        {{ y, i = TopK <{attributes}> (x, k) }}"""


def dequantize(
    kind: str = "int4", attributes: str = "axis = 0, block_size = 64", zero: str = "", **changes: str
) -> str:
    computed = changes.get("scales") == "computed"
    constants = [f"{kind}[128,8] w = {{{','.join(['1'] * 1024)}}}"]
    constants += [] if computed else [f"float16[2,8] s = {{{','.join(['1'] * 16)}}}"]
    constants += [f"{kind}[2,8] z = {{{','.join([zero] * 16)}}}"] if zero else []
    inputs, names = "float16[2,8] s" if computed else "", "w, s, z" if zero else "w, s"
    node = f"y = DequantizeLinear <{attributes}> ({names})"
    return f"g ({inputs}) => (float16[128,8] y) <{', '.join(constants)}> {{ {node} }}"


def reduce(op: str, axes: str = "constant", dtype: str = "float16") -> str:
    if axes == "constant":
        return f"g ({dtype}[1,S] x) => ({dtype}[1,1] y) <int64[1] a = {{1}}> {{ y = {op}(x, a) }}"
    if axes == "computed":
        return f"g ({dtype}[1,S] x, int64[1] a) => ({dtype}[?,?] y) {{ y = {op}(x, a) }}"
    return f"g ({dtype}[1,S] x) => ({dtype}[1,1] y) {{ y = {op} <axes = [1]> (x) }}"


def scatter_reduce(op: str, reduction: str = "", dtype: str = "float") -> str:
    attribute = f'<reduction = "{reduction}">' if reduction else ""
    shapes = ("int64[1,S,1] i", f"{dtype}[1,S] u") if op == "ScatterND" else ("int64[1,S] i", f"{dtype}[1,S] u")
    data = f"{dtype}[4]" if op == "ScatterND" else f"{dtype}[1,4]"
    return f"g ({data} x, {', '.join(shapes)}) => ({data} y) {{ y = {op} {attribute} (x, i, u) }}"


FUNCTION = '\n<domain: "own", opset_import: ["" : 20]>\nTwice (a) => (b) { b = Add(a, a) }'
CAPACITIES = "g (float16[1,1,{0},8] key_cache_0, float16[1,1,{1},8] value_cache_0) => (float16[1,1,?,8] y)"
JOIN = " { y = Concat <axis = 2> (key_cache_0, value_cache_0) }"
HUGE = "g (float16[{},65536] x) => (float16[?,?] y) {{ y = Relu(x) }}"
TWO = "g (float16[1,S] x, {}[1,S] z) => (float16[1,S] y) {{ y = Add(x, z) }}"
LAYER_NORM = "g (float16[1,S,8] x, float16[8] w) => (float16[1,S,8] y{}) {{ y{} = LayerNormalization(x, w) }}"
INT4_3D = """g (int4[2,128,8] w, float16[2,2,8] s) => (float16[2,128,8] y)
    { y = DequantizeLinear <axis = 1, block_size = 64> (w, s) }"""

PAIRS = [
    Pair("domain", "trt10.3", unary("com.microsoft.FastGelu"), unary("Gelu")),
    Pair("domain", "cpu", unary("other.Thing"), unary("com.microsoft.FastGelu")),
    Pair("local-function", "trt10.3", unary("own.Twice") + FUNCTION, unary("Relu")),
    Pair("operator", "trt10.3", attention(), unary("Gelu"), 24),
    Pair("operator", "trt8.6", unary("Gelu"), unary("Erf")),
    Pair("operator", "trt10.13", unary("Swish"), unary("own.Twice") + FUNCTION, 24),
    Pair("operator", "trt10.14", scatter(), attention(), 24),
    Pair("dtype", "trt10.3", unary("Relu", "double"), unary("Relu", "bfloat16")),
    Pair("dtype", "trt8.6", unary("Relu", "bfloat16"), unary("Neg", "int64")),
    Pair("dtype", "trt10.13", unary("Cast <to = 3>", "float16", "int8"), unary("Cast <to = 9>", "float16", "bool")),
    Pair("dtype", "trt10.16", reduce("ReduceMax", dtype="bool"), reduce("ReduceMax")),
    Pair(
        "dtype",
        "trt10.16",
        "g (bool[1,S] x) => (bool[1,?] y) <int64[4] p = {0,1,0,0}> { y = Pad(x, p) }",
        "g (float16[1,S] x) => (float16[1,?] y) <int64[4] p = {0,1,0,0}> { y = Pad(x, p) }",
    ),
    Pair(
        "dtype",
        "trt10.3",
        "g (int64[4] x) => (int64[4] y) <int64 a = {0}> { y = CumSum(x, a) }",
        "g (float16[4] x) => (float16[4] y) <int64 a = {0}> { y = CumSum(x, a) }",
    ),
    Pair("dtype", "trt10.16", dequantize("uint4"), dequantize("int4"), 21),
    Pair(
        "dtype",
        "trt10.3",
        "g (bool[1,S] c, double[1,S] x) => (double[1,S] y) { y = Where(c, x, x) }",
        "g (bool[1,S] c, float16[1,S] x) => (float16[1,S] y) { y = Where(c, x, x) }",
    ),
    Pair("opset", "trt10.3", "opset 24", "opset 20"),
    Pair("opset-too-old", "trt10.3", "opset 8", "opset 20"),
    Pair("reduce-axes-input", "trt8.6", reduce("ReduceMean"), reduce("ReduceMean", "attribute"), 0),
    Pair("constant-input", "trt10.3", reduce("ReduceSum", "computed"), reduce("ReduceSum")),
    Pair(
        "constant-input",
        "trt11.4",
        "g (int64[1,S] x, int64 d, float16[2] v) => (float16[?,?,?] y) { y = OneHot(x, d, v) }",
        "g (int64[1,S] x, float16[2] v) => (float16[?,?,?] y) <int64 d = {5}> { y = OneHot(x, d, v) }",
    ),
    Pair("extra-output", "trt10.3", LAYER_NORM.format(", float[1,S,1] m", ", m"), LAYER_NORM.format("", "")),
    Pair("int64-input", "trt8.6", unary("Neg", "int64"), unary("Neg", "int32")),
    Pair("int64-input", "trt8.6", unary("Neg", "int64"), unary("Neg")),
    Pair("attention-nonpad", "trt10.16", attention("q, k, v, m, , , n"), attention(), 24),
    Pair("attention-causal", "trt10.16", attention("q, k, v", ", is_causal = 1"), attention(), 24),
    Pair("attention-mask-causal", "trt11.4", attention(attributes=", is_causal = 1"), attention(), 24),
    Pair("attention-unsupported", "trt10.16", attention(attributes=", softcap = 2.0"), attention(), 24),
    Pair("attention-unsupported", "trt11.4", attention("q, k, v, m, pk, pv", outputs="y, a, b"), attention(), 24),
    Pair("attention-type", "trt10.16", attention(dtype="float"), attention(dtype="bfloat16"), 24),
    Pair("attention-type", "trt10.16", attention(mask="float"), attention(mask="float16"), 24),
    Pair("attention-head-size", "trt10.16", attention(width="2048"), attention(width="1024"), 24),
    Pair("tensor-scatter", "trt10.16", scatter("float16[1,1,C,8]"), scatter(), 24),
    Pair("tensor-scatter", "trt10.16", scatter("int8[1,1,96,8]"), scatter("bfloat16[1,1,96,8]"), 24),
    Pair("tensor-scatter", "trt10.16", scatter(attributes="axis = 1"), scatter(attributes="axis = 2"), 24),
    Pair("tensor-scatter", "trt10.16", scatter(attributes='axis = -2, mode = "circular"'), scatter(), 24),
    Pair("tensor-scatter", "trt11.4", scatter(nodes="d = Identity(c) y = TensorScatter(d, u, w)"), scatter(), 24),
    Pair("tensor-scatter", "trt11.4", scatter(nodes="z = TensorScatter(c, u, w) y = Relu(z)"), scatter(), 24),
    Pair(
        "tensor-scatter",
        "trt11.4",
        scatter("float16[1,96,8]", inputs="float16[1,96,8] c, float16[1,S,8] u, int64[1] w"),
        scatter(),
        24,
    ),
    Pair("tensor-scatter-length", "trt10.16", scatter(rows="97"), scatter(rows="96"), 24),
    Pair("scatternd-reduction", "trt10.3", scatter_reduce("ScatterND", "none"), scatter_reduce("ScatterND")),
    Pair("scatternd-reduction", "trt10.13", scatter_reduce("ScatterND", "add"), scatter_reduce("ScatterND", "none")),
    Pair("scatternd-reduction", "trt8.6", scatter_reduce("ScatterND", "add"), scatter_reduce("ScatterND", "none")),
    Pair(
        "scatterelements-ignored", "trt8.6", scatter_reduce("ScatterElements", "add"), scatter_reduce("ScatterElements")
    ),
    Pair(
        "scatterelements-plugin",
        "trt10.3",
        scatter_reduce("ScatterElements", "add"),
        scatter_reduce("ScatterElements", "none"),
    ),
    Pair(
        "scatterelements-fp16",
        "cpu",
        scatter_reduce("ScatterElements", "add", "float16"),
        scatter_reduce("ScatterElements", "add"),
    ),
    Pair("topk-limit", "trt10.3", topk("3841"), topk("3840")),
    Pair(
        "topk-dynamic",
        "trt10.3",
        "g (float16[1,S] x, int64[1] k) => (float16[?,?] y, int64[?,?] i) { y, i = TopK(x, k) }",
        topk(),
    ),
    Pair(
        "topk-axis",
        "trt10.3",
        topk(attributes="axis = 0", shape="8,1,1,1,S"),
        topk(attributes="axis = 1", shape="8,9,1,1,S"),
    ),
    Pair("topk-sorted", "trt10.3", topk(attributes="sorted = 0"), topk(attributes="sorted = 1")),
    Pair("data-dependent-shape", "trt10.3", "g (float16[4] x) => (int64[?,?] y) { y = NonZero(x) }", unary("Relu")),
    Pair(
        "data-dependent-shape",
        "trt10.16",
        "g (float16[4] x, bool[4] c) => (float16[?] y) { y = Compress(x, c) }",
        "g (float16[4] x, int64[2] c) => (float16[2] y) { y = Gather(x, c) }",
    ),
    Pair("zero-point", "trt10.16", dequantize(zero="1"), dequantize(zero="0"), 21),
    Pair(
        "quantize-uint8",
        "trt10.16",
        "g (float16[4] x) => (uint8[4] y) <float16 s = {1}, uint8 z = {0}> { y = QuantizeLinear(x, s, z) }",
        "g (float16[4] x) => (int8[4] y) <float16 s = {1}, int8 z = {0}> { y = QuantizeLinear(x, s, z) }",
        21,
    ),
    Pair("int4-block", "trt10.16", dequantize(attributes="axis = 0, block_size = 16"), dequantize(), 21),
    Pair("int4-block", "trt10.3", INT4_3D, dequantize(), 21),
    Pair("int4-block", "trt10.3", dequantize(scales="computed"), dequantize(), 21),
    Pair("int4-axis", "cpu", dequantize(attributes="axis = 1, block_size = 64"), dequantize(), 21),
    Pair("target-precision", "agx-orin-64gb@jp7.2", unary("Identity", "float8e4m3fn"), unary("Identity")),
    Pair("target-precision", "orin-nano-8gb@jp6.0", unary("Identity", "bfloat16"), unary("Identity")),
    Pair("mixed-types", "trt10.3", TWO.format("float"), TWO.format("float16")),
    Pair("mixed-types", "cpu", TWO.format("float"), attention(dtype="float"), 24),
    Pair("dynamic-axis", "trt10.3", "g (float16[1,W] x) => (float16[1,W] y) { y = Relu(x) }", unary("Relu")),
    Pair(
        "dynamic-axis",
        "trt10.3",
        "g (float16[?,8] pixel_values) => (float16[?,8] y) { y = Relu(pixel_values) }",
        "g (float16[W,8] pixel_values) => (float16[W,8] y) { y = Relu(pixel_values) }",  # the image sizes say what W is
    ),
    Pair("dynamic-axis", "trt10.3", "g (float16[1,?] x) => (float16[1,?] y) { y = Relu(x) }", unary("Relu")),
    Pair("cache-capacity", "trt10.16", CAPACITIES.format(96, 64) + JOIN, CAPACITIES.format(96, 96) + JOIN),
    Pair("tensor-volume", "trt10.3", HUGE.format(32768), HUGE.format(32767)),
    Pair("file-size", "trt10.3", "a large file", "a small file"),
    Pair("external-data", "trt10.3", "outside", "beside"),
]
