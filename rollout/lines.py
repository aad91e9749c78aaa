"""The line of a TOML file on which a key stands, so that an error can name it."""

import re
from collections.abc import Sequence

_TABLE = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(
    r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*="""
)
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")


def line_of(text: str, path: Sequence[str | int]) -> int | None:
    """The number of the line, from 1, that says most of `path`; None where none says any of it.

    A number in the path is the place of a table in an array of tables. What stands within a value
    that goes over several lines is said to be where the value begins.
    """
    found: tuple[int, int] | None = None
    table: tuple[str | int, ...] = ()
    counts: dict[tuple[str | int, ...], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            table = _table(counts, _parts(header[2]), many=header[1] == "[[")
            here = table
        elif key := _KEY.match(line):
            here = (*table, *_parts(key[1]))
        else:
            continue
        if here == tuple(path[: len(here)]) and (found is None or len(here) > found[0]):
            found = len(here), number
    return None if found is None else found[1]


def _table(
    counts: dict[tuple[str | int, ...], int], names: Sequence[str], *, many: bool
) -> tuple[str | int, ...]:
    """The path of a table, with the places of the arrays that it is in."""
    path: tuple[str | int, ...] = ()
    for depth, name in enumerate(names, start=1):
        path = (*path, name)
        if many and depth == len(names):
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = (*path, counts[path])
    return path


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in _PART.findall(dotted)]
