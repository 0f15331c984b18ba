"""End to end: exported graphs, driven by the runtime, against Hugging Face.

Most cases run through `verify_bundle`, which is what users run. The other tests share no code with it: plain
transformers for keep 1.0, and below it plain layers with the slow oracle of the merge.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from conftest import MODELS, Exports, repack  # noqa: E402
from oracles import lightkv_stage_oracle  # noqa: E402

from lightkv_export.bundle import open_bundle  # noqa: E402
from lightkv_export.families.llava import FAMILY  # noqa: E402
from lightkv_export.recipe import StageSpec  # noqa: E402
from lightkv_export.reference import EagerSession, Reference  # noqa: E402
from lightkv_export.runtime import Model, Result, load  # noqa: E402
from lightkv_export.runtime.generation import Request  # noqa: E402
from lightkv_export.tolerances import TOLERANCES  # noqa: E402
from lightkv_export.verify import CASES, verify_bundle  # noqa: E402
from lightkv_export.verify_cases import pictures, stages_of  # noqa: E402

TIE = 1e-5
NEW_TOKENS = 64
PROMPTS = (("Hi", 0), ("What is that on the left, next to the tree?", 1), ("Which of the two is larger?", 2))
PORTABLE = ("grouped",)


def messages(text: str, num_images: int, *earlier: dict) -> list[dict]:
    content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}]
    return [*earlier, {"role": "user", "content": content}]


class HuggingFace:
    """What a user of transformers would write."""

    def __init__(self, path: Path) -> None:
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(path).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(path, backend="pil")

    def inputs(self, conversation: list[dict], images: list):
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        return self.processor(text=text, images=images or None, return_tensors="pt")

    def generate(self, conversation: list[dict], images: list) -> tuple[list[int], np.ndarray]:
        """Greedy tokens, and the logits [tokens, V] that chose them."""
        inputs = self.inputs(conversation, images)
        out = self.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return out.sequences[0, inputs.input_ids.shape[1] :].tolist(), torch.cat(out.logits).numpy()


@lru_cache(maxsize=2)
def hugging_face(path: Path) -> HuggingFace:
    return HuggingFace(path)


def assert_same_tokens(found: tuple[int, ...], expected: list[int], logits: np.ndarray) -> None:
    """Token for token; where two logits differ by less than TIE, either token is right and the rest may differ."""
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if ours != theirs:
            gap = logits[place].max() - logits[place][ours]
            assert gap < TIE, f"new token {place}: {ours} for {theirs}, {gap} apart"
            return
    assert len(found) == len(expected)


@pytest.mark.parametrize("name", MODELS)
def test_keep_1_says_what_hugging_face_says(exports: Exports, name: str) -> None:
    reference, model = hugging_face(exports.model(name)), load(exports.bundle(name), threads=1)
    answers = []
    for text, num_images in PROMPTS:
        images = pictures(num_images)
        expected, logits = reference.generate(messages(text, num_images), images)
        result = model.run(text, images, keep=1.0, max_new_tokens=NEW_TOKENS)
        assert_same_tokens(result.token_ids, expected, logits)
        answers.append(result.token_ids)
    assert all(len(answer) == NEW_TOKENS and len(set(answer)) > 20 for answer in answers), "too easy"


@pytest.mark.parametrize("name", MODELS)
def test_a_second_turn_runs_on_the_kept_cache(exports: Exports, name: str) -> None:
    reference, session = hugging_face(exports.model(name)), load(exports.bundle(name), threads=1).session(1.0)
    images = pictures(2)
    session.append("What is this?", images[:1])
    first = session.generate()
    spoken = {"role": "assistant", "content": [{"type": "text", "text": first.text.strip()}]}
    history = (*messages("What is this?", 1), spoken)
    for text, new in (("And now?", 0), ("And here?", 1)):  # without and with another image
        conversation = messages(text, new, *history)
        expected, logits = reference.generate(conversation, images[: 1 + new])
        session.append(text, images[1 : 1 + new])
        result = session.generate(Request(max_new_tokens=NEW_TOKENS))
        assert result.cached_tokens > session._manifest.sizes[0].tokens, "the first image was read again"
        assert_same_tokens(result.token_ids, expected, logits)
        session.messages[-2:] = []  # the next question is asked instead of this one


@pytest.mark.parametrize("lowering", ["modern", "portable"])
@pytest.mark.parametrize("name", MODELS)
def test_verify_passes(exports: Exports, name: str, lowering: str) -> None:
    if lowering == "portable" and name not in PORTABLE:
        pytest.skip("other models add nothing to this lowering")
    checks = verify_bundle(exports.bundle(name, **lowering_option(lowering)), threads=1)
    assert not [check for check in checks if not check.passed]
    keeps = {check.keep for check in checks}
    assert len(keeps) == 1 + max(len(MODELS[name].keeps), 1)
    assert {check.case.removesuffix(" (1)").removesuffix(" (2)") for check in checks} == {case.name for case in CASES}
    assert max(check.value for check in checks if check.metric == "logits, largest difference") > 0, (
        "compared with itself"
    )


def lowering_option(lowering: str) -> dict[str, str]:
    return {} if lowering == "modern" else {"lowering": lowering}


def answer(model: Model, text: str, images: list, keep: float, new_tokens: int) -> tuple[Result, list[np.ndarray]]:
    """A free-running answer, and the logits of every step."""
    rows: list[np.ndarray] = []
    result = model.run(
        text, images, keep=keep, max_new_tokens=new_tokens, on_logits=lambda row: rows.append(row.copy())
    )
    return result, rows


def eager(exports: Exports, name: str) -> Reference:
    return Reference(exports.model(name), FAMILY)


@pytest.mark.parametrize(
    ("name", "lowering"), [(name, "modern") for name in MODELS] + [(name, "portable") for name in PORTABLE]
)
def test_compressed_greedy_decoding_equals_eager(exports: Exports, name: str, lowering: str) -> None:
    """Free running, every keep: logits within 1e-4 and the same 64 tokens."""
    reference, model = eager(exports, name), load(exports.bundle(name, **lowering_option(lowering)), threads=1)
    for keep in model.manifest.keeps[1:]:
        stages, tokens_per_image = stages_of(keep), model.manifest.sizes[0].tokens
        assert stages
        for text, num_images in PROMPTS[1:]:
            images = pictures(num_images)
            prompt = reference.encode(messages(text, num_images), images)
            session = EagerSession(reference, stages, model.manifest.positions)
            units = [tokens_per_image] * num_images
            tokens, rows = session.greedy(session.feed(prompt.ids.tolist(), prompt.image_inputs, units), NEW_TOKENS)
            result, found = answer(model, text, images, keep.requested, NEW_TOKENS)
            assert_same_tokens(result.token_ids, tokens, np.stack([row.numpy() for row in rows]))
            assert len(tokens) == NEW_TOKENS
            difference = [float(np.abs(a - b.numpy()).max()) for a, b in zip(found, rows, strict=True)]
            assert max(difference) <= 1e-4
            assert result.vision_tokens_per_layer == tuple(num_images * n for n in keep.vision_tokens_per_layer)
            share = np.mean(result.vision_tokens_per_layer) / (num_images * tokens_per_image)
            assert abs(result.keep - share) < 1e-9


@torch.no_grad()
def oracle_logits(reference: HuggingFace, inputs, stages: list[StageSpec]) -> np.ndarray:
    """Logits after a prompt: Hugging Face's layers one by one, between them the loops of oracles.py, positions 0..S-1.

    Query and key are projected once more and rotated here: nothing of the package runs.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config, text = reference.model.config, reference.model.model.language_model
    hidden = text.embed_tokens(inputs.input_ids)
    vision = inputs.input_ids[0] == config.image_token_id
    features = reference.model.get_image_features(pixel_values=inputs.pixel_values).pooler_output
    hidden[0, vision] = torch.cat(list(features))
    places, tokens = np.flatnonzero(vision.numpy()), config.image_seq_length
    starts = places[::tokens].tolist()
    by_layer = {stage.layer: stage for stage in stages}
    for index, layer in enumerate(text.layers):
        length = hidden.shape[1]
        rotary = text.rotary_emb(hidden, torch.arange(length)[None])
        causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
        states = layer.input_layernorm(hidden)
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary)
        if index not in by_layer:
            continue
        heads = [
            project(states).reshape(1, length, -1, layer.self_attn.head_dim).transpose(1, 2)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        ]
        query, key = apply_rotary_pos_emb(*heads, *rotary)
        stage, spans = by_layer[index], [(start, start + tokens) for start in starts]
        merged = lightkv_stage_oracle(hidden, query, key, spans, stage.windows_per_side, stage.discard_ratio)
        left = tokens - (length - merged.shape[1]) // len(starts)
        starts = [start - place * (tokens - left) for place, start in enumerate(starts)]
        hidden, tokens = torch.from_numpy(merged).float(), left
    return reference.model.lm_head(text.norm(hidden[:, -1]))[0].numpy()


@pytest.mark.parametrize("name", ["wide", "grouped", "one key", "tied"])
def test_prefill_equals_plain_layers_and_the_oracle(exports: Exports, name: str) -> None:
    reference, model = hugging_face(exports.model(name)), load(exports.bundle(name), threads=1)
    for (text, num_images), keep in ((case, keep) for case in PROMPTS[1:] for keep in model.manifest.keeps):
        images = pictures(num_images)
        stages = [StageSpec(stage.layer, stage.windows_per_side, stage.discard_ratio) for stage in keep.stages]
        expected = oracle_logits(reference, reference.inputs(messages(text, num_images), images), stages)
        _, found = answer(model, text, images, keep.requested, 1)
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-4)


def test_keeps_differ(exports: Exports) -> None:
    """Compression changes the logits by far more than any tolerance: a stage that did nothing would be seen."""
    model, rows = load(exports.bundle("wide"), threads=1), []
    for keep in model.manifest.keeps:
        model.run(
            PROMPTS[1][0],
            pictures(1),
            keep=keep.requested,
            max_new_tokens=1,
            on_logits=lambda row: rows.append(row.copy()),
        )
    assert min(float(np.abs(a - b).max()) for a, b in pairwise(rows)) > 100 * TOLERANCES["float32"].logits


@pytest.mark.parametrize("lowering", ["modern", "portable"])
def test_float16_stays_within_the_stated_tolerance(exports: Exports, lowering: str) -> None:
    path = exports.bundle("tied", dtype="fp16", **lowering_option(lowering))
    manifest = open_bundle(path).manifest
    assert manifest.dtype == "float16"
    assert {tensor.dtype for graph in manifest.graphs for tensor in graph.inputs} == {"float16", "int64"}
    checks = verify_bundle(path, threads=1)
    assert not [check for check in checks if not check.passed]
    shares = [check.value for check in checks if check.metric == "logits, share of norm"]
    assert 1e-5 < max(shares) < TOLERANCES["float16"].logits_share


@pytest.mark.parametrize("policy", ["original", "contiguous"])
def test_other_position_policies(exports: Exports, tmp_path: Path, policy: str) -> None:
    """Positions are inputs of the graphs, so the manifest alone decides."""
    repack(exports.bundle("grouped"), tmp_path / "bundle", positions=policy)
    checks = verify_bundle(tmp_path / "bundle", model=str(exports.model("grouped")), threads=1)
    assert not [check for check in checks if not check.passed]


def test_explicit_stages_are_what_the_bundle_has(exports: Exports) -> None:
    keep = open_bundle(exports.bundle("grouped")).manifest.keep_named()
    assert [(s.layer, s.windows_per_side, s.discard_ratio, s.tokens_in) for s in keep.stages] == [
        (0, 2, 0.5, 81),
        (2, 1, 0.3, keep.stages[0].tokens_out),
    ]
    assert keep.vision_tokens_per_layer == (81, *[keep.stages[0].tokens_out] * 2, keep.stages[1].tokens_out)
    assert keep.requested == keep.keep < 1
