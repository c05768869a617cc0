"""A step's arrays made longer for a graph: what is added must read nothing and write nowhere but the scratch block."""

from __future__ import annotations

import numpy as np

from opsin.runner.inputs import StepArrays, padded


def step() -> StepArrays:
    """Two rows, of 3 tokens at the start and of 1 in the middle, the second emitting."""
    return StepArrays(
        at_T=np.array([10, 11, 12, 77]),
        positions_AT=np.array([[0, 1, 2, 9]] * 3),
        slot_mapping_T=np.array([16, 17, 18, 41]),
        slot_B=np.array([1, 4]),
        emit_index_E=np.array([3]),
        token_at_E=np.array([78]),
        query_start_B1=np.array([0, 3, 4], dtype=np.int32),
        context_B=np.array([3, 10], dtype=np.int32),
    )


def test_padded_step_keeps_its_own_and_adds_rows_without_context():
    arrays = padded(step(), num_tokens=128, num_rows=5)
    assert arrays.query_start_B1.tolist() == [0, 3, 4, 4, 4, 128]
    # More tokens than a short model's block table has room for: without a context, none of them looks anything up.
    assert arrays.context_B.tolist() == [3, 10, 0, 0, 0]
    assert arrays.slot_mapping_T.tolist() == [16, 17, 18, 41] + [0] * 124
    assert arrays.at_T.shape == (128,)
    assert arrays.positions_AT.shape == (3, 128)
    assert arrays.emit_index_E.tolist() == [3, 0, 0, 0, 0]
    assert [array.dtype for array in arrays] == [array.dtype for array in step()]
