"""Captions from any chat endpoint that speaks OpenAI's protocol, through the `openai` client.

The client's own retries are off: they do not stop when told to, count a rate limit as a failure,
and do not hold back the other threads until it is over.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import logging
import math
import os
import random
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from gella.captions.captioner import (
    AnswerError,
    EndpointError,
    Reply,
    RequestError,
    StoppedError,
    Tally,
)

_logger = logging.getLogger(__name__)
_PATH = "/chat/completions"
_RETRIED = {408, 409, 425, 429}  # and every 5xx
_NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_LONG_KEY = 16  # shorter keys ("EMPTY") may be words of a description
_CONNECT_TIMEOUT = 20.0  # seconds at most


@dataclass(frozen=True)
class EndpointSettings:
    """How patiently to ask.

    Attributes:
        timeout: seconds for one request; a server that falls silent in its midst has twice that.
        retries: how often one question is asked again after a failure that may pass.
        backoff: seconds before the first retry; doubled each time, with a random factor 0.5 to 1.
        max_backoff: longest of these pauses, seconds.
        max_wait: longest pause that the endpoint itself may ask for, seconds; beyond it no
            further question makes sense now.
        rate_limit_retries: how often one question may meet a rate limit; these are not failures.
        max_tokens: longest answer, in tokens.
        max_bytes: longest response, in bytes.
        extra: fields of the request to add or replace, such as temperature; None removes one.
    """

    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    max_backoff: float = 60.0
    max_wait: float = 300.0
    rate_limit_retries: int = 50
    max_tokens: int = 1024
    max_bytes: int = 1_000_000
    extra: Mapping[str, Any] = field(default_factory=dict)


class _LaterError(Exception):
    """A failure that may pass: reason, seconds that the endpoint asks for, if it does, and whether
    it is a rate limit."""

    wait: float | None = None
    limited: bool = False


class EndpointCaptioner:
    """Asks a chat endpoint; several threads may share one.

    A rate-limit answer makes all threads pause, for as long as ``Retry-After`` says. The key is
    sent in the Authorization header and goes nowhere else: redirects are not followed, it is not in
    messages, logs or ``repr``, and is cut out of what the server answers. Proxies are those of the
    environment (``HTTPS_PROXY``, ``NO_PROXY``), never for this machine itself.

    Args:
        url: base address such as ``https://host/v1``, or the full one of ``/chat/completions``.
        model: name of the model at that endpoint.
        key: API key; None or "" sends none (servers on one's own machine need none).
        settings: how patiently to ask.
        tally: gets ``requests``, ``retries``, ``rate_limited``, ``prompt_tokens``,
            ``completion_tokens``, ``answers_without_usage``.

    Attributes:
        address: what is asked, without its query.

    Raises:
        ValueError: the address, the model or the key cannot be right; the key is not shown.
        ImportError: the package `openai` is missing.
    """

    mode = "json"

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        settings: EndpointSettings | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.model, self._key = model.strip(), (key or "").strip()
        if not self.model:
            raise ValueError("the model has no name; give the one that the endpoint lists")
        if not all(32 < ord(character) < 127 for character in self._key):
            raise ValueError("the key holds a blank or a character outside ASCII; copy it again")
        self.settings = EndpointSettings() if settings is None else settings
        self.tally = Tally() if tally is None else tally
        base, query, local = _read_address(url)
        self.address = base + _PATH
        if self._key and base.startswith("http:") and not local:
            _logger.warning("%s is not encrypted: the key is readable on its way", self.address)
        self._client = _open_client(base, query, self._key, self.settings, use_proxies=not local)
        self._stop = threading.Event()
        self._gate = threading.Lock()
        self._not_before = 0.0  # time.monotonic() before which a rate limit forbids requests

    @classmethod
    def from_environment(
        cls,
        url: str | None = None,
        model: str | None = None,
        key: str | None = None,
        **options: Any,
    ) -> EndpointCaptioner:
        """Build one; what is None comes from ``GELLA_API_URL``, ``_MODEL`` and ``_KEY``.

        Raises ValueError without address or model, and what the class raises.
        """
        url, model = url or os.getenv("GELLA_API_URL"), model or os.getenv("GELLA_API_MODEL")
        if not url:
            raise ValueError("the endpoint needs an address: use --url or set GELLA_API_URL")
        if not model:
            how = "--model, in the demo and the app --captioner-model,"
            raise ValueError(
                f"the endpoint needs the name of a model: use {how} or set GELLA_API_MODEL"
            )
        return cls(url, model, os.getenv("GELLA_API_KEY") if key is None else key, **options)

    def __repr__(self) -> str:
        """Address and model; never the key."""
        return f"EndpointCaptioner({self.address!r}, {self.model!r})"

    def stop(self) -> None:
        """Begin no request any more; pauses end at once, requests under way are finished."""
        self._stop.set()

    abort = stop  # nothing wakes a socket that waits for a silent server

    def ask(self, text: str, picture: bytes | None, *, attempt: int = 0) -> Reply:
        """Answer a question about a picture, or about nothing but the text.

        Failures that may pass (no connection, a broken or late answer, 408, 409, 425, 429, 5xx)
        are retried. With ``attempt`` above 0 a temperature set in ``extra`` is at least 0.7, lest
        the same answer come back.

        Raises:
            AnswerError: there is an answer without text (a refusal, a filter).
            RequestError: refused for good, or still failing after all retries.
            EndpointError: no question can be answered (key, model, address, quota, a long wait).
            StoppedError: :meth:`stop` was called.
        """
        request = self._request(text, picture, attempt)
        failures = limits = 0
        while True:
            while (pause := self._not_before - time.monotonic()) > 0 and not self._stop.wait(pause):
                pass
            if self._stop.is_set():
                raise StoppedError("stopped")
            self.tally.add(requests=1)
            try:
                return self._answer(*self._post(request))
            except _LaterError as error:
                failures, limits = failures + (not error.limited), limits + error.limited
                if self._stop.is_set():
                    raise StoppedError("stopped") from None
                if failures > self.settings.retries or limits > self.settings.rate_limit_retries:
                    raise RequestError(f"{error} (asked {failures + limits} times)") from None
                delay = self._delay(error, limits if error.limited else failures)
                self.tally.add(retries=1, rate_limited=int(error.limited))
                level = logging.WARNING if failures > 2 and not error.limited else logging.INFO
                _logger.log(level, "%s; again in %.1f s", error, delay)
            self._stop.wait(delay)

    def _request(self, text: str, picture: bytes | None, attempt: int) -> dict[str, Any]:
        content: Any = text
        if picture is not None:
            url = f"data:image/jpeg;base64,{b64encode(picture).decode('ascii')}"
            image = {"type": "image_url", "image_url": {"url": url}}
            content = [{"type": "text", "text": text}, image]
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.settings.max_tokens,
            **self.settings.extra,
        }
        if attempt and isinstance(request.get("temperature"), int | float):
            request["temperature"] = max(request["temperature"], 0.7)
        return {name: value for name, value in request.items() if value is not None}

    def _post(self, request: dict[str, Any]) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and text of the response, whatever its status."""
        import openai

        end, data = time.monotonic() + self.settings.timeout, bytearray()
        try:
            with self._client.chat.completions.with_streaming_response.create(
                model=self.model,
                messages=request["messages"],
                extra_body=request,
                extra_headers={} if self._key else {"Authorization": openai.Omit()},
            ) as response:
                if response.headers.get("content-encoding", "identity") != "identity":
                    # A few bytes may become any number of them.
                    raise _LaterError("the answer is compressed, which nobody asked for")
                for part in response.iter_bytes():
                    data += part
                    if len(data) > self.settings.max_bytes:
                        limit = f"{self.settings.max_bytes} bytes (--max-answer-bytes)"
                        raise _LaterError(f"the answer is larger than {limit}")
                    if time.monotonic() > end:  # a byte now and then passes every other limit
                        raise TimeoutError
            return response.status_code, response.headers, data.decode("utf-8", "replace")
        except openai.APIStatusError as error:
            return error.response.status_code, error.response.headers, error.response.text
        except Exception as error:
            raise self._no_response(error) from None

    def _no_response(self, error: BaseException) -> Exception:
        """The error for a request without a complete response; it holds no secret."""
        causes: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in causes:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        # The client's own error says no more than that there was one.
        reason = f"{type(causes[:2][-1]).__name__}: {causes[:2][-1]}"
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return EndpointError(
                    f"{self.address}: the certificate is not trusted ({cause.verify_message}); "
                    "name a file of the authority's certificate by SSL_CERT_FILE"
                )
            if isinstance(cause, TimeoutError):
                reason = f"no complete answer within {self.settings.timeout:g} s (--timeout)"
            elif isinstance(cause, _LaterError):
                reason = str(cause)
        return _LaterError(_redact(f"{self.address}: {reason}", self._key))

    def _delay(self, error: _LaterError, times: int) -> float:
        """Seconds until this question is asked again; a rate limit also closes the gate."""
        settings = self.settings
        delay = min(settings.max_backoff, settings.backoff * 2.0 ** min(times - 1, 30))
        delay *= random.uniform(0.5, 1.0)
        if error.wait is not None:
            if error.wait > settings.max_wait:
                raise EndpointError(
                    f"{error}: the endpoint asks to wait {error.wait:.0f} s, more than "
                    f"{settings.max_wait:g} s (--max-wait); run the same command again later"
                )
            # Never earlier than asked; the rest keeps the threads from coming back all at once.
            delay = error.wait + min(delay, settings.backoff)
        if error.limited:
            pause = delay if error.wait is None else error.wait
            with self._gate:
                self._not_before = max(self._not_before, time.monotonic() + pause)
        return delay

    def _answer(self, status: int, headers: Mapping[str, str], text: str) -> Reply:
        """The reply in a response, or the error that it stands for."""
        if len(self._key) >= _LONG_KEY:
            text = _redact(text, self._key)
        try:
            payload = json.loads(text)
        except (ValueError, RecursionError):
            payload = None
        error = payload.get("error") if isinstance(payload, dict) else None
        if status == 200 and error and not payload.get("choices"):
            # Gateways report the failure of the model behind them in a good response.
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 502
        if status != 200:
            raise self._failure(status, headers, error, text)
        reply, refusal = _read_reply(payload)
        if reply is None:
            raise _LaterError(f"{self.address}: the answer is no chat completion")
        self.tally.add_tokens(reply)
        if refusal or not reply.text.strip():
            raise AnswerError(f"no text in the answer ({refusal or 'empty'})"[:200])
        return reply

    def _failure(self, status: int, headers: Mapping[str, str], error: Any, text: str) -> Exception:
        details = error if isinstance(error, dict) else {}
        said = " ".join(str(details.get("message") or error or text).split())[:200]
        # Redacted again: short keys stay in answers, but never in a message.
        message = _redact(f"{self.address} answered {status}: {said}", self._key)
        if {str(details.get("code")), str(details.get("type"))} & _NO_QUOTA or status == 402:
            return EndpointError(f"{message}; the account has no quota left")
        if status in _RETRIED or status >= 500:
            later = _LaterError(message)
            later.wait, later.limited = _retry_after(headers), status == 429
            return later
        if status == 401:
            return EndpointError(f"{message}; check the key (GELLA_API_KEY or --key)")
        if status in (404, 405):
            return EndpointError(f"{message}; check the address (--url) and the model (--model)")
        if 300 <= status < 400:
            target = _redact(headers.get("location", "?").partition("?")[0], self._key)
            return EndpointError(f"{message}; it redirects to {target}: give that address by --url")
        if status == 413:
            message += "; smaller pictures: --max-side"
        return RequestError(message)


def _open_client(
    base: str, query: str, key: str, settings: EndpointSettings, *, use_proxies: bool
) -> Any:
    """The client of the `openai` package, which sends the key to this address only."""
    try:
        import httpx2  # what it sends with
        import openai
    except ImportError as error:
        raise ImportError(
            'a chat endpoint needs the package openai; install it: pip install -e ".[captions]"'
        ) from error

    for name in ("openai", "httpx2", "httpcore2"):
        # At DEBUG they tell pictures and what the server sent, which may be the key.
        logging.getLogger(name).setLevel(logging.WARNING)
    nothing: Any = openai.Omit()
    return openai.OpenAI(
        base_url=base,
        api_key=key or "none",
        max_retries=0,
        timeout=httpx2.Timeout(settings.timeout, connect=min(settings.timeout, _CONNECT_TIMEOUT)),
        default_query=dict(parse_qsl(query, keep_blank_values=True)),
        default_headers={
            "Accept-Encoding": "identity",
            # What OpenAI's own variables of the environment would add.
            **{"OpenAI-Organization": nothing, "OpenAI-Project": nothing},
        },
        http_client=httpx2.Client(
            verify=ssl.create_default_context(),  # which heeds SSL_CERT_FILE
            follow_redirects=False,  # the key would go to another host
            trust_env=use_proxies,
        ),
    )


def _read_address(url: str) -> tuple[str, str, bool]:
    """Base address without the path of completions, query, and whether it is this machine."""
    advice = "an endpoint's address looks like https://host/v1"
    url = url.strip()
    if not all(32 < ord(character) < 127 for character in url):
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
    path = parts.path.rstrip("/").removesuffix(_PATH)
    return f"{parts.scheme}://{parts.netloc}{path}", parts.query, is_loopback(parts.hostname)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header: a number, or a date by the server's own clock."""
    value = headers.get("retry-after", "").strip()
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


def _read_reply(payload: Any) -> tuple[Reply | None, str]:
    """The reply of a chat completion, None if it is none, and why it holds no answer."""
    try:
        choice, usage = payload["choices"][0], payload.get("usage") or {}
        message, reason = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), str(message.get("refusal") or "")
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError):
        return None, ""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str | None):
        return None, ""
    counts = [n if isinstance(n, int) and n >= 0 else None for n in tokens]
    if reason == "content_filter":
        refusal = refusal or "the endpoint's content filter"
    return Reply(content or "", counts[0], counts[1], reason != "length"), refusal


def _redact(text: str, secret: str) -> str:
    return text.replace(secret, "***") if secret else text
