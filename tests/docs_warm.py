"""A Python that is warm: one process imports the libraries once and is forked for each command.

    python docs_warm.py serve SOCKET          listens, until it is killed
    python docs_warm.py run SOCKET [-c CODE | -m MODULE | SCRIPT] [ARGUMENTS]
                                              is `python ...` in a fork of the server

The second has the current folder, the environment, the streams and the exit status of an ordinary
Python; only the seconds in which torch and transformers are imported are saved.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import sys
from typing import Any

IMPORTS = ("torch", "transformers", "timm", "detectron2.modeling", "gella", "PIL.Image")


def serve(address: str) -> None:
    """Import the libraries, then fork a supervisor for each connection."""
    for name in IMPORTS:
        __import__(name)
    gc.freeze()  # what is there now stays shared: no fork writes to it by looking for garbage
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(8)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are nobody's to wait for
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            job = _supervised(connection)
            if job is not None:
                _become(job)
                return
        connection.close()


def _supervised(connection: socket.socket) -> dict[str, Any] | None:
    """Fork once more: the child gets its job, the supervisor waits and tells the exit status."""
    data, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        connection.sendall(f"{child}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(f"{code}\n".encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return json.loads(data)


def _become(job: dict[str, Any]) -> None:
    """Run the job as the interpreter would; what it raises ends the process."""
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    # PYTHONPATH of the server is in sys.path already; its first entry is this file's folder.
    first, *arguments = job["arguments"]
    if first in ("-c", "-m"):
        target, *arguments = arguments
        sys.path[0] = job["folder"] if first == "-m" else ""
        sys.argv = [first, *arguments]
        if first == "-m":
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            exec(compile(target, "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = [first, *arguments]
    sys.path[0] = os.path.dirname(os.path.realpath(first))
    runpy.run_path(first, run_name="__main__")


def run(address: str, arguments: list[str]) -> int:
    """Hand a command line to the server; returns its exit status."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    job = {"folder": os.getcwd(), "environment": dict(os.environ), "arguments": arguments}
    socket.send_fds(connection, [json.dumps(job).encode()], [0, 1, 2])
    answers = connection.makefile()
    child = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(child, received))
    code = int(answers.readline() or 1)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(run(sys.argv[2], sys.argv[3:]))
