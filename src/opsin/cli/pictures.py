"""Pictures as people name them in a terminal: paths, file: and http(s) URLs, dropped or pasted into a line."""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from opsin.cli.words import is_model
from opsin.errors import MediaError

_SUFFIXES = frozenset(".avif .bmp .gif .heic .heif .ico .jfif .jpeg .jpg .png .ppm .pgm .tif .tiff .webp".split())

_PLACE = re.compile(r"messages\.(\d+)\.content\.(\d+)")

# A quoted stretch, or a run of non-blanks in which a backslash keeps the next character: how terminals paste paths.
_WORD = re.compile(r"""'([^']+)'|"([^"]+)"|((?:\\.|[^\s\\])+)""")


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://", "data:image/"))


def looks_like_picture(text: str) -> bool:
    """Whether the text can only have been meant as a picture: a URL, or a name that ends as pictures do."""
    return is_url(text) or (Path(text).suffix.lower() in _SUFFIXES and "\n" not in text)


def local_path(text: str) -> Path:
    """The path that a word of a terminal line names; ``file:`` URLs and ``~`` are understood."""
    if text.startswith("file:"):
        text = unquote(urlsplit(text).path)
    return Path(text).expanduser()


def is_file(text: str) -> bool:
    try:
        return local_path(text).is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a NUL: prose, then
        return False


def picture_url(source: str) -> str:
    """The URL under which a picture goes into a chat message; files are embedded as they are.

    Raises:
        MediaError: there is no such file.
    """
    if is_url(source):
        return source
    path = local_path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MediaError(f"Cannot read the picture {path}: {error.strerror}.") from error
    kind = mimetypes.guess_type(path.name)[0] or "image/png"  # a formality: the engine looks at the bytes
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def user_message(sources: Sequence[str], text: str) -> dict[str, Any]:
    """One user turn: the pictures in order, then the text."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": picture_url(source)}} for source in sources
    ]
    if text:
        parts.append({"type": "text", "text": text})
    return {"role": "user", "content": parts}


@contextmanager
def named(sources: Sequence[str], turn: int) -> Iterator[None]:
    """Let errors about a picture begin with the name that it was given by.

    Args:
        sources: the pictures of one message, as ``user_message`` took them.
        turn: which message of the conversation that is, from 0.

    Raises:
        MediaError: as the block did.
    """
    try:
        yield
    except MediaError as error:
        place = _PLACE.match(error.param or "")
        if place is not None and (int(place[1]) != turn or int(place[2]) >= len(sources)):
            raise
        # What turns out while pictures are decoded is not known to be about one of them.
        told = sources if place is None else [sources[int(place[2])]]
        names = ", ".join("a data: URL" if name.startswith("data:") else name for name in told)
        which = names if len(told) < 2 else f"One of {names}"
        if not which:
            raise
        raise MediaError(f"{which}: {error}", code=error.code, param=error.param) from error


def split_inputs(inputs: Sequence[str], most_texts: int | None = None) -> tuple[list[str], list[str]]:
    """Tell the pictures that a command's arguments begin with from the texts behind them.

    Args:
        most_texts: as many as the command takes.

    Raises:
        MediaError: what must be a picture is not there: there are more texts, or one can only have been meant as a
            picture or as the model.
    """
    pictures = list(takewhile(lambda word: is_url(word) or is_file(word), inputs))
    texts = list(inputs[len(pictures) :])
    names_picture = [looks_like_picture(text) and " " not in text for text in texts]
    model = texts and not pictures and is_model(texts[0])  # "cat/dog" behind a picture asks which it is
    if model or any(names_picture) or (most_texts is not None and len(texts) > most_texts):
        advice = f" A model is given as --model {texts[0]}." if model else ""
        raise MediaError(
            f"There is no picture {texts[0]!r}. Give paths or URLs first, then one quoted question.{advice}"
        )
    return pictures, texts


def split_line(line: str) -> tuple[list[str], str]:
    """The pictures named in a typed line, and the line without them.

    A word counts as a picture if it is an existing file with a picture's suffix, or a URL that ends in one.
    """
    pictures: list[str] = []

    def take(match: re.Match[str]) -> str:
        word = match[1] or match[2] or re.sub(r"\\(.)", r"\1", match[3])
        if Path(urlsplit(word).path if is_url(word) else word).suffix.lower() not in _SUFFIXES:
            return match[0]
        if not is_url(word) and not is_file(word):
            return match[0]
        pictures.append(word)
        return ""

    text = _WORD.sub(take, line)
    return pictures, (" ".join(text.split()) if pictures else line.strip())
