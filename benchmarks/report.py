"""The figures of a run, and the tables made from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Self

# Work of others on the gateway's core above this share makes a figure doubtful.
FOREIGN_LIMIT = 0.05
MEMORY_AFTER = (10_000, 100_000)


@dataclass(frozen=True, slots=True)
class Cell:
    """One target under one workload in one round; latencies as `LoadResult` has them."""

    target: str
    workload: str
    round: int
    cpu_microseconds: float  # of the target's process tree, for each request
    beside_microseconds: float  # of the processes beside it
    per_second: float
    p50_microseconds: int
    p99_microseconds: int
    mean_microseconds: float
    requests: int
    failed: int
    unfinished: int
    core_busy: float  # share of its core that the target used
    foreign: float  # share of that core that others used
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What a target's process tree holds after so many requests."""

    target: str
    requests: int
    resident_bytes: int
    failed: int


@dataclass(frozen=True, slots=True)
class Figures:
    """All that a run measured, and why it left out what it left out."""

    cells: Sequence[Cell]
    memory: Sequence[Memory] = ()
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """The figures of a run from what `--json` wrote."""
        return cls(
            cells=[Cell(**cell) for cell in record["cells"]],
            memory=[Memory(**one) for one in record["memory"]],
            missing=record["missing"],
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """The rounds of one target under one workload, as medians; milliseconds where not CPU."""

    cpu: float
    cpu_low: float
    cpu_high: float
    beside: float
    per_second: float
    p50: float
    p99: float
    mean: float
    core_busy: float
    resident_mb: float
    failed: int
    unfinished: int
    doubtful: bool

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> "Summary":
        cpu = [cell.cpu_microseconds for cell in cells]
        foreign = median(cell.foreign for cell in cells)
        return cls(
            cpu=median(cpu),
            cpu_low=min(cpu),
            cpu_high=max(cpu),
            beside=median(cell.beside_microseconds for cell in cells),
            per_second=median(cell.per_second for cell in cells),
            p50=median(cell.p50_microseconds for cell in cells) / 1000,
            p99=median(cell.p99_microseconds for cell in cells) / 1000,
            mean=median(cell.mean_microseconds for cell in cells) / 1000,
            core_busy=median(cell.core_busy for cell in cells),
            resident_mb=max(cell.resident_bytes for cell in cells) / 1e6,
            failed=sum(cell.failed for cell in cells),
            unfinished=sum(cell.unfinished for cell in cells),
            # The direct cell shares its core with the client by design.
            doubtful=cells[0].target != "direct" and foreign > FOREIGN_LIMIT,
        )


# By workload and target.
Summaries = dict[tuple[str, str], Summary]


def summarize(cells: Sequence[Cell]) -> Summaries:
    keys = dict.fromkeys((cell.workload, cell.target) for cell in cells)
    return {
        key: Summary.of([cell for cell in cells if (cell.workload, cell.target) == key])
        for key in keys
    }


def table(figures: Figures) -> str:
    """The whole result as text."""
    summaries = summarize(figures.cells)
    lines: list[str] = []
    for workload in dict.fromkeys(workload for workload, _ in summaries):
        lines += [_head(workload)]
        direct = summaries.get((workload, "direct"))
        for (name, target), summary in summaries.items():
            if name == workload:
                lines.append(_row(target, summary, direct))
        lines.append("")
    if any(summary.doubtful for summary in summaries.values()):
        lines += ["* other processes used over 5 % of the gateway's core: run it again", ""]
    lines += _memory(figures.memory)
    lines += _ratios(summaries)
    lines += [f"{name}: not available: {reason}" for name, reason in figures.missing.items()]
    return "\n".join(lines)


def _head(workload: str) -> str:
    what = "to the first token" if workload.startswith("open") else "to the last byte"
    return (
        f"{workload:<20}{'CPU µs':>9}{'(low–high)':>16}{'beside':>8}{'per second':>12}"
        f"{'mean ms':>10}{'added':>9}{'p50':>9}{'p99':>9}{'core':>6}{'RSS MB':>8}{'lost':>6}"
        f"{'late':>6}  {what}"
    )


def _row(target: str, summary: Summary, direct: Summary | None) -> str:
    spread = f"({summary.cpu_low:.0f}–{summary.cpu_high:.0f})"
    mark = "*" if summary.doubtful else " "
    added = "" if direct is None or target == "direct" else f"{summary.mean - direct.mean:.3f}"
    return (
        f"  {target:<18}{summary.cpu:>8.1f}{mark}{spread:>16}{summary.beside:>8.1f}"
        f"{summary.per_second:>12,.0f}{summary.mean:>10.3f}{added:>9}{summary.p50:>9.3f}"
        f"{summary.p99:>9.3f}{summary.core_busy:>6.0%}{summary.resident_mb:>8.0f}"
        f"{summary.failed:>6}{summary.unfinished:>6}"
    )


def _memory(memory: Sequence[Memory]) -> list[str]:
    if not memory:
        return []
    counts = list(dict.fromkeys(one.requests for one in memory))
    lines = [f"{'RSS MB, after':<20}" + "".join(f"{count:>12,}" for count in counts) + "   grown"]
    for target in dict.fromkeys(one.target for one in memory):
        sizes = [one.resident_bytes / 1e6 for one in memory if one.target == target]
        grown = f"{sizes[-1] / sizes[0] - 1:>8.1%}"
        lines.append(f"  {target:<18}" + "".join(f"{size:>12.1f}" for size in sizes) + grown)
    return [*lines, ""]


def _ratios(summaries: Summaries) -> list[str]:
    """CPU of Sluice over CPU of the peer, of medians and of lows: below 1, Sluice is the cheaper."""
    ours = {workload: one for (workload, name), one in summaries.items() if name == "sluice"}
    targets = dict.fromkeys(name for _, name in summaries)
    peers = [name for name in targets if not name.startswith(("sluice", "direct"))]
    if not peers or not ours:
        return []
    lines = [f"{'CPU, sluice ÷':<16}" + "".join(f"{workload:>15}" for workload in ours)]
    for peer in peers:
        line = f"  {peer:<14}"
        for workload, our in ours.items():
            their = summaries.get((workload, peer))
            # Of one that answered nothing there is nothing to say.
            said = (
                f"{our.cpu / their.cpu:.2f} ({our.cpu_low / their.cpu_low:.2f})"
                if their is not None and their.cpu_low > 0 and their.per_second > 0
                else "–"
            )
            line += f"{said:>15}"
        lines.append(line)
    return [
        *lines,
        "  of the medians (of the lows, which other work on the machine disturbs least)",
        "",
    ]
