"""Kernels that start before the one ahead of them has ended: programmatic dependent launch, on compute capability 9.0
and later.

A decode step is a chain of a few hundred kernels of some microseconds each, and between two of them a GPU idles for one
or more. Launched with ``launch_pdl``, a kernel gets its processors as soon as every program of the one ahead has called
``gdc_launch_dependents`` or has ended; ``gdc_wait`` then holds it until the one ahead has ended and its writes can be
seen. What lies before ``gdc_wait``, above all reading weights, overlaps with the kernels ahead.

Why nothing is read too early or overwritten too late. Kernels launched so obey two rules:

1. Every program calls ``gdc_wait`` before it returns, and before it reads or writes what any kernel ever writes.
2. Ahead of ``gdc_wait`` it reads weights alone. They are written before the first step is launched; and each step
   starts with kernels of torch, behind which everything earlier has ended.

By rule 1 such a kernel ends later than the one ahead of it, and so, by induction, than everything ahead in the stream.
Whoever has waited for its neighbour has therefore waited for all: also for the writer of a tensor that went past
several kernels, and for the readers of memory that the allocator gives to another tensor, even where all kernels of a
chain have called ``gdc_launch_dependents`` and lie on the processors at once. So reads and writes are in the very order
that they have without this. Kernels launched otherwise (torch's, cuBLAS's, others of this package), copies and events
come when the kernel ahead has ended, thus everything ahead; a kernel of ours behind one of these waits for its end,
too. Captured, the order becomes a graph's edges of the same meaning.

Nothing starves: a kernel starts when all programs of the one ahead have their processors, so those that wait keep
nobody from running that they wait for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from opsin.kernels.triton.device import capability


def can_overlap(device: torch.device) -> bool:
    """What launches on a device pass as ``PDL``, for the kernel, and as ``launch_pdl``, for the driver."""
    return capability(device) >= (9, 0)


@triton.jit
def follow(PDL: tl.constexpr):
    """What a kernel that reads no weights does first of all."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
