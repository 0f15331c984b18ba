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
from dataclasses import dataclass
from pathlib import Path

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
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= size - 8:
            raise UserError(f"{path} is not a safetensors file, or is cut off ({size} bytes)", fix="download it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path} has a damaged header: {error}", fix="download it again") from None
    refs = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if entry["dtype"] not in TORCH_FROM_SAFETENSORS:
            raise UserError(
                f"{path}: tensor {name} has dtype {entry['dtype']}", expected=", ".join(TORCH_FROM_SAFETENSORS)
            )
        if 8 + length + end > size:
            raise UserError(f"{path} is cut off: tensor {name} ends beyond its {size} bytes", fix="download it again")
        dtype, shape = TORCH_FROM_SAFETENSORS[entry["dtype"]], tuple(entry["shape"])
        refs[name] = TensorRef(path, 8 + length + start, end - start, dtype, shape)
    return refs


def read_checkpoint(directory: Path) -> dict[str, TensorRef]:
    """Every tensor of a checkpoint: one safetensors file, or shards with an index. Pickles are refused."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = _shards(index)
    elif (directory / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    else:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        found = f"{directory} holds no safetensors weights" + (
            f", only pickles ({', '.join(pickles)})" if pickles else ""
        )
        raise UserError(
            found,
            expected="model.safetensors, or model.safetensors.index.json with its shards",
            fix="convert with save_pretrained(..., safe_serialization=True); pickles can run code and are never read",
        )
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise UserError(
            f"{directory} lacks {', '.join(missing)}", expected=f"{len(shards)} shards", fix="download the rest"
        )
    refs: dict[str, TensorRef] = {}
    for shard in shards:
        refs.update(read_header(directory / shard))
    return refs


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except ValueError as error:
        raise UserError(f"{index} is not valid JSON: {error}", fix="download it again") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{index} has no weight_map", expected="tensor name -> shard", fix="download it again"
        ) from None


def slices(ref: TensorRef, dtype: torch.dtype) -> Iterable[torch.Tensor]:
    """The tensor's elements in order, flat, converted to `dtype`, at most SLICE_ELEMENTS at once.

    Raises UserError where a finite value does not fit `dtype` (bfloat16 reaches further than float16).
    """
    total = math.prod(ref.shape)
    for start in range(0, total, SLICE_ELEMENTS):
        count = min(SLICE_ELEMENTS, total - start)
        width = ref.dtype.itemsize
        raw = np.fromfile(ref.file, dtype=np.uint8, count=count * width, offset=ref.offset + start * width)
        part = torch.from_numpy(raw).view(ref.dtype)
        converted = part.to(dtype)
        if converted.is_floating_point() and bool((converted.isinf() & ~part.isinf()).any()):
            raise UserError(
                f"a weight of {ref.file.name} is {part.abs().max().item():.3g}, too large for {dtype}",
                fix="export with --dtype bf16 or --dtype fp32",
            )
        yield converted


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorRef], dtype: torch.dtype, on_bytes: Callable[[int], None]
) -> dict[str, TensorRef]:
    """Writes `tensors`, floating ones converted to `dtype`, and returns where each one now lies.

    The header is known before any data is read, so memory stays at one slice whatever the model's size.
    """
    placed, header, offset = {}, {}, 0
    for name, ref in tensors.items():
        kind = dtype if ref.dtype.is_floating_point else ref.dtype
        length = math.prod(ref.shape) * kind.itemsize
        shape = list(ref.shape)
        header[name] = {
            "dtype": SAFETENSORS_FROM_TORCH[kind],
            "shape": shape,
            "data_offsets": [offset, offset + length],
        }
        placed[name] = TensorRef(path, offset, length, kind, ref.shape)
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, ref in tensors.items():
            for part in slices(ref, placed[name].dtype):
                file.write(part.view(torch.uint8).numpy().data)
                on_bytes(part.nbytes)
    start = 8 + len(text)
    return {name: TensorRef(path, start + r.offset, r.length, r.dtype, r.shape) for name, r in placed.items()}


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


def place_weights(
    directory: Path,
    groups: Mapping[str, Mapping[str, TensorRef]],
    dtype: torch.dtype,
    *,
    link: bool,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, TensorRef]:
    """Puts every tensor of `groups` (file stem -> name -> checkpoint tensor) into `directory`, once.

    With `link`, tensors that need no conversion are used from hard-linked checkpoint files; the others are written to
    `<stem>.safetensors`. A name that occurs in two groups (tied embeddings) is stored with the first one.
    """
    placed: dict[str, TensorRef] = {}
    linked: dict[Path, Path] = {}
    for stem, tensors in groups.items():
        written = {}
        for name, ref in tensors.items():
            if name in placed:
                continue
            if link and (ref.dtype == dtype or not ref.dtype.is_floating_point):
                if ref.file not in linked:  # numbered: shards in two folders may have one name
                    linked[ref.file] = directory / f"checkpoint_{len(linked)}.safetensors"
                    link_file(ref.file, linked[ref.file])
                placed[name] = TensorRef(linked[ref.file], ref.offset, ref.length, ref.dtype, ref.shape)
            else:
                written[name] = ref
        if written:
            placed |= write_safetensors(directory / f"{stem}.safetensors", written, dtype, on_bytes)
    return placed
