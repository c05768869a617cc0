"""Attention in Triton and Gluon against the plain-torch reference; see ``test_triton_kernels``."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from opsin.kernels import quantized, reference
from opsin.kernels.inputs import AttentionInputs, LayerCache
from tests.kernels.triton_cases import DEVICE, HALF, HAS_CUDA, NEEDS_FP8, assert_close, rand, sized

pytestmark = pytest.mark.gpu if HAS_CUDA else []


ROWS = {  # (query length, context length) per row
    "decode": [(1, 1), (1, sized(700, 300)), (1, 16), (1, 33)],
    "decode-one-long": [(1, sized(5000, 1100))],
    "decode-many": [(1, 40 + 3 * i) for i in range(sized(200, 7))],
    "prefill": [(37, 37), (1, 1), (sized(200, 70), sized(200, 70))],
    "chunk": [(20, 90), (sized(64, 33), sized(700, 150))],
    "mixed": [(1, sized(300, 150)), (1, 17), (sized(100, 50), sized(100, 50)), (31, sized(260, 90)), (1, 64)],
}


class Mask(NamedTuple):
    """What an attention may be asked beside its rows; ``visible`` and ``whole`` of ten tokens of each long row."""

    window: int | None = None
    visible: bool = False
    whole: bool = False
    softcap: float | None = None


PLAIN, EVERYTHING = Mask(), Mask(6, visible=True, whole=True, softcap=5.0)
FOR_DECODES = (PLAIN, Mask(24), Mask(24, softcap=5.0))  # no such step has ranges to see
FOR_ALL = (*FOR_DECODES, Mask(visible=True), Mask(6, visible=True), Mask(6, visible=True, whole=True))
# Each combination of heads, height of a block and mask compiles a kernel, which takes a second or more. So the heads of
# Qwen2-VL-2B meet all masks; those of its 7B, of a tower and of Phi-3-vision meet the plain one, which they have, and
# once everything together.
HEADS = [(28, 4, 128, HALF), (sized(16, 3), sized(16, 3), 80, HALF), (sized(8, 2), sized(8, 2), 96, torch.float32)]
ATTENTIONS = [
    *((12, 2, 128, HALF, name, FOR_DECODES if name.startswith("decode") else FOR_ALL) for name in ROWS),
    *((*heads, name, (PLAIN, EVERYTHING) if name == "mixed" else (PLAIN,)) for heads in HEADS for name in ROWS),
]


@pytest.fixture(params=["any-gpu", "hopper"])
def paged_attention(request: pytest.FixtureRequest, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """By the kernel for all GPUs; and where there is one for Hopper and it suits, by that."""
    attention = importlib.import_module("opsin.kernels.triton.attention")
    if request.param == "any-gpu":
        monkeypatch.setattr(attention, "hopper_kernel", lambda name, device: None)
    elif attention.hopper_kernel("paged_hopper", DEVICE) is None:
        pytest.skip("needs a GPU of compute capability 9.0, and a Triton that paged_hopper has run with")
    return kernels.paged_attention


@pytest.mark.parametrize(
    ("heads", "kv", "size", "dtype", "name", "masks"),
    [pytest.param(*case, id="-".join(map(str, case[:-1]))) for case in ATTENTIONS],
)
def test_paged_attention_equals_reference(
    kernels: Any,
    paged_attention: Any,
    heads: int,
    kv: int,
    size: int,
    dtype: torch.dtype,
    name: str,
    masks: Sequence[Mask],
):
    rows, page = ROWS[name], 16
    query_lens = tuple(q for q, _ in rows)
    context_lens = tuple(c for _, c in rows)
    columns = -(-max(context_lens) // page)
    num_blocks = len(rows) * columns + 1
    tables = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(1)) + 1).view(len(rows), columns)
    starts = list(itertools.accumulate(query_lens, initial=0))
    positions = torch.cat([torch.arange(c - q, c) for q, c in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(query_lens))
    num_tokens = starts[-1]
    q = rand(num_tokens, heads, size, dtype=dtype)
    k, v = rand(num_tokens, kv, size, dtype=dtype, seed=1), rand(num_tokens, kv, size, dtype=dtype, seed=2)
    visible_end, visible_begin = positions + 1, positions.clone()
    for row, (query_len, context_len) in enumerate(rows):
        if query_len > 30:  # ten tokens that see one another
            first = context_len - query_len + 5
            at = starts[row] + 5
            visible_end[at : at + 10] = first + 10
            visible_begin[at : at + 10] = first
    for mask in masks:
        cache = LayerCache(*(rand(num_blocks, page, kv, size, dtype=dtype, seed=s) for s in (3, 4)))
        inputs = AttentionInputs(
            query_start_B1=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            context_lens_B=torch.tensor(context_lens, dtype=torch.int32, device=DEVICE),
            block_tables_BL=tables.int().to(DEVICE),
            slot_mapping_T=(tables[owner, positions // page] * page + positions % page).to(DEVICE),
            query_lens=query_lens,
            context_lens=context_lens,
            visible_end_T=visible_end.int().to(DEVICE) if mask.visible else None,
            visible_begin_T=visible_begin.int().to(DEVICE) if mask.whole else None,
        )
        twin = LayerCache(cache.key.clone(), cache.value.clone())
        kernels.write_kv(k, v, cache, inputs.slot_mapping_T)
        reference.write_kv(k, v, twin, inputs.slot_mapping_T)
        assert torch.equal(cache.key, twin.key)
        assert torch.equal(cache.value, twin.value)
        got = paged_attention(q, k, v, cache, inputs, size**-0.5, mask.window, mask.softcap)
        assert_close(got, reference.paged_attention(q, k, v, twin, inputs, size**-0.5, mask.window, mask.softcap))


@NEEDS_FP8
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_cache_of_8_bits_equals_reference(kernels: Any, dtype: torch.dtype):
    kv, size, page = 2, 64, 16
    caches = [LayerCache(*(rand(6, page, kv, size, seed=s).to(quantized.FP8) for s in (3, 4))) for _ in range(2)]
    inputs = AttentionInputs(
        query_start_B1=torch.tensor([0, 1, 21], dtype=torch.int32, device=DEVICE),
        context_lens_B=torch.tensor([40, 20], dtype=torch.int32, device=DEVICE),
        block_tables_BL=torch.tensor([[1, 2, 3], [4, 5, 0]], dtype=torch.int32, device=DEVICE),
        slot_mapping_T=torch.cat([torch.tensor([3 * page + 7]), 4 * page + torch.arange(20)]).to(DEVICE),
        query_lens=(1, 20),
        context_lens=(40, 20),
    )
    q = rand(21, 4, size, dtype=dtype)
    k, v = (rand(21, kv, size, dtype=dtype, seed=s) for s in (1, 2))
    k[0, 0, :2], v[1, 1, 0] = torch.tensor([1000.0, -1000.0]), 449.0  # beyond e4m3
    angle = rand(21, size // 2, seed=5)
    writes = (
        lambda own, cache: own.write_kv(k, v, cache, inputs.slot_mapping_T),
        lambda own, cache: own.rope_and_write(q, k, v, angle.cos(), angle.sin(), cache, inputs.slot_mapping_T),
    )
    for write in writes:
        for own, cache in zip((kernels, reference.KERNELS), caches, strict=True):
            write(own, cache)
        if HAS_CUDA:  # the interpreter's own e4m3 is not rounded, and some of it wrong
            for got, expected in zip(*caches, strict=True):  # a product rounded otherwise may fall to the neighbour
                torch.testing.assert_close(got.float(), expected.float(), rtol=2**-3, atol=2**-9)
                assert (got.view(torch.uint8) == expected.view(torch.uint8)).float().mean() > 0.99
    got = kernels.paged_attention(q, k, v, caches[1], inputs, size**-0.5)
    assert_close(got, reference.paged_attention(q, k, v, caches[1], inputs, size**-0.5))


@pytest.fixture(params=["any-gpu", "hopper", "hopper-queries-kept"])
def varlen_attention(request: pytest.FixtureRequest, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """By the kernel for all GPUs, and by the one for Hopper alone, whichever an engine takes."""
    varlen = importlib.import_module("opsin.kernels.triton.varlen")
    hopper = varlen.hopper_kernel("varlen_hopper", DEVICE)
    if request.param == "any-gpu":
        monkeypatch.setattr(varlen, "hopper_kernel", lambda name, device: None)
    elif hopper is None:
        pytest.skip("needs a GPU of compute capability 9.0, and a Triton that varlen_hopper has run with")
    else:
        monkeypatch.setattr(hopper, "suits", lambda *shape: True)
        monkeypatch.setattr(hopper, "launch", partial(hopper.launch, keep_queries=request.param.endswith("kept")))
    return kernels.varlen_attention


@pytest.mark.parametrize("size", [64, 72, 80, 88, 96, 128])
@pytest.mark.parametrize("lens", [(1,), (150, 64, 3, 129), sized((577, 577), (193, 193))], ids=str)
def test_varlen_attention_equals_reference(varlen_attention: Any, size: int, lens: tuple[int, ...]):
    heads, num_patches = 3, sum(lens)
    ends = torch.tensor((0, *lens)).cumsum(0, dtype=torch.int32).to(DEVICE)
    for dtype in {HALF, torch.float16}:
        q, k, v = rand(num_patches, 3 * heads, size, dtype=dtype).split(heads, dim=1)
        expected = reference.varlen_attention(q.float(), k.float(), v.float(), ends, lens, size**-0.5)
        assert_close(varlen_attention(q, k, v, ends, lens, size**-0.5), expected.to(dtype))
        more = torch.cat([ends, ends[-1:].expand(5)])  # empty ones, as where a graph has room for them
        assert_close(varlen_attention(q, k, v, more, None, size**-0.5), expected.to(dtype))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the neighbours' own results
def test_varlen_attention_reads_nothing_of_the_neighbours(varlen_attention: Any):
    q, k, v = rand(300, 6, 80, dtype=HALF).split(2, dim=1)
    lens, ends = (100, 90, 110), torch.tensor((0, 100, 190, 300), dtype=torch.int32, device=DEVICE)
    alone = varlen_attention(q, k, v, ends, lens, 0.1)
    for x in (q, k, v):
        x[:100], x[190:] = float("nan"), float("inf")
    assert torch.equal(varlen_attention(q, k, v, ends, lens, 0.1)[100:190], alone[100:190])


@pytest.mark.parametrize("block", [64, 128])
def test_varlen_attention_of_lengths_about_a_block_equals_reference(varlen_attention: Any, block: int):
    """One block of keys and none, whole ones and parts, several turns of the buffers, and tiles that are not full."""
    lens = (block - 1, block, block + 1, 2 * block, sized(9 * block + 1, 2 * block + 1), 1)
    ends = torch.tensor((0, *lens)).cumsum(0, dtype=torch.int32).to(DEVICE)
    with_empty = ends.repeat_interleave(2)
    q, k, v = rand(sum(lens), 6, 80, dtype=HALF).split(2, dim=1)
    expected = reference.varlen_attention(q.float(), k.float(), v.float(), ends, lens, 0.1)
    assert_close(varlen_attention(q, k, v, with_empty, None, 0.1), expected.to(HALF))


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("num_padding", [1, 3])
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_paged_attention_of_a_padded_step_equals_that_of_its_rows(
    paged_attention: Any, name: str, num_padding: int, window: int | None
):
    """As graphs launch it: lengths on the host are mere bounds, and rows are added that have no context.

    Decode rows are padded by rows of one token; others by empty rows, and a last one of several tokens.
    """
    rows, page, size = ROWS[name], 16, 64
    longest = max(context for _, context in rows)
    columns = -(-longest // page)
    num_tokens = sum(query for query, _ in rows)
    added = [1] * num_padding if name == "decode" else [0] * (num_padding - 1) + [5]
    q = rand(num_tokens + sum(added), 4, size, dtype=torch.float16)
    k, v = (rand(num_tokens + sum(added), 2, size, dtype=torch.float16, seed=seed) for seed in (1, 2))
    cache = LayerCache(*(rand(len(rows) * columns + 1, page, 2, size, dtype=torch.float16, seed=s) for s in (3, 4)))
    cache.key[0] = cache.value[0] = float("nan")  # the scratch block, of which nothing may be read
    tables = torch.arange(1, len(rows) * columns + 1, dtype=torch.int32).view(len(rows), columns)
    query_lens = tuple(query for query, _ in rows)
    context_lens = tuple(context for _, context in rows)

    def inputs(query_lens: tuple[int, ...], context_lens: tuple[int, ...], added: list[int]) -> AttentionInputs:
        starts = itertools.accumulate([*(query for query, _ in rows), *added], initial=0)
        return AttentionInputs(
            query_start_B1=torch.tensor(list(starts), dtype=torch.int32, device=DEVICE),
            context_lens_B=torch.tensor([c for _, c in rows] + [0] * len(added), dtype=torch.int32, device=DEVICE),
            block_tables_BL=torch.cat([tables, torch.zeros(len(added), columns, dtype=torch.int32)]).to(DEVICE),
            slot_mapping_T=torch.zeros(0, dtype=torch.int64, device=DEVICE),
            query_lens=query_lens,
            context_lens=context_lens,
        )

    num_rows = len(rows) + num_padding
    bounds = (1,) * num_rows if name == "decode" else (1, *(num_tokens + sum(added),) * (num_rows - 1))
    padded = inputs(bounds, (8 * longest,) * num_rows, added)
    got = paged_attention(q, k, v, cache, padded, size**-0.5, window)
    # The reference takes this step's keys from its arguments where they are all that a row sees: here all are cached.
    for row, (query_len, context_len) in enumerate(rows):
        at = sum(query_lens[:row]) + torch.arange(query_len)
        slots = (torch.arange(context_len - query_len, context_len) + tables[row, 0].item() * page).to(DEVICE)
        for new, stored in ((k, cache.key), (v, cache.value)):
            new[at.to(DEVICE)] = stored.view(-1, 2, size)[slots]
    alone = inputs(query_lens, context_lens, [])
    q, k, v = q[:num_tokens], k[:num_tokens], v[:num_tokens]
    assert_close(got[:num_tokens], reference.paged_attention(q, k, v, cache, alone, size**-0.5, window))


@pytest.mark.parametrize("name", ["mixed", "prefill", "decode"])
def test_rows_of_one_token_ahead_of_others_are_launched_alone(kernels: Any, monkeypatch: pytest.MonkeyPatch, name: str):
    """Beside a kernel for the other rows: here it writes 7 where it is told to, and leaves what it is told to leave."""
    attention = importlib.import_module("opsin.kernels.triton.attention")
    rows, page, size = ROWS[name], 16, 64
    singles = len(list(itertools.takewhile(lambda row: row[0] == 1, rows)))

    def fill(q: Any, out: torch.Tensor, cache: Any, inputs: Any, scale: float, *, skips_singles: bool) -> None:
        assert skips_singles
        out[singles:] = 7

    stand_in = SimpleNamespace(suits=lambda q, cache: True, launch=fill)
    monkeypatch.setattr(attention, "hopper_kernel", lambda name, device: stand_in)
    columns = -(-max(context for _, context in rows) // page)
    tables = torch.arange(1, len(rows) * columns + 1, dtype=torch.int32, device=DEVICE).view(len(rows), columns)
    cache = LayerCache(*(rand(len(rows) * columns + 1, page, 2, size, dtype=torch.float16, seed=s) for s in (3, 4)))
    q = rand(sum(query for query, _ in rows), 4, size, dtype=torch.float16)

    def inputs(some: Sequence[tuple[int, int]]) -> AttentionInputs:
        starts = list(itertools.accumulate((query for query, _ in some), initial=0))
        return AttentionInputs(
            query_start_B1=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            context_lens_B=torch.tensor([context for _, context in some], dtype=torch.int32, device=DEVICE),
            block_tables_BL=tables[: len(some)],
            slot_mapping_T=torch.zeros(0, dtype=torch.int64, device=DEVICE),
            query_lens=tuple(query for query, _ in some),
            context_lens=tuple(context for _, context in some),
        )

    got = kernels.paged_attention(q, q[:, :2], q[:, :2], cache, inputs(rows), size**-0.5)
    if singles:
        alone = kernels.paged_attention(q[:singles], q[:0, :2], q[:0, :2], cache, inputs(rows[:singles]), size**-0.5)
        assert_close(got[:singles], alone)
    assert name == "decode" or got[singles:].eq(7).all()


PAGED = [  # heads, key heads, size, page
    (32, 32, 128, 16),
    (28, 4, 128, 32),
    (12, 2, 128, 64),
    (16, 1, 64, 16),
    (15, 5, 64, 16),
    (sized(32, 2), sized(32, 2), 96, 16),
    (10, 2, 80, 32),
]


@pytest.mark.parametrize(("heads", "kv", "size", "page"), PAGED)
def test_paged_attention_of_prompts_sees_its_own_keys_alone(
    paged_attention: Any, heads: int, kv: int, size: int, page: int
):
    """Contexts about a block's length, some of them cached; all that is nobody's is NaN. Heads, pages and singles."""
    rows = [(1, 64), (1, 201), (64, 64), (65, 128), (2, 130), (63, 63), (sized(700, 90), sized(1100, 150)), (1, 1)]
    columns = -(-max(context for _, context in rows) // page)
    tables = torch.randperm(len(rows) * columns, generator=torch.Generator().manual_seed(1)).view(len(rows), -1) + 1
    kept = {
        row: [rand(context, kv, size, dtype=HALF, seed=row + s) for s in (10, 30)]
        for row, (_, context) in enumerate(rows)
    }
    cache = LayerCache(*(rand(tables.numel() + 1, page, kv, size, dtype=HALF).fill_(float("nan")) for _ in "kv"))
    for row, own in kept.items():
        slots = (tables[row].repeat_interleave(page) * page + torch.arange(columns * page) % page).to(DEVICE)
        for stored, mine in zip(cache, own, strict=True):
            stored.view(-1, kv, size)[slots[: len(mine)]] = mine
    q = rand(sum(query for query, _ in rows), heads, size, dtype=HALF, seed=5)
    starts = list(itertools.accumulate((query for query, _ in rows), initial=0))
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    inputs = AttentionInputs(
        query_start_B1=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        context_lens_B=torch.tensor([context for _, context in rows], dtype=torch.int32, device=DEVICE),
        block_tables_BL=tables.int().to(DEVICE),
        slot_mapping_T=nothing,
        query_lens=tuple(query for query, _ in rows),
        context_lens=tuple(context for _, context in rows),
    )
    got = paged_attention(q, q[:, :kv], q[:, :kv], cache, inputs, size**-0.5)
    for row, (query, context) in enumerate(rows):
        k, v = (x.float().repeat_interleave(heads // kv, dim=1).transpose(0, 1) for x in kept[row])
        own_q = q[starts[row] : starts[row + 1]].float().transpose(0, 1)
        sees = torch.ones(query, context, dtype=torch.bool, device=DEVICE).tril(context - query)
        expected = torch.nn.functional.scaled_dot_product_attention(own_q, k, v, attn_mask=sees)
        assert_close(got[starts[row] : starts[row + 1]], expected.transpose(0, 1).to(HALF))
