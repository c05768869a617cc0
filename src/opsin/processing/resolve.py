"""What parameters become for one prompt: lengths bounded by the context, words as tokens, ids of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from opsin.errors import ContextLengthError, RequestError
from opsin.params import PoolingParams, SamplingParams
from opsin.processing.expand import Expanded
from opsin.processing.pooling import VectorSizes, check_pooling
from opsin.processing.tokenizer import Tokenizer
from opsin.types import MediaItem


class ParamsResolver:
    """Resolves parameters for one model.

    Args:
        max_model_len: longest prompt plus answer, in tokens.
        max_answer_len: most tokens of any answer.
        vector_sizes: what ``dimensions`` may be.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        max_model_len: int,
        max_answer_len: int,
        vector_sizes: VectorSizes,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._max_answer_len = max_answer_len
        self._vector_sizes = vector_sizes

    def resolve(
        self, params: SamplingParams | PoolingParams, prompt: Expanded, items: Sequence[MediaItem]
    ) -> SamplingParams | PoolingParams:
        """The parameters with what depends on the prompt and the tokenizer filled in.

        Args:
            items: what the prompt shows.

        Raises:
            RequestError: a token outside the vocabulary, or nothing is left to draw.
            ContextLengthError: the prompt leaves no room for an answer.
        """
        length = len(prompt.token_ids)
        pooling = isinstance(params, PoolingParams)
        room = self._max_model_len - length
        if room < (0 if pooling else 1):
            features = sum(item.layout.num_features for item in items)
            made_of = f" ({features} of them for {len(items)} image(s) or video(s))" if items else ""
            answer = "" if pooling else ", and at least one token must remain for the answer"
            raise ContextLengthError(
                f"The prompt has {length} tokens{made_of}; this model's context holds {self._max_model_len}{answer}. "
                "Shorten the prompt, send fewer or smaller pictures, or raise max_model_len if the model allows it.",
                param="prompt",
            )
        if isinstance(params, PoolingParams):
            check_pooling(params, self._vector_sizes)
            return params
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            wrong = next((i for i in getattr(params, name) or () if i >= self._vocab_size), None)
            if wrong is not None:
                raise RequestError(
                    f"{name} holds {wrong}; this model's ids are 0 to {self._vocab_size - 1}.", param=name
                )
        room = min(room, self._max_answer_len)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        bad_words = params.bad_words_token_ids
        if params.bad_words:
            bad_words = [*(bad_words or ()), *self._tokenizer.encode_bad_words(params.bad_words)]
        wrong = next((i for word in bad_words or () for i in word if i >= self._vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"bad_words need token {wrong}; this model's ids are 0 to {self._vocab_size - 1}.",
                param="bad_words" if params.bad_words else "bad_words_token_ids",
            )
        min_tokens = min(params.min_tokens, max_tokens)
        never = {word[0] for word in bad_words or () if len(word) == 1}
        if min_tokens:
            never |= self.end_ids(params)
        if params.allowed_token_ids is not None and never.issuperset(params.allowed_token_ids):
            raise RequestError(
                "allowed_token_ids leaves nothing to draw: bad_words forbid each of them"
                + (f", or it ends the answer before min_tokens={min_tokens}." if min_tokens else "."),
                param="allowed_token_ids",
            )
        return msgspec.structs.replace(
            params, max_tokens=max_tokens, min_tokens=min_tokens, bad_words_token_ids=bad_words
        )

    def end_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end an answer."""
        ends = frozenset[int]() if params.ignore_eos else self._tokenizer.eos_token_ids
        return ends | frozenset(params.stop_token_ids)
