"""Where a process spends its time: py-spy's samples, added up by file and function.

What C libraries and the kernel do is charged to the function of Python that called them, whether
that is interpreted or compiled.
"""

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
_WAITING = ("concurrent/futures/thread.py", "_worker")
_ROOT = Path(__file__).parents[1]
_FRAME = re.compile(r"^(?P<function>.*) \((?P<file>[^():]+\.py|<[^>]+>)(:\d+)?\)( \d+)?$")
# What mypyc makes of `_Answering._deliver` in gateway/fast.py is fast____Answering____deliver.
_COMPILED = re.compile(r"^CPyDef_(?P<module>[a-z]+)___(?P<function>\w+) \(.*__mypyc")


@contextmanager
def recording(pid: int, place: Place, seconds: int) -> Iterator[Path]:
    """Sample `pid` and its children on the other core for `seconds`; the path holds the stacks
    after the block."""
    binary = install_from_pypi("py-spy", PY_SPY, "py-spy")
    path = place.folder / "stacks.txt"
    command = [
        *("taskset", "-c", str(place.cores.rest), str(binary), "record", "--pid", str(pid)),
        *("--native", "--subprocesses", "--rate", str(PER_SECOND), "--duration", str(seconds)),
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
        frames = stack.split(";")
        found = next(filter(None, map(_named, reversed(frames))), None)
        if found is not None and found != _WAITING:
            file, function = found
            files[file] += int(count)
            functions[f"{function} ({file})"] += int(count)
    total = sum(files.values())
    lines: list[str] = []
    for title, counter in (("file", files), ("function", functions)):
        lines += ["", f"  share  {title}, its own time"]
        lines += [f"{n / total:>7.1%}  {name}" for name, n in counter.most_common(SHOWN)]
    return "\n".join([*lines, f"  of {total} samples"])


def _named(frame: str) -> tuple[str, str] | None:
    """The file and the function of a frame of Python; None for one of C."""
    if (compiled := _COMPILED.match(frame)) is not None:
        function = compiled["function"].partition("_gen_____mypyc")[0].replace("___", ".", 1)
        name = f"{compiled['module']}.py"
        package = "gateway" if (_ROOT / "gateway" / name).exists() else "rollout"
        return f"{package}/{name}", function
    if (plain := _FRAME.match(frame)) is not None:
        return plain["file"], plain["function"]
    return None
