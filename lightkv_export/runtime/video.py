"""Videos are recognized, so that the message says what to do; they are not read."""

from __future__ import annotations

from pathlib import PurePath

from lightkv_export.errors import UserError

SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
HEAD_BYTES = 16
_HEADS = (b"\x1a\x45\xdf\xa3", b"FLV", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3")  # Matroska and WebM, Flash, MPEG
_PICTURES = (b"heic", b"heix", b"heif", b"mif1", b"avif")  # brands of ISO files that hold pictures


def looks_like_video(head: bytes, path: PurePath | None = None) -> bool:
    """Whether a file is a video, by its first `HEAD_BYTES` and its name."""
    if path is not None and path.suffix.lower() in SUFFIXES:
        return True
    if head[4:8] == b"ftyp":
        return head[8:12] not in _PICTURES
    return head.startswith(_HEADS) or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")


def video_error(name: str) -> UserError:
    """The refusal of a video called `name`."""
    return UserError(
        f"{name} is a video; videos are not supported",
        expected="images",
        fix="take frames out of it and pass them as images, in order",
    )
