"""Every family end to end: a small random model of its architecture, exported with two image sizes, against Hugging
Face with the checkpoint's own processor.

Most of the time is lowering: about 0.9 s of CPU per decoder layer and 3.5 s per stage graph, of which there is one for
every stage and unit length. So each family has the fewest that give keep 0.55, and what else a bundle can be (portable
or modern, one stage or two, one unit length or two) is spread over the families that share code.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models_next import make_llava_next, make_llava_onevision  # noqa: E402
from models_qwen import make_qwen2_5_vl, make_qwen2_vl, make_qwen3_vl  # noqa: E402
from models_tiles import make_idefics3, make_internvl, make_smolvlm  # noqa: E402

from lightkv_export.build import vision_shapes  # noqa: E402
from lightkv_export.bundle import open_bundle  # noqa: E402
from lightkv_export.errors import UserError  # noqa: E402
from lightkv_export.families import FAMILIES, family_named  # noqa: E402
from lightkv_export.frozen_sets import FrozenSet, Question  # noqa: E402
from lightkv_export.lint import Finding, context_for, graphs_of, lint_graphs  # noqa: E402
from lightkv_export.pipeline import ExportRequest, export_bundle  # noqa: E402
from lightkv_export.recipe import StageSpec  # noqa: E402
from lightkv_export.reference import EagerSession, Encoded, Reference  # noqa: E402
from lightkv_export.runtime import Model, load  # noqa: E402
from lightkv_export.runtime.generation import Request  # noqa: E402
from lightkv_export.runtime.image import pixel_values  # noqa: E402
from lightkv_export.verify import verify_bundle  # noqa: E402
from lightkv_export.verify_cases import ONE_IMAGE, picture, stages_of  # noqa: E402
from lightkv_export.verify_set import verify_answers  # noqa: E402

NEW_TOKENS = 24
TIE = 1e-5


ONE_STAGE = {"layers": 10, "stages": ("0:1:0.5",)}  # both keep 0.55, up to rounding
TWO_STAGES = {"layers": 4, "stages": ("0:2:0.5", "1:1:0.34")}


@dataclass(frozen=True)
class Small:
    """A family's small model, the sizes of its bundle (width, height), and how it is exported."""

    make: Callable[..., Path]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    layers: int
    stages: tuple[str, ...]
    lowering: str = "modern"
    seed: int = 0


FAMILIES_UNDER_TEST = {
    "llava_next": Small(make_llava_next, ((64, 64), (61, 41)), **TWO_STAGES),
    # The first size is shrunk bilinearly.
    "llava_onevision": Small(make_llava_onevision, ((133, 100), (64, 64)), **ONE_STAGE, lowering="portable"),
    "qwen2_vl": Small(make_qwen2_vl, ((96, 64), (64, 96)), **TWO_STAGES, lowering="portable"),
    "qwen2_5_vl": Small(make_qwen2_5_vl, ((96, 64), (56, 80)), **ONE_STAGE),
    # No stage before the last DeepStack layer.
    "qwen3_vl": Small(make_qwen3_vl, ((96, 64), (64, 96)), layers=6, stages=("1:2:0.5", "2:1:0.5"), seed=1),
    "internvl": Small(make_internvl, ((128, 64), (64, 64)), **TWO_STAGES),
    "smolvlm": Small(make_smolvlm, ((128, 128), (128, 64)), **ONE_STAGE, lowering="portable", seed=1),
    "idefics3": Small(make_idefics3, ((128, 128), (128, 64)), **ONE_STAGE, seed=1),
}
SHOWN = {"first size": (0,), "second size": (1,), "both sizes": (0, 1), "text only": ()}


@dataclass
class Pair:
    """A bundle and what it was made from. Pictures are named by their place in the bundle's sizes."""

    small: Small
    checkpoint: Path
    bundle: Path

    @cached_property
    def model(self) -> Model:
        return load(self.bundle, threads=1)

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.checkpoint, family_named(self.model.manifest.family))

    def pictures(self, shown: tuple[int, ...]) -> list:
        return [picture(place, *self.small.sizes[place]) for place in shown]

    def prompt(self, shown: tuple[int, ...]) -> tuple[str, Encoded]:
        """A question, and what Hugging Face's processor makes of it and the pictures."""
        text = "Which of them is brighter?"
        content = [*({"type": "image"} for _ in shown), {"type": "text", "text": text}]
        return text, self.reference.encode([{"role": "user", "content": content}], self.pictures(shown))

    def units(self, shown: tuple[int, ...]) -> list[int]:
        sizes = [self.model.manifest.sizes[place] for place in shown]
        return [size.tokens for size in sizes for _ in range(size.units)]


@pytest.fixture(scope="module", params=FAMILIES_UNDER_TEST)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.set_num_threads(1)
    small, root = FAMILIES_UNDER_TEST[request.param], tmp_path_factory.mktemp(request.param)
    checkpoint = _made(small, root)
    return Pair(small, checkpoint, _exported(small, checkpoint, root / "bundle"))


def _made(small: Small, root: Path) -> Path:
    name = "num_hidden_layers" if small.make.__module__ == "models_qwen" else "layers"
    return small.make(root / "model", small.seed, **{name: small.layers})


def _exported(small: Small, checkpoint: Path, out: Path, dtype: str = "fp32") -> Path:
    request = ExportRequest(
        str(checkpoint),
        out,
        stages=tuple(StageSpec.parse(text) for text in small.stages),
        image_sizes=small.sizes,
        dtype=dtype,
        lowering=small.lowering,
        max_tokens=2048,
    )
    return export_bundle(request).path


def test_every_family_is_tested() -> None:
    assert FAMILIES_UNDER_TEST.keys() | {"llava"} == FAMILIES.keys()  # LLaVA-1.5: test_export.py


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_keep_1_says_what_hugging_face_says(pair: Pair, shown: tuple[int, ...]) -> None:
    text, prompt = pair.prompt(shown)
    expected = pair.reference.generate(prompt, NEW_TOKENS)
    rows: list[np.ndarray] = []
    result = pair.model.run(
        text,
        pair.pictures(shown),
        keep=1.0,
        max_new_tokens=NEW_TOKENS,
        on_logits=lambda row: rows.append(row.copy()),
    )
    assert result.prompt_tokens == len(prompt.ids)
    assert_same_tokens(list(result.token_ids), expected, rows)
    assert len(set(expected)) > 8, "too easy"


@pytest.mark.parametrize("shown", [(1,), (0, 1)], ids=["second size", "both sizes"])
def test_compressed_decoding_equals_eager(pair: Pair, shown: tuple[int, ...]) -> None:
    manifest = pair.model.manifest
    keep = manifest.keep_named()
    assert stages_of(keep).keys() == {size.tokens for size in manifest.sizes}
    assert keep.keep == pytest.approx(0.55, abs=0.01)  # of the default size
    assert all(plan.keep == pytest.approx(0.55, abs=0.01) for plan in keep.plans)
    text, prompt = pair.prompt(shown)
    session = EagerSession(pair.reference, stages_of(keep), manifest.positions)
    logits = session.feed(prompt.ids.tolist(), prompt.image_inputs, pair.units(shown))
    tokens, expected = session.greedy(logits, NEW_TOKENS, manifest.eos_token_ids)
    rows: list[np.ndarray] = []
    result = pair.model.run(
        text,
        pair.pictures(shown),
        keep=keep.requested,
        max_new_tokens=NEW_TOKENS,
        on_logits=lambda row: rows.append(row.copy()),
    )
    assert_same_tokens(list(result.token_ids), tokens, rows)
    for found, wanted in zip(rows, expected, strict=False):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-4)
    counts = [keep.plan_for(tokens).vision_tokens_per_layer for tokens in pair.units(shown)]
    assert result.vision_tokens_per_layer == tuple(np.sum(counts, axis=0))


def assert_same_tokens(found: list[int], expected: list[int], rows: list[np.ndarray]) -> None:
    """Token for token; where two logits differ by less than TIE, either token is right and the rest may differ."""
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if ours != theirs:
            gap = rows[place].max() - rows[place][theirs]
            assert gap < TIE, f"new token {place}: {ours} for {theirs}, {gap} apart"
            return
    assert len(found) == len(expected)


def test_pixels_are_the_processors(pair: Pair) -> None:
    for place, size in enumerate(pair.model.manifest.sizes):
        (image,) = pair.pictures((place,))
        expected = np.asarray(pair.reference.image_inputs([image])["pixel_values"])
        found = pixel_values(pair.model.manifest.preprocess, image, size)
        assert found.size == expected.size
        assert np.abs(found - expected.reshape(found.shape)).max() <= 1e-5 * np.abs(expected).max()


def test_a_second_turn_with_another_size(pair: Pair) -> None:
    session = pair.model.session(1.0)
    first, second = pair.pictures((0, 1))
    session.append("What is this?", [first])
    session.generate(Request(max_new_tokens=4))
    session.append("And this?", [second])
    prompt = pair.reference.encode([message.as_dict() for message in session.messages], [first, second])
    assert session.generate(Request(max_new_tokens=2)).prompt_tokens == len(prompt.ids)


def test_a_picture_of_another_size_is_fitted(pair: Pair) -> None:
    wide = min(pair.model.manifest.sizes, key=lambda size: size.height / size.width)
    result = pair.model.run("What is this?", [picture(7, 4 * wide.width, 4 * wide.height + 3)], max_new_tokens=1)
    _, prompt = pair.prompt(())
    assert result.prompt_tokens > len(prompt.ids)
    assert result.vision_tokens_per_layer[0] == wide.image_tokens


def test_a_frozen_set_is_answered_as_by_the_reference(pair: Pair) -> None:
    """Its pictures have sizes that the bundle does not have, and that the processor would lay out in other ways."""
    pictures = {"wide.png": picture(3, 150, 71), "high.png": picture(4, 90, 131)}
    questions = tuple(Question(name, "any", "What is this?", "one two three") for name in pictures)
    checks = verify_answers(pair.bundle, FrozenSet("odd", questions, {k: _png(v) for k, v in pictures.items()}, ""))
    assert [check.keep for check in checks] == [keep.requested for keep in pair.model.manifest.keeps]
    assert all(check.passed for check in checks), checks


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_tensorrt_takes_its_graphs(pair: Pair) -> None:
    portable = pair.small.lowering == "portable"
    findings = _findings(pair.bundle, "orin-nano-8gb@jp6.2" if portable else "thor-t5000")
    assert {item.rule for item in findings} == (set() if portable else {"attention-type"})  # float32, as it should
    assert all("FP32" in item.message for item in findings)
    shapes = vision_shapes(open_bundle(pair.bundle, verify=False))
    assert len(shapes["pixel_values"]) == len(pair.small.sizes)


def _findings(bundle: Path, target: str) -> list[Finding]:
    """What the rules say, and what TensorRT's own parser says where it is installed; one has no use for the other."""
    graphs = graphs_of(bundle)
    findings = lint_graphs(graphs, context_for(target))
    if importlib.util.find_spec("tensorrt_rtx"):
        from lightkv_export.lint import rtx

        findings += [item for graph in graphs for item in rtx.parse(graph.path, graph.name, graph.fixed_axes)]
    return findings


@pytest.mark.parametrize(
    ("name", "lowering", "targets"),
    [
        ("qwen3_vl", "modern", ("thor-t5000", "trt11.4")),
        ("internvl", "portable", ("orin-nano-8gb@jp6.2", "trt10.13", "trt11.4")),
    ],
)
def test_float16(tmp_path: Path, name: str, lowering: str, targets: tuple[str, ...]) -> None:
    small = _smallest(name, lowering)
    bundle = _exported(small, _made(small, tmp_path), tmp_path / "bundle", "fp16")
    for target in targets:
        assert _findings(bundle, target) == []
    checks = verify_bundle(bundle, cases=(ONE_IMAGE,), new_tokens=16, threads=1)
    assert {check.keep for check in checks} == {keep.requested for keep in open_bundle(bundle).manifest.keeps}
    assert all(check.passed for check in checks), checks


def test_bfloat16(tmp_path: Path) -> None:
    """TensorRT takes it; ONNX Runtime has no kernels for it on a CPU, and the gate says so instead of passing."""
    small = _smallest("llava_next", "modern")
    bundle = _exported(small, _made(small, tmp_path), tmp_path / "bundle", "bf16")
    assert _findings(bundle, "thor-t5000") == []
    failed = [check for check in verify_bundle(bundle, cases=(ONE_IMAGE,), new_tokens=1) if not check.passed]
    assert {check.metric for check in failed} == {"the graphs run"}
    assert all("--dtype fp32 or fp16 for a CPU" in check.note for check in failed)


def _smallest(name: str, lowering: str) -> Small:
    """One size, and one stage in front of the last layer. The seed is chosen: with seed 0, InternVL's float16 logits
    behind the stage are 0.15 of their norm away from float32's (limit 0.1), at keep 1.0 only 0.0025."""
    small = FAMILIES_UNDER_TEST[name]
    layers, stages = int(small.stages[0][0]) + 2, small.stages[:1]
    return replace(small, sizes=small.sizes[:1], layers=layers, stages=stages, lowering=lowering, seed=1)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen2_vl", {"positions": "restart"}, "position policy 'restart' for a model with 3-D rotary positions"),
        ("qwen2_vl", {"image_sizes": ((96, 64), (97, 65))}, "image sizes 96x64 and 97x65 are one to this model"),
        ("qwen3_vl", {"stages": (StageSpec(0, 2, 0.5),)}, "adds vision features to its tokens up to layer 1"),
        ("internvl", {"image_sizes": ((64, 64),), "stages": (StageSpec(1, 9, 0.5),)}, "would do nothing"),
        ("llava_next", {"max_tokens": 64, "keeps": (1.0,)}, "vision tokens does not fit into 64 tokens"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path: Path, name: str, settings: dict, message: str) -> None:
    checkpoint = _made(FAMILIES_UNDER_TEST[name], tmp_path)
    with pytest.raises(UserError, match=message):
        export_bundle(ExportRequest(str(checkpoint), tmp_path / "bundle", **settings))
    assert not (tmp_path / "bundle").exists()
