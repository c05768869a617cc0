"""Chat templates from afar, each run in a process that is killed when it takes too long or too much memory.

jinja's sandbox keeps a template from reaching out, but not from computing: ``9 ** 9 ** 9`` is a legal expression, which
no signal and no other thread can end. A fresh process costs some 0.1 s, and nothing of it is left behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from opsin.errors import RequestError
from opsin.media.confine import confine
from opsin.processing.jinja import ChatTemplate, ContentFormat

DEADLINE_S = 2.0
_MAX_MEMORY_BYTES = 2**28
_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[1:]; from opsin.processing import isolated; isolated.main()"


class IsolatedTemplate:
    """What ``ChatTemplate`` is, with its arguments; compiled and rendered elsewhere.

    Raises:
        RequestError: as ``ChatTemplate`` does; or it took too long, or too much memory.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self.content_format: ContentFormat = cast(ContentFormat, self._run(None))

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt; arguments as ``ChatTemplate.render``'s."""
        return self._run({"messages": messages, **options})

    def _run(self, call: Mapping[str, Any] | None) -> str:
        try:
            task = json.dumps([self.source, self._special_tokens, call], default=str)
        except (TypeError, ValueError) as error:
            raise RequestError(f"The conversation is no plain JSON: {error}", param="messages") from None
        try:
            done = subprocess.run(
                [sys.executable, "-c", _BOOTSTRAP, *sys.path],
                input=task.encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=DEADLINE_S,
                env={"PATH": os.environ.get("PATH", "")},
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            message = f"The chat template took longer than {DEADLINE_S:g} s."
            raise RequestError(message, param="chat_template") from None
        if done.returncode != 0:
            raise RequestError("The chat template took too much memory, or crashed.", param="chat_template")
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise RequestError(answer["error"], param=answer["param"])
        return answer["text"]


def main() -> None:
    """The other side: one template, once."""
    confine(_MAX_MEMORY_BYTES)
    source, special_tokens, call = json.loads(sys.stdin.buffer.read())
    try:
        template = ChatTemplate(source, special_tokens)
        text = template.content_format if call is None else template.render(call.pop("messages"), **call)
        answer = {"text": text}
    except RequestError as error:
        answer = {"error": str(error), "param": error.param}
    sys.stdout.write(json.dumps(answer))
