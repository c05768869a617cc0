"""One request as the scheduler sees it: counts, blocks, and the media it has still to read."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import NamedTuple, Protocol

from opsin.cache.blocks import BlockPool
from opsin.cache.features import FeatureCache, Lease, Order
from opsin.cache.prefix import BlockHasher
from opsin.cache.table import BlockTable
from opsin.params import PoolingParams
from opsin.scheduler.limits import SchedulerLimits
from opsin.types import EngineRequest, FeatureUse, FinishReason, MediaItem, PositionLogprobs


class Grammar(Protocol):
    """What holds an answer to a form, token by token; ``opsin.processing.grammar.Grammar`` is one."""

    @property
    def mask(self) -> bytes | None:
        """The tokens that may come next, as ``RowPlan.mask``: None allows all. Not asked for when it is complete."""
        ...

    @property
    def is_complete(self) -> bool:
        """The answer can only end."""
        ...

    @property
    def error(self) -> str | None:
        """Why ``accept`` refused."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take in the next token; False when the answer cannot go on from here."""
        ...


class Extent(NamedTuple):
    """The prompt positions [start, end) from an item's first feature to its last, and its place among the media."""

    item: int
    start: int
    end: int


class Sequence:
    """State of one request. Counts run ahead of values: with steps in flight, a token is counted before it is known.

    Attributes:
        order: place in the line.
        tokens: known token ids, prompt and answer.
        num_tokens: tokens known or in flight.
        num_computed: positions whose keys and values are written by the steps planned so far.
        limit: ``num_tokens`` never exceeds it. Pooling counts as generating one token.
        blocks: KV blocks for exactly ``num_computed`` positions.
        in_flight: planned steps not yet committed that have a row of it.
        next_span: first span that ends after ``num_computed``.
        leased: keys of the items leased from the feature cache.
        slot: where the runner keeps it while it runs; the ``Line``'s to change, like ``parked_on``.
        parked_on: key of the item without which it cannot start, while that is missing.
        prompt_logprobs: collected until the first token is reported; None when not asked for, or reported.
        first_read: the first prompt position whose hidden state is asked for; None when only the last token's is.
        values: what was read so far, by position.
        scheduled_s: when it first got a slot.
        grammar: what the answer must look like. Its next token is drawn only once all those before are known.
    """

    def __init__(
        self,
        request: EngineRequest,
        order: Order,
        limits: SchedulerLimits,
        pool: BlockPool,
        grammar: Grammar | None = None,
    ) -> None:
        self.request = request
        self.grammar = grammar
        self.block_size = limits.block_size
        self.order = order
        self.scheduled_s: float | None = None
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = self.num_tokens = len(self.tokens)
        params = request.params
        self.pools = isinstance(params, PoolingParams)
        self._stop_token_ids, self._stops_after = request.stop_token_ids, self.num_prompt
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        self.first_read: int | None = None
        self.values: dict[int, bytes] = {}
        if isinstance(params, PoolingParams):
            self.limit = self.num_prompt + 1
            if params.task == "token_embed":
                self.first_read = 0
            elif params.targets:
                self.first_read = params.targets[0][0]
        else:
            self.limit = min(self.num_prompt + (params.max_tokens or limits.context_len), limits.context_len)
            self._stops_after += params.min_tokens
            if params.prompt_logprobs is not None:
                self.prompt_logprobs = [None for _ in self.tokens]
        self.num_computed = 0
        self.blocks = BlockTable(pool, limits.block_size, _hasher(request, self.tokens, limits))
        self.num_cached_tokens = 0
        self.slot: int | None = None
        self.in_flight = 0
        self.finished = False
        self.next_span = 0
        self.leased: set[bytes] = set()
        self.parked_on: bytes | None = None
        self.items: dict[bytes, Extent] = {}
        for span in request.spans:
            key = request.media[span.item].key
            item, start, _ = self.items.get(key, Extent(span.item, span.start, 0))
            self.items[key] = Extent(item, start, span.start + span.length)

    @property
    def is_runnable(self) -> bool:
        """It has a position to compute, by counts alone."""
        return self.num_computed < self.num_tokens < self.limit and (
            self.grammar is None or self.num_tokens == len(self.tokens)
        )

    @property
    def is_decoding(self) -> bool:
        """A single generated token is next, rather than a prompt, or an answer that is run again."""
        return self.num_prompt <= self.num_computed == self.num_tokens - 1 and self.is_runnable

    def accept(self, token: int) -> FinishReason | None:
        """Take in a token that was drawn; why the answer ends with it, if it does."""
        self.tokens.append(token)
        if token in self._stop_token_ids and len(self.tokens) > self._stops_after:
            return "stop"
        if self.grammar is not None:
            if not self.grammar.accept(token):
                return "error"
            if self.grammar.is_complete:
                return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    @property
    def num_shareable(self) -> int:
        """Leading positions that others' blocks may stand for; the rest is computed whatever is cached."""
        return len(self.tokens) - 1 if self.first_read is None else self.first_read

    def values_in_order(self) -> list[bytes] | None:
        """What was read, by rising position; None where nothing was asked for."""
        return [self.values[position] for position in sorted(self.values)] or None

    def publish_blocks(self) -> None:
        """Let others find the blocks that are full and whose tokens are known."""
        self.blocks.publish(min(self.num_computed, len(self.tokens)))

    def start_over(self, features: FeatureCache) -> None:
        """Forget what was computed: give the blocks back, and lease all media again. Tokens stay."""
        self.blocks.release()
        self.num_computed = self.next_span = 0
        if self.num_tokens == self.num_prompt:
            self.num_cached_tokens = 0
        self.lease_items(features)

    def range_across(self, position: int) -> tuple[int, int] | None:
        """The bidirectional range that a cut before ``position`` would split."""
        ranges = self.request.bidirectional
        i = bisect_left(ranges, position, key=lambda r: r[0]) - 1
        return ranges[i] if i >= 0 and position < ranges[i][1] else None

    def cut(self, position: int) -> int:
        """The last position up to ``position`` where computation may stop."""
        across = self.range_across(position)
        return position if across is None else across[0]

    def chunk(self, features: FeatureCache, budget: int) -> int:
        """How many positions to compute: within budget, before missing features, splitting no range; may be <= 0."""
        start = self.num_computed
        end = min(self.num_tokens, start + budget)
        missing = self.missing_span(features, end)
        if missing is not None:
            end = self.request.spans[missing].start
        end = self.cut(end)
        if end < self.num_tokens:
            # Stop at a block's end where that is possible: equal prompts can then go on from each other's blocks.
            aligned = end - end % self.block_size
            if aligned > start and self.cut(aligned) == aligned:
                end = aligned
        return end - start

    def advance(self, features: FeatureCache, num_computed: int) -> None:
        """Move on, and release the items whose last features are behind."""
        self.num_computed = num_computed
        spans = self.request.spans
        while self.next_span < len(spans):
            span = spans[self.next_span]
            if span.start + span.length > num_computed:
                break
            key = self.item_of(self.next_span).key
            self.next_span += 1
            if self.items[key].end <= num_computed and key in self.leased:
                self.leased.remove(key)
                features.release(key, self.order)

    # --------------------------------------------------------------------------------------- media

    def item_of(self, span: int) -> MediaItem:
        return self.request.media[self.request.spans[span].item]

    def lease_items(self, features: FeatureCache) -> None:
        """Lease every item that has features after ``num_computed``."""
        for key, extent in self.items.items():
            if extent.end > self.num_computed and key not in self.leased:
                self.leased.add(key)
                lease = Lease(extent.start, self.request.request_id, extent.item)
                features.lease(self.request.media[extent.item], self.order, lease)

    def missing_span(self, features: FeatureCache, end: int) -> int | None:
        """The first span still to be read, among those that start before ``end``, whose features are not stored."""
        spans = self.request.spans
        for i in range(self.next_span, len(spans)):
            if spans[i].start >= end:
                break
            if features.feature_id(self.item_of(i).key) is None:
                return i
        return None

    def missing_item(self, features: FeatureCache) -> bytes | None:
        """Key of the first item still to be read that is not stored."""
        span = self.missing_span(features, self.num_prompt)
        return self.item_of(span).key if span is not None else None

    def feature_uses(self, num_tokens: int, features: FeatureCache) -> tuple[FeatureUse, ...]:
        """Feature rows read by the next ``num_tokens`` positions."""
        begin, end = self.num_computed, self.num_computed + num_tokens
        uses: list[FeatureUse] = []
        for i in range(self.next_span, len(self.request.spans)):
            span = self.request.spans[i]
            if span.start >= end:
                break
            first = max(span.start, begin)
            feature_id = features.feature_id(self.item_of(i).key)
            assert feature_id is not None, "a chunk ends before features that are not stored"
            length = min(span.start + span.length, end) - first
            uses.append(FeatureUse(feature_id, span.feature_start + first - span.start, first - begin, length))
        return tuple(uses)

    def peak_features(self) -> int:
        """Most feature rows that must be stored at one time: of items that interleave or share a range."""
        changes: list[tuple[int, int]] = []
        for item, start, end in self.items.values():
            rows = self.request.media[item].layout.num_features
            across = self.range_across(end)
            changes.append((start, rows))
            changes.append((end if across is None else across[1], -rows))
        return max(accumulate(rows for _, rows in sorted(changes)), default=0)


def _hasher(request: EngineRequest, tokens: list[int], limits: SchedulerLimits) -> BlockHasher | None:
    """Of a request that shares its prefixes, with all others or with those of its namespace."""
    if not request.share_prefix or not (limits.enable_prefix_caching or request.cache_namespace):
        return None
    scope = "" if limits.enable_prefix_caching else request.cache_namespace
    return BlockHasher(request, tokens, limits.block_size, (scope, request.cache_salt))
