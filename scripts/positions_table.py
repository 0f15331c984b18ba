"""Measures tiny-llava's accuracy and writes the tables of docs/accuracy.md.

    python scripts/positions_table.py [--bundle DIR] [--set NAME] [--limit N] [--controls N] [--workers N]

Tables: keep x positions policy; keep x skill at the recipe's policy; and the control, keep x what weighs the merges
(the prompt, another prompt, chance, nothing), also with more stages. The first two run the exported bundle (ONNX
Runtime; one bundle serves all policies, which differ in position ids alone), the control the eager model. Results go to
docs/accuracy.json as they come, so a run that was stopped goes on; another bundle or set starts anew. Without --bundle
the recipe is exported first. About half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from branches import GUIDANCES, judge_all, route_of

from lightkv_export.cli.console import progress
from lightkv_export.evaluate import Share, answers_of, difference, ratio, right_answers, share
from lightkv_export.frozen_sets import FrozenSet, load_set
from lightkv_export.manifest import Keep
from lightkv_export.recipe import POSITIONS, StageSpec, load_recipe
from lightkv_export.report import write_text
from lightkv_export.runtime import Model, load

MODEL = "tiny-llava"
DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, PAGE = DOCS / "accuracy.json", DOCS / "accuracy.md"
Cases: TypeAlias = "Mapping[str, Sequence[StageSpec]]"
"""Stages by what a table's column says."""

HARDER: Cases = {  # 576 tokens become 9, at once or by degrees
    text: tuple(map(StageSpec.parse, text.split()))
    for text in (
        "0:4:0.5 1:2:0.5 2:1:0.5 3:1:0.5 4:1:0.5 5:1:0.5",
        "0:4:0.5 2:2:0.5 4:1:0.5 5:1:0.5 6:1:0.5 7:1:0.5",
    )
}
NAMES = {
    "prompt": "the prompt (the method)",
    "shuffled": "a question about another image",
    "random": "random numbers",
    "uniform": "nothing: plain means",
}


class Results:
    """Which answers were right, as text of 0 and 1 by name of the run, kept in a file."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = path, dict(facts)
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.runs: dict[str, str] = held.get("runs", {}) if held.get("facts") == self.facts else {}

    def has(self, run: str, questions: int) -> bool:
        """Whether the run is there, with so many questions."""
        return len(self.runs.get(run, "")) == questions

    def __getitem__(self, run: str) -> np.ndarray:
        return np.array([mark == "1" for mark in self.runs[run]])

    def add(self, run: str, right: Sequence[bool]) -> None:
        """Stores a run."""
        self.runs[run] = "".join("01"[int(mark)] for mark in right)
        self.path.parent.mkdir(exist_ok=True)
        write_text(self.path, json.dumps({"facts": self.facts, "runs": self.runs}, indent=1) + "\n")


def measure_policies(model: Model, frozen: FrozenSet, results: Results) -> None:
    """Runs "POLICY KEEP" for every policy and keep below 1.0, and "KEEP 1"."""
    missing = {"": [1.0]} | {policy: [k.requested for k in model.manifest.keeps if k.stages] for policy in POSITIONS}
    for policy, keeps in missing.items():
        under = _with_policy(model, policy) if policy else model
        for keep in keeps:
            run = f"{policy} {keep:g}".strip()
            if not results.has(run, len(frozen.questions)):
                print(f"bundle, {run}", file=sys.stderr)
                with progress() as on_question:
                    answers = answers_of(under, frozen, [keep], on_question=on_question)[keep].answers
                results.add(run, right_answers(frozen.questions, answers))


def measure_controls(model: Model, frozen: FrozenSet, cases: Cases, results: Results, workers: int) -> None:
    """Runs "GUIDANCE CASE POLICY" of the eager model at the bundle's policy."""
    policy = model.manifest.positions
    routes = {
        f"{name} {case} {policy}": route_of(stages, policy, name)
        for case, stages in cases.items()
        for name in GUIDANCES
    }
    if not all(results.has(run, len(frozen.questions)) for run in routes):
        judged = judge_all(MODEL, frozen, list(routes.values()), workers, "control")
        for run, route in routes.items():
            results.add(run, [item.right for item in judged[route]])


def policy_table(model: Model, images: np.ndarray, results: Results) -> list[str]:
    """keep x policy: accuracy with interval, and share of keep 1.0."""
    full = results["1"]
    default = model.manifest.positions
    names = [f"{policy} (default)" if policy == default else policy for policy in POSITIONS]
    lines = _head("keep", "achieved", "stages", *names)
    lines.append(_row("1.0", "1.000", "none", _text(share(full, images)), "the same", "the same"))
    for keep in (keep for keep in model.manifest.keeps if keep.stages):
        cells = []
        for policy in POSITIONS:
            right = results[f"{policy} {keep.requested:g}"]
            relative = f"; {_text(ratio(right, full, images))} of keep 1.0" if full.any() else ""
            cells.append(f"{_text(share(right, images))}{relative}")
        lines.append(_row(f"{keep.requested:g}", f"{keep.keep:.3f}", " ".join(map(str, _specs(keep))), *cells))
    return lines


def skill_table(model: Model, frozen: FrozenSet, results: Results) -> list[str]:
    """skill x keep at the bundle's policy."""
    skills = np.array([question.skill for question in frozen.questions])
    keeps = model.manifest.keeps
    runs = [f"{model.manifest.positions} {keep.requested:g}" if keep.stages else "1" for keep in keeps]
    lines = _head("skill", "questions", *(f"keep {keep.requested:g}" for keep in keeps))
    for skill in np.unique(skills):
        chosen = skills == skill
        lines.append(_row(str(skill), str(chosen.sum()), *(f"{results[run][chosen].mean():.1%}" for run in runs)))
    return lines


def control_table(policy: str, cases: Cases, images: np.ndarray, results: Results) -> list[str]:
    """guidance x case: accuracy with interval, and the paired difference to the prompt's guidance."""
    lines = _head("merges weighed by", *cases)
    for name in GUIDANCES:
        cells = []
        for case in cases:
            right, own = (results[f"{run} {case} {policy}"] for run in (name, "prompt"))
            apart = "" if name == "prompt" else f"; difference {_points(difference(right, own, images))}"
            cells.append(f"{_text(share(right, images))}{apart}")
        lines.append(_row(NAMES[name], *cells))
    return lines


def write_section(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with the text between the markers of section `name` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{PAGE} has no markers {begin} and {end}")
    return "\n".join([before + begin, *lines, end]) + after


def _with_policy(model: Model, policy: str) -> Model:
    manifest = replace(model.manifest, positions=policy)
    return Model(replace(model.bundle, manifest=manifest), model.backend)


def _specs(keep: Keep) -> tuple[StageSpec, ...]:
    return tuple(StageSpec(s.layer, s.windows_per_side, s.discard_ratio) for s in keep.stages)


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*("---" for _ in names))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: Share) -> str:
    return f"{value.value:.1%} [{value.low:.1%}, {value.high:.1%}]"


def _points(value: Share) -> str:
    return f"{100 * value.value:+.1f} points [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def _exported(out: Path) -> Path:
    from lightkv_export.pipeline import ExportRequest, export_bundle

    keeps = tuple(load_recipe(MODEL).schedules) or (0.75, 0.55, 0.4)
    with progress() as on_step:
        return export_bundle(ExportRequest(MODEL, out, keeps=keeps), on_step).path


def _images(frozen: FrozenSet) -> np.ndarray:
    return np.array([question.image for question in frozen.questions])


def main() -> int:
    """Measures what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="a float32 bundle of tiny-llava (default: export one)")
    parser.add_argument("--set", default="tiny-eval", help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only N questions, always the same")
    parser.add_argument("--controls", type=int, default=400, help="questions of the control (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the control (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the bundle's graphs (default: all cores)")
    parser.add_argument("--out", type=Path, default=PAGE, help="page with the markers (default: %(default)s)")
    arguments = parser.parse_args()
    whole = load_set(arguments.set)
    frozen, few = whole.sample(arguments.limit), whole.sample(min(arguments.controls, arguments.limit or 10**9))
    with tempfile.TemporaryDirectory() as scratch:
        model = load(arguments.bundle or _exported(Path(scratch) / MODEL), threads=arguments.threads)
        weights = {name: entry.sha256 for name, entry in model.manifest.files.items() if name.endswith(".safetensors")}
        stages = {f"{keep.requested:g}": " ".join(map(str, _specs(keep))) for keep in model.manifest.keeps}
        facts = {"set": whole.name, "sha256": whole.sha256, "weights": weights, "stages": stages}
        results = Results(arguments.out.with_suffix(".json"), facts)
        measure_policies(model, frozen, results)
        kept = {f"keep {keep.requested:g}": _specs(keep) for keep in model.manifest.keeps if keep.stages}
        measure_controls(model, few, kept, results, arguments.workers)
        measure_controls(model, frozen, HARDER, results, arguments.workers)
        page = arguments.out.read_text(encoding="utf-8")
        total, part = len(frozen.questions), len(few.questions)
        caption = f"Exact match on {whole.name}, {total} questions; 95 % bootstrap intervals over images."
        page = write_section(page, "policies", [caption, "", *policy_table(model, _images(frozen), results)])
        page = write_section(page, "skills", skill_table(model, frozen, results))
        policy = model.manifest.positions
        caption = f"Eager model, {part} questions, policy {policy}; differences are paired."
        page = write_section(page, "control", [caption, "", *control_table(policy, kept, _images(few), results)])
        caption = f"The same on {total} questions, with more stages than any schedule of the recipe."
        page = write_section(page, "harder", [caption, "", *control_table(policy, HARDER, _images(frozen), results)])
        write_text(arguments.out, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
