"""Targets, fit, advice and the roofline: the catalogue is consistent, refusals say why, predictions meet what others
published, and advice that is given makes it fit."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest

from lightkv_export.advice import Setting, advise
from lightkv_export.cli import main
from lightkv_export.cli import plan as command
from lightkv_export.errors import UserError
from lightkv_export.fit import BUILD_COPIES, BUILD_FIXED, Precision, memory, predict, segment_lengths
from lightkv_export.recipe import load_recipe
from lightkv_export.schedule import Plan, Request, plan, schedule_from_keep
from lightkv_export.targets import devices, load_target, release_of_l4t, target_names

GIB = 2**30
WITHIN = 0.35


def planned(model: str, keep: float = 1.0, **request: int) -> Plan:
    recipe = load_recipe(model)
    return plan(recipe, schedule_from_keep(recipe, keep), Request(**request))


# --- catalogue -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", target_names())
def test_every_target_is_consistent(name):
    target = load_target(name)
    assert target.name == name and 0 < target.available_bytes < target.device.memory_gib * GIB
    assert target.device.bandwidth_gbps > 0 and target.device.fp16_tflops > 0 and target.device.source
    assert {"fp32", "fp16", "int8"} <= set(target.precisions)
    assert target.lowering == ("modern" if target.version is None or target.version >= (10, 15) else "portable")
    assert 0 < target.efficiency.bandwidth <= 1 and 0 < target.efficiency.compute <= 1


def test_the_boards_and_releases_of_the_specification_exist():
    names = set(target_names())
    orin = ["orin-nano-4gb", "orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb"]
    assert {f"{board}@jp{jp}" for board in orin for jp in ("5.1", "6.0", "6.1", "6.2", "6.2.2", "7.2")} <= names
    assert {f"thor-t5000@jp{jp}" for jp in ("7.0", "7.1", "7.2")} | {"thor-t4000@jp7.1"} <= names
    assert {"agx-orin-64gb@jp7.2.2+trt11", "orin-nano-8gb-super@jp6.2", "rtx-4090", "h100", "cpu"} <= names
    assert not {"orin-nano-8gb@jp7.0", "thor-t5000@jp6.2", "thor-t4000@jp7.0", "orin-nano-8gb-super@jp6.0"} & names


@pytest.mark.parametrize(
    ("name", "tensorrt", "lowering"),
    [
        ("orin-nano-8gb@jp6.0", "8.6.2", "portable"),
        ("orin-nano-8gb@jp6.2.1", "10.3.0", "portable"),
        ("thor-t5000@jp7.0", "10.13.3", "portable"),
        ("agx-orin-64gb", "10.16.2", "modern"),
        ("Thor-T5000@jp7.2.2+trt11", "11.4.1", "modern"),
        ("rtx-4090@trt10.13", "10.13", "portable"),
        ("h100", "11.4", "modern"),
        ("cpu", None, "modern"),
    ],
)
def test_the_release_decides_tensorrt_and_lowering(name, tensorrt, lowering):
    target = load_target(name)
    assert (target.tensorrt, target.lowering) == (tensorrt, lowering)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("orin-nano-8g@jp6.2", "did you mean 'orin-nano-8gb'"),
        ("rtx4090", "did you mean 'rtx-4090'"),
        ("quantum", "one of: orin-nano-4gb"),
        ("orin-nano-8gb@jp7.0", "JetPack 7.0 does not exist for Jetson Orin Nano 8 GB"),
        ("orin-nano-8gb@6.2", "orin-nano-8gb@jp6.2"),
        ("h100@trt9.0", "no TensorRT version"),
        ("cpu@trt10.3", "ONNX Runtime"),
    ],
)
def test_an_unknown_target_is_explained(name, said):
    with pytest.raises(UserError) as error:
        load_target(name)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("target", "precision", "reason"),
    [
        ("agx-orin-64gb", "fp8", "has no fp8 (compute capability 8.7)"),
        ("orin-nano-8gb@jp6.2", "nvfp4", "has no nvfp4"),
        ("orin-nano-8gb@jp6.0", "int4", "TensorRT 8.6.2 takes int4 only from 10.0"),
        ("orin-nano-8gb@jp6.0", "bf16", "only from 10.0"),
        ("thor-t5000@jp7.2", "fp12", "has no fp12"),
        ("cpu", "fp8", "a CPU"),
    ],
)
def test_a_precision_that_is_missing_is_refused_with_the_reason(target, precision, reason):
    with pytest.raises(UserError) as error:
        load_target(target).check_precision(precision)
    assert reason in str(error.value) and "one of: fp32, fp16" in str(error.value)


def test_precisions_that_are_there_are_taken():
    for target, names in (("orin-nano-8gb@jp6.2", "fp16 bf16 int8 int4"), ("thor-t5000@jp7.0", "fp8 nvfp4 int4")):
        for name in names.split():
            load_target(target).check_precision(name)


@pytest.mark.parametrize(
    ("l4t", "jetpack"), [("36.4.7", "6.2"), ("36.4.0", "6.1"), ("36.3.0", "6.0"), ("36.5", "6.2.2"), ("39.2.1", "7.2")]
)
def test_jetson_linux_names_the_jetpack(l4t, jetpack):
    assert release_of_l4t(l4t).name == jetpack
    assert release_of_l4t("99.1") is None


def test_releases_that_cannot_run_the_package_are_warned_of():
    assert "Python 3.8" in " ".join(load_target("orin-nano-8gb@jp5.1").warnings)
    assert "TensorRT 8.6.2" in " ".join(load_target("orin-nano-8gb@jp6.0").warnings)
    assert not load_target("orin-nano-8gb@jp6.2").warnings


# --- prediction ------------------------------------------------------------------------------------------------------

# (target, model, weights, tokens/s, prefill of 2048 tokens in s). Five rows with the prompts of a data set; then the
# rows for 2048 cached tokens in the user guide of TensorRT Edge-LLM 0.10.0 (JetPack 7.2), "Performance Benchmarks",
# llm_bench, batch 1. The power mode is not said there; the figures of Orin Nano and NX are those of the default modes.
PUBLISHED = [
    ("orin-nano-8gb", "qwen3-vl-2b", "int4", 36, 1.0),
    ("orin-nx-16gb", "qwen3-vl-4b", "int4", 32, 1.7),
    ("orin-nx-16gb", "qwen3-vl-8b", "int4", 18, 3.1),
    ("agx-orin-64gb", "qwen3-vl-8b", "int4", 32, 1.4),
    ("thor-t5000", "qwen2.5-vl-7b", "nvfp4", 61, None),
    ("orin-nano-8gb", "qwen3-vl-2b", "int4", 32.3, 1.017),
    ("orin-nx-16gb", "qwen3-vl-2b", "int4", 52.6, 0.760),
    ("orin-nx-16gb", "qwen3-vl-4b", "int4", 29.4, 1.741),
    ("orin-nx-16gb", "qwen3-vl-8b", "int4", 17.4, 3.106),
    ("agx-orin-64gb", "qwen3-vl-2b", "int4", 88.7, 0.298),
    ("agx-orin-64gb", "qwen3-vl-4b", "int4", 50.8, 0.758),
    ("agx-orin-64gb", "qwen3-vl-8b", "int4", 30.6, 1.388),
    ("thor-t5000", "qwen3-vl-2b", "int4", 135.3, 0.145),
    ("thor-t5000", "qwen3-vl-4b", "int4", 76.3, 0.364),
    ("thor-t5000", "qwen3-vl-8b", "int4", 46.2, 0.662),
    ("thor-t5000", "qwen3-vl-8b", "nvfp4", 44.4, 0.1045),
    ("thor-t5000", "qwen2.5-vl-7b", "nvfp4", 59.2, 0.0831),
    ("dgx-spark", "qwen3-vl-2b", "int4", 133.9, 0.098),
    ("dgx-spark", "qwen3-vl-4b", "int4", 73.6, 0.226),
    ("dgx-spark", "qwen3-vl-8b", "int4", 42.4, 0.381),
]


@pytest.mark.parametrize(("target", "model", "weights", "tokens_per_s", "prefill_s"), PUBLISHED)
def test_predictions_meet_published_figures(target, model, weights, tokens_per_s, prefill_s):
    request = planned(model, images=0, text_tokens=2048, new_tokens=1)
    found = predict(request, load_target(target), Precision("fp16", weights))
    assert found.tokens_per_s == pytest.approx(tokens_per_s, rel=WITHIN)
    if prefill_s is not None:
        assert found.ttft_ms == pytest.approx(1e3 * prefill_s, rel=WITHIN)


def test_one_constant_serves_a_family():
    """The devices share what their family has; Orin and Spark need only one number for both phases."""
    efficiency = {device.family: load_target(device.name).efficiency for device in devices()}
    assert all(load_target(device.name).efficiency == efficiency[device.family] for device in devices())
    for family in ("orin", "spark"):
        assert efficiency[family].bandwidth == efficiency[family].compute


def test_the_roofline_by_hand():
    """A small model on one board, computed without the module."""
    target, request = load_target("rtx-3090"), planned("llava-1.5-7b", text_tokens=64, new_tokens=10)
    found = predict(request, target, Precision("fp16"))
    decoder = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * (4096 + 128)) + 4096 * 32064)
    filled = 32 * 2 * 4096 * 2 * (576 + 64 + 5)
    assert found.tokens_per_s == pytest.approx(936e9 * 0.7 / (decoder + filled))
    cost = request.flops
    prefill = cost.vision + cost.projector + cost.prefill + cost.stages + cost.lm_head / 11
    assert found.ttft_ms == pytest.approx(1e3 * prefill / (71e12 * 0.5))


def test_what_makes_it_faster_does():
    target = load_target("agx-orin-64gb")

    def speed(keep: float = 1.0, weights: str = "none", dtype: str = "fp16") -> tuple[float, float]:
        found = predict(planned("llava-1.5-7b", keep), target, Precision(dtype, weights))
        return found.tokens_per_s, -found.ttft_ms

    assert speed(0.55) > speed() and speed(0.55)[1] > speed()[1]
    assert speed(weights="int4")[0] > speed(weights="int8")[0] > speed()[0] > speed(dtype="fp32")[0]
    assert speed()[1] > speed(dtype="fp32")[1]


# --- memory and advice -----------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_checkpoint():
    """7.06 billion parameters less the embedding table, which stays on the disk."""
    need = memory(planned("llava-1.5-7b"), load_target("agx-orin-64gb"), Precision("fp16"))
    assert need.weights == pytest.approx(2 * (7.063e9 - 32064 * 4096), rel=0.01)
    assert need.kv == planned("llava-1.5-7b").kv_bytes and need.total == need.weights + need.kv + need.activations
    int4 = memory(planned("llava-1.5-7b"), load_target("agx-orin-64gb"), Precision("fp16", "int4"))
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert need.weights - int4.weights == pytest.approx(layers * (2 - 0.5 - 2 / 128), rel=1e-6)


def test_segments_are_cut_at_stages_and_again_where_a_limit_says():
    request = planned("llava-1.5-7b", 0.574)
    assert segment_lengths(request) == [13, 6, 6, 7]
    assert segment_lengths(request, 5) == [4, 4, 5, 3, 3, 3, 3, 3, 4] and segment_lengths(request, 1) == [1] * 32


def test_the_build_peak_follows_the_largest_segment():
    target, request = load_target("agx-orin-64gb"), planned("llava-1.5-7b", 0.574)
    need = memory(request, target, Precision())
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * (4096 + 128))
    assert need.build_peak == BUILD_COPIES * 13 * layer + need.activations + BUILD_FIXED
    finer = memory(request, target, Precision(), layers_per_segment=4)
    assert finer.build_peak < need.build_peak and finer.total == need.total
    assert memory(request, load_target("cpu"), Precision()).build_peak == 0


def test_the_portable_lowering_holds_its_scores():
    request = planned("llava-1.5-7b", text_tokens=2048)
    portable = memory(request, load_target("agx-orin-64gb@jp6.2"), Precision()).activations
    assert portable > memory(request, load_target("agx-orin-64gb@jp7.2"), Precision()).activations + 32 * 2048**2 * 4


@pytest.mark.parametrize(
    ("target", "model", "keep", "request_changes", "wanted"),
    [
        ("orin-nx-16gb", "llava-1.5-7b", 0.55, {}, {"layers_per_segment", "keep", "weights"}),
        ("orin-nano-8gb@jp6.2", "llava-1.5-7b", 0.55, {}, {"weights"}),
        ("orin-nano-8gb", "qwen2.5-vl-7b", 1.0, {}, {"weights", "layers_per_segment"}),
        ("orin-nx-16gb-super", "llava-1.5-7b", 0.4, {"new_tokens": 6000}, {"new_tokens"}),
    ],
)
def test_advice_that_is_given_makes_it_fit(target, model, keep, request_changes, wanted):
    setting, where = Setting(planned(model, keep, **request_changes), Precision()), load_target(target)
    given = advise(setting, where)
    assert not setting.fits(where) and wanted <= {name for item in given for name in item.changes}
    for item in given:
        assert max(item.total, item.build_peak) <= where.available_bytes and item.text
        assert applied(setting, item.changes).memory(where).total == item.total


def applied(setting: Setting, changes: dict) -> Setting:
    recipe, request = setting.plan.recipe, setting.plan.request
    request = dataclasses.replace(request, new_tokens=changes.get("new_tokens", request.new_tokens))
    keep = changes.get("keep")
    schedule = setting.plan.schedule if keep is None else schedule_from_keep(recipe, keep)
    precision = dataclasses.replace(setting.precision, weights=changes.get("weights", setting.precision.weights))
    return Setting(plan(recipe, schedule, request), precision, changes.get("layers_per_segment"))


def test_a_hopeless_case_is_called_so():
    (only,) = advise(Setting(planned("llava-1.5-13b"), Precision()), load_target("orin-nano-4gb"))
    assert not only.changes and "smaller model" in only.text


def test_what_fits_needs_no_advice():
    assert advise(Setting(planned("tiny-llava"), Precision()), load_target("orin-nano-4gb@jp6.2")) == []


# --- command line ----------------------------------------------------------------------------------------------------


def run_plan(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["plan", *arguments]))


def test_plan_with_a_target_adds_to_the_document(capsys):
    assert run_plan("llava-1.5-7b", "--keep", "0.55", "--target", "orin-nx-16gb@jp6.2", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {"weights", "kv", "activations", "build_peak", "total"} <= set(document["memory"])
    assert document["memory"]["kv"] == document["kv_bytes"] and document["fits"] is False
    assert document["advice"][0]["changes"] and document["advice"][0]["text"]
    assert set(document["predicted"]) >= {"ttft_ms", "tokens_per_s"} and document["target"]["tensorrt"] == "10.3.0"
    assert run_plan("llava-1.5-7b", "--keep", "0.55", "--json") == 0
    assert "memory" not in json.loads(capsys.readouterr().out)


def test_plan_with_a_target_shows_a_table(capsys):
    assert run_plan("llava-1.5-7b", "--keep", "0.55", "--target", "orin-nano-8gb@jp6.2") == 0
    printed = capsys.readouterr().out
    for expected in ("does not fit", "it would fit with --weights int4", "predicted: first token after", "tokens/s"):
        assert expected in printed
    assert run_plan("llava-1.5-7b", "--keep", "0.55", "--target", "orin-nano-8gb@jp6.2", "--weights", "int4") == 0
    assert "portable lowering: fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "int4"], "without a target"),
        (["--target", "agx-orin-64gb", "--weights", "fp8"], "has no fp8"),
        (["--target", "orin-nano-8gb@jp6.0", "--dtype", "bf16"], "only from 10.0"),
        (["--target", "agx"], "did you mean 'agx-orin-32gb'"),
    ],
)
def test_plan_refuses_what_the_target_lacks(arguments, said):
    with pytest.raises(UserError) as error:
        run_plan("llava-1.5-7b", "--keep", "0.55", *arguments)
    assert said in str(error.value)


def test_targets_lists_every_target(capsys):
    assert main(["targets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["targets"]
    assert [item["name"] for item in listed] == target_names()
    assert main(["targets"]) == 0
    printed = capsys.readouterr().out
    assert all(device.name in printed for device in devices())
