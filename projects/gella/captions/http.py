"""One HTTP POST at a time, bounded in time and size, on the standard library alone."""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import math
import socket
import ssl
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

__all__ = [
    "Response",
    "Transport",
    "TransportError",
    "full_address",
    "is_loopback",
    "retry_after",
]

_CONNECT_TIMEOUT = 20.0  # seconds at most for each step of connecting
_CHUNK = 65536


class TransportError(Exception):
    """No complete response came. ``fatal``: the next request would fail in the same way."""

    def __init__(self, message: str, fatal: bool = False) -> None:
        """Keep the message, which names no secret, and whether repeating is pointless."""
        super().__init__(message)
        self.fatal = fatal


@dataclass(frozen=True)
class Response:
    """A complete response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """Sends POST requests to one address, each over a connection of its own.

    Redirects are not followed: they would carry the key to another host. Proxies are those of the
    environment (``HTTPS_PROXY``, ``NO_PROXY``), never for this machine itself.

    Args:
        url: http or https address without user, password and fragment.
        timeout: seconds for a whole request, from the connection to the last byte of the answer.
        max_bytes: size of a response body above which it is refused.
        verify: check the server's certificate.
        ca_file: certificates to trust instead of the system's.

    Raises:
        ValueError: the address is none, or holds a password.
        FileNotFoundError: there is no such ``ca_file``.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        max_bytes: int,
        verify: bool = True,
        ca_file: str | None = None,
    ) -> None:
        self._parts = _split(url)
        self._timeout, self._max_bytes = timeout, max_bytes
        self._context = None if self._parts.scheme == "http" else _tls(verify, ca_file)
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._aborted = False

    @property
    def address(self) -> str:
        """The address without its query, for messages."""
        return f"{self._parts.scheme}://{self._parts.netloc}{self._parts.path}"

    def abort(self) -> None:
        """Cut all requests under way, and let no other begin."""
        with self._lock:
            self._aborted = True
            for handle in self._sockets:
                _cut(handle)

    def post(self, body: bytes, headers: Mapping[str, str]) -> Response:
        """Send ``body`` and return the response, whatever its status.

        Raises:
            TransportError: no connection, no complete response within the time, or one that is too
                large or no HTTP.
        """
        connection, target, extra = self._connection()
        late = threading.Event()
        handle: socket.socket | None = None
        timer: threading.Timer | None = None
        try:
            connection.connect()
            handle = connection.sock
            handle.settimeout(self._timeout)
            timer = threading.Timer(self._timeout, _end_late, (handle, late))
            timer.daemon = True
            timer.start()  # a server that sends a byte now and then passes every socket timeout
            self._register(handle)
            connection.request("POST", target, body=body, headers={**headers, **extra})
            return self._read(connection.getresponse())
        except TransportError as error:
            raise self._failure(error, True) if late.is_set() else error from None
        except ssl.SSLCertVerificationError as error:
            raise TransportError(
                f"the certificate of {self._parts.hostname} is not trusted"
                f" ({error.verify_message}); give the authority's certificate by --ca-file",
                fatal=True,
            ) from None
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            raise self._failure(error, late.is_set()) from None
        finally:
            if timer is not None:
                timer.cancel()
            if handle is not None:
                with self._lock:
                    self._sockets.discard(handle)
            connection.close()

    def _register(self, handle: socket.socket) -> None:
        with self._lock:
            self._sockets.add(handle)
            if self._aborted:
                _cut(handle)

    def _read(self, response: http.client.HTTPResponse) -> Response:
        parts, size = [], 0
        while size <= self._max_bytes:
            part = response.read(min(_CHUNK, self._max_bytes + 1 - size))
            if not part:
                break
            parts.append(part)
            size += len(part)
        if size > self._max_bytes:
            raise TransportError(
                f"the answer is larger than {self._max_bytes} bytes (--max-answer-bytes)"
            )
        if response.length:  # what the header promised and the connection did not bring
            raise TransportError(f"the connection ended {response.length} bytes too early")
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Response(response.status, headers, b"".join(parts))

    def _failure(self, error: Exception, late: bool) -> TransportError:
        if late or isinstance(error, TimeoutError):
            return TransportError(f"no complete answer within {self._timeout:g} s (--timeout)")
        # An HTTP exception's own text may hold what the server sent; its kind says enough.
        detail = str(error) if isinstance(error, OSError) else ""
        return TransportError(f"{type(error).__name__}{': ' if detail else ''}{detail}")

    def _connection(self) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """An unopened connection, the request's target, and headers for a proxy."""
        parts = self._parts
        host, port = parts.hostname or "", parts.port
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        timeout = min(self._timeout, _CONNECT_TIMEOUT)
        proxy = None if is_loopback(host) or urllib.request.proxy_bypass(host) else _proxy(parts)
        if proxy is None:
            if self._context is None:
                return http.client.HTTPConnection(host, port, timeout=timeout), target, {}
            tls = http.client.HTTPSConnection(host, port, timeout=timeout, context=self._context)
            return tls, target, {}
        secret = {}
        if proxy.username:
            user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            secret = {"Proxy-Authorization": f"Basic {b64encode(user.encode()).decode()}"}
        gate, gate_port = proxy.hostname or "", proxy.port or 80
        if self._context is None:
            plain = http.client.HTTPConnection(gate, gate_port, timeout=timeout)
            return plain, f"{self.address}{'?' if parts.query else ''}{parts.query}", secret
        tls = http.client.HTTPSConnection(gate, gate_port, timeout=timeout, context=self._context)
        tls.set_tunnel(host, port or 443, secret)
        return tls, target, {}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header: a number, or a date by the server's own clock."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            then = email.utils.parsedate_to_datetime(value).timestamp()
            date = headers.get("date")
            now = email.utils.parsedate_to_datetime(date).timestamp() if date else time.time()
        except (TypeError, ValueError):
            return None
        seconds = then - now
    return max(0.0, seconds) if math.isfinite(seconds) else None


def full_address(url: str, path: str) -> str:
    """The address with ``path`` at its end, whether it had that already or not; a query stays."""
    head, mark, query = url.strip().partition("?")
    head = head.rstrip("/")
    return (head if head.endswith(path) else head + path) + mark + query


def _split(url: str) -> SplitResult:
    advice = "an endpoint's address looks like https://host/v1"
    if any(ord(character) <= 32 or ord(character) > 126 for character in url):
        raise ValueError(f"the address holds a blank or a character outside ASCII; {advice}")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises where it is no number
    except ValueError as error:
        raise ValueError(f"the address cannot be read ({error}); {advice}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("the address holds a user or password; give the key by GELLA_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"the address does not begin with http:// or https:// and a host; {advice}"
        )
    return parts._replace(fragment="")


def _proxy(parts: SplitResult) -> SplitResult | None:
    address = urllib.request.getproxies().get(parts.scheme)
    if not address:
        return None
    return urlsplit(address if "//" in address else f"http://{address}")


def _tls(verify: bool, ca_file: str | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except FileNotFoundError:
        raise FileNotFoundError(f"certificate file {ca_file} does not exist") from None
    except ssl.SSLError as error:
        raise ValueError(f"{ca_file} holds no PEM certificate ({error.reason})") from None
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _end_late(handle: socket.socket, late: threading.Event) -> None:
    late.set()
    _cut(handle)


def _cut(handle: socket.socket) -> None:
    """End a connection that another thread is reading from or writing to."""
    try:
        # The plain socket's own method: TLS's would touch the state that the other thread uses.
        socket.socket.shutdown(handle, socket.SHUT_RDWR)
    except OSError:
        pass  # closed already
