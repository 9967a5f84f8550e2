"""A plain web server, and the Hub's files, read through urllib3.

fsspec's HTTP file system follows redirects by itself and has no If-Range; here each redirect is looked at before it is followed, since credentials must
stay with the host that they were given for, and a server's answer must not reach a file or an unencrypted host.
"""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from time import monotonic, time
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

import urllib3

from kdstore.address import redacted
from kdstore.errors import ConfigError
from kdstore.store.share.transport import BLOCK_BYTES, Body, Failure, Patience, number_of

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Web:
    """Files below a URL; user and password in it, a query (such as a signature) and `headers` go to its host alone."""

    pace = None

    def __init__(self, url: str, patience: Patience, *, name: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise ConfigError(f"{redacted(url)} names no host.", "Write https://HOST/PATH.")
        self.name = name or redacted(url)
        self._base = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
        self._query = parts.query
        self._headers = dict(headers or {})
        if parts.username is not None:
            self._headers |= urllib3.make_headers(basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}")
        self._silence = patience.silence
        self._timeout = urllib3.Timeout(connect=patience.connect, read=patience.silence)
        self._pools: dict[str, urllib3.PoolManager] = {}

    @contextlib.contextmanager
    def open(self, path: str, start: int = 0, tag: str | None = None) -> Iterator[Body]:
        """Ask for a file; see `Place.open`."""
        url = f"{self._base}/{quote(path)}" + (f"?{self._query}" if self._query else "")
        asked = {"Accept-Encoding": "identity", "User-Agent": "kdstore"} | ({"Range": f"bytes={start}-"} if start else {})
        asked |= {"If-Range": tag} if start and tag else {}
        try:
            answer = self._answer(url, asked)
            try:
                with _ended(self._silence, answer.shutdown) as waits:
                    yield _body(answer, start, waits)
            finally:
                answer.release_conn() if answer.length_remaining == 0 else answer.close()
        except urllib3.exceptions.HTTPError as e:
            raise Failure(_said(e)) from e

    def _answer(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        """Follow redirects that are safe to follow and return the last answer; raises Failure for those that are not."""
        home, own = urlsplit(self._base), dict(self._headers)
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._pool(url).request(
                "GET", url, headers={**headers, **own}, redirect=False, retries=False, preload_content=False, timeout=self._timeout
            )
            location = answer.headers.get("Location")
            if answer.status not in _REDIRECTS or not location:
                return answer
            answer.close()
            try:
                parts = urlsplit(url := urljoin(url, location))
                hostname = parts.hostname
            except ValueError as e:
                raise Failure("is redirected to what is no URL", again=False) from e
            if parts.scheme not in ("http", "https") or not hostname:
                raise Failure(f"is redirected to '{parts.scheme}:', which is not followed", again=False)
            if home.scheme == "https" and parts.scheme == "http":
                raise Failure("is redirected from https to http, which is not followed", again=False)
            if parts.username is not None or parts.password is not None:
                raise Failure(f"is redirected to {hostname} with credentials, which is not followed", again=False)
            if (parts.scheme, parts.netloc) != (home.scheme, home.netloc):
                own = {}
        raise Failure("is redirected without end", again=False)

    def _pool(self, url: str) -> urllib3.PoolManager:
        """Return the connections for a URL: through the proxy that the environment names, if any."""
        parts = urlsplit(url)
        proxy = "" if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies().get(parts.scheme, "")
        if proxy not in self._pools:
            made = urllib3.ProxyManager(proxy, maxsize=32) if proxy else urllib3.PoolManager(maxsize=32)
            limited = {scheme: _answering_within(self._silence, pool) for scheme, pool in made.pool_classes_by_scheme.items()}
            made.pool_classes_by_scheme = limited
            self._pools.setdefault(proxy, made)
        return self._pools[proxy]


def _answering_within(seconds: float, pool: type[urllib3.HTTPConnectionPool]) -> type[urllib3.HTTPConnectionPool]:
    """Return a pool whose connections end if an answer's headers take longer: a time-out of a socket begins anew with every byte."""

    class Connection(pool.ConnectionCls):  # type: ignore[name-defined]  # what urllib3 offers for it
        def getresponse(self) -> urllib3.HTTPResponse:
            end = functools.partial(_end, self.sock)
            with _ended(seconds, end) as waits:
                waits.append(monotonic())
                answer: urllib3.HTTPResponse = super().getresponse()
            answer.shutdown = end  # type: ignore[method-assign]  # its own lets a server go on sending
            return answer

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


@contextlib.contextmanager
def _ended(seconds: float, end: Callable[[], None]) -> Iterator[list[float]]:
    """Call `end` when a wait, whose begin is put into the list, takes so many seconds: lines of headers, chunks and trailers are no bytes of a file."""
    waits: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds / 4):
            if any(monotonic() - begun >= seconds for begun in waits):
                end()

    threading.Thread(target=watch, name="kdstore-watch", daemon=True).start()
    try:
        yield waits
    finally:
        over.set()


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        sock.shutdown(socket.SHUT_RDWR)


def _body(answer: urllib3.BaseHTTPResponse, start: int, waits: list[float]) -> Body:
    """Read what a server's answer is; raises Failure for one that is no file."""
    status, headers = answer.status, answer.headers
    if status in (404, 410):
        raise Failure(f"is not there (status {status})", again=False, missing=True)
    if status in (400, 401, 403, 405, 451):
        raise Failure(f"is refused (status {status})", again=False)
    if status in (206, 200) and headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Failure(f"comes encoded as {headers['Content-Encoding'][:20]}, which was not asked for")
    tag = headers.get("ETag")
    tag = None if tag is None or tag.startswith("W/") else tag
    if status == 206:
        found = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if not found or number_of(found[1]) != start:
            raise Failure("is answered with another range than was asked for")
        return Body(start, number_of(found[3]), tag, _blocks(answer, waits), answer.shutdown)
    if status == 200:
        return Body(0, number_of(headers.get("Content-Length", "")), tag, _blocks(answer, waits), answer.shutdown)
    raise Failure(f"is answered with status {status}", after=retry_after(headers.get("Retry-After", "")))


def _blocks(answer: urllib3.BaseHTTPResponse, waits: list[float]) -> Iterator[bytes]:
    """Yield what has come so far, again and again: a slow server is seen to be slow."""
    while True:
        waits.append(monotonic())
        block = answer.read1(BLOCK_BYTES, decode_content=False)
        waits.clear()
        if not block:
            return
        yield block


def retry_after(text: str) -> float:
    """Read the header Retry-After, seconds or a date, as seconds from now."""
    if (seconds := number_of(text.strip())) is not None:
        return float(seconds)
    with contextlib.suppress(ValueError, TypeError, LookupError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time())
    return 0.0


def _said(error: urllib3.exceptions.HTTPError) -> str:
    if isinstance(error, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ProxyError | urllib3.exceptions.SSLError):
        return f"cannot be asked for: there is no connection ({type(error).__name__})"
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return "does not come: no byte within the time-out"
    return f"breaks off ({type(error).__name__})"
