"""Errors that a user can act on. Standard library only.

Every error of this package says what was found, what was expected and what to do. The command line prints the message
and exits with status 2; nobody sees a stack trace for a mistake in an argument, a file or a recipe.
"""

from __future__ import annotations


class LightKVError(Exception):
    """Base of all errors raised on purpose by this package.

    Args:
        found: what is wrong, with the offending value.
        expected: what would have been right, or "".
        fix: what the user should do now, or "".
    """

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found]
        if expected:
            parts.append(f"expected: {expected}")
        if fix:
            parts.append(f"to do: {fix}")
        super().__init__("\n  ".join(parts))


class UserError(LightKVError):
    """The input (argument, image, prompt, recipe, model name) cannot be used as given."""


class BundleError(LightKVError):
    """A bundle is missing, incomplete, altered or of another format version."""


class BackendError(LightKVError):
    """A runtime backend is missing, or it failed (driver, memory, unsupported operator)."""


class StepError(LightKVError):
    """A step of the export pipeline failed: names the step and the steps that ran before it."""

    def __init__(self, step: str, done: list[str], found: str, *, fix: str = "") -> None:
        self.step, self.done = step, tuple(done)
        after = f" (after {', '.join(done)})" if done else ""
        super().__init__(f"{step}{after}: {found}", fix=fix)
