"""The web page over the released model, served in this process, and files to upload to it."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gella.commands import app
from gella.commands.app_server import Workspace

ROOT = Path(__file__).resolve().parents[1]
SCENES = ROOT / "examples" / "shapes"
SCENE = SCENES / "000000500002.png"
MASKS = SCENES / "000000500002_masks.png"
CAPTION = "Here we can see two white stars and the grass."


@dataclass
class Served:
    """A page that answers: its address, and what stands behind it."""

    address: str
    desk: Any
    workspace: Workspace
    encoded: list[Any]  # the image ids of all calls of encode
    captions: Any = None  # the chat endpoint that it asks, if there is one


@contextmanager
def served(*arguments: str) -> Iterator[Served]:
    """Serve the page with command line arguments until the end of the block."""
    args = app.parse_args(list(arguments))
    with Workspace(app.MAX_UPLOADS * 1_000_000, app.MAX_AGE) as workspace:
        desk = app.make_desk(args)
        encoded, encode = [], desk.predictor.encode

        def counted(*inputs: Any, **options: Any) -> Any:
            encoded.append(options.get("image_id"))
            return encode(*inputs, **options)

        desk.predictor.encode = counted
        blocks, address = app.launch(desk, args, workspace)
        try:
            yield Served(address, desk, workspace, encoded)
        finally:
            blocks.close(verbose=False)


def write_huge_png(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def write_zip_bomb(path: Path, megabytes: int) -> Path:
    """An .npz of a few kilobytes that unpacks to many megabytes of `masks`."""
    shape = (megabytes, 1000, 1000)
    text = repr({"descr": "|b1", "fortran_order": False, "shape": shape}).encode()
    text += b" " * (117 - len(text)) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("masks.npy", "w") as member:
            member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
            for _ in range(megabytes):
                member.write(bytes(1_000_000))
    return path
