"""Sessions on a toy model: prefill, decode, merging, several turns and images, limits and interruptions, against
numpy."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from toy_model import IMAGE_TOKENS, D, ToyModel

from lightkv_export.errors import UserError
from lightkv_export.runtime import Model, Sampling, Session, load
from lightkv_export.runtime.generation import Request
from lightkv_export.runtime.image import sized_pixels

TOY = ToyModel()
PROMPT = "What is in this picture?"
IMAGES = [np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in range(3)]


@pytest.fixture(scope="module", params=["scatter", "append"])
def model(request, tmp_path_factory) -> Model:
    return open_toy(tmp_path_factory.mktemp("toy"), TOY, request.param)


def open_toy(folder, toy: ToyModel, protocol: str = "scatter", **changes: object) -> Model:
    return load(toy.bundle(folder / "bundle", protocol, **changes).path, threads=1)


def features(model: Model, images: list) -> list[np.ndarray]:
    return [TOY.features(sized_pixels(model.manifest, image).values[0]) for image in images]


def prompt_ids(model: Model, num_images: int, prompt: str = PROMPT) -> list[int]:
    message = model.chat.message("user", [*[None] * num_images, prompt])
    return model.chat.ids([message], model.manifest.sizes[:1] * num_images)


def whole_ids(session: Session) -> list[int]:
    """The conversation of a session as the model is to see it."""
    return session._tokens().ids.tolist()


@pytest.mark.parametrize("keep", [1.0, 0.83])
@pytest.mark.parametrize("num_images", [0, 1, 2, 3])
def test_every_step_equals_the_oracle(model, keep, num_images):
    logits, images = [], IMAGES[:num_images]
    result = model.run(PROMPT, images, keep=keep, max_new_tokens=70, on_logits=logits.append)
    ids = prompt_ids(model, num_images)
    for step in (0, 1, 2, len(logits) - 1):
        chunks = [(ids, features(model, images)), *(([token], []) for token in result.token_ids[:step])]
        np.testing.assert_allclose(logits[step], TOY.logits(chunks, keep < 1), atol=2e-5)
    assert result.token_ids == tuple(int(np.argmax(step)) for step in logits)
    after = num_images * (IMAGE_TOKENS if keep == 1 else IMAGE_TOKENS // 2)
    assert result.vision_tokens_per_layer == (num_images * IMAGE_TOKENS,) * 2 + (after,)
    num_text = len(ids) - num_images * IMAGE_TOKENS
    rows = [vision + num_text + 70 for vision in result.vision_tokens_per_layer]  # as planned for the request
    assert result.kv_bytes_per_layer == tuple(2 * D * 4 * count for count in rows)
    assert result.kv_bytes == sum(result.kv_bytes_per_layer)
    assert result.prompt_tokens == len(ids) and result.cached_tokens == 0
    assert result.finish_reason in ("stop", "length") and len(result.token_ids) <= 70
    assert result.cache_tokens_per_layer[0] == len(ids) + len(result.token_ids) - 1


@pytest.mark.parametrize("policy", ["restart", "original", "contiguous"])
def test_position_policies(tmp_path, policy):
    toy = ToyModel(positions=policy)
    model, logits = open_toy(tmp_path, toy), []
    result = model.run(PROMPT, IMAGES[:2], max_new_tokens=4, on_logits=logits.append)
    given = [(prompt_ids(model, 2), features(model, IMAGES[:2])), *(([token], []) for token in result.token_ids[:3])]
    np.testing.assert_allclose(logits[3], toy.logits(given, True), atol=2e-5)


def test_half_precision_follows(tmp_path):
    logits, reference = [], []
    half = load(TOY.bundle(tmp_path / "half", dtype="float16").path)
    half.run(PROMPT, IMAGES[:1], max_new_tokens=1, on_logits=logits.append)
    open_toy(tmp_path, TOY).run(PROMPT, IMAGES[:1], max_new_tokens=1, on_logits=reference.append)
    assert logits[0].dtype == np.float32
    np.testing.assert_allclose(logits[0], reference[0], atol=0.05)


@pytest.mark.parametrize("size", [1, 5, 17])
def test_chunked_prefill_equals_one_prefill(model, size):
    whole, pieces = [], []
    model.run(PROMPT, IMAGES[:2], keep=1.0, max_new_tokens=3, on_logits=whole.append)
    session = model.session(1.0, prefill_chunk=size)
    session.ask(PROMPT, IMAGES[:2], Request(max_new_tokens=3, on_logits=pieces.append))
    np.testing.assert_allclose(whole, pieces, atol=1e-5)


@pytest.mark.parametrize("keep", [1.0, 0.83])
def test_several_turns_with_images_equal_the_whole_conversation(model, keep):
    session = model.session(keep)
    turns = [(PROMPT, IMAGES[:1]), ("And there?", IMAGES[1:2]), ("Sure?", [])]
    chunks: list[tuple[list[int], list[np.ndarray]]] = []
    for prompt, images in turns:
        logits = []
        session.append(prompt, images)
        ids = whole_ids(session)
        result = session.generate(Request(max_new_tokens=5, on_logits=logits.append))
        chunks = [*kept_chunks(chunks, result.cached_tokens), (ids[result.cached_tokens :], features(model, images))]
        assert [token for part, _ in chunks for token in part] == ids, "what was fed is the whole conversation"
        np.testing.assert_allclose(logits[0], TOY.logits(chunks, keep < 1), atol=2e-5)
        chunks += [([token], []) for token in result.token_ids[:-1]]
    assert result.cached_tokens > 60, "the caches of the first turns were used"
    assert sum(result.vision_tokens_per_layer) == (2 + 2 + 2 if keep == 1 else 2 + 2 + 1) * IMAGE_TOKENS


def kept_chunks(chunks: list, length: int) -> list:
    """The chunks as they are after a rollback to `length` tokens."""
    kept, total = [], 0
    for ids, images in chunks:
        if total + len(ids) > length:
            ids = ids[: length - total]
        if ids:
            kept.append((ids, images))
        total += len(ids)
    return kept


def test_rollback_into_a_merged_chunk_feeds_it_again(model):
    session = model.session(0.83)
    session.ask(PROMPT, IMAGES[:1], Request(max_new_tokens=3))
    length = len(prompt_ids(model, 1))
    assert session.sequence.rollback(length) == length, "the answer goes token by token"
    assert session.sequence.rollback(length - 1) == 0, "the merged chunk as a whole"
    again, fresh = [], []
    session.messages.pop()
    session.generate(Request(max_new_tokens=1, on_logits=again.append))
    model.run(PROMPT, IMAGES[:1], keep=0.83, max_new_tokens=1, on_logits=fresh.append)
    np.testing.assert_array_equal(again, fresh)


def test_another_image_is_not_taken_from_the_cache(model):
    session, logits, fresh = model.session(1.0), [], []

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask(PROMPT, IMAGES[:1], Request(on_logits=interrupt))  # cached, but the turn is dropped
    assert session.messages == [] and session.sequence.length == len(prompt_ids(model, 1))
    result = session.ask(PROMPT, IMAGES[1:2], Request(max_new_tokens=1, on_logits=logits.append))
    model.run(PROMPT, IMAGES[1:2], keep=1.0, max_new_tokens=1, on_logits=fresh.append)
    np.testing.assert_allclose(logits, fresh, atol=1e-5)
    assert 0 < result.cached_tokens < IMAGE_TOKENS


def test_an_interrupted_answer_stays_and_the_session_goes_on(model):
    session, said = model.session(1.0), []

    def stop_after_three(piece: str) -> None:
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask(PROMPT, IMAGES[:1], Request(max_new_tokens=50, on_token=stop_after_three))
    assert [message.role for message in session.messages] == ["user", "assistant"] and session.result is None
    logits = []
    session.append("Go on.")
    ids = whole_ids(session)
    session.generate(Request(max_new_tokens=1, on_logits=logits.append))
    np.testing.assert_allclose(logits[0], TOY.logits([(ids, features(model, IMAGES[:1]))], False), atol=2e-5)


def test_streaming_gives_the_text_piece_by_piece(model):
    session = model.session()
    session.append(PROMPT, IMAGES[:1])
    pieces = list(session.stream(Request(max_new_tokens=12)))
    assert len(pieces) > 3 and "".join(pieces) == session.result.text
    assert [message.role for message in session.messages] == ["user", "assistant"]


def test_sampling_with_a_seed_repeats(model):
    sampling = Sampling(temperature=2.0, top_k=50, seed=3)
    first, second = (model.run(PROMPT, max_new_tokens=8, sampling=sampling).token_ids for _ in range(2))
    assert first == second != model.run(PROMPT, max_new_tokens=8).token_ids


def test_end_of_sequence_stops(tmp_path):
    first = open_toy(tmp_path, TOY).run(PROMPT, max_new_tokens=3).token_ids
    stopping = load(TOY.bundle(tmp_path / "stopping", eos_token_ids=(first[1],)).path)
    result = stopping.run(PROMPT, max_new_tokens=3)
    assert result.token_ids == first[:2] and result.finish_reason == "stop"


def test_messages_and_prompt_are_the_same_request(model):
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    by_messages = model.run([{"role": "user", "content": content}], IMAGES[:1], max_new_tokens=5)
    assert by_messages.token_ids == model.run(PROMPT, IMAGES[:1], max_new_tokens=5).token_ids


def test_limits_are_checked_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(model.graphs, "executable", lambda graph: pytest.fail("a graph was used"))
    many = "word " * 400
    for call, message in (
        (lambda: model.run(PROMPT, IMAGES + IMAGES), "6 images"),
        (lambda: model.run(PROMPT, max_new_tokens=400), r"17 prompt tokens .* 400 new tokens are 417"),
        (lambda: model.run(many), "at most 400"),
        (lambda: model.run(PROMPT, keep=0.3), "no keep 0.3"),
        (lambda: model.run(" "), "prompt is empty"),
        (lambda: model.run(PROMPT, ["no.png"]), "does not exist"),
        (lambda: model.run(PROMPT, max_new_tokens=0), "max_new_tokens is 0"),
        (lambda: model.session(prefill_chunk=0), "prefill_chunk is 0"),
        (lambda: model.session().generate(), "no message to answer"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_refused_turn_leaves_the_conversation_as_it_was(model):
    session = model.session()
    session.ask(PROMPT, IMAGES[:1], Request(max_new_tokens=2))
    for prompt, images in (("", []), ("word " * 400, []), ("Hi", ["no.png"]), ("Hi", IMAGES)):
        with pytest.raises(UserError):
            session.ask(prompt, images)
    assert [message.role for message in session.messages] == ["user", "assistant"]
    assert session.ask("Hi", [], Request(max_new_tokens=2)).cached_tokens > 30


def test_stages_are_traced(model):
    session = model.session(0.83)
    session.ask(PROMPT, IMAGES[:2], Request(max_new_tokens=3))
    (trace,) = session.sequence.traces
    assert trace.layer == 1 and trace.kept.tolist() == [list(range(1, IMAGE_TOKENS, 2))] * 2
    assert trace.target.tolist() == [[place // 2 for place in range(IMAGE_TOKENS)]] * 2


def test_only_what_a_request_needs_is_loaded(tmp_path):
    model = open_toy(tmp_path, TOY)
    model.run(PROMPT, keep=1.0, max_new_tokens=1)
    assert sorted(model.graphs._loaded) == ["segment_0", "segment_1"]
    model.run(PROMPT, IMAGES[:1], keep=1.0, max_new_tokens=1)
    assert sorted(model.graphs._loaded) == ["segment_0", "segment_1", "vision"]
    model.run(PROMPT, IMAGES[:1], keep=0.83, max_new_tokens=1)
    assert "stage_v16_w1_r0.5" in model.graphs._loaded


def test_decoding_keeps_its_caches_and_allocates_little(model):
    session, peaks = model.session(1.0), []
    session.append(PROMPT, IMAGES[:1])
    stream = session.stream(Request(max_new_tokens=40))
    next(stream)
    place = session.sequence.caches[0].bindings(0, 1)[0]["key_cache_0"].ptr
    tracemalloc.start()
    for _ in stream:
        current, peak = tracemalloc.get_traced_memory()
        peaks.append(peak - current)
        tracemalloc.reset_peak()
    tracemalloc.stop()
    assert session.sequence.caches[0].bindings(0, 1)[0]["key_cache_0"].ptr == place
    assert max(peaks[5:]) < session.sequence.caches[0].nbytes / 4
