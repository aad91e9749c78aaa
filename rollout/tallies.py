"""What the labels of a route say together: how far people agree, and how often a version wins."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rollout.binomial import wilson_of_share
from rollout.cases import Case, Label, stratum_of, value_of
from rollout.exchanges import Outcome

_OFFERED, _DECIDED, _AGREEMENT = "offered", "decided", "agreement"
_OUTCOMES: Mapping[Outcome, str] = {"win": "wins", "loss": "losses", "tie": "ties"}


@dataclass(frozen=True, slots=True)
class Stratum:
    """Cases of one trial that were taken with the chance `inclusion`; some of them are decided."""

    inclusion: float
    offered: int = 0
    wins: int = 0
    losses: int = 0
    ties: int = 0

    @property
    def decided(self) -> int:
        return self.wins + self.losses + self.ties


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often people prefer the candidate among *all* pairs of a trial, not among the cases.

    `wins`, `losses` and `ties` are shares that sum to 1; `rate` is the wins and half of the ties,
    `low` to `high` its interval at 95 %. `decided` cases stand behind it. `covered` is the share
    of the pairs that are like some decided case; of the rest it says nothing.
    """

    rate: float
    low: float
    high: float
    wins: float
    losses: float
    ties: float
    decided: int
    covered: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Between labelers. `alpha` is None until `cases` with several labels can tell."""

    alpha: float | None = None
    cases: int = 0


def win_rate(strata: Iterable[Stratum]) -> WinRate | None:
    """Weigh each decided case by how many pairs it stands for; None while none is decided.

    This is Hájek's ratio form of the Horvitz-Thompson estimator (Särndal, Swensson & Wretman,
    *Model Assisted Survey Sampling*, 1992, 5.7). A case stands for 1/π pairs, where π is the chance
    to become a case times the share of its stratum that people came to label. The variance is the
    larger of the linearised one and Kish's (the binomial one times the design effect), for few
    labels that are all alike must not look certain; the interval is Wilson's with the sample size
    that this variance amounts to. It holds at one look, so it informs people and is no gate.
    """
    known = [stratum for stratum in strata if stratum.offered > 0 or stratum.decided > 0]
    pairs = sum(_offered(stratum) / stratum.inclusion for stratum in known)
    labelled = [stratum for stratum in known if stratum.decided]
    if not labelled:
        return None
    weights = [_offered(each) / each.inclusion / each.decided for each in labelled]
    total = sum(weight * each.decided for weight, each in zip(weights, labelled, strict=True))
    shares = [
        sum(weight * count for weight, count in zip(weights, counts, strict=True)) / total
        for counts in (
            [each.wins for each in labelled],
            [each.losses for each in labelled],
            [each.ties for each in labelled],
        )
    ]
    rate = min(1.0, shares[0] + shares[2] / 2)
    decided = sum(each.decided for each in labelled)
    low, high = wilson_of_share(rate, _effective_size(rate, weights, labelled, total))
    return WinRate(
        rate=rate,
        low=low,
        high=high,
        wins=shares[0],
        losses=shares[1],
        ties=shares[2],
        decided=decided,
        covered=total / pairs,
    )


def krippendorff_alpha(patterns: Mapping[tuple[int, ...], int]) -> float | None:
    """Agreement beyond chance on nominal values: 1 is perfect, 0 is chance, below is worse.

    A pattern counts how often each value was given to one case, and maps to the number of such
    cases. None where nothing could be compared, or everybody always said the same.
    Source: K. Krippendorff, *Content Analysis*, 4th edition, 2018, 12.3.4.
    """
    observed, totals, count = 0.0, Counter[int](), 0
    for pattern, cases in patterns.items():
        labels = sum(pattern)
        if labels < 2 or cases <= 0:
            continue
        count += cases * labels
        observed += cases * (labels**2 - sum(each**2 for each in pattern)) / (labels - 1)
        for value, each in enumerate(pattern):
            totals[value] += cases * each
    expected = count**2 - sum(each**2 for each in totals.values())
    return 1.0 - (count - 1) * observed / expected if expected else None


def offered(case: Case) -> str:
    """Names the tally that a case raises by becoming one."""
    return f"{_OFFERED}|{case.trial}|{stratum_of(case)}"


def decided(case: Case, outcome: Outcome) -> str:
    """Names the tally that a case raises by being decided."""
    return f"{_DECIDED}|{case.trial}|{stratum_of(case)}|{_OUTCOMES[outcome]}"


def agreement(case: Case, labels: Sequence[Label]) -> str | None:
    """Names the tally that these labels of a case belong to; None where there is no second one.

    Only the labels that every case gets are compared: the further one that a conflict asks for
    would make conflicts weigh more.
    """
    planned = labels[: case.labels_needed]
    if len(planned) < 2:
        return None
    counts = Counter(value_of(case, label) for label in planned)
    values = (counts[value] for value in ("stable", "candidate", "both", "neither"))
    return f"{_AGREEMENT}|{','.join(map(str, values))}"


def changes(before: Iterable[str | None], after: Iterable[str | None]) -> Mapping[str, int]:
    """By how much each tally changes that is only on one side."""
    found = Counter(name for name in after if name)
    found.subtract(name for name in before if name)
    return {name: change for name, change in found.items() if change}


def read_win_rates(tallies: Mapping[str, int]) -> Mapping[str, WinRate]:
    """By trial, the newest first, where any case of it is decided."""
    strata: dict[str, dict[str, Counter[str]]] = {}
    for name, count in tallies.items():
        kind, _, rest = name.partition("|")
        if kind not in (_OFFERED, _DECIDED):
            continue
        trial, inclusion, band, *result = rest.split("|")
        if not trial:  # what asks about labels, and compares no versions
            continue
        counts = strata.setdefault(trial, {}).setdefault(f"{inclusion}|{band}", Counter())
        counts[result[0] if result else _OFFERED] += count
    rates = {
        trial: win_rate(
            Stratum(float(name.partition("|")[0]), **counts) for name, counts in each.items()
        )
        for trial, each in strata.items()
    }
    newest = sorted(rates.items(), key=lambda each: _age(each[0]))
    return {trial: rate for trial, rate in newest if rate is not None}


def pair_counts_of(tallies: Mapping[str, int]) -> Mapping[tuple[str, str], tuple[int, int]]:
    """By trial and stratum: how many cases were offered, and how many of them are decided."""
    offered_, decided_ = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name, count in tallies.items():
        kind, _, rest = name.partition("|")
        if kind not in (_OFFERED, _DECIDED):
            continue
        trial, inclusion, band, *_ = rest.split("|")
        (offered_ if kind == _OFFERED else decided_)[trial, f"{inclusion}|{band}"] += count
    return {key: (offered_[key], decided_[key]) for key in {*offered_, *decided_} if key[0]}


def read_agreement(tallies: Mapping[str, int]) -> Agreement:
    patterns = {
        tuple(map(int, name.partition("|")[2].split(","))): count
        for name, count in tallies.items()
        if name.startswith(f"{_AGREEMENT}|")
    }
    return Agreement(krippendorff_alpha(patterns), sum(patterns.values()))


def _age(trial: str) -> tuple[int, str]:
    """The newest first: a trial's id ends in the revision that began it."""
    revision = trial.rpartition(".")[2]
    return -int(revision) if revision.isdecimal() else 0, trial


def _offered(stratum: Stratum) -> int:
    # What was decided was offered, even where the tally is from before offers were counted.
    return max(stratum.offered, stratum.decided)


def _effective_size(
    rate: float, weights: Sequence[float], labelled: Sequence[Stratum], total: float
) -> float:
    """How many labels of a simple random sample would tell as much."""
    pairs = list(zip(weights, labelled, strict=True))
    kish = total**2 / sum(weight**2 * each.decided for weight, each in pairs)
    linearised = (
        sum(
            weight**2
            * (each.wins * (1 - rate) ** 2 + each.losses * rate**2 + each.ties * (0.5 - rate) ** 2)
            for weight, each in pairs
        )
        / total**2
    )
    spread = rate * (1 - rate)
    return min(kish, spread / linearised) if spread and linearised else kish
