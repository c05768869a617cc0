"""Stands for CUDA graphs where there is no GPU, so that an engine runs with them on a CPU.

What is recorded is what a CUDA graph keeps: operations, on the very memory that they had. A replay runs these again; no
Python of the pass runs, so whatever it read on the host stays as it was. What a graph cannot do is refused: to read a
number back, to make tensors out of the host's, to have results whose shape depends on values. And what each graph left
in the pool that all share is overwritten when another runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsin.kernels import reference
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.layers.staging import noting

_REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "item")


class _Operation(NamedTuple):
    run: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    results: list[torch.Tensor]  # new memory that it wrote; empty where it wrote into its arguments

    def again(self) -> None:
        for result, value in zip(self.results, _tensors(self.run(*self.args, **self.kwargs)), strict=False):
            assert value.shape == result.shape
            result.copy_(value)


class _Operations(TorchDispatchMode):
    """Notes every operation on tensors.

    Args:
        refused: names of operations that a graph cannot hold.
    """

    def __init__(self, refused: Sequence[str]) -> None:
        super().__init__()
        self._refused = refused
        self.noted: list[_Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self._refused, f"a graph cannot hold {name}"
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        given = {_memory(x) for x in _tensors((args, kwargs))}
        new = [x for x in _tensors(returned) if _memory(x) not in given]
        if new or func._schema.is_mutable:  # the others are views, which stay what they are
            self.noted.append(_Operation(func, args, kwargs, new))
        return returned


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.numel() else id(x)


@dataclass(slots=True)
class Graph:
    """What was recorded; ``replay`` is all that an engine calls."""

    recorder: Recorder
    operations: list[_Operation]
    result: torch.Tensor
    num_replays: int = 0

    def replay(self) -> None:
        self.recorder.spoil()
        self.num_replays += 1
        for operation in self.operations:
            operation.again()


@dataclass(slots=True)
class Recorder:
    """``opsin.runner.graphs.Recorder``, for a CPU.

    Args:
        is_strict: nothing recorded may read on the host. Towers' whole passes do, what they made of torch there.
    """

    is_strict: bool = False
    graphs: list[Graph] = field(default_factory=list)

    def record(self, work: Callable[[], torch.Tensor], *, warm_up: bool) -> tuple[Graph, torch.Tensor]:
        refused = _REFUSED if warm_up or self.is_strict else ()  # the decoder's passes are those that are warmed up
        with noting() as uploads, _Operations(refused) as operations:
            result = work()
        assert not uploads, "a graph must not copy from the host"
        self.graphs.append(Graph(self, operations.noted, result))
        self.spoil()
        return self.graphs[-1], result

    def spoil(self) -> None:
        """All graphs' results, as the next one to run may."""
        for graph in self.graphs:
            graph.result.fill_(float("nan"))


@torch.library.custom_op("opsin_tests::paged_attention", mutates_args=())
def _attend(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_start_B1: torch.Tensor,
    context_lens_B: torch.Tensor,
    block_tables_BL: torch.Tensor,
    visible_end_T: torch.Tensor | None,
    visible_begin_T: torch.Tensor | None,
    bounds: list[int],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """``bounds``: the most tokens of a row, the longest context."""
    query_lens = tuple(query_start_B1.diff().tolist())
    context_lens = tuple(context_lens_B.tolist())
    assert max(query_lens) <= bounds[0]
    assert bounds[0] > 1 or set(query_lens) == {1}, "kernels take this for a decode step, where every row has a token"
    assert max(context_lens) <= bounds[1]
    real = [b for b, context_len in enumerate(context_lens) if context_len]
    num_rows = len(real)
    assert real == list(range(num_rows)), "rows that pad stand last"
    num_tokens = sum(query_lens[:num_rows])
    out_TNH = torch.zeros_like(q_TNH)
    if num_rows:
        inputs = AttentionInputs(
            query_start_B1=query_start_B1[: num_rows + 1],
            context_lens_B=context_lens_B[:num_rows],
            block_tables_BL=block_tables_BL[:num_rows],
            slot_mapping_T=query_start_B1,
            query_lens=query_lens[:num_rows],
            context_lens=context_lens[:num_rows],
            visible_end_T=visible_end_T,
            visible_begin_T=visible_begin_T,
        )
        q, k, v = (x[:num_tokens] for x in (q_TNH, k_TKH, v_TKH))
        cache = LayerCache(key, value)
        out_TNH[:num_tokens] = reference.paged_attention(q, k, v, cache, inputs, scale, window, softcap)
    return out_TNH


def paged_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cache: LayerCache,
    inputs: AttentionInputs,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """``reference.paged_attention`` by the device's lengths, as one operation; the host's are bounds."""
    return _attend(
        q_TNH,
        k_TKH,
        v_TKH,
        *cache,
        inputs.query_start_B1,
        inputs.context_lens_B,
        inputs.block_tables_BL,
        inputs.visible_end_T,
        inputs.visible_begin_T,
        [max(inputs.query_lens), max(inputs.context_lens)],
        scale,
        window,
        softcap,
    )


KERNELS = replace(reference.KERNELS, paged_attention=paged_attention, replayable=True)
