"""``POST /page/seen``: what the model sees of a picture. The page asks for it."""

from __future__ import annotations

import asyncio
import base64
import io

import msgspec
from PIL import Image
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from opsin.media.ops import PixelArray
from opsin.params import PoolingParams
from opsin.server.requests import Request
from opsin.server.state import ServerState, blame, renamed
from opsin.server.transport import ClientGone, GoneResponse, json_response, until_gone
from opsin.types import MediaLayout

_QUALITY = 90  # of the JPEGs that show tiles


class SeenRequest(Request, kw_only=True):
    """``POST /page/seen``: a picture, as a URL or a data URL."""

    image_url: str


class Grid(msgspec.Struct):
    """Tokens over a tile."""

    rows: int
    columns: int


class SeenView(msgspec.Struct):
    """One way in which the model sees a picture: tiles row by row, as JPEG data URLs."""

    columns: int
    tiles: list[str]
    grid: Grid | None


class Seen(msgspec.Struct):
    """The answer to ``POST /page/seen``; the size is the picture's, upright."""

    width: int
    height: int
    num_tokens: int
    views: list[SeenView]


async def see_picture(http: HTTPRequest, server: ServerState) -> Response:
    """What the model sees of a picture: resized, tiled, and how many tokens that is."""
    request = await server.read(http, SeenRequest)

    async def work() -> Seen:
        part = {"type": "image_url", "image_url": {"url": request.image_url}}
        messages = [{"role": "user", "content": [part]}]
        name = server.name_of(http, request, "seen")
        with renamed("image_url"), blame("image_url"):
            processed = await server.prepare_chat(name, request, messages, PoolingParams(), add_generation_prompt=True)
            pixels = await server.engine.look(processed)
        return await asyncio.to_thread(_shown, processed.request.media[0].layout, pixels)

    try:
        with server.admission.enter(1):
            return json_response(await until_gone(http.receive, work()))
    except ClientGone:
        return GoneResponse()


def _shown(layout: MediaLayout, pixels: PixelArray) -> Seen:
    plan = layout.plan
    views: list[SeenView] = []
    at = 0
    for view in plan.views:
        tiles: list[str] = []
        for _ in range(view.rows * view.cols):
            size = view.height * view.width * 3
            tiles.append(_data_url(pixels[at : at + size].reshape(view.height, view.width, 3)))
            at += size
        views.append(SeenView(view.cols, tiles, token_grid(layout, view.height, view.width)))
    return Seen(plan.width, plan.height, layout.num_features, views)


def token_grid(layout: MediaLayout, height: int, width: int) -> Grid | None:
    """How the features lie over a tile, where every tile has as many and they are spread evenly."""
    sizes = layout.plan.tile_sizes
    per_tile, rest = divmod(layout.num_features, len(sizes))
    if rest or any(size != (height, width) for size in sizes):
        return None
    for rows in range(1, per_tile + 1):
        columns, uneven = divmod(per_tile, rows)
        if not uneven and rows * width == columns * height:
            return Grid(rows, columns)
    return None


def _data_url(tile: PixelArray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
