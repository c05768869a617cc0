"""Pixels on their way to the device, where those that come raw are resized, cropped, padded and cut.

The bytes are those that ``media.ops`` makes of the same picture and plan, and in the same places.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from opsin.kernels.ops import Resample
from opsin.layers.staging import upload
from opsin.media.ops import make_frames, output_size
from opsin.media.resample import Pass, make_taps, passes
from opsin.runner.executor import Pixels
from opsin.types import Crop, Pad, PixelOp, PixelPlan, Resize, View

_MAX_TABLES = 256  # of some 20 KB each as a rule, and 400 KB at most


def raw_bytes(max_raw_pixels: int) -> int:
    """Device memory that one raw picture takes at most until its tiles are made: itself, and three stages of them."""
    return 4 * 3 * max_raw_pixels


class PixelLoader:
    """Brings one item after the other to the device.

    Args:
        resample: see ``kernels.ops.Resample``.
    """

    def __init__(self, resample: Resample, device: torch.device) -> None:
        self._resample = resample
        self._device = device
        self._tables: OrderedDict[Pass, npt.NDArray[np.int32]] = OrderedDict()  # least recently used first

    def load(self, pixels: Pixels, plan: PixelPlan, into: torch.Tensor | None = None) -> torch.Tensor:
        """Flat uint8 of ``plan.num_bytes`` on the device; the host does not wait.

        Args:
            into: where they are to be, rather than in new memory.
        """
        data = pixels.data
        if not pixels.is_raw:
            assert isinstance(data, np.ndarray)
            return upload([data], self._device, into)[0]
        flat = torch.empty(plan.num_bytes, dtype=torch.uint8, device=self._device) if into is None else into
        wanted = _all_passes(plan)
        if isinstance(data, np.ndarray):
            raw, *tables = upload([data, *map(self._table, wanted)], self._device)
        else:
            raw, tables = data, upload([*map(self._table, wanted)], self._device)
            if raw.is_cuda:  # its memory is another stream's, which must not have it back before this one has read it
                raw.record_stream(torch.cuda.current_stream(self._device))
        taps = dict(zip(wanted, tables, strict=True))
        frames = flat.view(len(plan.frames), -1)
        begin = 0
        for view in plan.views:
            self._make(raw.view(plan.height, plan.width, 3), view, taps, frames[0, begin : begin + view.num_bytes])
            begin += view.num_bytes
        if len(frames) > 1:
            frames[1:] = frames[:1]
        return flat

    def makes_pillows_bytes(self) -> bool:
        """A few pictures come out as the installed Pillow makes them: it is no fork with other arithmetic and no later
        version with another order of axes, and the device computes what it should."""
        random = np.random.default_rng(0)
        for (width, height), made in (
            ((40, 30), (55, 21)),
            ((31, 47), (24, 12)),
            ((20, 60), (17, 55)),
            ((9, 33), (40, 7)),
        ):
            picture = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            ops = (Resize(*made, name) for name in ("bilinear", "bicubic", "lanczos"))
            plan = PixelPlan(width, height, tuple(View((op,), height=op.height, width=op.width) for op in ops))
            expected = np.empty(plan.num_bytes, np.uint8)
            make_frames([Image.fromarray(picture)], plan, expected)
            if not np.array_equal(self.load(Pixels(picture.reshape(-1), is_raw=True), plan).cpu().numpy(), expected):
                return False
        return True

    def _table(self, wanted: Pass) -> npt.NDArray[np.int32]:
        table = self._tables.pop(wanted, None)
        if table is None:
            table = make_taps(wanted.resample, wanted.num_in, wanted.num_out)
            if len(self._tables) == _MAX_TABLES:
                self._tables.popitem(last=False)
        self._tables[wanted] = table
        return table

    def _make(self, seen_YX3: torch.Tensor, view: View, taps: dict[Pass, torch.Tensor], out: torch.Tensor) -> None:
        """Fill ``out`` with one view's tiles. A single tile that a resize makes is written there at once."""
        is_one_tile = view.rows == view.cols == 1
        for i, op in enumerate(view.ops):
            is_last = i == len(view.ops) - 1
            target = out.view(view.height, view.width, 3) if is_one_tile and is_last else None
            seen_YX3 = self._apply(seen_YX3, op, taps, target)
        if seen_YX3.data_ptr() != out.data_ptr():
            grid = seen_YX3.unflatten(1, (view.cols, view.width)).unflatten(0, (view.rows, view.height))
            out.view(view.rows, view.cols, view.height, view.width, 3).copy_(grid.transpose(1, 2))

    def _apply(
        self, seen_YX3: torch.Tensor, op: PixelOp, taps: dict[Pass, torch.Tensor], target: torch.Tensor | None
    ) -> torch.Tensor:
        height, width, _ = seen_YX3.shape
        match op:
            case Resize():
                todo = passes(op, width, height)
                for i, step in enumerate(todo):
                    shape = (step.num_out, seen_YX3.shape[1], 3) if step.axis == 0 else (len(seen_YX3), step.num_out, 3)
                    is_last = i == len(todo) - 1
                    out = target if is_last and target is not None else seen_YX3.new_empty(shape)
                    self._resample(seen_YX3, taps[step], step.axis, out)
                    seen_YX3 = out
                return seen_YX3
            case Crop():
                return _on_canvas(seen_YX3, op.width, op.height, -op.left, -op.top, op.fill)
            case Pad():
                width, height = width + op.left + op.right, height + op.top + op.bottom
                return _on_canvas(seen_YX3, width, height, op.left, op.top, op.fill)


def _all_passes(plan: PixelPlan) -> list[Pass]:
    """Those of every resize of the plan, each once."""
    found: dict[Pass, None] = {}
    for view in plan.views:
        width, height = plan.width, plan.height
        for op in view.ops:
            if isinstance(op, Resize):
                found.update(dict.fromkeys(passes(op, width, height)))
            width, height = output_size([op], width, height)
    return list(found)


def _on_canvas(
    seen_YX3: torch.Tensor, width: int, height: int, left: int, top: int, fill: tuple[int, int, int]
) -> torch.Tensor:
    """A ``width`` x ``height`` canvas with the picture's corner at (left, top), which may lie outside of it.

    A view of the picture where that covers it all.
    """
    part_YX3 = seen_YX3[max(0, -top) : max(0, height - top), max(0, -left) : max(0, width - left)]
    if part_YX3.shape[:2] == (height, width):
        return part_YX3
    canvas_YX3 = seen_YX3.new_empty(height, width, 3)
    for channel, value in enumerate(fill):
        canvas_YX3[..., channel] = value
    top, left = max(0, top), max(0, left)
    canvas_YX3[top : top + part_YX3.shape[0], left : left + part_YX3.shape[1]] = part_YX3
    return canvas_YX3
