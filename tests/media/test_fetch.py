"""URLs to bytes: what is refused before a packet is sent, and servers that misbehave."""

from __future__ import annotations

import os
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opsin.config import MediaConfig
from opsin.errors import MediaError
from opsin.media import fetch as fetch_module
from opsin.media.fetch import check_address, check_url, fetch

BODY = bytes(range(256)) * 20
PUBLIC = MediaConfig()
LOOPBACK = MediaConfig(allow_private_media_hosts=True, image_fetch_timeout_s=20, max_media_bytes=100_000)
HASTY = MediaConfig(allow_private_media_hosts=True, image_fetch_timeout_s=0.4, max_media_bytes=100_000)
NEVER_ENDING = ("drip-body", "drip-header", "silent")


def ok(body: bytes, *headers: str, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = ["HTTP/1.1 200 OK", f"Content-Length: {length}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


class Handler(socketserver.StreamRequestHandler):
    @property
    def _server(self) -> Server:
        assert isinstance(self.server, Server)
        return self.server

    def handle(self) -> None:
        request = self.rfile.readline().decode("latin-1")
        host = ""
        while (line := self.rfile.readline().strip()) != b"":
            name, _, value = line.decode("latin-1").partition(": ")
            host = value if name == "Host" else host
        path = request.split(" ")[1]
        self._server.seen.append((path, host))
        try:
            self.answer(path)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client had enough

    def answer(self, path: str) -> None:
        write = self.wfile.write
        match path.partition("?")[0].split("/")[1:]:
            case ["ok"]:
                write(ok(BODY))
            case ["chunked"]:
                write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
            case ["until-close"]:
                write(b"HTTP/1.0 200 OK\r\n\r\n" + BODY)
            case ["status", status]:
                write(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
            case ["hops", count]:
                write(redirect(f"/hops/{int(count) - 1}" if count != "1" else "/ok", 307))
            case ["to", *parts]:
                write(redirect("/".join(parts)))
            case ["too-short"]:
                write(ok(BODY, length=len(BODY) + 1))
            case ["too-long"]:
                write(ok(BODY + b"more", length=len(BODY)))
            case ["announces-much"]:
                write(ok(b"", length=10**9))
            case ["endless"]:
                write(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    write(bytes(2**16))
            case ["drip-body"]:
                self.drip(b"HTTP/1.1 200 OK\r\n\r\n")
            case ["drip-header"]:
                self.drip(b"HTTP/1.1 200 OK\r\nX: ")
            case ["silent"]:
                self._server.done.wait(5)
            case ["garbage"]:
                write(b"\0\1\2\3 what?\r\n\r\n")
            case _:
                write(ok(path.encode()))

    def drip(self, start: bytes) -> None:
        self.wfile.write(start)
        while not self._server.done.wait(0.02):
            self.wfile.write(b"x")


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str]] = []
        self.done = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.done.set()
        server.shutdown()
        thread.join()


def code_of(url: str, config: MediaConfig = LOOPBACK) -> str | None:
    with pytest.raises(MediaError) as caught:
        fetch(url, config)
    return caught.value.code


# ------------------------------------------------------------------------------------------ policy


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.0.1",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.3.4",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "168.63.129.16",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "2001:db8::1",
    ],
)
def test_address_that_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(MediaError) as caught:
        check_address(address, PUBLIC)
    assert caught.value.code == "invalid_image_url"
    check_address(address, LOOPBACK)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_public_address_is_let_through(address: str) -> None:
    check_address(address, PUBLIC)


@pytest.mark.parametrize(
    "url",
    [
        "picture.png",
        "",
        "://",
        "http://",
        "http:///path",
        "ftp://example.com/a.png",
        "gopher://example.com/",
        "javascript:alert(1)",
        "http://user@example.com/a.png",
        "http://user:secret@example.com/a.png",
        "http://@example.com/",
        "http://example.com\\@127.0.0.1/",
        "http://example.com/a b.png",
        "http://example.com/\r\nX: y",
        "http://example.com/\x00",
        "http://exa\tmple.com/",
        "http://example.com:99999/",
        "http://example.com:port/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127.0.0.01/",
        "http://[::1/",
        "http://[fe80::1%25eth0]/",
        "http://a..b/",
        "http://%31%32%37.0.0.1/",
        "http://" + "a" * 64 + ".com/",
        "http://example.com/" + "a" * 10_000,
    ],
)
def test_url_that_is_no_plain_web_address_is_refused(url: str) -> None:
    assert code_of(url, PUBLIC) == "invalid_image_url"
    assert code_of(url, LOOPBACK) == "invalid_image_url"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://Example.COM/a.png", ("http", "example.com", 80, "/a.png")),
        ("HTTPS://example.com.?q=1#part", ("https", "example.com", 443, "/?q=1")),
        ("http://example.com:8080", ("http", "example.com", 8080, "/")),
        ("http://bücher.example/ü%20b", ("http", "xn--bcher-kva.example", 80, "/%C3%BC%20b")),
        ("http://127.0.0.1/", ("http", "127.0.0.1", 80, "/")),
        ("http://[2606:4700::1111]:81/", ("http", "2606:4700::1111", 81, "/")),
    ],
)
def test_url_is_taken_apart(url: str, expected: tuple[str, str, int, str]) -> None:
    assert check_url(url, PUBLIC) == expected


def test_host_header_names_port_and_brackets_only_where_needed() -> None:
    assert check_url("https://example.com:443/", PUBLIC).authority == "example.com"
    assert check_url("http://example.com:443/", PUBLIC).authority == "example.com:443"
    assert check_url("http://[2606:4700::1111]:81/", PUBLIC).authority == "[2606:4700::1111]:81"


@pytest.mark.parametrize("host", ["example.com", "EXAMPLE.com.", "\uff45xample.com"])
def test_allowed_domain_is_matched_however_it_is_spelt(host: str) -> None:
    config = MediaConfig(allowed_media_domains=("Example.com",))
    assert check_url(f"http://{host}/", config).host == "example.com"


@pytest.mark.parametrize("host", ["evil.com", "example.com.evil.com", "notexample.com", "a.example.com"])
def test_other_domains_are_refused_where_some_are_listed(host: str) -> None:
    config = MediaConfig(allowed_media_domains=("example.com",))
    assert code_of(f"http://{host}/", config) == "invalid_image_url"


def test_private_host_is_refused_without_a_connection(server: Server) -> None:
    port = server.server_address[1]
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
        assert code_of(f"http://{host}:{port}/ok", PUBLIC) == "invalid_image_url"
    assert server.seen == []


def test_name_with_one_private_address_among_public_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answers)
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("dialled"))
    assert code_of("http://example.com/", PUBLIC) == "invalid_image_url"


def test_name_is_resolved_once_and_that_address_dialled(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def answer(host: str, port: int, *args: object, **kwargs: object) -> list[tuple[object, ...]]:
        if host != "pictures.example":  # create_connection() passes the number through here as well
            return resolve(host, port, *args, **kwargs)  # type: ignore[arg-type]
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    port = server.server_address[1]
    assert fetch(f"http://pictures.example:{port}/ok", LOOPBACK) == BODY
    assert asked == ["pictures.example"]
    assert server.seen == [("/ok", f"pictures.example:{port}")]


def test_slow_name_server_counts_against_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: release.wait(5) and [])
    start = time.monotonic()
    assert code_of("http://pictures.example/", HASTY) == "failed_to_download_image"
    assert time.monotonic() - start < 4  # the name server would have taken 5
    release.set()


# ------------------------------------------------------------------------------------------ download


def test_download_returns_the_body(server: Server) -> None:
    assert fetch(f"{server.url}/ok", LOOPBACK) == BODY
    assert fetch(f"{server.url}/chunked", LOOPBACK) == b"abcde"
    assert fetch(f"{server.url}/until-close", LOOPBACK) == BODY
    assert fetch(f"{server.url}/too-long", LOOPBACK) == BODY
    assert fetch(f"{server.url}/a%20b?c=d#e", LOOPBACK) == b"/a%20b?c=d"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("status/404", "failed_to_download_image"),
        ("status/403", "failed_to_download_image"),
        ("status/500", "failed_to_download_image"),
        ("status/204", "failed_to_download_image"),
        ("status/304", "failed_to_download_image"),
        ("too-short", "failed_to_download_image"),
        ("garbage", "failed_to_download_image"),
        ("drip-body", "failed_to_download_image"),
        ("drip-header", "failed_to_download_image"),
        ("silent", "failed_to_download_image"),
        ("endless", "image_file_too_large"),
        ("announces-much", "image_file_too_large"),
        ("to/file:///etc/passwd", "invalid_image_url"),
        ("to/data:,x", "invalid_image_url"),
        ("to/http://2130706433/", "invalid_image_url"),
        ("to/http://user@127.0.0.1/", "invalid_image_url"),
    ],
)
def test_misbehaving_server_fails_with_code_in_time(server: Server, path: str, code: str) -> None:
    start = time.monotonic()
    assert code_of(f"{server.url}/{path}", HASTY if path in NEVER_ENDING else LOOPBACK) == code
    assert time.monotonic() - start < 5


def test_unreachable_server_fails_with_code() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert code_of(f"http://127.0.0.1:{unused.getsockname()[1]}/") == "failed_to_download_image"


def test_three_redirects_are_followed_and_no_more(server: Server) -> None:
    assert fetch(f"{server.url}/hops/3", LOOPBACK) == BODY
    server.seen.clear()
    assert code_of(f"{server.url}/hops/4") == "failed_to_download_image"
    assert len(server.seen) == 4


def test_redirect_to_a_private_host_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_all_but_the_first(address: str, config: MediaConfig) -> None:
        if len(server.seen) > 0:
            check_address(address, PUBLIC)

    monkeypatch.setattr(fetch_module, "check_address", check_all_but_the_first)
    assert code_of(f"{server.url}/hops/1") == "invalid_image_url"
    assert [path for path, _ in server.seen] == ["/hops/1"]


def test_tls_to_a_server_without_it_fails_with_code(server: Server) -> None:
    assert code_of(server.url.replace("http", "https") + "/ok", HASTY) == "failed_to_download_image"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_tls_asks_for_and_verifies_the_name_though_a_number_is_dialled(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x"
    names = ["-addext", "subjectAltName=DNS:pictures.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    asked: list[str] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda connection, name, _: asked.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setattr(fetch_module, "_resolve", lambda target, deadline: ["127.0.0.1"])
    port = server.server_address[1]

    assert code_of(f"https://pictures.example:{port}/ok") == "failed_to_download_image", "an unknown signer"
    trusting = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    assert fetch(f"https://pictures.example:{port}/ok", LOOPBACK) == BODY
    assert code_of(f"https://other.example:{port}/ok") == "failed_to_download_image"
    assert asked == ["pictures.example", "pictures.example", "other.example"]


def test_download_leaves_no_descriptor(server: Server) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("ok", "endless", "status/404", "drip-header"):
        try:
            fetch(f"{server.url}/{path}", HASTY)
        except MediaError:
            pass
    server.done.set()
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.01)  # the server's own ends, in this same process, close in their threads
    assert len(os.listdir("/proc/self/fd")) <= before
