"""From the URL in a request to a picture's bytes, without being lent as a weapon against the network inside.

What a caller sends is never trusted: ``check_url`` and ``check_address`` are the policy, as pure functions, so that
any transport can share it. ``fetch`` is the blocking transport for threads: it resolves a name once, checks every
address it got, and dials one of those, so that a second answer of the name server (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import binascii
import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

import msgspec

from opsin.config import MediaConfig
from opsin.errors import MediaError
from opsin.media.sniff import check_num_bytes
from opsin.media.source import read_regular_file
from opsin.media.video import said_of_videos
from opsin.types import Modality

MAX_REDIRECTS = 3
_CHUNK_BYTES = 2**16
_BASE64_CHARS = 2**18
_BASE64_PADDING = "= \t\r\n"
_ESCAPES_IN_BASE64 = {"%2b": "+", "%2f": "/", "%3d": "=", "%0a": "\n", "%0d": "\r", "%20": " "}
_MAX_ESCAPED_CHARS = 2**20  # Python unescapes a few million characters a second
_MAX_URL_CHARS = 8192
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\x9f\\]")
_DECIMAL_HOST = re.compile(r"(?:0[xX][0-9a-fA-F]*|[0-9]+)(?:\.(?:0[xX][0-9a-fA-F]*|[0-9]+))*\.?")
_URL_PUNCTUATION = "!#$%&'()*+,/:;=?@[]~"
_CLOUD_HOSTS = frozenset(  # public by their numbers, inside by their place: Azure's and Oracle's metadata
    {ipaddress.IPv4Address("168.63.129.16"), ipaddress.IPv4Address("192.0.0.192")}
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class WebTarget(NamedTuple):
    """A checked http(s) URL in parts. ``host`` has no brackets; ``path`` is what the request line says."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _default_port(self.scheme) else f"{host}:{self.port}"


def fetch(url: str, config: MediaConfig, modality: Modality = "image") -> bytes:
    """Read the bytes behind a ``data:``, ``file:``, ``http:`` or ``https:`` URL; what they are is not looked at.

    Args:
        modality: what they are fetched as; videos may take longer.

    Raises:
        MediaError: ``invalid_image_url``, ``invalid_base64_image``, ``failed_to_download_image`` or
            ``image_file_too_large``; of videos, their twins.
    """
    if modality == "video":
        with said_of_videos():
            return _fetch(url, config, config.video_fetch_timeout_s)
    return _fetch(url, config, config.image_fetch_timeout_s)


def _fetch(url: str, config: MediaConfig, timeout_s: float) -> bytes:
    scheme = url[:8].partition(":")[0].lower() if ":" in url[:8] else ""
    if scheme == "data":
        return decode_data_url(url, config.max_media_bytes)
    if scheme == "file":
        return _read_local(url, config)
    return _download(url, config, timeout_s)


def check_url(url: str, config: MediaConfig) -> WebTarget:
    """Take an http(s) URL apart, or refuse it. Looks nothing up; addresses are ``check_address``'s.

    Raises:
        MediaError: ``invalid_image_url``.
    """
    if len(url) > _MAX_URL_CHARS:
        raise _refusal(f"The picture's URL has {len(url)} characters; at most {_MAX_URL_CHARS} are taken.")
    if _FORBIDDEN.search(url):
        raise _refusal("The picture's URL contains a space, a backslash or a control character.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _refusal("The picture's URL is malformed.") from None
    if parts.scheme not in ("http", "https") or not host:
        raise _refusal("A picture's URL must be an http:, https: or data: URL, or file: where that is allowed.")
    if parts.username is not None or parts.password is not None:
        raise _refusal("The picture's URL contains a user name or a password.")
    try:
        # One spelling of every name: "EXAMPLE.com." and full-width letters must not slip past the list of domains.
        host = host.rstrip(".").encode("idna").decode("ascii").lower() if ":" not in host else host
    except UnicodeError:
        raise _refusal("The picture's URL has a host name that cannot be.") from None
    if not host or "%" in host:  # percent-encoded names, IPv6 zones
        raise _refusal("The picture's URL has a host name that cannot be.")
    if _DECIMAL_HOST.fullmatch(host) and not _is_dotted_quad(host):  # 2130706433, 0x7f.1, 0177.0.0.1
        raise _refusal("The picture's URL names an address in a form other than a.b.c.d.")
    if config.allowed_media_domains and host not in {name.lower() for name in config.allowed_media_domains}:
        raise _refusal(f"Pictures may not be fetched from {host} (allowed_media_domains).")
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_URL_PUNCTUATION)
    return WebTarget(parts.scheme, host, port or _default_port(parts.scheme), path)


def check_address(address: str, config: MediaConfig) -> None:
    """Refuse addresses that are not public: loopback, private, link-local (cloud metadata), shared, multicast, ...

    IPv4 addresses that travel inside IPv6 ones are looked at as well.

    Raises:
        MediaError: ``invalid_image_url``.
    """
    if config.allow_private_media_hosts:
        return
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(not inner.is_global or inner.is_multicast or inner in _CLOUD_HOSTS for inner in _layers(ip)):
        raise _refusal("The picture's URL leads to an address that is not public (allow_private_media_hosts).")


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """Decode ``data:[type][;base64],...``. The type is ignored: bytes say what they are.

    Raises:
        MediaError: ``invalid_base64_image``, ``invalid_image_url`` or ``image_file_too_large``.
    """
    begin = url.find(",") + 1
    if not begin:
        raise _refusal("The picture's data: URL has no comma.")
    if url[max(0, begin - 8) : begin - 1].lower() != ";base64":
        body = url[begin:]
        check_num_bytes(len(body) // 3, max_bytes)  # percent-encoding takes at most three characters a byte
        if "%" in body and len(body) > _MAX_ESCAPED_CHARS:
            raise _refusal(
                f"The picture's data: URL has {len(body)} percent-encoded characters; at most {_MAX_ESCAPED_CHARS} are "
                "taken. Send it as base64."
            )
        data = unquote_to_bytes(body)
        check_num_bytes(len(data), max_bytes)
        return data
    check_num_bytes((len(url) - begin) // 4, max_bytes)  # a bound whatever is escaped; the exact check comes below
    if "%" in url:
        url, begin = url[begin:], 0
        for escape, char in _ESCAPES_IN_BASE64.items():  # as many passes, each of which takes no time
            url = url.replace(escape, char).replace(escape.upper(), char)
    data = io.BytesIO()  # no copy of a large picture is made in one go, neither of its text nor of its bytes
    try:
        for piece in _base64_pieces(url, begin):
            data.write(piece)
            check_num_bytes(data.tell(), max_bytes)
    except MediaError:
        raise
    except (ValueError, msgspec.ValidationError):
        raise MediaError("The picture's data: URL is not valid base64.", code="invalid_base64_image") from None
    return data.getvalue()


def _base64_pieces(text: str, begin: int) -> Iterator[bytes]:
    """Decode what stands from ``begin`` on, bit by bit, since the decoder lets no other thread run.

    Senders break lines and leave out padding; anything else that is not base64 is a mistake worth telling.
    """
    end = max(begin, _end_of_base64(text))
    rest = ""
    for start in range(begin, end, _BASE64_CHARS):
        piece = rest + "".join(text[start : min(start + _BASE64_CHARS, end)].split())
        cut = len(piece) - len(piece) % 4
        if "=" in piece:
            raise ValueError
        yield msgspec.convert(piece[:cut], bytes)  # four times as fast as binascii, and as strict
        rest = piece[cut:]
    yield binascii.a2b_base64(rest + "=" * (-len(rest) % 4), strict_mode=True)


def _end_of_base64(text: str) -> int:
    """Where the padding begins; bit by bit as well."""
    end = len(text)
    while end > 0:
        start = max(0, end - _BASE64_CHARS)
        kept = len(text[start:end].rstrip(_BASE64_PADDING))
        if kept:
            return start + kept
        end = start
    return 0


def decode_frames_url(url: str, config: MediaConfig) -> list[bytes] | None:
    """The pictures in ``data:video/jpeg;base64,<frame>,<frame>,...``, as vLLM's users send frames; None of other URLs.

    Raises:
        MediaError: ``invalid_base64_video``, ``video_file_too_large``, or more than ``max_video_frames``.
    """
    head, _, body = url.partition(",")
    if head.lower() != "data:video/jpeg;base64":
        return None
    count = body.count(",") + 1
    if count > config.max_video_frames:
        raise MediaError(
            f"The video has {count} frames; at most {config.max_video_frames} are taken (max_video_frames).",
            code="video_too_large",
        )
    with said_of_videos():
        check_num_bytes(len(body) // 4 * 3, config.max_media_bytes)
        return [decode_data_url(f"{head},{frame}", config.max_media_bytes) for frame in body.split(",")]


def _read_local(url: str, config: MediaConfig) -> bytes:
    if config.allowed_local_media_path is None:
        raise _refusal("file: URLs are not allowed here (allowed_local_media_path).")
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise _refusal("A file: URL must name a local file: file:///folder/picture.jpg.")
    try:
        allowed = Path(config.allowed_local_media_path).resolve(strict=True)
        path = Path(unquote(parts.path)).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # missing, a NUL, a loop of links
        raise _refusal("The file: URL names no file.") from None
    if not path.is_relative_to(allowed):
        raise _refusal("The file: URL leads out of the allowed folder (allowed_local_media_path).")
    return read_regular_file(path, config.max_media_bytes, beneath=allowed)


def _download(url: str, config: MediaConfig, timeout_s: float) -> bytes:
    deadline = time.monotonic() + timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        target = check_url(url, config)
        try:
            answer = _request(target, deadline, config)
        except TimeoutError:
            raise _failure(f"Fetching the picture took longer than {timeout_s:g} s.") from None
        except (OSError, http.client.HTTPException) as error:
            raise _failure(f"Fetching the picture failed: {type(error).__name__}.") from None
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise _failure(f"The picture's URL redirects more than {MAX_REDIRECTS} times.")


def _request(target: WebTarget, deadline: float, config: MediaConfig) -> bytes | str:
    """One request: the body, or where it redirects to."""
    addresses = _resolve(target, deadline)
    for address in addresses:
        check_address(address, config)
    with _dial(target, addresses, deadline) as connection:
        connection.settimeout(_seconds_left(deadline))
        connection.sendall(
            f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: opsin\r\n"
            "Accept: image/*,video/*,*/*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        with http.client.HTTPResponse(_DeadlineReader(connection, deadline), method="GET") as response:  # type: ignore[arg-type]
            response.begin()
            location = response.getheader("Location")
            if response.status in _REDIRECTS and location:
                return location
            if response.status != 200:
                raise _failure(f"The picture's server answered with HTTP status {response.status}.")
            return _read_body(response, config.max_media_bytes)


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    announced = response.length
    check_num_bytes(announced or 0, max_bytes)
    body = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        body += chunk
        check_num_bytes(len(body), max_bytes)
    if announced is not None and len(body) != announced:
        raise _failure(f"The picture's server announced {announced} bytes and sent {len(body)}.")
    return bytes(body)


class _DeadlineReader(io.RawIOBase):
    """A socket's bytes under one deadline for all of them; a timeout per read would let a server drip for ever."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._connection.settimeout(_seconds_left(self._deadline))
        return self._connection.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What ``http.client`` asks of a socket."""
        return io.BufferedReader(self, _CHUNK_BYTES)


def _seconds_left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _resolve(target: WebTarget, deadline: float) -> list[str]:
    """The host's addresses. The system's resolver knows no deadline, so it is asked on a thread that is left behind."""
    answers: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, name="opsin-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=_seconds_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, OSError):
        raise _failure(f"The host {target.host} of the picture's URL cannot be found.")
    return answer


def _dial(target: WebTarget, addresses: Sequence[str], deadline: float) -> socket.socket:
    """Connect to one of the checked addresses, by number; TLS still asks for, and verifies, the name."""
    failure: OSError = TimeoutError()
    for index, address in enumerate(addresses):
        try:  # one address that swallows packets leaves time for the next
            timeout = _seconds_left(deadline) / (len(addresses) - index)
            connection = socket.create_connection((address, target.port), timeout)
        except OSError as error:
            failure = error
            continue
        if target.scheme == "http":
            return connection
        try:
            connection.settimeout(_seconds_left(deadline))
            return ssl.create_default_context().wrap_socket(connection, server_hostname=target.host)
        except BaseException:
            connection.close()
            raise
    raise failure


def _layers(ip: IPAddress) -> list[IPAddress]:
    """The address, and every IPv4 address that it stands for or leads to."""
    if isinstance(ip, ipaddress.IPv4Address):
        return [ip]
    if ip.ipv4_mapped is not None:
        return [ip.ipv4_mapped]
    inner: list[IPAddress] = [ip]
    if ip.sixtofour is not None:
        inner.append(ip.sixtofour)
    if ip.teredo is not None:
        inner.extend(ip.teredo)
    if ip in _NAT64 or int(ip) < 2**32:  # the latter: "IPv4-compatible", long deprecated
        inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return inner


def _is_dotted_quad(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _refusal(message: str) -> MediaError:
    return MediaError(message, code="invalid_image_url")


def _failure(message: str) -> MediaError:
    return MediaError(message, code="failed_to_download_image")
