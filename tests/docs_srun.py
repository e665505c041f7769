"""What `srun` does, on this machine: two tasks with SLURM's variables.

python docs_srun.py [--OPTION=VALUE ...] python SCRIPT [ARGUMENTS]
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def main(arguments: list[str]) -> int:
    """Run the command twice at once; the first exit status that is not 0, else 0."""
    while arguments[0].startswith("--"):
        arguments = arguments[1:]
    step = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "localhost"}
    step |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    tasks = [
        subprocess.Popen(
            arguments,
            env={**os.environ, **step, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
        )
        for task in range(2)
    ]
    codes = [task.wait() for task in tasks]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
