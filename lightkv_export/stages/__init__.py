"""Stages: what shortens a sequence between two segments. Pure functions of tensors; a method is one file.

`lightkv_stage` and `merge_spans` run eagerly on whole tensors (the reference applies them to the untouched Hugging Face
model); `StageGraph` is the same arithmetic as a module that exports to standard operators.
"""

from __future__ import annotations

from lightkv_export.stages.lightkv import ImportanceFn, StageGraph, importance, lightkv_stage, merge_spans

__all__ = ["ImportanceFn", "StageGraph", "importance", "lightkv_stage", "merge_spans"]
