"""The named steps of an export: progress for people, errors that say which step failed. Standard library only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightkv_export.errors import LightKVError, StepError

NOTE = "note: "  # what a step's name starts with if it is news that should stay on the screen

OnStep = Callable[[str, int, int], None]
"""Called as (what is being done, done, in all); bytes while weights are written, else steps."""


@dataclass
class Steps:
    """Names the steps as they run: progress for people, `StepError` for what goes wrong, files for `--dump`."""

    on_step: OnStep
    dump: Path | None
    done: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str, what: str = "") -> Iterator[None]:
        """The block is step `name`, or the part of it that concerns `what`."""
        self.on_step(f"{name} {what}".strip(), len(self.done), 0)
        start = time.perf_counter()
        try:
            yield
        except (LightKVError, OSError):
            raise
        except Exception as error:
            before = [f"{step} {seconds:.1f} s" for step, seconds in self.done.items() if step != name]
            raise StepError(
                name, before, f"{type(error).__name__}: {error}", fix="report this with --debug's output"
            ) from error
        self.done[name] = self.done.get(name, 0.0) + time.perf_counter() - start

    def keep(self, name: str, text: Callable[[], str]) -> None:
        """Writes an intermediate result into the dump directory, if there is one."""
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            (self.dump / name).write_text(text(), encoding="utf-8")
