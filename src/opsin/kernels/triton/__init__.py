"""Triton kernels for CUDA devices: what models do between their matrix products.

Each replaces one function of ``opsin.kernels.reference`` and is tested against it.
"""

from __future__ import annotations

import dataclasses

from opsin.kernels import reference
from opsin.kernels.triton.ahead import compile_ahead
from opsin.kernels.triton.attention import paged_attention
from opsin.kernels.triton.elementwise import (
    activation,
    apply_rope,
    gated_activation,
    layer_norm,
    quantized_layer_norm,
    quantized_rms_norm,
    rms_norm,
    rope_and_write,
    write_kv,
)
from opsin.kernels.triton.greedy import greedy
from opsin.kernels.triton.quantized import (
    quantize_rows,
    quantized_activation,
    quantized_gated_activation,
    quantized_linear,
)
from opsin.kernels.triton.resample import resample
from opsin.kernels.triton.row_linear import linear, normed_linear
from opsin.kernels.triton.varlen import varlen_attention

KERNELS = dataclasses.replace(
    reference.KERNELS,
    linear=linear,
    quantize_rows=quantize_rows,
    quantized_linear=quantized_linear,
    rms_norm=rms_norm,
    layer_norm=layer_norm,
    activation=activation,
    gated_activation=gated_activation,
    quantized_rms_norm=quantized_rms_norm,
    quantized_layer_norm=quantized_layer_norm,
    quantized_activation=quantized_activation,
    quantized_gated_activation=quantized_gated_activation,
    normed_linear=normed_linear,
    apply_rope=apply_rope,
    write_kv=write_kv,
    rope_and_write=rope_and_write,
    paged_attention=paged_attention,
    varlen_attention=varlen_attention,
    resample=resample,
    greedy=greedy,
    compile_ahead=compile_ahead,
    replayable=True,
)
