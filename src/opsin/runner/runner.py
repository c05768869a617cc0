"""Runs one ``StepPlan`` on one device: open slots, encode pictures, run the decoder, draw tokens.

Nothing here decides what runs; the plan does. Nothing is waited for before ``PendingStep.result``, but for the scores
of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from opsin.kernels import Kernels, select
from opsin.kernels.inputs import LayerCache
from opsin.layers.staging import upload
from opsin.models.interface import VisionLanguageModel
from opsin.params import PoolingParams, SamplingParams
from opsin.runner.executor import Payload
from opsin.runner.graphs import Recorder, StepGraphs
from opsin.runner.inputs import RowNumbers, build_inputs, step_arrays, update_blocks, views_of
from opsin.runner.kept import Graph, Record
from opsin.runner.launched import LaunchedStep
from opsin.runner.pooling import RowValues, pool, read_row
from opsin.runner.sampler import ParticularRow, SampledTokens, SampleRows, prompt_logprobs, sample
from opsin.runner.slots import SlotTable
from opsin.runner.tower import EagerTower, ReplayedTower
from opsin.runner.vision import VisionStore
from opsin.types import PositionLogprobs, RowPlan, RowResult, StepPlan


class ModelRunner:
    """Model, KV cache and per-request tables of one device.

    Args:
        kv_dtype: of the KV cache; by default the model's.
        kernels: those that the model was built with; by default the device's best.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.block_size = block_size
        self._kernels = kernels or select(device)
        self._max_num_seqs = max_num_seqs
        self._graphs: StepGraphs | None = None
        self.vision = VisionStore(EagerTower(model, device, self._kernels), device, dtype)
        self._caches: list[LayerCache] = []
        self._slots = SlotTable(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            num_axes=model.spec.num_position_axes,
            device=device,
        )

    def allocate_kv(self, num_blocks: int) -> None:
        """Make a KV cache of ``num_blocks`` blocks, the scratch block 0 included; replaces any former one."""
        self._graphs = None
        self._caches = []
        for layer in self.model.spec.layers:
            shape = (num_blocks, self.block_size, layer.num_kv_heads, layer.head_dim)
            # Zeros, since attention may multiply unwritten slots by a weight of exactly 0, and 0 * NaN is NaN.
            key, value = (torch.zeros(shape, dtype=self.kv_dtype, device=self.device) for _ in range(2))
            self._caches.append(LayerCache(key, value))

    @property
    def can_replay(self) -> bool:
        """The device and the kernels can."""
        return self.device.type == "cuda" and self._kernels.replayable

    @torch.inference_mode()
    def capture_graphs(self, max_tokens: int, max_patches: int) -> None:
        """From now on replay steps, and pictures of sizes that come again, where the device and the kernels can.

        ``allocate_kv`` ends that.

        Args:
            max_tokens: the most that a step has.
            max_patches: likewise, for the vision tower.
        """
        if self.can_replay:
            record = Recorder(self.device).record
            tower = EagerTower(self.model, self.device, self._kernels)
            self.vision.tower = ReplayedTower(tower, record, max_patches)
            self._graphs = self._step_graphs(max_tokens, record)
            self._graphs.capture_first()

    @torch.inference_mode()
    def rehearse_graphs(self, max_tokens: int) -> None:
        """Launch what ``capture_graphs`` captures first, for ``compile_ahead``; it needs a KV cache, and changes none
        but the scratch block."""

        def rehearse(work: Callable[[], torch.Tensor], *, warm_up: bool) -> tuple[Graph, torch.Tensor]:
            """Do what is to be captured, and the draws behind it."""
            hidden_TD = work()
            self._kernels.greedy(self.model.ranking(hidden_TD[: self._max_num_seqs]))
            return torch.cuda.CUDAGraph(), hidden_TD

        self._step_graphs(max_tokens, rehearse).capture_first()

    def compile_ahead(self, *works: Callable[[], None]) -> None:
        """See ``kernels.ops.CompileAhead``."""
        self._kernels.compile_ahead(*works)

    def _step_graphs(self, max_tokens: int, record: Record) -> StepGraphs:
        return StepGraphs(
            self.model,
            self._caches,
            self._slots,
            block_size=self.block_size,
            max_rows=self._max_num_seqs,
            max_tokens=max_tokens,
            dtype=self.dtype,
            record=record,
        )

    def put_payload(self, key: bytes, payload: Payload) -> None:
        self.vision.put(key, payload)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start a step. Steps must be launched in the order in which they were planned."""
        self.vision.drop(plan.drop_features, plan.drop_payloads)
        if plan.encode:  # before all else, so that the device has something to do
            self.vision.encode(plan.encode)
        for opened in plan.opened:
            self._slots.open(opened)
        for row in plan.rows:
            if row.new_blocks:
                self._slots.append_blocks(row.slot, row.new_blocks)
        if not plan.rows:
            return LaunchedStep(plan.step, [])

        update_blocks(self._slots)
        numbers = RowNumbers.of(plan.rows)
        if self._graphs is not None and numbers.is_decode(self._slots):
            hidden_TD, token_at_E = self._graphs.decode(numbers)
            return self._emit(plan, numbers, range(len(plan.rows)), hidden_TD, hidden_TD, token_at_E)
        arrays = step_arrays(plan.rows, numbers, self._slots, self.block_size)
        views = views_of(plan.rows, numbers, self._slots, arrays)
        row_starts = arrays.query_start_B1[:-1].tolist()
        if self._graphs is not None and views is None and self._graphs.covers(arrays):

            def fill(hidden_TD: torch.Tensor, extra_TE: torch.Tensor | None) -> None:
                self.vision.scatter(hidden_TD, plan.rows, row_starts, extra_TE)

            hidden_TD, emit_index_E, token_at_E = self._graphs.prefill(arrays, fill)
            return self._emit(plan, numbers, row_starts, hidden_TD, hidden_TD[emit_index_E], token_at_E)
        inputs = build_inputs(arrays, views, numbers, self._slots, self.block_size)
        hidden_TD = self.model.embed(inputs.ids_T)
        extra_TE = self.vision.scatter(hidden_TD, plan.rows, row_starts)
        hidden_TD = self.model.forward(hidden_TD, inputs.positions_AT, inputs.attention, self._caches, extra_TE)
        return self._emit(plan, numbers, row_starts, hidden_TD, hidden_TD[inputs.emit_index_E], inputs.token_at_E)

    def _emit(
        self,
        plan: StepPlan,
        numbers: RowNumbers,
        row_starts: Sequence[int],
        hidden_TD: torch.Tensor,
        last_ED: torch.Tensor,
        token_at_E: torch.Tensor,
    ) -> LaunchedStep:
        """Draw tokens for the rows that generate, pool those that embed, score prompts where asked.

        Args:
            last_ED: hidden states of the emitting rows' last tokens.
            token_at_E: where in the flat token table those rows' next tokens belong.
        """
        slot_B, emits_B = numbers.slot_B, numbers.emits_B
        results = [RowResult() for _ in plan.rows]
        if self._slots.is_plain_S[slot_B].all():
            if not len(token_at_E):
                return LaunchedStep(plan.step, results)
            sampled = SampledTokens(self._kernels.greedy(self.model.ranking(last_ED)), None)
            self._slots.tokens_SL.view(-1).index_copy_(0, token_at_E, sampled.ids_B)
            return LaunchedStep(plan.step, results, sampled, np.flatnonzero(emits_B).tolist())

        pools_B = np.zeros_like(emits_B)
        pooled: list[tuple[RowResult, torch.Tensor]] = []
        values: list[RowValues] = []
        particular: dict[int, ParticularRow] = {}  # by index among all rows
        place_B = np.cumsum(emits_B) - 1  # among the emitting rows
        for b in np.flatnonzero(self._slots.is_particular_S[slot_B]).tolist():
            row, begin = plan.rows[b], row_starts[b]
            slot = self._slots[row.slot]
            if isinstance(slot.params, PoolingParams):
                pools_B[b] = True
                own_TD = hidden_TD[begin : begin + row.num_tokens]
                read = read_row(results[b], row, own_TD, slot.params, self.model.logits)
                values += [] if read is None else [read]
                if row.emits and slot.params.task == "embed":
                    pooled.append((results[b], pool(last_ED[int(place_B[b])], slot.params)))
                continue
            if slot.params.prompt_logprobs is not None:
                results[b].prompt_logprobs = self._score_prompt(row, begin, hidden_TD)
            particular[b] = ParticularRow(slot.params, slot.stop_token_ids, row.mask)

        drawn_B = np.flatnonzero(emits_B & ~pools_B)
        if not len(drawn_B):
            return LaunchedStep(plan.step, results, pooled=pooled, values=values)
        if len(drawn_B) < len(token_at_E):
            (index,) = upload([place_B[drawn_B]], self.device)
            last_ED, token_at_E = last_ED[index], token_at_E[index]
        drawn = drawn_B.tolist()
        rows = SampleRows(
            slot_B=slot_B[drawn_B],
            num_tokens_B=(numbers.start_B + numbers.len_B)[drawn_B],
            numbers_B=self._slots.numbers_S[slot_B[drawn_B]],
            particular={i: particular[b] for i, b in enumerate(drawn) if b in particular} if particular else {},
        )
        sampled = sample(self.model.logits(last_ED), rows, self._slots.tokens_SL)
        self._slots.tokens_SL.view(-1).index_copy_(0, token_at_E, sampled.ids_B)
        counts = {i: row.params.logprobs for i, row in rows.particular.items()}
        return LaunchedStep(plan.step, results, sampled, drawn, counts, pooled, values)

    def _score_prompt(self, row: RowPlan, begin: int, hidden_TD: torch.Tensor) -> list[PositionLogprobs]:
        slot = self._slots[row.slot]
        assert isinstance(slot.params, SamplingParams)
        assert slot.params.prompt_logprobs is not None
        targets = slot.prompt_token_ids[row.start + 1 : row.start + row.num_tokens + 1]
        return prompt_logprobs(hidden_TD[begin:], targets, slot.params.prompt_logprobs, self.model.logits)
