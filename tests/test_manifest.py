"""Manifests: text and back without loss, and every wrong one is refused with its place named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from bundle_factory import FILES, small_bundle, small_manifest

from lightkv_export.bundle import MANIFEST_NAME, FileEntry, Keep, KeepPlan, Manifest, Size, Tensor, open_bundle
from lightkv_export.errors import BundleError, UserError
from lightkv_export.manifest_json import CHECKSUM_KEY, LINE_WIDTH, checksum, manifest_from_text, manifest_text


def _edit(path: Path, change) -> None:
    """Change the manifest's JSON and seal it again, as a careful forger would."""
    data = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    change(data)
    data.pop(CHECKSUM_KEY)
    data[CHECKSUM_KEY] = checksum(data)
    (path / MANIFEST_NAME).write_text(json.dumps(data), encoding="utf-8")


def test_manifest_round_trip():
    manifest = small_manifest(files={name: FileEntry("0" * 64, 3) for name in (*FILES, "bild/größe 画像.bin")})
    text = manifest_text(manifest)
    assert manifest_from_text(text) == manifest
    assert manifest_text(manifest_from_text(text)) == text
    assert "größe 画像" in text
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_manifest_is_readable():
    lines = manifest_text(small_manifest()).splitlines()
    assert all(line.startswith("  ") for line in lines[1:-1])
    assert any('"name": "hidden", "shape": [1, "S", 8]' in line for line in lines)
    assert max(map(len, lines)) <= LINE_WIDTH + 60  # a key and a value that fits by itself


def test_integers_may_stand_for_floats_but_not_booleans(tmp_path):
    small_bundle(tmp_path / "b")
    _edit(tmp_path / "b", lambda d: d["keeps"][0].update(requested=1))
    keep = open_bundle(tmp_path / "b").manifest.keeps[0]
    assert isinstance(keep.requested, float)
    _edit(tmp_path / "b", lambda d: d["keeps"][0].update(requested=True))
    with pytest.raises(BundleError, match=r"keeps\[0\]\.requested is true"):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(colour="red"), "unknown key 'colour'"),
        (lambda d: d["graphs"][0].update(extra=1), r"graphs\[0\] has the unknown key 'extra'"),
        (lambda d: d.pop("rope"), "lacks the key 'rope'"),
        (lambda d: d["graphs"][0]["inputs"][0].update(shape=[1.5]), r"inputs\[0\]\.shape\[0\]"),
        (lambda d: d["embedding"].update(shape=[1, 2, 3]), r"embedding\.shape"),
        (lambda d: d.update(max_tokens="many"), "max_tokens"),
        (lambda d: d.update(keeps={}), "keeps"),
        (lambda d: d.update(embedding=[]), "embedding"),
        (lambda d: d.update(lowering="portable"), "cache protocol"),
        (lambda d: d.update(dtype="fp16"), "dtype 'fp16'"),
        (lambda d: d.update(default_keep=0.3), "default_keep"),
        (lambda d: d["keeps"].pop(0), "keep 1.0"),
        (lambda d: d["keeps"][1]["plans"][0]["stages"][0].update(graph="gone"), "'gone'"),
        (lambda d: d["graphs"][2].update(layers=[3, 4]), "start at 2"),
        (lambda d: d["graphs"].pop(2), "end at layer 2"),
        (lambda d: d["graphs"][0].update(role="brain"), "'brain'"),
        (lambda d: d["graphs"][0].update(file="onnx/other.onnx"), "not listed in files"),
        (lambda d: d.update(format_version=99), "format version 99"),
        (lambda d: d.update(format_version=1), "format version 1"),
        (lambda d: d.update(sizes=[]), "no image size"),
        (lambda d: d["sizes"].append(d["sizes"][0]), "two image sizes are the same"),
        (lambda d: d["sizes"][0].update(units=0), "0 units of 16"),
        (lambda d: d["sizes"][0].update(prompt=""), "empty prompt"),
        (lambda d: d["sizes"][0].update(advance=4), "which only mRoPE"),
        (lambda d: d["sizes"][0].update(tables="sizes/56x56.npz"), "not listed in files"),
        (lambda d: d["sizes"].append({**d["sizes"][0], "width": 112, "tokens": 32}), r"no plan for 32 .*size 112x56"),
        (lambda d: d["keeps"][1]["plans"][0].update(tokens=8), "does not begin with a plan for the default"),
        (lambda d: d["keeps"][1].update(plans=[]), "does not begin with a plan for the default"),
        (lambda d: d["keeps"][1]["plans"].append(d["keeps"][1]["plans"][0]), "two plans for units of one length"),
        (lambda d: d["keeps"][1]["plans"][0]["stages"][0].update(tokens_in=9), "takes 9 vision tokens, where 16"),
        (lambda d: d.update(rope="mrope"), "only 'original' serves"),
        (lambda d: d.update(rope="mrope", positions="original"), "lacks the tables or the advance"),
        (lambda d: d.update(deepstack_layers=[0]), "no vision graph gives 'deepstack_0'"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, change, message):
    small_bundle(tmp_path / "b")
    _edit(tmp_path / "b", change)
    with pytest.raises(BundleError, match=message):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "C:/x", "a\\b", "", MANIFEST_NAME])
def test_paths_out_of_the_bundle_are_refused(tmp_path, name):
    small_bundle(tmp_path / "b")
    _edit(tmp_path / "b", lambda d: d["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(BundleError, match="names the file"):
        open_bundle(tmp_path / "b", verify=False)


def test_a_manifest_altered_by_hand_is_noticed(tmp_path):
    small_bundle(tmp_path / "b")
    file = tmp_path / "b" / MANIFEST_NAME
    file.write_text(file.read_text().replace('"image_token_id": 31', '"image_token_id": 30'))
    with pytest.raises(BundleError, match="altered after it was written"):
        open_bundle(tmp_path / "b", verify=False)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"format_version": NaN}', b"\xff\xfe", b'{"a": 1, "a": 2}']
)
def test_a_manifest_that_is_not_one(tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(BundleError, match=MANIFEST_NAME):
        open_bundle(tmp_path)


def test_values_without_a_json_word_are_refused():
    with pytest.raises(BundleError, match="cannot be written as JSON"):
        manifest_text(small_manifest(source={"x": float("nan")}))
    with pytest.raises(BundleError, match="key 0.5 is not text"):
        manifest_text(small_manifest(source={0.5: 1}))


def _with_deepstack(*layers: int) -> Manifest:
    """The small manifest with DeepStack features added after `layers`, all of segment 0."""
    manifest = small_manifest()
    inputs = tuple(Tensor(f"deepstack_{layer}", "float32", (1, "S", 8)) for layer in layers)
    vision, first, *others = manifest.graphs
    vision = dataclasses.replace(vision, outputs=(*vision.outputs, *inputs))
    first = dataclasses.replace(first, inputs=(*first.inputs, *inputs))
    return dataclasses.replace(manifest, graphs=(vision, first, *others), deepstack_layers=layers)


def test_stages_stand_behind_deepstack():
    manifest = _with_deepstack(0, 1)
    assert manifest_from_text(manifest_text(manifest)) == manifest
    early = KeepPlan(16, 0.75, (dataclasses.replace(manifest.keeps[1].stages[0], layer=0),), (16, 8, 8, 8))
    wrong = dataclasses.replace(manifest, keeps=(manifest.keeps[0], Keep(0.75, (early,))))
    with pytest.raises(BundleError, match="stage after layer 0 stands before the DeepStack features of layer 1"):
        manifest_text(wrong)


def test_sizes_and_plans_are_found_by_name_and_length():
    manifest = small_manifest()
    wide = Size(112, 56, 32, 1, "<image>", {"resize": [[112, 56]]}, "sizes/112x56.npz", 8)
    manifest = dataclasses.replace(manifest, sizes=(*manifest.sizes, wide))
    assert manifest.size_named("112x56") is wide and wide.image_tokens == 32
    assert manifest_from_text(manifest_text(small_manifest())).sizes == small_manifest().sizes
    with pytest.raises(UserError, match="no image size 1x1\n.*56x56, 112x56"):
        manifest.size_named("1x1")
    keep = manifest.keeps[1]
    assert keep.plan_for(16).stages == keep.stages and keep.vision_tokens_per_layer == (16, 16, 8, 8)
    with pytest.raises(BundleError, match="no plan for 32 vision tokens"):
        keep.plan_for(32)


def test_keep_lookup():
    solved = Keep(0.55, (KeepPlan(16, 0.5512, (), (16, 16, 2, 2)),))
    manifest = dataclasses.replace(small_manifest(), keeps=(*small_manifest().keeps, solved))
    assert manifest.keep_named(0.55) is manifest.keep_named(0.5512) is solved
    assert manifest.keep_named().requested == 0.75
    with pytest.raises(UserError, match="no keep 0.5\n.*1 .*0.75.*0.55"):
        manifest.keep_named(0.5)
