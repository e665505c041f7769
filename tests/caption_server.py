"""Models for captions: a chat endpoint as bad as a test asks it to be, and a tiny LLaVA."""

from __future__ import annotations

import io
import json
import ssl
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KEY = "sk-test-8c41f0d9a2b74e6f-never-to-be-seen"
COLORS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220)}
COLORS |= {"yellow": (220, 220, 20), "white": (250, 250, 250), "black": (5, 5, 5)}


def write_pictures(folder: Path, count: int) -> dict[int, str]:
    """``count`` plain pictures 000000000001.png, ...; returns the colour of each id."""
    folder.mkdir(parents=True, exist_ok=True)
    truth = {number: list(COLORS)[number % len(COLORS)] for number in range(1, count + 1)}
    for number, color in truth.items():
        Image.new("RGB", (32, 24), COLORS[color]).save(folder / f"{number:012d}.png")
    return truth


def wait_until(condition: Callable[[], bool], seconds: float = 600.0) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def good_answer(request: dict[str, Any]) -> str:
    """Names the colour of the picture that the request holds, so that a mix-up shows."""
    content = request["messages"][0]["content"]
    data = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
    head, _, encoded = data.partition(",")
    assert head == "data:image/jpeg;base64"
    pixels = np.asarray(Image.open(io.BytesIO(b64decode(encoded))), dtype=float).mean((0, 1))
    color = min(COLORS, key=lambda name: np.abs(pixels - COLORS[name]).sum())
    text = f"There is a {color} wall behind two dogs."
    return json.dumps({"description": text, "nouns": [f"{color} wall", "two dogs"]})


@dataclass
class ChatServer:
    """What the tests see of the server.

    Attributes:
        script: behaviours of the next requests, in the order of their arrival; then ``default``.
        requests: (time, headers, JSON body) of all that came.
    """

    url: str = ""
    script: list[Callable[..., None]] = field(default_factory=list)
    default: Callable[..., None] = field(default_factory=lambda: answer())
    requests: list[tuple[float, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)
    at_once: int = 0
    most_at_once: int = 0
    over: Any = field(default_factory=threading.Event)


def send(handler: Any, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
    """A response; header names with _ for -; ``length`` that it claims to have."""
    handler.send_response_only(status)  # without a Date of its own
    headers.setdefault("Content_Length", str(len(body) if length is None else length))
    headers.setdefault("Connection", "close")  # as the server does
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def completion(text: Any, **message: Any) -> bytes:
    """A chat completion of 100 prompt tokens and 10 answer tokens."""
    choice = {"finish_reason": message.pop("finish", "stop")}
    choice["message"] = {"content": text, **message}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def answer(text: str | None = None, pause: float = 0.0, **message: Any) -> Callable[..., None]:
    """Answers after a pause; None: with the good answer."""

    def behave(handler: Any, request: dict[str, Any], server: ChatServer) -> None:
        server.over.wait(pause)
        send(handler, 200, completion(good_answer(request) if text is None else text, **message))

    return behave


def status(code: int, body: bytes = b"{}", **headers: str) -> Callable[..., None]:
    """Answers with a status."""
    return lambda handler, request, server: send(handler, code, body, **headers)


def stall(handler: Any, request: dict[str, Any], server: ChatServer) -> None:
    """Never answers."""
    server.over.wait(600)


def dribble(handler: Any, request: dict[str, Any], server: ChatServer) -> None:
    """Answers one byte at a time, so that no single read takes long."""
    send(handler, 200, b"", 100_000)
    while not server.over.wait(0.02):
        handler.wfile.write(b" ")


def cut(handler: Any, request: dict[str, Any], server: ChatServer) -> None:
    """Closes in the middle of a good answer."""
    body = completion(good_answer(request))
    send(handler, 200, body[: len(body) // 2], len(body))


def cut_chunked(handler: Any, request: dict[str, Any], server: ChatServer) -> None:
    """Closes in the middle of a chunk."""
    handler.send_response_only(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"400\r\n" + completion("x")[:20])


def hang_up(handler: Any, request: dict[str, Any], server: ChatServer) -> None:
    """Closes without a byte."""


@contextmanager
def chat_server(tls: ssl.SSLContext | None = None) -> Iterator[ChatServer]:
    """Run a server on a free port of 127.0.0.1."""
    state = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                headers = {name.title(): value for name, value in self.headers.items()}
                state.requests.append((time.monotonic(), headers, body))
                behave = state.script.pop(0) if state.script else state.default
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            with suppress(OSError):  # the client left
                behave(self, body, state)
            self.close_connection = True
            with state.lock:
                state.at_once -= 1

        def log_message(self, *_: Any) -> None:
            """Silent."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            """Silent: clients leave on purpose here."""

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        # The handshake is left to the connection's own thread: a client may refuse it.
        options = {"server_side": True, "do_handshake_on_connect": False}
        server.socket = tls.wrap_socket(server.socket, **options)
    state.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def save_tiny_llava(folder: Path, tokenizer_dir: Path) -> Path:
    """Write a LLaVA of random weights and its processor, as transformers saves them."""
    import torch
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    ids["pad_token_id"] = tokenizer.pad_token_id
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "num_key_value_heads": 2}
    vision = hf.CLIPVisionConfig(num_hidden_layers=2, image_size=16, patch_size=8, **small)
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**sizes, **ids, **small),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    patches = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(**size), tokenizer, **patches, num_additional_image_tokens=1
    )
    processor.save_pretrained(folder)
    return folder
