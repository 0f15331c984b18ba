"""`lightkv plan`: the JSON contract, the table for people, and messages for mistakes."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest

from lightkv_export.cli import plan as command
from lightkv_export.errors import UserError
from lightkv_export.recipe import load_recipe, recipe_names

TINY = load_recipe("tiny-llava")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["plan", *arguments]))


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_json_contract(capsys: pytest.CaptureFixture[str]) -> None:
    result = document(capsys, "llava-1.5-7b", "--stage", "12:4:0.5", "18:2:0.5", "--stage", "24:1:0.5")
    assert result["stages"][1] == {
        "layer": 18,
        "windows_per_side": 2,
        "discard_ratio": 0.5,
        "tokens_in": 288,
        "tokens_out": 145,
    }
    assert result["keep"] == pytest.approx(0.5749, abs=1e-4) and result["requested_keep"] is None
    assert result["vision_tokens_per_layer"] == [576] * 13 + [288] * 6 + [145] * 6 + [73] * 7
    assert result["kv_bytes"] == sum(result["kv_bytes_per_layer"]) < result["kv_bytes_vanilla"]
    assert result["flops"] == sum(result["flops_by_part"].values()) < result["flops_vanilla"]


def test_keep(capsys: pytest.CaptureFixture[str]) -> None:
    result = document(capsys, "tiny-llava", "--keep", "0.55")
    assert abs(result["keep"] - 0.55) <= 0.01 and result["requested_keep"] == 0.55 and len(result["stages"]) == 3
    uncompressed = document(capsys, "tiny-llava", "--keep", "1.0")
    assert uncompressed["stages"] == [] and uncompressed["keep"] == 1.0
    assert uncompressed["kv_bytes"] == uncompressed["kv_bytes_vanilla"]
    assert uncompressed["flops"] == uncompressed["flops_vanilla"] == result["flops_vanilla"]


def test_request_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text-tokens", "9", "--new-tokens", "5", "--batch", "2", "--images", "3", "--dtype", "fp32"]
    result = document(capsys, "tiny-llava", "--keep", "1.0", *options)
    assert result["kv_bytes"] == 12 * 2 * (3 * 576 + 9 + 5) * 2 * 6 * 32 * 4


def test_image_size(capsys: pytest.CaptureFixture[str]) -> None:
    default = document(capsys, "llava-next-vicuna-7b", "--keep", "0.55")
    assert document(capsys, "llava-next-vicuna-7b", "--keep", "0.55", "--image-size", "640x427") == default
    square = document(capsys, "llava-next-vicuna-7b", "--keep", "0.55", "--image-size", "672x672")
    assert (default["vision_tokens"], square["vision_tokens"], square["units"]) == (2144, 2928, 1)
    assert abs(square["keep"] - 0.55) <= 0.01 and square["kv_bytes"] > default["kv_bytes"]
    assert square["flops_by_part"]["vision"] == default["flops_by_part"]["vision"]  # as many tiles


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    vision = load_recipe(name).shape.vision
    result = document(capsys, name, "--keep", "0.55", "--target", "agx-orin-64gb@jp7.2")
    assert abs(result["keep"] - 0.55) <= 0.01 and result["vision_tokens"] == vision.units * vision.tokens
    assert result["vision_tokens_per_layer"][0] == result["vision_tokens"] and result["fits"]
    last = load_recipe(name).sizes[-1]
    other = document(capsys, name, "--keep", "0.55", "--image-size", last.image)
    assert other["vision_tokens"] == last.tokens * (last.units or vision.units)


def test_tokens_are_per_image_and_stages_per_unit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled = replace(TINY, shape=replace(TINY.shape, vision=replace(TINY.shape.vision, tokens=64, units=5)))
    monkeypatch.setattr("lightkv_export.families.resolve_recipe", lambda model: tiled)
    result = document(capsys, "tiles", "--stage", "4:2:0.5", "--text-tokens", "9", "--new-tokens", "1")
    assert result["stages"][0]["tokens_in"] == 64 and result["units"] == 5 and result["vision_tokens"] == 320
    left = result["stages"][0]["tokens_out"]
    assert result["vision_tokens_per_layer"] == [5 * 64] * 5 + [5 * left] * 7
    assert result["kv_bytes"] == sum(count + 10 for count in result["vision_tokens_per_layer"]) * 2 * 3 * 64 * 2
    assert run("tiles", "--stage", "4:2:0.5") == 0
    assert "1 x 320 vision tokens" in capsys.readouterr().out


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("llava-1.5-7b", "--keep", "0.574") == 0
    printed = capsys.readouterr().out
    for expected in ("keep 0.5749 (asked for 0.574)", "12", "4 x 4", "576 -> 288", "KV cache, GiB", "0.352", "0.232"):
        assert expected in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ("tiny-llama", "--keep", "0.55"),
        ("tiny-llava", "--keep", "0.1"),
        ("tiny-llava", "--keep", "55"),
        ("tiny-llava", "--stage", "4-2-0.5"),
        ("tiny-llava", "--stage", "4:2:0.6"),
        ("tiny-llava", "--stage", "11:2:0.5"),
        ("tiny-llava", "--stage", "6:2:0.5", "4:1:0.5"),
        ("tiny-llava", "--keep", "0.55", "--batch", "0"),
        ("tiny-llava", "--keep", "0.55", "--image-size", "640x480"),
        ("tiny-llava", "--keep", "0.55", "--image-size", "96"),
        ("tiny-llava", "--keep", "0.55", "--image-size", "0x96"),
        ("tiny-llava", "--keep", "0.55", "--text-tokens", "-1"),
        ("tiny-llava", "--keep", "0.55", "--new-tokens", "-1"),
    ],
)
def test_mistakes_are_user_errors(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="expected: "):
        run(*arguments)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [(), ("tiny-llava",), ("tiny-llava", "--keep", "0.5", "--stage", "4:2:0.5")])
def test_a_plan_needs_a_model_and_either_keep_or_stages(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
