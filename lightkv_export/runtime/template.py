"""Chat templates: messages to text with the template that ships with the checkpoint, in a Jinja2 sandbox.

The environment is the one of Hugging Face's `apply_chat_template` (trim_blocks, lstrip_blocks, loop controls, `tojson`,
`raise_exception`, `strftime_now`, and `{% generation %}` as a plain block), so the text is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightkv_export.errors import BundleError, UserError


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's part for training; here it renders its body."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template; `variables` are the special tokens that it may use (bos_token, eos_token, ...)."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BundleError(
                f"chat_template.jinja cannot be compiled: {error}", fix="export the bundle again"
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Messages ({"role", "content": parts of {"type": "image"} or {"type": "text", "text"}}) -> text.

        Raises:
            UserError: the template refuses these messages, in its own words.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template refuses these messages: {error}", fix="change the roles or contents"
            ) from None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """Jinja's own filter escapes HTML characters; templates do not want that."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
