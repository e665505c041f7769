"""Writing files whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import IO


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that readers, and a kill at any moment, see the old one or the whole new one.

    Args:
        path: local file to create or replace; its folder must exist.
        write: called once with a binary stream; what it writes becomes the file.

    Raises:
        Whatever ``write`` raises; the temporary file is then removed and ``path`` is untouched.
    """
    folder, name = os.path.split(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())  # a rename must not overtake the data on a power failure
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files that only the owner may read
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
