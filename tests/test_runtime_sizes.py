"""Several image sizes in one request, units with text between them, mRoPE positions and DeepStack: against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from toy_model import IMAGE, D
from toy_sizes import KEEPS, SQUARE, TALL, WIDE, Chunk, SizedToy

from lightkv_export.errors import BundleError, UserError
from lightkv_export.runtime import Model, load
from lightkv_export.runtime.generation import Request
from lightkv_export.runtime.image import ImageFeatures, sized_pixels

PROMPT = "What is in this picture?"
PLAIN, MROPE = SizedToy(), SizedToy(mrope=True)


def picture(size, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3 * size.height, 3 * size.width, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["scatter", "append"])
def model(request, tmp_path_factory) -> Model:
    return load(PLAIN.bundle(tmp_path_factory.mktemp("sized") / "b", request.param).path, threads=1)


@pytest.fixture(scope="module")
def mrope(tmp_path_factory) -> Model:
    return load(MROPE.bundle(tmp_path_factory.mktemp("mrope") / "b", eos_token_ids=()).path, threads=1)


def shown(toy: SizedToy, model: Model, images: list) -> list:
    pixels = [sized_pixels(model.manifest, image) for image in images]
    return [toy.shown(one.values, one.size) for one in pixels]


def test_an_image_gets_the_size_of_its_shape(model):
    sizes = [sized_pixels(model.manifest, picture(size)).size for size in (SQUARE, WIDE, TALL)]
    assert sizes == [SQUARE, WIDE, TALL]
    for size in sizes:
        features, (expected,) = model.encode(picture(size)), shown(PLAIN, model, [picture(size)])
        assert features.size == size and features.deepstack == ()
        np.testing.assert_allclose(features.rows, expected.rows, atol=1e-5)


@pytest.mark.parametrize("sizes", [(WIDE,), (TALL,), (SQUARE, WIDE), (WIDE, TALL, SQUARE, WIDE)], ids=len)
@pytest.mark.parametrize("keep", KEEPS)
def test_mixed_sizes_equal_the_oracle(model, keep, sizes):
    """Keep 0.83 has a stage for either unit after the same layer, keep 0.9 for one of them only."""
    images, logits = [picture(size, seed) for seed, size in enumerate(sizes)], []
    result = model.run(PROMPT, images, keep=keep, max_new_tokens=6, on_logits=logits.append)
    message = model.chat.message("user", [*[None] * len(images), PROMPT])
    ids = model.chat.ids([message], sizes)
    prompt = Chunk(ids, shown(PLAIN, model, images))
    for step, found in enumerate(logits):
        chunks = [prompt, *(Chunk([token]) for token in result.token_ids[:step])]
        np.testing.assert_allclose(found, PLAIN.oracle(chunks, KEEPS[keep]), atol=2e-5)
    kept = sum(size.image_tokens // (2 if size.tokens in KEEPS[keep] else 1) for size in sizes)
    whole = sum(size.image_tokens for size in sizes)
    assert result.vision_tokens_per_layer == (whole, whole, kept)
    assert result.keep == (2 * whole + kept) / (3 * whole)
    rows = [vision + len(ids) - whole + 6 for vision in result.vision_tokens_per_layer]
    assert result.kv_bytes_per_layer == tuple(2 * D * 4 * count for count in rows)


def test_text_stands_between_the_units_of_an_image(model):
    message = model.chat.message("user", [None, PROMPT])
    ids, text = model.chat.ids([message], [TALL]), "USER: " + TALL.prompt + "\n" + PROMPT + " ASSISTANT:"
    before = model.chat.tokenizer.encode(text).ids
    assert ids == [one for token in before for one in [token] * (TALL.tokens if token == IMAGE else 1)]
    session = model.session(0.83)
    session.ask(PROMPT, [picture(TALL), picture(WIDE)], Request(max_new_tokens=1))
    traces = session.sequence.traces
    assert [(trace.units, trace.kept.shape) for trace in traces] == [((0, 1), (2, 8)), ((2,), (1, 12))]


def test_only_the_stages_of_the_request_are_loaded(tmp_path):
    model = load(PLAIN.bundle(tmp_path / "b").path, threads=1)
    model.run(PROMPT, [picture(SQUARE)], keep=0.9, max_new_tokens=1)
    assert sorted(model.graphs._loaded) == ["segment_0", "segment_1", "vision"]
    model.run(PROMPT, [picture(WIDE)], keep=0.9, max_new_tokens=1)
    assert sorted(model.graphs._loaded) == ["segment_0", "segment_1", "stage_v24_w1_r0.5", "vision"]


def conversation_chunks(model: Model, session, images: list, cached: int, chunks: list[Chunk]) -> list[Chunk]:
    """What was fed so far, after a rollback to `cached` tokens, and the rest of the conversation as one chunk."""
    sizes = [sized_pixels(model.manifest, image).size for image in images]
    ids = model.chat.ids(session.messages, sizes)
    positions, kept, total = MROPE.slow_positions(ids, sizes), [], 0
    for chunk in chunks:
        size = min(len(chunk.ids), cached - total)
        if size > 0:
            kept.append(Chunk(chunk.ids[:size], chunk.images, positions[:, total : total + size]))
            total += size
    seen = sum(len(chunk.images) for chunk in kept)
    return [*kept, Chunk(ids[cached:], shown(MROPE, model, images[seen:]), positions[:, cached:])]


@pytest.mark.parametrize("keep", KEEPS)
def test_mrope_and_deepstack_over_several_turns(mrope, keep):
    session, images, chunks = mrope.session(keep), [], []
    turns = [(PROMPT, [picture(WIDE, 1), picture(SQUARE, 2)]), ("And there?", [picture(WIDE, 3)]), ("Sure?", [])]
    for prompt, new in turns:
        logits = []
        images = [*images, *new]
        session.append(prompt, new)
        before = list(session.messages)
        result = session.generate(Request(max_new_tokens=4, on_logits=logits.append))
        after, session.messages = session.messages, before
        chunks = conversation_chunks(mrope, session, images, result.cached_tokens, chunks)
        session.messages = after
        position = chunks[-1].positions[:, -1:]
        for step, found in enumerate(logits):
            np.testing.assert_allclose(found, MROPE.oracle(chunks, KEEPS[keep]), atol=3e-5, err_msg=f"step {step}")
            position = position + 1
            chunks.append(Chunk([result.token_ids[step]], (), position))
        chunks.pop()  # the last token was not fed
    assert result.cached_tokens > 60


def test_mrope_text_alone_and_in_pieces(mrope):
    whole, pieces, images = [], [], [picture(WIDE, 1), picture(SQUARE, 2)]
    mrope.run(PROMPT, images, keep=1.0, max_new_tokens=3, on_logits=whole.append)
    session = mrope.session(1.0, prefill_chunk=7)  # cuts images
    session.ask(PROMPT, images, Request(max_new_tokens=3, on_logits=pieces.append))
    np.testing.assert_allclose(whole, pieces, atol=1e-5)
    logits = []
    mrope.run(PROMPT, keep=0.83, max_new_tokens=1, on_logits=logits.append)
    ids = mrope.chat.ids([mrope.chat.message("user", [PROMPT])])
    expected = MROPE.oracle([Chunk(ids, (), MROPE.slow_positions(ids, []))], ())
    np.testing.assert_allclose(logits[0], expected, atol=2e-5)


def test_encoded_images_are_used_again(mrope):
    images = [picture(WIDE, 1), picture(SQUARE, 2)]
    encoded = [mrope.encode(image) for image in images]
    assert [len(one.deepstack) for one in encoded] == [2, 2]
    first = mrope.run(PROMPT, images, max_new_tokens=5).token_ids
    assert mrope.run(PROMPT, encoded, max_new_tokens=5).token_ids == first
    stranger = ImageFeatures(encoded[0].rows, TALL, encoded[0].deepstack)
    bare = ImageFeatures(encoded[0].rows, encoded[0].size)
    for wrong, message in ((stranger, "size 8x16"), (bare, "shape")):
        with pytest.raises(UserError, match=f"an encoded image of {message}"):
            mrope.run(PROMPT, [wrong])


def test_tables_that_do_not_fit_are_bundle_errors(tmp_path, monkeypatch):
    def opened(name: str, tables: dict, toy: SizedToy = PLAIN) -> Model:
        monkeypatch.setattr(toy, "tables", lambda size: tables)
        return load(toy.bundle(tmp_path / name).path, threads=1)

    whole = PLAIN.tables(SQUARE)
    for number, (tables, message) in enumerate(
        (
            ({"pick": whole["pick"]}, "takes 'shift'"),
            (whole | {"shift": whole["shift"][:-1]}, "shift of shape"),
            (whole | {"pick": whole["pick"][:, None]}, "pick of shape"),
            (whole | {"positions": np.zeros((3, 16), int)}, "has positions"),
        )
    ):
        with pytest.raises(BundleError, match=message):
            opened(str(number), tables).encode(picture(SQUARE))
    bundle = PLAIN.bundle(tmp_path / "damaged")
    bundle.file(SQUARE.tables).write_bytes(b"x" * bundle.file(SQUARE.tables).stat().st_size)
    with pytest.raises(BundleError, match="cannot be read"):
        load(bundle.path, verify=False).encode(picture(SQUARE))
