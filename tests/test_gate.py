"""The gate fails where it must: each test breaks one thing in a whole, rightly hashed bundle, then runs `lightkv
verify`."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from conftest import MODELS, Exports, repack  # noqa: E402
from models import make_llava  # noqa: E402

from lightkv_export.bundle import open_bundle  # noqa: E402
from lightkv_export.cli import main  # noqa: E402
from lightkv_export.weights import read_header  # noqa: E402

VERIFY = ["--new-tokens", "8", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def whole(exports: Exports) -> Path:
    return exports.bundle("one key")


def verified(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    """Exit status and JSON document of `lightkv verify`, after a look at everything that it wrote."""
    junit = tmp_path / "junit.xml"
    status = main(["verify", str(bundle), *VERIFY, "--json", "-", "--junit", str(junit)])
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # nothing else, and no NaN
    failed = [check for check in document["checks"] if not check["passed"]]
    assert document["passed"] == (not failed) == (status == 0)
    suite = ET.parse(junit).getroot()
    assert suite.tag == "testsuite" and int(suite.get("tests")) == len(document["checks"]) == len(suite)
    assert int(suite.get("failures")) == len(failed) == len(suite.findall("testcase/failure"))
    assert json.loads((bundle / "report.json").read_text())["verify"] == document
    return status, document


def test_a_whole_bundle_passes(whole, tmp_path, capsys):
    bundle = repack(whole, tmp_path / "bundle")
    (bundle / "report.json").write_text('{"bench": {"kept": true}}')
    status, document = verified(bundle, tmp_path, capsys)
    assert status == 0 and len(document["checks"]) > 30
    assert json.loads((bundle / "report.json").read_text())["bench"] == {"kept": True}
    open_bundle(bundle)  # the report is no part of what is hashed
    assert main(["verify", str(bundle), *VERIFY, "--json", str(tmp_path / "checks.json")]) == 0
    captured = capsys.readouterr()
    assert json.loads((tmp_path / "checks.json").read_text()) == document
    assert f"{len(document['checks'])} checks passed, 0 failed" in captured.out


def scaled(file: str, tensor: str, factor: float, elements: slice) -> Callable[[Path], None]:
    """An edit: multiplies elements of a stored float32 tensor by `factor`."""

    def edit(root: Path) -> None:
        path = root / "onnx" / "weights" / file
        (ref,) = (ref for name, ref in read_header(path).items() if name.endswith(tensor))
        values = np.memmap(path, np.float32, "r+", ref.offset, ref.shape).reshape(-1)
        values[elements] *= factor
        values.flush()

    return edit


ALL = slice(None)
WEIGHTS = {
    "one row of an output projection lost": ("segment_0.safetensors", "1.self_attn.o_proj.weight", 0, slice(0, 96)),
    "a norm one percent off": ("segment_0.safetensors", "0.input_layernorm.weight", 1.01, ALL),
    "one element of a norm a tenth off": ("segment_1.safetensors", "2.post_attention_layernorm.weight", 1.1, slice(1)),
    "the projector's bias lost": ("vision.safetensors", "linear_2.bias", 0, ALL),
    "the embedding one percent off": ("embedding.safetensors", "embed_tokens.weight", 1.01, ALL),
    "not a number": ("segment_1.safetensors", "language_model.norm.weight", np.nan, slice(1)),
}


@pytest.mark.parametrize("defect", WEIGHTS)
def test_a_wrong_weight_fails(whole, tmp_path, capsys, defect):
    bundle = repack(whole, tmp_path / "bundle", scaled(*WEIGHTS[defect]))
    status, document = verified(bundle, tmp_path, capsys)
    assert status == 1
    failed = {check["metric"] for check in document["checks"] if not check["passed"]}
    assert "logits, largest difference" in failed
    assert "cache bytes" not in failed


def with_initializer(file: str, change: Callable[[list], None]) -> Callable[[Path], None]:
    """An edit: lets `change` alter the initializers of a graph."""

    def edit(root: Path) -> None:
        path = root / "onnx" / file
        model = onnx.load(path, load_external_data=False)
        change(model.graph.initializer)
        path.write_bytes(model.SerializeToString())

    return edit


def stage_file(bundle: Path) -> str:
    (name,) = {stage.graph for keep in open_bundle(bundle).manifest.keeps for stage in keep.stages}
    return f"{name}.onnx"


def test_a_wrong_stage_constant_fails_below_keep_1_alone(whole, tmp_path, capsys):
    """Two tokens exchange their places in the windows' table."""

    def exchange(initializers: list) -> None:
        table = max(
            (item for item in initializers if item.data_type == onnx.TensorProto.INT64),
            key=lambda item: np.prod(item.dims),
        )
        values = onnx.numpy_helper.to_array(table).copy().reshape(-1)
        values[[3, 40]] = values[[40, 3]]
        assert values[3] != values[40]
        table.CopyFrom(onnx.numpy_helper.from_array(values.reshape(tuple(table.dims)), table.name))

    bundle = repack(whole, tmp_path / "bundle", with_initializer(stage_file(whole), exchange))
    status, document = verified(bundle, tmp_path, capsys)
    assert status == 1
    failed = [check for check in document["checks"] if not check["passed"]]
    assert {check["keep"] for check in failed} == {open_bundle(whole).manifest.default_keep}
    assert "text only" not in {check["case"] for check in failed}  # where no stage runs


def test_a_stage_of_other_windows_fails(whole, tmp_path, capsys):
    """The manifest says 1 window of 64 tokens; the graph has the shapes of that, and merges in another order."""
    manifest = open_bundle(whole).manifest
    keep = manifest.keep_named()
    (plan,) = keep.plans
    plan = replace(plan, stages=tuple(replace(stage, windows_per_side=2) for stage in plan.stages))
    other = replace(keep, plans=(plan,))
    bundle = repack(whole, tmp_path / "bundle", keeps=tuple(other if k == keep else k for k in manifest.keeps))
    status, document = verified(bundle, tmp_path, capsys)
    assert status == 1
    assert {check["keep"] for check in document["checks"] if not check["passed"]} == {keep.requested}


def test_exchanged_stages_fail(exports, tmp_path, capsys):
    """Graphs that do not fit together are a failed check, not a crash."""
    source = exports.bundle("grouped")
    first, second = (f"onnx/{stage.graph}.onnx" for stage in open_bundle(source).manifest.keep_named().stages)

    def exchange(root: Path) -> None:
        (root / first).rename(root / "other")
        (root / second).rename(root / first)
        (root / "other").rename(root / second)

    status, document = verified(repack(source, tmp_path / "bundle", exchange), tmp_path, capsys)
    assert status == 1
    failed = [check for check in document["checks"] if not check["passed"]]
    assert {check["metric"] for check in failed} == {"the graphs run"}
    assert all("ONNX Runtime failed in stage_" in check["note"] for check in failed)


@pytest.mark.parametrize("policy", ["original", "contiguous"])
def test_another_position_policy_than_the_recipes_fails(whole, tmp_path, capsys, policy):
    status, _ = verified(repack(whole, tmp_path / "bundle", positions=policy), tmp_path, capsys)
    assert status == 1


def test_another_stop_token_fails(whole, tmp_path, capsys):
    """A token of the answer is taken for the end of it."""
    from lightkv_export.runtime import load
    from lightkv_export.verify import CASES

    said = load(whole, threads=1).run(CASES[0].turns[0][0], keep=1.0, max_new_tokens=8).token_ids
    status, document = verified(repack(whole, tmp_path / "bundle", eos_token_ids=(said[2],)), tmp_path, capsys)
    assert status == 1
    assert "tokens of generate" in {check["metric"] for check in document["checks"] if not check["passed"]}


@pytest.mark.parametrize(("place", "length"), [(0, 8), (5, 8), (5, 5), (8, 9)])
def test_other_tokens_than_generates_fail(whole, tmp_path, capsys, monkeypatch, place, length):
    """Hugging Face says something else at `place`, or more, or less."""
    from lightkv_export.reference import Reference

    real = Reference.generate

    def generate(self, prompt, max_new_tokens):
        tokens = [*real(self, prompt, max_new_tokens), 7][:length]
        return [token if at != place else (token + 1) % 1024 for at, token in enumerate(tokens)]

    monkeypatch.setattr(Reference, "generate", generate)
    status, document = verified(repack(whole, tmp_path / "bundle"), tmp_path, capsys)
    assert status == 1
    failed = [check for check in document["checks"] if not check["passed"]]
    assert {check["metric"] for check in failed} == {"tokens of generate"}
    assert all(check["note"] == f"part at new token {min(place, length, 8)}" for check in failed)


def test_a_repetition_penalty_is_no_part_of_the_model(whole, exports, tmp_path, capsys):
    model = shutil.copytree(exports.model("one key"), tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 1.5, "temperature": 0.1, "do_sample": True}
    (model / "generation_config.json").write_text(json.dumps(settings))
    assert main(["verify", str(repack(whole, tmp_path / "bundle")), *VERIFY, "--reference", str(model)]) == 0


def test_other_pixels_fail(whole, tmp_path, capsys):
    preprocess = open_bundle(whole).manifest.preprocess
    settings = {**preprocess.settings, "image_mean": [0.5, 0.5, 0.5]}
    bundle = repack(whole, tmp_path / "bundle", preprocess=replace(preprocess, settings=settings))
    status, document = verified(bundle, tmp_path, capsys)
    assert status == 1
    assert "text only" not in {check["case"] for check in document["checks"] if not check["passed"]}


def test_another_reference_fails(whole, exports, tmp_path, capsys):
    other = make_llava(tmp_path / "other", **{**MODELS["one key"].model, "seed": 77})
    assert main(["verify", str(repack(whole, tmp_path / "bundle")), *VERIFY, "--reference", str(other)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_looser_tolerance_of_the_recipe_is_honoured(whole, tmp_path, capsys):
    source = dict(open_bundle(whole).manifest.source)
    loose = {"float32.logits": 1e9, "float32.logits_share": 1e9, "float32.top1": 0, "float32.tie": 1e9}
    edit = scaled(*WEIGHTS["a norm one percent off"])
    bundle = repack(whole, tmp_path / "bundle", edit, source={**source, "tolerances": loose})
    assert verified(bundle, tmp_path, capsys)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new-tokens", "0"], "0 new tokens"),
        (["--threads", "0"], "threads is 0"),
        (["--reference", "no-such-model"], "unknown model 'no-such-model'"),
        (["--junit", "no/such/folder/junit.xml"], "cannot write no/such/folder/junit.xml"),
    ],
)
def test_mistakes_are_status_2(whole, capsys, arguments, message):
    assert main(["verify", str(whole), "--new-tokens", "1", "--threads", "1", "--quiet", *arguments]) == 2
    assert message in capsys.readouterr().err
