"""The server's settings; the engine's are in ``opsin.config``."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal

from opsin.config import setting
from opsin.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Who may ask, how much, and where."""

    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 is every IPv4 interface.")
    port: int = setting(8000, "Port to listen on; 0 picks a free one.")
    uds: str | None = setting(None, "Unix socket to listen on, instead of host and port.")
    api_key: tuple[str, ...] = setting((), "Key that clients must send; give the flag again for another.")
    served_model_name: tuple[str, ...] = setting(
        (), "Names under which the model is asked for, the first one in answers; by default the model's own."
    )
    max_queue: int = setting(512, "Answers that wait beyond those that run; more are refused with 503.")
    max_requests_per_minute: int | None = setting(
        None, "Requests that one key (or address, where there are no keys) may send a minute; more get 429."
    )
    max_requests_per_key: int | None = setting(
        None, "Requests of one key (or address) that are answered at the same time; more get 429."
    )
    drain_timeout_s: float = setting(30.0, "After SIGTERM, time for running requests to finish, in seconds.")
    engine_silence_s: float = setting(
        10.0, "An engine process that gives no sign of life for so long is killed and started again, in seconds."
    )
    engine_step_timeout_s: float = setting(300.0, "So is one that takes longer for a single step, in seconds.")
    max_body_bytes: int = setting(64 * 2**20, "Larger request bodies are refused.")
    enable_prompt_tokens_details: bool = setting(True, "Report cached and picture tokens in usage.")
    trust_request_chat_template: bool = setting(
        False, "Let requests bring a chat_template; a template is a program, so only for callers that you trust."
    )

    chat_template_content_format: Literal["auto", "string", "openai"] = setting(
        "auto", "Whether the chat template takes content as text or as parts; 'auto' asks it."
    )
    tool_call_parser: Literal["auto", "hermes", "mistral"] = setting(
        "auto", "How the model writes tool calls by itself; 'auto' reads it from the chat template."
    )
    enable_auto_tool_choice: bool = setting(
        True, "Let the model decide whether to call a tool (tool_choice 'auto', the default where tools are given)."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be between 0 and 65535.")
        if not all(self.api_key):
            raise ConfigError("api_key is empty; give a key, or leave the flag out.")
        if not all(self.served_model_name):
            raise ConfigError("served_model_name is empty; give a name, or leave the flag out.")
        for name, low in (
            ("max_queue", 0),
            ("drain_timeout_s", 0),
            ("engine_silence_s", 1),
            ("engine_step_timeout_s", 1),
            ("max_body_bytes", 1),
            ("max_requests_per_minute", 1),
            ("max_requests_per_key", 1),
        ):
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {low}.")

    @property
    def is_local(self) -> bool:
        """Only this machine can connect."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
