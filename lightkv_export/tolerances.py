"""How far an exported graph may be from the reference: the one table. Standard library only.

A recipe overrides single values in its `[tolerances]` table, as `"float16.logits" = 0.5`. Measured values behind the
defaults: README, "What is measured".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from lightkv_export.errors import UserError


@dataclass(frozen=True)
class Tolerances:
    """Limits for one dtype.

    Attributes:
        logits: largest absolute difference of any logit, keep 1.0 and below.
        logits_share: largest ||difference|| / ||reference|| of one step's logits.
        tie: two reference logits closer than this are a tie: either token is right.
        top1: least share of steps whose best token is the reference's (ties count as agreement).
    """

    logits: float
    logits_share: float
    tie: float
    top1: float


# In float16 a merge decision near a tie may go the other way, which moves logits by much more than rounding does; so
# the share and the top-1 agreement carry the gate there, and the absolute limit only catches nonsense.
TOLERANCES = {
    "float32": Tolerances(logits=1e-4, logits_share=1e-4, tie=1e-5, top1=1.0),
    "float16": Tolerances(logits=2.0, logits_share=0.1, tie=0.1, top1=0.9),
    "bfloat16": Tolerances(logits=4.0, logits_share=0.3, tie=0.5, top1=0.8),
}

PIXELS = 1e-5  # of any dtype: largest difference of a pixel value, as a share of the largest value


def tolerances_for(dtype: str, overrides: Mapping[str, float]) -> Tolerances:
    """The table's row for `dtype` with a recipe's overrides; raises UserError for a key that means nothing."""
    names = [item.name for item in fields(Tolerances)]
    known = [f"{kind}.{name}" for kind in TOLERANCES for name in names]
    for key in overrides:
        if key not in known:
            raise UserError(f"unknown tolerance {key!r}", expected=f"one of {', '.join(known)}")
    own = {name: overrides[f"{dtype}.{name}"] for name in names if f"{dtype}.{name}" in overrides}
    return replace(TOLERANCES[dtype], **own)
