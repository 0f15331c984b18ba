"""`lightkv bench` on small bundles: figures of every keep, pictures of the size that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_sizes import SizedToy

from lightkv_export.cli import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SizedToy().bundle(tmp_path_factory.mktemp("toy") / "bundle").path


def document(capsys: pytest.CaptureFixture[str], bundle: Path, *words: str) -> dict:
    common = ["--json", "--quiet", "--threads", "1", "--runs", "1", "--warmup", "0", "--new-tokens", "2"]
    assert main(["bench", str(bundle), *common, *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_pictures_have_the_size_that_is_asked_for(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {name: document(capsys, bundle, *words) for name, words in SIZES.items()}
    assert {name: figures["request"]["image_size"] for name, figures in found.items()} == {name: name for name in SIZES}
    tokens = {name: figures["keeps"][0]["prompt_tokens"] for name, figures in found.items()}
    assert tokens["16x8"] - tokens["8x8"] == 24 - 16 and tokens["8x16"] > tokens["8x8"] + 16
    for figures in found.values():
        caches = {keep["keep"]: keep["kv_bytes"] for keep in figures["keeps"]}
        assert caches.keys() == {1.0, 0.83, 0.9} and caches[0.83] < caches[1.0]
    assert json.loads((bundle / "report.json").read_text())["bench"] == found["8x16"]


SIZES = {"8x8": (), "16x8": ("--image-size", "16x8"), "8x16": ("--image-size", "8x16")}


def test_a_size_that_the_bundle_lacks(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(bundle), "--image-size", "64x64", "--quiet"]) == 2
    assert "no image size 64x64" in capsys.readouterr().err
