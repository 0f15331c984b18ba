"""Templates, tokenization and detokenization: equal to Hugging Face's, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizer_factory import CHAT_TEMPLATE, EOS, IMAGE, TOKENIZER_CONFIG, byte_level_tokenizer, llama_tokenizer

from lightkv_export.errors import BundleError, UserError
from lightkv_export.manifest import Size
from lightkv_export.runtime.chat import Chat, Detokenizer, special_tokens
from lightkv_export.runtime.template import ChatTemplate

TOKENIZERS = {"bytes": byte_level_tokenizer, "llama": llama_tokenizer}
IMAGE_TOKENS = 9  # a 42 x 42 image in patches of 14
SIZE = Size(42, 42, IMAGE_TOKENS, 1, "<image>", {})
MANIFEST = SimpleNamespace(image_token_id=IMAGE, sizes=(SIZE,))
CONVERSATIONS = {
    "text": [("user", 0, "What is in this picture?")],
    "one image": [("user", 1, "What is in this picture?")],
    "two images": [("user", 2, "naïve café 東京 🙂 <b>\n\n  two  spaces")],
    "multi-turn": [("user", 1, "What is it?"), ("assistant", 0, "A red bus."), ("user", 0, "Sure?")],
    "image later": [("system", 0, "Be short."), ("user", 0, "Hi"), ("assistant", 0, "Hello"), ("user", 1, "And this?")],
    "special tokens in text": [("user", 0, "a</s>b <s> c")],
}
BOS_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE


def chat_of(folder: Path, kind: str, template: str = CHAT_TEMPLATE) -> Chat:
    """A `Chat` as a bundle would hold it."""
    TOKENIZERS[kind]().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(TOKENIZER_CONFIG)
    (folder / "chat_template.jinja").write_text(template)
    return Chat(folder, MANIFEST)


def as_dicts(turns: list[tuple[str, int, str]]) -> list[dict]:
    return [
        {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}
        for role, images, text in turns
    ]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, BOS_TEMPLATE], ids=["plain", "with bos"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_equal_hugging_face(tmp_path, kind, template):
    pytest.importorskip("torch")
    from PIL import Image
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    chat = chat_of(tmp_path, kind, template)
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}),
        AutoTokenizer.from_pretrained(tmp_path),
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    for name, turns in CONVERSATIONS.items():
        messages = as_dicts(turns)
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = Image.new("RGB", (50, 60))
        expected = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        num_images = sum(images for _, images, _ in turns)
        ours = chat.ids(chat.parse(as_dicts(turns), num_images), [SIZE] * num_images)
        theirs = expected["input_ids"]
        assert ours == list(theirs[0] if isinstance(theirs[0], list) else theirs), name
        assert ours.count(IMAGE) == num_images * IMAGE_TOKENS
        assert ours.count(1) == 1 + turns[0][2].count("<s>"), "one BOS"
        assert chat.decode(ours) == processor.decode(ours, skip_special_tokens=True)


def test_prompts_that_cannot_be_used(tmp_path):
    chat = chat_of(tmp_path, "bytes")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
    for call, message in (
        (lambda: chat.message("user", [" \n"]), "prompt is empty"),
        (lambda: chat.message("user", [None, ""]), "prompt is empty"),
        (lambda: chat.message("user", ["see <image>"]), "image token '<image>'"),
        (lambda: chat.message("robot", ["Hi"]), "role 'robot'"),
        (lambda: chat.parse([user], 0), "show 1 images, 0 were given"),
        (lambda: chat.parse([user], 2), "show 1 images, 2 were given"),
        (lambda: chat.parse([], 0), "does not end with a user's message"),
        (lambda: chat.parse([user, {"role": "assistant", "content": "Yes"}], 1), "does not end"),
        (lambda: chat.parse([{"role": "user", "content": [{"type": "video"}]}], 0), "video"),
        (lambda: chat.parse([{"role": "user"}], 0), "prompt is empty"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_template_can_refuse_and_is_sandboxed():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(UserError, match="roles must alternate"):
        template.render([], add_generation_prompt=True)
    with pytest.raises(UserError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render([], add_generation_prompt=True)
    with pytest.raises(BundleError, match="cannot be compiled"):
        ChatTemplate("{% for %}", {})
    html = ChatTemplate("{{ ['<b>é'] | tojson }} {{ strftime_now('%Y') | length }}", {})
    assert html.render([], add_generation_prompt=True) == '["<b>é"] 4'


def test_damaged_files_are_bundle_errors(tmp_path):
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        Chat(tmp_path, MANIFEST)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be used"):
        Chat(tmp_path, MANIFEST)
    (tmp_path / "tokenizer_config.json").write_text("not json")
    with pytest.raises(BundleError, match="not valid JSON"):
        special_tokens(tmp_path / "tokenizer_config.json")
    chat_of(tmp_path, "bytes")
    with pytest.raises(BundleError, match="no token 4000"):
        Chat(tmp_path, SimpleNamespace(image_token_id=4000, sizes=()))
    blind = chat_of(tmp_path, "bytes", "no image here")
    with pytest.raises(BundleError, match="shows 0 images for 1"):
        blind.ids([blind.message("user", [None, "Hi"])], [SIZE])


def test_special_tokens_are_found_in_both_spellings(tmp_path):
    (tmp_path / "c.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True})
    )
    assert special_tokens(tmp_path / "c.json") == {"bos_token": "<s>", "eos_token": "</s>"}
    assert special_tokens(tmp_path / "none.json") == {}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["A red bus, and a dog.", "naïve café 東京 🙂!", " two  spaces\n\n", "🙂🙂é"])
def test_streamed_pieces_are_whole_characters_and_add_up(tmp_path, kind, text):
    chat = chat_of(tmp_path, kind)
    ids = [*chat.tokenizer.encode(text, add_special_tokens=False).ids, EOS]
    detokenizer = Detokenizer(chat)
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.finish()]
    assert "".join(pieces) == chat.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_garbage_is_streamed_at_bounded_cost(tmp_path):
    chat = chat_of(tmp_path, "bytes")
    sizes = []
    counting = SimpleNamespace(decode=lambda ids: sizes.append(len(ids)) or chat.decode(ids))
    detokenizer = Detokenizer(counting)
    ids = np.random.default_rng(0).integers(4, 310, 500).tolist()
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.finish()]
    assert max(sizes) <= 16
    assert "".join(pieces).replace("\ufffd", "") == chat.decode(ids).replace("\ufffd", "")


def test_what_a_model_says_cannot_smuggle_in_an_image(tmp_path):
    chat = chat_of(tmp_path, "bytes")
    answer = chat.answer([*chat.tokenizer.encode("An ", add_special_tokens=False).ids, IMAGE, EOS])
    assert answer.parts == ("An",)
