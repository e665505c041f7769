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
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gella.commands.app_server import SLACK, Guard, Workspace
from gella.commands.app_sessions import Janitor, Sessions
from gella.commands.app_uploads import Limits

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "weights/gella_tiny_shapes/config.yaml"
EXAMPLES = ROOT / "examples" / "shapes"
FIRST_PORT = 7860
MAX_AGE = 6 * 3600.0  # seconds that an upload stays
MAX_UPLOADS = 100  # of the largest size that the folder may hold


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows an example\n")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the process with code 2 and one line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--config-file", default=str(ROOT / CONFIG), metavar="YAML", help=f"default: {CONFIG}")
    add("--weights", metavar="FILE", help='default: MODEL.WEIGHTS of the config; "": untrained')
    add("--device", help="cpu, cuda; default: the config's")
    add("--segmenter", metavar="SPEC", help="finds masks: sam:PATH, transformers:PATH, ...")
    add("--captioner", metavar="URL", help="chat endpoint (key: GELLA_API_KEY) or local model")
    add("--captioner-model", metavar="NAME", help="the endpoint's model")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    add("--port", type=int, help=f"default: the first free one from {FIRST_PORT}")
    add("--examples", default=str(EXAMPLES), metavar="DIR", help="with captions.jsonl")
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


def make_desk(args: argparse.Namespace) -> Any:
    """Load the model, the segmenter and the captioner; return the `Desk` over them.

    Raises FileNotFoundError, ValueError: what they raise for wrong names and files.
    """
    from gella.commands.app_tasks import Desk
    from gella.predictor import GellaPredictor

    limits = Limits(int(args.max_upload_mb * 1e6), args.max_pixels, args.max_caption)
    predictor = GellaPredictor.from_config(
        args.config_file, args.weights, args.device, opts=args.opts
    )
    finder = None
    if args.segmenter:
        from gella.segmenters.segmenter import load_segmenter

        finder = load_segmenter(args.segmenter, args.device)
    sessions = Sessions(args.sessions)
    return Desk(predictor, limits, sessions, finder=finder, captioner=make_captioner(args))


def make_captioner(args: argparse.Namespace) -> Any:
    """The captioner that the arguments name; None if they name none."""
    if not args.captioner:
        return None
    from gella.captions.ask import open_captioner
    from gella.captions.endpoint import EndpointSettings

    # Somebody waits at the page: better told soon than served late.
    patience = EndpointSettings(timeout=60.0, retries=1, max_wait=10.0, rate_limit_retries=2)
    device = args.device or "cpu"
    return open_captioner(args.captioner, args.captioner_model, device=device, settings=patience)


def launch(desk: Any, args: argparse.Namespace, workspace: Workspace) -> tuple[Any, str]:
    """Open the page; return Gradio's blocks, to be closed, and the address.

    Raises OSError: the port is in use, or the host is none of this machine's.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    from gella.commands.app_examples import copied, read_examples
    from gella.commands.app_page import HEAD, build

    untrained = not desk.predictor.cfg.MODEL.WEIGHTS
    examples = copied(read_examples(Path(args.examples)), workspace.folder)
    blocks = build(desk, workspace.downloads(), examples, untrained)
    workspace.keep_all()
    blocks.queue(max_size=args.queue, default_concurrency_limit=1)
    limit = desk.limits.max_upload
    guard = Middleware(
        Guard,
        max_upload=2 * limit + SLACK,  # a picture's masks may be two files
        max_body=SLACK + 12 * desk.limits.max_caption,  # a character may be written as \uXXXX twice
        full=workspace.is_full,
    )
    plain = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, address, _ = blocks.launch(
            server_name=args.host,
            server_port=args.port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            allowed_paths=[],
            max_file_size=limit,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            footer_links=[],
            theme=plain,
            head=HEAD,
            app_kwargs={"middleware": [guard]},
        )
    except OSError as error:
        raise OSError(f"{error}; choose another address by --host and --port") from error
    return blocks, address


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_address(host: str, port: int | None) -> None:
    """Raise OSError for a port in use or a host of another machine, before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port or 0))
    except OSError as error:
        where = f"{host}, port {port}" if port else host
        raise OSError(
            f"the page cannot answer at {where} ({error.strerror or error}); choose another "
            "address by --host and --port"
        ) from None


def run(args: argparse.Namespace, stop: threading.Event | None = None) -> None:
    """Build the model, open the page and serve until a signal, or ``stop``, says so."""
    stop = stop or threading.Event()
    if importlib.util.find_spec("gradio") is None:
        raise ImportError('the web page needs gradio; install it: pip install -e ".[app]"')
    check_address(args.host, args.port)
    uploads = int(MAX_UPLOADS * args.max_upload_mb * 1e6)
    with Workspace(uploads, MAX_AGE) as workspace:
        print("loading the model ...", flush=True)
        desk = make_desk(args)
        if not desk.predictor.cfg.MODEL.WEIGHTS:
            print("no weights: the model is untrained, and the page says so")
        blocks, address = launch(desk, args, workspace)
        janitor = Janitor([desk.sessions.sweep, workspace.clean])
        try:
            if not is_loopback(args.host):
                print(
                    f"warning: {args.host} lets others reach this page, and it asks for no password"
                )
            print(f"the page: {address}\nCtrl-C stops it; next: open it, click an example, Ground")
            sys.stdout.flush()
            stop.wait()
        finally:
            janitor.stop()
            blocks.close(verbose=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code. ``GELLA_TRACEBACK=1`` shows where an error arose."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(args, stop)
    except (ValueError, OSError, ImportError) as error:
        if os.getenv("GELLA_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("stopped; its temporary files are gone")
    return 0
