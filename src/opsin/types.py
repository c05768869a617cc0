"""The values that travel between opsin's rooms. No torch here, and nothing that computes.

Everything is a msgspec struct, so that each message can cross a process border as bytes. Those of which a step makes
many hold no cycles, and Python's garbage collector need not know of them (``gc=False``). Three groups:

* media, from sizes alone: ``PixelPlan`` (what a media worker must make), ``Clip`` (a video and the frames chosen of
  it) and ``MediaLayout`` (what a family's rule says about one item);
* requests: ``EngineRequest`` in, ``RequestUpdate`` out;
* steps: ``StepPlan`` (scheduler to runner: slots and counts, never sampled values) and ``StepResult`` (back).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from opsin.params import PoolingParams, SamplingParams

Modality = Literal["image", "video"]
FinishReason = Literal["stop", "length", "abort", "error"]

DEFAULT_FPS = 24.0
"""What Hugging Face's processors take a video's speed for when nobody tells it."""

# ---------------------------------------------------------------------------------------------- media


class Resize(msgspec.Struct, frozen=True, tag="resize"):
    """Resample to ``width`` x ``height`` pixels as Pillow does it (8-bit, antialiased)."""

    width: int
    height: int
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"


class Crop(msgspec.Struct, frozen=True, tag="crop"):
    """Cut out a window; parts outside the picture are filled with ``fill``."""

    left: int
    top: int
    width: int
    height: int
    fill: tuple[int, int, int] = (0, 0, 0)


class Pad(msgspec.Struct, frozen=True, tag="pad"):
    """Add a border, in pixels per side."""

    left: int
    top: int
    right: int
    bottom: int
    fill: tuple[int, int, int] = (0, 0, 0)


PixelOp = Resize | Crop | Pad


class View(msgspec.Struct, frozen=True):
    """One way of seeing the picture: apply ``ops``, then cut the result into ``rows`` x ``cols`` equal tiles.

    A view yields ``rows * cols`` uint8 RGB arrays of (height, width, 3), row by row. ``height`` and ``width`` are
    one tile's.
    """

    ops: tuple[PixelOp, ...]
    height: int
    width: int
    rows: int = 1
    cols: int = 1

    @property
    def num_bytes(self) -> int:
        return self.rows * self.cols * self.height * self.width * 3


class PixelPlan(msgspec.Struct, frozen=True):
    """What a media worker makes of one item: the tiles of every view, in order; for videos, for every frame.

    ``frames`` holds the indices of the frames to take, ascending; one may stand several times. Pictures have frame 0.
    ``width`` and ``height`` are the source's upright size, as its header announced it.
    """

    width: int
    height: int
    views: tuple[View, ...]
    frames: tuple[int, ...] = (0,)

    @property
    def num_bytes(self) -> int:
        return len(self.frames) * sum(view.num_bytes for view in self.views)

    @property
    def tile_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every tile of one frame, in order."""
        return [(v.height, v.width) for v in self.views for _ in range(v.rows * v.cols)]


class Clip(msgspec.Struct, frozen=True):
    """A video as its rule sees it, before anything is decoded.

    Attributes:
        width: of the upright frames; likewise ``height``.
        num_frames: frames that there are to take.
        frames: indices of those chosen for the model, ascending.
        fps: frames per second of the recording; None where nobody said.
        recorded: index in the recording of each frame that there is, where they are a selection from it already; empty
            where they are all of it. ``num_recorded`` is then how many it had.
    """

    width: int
    height: int
    num_frames: int
    frames: tuple[int, ...]
    fps: float | None = None
    recorded: tuple[int, ...] = ()
    num_recorded: int = 0

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds into the recording of each of ``frames``; counted at ``DEFAULT_FPS`` where its speed is unknown."""
        fps = self.fps or DEFAULT_FPS
        return tuple((self.recorded[i] if self.recorded else i) / fps for i in self.frames)

    @property
    def duration(self) -> float:
        """Seconds of the recording."""
        return (self.num_recorded or self.num_frames) / (self.fps or DEFAULT_FPS)

    @property
    def chosen_fps(self) -> float:
        """Chosen frames per second of the recording; ``DEFAULT_FPS`` where its speed is unknown."""
        if self.fps is None:
            return DEFAULT_FPS
        return len(self.frames) / (self.num_recorded or self.num_frames) * self.fps


class MediaLayout(msgspec.Struct, frozen=True):
    """A rule's verdict on one item, from its size alone.

    Attributes:
        plan: the pixels to make.
        num_features: rows that the projector returns for the item.
        num_patches: work for the vision tower, in patches; the unit of the vision budget.
        numbers: what else the family's model needs (a patch grid, tile rows and columns).
        times: seconds, where positions or the text around a video's frames depend on them.
    """

    plan: PixelPlan
    num_features: int
    num_patches: int
    numbers: tuple[int, ...] = ()
    times: tuple[float, ...] = ()


class MediaItem(msgspec.Struct, frozen=True):
    """One picture or video of a request, as the engine knows it.

    ``key`` names the item's *features*: a digest of the encoded bytes (or pixels, or embedding) and of the layout.
    Equal keys share everything. ``layout.plan.views`` is empty for embeddings given by the user.
    """

    key: bytes
    modality: Modality
    layout: MediaLayout


class FeatureSpan(msgspec.Struct, frozen=True):
    """Prompt positions [start, start + length) take the rows [feature_start, ...) of one item's features.

    An item whose placeholder interleaves text tokens has several spans; together they cover its features in order.
    """

    item: int
    start: int
    length: int
    feature_start: int = 0


# ------------------------------------------------------------------------------------------- requests


class EngineRequest(msgspec.Struct, kw_only=True):
    """One sequence to run. ``n > 1`` is several of these that share ``cache_namespace``.

    Attributes:
        prompt_token_ids: expanded: one id per position, placeholders included.
        spans: sorted by ``start``.
        bidirectional: position ranges [start, end) whose tokens see one another; a prefill chunk never splits one.
        positions: int32 bytes of shape (axes, prompt length) when positions are not simply 0, 1, 2, ... (M-RoPE).
        position_delta: added to the index of a generated token to get its position.
        stop_token_ids: ids that end the answer, the model's own end tokens included unless ``ignore_eos``.
        cache_salt: requests share cached prefixes only under the same salt.
        cache_namespace: equal for the samples of one prompt, which share its blocks even without prefix caching.
        share_prefix: False keeps this request's prompt out of the prefix cache and ignores hits.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams | PoolingParams
    media: list[MediaItem] = []
    spans: list[FeatureSpan] = []
    bidirectional: list[tuple[int, int]] = []
    positions: bytes | None = None
    position_delta: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    cache_salt: str = ""
    cache_namespace: str = ""
    share_prefix: bool = True
    priority: int = 0
    arrival_s: float = 0.0


class MediaNeed(msgspec.Struct, frozen=True):
    """The engine asks the front for one item's payload: pixels made by ``plan``, or the given embedding."""

    key: bytes
    request_id: str
    item: int


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probability and 1-based rank of one token at one position."""

    token_id: int
    logprob: float
    rank: int


PositionLogprobs = list[TokenLogprob]
"""The chosen token first, then the most likely ones in order (the chosen one may be among them)."""


OWN_FAULT = ""
"""``RequestUpdate.error_code`` of a request that is itself to blame, where no other code says how; None blames none."""


class RequestUpdate(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """What one committed step did for one request.

    ``values`` are what a pooling task read at several positions, in their order: float32 numbers as bytes.
    ``scheduled_s`` says when the request first got a slot, by the machine's monotonic clock, and ``failed_item`` of
    which of its media it failed.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    embedding: list[float] | None = None
    values: list[bytes] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    error_code: str | None = None
    failed_item: int | None = None
    num_cached_tokens: int = 0
    scheduled_s: float | None = None


# ---------------------------------------------------------------------------------------------- steps


class SlotOpen(msgspec.Struct, frozen=True, array_like=True):
    """A request takes a slot (again, after a preemption): all that the runner must know to run its rows.

    ``token_ids`` are the prompt and whatever was generated so far.
    """

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams | PoolingParams
    seed: int
    positions: bytes | None
    position_delta: int
    bidirectional: list[tuple[int, int]]
    stop_token_ids: frozenset[int]


class FeatureUse(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``length`` tokens of a row, from its ``offset``-th, take rows of a stored feature from ``feature_start``."""

    feature_id: int
    feature_start: int
    offset: int
    length: int


class RowPlan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request's share of a step: run its tokens [start, start + num_tokens).

    Attributes:
        new_blocks: KV blocks appended to the slot's table before the row runs.
        emits: the row ends at the last known token, so it samples (or pools).
        features: rows of media features that replace token embeddings, sorted by offset.
        mask: one bit per token that may be drawn, little-endian, in whole 32-bit words; None allows all.
    """

    slot: int
    start: int
    num_tokens: int
    new_blocks: tuple[int, ...]
    emits: bool
    features: tuple[FeatureUse, ...] = ()
    mask: bytes | None = None


class EncodeItem(msgspec.Struct, frozen=True, array_like=True):
    """Run the tower on the payload stored under ``key`` and keep the result as ``feature_id``."""

    feature_id: int
    key: bytes
    layout: MediaLayout


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step, for every rank alike: slots and counts, never sampled values.

    Applied in this order: drop features and payloads, encode, open slots, run rows. A slot that is opened replaces
    whatever it held before, so slots need no closing.
    """

    step: int
    rows: tuple[RowPlan, ...]
    opened: tuple[SlotOpen, ...] = ()
    encode: tuple[EncodeItem, ...] = ()
    drop_features: tuple[int, ...] = ()
    drop_payloads: tuple[bytes, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class RowResult(msgspec.Struct, array_like=True, gc=False):
    """What one row brought: a token where it emits, prompt logprobs where asked, an embedding where it pools.

    ``values`` holds what is read at single positions of the prompt, float32 numbers as bytes, by position.
    ``error`` is set when this row alone failed (logits that are not finite, say).
    """

    token_id: int | None = None
    logprobs: PositionLogprobs | None = None
    prompt_logprobs: list[PositionLogprobs] | None = None
    embedding: list[float] | None = None
    values: dict[int, bytes] | None = None
    error: str | None = None


class StepResult(msgspec.Struct, array_like=True):
    """Results in the order of ``StepPlan.rows``."""

    step: int
    rows: list[RowResult]


# ---------------------------------------------------------------------------------------------- model


class LayerCacheSpec(msgspec.Struct, frozen=True):
    """What one decoder layer keeps per token."""

    num_kv_heads: int
    head_dim: int


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a model that planning needs, from its config alone.

    Attributes:
        feature_width: values per media feature row: ``hidden_size``, or more where deeper layers take features too.
        num_position_axes: 1, or 3 for M-RoPE.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    feature_width: int
    max_position: int
    layers: tuple[LayerCacheSpec, ...]
    num_position_axes: int = 1

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        return sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.layers) * bytes_per_value
