"""What the demo found out, and the table that it ends with."""

from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table

from rollout.evidence import PairCounts, Score
from rollout.policy import Policy
from rollout.statistics import evidence_above, evidence_below


@dataclass(slots=True)
class Candidate:
    """One version's way through the demo. `pairs` is what its trial had come to when last seen."""

    version: str
    what: str
    score: Score | None = None
    pairs: PairCounts | None = None
    labels: int = 0
    end: str = ""


@dataclass(slots=True)
class Results:
    route: str
    policy: Policy
    heldout: int
    candidates: list[Candidate] = field(default_factory=list)
    stages: list[tuple[str, float]] = field(default_factory=list)
    requests: int = 0
    failed: int = 0

    def render(self) -> Group:
        """The versions, how each trial ended, and the seconds of each stage."""
        asked = f"{self.requests:,} requests of the application, {self.failed} of them failed"
        return Group(self._versions(), *self._ends(), "", self._stages(), asked)

    def _versions(self) -> Table:
        table = Table(title=f"{self.route}, version by version", title_justify="left")
        table.add_column("")
        table.add_column("what it is", overflow="fold")
        table.add_column(f"right on {self.heldout} held-out", justify="right")
        for name in ("pairs", "won", "lost", "E not worse", "E worse", "labels"):
            table.add_column(name, justify="right")
        table.add_column("", overflow="fold")
        for candidate in self.candidates:
            table.add_row(
                _number_of(candidate.version),
                candidate.what,
                _accuracy(candidate.score),
                *self._evidence(candidate),
                candidate.end.partition(":")[0],
            )
        return table

    def _ends(self) -> list[str]:
        return [
            f"{_number_of(candidate.version)} {candidate.end}"
            for candidate in self.candidates
            if ":" in candidate.end
        ]

    def _evidence(self, candidate: Candidate) -> list[str]:
        pairs = candidate.pairs
        if pairs is None:
            return ["–"] * 6
        wins, losses = pairs.wins, pairs.losses
        return [
            str(pairs.total),
            str(wins),
            str(losses),
            _number(evidence_above(wins, losses, 0.5 - self.policy.margin)),
            _number(evidence_below(wins, losses, 0.5)),
            str(candidate.labels),
        ]

    def _stages(self) -> Table:
        table = Table(title="How long it took", title_justify="left")
        table.add_column("stage")
        table.add_column("seconds", justify="right")
        for stage, seconds in self.stages:
            table.add_row(stage, f"{seconds:.0f}")
        table.add_section()
        table.add_row("all of it", f"{sum(seconds for _, seconds in self.stages):.0f}")
        return table


def _accuracy(score: Score | None) -> str:
    if score is None:
        return "–"
    return f"{score.accuracy:.1%} ({score.low:.0%} to {score.high:.0%})"


def _number_of(version: str) -> str:
    return "@" + version.rpartition("@")[2]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1e6 else f"{value:.1e}"
