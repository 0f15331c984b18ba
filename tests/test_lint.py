"""Lint: every rule fires on a small graph made to break it and stays silent on one that does not; bundles and files."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import onnx
import pytest
from bundle_factory import small_bundle
from lint_graphs import PAIRS, Pair, attention, model, reduce, scatter, unary

from lightkv_export.cli import main
from lightkv_export.errors import UserError
from lightkv_export.lint import ERROR, RULES, Finding, check_view, context_for, graphs_of, lint_graphs, view_of
from lightkv_export.lint.engine import first_version_with, op_table
from lightkv_export.targets import target_names


def findings(text: str, target: str, opset: int = 20) -> list[Finding]:
    return check_view(view_of(model(text, opset), "g"), context_for(target))


BY_FILE = {"opset", "opset-too-old", "file-size", "external-data"}  # these need a header or a file: tests below


def ids(pair: Pair) -> str:
    return f"{pair.rule}-{pair.target}"


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.rule not in BY_FILE], ids=ids)
def test_a_rule_fires_where_it_must_and_only_there(pair):
    fires, silent = (18, 17) if pair.opset == 0 else (pair.opset,) * 2
    found = [item for item in findings(pair.fires, pair.target, fires) if item.rule == pair.rule]
    assert found and all(item.message and item.graph == "g" for item in found)
    assert found[0].severity == next(rule.severity for rule in RULES if rule.name == pair.rule)
    assert pair.rule not in {item.rule for item in findings(pair.silent, pair.target, silent)}


def test_every_rule_has_such_graphs():
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names) and set(names) == {pair.rule for pair in PAIRS}


@pytest.mark.parametrize(("opset", "rule"), [(24, "opset"), (8, "opset-too-old"), (20, None)])
def test_opsets_are_compared_with_the_table(opset, rule):
    found = {item.rule for item in findings(unary("Relu", "float"), "trt10.3", opset)}
    assert found == ({rule} if rule else set())


def test_a_version_without_a_documented_opset_takes_any():
    assert findings(unary("Relu"), "trt10.13", 25) == []


def test_findings_name_node_operator_and_hint():
    (found,) = [item for item in findings(reduce("ReduceMax", dtype="bool"), "trt10.3") if item.rule == "dtype"]
    assert (found.node, found.op, found.severity) == ("y", "ReduceMax", ERROR) and "cast to int32" in found.message
    (found,) = [item for item in findings(attention(), "trt10.3", 24) if item.rule == "operator"]
    assert "first in 10.14" in found.message and "function" in found.message


def test_subgraphs_are_checked():
    text = """g (bool c, float16[1,S] x) => (float16[1,S] y) {
        y = If (c) <then_branch = a () => (float16[1,S] p) { p = Elu(x) },
                    else_branch = b () => (float16[1,S] q) { q = com.microsoft.FastGelu(x) }> }"""
    assert [item.op for item in findings(text, "trt10.3") if item.rule == "domain"] == ["FastGelu"]


def test_axes_that_the_builder_fixes_are_fixed():
    context, graph = context_for("trt10.16"), scatter("float16[1,1,C,8]")
    assert check_view(view_of(model(graph, 24), "g", fixed_axes={"C": 128}), context) == []
    assert check_view(view_of(model(graph, 24), "g"), context) != []


# --- tables and targets ----------------------------------------------------------------------------------------------


def test_tables_grow_with_the_versions():
    assert (
        op_table((8, 5)).version == "8.6"
        and op_table((11, 4)).version == "11.1"
        and op_table((10, 5)).version == "10.3"
    )
    assert "Gelu" not in op_table((8, 6)).types and "Gelu" in op_table((10, 3)).types
    assert "TensorScatter" not in op_table((10, 14)).types and "TensorScatter" in op_table((10, 15)).types
    assert op_table((10, 13)).max_opset is None and op_table((10, 16)).max_opset == 24
    assert op_table((10, 0)).constant_inputs["Slice"] == (3,) and op_table((10, 3)).constant_inputs["Slice"] == ()
    assert first_version_with("Attention") == "10.14" and first_version_with("Nothing") == ""


@pytest.mark.parametrize("name", ["trt10.3", "TRT11.4", "tensorrt8.6", *target_names()[::9]])
def test_targets_and_versions_are_contexts(name):
    context = context_for(name)
    assert (context.table is None) == (context.version is None)


def test_an_unknown_target_is_an_error():
    with pytest.raises(UserError, match="there is no target"):
        context_for("trt")


# --- files -----------------------------------------------------------------------------------------------------------


def external(folder: Path, location: str, length: int = 8) -> Path:
    """A graph whose weight lies at `location`, as written there."""
    proto = model("g (float16[1,4] x) => (float16[1,4] y) <float16[4] w = {1,1,1,1}> { y = Mul(x, w) }")
    weight = proto.graph.initializer[0]
    weight.ClearField("float_data")
    weight.ClearField("int32_data")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "g.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("../w.bin", "outside"),
        ("/w.bin", "outside"),
        ("weights/link.bin", "symbolic link"),
        ("weights/missing.bin", "missing"),
        ("weights/short.bin", "4 bytes, but 8"),
        ("weights/w.bin", ""),
    ],
)
def test_external_data_must_lie_beside_the_model(tmp_path, location, said):
    path = external(tmp_path / "onnx", location)
    weights = tmp_path / "onnx" / "weights"
    weights.mkdir()
    (weights / "w.bin").write_bytes(bytes(8))
    (weights / "short.bin").write_bytes(bytes(4))
    (weights / "link.bin").symlink_to(weights / "w.bin")
    found = lint_graphs(graphs_of(path), context_for("trt10.3"))
    assert [item.rule for item in found] == (["external-data"] if said else []) and (
        not said or said in found[0].message
    )
    assert (lint_graphs(graphs_of(path), context_for("cpu")) == []) == (not said)


def test_a_large_file_is_warned_of(tmp_path, monkeypatch):
    path = external(tmp_path, "w.bin")
    (tmp_path / "w.bin").write_bytes(bytes(8))
    monkeypatch.setattr("lightkv_export.lint.shapes.MAX_FILE_BYTES", 4)
    assert [item.rule for item in lint_graphs(graphs_of(path), context_for("trt10.3"))] == ["file-size"]


def test_weights_are_not_read(tmp_path):
    """External data that is a hole of 1 TiB costs nothing."""
    path = external(tmp_path, "w.bin")
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(2**40)
    assert lint_graphs(graphs_of(path), context_for("trt10.3")) == []


def test_what_is_no_graph_is_said(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(UserError, match="no ONNX model"):
        lint_graphs(graphs_of(tmp_path / "text.onnx"), context_for("trt10.3"))
    with pytest.raises(UserError, match="does not exist"):
        graphs_of(tmp_path / "nothing.onnx")


def test_the_graphs_of_a_bundle_are_built_with_its_capacity(tmp_path):
    bundle = small_bundle(tmp_path / "bundle")
    graphs = graphs_of(bundle.path)
    assert [item.name for item in graphs] == [item.name for item in bundle.manifest.graphs]
    assert all(item.fixed_axes == {"C": bundle.manifest.max_tokens} for item in graphs)
    assert graphs_of(bundle.path, 32)[0].fixed_axes == {"C": 32}


# --- our own graphs --------------------------------------------------------------------------------------------------


FP16 = {"portable": {"dtype": "fp16", "lowering": "portable"}, "modern": {"dtype": "fp16"}}  # as in test_export.py


@pytest.mark.parametrize(
    ("lowering", "targets"),
    [
        ("portable", "trt10.3 trt10.13 orin-nano-8gb@jp6.2 thor-t5000@jp7.0 agx-orin-64gb@jp7.2.2+trt11 cpu"),
        ("modern", "trt10.16 trt11.4 agx-orin-64gb@jp7.2 rtx-5090 cpu"),
    ],
)
def test_our_graphs_pass_for_the_targets_of_their_lowering(exports, lowering, targets):
    graphs = graphs_of(exports.bundle("tied", **FP16[lowering]))
    assert {item.name.partition("_")[0] for item in graphs} == {"vision", "segment", "stage"}
    for target in targets.split():
        assert lint_graphs(graphs, context_for(target)) == []


def test_our_portable_graphs_say_why_they_are_not_for_86(exports):
    """Reductions with axes as an input (opset 18) and Gelu (opset 20): that is all."""
    found = lint_graphs(graphs_of(exports.bundle("tied", **FP16["portable"])), context_for("trt8.6"))
    errors = [item for item in found if item.severity == ERROR]
    assert errors and {item.rule for item in errors} <= {"reduce-axes-input", "operator"}
    assert {item.op for item in errors} <= {"ReduceMean", "ReduceMax", "ReduceMin", "Gelu"}


def test_our_modern_graphs_are_not_for_103(exports):
    found = lint_graphs(graphs_of(exports.bundle("tied", **FP16["modern"])), context_for("trt10.3"))
    assert {"Attention", "TensorScatter", "RMSNormalization", "RotaryEmbedding"} <= {item.op for item in found}


@pytest.mark.parametrize("lowering", FP16)
def test_the_real_parser_takes_our_graphs(exports, capsys, lowering):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install lightkv-export[trt]")
    path = str(exports.bundle("tied", **FP16[lowering]))
    assert main(["lint", path, "--target", "trt11.4", "--parser", "rtx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


# --- command line ----------------------------------------------------------------------------------------------------


def save(folder: Path, text: str, opset: int = 20) -> str:
    path = folder / "g.onnx"
    path.write_bytes(model(text, opset).SerializeToString())
    return str(path)


def test_the_command_says_what_was_checked(tmp_path, capsys):
    path = save(tmp_path, scatter("float16[1,1,C,8]"), 24)
    assert main(["lint", path, "--target", "trt10.16", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["target"], document["table"], document["graphs"]) == ("trt10.16", "10.16", ["g"])
    assert set(document["findings"][0]) == {field.name for field in dataclasses.fields(Finding)}
    assert main(["lint", path, "--target", "trt10.16", "--capacity", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    assert main(["lint", path, "--target", "trt10.16"]) == 1
    assert "tensor-scatter" in capsys.readouterr().out


def test_warnings_alone_do_not_fail(tmp_path, capsys):
    assert main(["lint", save(tmp_path, unary("Relu"), 24), "--target", "trt10.3"]) == 0
    assert "opset 24" in capsys.readouterr().out


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    path = save(tmp_path, unary("Relu"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert main(["lint", path, "--target", "trt10.3", "--parser", "rtx"]) == 2
    assert "lightkv-export[trt]" in capsys.readouterr().err


def test_the_real_parser_agrees(tmp_path, capsys):
    """TensorRT-RTX refuses what the static rules refuse, and names the node."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install lightkv-export[trt]")
    path = save(tmp_path, scatter("float16[1,1,C,8]"), 24)
    assert main(["lint", path, "--target", "trt11.4", "--parser", "rtx", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    (verdict,) = [item for item in document["findings"] if item["rule"] == "rtx-parser"]
    assert verdict["op"] == "TensorScatter" and "static sequence length" in verdict["message"]
    assert "CUDA driver" not in verdict["message"] and document["parser"]["name"] == "tensorrt_rtx"
    assert main(["lint", path, "--target", "trt11.4", "--parser", "rtx", "--capacity", "64", "--json"]) == 0
