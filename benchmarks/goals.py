"""What Sluice is to reach beside its peers, and whether a run shows it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.report import MEMORY_AFTER, Figures, Summaries, Summary, summarize
from benchmarks.targets import NO_CAPTURE, SHADOW

# The targets that a goal names.
NAMED = ("direct", "nginx", "vllm-router", "sluice")
MAXIMUM_MB = 150.0


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of Sluice over a peer's (or alone), and its limit: at most, or at least."""

    text: str
    reached: float | None  # None: the run has not measured it
    limit: float
    at_least: bool = False
    unit: str = "×"
    shown: str = ""  # the figures that it was computed from
    doubtful: bool = False

    @property
    def state(self) -> Literal["met", "not met", "not measured"]:
        if self.reached is None:
            return "not measured"
        met = self.reached >= self.limit if self.at_least else self.reached <= self.limit
        return "met" if met else "not met"


def judge_goals(figures: Figures) -> list[Goal]:
    """Every goal; whatever the run left out is not measured."""
    summaries = summarize(figures.cells)
    return [
        *_cpu(summaries),
        _ratio(
            summaries,
            "answers a second at 32 connections, ÷ vllm-router",
            "answer@32",
            "vllm-router",
            lambda one: one.per_second,
            1.25,
            at_least=True,
        ),
        _ratio(
            summaries, "p50 at one connection, ÷ vllm-router", "answer@1", "vllm-router", _p50, 1.0
        ),
        _ratio(
            summaries, "p99 at 32 connections, ÷ vllm-router", "answer@32", "vllm-router", _p99, 1.0
        ),
        *_open(summaries),
        *_memory(figures),
        *_capture(summaries),
    ]


def goals_text(goals: list[Goal]) -> str:
    lines = ["goal" + " " * 58 + "reached     limit"]
    for goal in goals:
        reached = "–" if goal.reached is None else f"{goal.reached:.2f} {goal.unit}"
        limit = f"{'≥' if goal.at_least else '≤'} {goal.limit:g}"
        mark = "*" if goal.doubtful else " "
        line = f"  {goal.text:<56}{reached:>11}{mark}{limit:>8}  {goal.state:<12} {goal.shown}"
        lines.append(line.rstrip())
    if any(goal.doubtful for goal in goals):
        lines.append("  * from figures that other work on the machine disturbed")
    return "\n".join([*lines, ""])


def _cpu(summaries: Summaries) -> Iterator[Goal]:
    for workload, peer, limit in (
        ("answer@32", "vllm-router", 0.8),
        ("answer@1", "vllm-router", 1.1),
        ("answer@32", "nginx", 4.0),
        ("answer@1", "nginx", 4.0),
        ("stream@32", "vllm-router", 0.75),
        ("stream@1", "vllm-router", 0.75),
        ("stream@32", "nginx", 1.5),
        ("stream@1", "nginx", 1.5),
    ):
        text = f"CPU of {workload}, ÷ {peer}"
        yield _ratio(summaries, text, workload, peer, lambda one: one.cpu, limit)


def _open(summaries: Summaries) -> Iterator[Goal]:
    direct, nginx, ours = (
        summaries.get(("open@512", name)) for name in ("direct", "nginx", "sluice")
    )
    lost = None if ours is None else float(ours.failed + ours.unfinished)
    yield Goal("512 open streams: lost", lost, 0.0, unit="")
    text = "512 open streams: added p99 to the first token, ÷ nginx's"
    if direct is None or nginx is None or ours is None:
        yield Goal(text, None, 1.5)
        return
    # Stricter than the ratio of the p99 themselves, in which the engine's own part is on both sides.
    added, its = ours.p99 - direct.p99, nginx.p99 - direct.p99
    shown = f"p99 {ours.p99:.2f} ms, nginx {nginx.p99:.2f}, direct {direct.p99:.2f}"
    if its <= 0:
        yield Goal(text, None, 1.5, shown=shown + ": nginx added nothing")
        return
    yield Goal(text, added / its, 1.5, shown=shown, doubtful=ours.doubtful or nginx.doubtful)


def _memory(figures: Figures) -> Iterator[Goal]:
    sizes = {
        one.requests: one.resident_bytes / 1e6 for one in figures.memory if one.target == "sluice"
    }
    early, late = (sizes.get(requests) for requests in MEMORY_AFTER)
    grown = late / early if early and late else None
    shown = f"{early:.1f} MB, {late:.1f} MB" if early and late else ""
    yield Goal("memory after 100,000 requests, ÷ after 10,000", grown, 1.1, shown=shown)
    yield Goal("memory of a worker after 100,000 requests", late, MAXIMUM_MB, unit="MB")


def _capture(summaries: Summaries) -> Iterator[Goal]:
    for workload in ("answer@32", "stream@32"):
        text = f"CPU of {workload}, capture and shadow on, ÷ off"
        on = summaries.get((workload, f"sluice, {SHADOW}"))
        off = summaries.get((workload, f"sluice, {NO_CAPTURE}"))
        yield _over(text, on, off, lambda one: one.cpu, 1.1)


def _ratio(
    summaries: Summaries,
    text: str,
    workload: str,
    peer: str,
    figure: Callable[[Summary], float],
    limit: float,
    *,
    at_least: bool = False,
) -> Goal:
    ours, theirs = summaries.get((workload, "sluice")), summaries.get((workload, peer))
    return _over(text, ours, theirs, figure, limit, at_least=at_least)


def _over(
    text: str,
    ours: Summary | None,
    theirs: Summary | None,
    figure: Callable[[Summary], float],
    limit: float,
    *,
    at_least: bool = False,
) -> Goal:
    if ours is None or theirs is None or not figure(theirs):
        return Goal(text, None, limit, at_least)
    return Goal(
        text,
        figure(ours) / figure(theirs),
        limit,
        at_least,
        shown=f"{figure(ours):,.4g} and {figure(theirs):,.4g}",
        doubtful=ours.doubtful or theirs.doubtful,
    )


def _p50(one: Summary) -> float:
    return one.p50


def _p99(one: Summary) -> float:
    return one.p99
