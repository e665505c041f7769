#!/usr/bin/env python
"""Give this environment a Detectron2: the installed one, the original, or the core of this project.

1. Detectron2 is importable already: it is kept.
2. Otherwise, its repository answers within a few seconds: it is installed from there.
3. Otherwise, or if that fails: ``projects/detectron2_core``, the part that this project uses.

``GELLA_DETECTRON2=upstream`` or ``=core`` forces the choice, also over an installed one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
CORE = Path(__file__).resolve().parents[1] / "projects" / "detectron2_core"
ANSWER_SECONDS = 5
# What the project imports first; a half-built original fails here.
PROBE = "import detectron2, detectron2.config, detectron2.engine; print(detectron2.__version__)"


def installed_version() -> str | None:
    """Version of the Detectron2 that a fresh interpreter imports, None if it cannot."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False
    )
    return result.stdout.split()[-1] if result.returncode == 0 and result.stdout else None


def repository_answers() -> bool:
    """Whether git reaches Detectron2's repository within a few seconds."""
    command = ["git", "ls-remote", "--exit-code", REPOSITORY, "HEAD"]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        result = subprocess.run(
            command, capture_output=True, timeout=ANSWER_SECONDS, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or no answer
        return False
    return result.returncode == 0


def pip_install(*arguments: str) -> bool:
    """Run pip's install in this environment; whether it succeeded."""
    command = [sys.executable, "-m", "pip", "install", *arguments]
    return subprocess.run(command, check=False).returncode == 0


def install_upstream() -> bool:
    """Install the original from its repository; whether it can be imported afterwards."""
    print("Installing Detectron2 from its repository; it compiles for some minutes.", flush=True)
    # Its build needs the torch that is installed here, hence no isolation.
    return (
        pip_install("--no-build-isolation", f"git+{REPOSITORY}") and installed_version() is not None
    )


def main() -> int:
    """Choose, install, and print what was chosen and why; the exit status."""
    forced = os.environ.get("GELLA_DETECTRON2", "")
    if forced not in ("", "core", "upstream"):
        print(f"error: GELLA_DETECTRON2 is {forced!r}: use core or upstream", file=sys.stderr)
        return 2
    version = installed_version()
    if version is not None and not forced:
        print(f"Detectron2 {version}: it is installed already.")
        return 0
    reason = "GELLA_DETECTRON2 asks for it"
    if forced != "core":
        if not forced and not repository_answers():
            reason = f"{REPOSITORY} does not answer within {ANSWER_SECONDS} seconds"
        elif install_upstream():
            print(f"Detectron2 {installed_version()}: the original, from {REPOSITORY}.")
            return 0
        elif forced:
            print("error: the original Detectron2 could not be installed", file=sys.stderr)
            return 1
        else:
            reason = "the original could not be installed (see above)"
    # It follows the files of the checkout.
    if not pip_install("--no-deps", "--no-build-isolation", "-e", str(CORE)):
        print(f"error: {CORE} could not be installed (see above)", file=sys.stderr)
        return 1
    print(f"Detectron2 {installed_version()}: projects/detectron2_core, because {reason}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
