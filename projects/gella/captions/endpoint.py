"""Captions from any chat endpoint that speaks OpenAI's protocol; no client library is needed."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gella.captions.captioner import (
    AnswerError,
    EndpointError,
    Picture,
    Reply,
    RequestError,
    StoppedError,
    Tally,
    count_usage,
    redact,
)
from gella.captions.http import (
    Response,
    Transport,
    TransportError,
    full_address,
    is_loopback,
    retry_after,
)

__all__ = ["EndpointCaptioner", "EndpointSettings"]

_logger = logging.getLogger(__name__)
_PATH = "/chat/completions"
_RETRIED = {408, 409, 425, 429}  # and every 5xx
_NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_LONG_KEY = 16  # shorter keys ("EMPTY") may be words of a description


@dataclass(frozen=True)
class EndpointSettings:
    """How patiently to ask.

    Attributes:
        timeout: seconds for one whole request.
        retries: how often one question is asked again after a failure that may pass.
        backoff: seconds before the first retry; doubled each time, with a random factor 0.5 to 1.
        max_backoff: longest of these pauses, seconds.
        max_wait: longest pause that the endpoint itself may ask for, seconds; beyond it no
            further question makes sense now.
        rate_limit_retries: how often one question may meet a rate limit; these are not failures.
        max_tokens: longest answer, in tokens.
        max_bytes: longest response, in bytes.
        verify: check the server's certificate.
        ca_file: certificates to trust instead of the system's.
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
    verify: bool = True
    ca_file: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class _LaterError(Exception):
    """A failure that may pass. ``wait``: seconds that the endpoint asks for, if it does."""

    def __init__(self, reason: str, wait: float | None = None, limited: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.limited = wait, limited


class EndpointCaptioner:
    """Asks a chat endpoint; several threads may share one.

    A rate-limit answer makes all threads pause, for as long as ``Retry-After`` says. The key is
    sent in the Authorization header and goes nowhere else: it is not in messages, logs or ``repr``,
    and is cut out of what the server answers.

    Args:
        url: base address such as ``https://host/v1``, or the full one of ``/chat/completions``.
        model: name of the model at that endpoint.
        key: API key; None or "" sends none (servers on one's own machine need none).
        settings: how patiently to ask.
        tally: gets ``requests``, ``retries``, ``rate_limited``, ``prompt_tokens``,
            ``completion_tokens``, ``answers_without_usage``.

    Raises:
        ValueError: the address, the model or the key cannot be right; the key is not shown.
        FileNotFoundError: there is no such certificate file.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        settings: EndpointSettings | None = None,
        tally: Tally | None = None,
    ) -> None:
        if not model.strip():
            raise ValueError("the model has no name; give the one that the endpoint lists")
        self.model = model.strip()
        self.settings = EndpointSettings() if settings is None else settings
        self.tally = Tally() if tally is None else tally
        self._key = _checked_key(key)
        self._transport = Transport(
            full_address(url, _PATH),
            timeout=self.settings.timeout,
            max_bytes=self.settings.max_bytes,
            verify=self.settings.verify,
            ca_file=self.settings.ca_file,
        )
        parts = urlsplit(self.address)
        if self._key and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            _logger.warning("%s is not encrypted: the key is readable on its way", self.address)
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

        Raises:
            ValueError: no address or no model is given; and as the class.
        """
        found = {}
        for name, value in (("url", url), ("model", model)):
            found[name] = value or os.environ.get(f"GELLA_API_{name.upper()}", "")
            if not found[name]:
                raise ValueError(
                    f"the endpoint's {name} is not given: use --{name} or set "
                    f"GELLA_API_{name.upper()}"
                )
        key = os.environ.get("GELLA_API_KEY") if key is None else key
        return cls(found["url"], found["model"], key, **options)

    def __repr__(self) -> str:
        """Address and model; never the key."""
        return f"EndpointCaptioner({self.address!r}, {self.model!r})"

    @property
    def address(self) -> str:
        """The address that is asked, without its query."""
        return self._transport.address

    def stop(self) -> None:
        """Begin no request any more; pauses end at once, requests under way are finished."""
        self._stop.set()

    def abort(self) -> None:
        """Stop, and cut the requests under way."""
        self._stop.set()
        self._transport.abort()

    def ask(self, text: str, picture: Picture | None, *, attempt: int = 0) -> Reply:
        """Answer a question about a picture (or about nothing but the text).

        Failures that may pass (no connection, a broken or late answer, 408, 409, 425, 429, 5xx)
        are retried.

        Args:
            text: the question.
            picture: sent as a data URL; None sends the text only.
            attempt: above 0, a temperature set in ``extra`` is at least 0.7, lest the same answer
                come back.

        Raises:
            AnswerError: there is an answer without text (a refusal, a filter).
            RequestError: refused for good, or still failing after all retries.
            EndpointError: no question can be answered (key, model, address, quota, a wait longer
                than ``max_wait``).
            StoppedError: :meth:`stop` or :meth:`abort` was called.
        """
        body = json.dumps(self._request(text, picture, attempt)).encode("utf-8")
        failures = limits = 0
        while True:
            self._wait_for_turn()
            self.tally.add(requests=1)
            try:
                return self._answer(self._post(body))
            except _LaterError as error:
                failures, limits = failures + (not error.limited), limits + error.limited
                allowed = failures <= self.settings.retries
                if self._stop.is_set():
                    raise StoppedError("stopped") from None
                if not allowed or limits > self.settings.rate_limit_retries:
                    raise RequestError(f"{error} (asked {failures + limits} times)") from None
                delay = self._delay(error, failures if not error.limited else limits)
                self.tally.add(retries=1, rate_limited=int(error.limited))
                level = logging.WARNING if failures > 2 and not error.limited else logging.INFO
                _logger.log(level, "%s; again in %.1f s", error, delay)
            if self._stop.wait(delay):
                raise StoppedError("stopped")

    def _request(self, text: str, picture: Picture | None, attempt: int) -> dict[str, Any]:
        content: Any = text
        if picture is not None:
            data = b64encode(picture.data).decode("ascii")
            content = [
                {"type": "text", "text": text},
                {"type": "image_url", "image_url": {"url": f"data:{picture.mime};base64,{data}"}},
            ]
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.settings.max_tokens,
            **self.settings.extra,
        }
        if attempt and isinstance(request.get("temperature"), int | float):
            request["temperature"] = max(request["temperature"], 0.7)
        return {name: value for name, value in request.items() if value is not None}

    def _post(self, body: bytes) -> Response:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            return self._transport.post(body, headers)
        except TransportError as error:
            message = redact(f"{self.address}: {error}", self._key)
            if error.fatal:
                raise EndpointError(message) from None
            raise _LaterError(message) from None

    def _wait_for_turn(self) -> None:
        while not self._stop.is_set():
            with self._gate:
                pause = self._not_before - time.monotonic()
            if pause <= 0:
                return
            self._stop.wait(pause)
        raise StoppedError("stopped")

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

    def _answer(self, response: Response) -> Reply:
        """The reply in a response, or the error that it stands for."""
        text = response.body.decode("utf-8", "replace")
        if self._key and len(self._key) >= _LONG_KEY:
            text = redact(text, self._key)
        try:
            payload = json.loads(text)
        except (ValueError, RecursionError):
            payload = None
        status = response.status
        error = payload.get("error") if isinstance(payload, dict) else None
        if status == 200 and error and not payload.get("choices"):
            # Gateways report the failure of the model behind them in a good response.
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 502
        if status != 200:
            raise self._failure(status, response.headers, error, text)
        reply, refusal = _read_reply(payload)
        if reply is None:
            raise _LaterError(f"{self.address}: the answer is no chat completion")
        count_usage(self.tally, reply)
        if refusal or not reply.text.strip():
            raise AnswerError(f"no text in the answer ({refusal or 'empty'})"[:200])
        return reply

    def _failure(self, status: int, headers: Mapping[str, str], error: Any, text: str) -> Exception:
        details = error if isinstance(error, dict) else {}
        said = " ".join(str(details.get("message") or error or text).split())[:200]
        # Redacted again: the status line's short keys stay in answers, but never in a message.
        message = redact(f"{self.address} answered {status}: {said}", self._key)
        if {str(details.get("code")), str(details.get("type"))} & _NO_QUOTA or status == 402:
            return EndpointError(f"{message}; the account has no quota left")
        if status in _RETRIED or status >= 500:
            return _LaterError(message, retry_after(headers), limited=status == 429)
        if status == 401:
            return EndpointError(f"{message}; check the key (GELLA_API_KEY or --key)")
        if status in (404, 405):
            return EndpointError(f"{message}; check the address (--url) and the model (--model)")
        if 300 <= status < 400:
            place = redact(str(headers.get("location", "?")).partition("?")[0], self._key)
            return EndpointError(f"{message}; it redirects to {place}: give that address by --url")
        if status == 413:
            message += "; smaller pictures: --max-side"
        return RequestError(message)


def _read_reply(payload: Any) -> tuple[Reply | None, str]:
    """The reply of a chat completion, None if it is none, and why it holds no answer."""
    try:
        choice = payload["choices"][0]
        message = choice["message"]
        content = message.get("content")
        usage = payload.get("usage") or {}
        reason = choice.get("finish_reason")
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError):
        return None, ""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if content is not None and not isinstance(content, str):
        return None, ""
    counts = [n if isinstance(n, int) and n >= 0 else None for n in tokens]
    refusal = str(message.get("refusal") or "")
    if reason == "content_filter":
        refusal = refusal or "the endpoint's content filter"
    return Reply(content or "", counts[0], counts[1], complete=reason != "length"), refusal


def _checked_key(key: str | None) -> str | None:
    key = (key or "").strip()
    if any(ord(character) <= 32 or ord(character) > 126 for character in key):
        raise ValueError("the key holds a blank or a character outside ASCII; copy it again")
    return key or None
