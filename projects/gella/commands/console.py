"""How every command ends: a user's mistake is one line on stderr and status 2."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gella import __version__

# What a wrong file, name or value raises. Other exceptions are bugs and keep their traceback.
USER_ERRORS = (KeyError, ValueError, OSError, ImportError)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Parser(argparse.ArgumentParser):
    """A parser for which a wrong command line is one line, status 2; its help shows examples."""

    def __init__(self, description: str | None) -> None:
        """``description``: usually the docstring of the command."""
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form)
        self.add_argument("--version", action="version", version=f"gella {__version__}")

    def error(self, message: str) -> NoReturn:
        """End the process."""
        if message.startswith("unrecognized arguments"):
            # A mistyped --key would show its value.
            message = "an argument is not known: look at the spelling of the options"
        self.exit(2, f"error: {message}; --help shows an example\n")


def project(path: str) -> str:
    """A path of this project as seen from here, for a command to go on with.

    The project is the checkout of the script that runs; there is none of an installed command.
    """
    root = Path(sys.argv[0]).absolute().parent.parent
    return os.path.relpath(root / path) if (root / "tools/train_net.py").is_file() else path


def tools() -> str:
    """The folder of this project's scripts as seen from here."""
    return project("tools")


def shown(text: object) -> str:
    """A name or a text in one line for terminals, without control characters and broken letters."""
    return _CONTROL.sub("?", str(text))


def one_line(error: BaseException) -> str:
    """The message of an exception as `shown`, line ends as spaces; of a KeyError without quotes."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return shown(" ".join(str(text).split()))


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
        tell_error(error)
        return 2


def tell_error(error: BaseException) -> None:
    """Print ``error: ...`` on stderr, with ``GELLA_TRACEBACK=1`` after the traceback."""
    if os.getenv("GELLA_TRACEBACK") == "1":
        traceback.print_exception(error)
    text = one_line(error)
    if isinstance(error, KeyError) and " " not in text:  # a key alone says nothing
        text = f"KeyError {text} (GELLA_TRACEBACK=1 shows where)"
    print(f"error: {text}", file=sys.stderr, flush=True)
