"""Text in and out: tokenizer, messages to token ids with images expanded, and token ids back to text while they
arrive."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lightkv_export.errors import BundleError, UserError
from lightkv_export.manifest import Manifest, Size
from lightkv_export.runtime.template import ChatTemplate
from lightkv_export.runtime.video import video_error

ROLES = ("system", "user", "assistant")
MAX_PENDING = 8  # tokens that may be held back for an unfinished character (UTF-8 has at most 4 bytes)


@dataclass(frozen=True)
class Message:
    """One turn: its parts in order, a text or None for an image."""

    role: str
    parts: tuple[str | None, ...]

    @property
    def num_images(self) -> int:
        """How many images it shows."""
        return self.parts.count(None)

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates of vision-language models take."""
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in self.parts]
        return {"role": self.role, "content": content}


class Chat:
    """A bundle's tokenizer and chat template."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.tokenizer = _load_tokenizer(root / "tokenizer.json")
        self.image_token_id = manifest.image_token_id
        self.image_token = self.tokenizer.id_to_token(self.image_token_id)
        if self.image_token is None:
            raise BundleError(f"tokenizer.json has no token {self.image_token_id}, the image token of lightkv.json")
        for size in manifest.sizes:
            if size.prompt.count(self.image_token) != size.units:
                raise BundleError(
                    f"the prompt of size {size.name} shows {self.image_token!r} "
                    f"{size.prompt.count(self.image_token)} times for {size.units} units",
                    fix="export the bundle again",
                )
        variables = special_tokens(root / "tokenizer_config.json")
        self._bos = variables.get("bos_token")
        self._template = ChatTemplate(_read(root / "chat_template.jinja"), variables)

    def message(self, role: str, parts: Sequence[str | None]) -> Message:
        """A checked message.

        Raises:
            UserError: unknown role, a user's message without text, or a text that contains the image token itself.
        """
        if role not in ROLES:
            raise UserError(f"a message has role {role!r}", expected=f"one of: {', '.join(ROLES)}")
        text = "".join(part for part in parts if part is not None)
        if role == "user" and not text.strip():
            raise UserError("the prompt is empty", expected="some text", fix="say what the model should do")
        if self.image_token in text:
            raise UserError(
                f"the text contains the image token {self.image_token!r}",
                expected="plain text; images are passed beside it",
                fix=f"remove {self.image_token!r} from the text; every image given gets its place by itself",
            )
        return Message(role, tuple(parts))

    def ids(self, messages: Sequence[Message], sizes: Sequence[Size] = ()) -> list[int]:
        """Token ids of a conversation up to and including the start of the assistant's answer; every image placeholder
        as often as there are vision tokens. The same ids as Hugging Face's `AutoProcessor.apply_chat_template`.

        Args:
            sizes: of the images of all messages, in order.

        Raises:
            UserError: the template refuses the messages. BundleError: it shows another number of images.
        """
        text = self._template.render([message.as_dict() for message in messages], add_generation_prompt=True)
        between = text.split(self.image_token)
        if len(between) - 1 != len(sizes):
            raise BundleError(
                f"the chat template shows {len(between) - 1} images for {len(sizes)} given",
                fix="check chat_template.jinja of the bundle",
            )
        text = between[0] + "".join(size.prompt + after for size, after in zip(sizes, between[1:], strict=True))
        # A template that writes the BOS token itself must not get a second one from the tokenizer.
        add_special_tokens = not (self._bos and text.startswith(self._bos))
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        units = [size.tokens for size in sizes for _ in range(size.units)]
        if ids.count(self.image_token_id) != len(units):
            raise BundleError(
                f"the tokenizer finds {ids.count(self.image_token_id)} image tokens where {len(units)} are written",
                expected=f"{self.image_token!r} as a special token of tokenizer.json",
                fix="export the bundle again",
            )
        left = iter(units)
        return [one for one in ids for _ in range(next(left) if one == self.image_token_id else 1)]

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def answer(self, ids: Sequence[int]) -> Message:
        """Generated ids -> the assistant's message, as the next rendering of the conversation shows it."""
        return Message("assistant", (self.decode(ids).replace(self.image_token, "").strip(),))

    def parse(self, messages: Sequence[Mapping[str, Any]], num_images: int) -> list[Message]:
        """Messages as other libraries write them -> checked `Message`s: content is a text, or parts {"type": "image"}
        and {"type": "text", "text": ...}.

        Raises:
            UserError: a role, a part or the number of images is wrong, or the last message is not the user's.
        """
        parsed = [self.message(str(message.get("role")), _parts(message.get("content"))) for message in messages]
        if not parsed or parsed[-1].role != "user":
            raise UserError(
                "the conversation does not end with a user's message", expected="a last message with role user"
            )
        shown = sum(message.num_images for message in parsed)
        if shown != num_images:
            raise UserError(
                f"the messages show {shown} images, {num_images} were given",
                expected='as many images as parts {"type": "image"}',
            )
        return parsed


class Detokenizer:
    """Token ids to text piece by piece. Only whole characters are handed out; the cost per token is bounded.

    Ids are decoded from a prefix that ends where the last piece ended, so that spaces and merges come out as in one
    decode.
    """

    def __init__(self, chat: Chat) -> None:
        self._decode = chat.decode
        self._ids: list[int] = []
        self._prefix = self._read = 0

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps ""."""
        self._ids.append(token)
        before = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        if text.endswith("\ufffd") and len(self._ids) - self._read < MAX_PENDING:
            return ""  # perhaps the first bytes of a character
        return self._piece(before, text)

    def finish(self) -> str:
        """What was held back."""
        before = self._decode(self._ids[self._prefix : self._read])
        return self._piece(before, self._decode(self._ids[self._prefix :]))

    def _piece(self, before: str, text: str) -> str:
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(before) :]


def _parts(content: Any) -> list[str | None]:
    """The content of a message -> texts, and None for each image."""
    if isinstance(content, str):
        return [content]
    parts: list[str | None] = []
    for part in content or []:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "video":
            raise video_error("a part of a message")
        if kind == "image":
            parts.append(None)
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            raise UserError(
                f"a message has the part {part!r}", expected='{"type": "image"} or {"type": "text", "text": ...}'
            )
    return parts


def special_tokens(path: Path) -> dict[str, str]:
    """The named special tokens of tokenizer_config.json (`bos_token`, ...), for templates; {} if there is no such
    file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON: {error}", fix="export the bundle again") from None
    named = {name: value for name, value in config.items() if name.endswith("_token") and value}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _load_tokenizer(path: Path) -> Tokenizer:
    _read(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception
        raise BundleError(f"{path} cannot be used: {error}", fix="export the bundle again") from None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}", fix="export the bundle again") from None
