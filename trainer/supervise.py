"""Runs a command, and ends it with all that it started once nobody holds our standard input.

    python supervise.py MEMORY COMMAND …

MEMORY is how many bytes of its own each process may have, 0 for any number. This must be the leader
of a session of its own. So a foreign trainer outlives neither a job that asks it to stop nor one
that was killed.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

_GRACE_SECONDS = 10.0


def main(argv: Sequence[str]) -> int:
    memory, *command = argv
    if int(memory):
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as exc:
        sys.stderr.write(f"{command[0]} cannot be started: {exc.strerror}\n")
        return 127
    # Only now: a child would inherit it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_input, daemon=True).start()
    status = process.wait()
    return status if status >= 0 else 128 - status


def _end_with_input() -> None:
    # Not through sys.stdin: a thread that reads it keeps the interpreter from ending.
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
