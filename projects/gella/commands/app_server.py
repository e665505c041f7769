"""The web server around the page: bounded requests, no address but its own, a folder that goes.

The middleware stands before Gradio: what it refuses is never parsed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from gella.commands.app_uploads import clean_folder, folder_bytes

# Scripts, styles and pictures of this server only; Gradio's page has inline ones, and names hosts
# that are not asked then.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
SLACK = 100_000  # bytes of a request besides the file or the texts in it
DRAINED = 10  # times the allowed size: so much of a refused request is read, to tell why
_UPLOAD = "/upload"


class Guard:
    """ASGI middleware: bounds request bodies and refuses to fetch foreign addresses.

    Args:
        app: the application behind it.
        max_upload: bytes of a request that uploads a file.
        max_body: bytes of any other request.
        full: says that there is no room for another upload.
    """

    def __init__(self, app: Any, max_upload: int, max_body: int, full: Callable[[], bool]) -> None:
        self._app, self._full = app, full
        self._max_upload, self._max_body = max_upload, max_body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = unquote(scope["path"]).lower()
        if "/proxy=" in path or "file=http" in path or "file=//" in path:
            await _refuse(send, 403, "This server fetches nothing from other addresses.")
            return
        upload = path.rstrip("/").endswith(_UPLOAD)
        limit = self._max_upload if upload else self._max_body
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            await _drain(receive, DRAINED * limit)
            await _refuse(send, 413, f"The request is too large; at most {limit:,} bytes go.")
            return
        if upload and self._full():
            await _refuse(send, 503, "There is no room for uploads now; try again in a while.")
            return
        await self._app(scope, _Counted(receive, limit), _with_headers(send))


async def _drain(receive: Any, limit: int) -> None:
    """Read a body and drop it: a browser looks at the answer only when it has sent all."""
    while limit > 0:
        message = await receive()
        limit -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


class _Counted:
    """A request's body, which ends as if the client had gone when it is longer than allowed."""

    def __init__(self, receive: Any, limit: int) -> None:
        self._receive, self._left = receive, limit

    async def __call__(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                return {"type": "http.disconnect"}
        return message


def _with_headers(send: Any) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            given = [
                pair for pair in message.get("headers", []) if pair[0].decode() not in _HEADERS
            ]
            ours = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*given, *ours]}
        await send(message)

    return sending


async def _refuse(send: Any, status: int, message: str) -> None:
    body = json.dumps({"detail": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Workspace:
    """Gradio's temporary folder, of this server alone; it goes when the server ends.

    Must be entered before gradio is imported, which reads its settings from the environment then.

    Args:
        max_bytes: of all files in it; more uploads are refused.
        max_age: seconds after which a file is deleted.
    """

    def __init__(self, max_bytes: int, max_age: float) -> None:
        self.max_bytes, self.max_age = max_bytes, max_age
        self.folder = Path(tempfile.mkdtemp(prefix="gella_app_")).resolve()
        self._keep: set[Path] = set()
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> Workspace:
        """Point Gradio at the folder, and switch off what asks other hosts."""
        wanted = {
            "GRADIO_TEMP_DIR": str(self.folder),
            "GRADIO_EXAMPLES_CACHE": str(self.folder / "examples"),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_SHARE": "False",
            "GRADIO_SSR_MODE": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        self._before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Delete the folder with all that is in it, and restore the environment."""
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(self.folder, ignore_errors=True)

    def downloads(self) -> Path:
        """The folder for results on their way to the visitor."""
        folder = self.folder / "results"
        folder.mkdir(exist_ok=True)
        return folder

    def keep_all(self) -> None:
        """Keep the files that are there now (the examples) as long as the server runs."""
        self._keep = {path for path in self.folder.rglob("*") if path.is_file()}

    def clean(self) -> int:
        """Delete what is too old; return how many files."""
        return clean_folder(self.folder, self._keep, self.max_age)

    def is_full(self) -> bool:
        """Whether there is no room for another upload."""
        return folder_bytes(self.folder) > self.max_bytes
