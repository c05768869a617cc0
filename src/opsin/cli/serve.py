"""``opsin serve``: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
import json
import os
import shlex
import sys
import threading
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from opsin.cli.flags import add_engine_flags, add_model_place, add_option, engine_settings
from opsin.config import MediaConfig
from opsin.errors import ConfigError, RequestError
from opsin.server.config import ServerConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

    from opsin.cli.flags import Commands

SERVING_DEFAULTS: Mapping[str, Any] = {
    "limit_mm_per_prompt": {"image": 16, "video": 2},
    "max_media_bytes": 32 * 2**20,
    "max_image_pixels": 50_000_000,
    "max_request_media_bytes": 64 * 2**20,
    "max_request_pixels": 150_000_000,
}
"""Stricter than the engine's own: what comes over a network is a stranger's."""

_SHOWN_SIZES = ((224, 224), (640, 480), (1280, 720), (1920, 1080))
_TIMEOUT_VARIABLES = ("OPSIN_IMAGE_FETCH_TIMEOUT", "VLLM_IMAGE_FETCH_TIMEOUT")


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        usage="opsin serve [options] [MODEL]",
        help="answer over HTTP, as OpenAI's API does",
        description="Serve a model over HTTP, as OpenAI's API does. Where a flag is left out, pictures are limited to "
        "16, 64 MiB and 150 megapixels per request, and to 32 MiB and 50 megapixels each. Of the environment, "
        "OPSIN_IMAGE_FETCH_TIMEOUT (or VLLM_IMAGE_FETCH_TIMEOUT) stands for --image-fetch-timeout-s.",
        epilog="example: opsin serve Qwen/Qwen2-VL-2B-Instruct --port 8000",
        allow_abbrev=False,
    )
    add_model_place(parser)
    section = parser.add_argument_group("server: who may ask, how much, and where")
    hints = typing.get_type_hints(ServerConfig)
    for field in dataclasses.fields(ServerConfig):
        default = None if field.default is dataclasses.MISSING else field.default
        add_option(section, field.name, hints[field.name], field.metadata["help"], default, splits=False)
    add_engine_flags(parser)
    parser.set_defaults(function=execute, parser=parser)


def execute(args: argparse.Namespace) -> int:
    from opsin.engine.child import ChildProcess
    from opsin.server.listening import listen, url_of

    config = server_config(args)
    settings = serving_settings(engine_settings(args), os.environ)
    listener = listen(config)  # first: a busy port should not cost the loading of a model
    url = url_of(listener, config) + config.root_path.rstrip("/")

    def load(is_unwanted: threading.Event) -> FastAPI:
        from opsin.async_llm import AsyncLLM
        from opsin.engine.remote import Watch
        from opsin.server.app import create_app

        watch = Watch(silence_s=config.engine_silence_s, step_s=config.engine_step_timeout_s)
        engine = AsyncLLM.spawn(**settings, watch=watch, is_unwanted=is_unwanted, child=child)
        try:
            return create_app(engine, config, model=settings.get("model", "demo"))
        except BaseException:
            engine.shutdown()
            raise

    def announce(app: FastAPI) -> None:
        server = app.state.server
        told = banner(url, config, server.names[0], pools=settings.get("runner") == "pooling")
        lines = [picture_line(server.engine.picture_tokens), told]
        print("\n".join(filter(None, lines)), file=sys.stderr, flush=True)

    try:
        with ChildProcess() as child:  # before what follows is imported, which takes a second, too
            from opsin.server.run import run

            run(listener, load, announce, config)
    finally:
        listener.close()
        if config.uds is not None:
            os.unlink(config.uds)
    print("Stopped.", file=sys.stderr)
    return 0


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The server's settings that were given.

    Raises:
        ConfigError: a value is out of range.
    """
    names = {field.name for field in dataclasses.fields(ServerConfig)}
    return ServerConfig(**{name: value for name, value in vars(args).items() if name in names})


def serving_settings(settings: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The engine's settings for serving: those given, then the environment's, then ``SERVING_DEFAULTS``.

    Raises:
        ConfigError: pictures would be decoded in the server's own process, or a variable is no number.
    """
    result = {**SERVING_DEFAULTS, **settings}
    variable = next((name for name in _TIMEOUT_VARIABLES if name in environment), None)
    if variable is not None and "image_fetch_timeout_s" not in settings:
        try:
            result["image_fetch_timeout_s"] = float(environment[variable])
        except ValueError:
            raise ConfigError(f"{variable} is {environment[variable]!r}; it must be a number of seconds.") from None
    if result.get("media_workers") == 0:
        raise ConfigError(
            "media_workers is 0; a server needs at least 1, since only a process of its own can be stopped when a "
            "picture turns out to be hostile."
        )
    if result.get("media_workers") is None:
        result["media_workers"] = max(1, len(os.sched_getaffinity(0)) - 2)  # cores beside the engine and the server
    MediaConfig(**{field.name: result[field.name] for field in dataclasses.fields(MediaConfig) if field.name in result})
    return result


def picture_line(tokens: Callable[[int, int], int]) -> str:
    """What pictures of common sizes cost in the prompt; nothing for models that take none.

    Args:
        tokens: of a picture, by width and height.
    """
    costs: dict[int, list[str]] = {}
    for width, height in _SHOWN_SIZES:
        try:
            costs.setdefault(tokens(width, height), []).append(f"{width}x{height}")
        except RequestError:  # a size that this model does not take
            continue
    told = (f"{number} at {' or '.join(sizes)}" for number, sizes in costs.items())
    return f"Tokens per picture: {', '.join(told)}" if costs else ""


def banner(url: str, config: ServerConfig, name: str, *, pools: bool = False) -> str:
    """What is printed when the server is ready: where it is, and a line to try it with.

    Args:
        pools: the server gives vectors, and no text.
    """
    lines = [f"\nServing {name} at {url}" + (f" on the socket {config.uds}" if config.uds else "")]
    if not config.is_local and not config.api_key:
        lines.append(
            f"WARNING: everybody who can reach {config.host} may use this server. Set --api-key, or leave out --host."
        )
    return "\n".join([*lines, "Try it:\n", curl_line(url, config, name, pools=pools), ""])


def curl_line(url: str, config: ServerConfig, name: str, *, pools: bool = False) -> str:
    """A command that asks about a small picture; the key stays a variable, since terminals are looked at."""
    question = "Represent the given image." if pools else "What is in the picture?"
    content = [{"type": "image_url", "image_url": {"url": _sample_picture()}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    body = {"model": name, **({} if pools else {"max_tokens": 32}), "messages": messages}
    words = ["curl", "-s", f"{url}/v1/{'embeddings' if pools else 'chat/completions'}"]
    words += ["--unix-socket", config.uds] if config.uds else []
    words += ["--cacert", config.ssl_certfile] if config.ssl_certfile else []
    line = shlex.join([*words, "-H", "Content-Type: application/json", "-d", json.dumps(body)])
    return f'{line} -H "Authorization: Bearer $OPSIN_API_KEY"' if config.api_key else line


def _sample_picture() -> str:
    """A blue circle, as a data: URL of some two hundred characters. (A red one, to the demo model, is a stop sign.)"""
    from PIL import Image, ImageDraw

    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 255, 255, 0, 0, 255])
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill=1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, bits=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
