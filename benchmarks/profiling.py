"""Where a process spends its time: py-spy's samples, added up by file and function."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.install import install_from_pypi
from benchmarks.place import Place
from benchmarks.processes import StartError

PY_SPY = "py-spy==0.4.3"
PER_SECOND = 500
SHOWN = 20
# py-spy takes a pool's thread that waits for work for a busy one.
_WAITING = "_worker (concurrent/futures/thread.py"
_FRAME = re.compile(r"^(?P<function>.*) \((?P<file>[^():]+)(:\d+)?\)$")


@contextmanager
def recording(pid: int, place: Place, seconds: int) -> Iterator[Path]:
    """Sample `pid` and its children on the other core for `seconds`; the path holds the stacks
    after the block."""
    binary = install_from_pypi("py-spy", PY_SPY, "py-spy")
    path = place.folder / "stacks.txt"
    command = [
        *("taskset", "-c", str(place.cores.rest), str(binary), "record", "--pid", str(pid)),
        *("--subprocesses", "--rate", str(PER_SECOND), "--duration", str(seconds)),
        *("--format", "raw", "--output", str(path), "--function"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield path
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    if not path.exists():
        raise StartError(f"py-spy recorded nothing: {said.decode(errors='replace')[-500:]}")


def text(stacks: str) -> str:
    """Shares of the samples in which a file's, or function's, own code was running."""
    files: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        leaf = stack.rpartition(";")[2]
        if leaf.startswith(_WAITING) or (frame := _FRAME.match(leaf)) is None:
            continue
        files[frame["file"]] += int(count)
        functions[f"{frame['function']} ({frame['file']})"] += int(count)
    total = sum(files.values())
    lines: list[str] = []
    for title, counter in (("file", files), ("function", functions)):
        lines += ["", f"  share  {title}, its own time"]
        lines += [f"{n / total:>7.1%}  {name}" for name, n in counter.most_common(SHOWN)]
    return "\n".join([*lines, f"  of {total} samples"])
