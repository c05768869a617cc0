"""The tables of slots, on a device that is no CPU."""

from __future__ import annotations

import torch

from opsin.params import SamplingParams
from opsin.runner.slots import SlotTable
from opsin.types import SlotOpen


def test_new_blocks_on_any_device_but_a_cpu_are_told_to_it():
    # The device's copy of the block table is no longer the host's memory there, whoever made the device.
    table = SlotTable(max_num_seqs=2, max_model_len=8, block_size=4, num_axes=1, device=torch.device("meta"))
    table.open(SlotOpen(1, [5, 6], 2, SamplingParams(), 0, None, 0, [], frozenset()))
    table.append_blocks(1, (3, 7))
    new = table.take_new_blocks()
    assert new is not None
    places, blocks = new
    assert (places - table.blocks_SL.shape[1]).tolist() == [0, 1]
    assert blocks.tolist() == [3, 7]
    assert table.take_new_blocks() is None
