"""How every command ends: a user's mistake is one line on stderr and status 2."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

# What a wrong file, name or value raises. Other exceptions are bugs and keep their traceback.
USER_ERRORS = (KeyError, ValueError, OSError, ImportError)


def one_line(error: BaseException) -> str:
    """The message of an exception without line ends; of a KeyError without its quotes."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def exit_status(
    work: Callable[[], int | None],
    *,
    errors: tuple[type[Exception], ...] = USER_ERRORS,
    interrupted: str = "stopped; the same command goes on where this one stopped",
) -> int:
    """Run a command's work and return its exit status: 0 or what it returns, 2, or 130.

    Args:
        work: what the command does.
        errors: exceptions that are a mistake of the user; printed as ``error: ...``, status 2, and
            with ``GELLA_TRACEBACK=1`` after their traceback.
        interrupted: what to say after Ctrl-C, status 130.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except errors as error:
        if os.getenv("GELLA_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return 2
