"""Small tokenizers for tests: byte-level BPE (as in Qwen) and BPE with byte fallback and "▁" for spaces (as in
LLaMA)."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]
UNK, BOS, EOS, IMAGE = range(4)
TOKENIZER_CONFIG = json.dumps(
    {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "unk_token": "<unk>"}
)
CHAT_TEMPLATE = (  # the one of llava-hf's checkpoints
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CORPUS = [
    "USER: What is in this picture? ASSISTANT: A red bus, and a dog. naïve café 東京 🙂",
    "the cat sat on the mat",
] * 8


def byte_level_tokenizer(vocab_size: int = 316) -> Tokenizer:
    """Every id decodes to bytes, so characters split over tokens are common."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        tokenizer, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )


def llama_tokenizer(vocab_size: int = 420) -> Tokenizer:
    """Spaces are "▁", one is put before the text; unknown characters become byte tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    return _trained(
        tokenizer, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL + data, limit_alphabet=60), SPECIAL
    )


def _trained(tokenizer: Tokenizer, trainer: trainers.BpeTrainer, special: list[str] = SPECIAL) -> Tokenizer:
    trainer.show_progress = False
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer
