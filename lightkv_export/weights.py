"""Weights, tensor by tensor: safetensors headers in, ONNX external data out, never a model in memory.

A checkpoint is read through its safetensors headers. A tensor whose bytes are right as they are can be used in
place (`--link-weights`: a hard link, since ONNX Runtime and TensorRT refuse external data outside the model's
directory); every other one is converted in slices and written once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightkv_export.errors import UserError

TORCH_FROM_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_FROM_TORCH = {dtype: name for name, dtype in TORCH_FROM_SAFETENSORS.items()}
SLICE_ELEMENTS = 1 << 24  # converted at once: 64 MiB of float32
NOT_READ = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.safetensors")
LFS_POINTER = b"version "  # the first eight bytes of one
AGAIN = "download it again"


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor's bytes lie: `length` bytes at `offset` of `file`, row-major."""

    file: Path
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of one safetensors file, by name; raises UserError if the file is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head == LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the weights", fix="run `git lfs pull` in its directory")
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= size - 8:
            raise UserError(f"{path} is not a safetensors file, or is cut off ({size} bytes)", fix=AGAIN)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {name: _tensor_ref(path, name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} has a damaged header: {error}", fix=AGAIN) from None


def _tensor_ref(path: Path, name: str, entry: Mapping[str, Any], data: int) -> TensorRef:
    """One entry of a header; the tensors' bytes begin at `data`."""
    (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
    if entry["dtype"] not in TORCH_FROM_SAFETENSORS:
        raise UserError(
            f"{path}: tensor {name} has dtype {entry['dtype']}: the checkpoint is quantized",
            expected=f"one of {', '.join(TORCH_FROM_SAFETENSORS)}",
            fix="use the model's original checkpoint in float16, bfloat16 or float32",
        )
    dtype = TORCH_FROM_SAFETENSORS[entry["dtype"]]
    if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: tensor {name} {list(shape)} of {entry['dtype']} takes {end - start} bytes",
            expected=f"{math.prod(shape) * dtype.itemsize} bytes",
            fix=AGAIN,
        )
    if data + end > path.stat().st_size:
        raise UserError(
            f"{path} is cut off: tensor {name} ends beyond its {path.stat().st_size} bytes",
            expected=f"at least {data + end} bytes",
            fix=AGAIN,
        )
    return TensorRef(path, data + start, end - start, dtype, shape)


def read_checkpoint(directory: Path) -> dict[str, TensorRef]:
    """Every tensor of a checkpoint: one safetensors file, or shards with an index. Pickles are refused."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _read_shards(directory, _weight_map(index))
    if (directory / "model.safetensors").is_file():
        return read_header(directory / "model.safetensors")
    others = sorted(path.name for pattern in NOT_READ for path in directory.glob(pattern))
    pickles = bool(others) and all(name.endswith((".bin", ".pt", ".pth")) for name in others)
    kind = "only pickles" if pickles else "only"
    found = f"{directory} holds no safetensors weights" + (f", {kind} ({', '.join(others)})" if others else "")
    raise UserError(
        found,
        expected="model.safetensors, or model.safetensors.index.json with its shards",
        fix="load it where you trust it and write it with save_pretrained; pickles can run code and are never read"
        if pickles
        else "download the whole checkpoint, e.g. with: hf download ORG/NAME --local-dir DIR",
    )


def _read_shards(directory: Path, weight_map: Mapping[str, str]) -> dict[str, TensorRef]:
    """The tensors that the index promises, from the shards that it names."""
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise UserError(
            f"{directory} lacks {', '.join(missing)}",
            expected=f"{len(shards)} shards by model.safetensors.index.json",
            fix=f"download it, e.g. with: hf download ORG/NAME {missing[0]} --local-dir {directory}",
        )
    headers = {shard: read_header(directory / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise UserError(
                f"{directory / shard} lacks tensor {name}, which model.safetensors.index.json expects there",
                fix="download that shard and the index again: they are not of one revision",
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, whose name stays inside the directory."""
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        outside = [shard for shard in weight_map.values() if Path(shard).is_absolute() or ".." in Path(shard).parts]
    except ValueError as error:
        raise UserError(f"{index} is not valid JSON: {error}", fix=AGAIN) from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index} has no weight_map", expected="tensor name -> shard", fix=AGAIN) from None
    if outside:
        raise UserError(f"{index} names {outside[0]!r}", expected="files of the checkpoint's own directory", fix=AGAIN)
    return weight_map


def slices(ref: TensorRef, dtype: torch.dtype) -> Iterable[torch.Tensor]:
    """The tensor's elements in order, flat, converted to `dtype`, at most SLICE_ELEMENTS at once.

    Raises UserError where a finite value does not fit `dtype` (bfloat16 reaches further than float16).
    """
    total = math.prod(ref.shape)
    narrows = ref.dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(ref.dtype).max
    for start in range(0, total, SLICE_ELEMENTS):
        count = min(SLICE_ELEMENTS, total - start)
        width = ref.dtype.itemsize
        raw = np.fromfile(ref.file, dtype=np.uint8, count=count * width, offset=ref.offset + start * width)
        part = torch.from_numpy(raw).view(ref.dtype)
        converted = part.to(dtype)
        if narrows and bool((converted.isinf() & ~part.isinf()).any()):
            raise UserError(
                f"a weight of {ref.file.name} is {part.abs().max().item():.3g}, too large for {dtype}",
                fix="export with --dtype bf16 or --dtype fp32",
            )
        yield converted


def same_bytes(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors are stored alike; reads only as far as they are."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(slices(one, one.dtype), slices(other, other.dtype), strict=True)
    return all(torch.equal(left.view(torch.uint8), right.view(torch.uint8)) for left, right in pairs)


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorRef], dtype: torch.dtype, on_bytes: Callable[[int], None]
) -> dict[str, TensorRef]:
    """Writes `tensors`, floating ones converted to `dtype`, and returns where each one now lies.

    The header is known before any data is read, so memory stays at one slice whatever the model's size.
    """
    head, placed = safetensors_layout(path, _stored_as(tensors, dtype))
    with path.open("wb") as file:
        file.write(head)
        for name, ref in tensors.items():
            for part in slices(ref, placed[name].dtype):
                file.write(part.view(torch.uint8).numpy().data)
                on_bytes(part.nbytes)
    return placed


def safetensors_layout(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, dict[str, TensorRef]]:
    """What a safetensors file with these tensors (name -> dtype, shape) starts with, and where each one will lie.

    The data follows in the order of `tensors`, without gaps (format: https://github.com/huggingface/safetensors).
    """
    header, placed, offset = {}, {}, 0
    for name, (dtype, shape) in tensors.items():
        length = math.prod(shape) * dtype.itemsize
        span = [offset, offset + length]
        header[name] = {"dtype": SAFETENSORS_FROM_TORCH[dtype], "shape": list(shape), "data_offsets": span}
        placed[name] = TensorRef(path, offset, length, dtype, tuple(shape))
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    refs = {name: replace(ref, offset=start + ref.offset) for name, ref in placed.items()}
    return len(text).to_bytes(8, "little") + text, refs


def link_file(source: Path, target: Path) -> None:
    """Hard-links a checkpoint file into the bundle (symbolic links are refused by ONNX Runtime)."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise UserError(
            f"{source} cannot be linked into the bundle: {error.strerror}",
            expected="checkpoint and bundle on one file system",
            fix="choose --out on the checkpoint's file system, or drop --link-weights",
        ) from None


class WeightFiles:
    """Which file of a bundle holds each weight: decided first and written later, one file at a time.

    With `link`, tensors that need no conversion are used from hard-linked checkpoint files; the others go into
    `<stem>.safetensors`. A name that is added twice (tied embeddings) is stored with the first one.

    Attributes:
        placed: where each weight will lie, by name.
        links: file of the checkpoint -> its link in the bundle.
        contents: file of the bundle -> name -> the checkpoint's tensor.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, *, link: bool) -> None:
        self.directory, self.dtype, self.link = directory, dtype, link
        self.placed: dict[str, TensorRef] = {}
        self.links: dict[Path, Path] = {}
        self.contents: dict[Path, dict[str, TensorRef]] = {}

    def is_linked(self, ref: TensorRef) -> bool:
        """Whether the checkpoint's own bytes will do."""
        return self.link and (ref.dtype == self.dtype or not ref.dtype.is_floating_point)

    def bytes_written(self, tensors: Iterable[TensorRef]) -> int:
        """What `add` will write for the `tensors`; linked ones take no room."""
        elements = (math.prod(ref.shape) for ref in set(tensors) if not self.is_linked(ref))
        return sum(elements) * self.dtype.itemsize

    def add(self, stem: str, tensors: Mapping[str, TensorRef]) -> None:
        """Places the `tensors` (name -> checkpoint's tensor) that have no place yet."""
        written = {}
        for name, ref in tensors.items():
            if name in self.placed:
                continue
            if self.is_linked(ref):  # numbered: shards in two folders may have one name
                target = self.links.setdefault(ref.file, self.directory / f"checkpoint_{len(self.links)}.safetensors")
                self.placed[name] = replace(ref, file=target)
            else:
                written[name] = ref
        if written:
            path = self.directory / f"{stem}.safetensors"
            self.contents[path] = written
            self.placed |= safetensors_layout(path, _stored_as(written, self.dtype))[1]

    def files(self) -> dict[Path, int]:
        """Every file -> bytes that must be written for it."""
        sizes = dict.fromkeys(self.links.values(), 0)
        return sizes | {
            path: sum(self.placed[name].length for name in tensors) for path, tensors in self.contents.items()
        }

    def write(self, path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Links or writes one of `files`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if path in self.contents:
            write_safetensors(path, self.contents[path], self.dtype, on_bytes)
        else:
            link_file(next(source for source, target in self.links.items() if target == path), path)


def _stored_as(tensors: Mapping[str, TensorRef], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (dtype if ref.dtype.is_floating_point else ref.dtype, ref.shape) for name, ref in tensors.items()}
