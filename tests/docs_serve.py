"""Start a server, ask it for its page as a browser would, stop it with Ctrl-C.

    python docs_serve.py SCRIPT [ARGUMENTS]

The script has to print its address. The exit status is the server's, 1 without a page.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import urllib.request

SECONDS = 400.0  # until the address is there, on a busy machine


def main(arguments: list[str]) -> int:
    """Run the script until its page has been there."""
    server = subprocess.Popen(["python", *arguments], stdout=subprocess.PIPE, text=True)
    watch = threading.Timer(SECONDS, server.kill)
    watch.start()
    try:
        return _ask_and_stop(server)
    finally:
        watch.cancel()


def _ask_and_stop(server: subprocess.Popen[str]) -> int:
    """Wait for the address, get the page, stop; the exit status."""
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        found = re.search(r"http://127\.0\.0\.1:\d+\S*", line)
        if found:
            with urllib.request.urlopen(found[0], timeout=30) as answer:
                print(f"the page has {len(answer.read())} bytes, status {answer.status}")
            server.send_signal(signal.SIGINT)
            print(server.stdout.read(), end="")
            return server.wait()
    print("no address was printed", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
