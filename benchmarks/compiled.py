"""Which Sluice is measured: the hot path compiled to C, as the images have it, or plain Python."""

import os
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).parents[1]
# Where `make compiled` puts its copy of the packages.
_COMPILED = _ROOT / ".cache" / "compiled"


def is_compiled() -> bool:
    """Whether there is a compiled copy that is no older than what it was made from."""
    stamp = _COMPILED / ".built"
    if os.environ.get("SLUICE_PURE") == "1" or not stamp.exists():
        return False
    built = stamp.stat().st_mtime
    sources = (path for name in ("gateway", "rollout") for path in (_ROOT / name).rglob("*.py"))
    return all(path.stat().st_mtime <= built for path in sources)


def environ() -> Mapping[str, str]:
    """What makes `python -m gateway` run the compiled copy, where there is one."""
    if not is_compiled():
        return {}
    # Without the first one Python would look into the present folder before all others.
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{_COMPILED}{os.pathsep}{_ROOT}"}


def in_words() -> str:
    if is_compiled():
        return "sluice: its hot path compiled to C, as in the images"
    return "sluice: plain Python (`make compiled` compiles its hot path, as the images do)"
