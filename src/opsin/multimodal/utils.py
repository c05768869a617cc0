"""Fetching pictures, for programs that want them before the engine does."""

from __future__ import annotations

from PIL import Image

from opsin.config import MediaConfig
from opsin.media.fetch import fetch
from opsin.media.source import open_picture


def fetch_image(image_url: str) -> Image.Image:
    """The picture behind an http(s) or ``data:`` URL: RGB, upright, under the engine's own limits on hosts and sizes.

    Raises:
        MediaError: it cannot be had, or is no picture.
    """
    config = MediaConfig()
    return open_picture(fetch(image_url, config), config).decode()
