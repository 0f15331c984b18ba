"""Checkpoints as they are found on disks and hubs: storage forms that are read, and defects with their advice."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import huggingface_hub
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from lightkv_export import checkpoint
from lightkv_export.checkpoint import check_versions, checkpoint_directory, config_of, split_revision
from lightkv_export.cli import main
from lightkv_export.errors import UserError
from lightkv_export.families import FAMILIES, family_named, resolve_recipe
from lightkv_export.weights import WeightFiles, read_checkpoint, read_header, safetensors_layout, slices

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4), "c": torch.zeros(2, 2)}


def write_shards(root: Path, layout: dict[str, list[str]]) -> None:
    """Shard -> the names of TENSORS in it, and the index."""
    for shard, names in layout.items():
        save_file({name: TENSORS[name] for name in names}, root / shard)
    write_index(root, {name: shard for shard, names in layout.items() for name in names})


def write_index(root: Path, weight_map: dict[str, str]) -> None:
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_shards(tmp_path, {"one.safetensors": ["a", "b"], "two.safetensors": ["c"]})
    return tmp_path


def message(work: Callable[[], object]) -> str:
    """The message of the UserError that `work` must raise; it says what to do, or what would be right."""
    with pytest.raises(UserError) as caught:
        work()
    assert "\n  to do: " in str(caught.value) or "\n  expected: " in str(caught.value)
    return str(caught.value)


# What is read.


def test_single_file_and_shards_hold_the_same(sharded, tmp_path):
    single = tmp_path / "single"
    single.mkdir()
    save_file(TENSORS, single / "model.safetensors")
    for root in (single, sharded):
        refs = read_checkpoint(root)
        assert refs.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(torch.cat(list(slices(refs[name], torch.float32))).reshape(tensor.shape), tensor)


def test_the_layout_is_safetensors_own(tmp_path):
    path = tmp_path / "file.safetensors"
    head, refs = safetensors_layout(
        path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    )
    path.write_bytes(head + b"".join(tensor.numpy().tobytes() for tensor in TENSORS.values()))
    assert read_header(path) == refs
    from safetensors.torch import load_file

    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(path).items())


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_becomes_every_float(tmp_path, source, dtype):
    values = torch.tensor([0.0, 1.5, -2.25, 3e-5, 448.0]).to(source)
    save_file({"w": values}, tmp_path / "model.safetensors")
    weights = WeightFiles(tmp_path / "out", dtype, link=False)
    weights.add("part", read_checkpoint(tmp_path))
    (file,) = weights.files()
    weights.write(file)
    ref = read_header(file)["w"]
    assert ref == weights.placed["w"] and ref.dtype == dtype
    assert torch.equal(torch.cat(list(slices(ref, dtype))), values.to(dtype))


@pytest.mark.parametrize("value", [65536.0, -1e30])
def test_bfloat16_that_overflows_float16_is_refused(tmp_path, value):
    save_file({"w": torch.tensor([1.0, value], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    ref = read_checkpoint(tmp_path)["w"]
    text = message(lambda: list(slices(ref, torch.float16)))
    assert "model.safetensors" in text and "too large for torch.float16" in text and "--dtype bf16" in text
    assert torch.cat(list(slices(ref, torch.bfloat16)))[1] == torch.tensor(value, dtype=torch.bfloat16)


def test_infinity_stays_infinity(tmp_path):
    save_file({"w": torch.tensor([float("inf")])}, tmp_path / "model.safetensors")
    assert torch.cat(list(slices(read_checkpoint(tmp_path)["w"], torch.float16))).isinf().all()


# What is not.


def edit_header(path: Path, edit: Callable[[dict], None]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def set_entry(**entries: object) -> Callable[[Path], None]:
    return lambda root: edit_header(root / "one.safetensors", lambda header: header["a"].update(entries))


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / name, size)


DEFECTS = {
    "missing shard": (
        lambda root: (root / "two.safetensors").unlink(),
        ["lacks two.safetensors", "hf download", "two.safetensors --local-dir"],
    ),
    "shard of another revision": (
        lambda root: save_file({"other": TENSORS["a"]}, root / "two.safetensors"),
        ["two.safetensors lacks tensor c", "one revision"],
    ),
    "truncated shard": (truncate("one.safetensors", 150), ["one.safetensors is cut off", "download it again"]),
    "empty shard": (truncate("one.safetensors", 0), ["one.safetensors is not a safetensors file, or is cut off"]),
    "pointer of Git LFS": (
        lambda root: (root / "one.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        ["is a Git LFS pointer", "git lfs pull"],
    ),
    "no header": (lambda root: (root / "one.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]"), ["damaged header"]),
    "eight bits": (set_entry(dtype="F8_E4M3", data_offsets=[0, 6]), ["tensor a has dtype F8_E4M3", "quantized"]),
    "other size": (set_entry(shape=[2, 4]), ["tensor a [2, 4] of F32 takes 24 bytes", "32 bytes"]),
    "before the data": (set_entry(data_offsets=[-24, 0]), ["tensor a [2, 3] of F32 takes"]),
    "entry of something else": (set_entry(data_offsets=7), ["damaged header"]),
    "index that leaves the directory": (lambda root: write_index(root, {"a": "../a.safetensors"}), ["names '../a"]),
    "index without names": (lambda root: write_index(root, {"a": 3}), ["has no weight_map"]),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_of_weights(sharded, defect):
    edit, words = DEFECTS[defect]
    edit(sharded)
    text = message(lambda: read_checkpoint(sharded))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["pytorch_model.bin"], "only pickles (pytorch_model.bin)"),
        (["consolidated.00.pth", "pytorch_model-00001-of-00002.bin"], "only pickles"),
        (["model.gguf"], "only (model.gguf)"),
        ([], "holds no safetensors weights\n"),
    ],
)
def test_other_weights(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).touch()
    text = message(lambda: read_checkpoint(tmp_path))
    assert expected in text and ("pickles" not in expected or "can run code" in text)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llava", "auto_map": {"AutoModel": "modeling.Model"}}, "which is never run"),
        ({"model_type": "llava", "quantization_config": {"quant_method": "awq"}}, "is quantized (awq)"),
        ({"model_type": "bert"}, "'bert' is not supported"),
        ([], "is not a configuration"),
    ],
)
def test_configurations_that_are_refused(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = message(lambda: family_named(config_of(str(tmp_path))["model_type"]))
    assert expected in text
    assert "bert" not in expected or all(name in text for name in FAMILIES)


# Versions.


def test_the_versions_are_those_of_the_project():
    root = Path(__file__).parent.parent
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["export"]
    for name, (first, end) in checkpoint.SUPPORTED.items():
        assert f"{name}>={first},<{end}" in extra
    check_versions()


@pytest.mark.parametrize("version", ["4.57.6", "5.19.9", "6.0.0", "6.1.0.dev0"])
def test_an_unsupported_transformers_is_said_at_once(tmp_path, capsys, monkeypatch, version):
    real = checkpoint.importlib.metadata.version
    fake = lambda name: version if name == "transformers" else real(name)  # noqa: E731
    monkeypatch.setattr(checkpoint.importlib.metadata, "version", fake)
    assert main(["export", "tiny-llava", "--out", str(tmp_path / "bundle"), "--quiet"]) == 2
    text = capsys.readouterr().err
    assert f"transformers {version} is installed" in text and 'pip install "transformers>=5.20,<6"' in text
    assert not list(tmp_path.iterdir())


# The hub; no test goes there.


def refused(kind: type[Exception]) -> Exception:
    """An error of the hub's client as it would be raised."""
    error = kind.__new__(kind)
    error.args = ("no",)
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.GatedRepoError, ["org/name is gated", "huggingface.co/org/name", "HF_TOKEN"]),
        (errors.RepositoryNotFoundError, ["no repository org/name, or it is private", "check the name"]),
        (errors.RevisionNotFoundError, ["no revision 'v2' of org/name", "a branch, a tag or a commit"]),
        (errors.HFValidationError, ["cannot be a repository's name"]),
        (errors.LocalEntryNotFoundError, ["org/name@v2 could not be downloaded", "network", "HTTPS_PROXY"]),
        (errors.HfHubHTTPError, ["could not be downloaded: HfHubHTTPError", "run it again"]),
        (ConnectionError, ["could not be downloaded: ConnectionError"]),
    ],
)
def test_answers_of_the_hub(tmp_path, capsys, monkeypatch, error, expected):
    def download(model: str, revision: str, allow_patterns: list[str]) -> str:
        assert (model, revision) == ("org/name", "v2")
        raise refused(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert main(["export", "org/name@v2", "--out", str(tmp_path / "bundle"), "--quiet"]) == 2
    text = capsys.readouterr().err
    assert all(words in text for words in expected) and "Traceback" not in text, text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled])
def test_offline_without_a_download(monkeypatch, error):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(refused(error)))
    text = message(lambda: config_of("org/name", "v2"))
    assert "was not downloaded before, and HF_HUB_OFFLINE is set" in text and "hf download org/name" in text


def test_only_safe_files_are_downloaded_and_refusals_come_before_gigabytes(tmp_path, monkeypatch):
    asked = []

    def download(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert checkpoint_directory("org/name", "main") == tmp_path
    assert asked == [["config.json"], checkpoint.HUB_FILES]
    assert not any(name.endswith((".bin", ".pt", ".py", "*")) for name in checkpoint.HUB_FILES)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}')
    assert "never run" in message(lambda: checkpoint_directory("org/name"))
    assert asked[2:] == [["config.json"]]


def test_links_into_the_hubs_cache_are_followed(tmp_path):
    """A snapshot holds symbolic links to blobs; the bundle gets a hard link to the blob."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(TENSORS, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    weights = WeightFiles(tmp_path / "out", torch.float32, link=True)
    weights.add("part", read_checkpoint(tmp_path / "snapshot"))
    for file in weights.files():
        weights.write(file)
    assert not file.is_symlink() and file.stat().st_ino == (tmp_path / "blobs" / "0123").stat().st_ino
    ref = weights.placed["a"]
    assert np.fromfile(ref.file, np.float32, 6, offset=ref.offset).tolist() == [0, 1, 2, 3, 4, 5]


def test_revisions(tmp_path, monkeypatch):
    assert split_revision("org/name@refs/pr/3") == ("org/name", "refs/pr/3")
    assert split_revision("org/name") == ("org/name", None)
    (tmp_path / "a@b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_revision("a@b") == ("a@b", None)
    assert resolve_recipe("llava-1.5-7b@abc").revision == "abc"
    assert resolve_recipe("llava-1.5-7b").revision is None


# The script that writes checkpoints of full size.


def synthetic():
    """scripts/synthetic_checkpoint.py as a module."""
    path = Path(__file__).parent.parent / "scripts" / "synthetic_checkpoint.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "total_size"), [("llava-1.5-7b", 14_126_854_144), ("qwen2.5-vl-7b", 16_584_333_312)])
def test_synthetic_checkpoints_have_the_size_of_the_real_ones(name, total_size):
    module = synthetic()
    tensors = module.hub_tensors(module.MODELS[name])
    assert 2 * sum(math.prod(shape) for shape in tensors.values()) == total_size
    assert {"llava-1.5-7b": "language_model.model.embed_tokens.weight"}.get(
        name, "model.embed_tokens.weight"
    ) in tensors


def test_synthetic_shards_are_read_as_they_are_promised(tmp_path, monkeypatch):
    module = synthetic()
    monkeypatch.setattr(module, "SHARD_BYTES", 100)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1 << 10)
    shapes = {"a.weight": (4, 6), "norm.weight": (16,), "b.weight": (70, 40)}
    written = list(module.write_shards(tmp_path, shapes, torch.float16))
    assert len({shard for shard, _ in written}) == 2 and sum(count for _, count in written) == 2 * (24 + 16 + 2800)
    refs = read_checkpoint(tmp_path)
    assert {name: ref.shape for name, ref in refs.items()} == shapes
    values = torch.cat(list(slices(refs["norm.weight"], torch.float32)))
    assert values.min() > 0.9 and values.max() < 1.1
