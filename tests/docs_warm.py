"""The `python` of the documentation's commands: a fork of one process that is warm.

    docs_warm.py serve SOCKET                 imports the libraries once, listens until it is killed
    docs_warm.py run SOCKET [-c CODE | -m MODULE | SCRIPT] [ARGUMENTS]
    docs_warm.py visit SCRIPT [ARGUMENTS]     asks a server for its page and stops it with Ctrl-C

``run`` has the current folder, the environment, the streams and the exit status of an ordinary
Python; only the seconds in which torch and transformers are imported are saved.
"""

import gc
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import urllib.request

IMPORTS = ("torch", "transformers", "timm", "detectron2.modeling", "gella", "PIL.Image")


def serve(address):
    """Import the libraries, then fork a supervisor for each connection, and it a worker."""
    for name in IMPORTS:
        __import__(name)
    gc.freeze()  # what is there now stays shared: no fork writes to it by looking for garbage
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(8)
    print("listening", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are nobody's to wait for
    connection, _ = server.accept()
    while os.fork():
        connection.close()
        connection, _ = server.accept()
    server.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    if worker := os.fork():
        for stream in streams:
            os.close(stream)
        connection.sendall(f"{worker}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        connection.sendall(f"{code}\n".encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    become(**json.loads(data))


def become(folder, environment, arguments):
    """Run a command line as the interpreter would; what it raises ends the process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # PYTHONPATH of the server is in sys.path already; its first entry is this file's folder.
    first, *rest = sys.argv = arguments
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = ["-m", *rest[1:]], folder
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(first))
        runpy.run_path(first, run_name="__main__")


def run(address, arguments):
    """Hand a command line to the server; returns its exit status."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    job = {"folder": os.getcwd(), "environment": dict(os.environ), "arguments": arguments}
    socket.send_fds(connection, [json.dumps(job).encode()], [0, 1, 2])
    answers = connection.makefile()
    worker = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(worker, received))
    code = int(answers.readline() or 1)
    return code if code >= 0 else 128 - code


def visit(arguments):
    """Run a server until it has printed its address and given its page; its exit status."""
    server = subprocess.Popen(["python", *arguments], stdout=subprocess.PIPE, text=True)
    for line in server.stdout:
        print(line, end="", flush=True)
        if address := re.search(r"http://127\.0\.0\.1:\d+\S*", line):
            with urllib.request.urlopen(address[0], timeout=600) as answer:
                assert answer.status == 200 and answer.read()
            server.send_signal(signal.SIGINT)
            print(server.stdout.read(), end="")
            return server.wait()
    return 1  # no address


if __name__ == "__main__":
    mode, *words = sys.argv[1:]
    if mode == "serve":
        serve(words[0])
    else:
        sys.exit(run(words[0], words[1:]) if mode == "run" else visit(words))
