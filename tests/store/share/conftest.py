"""A plain web server that fails as it is told to, and patience that a test has."""

from __future__ import annotations

import contextlib
import http.server
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdstore.store.share import Patience

HTML = b"<html><body>Welcome to the wireless network. Please log in.</body></html>"


class Web:
    """Serves `root`; `faults[path]` are what its next answers for a path do instead, the last of them for ever if `forever`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.forever = False
        self.ranges = True
        self.asked: list[tuple[str, str | None, dict[str, str]]] = []
        self.sent: Counter[str] = Counter()
        self.pause = 0.0
        self._lock = threading.Lock()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.server.handle_error = lambda *who: None  # clients that are killed
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def fault_of(self, path: str) -> str:
        with self._lock:
            faults = self.faults[path] or self.faults["*"]
            return (faults[0] if self.forever else faults.pop(0)) if faults else ""

    def count(self, path: str, size: int) -> None:
        with self._lock:
            self.sent[path] += size

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                path = self.path.partition("?")[0].lstrip("/")
                web.asked.append((path, self.headers.get("Range"), {name.title(): value for name, value in self.headers.items()}))
                answer(self, web, path, web.fault_of(path))

        return Handler


def answer(to: http.server.BaseHTTPRequestHandler, web: Web, path: str, fault: str) -> None:
    kind, _, argument = fault.partition(":")
    if kind.isdigit():
        return send(to, int(kind), b"no", {"Retry-After": argument} if argument else {})
    if kind == "hang":
        time.sleep(1.5)
        to.close_connection = True
        return None
    if kind == "trickle":
        return trickle(to)
    if kind in ("lines", "trailers"):
        return lines(to, b"1" if kind == "lines" else b"0\r\nX: ")
    if kind == "html":
        return send(to, 200, HTML, {"Content-Type": "text/html"})
    if kind == "redirect":
        return send(to, 302, b"", {"Location": argument})
    file = web.root / path
    if not file.is_file():
        return send(to, 404, b"not here")
    content = file.read_bytes()
    tag = f'"{len(content)}-{file.stat().st_mtime_ns}"'
    asked, start = to.headers.get("Range"), 0
    if kind == "wrong":
        content = bytes(len(content))
    if kind == "other-tag":
        tag = '"another"'
    if asked and web.ranges and not kind.startswith("norange") and to.headers.get("If-Range", tag) == tag:
        start = int(asked.removeprefix("bytes=").rstrip("-"))
    body, status = content[start:], 206 if start else 200
    headers = {"ETag": tag} | ({"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {})
    if kind == "chunked":
        begin(to, status, headers | {"Transfer-Encoding": "chunked"})
        to.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        return None
    if kind == "digits":
        return send(to, status, body, headers | {"Connection": "close", "Content-Length": "1" * 5000}, length=False)
    if kind == "encoded":
        headers["Content-Encoding"] = "gzip"
    if kind == "other-range":
        headers["Content-Range"], status = f"bytes {start + 1}-{len(content) - 1}/{len(content)}", 206
    if kind == "twice":  # the body comes again, and no length is said
        return send(to, status, body + content, headers | {"Connection": "close"}, length=False)
    if kind in ("short", "norange-short", "reset", "slow"):
        begin(to, status, headers | {"Content-Length": str(len(body))})
        half = body[: max(1, len(body) // 2)]
        web.count(path, len(half))
        to.wfile.write(half)
        to.wfile.flush()
        if kind == "slow":
            with_patience(to, body[len(half) :])
        if kind == "reset":
            to.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        to.close_connection = True
        return None
    return send(to, status, body, headers, web)


def trickle(to: http.server.BaseHTTPRequestHandler) -> None:
    """Send headers without end, so often that no time-out between two bytes ends them."""
    to.close_connection = True
    with contextlib.suppress(OSError):
        to.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for i in range(40):
            to.wfile.write(f"X-{i}: x\r\n".encode())
            time.sleep(0.1)


def lines(to: http.server.BaseHTTPRequestHandler, first: bytes) -> None:
    """Send what is no byte of the file: the size of a chunk, or lines after the last one, without end."""
    to.close_connection = True
    begin(to, 200, {"Transfer-Encoding": "chunked"})
    with contextlib.suppress(OSError):
        to.wfile.write(first)
        while True:  # until the other side ends it
            to.wfile.write(b"0" if first == b"1" else b"x\r\nX: ")
            time.sleep(0.1)


def with_patience(to: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    try:
        for i in range(20):
            to.wfile.write(body[i : i + 1])
            to.wfile.flush()
            time.sleep(0.1)
    except OSError:
        pass


def begin(to: http.server.BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    to.send_response(status)
    for name, value in headers.items():
        to.send_header(name, value)
    to.end_headers()


def send(
    to: http.server.BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None, web: Web | None = None, length: bool = True
) -> None:
    begin(to, status, (headers or {}) | ({"Content-Length": str(len(body))} if length else {}))
    step = max(1, len(body) // 8) if web and web.pause else max(1, len(body))
    try:
        for at in range(0, len(body), step):
            to.wfile.write(body[at : at + step])
            if web:
                web.count(to.path.lstrip("/"), len(body[at : at + step]))
                time.sleep(web.pause)
    except OSError:
        pass
    to.close_connection = not length


@pytest.fixture
def web(pristine: Path) -> Iterator[Web]:
    """The pristine store on a web server."""
    made = Web(pristine)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def mirror(pristine: Path) -> Iterator[Web]:
    """The same on another one, which never fails."""
    made = Web(pristine)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def patience() -> Patience:
    return Patience(connect=1.0, silence=0.5, window=0.3, floor=1000.0, tries=3, backoff=0.01, longest=0.3)
