"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, BLOCK = "ok", "warn", "block"


@dataclass(frozen=True)
class Check:
    """One fact about the machine.

    Attributes:
        status: "ok"; "warn": works, but worse than it could; "block": something will not work.
        found, expected, to_do: as in every message of this package; `to_do` is empty where nothing need be done.
    """

    group: str
    name: str
    status: str
    found: str
    expected: str = ""
    to_do: str = ""
