"""Triton kernels for CUDA devices: what the decoder does between its matrix products.

Each replaces one function of ``opsin.kernels.reference`` and is tested against it. What is not here (towers' attention,
layer norm, patchify) is already one or two good kernels in plain torch.
"""

from __future__ import annotations

import dataclasses

from opsin.kernels import reference
from opsin.kernels.triton.attention import paged_attention
from opsin.kernels.triton.elementwise import apply_rope, gated_activation, rms_norm, write_kv

KERNELS = dataclasses.replace(
    reference.KERNELS,
    rms_norm=rms_norm,
    gated_activation=gated_activation,
    apply_rope=apply_rope,
    write_kv=write_kv,
    paged_attention=paged_attention,
)
