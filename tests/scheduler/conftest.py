"""A simulated device that distrusts every plan, and a language model whose tokens depend on all that it sees.

The device keeps, for each cell of each KV block, a digest of everything that a real key would depend on: the tokens
and feature rows up to the end of what the position sees, and the scope within which it may be shared. A row that reads
a stale, foreign or unwritten cell is caught at once. ``answer`` is the same model run alone, without any scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import pytest

from opsin.errors import RequestError
from opsin.params import PoolingParams, SamplingParams
from opsin.scheduler import Scheduler, SchedulerLimits
from opsin.types import (
    EngineRequest,
    FeatureSpan,
    MediaItem,
    MediaLayout,
    MediaNeed,
    PixelPlan,
    RequestUpdate,
    RowPlan,
    RowResult,
    StepPlan,
    StepResult,
    TokenLogprob,
    View,
)

PLACEHOLDER = 99
VOCAB = 13


def make_item(name: str, num_features: int, num_patches: int, num_pixels: int) -> MediaItem:
    plan = PixelPlan(width=1, height=1, views=(View(ops=(), height=1, width=num_pixels),))
    layout = MediaLayout(plan=plan, num_features=num_features, num_patches=num_patches)
    return MediaItem(key=name.encode(), modality="image", layout=layout)


def make_request(
    request_id: str,
    pieces: list[int | MediaItem],
    params: SamplingParams | PoolingParams | None = None,
    *,
    interleave: bool = False,
    bidirectional: bool = False,
    joined: bool = False,
    **fields: object,
) -> EngineRequest:
    """A prompt of token ids and items.

    ``interleave`` puts a text token inside each item; ``joined`` makes one range of neighbouring items.
    """
    tokens: list[int] = []
    media: list[MediaItem] = []
    spans: list[FeatureSpan] = []
    ranges: list[tuple[int, int]] = []
    for piece in pieces:
        if isinstance(piece, int):
            tokens.append(piece)
            continue
        count, begin = piece.layout.num_features, len(tokens)
        media.append(piece)
        first = count // 2 if interleave and count > 1 else count
        for start, length in ((0, first), (first, count - first)):
            if length:
                spans.append(FeatureSpan(len(media) - 1, len(tokens), length, start))
                tokens += [PLACEHOLDER] * length
                if length != count and start == 0:
                    tokens.append(1)
        if bidirectional:
            if joined and ranges and ranges[-1][1] == begin:
                begin, _ = ranges.pop()
            ranges.append((begin, len(tokens)))
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=tokens,
        params=params or SamplingParams(max_tokens=4),
        media=media,
        spans=spans,
        bidirectional=ranges,
        **fields,  # type: ignore[arg-type]
    )


def read_positions(request: EngineRequest) -> list[int]:
    """Where a pooling request reads values off its prompt."""
    params = request.params
    if isinstance(params, PoolingParams) and params.task == "token_embed":
        return list(range(len(request.prompt_token_ids)))
    return [position for position, _ in params.targets] if isinstance(params, PoolingParams) else []


class Form(NamedTuple):
    """A grammar: after each beginning it allows few tokens, and it is complete at ``length`` tokens; one that breaks
    then refuses the last of them instead."""

    length: int
    breaks: bool = False

    def allowed(self, answer: Sequence[int]) -> list[int]:
        digest = blake2b(repr(list(answer)).encode(), digest_size=2).digest()
        return sorted({byte % VOCAB for byte in digest})

    def mask(self, answer: Sequence[int]) -> bytes | None:
        if len(answer) >= self.length:
            return None
        return sum(1 << token for token in self.allowed(answer)).to_bytes(4, "little")


class FormKeeper:
    """The ``Grammar`` of one answer."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.answer: list[int] = []
        self.mask = form.mask([])
        self.error: str | None = None

    @property
    def is_complete(self) -> bool:
        return self.mask is None

    def accept(self, token_id: int) -> bool:
        assert self.mask is not None, "a token after the end"
        assert token_id in self.form.allowed(self.answer)
        self.answer.append(token_id)
        self.mask = self.form.mask(self.answer)
        if self.mask is None and self.form.breaks:
            self.error = "nothing fits"
        return self.error is None


class Truth:
    """What a request's positions really are, and what the model says after each prefix."""

    def __init__(self, request: EngineRequest, limits: SchedulerLimits, form: Form | None = None) -> None:
        self.request = request
        self.form = form
        self.num_prompt = len(request.prompt_token_ids)
        self.inputs: list[object] = list(request.prompt_token_ids)
        for span in request.spans:
            for i in range(span.length):
                self.inputs[span.start + i] = (request.media[span.item].key, span.feature_start + i)
        self.seen_to = list(range(1, self.num_prompt + 1))
        for start, end in request.bidirectional:
            self.seen_to[start:end] = [end] * (end - start)
        self._digests: list[bytes] = [b""]
        max_tokens = getattr(request.params, "max_tokens", 1) or limits.max_model_len
        self.limit = min(self.num_prompt + max_tokens, limits.context_len)
        if not request.share_prefix:
            self.scope = f"only {request.request_id}"
        elif limits.enable_prefix_caching:
            self.scope = f"salt {request.cache_salt}"
        elif request.cache_namespace:
            self.scope = f"salt {request.cache_salt} of {request.cache_namespace}"
        else:
            self.scope = f"only {request.request_id}"

    def digest(self, inputs: list[object]) -> bytes:
        while len(self._digests) <= len(inputs):
            last = self._digests[-1] + repr(inputs[len(self._digests) - 1]).encode()
            self._digests.append(blake2b(last, digest_size=8).digest())
        return self._digests[len(inputs)]

    def cell(self, inputs: list[object], position: int) -> tuple[str, bytes]:
        end = self.seen_to[position] if position < self.num_prompt else position + 1
        return self.scope, self.digest(inputs[:end])

    def mask(self, inputs: list[object]) -> bytes | None:
        """What the row that draws the next token must be given."""
        return None if self.form is None else self.form.mask(inputs[self.num_prompt :])  # type: ignore[arg-type]

    def next_token(self, inputs: list[object]) -> int:
        number = int.from_bytes(self.digest(inputs), "little")
        if self.form is None:
            return number % VOCAB
        allowed = self.form.allowed(inputs[self.num_prompt :])  # type: ignore[arg-type]
        return allowed[number % len(allowed)]

    def answer(self) -> tuple[list[int], str]:
        """Tokens and finish reason of the request run alone."""
        inputs, request = list(self.inputs), self.request
        if isinstance(request.params, PoolingParams):
            return [], "stop"
        while True:
            inputs.append(self.next_token(inputs))
            count = len(inputs) - self.num_prompt
            if inputs[-1] in request.stop_token_ids and count > request.params.min_tokens:
                return inputs[self.num_prompt :], "stop"  # type: ignore[return-value]
            if self.form is not None and count == self.form.length:
                reason = "error" if self.form.breaks else "stop"
                return inputs[self.num_prompt :], reason  # type: ignore[return-value]
            if len(inputs) >= self.limit:
                return inputs[self.num_prompt :], "length"  # type: ignore[return-value]


class Slot:
    def __init__(self, truth: Truth, token_ids: list[int]) -> None:
        self.truth = truth
        self.inputs = truth.inputs + token_ids[truth.num_prompt :]
        self.table: list[int] = []


class Device:
    """Runs plans in order, at launch; checks everything it is told."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.truths: dict[int, Truth] = {}  # by seed, which the tests make unique
        self.slots: dict[int, Slot] = {}
        self.cells: dict[tuple[int, int], tuple[str, bytes]] = {}
        self.payloads: set[bytes] = set()
        self.features: dict[int, bytes] = {}
        self.rows_by_size: dict[bytes, int] = {}
        self.broken: set[int] = set()  # seeds whose rows report an error
        self.num_encoded = 0
        self.num_rows_computed = 0

    def launch(self, plan: StepPlan) -> StepResult:
        limits = self.limits
        for feature_id in plan.drop_features:
            del self.features[feature_id]
        for key in plan.drop_payloads:
            self.payloads.remove(key)
        for opened in plan.opened:
            assert 0 <= opened.slot < limits.max_num_seqs
            truth = self.truths[opened.seed]
            assert opened.token_ids[: truth.num_prompt] == truth.request.prompt_token_ids
            assert opened.num_prompt_tokens == truth.num_prompt
            self.slots[opened.slot] = Slot(truth, opened.token_ids)
        for item in plan.encode:
            self.payloads.remove(item.key)
            assert item.feature_id not in self.features, "feature id in use"
            self.features[item.feature_id] = item.key
            self.rows_by_size[item.key] = item.layout.num_features
            self.num_encoded += 1
        patches = [item.layout.num_patches for item in plan.encode]
        assert len(patches) <= 1 or sum(patches) <= limits.max_num_batched_patches
        stored = [self.rows_by_size[key] * limits.feature_row_bytes for key in self.features.values()]
        assert len(set(self.features.values())) == len(self.features), "an item is stored twice"
        assert sum(stored) <= limits.feature_bytes
        assert plan.num_tokens <= limits.max_num_batched_tokens
        assert len({row.slot for row in plan.rows}) == len(plan.rows) <= limits.max_num_seqs
        decodes = [row.num_tokens == 1 and not row.features for row in plan.rows]
        assert decodes == sorted(decodes, reverse=True), "decoding rows come first"
        if any(row.num_tokens == 1 and row.start >= self._num_prompt(row) for row in plan.rows):
            self._check_beside_decodes(plan)
        written: set[tuple[int, int]] = set()
        for row in plan.rows:
            self._write(row, written)
        return StepResult(step=plan.step, rows=[self._read(row) for row in plan.rows])

    def _num_prompt(self, row: RowPlan) -> int:
        return self.slots[row.slot].truth.num_prompt

    def _check_beside_decodes(self, plan: StepPlan) -> None:
        """Only so much is done while an answer goes on; what is whole by nature may be larger, alone."""
        tokens, patches = self.limits.step_budget(has_decodes=True)
        assert len(plan.encode) <= 1 or sum(item.layout.num_patches for item in plan.encode) <= patches
        prefills = [row for row in plan.rows if row.num_tokens > 1 or row.start < self._num_prompt(row)]
        excess = sum(row.num_tokens for row in prefills) - tokens
        if excess > 0:
            whole = max(prefills, key=lambda row: row.num_tokens)
            end = whole.start + whole.num_tokens
            (begin, _), *_ = [r for r in self.slots[whole.slot].truth.request.bidirectional if r[1] == end]
            assert end - excess > begin, "less would not have cut the range"

    def _place(self, slot: Slot, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.limits.block_size)
        return slot.table[block], offset

    def _write(self, row: RowPlan, written: set[tuple[int, int]]) -> None:
        slot = self.slots[row.slot]
        truth = slot.truth
        end = row.start + row.num_tokens
        assert row.num_tokens > 0
        assert all(0 < block < self.limits.num_blocks for block in row.new_blocks), "block 0 is scratch"
        slot.table += row.new_blocks
        assert len(set(slot.table)) == len(slot.table)
        assert len(slot.table) == -(-end // self.limits.block_size)
        assert end <= len(slot.inputs), "a row runs past the known tokens"
        assert row.emits == (end == len(slot.inputs))
        assert row.mask == (truth.mask(slot.inputs) if row.emits else None), "a mask for another token"
        assert end + row.emits <= truth.limit or isinstance(truth.request.params, PoolingParams)
        for begin, stop in truth.request.bidirectional:
            assert not begin < row.start < stop, "a chunk starts inside a range"
            assert not begin < end < stop, "a chunk ends inside a range"
        used: dict[int, tuple[bytes, int]] = {}
        for use in row.features:
            for i in range(use.length):
                assert use.offset + i not in used
                used[use.offset + i] = (self.features[use.feature_id], use.feature_start + i)
        for i in range(row.num_tokens):
            expected = slot.inputs[row.start + i]
            assert used.get(i) == (expected if isinstance(expected, tuple) else None)
            place = self._place(slot, row.start + i)
            assert place not in written, "two rows write one cell"
            written.add(place)
            self.cells[place] = truth.cell(slot.inputs, row.start + i)
        self.num_rows_computed += row.num_tokens

    def _read(self, row: RowPlan) -> RowResult:
        slot = self.slots[row.slot]
        truth, end = slot.truth, row.start + row.num_tokens
        for position in range(end):
            cell = self.cells.get(self._place(slot, position))
            assert cell == truth.cell(slot.inputs, position), f"position {position} reads a wrong cell: {cell}"
        result = RowResult()
        if truth.request.seed in self.broken:
            result.error = "logits are not finite"
        if getattr(truth.request.params, "prompt_logprobs", None) is not None:
            positions = range(row.start + 1, min(end + 1, truth.num_prompt))
            result.prompt_logprobs = [[TokenLogprob(position, 0.0, 1)] for position in positions]
        reads = [p for p in read_positions(truth.request) if row.start <= p < end]
        result.values = {p: truth.cell(slot.inputs, p)[1] for p in reads} or None
        if row.emits and isinstance(truth.request.params, PoolingParams):
            result.embedding = [float(len(slot.inputs))]
        elif row.emits:
            result.token_id = truth.next_token(slot.inputs)
            slot.inputs.append(result.token_id)
        return result


class Rig:
    """Scheduler and device, driven as the engine drives them, with every update checked."""

    form = Form
    make_item = staticmethod(make_item)
    make_request = staticmethod(make_request)

    def __init__(self, **limits: object) -> None:
        settings: dict[str, object] = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "max_num_batched_patches": 64,
            "max_model_len": 64,
            "num_blocks": 33,
            "block_size": 4,
            "feature_bytes": 1000,
            "feature_row_bytes": 10,
            "pixel_bytes": 1000,
        }
        self.limits = SchedulerLimits(**(settings | limits))  # type: ignore[arg-type]
        self.finished: list[str] = []
        self.scheduler = Scheduler(self.limits, on_finish=self.finished.append)
        self.device = Device(self.limits)
        self.truths: dict[str, Truth] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, RequestUpdate] = {}
        self.updates: list[RequestUpdate] = []
        self.needs: list[MediaNeed] = []
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.plans: list[StepPlan] = []

    def add(self, request: EngineRequest, form: Form | None = None) -> None:
        request.seed = len(self.device.truths)
        self.scheduler.add(request, None if form is None else FormKeeper(form))
        truth = Truth(request, self.limits, form)
        self.device.truths[request.seed] = truth
        self.truths[request.request_id] = truth
        self.tokens[request.request_id] = []

    def try_add(self, request: EngineRequest, form: Form | None = None) -> bool:
        """Add; a refusal must have a reason."""
        try:
            self.add(request, form)
        except RequestError:
            limits, prompt_len = self.limits, len(request.prompt_token_ids)
            room = 0 if isinstance(request.params, PoolingParams) else 1
            rows = sum(item.layout.num_features for item in {item.key: item for item in request.media}.values())
            assert (
                prompt_len + room > limits.context_len
                or any(end - start > limits.max_num_batched_tokens for start, end in request.bidirectional)
                or rows * limits.feature_row_bytes > limits.feature_bytes
            )
            return False
        return True

    def abort(self, request_id: str) -> None:
        update = self.scheduler.abort(request_id)
        if update is not None:
            self._take(update)
            assert update.finish_reason == "abort"

    def ask(self) -> None:
        needs = self.scheduler.take_needs()
        for need in needs:
            assert need.request_id not in self.ends
            item = self.truths[need.request_id].request.media[need.item]
            assert item.key == need.key
        self.needs += needs
        pending = dict(self.scheduler.stats())["payload_bytes_pending"]
        sizes = [item.layout.plan.num_bytes for truth in self.truths.values() for item in truth.request.media]
        assert pending <= max([self.limits.pixel_bytes, *sizes]), "one larger item goes alone, nothing else does"

    def answer_need(self, index: int = 0, *, fail: bool = False) -> None:
        need = self.needs.pop(index)
        if fail:
            for update in self.scheduler.media_failed(need.key, "not a picture", "bad_image"):
                assert update.finish_reason == "error"
                assert any(item.key == need.key for item in self.truths[update.request_id].request.media)
                self._take(update)
        elif self.scheduler.wants(need.key):
            self.device.payloads.add(need.key)
            self.scheduler.media_ready(need.key)

    def step(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            assert len(self.in_flight) < self.limits.pipeline_depth
            self.plans.append(plan)
            self.in_flight.append((plan, self.device.launch(plan)))
        return plan

    def commit(self) -> list[RequestUpdate]:
        plan, result = self.in_flight.popleft()
        updates = self.scheduler.commit(plan, result)
        assert len({update.request_id for update in updates}) == len(updates)
        for update in updates:
            self._take(update)
        return updates

    def drain(self, max_steps: int = 5000) -> None:
        """Run to the end; every round must bring something."""
        for _ in range(max_steps):
            self.ask()
            num_needs = len(self.needs)
            while self.needs:
                self.answer_need()
            plan = self.step()
            if self.in_flight and (plan is None or len(self.in_flight) >= self.limits.pipeline_depth):
                self.commit()
            elif plan is None and num_needs == 0:
                break
        assert not self.scheduler.has_work, f"stuck: {self.scheduler.stats()}"
        self.check_answers()
        self.check_empty()

    def check_answers(self) -> None:
        """Everything came out as when run alone."""
        for request_id, truth in self.truths.items():
            tokens, end = self.tokens[request_id], self.ends[request_id]
            expected, reason = truth.answer()
            if end.finish_reason in ("abort", "error"):
                assert tokens == expected[: len(tokens)]
            elif reason == "error":
                raise AssertionError(f"{request_id} ended with {end.finish_reason}, against its grammar")
            else:
                assert (tokens, end.finish_reason) == (expected, reason)
                values = [truth.cell(truth.inputs, p)[1] for p in read_positions(truth.request)]
                assert end.values == (values or None)
                by_token = reason == "stop" and tokens and tokens[-1] in truth.request.stop_token_ids
                assert end.stop_token_id == (tokens[-1] if by_token else None)
        assert sorted(self.finished) == sorted(self.truths)

    def check_empty(self) -> None:
        """Pools are as full as at the start; nothing is held for requests that are gone."""
        stats = dict(self.scheduler.stats())
        for name in ("kv_blocks_used", "feature_bytes_leased", "payload_bytes_pending", "num_steps_in_flight"):
            assert stats[name] == 0, name
        assert not self.device.payloads
        assert self.scheduler.num_free_slots == self.limits.max_num_seqs
        rows = sum(self.device.rows_by_size[key] for key in self.device.features.values())
        assert stats["feature_bytes_stored"] == rows * self.limits.feature_row_bytes

    def run(self, *requests: EngineRequest) -> None:
        for request in requests:
            self.add(request)
        self.drain()

    def _take(self, update: RequestUpdate) -> None:
        assert update.request_id not in self.ends, "an update after the end"
        self.updates.append(update)
        self.tokens[update.request_id] += update.token_ids
        truth = self.truths[update.request_id]
        assert update.num_cached_tokens < truth.num_prompt
        assert update.num_cached_tokens % self.limits.block_size == 0
        if update.finish_reason is not None:
            self.ends[update.request_id] = update
            self.needs = [need for need in self.needs if need.request_id != update.request_id]  # they are void


@pytest.fixture(scope="session")
def rig_class() -> type[Rig]:
    return Rig


@pytest.fixture(scope="session")
def make(rig_class: type[Rig]) -> Callable[..., EngineRequest]:
    return rig_class.make_request
