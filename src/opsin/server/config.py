"""The server's settings; the engine's are in ``opsin.config``."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    allowed_origins: tuple[str, ...] = setting(
        (), "Origins whose pages may use this server from a browser (CORS), '*' for all; by default the server's own."
    )
    allowed_methods: tuple[str, ...] = setting(("*",), "Methods that such pages may use.")
    allowed_headers: tuple[str, ...] = setting(("*",), "Headers that such pages may send.")
    allow_credentials: bool = setting(False, "Let such pages send cookies and the like.")
    root_path: str = setting("", "Where a proxy puts this server: '/vlm' if it stands under https://host/vlm.")
    ssl_keyfile: str | None = setting(None, "File of the key of ssl_certfile.")
    ssl_certfile: str | None = setting(None, "File of the server's certificate (PEM); with it, the server talks TLS.")
    ssl_ca_certs: str | None = setting(None, "File of the authorities that clients' certificates must come from.")
    ssl_cert_reqs: int = setting(0, "Clients' certificates: 0 asks for none, 1 checks one that is sent, 2 demands one.")
    ssl_ciphers: str | None = setting(None, "Ciphers of TLS 1.2, as OpenSSL names them.")
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
    enable_force_include_usage: bool = setting(False, "Report usage in every stream, whether or not it is asked for.")
    return_tokens_as_token_ids: bool = setting(
        False, "Where requests do not say, write tokens of log-probabilities as 'token_id:ID' instead of their text."
    )
    trust_request_chat_template: bool = setting(
        False, "Let requests bring a chat_template; a template is a program, so only for callers that you trust."
    )
    default_chat_template_kwargs: Mapping[str, Any] = setting(
        None, "What the chat template gets beside the conversation, under what requests give it (JSON).", factory=dict
    )
    chat_template_content_format: Literal["auto", "string", "openai"] = setting(
        "auto", "Whether the chat template takes content as text or as parts; 'auto' asks it."
    )
    tool_call_parser: Literal["auto", "hermes", "mistral"] = setting(
        "auto", "How the model writes tool calls by itself; 'auto' reads it from the chat template."
    )
    reasoning_parser: Literal["deepseek_r1", "glm45", "qwen3"] | None = setting(
        None, "How the model marks what it thinks before it answers; chats then tell it apart, as 'reasoning'."
    )
    enable_auto_tool_choice: bool = setting(
        True, "Let the model decide whether to call a tool (tool_choice 'auto', the default where tools are given)."
    )
    exclude_tools_when_tool_choice_none: bool = setting(
        False, "Do not show tools to the model where tool_choice is 'none'."
    )
    disable_fastapi_docs: bool = setting(False, "Have neither /docs nor /openapi.json.")
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = setting(
        "warning", "What the HTTP layer itself logs."
    )
    disable_uvicorn_access_log: bool = setting(False, "Do not log a line for every request.")
    disable_access_log_for_endpoints: str | None = setting(
        None, "Paths whose requests are not logged, with commas between; those of the probes never are."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be between 0 and 65535.")
        if not all(self.api_key):
            raise ConfigError("api_key is empty; give a key, or leave the flag out.")
        if not all(self.served_model_name):
            raise ConfigError("served_model_name is empty; give a name, or leave the flag out.")
        self._check_tls()
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path is {self.root_path!r}; it must begin with '/'.")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError("allow_credentials needs allowed_origins that are named; '*' would be everybody.")
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

    def _check_tls(self) -> None:
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_ciphers"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} needs ssl_certfile, the server's certificate.")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(f"ssl_cert_reqs is {self.ssl_cert_reqs}; it must be 0, 1 or 2.")
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise ConfigError("ssl_cert_reqs needs ssl_ca_certs, the authorities of clients' certificates.")

    @property
    def unlogged_paths(self) -> frozenset[str]:
        """What ``disable_access_log_for_endpoints`` names."""
        return frozenset(path.strip() for path in (self.disable_access_log_for_endpoints or "").split(","))

    @property
    def is_local(self) -> bool:
        """Only this machine can connect."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
