"""A web page that grounds captions: open the address that it prints.

    python tools/app.py

takes the released tiny model (weights/gella_tiny_shapes) and its examples. Your own model, with a
segmenter for pictures without masks and a chat endpoint that writes captions:

    python tools/app.py --config-file configs/gella_swin_t.yaml --weights model_final.pth \\
        --device cuda --segmenter sam:facebook/sam-vit-base \\
        --captioner https://host/v1 --captioner-model some-model

The page answers on this machine only (127.0.0.1) until --host says otherwise; docs/APP.md says
what is bounded, kept and deleted. Ctrl-C stops it. Exit code 2 and one line "error: ..." for wrong
input.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

from gella.commands.console import Parser, exit_status
from gella.commands.demo_inputs import Entry, read_captions
from gella.utils.stopping import StopRequest

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "weights/gella_tiny_shapes/config.yaml"
EXAMPLES = ROOT / "examples" / "shapes"
FIRST_PORT = 7860
MAX_UPLOADS = 100  # of the largest size that the folder may hold
# Scripts, styles and pictures of this server only; Gradio's page has inline ones, and names hosts
# that are not asked then.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}
_SLACK = 100_000  # bytes of a request besides the file or the texts in it
_DRAINED = 10  # times the allowed size: so much of a refused request is read, to tell why
_ABANDONED = 3600.0  # seconds after which a file that is still being uploaded is given up


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the process with code 2 and one line."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--config-file", default=str(ROOT / CONFIG), metavar="YAML", help=f"default: {CONFIG}")
    add("--weights", metavar="FILE", help='default: MODEL.WEIGHTS of the config; "": untrained')
    add("--device", help="cpu, cuda; default: the config's")
    finds = "finds masks: sam:PATH, transformers:PATH, ...; default: one whose weights are at hand"
    add("--segmenter", metavar="SPEC", help=finds)
    add("--captioner", metavar="URL", help="chat endpoint (key: GELLA_API_KEY) or local model")
    add("--captioner-model", metavar="NAME", help="the endpoint's model")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    add("--port", type=int, help=f"default: the first free one from {FIRST_PORT}")
    shapes = "with captions.jsonl; default: drawn shapes for the released weights, else none"
    add("--examples", metavar="DIR", help=shapes)
    add = parser.add_argument_group("bounds").add_argument
    add("--max-upload-mb", type=float, default=20, metavar="MB", help="of a file; default 20")
    add("--max-pixels", type=int, default=16_000_000, metavar="N", help="default 16000000")
    add("--max-caption", type=int, default=2000, metavar="N", help="characters; default 2000")
    add("--queue", type=int, default=20, metavar="N", help="waiting questions; default 20")
    add("--sessions", type=int, default=16, metavar="N", help="encoded pictures; default 16")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    args = parser.parse_args(argv)
    for name in ("max_upload_mb", "max_pixels", "max_caption", "queue", "sessions"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; give more than 0")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port is {args.port}; ports are 1 to 65535")
    if args.captioner_model and not args.captioner:
        parser.error("--captioner-model needs --captioner, the endpoint's address")
    return args


def read_examples(folder: Path) -> list[Entry]:
    """The examples of ``captions.jsonl`` in a folder, with absolute paths; none without that file.

    Raises ValueError for a line of another form, FileNotFoundError for a file that is not there.
    """
    listed = folder.resolve() / "captions.jsonl"
    entries = read_captions(listed) if listed.is_file() else []
    for entry in entries:
        if not entry.image or not entry.masks:
            raise ValueError(f'{entry.where}: expected {{"image", "masks", "caption"}}')
        for path in (listed.parent / entry.image, entry.masks):
            if not path.is_file():
                raise FileNotFoundError(f"example {path} does not exist; correct captions.jsonl")
    return [entry._replace(image=str(listed.parent / str(entry.image))) for entry in entries]


@contextmanager
def own_folder() -> Iterator[Path]:
    """Gradio's temporary folder, of this server alone; it goes when the server ends.

    Must be entered before gradio is imported, which reads its settings from the environment then.
    They also switch off what asks other hosts.
    """
    with tempfile.TemporaryDirectory(prefix="gella_app_", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ.update(
            GRADIO_TEMP_DIR=str(folder),
            GRADIO_ANALYTICS_ENABLED="False",
            GRADIO_SHARE="False",
            GRADIO_SSR_MODE="False",
            HF_HUB_DISABLE_TELEMETRY="1",
        )
        yield folder


def is_full(folder: Path, max_bytes: float) -> bool:
    """Whether a folder holds more; files that visitors gave up uploading are deleted first.

    Gradio leaves those behind, directly in the folder; the others are its `delete_cache`'s.
    """
    total = 0
    # os.walk passes over a folder that a leaving visitor's files vanish with, rglob fails on it.
    for path in (Path(base, name) for base, _, names in os.walk(folder) for name in names):
        with suppress(FileNotFoundError):
            status = path.lstat()
            old = time.time() - status.st_mtime > _ABANDONED
            if old and path.parent == folder:
                path.unlink()
            else:
                total += status.st_size
    return total > max_bytes


class Guard:
    """ASGI middleware before Gradio: what it refuses is never parsed.

    Gradio bounds each uploaded file, but neither a whole request nor all uploads together, and it
    fetches addresses for its visitors.

    Args:
        app: the application behind it.
        max_upload: bytes of a request that uploads files.
        max_body: bytes of any other request.
        full: says that there is no room for another upload.
    """

    def __init__(self, app: Any, max_upload: int, max_body: int, full: Callable[[], bool]) -> None:
        self._app, self._full = app, full
        self._max_upload, self._max_body = max_upload, max_body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        from starlette.responses import JSONResponse

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, refused = unquote(scope["path"]).lower(), None
        upload = path.rstrip("/").endswith("/upload")
        left = limit = self._max_upload if upload else self._max_body
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if "/proxy=" in path or "file=http" in path or "file=//" in path:
            refused = 403, "This server fetches nothing from other addresses."
        elif not length.isdigit() or int(length) > limit:
            await _drain(receive, _DRAINED * limit)
            refused = 413, f"The request is too large; at most {limit:,} bytes go."
        elif upload and self._full():
            refused = 503, "There is no room for uploads now; try again in a while."
        if refused:
            await JSONResponse({"detail": refused[1]}, refused[0])(scope, receive, send)
            return

        async def counted() -> Any:
            """A body that is longer than allowed ends as if the client had gone."""
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = [pair for pair in message.get("headers", []) if pair[0] not in _HEADERS]
                message = {**message, "headers": [*given, *_HEADERS.items()]}
            await send(message)

        await self._app(scope, counted, with_headers)


async def _drain(receive: Any, limit: int) -> None:
    """Read a body and drop it: a browser looks at the answer only when it has sent all."""
    while limit > 0:
        message = await receive()
        limit -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


def check_address(host: str, port: int | None) -> None:
    """Raise OSError for a port in use or a host of another machine, before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port or 0))
    except OSError as error:
        address = f"{host}, port {port}" if port else host
        raise OSError(
            f"the page cannot answer at {address} ({error.strerror or error}); choose another "
            "address by --host and --port"
        ) from None


def make_desk(args: argparse.Namespace, folder: Path) -> Any:
    """Load the model, the segmenter and the captioner; return the `Desk` over them.

    Raises FileNotFoundError, ValueError: what they raise for wrong names and files.
    """
    from gella.captions import open_captioner
    from gella.captions.endpoint import EndpointSettings
    from gella.commands.app_page import Desk, Limits
    from gella.predictor import GellaPredictor
    from gella.segmenters.from_transformers import at_hand
    from gella.segmenters.segmenter import load_segmenter

    limits = Limits(int(args.max_upload_mb * 1e6), args.max_pixels, args.max_caption)
    predictor = GellaPredictor.from_config(
        args.config_file, args.weights, args.device, opts=args.opts
    )
    finder: Any = load_segmenter(args.segmenter, args.device) if args.segmenter else None
    if args.segmenter is None and (spec := next(iter(at_hand()), "")):
        print(f'pictures without masks: {spec} finds them (--segmenter "" leaves it out)')
        loaded = functools.cache(lambda: load_segmenter(spec, args.device))  # if it is needed
        finder = SimpleNamespace(segment=lambda image: loaded().segment(image))
    captioner = None
    if args.captioner:
        # Somebody waits at the page: better told soon than served late.
        patience = EndpointSettings(timeout=60.0, retries=1, max_wait=10.0, rate_limit_retries=2)
        captioner = open_captioner(
            args.captioner, args.captioner_model, device=args.device or "cpu", settings=patience
        )
    return Desk(predictor, limits, folder / "results", finder, captioner)


def open_page(desk: Any, args: argparse.Namespace, folder: Path) -> tuple[Any, str]:
    """Serve a `Desk` behind a `Guard`; return what is to be closed, and the address."""
    from starlette.middleware import Middleware

    from gella.commands.app_page import launch

    guard = Middleware(
        Guard,
        max_upload=2 * desk.limits.max_upload + _SLACK,  # a picture's masks may be two files
        max_body=_SLACK + 12 * desk.limits.max_caption,  # a character may be \uXXXX twice
        full=functools.partial(is_full, folder, MAX_UPLOADS * desk.limits.max_upload),
    )
    fitting = EXAMPLES if args.config_file == str(ROOT / CONFIG) else ""
    shown = args.examples or fitting
    return launch(desk, args, read_examples(Path(shown)) if shown else [], guard)


def run(args: argparse.Namespace, stop: threading.Event) -> None:
    """Build the model, open the page and serve until ``stop`` says so."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError('the web page needs gradio; install it: pip install -e ".[app]"')
    from gella.captions.endpoint import is_loopback

    check_address(args.host, args.port)
    with own_folder() as folder:
        print("loading the model ...", flush=True)
        desk = make_desk(args, folder)
        if not desk.predictor.cfg.MODEL.WEIGHTS:
            print("no weights: the model is untrained, and the page says so")
        blocks, address = open_page(desk, args, folder)
        try:
            if not is_loopback(args.host):
                print(
                    f"warning: {args.host} lets others reach this page, and it asks for no password"
                )
            print(f"the page: {address}\nCtrl-C stops it; next: open it, click an example, Ground")
            sys.stdout.flush()
            stop.wait()
        finally:
            blocks.close(verbose=False)
    print("stopped; its temporary files are gone")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code. ``GELLA_TRACEBACK=1`` shows where an error arose."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse_args(argv)
    stop = threading.Event()
    with StopRequest(first=lambda number: stop.set()):
        errors = (ValueError, OSError, ImportError)
        return exit_status(lambda: run(args, stop), errors=errors, interrupted="stopped")
