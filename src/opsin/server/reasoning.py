"""What a model thinks before it answers, told apart from its answer as the text grows.

A family puts two marks around its thoughts. The prompt may have written the first of them, or both, where thinking is
switched off. White space next to the marks belongs to them. Text that only looks like the beginning of a mark waits
until it is certain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from opsin.errors import RequestError
from opsin.params import SamplingParams, Thinking
from opsin.processing.processor import ProcessedRequest
from opsin.server.client import EngineClient
from opsin.server.config import ServerConfig
from opsin.server.tool_parsers import overlap


class Marks(NamedTuple):
    """What a family puts around its thoughts.

    Attributes:
        is_assumed: where neither the prompt nor the answer begins them, they begin with the answer all the same.
    """

    opens: str = "<think>"
    closes: str = "</think>"
    is_assumed: bool = False

    def state_after(self, prompt: str) -> bool | None:
        """Whether thoughts are open (True) or over (False) where the answer begins; None where a prompt does not say.

        Only the prompt's end tells: what stands before may be of an earlier turn.
        """
        end = prompt.rstrip()
        return True if end.endswith(self.opens) else False if end.endswith(self.closes) else None

    def state_within(self, begun: str) -> bool:
        """The same for an answer that goes on from ``begun``."""
        return begun.rfind(self.opens) > begun.rfind(self.closes)


REASONING_PARSERS: Mapping[str, Marks] = {"deepseek_r1": Marks(is_assumed=True), "glm45": Marks(), "qwen3": Marks()}
"""By the names that vLLM gives them. DeepSeek-R1 may leave out the first mark; with the others, the prompt tells."""


class MarkTokens(NamedTuple):
    """What the marks are to a tokenizer.

    Attributes:
        opens: the token that the first mark is, and ``closes`` the second; None where one takes several.
        is_special: texts leave one of them out unless they are asked for special tokens.
    """

    opens: int | None
    closes: int | None
    is_special: bool


class ModelReasoning:
    """How the model of one server thinks."""

    def __init__(self, marks: Marks, engine: EngineClient) -> None:
        self.marks = marks
        self._engine = engine
        self._tokens: MarkTokens | None = None

    async def tokens(self) -> MarkTokens:
        """What the marks are to the model's tokenizer."""
        if self._tokens is None:
            ids: list[int | None] = []
            is_special = False
            for mark in (self.marks.opens, self.marks.closes):
                spelt = await self._engine.tokenize(mark, add_special_tokens=False)
                ids.append(spelt[0] if len(spelt) == 1 else None)
                shown = await self._engine.detokenize(spelt, skip_special_tokens=True)
                is_special = is_special or mark not in shown
            self._tokens = MarkTokens(ids[0], ids[1], is_special)
        return self._tokens


def model_reasoning(config: ServerConfig, engine: EngineClient) -> ModelReasoning | None:
    """How a server's model thinks, where that is to be told apart."""
    name = config.reasoning_parser
    return None if name is None else ModelReasoning(REASONING_PARSERS[name], engine)


class Reasoning:
    """The thoughts before the answers to one request.

    Args:
        continued: the assistant's message that is gone on with; None where a new one is written.
        is_told: clients get them; they are left out otherwise.
    """

    def __init__(self, model: ModelReasoning, continued: str | None, is_told: bool) -> None:
        self.is_told = is_told
        self._model = model
        self._continued = continued
        self._state: bool | None = None
        self._tokens = MarkTokens(None, None, False)

    async def apply_to(self, params: SamplingParams) -> None:
        """Ask of the sampler what reading the thoughts needs."""
        self._tokens = await self._model.tokens()
        if self._tokens.is_special:
            params.skip_special_tokens = False

    def look_at(self, processed: ProcessedRequest) -> None:
        """See what the prompt says of thoughts, and let the form of the answer, if there is one, begin behind them.

        Raises:
            RequestError: it cannot begin there, since the model has no token for a mark.
        """
        marks, begun = self._model.marks, self._continued
        self._state = marks.state_after(processed.prompt or "") if begun is None else marks.state_within(begun)
        params = processed.request.params
        assert isinstance(params, SamplingParams)
        if params.structured_outputs is None or self._state is False:
            return
        opens, closes, _ = self._tokens
        if opens is None or closes is None:
            raise RequestError(
                f"structured_outputs cannot begin behind what this model thinks, since {marks.opens} and "
                f"{marks.closes} are no tokens of its own. Switch thinking off (chat_template_kwargs), or start the "
                "server without --reasoning-parser.",
                param="structured_outputs",
            )
        is_open = self._state is True or marks.is_assumed
        form = msgspec.structs.replace(
            params.structured_outputs, thinking=Thinking(opens=opens, closes=closes, is_open=is_open)
        )
        processed.request.params = msgspec.structs.replace(params, structured_outputs=form)

    def new_reader(self) -> ReasoningReader:
        """The reader of one answer; not before ``look_at``."""
        return ReasoningReader(self._model.marks, self._state, self._tokens)


class ReasoningReader:
    """Reads one answer.

    Args:
        state: whether thoughts are open or over where it begins, as ``Marks.state_after``.
        tokens: what the marks are; thoughts are counted by them.
    """

    def __init__(self, marks: Marks, state: bool | None, tokens: MarkTokens) -> None:
        self._marks = marks
        self._starts_inside = state is True or (state is None and marks.is_assumed)
        self._place: Literal["before", "inside", "gap", "behind"] = "behind" if state is False else "before"
        self._held = ""  # not yet certain: white space, and what may be the beginning of a mark
        self._has_told = self._has_thought = False
        self._tokens = tokens
        self._counts, self._has_closed = self._starts_inside, state is False
        self._num_tokens = 0

    @property
    def has_answer(self) -> bool:
        """Some of the answer itself has come."""
        return self._place == "behind"

    @property
    def num_tokens(self) -> int | None:
        """Tokens that were thought so far, the marks left out; None where the marks are no tokens."""
        if self._tokens.opens is None or self._tokens.closes is None:
            return None
        return self._num_tokens if self._has_thought else 0

    def take(self, text: str, token_ids: Sequence[int], ended: bool) -> tuple[str, str]:
        """What has become certain with this text: more of the thoughts, and more of the answer."""
        self._count(token_ids)
        searched = len(self._held)
        self._held += text
        thought = ""
        if self._place == "before":
            self._begin(ended)
            searched = 0
        if self._place == "inside":
            thought = self._think(searched, ended)
        if self._place == "gap" and (rest := self._held.lstrip()):
            self._held = rest
            self._place = "behind"
        answer = ""
        if self._place == "behind":
            answer, self._held = self._held, ""
        return thought, answer

    def _begin(self, ended: bool) -> None:
        """Find out whether the answer begins with thoughts."""
        lead, opens = self._held.lstrip(), self._marks.opens
        if lead.startswith(opens):
            self._held = lead[len(opens) :]
            self._place = "inside"
        elif not opens.startswith(lead) or ended:
            self._place = "inside" if self._starts_inside else "behind"
        self._has_thought = self._place == "inside"

    def _think(self, searched: int, ended: bool) -> str:
        """More of the thoughts, up to the mark that ends them."""
        closes = self._marks.closes
        at = self._held.find(closes, max(0, searched - len(closes)))
        if at >= 0:
            told, self._held = self._held[:at].rstrip(), self._held[at + len(closes) :]
            self._place = "gap"
        else:
            certain = len(self._held) - (0 if ended else overlap(self._held, closes))
            told = self._held[:certain].rstrip()
            self._held = self._held[len(told) :]
        if not self._has_told:
            told = told.lstrip()
            self._has_told = told != ""
        return told

    def _count(self, token_ids: Sequence[int]) -> None:
        if self._has_closed:  # marks that come later are part of the answer
            return
        for token_id in token_ids:
            if token_id == self._tokens.closes:
                self._has_closed = True
                return
            if token_id == self._tokens.opens:
                self._counts = True
            elif self._counts:
                self._num_tokens += 1
