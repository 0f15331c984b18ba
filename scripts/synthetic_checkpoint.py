"""Write a checkpoint of a real model's size: its exact tensor names, shapes, dtype, shards and config.json, with random
weights and a small tokenizer. What it says means nothing; what an export of it costs is real.

    python scripts/synthetic_checkpoint.py llava-1.5-7b --out DIR

Memory stays below 1 GiB: one random block of 64 MiB is written again and again. Needs the `export` extra.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightkv_export.cli.console import progress, size_text
from lightkv_export.cli.program import call_program
from lightkv_export.errors import UserError
from lightkv_export.weights import safetensors_layout

TINY = Path(__file__).resolve().parent.parent / "recipes" / "tiny-llava"
TINY_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
SHARD_BYTES = 5 * 10**9  # as save_pretrained cut the checkpoints on the hub
BLOCK_ELEMENTS = 1 << 25
STRIDE = 1_000_003  # where the next tensor starts to read the block: no two of a model are equal
DEVIATION = 0.02  # of the weights; the initializer_range of both decoders
SPARE_BYTES = 2 << 30  # left free on the disk
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class Model:
    """One checkpoint of the hub: config.json word for word, and its small files.

    Attributes:
        config: config.json.
        dtype: of every weight.
        special: special tokens and their ids; the other tokens of tiny-llava's tokenizer fill the ids from `first`.
        files: further JSON files.
        template: chat_template.jinja.
        prefixes: prefix in transformers' names -> prefix on the hub, where transformers' own rules do not say.
    """

    config: Mapping[str, Any]
    dtype: torch.dtype
    special: Mapping[str, int]
    files: Mapping[str, Any]
    template: str
    first: int = 0
    prefixes: Mapping[str, str] = field(default_factory=dict)


def llava(**text: int) -> Model:
    """llava-hf/llava-1.5-7b-hf; `text` is what the 13B's decoder says of its sizes."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 576,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        }
        | text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }
    files = {name: json.loads((TINY / name).read_text()) for name in TINY_FILES}
    sides = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    for name, entries in zip(TINY_FILES, (sides, {"patch_size": 14}, {"model_max_length": 4096}), strict=True):
        files[name] |= entries
    files["generation_config.json"] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001}
    return Model(
        config=config,
        dtype=torch.float16,
        special={"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001},
        first=3,
        files=files,
        template=(TINY / "chat_template.jinja").read_text(),
        prefixes={"vision_tower.": "vision_tower.vision_model."},
    )


def vicuna() -> Model:
    """lmsys/vicuna-7b-v1.5: the decoder of llava-1.5-7b alone, for exporters that take no vision."""
    whole = llava()
    text = {key: value for key, value in whole.config["text_config"].items() if key != "vocab_size"}
    files = {name: whole.files[name] for name in ("tokenizer_config.json", "generation_config.json")}
    return replace(whole, config=text | {"torch_dtype": "float16"}, files=files, prefixes={})


QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen() -> Model:
    """Qwen/Qwen2.5-VL-7B-Instruct."""
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 152064,
    }
    preprocessor = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    special = {f"<|{name}|>": 151652 + number for number, name in enumerate(names)}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Qwen2_5_VLProcessor",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special],
        "model_max_length": 131072,
    }
    generation = {"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643]}
    return Model(
        config=config,
        dtype=torch.bfloat16,
        special={"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645} | special,
        files={
            "preprocessor_config.json": preprocessor,
            "tokenizer_config.json": tokenizer,
            "generation_config.json": generation,
        },
        template=QWEN_TEMPLATE,
    )


LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40} | dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads"), 40
)
MODELS = {
    "llava-1.5-7b": llava(),
    "llava-1.5-13b": llava(**LLAMA_13B),
    "qwen2.5-vl-7b": qwen(),
    "vicuna-7b": vicuna(),
}


def main() -> int:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS, help="the model")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--layers", type=int, help="only so many decoder layers")
    args = parser.parse_args()
    model = MODELS[args.name]
    if args.layers:
        model = with_layers(model, args.layers)
    with progress() as on_step:
        tensors = hub_tensors(model)
        total = sum(math.prod(shape) for shape in tensors.values()) * model.dtype.itemsize
        make_directory(args.out, total)
        try:
            write_small_files(args.out, model)
            written = 0
            for shard, count in write_shards(args.out, tensors, model.dtype):
                written += count
                on_step(shard, written, total)
        except BaseException:
            shutil.rmtree(args.out)
            raise
    print(f"{args.out}: {len(tensors)} tensors, {size_text(total)}")
    return 0


def with_layers(model: Model, layers: int) -> Model:
    """The same model with fewer decoder layers: what grows with the model shows in a row of these."""
    depth = {"num_hidden_layers": layers}
    if "text_config" in model.config:
        return replace(model, config={**model.config, "text_config": {**model.config["text_config"], **depth}})
    return replace(model, config={**model.config, **depth})


def hub_tensors(model: Model) -> dict[str, tuple[int, ...]]:
    """Name on the hub -> shape, from transformers' model class without weights and its renaming rules, reversed."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    config = transformers.AutoConfig.for_model(**model.config)
    with torch.device("meta"):
        skeleton = getattr(transformers, model.config["architectures"][0])(config)
    names = {}
    for name, tensor in revert_weight_conversion(skeleton, dict(skeleton.state_dict())).items():
        old = next((prefix for prefix in model.prefixes if name.startswith(prefix)), "")
        names[model.prefixes.get(old, "") + name.removeprefix(old)] = tuple(tensor.shape)
    return names


def make_directory(out: Path, num_bytes: int) -> None:
    """Creates `out`; raises UserError if it exists, or if the disk is too small."""
    parent = out.resolve().parent
    if out.exists() or not parent.is_dir():
        raise UserError(f"{out} exists, or {parent} does not", fix="choose another --out")
    free = shutil.disk_usage(parent).free
    if free < num_bytes + SPARE_BYTES:
        raise UserError(
            f"{size_text(free)} free in {parent}",
            expected=f"{size_text(num_bytes)} for the weights and {size_text(SPARE_BYTES)} to spare",
            fix="free some space or choose another --out",
        )
    out.mkdir()


def write_small_files(out: Path, model: Model) -> None:
    """config.json, tokenizer, chat template and processor settings."""
    for name, document in {"config.json": model.config, "tokenizer.json": tokenizer_of(model), **model.files}.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(model.template, encoding="utf-8")


def tokenizer_of(model: Model) -> dict[str, Any]:
    """tiny-llava's tokenizer.json with the model's special tokens at their true ids; most ids stay without a token."""
    document = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    replaced = {token["content"] for token in document["added_tokens"]}
    words = [word for word in document["model"]["vocab"] if word not in replaced]
    document["model"]["vocab"] = dict(model.special) | {word: model.first + n for n, word in enumerate(words)}
    document["added_tokens"] = [
        {**document["added_tokens"][0], "id": number, "content": word} for word, number in model.special.items()
    ]
    if "<s>" in model.special:
        document["post_processor"]["special_tokens"]["<s>"]["ids"] = [model.special["<s>"]]
    else:
        document["model"]["unk_token"] = document["post_processor"] = None
    return document


def write_shards(out: Path, tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """Writes the weights and their index; yields (shard, bytes) after every block."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    sizes = [0]
    for name, shape in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if sizes[-1] + size > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = shape
        sizes[-1] += size
    weight_map = {}
    block = torch.from_numpy(np.random.default_rng(0).standard_normal(BLOCK_ELEMENTS, np.float32)) * DEVIATION
    plain, ones = block.to(dtype), (block[: 1 << 16] + 1).to(dtype)
    for number, shard in enumerate(shards, 1):
        path = out / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        head, _ = safetensors_layout(path, {name: (dtype, shape) for name, shape in shard.items()})
        with path.open("wb") as file:
            file.write(head)
            for name, shape in shard.items():
                weight_map[name] = path.name
                is_norm = len(shape) == 1 and name.endswith("weight")
                for part in parts(ones if is_norm else plain, math.prod(shape), STRIDE * len(weight_map)):
                    file.write(part.view(torch.uint8).numpy().data)
                    yield path.name, part.nbytes
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def parts(block: torch.Tensor, count: int, start: int) -> Iterator[torch.Tensor]:
    """`count` elements as pieces of `block`, from `start` on and round and round."""
    while count:
        start %= len(block)
        piece = block[start : start + count]
        yield piece
        start, count = start + len(piece), count - len(piece)


if __name__ == "__main__":
    raise SystemExit(call_program(main))
