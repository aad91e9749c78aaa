"""Where a gateway is started for measuring, and what is known of it then."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.load import Endpoint
from benchmarks.processes import Cores, Processes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a target is started: `processes` ends what it starts, `folder` is its own."""

    processes: Processes
    folder: Path
    cores: Cores
    engine_url: str
    engine_pid: int


@dataclass(frozen=True, slots=True)
class Started:
    """A target that answers; `pid` is the root of the process tree that is measured.

    beside: processes that the target keeps busy off the path of a request, on the other core; their
        CPU time is shown apart.
    awake: those of them that run only while this target is measured, and are stopped otherwise.
    variants: the same gateway asked in other ways, by the name of the way.
    """

    endpoint: Endpoint
    pid: int
    beside: tuple[int, ...] = ()
    awake: tuple[int, ...] = ()
    variants: Mapping[str, "Started"] = field(default_factory=dict)
